"""Shards: what is written comes back; what is not a shard of ours is refused before it is read."""

from __future__ import annotations

import resource
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from pipeline import store
from pipeline.errors import FinecoError, IntegrityError
from pipeline.files import check_file
from pipeline.lookup import Lookup, write_lookup
from pipeline.store import StoredFrames, StoredVideo
from pipeline.types import Float32, Float64, FrameFeatures, VideoEmbedding

DIM = 8
CANARY = b"CANARY-of-another-file " * 64
ROOT = Path(__file__).parents[2]


def unit_rows(n: int, seed: int = 0) -> Float32:
    rows = np.random.default_rng(seed).standard_normal((n, DIM)).astype(np.float32)
    unit: Float32 = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return unit


def times(n: int) -> Float64:
    return np.arange(n, dtype=np.float64) / 3


def video(number: int) -> StoredVideo:
    return StoredVideo(f"clip-{number}", f"{number:032x}", 10.0 + number)


def embedding(number: int, n: int) -> VideoEmbedding:
    rows = store.round_features(unit_rows(n, number))
    scores = np.linspace(-1, 1, n, dtype=np.float32)
    return VideoEmbedding(f"clip-{number}", unit_rows(1, number)[0], rows, times(n), scores, 0.5, n + 3, "caption")


def write_some_embeddings(path: Path) -> None:
    store.write_embeddings(path, [(video(i), embedding(i, n)) for i, n in enumerate((3, 1, 4))])


# --------------------------------------------------------------------------------------------------- round trips


def test_frames_come_back_byte_for_byte(tmp_path: Path) -> None:
    jpegs = [[b"\xff\xd8one", b"", b"\x00\n\xffthree"], [b"x" * 5000]]
    rows = [StoredFrames(video(i), j, times(len(j)), 0.25) for i, j in enumerate(jpegs)]
    record = store.write_frames(tmp_path / "1.h5", rows)
    check_file(tmp_path / "1.h5", record)
    with store.FramesShard(tmp_path / "1.h5") as shard:
        assert len(shard) == 2
        for i, row in enumerate(rows):
            back = shard.frames(i)
            assert (back.video, list(back.jpegs), back.span_seconds) == (row.video, jpegs[i], 0.25)
            np.testing.assert_array_equal(back.pts_seconds, row.pts_seconds)


def test_features_come_back_as_they_were_rounded(tmp_path: Path) -> None:
    features = [
        FrameFeatures(f"clip-{i}", store.round_features(unit_rows(n, i)), times(n), 1 / 3) for i, n in enumerate((5, 1))
    ]
    store.write_features(tmp_path / "1.h5", [(video(i), f) for i, f in enumerate(features)])
    with store.FeaturesShard(tmp_path / "1.h5") as shard:
        for i, expected in enumerate(features):
            back = shard.features(i)
            np.testing.assert_array_equal(back.features, expected.features)
            np.testing.assert_array_equal(back.pts_seconds, expected.pts_seconds)
            assert (back.video_id, back.span_seconds, shard.video(i)) == (f"clip-{i}", 1 / 3, video(i))


def test_embeddings_come_back_whole(tmp_path: Path) -> None:
    write_some_embeddings(tmp_path / "1.h5")
    with store.EmbeddingsShard(tmp_path / "1.h5") as shard:
        for i, n in enumerate((3, 1, 4)):
            back, expected = shard.embedding(i), embedding(i, n)
            for name in ("vector", "features", "pts_seconds", "scores"):
                np.testing.assert_array_equal(getattr(back, name), getattr(expected, name))
            assert (back.span_seconds, back.n_frames, back.selector) == (0.5, n + 3, "caption")
        np.testing.assert_array_equal(shard.vectors(), np.stack([unit_rows(1, i)[0] for i in range(3)]))


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    write_some_embeddings(tmp_path / "a" / "1.h5")
    write_some_embeddings(tmp_path / "b" / "1.h5")
    assert (tmp_path / "a" / "1.h5").read_bytes() == (tmp_path / "b" / "1.h5").read_bytes()


