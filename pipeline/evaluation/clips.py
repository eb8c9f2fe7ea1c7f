"""Clips as the rows of their frames: what of a video an annotation with a span speaks of, and many clips end to end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.select import pool
from pipeline.types import Float32, Float64


@dataclass(frozen=True, slots=True, repr=False)
class VideoRows:
    """The frames of one video that an evaluation looks at: all of them, or those that a selector kept.

    Attributes:
        features: (K, D) float32 unit rows, in order of time.
        pts_seconds: (K,) float64.
        span_seconds: What one row covers.
        duration_seconds: Of the video; 0 where it is not known.
    """

    features: Float32
    pts_seconds: Float64
    span_seconds: float
    duration_seconds: float


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
    """C clips of one or more rows each, end to end: clip c has the rows [offsets[c], offsets[c + 1]) of `features`."""

    def __init__(self, clips: Sequence[Float32]) -> None:
        self.features: Float32 = np.concatenate(clips)
        self.offsets: NDArray[np.int64] = np.cumsum([0, *map(len, clips)])

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def clip(self, number: int) -> Float32:
        """(T, D) rows of one clip."""
        return self.features[self.offsets[number] : self.offsets[number + 1]]

    def all(self) -> list[Float32]:
        """The rows of every clip."""
        return [self.clip(number) for number in range(len(self))]

    def means(self) -> Float32:
        """(C, D) unit rows: each clip's pooled vector, as an index has it."""
        return np.stack([pool(rows, np.zeros(len(rows), np.float32)) for rows in self.all()])

    @property
    def rows_per_clip(self) -> float:
        """Mean number of frames a clip is scored by."""
        return len(self.features) / len(self)
