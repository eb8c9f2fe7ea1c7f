"""The index of a collection: which moments go in, which videos are gone, and what lies beside the vectors."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from indexes.build import INDEX_FILE, RECALL_GOAL, IndexReport, build_index
from indexes.generations import (
    check_generation,
    current_generation,
    new_generation,
    prune_generations,
    read_sidecar,
    write_sidecar,
)
from indexes.id_map import video_key
from indexes.plan import plan_index
from models.base import Encoder
from pipeline.collection import Writer
from pipeline.commits import EMBEDDINGS, FEATURES, INDEX, Row
from pipeline.errors import FinecoError, IntegrityError, UsageError
from pipeline.files import link_file
from pipeline.gallery import Gallery
from pipeline.lookup import LOOKUP_FILE, Lookup, write_lookup
from pipeline.probes import N_QUESTIONS, make_probes, sampled_texts
from pipeline.text_vectors import TEXTS_FILE, TextVectors
from pipeline.types import Outcome

KEPT_GENERATIONS = 2  # a search that has the last one open goes on


def build_collection_index(
    writer: Writer,
    kind: str,
    memory_bytes: int | None,
    say: Callable[[str], None],
    force: bool = False,
    bury: bool = True,
    get_encoder: Callable[[], Encoder] | None = None,
    recall_goal: float | None = None,
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
        get_encoder: Loads the collection's encoder, for texts that the index is measured with and the one before it was
            not; None: these are left out.
        recall_goal: What it should find of an exhaustive search's first answers; None: as the index before it.

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
    if not writer.state.indexable(selection):
        raise _nothing_to_index(writer, selection)
    folder = collection.folder / INDEX
    goal = _goal_before(folder) if recall_goal is None else recall_goal
    wanted = {
        "content": writer.state.index_content(selection),
        "requested_kind": kind,
        "recall_goal": goal,
    }
    if not force and _up_to_date(folder, selection, encoder["fingerprint"], wanted):
        return None
    gallery = Gallery(writer, selection)
    plan = plan_index(len(gallery), len(gallery.id_map), int(encoder["spec"]["dim"]), memory_bytes, kind)
    say(plan.describe())
    texts = TextVectors(folder, encoder["fingerprint"], gallery.dim, get_encoder, say)
    temperature = float(encoder["spec"]["temperature"])
    probes, background = make_probes(gallery, _texts_beside(writer, gallery), texts, temperature)
    with new_generation(folder) as generation:
        report = build_index(plan, gallery.moments, gallery.id_map, probes, generation, say, goal)
        write_lookup(generation / LOOKUP_FILE, gallery, background)
        texts.write(generation / TEXTS_FILE)
        write_sidecar(generation, report, encoder["fingerprint"], selection, wanted | _last_commit(writer))
    prune_generations(folder, KEPT_GENERATIONS)
    return report


def _nothing_to_index(writer: Writer, selection: str) -> UsageError:
    folder = writer.collection.folder
    if f"{EMBEDDINGS}/{selection}" in writer.state.outdated and writer.state.places.get(FEATURES):
        return UsageError(
            f"the selection {selection} was made by an earlier version of fineco, which stored no moments",
            f"Run 'fineco select -c {folder}' first: nothing is decoded or embedded again.",
        )
    return UsageError("there is no video to index", "Run 'fineco failures' to see what went wrong with them.")


def _texts_beside(writer: Writer, gallery: Gallery) -> list[str]:
    """Texts beside some of the videos, as last seen."""
    with_texts = (v for v in gallery.video_ids if writer.state.has_texts(v))  # by ascending key: a sample by chance
    chosen = set(itertools.islice(with_texts, N_QUESTIONS))
    texts: dict[str, list[str]] = {}
    if chosen:
        for commit in writer.collection.commits():
            for row in commit.rows:
                if row.outcome.status == "ok" and row.outcome.video_id in chosen and row.texts:
                    texts[row.outcome.video_id] = [text.text for text in row.texts]
    return sampled_texts(texts)


def move_index(writer: Writer, say: Callable[[str], None]) -> None:
    """Makes the index in use, if there is one, name the files in which its videos lie now: the same vectors, linked,
    with a new lookup. One that is not of just the videos of the store is built anew."""
    folder = writer.collection.folder / INDEX
    try:
        before = current_generation(folder)
        sidecar = read_sidecar(before)
    except UsageError:
        return  # none yet, or one of an earlier version
    selection, kind = sidecar.selection, sidecar.extra.get("requested_kind", "auto")
    try:
        check_generation(before, sidecar, full=True)
    except IntegrityError as error:  # no reason to stop half-way: it is made of what is in the store
        say(f"The index is damaged ({error.message}) and built anew.")
        _build_anew(writer, kind, say)
        return
    alive = writer.state.indexable(selection)
    with Lookup(before / LOOKUP_FILE) as old:
        same = sorted(video_key(v) for v in alive) == old.id_map.keys.tolist()
        background = old.background
    if selection != writer.collection.current_selection() or not same:
        _build_anew(writer, kind, say)
        return
    extra = sidecar.extra | {"content": writer.state.index_content(selection)} | _last_commit(writer)
    with new_generation(folder) as generation:
        for name in (INDEX_FILE, TEXTS_FILE):
            link_file(before / name, generation / name)
        write_lookup(generation / LOOKUP_FILE, Gallery(writer, selection), background)
        write_sidecar(generation, sidecar.report, sidecar.fingerprint, selection, extra)


def _build_anew(writer: Writer, kind: str, say: Callable[[str], None]) -> None:
    """Builds the index without being asked: of another kind where there are too few moments for the one it had."""
    try:
        report = build_collection_index(writer, kind, None, say, force=True, bury=False)
    except UsageError:
        report = build_collection_index(writer, "auto", None, say, force=True, bury=False)
    if report is not None:
        say(report.describe())


def _last_commit(writer: Writer) -> dict[str, int]:
    """What a sidecar says of the collection's history: a commit that is missing later is noticed by it."""
    return {"last_commit": writer.state.last_number}


def _goal_before(folder: Path) -> float:
    """The recall that was asked of the index in use, or the usual one."""
    try:
        return float(read_sidecar(current_generation(folder)).extra.get("recall_goal", RECALL_GOAL))
    except FinecoError:
        return RECALL_GOAL


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


def _up_to_date(folder: Path, selection: str, fingerprint: str, wanted: dict[str, Any]) -> bool:
    """Whether the current generation was built from just this, as asked; a damaged or missing one is not."""
    try:
        sidecar = read_sidecar(generation := current_generation(folder))
        check_generation(generation, sidecar)
    except FinecoError:
        return False
    made_of = sidecar.selection, sidecar.fingerprint, {name: sidecar.extra.get(name) for name in wanted}
    return made_of == (selection, fingerprint, wanted)
