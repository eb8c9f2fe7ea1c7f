"""What each kind of index costs and finds, by number of moments: the measurements behind `indexes/plan.py`.

    python -m benchmarks.index_sizes            10,000 and 100,000 moments of 512 dimensions; 3 minutes on 2 cores
    python -m benchmarks.index_sizes --large    also 1,000,000; needs 6 GB of memory

The moments are synthetic: unit vectors around 2,000 random centres of unequal size, since those of real videos lie in
clusters too; eight in a row are a video. The questions are some of them with noise, each with the video of the nearest
moment, by an exact search in numpy, as its one right answer; "finds" is for how many that is among the candidates, with
as many cells and candidates as `build_index` then sets. "ms a query" is the median of proposing that many videos for
single questions, as `fineco search` does; "ms to open" includes the check of the digest.
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

from indexes.build import IndexReport, Probes, build_index
from indexes.candidates import propose_videos
from indexes.generations import new_generation, write_sidecar
from indexes.id_map import IdMap
from indexes.plan import LEAST_IVF, IndexPlan, plan_index
from indexes.search import VectorIndex
from pipeline.types import Float32, Int64

DIM = 512
SIZES = (10_000, 100_000)
LARGE = 1_000_000
CHUNK = 20_000
N_CENTRES = 2_000
SPREAD = 1.0  # length of what is added to a unit centre: two moments of one cluster then have a cosine of about 0.5
MOMENTS_PER_VIDEO = 8
NOISE = 1.0  # length of what is added to a moment to ask for it, as `pipeline.probes` does
N_QUESTIONS = 100
N_TIMED = 50
HEADER = ("moments", "index", "build s", "MB", "MB planned", "finds", "cells", "candidates", "ms a query", "ms to open")


def clustered_vectors(n: int) -> Iterator[tuple[Int64, Float32]]:
    """Chunks of (numbers from 0 on, unit vectors), the same at every call."""
    centres = np.random.default_rng(0).standard_normal((N_CENTRES, DIM), np.float32)
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    for start in range(0, n, CHUNK):
        size = min(CHUNK, n - start)
        rng = np.random.default_rng([1, start])
        members = (N_CENTRES * rng.random(size) ** 2).astype(np.int64)  # the first clusters are the largest
        yield np.arange(start, start + size), disturbed(centres[members], SPREAD, rng)


def disturbed(rows: Float32, distance: float, rng: np.random.Generator) -> Float32:
    """Unit rows (N, D), each with something random of length `distance` added, of unit length again."""
    noise = rng.standard_normal(rows.shape, np.float32)
    found = rows + distance * noise / np.linalg.norm(noise, axis=1, keepdims=True)
    unit: Float32 = found / np.linalg.norm(found, axis=1, keepdims=True)
    return unit


def made_up_videos(n_videos: int) -> IdMap:
    """The id map of videos of `MOMENTS_PER_VIDEO` moments."""
    keys = np.sort(np.random.default_rng(2).choice(1 << 62, n_videos, replace=False))
    return IdMap.of(keys, np.full(n_videos, MOMENTS_PER_VIDEO, np.int32))


def questions(n: int) -> Probes:
    """Some moments with noise, and whose moment is nearest among all `n`."""
    first = next(clustered_vectors(n))[1]
    asked = disturbed(first[:: len(first) // N_QUESTIONS][:N_QUESTIONS], NOISE, np.random.default_rng(3))
    best, nearest = np.full(len(asked), -np.inf, np.float32), np.zeros(len(asked), np.int64)
    for numbers, vectors in clustered_vectors(n):
        cosines = asked @ vectors.T
        better = cosines.max(axis=1) > best
        nearest[better] = numbers[cosines.argmax(axis=1)[better]]
        best = np.maximum(best, cosines.max(axis=1))
    right = (nearest // MOMENTS_PER_VIDEO).astype(np.int32)
    return Probes(asked, list(right[:, None]), f"{len(asked)} moments with noise")


def plans(n: int) -> Iterator[IndexPlan]:
    """Every kind of index that some memory budget leads to, largest first."""
    n_videos = n // MOMENTS_PER_VIDEO
    yield plan_index(n_videos, n, DIM, kind="flat")
    if n < LEAST_IVF:
        return
    last = ""
    budget = sys.maxsize
    while True:
        plan = plan_index(n_videos, n, DIM, budget, "ivf")
        if plan.factory == last:
            return
        yield plan
        last, budget = plan.factory, plan.n_bytes - 1


def milliseconds(seconds: list[float]) -> float:
    """Median in milliseconds."""
    return 1000 * statistics.median(seconds)


def measure(plan: IndexPlan, id_map: IdMap, probes: Probes, folder: Path) -> tuple[IndexReport, float, float]:
    """Builds, opens and searches; returns the report, ms a query and ms to open."""
    ids = id_map.ids_of(np.arange(len(id_map.keys)))

    def chunks() -> Iterator[tuple[Int64, Float32]]:
        for numbers, vectors in clustered_vectors(plan.n_vectors):
            yield ids[numbers], vectors

    with new_generation(folder) as generation:
        report = build_index(plan, chunks, id_map, probes, generation)
        write_sidecar(generation, report, "benchmark", "all", {})
        name = generation.with_suffix("").name
    opening, searching = [], []
    for _ in range(3):
        started = time.perf_counter()
        index = VectorIndex.open(folder / name, "benchmark")
        opening.append(time.perf_counter() - started)
    for query in probes.vectors[: N_TIMED + 1]:
        started = time.perf_counter()
        propose_videos(index.search, id_map, query[None], report.candidates)
        searching.append(time.perf_counter() - started)
    return report, milliseconds(searching[1:]), milliseconds(opening)  # the first search maps the file


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description="Measure every kind of index at several sizes.")
    parser.add_argument("--large", action="store_true", help=f"also {LARGE:,} moments")
    sizes = [*SIZES, LARGE] if parser.parse_args().large else SIZES
    print("".join(f"{title:>15}" for title in HEADER))
    for n in sizes:
        id_map, probes = made_up_videos(n // MOMENTS_PER_VIDEO), questions(n)
        for plan in plans(n):
            with tempfile.TemporaryDirectory() as folder:
                report, query_ms, open_ms = measure(plan, id_map, probes, Path(folder))
            megabytes, planned = f"{report.n_bytes / 1e6:.1f}", f"{plan.n_bytes / 1e6:.1f}"
            row = (n, plan.factory, f"{report.seconds:.1f}", megabytes, planned, f"{report.recall:.3f}", report.nprobe)
            timed = (report.candidates, f"{query_ms:.2f}", f"{open_ms:.0f}")
            print("".join(f"{x!s:>15}" for x in (*row, *timed)), flush=True)


if __name__ == "__main__":
    main()
