"""Which videos an index proposes: against comparing a query with every moment, however the moments are spread."""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from indexes import candidates
from indexes.candidates import MOMENTS_PER_VIDEO, MomentSearch, propose_videos, search_index
from indexes.id_map import IdMap, moment_ids
from pipeline.errors import IntegrityError
from pipeline.types import Float32, Int64

DIM = 16
NLIST = 8
KINDS = ["Flat", "IVF"]
CODES = ["Flat", f"IVF{NLIST},Flat", f"IVF{NLIST},SQ8", f"IVF{NLIST},RaBitQ"]


def unit(rows: Any) -> Float32:
    rows_of_one: Float32 = (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)
    return rows_of_one


def random_rows(n: int, seed: int) -> Float32:
    return unit(np.random.default_rng(seed).standard_normal((n, DIM)))


def beside(query: Float32, cosine: float, n: int, seed: int = 0) -> Float32:
    """(n, D) unit rows of nearly this cosine with the query, each in another direction from it."""
    rows = np.random.default_rng(seed).standard_normal((n, DIM))
    away = unit(rows - np.outer(rows @ query, query))
    return unit(cosine * query + np.sqrt(1 - cosine**2) * away)


class Moments:
    """Moments of some videos (a list of (M, D) rows), and an index of them."""

    def __init__(self, videos: list[Float32], kind: str = "Flat") -> None:
        self.videos = videos
        keys = np.random.default_rng(1).permutation(len(videos)).astype(np.int64)
        counts = np.array([len(rows) for rows in videos], np.int32)
        self.id_map, self.ids = IdMap.of(keys, counts), moment_ids(keys, counts)
        self.vectors: Float32 = np.concatenate([np.empty((0, DIM), np.float32), *videos])
        factory = {"Flat": "IDMap,Flat", "IVF": f"IVF{NLIST},Flat"}.get(kind, kind)
        self.index: Any = faiss.index_factory(DIM, factory, faiss.METRIC_INNER_PRODUCT)
        if factory.startswith("IVF"):
            ivf: Any = faiss.extract_index_ivf(self.index)
            ivf.cp.min_points_per_centroid = 1  # no word of there being few
            self.index.train(random_rows(500, 2))
            ivf.nprobe = NLIST
        if len(self.vectors):
            self.index.add_with_ids(self.vectors, self.ids)

    @property
    def search(self) -> MomentSearch:
        return lambda *given: search_index(self.index, *given)

    def propose(self, queries: Float32, n: int) -> list[tuple[NDArray[np.int32], Float32]]:
        return propose_videos(self.search, self.id_map, queries, n)

    def slowly(self, query: Float32, n: int) -> list[tuple[float, int]]:
        """Of every video the cosine of its best moment, the best `n` first."""
        best = [(max(float(row.astype(np.float64) @ query) for row in rows), v) for v, rows in enumerate(self.videos)]
        return sorted(best, reverse=True)[:n]


def check(moments: Moments, queries: Float32, n: int) -> None:
    """What is proposed is what comparing with every moment says; of equal videos any."""
    proposed = moments.propose(queries, n)
    assert len(proposed) == len(queries)
    for query, (videos, cosines) in zip(queries, proposed, strict=True):
        wanted = moments.slowly(query, len(moments.videos))
        of_video = {video: cosine for cosine, video in wanted}
        assert videos.dtype == np.int32 and cosines.dtype == np.float32
        assert len(set(videos.tolist())) == len(videos) == min(n, len(moments.videos))
        np.testing.assert_allclose(cosines, [cosine for cosine, _ in wanted[:n]], atol=1e-6)
        np.testing.assert_allclose(cosines, [of_video[v] for v in videos.tolist()], atol=1e-6)
        assert np.all(np.diff(cosines) <= 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 7, 60, 61, 100])
def test_proposed_are_the_videos_of_the_nearest_moments(n: int, kind: str) -> None:
    rng = np.random.default_rng(n)
    moments = Moments([random_rows(int(rng.integers(1, 30)), 100 + v) for v in range(60)], kind)
    check(moments, random_rows(5, 777), n)


