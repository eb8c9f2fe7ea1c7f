"""Choosing frames anew from stored features."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fakes import FakeEncoder
from pipeline import commands
from pipeline.collection import Collection
from pipeline.commands import Sources
from pipeline.config import EmbedOptions, SelectOptions
from pipeline.errors import FinecoError, IntegrityError, Interrupted, UsageError
from pipeline.interrupts import Interrupts
from pipeline.select import embed_video, n_kept, parse_keep, select_frames
from pipeline.store import round_features
from pipeline.types import Float32, TimedText, UInt8, VideoEmbedding
from small_runs import CAPTIONS, FPS5, HALF, checked, commits, embeddings_of, features_of, machine, make_videos, run

UNIFORM = SelectOptions("uniform", "3")


class TextsOnly(FakeEncoder):
    """Encodes texts; no frame."""

    def encode_frames(self, frames: UInt8) -> Float32:
        raise AssertionError("frames were embedded")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four videos, two of them with text, in three commits that have features; by caption, half of the frames."""
    folder = tmp_path_factory.mktemp("finished")
    videos = make_videos(folder / "videos")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.run.SHARD_VIDEOS", 2)
        run(folder / "c", videos / "clip0.mp4")
        run(folder / "c", videos)
    assert [stage for stage, files in commits(folder / "c") if files] == ["run"] * 3
    return folder


@pytest.fixture
def collection(finished: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(finished / "c", tmp_path / "c"))


def same(one: dict[str, VideoEmbedding], other: dict[str, VideoEmbedding]) -> None:
    assert one.keys() == other.keys()
    for path, embedding in one.items():
        assert embedding.selector == other[path].selector
        for name in ("vector", "features", "pts_seconds", "scores"):
            np.testing.assert_array_equal(getattr(embedding, name), getattr(other[path], name))


@pytest.mark.parametrize(
    "options",
    [
        SelectOptions("uniform", "3"),
        SelectOptions("uniform", "0.3"),
        SelectOptions("all"),
        SelectOptions("caption", "2"),
        SelectOptions("topics", "4", ("a dog", "a red block", "snow")),
    ],
    ids=lambda o: f"{o.selector}-{o.keep}",
)
def test_another_selector_gives_what_selecting_each_video_gives(options: SelectOptions, collection: Path) -> None:
    encoder = TextsOnly()
    assert commands.select(collection, options, machine(), encoder) == 4
    keep = parse_keep(options.keep or "0.25")
    embeddings = embeddings_of(collection)
    for path, features in features_of(collection).items():
        beside = Path(path).with_suffix(".txt")
        own = (beside.read_text().strip(),) if options.selector == "caption" and beside.exists() else ()
        texts = options.topics or own
        vectors = encoder.encode_text(texts) if texts else None
        selection = select_frames(features, str(options.selector), keep, [TimedText(t) for t in texts], vectors)
        expected = embed_video(features, selection)
        found = embeddings[path]
        assert len(found.features) == (len(features.features) if options.selector == "all" else len(expected.features))
        assert found.n_frames == len(features.features)
        assert found.selector == expected.selector
        np.testing.assert_array_equal(found.pts_seconds, expected.pts_seconds)
        np.testing.assert_array_equal(found.features, round_features(expected.features))
        np.testing.assert_array_equal(found.scores, expected.scores)
        np.testing.assert_array_equal(found.vector, expected.vector)


@pytest.mark.parametrize("keep", ["0.1", "0.5", "1", "7"])
def test_as_many_frames_are_kept_as_asked(keep: str, collection: Path) -> None:
    commands.select(collection, SelectOptions("uniform", keep), machine(), TextsOnly())
    kept = {path: len(e.features) for path, e in embeddings_of(collection).items()}
    assert kept == {path: n_kept(parse_keep(keep), len(f.features)) for path, f in features_of(collection).items()}


