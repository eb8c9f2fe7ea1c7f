"""How good scores are: ranks, recall, accuracy, temporal overlap, each with a bootstrap interval.

    docs/METHOD.md section 5               here
    rank = 1 + greater + ties / 2          `Ranks.average`, the rule of every figure unless another is asked for
    R@1/5/10, median and mean rank         `RetrievalMetrics`
    multiple choice, open-ended answers    `accuracy_metrics`
    moments: IoU, R@1 at IoU 0.5 and 0.7   `temporal_iou`, `moment_metrics`

Rows are queries, columns what is ranked, higher is better. A tie is neither a hit nor a miss: it counts half, so a
matrix of one value scores as chance (mean rank (n + 1) / 2), where ranking by equality with the diagonal, as two of the
published implementations do, calls it perfect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.types import Bool, Float64

Scores = NDArray[np.floating]
Right = Sequence[int] | Sequence[Sequence[int]] | NDArray[np.integer]
Interval = tuple[float, float]
TieRule = Literal["average", "optimistic", "pessimistic"]
Statistic = Callable[[Float64], Float64]  # (..., n) -> (...)

DRAWS = 1000
CONFIDENCE = 0.95
CUTOFFS = (1, 5, 10)
IOU_LEVELS = (0.5, 0.7)
DUAL_SOFTMAX_TEMPERATURE = 100.0  # what the cosines are multiplied by; the published implementations' value
RESAMPLED_AT_ONCE = 4_000_000  # indices: 32 MB


@dataclass(frozen=True, slots=True)
class Ranks:
    """For each query: how many wrong items scored higher than its best right one, and how many the same.

    `greater` and `ties` are (n,) int64; `n_items` is how many items were ranked.
    """

    greater: NDArray[np.int64]
    ties: NDArray[np.int64]
    n_items: int

    @property
    def average(self) -> Float64:
        """(n,) ranks from 1, ties counted half."""
        return np.asarray(1 + self.greater + self.ties / 2, np.float64)

    @property
    def optimistic(self) -> Float64:
        """(n,) ranks with every tie won: 1 + strictly greater, as many papers count."""
        return np.asarray(1 + self.greater, np.float64)

    @property
    def pessimistic(self) -> Float64:
        """(n,) ranks with every tie lost."""
        return np.asarray(1 + self.greater + self.ties, np.float64)


@dataclass(frozen=True, slots=True)
class RetrievalMetrics:
    """Figures of one direction of retrieval.

    Attributes:
        n_queries, n_items: Rows and columns.
        r1, r5, r10: Share of queries whose rank is at most 1, 5, 10 (in [0, 1]).
        median_rank, mean_rank: From 1; the median of an even number is the mean of the middle two.
        tied: Queries whose right item shares its score with a wrong one.
        intervals: Percentile bootstrap over queries for each of the figures above, by name; empty without draws.
    """

    n_queries: int
    n_items: int
    r1: float
    r5: float
    r10: float
    median_rank: float
    mean_rank: float
    tied: int
    intervals: dict[str, Interval]


@dataclass(frozen=True, slots=True)
class MeanMetrics:
    """Means over questions or queries, by name (in [0, 1]), with their intervals; `tied` as in RetrievalMetrics."""

    n: int
    values: dict[str, float]
    intervals: dict[str, Interval]
    tied: int = 0


# ------------------------------------------------------------------------------------------------------------ ranks


def _right_pairs(right: Right | None, n_rows: int, n_columns: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The right (row, column) pairs as two arrays, in order of rows.

    Raises:
        ValueError: A row without a right column, or one that is not there.
    """
    if right is None:
        if n_rows > n_columns:
            raise ValueError(f"{n_rows} rows and {n_columns} columns: say which column is right for each row")
        rows = columns = np.arange(n_rows)
    else:
        if len(right) != n_rows:
            raise ValueError(f"right answers for {len(right)} rows, the scores have {n_rows}")
        groups = [np.atleast_1d(np.asarray(group, np.intp)) for group in right]
        lengths = np.array([len(group) for group in groups], np.intp)
        if np.any(lengths == 0):
            raise ValueError(f"row {int(np.argmin(lengths))} has no right answer")
        rows = np.repeat(np.arange(n_rows), lengths)
        columns = np.concatenate(groups) if groups else np.empty(0, np.intp)
        if len(columns) and (columns.min() < 0 or columns.max() >= n_columns):
            raise ValueError(f"a right answer outside the {n_columns} columns")
    return rows, columns


def rank_rows(scores: Scores, right: Right | None = None) -> Ranks:
    """Ranks of each row's best right column among the wrong ones.

    Args:
        scores: (n, m), finite or infinite.
        right: Of each row its right column, or its right columns; None: column i of row i.

    Raises:
        ValueError: NaN, or `right` does not fit.
    """
    counter = RankCounter(scores.shape, right)
    counter.add_rows(0, scores)
    return counter.rows()


