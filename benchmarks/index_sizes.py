"""What each kind of index costs and finds, by number of vectors: the measurements behind `indexes/plan.py`.

    python -m benchmarks.index_sizes            10,000 and 100,000 vectors of 512 dimensions; 2 minutes on 2 cores
    python -m benchmarks.index_sizes --large    also 1,000,000; needs 6 GB of memory

The vectors are synthetic: unit vectors around 2,000 random centres of unequal size, since the features of real frames
lie in clusters too. Recall@10 is what `build_index` measures against exact search. "ms a query" is the median of single
queries for 100 candidates, as `fineco search` asks for; "ms to open" includes the check of the digest.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from indexes.build import IndexReport, build_index, recall_queries
from indexes.exact import Ids
from indexes.generations import new_generation, write_sidecar
from indexes.plan import LEAST_IVF, IndexPlan, plan_index
from indexes.search import VectorIndex
from pipeline.types import Float32

DIM = 512
SIZES = (10_000, 100_000)
LARGE = 1_000_000
CHUNK = 20_000
N_CENTRES = 2_000
SPREAD = 1.0  # length of what is added to a unit centre: two videos of one cluster then have a cosine of about 0.5
CANDIDATES = 100
N_QUERIES = 50
HEADER = ("vectors", "index", "build s", "MB", "MB planned", "recall@10", "cells a query", "ms a query", "ms to open")


def clustered_vectors(n: int) -> Iterator[tuple[Ids, Float32]]:
    """Chunks of (ids, unit vectors), the same at every call."""
    centres = np.random.default_rng(0).standard_normal((N_CENTRES, DIM), np.float32)
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    for start in range(0, n, CHUNK):
        size = min(CHUNK, n - start)
        rng = np.random.default_rng([1, start])
        members = (N_CENTRES * rng.random(size) ** 2).astype(np.int64)  # the first clusters are the largest
        noise = rng.standard_normal((size, DIM), np.float32)
        rows = centres[members] + SPREAD * noise / np.linalg.norm(noise, axis=1, keepdims=True)
        yield np.arange(start, start + size), rows / np.linalg.norm(rows, axis=1, keepdims=True)


def plans(n: int) -> Iterator[IndexPlan]:
    """Every kind of index that some memory budget leads to, largest first."""
    yield plan_index(n, DIM, kind="flat")
    if n < LEAST_IVF:
        return
    last = ""
    budget = sys.maxsize
    while True:
        plan = plan_index(n, DIM, budget, "ivf")
        if plan.factory == last:
            return
        yield plan
        last, budget = plan.factory, plan.n_bytes - 1


def milliseconds(seconds: list[float]) -> float:
    """Median in milliseconds."""
    return 1000 * statistics.median(seconds)


def measure(plan: IndexPlan, folder: Path) -> tuple[IndexReport, float, float]:
    """Builds, opens and searches; returns the report, ms a query and ms to open."""
    with new_generation(folder) as generation:
        report = build_index(plan, lambda: clustered_vectors(plan.n_vectors), generation)
        write_sidecar(generation, report, "benchmark", "all", {})
        name = generation.with_suffix("").name
    opening, searching = [], []
    for _ in range(3):
        started = time.perf_counter()
        index = VectorIndex.open(folder / name, "benchmark")
        opening.append(time.perf_counter() - started)
    _, vectors = next(clustered_vectors(plan.n_vectors))
    for query in recall_queries(vectors[: N_QUERIES + 1]):
        started = time.perf_counter()
        index.search(query[None], CANDIDATES)
        searching.append(time.perf_counter() - started)
    return report, milliseconds(searching[1:]), milliseconds(opening)  # the first search maps the file


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description="Measure every kind of index at several sizes.")
    parser.add_argument("--large", action="store_true", help=f"also {LARGE:,} vectors")
    sizes = [*SIZES, LARGE] if parser.parse_args().large else SIZES
    print("".join(f"{title:>15}" for title in HEADER))
    for n in sizes:
        for plan in plans(n):
            with tempfile.TemporaryDirectory() as folder:
                report, query_ms, open_ms = measure(plan, Path(folder))
            megabytes, planned = f"{report.n_bytes / 1e6:.1f}", f"{plan.n_bytes / 1e6:.1f}"
            row = (n, plan.factory, f"{report.seconds:.1f}", megabytes, planned, f"{report.recall_at_10:.3f}")
            print("".join(f"{x!s:>15}" for x in (*row, report.nprobe, f"{query_ms:.2f}", f"{open_ms:.0f}")), flush=True)


if __name__ == "__main__":
    main()
