"""A collection on disk: its configuration, who writes to it, what is in it and what became of every video.

    kitchen/
      collection.json            configuration and encoder
      .lock                      held by the one writer; names it
      outcomes/000001.jsonl      commits, in order: a digest, the files each one brought, a row for every video in it
      frames/ features/ embeddings/SELECTION/   000001.h5, named after the commit that brought them
      embeddings/CURRENT         the selection in use
      index/                     generations (see indexes.generations)

A commit's file in `outcomes/` is written last. A data file that no commit names is debris of a process that died and is
removed by the next writer, so that every video is either wholly in the collection or not at all.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.catalog import Known
from pipeline.errors import FinecoError, IntegrityError, UsageError
from pipeline.files import TEMPORARY_SUFFIX, FileRecord, check_file, write_bytes
from pipeline.types import Outcome, TimedText, Video

SCHEMA_VERSION = 1
CONFIG_FILE = "collection.json"
LOCK_FILE = ".lock"
OUTCOMES = "outcomes"
FRAMES, FEATURES, EMBEDDINGS, INDEX = "frames", "features", "embeddings", "index"
CURRENT = "CURRENT"


@dataclass(frozen=True, slots=True)
class Row:
    """One video in a commit: what the catalog knew of it, and what became of it."""

    outcome: Outcome
    content: str = ""
    size_bytes: int = -1
    mtime_ns: int = -1
    ctime_ns: int = -1
    duration_seconds: float | None = None
    texts: tuple[TimedText, ...] = ()

    @classmethod
    def of(cls, video: Video, outcome: Outcome, duration_seconds: float | None = None) -> Row:
        """The row of a video that the catalog found."""
        return cls(
            outcome, video.content, video.size_bytes, video.mtime_ns, video.ctime_ns, duration_seconds, video.texts
        )

    def to_json(self) -> dict[str, Any]:
        row = asdict(self.outcome) | asdict(self)
        del row["outcome"]
        row["texts"] = [[t.text, t.start_seconds, t.end_seconds] for t in self.texts]
        return row

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Row:
        outcome = {name: row.pop(name) for name in Outcome.__slots__}
        outcome["notes"] = tuple(outcome["notes"])
        row["texts"] = tuple(TimedText(*text) for text in row["texts"])
        return cls(Outcome(**outcome), **row)

    def video(self) -> Video:
        """The video as it was when the row was written."""
        return Video(
            self.outcome.video_id,
            self.content,
            self.outcome.path,
            self.size_bytes,
            self.mtime_ns,
            self.ctime_ns,
            self.duration_seconds,
            self.texts,
        )


@dataclass(frozen=True, slots=True)
class Commit:
    """One step of the collection: data files that came with it (relative name -> record), and its rows."""

    number: int
    stage: str
    files: dict[str, FileRecord]
    rows: list[Row]


@dataclass(slots=True)
class Place:
    """Where the latest data of a kind lies for one video: commit number, and the content it was made from."""

    commit: int
    content: str


@dataclass(slots=True)
class State:
    """The merged commits: the last word on every path, and on every video that has data.

    Attributes:
        latest: path -> (commit number, video id, status, code): the last row of a path; none where one was moved from.
        known: path -> size, times and content as last seen.
        places: kind of data (`frames`, `features`, `embeddings/NAME`) -> video id -> where it is.
        paths: video id -> where it was last found; not of a video that is gone or has another in its place.
        texts: video id -> hash of its texts, to see when a sidecar changes.
        last_number: Of the last commit.
    """

    latest: dict[str, tuple[int, str, str, str]] = field(default_factory=dict)
    known: dict[str, Known] = field(default_factory=dict)
    places: dict[str, dict[str, Place]] = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)
    texts: dict[str, int] = field(default_factory=dict)
    last_number: int = 0

    def merge(self, commit: Commit) -> None:
        """Takes the next commit into account."""
        kinds = [name.rpartition("/")[0] for name in commit.files]
        for row in commit.rows:
            outcome = row.outcome
            if outcome.stage != "select":  # which works from features, and has not looked where the file is now
                self._see(commit.number, row)
            if outcome.status == "ok":
                texts = _texts_hash(row.texts)
                if self.texts.get(outcome.video_id, texts) != texts:
                    self._forget_captions(outcome.video_id)
                self.texts[outcome.video_id] = texts
                for kind in kinds:
                    self.places.setdefault(kind, {})[outcome.video_id] = Place(commit.number, row.content)
        self.last_number = max(self.last_number, commit.number)

    def _see(self, number: int, row: Row) -> None:
        """Takes in what a row says of its path: which video is there, if any, and how it fared."""
        outcome = row.outcome
        before = self.latest.get(outcome.path)
        other = before is not None and before[1] != outcome.video_id and (row.content or outcome.status == "skipped")
        if before and other and self.paths.get(before[1]) == outcome.path:
            del self.paths[before[1]]  # another video lies where that one was
        self.latest[outcome.path] = (number, outcome.video_id, outcome.status, outcome.code)
        if row.content:
            self.known[outcome.path] = Known(row.size_bytes, row.mtime_ns, row.ctime_ns, row.content)
        if outcome.status == "ok":
            earlier = self.paths.get(outcome.video_id, outcome.path)
            if earlier != outcome.path and self.latest.get(earlier, (0, ""))[1] == outcome.video_id:
                del self.latest[earlier]  # it was moved from there
            self.paths[outcome.video_id] = outcome.path
        elif outcome.status == "removed" and self.paths.get(outcome.video_id) == outcome.path:
            del self.paths[outcome.video_id]

    def _forget_captions(self, video_id: str) -> None:
        """What was selected by a video's texts is to be selected anew when they change."""
        for kind, places in self.places.items():
            if kind.startswith(f"{EMBEDDINGS}/caption"):
                places.pop(video_id, None)

    def texts_changed(self, video: Video) -> bool:
        """Whether a finished video has other texts now than when it was last written down."""
        return self.texts.get(video.video_id) != _texts_hash(video.texts)

    def indexable(self, selection: str) -> dict[str, int]:
        """Videos of a selection whose file was there when last looked for -> the commit that has their embedding."""
        places = self.places.get(f"{EMBEDDINGS}/{selection}", {})
        return {v: place.commit for v, place in places.items() if v in self.paths}

    def index_content(self, selection: str) -> str:
        """Digest of what an index of a selection holds: two equal ones need no new index."""
        digest = hashlib.sha256()
        for video_id, commit in sorted(self.indexable(selection).items()):
            digest.update(os.fsencode(f"{video_id} {commit} {self.paths[video_id]}\0"))
        return digest.hexdigest()

    def has(self, kind: str, video: Video) -> bool:
        """Whether data of this kind exists for this very content."""
        place = self.places.get(kind, {}).get(video.video_id)
        return place is not None and place.content == video.content


