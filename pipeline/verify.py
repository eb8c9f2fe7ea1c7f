"""Whether a collection is what was written: every digest, id, offset, dimension and norm, the index against the store.

`examine` reads everything once and says which files are damaged and how; pipeline.repair works by what it finds.
"""

from __future__ import annotations

import contextlib
import hashlib
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from indexes.generations import check_generation, current_generation, read_sidecar
from indexes.id_map import video_key
from pipeline import store
from pipeline.collection import CONFIG_FILE, CURRENT, FIRST, OUTCOMES, Collection, Snapshot
from pipeline.commits import EMBEDDINGS, FEATURES, FRAMES, INDEX, Row, State, place_of
from pipeline.errors import FinecoError, IntegrityError, UsageError
from pipeline.files import TEMPORARY_SUFFIX, FileRecord, check_file
from pipeline.lookup import LOOKUP_FILE, Lookup
from pipeline.output import number_of, visible
from pipeline.types import Float32

SAMPLED_VECTORS = 1000  # of the index, compared with the store
SEED = 0
# Least cosine of a vector in the index with the one in the store, by how the index codes it.
LEAST_COSINE = {"Flat": 1 - 1e-6, "SQ8": 0.99, "RaBitQ": 0.5}
SHOWN_PROBLEMS = 50
SAY_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Problem:
    """One damaged file: its name in the collection (`index` for the index as a whole), and what is wrong with it."""

    name: str
    message: str


@dataclass(slots=True)
class Examination:
    """What was found in a collection.

    Attributes:
        state: The merged commits that can be read.
        records: Of every data file that they name.
        problems: In the order in which they were found.
        leftovers: Names of files that belong to nothing: what a process that died left, for the next writer to remove.
        digest: Of ids, contents, features, selections and vectors of all videos that are there, and nothing of how or
            when they were made.
        n_indexed: Videos in the index; None without one.
        any_lost: Whether a repair ever found rows that were lost.
    """

    collection: Collection
    state: State = field(default_factory=State)
    records: dict[str, FileRecord] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    digest: str = ""
    n_indexed: int | None = None
    any_lost: bool = False

    def damaged(self, *names: str) -> list[str]:
        """Names of the damaged files that start with one of `names`."""
        return [problem.name for problem in self.problems if problem.name.startswith(names)]


def _ignore(line: str) -> None:
    return None


def examine(folder: Path, say: Callable[[str], None] = _ignore) -> Examination:
    """Reads and checks everything in a collection. Nothing is changed.

    Args:
        say: Gets a line now and then, of how far it is.

    Raises:
        UsageError: There is no collection.
    """
    try:
        collection = Collection(folder)
        found = Examination(collection)
    except IntegrityError as error:
        collection = Collection.without_config(folder)
        found = Examination(collection, problems=[Problem(CONFIG_FILE, error.message)])
    rows = dict(_read_commits(found))
    lines: list[bytes] = []
    said = time.monotonic()
    for n_done, (name, record) in enumerate(sorted(found.records.items())):
        if time.monotonic() - said > SAY_SECONDS:
            say(f"{n_done} of {len(found.records)} files checked")
            said = time.monotonic()
        with _noticing(found, name):
            check_file(folder / name, record)
            lines += _check_shard(found, name, rows)
    found.digest = hashlib.sha256(b"".join(sorted(lines))).hexdigest()
    _check_selections(found)
    if found.any_lost and not found.problems:
        for kind, missing in lost_rows(found).items():
            of = number_of(len(missing), "video")
            found.problems.append(
                Problem(kind, f"{folder / kind}: rows of {of}, lost to damage, are not made again yet")
            )
    _check_index(found)
    found.leftovers = _leftovers(found)
    return found


@contextlib.contextmanager
def _noticing(found: Examination, name: str) -> Iterator[None]:
    """Turns an error inside the block into a problem of a file."""
    try:
        yield
    except FinecoError as error:
        found.problems.append(Problem(name, error.message))


def _read_commits(found: Examination) -> Iterator[tuple[int, dict[str, str]]]:
    """Merges all commits; yields the number of each that brought data, with id -> content of its videos."""
    collection = found.collection
    numbers = range(0)
    with _noticing(found, f"{OUTCOMES}/{FIRST}"):
        numbers = all_commit_numbers(collection)
    for number in numbers:
        with _noticing(found, f"{OUTCOMES}/{number:06d}.jsonl"):
            commit = collection.read_commit(number)
            found.state.merge(commit)
            commit.merge_records(found.records)
            found.any_lost = found.any_lost or bool(commit.lost)
            if commit.files:
                yield number, {r.outcome.video_id: r.content for r in commit.rows if r.outcome.status == "ok"}


