"""Building an index: train on a bounded sample, add in chunks, measure its recall against exact search."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from indexes.exact import TIE_ROOM, Chunks, Ids, exact_top_k, has_clear_answer, recall
from indexes.plan import IndexPlan
from pipeline.errors import FinecoError, IntegrityError
from pipeline.files import write_file
from pipeline.types import Float32, check_shape, check_unit_rows

INDEX_FILE = "index.faiss"
RECALL_AT = 10
RECALL_QUERIES = 256
RECALL_GOAL = 0.95
LEAST_GAIN = 0.005  # of recall: when twice the cells bring less, the vectors' coding is the limit, not the cells
QUERY_NOISE = 1.0  # length of the noise added to a unit vector to make a query
SEED = 0
DAMAGED = "Run 'fineco verify' on the collection."


@dataclass(frozen=True, slots=True)
class IndexReport:
    """What was built: recall@10 was measured with `nprobe` cells on `n_recall_queries` queries."""

    factory: str
    dim: int
    n_vectors: int
    nprobe: int
    recall_at_10: float
    n_recall_queries: int
    n_bytes: int
    seconds: float

    def describe(self) -> str:
        """The line printed after building."""
        probes = f", {self.nprobe} cells a query" if self.nprobe else ""
        return (
            f"Index built: {self.factory}, {self.n_vectors} videos{probes}, recall@{RECALL_AT} {self.recall_at_10:.3f} "
            f"against exact search, {self.n_bytes / 1e6:.1f} MB, {self.seconds:.1f} s"
        )

    def to_json(self) -> dict[str, Any]:
        """The fields, as plain values."""
        return asdict(self)


def build_index(plan: IndexPlan, chunks: Chunks, folder: Path) -> IndexReport:
    """Builds and writes `index.faiss` in `folder`.

    Args:
        chunks: Called for every pass over the vectors; gives (ids (n,) int64, unit vectors (n, D) float32).

    Raises:
        IntegrityError: Vectors that are not finite unit rows of the plan's dimension, ids that are not unique, or
            another number of vectors than planned.
        FinecoError: FAISS or the disk refuses.
    """
    import faiss

    started = time.monotonic()
    try:
        index = faiss.index_factory(plan.dim, _factory(plan), faiss.METRIC_INNER_PRODUCT)
        all_ids, sample = _survey(plan, chunks)
        if plan.nlist:
            _train(faiss, index, sample[: plan.n_train])
        added = 0
        for ids, vectors in _checked(chunks, plan.dim):
            if not np.array_equal(ids, all_ids[added : added + len(ids)]):
                raise IntegrityError("the vectors changed while the index was built", "Run the same command again.")
            index.add_with_ids(vectors, ids)
            added += len(ids)
        nprobe, measured, n_queries = _measure(faiss, index, plan, recall_queries(sample[:RECALL_QUERIES]), chunks)
        if plan.nlist:
            faiss.extract_index_ivf(index).nprobe = nprobe  # the file says what the report says
        record = write_file(folder / INDEX_FILE, lambda path: _write(faiss, index, path))
    except RuntimeError as error:
        raise FinecoError(f"FAISS could not build {plan.factory}: {faiss_reason(error)}") from error
    seconds = round(time.monotonic() - started, 3)
    return IndexReport(plan.factory, plan.dim, plan.n_vectors, nprobe, measured, n_queries, record.size_bytes, seconds)


def recall_queries(vectors: Float32) -> Float32:
    """What recall is measured with, (Q, D): each vector plus noise of the same length, as a unit vector.

    A query is then near a video (cosine about 0.7) without being one; a stored vector as its own query is found too
    easily. Texts lie farther from videos than that, so their recall may be lower.
    """
    noise = np.random.default_rng(SEED).standard_normal(vectors.shape)
    queries = vectors + QUERY_NOISE * noise / np.linalg.norm(noise, axis=1, keepdims=True)
    rows: Float32 = (queries / np.linalg.norm(queries, axis=1, keepdims=True)).astype(np.float32)
    return rows


def faiss_reason(error: RuntimeError) -> str:
    """The part of FAISS's message that is for people: without the C++ function, file and line."""
    return str(error).strip().splitlines()[0].rpartition("failed: ")[2].rpartition("Error: ")[2]


def _factory(plan: IndexPlan) -> str:
    return plan.factory if plan.nlist else f"IDMap,{plan.factory}"  # IVF keeps ids itself


def _checked(chunks: Chunks, dim: int) -> Iterator[tuple[Ids, Float32]]:
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


def _survey(plan: IndexPlan, chunks: Chunks) -> tuple[Ids, Float32]:
    """The first pass: checks everything before anything is built.

    Returns:
        All ids (n,) in order, and a uniform sample of the vectors in random order, enough to train and to measure.
    """
    rng = np.random.default_rng(SEED)
    size = min(max(plan.n_train, RECALL_QUERIES), plan.n_vectors)
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
        raise IntegrityError(f"two videos have the id {repeated[0]} in the index", DAMAGED)
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


def _measure(faiss: Any, index: Any, plan: IndexPlan, queries: Float32, chunks: Chunks) -> tuple[int, float, int]:
    """Recall@10 against exact search; doubles the cells to look into until the goal is met or nothing is gained.

    Returns:
        nprobe (0 for flat), the recall measured with it, and on how many queries.
    """
    wanted_ids, wanted_scores = exact_top_k(queries, _checked(chunks, plan.dim), RECALL_AT + TIE_ROOM)
    clear = has_clear_answer(wanted_scores, RECALL_AT, plan.n_vectors)
    queries, wanted_ids, wanted_scores = queries[clear], wanted_ids[clear], wanted_scores[clear]
    nprobe, best = plan.nprobe, (plan.nprobe, -1.0)
    while True:
        if plan.nlist:
            faiss.extract_index_ivf(index).nprobe = nprobe
        found = index.search(queries, RECALL_AT)[1] if len(queries) else []
        measured = round(recall(found, wanted_ids, wanted_scores, RECALL_AT), 4)
        if measured - best[1] < LEAST_GAIN:
            return *best, len(queries)
        best = (nprobe, measured)
        if measured >= RECALL_GOAL or nprobe >= plan.nlist:
            return nprobe, measured, len(queries)
        nprobe = min(2 * nprobe, plan.nlist)


def _write(faiss: Any, index: Any, path: Path) -> None:
    """Through a file of Python's: FAISS's own takes no name that is not UTF-8 and hides a full disk met at its end."""
    with path.open("wb") as file:
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write, 1 << 24))
