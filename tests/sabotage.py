"""What goes wrong in a stage's process, arranged in that process before the stage begins."""

from __future__ import annotations

import builtins
import contextlib
import functools
import importlib
import inspect
import io
import os
import resource
import signal
import time
from collections.abc import Callable
from typing import Any

BY_PATH = ("replace", "rename", "mkdir", "unlink", "remove", "rmdir", "chmod")
BY_DESCRIPTOR = ("fsync", "ftruncate", "pwrite")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def count_steps(root: str, log: str) -> None:
    """Writes a line into the file `log` for every step that changes what is in `root` on disk."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)
    _watch(root, lambda name: os.write(descriptor, f"{name}\n".encode()))


def kill_at_step(root: str, step: int) -> None:
    """SIGKILL at one of these steps, counted from 1."""
    steps = 0

    def count(name: str) -> None:
        nonlocal steps
        steps += 1
        if steps == step:
            os.kill(os.getpid(), signal.SIGKILL)

    _watch(root, count)


def two_workers() -> None:
    """As many decoding processes."""
    import fake_run

    fake_run.WORKERS = 2


def limit_files(n_bytes: int) -> None:
    """No file may get longer: what a full disk is, without a disk."""
    from pipeline.decode import _Worker

    limits = (n_bytes, resource.RLIM_INFINITY)
    plain_init = _Worker.__init__

    def start_unlimited(worker: _Worker, settings: dict[str, Any]) -> None:
        """The memory that a decoding process shares counts as a file."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        plain_init(worker, settings)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    _Worker.__init__ = start_unlimited  # type: ignore[method-assign,assignment]
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


SLOW: dict[str, tuple[str, str, float]] = {
    "catalog": ("pipeline.todo", "find_videos", 0.4),
    "decode": ("pipeline.decode", "DecodePool.decode", 0.02),
    "embed": ("fakes", "FakeEncoder.encode_frames", 0.2),
    "select": ("pipeline.run", "Selecting.select", 0.2),
    "index": ("pipeline.indexing", "build_index", 5.0),
    "verify": ("pipeline.verify", "check_file", 0.4),
    "train": ("pipeline.training.display", "Display.step", 0.05),
}
"""What takes long -> (module, function, seconds more for each call, or for each item that it gives)."""


def slow(what: str, reached: str) -> None:
    """Makes a part of the work take longer, and creates the file `reached` when that part begins."""
    module_name, path, seconds = SLOW[what]
    owner: Any = importlib.import_module(module_name)
    *classes, name = path.split(".")
    for class_name in classes:
        owner = getattr(owner, class_name)
    setattr(owner, name, _slower(getattr(owner, name), seconds, reached))


def slow_under_nohup(what: str, reached: str) -> None:
    """As `slow`, in a process that is to outlive its terminal."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    slow(what, reached)


def _slower(call: Callable[..., Any], seconds: float, reached: str) -> Callable[..., Any]:
    def pause() -> None:
        with contextlib.suppress(FileExistsError):
            os.close(os.open(reached, os.O_CREAT | os.O_EXCL))
        time.sleep(seconds)

    @functools.wraps(call)
    def slower(*arguments: Any, **named: Any) -> Any:
        pause()
        return call(*arguments, **named)

    @functools.wraps(call)
    def slower_items(*arguments: Any, **named: Any) -> Any:
        for item in call(*arguments, **named):
            pause()
            yield item

    return slower_items if inspect.isgeneratorfunction(call) else slower


def _watch(root: str, at: Callable[[str], object]) -> None:
    """Calls `at` with the name of each step: before and after every call that changes something in the folder `root`,
    and in the middle of every write."""

    def concerns(path: Any) -> bool:
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        return os.fsdecode(path).startswith(root)

    def watched(name: str, call: Callable[..., Any], concerned: Callable[..., bool]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            if not concerned(*arguments, **named):
                return call(*arguments, **named)
            step = f"{name} {_name_of(arguments[0])}"
            at(f"before {step}")
            result = call(*arguments, **named)
            at(f"after {step}")
            return result

        return wrapped

    def concerned_path(path: Any, *rest: Any, dir_fd: int | None = None, **named: Any) -> bool:
        return concerns(path if dir_fd is None else dir_fd)

    for name in BY_PATH:
        setattr(os, name, watched(name, getattr(os, name), concerned_path))
    for name in BY_DESCRIPTOR:
        setattr(os, name, watched(name, getattr(os, name), lambda descriptor, *rest: concerns(descriptor)))
    os.open = watched(
        "create", os.open, lambda path, flags, *rest, **named: bool(flags & WRITING) and concerned_path(path, **named)
    )
    plain_open = io.open

    def open_watched(path: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
        if not set(mode) & set("wax+") or not concerns(path):
            return plain_open(path, mode, *rest, **named)
        name = _name_of(path)
        at(f"before open {name}")
        file = _File(plain_open(path, mode, *rest, **named), name, at)
        at(f"after open {name}")
        return file

    for module in (io, builtins):
        module.open = open_watched  # type: ignore[attr-defined]


class _File:
    """A file that is written in halves."""

    def __init__(self, file: Any, name: str, at: Callable[[str], object]) -> None:
        self._file, self._name, self._at = file, name, at

    def write(self, data: Any) -> int:
        half = len(data) // 2
        self._at(f"before write {self._name}")
        self._file.write(data[:half])
        self._file.flush()
        self._at(f"half of write {self._name}")
        self._file.write(data[half:])
        self._file.flush()
        self._at(f"after write {self._name}")
        return len(data)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _name_of(path: Any) -> str:
    if isinstance(path, int):
        path = os.readlink(f"/proc/self/fd/{path}")
    return os.path.basename(os.fsdecode(path))