def all_commit_numbers(collection: Collection) -> range:
    """Numbers of the commits there must be: up to the last one that is there, or that the index in use knew of."""
    numbers = collection.commit_numbers()
    try:
        last = read_sidecar(current_generation(collection.folder / INDEX)).extra.get("last_commit", 0)
    except FinecoError:
        last = 0
    return range(numbers.start, max(numbers.stop, last + 1))


def _check_shard(found: Examination, name: str, rows: dict[int, dict[str, str]]) -> list[bytes]:
    """Checks every row of a data file; a line for every living video whose latest data is there, for the digest."""
    kind, number = place_of(name)
    encoder = found.collection.encoder
    lines = []
    with store.open_shard(kind, found.collection.folder / name) as shard:
        if encoder and kind != FRAMES and shard.dim != encoder["spec"]["dim"]:
            raise IntegrityError(f"{shard.path}: {shard.dim} dimensions, the encoder has {encoder['spec']['dim']}")
        if len(set(shard.video_ids)) != len(shard):
            raise IntegrityError(f"{shard.path}: a video is in it twice")
        if dict(zip(shard.video_ids, shard.contents, strict=True)) != rows[number]:
            raise IntegrityError(f"{shard.path}: its videos are not those of commit {number}")
        for row, video_id in enumerate(shard.video_ids):
            shard.check_row(row)
            place = found.state.places.get(kind, {}).get(video_id)
            if place and place.commit == number and video_id in found.state.paths:
                lines.append(f"{video_id} {shard.contents[row]} {kind} {shard.row_digest(row).hex()}\n".encode())
    return lines


def lost_rows(found: Examination | Snapshot) -> dict[str, list[Row]]:
    """Kind of data -> rows of the videos that a repair found lost and that were not made again since."""
    state = found.state
    lost: dict[str, list[Row]] = {}
    for commit in found.collection.commits():
        for name in commit.lost:
            kind, _ = place_of(name)
            for row in commit.rows:
                path, known = row.outcome.path, state.known.get(row.outcome.path)
                gone = state.latest.get(path, (0, "", ""))[2] == "removed" or (known and known.content != row.content)
                if row.outcome.code == "damaged" and not gone and not state.has(kind, row.video()):
                    lost.setdefault(kind, []).append(row)
    return lost


def _check_selections(found: Examination) -> None:
    collection, state = found.collection, found.state
    selected = [kind.partition("/")[2] for kind in state.places if kind.startswith(f"{EMBEDDINGS}/")]
    current = None
    with _noticing(found, f"{EMBEDDINGS}/{CURRENT}"):
        current = collection.current_selection()
        if current is None and selected:
            raise IntegrityError(f"{collection.folder / EMBEDDINGS / CURRENT} is missing")
    for name in dict.fromkeys([*selected, *([current] if current else [])]):
        with _noticing(found, f"{EMBEDDINGS}/{name}/selection.json"):
            collection.selection(name)


def _check_index(found: Examination) -> None:
    """Checks the index in use: its files, its lookup against the store, its ids, and a sample of its vectors."""
    folder = found.collection.folder / INDEX
    if not folder.exists():
        return
    with _noticing(found, INDEX):
        try:
            generation = current_generation(folder)
            sidecar = read_sidecar(generation)
        except UsageError:
            return  # none yet, or one of an earlier version
        found.n_indexed = sidecar.report.n_videos
        check_generation(generation, sidecar, full=True)
        with Lookup(generation / LOOKUP_FILE) as lookup:
            _check_ids(found, generation, sidecar.selection, lookup, sidecar.extra.get("content"))
            _check_vectors(found, generation, sidecar.selection, lookup)


def _check_ids(found: Examination, generation: Path, selection: str, lookup: Lookup, content: object) -> None:
    """FAISS and the lookup have the same moments; the videos of an index that is up to date are those of the store."""
    from indexes.search import stored_ids

    if not np.array_equal(np.sort(stored_ids(generation)), lookup.id_map.ids):
        raise IntegrityError(f"{generation}: the vectors and the list beside them are not of the same moments")
    if content == found.state.index_content(selection):
        wanted = np.sort(np.array([video_key(v) for v in found.state.indexable(selection)], np.int64))
        if not np.array_equal(wanted, lookup.id_map.keys):
            raise IntegrityError(f"{generation}: {len(lookup)} videos, the store has {len(wanted)} of this selection")


