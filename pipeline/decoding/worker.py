"""The process that decodes, without torch, killed by its parent when it hangs or bloats.

It reads one job per line on standard input, writes frames into memory shared with its parent, and says on standard
output which slots it filled.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import signal
import sys
import time
from typing import Any

from pipeline.decoding.container import Report, reason
from pipeline.decoding.decoder import sample_frames
from pipeline.decoding.pixels import Resizer, to_jpeg
from pipeline.errors import VideoError
from pipeline.sampling import Sampling
from pipeline.types import DecodeLimits, FrameGeometry

HEARTBEAT_SECONDS = 1.0


class _Parent:
    """The other end of the pipes: jobs and freed slots come in, filled slots and outcomes go out."""

    def __init__(self, reader: Any, writer: Any, n_slots: int) -> None:
        self._reader, self._writer = reader, writer
        self._free = n_slots
        self._n_slots = n_slots
        self._next = 0
        self._spoke = time.monotonic()

    def say(self, **message: Any) -> None:
        self._writer.write(json.dumps(message).encode() + b"\n")
        self._writer.flush()
        self._spoke = time.monotonic()

    def heartbeat(self) -> None:
        """Called for every packet, so that a long stretch without a sample is not taken for a hang."""
        if time.monotonic() - self._spoke > HEARTBEAT_SECONDS:
            self.say(kind="alive")

    def job(self) -> dict[str, Any]:
        """Waits for the next job; ends the process when the parent is gone."""
        while True:
            message = self._receive()
            if "path" in message:
                return message

    def slot(self) -> int:
        """A free slot's number; waits for the parent to free one (the ring is used in order)."""
        while self._free == 0:
            self._receive()
        self._free -= 1
        slot, self._next = self._next, (self._next + 1) % self._n_slots
        return slot

    def _receive(self) -> dict[str, Any]:
        line = self._reader.readline()
        if not line:
            os._exit(0)  # the parent closed the pipe or died
        message: dict[str, Any] = json.loads(line)
        self._free += message.get("free", 0)
        return message


def _work(parent: _Parent, memory: mmap.mmap, job: dict[str, Any], settings: dict[str, Any], resizer: Resizer) -> None:
    """Decodes one video into the slots."""
    report = Report(alive=parent.heartbeat)
    sampling, limits = Sampling(**settings["sampling"]), DecodeLimits(**settings["limits"])
    started, cpu = time.monotonic(), time.process_time()
    path = os.fsdecode(bytes.fromhex(job["path"]))
    try:
        for seconds, frame in sample_frames(path, sampling, report, limits):
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
    parent.say(
        **outcome,
        duration_seconds=report.duration_seconds,
        span_seconds=report.span_seconds,
        n_decoded=report.n_decoded,
        skipping=report.skipping,
        notes=report.notes,
        seconds=time.monotonic() - started,
        cpu_seconds=time.process_time() - cpu,
    )


def _harden(memory_bytes: int) -> None:
    """Dies with the parent, leaves to it what is asked of all processes, and cannot take more memory than allowed."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        # After all imports: under the limit they fail in ways that hide the reason.
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))


def main() -> None:
    """Runs the worker: settings on the first line of standard input, then jobs."""
    reader = sys.stdin.buffer
    writer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not reach the parent's protocol
    settings = json.loads(reader.readline())
    memory = mmap.mmap(settings["memory_fd"], settings["slot_bytes"] * settings["n_slots"])
    resizer = Resizer(FrameGeometry(**settings["geometry"]))
    parent = _Parent(reader, writer, settings["n_slots"])
    _harden(settings["limits"]["memory_bytes"])
    parent.say(kind="ready")
    with contextlib.suppress(BrokenPipeError):
        while True:
            _work(parent, memory, parent.job(), settings, resizer)


if __name__ == "__main__":
    main()
