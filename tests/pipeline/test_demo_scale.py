"""Composed collections: what stands where, and what of an exhaustive search is found by means and by moments."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fakes import FakeEncoder
from pipeline import demo
from pipeline.collection import Collection, Snapshot
from pipeline.commands import Machine, select
from pipeline.commits import FEATURES, Row
from pipeline.demo import DemoVideo, SceneCut, find_shots, run_at_scale
from pipeline.demo_scale import (
    SELECT,
    Comparison,
    Found,
    Shots,
    compare,
    compose,
    index_composed,
    ranks_of,
    video_name,
    write_composed,
)
from pipeline.errors import FinecoError
from pipeline.store import EmbeddingsShard, FeaturesShard, StoredVideo, write_features
from pipeline.types import Float32, FrameFeatures, Outcome

DIM, N_ASKED, N_OTHERS, N_VIDEOS, N_SCENES = 64, 16, 60, 60, 16
QUERIES = [f"word{number} thing{number}" for number in range(N_ASKED)]


def unit(rows: Float32) -> Float32:
    norms: Float32 = np.linalg.norm(rows, axis=-1, keepdims=True)
    return (rows / norms).astype(np.float32)


def shot_around(centre: Float32, rng: np.random.Generator, n_frames: int = 5) -> Float32:
    """(n_frames, DIM) frames that look alike: a cosine of some 0.99 with the centre."""
    noise = unit(rng.standard_normal((n_frames, len(centre))).astype(np.float32))
    return unit(centre + 0.15 * noise)


@pytest.fixture(scope="module")
def encoder() -> FakeEncoder:
    return FakeEncoder(dim=DIM)


@pytest.fixture(scope="module")
def shots(encoder: FakeEncoder) -> Shots:
    """A scene that is asked for lies halfway between its query and chance; the others lie anywhere."""
    rng = np.random.default_rng(4)
    scenes = unit(rng.standard_normal((N_ASKED + N_OTHERS + 9, DIM)).astype(np.float32))
    scenes[:N_ASKED] = unit(encoder.encode_text(QUERIES) + scenes[:N_ASKED])
    made = [shot_around(scene, rng) for scene in scenes]
    return Shots(made[:N_ASKED], made[N_ASKED : N_ASKED + N_OTHERS], made[N_ASKED + N_OTHERS :])


@pytest.fixture(scope="module")
def made(
    shots: Shots, encoder: FakeEncoder, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Collection, list[str], Comparison]:
    """A collection of composed videos, the right video of each query, and what was measured with eight candidates."""
    videos, owners = compose(shots, [N_SCENES] * N_VIDEOS, seed=1)
    folder = tmp_path_factory.mktemp("composed") / "at-scale"
    collection = write_composed(folder, videos, encoder)
    select(folder, SELECT, quiet(), encoder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("indexes.build.CANDIDATES", 8)
        patch.setattr("indexes.build.MOST_CANDIDATES", 8)
        index_composed(collection, encoder, quiet())
    names = [video_name(owner) for owner in owners.tolist()]
    return collection, names, compare(collection, QUERIES, names, encoder)


def quiet() -> Machine:
    return Machine(quiet=True, say=lambda line: None)


def shows(video: Float32, shot: Float32) -> int:
    """How often the first frames of a shot stand in a video."""
    return sum(np.array_equal(video[at : at + 2], shot[:2]) for at in range(len(video) - 1))


def test_every_scene_that_is_asked_for_stands_in_one_video_once(shots: Shots) -> None:
    videos, owners = compose(shots, [N_SCENES] * N_VIDEOS, seed=1)
    assert len(videos) == N_VIDEOS
    for shot, owner in zip(shots.asked, owners.tolist(), strict=True):
        assert [n for n, video in enumerate(videos) for _ in range(shows(video, shot))] == [owner]


def test_so_do_they_where_there_is_no_room_for_others(shots: Shots) -> None:
    videos, owners = compose(shots, [1] * N_ASKED, seed=1)
    assert sorted(owners.tolist()) == list(range(N_ASKED))
    assert all(shows(videos[owner], shot) == 1 for shot, owner in zip(shots.asked, owners.tolist(), strict=True))


def test_a_video_is_so_many_shots_each_shown_from_its_start_and_a_third_are_empty(shots: Shots) -> None:
    counts = [1, 3, 9, 27] * 10
    videos, _ = compose(shots, counts, seed=2)
    of_others, of_empty = ([sum(shows(v, s) for s in part) for v in videos] for part in (shots.others, shots.empty))
    of_asked = [sum(shows(v, s) for s in shots.asked) for v in videos]
    assert [sum(n) for n in zip(of_asked, of_others, of_empty, strict=True)] == counts
    assert sum(of_empty) / (sum(counts) - N_ASKED) == pytest.approx(1 / 3, abs=0.07)
    longest = [len(video) / (5 * n) for video, n in zip(videos, counts, strict=True)]
    assert 0.6 < np.mean(longest[3::4]) < 0.8  # a shot shows 2 to 5 of its 5 frames
    bank = {row.tobytes() for part in (shots.asked, shots.others, shots.empty) for shot in part for row in shot}
    assert all(row.tobytes() in bank for video in videos for row in video)


def test_without_empty_shots_there_are_none(shots: Shots) -> None:
    videos, _ = compose(Shots(shots.asked, shots.others), [N_SCENES] * N_VIDEOS, seed=1)
    assert sum(shows(video, shot) for video in videos for shot in shots.empty) == 0


def test_the_seed_decides_everything(shots: Shots) -> None:
    one, two, other = (compose(shots, [N_SCENES] * N_VIDEOS, seed) for seed in (1, 1, 2))
    assert [video.tobytes() for video in one[0]] == [video.tobytes() for video in two[0]]
    assert one[1].tolist() == two[1].tolist()
    assert [video.tobytes() for video in one[0]] != [video.tobytes() for video in other[0]]


def slow_ranks(collection: Collection, owners: list[str], encoder: FakeEncoder) -> tuple[list[int], float]:
    """The rank of each query's video when every kept frame of every video is scored one by one; frames a video."""
    kept: dict[str, Float32] = {}
    for path in sorted((collection.folder / "embeddings" / str(collection.current_selection())).glob("*.h5")):
        with EmbeddingsShard(path) as shard:
            kept.update({name: shard.embedding(row).features for row, name in enumerate(shard.video_ids)})
    ranks = []
    for query, owner in zip(QUERIES, owners, strict=True):
        z = encoder.encode_text([query])[0].astype(np.float64)
        scores = {}
        for name, frames in kept.items():
            cosines = [float(np.dot(frame.astype(np.float64), z)) for frame in frames]
            weights = [np.exp(cosine / encoder.spec.temperature) for cosine in cosines]
            scores[name] = sum(c * w for c, w in zip(cosines, weights, strict=True)) / sum(weights)
        ranks.append(sorted(scores, key=lambda name: -scores[name]).index(owner) + 1)
    return ranks, float(np.mean([len(frames) for frames in kept.values()]))