@pytest.mark.parametrize("kind", KINDS)
def test_a_video_of_ten_thousand_like_moments_crowds_nobody_out(kind: str) -> None:
    query = random_rows(1, 777)[0]
    crowd = beside(query, 0.99, 10_000)
    others = [np.concatenate([beside(query, 0.9 - v / 1000, 1, v), random_rows(4, v)]) for v in range(150)]
    moments = Moments([*others[:75], crowd, *others[75:]], kind)
    ((videos, _),) = moments.propose(query[None], 100)
    assert videos.tolist() == [75, *range(75), *range(76, 100)]
    check(moments, query[None], 100)


@pytest.mark.parametrize("kind", KINDS)
def test_several_crowds_crowd_nobody_out(kind: str) -> None:
    query = random_rows(1, 777)[0]
    crowds = [beside(query, 0.99 - v / 1000, 1500, v) for v in range(6)]
    others = [beside(query, 0.9 - v / 400, 1, v) for v in range(60)]
    moments = Moments([*others[:30], *crowds, *others[30:]], kind)
    ((videos, _),) = moments.propose(query[None], 40)
    assert videos.tolist() == [*range(30, 36), *range(30), *range(36, 40)]
    check(moments, np.concatenate([query[None], random_rows(3, 779), -query[None]]), 40)


def test_a_crowd_costs_a_few_searches_and_not_one_for_each_video() -> None:
    query = random_rows(1, 777)[0]
    moments = Moments([beside(query, 0.99 - v / 1000, 1500, v) for v in range(20)])
    asked: list[int] = []

    def counted(queries: Float32, k: int, without: Int64 | None = None) -> list[tuple[Int64, Float32]]:
        asked.append(k)
        return moments.search(queries, k, without)

    ((videos, _),) = propose_videos(counted, moments.id_map, query[None], 20)
    assert len(videos) == 20
    assert asked[0] == 20 * MOMENTS_PER_VIDEO and len(asked) <= 6
    assert max(asked) <= len(moments.id_map)


def test_one_search_is_enough_where_moments_are_spread_well() -> None:
    moments = Moments([random_rows(4, v) for v in range(300)])
    calls: list[int] = []

    def counted(queries: Float32, k: int, without: Int64 | None = None) -> list[tuple[Int64, Float32]]:
        calls.append(len(queries))
        return moments.search(queries, k, without)

    propose_videos(counted, moments.id_map, random_rows(9, 777), 50)
    assert calls == [9]


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_videos_than_asked_for_are_all_of_them(kind: str) -> None:
    moments = Moments([random_rows(3, v) for v in range(5)], kind)
    check(moments, random_rows(2, 777), 100)
    assert Moments([]).propose(random_rows(2, 777), 10)[0][0].tolist() == []
    assert Moments([random_rows(2, 0)]).propose(np.empty((0, DIM), np.float32), 10) == []


@pytest.mark.parametrize("kind", KINDS)
def test_copies_of_one_video_are_all_proposed(kind: str) -> None:
    """Ties: each once, and none takes another's place."""
    rows = random_rows(3, 0)
    moments = Moments([rows] * 30 + [random_rows(3, v) for v in range(1, 20)], kind)
    check(moments, rows[:1], 30)
    assert set(moments.propose(rows[:1], 30)[0][0].tolist()) == set(range(30))
    check(moments, rows[:1], 10)
    check(Moments([rows[:1]] * 40, kind), random_rows(3, 778), 25)
    check(Moments([np.repeat(rows[:1], 500, axis=0)] * 12, kind), random_rows(2, 778), 10)


