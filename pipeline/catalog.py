"""What videos there are: folders, files, patterns and manifests in, `Video` or its `Outcome` out, one at a time.

A video is known by its content, so a rename is no new video; by its manifest id where it has one. Rules:

- A folder is searched to the bottom, in order of name, for VIDEO_EXTENSIONS (any case). Links to files and folders are
  followed, each folder once; names that start with a dot are left out. Patterns (* ? [ ] **) find by the same rules.
- A file that is named is taken whatever its extension.
- A manifest (.jsonl, .csv) has rows with `path` (relative to the manifest) and, as wanted, `id`, `caption` with `start`
  and `end` in seconds, and in JSONL `captions` or `texts` (see pipeline.texts). Rows of one path are one video.

Nothing grows with the collection but a digest and a name per video (about 200 bytes).
"""

from __future__ import annotations

import csv
import difflib
import errno
import fnmatch
import functools
import hashlib
import json
import os
import re
import stat
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from pipeline.errors import FinecoError, UsageError, VideoError
from pipeline.texts import is_sidecar, names_beside, read_texts, texts_from_json
from pipeline.types import Bool, Outcome, TimedText, Video

# Self-contained formats only: a playlist (m3u8, mpd, ffconcat, sdp) opens files and addresses of its writer's choice.
VIDEO_EXTENSIONS = frozenset(
    f".{name}"
    for names in (
        "mp4 m4v mov qt mkv webm avi divx mpg mpeg mpe m1v m2v ts m2ts mts vob flv f4v wmv asf 3gp 3g2 ogv ogm rm rmvb",
        "mxf dv gif h264 264 h265 265 hevc mjpeg mjpg ivf y4m",
    )
    for name in names.split()
)
MANIFEST_EXTENSIONS = (".jsonl", ".csv")
MAX_LINE_BYTES = 4 * 2**20
MAX_PROBLEMS_SHOWN = 10
WHOLE_BYTES = 2**20  # files up to this size are digested whole
EDGE_BYTES = 128 * 2**10
PIECE_BYTES = 64 * 2**10
N_PIECES = 8

_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_MAGIC = re.compile(r"[*?[]")


class Known(NamedTuple):
    """What an earlier run recorded of a path."""

    size_bytes: int
    mtime_ns: int
    ctime_ns: int
    content: str


class _Candidate(NamedTuple):
    """A path that may be a video, with what a manifest says about it."""

    path: str
    video_id: str = ""
    texts: tuple[TimedText, ...] = ()


def _nothing_known(path: str) -> Known | None:
    return None


def _ignore(line: str) -> None:
    return None


def find_videos(
    sources: Sequence[str | os.PathLike[str]],
    manifest: str | os.PathLike[str] | None = None,
    known: Callable[[str], Known | None] = _nothing_known,
    warn: Callable[[str], None] = _ignore,
) -> Iterator[Video | Outcome]:
    """Finds the videos of `sources` and `manifest`; problems of single files come as Outcomes of stage `catalog`.

    Every source and every line of a manifest is checked before this returns; the search itself is lazy. Manifests come
    first, so that an id there holds for a file that a folder shows again.

    Args:
        sources: Files, folders, patterns, and manifests (by their extension). A path that exists is no pattern.
        known: The record of a path from an earlier run; its content is trusted while size, mtime and ctime are equal.
        warn: Gets one line per thing that was left out without costing a video.

    Raises:
        UsageError: A source is not there, a manifest has bad lines, or (once the search is over) nothing was found.
    """
    manifests = [] if manifest is None else [_manifest_path(manifest)]
    others: list[str] = []
    for source in map(os.fsdecode, sources):
        if source.lower().endswith(MANIFEST_EXTENSIONS) and os.path.exists(source) and not os.path.isdir(source):
            manifests.append(_manifest_path(source))
        else:
            _check_source(source)
            others.append(source)
    if not manifests and not others:
        raise UsageError("no videos were named", "Name files, folders, quoted patterns or a manifest (.jsonl, .csv).")
    return _examined(_candidates(manifests, _check_manifests(manifests), others, warn), known, warn)