def test_the_exhaustive_row_is_what_a_slow_search_finds(
    made: tuple[Collection, list[str], Comparison], encoder: FakeEncoder
) -> None:
    collection, owners, found = made
    ranks, n_frames = slow_ranks(collection, owners, encoder)
    assert found.exhaustive.recall_at_1 == np.mean([rank == 1 for rank in ranks])
    assert found.exhaustive.recall_at_5 == np.mean([rank <= 5 for rank in ranks])
    assert found.exhaustive.vectors == n_frames
    assert len(set(ranks)) > 1  # else any order would do


def test_moments_beat_one_mean(made: tuple[Collection, list[str], Comparison]) -> None:
    _, _, found = made
    assert found.mean.vectors == 1
    assert 1 < found.moments.vectors <= found.exhaustive.vectors
    assert found.moments.held >= found.mean.held + 0.3
    assert found.moments.recall_at_1 >= found.mean.recall_at_1 + 0.3
    assert found.met


def test_the_mean_row_is_what_the_pooled_vectors_propose(
    made: tuple[Collection, list[str], Comparison], encoder: FakeEncoder
) -> None:
    collection, owners, found = made
    held = []
    for query, owner in zip(QUERIES, owners, strict=True):
        z, means = encoder.encode_text([query])[0], {}
        for path in (collection.folder / "embeddings" / str(collection.current_selection())).glob("*.h5"):
            with EmbeddingsShard(path) as shard:
                means.update({name: shard.embedding(row).vector @ z for row, name in enumerate(shard.video_ids)})
        held.append(owner in sorted(means, key=lambda name: -means[name])[:8])
    assert found.mean.held == np.mean(held)
    assert 0 < found.mean.held < 1


def test_a_rank_counts_what_scores_as_well_and_no_rank_is_good_without_being_a_candidate() -> None:
    scores = np.array([[0.1, 0.9, 0.5], [0.5, 0.9, 0.5], [-np.inf, 0.9, 0.5], [0.9, 0.1, 0.2]], np.float32)
    assert ranks_of(scores, np.array([0, 0, 0, 0])).tolist() == [3, 3, 3, 1]


def test_the_goal_can_be_missed() -> None:
    def met(held: float, first: float, best: float) -> bool:
        mean, exhaustive = Found("", 1, 1, 1, 1), Found("", 9, 1, best, 1)
        return Comparison(mean, Found("", 5, held, first, 1), exhaustive).met

    assert met(0.97, 0.97, 1.0)
    assert met(0.5, 0.5, 0.5)
    assert not met(0.96, 0.97, 1.0)
    assert not met(1.0, 0.96, 1.0)
    assert not met(1.0, 0.0, 0.0)  # where nothing can be found, nothing was shown


