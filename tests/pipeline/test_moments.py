"""Scenes, groups in time and moments, against the definition worked out one merge at a time."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.moments import (
    CLASSES_PER_OCTAVE,
    EQUAL,
    NEAR_EQUAL,
    SCENE_SHARE,
    divide_in_time,
    find_scenes,
    moments_of,
    pool,
    pool_groups,
    typical_frames,
)
from pipeline.select import SELECTORS, embed_video, parse_keep, select_frames
from pipeline.store import round_features
from pipeline.types import Float32, FrameFeatures, Moments, TimedText

DIM = 24


def unit(rng: np.random.Generator, n: int, dim: int = DIM) -> Float32:
    rows = rng.standard_normal((n, dim))
    unit_rows: Float32 = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return unit_rows


def shots(rng: np.random.Generator, lengths: list[int], noise: float) -> Float32:
    """A video of as many unrelated shots; within one, frames differ by noise of this length."""
    rows = np.repeat(unit(rng, len(lengths)), lengths, axis=0) + noise * unit(rng, sum(lengths))
    return round_features((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32))


def video(h: Float32, span: float = 1.0) -> FrameFeatures:
    return FrameFeatures("v", h, np.arange(len(h), dtype=np.float64) * span, span)


def merged_by_loops(h: Float32, n_least: int, most_cost: float) -> list[int]:
    """What `_merge_in_time` says, on lists of frames in float64."""
    groups = [[i] for i in range(len(h))]
    rows = h.astype(np.float64)
    while len(groups) > n_least:
        costs = []
        for a, b in itertools.pairwise(groups):
            gap = rows[a].mean(axis=0) - rows[b].mean(axis=0)
            costs.append(len(a) * len(b) / (len(a) + len(b)) * (float(gap @ gap) + EQUAL))
        dearest = min(most_cost, sorted(costs)[len(groups) - n_least - 1])
        classes = [math.inf if c > dearest else math.floor(CLASSES_PER_OCTAVE * math.log2(c)) for c in costs]
        chosen: list[int] = []
        i = 0
        while i < len(classes):
            j = i
            while j < len(classes) and classes[j] == classes[i]:
                j += 1
            left = classes[i - 1] if i else math.inf
            right = classes[j] if j < len(classes) else math.inf
            if classes[i] < min(left, right):
                chosen += range(i, j, 2)
            i = j
        chosen = sorted(sorted(chosen, key=lambda i: (costs[i], i))[: len(groups) - n_least])
        if not chosen:
            break
        for i in reversed(chosen):
            groups[i : i + 2] = [groups[i] + groups[i + 1]]
    return [group[0] for group in groups]


def most_cost_of(h: Float32) -> float:
    rows = h.astype(np.float64)
    variance = float(np.mean([(row - rows.mean(axis=0)) @ (row - rows.mean(axis=0)) for row in rows]))
    return max(NEAR_EQUAL, SCENE_SHARE * variance)


@given(
    st.integers(0, 2**32 - 1), st.lists(st.integers(1, 7), min_size=1, max_size=9), st.sampled_from([0.05, 0.3, 0.8])
)
def test_scenes_and_groups_are_what_merging_one_by_one_gives(seed: int, lengths: list[int], noise: float) -> None:
    h = shots(np.random.default_rng(seed), lengths, noise)
    assert find_scenes(h).tolist() == merged_by_loops(h, 1, most_cost_of(h))
    for n in {1, min(3, len(h)), len(h)}:
        groups = divide_in_time(h, n)
        assert groups.tolist() == merged_by_loops(h, n, math.inf)
        assert len(groups) == n


@pytest.mark.parametrize("seed", range(5))
def test_the_shots_of_a_video_are_its_scenes(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 30, 12).tolist()
    h = shots(np.random.default_rng(seed), lengths, 0.25)
    assert find_scenes(h).tolist() == np.cumsum([0, *lengths])[:-1].tolist()


def test_a_held_slide_is_one_scene_and_fast_cuts_are_one_each() -> None:
    rng = np.random.default_rng(0)
    slide = np.repeat(unit(rng, 1), 3600, axis=0)
    grain = round_features(slide + np.float32(0.02) * unit(rng, 3600))
    grain /= np.linalg.norm(grain, axis=1, keepdims=True)
    assert find_scenes(slide).tolist() == find_scenes(grain).tolist() == [0]
    assert find_scenes(unit(rng, 300)).tolist() == list(range(300))
    assert find_scenes(unit(rng, 1)).tolist() == [0]
    assert find_scenes(np.concatenate([slide[:5], unit(rng, 1), slide[:5]])).tolist() == [0, 5, 6]


def test_ten_hours_that_change_ever_faster_take_few_rounds() -> None:
    """Where each merge is a little dearer than the one before, no merge but the first is the cheapest around."""
    angle = np.linspace(0, 1.5, 36_000) ** 2
    h = np.zeros((36_000, 8), np.float32)
    h[:, 0], h[:, 1] = np.cos(angle), np.sin(angle)
    assert 2 < len(find_scenes(h)) < 200  # one merge a round would take minutes
    assert len(divide_in_time(h, 9_000)) == 9_000


def test_the_typical_frame_is_the_nearest_to_the_mean_and_of_equal_ones_the_middle() -> None:
    rng = np.random.default_rng(3)
    h = unit(rng, 40)
    h[20:30] = h[20]
    starts = np.array([0, 7, 8, 20, 30])
    expected = []
    for a, b in zip(starts, [*starts[1:], 40], strict=True):
        closeness = [float(row @ h[a:b].mean(axis=0)) for row in h[a:b]]
        expected.append(a + closeness.index(max(closeness)))
    expected[3] = 24  # of ten equal ones, at 4.5 from either end
    assert typical_frames(h, starts).tolist() == expected


def test_groups_are_pooled_each_as_a_video_is() -> None:
    rng = np.random.default_rng(4)
    h, s = unit(rng, 9), rng.standard_normal(9).astype(np.float32)
    h[5] = -h[4]  # a group whose rows cancel each other: its best-scored row stands for it
    starts = np.array([0, 3, 4, 6])
    for row, (a, b) in zip(pool_groups(h, s, starts), [(0, 3), (3, 4), (4, 6), (6, 9)], strict=True):
        np.testing.assert_allclose(row, pool(h[a:b], s[a:b]), atol=1e-7)


@given(st.integers(0, 2**32 - 1), st.sampled_from(SELECTORS), st.sampled_from(["0.25", "3", "1.0", "0.6"]))
def test_moments_are_in_order_apart_and_hold_every_kept_frame_once(seed: int, selector: str, keep: str) -> None:
    rng = np.random.default_rng(seed)
    features = video(shots(rng, rng.integers(1, 8, rng.integers(1, 9)).tolist(), 0.3), 0.5)
    n = len(features.features)
    texts = [TimedText("a"), TimedText("b", 1.0, 2.0)] if selector in ("caption", "topics") else []
    predicted = rng.standard_normal(n).astype(np.float32)
    vectors = unit(rng, len(texts)) if texts else None
    selection = select_frames(features, selector, parse_keep(keep), texts, vectors, predicted)
    embedding = embed_video(features, selection)
    moments = embedding.moments
    assert 1 <= len(moments) <= selection.kept.sum()
    edges = np.stack([moments.start_seconds, moments.end_seconds], axis=1).ravel()
    assert np.all(np.diff(edges) >= 0)
    scenes = [*find_scenes(features.features).tolist(), n]
    at = 0
    for number, (first, end) in enumerate(zip(moments.offsets, moments.offsets[1:], strict=False)):
        times = embedding.pts_seconds[first:end]
        scene = next(i for i in range(len(scenes) - 1) if scenes[i] <= times[0] / 0.5 < scenes[i + 1])
        assert np.all((times / 0.5 >= scenes[scene]) & (times / 0.5 < scenes[scene + 1]))
        assert (moments.start_seconds[number], moments.end_seconds[number]) == (
            scenes[scene] / 2,
            scenes[scene + 1] / 2,
        )
        mean = embedding.features[first:end].astype(np.float64).mean(axis=0)
        np.testing.assert_allclose(moments.vectors[number], mean / np.linalg.norm(mean), atol=1e-6)
        assert scene >= at
        at = scene + 1
    assert moments.n_frames.sum() == selection.kept.sum()


def test_a_moment_ends_with_its_last_frame_where_the_video_has_a_gap() -> None:
    h = shots(np.random.default_rng(1), [3, 2], 0.1)
    features = FrameFeatures("v", h, np.array([0.0, 1.0, 2.0, 60.0, 61.0]), 1.0)
    moments = moments_of(features, np.ones(5, np.bool_), np.zeros(5, np.float32))
    assert moments.start_seconds.tolist() == [0.0, 60.0]
    assert moments.end_seconds.tolist() == [3.0, 62.0]


def test_no_moment_spans_a_hole_inside_a_scene() -> None:
    """As where a camera's clock jumps by a day: what was shown meanwhile nobody knows."""
    h = shots(np.random.default_rng(1), [6], 0.1)
    features = FrameFeatures("v", h, np.array([0.0, 1.0, 3.4, 6.0, 93_600.0, 93_601.0]), 1.0)
    moments = moments_of(features, np.ones(6, np.bool_), np.zeros(6, np.float32))
    assert moments.start_seconds.tolist() == [0.0, 6.0, 93_600.0]  # 2.4 spans are one missing sample, 2.6 are a hole
    assert moments.end_seconds.tolist() == [4.4, 7.0, 93_602.0]
    assert moments.n_frames.tolist() == [3, 1, 2]


