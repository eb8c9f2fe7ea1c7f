"""Annotation files as bytes, text and lines: bounded, unzipped, with the place of whatever is wrong."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import stat
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import UsageError

MAX_FILE_BYTES = 256 * 2**20  # MSR-VTT's largest unpacks to 16 MB


class BadRow(ValueError):
    """A row that cannot be used: where it stands, and why."""

    def __init__(self, place: str, reason: str) -> None:
        super().__init__(f"{place}: {reason}")


def read_text(path: Path) -> tuple[str, str]:
    """The text of a file, or of the one JSON file in a zip; and the SHA-256 of the file itself.

    Raises:
        UsageError: No such file, too large, not UTF-8, or a zip that cannot be read.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UsageError(f"{path} is not a file")
        if status.st_size > MAX_FILE_BYTES:
            raise UsageError(f"{path}: {status.st_size} bytes, at most {MAX_FILE_BYTES} are read")
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    sha256 = hashlib.sha256(data).hexdigest()
    if data.startswith(b"PK\x03\x04"):
        data = _unzipped(path, data)
    try:
        return data.decode("utf-8-sig"), sha256
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{path}:{line}: not UTF-8 text", "Save it as UTF-8.") from error


def _unzipped(path: Path, data: bytes) -> bytes:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = [name for name in archive.namelist() if name.endswith(".json") and "__MACOSX" not in name]
            if len(names) != 1:
                raise UsageError(f"{path}: {len(names)} JSON files in it, expected one", "Unpack it and name the file.")
            with archive.open(names[0]) as member:
                unpacked = member.read(MAX_FILE_BYTES + 1)  # what its directory says of the length may be a lie
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError, OSError) as error:
        raise UsageError(f"{path}: not a readable zip file ({error})") from error
    if len(unpacked) > MAX_FILE_BYTES:
        raise UsageError(f"{path}: {names[0]} unpacks to more than {MAX_FILE_BYTES} bytes")
    return unpacked


def json_lines(text: str) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    """Line number and object of every line that is not empty."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except RecursionError:
            value = BadRow(str(number), "nested too deeply")
        except ValueError as error:
            value = BadRow(str(number), f"not JSON: {error}")
        if not isinstance(value, dict | BadRow):
            value = BadRow(str(number), f"not an object ({line.strip():.40})")
        yield str(number), value


def csv_rows(text: str) -> Iterator[tuple[str, dict[str, str] | BadRow]]:
    """Line number and fields, by the names in the header, of every row."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    while True:
        line = str(reader.line_num + 1)  # where the row starts; quoted text may go over several lines
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, BadRow(line, f"not CSV: {error}")
            return
        if not header:
            header = [name.strip() for name in fields]
        elif fields and len(fields) != len(header):
            yield line, BadRow(line, f"{len(fields)} fields, the header has {len(header)}")
        elif fields:
            yield line, dict(zip(header, fields, strict=True))
