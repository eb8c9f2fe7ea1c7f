"""Re-scoring and moments against slow loops and cases worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.rescore import find_moments, rescore, score_frames
from pipeline.types import Float32, Moment, Moments

scores_of_a_video = st.lists(st.integers(-100, 100).map(lambda n: n / 100), min_size=1, max_size=40)


def random_unit(rng: np.random.Generator, *shape: int) -> Float32:
    x = rng.standard_normal(shape)
    unit: Float32 = (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)
    return unit


def array(values: list[float]) -> Float32:
    return np.array(values, np.float32)


def rescore_by_loops(scores: list[float], temperature: float) -> float:
    weights = [math.exp((score - max(scores)) / temperature) for score in scores]
    return sum(w * score for w, score in zip(weights, scores, strict=True)) / sum(weights)


def rescore_one(scores: list[float], temperature: float = 0.05) -> float:
    return float(rescore(array(scores), np.array([0, len(scores)]), temperature)[0])


def stored(n_frames: list[int], starts: list[float], ends: list[float]) -> Moments:
    """Moments of so many kept frames each."""
    vectors = np.eye(2, dtype=np.float32)[np.zeros(len(n_frames), np.intp)]
    return Moments(vectors, np.array(starts), np.array(ends), np.array(n_frames, np.int64))


def one_frame_each(n: int, span: float = 1.0) -> Moments:
    return stored([1] * n, [i * span for i in range(n)], [(i + 1) * span for i in range(n)])


def moments_by_loops(
    scores: list[float], of: Moments, span: float, background: float, temperature: float, duration: float | None
) -> list[Moment]:
    best = max(scores)
    level = min((background + best) / 2, best - 2 * temperature)
    frames = iter(scores)
    best_of = [max(next(frames) for _ in range(n)) for n in of.n_frames]
    starts, ends = of.start_seconds.tolist(), of.end_seconds.tolist()
    runs: list[list[int]] = []
    for i, score in enumerate(best_of):
        if score < level:
            continue
        if runs and runs[-1][-1] == i - 1 and starts[i] - ends[i - 1] <= 1.5 * span:
            runs[-1].append(i)
        else:
            runs.append([i])
    moments = []
    for run in runs:
        end = ends[run[-1]]
        if duration is not None:
            end = max(starts[run[0]], min(end, duration))
        moments.append(Moment(starts[run[0]], end, max(best_of[i] for i in run)))
    return sorted(moments, key=lambda m: (-m.score, m.start_seconds))


def test_frame_scores_are_the_cosines() -> None:
    rng = np.random.default_rng(3)
    query, features = random_unit(rng, 96), random_unit(rng, 50, 96)
    got = score_frames(query, features)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, features.astype(np.float64) @ query.astype(np.float64), atol=1e-6)


def test_a_query_of_another_dimension_or_type_is_refused() -> None:
    wrong_type: Any = np.ones(4)
    with pytest.raises(ValueError):
        score_frames(np.ones(3, np.float32), np.ones((2, 4), np.float32))
    with pytest.raises(ValueError):
        score_frames(wrong_type, np.ones((2, 4), np.float32))


def test_the_temperature_leads_from_the_best_frame_to_the_mean_of_all() -> None:
    scores = [0.25, 0.5, 0.0, -0.5]
    assert rescore_one([0.5]) == 0.5
    assert rescore_one(scores, 1e-3) == pytest.approx(0.5)
    assert rescore_one(scores, 1e6) == pytest.approx(0.0625, abs=1e-5)
    assert 0.25 < rescore_one(scores, 0.2) < 0.5


def test_a_long_video_loses_nothing_to_rounding() -> None:
    assert rescore_one([0.1] * 400_000) == np.float32(0.1)


def test_a_short_match_in_a_long_video_beats_a_video_that_half_matches_throughout() -> None:
    assert rescore_one([0.1] * 600 + [0.7] * 5) > rescore_one([0.4] * 600)


@given(scores_of_a_video, st.sampled_from([0.01, 0.05, 1.0]))
def test_rescoring_is_what_the_loops_say_in_any_order_of_frames(scores: list[float], temperature: float) -> None:
    assert rescore_one(scores, temperature) == pytest.approx(rescore_by_loops(scores, temperature), abs=1e-6)
    assert rescore_one(scores, temperature) == pytest.approx(rescore_one(scores[::-1], temperature), abs=1e-6)


@given(st.lists(scores_of_a_video, max_size=8))
def test_many_videos_at_once_score_as_one_by_one(videos: list[list[float]]) -> None:
    offsets = np.cumsum([0] + [len(video) for video in videos])
    got = rescore(array([score for video in videos for score in video]), offsets, 0.05)
    assert got.dtype == np.float32
    assert list(got) == pytest.approx([rescore_one(video) for video in videos], abs=1e-6)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_none_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        rescore_one([0.1, 0.2], temperature)


@pytest.mark.parametrize("offsets", [[], [0], [0, 2], [1, 3], [0, 2, 2, 3], [0, 2, 1, 3], [0, 4]])
def test_offsets_that_do_not_divide_the_frames_are_refused(offsets: list[int]) -> None:
    with pytest.raises(ValueError, match="offsets"):
        rescore(array([0.1, 0.2, 0.3]), np.array(offsets, np.int64), 0.05)


def test_no_candidates_have_no_scores() -> None:
    assert len(rescore(np.empty(0, np.float32), np.array([0]), 0.05)) == 0


@given(st.lists(scores_of_a_video, min_size=1, max_size=4), st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_many_queries_are_scored_at_once_as_each_alone(rows: list[list[float]], lengths: list[int]) -> None:
    offsets = np.cumsum([0, *lengths])
    scores = np.stack([np.resize(array(row), offsets[-1]) for row in rows])
    np.testing.assert_array_equal(
        rescore(scores, offsets, 0.05), np.stack([rescore(row, offsets, 0.05) for row in scores])
    )


T = 1e-9  # a temperature at which no two scores are about the same


def spans(moments: Sequence[Moment]) -> list[tuple[float, float]]:
    return [(m.start_seconds, m.end_seconds) for m in moments]


def test_moments_are_the_runs_above_halfway_between_background_and_best() -> None:
    #           0    1     2    3    4    5     6    7     8
    scores = [0.1, 0.31, 0.5, 0.1, 0.1, 0.29, 0.4, 0.31, 0.1]
    got = find_moments(array(scores), one_frame_each(9), 1.0, 0.1, T)  # halfway: 0.3
    assert spans(got) == [(1.0, 3.0), (6.0, 8.0)]
    assert [m.score for m in got] == pytest.approx([0.5, 0.4])


def test_a_scene_that_was_stored_as_one_is_never_divided() -> None:
    """Its best frame speaks for it, and it lasts as long as the scene does, of which one frame in four was kept."""
    of = stored([3, 2], [0.0, 12.0], [12.0, 20.0])
    got = find_moments(array([0.1, 0.5, 0.1, 0.1, 0.1]), of, 1.0, 0.1, T)
    assert got == (Moment(0.0, 12.0, 0.5),)


def test_unkept_frames_between_two_moments_are_unknown_up_to_one_sample() -> None:
    of = stored([1] * 4, [0.0, 1.0, 3.02, 6.0], [1.0, 2.0, 4.02, 7.0])  # one sample missing (and jitter), then two
    got = find_moments(array([0.5, 0.5, 0.5, 0.4]), of, 1.0, 0.0, T)
    assert spans(got) == [(0.0, 4.02), (6.0, 7.0)]


def test_a_stored_moment_that_does_not_match_ends_the_moment_however_near() -> None:
    got = find_moments(array([0.5, 0.0, 0.5]), one_frame_each(3, 0.5), 1.0, 0.0, T)
    assert spans(got) == [(0.0, 0.5), (1.0, 1.5)]


def test_no_moment_ends_after_the_video() -> None:
    of = stored([1, 1], [0.0, 4.0], [4.0, 8.0])
    assert find_moments(array([0.1, 0.5]), of, 4.0, 0.1, T, duration=5.5) == (Moment(4.0, 5.5, 0.5),)
    lying_container = find_moments(array([0.1, 0.5]), of, 4.0, 0.1, T, duration=3.0)
    assert lying_container == (Moment(4.0, 4.0, 0.5),)


def test_one_frame_is_one_moment() -> None:
    for background in (-1.0, 0.5, 0.9):
        assert find_moments(array([0.5]), stored([1], [2.0], [3.0]), 1.0, background, T) == (Moment(2.0, 3.0, 0.5),)


@pytest.mark.parametrize("background", [0.0, 0.6, 0.69, 0.7, 0.9])
def test_where_a_moment_ends_does_not_depend_on_how_common_it_is(background: float) -> None:
    """Scores of one matching scene after another, apart by less than the encoder tells apart; then one that is none."""
    got = find_moments(array([0.66, 0.7, 0.67, 0.69, 0.2]), one_frame_each(5), 1.0, background, 0.04)
    assert spans(got) == [(0.0, 4.0)]


def test_a_video_wholly_below_the_background_still_names_its_best_frame() -> None:
    got = find_moments(array([0.1, 0.2, 0.15]), one_frame_each(3), 1.0, 0.4, 0.01)
    assert spans(got) == [(1.0, 2.0)]


@pytest.mark.parametrize("n", [0, 2])
def test_frames_that_are_not_those_of_the_moments_are_refused(n: int) -> None:
    with pytest.raises(ValueError):
        find_moments(np.zeros(n, np.float32), one_frame_each(1), 1.0, 0.0, T)


def test_also_the_rest_are_the_moments_that_do_not_match_each_by_itself() -> None:
    scores = array([0.5, 0.5, 0.1, 0.2, 0.3])
    got = find_moments(scores, one_frame_each(5), 1.0, 0.0, T, also_the_rest=True)
    assert spans(got) == [(0.0, 2.0), (4.0, 5.0), (3.0, 4.0), (2.0, 3.0)]
    assert [m.score for m in got] == pytest.approx([0.5, 0.3, 0.2, 0.1])


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=12),
    st.lists(st.integers(-64, 64), min_size=36, max_size=36),
    st.integers(-64, 64),
    st.sampled_from([0, 1, 8]),
    st.one_of(st.none(), st.integers(0, 60)),
)
def test_moments_are_what_the_loops_say(
    scenes: list[tuple[int, int, int]], values: list[int], background: int, temperature: int, duration: int | None
) -> None:
    gaps, lengths, counts = (list(column) for column in zip(*scenes, strict=True))
    edges = np.cumsum([step for pair in zip(gaps, lengths, strict=True) for step in pair]) * 0.5
    of = stored(counts, edges[0::2].tolist(), edges[1::2].tolist())
    scores = [value / 64 for value in values[: sum(counts)]]  # in binary fractions every comparison is exact
    end = None if duration is None else float(duration)
    got = find_moments(array(scores), of, 0.5, background / 64, temperature / 128, end)
    assert list(got) == moments_by_loops(scores, of, 0.5, background / 64, temperature / 128, end)
    assert len(got) >= 1
    assert got[0].score == max(scores)
