"""Moments (temporal grounding): for each sentence the part of its video that shows it, against the annotated span."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from pipeline.annotations import Annotations, Caption
from pipeline.errors import UsageError
from pipeline.evaluate import moment_metrics, temporal_iou
from pipeline.evaluation.clips import VideoRows
from pipeline.evaluation.material import Material, intervals_of, result_of, split_of
from pipeline.probes import EVERYDAY_TEXTS
from pipeline.rescore import Background, find_moments, score_frames
from pipeline.types import Float64


def evaluate_moments(annotations: Annotations[Caption], material: Material) -> dict[str, Any]:
    """IoU of each query's best moment, and of the whole video for comparison, as the content of a report.

    The moment is what a search would show first in that video (`pipeline.rescore.find_moments`, over all frames and
    the moments that they are pooled to), with the annotated videos as the collection whose background it stands out
    from. A sentence annotated twice in one video is one query, right where it meets either span.

    Raises:
        UsageError: An annotation without a span; no annotated video is there, or one is ambiguous.
    """
    without = sum(caption.start_seconds is None for caption in annotations.rows)
    if without:
        raise UsageError(f"{without} of {len(annotations.rows)} annotations have no start and end: no moment to find")
    names = {caption.video for caption in annotations.rows}
    matched = material.match(names)
    rows = material.read({video.video_id: video for video in matched.found.values()}.values())
    spans: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for caption in annotations.rows:
        if caption.video in matched.found and caption.start_seconds is not None and caption.end_seconds is not None:
            query = (matched.found[caption.video].video_id, caption.text)
            spans.setdefault(query, []).append((caption.start_seconds, caption.end_seconds))
    vectors = material.encode([text for _, text in spans])
    background, temperature = _background_of(rows.values(), material), material.encoder.spec.temperature
    found, whole = [], []
    for ((video_id, _), true), vector in zip(spans.items(), vectors, strict=True):
        video = rows[video_id]
        duration = video.duration_seconds or None
        scores, level = score_frames(vector, video.features), background.of(vector)
        best = find_moments(scores, video.moments, video.span_seconds, level, temperature, duration)[0]
        last = float(video.pts_seconds[-1]) + video.span_seconds
        found.append(_best_iou(best.start_seconds, best.end_seconds, true))
        whole.append(_best_iou(0.0, duration or last, true))
    options = material.options
    used = {"queries": len(spans), "videos": len(rows)}
    return {
        "protocol": "moments",
        "split": split_of(annotations, names, matched, used),
        "scored": material.describe() | {"score": "moments", "background_videos": len(rows)},
        **intervals_of(options, "queries"),
        "results": [
            result_of("best moment", moment_metrics(np.array(found), options.draws, options.seed)),
            result_of("whole video, for comparison", moment_metrics(np.array(whole), options.draws, options.seed)),
        ],
    }


def _background_of(videos: Iterable[VideoRows], material: Material) -> Background:
    """What a query scores where nothing matches, in these videos, as an index would hold it."""
    means = [video.features.mean(axis=0, dtype=np.float64) for video in videos]
    frame_mean = np.mean(means, axis=0).astype(np.float32)
    everyday = material.encode_readable(EVERYDAY_TEXTS)
    return Background(frame_mean, float((everyday @ frame_mean).mean()) if len(everyday) else None)


def _best_iou(start: float, end: float, true: list[tuple[float, float]]) -> float:
    spans: Float64 = np.array(true, np.float64)
    return float(temporal_iou(np.array(start), np.array(end), spans[:, 0], spans[:, 1]).max())
