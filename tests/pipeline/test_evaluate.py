"""Ranks, recall, accuracy and temporal overlap: golden numbers, slow loops, a published model's real scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from pipeline.evaluate import (
    RankCounter,
    RetrievalMetrics,
    TieRule,
    accuracy_metrics,
    bootstrap,
    dual_softmax,
    mean_metrics,
    metrics_of_ranks,
    moment_metrics,
    rank_rows,
    retrieval_metrics,
    temporal_iou,
)
from pipeline.types import Float32, Float64

GOLDEN = Path(__file__).parents[1] / "golden" / "retrieval_metrics"
EXPECTED: dict[str, Any] = json.loads((GOLDEN / "expected.json").read_text())
SQUARE = [name for name, case in EXPECTED.items() if "rules_transposed" in case]

small_matrices = st.integers(1, 7).flatmap(
    lambda n: st.lists(st.lists(st.integers(-2, 2), min_size=n, max_size=n), min_size=1, max_size=7)
)


@pytest.fixture(scope="module")
def matrices() -> dict[str, Float32]:
    return dict(load_file(GOLDEN / "matrices.safetensors"))


def rank_by_loops(row: list[int], right: list[int]) -> float:
    best = max(row[i] for i in right)
    wrong = [score for i, score in enumerate(row) if i not in right]
    return 1 + sum(score > best for score in wrong) + sum(score == best for score in wrong) / 2


def figures(metrics: RetrievalMetrics) -> dict[str, float]:
    return {
        "R1": metrics.r1,
        "R5": metrics.r5,
        "R10": metrics.r10,
        "MedR": metrics.median_rank,
        "MeanR": metrics.mean_rank,
    }


def test_the_golden_file_has_every_kind_of_matrix() -> None:
    assert len(EXPECTED) >= 14 and len(SQUARE) >= 12
    assert {case["group"] for case in EXPECTED.values()} == {"tie_free", "ties"}


@pytest.mark.parametrize("name", EXPECTED)
def test_ranks_and_figures_are_the_golden_ones(name: str, matrices: dict[str, Float32]) -> None:
    ranks = rank_rows(matrices[name])
    rules: tuple[TieRule, ...] = ("average", "optimistic", "pessimistic")
    for rule in rules:
        assert np.array_equal(getattr(ranks, rule), matrices[f"{name}.rank_{rule}"])
        by_rule = figures(retrieval_metrics(matrices[name], draws=0, ties=rule))
        assert by_rule == pytest.approx(EXPECTED[name]["rules"][rule], rel=0, abs=1e-12)
    metrics = retrieval_metrics(matrices[name], draws=0)
    assert figures(metrics) == pytest.approx(EXPECTED[name]["rules"]["average"], rel=0, abs=1e-12)
    assert [metrics.n_queries, metrics.n_items] == EXPECTED[name]["shape"]
    assert (metrics.tied == 0) or EXPECTED[name]["group"] == "ties"


@pytest.mark.parametrize("name", SQUARE)
def test_the_other_direction_is_golden_too(name: str, matrices: dict[str, Float32]) -> None:
    expected = EXPECTED[name]["rules_transposed"]["average"]
    scores = matrices[name]
    assert figures(retrieval_metrics(scores.T, draws=0)) == pytest.approx(expected, rel=0, abs=1e-12)
    counter = RankCounter(scores.shape)
    counter.add_rows(0, scores)
    counter.add_columns(0, scores)
    assert figures(metrics_of_ranks(counter.columns(), draws=0)) == pytest.approx(expected, rel=0, abs=1e-12)


@given(small_matrices, st.data())
def test_any_right_answers_rank_as_a_slow_loop_ranks_them(rows: list[list[int]], data: st.DataObject) -> None:
    columns = range(len(rows[0]))
    one_or_more = st.lists(st.sampled_from(columns), min_size=1, unique=True)
    right = data.draw(st.lists(one_or_more, min_size=len(rows), max_size=len(rows)))
    ranks = rank_rows(np.array(rows, np.float32), right)
    assert ranks.average.tolist() == [rank_by_loops(row, answer) for row, answer in zip(rows, right, strict=True)]


@given(small_matrices, st.integers(1, 4), st.data())
def test_blocks_give_the_ranks_of_the_whole_in_both_directions(
    rows: list[list[int]], block: int, data: st.DataObject
) -> None:
    scores = np.array(rows, np.float32)
    right = data.draw(st.lists(st.integers(0, scores.shape[1] - 1), min_size=len(rows), max_size=len(rows)))
    counter = RankCounter(scores.shape, right)
    for take in (counter.add_rows, counter.add_columns):
        for start in range(0, len(rows), block):
            take(start, scores[start : start + block])
    assert np.array_equal(counter.rows().average, rank_rows(scores, right).average)
    owners = {column: [i for i, r in enumerate(right) if r == column] for column in sorted(set(right))}
    expected = [rank_by_loops(scores[:, column].tolist(), texts) for column, texts in owners.items()]
    assert counter.columns().average.tolist() == expected


def test_several_texts_of_a_video_do_not_stand_in_each_others_way() -> None:
    """Five texts, two videos: a tall matrix; text to video each ranks alone, video to text by its best."""
    scores = np.array([[9, 1], [8, 2], [7, 3], [6, 4], [5, 10]], np.float32)
    owner = [0, 0, 1, 1, 1]
    assert rank_rows(scores, owner).average.tolist() == [1, 1, 2, 2, 1]
    assert rank_rows(scores.T, [[0, 1], [2, 3, 4]]).average.tolist() == [1, 1]
    scores[4, 1] = 0  # now the best text of the second video is the fourth, and nothing beats it there
    assert rank_rows(scores.T, [[0, 1], [2, 3, 4]]).average.tolist() == [1, 1]
    scores[0, 1] = 4  # as good as it
    assert rank_rows(scores.T, [[0, 1], [2, 3, 4]]).average.tolist() == [1, 1.5]


@pytest.mark.parametrize("n", [1, 2, 10, 101])
def test_a_constant_matrix_scores_as_chance(n: int) -> None:
    metrics = retrieval_metrics(np.zeros((n, n), np.float32), draws=0)
    assert metrics.mean_rank == metrics.median_rank == (n + 1) / 2
    assert metrics.r1 == (n == 1) and metrics.tied == (n if n > 1 else 0)


def test_scores_that_are_no_numbers_are_refused() -> None:
    scores = np.eye(3, dtype=np.float32)
    scores[1, 2] = np.nan
    for refuses in (retrieval_metrics, dual_softmax):
        with pytest.raises(ValueError, match="NaN"):
            refuses(scores)
    with pytest.raises(ValueError, match="NaN"):
        accuracy_metrics([scores[1]], [0])
    infinite = np.where(np.eye(3) > 0, -np.inf, 0).astype(np.float32)
    assert rank_rows(infinite).average.tolist() == [3, 3, 3]


@pytest.mark.parametrize(
    ("shape", "right"), [((3, 2), None), ((2, 2), [0]), ((2, 2), [0, 2]), ((2, 2), [0, -1]), ((2, 2), [[0], []])]
)
def test_right_answers_that_do_not_fit_are_refused(shape: tuple[int, int], right: Any) -> None:
    with pytest.raises(ValueError, match=r"right|row"):
        rank_rows(np.zeros(shape, np.float32), right)


def test_no_query_has_no_figure() -> None:
    with pytest.raises(ValueError, match="no query"):
        retrieval_metrics(np.empty((0, 3), np.float32))


# ------------------------------------------------------------------------------------------- a published model's scores


def percent(metrics: RetrievalMetrics) -> tuple[float, ...]:
    shares = [round(100 * share, 9) for share in (metrics.r1, metrics.r5, metrics.r10)]
    return (*shares, metrics.median_rank, round(metrics.mean_rank, 9))


@pytest.fixture(scope="module")
def real_scores(shared: Path) -> Float32:
    scores: Float32 = np.load(shared / "data" / "scores" / "msrvtt_1ka_text_video_cosine.npy", allow_pickle=False)
    return scores


def test_a_published_models_text_to_video_figures_come_out(real_scores: Float32) -> None:
    metrics = retrieval_metrics(real_scores, draws=0)
    assert percent(metrics) == (48.0, 73.0, 82.9, 2, 13.129)
    assert metrics.tied == 0  # so that the rules agree
    ranks = rank_rows(real_scores)
    assert np.array_equal(ranks.average, ranks.optimistic) and np.array_equal(ranks.average, ranks.pessimistic)


def test_its_video_to_text_figures_come_out_by_their_own_rule(real_scores: Float32) -> None:
    """Four captions occur more than once there: the same words cannot be told apart, which that rule counts as won."""
    metrics = retrieval_metrics(real_scores.T, draws=0, ties="optimistic")
    assert percent(metrics) == (46.0, 74.1, 82.8, 2, 8.674)
    ranks = rank_rows(real_scores.T)
    assert ranks.ties.sum() == 12
    assert np.mean(ranks.average) == pytest.approx(8.674 + 12 / 2 / 1000, abs=1e-12)


def test_its_dual_softmax_figures_come_out(real_scores: Float32) -> None:
    assert percent(retrieval_metrics(dual_softmax(real_scores), draws=0)) == (52.8, 78.0, 85.8, 1, 10.921)


def test_dual_softmax_is_the_formula() -> None:
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((4, 3)).astype(np.float32)
    for i in range(4):
        for j in range(3):
            column = np.exp(5.0 * scores[:, j].astype(np.float64))
            assert dual_softmax(scores, 5.0)[i, j] == pytest.approx(scores[i, j] * column[i] / column.sum())
    assert np.all(np.isfinite(dual_softmax(scores * 1000)))  # where a plain exp overflows


# ---------------------------------------------------------------------------------------------------------- intervals


def test_an_interval_is_as_wide_as_theory_says() -> None:
    """Of a share p over n queries: p -+ 1.96 sqrt(p (1 - p) / n)."""
    n, p = 3350, 0.227
    hits = (np.arange(n) < p * n).astype(np.float64)
    metrics = mean_metrics({"share": hits}, draws=1000, seed=3)
    low, high = metrics.intervals["share"]
    half = 1.96 * np.sqrt(p * (1 - p) / n)
    assert metrics.values["share"] == pytest.approx(p, abs=1 / n)
    assert low == pytest.approx(p - half, abs=0.1 * half) and high == pytest.approx(p + half, abs=0.1 * half)


def test_every_figure_has_an_interval_around_it_that_a_seed_fixes() -> None:
    scores = np.random.default_rng(1).standard_normal((60, 60)) + 2 * np.eye(60)
    metrics = retrieval_metrics(scores, draws=200, seed=5)
    assert set(metrics.intervals) == {"r1", "r5", "r10", "median_rank", "mean_rank"}
    for name, (low, high) in metrics.intervals.items():
        assert low <= getattr(metrics, name) <= high and low < high
    assert retrieval_metrics(scores, draws=200, seed=5) == metrics
    assert retrieval_metrics(scores, draws=200, seed=6).intervals != metrics.intervals
    assert retrieval_metrics(scores, draws=0).intervals == {}


def test_the_size_of_a_block_changes_no_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(2).standard_normal(50)

    def mean(x: Float64) -> Float64:
        result: Float64 = x.mean(axis=-1)
        return result

    whole = bootstrap(values, {"mean": mean}, 100, 7)
    monkeypatch.setattr("pipeline.evaluate.RESAMPLED_AT_ONCE", 170)  # three draws at a time
    assert bootstrap(values, {"mean": mean}, 100, 7) == whole


# ------------------------------------------------------------------------------------------------ choices and moments


def test_accuracy_counts_a_tie_as_its_share() -> None:
    options = [np.array(row, np.float32) for row in ([1, 0, 0], [0, 1, 1], [2, 2], [0, 3, 1])]
    metrics = accuracy_metrics(options, [0, 1, 0, 2], draws=0)
    assert metrics.values["accuracy"] == pytest.approx((1 + 1 / 2 + 1 / 2 + 0) / 4)
    assert (metrics.n, metrics.tied) == (4, 2)


def test_constant_options_are_chance_and_an_answer_out_of_the_list_is_wrong() -> None:
    constant = np.zeros((100, 5), np.float32)
    assert accuracy_metrics(constant, list(range(5)) * 20, draws=0).values["accuracy"] == pytest.approx(0.2)
    assert accuracy_metrics(constant, [-1] * 100, draws=0).values["accuracy"] == 0
    with pytest.raises(ValueError, match="answer 5 of 5"):
        accuracy_metrics(constant[:1], [5])


@pytest.mark.parametrize(
    ("a", "b", "iou"),
    [
        ((0, 10), (0, 10), 1.0),
        ((0, 10), (5, 15), 5 / 15),
        ((5, 15), (0, 10), 5 / 15),
        ((0, 10), (2, 4), 0.2),
        ((0, 1), (1, 2), 0.0),
        ((0, 1), (5, 6), 0.0),
        ((3, 3), (3, 3), 0.0),
        ((3, 3), (0, 6), 0.0),
    ],
)
def test_temporal_overlap(a: tuple[float, float], b: tuple[float, float], iou: float) -> None:
    spans = [np.array([x], np.float64) for x in (*a, *b)]
    assert temporal_iou(*spans)[0] == pytest.approx(iou)


def test_moments_are_right_from_their_level_on() -> None:
    metrics = moment_metrics(np.array([0.0, 0.49, 0.5, 0.69, 0.7, 1.0]), draws=50)
    assert metrics.values == pytest.approx({"r1_iou_0.5": 4 / 6, "r1_iou_0.7": 2 / 6, "mean_iou": 3.38 / 6})
    assert set(metrics.intervals) == set(metrics.values)