def test_one_that_was_composed_is_replaced_and_no_other(shots: Shots, encoder: FakeEncoder, tmp_path: Path) -> None:
    videos, _ = compose(shots, [2] * 8, seed=1)
    folder = tmp_path / "at-scale"
    write_composed(folder, videos, encoder)
    select(folder, SELECT, quiet(), encoder)
    collection = write_composed(folder, videos[:4], encoder)
    assert sorted(collection.state().places) == [FEATURES]
    assert len(collection.state().places[FEATURES]) == 4

    kitchen = Collection.create(tmp_path / "kitchen", {"model": "fake"})
    with pytest.raises(FinecoError, match="not the demo's"):
        write_composed(kitchen.folder, videos, encoder)
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "will.txt").write_text("all to my cat")
    with pytest.raises(FinecoError, match="is not a collection"):
        write_composed(tmp_path / "papers", videos, encoder)
    assert (tmp_path / "papers" / "will.txt").exists() and Collection.exists(kitchen.folder)


def rendered(folder: Path, videos: list[DemoVideo], encoder: FakeEncoder) -> Collection:
    """A collection as `run` leaves that of the demo: two frames a second, those of one scene in one direction."""
    config = {"model": "fake", "sampling": {"mode": "fps", "value": 2.0}}
    collection = Collection.create(folder, config)
    collection.update(config, {"name": "fake", "fingerprint": encoder.spec.fingerprint, "spec": {"dim": DIM}})
    rng = np.random.default_rng(0)
    rows, stored = list[Row](), []
    for video in videos:
        centres = encoder.encode_text([" ".join(cut.scene) for cut in video.cuts])
        times = np.arange(0.01, video.cuts[-1].end_seconds - 0.1, 0.5)
        cut_of = np.searchsorted([cut.end_seconds for cut in video.cuts], times, side="right")
        features = unit(centres[cut_of] + 0.001 * rng.standard_normal((len(times), DIM)).astype(np.float32))
        name = f"{len(rows):032x}"
        stored.append((StoredVideo(name, name, 1.0), FrameFeatures(name, features, times, 0.5)))
        rows.append(Row(Outcome(name, f"/videos/{video.name}", "ok", "run"), name, 1, 1, 1, 1.0))
    with collection.writing("test") as writer:
        writer.commit("run", rows, [(FEATURES, lambda path: write_features(path, stored))])
    return collection


def planned(n_videos: int) -> list[DemoVideo]:
    """Videos of three scenes of two and a half seconds; the query is in the words of one."""
    videos = []
    for number in range(n_videos):
        scenes = [(f"colour{number}", f"shape{part}", f"size{number}", "place", f"motion{part}") for part in range(3)]
        cuts = tuple(SceneCut(scene, 0, 2.5 * part, 2.5 * part + 2.5) for part, scene in enumerate(scenes))
        answer = number % 3
        query = " ".join(scenes[answer])
        videos.append(DemoVideo(f"video-{number:03d}.mp4", cuts, query, query, answer))
    return videos


def test_the_shots_of_a_rendered_video_are_the_frames_between_its_cuts(encoder: FakeEncoder, tmp_path: Path) -> None:
    videos = planned(8)
    found = find_shots(videos, rendered(tmp_path / "c", videos, encoder))
    asked = encoder.encode_text([video.query for video in videos])
    assert [len(shot) for shot in (*found.asked, *found.others)] == [5] * 24
    for shot, centre in zip(found.asked, asked, strict=True):
        assert (shot @ centre).min() > 0.99
    others = encoder.encode_text([" ".join(cut.scene) for v in videos for n, cut in enumerate(v.cuts) if n != v.answer])
    for shot, centre in zip(found.others, others, strict=True):
        assert (shot @ centre).min() > 0.99


@pytest.mark.parametrize("spoilt", [False, True])
def test_the_second_part_of_the_demo_says_whether_its_goal_is_met(
    spoilt: bool,
    encoder: FakeEncoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(demo, "SCALE_VIDEOS", 150)
    monkeypatch.setattr(demo, "EMPTY_SHOTS", 8)
    if spoilt:
        monkeypatch.setattr("pipeline.search.Searcher.candidates", lambda self, vectors, n: [(np.arange(1), None)] * 8)
        monkeypatch.setattr("pipeline.search.Searcher.search", lambda self, queries, k: [[]] * 8)
    videos, said = planned(8), list[str]()
    collection = rendered(tmp_path / "c", videos, encoder)
    machine = Machine(quiet=True, say=said.append)
    assert run_at_scale(tmp_path / "at-scale", videos, collection, encoder, machine) is not spoilt
    shown = capfd.readouterr().out
    assert ("MISSED" in shown, ") met" in shown) == (spoilt, not spoilt)
    assert all(name in shown for name in ("one mean per video", "moments", "(exhaustive)"))
    assert [line.partition(":")[0] for line in said[-2:]] == ["Index plan", "Index built"]
    assert json.loads((tmp_path / "at-scale" / "collection.json").read_bytes())["config"]["made_by"] == "fineco demo"
    snapshot = Snapshot(Collection(tmp_path / "at-scale"))
    with FeaturesShard(snapshot.collection.open_file(f"{FEATURES}/000001.h5", snapshot.records)) as shard:
        assert len(shard) == 150
