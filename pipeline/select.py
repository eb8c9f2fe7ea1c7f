"""FineCo frame selection: every sampled frame gets a score, the K highest are kept, their mean is the video's vector.

The FineCo paper (arXiv 2210.05039) says that the frames most informative for the text are the positives;
docs/METHOD.md section 1 fixes the exact form and section 2 says where the text comes from.

    docs/METHOD.md                         here
    h_1..h_T   tokens of the video         `h`, the features (T, D), unit rows
    z_t        text embedding              `z`, one row of `text_vectors` (M, D), unit rows
    s_i        <h_i, z_t>, the cosine      `s` (T,): over several texts, the highest of each frame. The temperature is
                                           left out: it is positive, so it changes no order
    K          max(1, ceil(ratio * T))     `n_kept(keep, T)`
    P, N       positives, negatives        `kept`, `~kept`
    selectors  caption, topics, uniform,   the functions of those names; `scorer` takes the place of the text's
               scorer, all                 scores with those of models.scorer

Everything is float32 on one video alone, so a video's selection never depends on which others are in the run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UsageError
from pipeline.moments import divide_in_time, moments_of, pool, typical_frames
from pipeline.types import (
    Bool,
    Float32,
    FrameFeatures,
    Selection,
    TimedText,
    VideoEmbedding,
    check_shape,
    check_unit_rows,
)

SELECTORS = ("caption", "topics", "uniform", "all", "scorer")

PAD_SECONDS = 1.0
# On both sides of a cue: subtitles appear with the speech and are gone before what they name has left the picture, and
# at the default of 1 frame/s it lets a cue shorter than a second still meet the frame before it and the one after it.

LEAST_COSINE = -1.0  # the score of a frame that no text speaks of: below every frame that one does

RATIO_SLACK = 1e-9  # 0.07 * 100 is 7.000000000000001 in binary; without this its ceiling would be 8


@dataclass(frozen=True, slots=True)
class Keep:
    """How many frames to keep: a share of them (`ratio`, in (0, 1]) or a number (`count`, 1 or more); never both."""

    ratio: float | None = None
    count: int | None = None

    def __post_init__(self) -> None:
        if (self.ratio is None) == (self.count is None):
            raise ValueError("a ratio or a count, one of the two")
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise UsageError(
                f"cannot keep a share of {self.ratio:g} of the frames: a ratio lies above 0 and up to 1.0",
                "write 0.25 for a quarter of the frames, or a whole number such as 8 for a count",
            )
        if self.count is not None and self.count < 1:
            raise UsageError(
                f"cannot keep {self.count} frames of a video: a count is 1 or more",
                "write a whole number such as 8, or 0.25 for a quarter of the frames",
            )


def parse_keep(text: str) -> Keep:
    """Reads `0.25` as a ratio and `8` as a count: a whole number is a count, a number with a point is a ratio.

    So `1` keeps one frame and `1.0` keeps all of them.

    Raises:
        UsageError: It is neither, or out of range.
    """
    text = text.strip()
    if re.fullmatch(r"-?[0-9]{1,9}", text):
        return Keep(count=int(text))
    if re.fullmatch(r"-?([0-9]+\.[0-9]*|\.[0-9]+)", text):
        return Keep(ratio=float(text))
    raise UsageError(
        f"cannot read {text!r} as how many frames to keep",
        "write 0.25 for a quarter of the frames, or a whole number such as 8 for a count",
    )


def n_kept(keep: Keep, n_frames: int) -> int:
    """K of docs/METHOD.md for T = `n_frames` >= 1: max(1, ceil(ratio * T)), or the count where there are as many."""
    if keep.ratio is not None:
        return max(1, math.ceil(keep.ratio * n_frames - RATIO_SLACK))
    return min(keep.count or 1, n_frames)


def select_frames(
    features: FrameFeatures,
    selector: str,
    keep: Keep,
    texts: Sequence[TimedText] = (),
    text_vectors: Float32 | None = None,
    predicted: Float32 | None = None,
) -> Selection:
    """Scores the frames of one video and keeps some.

    Args:
        selector: One of `SELECTORS`.
        keep: How many; `all` does not look at it.
        texts: The video's own texts for `caption`; the user's list for `topics` (spans are ignored there).
        text_vectors: (M, D) float32 unit rows, one for each text; None where there are no texts.
        predicted: (N,) float32, what models.scorer.score_frames_without_text says; for `scorer` alone.

    Returns:
        The selection. It names `uniform` when `caption` found no text for this video.

    Raises:
        UsageError: Unknown selector, or `topics` without a topic.
        ValueError: Texts and vectors do not fit each other or the features; `scorer` without predicted scores.
    """
    h = features.features
    if text_vectors is None:
        text_vectors = np.empty((0, h.shape[1]), np.float32)
    check_shape("text_vectors", text_vectors, (len(texts), h.shape[1]), np.float32)
    if len(texts):
        check_unit_rows("text_vectors", text_vectors)
    if selector == "caption":
        return caption(features, keep, texts, text_vectors)
    if selector == "topics":
        return topics(h, keep, text_vectors)
    if selector == "scorer":
        if predicted is None:
            raise ValueError("the selector 'scorer' needs predicted scores")
        check_shape("predicted", predicted, (len(h),), np.float32)
        return Selection(predicted, best_of_parts(predicted, keep), "scorer")
    if selector == "uniform":
        return uniform(h, keep)
    if selector == "all":
        return Selection(np.zeros(len(h), np.float32), np.ones(len(h), np.bool_), "all")
    raise UsageError(f"unknown selector {selector!r}", f"choose one of {', '.join(SELECTORS)}")


def caption(features: FrameFeatures, keep: Keep, texts: Sequence[TimedText], text_vectors: Float32) -> Selection:
    """The paper's setting: each text of the video keeps its K best frames, and their union is kept.

    A text with a span scores only the frames inside it. A count is a budget for the whole video: where the union is
    larger, each text's best frame goes first, then the highest scores.
    """
    h = features.features
    s = np.full(len(h), LEAST_COSINE, np.float32)
    kept = np.zeros(len(h), np.bool_)
    best_of_a_text = np.zeros(len(h), np.bool_)
    for text, z in zip(texts, text_vectors, strict=True):
        inside = frames_of(text, features)
        s_text = cosines(h[inside], z)
        if len(s_text) == 0:
            continue
        s[inside] = np.maximum(s[inside], s_text)
        positives = inside.start + best_first(s_text)[: n_kept(keep, len(s_text))]
        kept[positives] = True
        best_of_a_text[positives[0]] = True
    if not kept.any():
        return uniform(h, keep)
    if keep.count is not None and kept.sum() > keep.count:
        frames = np.flatnonzero(kept)
        # the last key decides first; frames equal in both stay in order of time
        order = np.lexsort((-s[frames], ~best_of_a_text[frames]))
        kept[frames[order[keep.count :]]] = False
    return Selection(s, kept, "caption")


def topics(h: Float32, keep: Keep, text_vectors: Float32) -> Selection:
    """Each frame is scored by the topic it shows best; the K best frames are kept."""
    if len(text_vectors) == 0:
        raise UsageError("the selector 'topics' needs at least one topic", "give a file with one topic on each line")
    s = np.einsum("td,md->tm", h, text_vectors).max(axis=1)
    return Selection(s, highest(s, keep), "topics")


def uniform(h: Float32, keep: Keep) -> Selection:
    """What covers the video without any text: the most typical frame of each of K groups in time.

    The groups are where the video changes least (`pipeline.moments`), so a short scene counts as much as a long one;
    docs/STUDY.md measures them against evenly spaced frames.
    """
    kept = np.zeros(len(h), np.bool_)
    kept[typical_frames(h, divide_in_time(h, n_kept(keep, len(h))))] = True
    return Selection(np.zeros(len(h), np.float32), kept, "uniform")


def evenly_spaced(n_frames: int, keep: Keep) -> Bool:
    """Which frames are the middles of K equal parts of the T frames, floor((i + 1/2) * T / K): the control."""
    n = n_kept(keep, n_frames)
    kept = np.zeros(n_frames, np.bool_)
    kept[(2 * np.arange(n) + 1) * n_frames // (2 * n)] = True  # in whole numbers, so no rounding moves a frame
    return kept


def frames_of(text: TimedText, features: FrameFeatures) -> slice:
    """The frames a text speaks of: those whose [pts, pts + span) meets its own span, padded; all without a span."""
    if text.start_seconds is None or text.end_seconds is None:
        return slice(0, len(features.features))
    pts = features.pts_seconds  # in order, so the frames are one run
    first = int(np.searchsorted(pts + features.span_seconds, text.start_seconds - PAD_SECONDS, side="right"))
    end = int(np.searchsorted(pts, text.end_seconds + PAD_SECONDS, side="right"))
    return slice(first, end)


def cosines(h: Float32, z: Float32) -> Float32:
    """s_i = <h_i, z> for unit rows `h` (T, D) and a unit vector `z` (D,).

    By einsum and not by BLAS: measured as fast, and equal rows get equal scores wherever they stand, which BLAS does
    not promise (two of 37 copies of one row differed in the last bit). A still video has thousands of equal frames.
    """
    scores: Float32 = np.einsum("td,d->t", h, z)
    return scores


def best_first(s: Float32) -> NDArray[np.intp]:
    """Positions from the highest score to the lowest; of equal scores, the earlier frame first."""
    return np.argsort(-s, kind="stable")


def highest(s: Float32, keep: Keep) -> Bool:
    """Which frames have the K highest scores (T,)."""
    kept = np.zeros(len(s), np.bool_)
    kept[best_first(s)[: n_kept(keep, len(s))]] = True
    return kept


def best_of_parts(s: Float32, keep: Keep) -> Bool:
    """Which frames have the highest score (T,) of their part, of K equal parts of the video.

    For scores that know no text: the K highest of all are often K frames of one scene, and the query may be about
    another (measured in docs/METHOD.md section 6).
    """
    n = n_kept(keep, len(s))
    edges = np.arange(n + 1) * len(s) // n
    kept = np.zeros(len(s), np.bool_)
    kept[[start + int(np.argmax(s[start:end])) for start, end in pairwise(edges.tolist())]] = True
    return kept


def embed_video(features: FrameFeatures, selection: Selection) -> VideoEmbedding:
    """What the store, the index and the search need of the video: kept frames, their moments, the pooled vector."""
    check_shape("kept", selection.kept, (len(features.features),), np.bool_)
    h, s = features.features[selection.kept], selection.scores[selection.kept]
    return VideoEmbedding(
        video_id=features.video_id,
        vector=pool(h, s),
        features=h,
        moments=moments_of(features, selection.kept, selection.scores),
        pts_seconds=features.pts_seconds[selection.kept],
        scores=s,
        span_seconds=features.span_seconds,
        n_frames=len(selection.kept),
        selector=selection.selector,
    )
