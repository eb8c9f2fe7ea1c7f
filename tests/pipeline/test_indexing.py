"""Which videos an index holds, when it is built anew, and what becomes of videos that are gone."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from fakes import FakeEncoder
from indexes.generations import current_generation, read_sidecar
from indexes.id_map import moment_ids, video_key
from indexes.search import VectorIndex, stored_ids, stored_vectors
from pipeline import commands, store
from pipeline.commands import Sources
from pipeline.config import SelectOptions
from pipeline.errors import FinecoError, IntegrityError, UsageError
from pipeline.inspect import status_of
from pipeline.lookup import LOOKUP_FILE, Lookup
from pipeline.probes import EVERYDAY_TEXTS
from pipeline.types import Int64, VideoEmbedding
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
    generation = current_generation(collection / "index")
    selection, found = read_sidecar(generation).selection, dict[str, str]()
    with Lookup(generation / LOOKUP_FILE) as lookup:
        for video in range(len(lookup)):
            number, row, path = lookup.find(video)
            with store.EmbeddingsShard(collection / "embeddings" / selection / f"{number:06d}.h5") as shard:
                assert video_key(shard.video_ids[row]) == lookup.id_map.keys[video]
                assert len(shard.embedding(row).moments) == lookup.id_map.counts[video]
                found[shard.video_ids[row]] = path
        assert len(found) == len(lookup)
        np.testing.assert_array_equal(np.sort(stored_ids(generation)), lookup.id_map.ids)
    return found


def ids_of(embedding: VideoEmbedding) -> Int64:
    """Ids of a video's moments in the index."""
    return moment_ids(np.array([video_key(embedding.video_id)]), np.array([len(embedding.moments)]))


def names(collection: Path) -> list[str]:
    return sorted(Path(path).name for path in indexed(collection).values())


def test_every_moment_is_in_the_index_under_its_id(collection: Path) -> None:
    generation = current_generation(collection / "index")
    index = VectorIndex.open(generation, FakeEncoder().spec.fingerprint)
    embeddings, paths, n_moments = embeddings_of(collection), indexed(collection), 0
    for path, embedding in embeddings.items():
        ids, vectors = ids_of(embedding), embedding.moments.vectors
        assert paths[embedding.video_id] == path
        np.testing.assert_array_equal(stored_vectors(generation, ids)[1], vectors)
        for identifier, vector, (found, scores) in zip(ids, vectors, index.search(vectors, 100), strict=True):
            (at,) = np.flatnonzero(found == identifier).tolist()
            assert scores[at] == pytest.approx(float(vector @ vector), abs=1e-6)
        n_moments += len(ids)
    assert len(paths) == len(embeddings) == 4
    assert len(index) == n_moments > 4


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


def test_another_goal_is_a_reason_to_build_and_is_kept(collection: Path) -> None:
    assert not commands.index(collection, machine=machine(), recall_goal=0.95)
    assert commands.index(collection, machine=machine(), recall_goal=0.8)
    for _ in range(2):
        assert not commands.index(collection, machine=machine())
        assert not commands.index(collection, machine=machine(), recall_goal=0.8)
        assert read_sidecar(current_generation(collection / "index")).extra["recall_goal"] == 0.8
        commands.index(collection, machine=machine(), force=True)


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
    embedding = embeddings_of(collection)[path]
    assert embedding.n_frames > len(embedding.features)
    assert len(index) == sum(len(e.moments) for e in embeddings_of(collection).values())
    found = stored_vectors(current_generation(collection / "index"), ids_of(embedding))[1]
    np.testing.assert_array_equal(found, embedding.moments.vectors)


def test_it_is_measured_with_the_texts_and_the_encoder_of_the_run(collection: Path) -> None:
    report = read_sidecar(current_generation(collection / "index")).report
    n_everyday = len(EVERYDAY_TEXTS)
    assert report.probes == f"2 texts beside videos, {n_everyday} everyday texts, 4 kept frames with noise"
    assert (report.n_probes, report.n_found) == (n_everyday + 6, n_everyday + 6)
    assert (report.n_videos, report.factory, report.candidates) == (4, "Flat", 100)


def test_the_same_videos_in_another_order_make_an_index_that_finds_the_same(videos: Path, tmp_path: Path) -> None:
    paths = sorted(str(path) for path in videos.glob("*.mp4"))
    run(tmp_path / "at once", videos)
    for path in reversed(paths):
        run(tmp_path / "one by one", Sources([path]))
    lookups = []
    for name in ("at once", "one by one"):
        assert embeddings_of(tmp_path / name).keys() == set(paths)
        generation = current_generation(tmp_path / name / "index")
        report = read_sidecar(generation).report
        with Lookup(generation / LOOKUP_FILE) as lookup:
            vectors = stored_vectors(generation, lookup.id_map.ids)[1].tobytes()
            background = lookup.background
            columns = (lookup.id_map.keys.tolist(), lookup.id_map.ids.tolist(), lookup.id_map.videos.tolist())
            measured = (report.n_probes, report.n_found, report.probes, report.n_vectors)
            lookups.append((columns, vectors, background.frame_mean.tobytes(), background.unrelated, measured))
    assert lookups[0] == lookups[1]


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
    assert said == ["No frames are selected yet: run 'fineco select' first."]
    commands.select(tmp_path / "c", SelectOptions("all"), machine())
    assert commands.index(tmp_path / "c", machine=machine())


def test_when_every_video_failed_there_is_no_index_and_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "broken.mp4").write_bytes(b"no video at all" * 100)
    assert run(tmp_path / "c", tmp_path / "videos").any_failed
    assert not (tmp_path / "c" / "index").exists()
    with pytest.raises(UsageError, match="no index yet"):
        commands.search(tmp_path / "c", ["a bird"], encoder=FakeEncoder())
