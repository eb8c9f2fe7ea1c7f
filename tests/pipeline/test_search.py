"""Text in, videos and moments out: against scoring every stored frame of every video in plain loops."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from command_line import fineco
from fakes import FakeEncoder
from indexes.generations import SIDECAR_FILE, current_generation
from pipeline import commands, search
from pipeline.collection import Collection
from pipeline.commands import Sources
from pipeline.config import SelectOptions
from pipeline.errors import FinecoError, IntegrityError, UsageError
from pipeline.files import read_sealed, seal
from pipeline.lookup import LOOKUP_FILE
from pipeline.output import format_hits
from pipeline.probes import EVERYDAY_TEXTS
from pipeline.search import Searcher
from pipeline.text_vectors import TEXTS_FILE
from pipeline.types import Hit
from small_galleries import DIM, SmallVideo, make_collection, unit
from small_runs import checked, embeddings_of, features_of, machine, make_videos, run

QUERIES = ["a red block", "blue birds on a hill", "snow"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A collection of nine videos in two shards of embeddings."""
    folder = tmp_path_factory.mktemp("finished")
    run(folder / "c", make_videos(folder / "videos", 5))
    run(folder / "c", make_videos(folder / "videos", 9))
    return folder / "c"


@pytest.fixture
def collection(finished: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(finished, tmp_path / "c"))


def ask(collection: Path, queries: list[str], encoder: FakeEncoder | None = None, **options: object) -> list[list[Hit]]:
    with Searcher(Collection(collection), encoder or FakeEncoder()) as searcher:
        return searcher.search(queries, **options)  # type: ignore[arg-type]


def nearest_moments(collection: Path, query: str) -> dict[str, float]:
    """The cosine of every video's nearest moment, by path."""
    vector = FakeEncoder().encode_text([query])[0]
    return {path: float((e.moments.vectors @ vector).max()) for path, e in embeddings_of(collection).items()}


def say_of_index(collection: Path, **fields: object) -> None:
    """Changes what the report of the index in use says."""
    path = current_generation(collection / "index") / SIDECAR_FILE
    content = read_sealed(path)
    content["report"] |= fields
    path.write_bytes(seal(content))


def plain_scores(collection: Path, query: str) -> dict[str, float]:
    """The softmax-weighted mean of every video's frame cosines, by path."""
    vector = FakeEncoder().encode_text([query])[0].astype(np.float64)
    scores = {}
    for path, embedding in embeddings_of(collection).items():
        cosines = [math.fsum(a * b for a, b in zip(f, vector, strict=True)) for f in embedding.features.tolist()]
        weights = [math.exp((c - max(cosines)) / FakeEncoder().spec.temperature) for c in cosines]
        scores[path] = math.fsum(w * c for w, c in zip(weights, cosines, strict=True)) / math.fsum(weights)
    return scores


@pytest.mark.parametrize("query", QUERIES)
def test_hits_are_those_of_scoring_every_stored_frame(query: str, finished: Path) -> None:
    (hits,) = ask(finished, [query], k=20)
    expected = plain_scores(finished, query)
    assert [hit.path for hit in hits] == sorted(expected, key=lambda path: -expected[path])
    np.testing.assert_allclose([hit.score for hit in hits], [expected[hit.path] for hit in hits], atol=1e-6)
    assert [hit.rank for hit in hits] == list(range(1, 10))
    ids = {path: e.video_id for path, e in embeddings_of(finished).items()}
    assert [hit.video_id for hit in hits] == [ids[hit.path] for hit in hits]


@pytest.mark.parametrize("query", QUERIES)
def test_moments_lie_in_the_video_and_the_best_comes_first(query: str, finished: Path) -> None:
    (hits,) = ask(finished, [query])
    features = features_of(finished)
    vector = FakeEncoder().encode_text([query])[0]
    for hit in hits:
        last = features[hit.path].pts_seconds[-1] + features[hit.path].span_seconds
        assert hit.moments
        assert all(0 <= m.start_seconds <= m.end_seconds <= last + 1e-9 for m in hit.moments)
        assert [m.score for m in hit.moments] == sorted((m.score for m in hit.moments), reverse=True)
        embedding = embeddings_of(finished)[hit.path]
        best = int(np.argmax(embedding.features @ vector))
        assert hit.moments[0].start_seconds <= embedding.pts_seconds[best] <= hit.moments[0].end_seconds
        assert hit.moments[0].score == pytest.approx(float((embedding.features @ vector)[best]), abs=1e-6)


