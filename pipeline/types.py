"""The values that travel between the stages: frozen, slotted, checked where they are made.

N: sampled frames of a video. K: kept frames. D: the encoder's dimension. Times are seconds on the video's own
time line (0 is the start of the container), as a player shows them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
UInt8 = NDArray[np.uint8]
Bool = NDArray[np.bool_]

UNIT_TOLERANCE = 1e-3  # rows rounded to float16 keep their norm within 5e-4


def check_shape(name: str, array: NDArray[np.generic], shape: Sequence[int | None], dtype: type[np.generic]) -> None:
    """Raises ValueError unless `array` has this dtype and shape (None: any length)."""
    if array.dtype != np.dtype(dtype):
        raise ValueError(f"{name} is {array.dtype}, expected {np.dtype(dtype)}")
    if array.ndim != len(shape) or any(n is not None and n != m for n, m in zip(shape, array.shape, strict=True)):
        raise ValueError(f"{name} has shape {array.shape}, expected {tuple('any' if n is None else n for n in shape)}")


def check_unit_rows(name: str, rows: Float32) -> None:
    """Raises ValueError unless every row of `rows` (..., D) is finite and has norm 1."""
    norms = np.linalg.norm(rows, axis=-1)
    if not np.all(np.abs(norms - 1.0) <= UNIT_TOLERANCE):  # False for NaN as well
        raise ValueError(f"{name}: rows are not unit vectors (norms {norms.min():.4g} to {norms.max():.4g})")


def check_times(name: str, pts_seconds: Float64, n: int) -> None:
    """Raises ValueError unless there are `n` finite, non-decreasing times."""
    check_shape(name, pts_seconds, (n,), np.float64)
    if not np.all(np.isfinite(pts_seconds)) or np.any(np.diff(pts_seconds) < 0):
        raise ValueError(f"{name}: times are not finite and non-decreasing")


@dataclass(frozen=True, slots=True)
class TimedText:
    """A text about a video, or about the part of it from `start` to `end` seconds (both None: all of it)."""

    text: str
    start_seconds: float | None = None
    end_seconds: float | None = None

    def __post_init__(self) -> None:
        if (self.start_seconds is None) != (self.end_seconds is None):
            raise ValueError("a span needs both a start and an end")
        if self.start_seconds is not None and self.end_seconds is not None:
            if not (np.isfinite(self.start_seconds) and np.isfinite(self.end_seconds)):
                raise ValueError("a span must be finite")
            if self.end_seconds < self.start_seconds:
                raise ValueError(f"span ends before it starts ({self.start_seconds} > {self.end_seconds})")


@dataclass(frozen=True, slots=True)
class Video:
    """One video as the catalog found it.

    Attributes:
        video_id: The manifest's id, or else `content`; unique in a collection.
        content: Digest of size and sampled bytes (32 hex digits): the identity of the file's content.
        path: Absolute path as text (surrogateescape for names that are not UTF-8).
        ctime_ns: With size and mtime, tells whether `content` must be computed again.
        duration_seconds: Known only after decoding.
        text_notes: What of the text beside it could not be used, a line each.
    """

    video_id: str
    content: str
    path: str
    size_bytes: int
    mtime_ns: int
    ctime_ns: int
    duration_seconds: float | None = None
    texts: tuple[TimedText, ...] = ()
    text_notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FrameGeometry:
    """How a decoded frame becomes the encoder's input square.

    Attributes:
        height, width: Of the result, in pixels.
        resize: `shortest` resizes the shorter side and crops the centre; `squash` ignores the aspect ratio;
            `longest` fits the longer side and pads with `fill`; `bound` only shrinks, until the shorter side is
            `height`, and neither crops nor pads (frames on their way to disk).
        interpolation: `bicubic` or `bilinear`.
        exact: Resize as Pillow does (the encoder's own preprocessing) instead of in the decoder's scaler.
    """

    height: int
    width: int
    resize: Literal["shortest", "squash", "longest", "bound"] = "shortest"
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    fill: int = 0
    exact: bool = False


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    """What one video may cost; over it the video fails and the run goes on.

    There is no limit of time in all: a video may wait for the encoder as long as it must.

    Attributes:
        max_pixels: Of a frame, width times height, declared or decoded (code `max_pixels`).
        max_frames: Sampled (code `max_frames`).
        memory_bytes: Address space of its decoding process, some 220 MiB of it the process itself (code `memory`).
        stall_seconds: Without a sign of progress from the decoder (code `timeout`).
        cpu_seconds: Processor time (code `cpu_time`). The default lets ten hours of 1080p pass at 75 decoded frames a
            second, a fifth of what one processor core does with H.264.
    """

    max_pixels: int = 8192 * 4608
    max_frames: int = 200_000
    memory_bytes: int = 4 << 30
    stall_seconds: float = 60.0
    cpu_seconds: float = 4 * 3600.0


@dataclass(frozen=True, slots=True, repr=False)
class FrameFeatures:
    """Features of every sampled frame: `features` (N, D) float32 unit rows, `pts_seconds` (N,) float64.

    `span_seconds` is how much video one row stands for: row i covers [pts, pts + span).
    """

    video_id: str
    features: Float32
    pts_seconds: Float64
    span_seconds: float

    def __post_init__(self) -> None:
        check_shape("features", self.features, (None, None), np.float32)
        check_times("pts_seconds", self.pts_seconds, len(self.features))
        if len(self.features) == 0:
            raise ValueError("a video without frames has no features")
        check_unit_rows("features", self.features)

    def __repr__(self) -> str:
        return f"FrameFeatures({self.video_id!r}, features {self.features.shape})"


@dataclass(frozen=True, slots=True, repr=False)
class Selection:
    """Which frames a selector keeps: `scores` (N,) float32, `kept` (N,) bool with at least one True."""

    scores: Float32
    kept: Bool
    selector: str

    def __post_init__(self) -> None:
        check_shape("scores", self.scores, (None,), np.float32)
        check_shape("kept", self.kept, (len(self.scores),), np.bool_)
        if not self.kept.any():
            raise ValueError("a selection keeps at least one frame")
        if not np.all(np.isfinite(self.scores)):
            raise ValueError("scores are not finite")


@dataclass(frozen=True, slots=True, repr=False)
class Moments:
    """The M moments of one video, in order of time: what the index holds.

    Attributes:
        vectors: (M, D) float32 unit rows: normalised means of the moments' kept frames.
        start_seconds, end_seconds: (M,) float64: what they cover; no two overlap.
        n_frames: (M,) int64: how many of the video's kept frames each has, which follow one another.
    """

    vectors: Float32
    start_seconds: Float64
    end_seconds: Float64
    n_frames: Int64

    def __post_init__(self) -> None:
        n = len(self.vectors)
        check_shape("vectors", self.vectors, (None, None), np.float32)
        check_shape("start_seconds", self.start_seconds, (n,), np.float64)
        check_shape("end_seconds", self.end_seconds, (n,), np.float64)
        check_shape("n_frames", self.n_frames, (n,), np.int64)
        if n == 0 or self.n_frames.min() < 1:
            raise ValueError("a video has at least one moment, and a moment at least one frame")
        check_unit_rows("vectors", self.vectors)
        edges = np.stack([self.start_seconds, self.end_seconds], axis=1).reshape(-1)
        if not np.all(np.isfinite(edges)) or np.any(edges[1:] < edges[:-1]):
            raise ValueError("moments overlap, or are not in order of time")

    def __len__(self) -> int:
        return len(self.vectors)

    def __repr__(self) -> str:
        return f"Moments({len(self)} of {int(self.n_frames.sum())} frames)"

    @property
    def offsets(self) -> Int64:
        """(M + 1,): moment m has the kept frames [offsets[m], offsets[m + 1])."""
        return np.concatenate([[0], np.cumsum(self.n_frames)])


@dataclass(frozen=True, slots=True, repr=False)
class VideoEmbedding:
    """What the index and the search need of a video.

    Attributes:
        vector: (D,) float32 unit: normalised mean of the kept features.
        features: (K, D) float32 unit rows of the kept frames, in order of time.
        moments: What the kept frames are pooled to, scene by scene.
        pts_seconds, scores: (K,) of the kept frames.
        span_seconds: What one row covers.
        n_frames: How many frames were sampled (N).
        selector: Which selector made it; a video without text under `caption` says `uniform`.
    """

    video_id: str
    vector: Float32
    features: Float32
    moments: Moments
    pts_seconds: Float64
    scores: Float32
    span_seconds: float
    n_frames: int
    selector: str

    def __post_init__(self) -> None:
        check_shape("vector", self.vector, (None,), np.float32)
        check_shape("features", self.features, (None, len(self.vector)), np.float32)
        check_times("pts_seconds", self.pts_seconds, len(self.features))
        check_shape("scores", self.scores, (len(self.features),), np.float32)
        check_unit_rows("vector", self.vector)
        check_unit_rows("features", self.features)
        if not 1 <= len(self.features) <= self.n_frames:
            raise ValueError(f"{len(self.features)} frames kept of {self.n_frames}")
        if self.moments.vectors.shape[1] != len(self.vector) or self.moments.n_frames.sum() != len(self.features):
            raise ValueError(f"{self.moments} are not of {len(self.features)} kept frames of {len(self.vector)} values")
        first, last = self.pts_seconds[self.moments.offsets[:-1]], self.pts_seconds[self.moments.offsets[1:] - 1]
        if np.any(first < self.moments.start_seconds) or np.any(last > self.moments.end_seconds):
            raise ValueError("a kept frame lies outside its moment")

    def __repr__(self) -> str:
        return f"VideoEmbedding({self.video_id!r}, kept {len(self.features)} of {self.n_frames}, {self.moments})"


@dataclass(frozen=True, slots=True)
class Moment:
    """A run of frames that match the query: from `start` to `end` seconds, and its best frame's cosine."""

    start_seconds: float
    end_seconds: float
    score: float


@dataclass(frozen=True, slots=True)
class Hit:
    """One answer: `rank` from 1, `score` the cosine after re-scoring, `moments` best first.

    Where moments are asked for one by one, `moments` is the one that was found and `score` is its score.
    """

    rank: int
    video_id: str
    path: str
    score: float
    moments: tuple[Moment, ...] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one video in one stage. `seconds` is the wall time spent on it."""

    video_id: str
    path: str
    status: Literal["ok", "skipped", "failed", "removed"]
    stage: str
    code: str = ""
    message: str = ""
    attempts: int = 1
    seconds: float = 0.0
    notes: tuple[str, ...] = field(default=())
