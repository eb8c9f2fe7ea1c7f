"""Damaged and hostile files of a collection: an error that names the file, never a wrong answer or a foreign byte."""

from __future__ import annotations

import contextlib
import multiprocessing
import random
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import h5py
import numpy as np
import pytest

from fakes import FakeEncoder
from guards import Guard
from indexes.generations import current_generation, read_sidecar, write_sidecar
from indexes.id_map import IdMap
from pipeline import commands, store
from pipeline.collection import Collection, Snapshot
from pipeline.commits import place_of
from pipeline.errors import FinecoError, IntegrityError, UsageError
from pipeline.files import record_of
from pipeline.gallery import Gallery
from pipeline.lookup import Lookup, write_lookup
from pipeline.types import Hit
from pipeline.verify import verify_collection
from small_runs import HALF, files_in_use, machine, make_everything

GUARDS = [
    Guard(
        (3,),
        "pipeline/store.py",
        "if _digest_of(self.kind, pieces) != self.row_digest(row):",
        "if False:",
        "test_a_changed_row_is_refused_by_a_search",
    ),
    Guard(
        (3,),
        "pipeline/files.py",
        'if digest != hashlib.sha256(name).hexdigest().encode() + b"\\n":',
        "if False:",
        "test_a_pointer_that_names_another_is_refused",
    ),
    Guard(
        (4,),
        "pipeline/store.py",
        "if not isinstance(self._file.get(name, getlink=True), h5py.HardLink):",
        "if False:",
        "test_a_hostile_shard_is_refused_by_every_command[external link]",
    ),
    Guard(
        (4,),
        "pipeline/store.py",
        "dataset.is_virtual or dataset.external is not None",
        "False",
        "test_a_hostile_shard_is_refused_by_every_command[external storage]",
    ),
    Guard(
        (4,),
        "pipeline/store.py",
        "if dataset.size * dataset.dtype.itemsize > size:",
        "if False:",
        "test_a_hostile_shard_is_refused_by_every_command[giant]",
    ),
    Guard(
        (4,),
        "pipeline/store.py",
        "if attribute.dtype != np.dtype(dtype) or attribute.shape != ():",
        "if False:",
        "test_texts_of_any_length_are_refused_before_they_are_read",
    ),
    Guard(
        (5,),
        "indexes/search.py",
        "        check_generation(generation, sidecar)\n",
        "",
        "test_faiss_never_reads_a_damaged_index",
    ),
    Guard(
        (5,),
        "indexes/search.py",
        "faiss.set_deserialization_vector_byte_limit(2 * path.stat().st_size + (1 << 20))",
        "pass",
        "test_faiss_reads_within_limits",
    ),
    Guard(
        (7,),
        "indexes/search.py",
        "if sidecar.fingerprint != fingerprint:",
        "if False:",
        "test_an_index_of_another_encoder_is_refused_with_both_named",
    ),
    Guard((7,), "indexes/search.py", "if found != wanted:", "if False:", "test_an_index_that_is_another_is_refused[d]"),
]

pytestmark = pytest.mark.fault

QUERIES = ["a red block", "two blue birds"]
CANARY = b"CANARY-what-nobody-may-read-CANARY-" * 4


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_everything(tmp_path_factory.mktemp("built"))


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "kitchen"))


def search(collection: Path) -> list[list[Hit]]:
    return commands.search(collection, QUERIES, 10, encoder=FakeEncoder())


def check_flips(built: Path, copy: Path, n_per_file: int, seed: int) -> tuple[int, int]:
    """Flips bytes one at a time; returns how many were refused and how many changed nothing."""
    expected = search(built)
    rng = random.Random(seed)
    refused = unchanged = 0
    for name in files_in_use(built):
        data = (built / name).read_bytes()
        for _ in range(n_per_file):
            at, bit = rng.randrange(len(data)), 1 << rng.randrange(8)
            (copy / name).write_bytes(data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :])
            try:
                answers = search(copy)
            except FinecoError as error:
                assert str(copy) in error.message, (seed, name, at, bit)
                refused += 1
            else:
                assert answers == expected, (seed, name, at, bit)
                assert verify_collection(copy)["problems"], (seed, name, at, bit)
                unchanged += 1
        (copy / name).write_bytes(data)
    return refused, unchanged


