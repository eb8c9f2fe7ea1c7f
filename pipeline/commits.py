"""What happened to a collection, step by step, and what all steps together say: rows, commits, the merged state."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.catalog import Known
from pipeline.files import FileRecord
from pipeline.types import Outcome, TimedText, Video

COMMIT_SCHEMA = 3
SCHEMA_WITHOUT_MOMENTS = 2  # its features are as they are now; its embeddings are not used any more
FRAMES, FEATURES, EMBEDDINGS, INDEX = "frames", "features", "embeddings", "index"

BLIND_STAGES = ("select", "compact", "repair")  # work from what is stored, and have not looked where a file is now


def place_of(name: str) -> tuple[str, int]:
    """Kind of data and number of the commit of a data file: `embeddings/all/000003.h5` is ("embeddings/all", 3)."""
    kind, _, stem = name.rpartition("/")
    return kind, int(stem.partition(".")[0])


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
    text_notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, video: Video, outcome: Outcome, duration_seconds: float | None = None) -> Row:
        """The row of a video that the catalog found."""
        return cls(
            outcome,
            video.content,
            video.size_bytes,
            video.mtime_ns,
            video.ctime_ns,
            duration_seconds,
            video.texts,
            video.text_notes,
        )

    def to_json(self) -> dict[str, Any]:
        row = asdict(self.outcome) | asdict(self)
        del row["outcome"]
        row["texts"] = [[t.text, t.start_seconds, t.end_seconds] for t in self.texts]
        return row

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Row:
        row = {name: value for name, value in row.items() if name != "digest"}
        outcome = {name: row.pop(name) for name in Outcome.__slots__}
        outcome["notes"] = tuple(outcome["notes"])
        row["texts"] = tuple(TimedText(*text) for text in row["texts"])
        row["text_notes"] = tuple(row["text_notes"])
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
            self.text_notes,
        )


@dataclass(frozen=True, slots=True)
class Commit:
    """One step of the collection.

    Attributes:
        files: Data files that came with it: relative name -> record.
        made_with: The collection's `config` and `encoder` at the time, and under `selections` what those in `files`
            were made with: what `verify --repair` restores the small files of a collection from.
        lost: Names of data files of earlier commits that were found damaged: they do not count any more.
        outdated: Names of its data files that an earlier version of fineco wrote and this one does not use.
    """

    number: int
    stage: str
    files: dict[str, FileRecord]
    rows: list[Row]
    made_with: dict[str, Any] = field(default_factory=dict)
    lost: tuple[str, ...] = ()
    outdated: tuple[str, ...] = ()

    def merge_records(self, records: dict[str, FileRecord]) -> None:
        """Adds the commit's data files to those of the commits before it, and takes away what it says is lost."""
        records.update(self.files)
        for name in self.lost:
            records.pop(name, None)

    def to_bytes(self) -> bytes:
        """The file of the commit: the SHA-256 of all lines behind the first, then its head and a line for every row.
        Each of these ends in a digest of its own, so that damage to one line costs no other."""
        head = {
            "schema": COMMIT_SCHEMA,
            "stage": self.stage,
            "files": {name: asdict(record) for name, record in self.files.items()},
            "made_with": self.made_with,
            "lost": self.lost,
        }
        body = b"".join(_line(value) for value in (head, *(row.to_json() for row in self.rows)))
        return _json({"sha256": hashlib.sha256(body).hexdigest()}) + body

    @classmethod
    def from_bytes(cls, number: int, data: bytes) -> Commit:
        """Reads what `to_bytes` made.

        Raises:
            ValueError: It is anything else.
        """
        digest, _, body = data.partition(b"\n")
        try:
            if json.loads(digest) != {"sha256": hashlib.sha256(body).hexdigest()}:
                raise ValueError("its lines changed since they were written (SHA-256 differs)")
            return cls._from_lines(number, [json.loads(line) for line in body.splitlines()])
        except (KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            raise ValueError(f"not a commit ({type(error).__name__}: {error})") from error

    @classmethod
    def salvage(cls, number: int, data: bytes) -> tuple[Commit | None, list[Row]]:
        """What a damaged file still holds: the commit without its rows (None: that line is damaged too), and the rows
        whose own digests are right."""
        head: Commit | None = None
        rows: list[Row] = []
        for line in data.split(b"\n"):
            try:
                value = json.loads(line)
                if _line({name: value[name] for name in value if name != "digest"}) != line + b"\n":
                    continue
                if "files" in value:
                    head = cls._from_lines(number, [value])
                else:
                    rows.append(Row.from_json(value))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                continue
        return head, rows

    @classmethod
    def _from_lines(cls, number: int, lines: list[Any]) -> Commit:
        head, *rows = lines
        if head["schema"] not in (COMMIT_SCHEMA, SCHEMA_WITHOUT_MOMENTS):
            raise ValueError(f"schema {head['schema']}, expected {COMMIT_SCHEMA}")
        files = {name: FileRecord(**record) for name, record in head["files"].items()}
        outdated: list[str] = []
        if head["schema"] == SCHEMA_WITHOUT_MOMENTS:
            outdated = [name for name in files if name.startswith(f"{EMBEDDINGS}/")]
            files = {name: record for name, record in files.items() if name not in outdated}
        parsed = [Row.from_json(row) for row in rows]
        return cls(number, head["stage"], files, parsed, head["made_with"], tuple(head["lost"]), tuple(outdated))


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
        text_notes: path -> what of the text beside it could not be used, where there is any such note.
        outdated: Kinds of data that an earlier version of fineco wrote and this one does not use.
        last_number: Of the last commit.
    """

    latest: dict[str, tuple[int, str, str, str]] = field(default_factory=dict)
    known: dict[str, Known] = field(default_factory=dict)
    places: dict[str, dict[str, Place]] = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)
    texts: dict[str, int] = field(default_factory=dict)
    text_notes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    outdated: set[str] = field(default_factory=set)
    last_number: int = 0

    def merge(self, commit: Commit) -> None:
        """Takes the next commit into account."""
        kinds = [name.rpartition("/")[0] for name in commit.files]
        self.outdated |= {place_of(name)[0] for name in commit.outdated}
        for name in commit.lost:
            self._forget_file(*place_of(name))
        for row in commit.rows:
            outcome = row.outcome
            if outcome.stage not in BLIND_STAGES:
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
        seen = self.known.get(outcome.path)
        broken = outcome.status != "ok" and bool(row.content) and seen is not None and seen.content != row.content
        if before and (other or broken) and self.paths.get(before[1]) == outcome.path:
            del self.paths[before[1]]  # another video lies where that one was, or what is none
        self.latest[outcome.path] = (number, outcome.video_id, outcome.status, outcome.code)
        self.text_notes.pop(outcome.path, None)
        if row.text_notes:
            self.text_notes[outcome.path] = row.text_notes
        if row.content:
            self.known[outcome.path] = Known(row.size_bytes, row.mtime_ns, row.ctime_ns, row.content)
        if outcome.status == "ok":
            earlier = self.paths.get(outcome.video_id, outcome.path)
            if earlier != outcome.path and self.latest.get(earlier, (0, ""))[1] == outcome.video_id:
                del self.latest[earlier]  # it was moved from there
                self.text_notes.pop(earlier, None)
            self.paths[outcome.video_id] = outcome.path
        elif outcome.status == "removed" and self.paths.get(outcome.video_id) == outcome.path:
            del self.paths[outcome.video_id]

    def _forget_file(self, kind: str, number: int) -> None:
        places = self.places.get(kind, {})
        for video_id in [v for v, place in places.items() if place.commit == number]:
            del places[video_id]

    def _forget_captions(self, video_id: str) -> None:
        """What was selected by a video's texts is to be selected anew when they change."""
        for kind, places in self.places.items():
            if kind.startswith(f"{EMBEDDINGS}/caption"):
                places.pop(video_id, None)

    def texts_changed(self, video: Video) -> bool:
        """Whether a finished video has other texts, or other notes on them, than when it was last written down."""
        same_notes = self.text_notes.get(video.path, ()) == video.text_notes
        return not same_notes or self.texts.get(video.video_id) != _texts_hash(video.texts)

    def has_texts(self, video_id: str) -> bool:
        """Whether there was text beside a video when it was last looked at."""
        return self.texts.get(video_id, _texts_hash(())) != _texts_hash(())

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


def _texts_hash(texts: tuple[TimedText, ...]) -> int:
    content = json.dumps([[t.text, t.start_seconds, t.end_seconds] for t in texts]).encode()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big")


def _json(value: dict[str, Any]) -> bytes:
    """One line of JSON; ASCII, so that any path survives (surrogates come back as they were)."""
    return json.dumps(value, separators=(",", ":")).encode("ascii") + b"\n"


def _line(value: dict[str, Any]) -> bytes:
    digest = hashlib.blake2b(_json(value), digest_size=8).hexdigest()
    return _json({**value, "digest": digest})
