"""Folding a collection: many small files into few, without what no longer counts; the same logical digest.

Every living video's data, and the last word on every path, is written anew as ordinary commits behind the old ones.
Until then a reader sees both, which say the same. Then the index is pointed at the new files, and one rename of
`outcomes/FIRST` makes all older commits count no more; only then are the old files removed. A kill at any step leaves
a whole collection, and the next writer removes what is left over. Large files that are wholly alive are linked under
their new name, not copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from indexes.generations import prune_generations
from pipeline import store
from pipeline.collection import FIRST, OUTCOMES, Collection, Writer, this_command
from pipeline.commands import Machine
from pipeline.commits import BLIND_STAGES, INDEX, Row
from pipeline.files import FileRecord, link_file, write_pointer
from pipeline.indexing import move_index
from pipeline.interrupts import Interrupts
from pipeline.output import number_of
from pipeline.run import SHARD_BYTES, SHARD_VIDEOS
from pipeline.todo import CATALOG_ROWS_PER_COMMIT
from pipeline.types import TimedText

LARGE_BYTES = SHARD_BYTES // 2  # a file of this size gains nothing by being folded


@dataclass(frozen=True, slots=True)
class Folded:
    """What a compaction did: counts before and after."""

    n_files: tuple[int, int]
    n_commits: tuple[int, int]
    n_bytes: tuple[int, int]

    def describe(self) -> str:
        """The line printed at the end."""
        files, commits, sizes = self.n_files, self.n_commits, self.n_bytes
        before = f"{number_of(files[0], 'file')} in {number_of(commits[0], 'commit')}, {sizes[0] / 1e6:.1f} MB"
        return f"{before}, folded into {files[1]} in {commits[1]}, {sizes[1] / 1e6:.1f} MB"


def compact(folder: Path, machine: Machine = Machine()) -> Folded | None:
    """Folds a collection; returns None when there is nothing to fold.

    Videos that are gone are forgotten with all their data: when their file comes back it is decoded again.

    Raises:
        IntegrityError: A file is damaged; nothing was removed.
        Interrupted: After a signal; nothing was removed.
        FinecoError: The disk is full, or the like; nothing was removed.
    """
    collection = Collection(folder)
    with Interrupts(this_command()) as interrupts, collection.writing(this_command()) as writer:
        last, records = writer.state.last_number, dict(writer.records)
        n_commits = len(collection.commit_numbers())
        if not _any_gain(writer):
            machine.say("There is nothing to fold.")
            return None
        for kind in sorted(writer.state.places):
            _fold_kind(writer, kind, last, interrupts)
        _fold_outcomes(writer, last, interrupts)
        with interrupts.at_once():  # the index before it stays
            move_index(writer, machine.say)
        write_pointer(folder / OUTCOMES / FIRST, str(last + 1))
        writer.read()
        if (folder / INDEX / "CURRENT").exists():
            prune_generations(folder / INDEX, keep=1)
        writer.remove_debris()
        sizes = [sum(record.size_bytes for record in some.values()) for some in (records, writer.records)]
        return Folded(
            (len(records), len(writer.records)),
            (n_commits, len(collection.commit_numbers())),
            (sizes[0], sizes[1]),
        )


def _living(writer: Writer, kind: str, up_to: int) -> dict[int, set[str]]:
    """Commit number -> ids of the videos that are there and whose latest data of this kind came with it."""
    state = writer.state
    living: dict[int, set[str]] = {}
    for video_id, place in state.places.get(kind, {}).items():
        if video_id in state.paths and place.commit <= up_to:
            living.setdefault(place.commit, set()).add(video_id)
    return dict(sorted(living.items()))


def _any_gain(writer: Writer) -> bool:
    """Whether two files could be one, rows count no more, or many commits bring nothing but outcomes."""
    state = writer.state
    living = {kind: _living(writer, kind, state.last_number) for kind in state.places}
    n_living = sum(len(ids) for of_kind in living.values() for ids in of_kind.values())
    n_stored = n_commits = 0
    for commit in writer.collection.commits():
        n_commits += 1
        n_stored += len(commit.files) * sum(row.outcome.status == "ok" for row in commit.rows)
    small = [
        sum(writer.records[f"{kind}/{number:06d}.h5"].size_bytes < LARGE_BYTES for number in of_kind)
        for kind, of_kind in living.items()
    ]
    n_outcomes = 1 + len(state.latest) // CATALOG_ROWS_PER_COMMIT
    return max(small, default=0) > 1 or n_stored > n_living or n_commits > len(writer.records) + n_outcomes


def _fold_kind(writer: Writer, kind: str, last: int, interrupts: Interrupts) -> None:
    """Writes the living videos' data of one kind anew, in the order in which it came."""
    folded: list[store.Rows] = []
    rows: list[Row] = []
    n_bytes = 0

    def flush() -> None:
        nonlocal n_bytes
        if folded:
            writer.commit("compact", rows, [(kind, partial(store.copy_rows, rows=list(folded)))])
            folded.clear()
            rows.clear()
            n_bytes = 0

    living = _living(writer, kind, last)
    texts = writer.newer_texts(kind, set().union(*living.values()))
    for number, ids in living.items():
        interrupts.check()
        name = f"{kind}/{number:06d}.h5"
        path = writer.collection.open_file(name, writer.records)
        found = {r.outcome.video_id: r for r in writer.collection.read_commit(number).rows if r.outcome.status == "ok"}
        with store.open_shard(kind, path) as shard:
            if ids == set(shard.video_ids) and writer.records[name].size_bytes >= LARGE_BYTES:
                flush()
                linked = [(kind, partial(_link, path, writer.records[name]))]
                writer.commit("compact", [_row(writer, found[v], texts) for v in shard.video_ids], linked)
                continue
            for at, video_id in enumerate(shard.video_ids):
                if video_id in ids:
                    folded.append(shard.rows(at))
                    rows.append(_row(writer, found[video_id], texts))
                    n_bytes += folded[-1].n_bytes
                    if len(folded) >= SHARD_VIDEOS or n_bytes >= SHARD_BYTES:
                        flush()
    flush()


