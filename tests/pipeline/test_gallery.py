"""What an index is built of: against reading every video of every shard on its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from indexes.id_map import video_key
from pipeline import gallery, store
from pipeline.errors import IntegrityError
from pipeline.gallery import Gallery
from pipeline.types import Float32, VideoEmbedding
from small_galleries import (
    DIM,
    SELECTION,
    SmallVideo,
    add,
    gallery_of,
    make_collection,
    path_of,
    random_video,
    remove,
)

VIDEOS = [random_video(number) for number in range(40)]
GONE = [3, 11, 12, 39]  # in the middle and at the end of a shard, and all there is of one
AGAIN = [5, 20]  # which were selected anew
LONGEST = 12  # frames of any video


def again(number: int) -> SmallVideo:
    """The video as it was selected anew: other frames."""
    return replace(random_video(number + 100), video_id=VIDEOS[number].video_id)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five shards; some of their videos are gone, some have newer rows in the last. And one of another selection."""
    folder = tmp_path_factory.mktemp("gallery") / "kitchen"
    make_collection(folder, VIDEOS[:10], VIDEOS[10:11], VIDEOS[11:13], VIDEOS[13:])
    add(folder, [random_video(number + 1000) for number in range(3)], "uniform-1")
    add(folder, [again(number) for number in AGAIN])
    remove(folder, *(VIDEOS[number] for number in GONE))
    return folder


def read_slowly(folder: Path, selection: str = SELECTION) -> dict[str, tuple[list[int], VideoEmbedding]]:
    """Place (commit, row) and embedding of every video whose file is there, by its last row."""
    found = {}
    for path in sorted((folder / "embeddings" / selection).glob("*.h5")):
        with store.EmbeddingsShard(path) as shard:
            for row, video_id in enumerate(shard.video_ids):
                found[video_id] = [int(path.stem), row], shard.embedding(row)
    return {v: what for v, what in found.items() if path_of(folder, v).exists()}


def moments_by_id(some: Gallery) -> dict[int, Float32]:
    """Every moment that comes; none may come twice."""
    found: dict[int, Float32] = {}
    for ids, vectors in some.moments():
        assert ids.dtype == np.int64 and vectors.dtype == np.float32 and vectors.shape == (len(ids), DIM)
        assert not found.keys() & set(ids.tolist())
        found.update(zip(ids.tolist(), vectors, strict=True))
    return found


def frames_by_video(some: Gallery) -> dict[int, Float32]:
    """Every video's frames that come; none may come twice."""
    found: dict[int, Float32] = {}
    for block in some.frames(len(some)):
        assert block.features.dtype == np.float32 and block.features.shape == (block.offsets[-1], DIM)
        assert len(block.offsets) == len(block.videos) + 1 and block.offsets[0] == 0
        for at, video in enumerate(block.videos.tolist()):
            assert video not in found
            found[video] = block.features[block.offsets[at] : block.offsets[at + 1]]
    return found


def test_videos_are_those_that_are_there_by_ascending_key(folder: Path) -> None:
    some, expected = gallery_of(folder), read_slowly(folder)
    assert len(some) == len(expected) == 36
    assert some.video_ids == sorted(expected, key=video_key)
    assert some.id_map.keys.tolist() == [video_key(v) for v in some.video_ids]
    assert some.id_map.counts.tolist() == [len(expected[v][1].moments) for v in some.video_ids]
    assert some.places.tolist() == [expected[v][0] for v in some.video_ids]
    assert some.paths == [str(path_of(folder, v)) for v in some.video_ids]
    assert some.dim == DIM
    assert some.lengths.tolist() == [len(expected[v][1].features) for v in some.video_ids]


@pytest.mark.parametrize("n_videos", [0, 1, 9, 36, 50])
def test_the_frames_of_the_first_videos_are_those_and_no_others(folder: Path, n_videos: int) -> None:
    some = gallery_of(folder)
    found = {video for block in some.frames(n_videos) for video in block.videos.tolist()}
    assert found == set(range(min(n_videos, 36)))


def test_so_many_videos_have_so_many_frames_at_most_and_one_is_the_least(folder: Path) -> None:
    some = gallery_of(folder)
    for n in range(1, 37):
        total = int(some.lengths[:n].sum())
        assert some.n_videos_of(total) == n
        assert some.n_videos_of(total - 1) == max(1, n - 1)
    assert some.n_videos_of(0) == 1


def test_moments_are_those_of_a_slow_reading_of_the_shards(folder: Path) -> None:
    some, expected = gallery_of(folder), read_slowly(folder)
    found = moments_by_id(some)
    assert len(found) == len(some.id_map) == sum(len(e.moments) for _, e in expected.values())
    for video, video_id in enumerate(some.video_ids):
        ids = some.id_map.ids_of(np.array([video])).tolist()
        np.testing.assert_array_equal([found[i] for i in ids], expected[video_id][1].moments.vectors)


