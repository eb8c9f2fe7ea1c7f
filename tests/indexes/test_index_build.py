"""Building: against exact search, with bad input, with a full disk."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import pytest

from indexes import build
from indexes.build import INDEX_FILE, build_index, recall_queries
from indexes.exact import Chunks, Ids, exact_top_k
from indexes.plan import IndexPlan, plan_index
from pipeline.errors import FinecoError, IntegrityError
from pipeline.types import Float32

ROOT = Path(__file__).parents[2]
DIM = 32


def make_vectors(n: int, clusters: int = 0, dim: int = DIM) -> tuple[Ids, Float32]:
    """Ids above 2**53, and unit rows: around so many centres, or without any structure (0)."""
    rng = np.random.default_rng(n)
    rows = rng.standard_normal((n, dim))
    if clusters:
        rows = 2 * rng.standard_normal((clusters, dim))[rng.integers(0, clusters, n)] + 0.3 * rows
    ids = rng.permutation(np.arange(n, dtype=np.int64) * 3 + 2**60 + 1)
    return ids, (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def in_chunks(ids: Ids, vectors: Float32, size: int = 700) -> Chunks:
    return lambda: ((ids[i : i + size], vectors[i : i + size]) for i in range(0, len(ids), size))


def ivf_plan(code: str, n: int, nlist: int = 16, nprobe: int = 1) -> IndexPlan:
    """A plan for fewer vectors than `plan_index` would cut into cells."""
    return IndexPlan(f"IVF{nlist},{code}", n, DIM, 0, nlist, nprobe, n, None, "test")


def search_file(folder: Path, queries: Float32, k: int, nprobe: int = 0) -> Ids:
    index = faiss.read_index(str(folder / INDEX_FILE))
    if nprobe:
        faiss.extract_index_ivf(index).nprobe = nprobe
    found: Ids = index.search(queries, k)[1]
    return found


def test_flat_finds_what_exact_search_finds(tmp_path: Path) -> None:
    ids, vectors = make_vectors(1500)
    report = build_index(plan_index(1500, DIM), in_chunks(ids, vectors), tmp_path)
    queries = recall_queries(vectors[:40])
    wanted, _ = exact_top_k(queries, [(ids, vectors)], 10)
    np.testing.assert_array_equal(search_file(tmp_path, queries, 10), wanted)
    assert (report.factory, report.n_vectors, report.dim, report.nprobe) == ("Flat", 1500, DIM, 0)
    assert (report.recall_at_10, report.n_recall_queries) == (1.0, 256)
    assert report.n_bytes == (tmp_path / INDEX_FILE).stat().st_size


def test_ivf_looking_into_every_cell_finds_what_exact_search_finds(tmp_path: Path) -> None:
    ids, vectors = make_vectors(1500)
    build_index(ivf_plan("Flat", 1500, nprobe=16), in_chunks(ids, vectors), tmp_path)
    queries = recall_queries(vectors[:40])
    wanted, _ = exact_top_k(queries, [(ids, vectors)], 10)
    np.testing.assert_array_equal(search_file(tmp_path, queries, 10, nprobe=16), wanted)


@pytest.mark.parametrize("code", ["Flat", "SQ8", "RaBitQ"])
def test_the_stored_recall_is_the_recall_of_the_stored_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    monkeypatch.setattr(build, "RECALL_GOAL", 0.0)
    ids, vectors = make_vectors(2000)
    plan = ivf_plan(code, 2000, nprobe=2)
    report = build_index(plan, in_chunks(ids, vectors), tmp_path)
    queries = recall_queries(build._survey(plan, in_chunks(ids, vectors))[1][: build.RECALL_QUERIES])
    wanted, _ = exact_top_k(queries, [(ids, vectors)], 10)
    found = search_file(tmp_path, queries, 10, report.nprobe)
    hits = sum(len(set(f) & set(w)) for f, w in zip(found.tolist(), wanted.tolist(), strict=True))
    assert 0.1 < report.recall_at_10 < 0.9
    assert report.recall_at_10 == pytest.approx(hits / wanted.size, abs=1e-4)


def test_cells_are_added_until_recall_is_reached(tmp_path: Path) -> None:
    ids, vectors = make_vectors(2000)  # without clusters, few cells find little
    report = build_index(ivf_plan("Flat", 2000), in_chunks(ids, vectors), tmp_path)
    assert report.recall_at_10 >= build.RECALL_GOAL
    assert 1 < report.nprobe <= 16


def test_cells_are_not_added_when_the_code_is_what_limits_recall(tmp_path: Path) -> None:
    ids, vectors = make_vectors(2000, clusters=16)
    report = build_index(ivf_plan("RaBitQ", 2000), in_chunks(ids, vectors), tmp_path)
    assert report.recall_at_10 < build.RECALL_GOAL
    assert report.nprobe < 16
    assert faiss.extract_index_ivf(faiss.read_index(str(tmp_path / INDEX_FILE))).nprobe == report.nprobe


def test_a_gpu_that_refuses_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(index: object) -> object:
        asked.append(index)
        raise RuntimeError("Error: 'err == cudaSuccess' failed: out of memory")

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", refuse)
    assert build_index(ivf_plan("Flat", 1000), in_chunks(*make_vectors(1000)), tmp_path).n_vectors == 1000
    assert len(asked) == 1


def test_copies_of_one_video_do_not_count_against_recall(tmp_path: Path) -> None:
    ids, vectors = make_vectors(600)
    vectors[::2] = vectors[0]  # 300 copies: more than are told apart, so that queries beside them do not count
    vectors[1:100:2] = vectors[1]  # 50 copies
    report = build_index(plan_index(600, DIM), in_chunks(ids, vectors), tmp_path)
    assert report.recall_at_10 == 1.0
    assert 60 < report.n_recall_queries < 200


@pytest.mark.parametrize("memory_bytes", [10**9, 300_000, 1])
def test_the_planned_size_is_the_size_of_the_file(tmp_path: Path, memory_bytes: int) -> None:
    ids, vectors = make_vectors(5000, clusters=50)
    plan = plan_index(5000, DIM, memory_bytes, "ivf")
    report = build_index(plan, in_chunks(ids, vectors), tmp_path)
    assert report.n_bytes == pytest.approx(plan.n_bytes, rel=0.05)


def test_the_same_vectors_make_the_same_file(tmp_path: Path) -> None:
    ids, vectors = make_vectors(2000, clusters=16)
    for name in ("a", "b"):
        build_index(ivf_plan("SQ8", 2000), in_chunks(ids, vectors, size=300 if name == "a" else 1000), tmp_path / name)
    assert (tmp_path / "a" / INDEX_FILE).read_bytes() == (tmp_path / "b" / INDEX_FILE).read_bytes()


def test_an_index_of_nothing_can_be_built(tmp_path: Path) -> None:
    report = build_index(plan_index(0, DIM), lambda: [], tmp_path)
    assert (report.n_vectors, report.recall_at_10, report.n_recall_queries) == (0, 1.0, 0)
    report = build_index(plan_index(3, DIM), in_chunks(*make_vectors(3)), tmp_path)
    assert (report.n_vectors, report.recall_at_10, report.n_recall_queries) == (3, 1.0, 3)


def spoil(change: Callable[[Ids, Float32], tuple[Ids, Float32]]) -> Chunks:
    return in_chunks(*change(*make_vectors(1000)), size=300)


def set_row(row: int, value: float) -> Callable[[Ids, Float32], tuple[Ids, Float32]]:
    def change(ids: Ids, vectors: Float32) -> tuple[Ids, Float32]:
        vectors[row] = value
        return ids, vectors

    return change


def set_id(row: int, value: Callable[[Ids], int]) -> Callable[[Ids, Float32], tuple[Ids, Float32]]:
    def change(ids: Ids, vectors: Float32) -> tuple[Ids, Float32]:
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
        (lambda ids, vectors: (ids, np.ascontiguousarray(vectors[:, :-1])), "shape"),
        (lambda ids, vectors: (ids, vectors.astype(np.float64)), "float64"),
        (lambda ids, vectors: (ids.astype(np.int32), vectors), "int32"),
        (lambda ids, vectors: (ids[:-1], vectors[:-1]), "999 vectors came for an index planned for 1000"),
        (lambda ids, vectors: (ids[:0], vectors[:0]), "0 vectors came"),
    ],
)
def test_bad_vectors_are_refused_before_anything_is_written(
    tmp_path: Path, change: Callable[[Ids, Float32], tuple[Ids, Float32]], message: str
) -> None:
    for plan in (plan_index(1000, DIM), ivf_plan("Flat", 1000)):
        with pytest.raises(IntegrityError, match=message):
            build_index(plan, spoil(change), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_more_vectors_than_planned_are_refused(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="1000 vectors came for an index planned for 900"):
        build_index(plan_index(900, DIM), in_chunks(*make_vectors(1000)), tmp_path)


def test_vectors_that_change_between_the_passes_are_refused(tmp_path: Path) -> None:
    ids, vectors = make_vectors(1000)
    passes = iter([ids, ids[::-1].copy(), ids])
    with pytest.raises(IntegrityError, match="changed while"):
        build_index(plan_index(1000, DIM), lambda: in_chunks(next(passes), vectors)(), tmp_path)


@pytest.mark.fault
@pytest.mark.parametrize("n_vectors", [10, 20_000])  # the small one fails only when FAISS would close the file
def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path, n_vectors: int) -> None:
    script = f"""
import resource, sys
from pathlib import Path
import numpy as np
from indexes.build import build_index
from indexes.plan import plan_index
from pipeline.errors import FinecoError
vectors = np.random.default_rng(0).standard_normal(({n_vectors}, {DIM}))
vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    plan = plan_index({n_vectors}, {DIM}, kind="flat")
    build_index(plan, lambda: [(np.arange({n_vectors}), vectors)], Path(sys.argv[1]))
except FinecoError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert f"cannot write {tmp_path / INDEX_FILE}: File too large" in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_faiss_refuses_is_one_clear_line(tmp_path: Path) -> None:
    plan = IndexPlan("IVF16,NoSuchCode", 100, DIM, 0, 16, 1, 100, None, "test")
    with pytest.raises(FinecoError, match=r"^FAISS could not build IVF16,NoSuchCode: could not parse [^\n]*$"):
        build_index(plan, in_chunks(*make_vectors(100)), tmp_path)
