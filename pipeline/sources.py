"""Files, folders and patterns: the files that a source stands for, one at a time, and why a path gives no video.

A folder is searched in order of name, each folder once, hidden names left out; what is passed by is counted, for the
message when nothing is found.
"""

from __future__ import annotations

import difflib
import errno
import fnmatch
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator

from pipeline.errors import UsageError
from pipeline.types import Outcome

# Self-contained formats only: a playlist (m3u8, mpd, ffconcat, sdp) opens files and addresses of its writer's choice.
VIDEO_EXTENSIONS = frozenset(
    f".{name}"
    for names in (
        "mp4 m4v mov qt mkv webm avi divx mpg mpeg mpe m1v m2v ts m2ts mts vob flv f4v wmv asf 3gp 3g2 ogv ogm rm rmvb",
        "mxf dv gif h264 264 h265 265 hevc mjpeg mjpg ivf y4m",
    )
    for name in names.split()
)

_MAGIC = re.compile(r"[*?[]")


def check_source(source: str) -> None:
    """Raises UsageError unless the source is there, can be listed, or is a pattern that finds something."""
    if source and os.path.lexists(source):
        if os.path.isdir(source):
            try:
                os.scandir(source).close()
            except OSError as error:
                raise UsageError(f"cannot read the folder {shown(source)}: {error.strerror or error}") from error
        return
    if _MAGIC.search(source):
        if next(_matches(source), None) is None:
            raise UsageError(f"nothing matches {shown(source)}", nearest(source))
        return
    if "://" in source:
        raise UsageError(f"{shown(source)} is an address; fineco reads local files", "Download it first.")
    raise UsageError(f"no such file or folder: {shown(source) if source else 'an empty name'}", nearest(source))


def nearest(source: str) -> str:
    """What there is near a path that is not there."""
    folder, wanted = os.path.split(os.path.abspath(source))
    while not os.path.isdir(folder):
        folder, wanted = os.path.split(folder)
    try:
        names = os.listdir(folder)
    except OSError:
        return f"The nearest folder, {shown(folder)}, may not be listed by this user."
    close = difflib.get_close_matches(wanted, names[:10_000], n=1) if len(wanted) <= 255 else []
    hint = f" Did you mean {shown(os.path.join(folder, close[0]))}?" if close else ""
    return f"The nearest folder, {shown(folder)}, has {len(names)} entries, none of this name.{hint}"


def shown(path: str) -> str:
    """A path as one line of text, whatever its bytes are."""
    return path if path.isprintable() else repr(path)


class Census:
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


def list_source(source: str, census: Census) -> Iterator[str | Outcome]:
    """The files that a source stands for."""
    is_pattern = not os.path.lexists(source)
    for path in _matches(source) if is_pattern else [os.path.abspath(source)]:
        if os.path.isdir(path):
            yield from _walk(path, census)
        elif not is_pattern or census.is_video(path):
            yield path


def _walk(top: str, census: Census) -> Iterator[str | Outcome]:
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
            yield no_video(path, *why_refused(path, error))


def _list_folder(folder: str, census: Census) -> list[str]:
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


def why_refused(path: str, error: OSError) -> tuple[str, str]:
    """Code and message for a file or folder that the system refuses."""
    if isinstance(error, FileNotFoundError) and os.path.islink(path):
        return "missing", f"is a link to {os.readlink(path)!r}, which is not there"
    if isinstance(error, PermissionError):
        return "unreadable", "may not be read by this user (permission denied)"
    missing = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
    return ("missing" if missing else "unreadable"), f"cannot be read: {error.strerror or error}"


def no_video(path: str, code: str, message: str, video_id: str = "") -> Outcome:
    """What became of a path that gives no video; without a manifest id it is known by its path."""
    video_id = video_id or "path-" + hashlib.sha256(os.fsencode(path)).hexdigest()[:27]
    return Outcome(video_id, path, "skipped" if code == "duplicate" else "failed", "catalog", code, message)
