"""Mending a damaged collection: exactly what is broken is made again, and nothing else.

In this order, each step written down before the next begins, so that a repair that was killed goes on where it was:

1. Commits: the lines that are whole are kept. Small files (configuration, selections, pointers) from what commits say.
2. Data files: the videos whose rows are whole are copied into a new file; the damaged one does not count any more.
3. What is lost for good is made again: decoded, embedded or selected, from the videos, which must be there unchanged.
4. The index, when it is damaged or names what was replaced.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from indexes.generations import current_generation, read_sidecar
from indexes.id_map import video_key
from models.base import Encoder
from pipeline import commands, store
from pipeline.catalog import content_digest
from pipeline.collection import CONFIG_FILE, CURRENT, FIRST, OUTCOMES, Collection, Writer, this_command, write_config
from pipeline.commits import EMBEDDINGS, FEATURES, FRAMES, INDEX, Commit, Row, place_of
from pipeline.config import SelectOptions, plan_selection
from pipeline.errors import FinecoError, IntegrityError, UsageError, VideoError
from pipeline.files import record_of, seal, write_bytes, write_pointer
from pipeline.indexing import build_collection_index
from pipeline.interrupts import Interrupts
from pipeline.lock import Lock
from pipeline.lookup import LOOKUP_FILE, Lookup
from pipeline.output import number_of, visible
from pipeline.reselect import select_stored
from pipeline.run import Selecting
from pipeline.types import Outcome, Video
from pipeline.verify import Examination, all_commit_numbers, examine, lost_rows

GIVE_UP = "What is whole can be copied; otherwise run the videos again into a new folder."


def repair_collection(
    folder: Path, machine: commands.Machine = commands.Machine(), encoder: Encoder | None = None
) -> tuple[Examination, list[str]]:
    """Repairs a collection.

    Args:
        encoder: Instead of the one that the collection names.

    Returns:
        What `examine` finds afterwards, and a line for every video that could not be made again.

    Raises:
        UsageError: There is no collection, or another process writes to it.
        FinecoError: It is damaged beyond repair, or the disk refuses.
    """
    found = examine(folder, machine.say)
    if not found.problems:
        machine.say("Nothing is damaged.")
        return found, []
    with Lock(folder, this_command()):
        _mend_commits(folder, machine.say)
        _mend_small_files(folder, machine.say)
    found = examine(folder, machine.say)
    with Collection(folder).writing(this_command()) as writer:
        for name in found.damaged(FRAMES, FEATURES, EMBEDDINGS):
            if name in writer.records:
                _keep_whole_rows(writer, name, machine.say)
        lost = lost_rows(writer)
    hopeless = _make_again(folder, lost, machine, encoder)
    _mend_index(folder, found, machine, encoder)
    found = examine(folder, machine.say)
    return found, hopeless


# ----------------------------------------------------------------------------------------- commits and small files


def _mend_commits(folder: Path, say: Callable[[str], None]) -> None:
    collection = Collection.without_config(folder)
    try:
        collection.first_commit()
    except IntegrityError:
        first = min((int(p.stem) for p in (folder / OUTCOMES).glob("*.jsonl") if p.stem.isdecimal()), default=1)
        write_pointer(folder / OUTCOMES / FIRST, str(first))
        say(f"{OUTCOMES}/{FIRST}: written again")
    for number in all_commit_numbers(collection):
        try:
            collection.read_commit(number)
        except IntegrityError:
            path = collection.commit_path(number)
            data = path.read_bytes() if path.exists() else b""
            head, rows = Commit.salvage(number, data)
            if head is None:
                names = (f"{top}/{number:06d}.h5" for top in (FRAMES, FEATURES, *_selection_folders(folder)))
                files = {name: record_of(folder / name) for name in names if (folder / name).exists()}
                head = Commit(number, "repair", files, [])
            if data:
                write_bytes(path.with_name(path.name + ".damaged"), data)  # whatever a person may still read in it
            write_bytes(path, replace(head, rows=rows).to_bytes())
            n_lost = max(0, len(data.splitlines()) - 2 - len(rows))
            rest = number_of(n_lost, "row") + " lost" if data else "the file was gone"
            say(f"{OUTCOMES}/{path.name}: {number_of(len(rows), 'row')} kept, {rest}")


def _selection_folders(folder: Path) -> list[str]:
    return sorted(f"{EMBEDDINGS}/{p.name}" for p in (folder / EMBEDDINGS).glob("*") if p.is_dir())


def _mend_small_files(folder: Path, say: Callable[[str], None]) -> None:
    """`collection.json`, `selection.json` and the selection's pointer, as the newest commits have them."""
    config, encoder = None, None
    selections: dict[str, dict[str, Any]] = {}
    newest = None
    for commit in Collection.without_config(folder).commits():
        if "config" in commit.made_with:
            config, encoder = commit.made_with["config"], commit.made_with["encoder"]
            selections |= commit.made_with["selections"]
            newest = next(iter(commit.made_with["selections"]), newest)
    try:
        Collection(folder)
    except IntegrityError as error:
        if config is None:
            raise IntegrityError(f"{error.message}; and no commit says what it was", GIVE_UP) from error
        write_config(folder, config, encoder)
        say(f"{CONFIG_FILE}: written again from the newest commit")
    collection = Collection(folder)
    for name, content in selections.items():
        try:
            collection.selection(name)
        except IntegrityError:
            write_bytes(folder / EMBEDDINGS / name / "selection.json", seal(content))
            say(f"{EMBEDDINGS}/{name}/selection.json: written again from the newest commit")
    try:
        current = collection.current_selection()
        damaged = current not in selections if current else bool(selections)
    except IntegrityError:
        damaged = True
    if damaged and newest:
        indexed = _indexed_selection(folder)
        name = indexed if indexed in selections else newest
        write_pointer(folder / EMBEDDINGS / CURRENT, str(name))
        say(f"{EMBEDDINGS}/{CURRENT}: names {name} again")


