"""A small disk of its own for a test that runs as root: full, or read-only."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def mounted(
    folder: Path, megabytes: int, fill: Callable[[Path], object] = lambda disk: None, read_only: bool = False
) -> Iterator[Path]:
    """Mounts a disk in memory; the test is skipped where that is not allowed.

    Args:
        fill: Called with the mounted folder before it becomes read-only.
    """
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    folder.mkdir()
    done = _mount("-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder))
    if done.returncode != 0:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
    try:
        fill(folder)
        if read_only:
            assert _mount("-o", "remount,ro", str(folder)).returncode == 0
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)


def _mount(*arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        pytest.skip(f"no mount: {error}")


def free_bytes(folder: Path) -> int:
    """What is left on the disk of a folder."""
    numbers = os.statvfs(folder)
    return numbers.f_bavail * numbers.f_frsize


def leave_free(folder: Path, n_bytes: int) -> Path:
    """Fills the disk of a folder with one file but for so many bytes; returns the file."""
    ballast = folder / "ballast"
    ballast.write_bytes(bytes(max(0, free_bytes(folder) - n_bytes)))
    return ballast
