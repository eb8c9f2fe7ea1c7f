"""Which FAISS index for how many vectors and how much memory; `benchmarks/index_sizes.py` measures the choices."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UsageError

FLAT_LIMIT = (
    100_000  # moments; exact search of so many takes some 36 ms a query on 2 cores (512 dimensions); beyond, IVF
)
ID_BYTES = 8 + 8 + 4  # FAISS's id of a moment, and the id and the video in the list beside the vectors
LEAST_IVF = 4_000  # below, cells are too few and too empty to be trained
VECTORS_PER_CELL = 39  # FAISS warns below so many training vectors a cell
TRAIN_PER_CELL = 64
MAX_TRAIN = 1_000_000
MEMORY_SHARE = 0.5  # of what is available, when nothing is said: cells grow by doubling while they are filled
KINDS = ("auto", "flat", "ivf")


@dataclass(frozen=True, slots=True)
class IndexPlan:
    """What will be built.

    Attributes:
        factory: FAISS's name of the index, without the id map.
        n_videos, n_vectors: Videos, and their moments, each of which is a vector.
        n_bytes: What it will take, on disk and when searched, with the ids.
        nlist, nprobe: Cells, and how many are looked into at first (0 for flat).
        n_train: Vectors to train on.
        expected_recall: Of what an exhaustive search finds first, the share that should be among the candidates, as
            measured on clustered synthetic vectors (benchmarks/index_sizes.py); None where it depends on the data too
            much to say.
        reason: Why this one, in a phrase.
    """

    factory: str
    n_videos: int
    n_vectors: int
    dim: int
    n_bytes: int
    nlist: int
    nprobe: int
    n_train: int
    expected_recall: float | None
    reason: str

    def describe(self) -> str:
        """The line printed before building."""
        if self.expected_recall is None:
            recall = "recall to be measured"
        else:
            recall = f"recall about {self.expected_recall:g}, to be measured" if self.nlist else "all are compared"
        cells = f", {self.nlist} cells" if self.nlist else ""
        size = f"{self.n_bytes / 1e6:.1f} MB" if self.n_bytes < 1e9 else f"{self.n_bytes / 1e9:.2f} GB"
        what = f"{moments_of_videos(self.n_vectors, self.n_videos)}, {self.dim} dimensions"
        return f"Index plan: {self.factory}{cells}, {what}, {size}, {recall} ({self.reason})"


def moments_of_videos(n_moments: int, n_videos: int) -> str:
    """`7 moments of 1 video`."""
    return f"{n_moments} moment{'s' * (n_moments != 1)} of {n_videos} video{'s' * (n_videos != 1)}"


def plan_index(
    n_videos: int, n_vectors: int, dim: int, memory_bytes: int | None = None, kind: str = "auto"
) -> IndexPlan:
    """Chooses an index.

    Args:
        n_videos, n_vectors: Videos, and moments of all of them.
        memory_bytes: What it may take; None: half of what is available now.
        kind: `auto`, or `flat` or `ivf` by the user's wish.

    Raises:
        UsageError: Unknown kind, or too few vectors for IVF.
    """
    if kind not in KINDS:
        raise UsageError(f"unknown index kind {kind!r}", f"Choose one of {', '.join(KINDS)}.")
    budget = memory_bytes if memory_bytes is not None else int(_available_bytes() * MEMORY_SHARE)
    if kind == "ivf" and n_vectors < LEAST_IVF:
        raise UsageError(f"an IVF index needs at least {LEAST_IVF} moments, there are {n_vectors}", "Use --kind flat.")
    flat_bytes = n_vectors * (4 * dim + ID_BYTES)
    if kind == "flat" or (kind == "auto" and n_vectors < LEAST_IVF):
        return IndexPlan(
            "Flat", n_videos, n_vectors, dim, flat_bytes, 0, 0, 0, 1.0, "as asked" if kind == "flat" else "small"
        )
    if kind == "auto" and n_vectors <= FLAT_LIMIT and flat_bytes <= budget:
        return IndexPlan("Flat", n_videos, n_vectors, dim, flat_bytes, 0, 0, 0, 1.0, "few enough to compare with each")
    nlist = _cells(n_vectors)
    n_train = min(n_vectors, MAX_TRAIN, TRAIN_PER_CELL * nlist)
    overhead = nlist * 4 * dim + ID_BYTES * n_vectors
    nprobe = max(8, nlist // 64)
    # RaBitQ rather than PQ of the same size (50,000 x 512, 2 busy cores): 1 s to train instead of 143, recall@10 0.47
    # instead of 0.44; of the ten best, 0.999 are among the hundred candidates, which are scored again by their frames.
    choices = [
        (f"IVF{nlist},Flat", 4 * dim, 0.98, "fits the memory"),
        (f"IVF{nlist},SQ8", dim, 0.97, "a byte a dimension, to fit the memory"),
        (f"IVF{nlist},RaBitQ", (dim + 7) // 8 + 8, None, "a bit a dimension, to fit the memory"),
    ]
    for factory, vector_bytes, recall, reason in choices:  # noqa: B007 - used after the loop
        n_bytes = overhead + n_vectors * vector_bytes
        if n_bytes <= budget:
            break
    else:
        reason = "the smallest there is, though over the memory budget"
    return IndexPlan(factory, n_videos, n_vectors, dim, n_bytes, nlist, nprobe, n_train, recall, reason)


def _cells(n_vectors: int) -> int:
    """At most 4 sqrt(n) cells, a power of two, with enough vectors to train each."""
    return int(2 ** math.floor(math.log2(min(4 * math.sqrt(n_vectors), n_vectors / VECTORS_PER_CELL))))


def _available_bytes() -> int:
    """Memory that is free for use now, within the limit of the container."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path, key in (("/proc/meminfo", "MemAvailable:"), ("/sys/fs/cgroup/memory.max", "")):
        try:
            words = Path(path).read_text("ascii").split()
            limits.append(int(words[words.index(key) + 1]) * 1024 if key else int(words[0]))
        except (OSError, ValueError, IndexError):  # not Linux, or no limit ("max")
            continue
    return min(limits)
