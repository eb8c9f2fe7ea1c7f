"""What there is to do: the videos that the catalog finds, against what the collection already has."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.catalog import find_videos
from pipeline.collection import Writer
from pipeline.commits import Row
from pipeline.errors import FinecoError
from pipeline.types import Outcome, Video

CATALOG_ROWS_PER_COMMIT = 10_000
CHANGED = "changed"  # while it was read: that is no fault of the content, and is tried again without being asked


@dataclass(slots=True)
class Counts:
    """How many videos there are of each sort."""

    found: int = 0
    to_do: int = 0
    done_before: int = 0
    failed_before: int = 0
    failed_now: int = 0
    skipped: int = 0


class Todo:
    """The videos that lack one kind of data; everything else the catalog says is written down at once.

    The list is kept in a temporary file: a million videos with their texts need no memory.

    Args:
        writer: The collection, locked.
        sources, manifest: As `catalog.find_videos` takes them.
        stored: The videos when there are neither: those that an earlier command stored something of.
        wanted: Kind of data that makes a video done: `frames` or `features`.
        retry_failed: Also videos that failed in an earlier run.
        warn: Gets a line per thing worth knowing.
        check: Called for every video; raises to stop.
    """

    def __init__(
        self,
        writer: Writer,
        sources: Sequence[str],
        manifest: Path | None,
        stored: Iterable[Video],
        wanted: str,
        retry_failed: bool,
        warn: Callable[[str], None],
        check: Callable[[], None],
    ) -> None:
        self.counts = Counts()
        self._writer = writer
        self._spool = tempfile.TemporaryFile()
        self._rows: list[Row] = []
        known = writer.state.known.get
        for found in find_videos(sources, manifest, known, warn) if sources or manifest else stored:
            check()
            self.counts.found += 1
            if isinstance(found, Outcome):
                self._problem(found)
            elif writer.state.has(wanted, found):
                self.counts.done_before += 1
                self._note_changes(found)
            elif not retry_failed and (last := self._given_up(found)):
                if last == "skipped":
                    self.counts.skipped += 1
                else:
                    self.counts.failed_before += 1
            else:
                self.counts.to_do += 1
                row = Row.of(found, Outcome(found.video_id, found.path, "ok", "catalog"))
                self._put(json.dumps(row.to_json()).encode() + b"\n")
        self._put(b"", last=True)
        self._commit()

    def videos(self) -> Iterator[Video]:
        """The videos to do, in the order in which they were found."""
        self._spool.seek(0)
        for line in self._spool:
            yield Row.from_json(json.loads(line)).video()

    def _put(self, line: bytes, last: bool = False) -> None:
        try:
            self._spool.write(line)
            if last:
                self._spool.flush()
        except OSError as error:
            raise FinecoError(
                f"cannot write a temporary file in {tempfile.gettempdir()}: {error.strerror or error}",
                "Free some space there, or let TMPDIR name another folder; the same command then continues.",
            ) from error

    def _problem(self, outcome: Outcome) -> None:
        if outcome.status == "skipped":
            self.counts.skipped += 1
        else:
            self.counts.failed_now += 1
        last = self._writer.state.latest.get(outcome.path)
        if last is None or last[2:] != (outcome.status, outcome.code):
            self._add(Row(outcome))

    def _given_up(self, video: Video) -> str | None:
        """`failed` or `skipped` when that is what an earlier run made of this very content."""
        last = self._writer.state.latest.get(video.path)
        if last is not None and last[3] == CHANGED:
            return None
        known = self._writer.state.known.get(video.path)
        same = last is not None and known is not None and known.content == video.content
        return last[2] if same and last and last[2] in ("failed", "skipped") else None

    def _note_changes(self, video: Video) -> None:
        """Writes down that a finished video was moved, came back, or has other texts beside it."""
        state = self._writer.state
        if state.paths.get(video.video_id) != video.path or state.texts_changed(video):
            self._add(Row.of(video, Outcome(video.video_id, video.path, "ok", "catalog")))

    def _add(self, row: Row) -> None:
        self._rows.append(replace(row, outcome=replace(row.outcome, seconds=0.0)))
        if len(self._rows) >= CATALOG_ROWS_PER_COMMIT:
            self._commit()

    def _commit(self) -> None:
        if self._rows:
            self._writer.commit("catalog", self._rows, [])
            self._rows = []