def test_no_flipped_byte_changes_an_answer(built: Path, copy: Path) -> None:
    """One that a search looks at is refused, and `verify` finds every one."""
    refused, unchanged = check_flips(built, copy, 3, 20261124)
    assert refused > 10 and unchanged > 10  # some of each, or this says nothing


@pytest.mark.long
@pytest.mark.parametrize("seed", range(4))
def test_no_flipped_byte_of_many_changes_an_answer(seed: int, built: Path, copy: Path) -> None:
    check_flips(built, copy, 60, seed)


def test_a_changed_row_is_refused_by_a_search(copy: Path) -> None:
    """It does not digest the whole file, which may be one of a thousand, but the rows that it reads."""
    place = next(iter(Collection(copy).state().places["embeddings/caption-0.5"].values()))
    path = copy / "embeddings" / "caption-0.5" / f"{place.commit:06d}.h5"
    with h5py.File(path, "r+") as file:
        file["features"][0, 0] += np.float16(0.01)
    with pytest.raises(IntegrityError, match="its rows changed since they were written"):
        search(copy)


def test_a_pointer_that_names_another_is_refused(copy: Path) -> None:
    """One bit makes `uniform-3` another selection, and 000001 another generation."""
    for name, wrong in (("embeddings/CURRENT", "uniform-3"), ("index/CURRENT", "000001")):
        lines = (copy / name).read_bytes().splitlines(keepends=True)
        (copy / name).write_bytes(wrong.encode() + b"\n" + lines[1])
        with pytest.raises(IntegrityError, match="CURRENT"):
            if name == "index/CURRENT":
                search(copy)
            else:
                commands.index(copy, machine=machine())


# ------------------------------------------------------------------------------------------------ hostile HDF5 files


def external_link(file: Any, name: str, canary: Path) -> None:
    with h5py.File(canary.with_suffix(".h5"), "w") as other:
        other.create_dataset("canary", data=np.frombuffer(CANARY[:32], "<f4"))
    file[name] = h5py.ExternalLink(canary.with_suffix(".h5"), "canary")


def virtual(file: Any, name: str, canary: Path) -> None:
    layout = h5py.VirtualLayout((8,), "<f4")
    with h5py.File(canary.with_suffix(".h5"), "w") as other:
        other.create_dataset("canary", data=np.frombuffer(CANARY[:32], "<f4"))
    layout[:] = h5py.VirtualSource(canary.with_suffix(".h5"), "canary", (8,))
    file.create_virtual_dataset(name, layout)


# All the ways are in tests/pipeline/test_store.py; these are the ones that reach out of the file, through the commands.
HOSTILE: dict[str, tuple[str, Callable[[Any, str, Path], Any]]] = {
    "external storage": (
        "scores is not a plain dataset",
        lambda f, name, canary: f.create_dataset(name, (8,), "<f4", external=[(str(canary), 0, 32)]),
    ),
    "external link": ("scores is missing or a link to elsewhere", external_link),
    "virtual": ("scores is not a plain dataset", virtual),
    "giant": ("more than the file holds", lambda f, name, canary: f.create_dataset(name, (10**14,), "<f4")),
}


