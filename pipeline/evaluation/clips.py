"""Clips as the rows of their frames: what of a video an annotation with a span speaks of, and many clips end to end.

A clip is scored as a whole, as the published protocols do, or by its best moment, as an index finds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.moments import pool
from pipeline.types import Float32, Float64, Int64, Moments


@dataclass(frozen=True, slots=True, repr=False)
class VideoRows:
    """The frames of one video that an evaluation looks at: all of them, or those that a selector kept.

    Attributes:
        features: (K, D) float32 unit rows, in order of time.
        moments: Of these rows, by the scenes of all frames of the video.
        pts_seconds: (K,) float64.
        span_seconds: What one row covers.
        duration_seconds: Of the video; 0 where it is not known.
    """

    features: Float32
    moments: Moments
    pts_seconds: Float64
    span_seconds: float
    duration_seconds: float

    @property
    def scenes(self) -> Int64:
        """(K,) int64: the moment of each row, which is its scene; numbered from 0 in order of time."""
        return np.repeat(np.arange(len(self.moments), dtype=np.int64), self.moments.n_frames)


def rows_in_span(video: VideoRows, start_seconds: float, end_seconds: float) -> slice:
    """The rows whose [pts, pts + span) meets [start, end); the nearest row where none does, as in a gap.

    Rows are in order of time, so they are one run. A span without length is met by the row that holds that instant.
    """
    pts = video.pts_seconds
    first = int(np.searchsorted(pts + video.span_seconds, start_seconds, side="right"))
    end = int(np.searchsorted(pts, end_seconds, side="left" if end_seconds > start_seconds else "right"))
    if first < end:
        return slice(first, end)
    middles = pts + video.span_seconds / 2
    nearest = int(np.argmin(np.abs(middles - (start_seconds + end_seconds) / 2)))
    return slice(nearest, nearest + 1)


class Clips:
    """C clips of one or more rows each, end to end, in P parts: a clip's score is that of its best part.

    Args:
        clips: (T, D) float32 unit rows of each.
        scenes: (T,) int64 of each clip, the scenes of its rows: its parts are then its runs of equal scenes, which are
            moments. None: each clip is one part.

    Attributes:
        features: (M, D) float32, the rows of all clips.
        offsets: (C + 1,) int64: clip c has the rows [offsets[c], offsets[c + 1]).
        parts: (P + 1,) int64: part p has the rows [parts[p], parts[p + 1]).
        part_offsets: (C + 1,) int64: clip c has the parts [part_offsets[c], part_offsets[c + 1]).
    """

    def __init__(self, clips: Sequence[Float32], scenes: Sequence[Int64] | None = None) -> None:
        self.features: Float32 = np.concatenate(clips)
        self.offsets: Int64 = np.cumsum([0, *map(len, clips)])
        self.parts = self.offsets
        if scenes is not None:
            edges = np.diff(np.concatenate(scenes), prepend=-1, append=-1) != 0
            edges[self.offsets] = True  # two clips of one scene are no common part
            self.parts = np.flatnonzero(edges)
        self.part_offsets: Int64 = np.searchsorted(self.parts, self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def clip(self, number: int) -> Float32:
        """(T, D) rows of one clip."""
        return self.features[self.offsets[number] : self.offsets[number + 1]]

    def all(self) -> list[Float32]:
        """The rows of every clip."""
        return [self.clip(number) for number in range(len(self))]

    def means(self) -> Float32:
        """(P, D) float32 unit rows: each part's pooled vector."""
        parts = np.split(self.features, self.parts[1:-1])
        return np.stack([pool(rows, np.zeros(len(rows), np.float32)) for rows in parts])

    def best_of_parts(self, scores: Float32) -> Float32:
        """Scores of parts (n, P) -> scores of clips (n, C)."""
        best: Float32 = np.maximum.reduceat(scores, self.part_offsets[:-1], axis=1)
        return best

    @property
    def rows_per_clip(self) -> float:
        """Mean number of frames a clip is scored by."""
        return len(self.features) / len(self)

    @property
    def parts_per_clip(self) -> float:
        """Mean number of parts of a clip."""
        return (len(self.parts) - 1) / len(self)
