"""One writer at a time: a lock that names its holder and that no crash can leave behind."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import time
from pathlib import Path
from types import TracebackType

from pipeline.errors import FinecoError, UsageError

LOCK_FILE = ".lock"
OPENING = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class Lock:
    """The right to write to a folder, held by one process and given back by its death.

    The folder itself is locked beside the file in it: whoever removes or replaces that file lets no second writer in.
    """

    def __init__(self, folder: Path, command: str) -> None:
        self._path = folder / LOCK_FILE
        self._command = command
        self._descriptors: list[int] = []

    def __enter__(self) -> Lock:
        try:
            while not self._take():
                self._release()
        except OSError as error:
            self._release()
            raise FinecoError(
                f"cannot write to {self._path.parent}: {error.strerror or error}", "Choose another folder."
            ) from error
        except FinecoError:
            self._release()
            raise
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        holder = f"'{self._command}' (process {os.getpid()} on {socket.gethostname()}, since {started})\n"
        with contextlib.suppress(OSError):  # a full disk: the lock holds, only its message is lost
            os.ftruncate(self._descriptors[0], 0)
            os.pwrite(self._descriptors[0], holder.encode("utf-8", "replace"), 0)
        return self

    def _take(self) -> bool:
        """Locks file and folder; False when the file was removed or replaced meanwhile."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._descriptors.append(os.open(self._path, OPENING, 0o644))
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise
            raise self._strange() from error
        if not stat.S_ISREG(os.fstat(self._descriptors[0]).st_mode):
            raise self._strange()
        self._lock(self._descriptors[0])
        try:
            if not os.path.samestat(os.fstat(self._descriptors[0]), os.lstat(self._path)):
                return False
        except FileNotFoundError:
            return False
        self._descriptors.append(os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        with contextlib.suppress(OSError):  # NFS locks no folders; the file has to do there
            self._lock(self._descriptors[1])
        return True

    def _lock(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._descriptors[0], 4096, 0).decode("utf-8", "replace").strip() or "another process"
            raise UsageError(
                f"{self._path.parent} is being written by {holder}", "Wait for it, or stop it; what it did is kept."
            ) from None

    def _strange(self) -> FinecoError:
        return FinecoError(f"{self._path} is not a plain file", "It was not made by fineco: remove it.")

    def _release(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            os.ftruncate(self._descriptors[0], 0)
        self._release()
