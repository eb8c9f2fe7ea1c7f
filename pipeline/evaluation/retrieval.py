"""Text-to-video and video-to-text retrieval (docs/METHOD.md section 5).

Queries are the annotated sentences. What is ranked are clips: an annotation with a span is about the frames that meet
it, one without about the whole video. Several sentences of one clip are several queries with the same right answer; the
other way round, the best-ranked of them counts. YouCookII's protocol takes each row as a clip of its own.

The published protocols score a clip as a whole. By moments, it has the score of the best of its moments, the runs of
its frames that lie in one scene of the video: what an index can find, at its best.
"""

from __future__ import annotations

import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from pipeline.annotations import Annotations, Caption
from pipeline.errors import UsageError
from pipeline.evaluate import (
    CUTOFFS,
    DUAL_SOFTMAX_TEMPERATURE,
    RankCounter,
    Ranks,
    dual_softmax,
    metrics_of_ranks,
    rank_rows,
)
from pipeline.evaluation.clips import Clips, VideoRows, rows_in_span
from pipeline.evaluation.matching import Matched
from pipeline.evaluation.material import Material, Options, intervals_of, split_of
from pipeline.evaluation.scoring import Block, mean_blocks, model_blocks, rescore_blocks

HELD_BYTES = 256 * 2**20  # a larger matrix is never whole in memory: its blocks are computed twice
NOTE_SECONDS = 30.0
TIE_RULES = {
    "average": "rank = 1 + greater + ties / 2",
    "optimistic": "rank = 1 + greater, every tie won: equal scores look perfect",
    "pessimistic": "rank = 1 + greater + ties",
}

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Clip:
    """What is ranked: a video of the collection, or a part of it."""

    video: str
    start_seconds: float | None
    end_seconds: float | None


@dataclass(frozen=True, slots=True)
class Pairs:
    """The sentences, the clips in order of their first sentence, and the clip of each sentence."""

    texts: list[str]
    clips: list[Clip]
    right: NDArray[np.intp]


def pair_up(annotations: Annotations[Caption], videos: Mapping[str, str] | None = None) -> Pairs:
    """Sentences and clips of the annotations.

    Args:
        videos: Annotated name -> id of the video; captions of others are left out. None: all, by their names.
    """
    texts: list[str] = []
    right: list[int] = []
    numbers: dict[tuple[Clip, int], int] = {}
    for row_number, caption in enumerate(annotations.rows):
        video = caption.video if videos is None else videos.get(caption.video)
        if video is None:
            continue
        clip = Clip(video, caption.start_seconds, caption.end_seconds)
        key = (clip, row_number if annotations.clip_per_row else -1)
        texts.append(caption.text)
        right.append(numbers.setdefault(key, len(numbers)))
    return Pairs(texts, [clip for clip, _ in numbers], np.array(right, np.intp))


def evaluate_retrieval(
    annotations: Annotations[Caption], material: Material, dual: bool = False, say: Say = lambda line: None
) -> dict[str, Any]:
    """Both directions over a collection, as the content of a report.

    Args:
        dual: Adds figures with a dual softmax, which are labelled.
        say: Told what takes time.

    Raises:
        UsageError: No annotated video is there, or one is ambiguous.
    """
    matched = material.match({caption.video for caption in annotations.rows})
    pairs = pair_up(annotations, {name: video.video_id for name, video in matched.found.items()})
    videos = {video.video_id: video for video in matched.found.values()}
    rows = material.read(videos.values())
    parts = [(rows[clip.video], _part_of(clip, rows[clip.video])) for clip in pairs.clips]
    by_moments = material.options.by == "moments"
    scenes = [video.scenes[part] for video, part in parts] if by_moments else None
    clips = Clips([video.features[part] for video, part in parts], scenes)
    say(f"Scoring {len(pairs.texts)} texts against {len(clips)} clips ({len(clips.features)} frames)")
    if material.model is not None:
        model = material.model

        def blocks() -> Iterator[Block]:
            return model_blocks(model, pairs.texts, clips)
    else:
        vectors = material.encode(pairs.texts)

        def blocks() -> Iterator[Block]:
            if material.options.score == "mean":
                return mean_blocks(vectors, clips)
            return rescore_blocks(vectors, clips, material.encoder.spec.temperature)

    content = _split(annotations, pairs, matched)
    scored = material.describe() | {"by": material.options.by, "frames_per_clip": clips.rows_per_clip}
    if by_moments:
        scored["moments_per_clip"] = clips.parts_per_clip
    leaked = material.own_texts(videos.values()) & set(pairs.texts)
    if leaked:
        scored["queries_that_selected"] = sum(text in leaked for text in pairs.texts)
    results = _results(pairs, blocks, np.float32, material.options, dual, say)
    return {"protocol": "retrieval", "split": content, "scored": scored, "index": material.index(), **results}


