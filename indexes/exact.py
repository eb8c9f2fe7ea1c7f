"""Exact nearest neighbours in numpy: what every index is measured against."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from pipeline.types import Float32

Ids = NDArray[np.int64]
Chunks = Callable[[], Iterable[tuple[Ids, Float32]]]


def exact_top_k(queries: Float32, chunks: Iterable[tuple[Ids, Float32]], k: int) -> tuple[Ids, Float32]:
    """The k greatest inner products of each query, over vectors that come in chunks of any size.

    Args:
        queries: (Q, D).
        chunks: (ids (n,), vectors (n, D)).

    Returns:
        ids (Q, min(k, total)) and scores of the same shape, best first; equal scores by ascending id.
    """
    best_ids = np.empty((len(queries), 0), np.int64)
    best_scores = np.empty((len(queries), 0), np.float32)
    for ids, vectors in chunks:
        scores = np.concatenate([best_scores, queries @ vectors.T], axis=1)
        all_ids = np.concatenate([best_ids, np.broadcast_to(ids, (len(queries), len(ids)))], axis=1)
        order = np.lexsort((all_ids, -scores), axis=1)[:, :k]
        best_scores = np.take_along_axis(scores, order, axis=1)
        best_ids = np.take_along_axis(all_ids, order, axis=1)
    return best_ids, best_scores


def recall(found: Iterable[Ids], wanted: Ids) -> float:
    """Share of the wanted ids (Q, k) that were found, over all queries."""
    hits = sum(len(np.intersect1d(f, w)) for f, w in zip(found, wanted, strict=True))
    return hits / wanted.size if wanted.size else 1.0
