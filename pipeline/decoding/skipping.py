"""Decoding only what the samples need, to the same bits as decoding everything.

Three things are left out: non-reference frames that are not samples (the decoder skips them, `skip_frame`), the packets
after the last sample before a random access point, and whole groups without a sample; `benchmarks/decode_cost.py`
measures what it saves. It rests on rules that damaged or unusual streams break; at the first sign of it (a decoder
error, a time missing or out of order, a sample that did not come out) `NotAsExpectedError` sends the caller back to
plain decoding.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import av

from pipeline.decoding.container import Clock, error_count, has_times

# Codecs whose every keyframe resets all references. H.264 and HEVC are asked per packet instead.
RESETTING_CODECS = frozenset({"vp8", "vp9", "av1", "libdav1d", "mjpeg", "prores", "png", "ffv1", "dnxhd", "theora"})
H264_IDR = 5
HEVC_IDR_OR_BLA = range(16, 21)  # CRA (21) is left out: its leading frames need what came before

MAX_HELD_PACKETS = 1024  # packets kept back in the hope of dropping them: bounds memory on endless groups
MAX_HELD_BYTES = 64 << 20


class NotAsExpectedError(Exception):
    """The stream broke a rule that skipping rests on; decode the plain way."""


def _leading_units(packet: Any, nal_length_size: int, hevc: bool) -> Iterator[tuple[int, bytes]]:
    """(type, bytes) of the packet's NAL units up to its first slice; fewer when the packet does not parse."""
    data = bytes(packet)
    position = 0
    while position < len(data):
        if nal_length_size:
            start = position + nal_length_size
            end = start + int.from_bytes(data[position:start], "big")
        else:  # Annex B: after 00 00 01
            start = data.find(b"\x00\x00\x01", position) + 3
            if start < 3:
                return
            end = data.find(b"\x00\x00\x01", start)
            end = len(data) if end < 0 else end
        if start >= len(data):
            return
        position = end
        kind = (data[start] >> 1) & 0x3F if hevc else data[start] & 0x1F
        yield kind, data[start:end]
        if kind < 32 if hevc else 1 <= kind <= 5:
            return


def _random_access_test(stream: Any) -> Callable[[Any], bool]:
    """A function telling whether decoding can start afresh at a packet with nothing before it mattering. It raises
    NotAsExpectedError where the stream changes its parameters: later groups may need what a dropped packet says."""
    name, extradata = stream.codec_context.name, stream.codec_context.extradata or b""
    if name in RESETTING_CODECS:
        return lambda packet: bool(packet.is_keyframe)
    if name not in ("h264", "hevc"):
        return lambda packet: False
    hevc = name == "hevc"
    restarts, parameter_sets = (HEVC_IDR_OR_BLA, range(32, 35)) if hevc else ((H264_IDR,), range(7, 9))
    at = 21 if hevc else 4  # of the length size in hvcC and avcC
    size = (extradata[at] & 3) + 1 if len(extradata) > at + 2 and extradata[0] == 1 else 0
    known: list[bytes] = []  # where a parameter set may be: the extradata and those of the first keyframe

    def restarts_at(packet: Any) -> bool:
        if not packet.is_keyframe:
            return False
        units = list(_leading_units(packet, size, hevc))
        found = [unit.rstrip(b"\x00") for kind, unit in units if kind in parameter_sets]
        if not known:
            known.extend((extradata, *found))
        if not all(any(unit in place for place in known) for unit in found):
            raise NotAsExpectedError
        return bool(units) and units[-1][0] in restarts

    return restarts_at


