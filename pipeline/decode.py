"""Decoding in many processes: who decodes what, what is done when one hangs or dies, and how frames come over.

Each worker owns a ring of slots in memory shared with this process (an anonymous file: nothing is left behind whatever
dies). It fills slots and waits when all are full, so a slow consumer slows decoding down and memory stays bounded,
however long a video is. This process opens the videos and hands them over, but never reads them; a worker can open
nothing itself (`pipeline.decoding.sandbox`).
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import selectors
import signal
import socket
import stat
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
from pipeline.sources import why_refused
from pipeline.types import DecodeLimits, FrameGeometry, UInt8, Video

RING_BYTES = 32 << 20
MAX_SLOTS = 128
JOBS_PER_WORKER = 500  # then a fresh one, lest a leak in a decoder adds up over a million videos
MAX_FAILED_STARTS = 3
START_SECONDS = 60.0  # a cold disk is no hanging decoder
MAX_MESSAGE_BYTES = 1 << 20  # of a worker's; the longest there are hold a few notes
LAST_WORDS_BYTES = 2000


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
        self.n_slots: int = settings["n_slots"]
        self._socket, theirs = socket.socketpair()
        self._stderr = tempfile.TemporaryFile()
        ring = _anonymous_file()
        try:
            os.ftruncate(ring.fileno(), size)
            self.memory = mmap.mmap(ring.fileno(), size)
            root = str(Path(__file__).parents[1])
            path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
            self.process = subprocess.Popen(
                # -P: a file named json.py among the videos is not json
                [sys.executable, "-P", "-m", "pipeline.decoding.worker"],
                stdin=theirs.fileno(),
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                pass_fds=(ring.fileno(),),
                # Threads of numpy's that nobody asked for would escape the sandbox.
                env={**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"},
            )
            self.send({**settings, "memory_fd": ring.fileno()})
        except BaseException:
            self._socket.close()
            self._stderr.close()
            raise
        finally:
            theirs.close()
            ring.close()
        self.job: tuple[Video, int] | None = None
        self.last_seconds: float | None = None  # of its last frame
        self.jobs_done = 0
        self.ready = False
        self.started = self.heard = time.monotonic()
        self._buffer = b""
        stdout = self.process.stdout
        if stdout is None:
            raise FinecoError("a decoding process has no output")
        self.stdout: IO[bytes] = stdout
        os.set_blocking(self.stdout.fileno(), False)

    def send(self, message: dict[str, Any], *descriptors: int) -> None:
        """Writes one line to the worker; a worker that died is noticed when it is read from."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            data = json.dumps(message).encode() + b"\n"
            sent = socket.send_fds(self._socket, [data], descriptors) if descriptors else 0
            self._socket.sendall(data[sent:])

    def start(self, video: Video, attempt: int) -> None:
        """Hands a video over. Raises VideoError if it cannot be opened."""
        descriptor = open_file(video)
        self.job, self.last_seconds = (video, attempt), None
        self.started = self.heard = time.monotonic()
        self.send({}, descriptor)
        os.close(descriptor)

    def receive(self) -> tuple[list[dict[str, Any]], bool]:
        """Messages that have come, and whether the process is gone."""
        data = self.stdout.read()
        if data is None:
            return [], False
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        if len(self._buffer) > MAX_MESSAGE_BYTES:
            raise ValueError("a message without an end")
        self.heard = time.monotonic()
        return [json.loads(line) for line in lines], not data

    def slot(self, number: int, size: int) -> UInt8:
        """A view of the bytes in a slot."""
        if not (0 <= number < self.n_slots and 0 <= size <= self.slot_bytes):
            raise ValueError("a slot that there is not")
        return np.frombuffer(self.memory, np.uint8, count=size, offset=number * self.slot_bytes)

    def stop(self) -> tuple[int, str]:
        """Kills the process; returns its exit status and what it died of, in words."""
        self.process.kill()
        status = self.process.wait()
        self.stdout.close()
        self._socket.close()
        self._stderr.seek(max(0, self._stderr.seek(0, os.SEEK_END) - LAST_WORDS_BYTES))
        last_words = self._stderr.read(LAST_WORDS_BYTES).decode("utf-8", "replace").strip().splitlines()
        self._stderr.close()
        return status, last_words[-1][:200] if last_words else f"exit status {status}"


