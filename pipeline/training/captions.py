"""From texts to examples: which video a text means, and which of its tokens."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.base import Encoder
from pipeline.annotations import Caption, read_captions, recognise
from pipeline.collection import Snapshot
from pipeline.commits import FEATURES
from pipeline.embed import TEXTS_PER_BATCH, encode_texts
from pipeline.errors import UsageError
from pipeline.files import write_file
from pipeline.output import number_of
from pipeline.training.bank import FeatureBank
from pipeline.types import Float64

TRAINING_SUBSETS = {"youcookii": "training", "msrvtt": "train"}
LEAST_WORDS, MOST_WORDS = 8, 64  # of a text that `overlapped` clips go with (docs/METHOD.md section 3)
MANY = 3  # examples of what was left out


@dataclass(frozen=True, slots=True)
class SpokenOf:
    """Texts and the tokens [start, stop) of the bank's videos that they speak of: `videos` (M,), `spans` (M, 2)."""

    texts: list[str]
    videos: NDArray[np.int64]
    spans: NDArray[np.int64]

    def digest(self, video_ids: Sequence[str], lengths: NDArray[np.int64]) -> str:
        """Of the texts, what they speak of, and the lengths of these videos: a training goes on only with the same."""
        digest = hashlib.sha256(texts_digest(self.texts).encode())
        for video in np.unique(self.videos).tolist():
            digest.update(f"{video_ids[video]} {lengths[video]}\0".encode("utf-8", "surrogateescape"))
        digest.update(self.videos.tobytes() + np.ascontiguousarray(self.spans).tobytes())
        return digest.hexdigest()


def read_texts(
    snapshot: Snapshot,
    bank: FeatureBank,
    path: Path | None,
    subset: str | None,
    merge: bool,
    say: Callable[[str], None],
) -> SpokenOf:
    """The texts to learn from.

    Args:
        path: A file of captions in any form that `pipeline.annotations` reads; None: the texts that were found with the
            videos.
        subset: Of a file that has several; None: the one that is meant for training.
        merge: Neighbouring cues become one text until it has `LEAST_WORDS` words.
        say: Gets what was left out.

    Raises:
        UsageError: No text belongs to a video of the collection.
    """
    rows: Iterable[Caption]
    if path is None:
        rows = _own_texts(snapshot)
    else:
        rows = read_captions(path, subset=subset or TRAINING_SUBSETS.get(recognise(path))).rows
    matched, left_out = _match(rows, snapshot, bank)
    for line in left_out:
        say(line)
    if not matched:
        raise UsageError(
            f"{path}: none of its texts belongs to a video of {snapshot.collection.folder}"
            if path
            else f"the videos of {snapshot.collection.folder} have no texts",
            "A text names its video by id, file name, or file name without extension: "
            '--texts FILE with lines like {"video": "clip.mp4", "caption": "someone whisks eggs"}.',
        )
    if merge:
        matched = list(_merged(matched))
    return _spoken_of(matched, bank, say)


def _own_texts(snapshot: Snapshot) -> Iterator[Caption]:
    for video in snapshot.videos(FEATURES):
        for text in video.texts:
            yield Caption(video.video_id, text.text, text.start_seconds, text.end_seconds)


def video_numbers(snapshot: Snapshot, bank: FeatureBank) -> dict[str, int | None]:
    """Every name of a video, its id, file name, and file name without extension -> its number in the bank; None where
    a name fits several."""
    by_id = {video_id: number for number, video_id in enumerate(bank.video_ids)}
    numbers: dict[str, int | None] = {}
    for video_id, path in snapshot.state.paths.items():
        if (number := by_id.get(video_id)) is not None:
            file_name = os.path.basename(path)
            for name in {file_name, os.path.splitext(file_name)[0]}:
                numbers[name] = number if numbers.get(name, number) == number else None
    return {**numbers, **by_id}  # an id is never in doubt


def _match(
    rows: Iterable[Caption], snapshot: Snapshot, bank: FeatureBank
) -> tuple[list[tuple[int, Caption]], list[str]]:
    """The rows with the number of their video, and lines about those without."""
    numbers = video_numbers(snapshot, bank)
    matched: list[tuple[int, Caption]] = []
    unknown: dict[str, int] = {}
    ambiguous: dict[str, int] = {}
    for row in rows:
        found = numbers.get(row.video, -1)
        if found is None:
            ambiguous[row.video] = ambiguous.get(row.video, 0) + 1
        elif found < 0:
            unknown[row.video] = unknown.get(row.video, 0) + 1
        else:
            matched.append((found, row))
    lines = []
    for names, why in (
        (unknown, "name a video that the collection does not have"),
        (ambiguous, "name one that fits several of its videos"),
    ):
        if names:
            shown = ", ".join(sorted(names)[:MANY]) + (", ..." if len(names) > MANY else "")
            lines.append(f"left out: {number_of(sum(names.values()), 'text')} {why} ({shown})")
    return matched, lines