class _Skipper:
    """Decides, packet by packet in decoding order, which are decoded whole, decoded if referenced, or dropped.

    A sample can be decided on once no later packet can precede it in presentation: packets still to come have
    pts >= dts > the last dts. Packets are held back until a sample behind them needs them, or until a random access
    point shows that none does.
    """

    def __init__(self, context: Any, pick: Callable[[int], bool], restarts_at: Callable[[Any], bool]) -> None:
        self._context = context
        self._pick = pick
        self._restarts_at = restarts_at
        self._held: deque[tuple[int, Any]] = deque()  # (number in decoding order, packet)
        self._held_bytes = 0
        self._undecided: list[tuple[int, int]] = []  # heap of (pts, number)
        self._undecided_numbers: set[int] = set()
        self._wanted_numbers: set[int] = set()
        self._needed_up_to = -1  # number of the last packet that a sample needs
        self._number = -1
        self._last_dts: int | None = None
        self._last_decided: int | None = None
        self._mode = ""
        self.expected: deque[int] = deque()  # pts of samples not yet come out of the decoder

    def push(self, packet: Any) -> Iterator[Any]:
        """Takes the next packet; yields frames."""
        pts, dts = packet.pts, packet.dts
        if pts is None or packet.is_corrupt or (dts is not None and pts < dts):
            raise NotAsExpectedError
        if dts is not None:
            if self._last_dts is not None and dts <= self._last_dts:
                raise NotAsExpectedError
            self._last_dts = dts
        restarts = self._restarts_at(packet)
        if restarts and self._held:
            yield from self._end_group()
        self._number += 1
        self._held.append((self._number, packet))
        self._held_bytes += packet.size
        if not packet.is_discard:  # the edit list hides its frame, which others may still refer to
            heapq.heappush(self._undecided, (pts, self._number))
            self._undecided_numbers.add(self._number)
        if self._last_dts is not None:
            self._decide(self._last_dts)
        if len(self._held) > MAX_HELD_PACKETS or self._held_bytes > MAX_HELD_BYTES:
            self._needed_up_to = self._number
        yield from self._release()

    def finish(self) -> Iterator[Any]:
        """Takes the end of the stream; yields the last frames."""
        yield from self._end_group()
        yield from self._context.decode(None)

    def _end_group(self) -> Iterator[Any]:
        """Nothing before this point is needed behind it: decides on what is held, drops what no sample needs."""
        self._decide(None)
        yield from self._release()
        self._held.clear()
        self._held_bytes = 0

    def _decide(self, up_to: int | None) -> None:
        while self._undecided and (up_to is None or self._undecided[0][0] <= up_to):
            pts, number = heapq.heappop(self._undecided)
            if self._last_decided is not None and pts <= self._last_decided:
                raise NotAsExpectedError  # two frames at one time, or a group that overlaps the one before
            self._last_decided = pts
            self._undecided_numbers.discard(number)
            if self._pick(pts):
                self._wanted_numbers.add(number)
                self._needed_up_to = max(self._needed_up_to, number)
                self.expected.append(pts)

    def _release(self) -> Iterator[Any]:
        while self._held and self._held[0][0] <= self._needed_up_to:
            number, packet = self._held[0]
            if number in self._undecided_numbers:
                return
            self._held.popleft()
            self._held_bytes -= packet.size
            mode = "DEFAULT" if number in self._wanted_numbers else "NONREF"
            self._wanted_numbers.discard(number)
            if mode != self._mode:
                self._context.skip_frame = self._mode = mode
            yield from self._context.decode(packet)


def iter_samples(container: Any, stream: Any, pick: Callable[[int], bool], clock: Clock) -> Iterator[Any]:
    """Yields the sampled frames, decoding as little as possible. Raises NotAsExpectedError at the first surprise."""
    if not has_times(container, stream):
        raise NotAsExpectedError
    skipper = _Skipper(stream.codec_context, pick, _random_access_test(stream))
    errors = error_count()

    def wanted(frames: Iterator[Any]) -> Iterator[Any]:
        for frame in frames:
            clock.report.n_decoded += 1
            if frame.pts is None or frame.is_corrupt or error_count() != errors:
                raise NotAsExpectedError
            if skipper.expected and frame.pts >= skipper.expected[0]:
                if frame.pts != skipper.expected.popleft():
                    raise NotAsExpectedError
                yield frame

    try:
        for packet in container.demux(stream):
            if packet.size:
                clock.n_hidden += packet.is_discard
                if not packet.is_discard:
                    clock.saw(packet.pts)
                yield from wanted(skipper.push(packet))
        yield from wanted(skipper.finish())
    except av.FFmpegError as error:
        raise NotAsExpectedError from error
    if skipper.expected or error_count() != errors:
        raise NotAsExpectedError


def iter_keyframes(container: Any, stream: Any, clock: Clock) -> Iterator[Any]:
    """Yields the keyframes, decoding nothing else: after each the decoder starts afresh, as after a seek."""
    if not has_times(container, stream):
        raise NotAsExpectedError
    context = stream.codec_context
    errors = error_count()
    last: int | None = None
    try:
        for packet in container.demux(stream):
            if packet.size and not packet.is_discard:
                clock.saw(packet.pts)
            clock.n_hidden += packet.is_discard
            if not (packet.size and packet.is_keyframe) or packet.is_discard:
                continue
            frames = [*context.decode(packet), *context.decode(None)]
            context.flush_buffers()
            clock.report.n_decoded += len(frames)
            if len(frames) != 1 or frames[0].pts != packet.pts or frames[0].is_corrupt or error_count() != errors:
                raise NotAsExpectedError
            if last is not None and packet.pts <= last:
                raise NotAsExpectedError
            last = packet.pts
            yield frames[0]
    except av.FFmpegError as error:
        raise NotAsExpectedError from error
