"""Selection against METHOD.md sections 1-2, written out again in slow loops, and the invariants that follow from it."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UsageError
from pipeline.moments import pool
from pipeline.select import (
    LEAST_COSINE,
    PAD_SECONDS,
    Keep,
    embed_video,
    evenly_spaced,
    n_kept,
    parse_keep,
    select_frames,
)
from pipeline.types import Float32, FrameFeatures, Selection, TimedText

DIM = 4
# Unit rows whose every product is a multiple of 1/4: float32 is exact on them, and ties are common.
EXACT_ROWS = np.array(
    [[0.5 * a, 0.5 * b, 0.5 * c, 0.5 * d] for a in (1, -1) for b in (1, -1) for c in (1, -1) for d in (1, -1)]
    + [list(row) for row in np.eye(DIM)]
    + [list(row) for row in -np.eye(DIM)],
    dtype=np.float32,
)
rows = st.integers(0, len(EXACT_ROWS) - 1)
keeps = st.one_of(
    st.integers(1, 1000).map(lambda n: Keep(ratio=n / 1000)),
    st.integers(1, 30).map(lambda n: Keep(count=n)),
)


@st.composite
def videos(draw: st.DrawFn) -> FrameFeatures:
    """1 to 24 frames of 0.5 s, some of them missing."""
    chosen = draw(st.lists(rows, min_size=1, max_size=24))
    steps = draw(st.lists(st.integers(0, 4), min_size=len(chosen), max_size=len(chosen)))
    return FrameFeatures("v", EXACT_ROWS[chosen], np.cumsum(steps, dtype=np.float64) * 0.5, 0.5)


@st.composite
def text_lists(draw: st.DrawFn) -> tuple[list[TimedText], Float32]:
    """Up to 5 texts, with and without spans, some of them outside the video."""
    chosen = draw(st.lists(rows, max_size=5))
    texts = []
    for number in range(len(chosen)):
        start = draw(st.one_of(st.none(), st.integers(-20, 120)))
        if start is None:
            texts.append(TimedText(f"text {number}"))
        else:
            texts.append(TimedText(f"text {number}", start * 0.25, (start + draw(st.integers(0, 12))) * 0.25))
    return texts, EXACT_ROWS[chosen].reshape(len(chosen), DIM)


def video_of(features: Float32, span: float = 1.0) -> FrameFeatures:
    return FrameFeatures("v", features, np.arange(len(features), dtype=np.float64) * span, span)


def random_unit(rng: np.random.Generator, *shape: int) -> Float32:
    x = rng.standard_normal(shape)
    unit: Float32 = (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)
    return unit


def exact_ceiling(keep: Keep, n: int) -> int:
    """K by exact arithmetic on the decimal the user wrote."""
    if keep.count is not None:
        return min(keep.count, n)
    return max(1, math.ceil(Fraction(str(keep.ratio)) * n))


def caption_by_loops(video: FrameFeatures, texts: list[TimedText], vectors: Float32, keep: Keep) -> Selection:
    """`caption` as METHOD.md says it, one frame and one text at a time."""
    n = len(video.features)
    kept: set[int] = set()
    firsts: set[int] = set()
    best = [LEAST_COSINE] * n
    for text, z in zip(texts, vectors, strict=True):
        scored = []
        for i in range(n):
            start, end = video.pts_seconds[i], video.pts_seconds[i] + video.span_seconds
            first = -math.inf if text.start_seconds is None else text.start_seconds - PAD_SECONDS
            last = math.inf if text.end_seconds is None else text.end_seconds + PAD_SECONDS
            if start > last or end <= first:
                continue
            cosine = sum(float(a) * float(b) for a, b in zip(video.features[i], z, strict=True))
            best[i] = max(best[i], cosine)
            scored.append((-cosine, i))
        scored.sort()
        chosen = [i for _, i in scored[: exact_ceiling(keep, len(scored))]] if scored else []
        kept.update(chosen)
        firsts.update(chosen[:1])
    if not kept:
        return select_frames(video, "uniform", keep)  # which tests/pipeline/test_moments.py looks at
    if keep.count is not None:
        ranked = sorted(kept, key=lambda i: (i not in firsts, -best[i], i))
        kept = set(ranked[: keep.count])
    return Selection(np.array(best, np.float32), np.array([i in kept for i in range(n)]), "caption")


def test_a_whole_number_is_a_count_and_a_number_with_a_point_is_a_ratio() -> None:
    assert parse_keep("8") == Keep(count=8)
    assert parse_keep("0.25") == Keep(ratio=0.25)
    assert parse_keep(" .5 ") == Keep(ratio=0.5)
    assert parse_keep("1") == Keep(count=1)
    assert parse_keep("1.0") == Keep(ratio=1.0)
    assert n_kept(parse_keep("1"), 50) == 1
    assert n_kept(parse_keep("1.0"), 50) == 50


@pytest.mark.parametrize("text", ["", "0", "-3", "0.0", "1.5", "-0.5", "nan", "inf", ".", "1e-2", "a", "٣", "9" * 5000])
def test_what_is_no_share_and_no_count_is_refused_in_one_line_with_an_example(text: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_keep(text)
    assert "\n" not in error.value.message
    assert "0.25" in error.value.hint or "1.0" in error.value.hint


def test_a_keep_is_a_ratio_or_a_count() -> None:
    with pytest.raises(ValueError):
        Keep()
    with pytest.raises(ValueError):
        Keep(ratio=0.5, count=3)


def test_the_kept_count_is_the_exact_ceiling_at_every_length() -> None:
    assert n_kept(Keep(ratio=1e-12), 5) == 1
    assert n_kept(Keep(count=8), 3) == 3
    assert n_kept(Keep(ratio=0.1), 30) == 3  # 0.1 * 30 > 3 in binary
    for thousandths in range(1, 1001, 7):
        keep = Keep(ratio=thousandths / 1000)
        for n in [*range(1, 200), 1000, 3000, 7200, 100_000, 1_000_000]:
            assert n_kept(keep, n) == exact_ceiling(keep, n), (keep, n)


@given(videos(), text_lists(), keeps)
def test_caption_is_what_the_loops_say(
    video: FrameFeatures, texts: tuple[list[TimedText], Float32], keep: Keep
) -> None:
    got = select_frames(video, "caption", keep, *texts)
    want = caption_by_loops(video, *texts, keep)
    assert got.selector == want.selector
    np.testing.assert_array_equal(got.kept, want.kept)
    np.testing.assert_array_equal(got.scores, want.scores)


@given(videos(), text_lists(), keeps, st.permutations(range(5)))
def test_the_order_of_the_texts_does_not_matter(
    video: FrameFeatures, texts: tuple[list[TimedText], Float32], keep: Keep, shuffle: list[int]
) -> None:
    order = [i for i in shuffle if i < len(texts[0])]
    shuffled = [texts[0][i] for i in order], texts[1][order]
    for selector in ("caption", "topics") if order else ("caption",):
        one, other = select_frames(video, selector, keep, *texts), select_frames(video, selector, keep, *shuffled)
        np.testing.assert_array_equal(one.kept, other.kept)
        np.testing.assert_array_equal(one.scores, other.scores)


@given(videos(), rows, keeps)
def test_one_text_about_the_whole_video_keeps_exactly_k(video: FrameFeatures, row: int, keep: Keep) -> None:
    z = EXACT_ROWS[row : row + 1]
    got = select_frames(video, "caption", keep, [TimedText("all of it")], z)
    assert got.kept.sum() == exact_ceiling(keep, len(video.features))
    if not got.kept.all():
        assert got.scores[got.kept].min() >= got.scores[~got.kept].max()
    np.testing.assert_array_equal(got.scores, video.features @ z[0])


@given(videos(), text_lists(), st.integers(1, 30))
def test_a_count_is_never_exceeded(video: FrameFeatures, texts: tuple[list[TimedText], Float32], count: int) -> None:
    got = select_frames(video, "caption", Keep(count=count), *texts)
    assert 1 <= got.kept.sum() <= count


def test_real_scores_agree_with_float64_and_one_selection_is_repeatable() -> None:
    rng = np.random.default_rng(5)
    video, z = video_of(random_unit(rng, 300, 512)), random_unit(rng, 1, 512)
    got = select_frames(video, "caption", Keep(ratio=0.25), [TimedText("x")], z)
    exact = video.features.astype(np.float64) @ z[0].astype(np.float64)
    np.testing.assert_allclose(got.scores, exact, atol=1e-6)
    assert set(np.flatnonzero(got.kept)) == set(np.argsort(-exact)[:75])
    again = select_frames(video, "caption", Keep(ratio=0.25), [TimedText("x")], z)
    np.testing.assert_array_equal(got.scores, again.scores)


@pytest.mark.parametrize("selector", ["caption", "topics"])
@pytest.mark.parametrize("dim", [7, 512, 765])
def test_equal_frames_tie_exactly_and_the_earlier_ones_are_kept(selector: str, dim: int) -> None:
    rng = np.random.default_rng(1)
    still = video_of(np.repeat(random_unit(rng, 1, dim), 37, axis=0))
    got = select_frames(still, selector, Keep(count=5), [TimedText("a"), TimedText("b")], random_unit(rng, 2, dim))
    assert len(np.unique(got.scores)) == 1
    assert list(np.flatnonzero(got.kept)) == [0, 1, 2, 3, 4]


def test_a_cue_scores_only_the_frames_that_meet_its_padded_span() -> None:
    video = video_of(np.repeat(EXACT_ROWS[:1], 12, axis=0))
    got = select_frames(video, "caption", Keep(ratio=1.0), [TimedText("cue", 5.5, 6.5)], EXACT_ROWS[:1])
    # padded to [4.5, 7.5]: frame 4 covers [4, 5), frame 7 [7, 8)
    assert list(np.flatnonzero(got.kept)) == [4, 5, 6, 7]
    assert set(got.scores[got.kept]) == {1.0}
    assert set(got.scores[~got.kept]) == {LEAST_COSINE}


def test_a_frame_covers_up_to_its_end_but_not_the_end_itself() -> None:
    video = video_of(np.repeat(EXACT_ROWS[:1], 6, axis=0))
    got = select_frames(video, "caption", Keep(ratio=1.0), [TimedText("cue", 3.0, 3.0)], EXACT_ROWS[:1])
    # padded to [2, 4]: frame 1 covers [1, 2) and does not meet it, frame 4 starts on its last instant
    assert list(np.flatnonzero(got.kept)) == [2, 3, 4]


def test_k_is_a_share_of_the_frames_a_cue_scores_not_of_the_video() -> None:
    video = video_of(np.repeat(EXACT_ROWS[:1], 100, axis=0))
    got = select_frames(video, "caption", Keep(ratio=0.25), [TimedText("cue", 11.0, 16.5)], EXACT_ROWS[:1])
    assert list(np.flatnonzero(got.kept)) == [10, 11]  # ceil(0.25 * 8)


def test_several_texts_keep_the_union_and_a_frame_has_the_highest_of_its_scores() -> None:
    e = np.eye(DIM, dtype=np.float32)
    video = video_of(e[[0, 0, 1, 2, 3, 3]])
    got = select_frames(video, "caption", Keep(ratio=0.3), [TimedText("a"), TimedText("b")], e[[0, 3]])
    assert list(np.flatnonzero(got.kept)) == [0, 1, 4, 5]
    assert list(got.scores) == [1, 1, 0, 0, 1, 1]


def test_a_count_gives_each_text_its_best_frame_before_any_text_gets_a_second() -> None:
    def at(cosine: float, axis: int) -> list[float]:
        row = [0.0] * DIM
        row[axis], row[3] = cosine, math.sqrt(1 - cosine**2)
        return row

    # text a scores 0.9, 0.8, 0.7 on the first three frames, text b 0.5 and 0.4 on the last two
    video = video_of(np.array([at(0.9, 0), at(0.8, 0), at(0.7, 0), at(0.5, 1), at(0.4, 1)], np.float32))
    z = np.eye(DIM, dtype=np.float32)[:2]
    texts = [TimedText("a"), TimedText("b")]
    kept = {n: list(np.flatnonzero(select_frames(video, "caption", Keep(count=n), texts, z).kept)) for n in (1, 2, 3)}
    assert kept == {1: [0], 2: [0, 3], 3: [0, 1, 3]}


def test_of_equal_frames_the_earlier_ones_stay_within_a_count() -> None:
    video = video_of(np.repeat(EXACT_ROWS[:1], 30, axis=0))
    texts = [TimedText("late", 22.0, 22.5), TimedText("early", 5.0, 5.5), TimedText("middle", 12.0, 12.5)]
    got = select_frames(video, "caption", Keep(count=2), texts, np.repeat(EXACT_ROWS[:1], 3, axis=0))
    assert list(np.flatnonzero(got.kept)) == [4, 11]  # the first frame of each padded cue, and of those the first two


def test_without_a_text_inside_the_video_caption_is_uniform_and_says_so() -> None:
    video = video_of(EXACT_ROWS)
    want = select_frames(video, "uniform", Keep(count=3))
    for texts, z in (([], EXACT_ROWS[:0]), ([TimedText("after the end", 500.0, 510.0)], EXACT_ROWS[:1])):
        got = select_frames(video, "caption", Keep(count=3), texts, z)
        assert got.selector == "uniform"
        np.testing.assert_array_equal(got.kept, want.kept)
        np.testing.assert_array_equal(got.scores, want.scores)
    assert select_frames(video, "caption", Keep(count=3)).selector == "uniform"


def test_a_cue_outside_the_video_does_not_take_part_beside_one_inside() -> None:
    video = video_of(np.repeat(EXACT_ROWS[:1], 10, axis=0))
    texts = [TimedText("outside", 100.0, 101.0), TimedText("inside", 4.5, 4.6)]
    got = select_frames(video, "caption", Keep(count=1), texts, EXACT_ROWS[[3, 0]])
    assert got.selector == "caption"
    assert list(np.flatnonzero(got.kept)) == [3]


@given(videos(), st.lists(rows, min_size=1, max_size=6), keeps)
def test_topics_keeps_the_k_frames_whose_best_topic_is_best(
    video: FrameFeatures, chosen: list[int], keep: Keep
) -> None:
    z = EXACT_ROWS[chosen]
    got = select_frames(video, "topics", keep, [TimedText("t", 900.0, 901.0)] * len(z), z)  # spans mean nothing here
    scores = [max(float(np.dot(h, row)) for row in z) for h in video.features]
    ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[: exact_ceiling(keep, len(scores))]
    assert got.selector == "topics"
    assert list(got.scores) == scores
    assert set(np.flatnonzero(got.kept)) == set(ranked)


@given(st.integers(1, 400), keeps)
def test_uniform_keeps_exactly_k_frames_all_over_a_still_video(n: int, keep: Keep) -> None:
    got = select_frames(video_of(np.repeat(EXACT_ROWS[:1], n, axis=0)), "uniform", keep)
    k = exact_ceiling(keep, n)
    assert got.kept.sum() == k
    assert not got.scores.any()
    gaps = np.diff(np.flatnonzero(got.kept), prepend=-1, append=n)
    assert gaps.max() <= 4 * n / k + 1  # groups that are merged by halves are up to twice as long as others


@given(st.integers(1, 400), keeps)
def test_evenly_spaced_frames_are_the_middles_of_k_equal_parts(n: int, keep: Keep) -> None:
    places = np.flatnonzero(evenly_spaced(n, keep))
    k = exact_ceiling(keep, n)
    assert list(places) == [math.floor((i + Fraction(1, 2)) * Fraction(n, k)) for i in range(k)]


def test_all_keeps_all_whatever_the_share() -> None:
    got = select_frames(video_of(EXACT_ROWS), "all", Keep(count=1))
    assert got.kept.all()
    assert not got.scores.any()
    assert got.selector == "all"


def test_an_unknown_selector_and_topics_without_topics_are_wrong_usage() -> None:
    video = video_of(EXACT_ROWS)
    with pytest.raises(UsageError, match="caption, topics, uniform, all"):
        select_frames(video, "best", Keep(count=1))
    with pytest.raises(UsageError, match="at least one topic"):
        select_frames(video, "topics", Keep(count=1))


def test_vectors_that_do_not_fit_are_refused() -> None:
    video, texts = video_of(EXACT_ROWS), [TimedText("a")]
    wrong_type: Any = EXACT_ROWS[:1].astype(np.float64)
    for bad in (
        EXACT_ROWS[:2],  # two vectors, one text
        EXACT_ROWS[:1, :3],  # another dimension
        wrong_type,
        EXACT_ROWS[:1] * 2,  # not unit
        np.full((1, DIM), np.nan, np.float32),
    ):
        with pytest.raises(ValueError):
            select_frames(video, "caption", Keep(count=1), texts, bad)


def test_the_pooled_vector_is_the_normalised_mean_of_the_kept_rows_alone() -> None:
    rng = np.random.default_rng(2)
    video = video_of(random_unit(rng, 40, 64))
    selection = select_frames(video, "caption", Keep(ratio=0.2), [TimedText("x")], random_unit(rng, 1, 64))
    got = embed_video(video, selection)
    places = [i for i in range(40) if selection.kept[i]]
    mean = sum(video.features[i].astype(np.float64) for i in places) / len(places)
    np.testing.assert_allclose(got.vector, mean / np.linalg.norm(mean), atol=1e-6)
    np.testing.assert_array_equal(got.features, video.features[places])
    np.testing.assert_array_equal(got.pts_seconds, video.pts_seconds[places])
    np.testing.assert_array_equal(got.scores, selection.scores[places])
    assert (got.video_id, got.n_frames, got.span_seconds, got.selector) == ("v", 40, 1.0, "caption")


def test_rows_that_cancel_each_other_leave_the_best_row_and_never_nan() -> None:
    e = np.eye(DIM, dtype=np.float32)
    rows_ = np.stack([e[0], e[1], -e[0], -e[1]])
    np.testing.assert_array_equal(pool(rows_, np.array([0.1, 0.9, 0.2, 0.3], np.float32)), e[1])
    np.testing.assert_array_equal(pool(rows_, np.zeros(4, np.float32)), e[0])


@given(videos(), text_lists(), keeps)
def test_every_selection_gives_a_valid_embedding(
    video: FrameFeatures, texts: tuple[list[TimedText], Float32], keep: Keep
) -> None:
    for selector in ("caption", "uniform", "all"):
        got = embed_video(video, select_frames(video, selector, keep, *texts))  # the types check norms and shapes
        assert abs(float(np.linalg.norm(got.vector)) - 1) < 1e-5


def test_a_selection_of_another_video_is_refused() -> None:
    with pytest.raises(ValueError, match="kept"):
        embed_video(video_of(EXACT_ROWS), Selection(np.zeros(3, np.float32), np.ones(3, np.bool_), "all"))
