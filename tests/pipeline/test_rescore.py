"""Re-scoring and moments against slow loops and cases worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.rescore import find_moments, rescore, score_frames
from pipeline.types import Float32, Moment

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


def moments_by_loops(
    scores: list[float], pts: list[float], span: float, background: float, duration: float | None
) -> list[Moment]:
    best = max(scores)
    level = min(best, (background + best) / 2)
    runs: list[list[int]] = []
    for i, score in enumerate(scores):
        if score < level:
            continue
        if runs and runs[-1][-1] == i - 1 and pts[i] - pts[i - 1] <= 2.5 * span:
            runs[-1].append(i)
        else:
            runs.append([i])
    moments = []
    for run in runs:
        end = pts[run[-1]] + span
        if duration is not None:
            end = max(pts[run[0]], min(end, duration))
        moments.append(Moment(pts[run[0]], end, max(scores[i] for i in run)))
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


def test_moments_are_the_runs_above_halfway_between_background_and_best() -> None:
    #           0    1     2    3    4    5     6    7     8
    scores = [0.1, 0.31, 0.5, 0.1, 0.1, 0.29, 0.4, 0.31, 0.1]
    got = find_moments(array(scores), np.arange(9.0), 1.0, background=0.1)  # halfway: 0.3
    assert [(m.start_seconds, m.end_seconds) for m in got] == [(1.0, 3.0), (6.0, 8.0)]
    assert [m.score for m in got] == pytest.approx([0.5, 0.4])


def test_unkept_frames_between_two_kept_ones_are_unknown_up_to_one_sample() -> None:
    pts = np.array([0.0, 1.0, 3.02, 6.0])  # one sample missing (and jitter), then two missing
    got = find_moments(array([0.5, 0.5, 0.5, 0.4]), pts, 1.0, background=0.0)
    assert [(m.start_seconds, m.end_seconds) for m in got] == [(0.0, 4.02), (6.0, 7.0)]


def test_a_stored_frame_that_does_not_match_ends_the_moment_however_near() -> None:
    got = find_moments(array([0.5, 0.0, 0.5]), np.array([0.0, 0.5, 1.0]), 1.0, background=0.0)
    assert [(m.start_seconds, m.end_seconds) for m in got] == [(0.0, 1.0), (1.0, 2.0)]


def test_no_moment_ends_after_the_video() -> None:
    got = find_moments(array([0.1, 0.5]), np.array([0.0, 4.0]), 4.0, background=0.1, duration=5.5)
    assert got == (Moment(4.0, 5.5, 0.5),)
    lying_container = find_moments(array([0.1, 0.5]), np.array([0.0, 4.0]), 4.0, background=0.1, duration=3.0)
    assert lying_container == (Moment(4.0, 4.0, 0.5),)


def test_one_frame_is_one_moment() -> None:
    for background in (-1.0, 0.5, 0.9):
        assert find_moments(array([0.5]), np.array([2.0]), 1.0, background) == (Moment(2.0, 3.0, 0.5),)


def test_a_video_that_scores_the_same_throughout_is_one_moment() -> None:
    got = find_moments(array([0.2] * 6), np.arange(6.0), 1.0, background=0.2)
    assert [(m.start_seconds, m.end_seconds) for m in got] == [(0.0, 6.0)]


def test_a_video_wholly_below_the_background_still_names_its_best_frame() -> None:
    got = find_moments(array([0.1, 0.2, 0.15]), np.arange(3.0), 1.0, background=0.4)
    assert [(m.start_seconds, m.end_seconds) for m in got] == [(1.0, 2.0)]


def test_frames_out_of_order_or_absent_are_refused() -> None:
    with pytest.raises(ValueError):
        find_moments(array([0.1, 0.2]), np.array([1.0, 0.0]), 1.0, 0.0)
    with pytest.raises(ValueError):
        find_moments(array([]), np.array([]), 1.0, 0.0)
    with pytest.raises(ValueError):
        find_moments(array([0.1]), np.array([1.0, 2.0]), 1.0, 0.0)


@given(
    st.lists(st.tuples(st.integers(-64, 64), st.integers(0, 5)), min_size=1, max_size=40),
    st.integers(-64, 64),
    st.one_of(st.none(), st.integers(0, 60)),
)
def test_moments_are_what_the_loops_say(frames: list[tuple[int, int]], background: int, duration: int | None) -> None:
    scores = [score / 64 for score, _ in frames]  # in binary fractions every comparison is exact
    pts = list(np.cumsum([step for _, step in frames]) * 0.5)
    end = None if duration is None else float(duration)
    got = find_moments(array(scores), np.array(pts), 0.5, background / 64, end)
    assert list(got) == moments_by_loops(scores, pts, 0.5, background / 64, end)
    assert len(got) >= 1
    assert got[0].score == max(scores)
