"""Decoding in many processes: who decodes what, what is done when one hangs or dies, and how frames come over.

Each worker owns a ring of slots in memory shared with this process (an anonymous file: nothing is left behind whatever
dies). It fills slots and waits when all are full, so a slow consumer slows decoding down and memory stays bounded,
however long a video is.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import selectors
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from pipeline.errors import FinecoError, VideoError
from pipeline.sampling import Sampling
from pipeline.types import DecodeLimits, FrameGeometry, UInt8, Video

RING_BYTES = 32 << 20
MAX_SLOTS = 128
JOBS_PER_WORKER = 500  # then a fresh one, lest a leak in a decoder adds up over a million videos
MAX_FAILED_STARTS = 3
START_SECONDS = 60.0  # a cold disk is no hanging decoder


@dataclass(frozen=True, slots=True)
class DecodedFrame:
    """One sampled frame. `data` is a view that is valid until the next event is asked for."""

    video: Video
    attempt: int
    seconds: float
    data: UInt8  # (H, W, 3), or the bytes of a JPEG


@dataclass(frozen=True, slots=True)
class VideoDecoded:
    """All frames of a video have come."""

    video: Video
    attempt: int
    duration_seconds: float
    span_seconds: float
    n_decoded: int
    notes: tuple[str, ...]
    seconds: float
    cpu_seconds: float
    from_store: bool = False  # its frames were stored by an earlier `decode`


@dataclass(frozen=True, slots=True)
class VideoFailed:
    """A video cannot be decoded, or (`will_retry`) its worker died and it will be tried once more, alone."""

    video: Video
    attempt: int
    error: VideoError
    will_retry: bool
    seconds: float


DecodeEvent = DecodedFrame | VideoDecoded | VideoFailed


class _Worker:
    """One decoding process and the ring it fills."""

    def __init__(self, settings: dict[str, Any]) -> None:
        size = settings["slot_bytes"] * settings["n_slots"]
        self.slot_bytes: int = settings["slot_bytes"]
        self._file: IO[bytes] | None = None
        if hasattr(os, "memfd_create"):
            descriptor = os.memfd_create("fineco-frames")
        else:
            self._file = tempfile.TemporaryFile()
            descriptor = self._file.fileno()
        try:
            os.ftruncate(descriptor, size)
            self.memory = mmap.mmap(descriptor, size)
            self._stderr = tempfile.TemporaryFile()
            root = str(Path(__file__).parents[1])
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pipeline.decoding.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                pass_fds=(descriptor,),
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))},
            )
            self.send({**settings, "memory_fd": descriptor})
        finally:
            if self._file is None:
                os.close(descriptor)
        self.job: tuple[Video, int] | None = None
        self.jobs_done = 0
        self.ready = False
        self.started = self.heard = time.monotonic()
        self._buffer = b""
        stdout = self.process.stdout
        if stdout is None:
            raise FinecoError("a decoding process has no output")
        self.stdout: IO[bytes] = stdout
        os.set_blocking(self.stdout.fileno(), False)

    def send(self, message: dict[str, Any]) -> None:
        """Writes one line to the worker; a worker that died is noticed when it is read from."""
        with contextlib.suppress(BrokenPipeError):
            stdin = self.process.stdin
            if stdin is not None:
                stdin.write(json.dumps(message).encode() + b"\n")
                stdin.flush()

    def start(self, video: Video, attempt: int) -> None:
        self.job = (video, attempt)
        self.started = self.heard = time.monotonic()
        self.send({"path": os.fsencode(video.path).hex()})

    def receive(self) -> tuple[list[dict[str, Any]], bool]:
        """Messages that have come, and whether the process is gone."""
        data = self.stdout.read()
        if data is None:
            return [], False
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        self.heard = time.monotonic()
        return [json.loads(line) for line in lines], not data

    def slot(self, number: int, size: int) -> UInt8:
        """A view of the bytes in a slot."""
        return np.frombuffer(self.memory, np.uint8, count=size, offset=number * self.slot_bytes)

    def stop(self) -> str:
        """Kills the process; returns what it died of, in words."""
        self.process.kill()
        code = self.process.wait()
        self.stdout.close()
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
        self._stderr.seek(0)
        last_words = self._stderr.read()[-2000:].decode("utf-8", "replace").strip().splitlines()
        self._stderr.close()
        if self._file is not None:
            self._file.close()
        return last_words[-1][:200] if last_words else f"exit status {code}"


class DecodePool:
    """Decodes videos in `n_workers` processes.

    Args:
        n_workers: Processes, one decoding thread each.
        sampling: Which frames.
        geometry: What they become.
        limits: What one video may cost.
        jpeg: Frames come as JPEG bytes instead of pixels.
    """

    def __init__(
        self, n_workers: int, sampling: Sampling, geometry: FrameGeometry, limits: DecodeLimits, jpeg: bool = False
    ) -> None:
        width = 4 * geometry.height if geometry.resize == "bound" else geometry.width
        slot_bytes = geometry.height * width * 3 + (4096 if jpeg else 0)
        self.geometry = geometry
        self._stall_seconds = limits.stall_seconds
        self._shape = None if jpeg else (geometry.height, geometry.width, 3)
        self._settings = {
            "slot_bytes": slot_bytes,
            "n_slots": max(4, min(MAX_SLOTS, RING_BYTES // slot_bytes)),
            "geometry": asdict(geometry),
            "sampling": asdict(sampling),
            "limits": asdict(limits),
            "jpeg": jpeg,
        }
        self._failed_starts = 0
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Worker] = []
        for _ in range(n_workers):
            self._add_worker()

    def __enter__(self) -> DecodePool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends every worker, at once."""
        for worker in self._workers:
            self._selector.unregister(worker.stdout)
            worker.stop()
        self._workers.clear()
        self._selector.close()

    def decode(self, videos: Iterable[Video], stop: threading.Event) -> Iterator[DecodeEvent]:
        """Decodes the videos, as many at a time as there are workers; events of different videos interleave.

        Ends early, within a second, when `stop` is set. A frame's `data` is valid only until the next event is asked
        for; that is also what frees its slot.

        Raises:
            FinecoError: Workers cannot be started.
        """
        waiting = iter(videos)
        alone: deque[Video] = deque()
        more = True
        while not stop.is_set():
            for worker in [w for w in self._workers if w.job is None]:
                if not more:
                    break
                video = next(waiting, None)
                if video is None:
                    more = False
                else:
                    if worker.jobs_done >= JOBS_PER_WORKER:
                        worker = self._replace(worker)[0]
                    worker.start(video, 1)
            busy = any(w.job for w in self._workers)
            if not busy and not more:
                if not alone:
                    return
                self._workers[0].start(alone.popleft(), 2)
            for event in self._wait():
                if isinstance(event, VideoFailed) and event.will_retry:
                    alone.append(event.video)
                yield event
                if stop.is_set():
                    return

    def _wait(self) -> Iterator[DecodeEvent]:
        """Waits for messages, or for a worker's time to run out."""
        ready = self._selector.select(timeout=min(1.0, self._stall_seconds))
        for key, _ in ready:
            worker: _Worker = key.data
            messages, gone = worker.receive()
            for message in messages:
                yield from self._handle(worker, message)
            if gone:
                yield from self._lost(worker, None)
        # Silent is only who has said nothing that is still unread: the consumer of the events above took its time.
        unread = {key.data for key, _ in self._selector.select(timeout=0)}
        now = time.monotonic()
        for worker in [w for w in self._workers if w not in unread]:
            limit = self._stall_seconds if worker.ready else max(self._stall_seconds, START_SECONDS)
            if (worker.job or not worker.ready) and now - worker.heard > limit:
                yield from self._lost(worker, f"no progress for {limit:g} s")

    def _handle(self, worker: _Worker, message: dict[str, Any]) -> Iterator[DecodeEvent]:
        kind = message["kind"]
        if kind == "ready":
            worker.ready = True
            self._failed_starts = 0
        elif kind == "frame" and worker.job:
            data = worker.slot(message["slot"], message["size"])
            yield DecodedFrame(*worker.job, message["seconds"], data.reshape(self._shape) if self._shape else data)
            del data
            worker.send({"free": 1})
            worker.heard = time.monotonic()  # it may have waited for this slot: the consumer's time, not its own
        elif kind in ("done", "failed") and worker.job:
            video, attempt = worker.job
            worker.job = None
            worker.jobs_done += 1
            if kind == "done":
                yield VideoDecoded(
                    video,
                    attempt,
                    message["duration_seconds"],
                    message["span_seconds"],
                    message["n_decoded"],
                    tuple(message["notes"]),
                    message["seconds"],
                    message["cpu_seconds"],
                )
            else:
                error = VideoError(message["code"], message["message"])
                yield VideoFailed(video, attempt, error, False, message["seconds"])

    def _lost(self, worker: _Worker, stalled: str | None) -> Iterator[DecodeEvent]:
        """A worker hung or died: a new one takes its place, its video is tried once more or given up."""
        job, started, was_ready = worker.job, worker.started, worker.ready
        _, last_words = self._replace(worker)
        if not was_ready:
            self._failed_starts += 1
            if self._failed_starts > MAX_FAILED_STARTS:
                raise FinecoError(f"decoding processes do not start: {last_words}", "Run 'fineco doctor'.")
        if job is not None:
            video, attempt = job
            if stalled:
                error = VideoError("timeout", stalled)
            else:
                error = VideoError("crash", f"the decoding process died ({last_words})")
            yield VideoFailed(video, attempt, error, attempt == 1, time.monotonic() - started)

    def _replace(self, worker: _Worker) -> tuple[_Worker, str]:
        self._selector.unregister(worker.stdout)
        self._workers.remove(worker)
        last_words = worker.stop()
        return self._add_worker(), last_words

    def _add_worker(self) -> _Worker:
        worker = _Worker(self._settings)
        self._workers.append(worker)
        self._selector.register(worker.stdout, selectors.EVENT_READ, worker)
        return worker
