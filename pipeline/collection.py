"""A collection on disk: its configuration, who writes to it, what is in it and what became of every video.

    kitchen/
      collection.json            configuration and encoder (like every JSON file here, with a digest of itself)
      .lock                      held by the one writer; names it
      outcomes/000001.jsonl      commits, in order: a digest, the files each one brought, a row for every video in it
      outcomes/FIRST             the first commit that counts, once `compact` wrote all before it anew
      frames/ features/ embeddings/SELECTION/   000001.h5, named after the commit that brought them
      embeddings/CURRENT         the selection in use
      index/                     generations (see indexes.generations)

A commit's file in `outcomes/` is written last. A data file that no commit names is debris of a process that died and is
removed by the next writer, so that every video is either wholly in the collection or not at all.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from pipeline.commits import BLIND_STAGES, EMBEDDINGS, FEATURES, FRAMES, Commit, Row, State
from pipeline.errors import IntegrityError, UsageError
from pipeline.files import (
    TEMPORARY_SUFFIX,
    FileRecord,
    check_file,
    read_pointer,
    read_regular,
    read_sealed,
    seal,
    write_bytes,
    write_pointer,
)
from pipeline.lock import LOCK_FILE, Lock
from pipeline.types import TimedText, Video

SCHEMA_VERSION = 3
SCHEMA_WITHOUT_MOMENTS = 2  # read as it is; a writer makes it a collection of this version
CONFIG_FILE = "collection.json"
SELECTION_FILE = "selection.json"
OUTCOMES = "outcomes"
CURRENT = "CURRENT"
FIRST = "FIRST"
REPAIR = "Run 'fineco verify --repair' on the collection."
Result = TypeVar("Result")
SHOWN_COMMAND = 400  # characters: `fineco run *.mp4` may have ten thousand names


class Collection:
    """A collection folder, open for reading. `writing()` takes the lock for changes.

    Args:
        folder: The collection.

    Raises:
        UsageError: There is no collection there, or one of another version.
        IntegrityError: `collection.json` is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / CONFIG_FILE
        try:
            content = read_sealed(path)
        except (FileNotFoundError, NotADirectoryError):
            if (folder / OUTCOMES).is_dir():
                raise IntegrityError(f"{path} is missing, though there are commits", REPAIR) from None
            raise UsageError(
                f"{folder} is not a collection (it has no {CONFIG_FILE})",
                f"Make one with 'fineco run VIDEOS -c {folder}'.",
            ) from None
        except (OSError, ValueError) as error:
            if _is_of_first_schema(path):
                raise _other_version(folder, 1) from None
            raise IntegrityError(f"{path}: {error}", REPAIR) from error
        if content.get("schema") not in (SCHEMA_VERSION, SCHEMA_WITHOUT_MOMENTS):
            raise _other_version(folder, content.get("schema"))
        if not isinstance(content.get("config"), dict) or not isinstance(content.get("encoder"), dict | None):
            raise IntegrityError(f"{path}: not the configuration of a collection", REPAIR)
        self.schema: int = content["schema"]
        self.config: dict[str, Any] = content["config"]
        self.encoder: dict[str, Any] | None = content.get("encoder")

    @classmethod
    def without_config(cls, folder: Path) -> Collection:
        """One whose `collection.json` is damaged, for what can be read all the same."""
        collection = cls.__new__(cls)
        collection.folder, collection.config, collection.encoder = folder, {}, None
        collection.schema = SCHEMA_VERSION
        return collection

    @staticmethod
    def exists(folder: Path) -> bool:
        """Whether there is one, damaged or not."""
        return (folder / CONFIG_FILE).is_file() or (folder / OUTCOMES).is_dir()

    @staticmethod
    def check_new(folder: Path) -> None:
        """Whether a collection can be made there: the folder is absent, empty, or has what a dead process left of one.

        Raises:
            UsageError: The folder holds other files, or is a file.
        """
        ours = {LOCK_FILE, CONFIG_FILE + TEMPORARY_SUFFIX}
        if folder.exists() and (not folder.is_dir() or {p.name for p in folder.iterdir()} - ours):
            raise UsageError(
                f"{folder} exists and is not a collection", "Choose a new or empty folder for the collection."
            )

    @classmethod
    def create(cls, folder: Path, config: dict[str, Any]) -> Collection:
        """Makes an empty collection. Raises as `check_new`."""
        cls.check_new(folder)
        write_config(folder, config, None)
        return cls(folder)

    def update(self, config: dict[str, Any], encoder: dict[str, Any] | None) -> None:
        """Writes the configuration again, with what a later stage added to it."""
        write_config(self.folder, config, encoder)
        self.config, self.encoder, self.schema = config, encoder, SCHEMA_VERSION

    # ------------------------------------------------------------------------------------------------- commits

    def first_commit(self) -> int:
        """Number of the first commit that counts: 1 before the first `compact`."""
        path = self.folder / OUTCOMES / FIRST
        try:
            return int(read_pointer(path))
        except (FileNotFoundError, NotADirectoryError):
            return 1
        except (OSError, ValueError) as error:
            raise IntegrityError(f"{path}: {error}", REPAIR) from error

    def commit_numbers(self) -> range:
        """Numbers of the commits that count, in order; also of one that is missing between two others."""
        found = [int(p.stem) for p in (self.folder / OUTCOMES).glob("*.jsonl") if p.stem.isdecimal()]
        return range(self.first_commit(), max(found, default=0) + 1)

    def read_commit(self, number: int) -> Commit:
        """One commit.

        Raises:
            IntegrityError: Its file is damaged.
        """
        path = self.commit_path(number)
        try:
            return Commit.from_bytes(number, path.read_bytes())
        except (OSError, ValueError) as error:
            raise IntegrityError(f"{path}: {getattr(error, 'strerror', None) or error}", REPAIR) from error

    def commit_path(self, number: int) -> Path:
        """The file of a commit."""
        return self.folder / OUTCOMES / f"{number:06d}.jsonl"

    def commits(self) -> Iterator[Commit]:
        """Every commit, in order.

        Raises:
            IntegrityError: One is damaged or missing: its data files must not be taken for debris.
        """
        for number in self.commit_numbers():
            yield self.read_commit(number)

    def stable(self, read: Callable[[], Result]) -> Result:
        """What `read` reads; again if a `compact` meanwhile took away the files it was about to open."""
        while True:
            first = self.first_commit()
            try:
                return read()
            except IntegrityError:
                if self.first_commit() == first:
                    raise

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
            return read_pointer(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise IntegrityError(f"{path}: {error}", REPAIR) from error

    def selection(self, name: str) -> dict[str, Any]:
        """What a selection was made with: selector, keep, topics."""
        path = self.folder / EMBEDDINGS / name / SELECTION_FILE
        try:
            return read_sealed(path)
        except (OSError, ValueError) as error:
            raise IntegrityError(f"{path}: {error}", REPAIR) from error

    def add_selection(self, name: str, content: dict[str, Any]) -> None:
        """Writes what a selection is made with, if it is new."""
        path = self.folder / EMBEDDINGS / name / SELECTION_FILE
        if not path.exists():
            write_bytes(path, seal(content))

    def use_selection(self, name: str, content: dict[str, Any]) -> None:
        """Makes this the selection in use; writes it if it is new."""
        self.add_selection(name, content)
        if self.current_selection() != name:
            write_pointer(self.folder / EMBEDDINGS / CURRENT, name)

    def writing(self, command: str) -> Writer:
        """Takes the lock (a context manager)."""
        return Writer(self, command)


class Snapshot:
    """The merged commits of a collection as it stands; reading takes no lock, for files are added, never changed.

    Attributes:
        state: What is there.
        records: Name of every data file -> its length and digest.
    """

    def __init__(self, collection: Collection) -> None:
        self.collection = collection
        self.read()

    def read(self) -> None:
        """Reads the commits (again)."""
        self.state, self.records = self.collection.stable(self._read)

    def _read(self) -> tuple[State, dict[str, FileRecord]]:
        state, records = State(), dict[str, FileRecord]()
        for commit in self.collection.commits():
            state.merge(commit)
            commit.merge_records(records)
        return state, records

    def newer_texts(self, kind: str, video_ids: set[str]) -> dict[str, tuple[TimedText, ...]]:
        """Texts of some videos that were found after their data of this kind was made."""
        texts = {}
        places = self.state.places.get(kind, {})
        for commit in self.collection.commits():
            if commit.stage in BLIND_STAGES:
                continue
            for row in commit.rows:
                video_id = row.outcome.video_id
                if row.outcome.status == "ok" and video_id in video_ids and commit.number > places[video_id].commit:
                    texts[video_id] = row.texts
        return texts

    def videos(self, kind: str) -> Iterator[Video]:
        """The videos that have data of this kind, with the paths and texts last seen."""
        places = self.state.places.get(kind, {})
        texts = self.newer_texts(kind, set(places))
        for commit in self.collection.commits():
            for row in commit.rows:
                video = row.video()
                place = places.get(video.video_id)
                if place is None or place.commit != commit.number or row.outcome.status != "ok":
                    continue
                path = self.state.paths.get(video.video_id, video.path)
                notes = self.state.text_notes.get(path, ())
                video = replace(video, path=path, texts=texts.get(video.video_id, video.texts), text_notes=notes)
                if seen := self.state.known.get(path):
                    video = replace(video, size_bytes=seen.size_bytes, mtime_ns=seen.mtime_ns, ctime_ns=seen.ctime_ns)
                yield video


class Writer(Snapshot):
    """The collection under its lock: the merged state, and new commits."""

    def __init__(self, collection: Collection, command: str) -> None:
        self.collection = collection
        self._lock = Lock(collection.folder, command)

    def __enter__(self) -> Writer:
        self._lock.__enter__()
        try:
            collection = self.collection
            if collection.schema != SCHEMA_VERSION:  # first of all, so that an earlier version knows it as another's
                collection.update(collection.config, collection.encoder)
            self.read()
            self.remove_debris()
        except BaseException:
            self._lock.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lock.__exit__(kind, error, traceback)

    def remove_debris(self) -> None:
        """Removes what a process that died left: temporary files, and data files that no commit names."""
        folder = self.collection.folder
        for name in (FRAMES, FEATURES, EMBEDDINGS, OUTCOMES):
            for path in (folder / name).rglob("*"):
                unnamed = path.suffix == ".h5" and path.relative_to(folder).as_posix() not in self.records
                if unnamed or path.name.endswith(TEMPORARY_SUFFIX):
                    path.unlink(missing_ok=True)
        for path in folder.glob(f"*{TEMPORARY_SUFFIX}"):
            path.unlink(missing_ok=True)
        first = self.collection.first_commit()
        for path in (folder / OUTCOMES).glob("*.jsonl"):
            if path.stem.isdecimal() and int(path.stem) < first:
                path.unlink(missing_ok=True)

    def commit(
        self,
        stage: str,
        rows: Sequence[Row],
        files: Iterable[tuple[str, Callable[[Path], FileRecord]]],
        lost: Sequence[str] = (),
    ) -> int:
        """Writes data files, then the commit that names them; returns its number.

        Args:
            stage: The command's stage.
            rows: What became of each video; those that are ok are in every file.
            files: (kind, function that writes the file at a path and returns its record).
            lost: Names of earlier data files that are damaged and do not count any more.
        """
        number = self.state.last_number + 1
        folder = self.collection.folder
        records = {f"{kind}/{number:06d}.h5": write for kind, write in files}
        written = {name: write(folder / name) for name, write in records.items()}
        commit = Commit(number, stage, written, list(rows), self._made_with(written), tuple(lost))
        write_bytes(self.collection.commit_path(number), commit.to_bytes())
        commit.merge_records(self.records)
        self.state.merge(commit)
        return number

    def _made_with(self, files: Iterable[str]) -> dict[str, Any]:
        """What a damaged small file of the collection can be restored from."""
        collection = self.collection
        names = sorted({name.split("/")[1] for name in files if name.startswith(f"{EMBEDDINGS}/")})
        selections = {n: collection.selection(n) for n in names}
        return {"config": collection.config, "encoder": collection.encoder, "selections": selections}


def write_config(folder: Path, config: dict[str, Any], encoder: dict[str, Any] | None) -> None:
    """Writes `collection.json`."""
    content = {"schema": SCHEMA_VERSION, "config": config, "encoder": encoder}
    write_bytes(folder / CONFIG_FILE, seal(content))


def _is_of_first_schema(path: Path) -> bool:
    """Whether a `collection.json` is of the first version, whose files had no digests of themselves."""
    try:
        content = json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and "sha256" not in content and content.get("schema") == 1


def _other_version(folder: Path, schema: object) -> UsageError:
    return UsageError(
        f"{folder} was made by another version of fineco (schema {schema}, this one reads {SCHEMA_VERSION})",
        "Use that version, or run the videos again into a new folder.",
    )


def this_command() -> str:
    """The command line, for the lock's message and the line to resume with; the middle of a very long one left out."""
    import shlex

    command = shlex.join(["fineco", *sys.argv[1:]])
    if len(command) <= SHOWN_COMMAND:
        return command
    return f"{command[: SHOWN_COMMAND // 2]} ... {command[-SHOWN_COMMAND // 2 :]}"
