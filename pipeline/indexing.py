"""The index of a collection: which vectors go in, which videos are gone, and the lookup beside the vectors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from indexes.build import IndexReport, build_index
from indexes.generations import current_generation, new_generation, prune_generations, read_sidecar, write_sidecar
from indexes.plan import plan_index
from pipeline import store
from pipeline.collection import Writer
from pipeline.commits import EMBEDDINGS, INDEX, Row
from pipeline.errors import FinecoError, UsageError
from pipeline.search import LOOKUP_FILE, index_id
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

    def shards() -> Iterator[tuple[int, store.EmbeddingsShard, list[int]]]:
        """Commit number, opened shard and the rows to take."""
        for number in sorted(set(alive.values())):
            name = f"{EMBEDDINGS}/{selection}/{number:06d}.h5"
            with store.EmbeddingsShard(collection.open_file(name, writer.records)) as shard:
                yield number, shard, [row for row, v in enumerate(shard.video_ids) if alive.get(v) == number]

    def chunks() -> Iterator[tuple[np.ndarray[tuple[int], np.dtype[np.int64]], Float32]]:
        for _, shard, rows in shards():
            ids = np.array([index_id(shard.video_ids[row]) for row in rows], np.int64)
            yield ids, np.ascontiguousarray(shard.vectors()[rows])

    lookup = [
        (index_id(shard.video_ids[row]), number, row, writer.state.paths[shard.video_ids[row]])
        for number, shard, rows in shards()
        for row in rows
    ]
    with new_generation(folder) as generation:
        report = build_index(plan, chunks, generation)
        store.write_lookup(generation / LOOKUP_FILE, lookup)
        extra = {"content": content, "requested_kind": kind}
        write_sidecar(generation, report, encoder["fingerprint"], selection, extra)
    prune_generations(folder, KEPT_GENERATIONS)
    return report


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
