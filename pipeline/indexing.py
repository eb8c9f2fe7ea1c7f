"""The index of a collection: which vectors go in, which videos are gone, and the lookup beside the vectors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from indexes.build import INDEX_FILE, IndexReport, build_index
from indexes.generations import (
    check_generation,
    current_generation,
    new_generation,
    prune_generations,
    read_sidecar,
    write_sidecar,
)
from indexes.plan import plan_index
from pipeline import store
from pipeline.collection import Writer
from pipeline.commits import EMBEDDINGS, INDEX, Row
from pipeline.errors import FinecoError, UsageError
from pipeline.files import link_file
from pipeline.lookup import LOOKUP_FILE, Lookup, index_id, write_lookup
from pipeline.types import Float32, Outcome

KEPT_GENERATIONS = 2  # a search that has the last one open goes on


def build_collection_index(
    writer: Writer,
    kind: str,
    memory_bytes: int | None,
    say: Callable[[str], None],
    force: bool = False,
    bury: bool = True,
) -> IndexReport | None:
    """Builds a generation from the selection in use; returns None when the current one is up to date.

    Videos whose file is gone get a tombstone: a row `removed` in a commit. What the collection has of them stays, and a
    later run that finds the file again brings them back.

    Args:
        kind: `auto`, `flat` or `ivf`.
        memory_bytes: What the index may take when searched; None: a share of what is free.
        say: Gets the plan, and notes.
        force: Also when the current one is up to date.
        bury: Whether to look which videos are gone.

    Raises:
        UsageError: Nothing is selected yet.
        FinecoError: No video can be found any more, as when a drive is not mounted.
    """
    collection = writer.collection
    selection = collection.current_selection()
    encoder = collection.encoder
    if selection is None or encoder is None:
        raise UsageError(f"{collection.folder} has no selected frames to index", "Run 'fineco run' or 'fineco select'.")
    if bury:
        _bury_missing(writer, say)
    alive = writer.state.indexable(selection)
    if not alive:
        raise UsageError("there is no video to index", "Run 'fineco failures' to see what went wrong with them.")
    folder = collection.folder / INDEX
    content = writer.state.index_content(selection)
    if not force and _up_to_date(folder, selection, encoder["fingerprint"], content, kind):
        return None
    plan = plan_index(len(alive), int(encoder["spec"]["dim"]), memory_bytes, kind)
    say(plan.describe())

    def chunks() -> Iterator[tuple[np.ndarray[tuple[int], np.dtype[np.int64]], Float32]]:
        for _, shard, rows in _shards(writer, selection, alive):
            ids = np.array([index_id(shard.video_ids[row]) for row in rows], np.int64)
            yield ids, np.ascontiguousarray(shard.vectors()[rows])

    lookup = _lookup_rows(writer, selection, alive)
    with new_generation(folder) as generation:
        report = build_index(plan, chunks, generation)
        write_lookup(generation / LOOKUP_FILE, lookup)
        write_sidecar(generation, report, encoder["fingerprint"], selection, _extra(writer, content, kind))
    prune_generations(folder, KEPT_GENERATIONS)
    return report


def move_index(writer: Writer, say: Callable[[str], None]) -> None:
    """Makes the index in use, if there is one, name the files in which its videos lie now: the same vectors, linked,
    with a new lookup. One that is not of just the videos of the store is built anew."""
    folder = writer.collection.folder / INDEX
    try:
        before = current_generation(folder)
    except UsageError:
        return
    sidecar = read_sidecar(before)
    selection, kind = sidecar.selection, sidecar.extra.get("requested_kind", "auto")
    alive = writer.state.indexable(selection)
    with Lookup(before / LOOKUP_FILE) as old:
        same = sorted(index_id(v) for v in alive) == old.ids.tolist()
    if selection != writer.collection.current_selection() or not same:
        build_collection_index(writer, kind, None, say, bury=False)
        return
    check_generation(before, sidecar, full=True)
    content = writer.state.index_content(selection)
    lookup = _lookup_rows(writer, selection, alive)
    with new_generation(folder) as generation:
        link_file(before / INDEX_FILE, generation / INDEX_FILE)
        write_lookup(generation / LOOKUP_FILE, lookup)
        write_sidecar(generation, sidecar.report, sidecar.fingerprint, selection, _extra(writer, content, kind))


def _extra(writer: Writer, content: str, kind: str) -> dict[str, Any]:
    """What a sidecar says of its collection: what the index holds, the kind that was asked for, the last commit."""
    return {"content": content, "requested_kind": kind, "last_commit": writer.state.last_number}


def _shards(
    writer: Writer, selection: str, alive: dict[str, int]
) -> Iterator[tuple[int, store.EmbeddingsShard, list[int]]]:
    """Commit number, opened shard and the rows to take."""
    for number in sorted(set(alive.values())):
        name = f"{EMBEDDINGS}/{selection}/{number:06d}.h5"
        with store.EmbeddingsShard(writer.collection.open_file(name, writer.records)) as shard:
            yield number, shard, [row for row, v in enumerate(shard.video_ids) if alive.get(v) == number]


def _lookup_rows(writer: Writer, selection: str, alive: dict[str, int]) -> list[tuple[int, int, int, str]]:
    return [
        (index_id(shard.video_ids[row]), number, row, writer.state.paths[shard.video_ids[row]])
        for number, shard, rows in _shards(writer, selection, alive)
        for row in rows
    ]


def _bury_missing(writer: Writer, say: Callable[[str], None]) -> None:
    missing = {v: path for v, path in writer.state.paths.items() if not os.path.lexists(path)}
    if not missing:
        return
    if len(missing) == len(writer.state.paths):
        example = next(iter(missing.values()))
        raise FinecoError(
            f"none of the {len(missing)} videos of this collection can be found, e.g. {example}",
            "Is a drive not mounted? If they were moved, run 'fineco run' on their new folder.",
        )
    rows = [Row(Outcome(v, path, "removed", "index", "missing", "its file is gone")) for v, path in missing.items()]
    writer.commit("index", rows, [])
    say(f"{len(missing)} videos are gone and leave the index (a run that finds them again brings them back)")


def _up_to_date(folder: Path, selection: str, fingerprint: str, content: str, kind: str) -> bool:
    """Whether the current generation was built from just this; a damaged or missing one is not."""
    try:
        sidecar = read_sidecar(current_generation(folder))
    except FinecoError:
        return False
    made_of = (
        sidecar.selection,
        sidecar.fingerprint,
        sidecar.extra.get("content"),
        sidecar.extra.get("requested_kind"),
    )
    return made_of == (selection, fingerprint, content, kind)
