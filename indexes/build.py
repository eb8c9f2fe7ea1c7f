"""Building an index: train on a bounded sample, add in chunks, measure its recall against exact search."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from indexes.exact import Chunks, Ids, exact_top_k, recall
from indexes.plan import IndexPlan
from pipeline.errors import FinecoError, IntegrityError
from pipeline.files import write_file
from pipeline.types import Float32, check_shape, check_unit_rows

INDEX_FILE = "index.faiss"
RECALL_AT = 10
RECALL_QUERIES = 256
RECALL_GOAL = 0.95
QUERY_NOISE = 0.5  # a query lies near videos but is none: a unit vector and noise of half its length
SEED = 0


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
        probes = f", {self.nprobe} cells a query" if self.nprobe else ""
        return (
            f"Index built: {self.factory}, {self.n_vectors} videos{probes}, recall@{RECALL_AT} {self.recall_at_10:.3f} "
            f"against exact search, {self.n_bytes / 1e6:.1f} MB, {self.seconds:.1f} s"
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def build_index(plan: IndexPlan, chunks: Chunks, folder: Path) -> IndexReport:
    """Builds and writes `index.faiss` in `folder`.

    Args:
        chunks: Called for every pass over the vectors; gives (ids (n,) int64, unit vectors (n, D) float32).

    Raises:
        IntegrityError: Vectors that are not finite unit rows of the plan's dimension, or ids that are not unique.
        FinecoError: FAISS or the disk refuses.
    """
    import faiss

    started = time.monotonic()
    try:
        index = faiss.index_factory(plan.dim, _factory(plan), faiss.METRIC_INNER_PRODUCT)
        sample = _sample(plan, chunks, max(plan.n_train, RECALL_QUERIES))
        if plan.nlist:
            _train(faiss, index, sample[: plan.n_train])
        seen: set[int] = set()
        for ids, vectors in _checked(chunks, plan.dim):
            fresh = set(ids.tolist())
            if len(fresh) != len(ids) or not seen.isdisjoint(fresh):
                raise IntegrityError("two videos have the same id in the index", "Run 'fineco verify'.")
            seen |= fresh
            index.add_with_ids(vectors, ids)
        if index.ntotal != plan.n_vectors:
            raise IntegrityError(f"{index.ntotal} vectors came for a plan of {plan.n_vectors}")
        nprobe, measured, n_queries = _measure(faiss, index, plan, sample, chunks)
        record = write_file(folder / INDEX_FILE, lambda path: faiss.write_index(index, str(path)))
    except RuntimeError as error:
        reason = str(error).splitlines()[0].rpartition(": ")[2]
        raise FinecoError(f"FAISS could not build {plan.factory}: {reason}") from error
    return IndexReport(
        plan.factory,
        plan.dim,
        plan.n_vectors,
        nprobe,
        measured,
        n_queries,
        record.size_bytes,
        round(time.monotonic() - started, 3),
    )


def _factory(plan: IndexPlan) -> str:
    return plan.factory if plan.nlist else f"IDMap2,{plan.factory}"  # IVF keeps ids itself


def _checked(chunks: Chunks, dim: int) -> Iterator[tuple[Ids, Float32]]:
    for ids, vectors in chunks():
        try:
            check_shape("vectors", vectors, (len(ids), dim), np.float32)
            check_shape("ids", ids, (None,), np.int64)
            if len(vectors):
                check_unit_rows("vectors", vectors)
                if ids.min() < 0:
                    raise ValueError("an id is negative")
        except ValueError as error:
            raise IntegrityError(f"cannot index: {error}", "Run 'fineco verify' on the collection.") from error
        yield ids, np.ascontiguousarray(vectors)


def _sample(plan: IndexPlan, chunks: Chunks, size: int) -> Float32:
    """A uniform random sample in random order, (min(size, n), D), by drawing the row numbers beforehand."""
    rng = np.random.default_rng(SEED)
    chosen = np.sort(rng.choice(plan.n_vectors, size=min(size, plan.n_vectors), replace=False))
    parts, start = [], 0
    for _, vectors in _checked(chunks, plan.dim):
        rows = chosen[(chosen >= start) & (chosen < start + len(vectors))] - start
        parts.append(vectors[rows])
        start += len(vectors)
    sample: Float32 = np.concatenate(parts)
    rng.shuffle(sample)
    return sample


def _train(faiss: Any, index: Any, sample: Float32) -> None:
    """Trains the cells, on the GPU when FAISS has one; the index itself stays on the CPU."""
    ivf = faiss.extract_index_ivf(index)
    if hasattr(faiss, "get_num_gpus") and faiss.get_num_gpus() > 0:
        ivf.clustering_index = faiss.index_cpu_to_all_gpus(faiss.IndexFlatIP(index.d))
    index.train(sample)
    ivf.clustering_index = None


def _measure(faiss: Any, index: Any, plan: IndexPlan, sample: Float32, chunks: Chunks) -> tuple[int, float, int]:
    """Recall@10 against exact search; probes more cells until the goal is met. Returns nprobe, recall, queries."""
    rng = np.random.default_rng(SEED)
    queries = sample[:RECALL_QUERIES]
    noise = rng.standard_normal(queries.shape).astype(np.float32)
    queries = queries + QUERY_NOISE * noise / np.linalg.norm(noise, axis=1, keepdims=True)
    queries = (queries / np.linalg.norm(queries, axis=1, keepdims=True)).astype(np.float32)
    k = min(RECALL_AT, plan.n_vectors)
    wanted, _ = exact_top_k(queries, _checked(chunks, plan.dim), k)
    nprobe = plan.nprobe
    while True:
        if plan.nlist:
            faiss.extract_index_ivf(index).nprobe = nprobe
        _, found = index.search(queries, k)
        measured = recall(found, wanted)
        if not plan.nlist or measured >= RECALL_GOAL or nprobe >= plan.nlist:
            return nprobe, round(measured, 4), len(queries)
        nprobe = min(2 * nprobe, plan.nlist)
