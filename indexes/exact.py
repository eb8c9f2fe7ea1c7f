"""Exact nearest neighbours in numpy: what every index is measured against."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from pipeline.types import Bool, Float32

Ids = NDArray[np.int64]
Chunks = Callable[[], Iterable[tuple[Ids, Float32]]]

BLOCK_ROWS = 4096  # bounds the score matrix: 8 MB for 256 queries
TIE_TOLERANCE = 1e-6  # FAISS sums in float32, in another order
TIE_ROOM = 90  # further exact answers to keep for a measurement, among which the ties of the last one are found


def exact_top_k(queries: Float32, chunks: Iterable[tuple[Ids, Float32]], k: int) -> tuple[Ids, Float32]:
    """The k greatest inner products of each query, over vectors that come in chunks of any size.

    Sums are taken in float64 and rounded, so that equal vectors score the same in whichever chunk they come.

    Args:
        queries: (Q, D).
        chunks: (ids (n,), vectors (n, D)).

    Returns:
        ids (Q, min(k, total)) and scores of the same shape, best first; equal scores by ascending id.
    """
    n_queries = len(queries)
    exact_queries = queries.astype(np.float64)
    rows, ids, scores = np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)  # best so far, flat
    least = np.full(n_queries, -np.inf, np.float32)  # the k-th score so far: what does not reach it is out
    total = 0
    for block_ids, vectors in _blocks(chunks):
        total += len(block_ids)
        block = (exact_queries @ vectors.astype(np.float64).T).astype(np.float32)
        if len(block_ids) >= k:
            least = np.maximum(least, np.partition(block, len(block_ids) - k, axis=1)[:, len(block_ids) - k])
        hit_rows, hit_columns = np.nonzero(block >= least[:, None])
        rows = np.concatenate([rows, hit_rows])
        ids = np.concatenate([ids, block_ids[hit_columns]])
        scores = np.concatenate([scores, block[hit_rows, hit_columns]])
        order = np.lexsort((ids, -scores, rows))
        rows, ids, scores = rows[order], ids[order], scores[order]
        kept = np.arange(len(rows)) - np.searchsorted(rows, np.arange(n_queries))[rows] < k
        rows, ids, scores = rows[kept], ids[kept], scores[kept]
        if total >= k:
            least = scores[k - 1 :: k]
    shape = (n_queries, min(k, total))
    return ids.reshape(shape), scores.reshape(shape)


def has_clear_answer(wanted_scores: Float32, k: int, n_vectors: int) -> Bool:
    """Which queries (Q,) recall can be measured on: not those where more answers tie with the k-th than were kept.

    That happens beside a hundred copies of one video, where any of them would be right.
    """
    n_kept = wanted_scores.shape[1]
    if n_kept == n_vectors:
        return np.ones(len(wanted_scores), np.bool_)
    return np.asarray(wanted_scores[:, -1] < wanted_scores[:, k - 1] - TIE_TOLERANCE)


def recall(found: Iterable[Ids], wanted_ids: Ids, wanted_scores: Float32, k: int) -> float:
    """Share of the k best answers that were found, over all queries; answers that tie with the k-th are as good.

    Copies of one video have one vector: without the ties, an index that finds another copy would count as wrong.

    Args:
        found: For each query, the ids of an index, at most k.
        wanted_ids, wanted_scores: From `exact_top_k` with k or more (`k + TIE_ROOM`).
    """
    k = min(k, wanted_ids.shape[1])
    if wanted_ids.shape[0] * k == 0:
        return 1.0
    hits = 0
    for answer, ids, scores in zip(found, wanted_ids, wanted_scores, strict=True):
        good = ids[scores >= scores[k - 1] - TIE_TOLERANCE]
        hits += min(k, len(np.intersect1d(answer, good)))
    return hits / float(wanted_ids.shape[0] * k)


def _blocks(chunks: Iterable[tuple[Ids, Float32]]) -> Iterable[tuple[Ids, Float32]]:
    for ids, vectors in chunks:
        for start in range(0, len(ids), BLOCK_ROWS):
            yield ids[start : start + BLOCK_ROWS], vectors[start : start + BLOCK_ROWS]
