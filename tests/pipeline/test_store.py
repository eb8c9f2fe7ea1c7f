"""Shards: what is written comes back; what is not a shard of ours is refused before it is read."""

from __future__ import annotations

import resource
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest

from indexes.id_map import IdMap, moment_ids
from pipeline import schema, store
from pipeline.errors import FinecoError, IntegrityError
from pipeline.files import check_file
from pipeline.lookup import Lookup, write_lookup
from pipeline.rescore import Background
from pipeline.store import StoredFrames, StoredVideo
from pipeline.types import Float32, Float64, FrameFeatures, Moments, VideoEmbedding

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


def moments(number: int, n: int) -> Moments:
    """Of `n` kept frames: all but the last one, where there are others, and that one."""
    n_frames = np.array([n - 1, 1] if n > 1 else [1], np.int64)
    ends = np.cumsum(n_frames)
    starts = ends - n_frames
    vectors = store.round_features(unit_rows(len(n_frames), 50 + number))
    return Moments(vectors, times(n)[starts], times(n)[ends - 1] + 0.25, n_frames)


def embedding(number: int, n: int) -> VideoEmbedding:
    rows = store.round_features(unit_rows(n, number))
    scores = np.linspace(-1, 1, n, dtype=np.float32)
    vector = unit_rows(1, number)[0]
    return VideoEmbedding(f"clip-{number}", vector, rows, moments(number, n), times(n), scores, 0.5, n + 3, "caption")