def _merged(rows: Sequence[tuple[int, Caption]]) -> Iterator[tuple[int, Caption]]:
    """Cues of one video, in order of time, joined until they have enough words; texts without a span stay apart."""
    timed = [(number, row) for number, row in rows if row.start_seconds is not None]
    yield from ((number, row) for number, row in rows if row.start_seconds is None)
    timed.sort(key=lambda each: (each[0], each[1].start_seconds))
    words: list[str] = []
    span = (0.0, 0.0)
    for at, (number, row) in enumerate(timed):
        start, end = float(row.start_seconds or 0.0), float(row.end_seconds or 0.0)
        span = (min(span[0], start), max(span[1], end)) if words else (start, end)
        words += row.text.split()
        last_of_video = at + 1 == len(timed) or timed[at + 1][0] != number
        if len(words) >= LEAST_WORDS or last_of_video:
            yield number, Caption(row.video, " ".join(words[:MOST_WORDS]), *span)
            words = []


def _spoken_of(rows: Sequence[tuple[int, Caption]], bank: FeatureBank, say: Callable[[str], None]) -> SpokenOf:
    texts: list[str] = []
    videos: list[int] = []
    spans: list[tuple[int, int]] = []
    beyond = 0
    times: tuple[int, Float64, float] | None = None
    for number, row in sorted(rows, key=lambda each: each[0]):
        span: tuple[int, int] | None = (0, int(bank.lengths[number]))
        if row.start_seconds is not None and row.end_seconds is not None:
            if times is None or times[0] != number:
                times = (number, *bank.times(number))
            span = tokens_between(times[1], times[2], row.start_seconds, row.end_seconds)
        if span is None:
            beyond += 1
            continue
        texts.append(row.text)
        videos.append(number)
        spans.append(span)
    if beyond:
        say(f"left out: {number_of(beyond, 'text')} of a time after the end of the video")
    if not texts:
        raise UsageError("every text speaks of a time after the end of its video", "Spans are in seconds.")
    return SpokenOf(texts, np.array(videos, np.int64), np.array(spans, np.int64))


def tokens_between(pts_seconds: Float64, span_seconds: float, start: float, end: float) -> tuple[int, int] | None:
    """The tokens [first, last) that cover some of the time from start to end, at least one; None after the end."""
    if start >= pts_seconds[-1] + span_seconds:
        return None
    first = int(np.searchsorted(pts_seconds + span_seconds, start, side="right"))
    last = int(np.searchsorted(pts_seconds, end, side="left"))
    return first, max(last, first + 1)


def texts_digest(texts: Sequence[str]) -> str:
    """Of texts in their order."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def text_vectors(
    spoken_of: SpokenOf, folder: Path, fingerprint: str, load: Callable[[], Encoder], check: Callable[[], None]
) -> NDArray[np.float16]:
    """(M, D) vectors of the base encoder, float16, mapped from a file that is made once for these texts and encoder.

    Args:
        folder: Where the file is kept.
        load: The encoder, called only when there is no such file.
        check: Called between batches; raises to stop.
    """
    key = hashlib.sha256(json.dumps([texts_digest(spoken_of.texts), fingerprint]).encode()).hexdigest()[:16]
    path = folder / f"texts-{key}.npy"
    if not path.exists():
        encoder = load()
        unique = list(dict.fromkeys(spoken_of.texts))
        at = {text: number for number, text in enumerate(unique)}
        rows = np.empty((len(unique), encoder.spec.dim), np.float16)
        for start in range(0, len(unique), TEXTS_PER_BATCH):
            check()
            rows[start : start + TEXTS_PER_BATCH] = encode_texts(encoder, unique[start : start + TEXTS_PER_BATCH])
        order = np.array([at[text] for text in spoken_of.texts])
        write_file(path, lambda temporary: _save(temporary, rows[order]))
    mapped: NDArray[np.float16] = np.load(path, mmap_mode="r")
    return mapped


def _save(path: Path, array: NDArray[np.float16]) -> None:
    with path.open("wb") as file:  # np.save adds its extension to a name
        np.save(file, array)