def open_file(video: Video) -> int:
    """Opens a video for reading and returns the descriptor; anything but a regular file is never opened.

    Raises:
        VideoError: Codes `missing`, `unreadable`, `not_a_file`, `changed` (since its content was recorded).
    """
    try:
        if not stat.S_ISREG(os.stat(video.path).st_mode):  # a pipe would wait for its writer
            raise VideoError("not_a_file", "is not a regular file")
        descriptor = os.open(video.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise VideoError(*why_refused(video.path, error)) from error
    except ValueError as error:  # a NUL in the name
        raise VideoError("missing", f"is no name of a file: {error}") from error
    status = os.fstat(descriptor)
    found = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    regular = stat.S_ISREG(status.st_mode)  # what is there may have changed meanwhile
    if regular and (not video.size_bytes or found == (video.size_bytes, video.mtime_ns, video.ctime_ns)):
        return descriptor
    os.close(descriptor)
    if not regular:
        raise VideoError("not_a_file", "is not a regular file")
    raise VideoError("changed", "the file changed since it was found; run again")


def _anonymous_file() -> IO[bytes]:
    """A file without a name, in memory where the system can."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("fineco-frames"), "w+b", buffering=0)
    return tempfile.TemporaryFile()


def _outcome(message: dict[str, Any], video: Video, attempt: int) -> VideoDecoded | VideoFailed:
    """What a worker says became of its video; raises as `_finite` does if it does not say it properly."""
    seconds = _finite(message["seconds"])
    if message["kind"] == "failed":
        return VideoFailed(
            video, attempt, VideoError(str(message["code"]), str(message["message"])[:1000]), False, seconds
        )
    return VideoDecoded(
        video,
        attempt,
        _finite(message["duration_seconds"]),
        _finite(message["span_seconds"]),
        int(message["n_decoded"]),
        tuple(str(note) for note in message["notes"]),
        seconds,
        _finite(message["cpu_seconds"]),
    )


def _finite(number: Any) -> float:
    """Raises ValueError or TypeError unless it is a finite number."""
    if not math.isfinite(number):
        raise ValueError(f"{number} is not finite")
    return float(number)


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
        self._cpu_seconds = limits.cpu_seconds
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
        try:
            for _ in range(n_workers):
                self._add_worker()
        except BaseException:
            self.close()
            raise

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
                while more and worker.job is None and not stop.is_set():  # until one can be opened
                    video = next(waiting, None)
                    if video is None:
                        more = False
                    else:
                        if worker.jobs_done >= JOBS_PER_WORKER:
                            worker = self._replace(worker)[0]
                        yield from self._start(worker, video, 1)
            if not any(w.job for w in self._workers):
                if more or not alone:
                    return
                yield from self._start(self._workers[0], alone.popleft(), 2)
            for event in self._wait():
                if isinstance(event, VideoFailed) and event.will_retry:
                    alone.append(event.video)
                yield event
                if stop.is_set():
                    return

    def _start(self, worker: _Worker, video: Video, attempt: int) -> Iterator[DecodeEvent]:
        try:
            worker.start(video, attempt)
        except VideoError as error:
            yield VideoFailed(video, attempt, error, False, 0.0)

    def _wait(self) -> Iterator[DecodeEvent]:
        """Waits for messages, or for a worker's time to run out."""
        ready = self._selector.select(timeout=min(1.0, self._stall_seconds))
        for key, _ in ready:
            worker: _Worker = key.data
            try:
                messages, gone = worker.receive()
                for message in messages:
                    yield from self._handle(worker, message)
            except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError):
                gone = True  # it does not keep to the protocol: a decoder that a file has taken over
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
            seconds = _finite(message["seconds"])
            if worker.last_seconds is not None and seconds <= worker.last_seconds:
                raise ValueError("frames out of order")
            worker.last_seconds = seconds
            yield DecodedFrame(*worker.job, seconds, data.reshape(self._shape) if self._shape else data)
            del data
            worker.send({"free": 1})
            worker.heard = time.monotonic()  # it may have waited for this slot: the consumer's time, not its own
        elif kind in ("done", "failed") and worker.job:
            event = _outcome(message, *worker.job)
            if kind == "done" and worker.last_seconds is None:
                raise ValueError("done without a frame")
            worker.job = None
            worker.jobs_done += 1
            yield event

    def _lost(self, worker: _Worker, stalled: str | None) -> Iterator[DecodeEvent]:
        """A worker hung or died: a new one takes its place, its video is tried once more or given up."""
        job, started, was_ready = worker.job, worker.started, worker.ready
        _, status, last_words = self._replace(worker)
        if not was_ready:
            self._failed_starts += 1
            if self._failed_starts > MAX_FAILED_STARTS:
                raise FinecoError(f"decoding processes do not start: {last_words}", "Run 'fineco doctor'.")
        if job is not None:
            video, attempt = job
            if stalled:
                error = VideoError("timeout", stalled)
            elif status == -signal.SIGXCPU:
                error = VideoError("cpu_time", f"needs over {self._cpu_seconds:g} s of processor time")
            else:
                error = VideoError("crash", f"the decoding process died ({last_words})")
            will_retry = attempt == 1 and error.code != "cpu_time"
            yield VideoFailed(video, attempt, error, will_retry, time.monotonic() - started)

    def _replace(self, worker: _Worker) -> tuple[_Worker, int, str]:
        """A new worker in the place of this one; how that one ended."""
        self._selector.unregister(worker.stdout)
        self._workers.remove(worker)
        status, last_words = worker.stop()
        return self._add_worker(), status, last_words

    def _add_worker(self) -> _Worker:
        try:
            worker = _Worker(self._settings)
        except OSError as error:
            raise FinecoError(f"decoding processes do not start: {error}", "Run 'fineco doctor'.") from error
        self._workers.append(worker)
        self._selector.register(worker.stdout, selectors.EVENT_READ, worker)
        return worker
