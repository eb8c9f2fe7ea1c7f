"""Ids of moments: the same in every build, unique, and the way back to their video."""

from __future__ import annotations

import re
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from indexes import id_map
from indexes.id_map import IdMap, Int32, moment_ids, video_key
from pipeline.errors import IntegrityError
from pipeline.types import Int64

MASK = 2**64 - 1
spreads = st.dictionaries(st.integers(0, 2**63 - 1), st.integers(1, 30), max_size=20)  # key -> number of moments


def splitmix(key: int, number: int) -> int:
    """The id of a moment, in Python's own whole numbers."""
    z = (key + (number + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return (z ^ (z >> 31)) >> 1


def columns(spread: dict[int, int]) -> tuple[Int64, Int32]:
    return np.array(list(spread), np.int64), np.array(list(spread.values()), np.int32)


def test_the_keys_of_videos_do_not_change() -> None:
    assert video_key("clip-17") == 185013966265301820
    assert video_key("") == 8203414616412130826
    assert video_key("日本 \u2028") == 1539981752320440740
    assert all(0 <= video_key(str(i)) < 2**63 for i in range(1000))


def test_the_ids_of_moments_do_not_change() -> None:
    ids = moment_ids(np.array([0, 185013966265301820, 2**63 - 1]), np.array([2, 3, 1]))
    assert ids.dtype == np.int64
    assert ids.tolist() == [
        8147104208329303767,
        3980143261097177850,
        6249110560397699199,
        1957807880663007120,
        4594925262610336184,
        1527823816519176019,
    ]


@given(spreads)
def test_ids_are_those_of_the_published_mixer_in_63_bits(spread: dict[int, int]) -> None:
    wanted = [splitmix(key, number) for key, count in spread.items() for number in range(count)]
    assert moment_ids(*columns(spread)).tolist() == wanted
    assert all(0 <= identifier < 2**63 for identifier in wanted)


def test_ids_of_many_moments_are_unique_and_spread_over_all_63_bits() -> None:
    keys = np.array([video_key(f"clip-{i}") for i in range(2000)], np.int64)
    near = np.concatenate([keys, np.arange(500), 2**62 + np.arange(500)])  # keys beside each other too
    ids = moment_ids(near, np.full(len(near), 100, np.int32))
    assert len(np.unique(ids)) == len(ids) == 300_000
    for bit in range(63):
        assert 0.49 < np.mean((ids >> bit) & 1) < 0.51


@given(spreads, st.randoms())
def test_the_map_is_that_of_a_slow_dictionary_in_any_order_of_videos(spread: dict[int, int], random: Random) -> None:
    slow = {splitmix(key, n): key for key, count in spread.items() for n in range(count)}
    order = sorted(spread)
    random.shuffle(order)
    for some in (spread, {key: spread[key] for key in order}):
        found = IdMap.of(*columns(some))
        assert found.keys.tolist() == list(some) and found.counts.tolist() == list(some.values())
        assert found.ids.tolist() == sorted(slow)
        assert len(found) == len(slow)
        asked = np.array(list(slow), np.int64)
        videos = found.videos_of(asked)
        assert videos.dtype == np.int32
        assert found.keys[videos].tolist() == list(slow.values())


@given(spreads)
def test_videos_of_and_ids_of_lead_back_to_each_other(spread: dict[int, int]) -> None:
    found = IdMap.of(*columns(spread))
    backwards = np.arange(len(spread))[::-1]
    ids = found.ids_of(backwards)
    assert len(ids) == len(found)
    assert found.videos_of(ids).tolist() == np.repeat(backwards, found.counts[backwards]).tolist()
    for video, (key, count) in enumerate(spread.items()):
        assert found.ids_of(np.array([video])).tolist() == [splitmix(key, n) for n in range(count)]
    np.testing.assert_array_equal(found.ids[np.argsort(found.ids)], np.sort(ids))


def test_what_a_video_has_does_not_depend_on_which_others_there_are() -> None:
    alone, among = IdMap.of(*columns({7: 4})), IdMap.of(*columns({3: 9, 7: 4, 12: 1}))
    assert set(alone.ids.tolist()) < set(among.ids.tolist())
    assert among.videos_of(alone.ids).tolist() == [1] * 4


def test_an_empty_map_has_no_ids() -> None:
    empty = IdMap.of(np.empty(0, np.int64), np.empty(0, np.int32))
    assert len(empty) == 0
    assert len(empty.videos_of(np.empty(0, np.int64))) == len(empty.ids_of(np.empty(0, np.int64))) == 0
    with pytest.raises(IntegrityError, match="an id that the list beside it does not"):
        empty.videos_of(np.array([5]))


@pytest.mark.parametrize("change", [1, -1])
@pytest.mark.parametrize("at", [0, 10, -1])
def test_an_id_of_no_video_is_damage(at: int, change: int) -> None:
    some = IdMap.of(*columns({video_key("a"): 20, video_key("b"): 3}))
    asked = some.ids.copy()
    asked[at] += change
    with pytest.raises(IntegrityError, match="an id that the list beside it does not"):
        some.videos_of(asked)


GOOD: dict[str, list[int]] = {"keys": [5, 9], "counts": [2, 1], "ids": [10, 20, 30], "videos": [0, 1, 0]}
BAD: list[tuple[str, list[int], str]] = [
    ("keys", [5], "do not fit each other"),
    ("counts", [2, 1, 1], "do not fit each other"),
    ("counts", [3, 0], "do not fit each other"),
    ("counts", [4, -1], "do not fit each other"),
    ("ids", [10, 20], "do not fit each other"),
    ("ids", [10, 30, 20], "not sorted and unique"),
    ("ids", [10, 20, 20], "not sorted and unique"),
    ("ids", [2**62, -(2**62) - 2, 5], "not sorted and unique"),  # a difference would overflow
    ("counts", [1, 1], "missing"),
    ("counts", [1, 2], "missing"),
    ("videos", [0, 1, 1], "missing"),
    ("videos", [0, 1, 2], "missing"),
    ("videos", [0, 1, -1], "negative"),
]


@pytest.mark.parametrize(("name", "values", "message"), BAD)
def test_columns_that_do_not_fit_each_other_are_refused(name: str, values: list[int], message: str) -> None:
    types = {"keys": np.int64, "counts": np.int32, "ids": np.int64, "videos": np.int32}
    IdMap(**{column: np.array(given, types[column]) for column, given in GOOD.items()})
    spoilt = {column: np.array(given, types[column]) for column, given in {**GOOD, name: values}.items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        IdMap(**spoilt)


def test_two_moments_with_one_id_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two videos of one key have the same ids; so have two whose ids collide."""
    with pytest.raises(ValueError, match="not sorted and unique"):
        IdMap.of(np.array([4, 4]), np.array([1, 1], np.int32))
    monkeypatch.setattr(id_map, "moment_ids", lambda keys, counts: np.array([3, 8, 3]))
    with pytest.raises(ValueError, match="not sorted and unique"):
        IdMap.of(np.array([4, 5]), np.array([1, 2], np.int32))