def check_same(found: VideoEmbedding, expected: VideoEmbedding) -> None:
    """Every value, to the bit."""
    for name in ("vector", "features", "pts_seconds", "scores"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    for name in ("vectors", "start_seconds", "end_seconds", "n_frames"):
        np.testing.assert_array_equal(getattr(found.moments, name), getattr(expected.moments, name))
    for name in ("video_id", "span_seconds", "n_frames", "selector"):
        assert getattr(found, name) == getattr(expected, name)


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
        expected = [embedding(i, n) for i, n in enumerate((3, 1, 4))]
        for i, video_of_row in enumerate(expected):
            check_same(shard.embedding(i), video_of_row)
        np.testing.assert_array_equal(shard.vectors(), np.stack([unit_rows(1, i)[0] for i in range(3)]))
        assert shard.dim == DIM
        assert shard.offsets.tolist() == [0, 3, 4, 8]
        assert shard.moment_offsets.tolist() == [0, 2, 3, 5]
        for i, video_of_row in enumerate(expected):
            np.testing.assert_array_equal(shard.kept_features(i), video_of_row.features)
        assert shard.moment_vectors().dtype == shard.kept_features(0).dtype == np.float32
        np.testing.assert_array_equal(shard.moment_vectors(), np.concatenate([e.moments.vectors for e in expected]))


def test_rows_are_copied_with_their_moments_and_their_digests(tmp_path: Path) -> None:
    """Out of several shards, in another order."""
    write_some_embeddings(tmp_path / "1.h5")
    store.write_embeddings(tmp_path / "2.h5", [(video(7), embedding(7, 5))])
    with store.EmbeddingsShard(tmp_path / "1.h5") as one, store.EmbeddingsShard(tmp_path / "2.h5") as two:
        store.copy_rows(tmp_path / "3.h5", [one.rows(2), two.rows(0), one.rows(1)])
        digests = [one.row_digest(2), two.row_digest(0), one.row_digest(1)]
    with store.EmbeddingsShard(tmp_path / "3.h5") as shard:
        for row, (number, n) in enumerate(((2, 4), (7, 5), (1, 1))):
            check_same(shard.embedding(row), embedding(number, n))
            assert shard.row_digest(row) == digests[row]
        assert shard.moment_offsets.tolist() == [0, 2, 4, 5]


def test_what_has_moments_is_of_a_later_version(tmp_path: Path) -> None:
    """The files of the version before are refused and not misread; frames and features are as they were."""
    write_some_embeddings(tmp_path / "1.h5")
    write_a_lookup(tmp_path / "v.h5")
    for name, kind, what in (("1.h5", store.EmbeddingsShard, "embeddings"), ("v.h5", Lookup, "lookup")):
        with h5py.File(tmp_path / name, "r+") as file:
            assert file.attrs["schema"] == 3
            file.attrs["schema"] = np.int64(2)
        with pytest.raises(IntegrityError, match=f"not an? {what} shard of schema 3"):
            kind(tmp_path / name)
    store.write_frames(tmp_path / "f.h5", [StoredFrames(video(0), [b"abc"], times(1), 1.0)])
    store.write_features(tmp_path / "x.h5", [(video(0), FrameFeatures("x", unit_rows(1), times(1), 1.0))])
    for name in ("f.h5", "x.h5"):
        with h5py.File(tmp_path / name) as file:
            assert file.attrs["schema"] == 2


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    write_some_embeddings(tmp_path / "a" / "1.h5")
    write_some_embeddings(tmp_path / "b" / "1.h5")
    assert (tmp_path / "a" / "1.h5").read_bytes() == (tmp_path / "b" / "1.h5").read_bytes()


def write_a_lookup(
    path: Path,
    keys: list[int] = [3, 2**53, 2**53 + 1, 2**63 - 1],  # noqa: B006 - never changed
    paths: list[str] | None = None,
    unrelated: float | None = 0.25,
) -> IdMap:
    """A lookup of videos of 1, 2, 3, 4 ... moments; video number v lies in row 10 v of commit v."""
    id_map = IdMap.of(np.array(keys, np.int64), np.arange(1, len(keys) + 1, dtype=np.int32))
    places = np.array([[v, 10 * v] for v in range(len(keys))], np.int64).reshape(-1, 2)
    names = [f"/v/{v}.mp4" for v in range(len(keys))] if paths is None else paths
    gallery: Any = SimpleNamespace(id_map=id_map, places=places, paths=names)
    write_lookup(path, gallery, Background(unit_rows(1, 9)[0], unrelated))
    return id_map


def test_lookup_finds_the_video_of_every_moment_with_any_path(tmp_path: Path) -> None:
    paths = ["/a/plain.mp4", "/a/new\nline.mp4", "/a/not-utf8-\udcff\udc80.mp4", "/a/'\"日本.mp4", ""]
    keys = [0, 7, 2**53, 2**53 + 1, 2**63 - 1]
    id_map = write_a_lookup(tmp_path / "v.h5", keys, paths)
    with Lookup(tmp_path / "v.h5") as lookup:
        assert len(lookup) == 5
        for name in ("keys", "counts", "ids", "videos"):
            back, expected = getattr(lookup.id_map, name), getattr(id_map, name)
            assert back.dtype == expected.dtype
            np.testing.assert_array_equal(back, expected)
        for video, key in enumerate(keys):
            ids = moment_ids(np.array([key]), np.array([video + 1]))
            assert lookup.id_map.videos_of(ids).tolist() == [video] * (video + 1)
            assert lookup.find(video) == (video, 10 * video, paths[video])
            assert lookup.place(video) == (video, 10 * video)
        assert lookup.places() == {video: [(10 * video, video)] for video in range(5)}
        for absent in (1, 2**53 + 2, 2**62):
            with pytest.raises(IntegrityError, match="the list beside it does not"):
                lookup.id_map.videos_of(np.array([absent]))


@pytest.mark.parametrize("unrelated", [0.25, -0.125, 0.0, None])
def test_lookup_says_what_a_query_scores_where_nothing_matches(unrelated: float | None, tmp_path: Path) -> None:
    write_a_lookup(tmp_path / "v.h5", unrelated=unrelated)
    with Lookup(tmp_path / "v.h5") as lookup:
        assert lookup.background.unrelated == unrelated
        np.testing.assert_array_equal(lookup.background.frame_mean, unit_rows(1, 9)[0])


def test_a_lookup_of_no_videos_comes_back(tmp_path: Path) -> None:
    write_a_lookup(tmp_path / "v.h5", [])
    with Lookup(tmp_path / "v.h5") as lookup:
        assert (len(lookup), len(lookup.id_map), lookup.places()) == (0, 0, {})


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
    "too few moments": (
        "moment_starts",
        lambda f, secret: f.create_dataset("moment_starts", data=np.zeros(4)),
    ),
    "too few moments' vectors": (
        "moment_vectors",
        lambda f, secret: f.create_dataset("moment_vectors", data=unit_rows(4).astype(np.float16)),
    ),
    "too many moments' frames": (
        "moment_frames",
        lambda f, secret: f.create_dataset("moment_frames", data=np.ones(6, np.int64)),
    ),
    "moments of other dtype": (
        "moment_vectors",
        lambda f, secret: f.create_dataset("moment_vectors", data=unit_rows(5)),
    ),
    "giant moments": (
        "moment_vectors",
        lambda f, secret: f.create_dataset("moment_vectors", (5, 10**11), "<f2"),
    ),
    "external moments": (
        "moment_ends",
        lambda f, secret: f.create_dataset("moment_ends", (5,), "<f8", external=[(str(secret), 0, 40)]),
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
    plain_and_small = name == "video_ids" or what.startswith("too few")  # no more than wrong: they are read
    assert plain_and_small or f"/{name}" not in read


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
    write_a_lookup(tmp_path / "v.h5", [1, 2], ["abc", "def"])
    store.write_frames(tmp_path / "f.h5", [StoredFrames(video(0), [b"abc", b"def"], times(2), 1.0)])
    data = np.array(offsets, np.int64)
    for file_name, name, kind in (
        ("v.h5", "path_offsets", Lookup),
        ("f.h5", "jpeg_offsets", store.FramesShard),
    ):
        change(tmp_path / file_name, name, lambda file, name=name: file.create_dataset(name, data=data))  # type: ignore[misc]
        with pytest.raises(IntegrityError, match=rf"{name}|columns of different lengths"):
            kind(tmp_path / file_name)


@pytest.mark.parametrize(
    "offsets",
    [[0, 2, 3, 6], [1, 2, 3, 5], [0, 4, 3, 5], [0, -1, 3, 5], [0, 2, 5], [0, 2, 3, 4, 5], [0, 2**62, -(2**62), 5]],
)
def test_offsets_of_moments_are_checked(offsets: list[int], tmp_path: Path) -> None:
    path = tmp_path / "1.h5"
    write_some_embeddings(path)
    change(path, "moment_offsets", lambda file: file.create_dataset("moment_offsets", data=np.array(offsets)))
    with pytest.raises(IntegrityError, match="moment_offsets"):
        store.EmbeddingsShard(path)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("moment_ids", [2, 0, 1, 3, 4, 5], "ids are not sorted"),
        ("moment_ids", [0, 1, 1, 2, 3, 4], "ids are not sorted"),
        ("moment_ids", [2**62, -(2**62) - 2, 5, 6, 7, 8], "ids are not sorted"),
        ("moment_ids", [0, 1, 2, 3, 4], "do not fit each other"),
        ("moment_videos", [0, 1, 1, 1, 2, 2], "moments are missing"),
        ("moment_videos", [0, 1, 1, 2, 2, 3], "moments are missing"),
        ("moment_videos", [0, 1, 1, 2, 2, -1], "negative"),
        ("counts", [1, 2, 4], "moments are missing"),
        ("counts", [3, 0, 3], "do not fit each other"),
        ("counts", [1, 2], "do not fit each other"),
        ("keys", [7, 9, 8], "keys are not sorted"),
        ("keys", [7, 7, 8], "keys are not sorted"),
        ("keys", [2**62, -(2**62) - 2, 5], "keys are not sorted"),
        ("keys", [7, 8], "do not fit each other"),
        ("places", [[0, 0], [1, 10]], "different lengths"),
        ("places", [[0], [1], [2]], "different lengths"),
    ],
)
def test_a_lookup_whose_columns_do_not_fit_each_other_is_refused(
    name: str, values: list[Any], message: str, tmp_path: Path
) -> None:
    write_a_lookup(tmp_path / "v.h5", [7, 8, 9])
    data = np.array(values, np.int32 if name in ("counts", "moment_videos") else np.int64)
    change(tmp_path / "v.h5", name, lambda file: file.create_dataset(name, data=data))
    with pytest.raises(IntegrityError, match=rf"v\.h5.*{message}"):
        Lookup(tmp_path / "v.h5")


@pytest.mark.parametrize(
    "change_it", [lambda m: m[::-1], lambda m: m + 1, lambda m: m - 1], ids=["back", "more", "less"]
)
def test_moments_that_are_not_of_the_kept_frames_are_damage(change_it: Callable[[Any], Any], tmp_path: Path) -> None:
    """Even with a digest that is right."""
    path = tmp_path / "1.h5"
    write_some_embeddings(path)
    with store.EmbeddingsShard(path, whole=True) as shard:
        columns = dict(shard._datasets)
    columns["moment_frames"] = change_it(columns["moment_frames"])
    store.write_shard(path, "embeddings", schema.EMBEDDINGS, columns, schema.MOMENTS_SCHEMA_VERSION)
    with store.EmbeddingsShard(path) as shard:
        for row in (0, 2):
            with pytest.raises(IntegrityError, match=f"clip-{row}"):
                shard.embedding(row)


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
        from pipeline import schema, store
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
                    check_same(shard.embedding(row), written[row])
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
        from pipeline import schema, store
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
