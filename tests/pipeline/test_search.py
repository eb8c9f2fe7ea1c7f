"""Text in, videos and moments out: against scoring every stored frame of every video in plain loops."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from fakes import FakeEncoder
from indexes.generations import current_generation
from pipeline import commands, search
from pipeline.collection import Collection
from pipeline.config import SelectOptions
from pipeline.errors import FinecoError, IntegrityError, UsageError
from pipeline.lookup import LOOKUP_FILE, index_id
from pipeline.search import Searcher
from pipeline.types import Hit
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
def test_without_rescoring_the_pooled_vectors_decide(query: str, finished: Path) -> None:
    (hits,) = ask(finished, [query], k=5, rescoring=False)
    vector = FakeEncoder().encode_text([query])[0]
    expected = {path: float(e.vector @ vector) for path, e in embeddings_of(finished).items()}
    assert [hit.path for hit in hits] == sorted(expected, key=lambda path: -expected[path])[:5]
    np.testing.assert_allclose([hit.score for hit in hits], [expected[hit.path] for hit in hits], atol=1e-6)
    assert all(hit.moments == () for hit in hits)


def test_candidates_are_more_than_the_answers_asked_for(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first by frames need not be the first by pooled vector."""
    monkeypatch.setattr(search, "CANDIDATES", 1)
    for k in (1, 2):
        (hits,) = ask(finished, ["snow"], k=k)
        candidates = {hit.path for hit in ask(finished, ["snow"], k=4 * k, rescoring=False)[0]}
        expected = plain_scores(finished, "snow")
        assert [hit.path for hit in hits] == sorted(candidates, key=lambda path: -expected[path])[:k]


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


def test_ids_are_63_bits_and_do_not_change() -> None:
    assert index_id("clip-17") == 185013966265301820
    assert all(0 <= index_id(str(i)) < 2**63 for i in range(1000))


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
@pytest.mark.parametrize("name", [LOOKUP_FILE, "index.faiss", "index.json"])
def test_a_damaged_index_is_an_error_that_names_the_file(name: str, how: str, collection: Path) -> None:
    damage(current_generation(collection / "index") / name, how)
    with pytest.raises(IntegrityError, match=name):
        ask(collection, ["snow"])
    commands.index(collection, machine=machine(), force=True)
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
