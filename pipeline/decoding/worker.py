"""The process that decodes, without torch, killed by its parent when it hangs or bloats.

It reads jobs from a socket on its standard input, each with the open video, writes frames into memory shared with its
parent, and says on standard output which slots it filled. Before the first video it gives up everything else: it can
open no file and no connection and start no process (`pipeline.decoding.sandbox`), and it is held to the limits of
`DecodeLimits` and to these: a megabyte for what libraries print, no core file, 64 descriptors.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import math
import mmap
import os
import pkgutil
import signal
import socket
import sys
import time
from collections import deque
from typing import Any

import av
import numpy as np

from pipeline.decoding.container import Report, open_video, reason
from pipeline.decoding.decoder import sample_frames
from pipeline.decoding.pixels import Resizer, to_jpeg
from pipeline.decoding.sandbox import lock_down
from pipeline.errors import VideoError
from pipeline.sampling import Sampling
from pipeline.types import DecodeLimits, FrameGeometry

HEARTBEAT_SECONDS = 1.0
LOOK_SECONDS = 0.05  # between two looks at the processor time
KILL_AFTER_SECONDS = 1  # of processor time over the limit, for a decoder that does not come back to look
PRINTED_BYTES = 1 << 20
MAX_DESCRIPTORS = 64


class _Parent:
    """The other end: settings, jobs and freed slots come in, filled slots and outcomes go out."""

    def __init__(self) -> None:
        self._socket = socket.socket(fileno=0)
        self._writer = os.fdopen(os.dup(1), "wb")
        self._buffer = b""
        self._descriptors: deque[int] = deque()
        self._free = self._next = 0
        self.settings = self._receive()
        self._free = self._n_slots = int(self.settings["n_slots"])
        self._spoke = time.monotonic()

    def say(self, **message: Any) -> None:
        self._writer.write(json.dumps(message).encode() + b"\n")
        self._writer.flush()
        self._spoke = time.monotonic()

    def heartbeat(self) -> None:
        """So that a long stretch without a sample is not taken for a hang."""
        if time.monotonic() - self._spoke > HEARTBEAT_SECONDS:
            self.say(kind="alive")

    def job(self) -> int:
        """Waits for the next video and returns its descriptor; ends the process when the parent is gone."""
        while not self._descriptors:
            self._receive()
        return self._descriptors.popleft()

    def slot(self) -> int:
        """A free slot's number; waits for the parent to free one (the ring is used in order)."""
        while self._free == 0:
            self._receive()
        self._free -= 1
        slot, self._next = self._next, (self._next + 1) % self._n_slots
        return slot

    def _receive(self) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            data, descriptors, _, _ = socket.recv_fds(self._socket, 1 << 16, 1)
            if not data:
                os._exit(0)  # the parent closed the socket or died
            self._buffer += data
            self._descriptors.extend(descriptors)
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        self._free += message.get("free", 0)
        return message


class _Allowance:
    """The processor time of one video: looked at between packets, and by the kernel in case that there is no end to one
    of them (it then kills the process)."""

    def __init__(self, seconds: float, parent: _Parent) -> None:
        self._seconds = seconds
        self._parent = parent
        self._start = time.process_time()
        self._looked = time.monotonic()
        with contextlib.suppress(ImportError, ValueError, OSError):
            import resource

            _, most = resource.getrlimit(resource.RLIMIT_CPU)
            soft = math.ceil(self._start + seconds) + KILL_AFTER_SECONDS
            resource.setrlimit(resource.RLIMIT_CPU, (soft if most < 0 else min(soft, most), most))

    def used(self) -> float:
        return time.process_time() - self._start

    def look(self) -> None:
        """Called for every packet. Raises VideoError when the time is used up."""
        now = time.monotonic()
        if now - self._looked > LOOK_SECONDS:
            self._looked = now
            self._parent.heartbeat()
            if self.used() > self._seconds:
                raise VideoError("cpu_time", f"needs over {self._seconds:g} s of processor time")