def test_moments_come_shard_by_shard_the_same_in_every_pass(folder: Path) -> None:
    some = gallery_of(folder)
    passes = [[(ids.tolist(), vectors.tolist()) for ids, vectors in some.moments()] for _ in range(2)]
    assert passes[0] == passes[1]
    numbers = [sorted({some.places[v][0] for v in some.id_map.videos_of(np.array(ids))}) for ids, _ in passes[0]]
    assert numbers == [[1], [2], [4], [6]]  # of the third shard nothing is left


@pytest.mark.parametrize("block_rows", [1, 7, 30, 10_000])
def test_frames_are_those_of_a_slow_reading_in_blocks_of_bounded_size(
    folder: Path, monkeypatch: pytest.MonkeyPatch, block_rows: int
) -> None:
    monkeypatch.setattr(gallery, "BLOCK_ROWS", block_rows)
    some, expected = gallery_of(folder), read_slowly(folder)
    found = frames_by_video(some)
    assert sorted(found) == list(range(len(some)))
    for video, frames in found.items():
        np.testing.assert_array_equal(frames, expected[some.video_ids[video]][1].features)
    sizes = [len(block.features) for block in some.frames(len(some))]
    assert max(sizes) < block_rows + LONGEST
    assert len(sizes) <= 4 + sum(sizes) / block_rows  # and not in many tiny ones


def test_a_video_longer_than_a_block_comes_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery, "BLOCK_ROWS", 10)
    long = SmallVideo("long", np.repeat(VIDEOS[0].frames[:1], 95, axis=0), (95,))
    make_collection(tmp_path / "kitchen", [VIDEOS[0], long, VIDEOS[1], VIDEOS[2]])
    some = gallery_of(tmp_path / "kitchen")
    lengths = {some.video_ids[video]: len(frames) for video, frames in frames_by_video(some).items()}
    assert lengths == {v.video_id: len(v.frames) for v in (VIDEOS[0], long, VIDEOS[1], VIDEOS[2])}


def test_a_gallery_does_not_depend_on_the_order_of_videos(tmp_path: Path) -> None:
    shuffled = [VIDEOS[at] for at in np.random.default_rng(7).permutation(40)]
    make_collection(tmp_path / "one", VIDEOS[:25], VIDEOS[25:])
    make_collection(tmp_path / "other", shuffled[:4], shuffled[4:5], shuffled[5:])
    one, other = gallery_of(tmp_path / "one"), gallery_of(tmp_path / "other")
    for name in ("keys", "counts", "ids", "videos"):
        np.testing.assert_array_equal(getattr(one.id_map, name), getattr(other.id_map, name))
    assert (one.video_ids, one.paths) == (other.video_ids, other.paths)
    assert one.places.tolist() != other.places.tolist()
    for read in (moments_by_id, frames_by_video):
        expected, found = read(one), read(other)
        assert expected.keys() == found.keys()
        for number, vectors in expected.items():
            np.testing.assert_array_equal(found[number], vectors)


def test_another_selection_has_a_gallery_of_its_own(folder: Path) -> None:
    some = gallery_of(folder, "uniform-1")
    assert set(some.video_ids) == {f"clip-{number + 1000}" for number in range(3)}
    assert len(moments_by_id(some)) == len(some.id_map)


def test_without_videos_a_gallery_is_empty(tmp_path: Path) -> None:
    make_collection(tmp_path / "kitchen", VIDEOS[:2])
    remove(tmp_path / "kitchen", *VIDEOS[:2])
    some = gallery_of(tmp_path / "kitchen")
    assert (len(some), len(some.id_map), some.places.shape) == (0, 0, (0, 2))
    assert list(some.moments()) == []
    assert list(some.frames(5)) == []


def test_a_damaged_shard_is_refused_before_anything_is_read_of_it(tmp_path: Path) -> None:
    make_collection(tmp_path / "kitchen", VIDEOS[:3], VIDEOS[3:6])
    shard = tmp_path / "kitchen" / "embeddings" / SELECTION / "000002.h5"
    whole = shard.read_bytes()
    for at in (len(whole) // 3, len(whole) // 2, len(whole) - 1):
        shard.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(IntegrityError, match=r"000002\.h5"):
            gallery_of(tmp_path / "kitchen")
    shard.unlink()
    with pytest.raises(IntegrityError, match=r"000002\.h5"):
        gallery_of(tmp_path / "kitchen")


def test_two_videos_of_one_key_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_collection(tmp_path / "kitchen", VIDEOS[:6])
    monkeypatch.setattr(gallery, "video_key", lambda v: video_key(v) if v not in ("clip-2", "clip-4") else 7)
    with pytest.raises(IntegrityError, match=r"videos clip-2 and clip-4 have one key"):
        gallery_of(tmp_path / "kitchen")
