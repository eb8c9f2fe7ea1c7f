"""Manifests: CSV and JSONL files that name videos, with their ids and texts.

A manifest is read twice: once to check every line, so that a mistake is told before any work begins, and once to hand
out its rows, one per path. In between only hashes are kept; then only rows whose path comes again further down.
"""

from __future__ import annotations

import csv
import json
import os
import re
from array import array
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

from pipeline.errors import FinecoError, UsageError
from pipeline.sources import nearest, shown
from pipeline.texts import texts_from_json
from pipeline.types import Bool, TimedText

MANIFEST_EXTENSIONS = (".jsonl", ".csv")
MAX_LINE_BYTES = 4 * 2**20
MAX_PROBLEMS_SHOWN = 10

_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class Candidate(NamedTuple):
    """A path that may be a video, with what a manifest says about it."""

    path: str
    video_id: str = ""
    texts: tuple[TimedText, ...] = ()


def manifest_path(manifest: str | os.PathLike[str]) -> str:
    """Absolute path of a manifest. Raises UsageError unless it is a readable regular file of a known kind."""
    path = os.path.abspath(os.fsdecode(manifest))
    if not os.path.lexists(path):
        raise UsageError(f"no such manifest: {shown(path)}", nearest(path))
    if not path.lower().endswith(MANIFEST_EXTENSIONS):
        raise UsageError(f"{shown(path)} is not a manifest", "A manifest is a .jsonl or .csv file.")
    if not os.path.isfile(path):
        raise UsageError(f"the manifest {shown(path)} is not a file", "It is read twice, so it cannot be a pipe.")
    return path


def manifest_candidates(files: list[str], last: Bool) -> Iterator[Candidate]:
    """One candidate per path of the checked manifests, where its last row is, with the texts of all its rows."""
    pending: dict[str, Candidate] = {}
    index = 0
    for file in files:
        for _, row in _rows(file):
            if isinstance(row, str) or index >= len(last):
                raise FinecoError(f"{shown(file)} changed while it was read", "Run the command again.")
            if earlier := pending.pop(row.path, None):
                texts = tuple(dict.fromkeys(earlier.texts + row.texts))
                row = Candidate(row.path, earlier.video_id or row.video_id, texts)
            if last[index]:
                yield row
            else:
                pending[row.path] = row
            index += 1
    yield from pending.values()  # a collision of hashes, or nothing


def check_manifests(files: list[str]) -> Bool:
    """Reads the manifests once and returns, for every row, whether it is the last of its path (rows,).

    17 bytes per row are kept: hashes of path and id, and the answer.

    Raises:
        UsageError: With the place and the reason of the first bad lines.
    """
    paths, ids, lines, starts = array("q"), array("q"), array("q"), array("q")
    problems: list[str] = []
    n_problems = 0
    for file in files:
        starts.append(len(lines))
        for line, row in _rows(file):
            if isinstance(row, str):
                n_problems += 1
                if len(problems) < MAX_PROBLEMS_SHOWN:
                    problems.append(f"{shown(file)}:{line}: {row}")
            else:
                paths.append(hash(row.path))
                ids.append(hash(row.video_id) or 1 if row.video_id else 0)
                lines.append(line)
    path_keys, id_keys = np.array(paths, np.int64), np.array(ids, np.int64)

    def place(row: int) -> str:
        file = int(np.searchsorted(np.array(starts), row, side="right")) - 1
        return f"{shown(files[file])}:{lines[row]}"

    named = np.flatnonzero(id_keys)
    for keys, others, what in (
        (id_keys, path_keys, "the id of another path on {}"),
        (path_keys, id_keys, "another id for the path on {}"),
    ):
        order = named[np.argsort(keys[named], kind="stable")]
        clash = (keys[order][1:] == keys[order][:-1]) & (others[order][1:] != others[order][:-1])
        n_problems += int(clash.sum())
        for at in np.flatnonzero(clash)[: MAX_PROBLEMS_SHOWN - len(problems)]:
            problems.append(f"{place(int(order[at + 1]))}: {what.format(place(int(order[at])))}")
    if problems:
        more = f"\n(and {n_problems - len(problems)} more)" if n_problems > len(problems) else ""
        raise UsageError("bad lines in the manifest:\n" + "\n".join(problems) + more)
    order = np.argsort(path_keys, kind="stable")
    last = np.ones(len(order), np.bool_)
    last[order[:-1]] = path_keys[order][1:] != path_keys[order][:-1]
    return last


