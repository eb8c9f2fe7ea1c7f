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

FRAMES, FEATURES, EMBEDDINGS, INDEX = "frames", "features", "embeddings", "index"


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
        outcome = {name: row.pop(name) for name in Outcome.__slots__}
        outcome["notes"] = tuple(outcome["notes"])
        row["texts"] = tuple(TimedText(*text) for text in row["texts"])
        row["text_notes"] = tuple(row.get("text_notes", ()))  # collections made before there were any have none
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
        text_notes: path -> what of the text beside it could not be used, where there is any such note.
        last_number: Of the last commit.
    """

    latest: dict[str, tuple[int, str, str, str]] = field(default_factory=dict)
    known: dict[str, Known] = field(default_factory=dict)
    places: dict[str, dict[str, Place]] = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)
    texts: dict[str, int] = field(default_factory=dict)
    text_notes: dict[str, tuple[str, ...]] = field(default_factory=dict)
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

    def _forget_captions(self, video_id: str) -> None:
        """What was selected by a video's texts is to be selected anew when they change."""
        for kind, places in self.places.items():
            if kind.startswith(f"{EMBEDDINGS}/caption"):
                places.pop(video_id, None)

    def texts_changed(self, video: Video) -> bool:
        """Whether a finished video has other texts, or other notes on them, than when it was last written down."""
        same_notes = self.text_notes.get(video.path, ()) == video.text_notes
        return not same_notes or self.texts.get(video.video_id) != _texts_hash(video.texts)

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