def test_switching_back_costs_nothing(collection: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.registry.load_encoder", None)  # calling it fails
    before = embeddings_of(collection)
    assert commands.select(collection, UNIFORM, machine()) == 4
    assert Collection(collection).current_selection() == "uniform-3"
    n_commits = len(commits(collection))
    assert commands.select(collection, HALF, machine()) == 0
    assert Collection(collection).current_selection() == "caption-0.5"
    assert len(commits(collection)) == n_commits
    same(embeddings_of(collection), before)


@pytest.mark.parametrize("options", [UNIFORM, SelectOptions("all")])
def test_no_encoder_is_loaded_where_there_is_no_text(
    options: SelectOptions, collection: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.registry.load_encoder", None)
    assert commands.select(collection, options, machine()) == 4


def test_the_encoder_is_loaded_once_where_there_is_text(collection: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []

    def load(name: str, device: str, precision: str) -> FakeEncoder:
        loaded.append(f"{name} {precision}")
        return TextsOnly()

    monkeypatch.setattr("models.registry.load_encoder", load)
    monkeypatch.setattr("models.device.device_summary", "{} {}".format)  # the real one imports torch
    commands.select(collection, SelectOptions("caption", "2"), machine())
    assert loaded == ["fake fp32"]


def test_another_encoder_is_refused(collection: Path) -> None:
    with pytest.raises(UsageError, match=r"^encoder: "):
        commands.select(collection, SelectOptions("caption", "2"), machine(), FakeEncoder(seed=1))


def test_the_index_follows_the_selection(collection: Path) -> None:
    before = checked(collection)["digest"]
    commands.select(collection, UNIFORM, machine())
    assert commands.index(collection, machine=machine())
    assert not commands.index(collection, machine=machine())
    assert checked(collection)["indexed"] == 4
    assert checked(collection)["digest"] != before


def test_without_features_there_is_nothing_to_select(finished: Path, tmp_path: Path) -> None:
    videos = Sources([str(finished / "videos" / "clip0.mp4")])
    commands.decode(tmp_path / "c", videos, FPS5, machine())
    with pytest.raises(UsageError, match="no features"):
        commands.select(tmp_path / "c", UNIFORM, machine())


# ------------------------------------------------------------------------------------------------------ broken off


def broken(collection: Path, monkeypatch: pytest.MonkeyPatch, n_shards: int) -> None:
    """Selects uniformly, stopped after so many shards."""
    calls = 0

    def check(interrupts: Interrupts) -> None:
        nonlocal calls
        calls += 1
        if calls == n_shards:
            raise Interrupted(2, "fineco select")

    with monkeypatch.context() as patch:
        patch.setattr(Interrupts, "check", check)
        with pytest.raises(Interrupted):
            commands.select(collection, UNIFORM, machine())


def test_a_selection_that_was_broken_off_goes_on(
    finished: Path, collection: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken(collection, monkeypatch, 1)
    assert commands.select(collection, UNIFORM, machine()) == 3
    whole = Path(shutil.copytree(finished / "c", tmp_path / "whole"))
    commands.select(whole, UNIFORM, machine())
    assert checked(collection)["digest"] == checked(whole)["digest"]
    same(embeddings_of(collection), embeddings_of(whole))


def test_until_a_selection_is_finished_the_one_before_is_in_use(
    collection: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(collection, monkeypatch, 1)
    assert Collection(collection).current_selection() == "caption-0.5"
    assert not commands.index(collection, machine=machine())  # not of the one video selected anew
    assert checked(collection)["indexed"] == 4


def test_a_model_that_cannot_be_had_changes_nothing(collection: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, device: str, precision: str) -> FakeEncoder:
        raise FinecoError("the model cannot be had")

    monkeypatch.setattr("models.registry.load_encoder", load)
    before = commits(collection), checked(collection)
    with pytest.raises(FinecoError, match="cannot be had"):
        commands.select(collection, SelectOptions("topics", "2", ("a dog",)), machine())
    assert Collection(collection).current_selection() == "caption-0.5"
    assert before == (commits(collection), checked(collection))


def test_damaged_features_are_named(collection: Path) -> None:
    shard = sorted((collection / "features").iterdir())[1]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(IntegrityError, match=shard.name):
        commands.select(collection, UNIFORM, machine())


# --------------------------------------------------------------------------------------------------- texts that change


def embed_and_select(collection: Path, videos: Path, keep: str, **more: Any) -> dict[str, VideoEmbedding]:
    run(collection, videos, **more)
    commands.select(collection, SelectOptions("caption", keep), machine(), TextsOnly())
    return embeddings_of(collection)


def test_a_text_that_changed_under_another_selector_counts_when_switching_back(finished: Path, tmp_path: Path) -> None:
    videos = Path(shutil.copytree(finished / "videos", tmp_path / "videos"))
    collection = tmp_path / "c"
    run(collection, videos)
    commands.select(collection, UNIFORM, machine())
    (videos / "clip1.txt").write_text("something else entirely\n")
    run(collection, videos, TextsOnly(), select=SelectOptions())
    before = embeddings_of(collection, "caption-0.5")
    assert str(videos / "clip1.mp4") not in before
    assert commands.select(collection, HALF, machine(), TextsOnly()) == 1
    run(tmp_path / "fresh", videos)
    same(embeddings_of(collection), embeddings_of(tmp_path / "fresh"))


def test_the_latest_texts_count_and_not_older_ones_that_were_noted_apart(finished: Path, tmp_path: Path) -> None:
    """A note of changed texts, and then new features with yet other texts: the note is out of date."""
    videos = Path(shutil.copytree(finished / "videos", tmp_path / "videos"))
    manifest = tmp_path / "videos.csv"
    manifest.write_text("path,id\nvideos/clip1.mp4,a\n")
    sources = Sources([], manifest)
    run(tmp_path / "c", sources)
    (videos / "clip1.txt").write_text("a text that counts for one run only\n")
    run(tmp_path / "c", sources)
    (videos / "clip1.txt").write_text("the last text\n")
    shutil.copy(videos / "clip3.mp4", videos / "clip1.mp4")
    run(tmp_path / "c", sources)
    commands.select(tmp_path / "c", SelectOptions("caption", "3"), machine(), TextsOnly())
    run(tmp_path / "fresh", sources, select=SelectOptions("caption", "3"))
    same(embeddings_of(tmp_path / "c"), embeddings_of(tmp_path / "fresh"))


def test_texts_that_decode_found_count(finished: Path, tmp_path: Path) -> None:
    videos = Path(shutil.copytree(finished / "videos", tmp_path / "videos"))
    sources = Sources([str(videos)])
    run(tmp_path / "c", videos)
    (videos / "clip1.txt").write_text("something else entirely\n")
    commands.decode(tmp_path / "c", sources, EmbedOptions(), machine())
    run(tmp_path / "c", videos, TextsOnly())
    run(tmp_path / "fresh", videos)
    same(embeddings_of(tmp_path / "c"), embeddings_of(tmp_path / "fresh"))
    assert len(CAPTIONS) == sum(e.selector == "caption" for e in embeddings_of(tmp_path / "c").values())
