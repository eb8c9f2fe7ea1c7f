"""Building an index: train on a bounded sample, add in chunks, measure what of an exhaustive search it finds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from indexes.candidates import propose_videos, search_index
from indexes.id_map import IdMap
from indexes.plan import IndexPlan, moments_of_videos
from pipeline.errors import FinecoError, IntegrityError
from pipeline.files import write_file
from pipeline.types import Float32, Int64, check_shape, check_unit_rows

INDEX_FILE = "index.faiss"
RECALL_GOAL = 0.95  # of what an exhaustive search finds first
CANDIDATES = 100  # videos a query is compared with frame by frame, unless that finds too little
MOST_CANDIDATES = 800
SEED = 0
DAMAGED = "Run 'fineco verify' on the collection."

Chunks = Callable[[], Iterable[tuple[Int64, Float32]]]


@dataclass(frozen=True, slots=True)
class Probes:
    """Questions whose answer is known from an exhaustive search.

    Attributes:
        vectors: (Q, D) float32 unit rows.
        right: For each the videos (numbers in the id map) that an exhaustive search finds first; several where equal.
        about: What they are, for a person, e.g. `100 texts beside videos`.
        n_videos: The exhaustive search was among the first so many videos of the id map; None: among all.
    """

    vectors: Float32
    right: Sequence[NDArray[np.int32]]
    about: str
    n_videos: int | None = None


@dataclass(frozen=True, slots=True)
class IndexReport:
    """What was built, and what it finds.

    Attributes:
        n_vectors: Moments of the `n_videos` videos.
        nprobe: Cells that a query looks into; 0 for flat.
        candidates: Videos that are scored again by their frames, unless a search asks for many hits.
        n_probes, n_found: Questions that it was measured with, and for how many of them what an exhaustive search finds
            first is among the candidates (among all videos, or a sample, as `probes` says).
        probes: What the questions were.
        n_bytes: Of `index.faiss`; what else a search reads is counted by the plan.
    """

    factory: str
    dim: int
    n_videos: int
    n_vectors: int
    nprobe: int
    candidates: int
    n_probes: int
    n_found: int
    probes: str
    n_bytes: int
    seconds: float

    @property
    def recall(self) -> float:
        """Share of the questions for which it finds what an exhaustive search finds first; 1 without a question."""
        return self.n_found / self.n_probes if self.n_probes else 1.0

    def describe(self) -> str:
        """The line printed after building."""
        size = f"{self.n_bytes / 1e6:.1f} MB, {self.seconds:.1f} s"
        what = moments_of_videos(self.n_vectors, self.n_videos)
        return f"Index built: {self.factory}, {what}, {size}; {self.finds()}"

    def finds(self) -> str:
        """How good it is, in words."""
        cells = f"{self.nprobe} cells and " if self.nprobe else ""
        return (
            f"of {self.n_probes} questions ({self.probes}) it finds {self.n_found} that an exhaustive search finds "
            f"first ({cells}{min(self.candidates, self.n_videos)} of {self.n_videos} videos a question)"
        )

    def to_json(self) -> dict[str, Any]:
        """The fields, as plain values."""
        return asdict(self)


def build_index(
    plan: IndexPlan,
    chunks: Chunks,
    id_map: IdMap,
    probes: Probes,
    folder: Path,
    say: Callable[[str], None] = lambda line: None,
    recall_goal: float = RECALL_GOAL,
) -> IndexReport:
    """Builds and writes `index.faiss` in `folder`.

    Args:
        chunks: Called for every pass over the vectors; gives (ids (n,) int64, unit vectors (n, D) float32).
        id_map: Whose moments they are.
        probes: What its recall is measured with.
        recall_goal: Where the recall is below it, a query looks into more cells and then takes more candidates, as far
            as that helps.
        say: Told when that happens.

    Raises:
        IntegrityError: Vectors that are not finite unit rows of the plan's dimension, other ids than those of the map,
            or another number of vectors than planned.
        FinecoError: FAISS or the disk refuses.
    """
    import faiss

    started = time.monotonic()
    try:
        index = faiss.index_factory(plan.dim, _factory(plan), faiss.METRIC_INNER_PRODUCT)
        all_ids, sample = _survey(plan, chunks)
        if not np.array_equal(np.sort(all_ids), id_map.ids) or len(id_map.keys) != plan.n_videos:
            raise IntegrityError("the vectors to index are not those of the list of moments", DAMAGED)
        if plan.nlist:
            _train(faiss, index, sample)
        added = 0
        for ids, vectors in _checked(chunks, plan.dim):
            if not np.array_equal(ids, all_ids[added : added + len(ids)]):
                raise IntegrityError("the vectors changed while the index was built", "Run the same command again.")
            index.add_with_ids(vectors, ids)
            added += len(ids)
        nprobe, candidates, n_found = _tune(faiss, index, plan, id_map, probes, recall_goal, say)
        record = write_file(folder / INDEX_FILE, lambda path: _write(faiss, index, path))
    except RuntimeError as error:
        raise FinecoError(f"FAISS could not build {plan.factory}: {faiss_reason(error)}") from error
    return IndexReport(
        plan.factory,
        plan.dim,
        plan.n_videos,
        plan.n_vectors,
        nprobe,
        candidates,
        len(probes.vectors),
        n_found,
        probes.about,
        record.size_bytes,
        round(time.monotonic() - started, 3),
    )


def faiss_reason(error: RuntimeError) -> str:
    """The part of FAISS's message that is for people: without the C++ function, file and line."""
    return str(error).strip().splitlines()[0].rpartition("failed: ")[2].rpartition("Error: ")[2]


