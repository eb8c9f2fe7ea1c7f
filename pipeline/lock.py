"""One writer at a time: a lock that names its holder and that no crash can leave behind."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from pathlib import Path
from types import TracebackType

from pipeline.errors import FinecoError, UsageError

LOCK_FILE = ".lock"


class Lock:
    """The right to write to a folder, held by one process and given back by its death."""

    def __init__(self, folder: Path, command: str) -> None:
        self._path = folder / LOCK_FILE
        self._command = command
        self._descriptor = -1

    def __enter__(self) -> Lock:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise FinecoError(f"cannot write to {self._path.parent}: {error.strerror or error}") from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._descriptor, 4096, 0).decode("utf-8", "replace").strip() or "another process"
            os.close(self._descriptor)
            raise UsageError(
                f"{self._path.parent} is being written by {holder}", "Wait for it, or stop it; what it did is kept."
            ) from None
        except OSError as error:
            os.close(self._descriptor)
            raise FinecoError(f"cannot lock {self._path}: {error.strerror or error}") from error
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        holder = f"'{self._command}' (process {os.getpid()} on {socket.gethostname()}, since {started})\n"
        with contextlib.suppress(OSError):  # a full disk: the lock holds, only its message is lost
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, holder.encode("utf-8", "replace"), 0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)
