"""Generations of an index on disk: a reader sees the old one or the new one, never half of one.

index/000002/{index.faiss, index.json, ...} and index/CURRENT, a file that names the generation in use.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast, get_type_hints

from indexes.build import INDEX_FILE, IndexReport
from pipeline.errors import FinecoError, IntegrityError, UsageError
from pipeline.files import (
    FileRecord,
    check_file,
    fsync_folder,
    read_pointer,
    read_sealed,
    record_of,
    seal,
    write_bytes,
    write_pointer,
)

SCHEMA_VERSION = 3
SCHEMA_WITHOUT_MOMENTS = 2  # one pooled vector a video
SIDECAR_FILE = "index.json"
CURRENT = "CURRENT"
UNFINISHED = ".tmp"
REBUILD = "Run 'fineco index --force'."

# A digest of all bytes takes about 1.5 s a gigabyte at every search. Files over this size are checked at their length
# and both ends only (FAISS keeps its header and the table of its cells at the start); 'fineco verify' checks it all.
FULLY_CHECKED_BYTES = 1 << 30
ENDS_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Sidecar:
    """What a generation says of itself.

    Attributes:
        fingerprint: Of the encoder.
        selection: Which selection the vectors are of.
        files: Length and digest of every other file, by name.
        ends: SHA-256 of the first and last `ENDS_BYTES` of the files over `FULLY_CHECKED_BYTES`.
        extra: What the caller wants to find again.
    """

    report: IndexReport
    fingerprint: str
    selection: str
    files: dict[str, FileRecord]
    ends: dict[str, str]
    extra: dict[str, Any]


@contextlib.contextmanager
def new_generation(index_folder: Path) -> Iterator[Path]:
    """A folder to build a generation in; when the block ends well it becomes the current one, at once.

    What an earlier process left unfinished is removed first.

    Raises:
        FinecoError: The disk refuses; the current generation stays.
    """
    try:
        index_folder.mkdir(parents=True, exist_ok=True)
        for leftover in index_folder.glob(f"*{UNFINISHED}"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        number = max([int(p.name) for p in index_folder.iterdir() if p.name.isdecimal()], default=0) + 1
        temporary = index_folder / f"{number:06d}{UNFINISHED}"
        temporary.mkdir()
    except OSError as error:
        raise FinecoError(f"cannot write to {index_folder}: {error.strerror or error}") from error
    try:
        yield temporary
        read_sidecar(temporary)  # a generation without one must never be current
        for path in temporary.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        fsync_folder(temporary)
        final = index_folder / f"{number:06d}"
        os.replace(temporary, final)
        fsync_folder(index_folder)
        write_pointer(index_folder / CURRENT, final.name)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise FinecoError(f"cannot write to {index_folder}: {error.strerror or error}", "Free some space.") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def current_generation(index_folder: Path) -> Path:
    """The generation in use.

    Raises:
        UsageError: There is none.
        IntegrityError: CURRENT names something else than a generation.
    """
    try:
        name = read_pointer(index_folder / CURRENT)
    except FileNotFoundError:
        raise UsageError(
            f"{index_folder.parent} has no index yet", f"Build it with 'fineco index -c {index_folder.parent}'."
        ) from None
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{index_folder / CURRENT}: {error}", REBUILD) from error
    if not name.isdecimal() or not (index_folder / name).is_dir():
        raise IntegrityError(f"{index_folder / CURRENT} names {name!r}, which is not there", REBUILD)
    return index_folder / name


def prune_generations(index_folder: Path, keep: int) -> None:
    """Removes all but the newest `keep` generations; never the current one."""
    current = current_generation(index_folder).name
    names = sorted(p.name for p in index_folder.iterdir() if p.name.isdecimal())
    for name in names[:-keep]:
        if name != current:
            shutil.rmtree(index_folder / name, ignore_errors=True)


def write_sidecar(
    generation: Path, report: IndexReport, fingerprint: str, selection: str, extra: dict[str, Any]
) -> None:
    """Writes `index.json` with the length and digest of every other file of the generation."""
    files = {path.name: record_of(path) for path in sorted(generation.iterdir()) if path.name != SIDECAR_FILE}
    content = {
        "schema": SCHEMA_VERSION,
        "report": report.to_json(),
        "fingerprint": fingerprint,
        "selection": selection,
        "files": {name: asdict(record) for name, record in files.items()},
        "ends": {name: _ends_sha256(generation / name) for name, record in files.items() if _is_large(record)},
        "extra": extra,
    }
    write_bytes(generation / SIDECAR_FILE, seal(content))


def read_sidecar(generation: Path) -> Sidecar:
    """Reads `index.json`, strictly.

    Raises:
        UsageError: An earlier version of fineco made it, which indexed no moments.
        IntegrityError: It is missing, or a field is missing, unknown or of another type.
    """
    path = generation / SIDECAR_FILE
    try:
        content = read_sealed(path)
        schema = content.get("schema")
        if schema == SCHEMA_WITHOUT_MOMENTS:
            raise _outdated(generation)
        if type(schema) is not int or schema != SCHEMA_VERSION:  # True is 1
            raise ValueError(f"field 'schema' is {schema}, expected {SCHEMA_VERSION}")
        del content["schema"]
        _check_fields(content, Sidecar, "")
        _check_fields(content["report"], IndexReport, "report.")
        for name, record in content["files"].items():
            if Path(name).name != name or name == "..":
                raise ValueError(f"field 'files' has {name!r}, which is no plain file name")
            _check_fields(record, FileRecord, f"files.{name}.")
        files = {name: FileRecord(**record) for name, record in content["files"].items()}
        if INDEX_FILE not in files:
            raise ValueError(f"field 'files' has no {INDEX_FILE}")
        for name, record in files.items():
            if _is_large(record) and not isinstance(content["ends"].get(name), str):
                raise ValueError(f"field 'ends' has no digest for {name}")
        return Sidecar(**content | {"report": IndexReport(**content["report"]), "files": files})
    except (OSError, ValueError) as error:  # ValueError: also what is not JSON or not UTF-8
        raise IntegrityError(f"{path}: {error}", REBUILD) from error


def _outdated(generation: Path) -> UsageError:
    folder = generation.parent.parent
    return UsageError(
        f"{folder} was indexed by an earlier version of fineco, with one mean vector a video instead of its moments",
        f"Run 'fineco select -c {folder}' and 'fineco index -c {folder}': nothing is decoded or embedded again.",
    )


def check_generation(generation: Path, sidecar: Sidecar, full: bool = False) -> None:
    """Checks every file of a generation against its sidecar: every byte if `full`, else as far as a search can wait.

    Raises:
        IntegrityError: A file is missing or damaged.
    """
    for name, record in sidecar.files.items():
        path = generation / name
        try:
            check_file(path, record, full=full or not _is_large(record))
        except IntegrityError as error:
            raise IntegrityError(error.message, REBUILD) from error
        if _is_large(record) and _ends_sha256(path) != sidecar.ends[name]:
            raise IntegrityError(f"{path}: its bytes changed since it was written (SHA-256 of its ends)", REBUILD)


def _is_large(record: FileRecord) -> bool:
    return record.size_bytes > FULLY_CHECKED_BYTES


def _ends_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(ENDS_BYTES))
        file.seek(-ENDS_BYTES, os.SEEK_END)
        digest.update(file.read(ENDS_BYTES))
    return digest.hexdigest()


def _check_fields(content: object, kind: type, prefix: str) -> None:
    """Raises ValueError unless `content` is an object with just the fields of a dataclass, of JSON's matching types."""
    if not isinstance(content, dict):
        raise ValueError(f"field '{prefix.rstrip('.')}' is not an object")
    hints = get_type_hints(kind)
    names = [field.name for field in fields(kind)]
    for name in [*names, *content]:
        if name not in content:
            raise ValueError(f"no field '{prefix}{name}'")
        if name not in names:
            raise ValueError(f"unknown field '{prefix}{name}'")
        wanted = hints[name] if hints[name] in (int, float, str) else dict
        accepted = (int, float) if wanted is float else cast(type, wanted)
        value = content[name]
        if isinstance(value, bool) or not isinstance(value, accepted):
            raise ValueError(f"field '{prefix}{name}' is {type(value).__name__}, expected {wanted.__name__}")