class Collection:
    """A collection folder, open for reading. `writing()` takes the lock for changes.

    Args:
        folder: The collection.

    Raises:
        UsageError: There is no collection there.
        IntegrityError: `collection.json` is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / CONFIG_FILE
        try:
            content = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            raise UsageError(
                f"{folder} is not a collection (it has no {CONFIG_FILE})",
                f"Make one with 'fineco run VIDEOS -c {folder}'.",
            ) from None
        except (OSError, ValueError) as error:
            raise IntegrityError(f"{path}: {error}") from error
        if (
            not isinstance(content, dict)
            or content.get("schema") != SCHEMA_VERSION
            or not isinstance(content.get("config"), dict)
            or not isinstance(content.get("encoder"), dict | None)
        ):
            raise IntegrityError(f"{path}: not the configuration of a collection of schema {SCHEMA_VERSION}")
        self.config: dict[str, Any] = content["config"]
        self.encoder: dict[str, Any] | None = content.get("encoder")

    @staticmethod
    def exists(folder: Path) -> bool:
        return (folder / CONFIG_FILE).is_file()

    @classmethod
    def create(cls, folder: Path, config: dict[str, Any]) -> Collection:
        """Makes an empty collection; the folder may exist but must be empty, or hold what a dead process left of one.

        Raises:
            UsageError: The folder holds other files.
        """
        ours = {LOCK_FILE, CONFIG_FILE + TEMPORARY_SUFFIX}
        if folder.exists() and (not folder.is_dir() or {p.name for p in folder.iterdir()} - ours):
            raise UsageError(
                f"{folder} exists and is not a collection", "Choose a new or empty folder for the collection."
            )
        _write_config(folder, config, None)
        return cls(folder)

    def update(self, config: dict[str, Any], encoder: dict[str, Any] | None) -> None:
        """Writes the configuration again, with what a later stage added to it."""
        _write_config(self.folder, config, encoder)
        self.config, self.encoder = config, encoder

    # ------------------------------------------------------------------------------------------------- commits

    def commit_numbers(self) -> list[int]:
        """Numbers of the commits, in order."""
        return sorted(int(p.stem) for p in (self.folder / OUTCOMES).glob("*.jsonl") if p.stem.isdigit())

    def read_commit(self, number: int) -> Commit:
        """One commit.

        Raises:
            IntegrityError: Its file is damaged.
        """
        path = self.folder / OUTCOMES / f"{number:06d}.jsonl"
        try:
            digest, _, body = path.read_bytes().partition(b"\n")
            if json.loads(digest) != {"sha256": hashlib.sha256(body).hexdigest()}:
                raise ValueError("its lines changed since they were written (SHA-256 differs)")
            head, *lines = body.splitlines()
            header = json.loads(head)
            if header["schema"] != SCHEMA_VERSION:
                raise ValueError(f"schema {header['schema']}, expected {SCHEMA_VERSION}")
            files = {name: FileRecord(**record) for name, record in header["files"].items()}
            rows = [Row.from_json(json.loads(line)) for line in lines]
            return Commit(number, header["stage"], files, rows)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise IntegrityError(
                f"{path}: {error}", "Restore it from a backup; 'fineco verify' lists all damage."
            ) from error

    def commits(self) -> Iterator[Commit]:
        """Every commit, in order.

        Raises:
            IntegrityError: One is damaged or missing: its data files must not be taken for debris.
        """
        for number in range(1, max(self.commit_numbers(), default=0) + 1):
            yield self.read_commit(number)

    def state(self) -> State:
        """The merged commits."""
        state = State()
        for commit in self.commits():
            state.merge(commit)
        return state

    def open_file(self, name: str, records: dict[str, FileRecord]) -> Path:
        """Path of a data file whose length and digest are as recorded."""
        path = self.folder / name
        if name not in records:
            raise IntegrityError(f"{path}: no commit names this file", "Run 'fineco verify'.")
        check_file(path, records[name])
        return path

    # ---------------------------------------------------------------------------------------------- selections

    def current_selection(self) -> str | None:
        """Name of the selection in use; None before the first."""
        path = self.folder / EMBEDDINGS / CURRENT
        try:
            return path.read_text("utf-8").strip()
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise IntegrityError(f"{path}: {error}") from error

    def selection(self, name: str) -> dict[str, Any]:
        """What a selection was made with: selector, keep, topics."""
        path = self.folder / EMBEDDINGS / name / "selection.json"
        try:
            content: dict[str, Any] = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise IntegrityError(f"{path}: {error}") from error
        return content

    def use_selection(self, name: str, content: dict[str, Any]) -> None:
        """Makes this the selection in use, and writes what it is made with if it is new."""
        path = self.folder / EMBEDDINGS / name / "selection.json"
        if not path.exists():
            write_bytes(path, _json(content))
        if self.current_selection() != name:
            write_bytes(self.folder / EMBEDDINGS / CURRENT, f"{name}\n".encode())

    def writing(self, command: str) -> Writer:
        """Takes the lock (a context manager)."""
        return Writer(self, command)


class Lock:
    """The right to write to a folder, held by one process and given back by its death."""

    def __init__(self, folder: Path, command: str) -> None:
        self._path = folder / LOCK_FILE
        self._command = command
        self._descriptor = -1

    def __enter__(self) -> Lock:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise FinecoError(f"cannot write to {self._path.parent}: {error.strerror or error}") from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._descriptor, 4096, 0).decode("utf-8", "replace").strip() or "another process"
            os.close(self._descriptor)
            raise UsageError(
                f"{self._path.parent} is being written by {holder}", "Wait for it, or stop it; what it did is kept."
            ) from None
        except OSError as error:
            os.close(self._descriptor)
            raise FinecoError(f"cannot lock {self._path}: {error.strerror or error}") from error
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        holder = f"'{self._command}' (process {os.getpid()} on {socket.gethostname()}, since {started})\n"
        with contextlib.suppress(OSError):  # a full disk: the lock holds, only its message is lost
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, holder.encode("utf-8", "replace"), 0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)


class Writer:
    """The collection under its lock: the merged state, and new commits."""

    def __init__(self, collection: Collection, command: str) -> None:
        self.collection = collection
        self._lock = Lock(collection.folder, command)

    def __enter__(self) -> Writer:
        self._lock.__enter__()
        try:
            self.state = State()
            self.records: dict[str, FileRecord] = {}
            for commit in self.collection.commits():
                self.state.merge(commit)
                self.records.update(commit.files)
            self._remove_debris()
        except BaseException:
            self._lock.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lock.__exit__(kind, error, traceback)

    def newer_texts(self, kind: str, video_ids: set[str]) -> dict[str, tuple[TimedText, ...]]:
        """Texts of some videos that were found after their data of this kind was made."""
        texts = {}
        places = self.state.places.get(kind, {})
        for commit in self.collection.commits():
            if commit.stage == "select":  # which looks at no file
                continue
            for row in commit.rows:
                video_id = row.outcome.video_id
                if row.outcome.status == "ok" and video_id in video_ids and commit.number > places[video_id].commit:
                    texts[video_id] = row.texts
        return texts

    def _remove_debris(self) -> None:
        """Removes what a process that died left: temporary files, and data files that no commit names."""
        folder = self.collection.folder
        for name in (FRAMES, FEATURES, EMBEDDINGS, OUTCOMES):
            for path in (folder / name).rglob("*"):
                unnamed = path.suffix == ".h5" and path.relative_to(folder).as_posix() not in self.records
                if unnamed or path.name.endswith(TEMPORARY_SUFFIX):
                    path.unlink(missing_ok=True)
        for path in folder.glob(f"*{TEMPORARY_SUFFIX}"):
            path.unlink(missing_ok=True)

    def commit(self, stage: str, rows: Sequence[Row], files: Iterable[tuple[str, Callable[[Path], FileRecord]]]) -> int:
        """Writes data files, then the commit that names them; returns its number.

        Args:
            stage: The command's stage.
            rows: What became of each video; those that are ok are in every file.
            files: (kind, function that writes the file at a path and returns its record).
        """
        number = self.state.last_number + 1
        folder = self.collection.folder
        records = {f"{kind}/{number:06d}.h5": write for kind, write in files}
        written = {name: write(folder / name) for name, write in records.items()}
        header = {
            "schema": SCHEMA_VERSION,
            "stage": stage,
            "files": {name: asdict(record) for name, record in written.items()},
        }
        body = b"".join([_json(header), *(_json(row.to_json()) for row in rows)])
        digest = _json({"sha256": hashlib.sha256(body).hexdigest()})
        write_bytes(folder / OUTCOMES / f"{number:06d}.jsonl", digest + body)
        self.records.update(written)
        self.state.merge(Commit(number, stage, written, list(rows)))
        return number


def _texts_hash(texts: tuple[TimedText, ...]) -> int:
    content = json.dumps([[t.text, t.start_seconds, t.end_seconds] for t in texts]).encode()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big")


def _json(value: Any) -> bytes:
    """One line of JSON; ASCII, so that any path survives (surrogates come back as they were)."""
    return json.dumps(value, separators=(",", ":")).encode("ascii") + b"\n"


def _write_config(folder: Path, config: dict[str, Any], encoder: dict[str, Any] | None) -> None:
    content = {"schema": SCHEMA_VERSION, "config": config, "encoder": encoder}
    write_bytes(folder / CONFIG_FILE, json.dumps(content, indent=2).encode("ascii") + b"\n")


def check_same(field_name: str, recorded: object, given: object, option: str, cure: str) -> None:
    """Raises UsageError when a collection was made with another value than the command names."""
    if recorded != given:
        raise UsageError(
            f"{field_name}: the collection was made with {recorded}, this command says {option} {given}", cure
        )


def this_command() -> str:
    """The command line, for the lock's message and the line to resume with."""
    import shlex

    return shlex.join(["fineco", *sys.argv[1:]])