def test_k_and_threshold_only_shorten_the_list(finished: Path) -> None:
    (everything,) = ask(finished, ["snow"], k=9)
    for k in (1, 3, 9, 1000):
        assert ask(finished, ["snow"], k=k) == [everything[:k]]
    for threshold in (everything[2].score, 0.999, -1.0):
        assert ask(finished, ["snow"], threshold=threshold) == [[h for h in everything if h.score >= threshold]]
    assert len(ask(finished, ["snow"], threshold=everything[2].score)[0]) == 3


def test_several_queries_are_answered_as_each_alone(finished: Path) -> None:
    assert ask(finished, QUERIES, k=4) == [ask(finished, [query], k=4)[0] for query in QUERIES]
    assert ask(finished, list(reversed(QUERIES)), k=4) == list(reversed(ask(finished, QUERIES, k=4)))


@pytest.mark.parametrize("query", QUERIES)
def test_without_rescoring_the_nearest_moments_decide(query: str, finished: Path) -> None:
    (hits,) = ask(finished, [query], k=5, rescoring=False)
    expected = nearest_moments(finished, query)
    assert [hit.path for hit in hits] == sorted(expected, key=lambda path: -expected[path])[:5]
    np.testing.assert_allclose([hit.score for hit in hits], [expected[hit.path] for hit in hits], atol=1e-6)
    assert [hit.rank for hit in hits] == [1, 2, 3, 4, 5]
    assert all(hit.moments == () for hit in hits)
    assert len(ask(finished, [query], k=20, rescoring=False)[0]) == 9


# ---------------------------------------------------------------------------------- videos that are known in every part


WANTED = "wanted"
N_OPPOSED = 20


def matching(name: str, *scenes: tuple[float, int]) -> SmallVideo:
    """A video of scenes: the cosine of their frames with the words that are wanted, and how many frames."""
    query = FakeEncoder().encode_text([WANTED])[0]
    away = unit(np.eye(DIM)[0] - query[0] * query)
    rows = [np.repeat((c * query + math.sqrt(1 - c * c) * away)[None], n, axis=0) for c, n in scenes]
    return SmallVideo(name, unit(np.concatenate(rows)), tuple(n for _, n in scenes))


