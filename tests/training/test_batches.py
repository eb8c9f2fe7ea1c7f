"""Batches: distinct videos, pure functions of seed and epoch, clips that lie where they should."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.training.batches import (
    batch_size_of,
    collate,
    epoch_batches,
    middle_part,
    overlapping,
    random_of,
    random_part,
    training_batch,
)
from pipeline.training.examples import Examples, split
from small_trainings import random_rows, small_examples

UNEVEN = np.repeat(np.arange(20), np.arange(20) % 4 + 1)  # one to four texts a video


def spans(*pairs: tuple[int, int]) -> NDArray[np.int64]:
    return np.array(pairs, np.int64)


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=60),
    st.integers(2, 6),
    st.integers(0, 5),
    st.booleans(),
)
def test_a_batch_has_distinct_videos_and_no_text_comes_twice(
    of: list[int], batch_size: int, epoch: int, hard: bool
) -> None:
    videos = np.array(of)
    neighbours = np.random.default_rng(0).permuted(np.tile(np.arange(10), (10, 1)), axis=1) if hard else None
    batches = epoch_batches(videos, batch_size, 7, epoch, neighbours)
    assert all(len(set(videos[rows].tolist())) == len(rows) == batch_size for rows in batches)
    taken = [row for rows in batches for row in rows.tolist()]
    assert len(taken) == len(set(taken))


@pytest.mark.parametrize("hard", [False, True])
def test_an_epoch_leaves_out_no_more_than_it_must(hard: bool) -> None:
    neighbours = np.random.default_rng(0).permuted(np.tile(np.arange(20), (20, 1)), axis=1) if hard else None
    assert len(epoch_batches(np.arange(20), 4, 0, 0, neighbours)) == 5
    n_batches = len(epoch_batches(UNEVEN, 4, 0, 0, neighbours))
    assert n_batches >= (8 if hard else 12) and n_batches <= len(UNEVEN) // 4


def test_order_is_a_function_of_seed_and_epoch() -> None:
    first = [epoch_batches(UNEVEN, 4, seed, epoch) for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))]
    flat = [np.concatenate(batches).tolist() for batches in first]
    assert flat[0] == flat[1]
    assert flat[0] != flat[2] and flat[0] != flat[3] and flat[2] != flat[3]


def test_hard_batches_are_made_of_neighbours() -> None:
    group = np.arange(80) // 8  # ten groups of eight look-alikes
    neighbours = np.array([[v for v in np.flatnonzero(group == group[n]) if v != n] for n in range(80)])
    alike = [
        np.mean([len(set(group[rows].tolist())) for rows in epoch_batches(np.arange(80), 16, 0, 0, near)])
        for near in (neighbours, None)
    ]
    assert alike[0] < 4 < alike[1]


def test_batches_are_no_larger_than_there_are_videos_and_divide_among_processes() -> None:
    assert batch_size_of(UNEVEN, 128) == 20
    assert batch_size_of(UNEVEN, 8) == 8
    assert batch_size_of(np.arange(7), 128, 2) == 6


def test_a_long_span_gives_another_part_each_time_and_its_middle_to_validation() -> None:
    long = spans((10, 110))
    parts = {tuple(random_part(long, 30, random_of(0, n))[0].tolist()) for n in range(1000)}
    assert {stop - start for start, stop in parts} == {30}
    assert min(parts)[0] == 10 and max(parts)[1] == 110
    assert middle_part(long, 30).tolist() == [[45, 75]]
    assert random_part(spans((3, 5)), 30, random_of(0)).tolist() == [[3, 5]]
    assert middle_part(spans((3, 5)), 30).tolist() == [[3, 5]]


def test_overlapped_clips_hold_a_token_of_the_span_and_stay_in_the_video() -> None:
    n = 3000
    of, lengths = np.tile(spans((20, 24), (0, 2), (4, 5)), (n, 1)), np.tile([60, 40, 5], n)
    cut = overlapping(of, lengths, (3, 32), random_of(0))
    sizes = cut[:, 1] - cut[:, 0]
    assert np.all((cut[:, 0] >= 0) & (cut[:, 1] <= lengths))
    assert np.all((cut[:, 0] < of[:, 1]) & (cut[:, 1] > of[:, 0]))
    assert set(sizes[lengths == 60].tolist()) == set(range(3, 33))
    assert sizes.max() == 32 and set(sizes[lengths == 5].tolist()) == {3, 4, 5}


def test_clips_are_padded_with_zeros_behind_the_mask() -> None:
    examples = small_examples(3)
    cut = spans((0, 3), (1, 3), (2, 3))
    batch = collate(examples, np.arange(3), cut)
    assert batch.mask.tolist() == [[True, True, True], [True, True, False], [True, False, False]]
    for at, (start, stop) in enumerate(cut.tolist()):
        expected = examples.bank.rows(at, start, stop)
        np.testing.assert_array_equal(batch.features[at, : stop - start].numpy(), expected)
        assert not batch.features[at, stop - start :].any()


def test_two_processes_take_the_two_halves_of_one_batch() -> None:
    examples = Examples.of_arrays([random_rows(90, n) for n in range(4)], random_rows(4))
    rows = np.arange(4)
    whole = training_batch(examples, rows, "span", (3, 16), random_of(5))
    for part in (slice(0, 2), slice(2, 4)):
        half = training_batch(examples, rows, "span", (3, 16), random_of(5), part)
        np.testing.assert_array_equal(half.features.numpy(), whole.features[part].numpy())
        np.testing.assert_array_equal(half.texts[0].numpy(), whole.texts[0][part].numpy())


def test_a_video_validates_or_trains_and_a_grown_collection_keeps_most_who_validate() -> None:
    names = [f"id-{n}" for n in range(200)]
    videos = np.repeat(np.arange(200), 3)
    before = split(videos[:300], names, 0.2)
    after = split(videos, names, 0.2)
    for which, n in ((before, 100), (after, 200)):
        validating = set(videos[which.validation].tolist())
        assert len(validating) == n // 5 and len(which.validation) == 3 * len(validating)
        assert not validating & set(videos[which.training].tolist())
    kept = set(videos[before.validation].tolist()) & set(videos[after.validation].tolist())
    assert len(kept) >= 12
    assert len(split(videos, names, 0.0).validation) == 0
    assert len(split(videos, names, 0.5, most_videos=7).validation) == 21