def test_frames_at_one_time_make_no_moments_that_overlap() -> None:
    h = shots(np.random.default_rng(1), [2, 2, 2], 0.1)
    features = FrameFeatures("v", h, np.array([0.0, 1.0, 1.0, 1.0, 1.0, 1.5]), 1.0)
    moments = moments_of(features, np.ones(6, np.bool_), np.zeros(6, np.float32))
    assert moments.start_seconds.tolist() == [0.0, 1.0, 1.0]
    assert moments.end_seconds.tolist() == [1.0, 1.0, 2.5]


def test_uniform_keeps_a_frame_of_every_scene_where_evenly_spaced_frames_would_miss_some() -> None:
    lengths = [20, 1, 20, 1, 20, 2]
    h = shots(np.random.default_rng(2), lengths, 0.2)
    kept = np.flatnonzero(select_frames(video(h), "uniform", parse_keep("6")).kept)
    scene_of = np.repeat(np.arange(6), lengths)
    assert scene_of[kept].tolist() == [0, 1, 2, 3, 4, 5]
    assert len(np.flatnonzero(select_frames(video(h), "uniform", parse_keep("0.25")).kept)) == 16


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_frames": np.array([2, 0])}, "at least one frame"),
        ({"start_seconds": np.array([0.0, 0.5])}, "overlap"),
        ({"end_seconds": np.array([1.0, np.nan])}, "overlap"),
        ({"vectors": np.ones((2, 4), np.float32)}, "unit"),
        ({"vectors": np.eye(4, dtype=np.float32)[:1]}, "shape"),
    ],
)
def test_moments_that_are_none_are_refused(change: dict[str, np.ndarray], words: str) -> None:
    good = {
        "vectors": np.eye(4, dtype=np.float32)[:2],
        "start_seconds": np.array([0.0, 1.0]),
        "end_seconds": np.array([1.0, 2.0]),
        "n_frames": np.array([2, 1]),
    }
    Moments(**good)
    with pytest.raises(ValueError, match=words):
        Moments(**good | change)