@pytest.fixture(scope="module")
def opposed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of one moment each whose order by moment is the opposite of that by frames: ever better, ever fewer."""
    folder = tmp_path_factory.mktemp("opposed") / "c"
    videos = [matching(f"clip-{i}", (0.5 + 0.02 * i, 1), (0.1, i + 1)) for i in range(N_OPPOSED)]
    make_collection(folder, [replace(video, moment_lengths=(len(video.frames),)) for video in videos])
    commands.index(folder, machine=machine(), encoder=FakeEncoder())
    return folder


def test_the_first_by_frames_is_not_the_first_by_moment(opposed: Path) -> None:
    """So the next tests can fail."""
    (by_frames,), (by_moment,) = (ask(opposed, [WANTED], k=N_OPPOSED, rescoring=r) for r in (True, False))
    names = [f"clip-{i}" for i in range(N_OPPOSED)]
    assert [hit.video_id for hit in by_moment] == names
    assert [hit.video_id for hit in by_frames] == names[::-1]


@pytest.mark.parametrize("k", [1, 2, 3])
def test_candidates_are_more_than_the_answers_asked_for(k: int, opposed: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(opposed, tmp_path / "c"))
    say_of_index(copy, candidates=1)
    (hits,) = ask(copy, [WANTED], k=k)
    assert [hit.video_id for hit in hits] == [f"clip-{4 * k - 1 - i}" for i in range(k)]


@pytest.mark.parametrize("n_candidates", [5, 8, 19, 20, 100])
def test_candidates_are_as_many_as_the_index_says(n_candidates: int, opposed: Path, tmp_path: Path) -> None:
    """It was measured with as many when it was built."""
    copy = Path(shutil.copytree(opposed, tmp_path / "c"))
    say_of_index(copy, candidates=n_candidates)
    last = min(n_candidates, N_OPPOSED) - 1
    (hits,), (moments,) = (ask(copy, [WANTED], k=1, by_moment=by_moment) for by_moment in (False, True))
    assert hits[0].video_id == moments[0].video_id == f"clip-{last}"
    with Searcher(Collection(copy), FakeEncoder()) as searcher:
        ((videos, cosines),) = searcher.candidates(FakeEncoder().encode_text([WANTED]), n_candidates)
        assert [searcher._find(video)[0].video_ids[searcher._find(video)[1]] for video in videos.tolist()] == [
            f"clip-{i}" for i in range(last + 1)
        ]
        nearest = sorted(nearest_moments(copy, WANTED).values(), reverse=True)[: last + 1]
        np.testing.assert_allclose(cosines, nearest, atol=1e-6)


@pytest.mark.parametrize("encoder", [FakeEncoder(), None], ids=["with texts", "without texts"])
def test_moments_stand_out_from_what_the_query_scores_on_the_collection(encoder: FakeEncoder, tmp_path: Path) -> None:
    """Or from what everyday texts do, where that is less and the index was built where they could be encoded."""
    videos = [matching(f"clip-{i}", *((0.9 - (i + 3 * j) / 100, 1) for j in range(30))) for i in range(3)]
    make_collection(tmp_path / "c", videos)
    commands.index(tmp_path / "c", machine=machine(), encoder=encoder)
    vector, embeddings = FakeEncoder().encode_text([WANTED])[0], embeddings_of(tmp_path / "c")
    mean = np.mean([e.features.astype(np.float64).mean(axis=0) for e in embeddings.values()], axis=0)
    everyday = float((FakeEncoder().encode_text(EVERYDAY_TEXTS) @ mean).mean())
    background = float(vector @ mean)
    assert everyday < background - 0.1 and abs(everyday) > 0.02
    (hits,) = ask(tmp_path / "c", [WANTED])
    assert len(hits) == 3
    for hit in hits:
        embedding = embeddings[hit.path]
        scores = (embedding.features @ vector).astype(np.float32)
        best = float(scores.max())
        level = best - max((best - (background if encoder is None else everyday)) / 2, 2 * 0.1)
        ((start, end),) = [(m.start_seconds, m.end_seconds) for m in hit.moments]  # scenes get worse one by one
        assert (start, end) == (0.0, float(np.sum(scores >= level)))
        assert 5 < end < 25


def test_the_order_of_the_videos_changes_no_hit(finished: Path, tmp_path: Path) -> None:
    """Nor does how they came into the collection: to the bit."""
    paths = sorted(embeddings_of(finished))
    shuffled = [paths[at] for at in np.random.default_rng(4).permutation(len(paths))]
    run(tmp_path / "at once", Sources(shuffled))
    run(tmp_path / "in parts", Sources(shuffled[:2]))
    run(tmp_path / "in parts", Sources(shuffled[2:]))
    for by_moment in (False, True):
        expected = ask(finished, QUERIES, k=30, by_moment=by_moment)
        for name in ("at once", "in parts"):
            assert ask(tmp_path / name, QUERIES, k=30, by_moment=by_moment) == expected


# ------------------------------------------------------------------------------------------------- moment by moment


@pytest.mark.parametrize("query", QUERIES)
def test_moments_one_by_one_are_those_of_the_videos_best_first(query: str, finished: Path) -> None:
    (videos,) = ask(finished, [query], k=9)
    (hits,) = ask(finished, [query], k=1000, by_moment=True)
    vector, embeddings = FakeEncoder().encode_text([query])[0], embeddings_of(finished)
    assert [hit.rank for hit in hits] == list(range(1, len(hits) + 1))
    assert all(len(hit.moments) == 1 and hit.moments[0].score == hit.score for hit in hits)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    whole = {(v.path, m.start_seconds, m.end_seconds) for v in videos for m in v.moments}
    assert whole <= {(hit.path, hit.moments[0].start_seconds, hit.moments[0].end_seconds) for hit in hits}
    wanted = {(path, start) for path, start, _ in whole}
    for video in videos:  # and what does not match, each stored moment by itself
        for start in embeddings[video.path].moments.start_seconds.tolist():
            if not any(path == video.path and a <= start < b for path, a, b in whole):
                wanted.add((video.path, start))
    assert {(hit.path, hit.moments[0].start_seconds) for hit in hits} == wanted
    assert len(hits) == len(wanted) > len(videos)  # several of a video where it has them
    for hit in hits:
        embedding, moment = embeddings[hit.path], hit.moments[0]
        within = (embedding.pts_seconds >= moment.start_seconds) & (embedding.pts_seconds < moment.end_seconds)
        assert hit.score == pytest.approx(float((embedding.features[within] @ vector).max()), abs=1e-6)
    best = max(float((e.features @ vector).max()) for e in embeddings.values())
    assert hits[0].score == pytest.approx(best, abs=1e-6)


def test_k_and_threshold_only_shorten_the_list_of_moments(finished: Path) -> None:
    (everything,) = ask(finished, ["snow"], k=1000, by_moment=True)
    assert len(everything) > 10
    for k in (1, 3, 10):
        assert ask(finished, ["snow"], k=k, by_moment=True) == [everything[:k]]
    for threshold in (everything[4].score, 0.999, -1.0):
        found = ask(finished, ["snow"], k=1000, threshold=threshold, by_moment=True)
        assert found == [[hit for hit in everything if hit.score >= threshold]]
    assert len(ask(finished, ["snow"], threshold=everything[4].score, by_moment=True)[0]) == 5


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of scenes, some of which match and some of which do not."""
    folder = tmp_path_factory.mktemp("scenes") / "c"
    twice = matching("twice", (0.9, 2), (0.0, 3), (0.7, 4), (-0.2, 2))
    once = matching("once", (0.1, 2), (0.8, 1), (0.0, 5))
    same = matching("same", (0.8, 1), (0.1, 2), (0.0, 5))
    never = matching("never", (-0.1, 4), (0.05, 3))
    make_collection(folder, [never, once], [twice, same])
    commands.index(folder, machine=machine(), encoder=FakeEncoder())
    return folder


