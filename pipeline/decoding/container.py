"""Opening a video file, hardened, and its time line."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import av

from pipeline.errors import VideoError
from pipeline.types import DecodeLimits

# Containers that hold their media themselves. No playlist (hls, dash, concat, sdp) and no file sequence (image2):
# those make FFmpeg open other files or addresses (an HLS playlist named .mp4 made PyAV 18.1 read another local file).
CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,ogg,asf,gif,rm,mxf,nut,wtv,dv,ivf,obu,"
    "h261,h263,h264,hevc,vvc,vc1,m4v,mjpeg,jpeg_pipe,png_pipe,webp_pipe,yuv4mpegpipe,mp3,aac,wav,flac"
)
ATTACHED_PICTURE, TIMED_THUMBNAILS, DEFAULT_STREAM = 0x400, 0x800, 0x1


@dataclass(slots=True)
class Report:
    """What was learned of a video while decoding; filled as it goes."""

    duration_seconds: float = 0.0
    span_seconds: float = 0.0
    pixel_aspect: float = 1.0  # width of a pixel over its height
    n_decoded: int = 0
    skipping: bool = True
    notes: list[str] = field(default_factory=list)
    alive: Callable[[], object] = bool  # called for every packet


def open_video(descriptor: int, limits: DecodeLimits) -> tuple[Any, Any]:
    """Opens the container and its one video stream, hardened. Returns (container, stream).

    A descriptor has no name that could be taken for an address, and a process that may open nothing can read it. Close
    one container of a descriptor before the next is opened: they share its offset.
    """
    os.lseek(descriptor, 0, os.SEEK_SET)
    try:
        container = av.open(
            "fd:",
            options={
                "fd": str(descriptor),
                "protocol_whitelist": "fd",
                "format_whitelist": CONTAINERS,
                "max_pixels": str(limits.max_pixels),  # of the frames that are decoded to see what they are
            },
            metadata_errors="replace",
            timeout=(30, 30),
        )
    except Exception as error:
        raise VideoError("invalid", f"not a readable video: {reason(error)}") from error
    streams = [s for s in container.streams.video if not s.disposition & (ATTACHED_PICTURE | TIMED_THUMBNAILS)]
    if not streams:
        container.close()
        raise VideoError("no_video", "no video stream")
    streams = [s for s in streams if s.codec_context is not None]
    if not streams:
        container.close()
        raise VideoError("no_decoder", "its video is in a format that FFmpeg does not know")
    # The default stream; among several the largest picture, then the first.
    stream = min(
        streams,
        key=lambda s: (not s.disposition & DEFAULT_STREAM, -s.codec_context.width * s.codec_context.height, s.index),
    )
    context = stream.codec_context
    if context.width * context.height > limits.max_pixels:
        container.close()
        raise VideoError("max_pixels", f"{context.width}x{context.height} is over {limits.max_pixels} pixels a frame")
    context.thread_count = 1  # the parallelism is over videos (fewer CPU seconds than frame threads)
    context.thread_type = "NONE"
    context.options = {"max_pixels": str(limits.max_pixels)}  # declared sizes lie; the decoder checks each frame
    return container, stream


def reason(error: BaseException) -> str:
    """The first line of a library's error, without the path it repeats."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0][:200]


def _time_zero(container: Any, stream: Any) -> Fraction | None:
    """The container's start on the stream's clock, in ticks: time 0 for a player. None when unknown."""
    if container.start_time is None:
        return None
    time_base: Fraction = stream.time_base
    return Fraction(container.start_time, 1_000_000) / time_base


def has_times(container: Any, stream: Any) -> bool:
    """Whether packets carry presentation times. AVI has none, and what FFmpeg makes up for these codecs is the decoding
    order: with B-frames, wrong for most frames."""
    codec = stream.codec_context
    return not (container.format.name == "avi" and codec.name in ("h264", "hevc") and codec.has_b_frames)


def frame_ticks(stream: Any) -> int:
    """Ticks from one frame to the next at the declared rate; 25 a second where that is nonsense."""
    rate: Fraction = stream.average_rate or stream.guessed_rate or Fraction(25)
    if not 1 <= rate <= 240:
        rate = Fraction(25)
    return max(1, round(1 / (rate * Fraction(stream.time_base))))


def _seconds(ticks: int | None, time_base: Fraction) -> float | None:
    return None if ticks is None else float(ticks * time_base)


class Clock:
    """Turns ticks into seconds on the video's time line and keeps the report."""

    def __init__(self, container: Any, stream: Any, report: Report) -> None:
        self.time_base: Fraction = stream.time_base
        self.zero = _time_zero(container, stream)
        self.report = report
        ratio = stream.sample_aspect_ratio
        report.pixel_aspect = float(ratio) if ratio and 0.1 < ratio < 10 else 1.0
        self.frame_seconds = float(frame_ticks(stream) * stream.time_base)
        self.n_hidden = 0  # frames that the file's edit list hides
        lengths = [container.duration and container.duration / 1_000_000, _seconds(stream.duration, stream.time_base)]
        self.declared_seconds = min((length for length in lengths if length), default=0.0)
        self.last_pts: int | None = None

    def zero_or(self, pts: int) -> int:
        return pts if self.zero is None else round(self.zero)

    def saw(self, pts: int | None) -> None:
        """A packet or frame at `pts` exists; the first one sets time 0 where the container does not."""
        self.report.alive()
        if pts is None:
            return
        if self.zero is None or (self.last_pts is None and pts < self.zero):
            self.zero = Fraction(pts)
        self.last_pts = pts if self.last_pts is None else max(pts, self.last_pts)

    def seconds(self, pts: int) -> float:
        return float((pts - (self.zero or 0)) * self.time_base)

    def note(self, text: str) -> None:
        if text not in self.report.notes:
            self.report.notes.append(text)


def error_count() -> int:
    """How many errors FFmpeg has logged in this process."""
    return int(av.logging.get_last_error()[0])


class _Oversize(logging.Handler):
    """Hears that FFmpeg refused a picture over `max_pixels`: the codes of its errors do not tell."""

    seen = False

    def emit(self, record: logging.LogRecord) -> None:
        self.seen = self.seen or "max pixel count" in record.getMessage()


def _count_errors_quietly() -> None:
    """FFmpeg's errors are counted, not printed: a damaged file says thousands. Skipping relies on the count."""
    av.logging.set_level(av.logging.ERROR)
    logger = logging.getLogger("libav")
    logger.propagate = False
    logger.addHandler(oversize)


oversize = _Oversize()
_count_errors_quietly()
