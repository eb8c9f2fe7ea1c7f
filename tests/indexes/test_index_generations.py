"""Generations on disk and their search: whole, verified, the right ones; after a kill, the old one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from indexes import generations
from indexes.build import INDEX_FILE, IndexReport, Probes, build_index
from indexes.generations import (
    SIDECAR_FILE,
    current_generation,
    new_generation,
    prune_generations,
    read_sidecar,
    write_sidecar,
)
from indexes.id_map import IdMap, Int32, moment_ids
from indexes.plan import IndexPlan, plan_index
from indexes.search import VectorIndex, stored_ids, stored_vectors
from pipeline.errors import FinecoError, IntegrityError, UsageError
from pipeline.files import seal, write_pointer
from pipeline.types import Float32, Int64
from pipeline.verify import LEAST_COSINE

ROOT = Path(__file__).parents[2]
DIM = 16
FINGERPRINT = "f" * 32
PER_VIDEO = 3


def keys_and_counts(n: int, seed: int = 0) -> tuple[Int64, Int32]:
    """Videos of `n` moments in all."""
    counts = np.array([min(PER_VIDEO, n - first) for first in range(0, n, PER_VIDEO)], np.int32)
    return np.random.default_rng(seed).permutation(len(counts)).astype(np.int64) + 2**60, counts


def make_vectors(n: int, seed: int = 0) -> tuple[Int64, Float32]:
    rows = np.random.default_rng(seed).standard_normal((n, DIM))
    return moment_ids(*keys_and_counts(n, seed)), (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(
        np.float32
    )


def build(folder: Path, plan: IndexPlan, ids: Int64, vectors: Float32, seed: int = 0) -> IndexReport:
    """An index of moments of the videos that `keys_and_counts` gives, measured with its first three."""
    id_map = IdMap.of(*keys_and_counts(len(ids), seed))
    probes = Probes(vectors[:3], [id_map.videos_of(ids[i : i + 1]) for i in range(len(ids[:3]))], "three moments")
    return build_index(plan, lambda: [(ids, vectors)], id_map, probes, folder)


def plan_of(n: int, factory: str = "Flat", nlist: int = 0) -> IndexPlan:
    """A plan for `n` moments, flat or of so many cells, all of which are looked into."""
    n_videos = -(-n // PER_VIDEO)
    if not nlist:
        return plan_index(n_videos, n, DIM)
    return IndexPlan(factory, n_videos, n, DIM, 0, nlist, nlist, n, None, "test")


def nearest(ids: Int64, vectors: Float32, query: Float32, k: int) -> tuple[list[int], list[float]]:
    """What comparing with every vector finds."""
    cosines = [(float(row.astype(np.float64) @ query), -i) for row, i in zip(vectors, ids.tolist(), strict=True)]
    best = sorted(cosines, reverse=True)[:k]
    return [-negative for _, negative in best], [cosine for cosine, _ in best]


def rewrite(path: Path, content: dict[str, Any]) -> None:
    """Writes a sidecar that says something else, with the right digest of itself."""
    path.write_bytes(seal({name: value for name, value in content.items() if name != "sha256"}))


def publish(folder: Path, n: int = 300, seed: int = 0, nlist: int = 0) -> Path:
    """A new generation of `n` vectors with a lookup file beside the index."""
    with new_generation(folder) as generation:
        report = build(generation, plan_of(n, f"IVF{nlist},Flat", nlist), *make_vectors(n, seed), seed)
        (generation / "videos.h5").write_bytes(b"lookup" * 100)
        write_sidecar(generation, report, FINGERPRINT, "uniform", {"last_commit": 7})
    return current_generation(folder)


def test_a_generation_is_found_again_with_all_it_says(tmp_path: Path) -> None:
    generation = publish(tmp_path / "index")
    sidecar = read_sidecar(generation)
    assert generation.name == "000001"
    assert (sidecar.fingerprint, sidecar.selection, sidecar.extra) == (FINGERPRINT, "uniform", {"last_commit": 7})
    assert sorted(sidecar.files) == [INDEX_FILE, "videos.h5"]
    assert sidecar.files["videos.h5"].size_bytes == 600
    report = sidecar.report
    assert (report.factory, report.n_videos, report.n_vectors, report.dim) == ("Flat", 100, 300, DIM)
    assert (report.nprobe, report.candidates, report.recall) == (0, 100, 1.0)
    assert (report.n_probes, report.n_found, report.probes) == (3, 3, "three moments")
    assert report.n_bytes == sidecar.files[INDEX_FILE].size_bytes


@pytest.mark.parametrize("nlist", [0, 8])
def test_search_finds_what_exhaustive_search_finds_with_large_ids(tmp_path: Path, nlist: int) -> None:
    index = VectorIndex.open(publish(tmp_path, nlist=nlist), FINGERPRINT)
    ids, vectors = make_vectors(300)
    queries = make_vectors(20, seed=1)[1]
    answers = index.search(queries, 7)
    assert len(index) == 300 and len(answers) == 20
    assert ids.max() > 2**62
    for query, (found_ids, found_scores) in zip(queries, answers, strict=True):
        assert found_ids.dtype == np.int64 and found_scores.dtype == np.float32
        row_ids, row_scores = nearest(ids, vectors, query, 7)
        assert found_ids.tolist() == row_ids
        np.testing.assert_allclose(found_scores, row_scores, atol=1e-6)


@pytest.mark.parametrize("nlist", [0, 8])
def test_search_leaves_out_what_it_is_told_to(tmp_path: Path, nlist: int) -> None:
    """Of the file as it is mapped into memory, too."""
    index = VectorIndex.open(publish(tmp_path, nlist=nlist), FINGERPRINT)
    ids, vectors = make_vectors(300)
    queries, left = make_vectors(5, seed=1)[1], np.arange(300) % 3 != 0
    for query, (found, _) in zip(queries, index.search(queries, 300, ids[~left]), strict=True):
        assert found.tolist() == nearest(ids[left], vectors[left], query, 300)[0]
    assert [len(found) for found, _ in index.search(queries, 300, ids)] == [0] * 5


def test_more_answers_than_vectors_are_all_of_them(tmp_path: Path) -> None:
    index = VectorIndex.open(publish(tmp_path, n=5), FINGERPRINT)
    ((ids, scores),) = index.search(make_vectors(1)[1], 100)
    assert sorted(ids.tolist()) == sorted(make_vectors(5)[0].tolist())
    assert np.all(np.diff(scores) <= 0)


def test_places_that_faiss_cannot_fill_are_left_out(tmp_path: Path) -> None:
    generation = publish(tmp_path, nlist=8)
    sidecar = json.loads((generation / SIDECAR_FILE).read_text())
    sidecar["report"]["nprobe"] = 1  # one cell does not hold 200 vectors
    rewrite(generation / SIDECAR_FILE, sidecar)
    ((ids, scores),) = VectorIndex.open(generation, FINGERPRINT).search(make_vectors(1, seed=1)[1], 200)
    assert 0 < len(ids) == len(scores) < 200
    assert set(ids.tolist()) <= set(make_vectors(300)[0].tolist())
    assert scores.min() >= -1.0


def test_equal_scores_come_by_ascending_id(tmp_path: Path) -> None:
    ids, vectors = make_vectors(50)
    vectors[:] = vectors[0]
    with new_generation(tmp_path) as generation:
        report = build(generation, plan_of(50), ids, vectors)
        write_sidecar(generation, report, FINGERPRINT, "uniform", {})
    ((found, _),) = VectorIndex.open(current_generation(tmp_path), FINGERPRINT).search(vectors[:1], 50)
    assert found.tolist() == sorted(ids.tolist())


def test_an_empty_index_answers_nothing(tmp_path: Path) -> None:
    with new_generation(tmp_path) as generation:
        report = build(generation, plan_of(0), *make_vectors(0))
        write_sidecar(generation, report, FINGERPRINT, "uniform", {})
    answers = VectorIndex.open(current_generation(tmp_path), FINGERPRINT).search(make_vectors(2)[1], 10)
    assert [len(ids) for ids, _ in answers] == [0, 0]


def test_bad_queries_are_refused(tmp_path: Path) -> None:
    index = VectorIndex.open(publish(tmp_path), FINGERPRINT)
    with pytest.raises(UsageError, match="not finite"):
        index.search(np.full((1, DIM), np.nan, np.float32), 5)
    with pytest.raises(UsageError, match=rf"\(1, {DIM + 1}\).*{DIM} dimensions"):
        index.search(np.ones((1, DIM + 1), np.float32), 5)
    with pytest.raises(UsageError, match="dimensions"):
        index.search(np.ones(DIM, np.float32), 5)


def test_another_encoder_is_refused_and_both_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"{'f' * 12}.*{'e' * 12}"):
        VectorIndex.open(publish(tmp_path), "e" * 32)


def test_a_folder_whose_name_is_not_utf8_works(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    assert len(VectorIndex.open(publish(folder), FINGERPRINT)) == 300


def truncate(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip(position: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:position] + bytes([data[position] ^ 0x40]) + data[position + 1 :]


@pytest.mark.fault
@pytest.mark.parametrize("file", [INDEX_FILE, "videos.h5"])
@pytest.mark.parametrize(
    "damage",
    [truncate, lambda data: data[:-1], lambda data: b"", lambda data: data + bytes(100), flip(5), flip(40), flip(500)],
    ids=["half", "last byte", "empty", "tail", "header 5", "header 40", "payload"],
)
def test_a_damaged_file_is_refused_before_faiss_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, damage: Callable[[bytes], bytes]
) -> None:
    generation = publish(tmp_path)
    (generation / file).write_bytes(damage((generation / file).read_bytes()))
    monkeypatch.setattr(faiss, "read_index", lambda *_: pytest.fail("FAISS was given a damaged file"))
    with pytest.raises(IntegrityError, match=file):
        VectorIndex.open(generation, FINGERPRINT)


@pytest.mark.fault
def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    generation = publish(tmp_path)
    (generation / INDEX_FILE).unlink()
    with pytest.raises(IntegrityError, match=INDEX_FILE):
        VectorIndex.open(generation, FINGERPRINT)


@pytest.mark.fault
@pytest.mark.parametrize(("position", "noticed"), [(10, True), (-10, True), (10_000, False)])
def test_of_a_large_file_length_and_ends_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, position: int, noticed: bool
) -> None:
    monkeypatch.setattr(generations, "FULLY_CHECKED_BYTES", 10_000)
    monkeypatch.setattr(generations, "ENDS_BYTES", 1_000)
    generation = publish(tmp_path)
    data = bytearray((generation / INDEX_FILE).read_bytes())
    VectorIndex.open(generation, FINGERPRINT)
    data[position] ^= 0x40
    (generation / INDEX_FILE).write_bytes(data)
    if noticed:
        with pytest.raises(IntegrityError, match="ends"):
            VectorIndex.open(generation, FINGERPRINT)
    else:
        VectorIndex.open(generation, FINGERPRINT)
    (generation / INDEX_FILE).write_bytes(data[:-1])
    with pytest.raises(IntegrityError, match="bytes, its record says"):
        VectorIndex.open(generation, FINGERPRINT)


@pytest.mark.fault
@pytest.mark.parametrize(("field", "value"), [("dim", DIM + 1), ("n_vectors", 299), ("nprobe", 4)])
def test_an_index_that_is_not_what_its_sidecar_says_is_refused(tmp_path: Path, field: str, value: int) -> None:
    generation = publish(tmp_path)
    sidecar = json.loads((generation / SIDECAR_FILE).read_text())
    sidecar["report"][field] = value
    rewrite(generation / SIDECAR_FILE, sidecar)
    with pytest.raises(IntegrityError, match=INDEX_FILE):
        VectorIndex.open(generation, FINGERPRINT)


@pytest.mark.fault
def test_another_metric_is_refused(tmp_path: Path) -> None:
    generation = publish(tmp_path)
    index = faiss.index_factory(DIM, "IDMap,Flat", faiss.METRIC_L2)
    ids, vectors = make_vectors(300)
    index.add_with_ids(vectors, ids)
    faiss.write_index(index, str(generation / INDEX_FILE))
    write_sidecar(generation, read_sidecar(generation).report, FINGERPRINT, "uniform", {})
    with pytest.raises(IntegrityError, match="metric"):
        VectorIndex.open(generation, FINGERPRINT)


@pytest.mark.fault
def test_every_missing_or_wrong_field_of_the_sidecar_is_named(tmp_path: Path) -> None:
    path = publish(tmp_path) / SIDECAR_FILE
    whole = json.loads(path.read_text())
    del whole["sha256"]
    places = [(), ("report",), ("files", INDEX_FILE)]
    for place in places:
        inner = whole
        for key in place:
            inner = inner[key]
        for field in list(inner):
            for spoilt in ("missing", None, True, ["x"]):
                changed = json.loads(json.dumps(whole))
                target = changed
                for key in place:
                    target = target[key]
                if spoilt == "missing":
                    del target[field]
                else:
                    target[field] = spoilt
                rewrite(path, changed)
                with pytest.raises(IntegrityError, match=field) as caught:
                    read_sidecar(path.parent)
                assert str(path) in str(caught.value)
    rewrite(path, {**whole, "surprise": 1})
    with pytest.raises(IntegrityError, match="surprise"):
        read_sidecar(path.parent)


@pytest.mark.fault
@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/b", ".."])
def test_a_sidecar_cannot_name_a_file_elsewhere(tmp_path: Path, name: str) -> None:
    path = publish(tmp_path) / SIDECAR_FILE
    content = json.loads(path.read_text())
    content["files"][name] = content["files"]["videos.h5"]
    rewrite(path, content)
    with pytest.raises(IntegrityError, match="plain file name"):
        read_sidecar(path.parent)


@pytest.mark.fault
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"schema": 99}'])
def test_a_sidecar_that_is_no_sidecar_is_refused(tmp_path: Path, content: bytes) -> None:
    path = publish(tmp_path) / SIDECAR_FILE
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match=SIDECAR_FILE):
        read_sidecar(path.parent)


@pytest.mark.fault
@pytest.mark.parametrize("schema", [0, 1, 4, True, 3.0, "3", None, [2]])
def test_a_sidecar_of_an_unknown_version_is_refused(tmp_path: Path, schema: object) -> None:
    path = publish(tmp_path) / SIDECAR_FILE
    rewrite(path, {**json.loads(path.read_text()), "schema": schema})
    with pytest.raises(IntegrityError, match="field 'schema'"):
        read_sidecar(path.parent)


def test_an_index_of_the_version_without_moments_is_no_damage_and_the_cure_is_said(tmp_path: Path) -> None:
    """Of which nothing else is looked at: its report had other fields."""
    path = publish(tmp_path / "kitchen" / "index") / SIDECAR_FILE
    rewrite(path, {"schema": 2, "report": {"recall_at_10": 1.0}, "fingerprint": FINGERPRINT})
    for read in (read_sidecar, lambda generation: VectorIndex.open(generation, FINGERPRINT)):
        with pytest.raises(UsageError, match="earlier version") as caught:
            read(path.parent)
        folder = tmp_path / "kitchen"
        assert f"fineco select -c {folder}" in str(caught.value) and f"fineco index -c {folder}" in str(caught.value)
    path.write_bytes(path.read_bytes().replace(b"recall_at_10", b"recall_at_11"))  # not even that, if damaged
    with pytest.raises(IntegrityError, match=SIDECAR_FILE):
        read_sidecar(path.parent)


def test_no_index_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="fineco index"):
        current_generation(tmp_path / "index")


@pytest.mark.fault
@pytest.mark.parametrize("name", ["", "..", "/tmp", "000009", "٣"])
def test_a_pointer_to_no_generation_is_refused(tmp_path: Path, name: str) -> None:
    publish(tmp_path)
    write_pointer(tmp_path / "CURRENT", name)
    with pytest.raises(IntegrityError, match="CURRENT"):
        current_generation(tmp_path)


@pytest.mark.fault
def test_a_damaged_pointer_is_refused_even_when_it_names_a_generation(tmp_path: Path) -> None:
    publish(tmp_path)
    publish(tmp_path)
    whole = (tmp_path / "CURRENT").read_bytes()
    for damaged in (b"", b"000001\n", whole.replace(b"000002", b"000001"), b"\xff" + whole, whole[:-1], whole + b"\n"):
        (tmp_path / "CURRENT").write_bytes(damaged)
        with pytest.raises(IntegrityError, match="CURRENT"):
            current_generation(tmp_path)
    with pytest.raises(IntegrityError, match="CURRENT"):
        current_generation(tmp_path)


def test_a_new_generation_takes_over_and_old_ones_go_but_never_the_current(tmp_path: Path) -> None:
    names = [publish(tmp_path, seed=seed).name for seed in range(4)]
    assert names == ["000001", "000002", "000003", "000004"]
    write_pointer(tmp_path / "CURRENT", "000001")
    prune_generations(tmp_path, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000001", "000003", "000004", "CURRENT"]
    assert publish(tmp_path).name == "000005"
    prune_generations(tmp_path, keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000005", "CURRENT"]


def test_a_search_in_progress_outlives_its_generation(tmp_path: Path) -> None:
    index = VectorIndex.open(publish(tmp_path), FINGERPRINT)
    before = index.search(make_vectors(3, seed=1)[1], 5)
    for seed in (1, 2):
        publish(tmp_path, seed=seed)
        prune_generations(tmp_path, keep=1)
    after = index.search(make_vectors(3, seed=1)[1], 5)
    assert [ids.tolist() for ids, _ in before] == [ids.tolist() for ids, _ in after]


def test_a_build_that_fails_leaves_the_current_generation_and_no_trace(tmp_path: Path) -> None:
    first = publish(tmp_path)
    with pytest.raises(IntegrityError, match="vectors came"), new_generation(tmp_path) as generation:
        build(generation, plan_of(301), *make_vectors(300))
    assert current_generation(tmp_path) == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000001", "CURRENT"]


def test_a_generation_without_a_sidecar_is_never_current(tmp_path: Path) -> None:
    first = publish(tmp_path)
    with pytest.raises(FinecoError, match=SIDECAR_FILE), new_generation(tmp_path) as generation:
        build(generation, plan_of(300), *make_vectors(300))
    assert current_generation(tmp_path) == first


KILLED_BUILD = """
import os, signal, sys
from pathlib import Path
import numpy as np
from indexes import build, generations
from indexes.id_map import IdMap, moment_ids
from indexes.plan import plan_index
moment, folder = sys.argv[1], Path(sys.argv[2])
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
class Half:
    def __init__(self, file): self.file = file
    def write(self, data):
        self.file.write(data[: len(data) // 2]); self.file.flush(); die()
if moment == "in the index file":
    build._write = lambda faiss, index, path: faiss.write_index(
        index, faiss.PyCallbackIOWriter(Half(path.open("wb")).write))
elif moment == "before the sidecar":
    generations.write_sidecar = die
elif moment == "before the rename":
    generations.fsync_folder = die
elif moment == "before CURRENT":
    generations.write_pointer = die
rows = np.random.default_rng(5).standard_normal((900, %d))
rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
with generations.new_generation(folder) as generation:
    keys, counts = np.arange(300), np.full(300, 3, np.int32)
    probes = build.Probes(np.empty((0, %d), np.float32), [], "none")
    id_map, ids, plan = IdMap.of(keys, counts), moment_ids(keys, counts), plan_index(300, 900, %d)
    report = build.build_index(plan, lambda: [(ids, rows)], id_map, probes, generation)
    generations.write_sidecar(generation, report, "f" * 32, "uniform", {})
"""


@pytest.mark.long
@pytest.mark.fault
@pytest.mark.parametrize(
    "moment", ["in the index file", "before the sidecar", "before the rename", "before CURRENT", "never"]
)
def test_a_killed_build_leaves_the_old_index_searchable(tmp_path: Path, moment: str) -> None:
    publish(tmp_path)
    queries = make_vectors(5, seed=1)[1]
    before = VectorIndex.open(current_generation(tmp_path), FINGERPRINT).search(queries, 10)
    script = KILLED_BUILD % (DIM, DIM, DIM)
    done = subprocess.run([sys.executable, "-c", script, moment, str(tmp_path)], cwd=ROOT, timeout=60)
    index = VectorIndex.open(current_generation(tmp_path), FINGERPRINT)
    if moment == "never":
        assert done.returncode == 0 and len(index) == 900
        return
    assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 3  # what the killed build left is there, beside the old one
    after = index.search(queries, 10)
    assert [ids.tolist() for ids, _ in after] == [ids.tolist() for ids, _ in before]
    assert len(VectorIndex.open(publish(tmp_path, n=400), FINGERPRINT)) == 400
    prune_generations(tmp_path, keep=1)
    assert len(list(tmp_path.iterdir())) == 2  # the new one and CURRENT


@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat", "IVF8,SQ8", "IVF8,RaBitQ"])
def test_what_is_stored_can_be_read_back(tmp_path: Path, factory: str) -> None:
    """For `verify`, which compares it with the store: as exactly as each coding allows."""
    nlist = 0 if factory == "Flat" else 8
    ids, vectors = make_vectors(400)
    with new_generation(tmp_path) as generation:
        report = build(generation, plan_of(400, factory, nlist), ids, vectors)
        write_sidecar(generation, report, FINGERPRINT, "uniform", {})
    generation = current_generation(tmp_path)
    assert sorted(stored_ids(generation)) == sorted(ids)
    some = np.sort(ids)[::7]
    code, found = stored_vectors(generation, some)
    wanted = vectors[[ids.tolist().index(i) for i in some]]
    cosines = (found * wanted).sum(axis=1) / np.linalg.norm(found, axis=1)
    assert code == factory
    assert cosines.min() >= LEAST_COSINE[factory.rpartition(",")[2]]
    assert np.array_equal(found, wanted) == factory.endswith("Flat")
