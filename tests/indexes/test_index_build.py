"""Building: against exhaustive search, with hard questions, with bad input, with a full disk."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from indexes import build
from indexes.build import CANDIDATES, INDEX_FILE, RECALL_GOAL, Chunks, IndexReport, Probes, build_index
from indexes.generations import read_sidecar, write_sidecar
from indexes.id_map import IdMap, moment_ids
from indexes.plan import IndexPlan, plan_index
from pipeline.errors import FinecoError, IntegrityError
from pipeline.types import Float32, Int64
from small_galleries import unit

ROOT = Path(__file__).parents[2]
DIM = 32
NOTHING = Probes(np.empty((0, DIM), np.float32), [], "none")


@dataclass(frozen=True)
class Moments:
    """Moments of some videos, in the order in which they come: not sorted by anything."""

    id_map: IdMap
    ids: Int64
    vectors: Float32

    def chunks(self, size: int = 700) -> Chunks:
        return in_chunks(self.ids, self.vectors, size)

    def plan(self, **more: Any) -> IndexPlan:
        return plan_index(len(self.id_map.keys), len(self.ids), DIM, **more)

    def ivf_plan(self, code: str, nlist: int = 16, nprobe: int = 1) -> IndexPlan:
        """A plan for fewer vectors than `plan_index` would cut into cells."""
        n_videos, n = len(self.id_map.keys), len(self.ids)
        return IndexPlan(f"IVF{nlist},{code}", n_videos, n, DIM, 0, nlist, nprobe, n, None, "test")

    @cached_property
    def video_of(self) -> dict[int, int]:
        """The video of every id, video by video."""
        videos = range(len(self.id_map.keys))
        return {identifier: v for v in videos for identifier in self.id_map.ids_of(np.array([v])).tolist()}

    def videos_by_cosine(self, query: Float32) -> list[int]:
        """All videos, by their nearest moments, in plain steps."""
        cosines = self.vectors.astype(np.float64) @ query.astype(np.float64)
        ids = self.ids[np.argsort(-cosines, kind="stable")].tolist()
        return list(dict.fromkeys(self.video_of[identifier] for identifier in ids))

    def probes(self, n: int, rank: int = 0, noise: float = 1.0) -> Probes:
        """Questions beside moments here and there, whose right answer is the video of this rank among all."""
        rng = np.random.default_rng(99)
        rows = np.linspace(0, len(self.ids) - 1, n).astype(int)
        asked = unit(self.vectors[rows] + noise * unit(rng.standard_normal((n, DIM))))
        return Probes(asked, [np.array([self.videos_by_cosine(query)[rank]], np.int32) for query in asked], "tests")


def make_moments(n: int, clusters: int = 0, per_video: int = 3) -> Moments:
    """Unit rows around so many centres, or without any structure (0), of videos of up to `per_video` moments each."""
    rng = np.random.default_rng(n)
    rows = rng.standard_normal((n, DIM))
    if clusters:
        rows = 2 * rng.standard_normal((clusters, DIM))[rng.integers(0, clusters, n)] + 0.3 * rows
    counts = np.array([min(per_video, n - first) for first in range(0, n, per_video)], np.int32)
    keys = rng.permutation(len(counts)).astype(np.int64) * 3 + 2**60 + 1
    ids = moment_ids(keys, counts)
    return Moments(IdMap.of(keys, counts), ids, unit(rows))


def in_chunks(ids: Int64, vectors: Float32, size: int = 700) -> Chunks:
    return lambda: ((ids[i : i + size], vectors[i : i + size]) for i in range(0, len(ids), size))


def make_index(
    moments: Moments,
    folder: Path,
    plan: IndexPlan | None = None,
    probes: Probes = NOTHING,
    say: Callable[[str], None] = lambda line: None,
    recall_goal: float = RECALL_GOAL,
) -> IndexReport:
    return build_index(plan or moments.plan(), moments.chunks(), moments.id_map, probes, folder, say, recall_goal)


def read_file(folder: Path) -> Any:
    return faiss.read_index(str(folder / INDEX_FILE))


def nearest_ids(moments: Moments, query: Float32, k: int) -> list[int]:
    cosines = moments.vectors.astype(np.float64) @ query.astype(np.float64)
    found: list[int] = moments.ids[np.argsort(-cosines)[:k]].tolist()
    return found


def found_slowly(moments: Moments, folder: Path, probes: Probes, candidates: int) -> int:
    """For how many questions the file, as it lies there, has the right video among the first candidates."""
    index = read_file(folder)
    n_found = 0
    for query, right in zip(probes.vectors, probes.right, strict=True):
        scores, ids = index.search(query[None], index.ntotal)
        best: dict[int, float] = {}
        for identifier, score in zip(ids[0].tolist(), scores[0].tolist(), strict=True):
            if identifier >= 0:
                video = moments.video_of[identifier]
                best[video] = max(score, best.get(video, -np.inf))
        first = sorted(best, key=lambda video: -best[video])[:candidates]
        n_found += bool(set(right.tolist()) & set(first))
    return n_found


# ----------------------------------------------------------------------------------------------- what is in the file


def test_flat_finds_what_exhaustive_search_finds(tmp_path: Path) -> None:
    moments = make_moments(1500)
    probes = moments.probes(40)
    report = make_index(moments, tmp_path, probes=probes)
    index = read_file(tmp_path)
    for query in probes.vectors:
        assert index.search(query[None], 10)[1][0].tolist() == nearest_ids(moments, query, 10)
    assert (report.factory, report.n_videos, report.n_vectors, report.dim) == ("Flat", 500, 1500, DIM)
    assert (report.nprobe, report.candidates) == (0, CANDIDATES)
    assert (report.n_probes, report.n_found, report.probes, report.recall) == (40, 40, "tests", 1.0)
    assert report.n_bytes == (tmp_path / INDEX_FILE).stat().st_size


def test_ivf_looking_into_every_cell_finds_what_exhaustive_search_finds(tmp_path: Path) -> None:
    moments = make_moments(1500)
    make_index(moments, tmp_path, moments.ivf_plan("Flat", nprobe=16))
    index = read_file(tmp_path)
    for query in moments.probes(40).vectors:
        assert index.search(query[None], 10)[1][0].tolist() == nearest_ids(moments, query, 10)


def test_the_report_reads_as_a_line(tmp_path: Path) -> None:
    moments = make_moments(100)
    report = make_index(moments, tmp_path, probes=moments.probes(7))
    report = replace(report, n_bytes=12_345_678, seconds=1.25)
    assert report.describe() == (
        "Index built: Flat, 100 moments of 34 videos, 12.3 MB, 1.2 s; of 7 questions (tests) it finds 7 that an "
        "exhaustive search finds first (34 of 34 videos a question)"
    )
    assert "(5 cells and 100 of 1000 videos a question)" in replace(report, nprobe=5, n_videos=1000).describe()
    assert report.to_json()["n_found"] == 7


# ------------------------------------------------------------------------------------------------------------ recall


@pytest.mark.parametrize("code", ["Flat", "SQ8", "RaBitQ"])
def test_the_stored_recall_is_the_recall_of_the_stored_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    monkeypatch.setattr(build, "CANDIDATES", 3)
    moments = make_moments(2000)
    probes = moments.probes(60)
    report = make_index(moments, tmp_path, moments.ivf_plan(code, nprobe=3), probes, recall_goal=0.0)
    assert (report.nprobe, report.candidates, report.n_probes) == (3, 3, 60)
    assert report.n_found == found_slowly(moments, tmp_path, probes, 3)
    assert report.recall == report.n_found / 60
    assert 0.1 < report.recall < 0.9


@pytest.mark.parametrize("code", ["Flat", "SQ8", "RaBitQ"])
def test_what_the_report_says_after_adding_cells_and_candidates_is_true(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    monkeypatch.setattr(build, "CANDIDATES", 3)
    moments = make_moments(2000)
    probes = moments.probes(60)
    report = make_index(moments, tmp_path, moments.ivf_plan(code), probes)
    assert report.n_found == found_slowly(moments, tmp_path, probes, report.candidates)
    assert faiss.extract_index_ivf(read_file(tmp_path)).nprobe == report.nprobe
    assert report.recall >= RECALL_GOAL


def test_cells_are_added_until_recall_is_reached_and_no_further(tmp_path: Path) -> None:
    moments, said = make_moments(2000), list[str]()  # without clusters, few cells find little
    probes = moments.probes(60)
    report = make_index(moments, tmp_path, moments.ivf_plan("Flat"), probes, said.append)
    assert report.recall >= RECALL_GOAL
    assert 1 < report.nprobe <= 16
    assert report.candidates == CANDIDATES
    steps = [2**i for i in range(1, 5) if 2**i <= report.nprobe]
    assert [line.partition(", which")[0] for line in said] == [
        f"Recall is below 0.95: a query now takes {nprobe} cells and {CANDIDATES} videos" for nprobe in steps
    ]
    assert said[-1].endswith(f"which finds {report.n_found}.")
    index = read_file(tmp_path)
    faiss.extract_index_ivf(index).nprobe = report.nprobe // 2
    faiss.write_index(index, str(tmp_path / INDEX_FILE))
    assert found_slowly(moments, tmp_path, probes, CANDIDATES) < RECALL_GOAL * 60


def test_a_lower_goal_is_reached_with_fewer_cells_and_a_higher_one_with_more(tmp_path: Path) -> None:
    moments = make_moments(2000)
    probes, said = moments.probes(60), list[str]()
    made = [
        make_index(moments, tmp_path, moments.ivf_plan("Flat"), probes, said.append, goal) for goal in (0.6, 0.95, 1.0)
    ]
    assert [report.recall >= goal for report, goal in zip(made, (0.6, 0.95, 1.0), strict=True)] == [True] * 3
    assert made[0].nprobe < made[1].nprobe <= made[2].nprobe
    assert made[0].recall < 0.95
    assert {line.split(":")[0] for line in said} == {f"Recall is below {goal}" for goal in ("0.6", "0.95", "1")}


def test_nothing_is_added_where_the_first_choice_is_good_enough(tmp_path: Path) -> None:
    moments, said = make_moments(2000, clusters=16), list[str]()
    report = make_index(
        moments, tmp_path, moments.ivf_plan("Flat", nprobe=4), moments.probes(40, noise=0.1), said.append
    )
    assert (report.nprobe, report.candidates, report.n_found) == (4, CANDIDATES, 40)
    assert said == []


@pytest.mark.parametrize(
    ("ranks", "candidates", "n_found"),
    [((0, 99), 100, 40), ((0, 100), 200, 40), ((0, 120, 399), 400, 40), ((0, 120, 250, 500), 800, 40)],
)
def test_candidates_are_added_where_the_right_video_is_not_among_the_nearest(
    tmp_path: Path, ranks: tuple[int, ...], candidates: int, n_found: int
) -> None:
    """As where a video's score by its frames differs from that of its moments."""
    moments, said = make_moments(3000), list[str]()
    parts = [moments.probes(40 // len(ranks), rank) for rank in ranks]
    probes = Probes(np.concatenate([p.vectors for p in parts]), [right for p in parts for right in p.right], "tests")
    report = make_index(moments, tmp_path, probes=probes, say=said.append)
    assert (report.nprobe, report.candidates) == (0, candidates)
    assert report.n_found == len(probes.right) == found_slowly(moments, tmp_path, probes, candidates)
    assert [line.split()[8:10] for line in said] == [[str(100 * 2**i), "videos,"] for i in range(1, len(said) + 1)]
    assert candidates == 100 * 2 ** len(said)


def test_cells_come_first_and_candidates_after_them(tmp_path: Path) -> None:
    moments, said = make_moments(2000), list[str]()
    report = make_index(moments, tmp_path, moments.ivf_plan("Flat"), moments.probes(60, rank=101), said.append)
    assert (report.nprobe, report.candidates) == (16, 200)
    assert report.n_found == 60
    assert "16 cells and 200 videos, which finds 60" in said[-1]
    assert f"2 cells and {CANDIDATES} videos" in said[0]
    generation = tmp_path
    write_sidecar(generation, report, "f" * 32, "uniform", {})
    assert read_sidecar(generation).report == report
    assert faiss.extract_index_ivf(read_file(generation)).nprobe == 16


def test_candidates_are_not_more_than_a_search_can_bear_and_the_rest_is_said(tmp_path: Path) -> None:
    moments, said = make_moments(3000, per_video=1), list[str]()
    parts = [moments.probes(10, rank) for rank in (0, 150, 350, 750, 2000)]
    probes = Probes(np.concatenate([p.vectors for p in parts]), [right for p in parts for right in p.right], "tests")
    report = make_index(moments, tmp_path, probes=probes, say=said.append)
    assert (report.candidates, report.n_found) == (build.MOST_CANDIDATES, 40)
    assert len(said) == 4
    assert said[-1] == "Recall is below 0.95: this index finds 40 of 50."  # more memory would not help a flat one


def test_cells_are_not_added_when_the_code_is_what_limits_recall(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the line says what would help."""
    monkeypatch.setattr(build, "CANDIDATES", 2)
    monkeypatch.setattr(build, "MOST_CANDIDATES", 4)
    moments, said = make_moments(2000, clusters=16), list[str]()
    probes = moments.probes(60)
    report = make_index(moments, tmp_path, moments.ivf_plan("RaBitQ"), probes, said.append)
    assert report.recall < RECALL_GOAL
    assert report.nprobe < 16
    assert report.candidates == 4
    assert faiss.extract_index_ivf(read_file(tmp_path)).nprobe == report.nprobe
    assert report.n_found == found_slowly(moments, tmp_path, probes, report.candidates)
    assert said[-1] == (
        f"Recall is below 0.95: this index finds {report.n_found} of 60; with more memory (--memory) it could be finer."
    )


def test_any_of_several_equal_answers_is_right(tmp_path: Path) -> None:
    """Copies of one video: an index may propose whichever."""
    moments = make_moments(600, per_video=2)
    probes = moments.probes(30)
    worst = [np.array([moments.videos_by_cosine(query)[-1]], np.int32) for query in probes.vectors]
    both = [np.concatenate([wrong, right]) for wrong, right in zip(worst, probes.right, strict=True)]
    assert make_index(moments, tmp_path, probes=Probes(probes.vectors, both, "tests")).n_found == 30
    report = make_index(moments, tmp_path, probes=Probes(probes.vectors, worst, "tests"), recall_goal=0.0)
    assert (report.n_found, report.recall) == (0, 0.0)


def test_where_twice_as_many_candidates_find_nothing_new_all_that_there_may_be_are_tried(tmp_path: Path) -> None:
    """What is right may lie behind hundreds of videos that are nearer by one moment."""
    moments, said = make_moments(600, per_video=2), list[str]()
    report = make_index(moments, tmp_path, probes=moments.probes(30, rank=290), say=said.append)
    assert (report.candidates, report.n_found) == (300, 30)
    assert said == ["Recall is below 0.95: a query now takes 300 videos, which finds 30."]


@pytest.mark.parametrize("factory", ["Flat", "IVF"])
def test_questions_about_a_sample_of_the_videos_are_asked_of_that_sample(tmp_path: Path, factory: str) -> None:
    """With as large a share of the candidates as it is of the videos."""
    moments = make_moments(2000, per_video=2)
    n, rng = 250, np.random.default_rng(3)
    sample = moments.id_map.ids_of(np.arange(n))
    rows = np.flatnonzero(np.isin(moments.ids, sample))
    asked = unit(moments.vectors[rows[:40]] + 2 * unit(rng.standard_normal((40, DIM))))
    cosines = asked @ moments.vectors[rows].T
    of_row = moments.id_map.videos_of(moments.ids[rows])
    best = np.stack([[row[of_row == video].max() for video in range(n)] for row in cosines])
    order = np.argsort(-best, axis=1)
    plan = moments.plan() if factory == "Flat" else moments.ivf_plan("Flat", nprobe=16)
    for rank, n_found in ((0, 40), (24, 40), (25, 0)):  # a quarter of the videos: 25 of 100 candidates
        right = [row[rank : rank + 1].astype(np.int32) for row in order]
        report = make_index(moments, tmp_path, plan, Probes(asked, right, "tests", n), recall_goal=0.0)
        assert (report.n_found, report.candidates) == (n_found, CANDIDATES)


def test_without_questions_nothing_is_missed(tmp_path: Path) -> None:
    moments, said = make_moments(500), list[str]()
    for plan in (moments.plan(), moments.ivf_plan("Flat")):
        report = make_index(moments, tmp_path, plan, NOTHING, said.append)
        assert (report.n_probes, report.n_found, report.recall) == (0, 0, 1.0)
        assert (report.nprobe, report.candidates) == (plan.nprobe, CANDIDATES)
    assert said == []


# ------------------------------------------------------------------------------------------------- size and sameness


def test_a_gpu_that_refuses_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(index: object) -> object:
        asked.append(index)
        raise RuntimeError("Error: 'err == cudaSuccess' failed: out of memory")

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", refuse)
    moments = make_moments(1000)
    assert make_index(moments, tmp_path, moments.ivf_plan("Flat")).n_vectors == 1000
    assert len(asked) == 1


@pytest.mark.parametrize("memory_bytes", [10**9, 350_000, 1])
def test_the_planned_size_is_the_size_of_the_file_and_of_the_list_beside_it(tmp_path: Path, memory_bytes: int) -> None:
    moments = make_moments(5000, clusters=50)
    plan = moments.plan(memory_bytes=memory_bytes, kind="ivf")
    report = make_index(moments, tmp_path, plan)
    listed = moments.id_map.ids.nbytes + moments.id_map.videos.nbytes
    assert report.n_bytes + listed == pytest.approx(plan.n_bytes, rel=0.05)
    code = {10**9: "Flat", 350_000: "SQ8", 1: "RaBitQ"}[memory_bytes]
    assert plan.factory.endswith(f",{code}")


def test_the_same_vectors_make_the_same_file(tmp_path: Path) -> None:
    moments = make_moments(2000, clusters=16)
    plan, probes = moments.ivf_plan("SQ8"), moments.probes(20)
    for name, size in (("a", 300), ("b", 1000)):
        build_index(plan, moments.chunks(size), moments.id_map, probes, tmp_path / name)
    assert (tmp_path / "a" / INDEX_FILE).read_bytes() == (tmp_path / "b" / INDEX_FILE).read_bytes()


def test_an_index_of_nothing_can_be_built(tmp_path: Path) -> None:
    nothing = IdMap.of(np.empty(0, np.int64), np.empty(0, np.int32))
    report = build_index(plan_index(0, 0, DIM), lambda: [], nothing, NOTHING, tmp_path)
    assert (report.n_videos, report.n_vectors, report.recall, report.n_probes) == (0, 0, 1.0, 0)
    moments = make_moments(3)
    report = make_index(moments, tmp_path, probes=moments.probes(3))
    assert (report.n_videos, report.n_vectors, report.recall, report.n_probes) == (1, 3, 1.0, 3)


# --------------------------------------------------------------------------------------------------------- bad input


def spoil(change: Callable[[Int64, Float32], tuple[Int64, Float32]]) -> Chunks:
    moments = make_moments(1000)
    return in_chunks(*change(moments.ids, moments.vectors), size=300)


def set_row(row: int, value: float) -> Callable[[Int64, Float32], tuple[Int64, Float32]]:
    def change(ids: Int64, vectors: Float32) -> tuple[Int64, Float32]:
        vectors[row] = value
        return ids, vectors

    return change


def set_id(row: int, value: Callable[[Int64], int]) -> Callable[[Int64, Float32], tuple[Int64, Float32]]:
    def change(ids: Int64, vectors: Float32) -> tuple[Int64, Float32]:
        ids[row] = value(ids)
        return ids, vectors

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_row(999, np.nan), "unit"),
        (set_row(500, np.inf), "unit"),
        (set_row(0, 0.0), "unit"),
        (set_row(0, 1.0), "unit"),
        (set_id(1, lambda ids: int(ids[0])), "the id"),
        (set_id(999, lambda ids: int(ids[0])), "the id"),
        (set_id(3, lambda ids: -1), "negative"),
        (set_id(3, lambda ids: int(ids[3]) + 1), "not those of the list of moments"),
        (lambda ids, vectors: (ids, np.ascontiguousarray(vectors[:, :-1])), "shape"),
        (lambda ids, vectors: (ids, vectors.astype(np.float64)), "float64"),
        (lambda ids, vectors: (ids.astype(np.int32), vectors), "int32"),
        (lambda ids, vectors: (ids[:-1], vectors[:-1]), "999 vectors came for an index planned for 1000"),
        (lambda ids, vectors: (ids[:0], vectors[:0]), "0 vectors came"),
    ],
)
def test_bad_vectors_are_refused_before_anything_is_written(
    tmp_path: Path, change: Callable[[Int64, Float32], tuple[Int64, Float32]], message: str
) -> None:
    moments = make_moments(1000)
    for plan in (moments.plan(), moments.ivf_plan("Flat")):
        with pytest.raises(IntegrityError, match=message):
            build_index(plan, spoil(change), moments.id_map, NOTHING, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_list_of_other_moments_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    moments = make_moments(1000)
    keys, counts = moments.id_map.keys, moments.id_map.counts
    one_more, one_fewer = counts.copy(), counts.copy()
    one_more[5] += 1
    one_fewer[7] -= 1
    others = [
        IdMap.of(keys + 1, counts),
        IdMap.of(keys, one_more),
        IdMap.of(keys, one_fewer),
        IdMap.of(keys, one_more + one_fewer - counts),  # as many moments, but of other videos
        IdMap.of(keys[1:], counts[1:]),
        IdMap.of(np.empty(0, np.int64), np.empty(0, np.int32)),
    ]
    for other in others:
        with pytest.raises(IntegrityError, match="not those of the list of moments"):
            build_index(moments.plan(), moments.chunks(), other, NOTHING, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_more_vectors_than_planned_are_refused(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="1000 vectors came for an index planned for 900"):
        make_index(make_moments(1000), tmp_path, plan_index(300, 900, DIM))


def test_vectors_that_change_between_the_passes_are_refused(tmp_path: Path) -> None:
    moments = make_moments(1000)
    passes = iter([moments.ids, moments.ids[::-1].copy(), moments.ids])
    with pytest.raises(IntegrityError, match="changed while"):
        build_index(
            moments.plan(), lambda: in_chunks(next(passes), moments.vectors)(), moments.id_map, NOTHING, tmp_path
        )


@pytest.mark.fault
@pytest.mark.parametrize("n_vectors", [10, 20_000])  # the small one fails only when FAISS would close the file
def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path, n_vectors: int) -> None:
    script = f"""
import resource, sys
from pathlib import Path
import numpy as np
from indexes.build import Probes, build_index
from indexes.id_map import IdMap, moment_ids
from indexes.plan import plan_index
from pipeline.errors import FinecoError
keys, counts = np.arange({n_vectors} // 2), np.full({n_vectors} // 2, 2, np.int32)
vectors = np.random.default_rng(0).standard_normal(({n_vectors}, {DIM}))
vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    plan = plan_index({n_vectors} // 2, {n_vectors}, {DIM}, kind="flat")
    probes = Probes(np.empty((0, {DIM}), np.float32), [], "none")
    ids = moment_ids(keys, counts)
    build_index(plan, lambda: [(ids, vectors)], IdMap.of(keys, counts), probes, Path(sys.argv[1]))
except FinecoError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert f"cannot write {tmp_path / INDEX_FILE}: File too large" in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_faiss_refuses_is_one_clear_line(tmp_path: Path) -> None:
    moments = make_moments(100)
    moments = make_moments(100)
    with pytest.raises(FinecoError, match=r"^FAISS could not build IVF16,NoSuchCode: could not parse [^\n]*$"):
        make_index(moments, tmp_path, moments.ivf_plan("NoSuchCode"))