def _indexed_selection(folder: Path) -> str | None:
    """The selection that the index in use was built from."""
    try:
        return read_sidecar(current_generation(folder / INDEX)).selection
    except FinecoError:
        return None


# ------------------------------------------------------------------------------------------------------- data files


def _keep_whole_rows(writer: Writer, name: str, say: Callable[[str], None]) -> None:
    """Copies what is whole in a damaged file into a new one, and writes down which videos are not in it."""
    kind, number = place_of(name)
    places = writer.state.places.get(kind, {})
    commit = writer.collection.read_commit(number)
    contents = {r.outcome.video_id: r.content for r in commit.rows if r.outcome.status == "ok"}
    wanted = {v: content for v, content in contents.items() if v in places and places[v].commit == number}
    whole: dict[str, store.Rows] = {}
    with contextlib.suppress(IntegrityError), store.open_shard(kind, writer.collection.folder / name) as shard:
        for at, video_id in enumerate(shard.video_ids):
            with contextlib.suppress(IntegrityError):
                rows = shard.rows(at)
                if video_id not in places:  # its line in the commit was lost: the file still says what it is
                    wanted.setdefault(video_id, shard.contents[at])
                if wanted.get(video_id) == shard.contents[at]:
                    whole[video_id] = rows
    known = _known_rows(writer, wanted)
    kept = {v: rows for v, rows in whole.items() if v in known}
    copied = [replace(known[v], outcome=Outcome(v, known[v].outcome.path, "ok", "repair")) for v in kept]
    by_index = _paths_of_index(writer.collection.folder) if wanted.keys() - known.keys() else {}
    lost = []
    for video_id in sorted(wanted.keys() - kept.keys()):
        path = known[video_id].outcome.path if video_id in known else by_index.get(video_key(video_id), "")
        texts = known[video_id].texts if video_id in known else ()
        outcome = Outcome(video_id, path, "failed", "repair", "damaged", f"its rows in {name} were damaged")
        lost.append(Row(outcome, wanted[video_id], texts=texts))
    files = [(kind, lambda path: store.copy_rows(path, list(kept.values())))] if kept else []
    writer.commit("repair", [*copied, *lost], files, lost=[name])
    say(f"{name}: {number_of(len(kept), 'video')} kept, {len(lost)} to be made again")


def _known_rows(writer: Writer, contents: dict[str, str]) -> dict[str, Row]:
    """The last row in any commit of some videos, of their very content, with the path and texts last seen."""
    known: dict[str, Row] = {}
    for commit in writer.collection.commits():
        for row in commit.rows:
            video_id = row.outcome.video_id
            if row.outcome.status == "ok" and row.content and contents.get(video_id) == row.content:
                path = writer.state.paths.get(video_id, row.outcome.path)
                known[video_id] = replace(row, outcome=replace(row.outcome, path=path))
    return known