def _row(writer: Writer, row: Row, texts: dict[str, tuple[TimedText, ...]]) -> Row:
    """A video's row for its data: where the file is comes with `_fold_outcomes`."""
    video_id = row.outcome.video_id
    outcome = replace(row.outcome, path=writer.state.paths[video_id], stage="compact", notes=())
    return replace(row, outcome=outcome, texts=texts.get(video_id, row.texts))


def _link(source: Path, record: FileRecord, path: Path) -> FileRecord:
    link_file(source, path)
    return record


def _fold_outcomes(writer: Writer, last: int, interrupts: Interrupts) -> None:
    """Writes the last word on every path anew, and of every living video where it was last found."""
    found_in: dict[str, int] = {}
    for number, row in _seen(writer, last):
        if row.outcome.status == "ok" and writer.state.paths.get(row.outcome.video_id) == row.outcome.path:
            found_in[row.outcome.video_id] = number
    rows: list[Row] = []
    latest = {path: word[0] for path, word in writer.state.latest.items()}  # as it was before these rows are added
    for number, row in _seen(writer, last):
        outcome = row.outcome
        is_last_word = latest.get(outcome.path) == number and outcome.status != "removed"
        is_found = outcome.status == "ok" and found_in.get(outcome.video_id) == number
        failed_since = outcome.stage == "select" and number > latest.get(outcome.path, number)
        if is_last_word or is_found or failed_since:
            rows.append(row)
        if len(rows) >= CATALOG_ROWS_PER_COMMIT:
            interrupts.check()
            writer.commit("compact", rows, [])
            rows = []
    if rows:
        writer.commit("compact", rows, [])


def _seen(writer: Writer, last: int) -> Iterator[tuple[int, Row]]:
    """Rows of the commits up to `last` that say where a file is, or that a selection failed, with the numbers."""
    for number in writer.collection.commit_numbers():
        if number > last:
            return
        for row in writer.collection.read_commit(number).rows:
            if row.outcome.stage not in BLIND_STAGES or (row.outcome.stage, row.outcome.status) == ("select", "failed"):
                yield number, row