def evaluate_scores(
    annotations: Annotations[Caption], path: Path, options: Options, dual: bool = False, say: Say = lambda line: None
) -> dict[str, Any]:
    """Both directions of a ready matrix: a .npy of (texts, clips) in the order of the annotations.

    Raises:
        UsageError: It cannot be read, or has another shape or NaN.
    """
    pairs = pair_up(annotations)
    try:
        if path.exists() and not path.is_file():
            raise ValueError("a pipe or a device")
        scores = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not a .npy file of numbers"
        raise UsageError(f"{path}: {reason}", "Give an array of scores as numpy.save writes it.") from error
    shape = (len(pairs.texts), len(pairs.clips))
    if not isinstance(scores, np.ndarray) or scores.shape != shape or scores.dtype.kind != "f":
        what = f"{scores.dtype} of shape {scores.shape}" if isinstance(scores, np.ndarray) else "several arrays"
        raise UsageError(
            f"{path}: {what}, the annotations need floating-point scores of shape {shape}",
            "Rows are the sentences and columns the clips, both in the order of the annotations.",
        )
    at_once = max(1, HELD_BYTES // (8 * max(1, shape[1])))

    def blocks() -> Iterator[Block]:
        for start in range(0, shape[0], at_once):
            yield start, np.asarray(scores[start : start + at_once])

    try:
        results = _results(pairs, blocks, scores.dtype, options, dual, say)
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from error
    return {
        "protocol": "retrieval",
        "split": _split(annotations, pairs, None),
        "scored": {"score": "matrix", "matrix": path.name},
        "index": None,
        **results,
    }


def _part_of(clip: Clip, video: VideoRows) -> slice:
    """The rows of its video that a clip has."""
    if clip.start_seconds is None or clip.end_seconds is None:
        return slice(None)
    return rows_in_span(video, clip.start_seconds, clip.end_seconds)


def _split(annotations: Annotations[Caption], pairs: Pairs, matched: Matched | None) -> dict[str, Any]:
    per_video = Counter(pairs.clips[number].video for number in pairs.right.tolist())
    counts = np.array(list(per_video.values()))
    used = {"texts": len(pairs.texts), "clips": len(pairs.clips), "videos": len(per_video)}
    spread = {"least": int(counts.min()), "mean": float(counts.mean()), "most": int(counts.max())}
    names = {caption.video for caption in annotations.rows}
    return split_of(annotations, names, matched, used) | {"captions_per_video": spread}


def _results(
    pairs: Pairs, blocks: Callable[[], Iterator[Block]], dtype: DTypeLike, options: Options, dual: bool, say: Say
) -> dict[str, Any]:
    """Ranks of both directions: from the whole matrix where it is small, else from its blocks, computed twice."""
    shape = (len(pairs.texts), len(pairs.clips))
    size = np.dtype(dtype).itemsize * shape[0] * shape[1]
    if dual and size > HELD_BYTES:
        raise UsageError(
            f"a dual softmax needs the whole matrix of {shape[0]} x {shape[1]} scores in memory "
            f"({size / 2**20:.0f} MiB, at most {HELD_BYTES // 2**20})",
            "Leave --dual-softmax out, or evaluate fewer texts.",
        )
    counter = RankCounter(shape, pairs.right)
    scores = np.empty(shape, dtype) if size <= HELD_BYTES else None
    pace = _Pace(say, shape[0])
    for start, block in blocks():
        counter.add_rows(start, block)
        if scores is not None:
            scores[start : start + len(block)] = block
        pace(start + len(block), "scored")
    for start, block in blocks() if scores is None else [(0, scores)]:
        counter.add_columns(start, block)
        pace(start + len(block), "scored again, for the ranks of the videos' texts")
    results = [
        _result("text to video", counter.rows(), options, None),
        _result("video to text", counter.columns(), options, None),
    ]
    if dual and scores is not None:
        owners: list[list[int]] = [[] for _ in pairs.clips]
        for text, clip in enumerate(pairs.right.tolist()):
            owners[clip].append(text)
        for direction, ranks in (
            ("text to video", rank_rows(dual_softmax(scores), pairs.right)),
            ("video to text", rank_rows(dual_softmax(scores.T), owners)),
        ):
            results.append(_result(direction, ranks, options, DUAL_SOFTMAX_TEMPERATURE))
    ties = {"ties": TIE_RULES[options.ties], "chance": _chance(shape[1])}
    return ties | intervals_of(options, "queries") | {"results": results}


def _chance(n_items: int) -> dict[str, float]:
    """What any order of the clips gives a text on average."""
    shares = {f"r{k}": min(1.0, k / n_items) for k in CUTOFFS}
    return shares | {"median_rank": (n_items + 1) / 2, "mean_rank": (n_items + 1) / 2}


def _result(direction: str, ranks: Ranks, options: Options, temperature: float | None) -> dict[str, Any]:
    metrics = metrics_of_ranks(ranks, options.draws, options.seed, options.ties)
    return {
        "direction": direction,
        "dual_softmax": temperature,
        "queries": metrics.n_queries,
        "items": metrics.n_items,
        "tied": metrics.tied,
        "values": {name: getattr(metrics, name) for name in ("r1", "r5", "r10", "median_rank", "mean_rank")},
        "intervals": {name: list(interval) for name, interval in metrics.intervals.items()},
    }


class _Pace:
    """A line now and then on how far the scoring is."""

    def __init__(self, say: Say, total: int) -> None:
        self._say, self._total = say, total
        self._last = time.monotonic()

    def __call__(self, done: int, what: str) -> None:
        if time.monotonic() - self._last >= NOTE_SECONDS:
            self._last = time.monotonic()
            self._say(f"  {done} of {self._total} texts {what}")
