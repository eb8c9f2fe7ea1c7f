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

import functools
import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import UsageError, VideoError
from pipeline.manifest import MANIFEST_EXTENSIONS, Candidate, check_manifests, manifest_candidates, manifest_path
from pipeline.sources import Census, check_source, list_source, no_video, shown, why_refused
from pipeline.texts import is_sidecar, names_beside, read_texts
from pipeline.types import Bool, Outcome, Video

WHOLE_BYTES = 2**20  # files up to this size are digested whole
EDGE_BYTES = 128 * 2**10
PIECE_BYTES = 64 * 2**10
N_PIECES = 8


class Known(NamedTuple):
    """What an earlier run recorded of a path."""

    size_bytes: int
    mtime_ns: int
    ctime_ns: int
    content: str


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
    manifests = [] if manifest is None else [manifest_path(manifest)]
    others: list[str] = []
    for source in map(os.fsdecode, sources):
        if source.lower().endswith(MANIFEST_EXTENSIONS) and os.path.exists(source) and not os.path.isdir(source):
            manifests.append(manifest_path(source))
        else:
            check_source(source)
            others.append(source)
    if not manifests and not others:
        raise UsageError("no videos were named", "Name files, folders, quoted patterns or a manifest (.jsonl, .csv).")
    return _examined(_candidates(manifests, check_manifests(manifests), others, warn), known, warn)


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


def _candidates(
    manifests: list[str], last: Bool, sources: list[str], warn: Callable[[str], None]
) -> Iterator[Candidate | Outcome]:
    """All candidates, the manifests' first. Raises UsageError at the end if there was none."""
    found = False
    for row in manifest_candidates(manifests, last):
        found = True
        yield row
    census = Census()
    empty: list[str] = []
    for source in sources:
        n_found = 0
        n_visited = len(census.visited)
        for path in list_source(source, census):
            n_found += 1
            yield path if isinstance(path, Outcome) else Candidate(path)
        found = found or n_found > 0
        if not n_found and (len(census.visited) > n_visited or not os.path.isdir(source)):
            empty.append(source)  # a folder that an earlier source went through is not empty
    if not found:
        raise UsageError(
            f"no videos in {', '.join(map(shown, [*manifests, *sources]))}",
            f"Seen: {census}. A file that is named itself is taken whatever its extension." if sources else "",
        )
    for source in empty:
        warn(f"{source!r}: no videos found there")


def _examined(
    candidates: Iterator[Candidate | Outcome], known: Callable[[str], Known | None], warn: Callable[[str], None]
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
            yield no_video(path, error.code, error.message, video_id)
            continue
        folder, name = os.path.split(path)
        notes: tuple[str, ...] = ()
        if beside := names_beside(os.path.splitext(name)[0], sidecars(folder)):
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
            text_notes=notes,
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
        raise VideoError(*why_refused(path, error), "catalog") from error


def _kind(mode: int) -> str:
    kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"))
    return next((name for is_kind, name in kinds if is_kind(mode)), "a device")


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