def _paths_of_index(folder: Path) -> dict[int, str]:
    """Where the index says that videos are: all that is left of one whose line in a commit is lost."""
    with contextlib.suppress(FinecoError), Lookup(current_generation(folder / INDEX) / LOOKUP_FILE) as lookup:
        return {key: lookup.find(video)[2] for video, key in enumerate(lookup.id_map.keys.tolist())}
    return {}


# ------------------------------------------------------------------------------------------------- what is made again


def _make_again(
    folder: Path, lost: dict[str, list[Row]], machine: commands.Machine, encoder: Encoder | None
) -> list[str]:
    """Decodes, embeds and selects what is lost; a line for each video that is not there as it was."""
    hopeless = []
    for kind in (FRAMES, FEATURES):
        videos = []
        for row in lost.get(kind, ()):
            try:
                videos.append(_as_it_was(row))
            except VideoError as error:
                name = visible(row.outcome.path or row.outcome.video_id)
                hopeless.append(f"{name}: {error.message} [{error.code}]")
        sources = commands.Sources(again=videos, retry_failed=True)
        if videos and kind == FRAMES:
            commands.decode(folder, sources, machine=machine)
        elif videos:
            commands.embed(folder, sources, machine=machine, encoder=encoder)
    collection = Collection(folder)
    get_encoder = commands.EncoderOnDemand(collection.config, collection, machine, encoder)
    for kind, rows in sorted(lost.items()):
        if kind.startswith(f"{EMBEDDINGS}/"):
            ids = {row.outcome.video_id for row in rows}
            _select_again(collection, kind.partition("/")[2], ids, get_encoder, machine)
    return hopeless


def _as_it_was(row: Row) -> Video:
    """The video of a row, whose file must still have that content."""
    path = row.outcome.path
    if not path:
        raise VideoError("missing", "no commit knows its file any more; 'fineco run' on its folder finds it", "catalog")
    try:
        status = os.stat(path)
        content = content_digest(path, status.st_size)
    except OSError as error:
        raise VideoError("missing", f"its file cannot be read: {error.strerror or error}", "catalog") from error
    if content != row.content:
        raise VideoError("changed", "its file is another one now; 'fineco run' takes that in", "catalog")
    times = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return Video(row.outcome.video_id, content, path, *times, None, row.texts)


def _select_again(
    collection: Collection, name: str, ids: set[str], get_encoder: commands.EncoderOnDemand, machine: commands.Machine
) -> None:
    content = collection.selection(name)
    scorer = Path(content["scorer_file"]) if "scorer_file" in content else None
    options = SelectOptions(content["selector"], content["keep"], tuple(content["topics"]) or None, scorer)
    plan = plan_selection(collection, options, change=True)
    if plan.name != name:
        raise FinecoError(f"{EMBEDDINGS}/{name} cannot be made again: {scorer} is another scorer now")

    def make_selecting(any_text: bool) -> Selecting:
        return Selecting(plan, get_encoder() if plan.needs_encoder(any_text) else None)

    with (
        Interrupts(this_command()) as interrupts,
        collection.writing(this_command()) as writer,
        machine.progress() as progress,
    ):
        select_stored(writer, make_selecting, name, progress, interrupts, ids)


def _mend_index(folder: Path, found: Examination, machine: commands.Machine, encoder: Encoder | None) -> None:
    """Builds the index again when it is damaged, or when what it names lies elsewhere now."""
    if not (folder / INDEX).exists():
        return
    kind = "auto"
    collection = Collection(folder)
    get_encoder = commands.EncoderOnDemand(collection.config, collection, machine, encoder)
    with contextlib.suppress(FinecoError):
        kind = read_sidecar(current_generation(folder / INDEX)).extra.get("requested_kind", "auto")
    try:
        with collection.writing(this_command()) as writer:
            force = bool(found.damaged(INDEX))
            report = build_collection_index(
                writer, kind, None, machine.say, force=force, bury=False, get_encoder=get_encoder
            )
    except UsageError as error:  # nothing is left to index
        machine.say(error.message)
        return
    if report is not None:
        machine.say(report.describe())
