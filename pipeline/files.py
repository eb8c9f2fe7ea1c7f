"""Files that are whole or absent: temporary name, fsync, rename, fsync of the folder; and their digests.

After any process death a final name holds a complete file (tests/faults kills a writer at every step).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import FinecoError, IntegrityError

TEMPORARY_SUFFIX = ".tmp"


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What a file must be: its length and the SHA-256 of its bytes."""

    size_bytes: int
    sha256: str


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def record_of(path: Path) -> FileRecord:
    """Length and digest of the file as it stands."""
    return FileRecord(path.stat().st_size, sha256_of(path))


def check_file(path: Path, record: FileRecord, full: bool = True) -> None:
    """Raises IntegrityError unless the file has the recorded length and, if `full`, the recorded digest."""
    try:
        size = path.stat().st_size
        if size != record.size_bytes:
            raise IntegrityError(f"{path}: {size} bytes, its record says {record.size_bytes}")
        if full and sha256_of(path) != record.sha256:
            raise IntegrityError(f"{path}: its bytes changed since it was written (SHA-256 differs from the record)")
    except OSError as error:
        raise IntegrityError(f"{path}: {error.strerror or error}", "Run 'fineco verify' on the collection.") from error


def fsync_folder(folder: Path) -> None:
    """Makes a rename inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, write: Callable[[Path], None]) -> FileRecord:
    """Makes `path` by calling `write` on a temporary name beside it; whole or absent whatever happens.

    Raises:
        FinecoError: The disk is full, read-only, or gone; nothing is left under the final name.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors leaves files that only their owner may read
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        record = record_of(temporary)
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except OSError as error:
        _discard(temporary)
        raise FinecoError(
            f"cannot write {path}: {error.strerror or error}",
            "Free some space or choose another collection folder; the same command then continues.",
        ) from error
    except BaseException:
        _discard(temporary)
        raise
    return record


def _discard(temporary: Path) -> None:
    with contextlib.suppress(OSError):  # a read-only disk refuses even to remove what is not there
        temporary.unlink()


def write_bytes(path: Path, data: bytes) -> FileRecord:
    """Writes `data` to `path`, whole or absent."""
    return write_file(path, lambda temporary: _write(temporary, data))


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def link_file(source: Path, path: Path) -> None:
    """Makes `path` the same file as `source`: a hard link where the system has them, else a copy; whole or absent.

    Raises:
        FinecoError: The disk refuses.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        os.link(source, path)
        fsync_folder(path.parent)
    except OSError:
        write_file(path, lambda temporary: _copy(source, temporary))


def _copy(source: Path, path: Path) -> None:
    shutil.copyfile(source, path)


def seal(content: dict[str, Any]) -> bytes:
    """A JSON object as text that begins with the SHA-256 of the rest, so that any change of the file is noticed."""
    sha256 = hashlib.sha256(json.dumps(content, indent=2).encode()).hexdigest()
    return json.dumps({"sha256": sha256, **content}, indent=2).encode() + b"\n"


def read_sealed(path: Path) -> dict[str, Any]:
    """What `seal` made into a file.

    Raises:
        OSError: It cannot be read.
        ValueError: It is not what was written.
    """
    data = read_regular(path)
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(content, dict) or "sha256" not in content:
        raise ValueError("it has no SHA-256 of itself: not written by this version of fineco")
    del content["sha256"]
    if seal(content) != data:
        raise ValueError("its text changed since it was written (its SHA-256 differs)")
    return content


def read_regular(path: Path) -> bytes:
    """The bytes of a file. Raises OSError, or ValueError where it is a pipe or the like."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is not a regular file")  # a pipe would be waited for
    return path.read_bytes()


def write_pointer(path: Path, name: str) -> None:
    """Makes a file that names what is in use: the name on its first line, the SHA-256 of it on the second."""
    write_bytes(path, f"{name}\n{hashlib.sha256(name.encode()).hexdigest()}\n".encode())


def read_pointer(path: Path) -> str:
    """The name that `write_pointer` wrote.

    Raises:
        OSError: It cannot be read.
        ValueError: It is not what was written.
    """
    name, _, digest = read_regular(path).partition(b"\n")
    if digest != hashlib.sha256(name).hexdigest().encode() + b"\n":
        raise ValueError("its text changed since it was written (its SHA-256 differs)")
    return name.decode()
