"""Which videos an index holds, when it is built anew, and what becomes of videos that are gone."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from fakes import FakeEncoder
from indexes.generations import current_generation, read_sidecar
from indexes.search import VectorIndex
from pipeline import commands, store
from pipeline.collection import Collection
from pipeline.commands import Sources
from pipeline.config import SelectOptions
from pipeline.errors import FinecoError, IntegrityError, UsageError
from pipeline.inspect import status_of
from pipeline.lookup import LOOKUP_FILE, Lookup, index_id
from small_runs import FPS5, checked, commits, embeddings_of, machine, make_clip, make_videos, run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_videos(tmp_path_factory.mktemp("made") / "videos")


@pytest.fixture
def videos(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "videos"))


@pytest.fixture
def collection(videos: Path, tmp_path: Path) -> Path:
    """A finished collection of the four videos."""
    run(tmp_path / "c", videos)
    return tmp_path / "c"


def indexed(collection: Path) -> dict[str, str]:
    """What the index in use holds: video id -> path."""
    with Lookup(current_generation(collection / "index") / LOOKUP_FILE) as lookup:
        found = {}
        selection = read_sidecar(current_generation(collection / "index")).selection
        ids = {index_id(v): v for v in Collection(collection).state().places[f"embeddings/{selection}"]}
        for identifier, video_id in ids.items():
            try:
                number, row, path = lookup.find(identifier)
            except IntegrityError:
                continue
            with store.EmbeddingsShard(collection / "embeddings" / selection / f"{number:06d}.h5") as shard:
                assert shard.video_ids[row] == video_id
            found[video_id] = path
        assert len(found) == len(lookup)
    return found


def names(collection: Path) -> list[str]:
    return sorted(Path(path).name for path in indexed(collection).values())


def test_every_vector_is_in_the_index_under_its_id(collection: Path) -> None:
    index = VectorIndex.open(current_generation(collection / "index"), FakeEncoder().spec.fingerprint)
    for path, embedding in embeddings_of(collection).items():
        ((ids, scores),) = index.search(embedding.vector[None], 1)
        assert indexed(collection)[embedding.video_id] == path
        assert ids.tolist() == [index_id(embedding.video_id)]
        np.testing.assert_allclose(scores, [1.0], atol=1e-6)


def test_it_is_built_anew_only_when_something_changed(collection: Path) -> None:
    said: list[str] = []
    generation = current_generation(collection / "index")
    before = (generation / "index.json").stat().st_mtime_ns
    assert not commands.index(collection, machine=machine(said.append))
    assert said == ["The index is up to date."]
    assert current_generation(collection / "index") == generation
    assert (generation / "index.json").stat().st_mtime_ns == before
    assert commands.index(collection, machine=machine(), force=True)
    assert current_generation(collection / "index") != generation


def test_another_kind_is_a_reason_to_build(collection: Path) -> None:
    assert commands.index(collection, "flat", machine=machine())
    assert not commands.index(collection, "flat", machine=machine())


def test_a_removed_video_leaves_the_index_and_comes_back(videos: Path, collection: Path, tmp_path: Path) -> None:
    away = tmp_path / "away.mp4"
    (videos / "clip2.mp4").rename(away)
    said: list[str] = []
    commands.index(collection, machine=machine(said.append))
    assert said[0].startswith("1 videos are gone")
    assert names(collection) == ["clip0.mp4", "clip1.mp4", "clip3.mp4"]
    assert checked(collection)["videos"] == 3
    assert status_of(collection)["videos"] == {"ok": 3, "removed": 1}
    commands.index(collection, machine=machine(said.append))
    assert said[-1] == "The index is up to date."  # and the video is not buried twice
    away.rename(videos / "clip2.mp4")
    encoder = FakeEncoder()
    assert run(collection, videos, encoder).counts.done_before == 4
    assert encoder.batch_sizes == []
    assert names(collection) == ["clip0.mp4", "clip1.mp4", "clip2.mp4", "clip3.mp4"]


def test_a_moved_video_is_found_at_its_new_place(videos: Path, collection: Path) -> None:
    (videos / "clip2.mp4").rename(videos / "moved.mp4")
    encoder = FakeEncoder()
    run(collection, videos, encoder)
    assert encoder.batch_sizes == []
    assert names(collection) == ["clip0.mp4", "clip1.mp4", "clip3.mp4", "moved.mp4"]


def test_a_replaced_video_gives_way_to_the_new_one(videos: Path, collection: Path) -> None:
    before = indexed(collection)
    make_clip(videos / "clip2.mp4", 7)
    run(collection, videos)
    after = indexed(collection)
    assert names(collection) == ["clip0.mp4", "clip1.mp4", "clip2.mp4", "clip3.mp4"]
    assert len(after.keys() - before.keys()) == len(before.keys() - after.keys()) == 1


def test_a_video_overwritten_by_a_broken_file_leaves_the_index(videos: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "videos.csv"
    manifest.write_text("path,id\nvideos/clip0.mp4,a\nvideos/clip1.mp4,b\n")
    sources, collection = Sources([], manifest), tmp_path / "c"
    run(collection, sources)
    good = (videos / "clip0.mp4").read_bytes()
    (videos / "clip0.mp4").write_bytes(b"no video at all" * 100)
    assert run(collection, sources).any_failed
    assert indexed(collection) == {"b": str(videos / "clip1.mp4")}
    (videos / "clip0.mp4").write_bytes(good)
    encoder = FakeEncoder()
    assert not run(collection, sources, encoder).any_failed
    assert encoder.batch_sizes == []
    assert indexed(collection).keys() == {"a", "b"}


def test_when_all_videos_are_gone_the_index_stays(videos: Path, collection: Path) -> None:
    before, n_commits = names(collection), len(commits(collection))
    videos.rename(videos.with_name("unmounted"))
    with pytest.raises(FinecoError, match="none of the 4 videos"):
        commands.index(collection, machine=machine())
    assert names(collection) == before
    assert len(commits(collection)) == n_commits


def test_a_video_selected_anew_is_in_the_index_once(videos: Path, collection: Path) -> None:
    (videos / "clip1.txt").write_text("something else entirely\n")
    run(collection, videos)
    assert names(collection) == ["clip0.mp4", "clip1.mp4", "clip2.mp4", "clip3.mp4"]
    (path,) = [path for path in indexed(collection).values() if path.endswith("clip1.mp4")]
    index = VectorIndex.open(current_generation(collection / "index"), FakeEncoder().spec.fingerprint)
    ((_, scores),) = index.search(embeddings_of(collection)[path].vector[None], 1)
    np.testing.assert_allclose(scores, [1.0], atol=1e-6)


def test_two_generations_are_kept(collection: Path) -> None:
    for _ in range(3):
        commands.index(collection, machine=machine(), force=True)
    generations = [p for p in (collection / "index").iterdir() if p.is_dir()]
    assert len(generations) == 2
    assert current_generation(collection / "index") in generations


def test_a_damaged_shard_stops_the_build_and_leaves_the_index_in_use(videos: Path, collection: Path) -> None:
    generation = current_generation(collection / "index")
    (shard,) = (collection / "embeddings" / "caption-0.5").glob("*.h5")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(IntegrityError, match=shard.name):
        commands.index(collection, machine=machine(), force=True)
    assert current_generation(collection / "index") == generation
    assert [p for p in (collection / "index").iterdir() if p.is_dir()] == [generation]


def test_a_damaged_index_is_built_anew(collection: Path) -> None:
    (current_generation(collection / "index") / "index.json").write_text("{}")
    assert commands.index(collection, machine=machine())
    assert checked(collection)["indexed"] == 4


def test_without_a_selection_there_is_nothing_to_index(videos: Path, tmp_path: Path) -> None:
    said: list[str] = []
    commands.embed(tmp_path / "c", Sources([str(videos)]), FPS5, machine(), FakeEncoder())
    assert not commands.index(tmp_path / "c", machine=machine(said.append))
    assert said == ["No video to index."]
    commands.select(tmp_path / "c", SelectOptions("all"), machine())
    assert commands.index(tmp_path / "c", machine=machine())


def test_when_every_video_failed_there_is_no_index_and_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "broken.mp4").write_bytes(b"no video at all" * 100)
    assert run(tmp_path / "c", tmp_path / "videos").any_failed
    assert not (tmp_path / "c" / "index").exists()
    with pytest.raises(UsageError, match="no index yet"):
        commands.search(tmp_path / "c", ["a bird"], encoder=FakeEncoder())