def _rows(file: str) -> Iterator[tuple[int, Candidate | str]]:
    """Line number and row of a manifest, or the reason why the line is bad."""
    read = _csv_values if file.lower().endswith(".csv") else _jsonl_values
    folder = os.path.dirname(file)
    try:
        with open(file, "rb") as stream:
            for line, value in read(stream):
                if isinstance(value, str):
                    yield line, value
                    continue
                try:
                    row: Candidate | str = _row(value, folder)
                except ValueError as error:
                    row = str(error)
                yield line, row
    except OSError as error:
        raise UsageError(f"cannot read the manifest {shown(file)}: {error.strerror or error}") from error


def _row(value: dict[str, object], folder: str) -> Candidate:
    """A row of a manifest. Raises ValueError with the reason if it is bad."""
    path = value.get("path")
    if not isinstance(path, str) or not path:
        raise ValueError(f'no "path" (it has: {", ".join(map(str, value)) or "nothing"})'[:200])
    try:
        if "\0" in path:
            raise ValueError
        os.fsencode(path)
    except ValueError:
        raise ValueError(f"{path!r:.80} cannot be a file name") from None
    video_id = value.get("id")
    if video_id is None:
        video_id = ""
    elif not isinstance(video_id, str) or (video_id and not _ID.fullmatch(video_id)):
        raise ValueError(f"id {video_id!r:.80} is not text of 1 to 128 of A-Z a-z 0-9 . _ -")
    texts, problems = texts_from_json(value, ("caption", "captions", "texts"))
    if problems:
        raise ValueError(problems[0])
    return Candidate(os.path.abspath(os.path.join(folder, path)), video_id, tuple(texts))


def _lines(stream: BinaryIO) -> Iterator[str]:
    """Lines as text; bytes that are not UTF-8 survive as surrogates, for paths. Raises ValueError on a bad file."""
    encoding = "utf-8-sig"  # only the first line may start with a mark
    while line := stream.readline(MAX_LINE_BYTES + 1):
        if len(line) > MAX_LINE_BYTES:
            raise ValueError(f"longer than {MAX_LINE_BYTES} bytes; the rest was not read")
        if encoding == "utf-8-sig" and line.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise ValueError("the file is UTF-16; save it as UTF-8")
        yield line.decode(encoding, "surrogateescape")
        encoding = "utf-8"


def _jsonl_values(stream: BinaryIO) -> Iterator[tuple[int, dict[str, object] | str]]:
    number = 0
    try:
        for number, line in enumerate(_lines(stream), 1):
            if line.isspace():
                continue
            try:
                value = json.loads(line.rstrip())
            except json.JSONDecodeError as error:
                value = f"not JSON: {error.msg} (column {error.colno})"
            except RecursionError:
                value = "nested too deeply"
            except ValueError as error:
                value = f"not JSON: {error}"
            else:
                if not isinstance(value, dict):
                    value = f"not an object ({line.strip():.40})"
            yield number, value
    except ValueError as error:
        yield number + 1, str(error)


def _csv_values(stream: BinaryIO) -> Iterator[tuple[int, dict[str, object] | str]]:
    reader = csv.reader(_lines(stream), strict=True)
    header: list[str] | None = None
    while True:
        number = reader.line_num + 1  # where the row starts; quoted text may go over several lines
        try:
            fields = next(reader)
        except StopIteration:
            return
        except (csv.Error, ValueError) as error:
            yield number, f"not CSV: {error}" if isinstance(error, csv.Error) else str(error)
            return  # a quote that does not end takes everything behind it
        if header is None:
            header = [name.strip() for name in fields]
            if "path" not in header or len(set(header)) < len(header):
                yield number, f'the header needs "path", and every name once (it has: {", ".join(header)})'
                return
        elif len(fields) not in (0, len(header)):
            yield number, f"{len(fields)} fields, the header has {len(header)}"
        elif fields:
            value: dict[str, object] = dict(zip(header, fields, strict=True))
            yield number, _with_seconds(value)


def _with_seconds(value: dict[str, object]) -> dict[str, object] | str:
    """The fields of a CSV row with `start` and `end` as numbers; empty ones are left out."""
    for name in ("start", "end", "caption"):
        if name in value and value[name] == "":
            del value[name]
    for name in ("start", "end"):
        try:
            if name in value:
                value[name] = float(str(value[name]))
        except ValueError:
            return f"{name} is {value[name]!r:.40}, expected seconds"
    return {name: value[name] for name in ("path", "id", "caption", "start", "end") if name in value}