def test_moments_of_one_video_stand_between_those_of_others(scenes: Path) -> None:
    (hits,), (videos,) = (ask(scenes, [WANTED], by_moment=by_moment) for by_moment in (True, False))
    found = [(h.rank, h.video_id, h.moments[0].start_seconds, h.moments[0].end_seconds) for h in hits]
    first_of_equal = [hit.video_id for hit in videos if hit.video_id in ("once", "same")]
    spans = {"once": (2.0, 3.0), "same": (0.0, 1.0)}
    assert found[:4] == [
        (1, "twice", 0.0, 2.0),
        (2, first_of_equal[0], *spans[first_of_equal[0]]),
        (3, first_of_equal[1], *spans[first_of_equal[1]]),
        (4, "twice", 5.0, 9.0),
    ]
    assert {name for _, name, *_ in found[4:]} >= {"never"} and all(h.score < 0.65 for h in hits[4:])
    np.testing.assert_allclose([h.score for h in hits[:4]], [0.9, 0.8, 0.8, 0.7], atol=2e-3)
    n_moments = {hit.video_id: len(hit.moments) for hit in videos}
    assert (n_moments["twice"], n_moments["once"], n_moments["same"]) == (2, 1, 1)
    assert sum(name == "never" for _, name, *_ in found) >= n_moments["never"] >= 1


def test_moments_one_by_one_are_of_each_query_alone(finished: Path) -> None:
    together = ask(finished, QUERIES, k=7, by_moment=True)
    assert together == [ask(finished, [query], k=7, by_moment=True)[0] for query in QUERIES]


def test_moments_without_rescoring_are_refused(finished: Path) -> None:
    with pytest.raises(UsageError, match="re-scoring"):
        ask(finished, ["snow"], rescoring=False, by_moment=True)
    with pytest.raises(UsageError, match="re-scoring"):
        commands.search(finished, ["snow"], rescoring=False, encoder=FakeEncoder(), by_moment=True)