def content_digest(path: str, size: int) -> str:
    """32 hex digits for the size and the bytes of a file; above 1 MiB of its start, its end and eight pieces between.

    Raises:
        VideoError: `changed`, if the file has become shorter than `size`.
    """
    if size <= WHOLE_BYTES:
        pieces = [(0, size)]
    else:
        room = size - 2 * EDGE_BYTES - PIECE_BYTES
        inner = [(EDGE_BYTES + room * (i + 1) // (N_PIECES + 1), PIECE_BYTES) for i in range(N_PIECES)]
        pieces = [(0, EDGE_BYTES), *inner, (size - EDGE_BYTES, EDGE_BYTES)]
    digest = hashlib.sha256(b"%d\n" % size)
    with open(path, "rb", buffering=0) as file:
        for start, length in pieces:
            data = os.pread(file.fileno(), length, start)
            if len(data) != length:
                raise VideoError("changed", f"became shorter than {size} bytes while it was read", "catalog")
            digest.update(data)
    return digest.hexdigest()[:32]


def check_unchanged(video: Video) -> bool:
    """Whether the file still has the size, mtime and ctime that were recorded when its content was digested."""
    try:
        status = os.stat(video.path)
    except OSError:
        return False
    recorded = (video.size_bytes, video.mtime_ns, video.ctime_ns)
    return (status.st_size, status.st_mtime_ns, status.st_ctime_ns) == recorded


def _examined(
    candidates: Iterator[_Candidate | Outcome], known: Callable[[str], Known | None], warn: Callable[[str], None]
) -> Iterator[Video | Outcome]:
    """Every candidate once: as a video with its texts, or as what became of it."""
    first = _FirstPaths()
    reported: set[str] = set()  # paths that are not the first of their content
    sidecars = functools.lru_cache(maxsize=64)(_sidecars)
    for candidate in candidates:
        if isinstance(candidate, Outcome):
            yield candidate
            continue
        path, video_id, texts = candidate
        if path in reported:
            continue
        try:
            status, content = _content(path, known)
            earlier, earlier_has_id = first.put(content, path, bool(video_id))
            if earlier == path:
                continue
            if earlier:
                reported.add(path)
                if not (video_id and earlier_has_id):
                    raise VideoError("duplicate", f"same content as {earlier!r}", "catalog")
        except VideoError as error:
            reported.add(path)
            yield _outcome(path, error.code, error.message, video_id)
            continue
        folder, name = os.path.split(path)
        beside = names_beside(os.path.splitext(name)[0], sidecars(folder))
        if beside:
            more, notes = read_texts(Path(path), beside)
            texts = tuple(dict.fromkeys(texts + more))
            for note in notes:
                warn(note)
        yield Video(
            video_id=video_id or content,
            content=content,
            path=path,
            size_bytes=status.st_size,
            mtime_ns=status.st_mtime_ns,
            ctime_ns=status.st_ctime_ns,
            texts=texts,
        )


def _content(path: str, known: Callable[[str], Known | None]) -> tuple[os.stat_result, str]:
    """Status and content digest of a file. Raises VideoError if it cannot be a video."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # and is never opened: a pipe would wait for its writer
            raise VideoError("not_a_file", f"is {_kind(status.st_mode)}, not a file", "catalog")
        if status.st_size == 0:
            raise VideoError("empty", "has 0 bytes", "catalog")
        record = known(path)
        # Nobody can set ctime, so an edit that puts mtime back is seen.
        if record is not None and record[:3] == (status.st_size, status.st_mtime_ns, status.st_ctime_ns):
            return status, record.content
        return status, content_digest(path, status.st_size)
    except OSError as error:
        raise VideoError(*_why(path, error), "catalog") from error


def _why(path: str, error: OSError) -> tuple[str, str]:
    """Code and message for a file or folder that the system refuses."""
    if isinstance(error, FileNotFoundError) and os.path.islink(path):
        return "missing", f"is a link to {os.readlink(path)!r}, which is not there"
    if isinstance(error, PermissionError):
        return "unreadable", "may not be read by this user (permission denied)"
    missing = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
    return ("missing" if missing else "unreadable"), f"cannot be read: {error.strerror or error}"


def _kind(mode: int) -> str:
    kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"))
    return next((name for is_kind, name in kinds if is_kind(mode)), "a device")


def _outcome(path: str, code: str, message: str, video_id: str = "") -> Outcome:
    """What became of a path that gives no video; without a manifest id it is known by its path."""
    video_id = video_id or "path-" + hashlib.sha256(os.fsencode(path)).hexdigest()[:27]
    return Outcome(video_id, path, "skipped" if code == "duplicate" else "failed", "catalog", code, message)


class _FirstPaths:
    """The first path of every content. Folders are kept once: a million videos cost 170 MB instead of 250."""

    def __init__(self) -> None:
        self._folders: list[str] = []
        self._names: dict[bytes, str] = {}  # digest -> folder's number, "#" if it has a manifest id, "/", name

    def put(self, content: str, path: str, has_id: bool) -> tuple[str, bool]:
        """Records `path` unless the content has one; returns the path there was ("" if none), and if it has an id."""
        key = bytes.fromhex(content)
        if key in self._names:
            folder, _, name = self._names[key].partition("/")
            return os.path.join(self._folders[int(folder.rstrip("#"))], name), folder.endswith("#")
        folder, name = os.path.split(path)
        if not self._folders or self._folders[-1] != folder:
            self._folders.append(folder)
        self._names[key] = f"{len(self._folders) - 1}{'#' if has_id else ''}/{name}"
        return "", False


def _sidecars(folder: str) -> list[str]:
    """Sorted names in a folder that may hold the text of a video."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if is_sidecar(entry.name))
    except OSError:
        return []  # a folder may be passed through without the right to list it


# ---- files, folders and patterns


def _check_source(source: str) -> None:
    """Raises UsageError unless the source is there, can be listed, or is a pattern that finds something."""
    if source and os.path.lexists(source):
        if os.path.isdir(source):
            try:
                os.scandir(source).close()
            except OSError as error:
                raise UsageError(f"cannot read the folder {_shown(source)}: {error.strerror or error}") from error
        return
    if _MAGIC.search(source):
        if next(_matches(source), None) is None:
            raise UsageError(f"nothing matches {_shown(source)}", _nearest(source))
        return
    if "://" in source:
        raise UsageError(f"{_shown(source)} is an address; fineco reads local files", "Download it first.")
    raise UsageError(f"no such file or folder: {_shown(source) if source else 'an empty name'}", _nearest(source))


def _nearest(source: str) -> str:
    """What there is near a path that is not there."""
    folder, wanted = os.path.split(os.path.abspath(source))
    while not os.path.isdir(folder):
        folder, wanted = os.path.split(folder)
    try:
        names = os.listdir(folder)
    except OSError:
        return f"The nearest folder, {_shown(folder)}, may not be listed by this user."
    close = difflib.get_close_matches(wanted, names[:10_000], n=1) if len(wanted) <= 255 else []
    hint = f" Did you mean {_shown(os.path.join(folder, close[0]))}?" if close else ""
    return f"The nearest folder, {_shown(folder)}, has {len(names)} entries, none of this name.{hint}"


def _shown(path: str) -> str:
    """A path as one line of text, whatever its bytes are."""
    return path if path.isprintable() else repr(path)


class _Census:
    """What the search passed by, for the message when nothing is found."""

    def __init__(self) -> None:
        self.visited: set[tuple[int, int]] = set()  # folders by device and inode: links cannot make a loop
        self.n_hidden = 0
        self.others: Counter[str] = Counter()

    def is_video(self, name: str) -> bool:
        """Whether the extension is one of VIDEO_EXTENSIONS; counts it if not."""
        extension = os.path.splitext(name)[1].lower()
        if extension in VIDEO_EXTENSIONS:
            return True
        self.others[extension if len(self.others) < 1000 else "..."] += 1
        return False

    def __str__(self) -> str:
        kinds = ", ".join(f"{n} {kind or 'without extension'}" for kind, n in self.others.most_common(5))
        seen = f"{self.others.total()} files, none with the extension of a video" + (f" ({kinds})" if kinds else "")
        return seen + (f", {self.n_hidden} hidden names left out" if self.n_hidden else "")


def _candidates(
    manifests: list[str], last: Bool, sources: list[str], warn: Callable[[str], None]
) -> Iterator[_Candidate | Outcome]:
    """All candidates, the manifests' first. Raises UsageError at the end if there was none."""
    found = False
    for row in _manifest_candidates(manifests, last):
        found = True
        yield row
    census = _Census()
    empty: list[str] = []
    for source in sources:
        n_found = 0
        n_visited = len(census.visited)
        for path in _listed(source, census):
            n_found += 1
            yield path if isinstance(path, Outcome) else _Candidate(path)
        found = found or n_found > 0
        if not n_found and (len(census.visited) > n_visited or not os.path.isdir(source)):
            empty.append(source)  # a folder that an earlier source went through is not empty
    if not found:
        raise UsageError(
            f"no videos in {', '.join(map(_shown, [*manifests, *sources]))}",
            f"Seen: {census}. A file that is named itself is taken whatever its extension." if sources else "",
        )
    for source in empty:
        warn(f"{source!r}: no videos found there")


def _listed(source: str, census: _Census) -> Iterator[str | Outcome]:
    """The files that a source stands for."""
    is_pattern = not os.path.lexists(source)
    for path in _matches(source) if is_pattern else [os.path.abspath(source)]:
        if os.path.isdir(path):
            yield from _walk(path, census)
        elif not is_pattern or census.is_video(path):
            yield path


def _walk(top: str, census: _Census) -> Iterator[str | Outcome]:
    """The videos under a folder in order of name, each folder once; a subfolder that cannot be read is an Outcome."""
    levels = [(top, [""])]  # names left to do, last first, so that they are freed one by one
    while levels:
        folder, names = levels[-1]
        if not names:
            levels.pop()
            continue
        name = names.pop()
        path = os.path.join(folder, name) if name else folder
        if name and not name.endswith("/"):
            yield path
            continue
        path = path.rstrip("/") or "/"
        try:
            levels.append((path, _list_folder(path, census)))
        except OSError as error:
            yield _outcome(path, *_why(path, error))


def _list_folder(folder: str, census: _Census) -> list[str]:
    """Names of videos, and of folders with "/" behind, in reverse order; nothing if the folder was visited."""
    status = os.stat(folder)
    if (status.st_dev, status.st_ino) in census.visited:
        return []
    census.visited.add((status.st_dev, status.st_ino))
    names: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                census.n_hidden += 1
            elif _is_folder(entry):
                names.append(entry.name + "/")
            elif census.is_video(entry.name):
                names.append(entry.name)
    names.sort(reverse=True)
    return names


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _matches(pattern: str) -> Iterator[str]:
    """Absolute paths that match a pattern; only what the user typed is a pattern, not the current folder's own name."""
    parts = [part for part in os.path.normpath(pattern).split("/") if part]
    return _expand("/" if pattern.startswith("/") else os.getcwd(), parts)


def _expand(folder: str, parts: list[str]) -> Iterator[str]:
    """Matches of the parts below `folder`, in order of name, as a shell would give them."""
    part, rest = parts[0], parts[1:]
    if part == "**":
        rest = rest[next((i for i, other in enumerate(rest) if other != "**"), len(rest)) :]
        if not rest:
            yield os.path.abspath(folder)  # and all below, by _walk
            return
        for below in _folders(folder):
            yield from _expand(below, rest)
        return
    literal = os.path.join(folder, part)
    if os.path.lexists(literal) or not _MAGIC.search(part):
        found = [literal] if os.path.lexists(literal) else []
    else:
        try:
            names = sorted(os.listdir(folder))
        except OSError:
            return
        hidden = part.startswith(".")
        found = [
            os.path.join(folder, name) for name in fnmatch.filter(names, part) if hidden or not name.startswith(".")
        ]
    for path in found:
        if not rest:
            yield os.path.abspath(path)
        elif os.path.isdir(path):
            yield from _expand(path, rest)


def _folders(top: str) -> Iterator[str]:
    """The folder and all folders below, each once."""
    visited: set[tuple[int, int]] = set()
    left = [top]
    while left:
        folder = left.pop()
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                below = sorted((e.path for e in entries if not e.name.startswith(".") and _is_folder(e)), reverse=True)
        except OSError:
            continue
        yield folder
        left += below


# ---- manifests


def _manifest_path(manifest: str | os.PathLike[str]) -> str:
    """Absolute path of a manifest. Raises UsageError unless it is a readable regular file of a known kind."""
    path = os.path.abspath(os.fsdecode(manifest))
    if not os.path.lexists(path):
        raise UsageError(f"no such manifest: {_shown(path)}", _nearest(path))
    if not path.lower().endswith(MANIFEST_EXTENSIONS):
        raise UsageError(f"{_shown(path)} is not a manifest", "A manifest is a .jsonl or .csv file.")
    if not os.path.isfile(path):
        raise UsageError(f"the manifest {_shown(path)} is not a file", "It is read twice, so it cannot be a pipe.")
    return path


def _manifest_candidates(files: list[str], last: Bool) -> Iterator[_Candidate]:
    """One candidate per path of the checked manifests, where its last row is, with the texts of all its rows."""
    pending: dict[str, _Candidate] = {}
    index = 0
    for file in files:
        for _, row in _rows(file):
            if isinstance(row, str) or index >= len(last):
                raise FinecoError(f"{_shown(file)} changed while it was read", "Run the command again.")
            if earlier := pending.pop(row.path, None):
                texts = tuple(dict.fromkeys(earlier.texts + row.texts))
                row = _Candidate(row.path, earlier.video_id or row.video_id, texts)
            if last[index]:
                yield row
            else:
                pending[row.path] = row
            index += 1
    yield from pending.values()  # a collision of hashes, or nothing


def _check_manifests(files: list[str]) -> Bool:
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
                    problems.append(f"{_shown(file)}:{line}: {row}")
            else:
                paths.append(hash(row.path))
                ids.append(hash(row.video_id) or 1 if row.video_id else 0)
                lines.append(line)
    path_keys, id_keys = np.array(paths, np.int64), np.array(ids, np.int64)

    def place(row: int) -> str:
        file = int(np.searchsorted(np.array(starts), row, side="right")) - 1
        return f"{_shown(files[file])}:{lines[row]}"

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


def _rows(file: str) -> Iterator[tuple[int, _Candidate | str]]:
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
                    row: _Candidate | str = _row(value, folder)
                except ValueError as error:
                    row = str(error)
                yield line, row
    except OSError as error:
        raise UsageError(f"cannot read the manifest {_shown(file)}: {error.strerror or error}") from error


def _row(value: dict[str, object], folder: str) -> _Candidate:
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
    return _Candidate(os.path.abspath(os.path.join(folder, path)), video_id, tuple(texts))


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