class RankCounter:
    """Ranks of rows and of columns from a matrix that comes in blocks of rows, twice.

    A column's right score is only known when all rows have been seen: `add_rows` takes every block once, then
    `add_columns` takes every block again. `rows()` and `columns()` then give the ranks of the two directions. The
    blocks of the second pass must be those of the first, to the last bit.

    Args:
        shape: Of the whole matrix, two lengths.
        right: Of each row its right column, or its right columns; None: column i of row i.

    Raises:
        ValueError: `right` does not fit; NaN in a block.
    """

    def __init__(self, shape: tuple[int, ...], right: Right | None = None) -> None:
        n_rows, n_columns = shape
        self._right = _right_pairs(right, n_rows, n_columns)
        self._n = n_rows, n_columns
        self._best_of_column = np.full(n_columns, -np.inf)
        self._row_counts = np.zeros((2, n_rows), np.int64)
        self._column_counts = np.zeros((2, n_columns), np.int64)

    def add_rows(self, start: int, block: Scores) -> None:
        """Takes the rows from `start` on: their ranks are then known."""
        block = checked(block)
        rows, columns = self._inside(start, len(block))
        right = block[rows, columns]
        best = np.full(len(block), -np.inf)
        np.maximum.at(best, rows, right)
        np.maximum.at(self._best_of_column, columns, right)
        greater = np.count_nonzero(block > best[:, None], axis=1)
        equal = np.count_nonzero(block == best[:, None], axis=1)
        # The right ones that are no better than the best one are not in the way of it.
        equal -= np.bincount(rows[right == best[rows]], minlength=len(block))
        self._row_counts[:, start : start + len(block)] = greater, equal

    def add_columns(self, start: int, block: Scores) -> None:
        """Takes a block again, for the ranks of the columns."""
        block = checked(block)
        rows, columns = self._inside(start, len(block))
        best = self._best_of_column
        self._column_counts[0] += np.count_nonzero(block > best, axis=0)
        self._column_counts[1] += np.count_nonzero(block == best, axis=0)
        ours = block[rows, columns] == best[columns]
        self._column_counts[1] -= np.bincount(columns[ours], minlength=self._n[1])

    def rows(self) -> Ranks:
        """Ranks of the rows' right columns."""
        return Ranks(self._row_counts[0], self._row_counts[1], self._n[1])

    def columns(self) -> Ranks:
        """Ranks of the columns' right rows; of the columns that have one."""
        asked = np.unique(self._right[1])
        return Ranks(self._column_counts[0, asked], self._column_counts[1, asked], self._n[0])

    def _inside(self, start: int, n: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        rows, columns = self._right
        first, end = np.searchsorted(rows, (start, start + n))
        return rows[first:end] - start, columns[first:end]


def checked(block: Scores) -> Scores:
    """The block, unless it holds NaN: then ValueError, because nothing compares with NaN and it would rank first."""
    if np.isnan(block).any():
        raise ValueError("NaN among the scores")
    return block


def retrieval_metrics(
    scores: Scores, right: Right | None = None, draws: int = DRAWS, seed: int = 0, ties: TieRule = "average"
) -> RetrievalMetrics:
    """Figures of a matrix of scores.

    Args:
        scores: (n, m); rows are queries, higher is better.
        right: Of each row its right column, or several (the best one counts); None: column i of row i.
        draws: Bootstrap resamples of the queries; 0 for none.
        seed: Of the resampling.
        ties: Which of the ranks of `Ranks` to take.

    Raises:
        ValueError: NaN, no row, or `right` does not fit.
    """
    return metrics_of_ranks(rank_rows(scores, right), draws, seed, ties)


def metrics_of_ranks(ranks: Ranks, draws: int = DRAWS, seed: int = 0, ties: TieRule = "average") -> RetrievalMetrics:
    """Figures of ranks that were counted before. Raises ValueError without a query."""
    chosen: Float64 = getattr(ranks, ties)
    statistics = {f"r{k}": _share_up_to(k) for k in CUTOFFS} | {"median_rank": _median, "mean_rank": _mean}
    values, intervals = bootstrap(chosen, statistics, draws, seed)
    tied = int(np.count_nonzero(ranks.ties))
    return RetrievalMetrics(len(chosen), ranks.n_items, tied=tied, intervals=intervals, **values)


def _share_up_to(k: int) -> Statistic:
    return lambda ranks: _mean(ranks <= k)


def _median(values: Float64) -> Float64:
    middle: Float64 = np.median(values, axis=-1)
    return middle


def _mean(values: Float64 | Bool) -> Float64:
    mean: Float64 = np.mean(values, axis=-1)
    return mean


def dual_softmax(scores: Scores, temperature: float = DUAL_SOFTMAX_TEMPERATURE) -> Float64:
    """(n, m) scores weighted by a softmax over the queries: s * softmax(temperature * s) down each column.

    It lets no item answer every query, and needs all the queries at once: a search has only one. A figure made with it
    is labelled so. For the other direction, give the transposed matrix.

    Raises:
        ValueError: NaN.
    """
    logits = temperature * checked(scores).astype(np.float64)
    weights = np.exp(logits - logits.max(axis=0, keepdims=True))
    weighted: Float64 = scores * (weights / weights.sum(axis=0, keepdims=True))
    return weighted


# ------------------------------------------------------------------------------------------------ choices, answers


def accuracy_metrics(
    options: Iterable[Scores], answers: Sequence[int], draws: int = DRAWS, seed: int = 0
) -> MeanMetrics:
    """Share of questions whose answer has the highest score: `accuracy`.

    Args:
        options: The scores of each question's options; their number may differ.
        answers: Position of the right one, -1 where it is not among the options (never right).

    A question whose answer shares the highest score with k wrong options counts 1 / (k + 1), what guessing among them
    would give.

    Raises:
        ValueError: NaN, no question, or an answer outside its options.
    """
    credit = np.zeros(len(answers))
    tied = 0
    for i, (scores, answer) in enumerate(zip(options, answers, strict=True)):
        if not -1 <= answer < len(scores):
            raise ValueError(f"question {i}: answer {answer} of {len(scores)} options")
        best = np.flatnonzero(checked(scores) == scores.max()) if answer >= 0 else np.empty(0)
        if answer in best:
            credit[i] = 1 / len(best)
            tied += len(best) > 1
    return mean_metrics({"accuracy": credit}, draws, seed, tied)


def mean_metrics(columns: dict[str, Float64], draws: int = DRAWS, seed: int = 0, tied: int = 0) -> MeanMetrics:
    """Means of columns (n,) with their intervals. Raises ValueError without a row."""
    values: dict[str, float] = {}
    intervals: dict[str, Interval] = {}
    for name, column in columns.items():
        value, interval = bootstrap(column, {name: _mean}, draws, seed)
        values |= value
        intervals |= interval
    return MeanMetrics(len(next(iter(columns.values()))), values, intervals, tied)


# ---------------------------------------------------------------------------------------------------------- moments


def temporal_iou(starts: Float64, ends: Float64, true_starts: Float64, true_ends: Float64) -> Float64:
    """Overlap of spans in time, their intersection over their union, in [0, 1]; shapes broadcast.

    Two spans without length overlap by 0.
    """
    intersection = np.clip(np.minimum(ends, true_ends) - np.maximum(starts, true_starts), 0, None)
    union = (ends - starts) + (true_ends - true_starts) - intersection
    iou: Float64 = np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)
    return iou