def _factory(plan: IndexPlan) -> str:
    return plan.factory if plan.nlist else f"IDMap,{plan.factory}"  # IVF keeps ids itself


def _checked(chunks: Chunks, dim: int) -> Iterator[tuple[Int64, Float32]]:
    for ids, vectors in chunks():
        try:
            check_shape("ids", ids, (None,), np.int64)
            check_shape("vectors", vectors, (len(ids), dim), np.float32)
            if len(vectors):
                check_unit_rows("vectors", vectors)
                if ids.min() < 0:
                    raise ValueError("an id is negative")
        except ValueError as error:
            raise IntegrityError(f"cannot index: {error}", DAMAGED) from error
        yield ids, np.ascontiguousarray(vectors)


def _survey(plan: IndexPlan, chunks: Chunks) -> tuple[Int64, Float32]:
    """The first pass: checks everything before anything is built.

    Returns:
        All ids (n,) in order, and a uniform sample of the vectors in random order to train with.
    """
    rng = np.random.default_rng(SEED)
    size = min(plan.n_train, plan.n_vectors)
    chosen = np.sort(rng.choice(plan.n_vectors, size=size, replace=False)) if size else np.empty(0, np.int64)
    all_ids, start = [np.empty(0, np.int64)], 0
    parts = [np.empty((0, plan.dim), np.float32)]
    for ids, vectors in _checked(chunks, plan.dim):
        first, last = np.searchsorted(chosen, (start, start + len(ids)))
        parts.append(vectors[chosen[first:last] - start])
        all_ids.append(ids)
        start += len(ids)
    if start != plan.n_vectors:
        raise IntegrityError(f"{start} vectors came for an index planned for {plan.n_vectors}", DAMAGED)
    in_order = np.concatenate(all_ids)
    by_value = np.sort(in_order)
    repeated = by_value[1:][by_value[1:] == by_value[:-1]]
    if len(repeated):
        raise IntegrityError(f"two moments have the id {repeated[0]} in the index", DAMAGED)
    sample: Float32 = np.concatenate(parts)
    rng.shuffle(sample)
    return in_order, sample


def _train(faiss: Any, index: Any, sample: Float32) -> None:
    """Trains the cells, on the GPUs when FAISS has any; the index itself stays on the CPU."""
    ivf = faiss.extract_index_ivf(index)
    if hasattr(faiss, "get_num_gpus") and faiss.get_num_gpus() > 0:
        try:
            ivf.clustering_index = faiss.index_cpu_to_all_gpus(faiss.IndexFlatIP(index.d))
            index.train(sample)
            return
        except RuntimeError:  # a GPU that another program fills: the CPU takes longer and comes to the same
            pass
        finally:
            ivf.clustering_index = None
    index.train(sample)


def _tune(
    faiss: Any,
    index: Any,
    plan: IndexPlan,
    id_map: IdMap,
    probes: Probes,
    recall_goal: float,
    say: Callable[[str], None],
) -> tuple[int, int, int]:
    """Sets how many cells a query looks into, and finds how many candidates it needs.

    Returns:
        nprobe (0 for flat), candidates, and for how many probes they hold what an exhaustive search finds first.
    """

    def look_into(nprobe: int) -> None:
        if nprobe:
            faiss.extract_index_ivf(index).nprobe = nprobe

    share, among = 1.0, None
    if probes.n_videos is not None and probes.n_videos < plan.n_videos:
        share, among = probes.n_videos / plan.n_videos, id_map.ids_of(np.arange(probes.n_videos))

    def search(queries: Float32, k: int, without: Int64 | None = None) -> list[tuple[Int64, Float32]]:
        return search_index(index, queries, k, without, among)

    def found(nprobe: int, candidates: int) -> int:
        look_into(nprobe)  # of a sample of the videos, as large a share of the candidates is to be expected
        proposed = propose_videos(search, id_map, probes.vectors, max(1, round(share * candidates)))
        pairs = zip(proposed, probes.right, strict=True)
        return sum(bool(np.isin(right, videos).any()) for (videos, _), right in pairs)

    nprobe, candidates = plan.nprobe, CANDIDATES
    n_found, goal = found(nprobe, candidates), recall_goal * len(probes.vectors)
    while n_found < goal:
        # A bit more, or where that finds nothing new, all that there is: cells first, for candidates cost more.
        steps = [(cells, candidates) for cells in _further(nprobe, plan.nlist)]
        steps += [(nprobe, videos) for videos in _further(candidates, min(MOST_CANDIDATES, plan.n_videos))]
        found_by = ((step, found(*step)) for step in steps)
        better = next(((step, n) for step, n in found_by if n > n_found), None)
        if better is None:
            more = "" if plan.factory.endswith("Flat") else "; with more memory (--memory) it could be finer"
            say(f"Recall is below {recall_goal:g}: this index finds {n_found} of {len(probes.vectors)}{more}.")
            break
        (nprobe, candidates), n_found = better
        cells = f"{nprobe} cells and " if nprobe else ""
        say(f"Recall is below {recall_goal:g}: a query now takes {cells}{candidates} videos, which finds {n_found}.")
    look_into(nprobe)  # the file says what the report says
    return nprobe, candidates, n_found


def _further(number: int, most: int) -> list[int]:
    """Twice a number, and the most there may be, as far as they are above it."""
    return [more for more in dict.fromkeys((min(2 * number, most), most)) if more > number]


def _write(faiss: Any, index: Any, path: Path) -> None:
    """Through a file of Python's: FAISS's own takes no name that is not UTF-8 and hides a full disk met at its end."""
    with path.open("wb") as file:
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write, 1 << 24))
