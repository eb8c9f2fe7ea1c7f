"""The oracle itself, against a plain loop."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from indexes import exact
from indexes.exact import exact_top_k, recall
from pipeline.types import Float32


def unit_rows(n: int, dim: int, seed: int) -> Float32:
    rows = np.random.default_rng(seed).standard_normal((n, dim))
    unit: Float32 = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return unit


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 60),
    k=st.integers(1, 20),
    size=st.integers(1, 25),
    block=st.integers(1, 30),
    seed=st.integers(0, 9),
)
def test_top_k_is_what_a_loop_finds_in_any_chunks(n: int, k: int, size: int, block: int, seed: int) -> None:
    vectors = unit_rows(max(n, 1), 8, seed)[
        np.random.default_rng(seed).integers(0, max(n, 1) // 2 + 1, n)
    ]  # with copies
    ids = np.random.default_rng(seed).permutation(1000)[:n].astype(np.int64) + 2**60
    queries = unit_rows(3, 8, seed + 100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "BLOCK_ROWS", block)
        chunks = [(ids[i : i + size], vectors[i : i + size]) for i in range(0, n, size)]
        found_ids, found_scores = exact_top_k(queries, chunks, k)
    for query, row_ids, row_scores in zip(queries, found_ids, found_scores, strict=True):
        scored = [
            (-np.float32(v.astype(np.float64) @ query.astype(np.float64)), i) for v, i in zip(vectors, ids, strict=True)
        ]
        expected = sorted((float(score), int(i)) for score, i in scored)[:k]
        assert row_ids.tolist() == [i for _, i in expected]
        np.testing.assert_allclose(row_scores, [-score for score, _ in expected], atol=1e-6)


def test_an_answer_that_ties_with_the_last_is_as_good() -> None:
    wanted_ids = np.array([[5, 6, 7, 8]])
    wanted_scores = np.array([[0.9, 0.8, 0.8, 0.1]], np.float32)
    assert recall([np.array([5, 7])], wanted_ids, wanted_scores, k=2) == 1.0
    assert recall([np.array([5, 8])], wanted_ids, wanted_scores, k=2) == 0.5
    assert recall([np.array([6, 7])], wanted_ids, wanted_scores, k=2) == 1.0  # both reach the second best score
    assert recall([np.array([-1, -1])], wanted_ids, wanted_scores, k=2) == 0.0