def test_lookup_finds_every_id_with_any_path(tmp_path: Path) -> None:
    paths = ["/a/plain.mp4", "/a/new\nline.mp4", "/a/not-utf8-\udcff\udc80.mp4", "/a/'\"日本.mp4", ""]
    ids = [7, 2**63 - 1, 0, 2**53 + 1, 2**53]
    write_lookup(tmp_path / "v.h5", [(ids[i], i, 10 * i, path) for i, path in enumerate(paths)])
    with Lookup(tmp_path / "v.h5") as lookup:
        assert len(lookup) == 5
        assert [lookup.find(x) for x in ids] == [(i, 10 * i, path) for i, path in enumerate(paths)]
        for absent in (1, 2**53 + 2, 2**62):
            with pytest.raises(IntegrityError, match=str(absent)):
                lookup.find(absent)


# -------------------------------------------------------------------------------------------------- hostile files


def change(path: Path, name: str, make: Callable[[Any], None]) -> None:
    """Replaces one dataset of a good shard by whatever `make` creates in the open file."""
    with h5py.File(path, "r+") as file:
        del file[name]
        make(file)


def test_another_kind_of_shard_is_refused(tmp_path: Path) -> None:
    write_some_embeddings(tmp_path / "1.h5")
    with pytest.raises(IntegrityError, match=r"1\.h5: not a features shard"):
        store.FeaturesShard(tmp_path / "1.h5")


HOSTILE: dict[str, tuple[str, Callable[[Any, Path], None]]] = {
    "external storage": (
        "scores",
        lambda f, secret: f.create_dataset("scores", (8,), "<f4", external=[(str(secret), 0, 32)]),
    ),
    "external link": ("scores", lambda f, secret: f.__setitem__("scores", h5py.ExternalLink(str(secret), "/scores"))),
    "soft link": ("scores", lambda f, secret: f.__setitem__("scores", h5py.SoftLink("/pts_seconds"))),
    "a group": ("scores", lambda f, secret: f.create_group("scores")),
    "missing": ("scores", lambda f, secret: None),
    "chunked": ("scores", lambda f, secret: f.create_dataset("scores", (8,), "<f4", chunks=(4,))),
    "compressed": ("scores", lambda f, secret: f.create_dataset("scores", (8,), "<f4", compression="gzip")),
    "giant": ("features", lambda f, secret: f.create_dataset("features", (8, 10**11), "<f2")),
    "giant column": ("offsets", lambda f, secret: f.create_dataset("offsets", (10**12,), "<i8")),
    "other dtype": ("scores", lambda f, secret: f.create_dataset("scores", data=np.zeros(8))),
    "strings": ("scores", lambda f, secret: f.create_dataset("scores", (8,), h5py.string_dtype())),
    "dtype without a numpy name": (
        "scores",
        lambda f, secret: h5py.h5d.create(f.id, b"scores", h5py.h5t.UNIX_D32LE, h5py.h5s.create_simple((8,))),
    ),
    "other rank": ("scores", lambda f, secret: f.create_dataset("scores", data=np.zeros((8, 1), np.float32))),
    "empty": ("scores", lambda f, secret: f.create_dataset("scores", data=h5py.Empty("<f4"))),
    "too short": ("scores", lambda f, secret: f.create_dataset("scores", data=np.zeros(7, np.float32))),
    "too few vectors": ("vectors", lambda f, secret: f.create_dataset("vectors", data=unit_rows(2))),
    "too few counts": ("n_frames", lambda f, secret: f.create_dataset("n_frames", data=np.array([6]))),
    "too few names": ("selectors", lambda f, secret: f.create_dataset("selectors", data=np.array([b"x"], "S16"))),
    "ids not ascii": (
        "video_ids",
        lambda f, secret: f.create_dataset("video_ids", data=np.array(["é".encode()] * 3, "S128")),
    ),
    "too few ids": ("video_ids", lambda f, secret: f.create_dataset("video_ids", data=np.array([b"a"], "S128"))),
}


