"""Stages in processes of their own: start one, hit it, ask how it ended."""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


class Server:
    """A process that forks one for each stage (tests/fake_run.py).

    Args:
        modules: To import beforehand.
    """

    def __init__(self, *modules: str) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._names = itertools.count()
        self._codes: dict[int, int] = {}
        self._process = subprocess.Popen(
            [sys.executable, "-c", "import sys, fake_run; fake_run.serve(sys.argv[1:])", *modules],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
                "OMP_NUM_THREADS": "1",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._buffer = b""
        atexit.register(self._process.communicate)

    def start(
        self,
        stage: str,
        videos: Path,
        collection: Path,
        seconds_per_batch: float = 0.0,
        prepare: Sequence[object] = (),
        environment: Mapping[str, str] | None = None,
    ) -> Job:
        """Starts a stage.

        Args:
            prepare: (module, function, arguments) to be called first.
        """
        errors = Path(self._folder.name) / str(next(self._names))
        order = {
            "stage": stage,
            "videos": str(videos),
            "collection": str(collection),
            "seconds_per_batch": seconds_per_batch,
            "prepare": prepare,
            "environment": dict(environment or {}),
            "errors": str(errors),
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()
        while True:
            answer = self._read(60)
            if "started" in answer:
                self._codes.pop(answer["started"], None)  # of an earlier process with this number
                return Job(self, answer["started"], errors)

    def code_of(self, pid: int, seconds: float) -> int | None:
        """The exit code of a process, negative for the signal it died of; None when it has not ended in time."""
        deadline = time.monotonic() + seconds
        while pid not in self._codes:
            left = deadline - time.monotonic()
            if left < 0 or not self._read(left):
                return None
        return self._codes[pid]

    def _read(self, seconds: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._buffer:
            if not select.select([descriptor], [], [], seconds)[0]:
                return {}
            data = os.read(descriptor, 1 << 16)
            if not data:
                raise RuntimeError("tests/fake_run.py ended")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if "ended" in answer:
            self._codes[answer["ended"]] = answer["code"]
        return answer


class Job:
    """One started stage, the leader of a process group of its own."""

    def __init__(self, server: Server, pid: int, errors: Path) -> None:
        self._server, self.pid, self._errors = server, pid, errors

    def wait(self, seconds: float = 60) -> int:
        """Its exit code, negative for the signal it died of. Raises TimeoutError (and kills it) when it goes on."""
        code = self._server.code_of(self.pid, seconds)
        if code is None:
            self.send(signal.SIGKILL)
            raise TimeoutError(f"went on for {seconds} s: {self.errors}")
        return code

    def ended_within(self, seconds: float) -> bool:
        return self._server.code_of(self.pid, seconds) is not None

    def send(self, number: int, to_group: bool = False) -> None:
        """Sends a signal; that it has just ended shows in its exit code."""
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if to_group else os.kill)(self.pid, number)

    @property
    def errors(self) -> str:
        """What it wrote to standard error, once it has ended."""
        return self._errors.read_text("utf-8", "replace") if self._errors.exists() else ""

    def children(self) -> list[int]:
        path = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        try:
            return [int(child) for child in path.read_text().split()]
        except OSError:
            return []


@functools.cache
def server(*modules: str) -> Server:
    """The one for these modules; it ends with this process."""
    return Server(*modules)


def wait_until(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("it never came to pass")
        time.sleep(0.005)


def are_gone(pids: list[int], seconds: float = 5.0) -> bool:
    """Whether none of the processes is there any more, soon."""
    try:
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), seconds)
    except TimeoutError:
        return False
    return True