def sign(collection: Path, name: str) -> None:
    """Makes the commit say that the file is just as it should be: an attacker can compute digests too."""
    number = place_of(name)[1]
    commit = Collection(collection).read_commit(number)
    signed = replace(commit, files={**commit.files, name: record_of(collection / name)})
    (collection / "outcomes" / f"{number:06d}.jsonl").write_bytes(signed.to_bytes())


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_shard_is_refused_by_every_command(kind: str, copy: Path, tmp_path: Path) -> None:
    """For what it is, before anything of it is read; the canary stands for any file of the user's. In a process of its
    own, for its memory."""
    canary = tmp_path / "canary"
    canary.write_bytes(CANARY)
    state = Collection(copy).state()
    number = state.places["embeddings/caption-0.5"][next(iter(state.paths))].commit
    name = f"embeddings/caption-0.5/{number:06d}.h5"
    with h5py.File(copy / name, "r+") as file:
        del file["scores"]
        why, make = HOSTILE[kind]
        make(file, "scores", canary)
    sign(copy, name)
    code = """
        import sys
        from pathlib import Path
        from fakes import FakeEncoder
        from pipeline import commands, store
        from pipeline.errors import FinecoError
        from pipeline.verify import verify_collection
        from small_runs import machine
        folder = Path(sys.argv[1])
        for act in (
            lambda: commands.search(folder, ["a"], encoder=FakeEncoder()),
            lambda: commands.index(folder, machine=machine(), force=True),
        ):
            try:
                print("answered", act())
            except FinecoError as error:
                print("refused", type(error).__name__, error)
        print(verify_collection(folder)["problems"])
        print("MiB", int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(copy)],
        cwd=Path(__file__).parents[2],
        env={"PYTHONPATH": f".:{Path(__file__).parents[1]}", "PATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("refused IntegrityError") == 2, done.stdout
    assert done.stdout.count(name) >= 3 and done.stdout.count(why) >= 3  # by both, and by verify
    assert "CANARY" not in done.stdout + done.stderr
    assert int(done.stdout.split()[-1]) < 300


def test_texts_of_any_length_are_refused_before_they_are_read(copy: Path) -> None:
    """One flipped bit in the heap where they lie made libhdf5 read it for ever, in the middle of a search."""
    name = next(n for n in files_in_use(copy) if n.startswith("embeddings/caption-0.5/0"))
    with h5py.File(copy / name, "r+") as file:
        del file.attrs["kind"]
        file.attrs["kind"] = "embeddings"
    sign(copy, name)
    with pytest.raises(IntegrityError, match="its attribute kind is object"):
        search(copy)


def read_damaged(path: Path, positions: list[int]) -> None:
    """Reads a shard whole with each of its bytes at `positions` flipped, one at a time; a hang ends the process."""
    whole = path.read_bytes()
    for at in positions:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
        signal.alarm(10)
        with contextlib.suppress(IntegrityError), store.EmbeddingsShard(path) as shard:
            for row in range(len(shard)):
                shard.embedding(row)
    signal.alarm(0)


@pytest.mark.parametrize("step", [41, pytest.param(1, marks=pytest.mark.long)])
def test_no_flipped_byte_makes_hdf5_hang_or_die(step: int, copy: Path) -> None:
    path = copy / next(n for n in files_in_use(copy) if n.startswith("embeddings/caption-0.5/0"))
    child = multiprocessing.get_context("fork").Process(
        target=read_damaged, args=(path, list(range(0, path.stat().st_size, step)))
    )
    child.start()
    child.join()
    assert child.exitcode == 0


# ------------------------------------------------------------------------------------------------------------- FAISS


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is called of FAISS on the way to reading an index, in order."""
    calls: list[str] = []
    for name in ("read_index", "set_deserialization_vector_byte_limit", "set_deserialization_loop_limit"):
        real = getattr(faiss, name)

        def noted(*arguments: Any, name: str = name, real: Callable[..., Any] = real) -> Any:
            calls.append(name)
            return real(*arguments)

        monkeypatch.setattr(faiss, name, noted)
    yield calls


@pytest.mark.parametrize("damage", ["cut", "flipped", "longer"])
def test_faiss_never_reads_a_damaged_index(damage: str, copy: Path, reads: list[str]) -> None:
    path = current_generation(copy / "index") / "index.faiss"
    data = path.read_bytes()
    half = len(data) // 2
    flipped = data[:half] + bytes([data[half] ^ 1]) + data[half + 1 :]
    path.write_bytes({"cut": data[:half], "flipped": flipped, "longer": data + b"\0" * 100}[damage])
    with pytest.raises(IntegrityError, match=r"index\.faiss"):
        search(copy)
    assert reads == []


def test_faiss_reads_within_limits(copy: Path, reads: list[str]) -> None:
    search(copy)
    assert reads[-1] == "read_index"
    assert set(reads[:-1]) == {"set_deserialization_vector_byte_limit", "set_deserialization_loop_limit"}


