"""Which video is meant, which frames a span has, and scores in blocks, against slow loops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UsageError
from pipeline.evaluation.clips import Clips, VideoRows, rows_in_span
from pipeline.evaluation.matching import match_videos
from pipeline.evaluation.scoring import mean_blocks, rescore_blocks
from pipeline.moments import pool
from pipeline.rescore import rescore, score_frames
from pipeline.types import Float32, Int64, Moments, Video
from small_evaluations import best_score, random_unit

# --------------------------------------------------------------------------------------------------------- matching


def video(video_id: str, path: str) -> Video:
    return Video(video_id, video_id, path, 1, 1, 1)


def test_videos_are_found_by_id_then_name_then_stem() -> None:
    videos = [video("id1", "/x/aa.mp4"), video("id2", "/x/-dh_u.webm"), video("aa", "/x/b.mp4")]
    matched = match_videos(["aa", "aa.mp4", "-dh_u", "id1", "zz", "aa.mkv"], videos)
    assert {name: found.video_id for name, found in matched.found.items()} == {
        "aa": "aa",
        "aa.mp4": "id1",
        "-dh_u": "id2",
        "id1": "id1",
    }
    assert matched.missing == ("aa.mkv", "zz")


def test_a_name_that_fits_two_videos_is_an_error_that_shows_both() -> None:
    videos = [video("1", "/x/aa.mp4"), video("2", "/y/aa.mkv"), video("3", "/y/b.mp4")]
    with pytest.raises(UsageError, match=r"'aa' fits 2 videos of the collection: /x/aa.mp4, /y/aa.mkv"):
        match_videos(["aa"], videos)
    assert match_videos(["b", "aa.mp4"], videos).missing == ()


# ------------------------------------------------------------------------------------------------------------ spans


def rows_of(pts: Sequence[float], span: float) -> VideoRows:
    times, n = np.array(pts, np.float64), len(pts)
    moment = Moments(np.eye(1, n, dtype=np.float32), times[:1], times[-1:] + span, np.array([n], np.int64))
    return VideoRows(np.eye(n, dtype=np.float32), moment, times, span, 0.0)


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=12).map(sorted),
    st.integers(1, 6),
    st.integers(0, 45),
    st.integers(0, 9),
)
def test_a_span_has_the_rows_that_meet_it_or_the_nearest(pts: list[int], span: int, start: int, length: int) -> None:
    end = start + length
    meets = [i for i, t in enumerate(pts) if t + span > start and (t < end or t == start)]
    found = rows_in_span(rows_of(pts, span), start, end)
    if meets:
        assert list(range(found.start, found.stop)) == meets
    else:
        distances = [abs(t + span / 2 - (start + end) / 2) for t in pts]
        assert found.stop == found.start + 1
        assert distances[found.start] == min(distances)


def test_a_span_beside_the_frames_takes_the_nearest_one() -> None:
    video = rows_of([0, 1, 2, 10], 1)
    assert rows_in_span(video, 20, 25) == slice(3, 4)
    assert rows_in_span(video, 4, 5) == slice(2, 3)
    assert rows_in_span(video, 1.0, 1.0) == slice(1, 2)
    assert rows_in_span(rows_of([0, 10], 4), 8, 9) == slice(1, 2)  # the frame's middle counts, not its start or end
    assert rows_in_span(rows_of([0, 10], 4), 4, 5) == slice(0, 1)


# ----------------------------------------------------------------------------------------------------------- scores


def whole(blocks: Any) -> Float32:
    return np.concatenate([block for _, block in blocks])


def test_blocks_of_scores_are_those_of_search_and_index(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    rows = [random_unit(rng, n) for n in (1, 4, 7)]
    texts, clips = random_unit(rng, 9), Clips(rows)
    for block_bytes in (1, 300, 10**6):  # one text, a few, all at once
        monkeypatch.setattr("pipeline.evaluation.scoring.BLOCK_BYTES", block_bytes)
        weighted, mean = whole(rescore_blocks(texts, clips, 0.1)), whole(mean_blocks(texts, clips))
        for i, text in enumerate(texts):
            expected = rescore(score_frames(text, clips.features), clips.offsets, 0.1)
            assert weighted[i] == pytest.approx(expected, abs=1e-6)
            pooled = [pool(clip, np.zeros(len(clip), np.float32)) @ text for clip in rows]
            assert mean[i] == pytest.approx(pooled, abs=1e-6)


def scenes_of(lengths: Sequence[int]) -> Int64:
    """Labels of scenes of these lengths, from 3 on."""
    return np.repeat(np.arange(3, 3 + len(lengths)), lengths)


@given(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=4), min_size=1, max_size=5), st.integers(0, 99))
def test_by_moments_a_clip_has_the_score_of_its_best_run_of_one_scene(clips: list[list[int]], seed: int) -> None:
    """Every clip's scenes have the same labels, so that neighbours may meet in one: that is no common moment."""
    rng = np.random.default_rng(seed)
    rows, texts = [random_unit(rng, sum(lengths)) for lengths in clips], random_unit(rng, 3)
    by_moments = Clips(rows, [scenes_of(lengths) for lengths in clips])
    whole_ones = [[h] for h in rows]
    moments = [np.split(h, np.cumsum(lengths)[:-1]) for h, lengths in zip(rows, clips, strict=True)]
    assert by_moments.parts_per_clip == sum(map(len, clips)) / len(clips)
    for given_clips, groups in ((by_moments, moments), (Clips(rows), whole_ones)):
        weighted, mean = whole(rescore_blocks(texts, given_clips, 0.1)), whole(mean_blocks(texts, given_clips))
        for scores, temperature in ((weighted, 0.1), (mean, None)):
            assert scores.dtype == np.float32
            expected = [[best_score(text, group, temperature) for group in groups] for text in texts]
            assert scores == pytest.approx(np.array(expected), abs=2e-7)


@pytest.mark.parametrize("scenes", [None, scenes_of([2, 3])])
def test_equal_texts_and_equal_clips_have_equal_scores_wherever_they_stand(scenes: Int64 | None) -> None:
    rng = np.random.default_rng(1)
    rows = [random_unit(rng, 5, 64) for _ in range(40)]
    texts = random_unit(rng, 37, 64)
    twice = np.concatenate([texts, texts[::-1]])
    clips = Clips([*rows, *rows[::-1]], None if scenes is None else [scenes] * 80)
    for blocks in (rescore_blocks(twice, clips, 0.05), mean_blocks(twice, clips)):
        scores = whole(blocks)
        assert np.array_equal(scores[:37], scores[37:][::-1])
        assert np.array_equal(scores[:, :40], scores[:, 40:][:, ::-1])