@pytest.mark.parametrize("what", [*HOSTILE, "virtual"])
def test_a_hostile_dataset_is_refused_when_the_file_is_opened(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "secret.h5"
    write_some_embeddings(secret)
    path = tmp_path / "1.h5"
    write_some_embeddings(path)
    if what == "virtual":
        layout = h5py.VirtualLayout((8,), "<f4")
        layout[:] = h5py.VirtualSource(str(secret), "scores", (8,))
        change(path, "scores", lambda file: file.create_virtual_dataset("scores", layout))
    else:
        name, make = HOSTILE[what]
        change(path, name, lambda file: make(file, secret))
    read: list[str] = []
    plain = h5py.Dataset.__getitem__

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        read.append(self.name)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(h5py.Dataset, "__getitem__", watched)
    reason = "more than the file holds" if what.startswith("giant") else ""
    with pytest.raises(IntegrityError, match=rf"1\.h5.*{reason}"), store.EmbeddingsShard(path):
        pass
    name = HOSTILE[what][0] if what in HOSTILE else "scores"
    assert name == "video_ids" or f"/{name}" not in read


LIES = {
    "not from 0": [1, 3, 4, 8],
    "past the end": [0, 3, 4, 9],
    "falling": [0, 5, 4, 8],
    "negative": [0, -3, 4, 8],
    "a fall that overflows": [0, 2**62, -(2**63), -(2**62), 0, 8],
}


@pytest.mark.parametrize("lie", LIES)
def test_offsets_that_do_not_fit_the_rows_are_refused(lie: str, tmp_path: Path) -> None:
    path = tmp_path / "1.h5"
    offsets = np.array(LIES[lie], np.int64)
    store.write_features(
        path, [(video(i), FrameFeatures("x", unit_rows(n), times(n), 1.0)) for i, n in enumerate([1] * 8)]
    )
    with h5py.File(path, "r+") as file:
        for name in ("video_ids", "contents", "span_seconds", "duration_seconds", "row_digests"):
            data = file[name][: len(offsets) - 1]
            del file[name]
            file.create_dataset(name, data=data)
        del file["offsets"]
        file.create_dataset("offsets", data=offsets)
    with pytest.raises(IntegrityError, match="offsets do not fit"):
        store.FeaturesShard(path)


@pytest.mark.parametrize("offsets", [[0, 100, 6], [0, -2, 6], [0, 3, 7], [0, 6], [1, 3, 6]])
def test_offsets_of_paths_and_jpegs_are_checked(offsets: list[int], tmp_path: Path) -> None:
    write_lookup(tmp_path / "v.h5", [(1, 0, 0, "abc"), (2, 0, 1, "def")])
    store.write_frames(tmp_path / "f.h5", [StoredFrames(video(0), [b"abc", b"def"], times(2), 1.0)])
    data = np.array(offsets, np.int64)
    for file_name, name, kind in (
        ("v.h5", "path_offsets", Lookup),
        ("f.h5", "jpeg_offsets", store.FramesShard),
    ):
        change(tmp_path / file_name, name, lambda file, name=name: file.create_dataset(name, data=data))  # type: ignore[misc]
        with pytest.raises(IntegrityError, match=name):
            kind(tmp_path / file_name)


def test_lookup_ids_out_of_order_are_refused(tmp_path: Path) -> None:
    write_lookup(tmp_path / "v.h5", [(i, 0, 0, "") for i in range(3)])
    for ids in ([0, 2, 1], [0, 1, 1], [2**62, -(2**62) - 2, 5]):
        change(tmp_path / "v.h5", "ids", lambda file, ids=ids: file.create_dataset("ids", data=np.array(ids)))  # type: ignore[misc]
        with pytest.raises(IntegrityError, match="ids are not sorted"):
            Lookup(tmp_path / "v.h5")


@pytest.mark.parametrize("value", [np.nan, np.inf, 7.0])
def test_rows_that_are_not_unit_vectors_are_damage(value: float, tmp_path: Path) -> None:
    path = tmp_path / "1.h5"
    store.write_features(path, [(video(i), FrameFeatures("x", unit_rows(2), times(2), 1.0)) for i in range(2)])
    with h5py.File(path, "r+") as file:
        file["features"][2, 0] = value
    with store.FeaturesShard(path) as shard:
        shard.features(0)
        with pytest.raises(IntegrityError, match="clip-1"):
            shard.features(1)


def test_no_byte_of_another_file_is_read_and_memory_stays_small(tmp_path: Path) -> None:
    """A file that points its datasets at a text file, and one that claims a petabyte, in a process of their own."""
    (tmp_path / "canary.txt").write_bytes(CANARY)
    for name, make in (
        ("external", {"external": [(str(tmp_path / "canary.txt"), 0, 32)], "shape": (8,)}),
        ("giant", {"shape": (10**14,)}),
    ):
        write_some_embeddings(tmp_path / f"{name}.h5")
        change(tmp_path / f"{name}.h5", "scores", lambda file, m=make: file.create_dataset("scores", dtype="<f4", **m))  # type: ignore[misc]
    code = """
        import sys
        from pathlib import Path
        from pipeline import store
        from pipeline.errors import IntegrityError
        for name in sys.argv[1:]:
            try:
                with store.EmbeddingsShard(Path(name)) as shard:
                    print([bytes(shard.embedding(i).scores) for i in range(len(shard))])
            except IntegrityError as error:
                print("refused:", error)
        # ru_maxrss would be that of the test run, which this process was forked from
            print("MiB", int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024)
    """
    files = [str(tmp_path / f"{name}.h5") for name in ("external", "giant")]
    done = run_python(code, *files)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("refused:") == 2
    assert "CANARY" not in done.stdout + done.stderr
    assert int(done.stdout.split()[-1]) < 300


# ------------------------------------------------------------------------------------------------------- damage


def test_truncation_is_an_integrity_error_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "1.h5"
    write_some_embeddings(path)
    whole = path.read_bytes()
    for end in {0, 1, 8, 100, len(whole) // 4, len(whole) // 2, len(whole) - 100, len(whole) - 1}:
        path.write_bytes(whole[:end])
        with pytest.raises(IntegrityError, match=r"1\.h5"):
            store.EmbeddingsShard(path)


def test_every_flipped_byte_is_found_by_the_digest(tmp_path: Path) -> None:
    path = tmp_path / "1.h5"
    record = store.write_embeddings(path, [(video(0), embedding(0, 3))])
    whole = path.read_bytes()
    for at in range(0, len(whole), len(whole) // 50):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        with pytest.raises(IntegrityError, match="bytes changed"):
            check_file(path, record)


def test_random_damage_gives_what_was_written_or_an_integrity_error(tmp_path: Path) -> None:
    """Without the digest of the whole file, which a search has no time for: each video's rows have their own."""
    path = tmp_path / "1.h5"
    write_some_embeddings(path)
    whole = path.read_bytes()
    with store.EmbeddingsShard(path) as shard:
        written = [shard.embedding(row) for row in range(len(shard))]
    rng = np.random.default_rng(5)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for at in rng.integers(0, len(whole), size=4):
            damaged[at] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            with store.EmbeddingsShard(path) as shard:
                for row in range(len(shard)):
                    back = shard.embedding(row)
                    for name in ("vector", "features", "pts_seconds", "scores"):
                        np.testing.assert_array_equal(getattr(back, name), getattr(written[row], name))
                    for name in ("video_id", "span_seconds", "n_frames", "selector"):
                        assert getattr(back, name) == getattr(written[row], name)
        except IntegrityError:
            refused += 1
    assert refused > 50


def test_a_file_that_is_not_hdf5_or_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.h5").write_text("not HDF5")
    (tmp_path / "folder.h5").mkdir()
    for name in ("text.h5", "absent.h5", "folder.h5"):
        with pytest.raises(IntegrityError, match=name):
            store.FramesShard(tmp_path / name)


# ----------------------------------------------------------------------------------------------------- full disk


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments], capture_output=True, text=True, cwd=ROOT, timeout=60
    )


@pytest.mark.fault
@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="this system has no limit on file sizes")
def test_a_full_disk_is_one_clear_error_and_leaves_nothing(tmp_path: Path) -> None:
    code = """
        import resource, sys
        from pathlib import Path
        import numpy as np
        from pipeline import store
        from pipeline.errors import FinecoError
        from pipeline.types import FrameFeatures
        rows = np.zeros((4096, 64), np.float32)
        rows[:, 0] = 1
        features = FrameFeatures("x", rows, np.arange(4096.0), 1.0)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            store.write_features(Path(sys.argv[1]), [(store.StoredVideo("x", "0" * 32, 1.0), features)])
        except FinecoError as error:
            print(type(error).__name__, error)
    """
    done = run_python(code, str(tmp_path / "features" / "000001.h5"))
    assert done.returncode == 0, done.stderr  # and not -11: HDF5 itself dies of a full disk at exit
    assert done.stdout.startswith("FinecoError cannot write ")
    assert "000001.h5" in done.stdout
    assert "space" in done.stdout
    assert list((tmp_path / "features").iterdir()) == []


def test_a_disk_that_refuses_is_reported_for_every_kind_of_shard(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(FinecoError, match="cannot write"):
        write_some_embeddings(tmp_path / "file" / "1.h5")