def _check_vectors(found: Examination, generation: Path, selection: str, lookup: Lookup) -> None:
    """Every video of the lookup lies in the store where it says, with as many moments; some of the index's vectors are
    compared with it."""
    from indexes.search import stored_vectors

    id_map = lookup.id_map
    rng = np.random.default_rng(SEED)
    sampled = set(rng.permutation(id_map.ids)[:SAMPLED_VECTORS].tolist())
    kind = f"{EMBEDDINGS}/{selection}"
    vectors: dict[int, Float32] = {}
    for number, rows in lookup.places().items():
        name = f"{kind}/{number:06d}.h5"
        if name in found.damaged(name):
            continue  # told already
        if name not in found.records:
            raise IntegrityError(f"{generation}: it holds videos of {name}, which the store does not have")
        with store.EmbeddingsShard(found.collection.folder / name) as shard:
            stored = shard.moment_vectors()
            for row, video in rows:
                if row >= len(shard) or video_key(shard.video_ids[row]) != id_map.keys[video]:
                    raise IntegrityError(f"{generation}: row {row} of {name} is not the video that the lookup says")
                first, end = shard.moment_offsets[row : row + 2].tolist()
                if end - first != id_map.counts[video]:
                    raise IntegrityError(f"{generation}: row {row} of {name} has {end - first} moments, not as many")
                for moment, identifier in enumerate(id_map.ids_of(np.array([video])).tolist(), first):
                    if identifier in sampled:
                        vectors[identifier] = stored[moment]
    if not vectors:
        return
    ids = np.array(sorted(vectors), np.int64)
    wanted = np.stack([vectors[i] for i in ids.tolist()])
    factory, found_vectors = stored_vectors(generation, ids)
    least = LEAST_COSINE[factory.rpartition(",")[2]]
    norms = np.linalg.norm(wanted, axis=1) * np.linalg.norm(found_vectors, axis=1)
    cosines = np.einsum("nd,nd->n", wanted, found_vectors) / np.maximum(norms, 1e-12)
    if not np.all(cosines >= least):
        n = int(np.sum(~(cosines >= least)))
        raise IntegrityError(f"{generation}: {n} of {len(ids)} sampled vectors are not those of the store")


def _leftovers(found: Examination) -> list[str]:
    folder = found.collection.folder
    names = []
    for top in (FRAMES, FEATURES, EMBEDDINGS, OUTCOMES, INDEX):
        for path in (folder / top).rglob("*"):
            name = path.relative_to(folder).as_posix()
            unnamed = path.suffix == ".h5" and top != INDEX and name not in found.records
            if path.is_file() and (unnamed or path.name.endswith(TEMPORARY_SUFFIX)):
                names.append(name)
    return sorted(names)


def verify_collection(folder: Path, say: Callable[[str], None] = _ignore) -> dict[str, Any]:
    """`examine` as plain values. Raises as that."""
    return verification(examine(folder, say))


def verification(found: Examination) -> dict[str, Any]:
    """What was found as plain values: counts, the digest, the problems and the leftovers."""
    return {
        "collection": str(found.collection.folder),
        "files": len(found.records),
        "bytes": sum(record.size_bytes for record in found.records.values()),
        "videos": len(found.state.paths),
        "indexed": found.n_indexed,
        "digest": found.digest,
        "problems": [problem.message for problem in found.problems],
        "leftovers": found.leftovers,
    }


def verify_text(content: dict[str, Any]) -> str:
    """The verification for a person."""
    indexed = "no index" if content["indexed"] is None else f"{content['indexed']} in the index"
    files, videos = number_of(content["files"], "file"), number_of(content["videos"], "video")
    problems, leftovers = content["problems"], content["leftovers"]
    lines = [f"{files}, {content['bytes'] / 1e6:.1f} MB, {videos}, {indexed}"]
    lines += [f"problem: {visible(problem)}" for problem in problems[:SHOWN_PROBLEMS]]
    if len(problems) > SHOWN_PROBLEMS:
        lines.append(f"(and {len(problems) - SHOWN_PROBLEMS} more)")
    if problems:
        lines.append(f"'fineco verify --repair -c {shlex.quote(content['collection'])}' makes it whole again")
    if leftovers and not problems:
        lines.append(f"of no use, and removed by the next run: {number_of(len(leftovers), 'file')}")
    lines.append(number_of(len(problems), "problem") if problems else "everything is as it was written")
    if not problems:
        lines.append(f"digest {content['digest']}")
    return "\n".join(lines) + "\n"