def moment_metrics(ious: Float64, draws: int = DRAWS, seed: int = 0) -> MeanMetrics:
    """Of each query's IoU (n,): the share at 0.5 and at 0.7 or more, and the mean."""
    columns = {f"r1_iou_{level:g}": (ious >= level).astype(np.float64) for level in IOU_LEVELS}
    return mean_metrics({**columns, "mean_iou": ious}, draws, seed)


# -------------------------------------------------------------------------------------------------------- bootstrap


def bootstrap(
    values: Float64, statistics: dict[str, Statistic], draws: int = DRAWS, seed: int = 0
) -> tuple[dict[str, float], dict[str, Interval]]:
    """Statistics of (n,) values, and their 95 % percentile intervals over `draws` resamples of the same size.

    Args:
        values: One for each query.
        statistics: Functions of (..., n) that reduce the last axis.

    Returns:
        The statistics, and the intervals (none without draws), by name.

    Raises:
        ValueError: No value.
    """
    if len(values) == 0:
        raise ValueError("no query to take a figure of")
    found = {name: float(statistic(values)) for name, statistic in statistics.items()}
    if draws < 1:
        return found, {}
    resampled: dict[str, list[Float64]] = {name: [] for name in statistics}
    for sample in _resamples(values, draws, seed):
        for name, statistic in statistics.items():
            resampled[name].append(statistic(sample))
    tail = 100 * (1 - CONFIDENCE) / 2
    intervals = {}
    for name, parts in resampled.items():
        low, high = np.percentile(np.concatenate(parts), [tail, 100 - tail])
        intervals[name] = (float(low), float(high))
    return found, intervals


def _resamples(values: Float64, draws: int, seed: int) -> Iterator[Float64]:
    """(b, n) draws with replacement, `draws` rows in all; the same whatever the size of a block."""
    generator = np.random.default_rng(seed)
    at_once = max(1, RESAMPLED_AT_ONCE // len(values))
    for start in range(0, draws, at_once):
        yield values[generator.integers(0, len(values), (min(at_once, draws - start), len(values)))]
