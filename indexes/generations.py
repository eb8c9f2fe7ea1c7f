"""Generations of an index on disk: a reader sees the old one or the new one, never half of one.

index/000002/{index.faiss, index.json, ...} and index/CURRENT, a file that names the generation in use.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from indexes.build import IndexReport
from pipeline.errors import IntegrityError, UsageError
from pipeline.files import FileRecord, fsync_folder, record_of, write_bytes

SCHEMA_VERSION = 1
SIDECAR_FILE = "index.json"
CURRENT = "CURRENT"
UNFINISHED = ".tmp"


@dataclass(frozen=True, slots=True)
class Sidecar:
    """What a generation says of itself."""

    report: IndexReport
    fingerprint: str  # of the encoder
    selection: str
    files: dict[str, FileRecord]
    extra: dict[str, Any]


@contextlib.contextmanager
def new_generation(index_folder: Path) -> Iterator[Path]:
    """A folder to build a generation in; when the block ends well it becomes the current one, at once.

    What an earlier process left unfinished is removed first.
    """
    index_folder.mkdir(parents=True, exist_ok=True)
    for leftover in index_folder.glob(f"*{UNFINISHED}"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    number = max([int(p.name) for p in index_folder.iterdir() if p.name.isdigit()], default=0) + 1
    temporary = index_folder / f"{number:06d}{UNFINISHED}"
    temporary.mkdir()
    try:
        yield temporary
        fsync_folder(temporary)
        final = index_folder / f"{number:06d}"
        os.replace(temporary, final)
        fsync_folder(index_folder)
        write_bytes(index_folder / CURRENT, f"{final.name}\n".encode())
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
        name = (index_folder / CURRENT).read_text("ascii").strip()
    except FileNotFoundError:
        raise UsageError(
            f"{index_folder.parent} has no index yet", f"Build it with 'fineco index -c {index_folder.parent}'."
        ) from None
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{index_folder / CURRENT}: {error}") from error
    if not name.isdigit() or not (index_folder / name).is_dir():
        raise IntegrityError(
            f"{index_folder / CURRENT} names {name!r}, which is not there", "Run 'fineco index --force'."
        )
    return index_folder / name


def prune_generations(index_folder: Path, keep: int) -> None:
    """Removes all but the newest `keep` generations; never the current one."""
    current = current_generation(index_folder).name
    names = sorted(p.name for p in index_folder.iterdir() if p.name.isdigit())
    for name in names[:-keep]:
        if name != current:
            shutil.rmtree(index_folder / name, ignore_errors=True)


def write_sidecar(
    generation: Path, report: IndexReport, fingerprint: str, selection: str, extra: dict[str, Any]
) -> None:
    """Writes `index.json` with the length and digest of every other file of the generation."""
    content = {
        "schema": SCHEMA_VERSION,
        "report": report.to_json(),
        "fingerprint": fingerprint,
        "selection": selection,
        "files": {p.name: asdict(record_of(p)) for p in sorted(generation.iterdir()) if p.name != SIDECAR_FILE},
        "extra": extra,
    }
    write_bytes(generation / SIDECAR_FILE, json.dumps(content, indent=2).encode() + b"\n")


def read_sidecar(generation: Path) -> Sidecar:
    """Reads `index.json`, strictly.

    Raises:
        IntegrityError: It is missing, or a field is missing or of another type.
    """
    path = generation / SIDECAR_FILE
    try:
        content = json.loads(path.read_text("utf-8"))
        if content["schema"] != SCHEMA_VERSION:
            raise ValueError(f"schema {content['schema']}, expected {SCHEMA_VERSION}")
        files = {str(name): FileRecord(int(r["size_bytes"]), str(r["sha256"])) for name, r in content["files"].items()}
        report = IndexReport(**content["report"])
        if not isinstance(content["extra"], dict):
            raise TypeError("extra is not an object")
        return Sidecar(report, str(content["fingerprint"]), str(content["selection"]), files, content["extra"])
    except KeyError as error:
        raise IntegrityError(f"{path}: no field {error}", "Run 'fineco index --force'.") from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{path}: {error}", "Run 'fineco index --force'.") from error