def test_an_index_of_another_encoder_is_refused_with_both_named(copy: Path) -> None:
    other = FakeEncoder(seed=1)
    with pytest.raises(UsageError) as refused:
        commands.search(copy, QUERIES, encoder=other)
    assert FakeEncoder().spec.fingerprint[:12] in refused.value.message
    assert other.spec.fingerprint[:12] in refused.value.message


@pytest.mark.parametrize("what", ["d", "ntotal", "metric"])
def test_an_index_that_is_another_is_refused(what: str, copy: Path) -> None:
    """Its digest is right: it is the sidecar that does not fit."""
    generation = current_generation(copy / "index")
    sidecar = read_sidecar(generation)
    dim = sidecar.report.dim + (what == "d")
    metric = faiss.METRIC_L2 if what == "metric" else faiss.METRIC_INNER_PRODUCT
    index = faiss.index_factory(dim, "IDMap,Flat", metric)
    n = sidecar.report.n_vectors - (what == "ntotal")
    index.add_with_ids(np.ones((n, dim), np.float32), np.arange(n))
    faiss.write_index(index, str(generation / "index.faiss"))
    write_sidecar(generation, sidecar.report, sidecar.fingerprint, sidecar.selection, sidecar.extra)
    with pytest.raises(IntegrityError, match=r"its sidecar says"):
        search(copy)


def test_verify_finds_an_index_whose_vectors_are_not_those_of_the_store(copy: Path) -> None:
    """Every digest is right, and so are the ids: only the vectors are of something else."""
    generation = current_generation(copy / "index")
    sidecar = read_sidecar(generation)
    index: Any = faiss.read_index(str(generation / "index.faiss"))
    ids = faiss.vector_to_array(index.id_map)
    vectors = np.random.default_rng(0).standard_normal((len(ids), index.d)).astype(np.float32)
    swapped = faiss.index_factory(index.d, "IDMap,Flat", faiss.METRIC_INNER_PRODUCT)
    swapped.add_with_ids(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), ids)
    faiss.write_index(swapped, str(generation / "index.faiss"))
    write_sidecar(generation, sidecar.report, sidecar.fingerprint, sidecar.selection, sidecar.extra)
    (problem,) = verify_collection(copy)["problems"]
    assert len(ids) > 4  # moments of the four videos
    assert f"{len(ids)} of {len(ids)} sampled vectors are not those of the store" in problem


@pytest.mark.parametrize("one_more", [True, False])
def test_verify_finds_an_index_that_has_other_moments_of_a_video_than_the_store(copy: Path, one_more: bool) -> None:
    """Every digest is right, and the vectors and the list beside them fit each other: the video has not so many."""
    generation = current_generation(copy / "index")
    sidecar, gallery = read_sidecar(generation), Gallery(Snapshot(Collection(copy)), "caption-0.5")
    counts = gallery.id_map.counts.copy()
    video = int(counts.argmax())
    counts[video] += 1 if one_more else -1
    gallery.id_map = IdMap.of(gallery.id_map.keys, counts)
    known = {i: row for ids, rows in gallery.moments() for i, row in zip(ids.tolist(), rows, strict=True)}
    spare = next(iter(known.values()))
    vectors = np.stack([known.get(i, spare) for i in gallery.id_map.ids.tolist()])
    changed: Any = faiss.index_factory(gallery.dim, "IDMap,Flat", faiss.METRIC_INNER_PRODUCT)
    changed.add_with_ids(vectors, gallery.id_map.ids)
    faiss.write_index(changed, str(generation / "index.faiss"))
    with Lookup(generation / "videos.h5") as lookup:
        background = lookup.background
    write_lookup(generation / "videos.h5", gallery, background)
    report = replace(sidecar.report, n_vectors=len(vectors))
    write_sidecar(generation, report, sidecar.fingerprint, sidecar.selection, sidecar.extra)
    (problem,) = verify_collection(copy)["problems"]
    n_stored = counts[video] + (-1 if one_more else 1)
    assert f"has {n_stored} moments, not as many" in problem


def test_select_stops_at_damaged_features_and_names_them(copy: Path) -> None:
    name = next(n for n in files_in_use(copy) if n.startswith("features/"))
    path = copy / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match=name):
        commands.select(copy, replace(HALF, keep="0.25"), machine(), FakeEncoder())
