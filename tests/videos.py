"""Small test videos made on the spot, and the plainest way to read them back: the oracle of the decoding tests."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from pipeline.types import UInt8, Video

Clip = Mapping[str, Any]  # keyword arguments of encode_video
# What each encoder is told so that a test does not wait for it.
ENCODER_OPTIONS: dict[str, dict[str, str]] = {
    "libx264": {"preset": "veryfast", "threads": "1", "sc_threshold": "0"},
    "libx265": {"preset": "ultrafast", "x265-params": "log-level=none:pools=none:frame-threads=1"},
    "libvpx": {"deadline": "realtime", "cpu-used": "8", "auto-alt-ref": "1"},
    "libvpx-vp9": {"deadline": "good", "cpu-used": "8", "lag-in-frames": "16", "auto-alt-ref": "1"},
    "libsvtav1": {"preset": "12", "svtav1-params": "lp=1"},
}


def moving_picture(i: int, size: tuple[int, int]) -> UInt8:
    """(H, W, 3) picture `i`, unlike every other: a gradient that moves, a block that jumps, grain. `size` is (W, H)."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width]
    picture = np.stack([(x * 2 + i * 3) % 256, (y * 3 + i * 5) % 256, (x + y + i * 7) % 256], axis=-1)
    side = max(1, height // 4)
    top, left = (i * 11) % max(1, height - side), (i * 17) % max(1, width - side)
    picture[top : top + side, left : left + side] = (255, 255 - i % 200, i % 256)
    grain = np.random.default_rng(i).integers(-12, 13, picture.shape)
    return np.clip(picture + grain, 0, 255).astype(np.uint8)


def encode_video(
    path: Path,
    pictures: Iterable[UInt8] | None = None,
    *,
    codec: str = "libx264",
    n_frames: int = 90,
    size: tuple[int, int] = (96, 64),
    fps: Fraction | int = 30,
    gop: int | None = None,
    b_frames: int | None = None,
    options: Mapping[str, str] | None = None,
    container_options: Mapping[str, str] | None = None,
    pts: Sequence[int] | None = None,
    time_base: Fraction | None = None,
    pixel_format: str = "yuv420p",
    pixel_aspect: Fraction | None = None,
    rotation: int = 0,
) -> Path:
    """Encodes (H, W, 3) pictures (`n_frames` moving ones unless given) into `path`; the suffix names the container.

    Args:
        size: (width, height) of the moving pictures.
        gop, b_frames: The encoder's own choice unless given.
        options: Of the encoder, over `ENCODER_OPTIONS`.
        container_options: Of the muxer.
        pts: A time for each picture in ticks of `time_base`; else constant `fps`.
        rotation: Degrees written into the display matrix.
    """
    given = [moving_picture(i, size) for i in range(n_frames)] if pictures is None else list(pictures)
    height, width = given[0].shape[:2]
    tick = time_base or 1 / Fraction(fps)
    with av.open(str(path), "w", options=dict(container_options or {})) as container:
        stream: Any = container.add_stream(codec, rate=Fraction(fps))
        context = stream.codec_context
        context.width, context.height, context.pix_fmt = width, height, pixel_format
        context.time_base = stream.time_base = tick
        context.options = {**ENCODER_OPTIONS.get(codec, {}), **(options or {})}
        if gop is not None:
            context.gop_size = gop
        if b_frames is not None:
            context.max_b_frames = b_frames
        if pixel_aspect is not None:
            context.sample_aspect_ratio = pixel_aspect
        if rotation:
            stream.set_display_rotation(rotation)
        for i, picture in enumerate(given):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixel_format)
            frame.pts, frame.time_base = (pts[i] if pts is not None else i), tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@dataclass(frozen=True)
class PlainFrame:
    """A frame as plain decoding gives it: exact time, digest of its pixels, whether the container marks it
    as a keyframe (the decoder's own mark differs: it counts recovery points)."""

    seconds: Fraction
    digest: bytes
    keyframe: bool


def pixel_digest(frame: av.VideoFrame) -> bytes:
    """Digest of the pixels in the file's own format, without the padding at the ends of rows."""
    try:
        pixels = frame.to_ndarray().tobytes()
    except (ValueError, AssertionError):  # a planar format or an odd size that PyAV has no array for
        rows = [np.frombuffer(bytes(plane), np.uint8).reshape(-1, plane.line_size) for plane in frame.planes]
        widths = [
            plane.width * (2 if component.bits > 8 else 1)
            for plane, component in zip(frame.planes, frame.format.components, strict=True)
        ]
        pixels = b"".join(row[:, :width].tobytes() for row, width in zip(rows, widths, strict=True))
    return hashlib.blake2b(pixels, digest_size=16).digest()


def plain_frames(path: Path) -> list[PlainFrame]:
    """Every frame of the first video stream, with FFmpeg's defaults, on the container's time line."""
    with av.open(str(path), metadata_errors="replace") as container:
        stream = container.streams.video[0]
        zero = Fraction(container.start_time or 0, av.time_base)
        keyframes: set[int | None] = set()
        frames: list[PlainFrame] = []
        for packet in container.demux(stream):
            if packet.is_keyframe and packet.size:
                keyframes.add(packet.pts)
            for frame in packet.decode():
                if frame.pts is None or frame.time_base is None:
                    raise ValueError(f"{path}: a frame without a time is no oracle")
                if not frames:  # the container's whole microseconds may round past it
                    zero = min(zero, frame.pts * frame.time_base)
                seconds = frame.pts * frame.time_base - zero
                frames.append(PlainFrame(seconds, pixel_digest(frame), frame.pts in keyframes))
    return frames


def video(path: Path | str, video_id: str | None = None, **more: Any) -> Video:
    """The catalog's entry for a file, as far as decoding cares."""
    known = {"content": "0" * 32, "path": str(path), "size_bytes": 0, "mtime_ns": 0, "ctime_ns": 0}
    return Video(video_id=Path(path).stem if video_id is None else video_id, **{**known, **more})
