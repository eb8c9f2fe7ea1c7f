"""The sampled frames of one video: skipping where the stream allows it, else every frame in order."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
import numpy as np

from pipeline.decoding.container import (
    Clock,
    Report,
    error_count,
    frame_ticks,
    has_times,
    open_video,
    oversize,
    reason,
)
from pipeline.decoding.skipping import NotAsExpectedError, iter_keyframes, iter_samples
from pipeline.errors import VideoError
from pipeline.sampling import CellPicker, Sampling, fps_picker, frames_picker
from pipeline.types import DecodeLimits

Times = tuple[list[int], set[int]]  # sorted presentation times of all frames, and those of the keyframes
MAX_BAD_PACKETS = 300  # in a row without a frame: what follows is noise


def sample_frames(
    file: str | int, sampling: Sampling, report: Report, limits: DecodeLimits, skip: bool = True
) -> Iterator[Any]:
    """Decodes the sampled frames of one video.

    Args:
        file: A path, or an open descriptor of a file, which stays open.
        sampling: Which frames.
        report: Filled while decoding; complete when the iterator ends.
        limits: Of pixels and frames.
        skip: False decodes every frame, the plain way; the samples are the same.

    Yields:
        (seconds on the video's time line, av.VideoFrame), in order of time.

    Raises:
        VideoError: Codes `invalid`, `no_video`, `no_decoder`, `no_frames`, `max_pixels`, `max_frames`, `memory`.
    """
    if isinstance(file, str):
        with open(file, "rb", buffering=0) as opened:
            yield from sample_frames(opened.fileno(), sampling, report, limits, skip)
        return
    oversize.seen = False
    emitted = 0
    last_seconds = -np.inf
    for skipping in (True, False) if skip else (False,):
        report.skipping = skipping
        times: Times | None = None
        if sampling.mode != "fps":  # before the container is opened that is decoded: they share an offset
            try:
                times = _all_times(file, limits, skipping, report)
            except NotAsExpectedError:
                continue
        container, stream = open_video(file, limits)
        clock = Clock(container, stream, report)
        errors = error_count()
        try:
            for pts, frame in _samples(container, stream, sampling, clock, times, skipping):
                seconds = clock.seconds(pts)
                if seconds <= last_seconds:  # came out before the stream turned out to need the plain way
                    continue
                if frame.width * frame.height > limits.max_pixels:
                    raise VideoError("max_pixels", f"a frame of {frame.width}x{frame.height} pixels")
                emitted += 1
                if emitted > limits.max_frames:
                    raise VideoError("max_frames", f"more than {limits.max_frames} sampled frames")
                last_seconds = seconds
                yield seconds, frame
            break
        except NotAsExpectedError:
            continue
        finally:
            container.close()
    if not emitted and oversize.seen:
        raise VideoError("max_pixels", f"its pictures are over {limits.max_pixels} pixels")
    _finish_report(clock, report, emitted, error_count() - errors)


def _finish_report(clock: Clock, report: Report, emitted: int, errors: int) -> None:
    if not emitted:
        raise VideoError("no_frames", "no frame of it can be decoded")
    last = clock.seconds(clock.last_pts) if clock.last_pts is not None else 0.0
    report.duration_seconds = last + min(clock.frame_seconds, 1.0)
    declared = clock.declared_seconds
    if declared > report.duration_seconds + max(0.5, 0.02 * declared):
        clock.note(f"ends at {report.duration_seconds:.1f} s though it declares {declared:.1f} s")
    if clock.n_hidden:
        clock.note(f"frames hidden by the file's edit list: {clock.n_hidden}")
    if errors:
        clock.note(f"decoder errors: {errors}")


def _samples(
    container: Any, stream: Any, sampling: Sampling, clock: Clock, times: Times | None, skipping: bool
) -> Iterator[tuple[int, Any]]:
    """Yields (pts, frame) of the samples, by skipping or the plain way."""
    keyframe_pts: set[int] = set()
    picker: CellPicker | None = None
    if times is None:
        clock.report.span_seconds = 1.0 / sampling.value
    else:
        all_pts, keyframe_pts = times
        if sampling.mode == "frames":
            picker, clock.report.span_seconds = frames_picker(int(sampling.value), all_pts, clock.time_base)
        else:
            if all_pts[0] not in keyframe_pts:  # the picture it begins with, though an edit list hides its keyframe
                if skipping:
                    raise NotAsExpectedError
                keyframe_pts.add(all_pts[0])
            length = float((all_pts[-1] - all_pts[0]) * clock.time_base)
            clock.report.span_seconds = max(length / len(keyframe_pts), clock.frame_seconds)

    def pick(pts: int) -> bool:
        nonlocal picker
        if sampling.mode == "keyframes":
            return pts in keyframe_pts
        if picker is None:  # not before the first packet was seen: it may be what sets time 0
            picker = fps_picker(sampling.value, clock.zero or Fraction(0), clock.time_base)
        return picker.pick(pts)

    if skipping:
        by_keyframe = sampling.mode == "keyframes"
        frames = (
            iter_keyframes(container, stream, clock) if by_keyframe else iter_samples(container, stream, pick, clock)
        )
        for frame in frames:
            yield frame.pts, frame
    else:
        for pts, frame in _plain(container, stream, clock):
            if pick(pts):
                yield pts, frame


def _all_times(descriptor: int, limits: DecodeLimits, skipping: bool, report: Report) -> Times:
    """Sorted presentation times of the whole video, and those of its keyframes: from the packets, without decoding;
    or, where packets have no usable times, from the decoded frames (and then skipping is out of the question)."""
    container, stream = open_video(descriptor, limits)
    try:
        pairs: list[tuple[int, bool]] = []
        last_dts = None
        with contextlib.suppress(av.FFmpegError):
            for packet in container.demux(stream):
                report.alive()
                if not packet.size:
                    continue
                jumped = packet.dts is not None and last_dts is not None and packet.dts <= last_dts
                if packet.pts is None or jumped or not has_times(container, stream):
                    pairs = []
                    break
                last_dts = packet.dts
                if not packet.is_discard:
                    pairs.append((packet.pts, bool(packet.is_keyframe)))
    finally:
        container.close()
    if not pairs:
        if skipping:
            raise NotAsExpectedError
        container, stream = open_video(descriptor, limits)
        try:
            clock = Clock(container, stream, Report(alive=report.alive))
            pairs = [(pts, bool(frame.key_frame)) for pts, frame in _plain(container, stream, clock)]
        finally:
            container.close()
        if not pairs:
            raise VideoError("no_frames", "no frame of it can be decoded")
    return sorted(pts for pts, _ in pairs), {pts for pts, keyframe in pairs if keyframe}


def _plain(container: Any, stream: Any, clock: Clock) -> Iterator[tuple[int, Any]]:
    """Yields (pts, frame) of every frame that decodes, in order of time, with times repaired: missing ones continue at
    the frame rate, and where the file's clock jumps back (two recordings in one file) it continues from there."""
    context = stream.codec_context
    step = frame_ticks(stream)
    offset = 0  # added to the packets' times since the last jump
    last_dts: int | None = None
    last: int | None = None
    guessed = False  # whether `last` was made up
    late = 0  # what made-up times ran ahead of the real ones that follow
    bad = 0
    # Where there are no presentation times, frames come out in that order and take the decoding times one by one.
    times: deque[int] | None = None if has_times(container, stream) else deque()
    for packet in _packets(container, stream, clock):
        if packet is not None:
            dts = packet.dts
            if dts is not None:
                if last_dts is not None and dts + offset < last_dts - 2 * step:
                    clock.note("the clock jumps back; times go on from there")
                    offset = last_dts + step - dts
                last_dts = dts + offset
            if packet.pts is not None and offset:
                packet.pts += offset
            clock.n_hidden += packet.is_discard
            if times is not None and last_dts is not None:
                times.append(last_dts)
        try:
            frames = context.decode(packet)
        except (av.FFmpegError, MemoryError) as error:
            if isinstance(error, MemoryError):  # PyAV's own ENOMEM is one too
                raise VideoError("memory", "the decoder ran out of memory") from error
            frames = []
        bad = 0 if frames else bad + 1
        for frame in frames:
            clock.report.n_decoded += 1
            if times is not None:
                frame.pts = times.popleft() if times else None
            if frame.pts is None:
                pts = clock.zero_or(0) if last is None else last + step
                guessed = True
            else:
                pts = frame.pts + late
                if guessed and last is not None and pts <= last:
                    late += last + step - pts
                    pts = last + step
                guessed = False
            if last is not None and pts <= last:  # out of order in a damaged stream: its time is past
                continue
            last = pts
            clock.saw(pts)
            yield pts, frame
        if bad > MAX_BAD_PACKETS:
            clock.note(f"gave up after {bad} packets in a row that do not decode")
            return


def _packets(container: Any, stream: Any, clock: Clock) -> Iterator[Any]:
    """The stream's packets and a last None; a read error ends them with a note."""
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            break
        except av.FFmpegError as error:
            clock.note(f"reading stopped: {reason(error)}")
            break
        if packet.size:
            yield packet
    yield None