@settings(max_examples=60, deadline=None)
@given(
    spread=st.lists(st.sampled_from([1, 1, 2, 5, 40, 300]), min_size=1, max_size=12),
    n=st.integers(1, 14),
    levels=st.integers(1, 6),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 99),
)
def test_any_spread_of_moments_gives_the_videos_of_the_nearest(
    spread: list[int], n: int, levels: int, kind: str, seed: int
) -> None:
    """Few different vectors among all, so that many moments are equal, within videos and between them."""
    rng = np.random.default_rng(seed)
    different = random_rows(levels, seed)
    moments = Moments([different[rng.integers(0, levels, count)] for count in spread], kind)
    check(moments, np.concatenate([random_rows(2, seed + 1000), different[:1]]), n)


def test_cells_that_hold_too_few_videos_give_what_they_hold() -> None:
    """And the search for more comes to an end."""
    moments = Moments([random_rows(2, v) for v in range(200)], "IVF")
    faiss.extract_index_ivf(moments.index).nprobe = 1
    query = random_rows(1, 777)
    in_cells = {int(v) for ids, _ in moments.search(query, 400) for v in moments.id_map.videos_of(ids)}
    ((videos, _),) = moments.propose(query, 200)
    assert set(videos.tolist()) == in_cells
    assert 0 < len(in_cells) < 200


def test_an_id_that_the_list_does_not_have_is_damage() -> None:
    moments = Moments([random_rows(2, v) for v in range(5)])
    moments.index.add_with_ids(random_rows(1, 779), np.array([12345]))
    with pytest.raises(IntegrityError, match="the list beside it"):
        moments.propose(random_rows(1, 777), 5)


# ------------------------------------------------------------------------------------------------- one search


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.9, 1.0])
def test_ids_are_left_out_in_every_code(share: float, code: str) -> None:
    moments = Moments([random_rows(20, v) for v in range(30)], "Flat" if code == "Flat" else code)
    queries = random_rows(4, 777)
    everything = search_index(moments.index, queries, 600)
    without = np.random.default_rng(5).permutation(moments.ids)[: int(share * 600)]
    for all_of, (ids, scores) in zip(everything, search_index(moments.index, queries, 600, without), strict=True):
        left = ~np.isin(all_of[0], without)
        assert ids.tolist() == all_of[0][left].tolist()
        np.testing.assert_allclose(scores, all_of[1][left], atol=1e-6)
        assert len(ids) == 600 - len(without)


@pytest.mark.parametrize("code", CODES[1:])
def test_leaving_ids_out_looks_into_as_many_cells(code: str) -> None:
    """FAISS's parameters would say one cell where they say nothing."""
    moments = Moments([random_rows(20, v) for v in range(30)], code)
    queries = random_rows(4, 777)
    for nprobe in (1, 3, NLIST):
        faiss.extract_index_ivf(moments.index).nprobe = nprobe
        everything = search_index(moments.index, queries, 600)
        some = search_index(moments.index, queries, 600, moments.ids[:1])
        for (ids, _), (fewer, _) in zip(everything, some, strict=True):
            assert fewer.tolist() == [i for i in ids.tolist() if i != moments.ids[0]]
        assert (len(everything[0][0]) == 600) == (nprobe == NLIST)


def test_equal_scores_come_by_ascending_id_and_empty_places_not_at_all() -> None:
    moments = Moments([np.repeat(random_rows(1, 0), 8, axis=0)] * 3)
    ((ids, scores),) = search_index(moments.index, random_rows(1, 777), 100)
    assert ids.tolist() == sorted(moments.ids.tolist())
    assert len(set(scores.tolist())) == 1
    assert [len(ids) for ids, _ in search_index(moments.index, random_rows(2, 777), 0)] == [0, 0]


def test_the_first_search_asks_for_several_moments_a_video(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one a video there would be a second search nearly always, of every query on its own."""
    assert candidates.MOMENTS_PER_VIDEO > 1
    moments = Moments([random_rows(5, v) for v in range(40)])
    for per_video, growth in ((1, 2), (1, 10), (50, 2)):
        monkeypatch.setattr(candidates, "MOMENTS_PER_VIDEO", per_video)
        monkeypatch.setattr(candidates, "GROWTH", growth)
        check(moments, random_rows(6, 777), 25)