def test_the_command_gives_moments_one_by_one(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.registry.load_encoder", lambda name, device, precision: FakeEncoder())
    (hits,) = ask(finished, ["snow"], k=12, by_moment=True)
    assert commands.search(finished, ["snow"], k=12, machine=machine(), by_moment=True) == [hits]
    done = fineco("search", "snow", "--moments", "-k", 12, "-c", finished, "--format", "json")
    assert (done.code, done.err) == (0, "")
    assert done.out.decode() == format_hits(["snow"], [hits], "json")
    assert len({hit.path for hit in hits}) < len(hits) == 12
    plain = fineco("search", "snow", "-k", 12, "-c", finished, "--format", "json")
    assert plain.code == 0 and plain.out != done.out


def test_the_command_refuses_moments_without_rescoring_before_anything_is_loaded(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.registry.load_encoder", None)
    done = fineco("search", "snow", "--moments", "--no-rerank", "-c", finished)
    assert (done.code, done.out) == (2, b"")
    assert "--moments and --no-rerank" in done.err


def test_few_files_are_open_at_a_time(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = ask(finished, QUERIES)
    monkeypatch.setattr(search, "MAX_OPEN_SHARDS", 1)
    assert ask(finished, QUERIES) == expected


@pytest.mark.parametrize("queries", [[""], ["snow", " \t"]])
def test_an_empty_query_is_refused(queries: list[str], finished: Path) -> None:
    with pytest.raises(UsageError, match=rf"^query {len(queries)} is empty"):
        ask(finished, queries)


def test_no_hits_at_all_are_not_to_be_asked_for(finished: Path) -> None:
    with pytest.raises(UsageError, match="at least one"):
        ask(finished, ["snow"], k=0)


def test_the_command_loads_the_recorded_model_and_searches(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[tuple[str, str, str]] = []

    def load(name: str, device: str, precision: str) -> FakeEncoder:
        loaded.append((name, device, precision))
        return FakeEncoder()

    monkeypatch.setattr("models.registry.load_encoder", load)
    assert commands.search(finished, QUERIES, k=3, machine=machine()) == ask(finished, QUERIES, k=3)
    assert loaded == [("fake", "auto", "fp32")]


def test_a_missing_index_is_said_before_a_model_is_loaded(collection: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.registry.load_encoder", None)
    shutil.rmtree(collection / "index")
    with pytest.raises(UsageError, match="no index"):
        commands.search(collection, ["snow"], machine=machine())


def test_another_encoder_is_refused(finished: Path) -> None:
    with pytest.raises(UsageError, match="encoder"):
        Searcher(Collection(finished), FakeEncoder(seed=1))


def test_a_search_goes_on_with_its_selection_until_the_index_is_built_anew(collection: Path) -> None:
    before = ask(collection, QUERIES)
    commands.select(collection, SelectOptions("uniform", "1"), machine())
    assert ask(collection, QUERIES) == before
    commands.index(collection, machine=machine())
    after = ask(collection, QUERIES)
    assert after != before
    expected = plain_scores(collection, QUERIES[0])
    np.testing.assert_allclose([hit.score for hit in after[0]], [expected[hit.path] for hit in after[0]], atol=1e-6)


def test_a_search_that_is_open_outlives_two_builds(collection: Path) -> None:
    with Searcher(Collection(collection), FakeEncoder()) as searcher:
        before = searcher.search(QUERIES)
        commands.index(collection, machine=machine(), force=True)
        commands.index(collection, machine=machine(), force=True)
        assert searcher.search(QUERIES) == before
        assert len(searcher) == 9


# ----------------------------------------------------------------------------------------------------------- damage


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[len(data) // 2] ^= 0xFF
        path.write_bytes(data)
    elif how == "truncate":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["flip", "truncate", "empty", "remove"])
@pytest.mark.parametrize("name", [LOOKUP_FILE, TEXTS_FILE, "index.faiss", "index.json"])
def test_a_damaged_index_is_an_error_that_names_the_file(name: str, how: str, collection: Path) -> None:
    damage(current_generation(collection / "index") / name, how)
    with pytest.raises(IntegrityError, match=name) as error:
        ask(collection, ["snow"])
    assert "fineco index" in error.value.hint
    assert commands.index(collection, machine=machine())  # which is not up to date
    assert len(ask(collection, ["snow"])[0]) == 9


@pytest.mark.parametrize("how", ["truncate", "empty", "remove"])
def test_a_damaged_shard_is_an_error_that_names_the_file(how: str, collection: Path) -> None:
    shard = sorted((collection / "embeddings" / "caption-0.5").glob("*.h5"))[0]
    damage(shard, how)
    with pytest.raises(IntegrityError, match=shard.name):
        ask(collection, ["snow"])


@pytest.mark.parametrize("rescoring", [True, False])
def test_a_shard_of_other_videos_is_an_error_and_no_wrong_answer(rescoring: bool, collection: Path) -> None:
    one, other = sorted((collection / "embeddings" / "caption-0.5").glob("*.h5"))
    swapped = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(swapped)
    with pytest.raises(IntegrityError, match=r"0000\d\d.h5"):
        ask(collection, ["snow"], rescoring=rescoring)


def test_every_flipped_byte_of_a_shard_is_an_error_or_changes_no_answer(collection: Path) -> None:
    """A search does not digest the shards, but the rows that it reads."""
    shard = sorted((collection / "embeddings" / "caption-0.5").glob("*.h5"))[0]
    data = shard.read_bytes()
    expected = ask(collection, ["snow"])
    for at in range(0, len(data), max(1, len(data) // 60)):
        flipped = bytearray(data)
        flipped[at] ^= 0xFF
        shard.unlink()
        shard.write_bytes(flipped)
        try:
            assert ask(collection, ["snow"]) == expected
        except FinecoError:
            continue
    shard.write_bytes(data)
    checked(collection)
