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

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.commits import EMBEDDINGS, FEATURES, FRAMES, Commit, Row, State
from pipeline.errors import IntegrityError, UsageError
from pipeline.files import TEMPORARY_SUFFIX, FileRecord, check_file, write_bytes
from pipeline.lock import LOCK_FILE, Lock
from pipeline.types import TimedText, Video

SCHEMA_VERSION = 1
CONFIG_FILE = "collection.json"
OUTCOMES = "outcomes"
CURRENT = "CURRENT"
SHOWN_COMMAND = 400  # characters: `fineco run *.mp4` may have ten thousand names


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
        except (FileNotFoundError, NotADirectoryError):
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
        self.state = State()
        self.records: dict[str, FileRecord] = {}
        for commit in self.collection.commits():
            self.state.merge(commit)
            self.records.update(commit.files)

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
            self.read()
            self._remove_debris()
        except BaseException:
            self._lock.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lock.__exit__(kind, error, traceback)

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


def _json(value: Any) -> bytes:
    """One line of JSON; ASCII, so that any path survives (surrogates come back as they were)."""
    return json.dumps(value, separators=(",", ":")).encode("ascii") + b"\n"


def _write_config(folder: Path, config: dict[str, Any], encoder: dict[str, Any] | None) -> None:
    content = {"schema": SCHEMA_VERSION, "config": config, "encoder": encoder}
    write_bytes(folder / CONFIG_FILE, json.dumps(content, indent=2).encode("ascii") + b"\n")


def this_command() -> str:
    """The command line, for the lock's message and the line to resume with; the middle of a very long one left out."""
    import shlex

    command = shlex.join(["fineco", *sys.argv[1:]])
    if len(command) <= SHOWN_COMMAND:
        return command
    return f"{command[: SHOWN_COMMAND // 2]} ... {command[-SHOWN_COMMAND // 2 :]}"