def _work(parent: _Parent, memory: mmap.mmap, descriptor: int, resizer: Resizer) -> None:
    """Decodes one video into the slots."""
    settings = parent.settings
    sampling, limits = Sampling(**settings["sampling"]), DecodeLimits(**settings["limits"])
    started, allowance = time.monotonic(), _Allowance(limits.cpu_seconds, parent)
    report = Report(alive=allowance.look)
    try:
        for seconds, frame in sample_frames(descriptor, sampling, report, limits):
            pixels = resizer(frame, report.pixel_aspect)
            data = to_jpeg(pixels) if settings["jpeg"] else pixels.data.cast("B")
            slot = parent.slot()
            size = len(data)
            start = slot * settings["slot_bytes"]
            memory[start : start + size] = data
            parent.say(kind="frame", slot=slot, size=size, seconds=seconds)
        outcome: dict[str, Any] = {"kind": "done"}
    except VideoError as error:
        outcome = {"kind": "failed", "code": error.code, "message": error.message}
    except MemoryError:
        outcome = {"kind": "failed", "code": "memory", "message": f"needs over {limits.memory_bytes >> 20} MiB"}
    except Exception as error:  # the boundary of one video: whatever a damaged file provokes must not end the run
        outcome = {"kind": "failed", "code": "decode_error", "message": f"{type(error).__name__}: {reason(error)}"}
    os.close(descriptor)
    parent.say(
        **outcome,
        duration_seconds=report.duration_seconds,
        span_seconds=report.span_seconds,
        n_decoded=report.n_decoded,
        skipping=report.skipping,
        notes=report.notes,
        seconds=time.monotonic() - started,
        cpu_seconds=allowance.used(),
    )


def _load_the_rest(resizer: Resizer) -> None:
    """What libraries load when it is first needed; once the process is locked down they cannot."""
    for module in pkgutil.walk_packages(av.__path__, "av."):  # PyAV loads a kind of stream when a file has one
        if module.name not in ("av.__main__", "av.datasets"):
            importlib.import_module(module.name)
    grey = av.VideoFrame.from_ndarray(np.full((16, 16, 3), 128, np.uint8), format="rgb24")
    to_jpeg(resizer(grey))
    with contextlib.suppress(VideoError), open(os.devnull, "rb") as nothing:
        open_video(nothing.fileno(), DecodeLimits())


def _limit(limits: dict[str, Any]) -> None:
    """After all that is loaded: under the limit of memory loading fails in ways that hide the reason."""
    with contextlib.suppress(ImportError):
        import resource

        for kind, most in (
            (resource.RLIMIT_AS, limits["memory_bytes"]),
            (resource.RLIMIT_FSIZE, PRINTED_BYTES),  # standard error is a file
            (resource.RLIMIT_NOFILE, MAX_DESCRIPTORS),
            (resource.RLIMIT_CORE, 0),
        ):
            with contextlib.suppress(ValueError, OSError):  # the system's own limit is lower
                resource.setrlimit(kind, (most, most))


def main() -> None:
    """Runs the worker: settings come first on standard input, then jobs."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # what is asked of all processes is the parent's to answer
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: dies with the parent
    parent = _Parent()
    os.dup2(2, 1)  # whatever a library prints must not reach the parent's protocol
    settings = parent.settings
    memory = mmap.mmap(settings["memory_fd"], settings["slot_bytes"] * settings["n_slots"])
    resizer = Resizer(FrameGeometry(**settings["geometry"]))
    _load_the_rest(resizer)
    _limit(settings["limits"])
    isolation = lock_down()
    parent.say(kind="ready", isolation=isolation)
    with contextlib.suppress(BrokenPipeError):
        while True:
            _work(parent, memory, parent.job(), resizer)


if __name__ == "__main__":
    main()
