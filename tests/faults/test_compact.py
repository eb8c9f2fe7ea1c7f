"""Folding a collection: fewer files, the same digest and answers, and what is gone is forgotten."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from command_line import fineco
from fakes import FakeEncoder
from indexes.generations import current_generation
from pipeline import commands
from pipeline.collection import Collection
from pipeline.commits import State
from pipeline.compact import compact
from pipeline.config import SelectOptions
from pipeline.errors import IntegrityError
from pipeline.files import read_sealed, seal
from pipeline.inspect import failures_of, status_of
from small_runs import HALF, checked, embeddings_of, features_of, machine, make_clip, run

pytestmark = pytest.mark.fault


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A collection of many small runs: videos that came, changed, moved, failed, were captioned anew, and went."""
    folder = tmp_path_factory.mktemp("grown")
    videos, collection = folder / "videos", folder / "kitchen"
    videos.mkdir()
    for number in range(5):
        make_clip(videos / f"clip{number}.mp4", number)
        run(collection, videos)
    (videos / "broken.mp4").write_bytes(b"no video" * 50)
    make_clip(videos / "clip1.mp4", 11)  # another video in its place
    (videos / "clip2.mp4").rename(videos / "moved.mp4")
    run(collection, videos)
    (videos / "moved.txt").write_text("a red block on a hill\n", "utf-8")
    (videos / "clip3.mp4").unlink()
    run(collection, videos)
    commands.select(collection, SelectOptions("uniform", "3"), machine())
    commands.select(collection, HALF, machine(), FakeEncoder())
    return collection


@pytest.fixture
def copy(grown: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(grown, tmp_path / "kitchen"))


def what_counts(state: State) -> dict[str, object]:
    """A state without the numbers of its commits, and without what is gone."""
    living = set(state.paths)
    return {
        "paths": state.paths,
        "texts": {v: text for v, text in state.texts.items() if v in living},
        "latest": {p: word[1:] for p, word in state.latest.items() if word[2] != "removed"},
        "known": {
            p: seen for p, seen in state.known.items() if state.latest.get(p, (0, "", "removed"))[2] != "removed"
        },
        "places": {
            kind: {v: place.content for v, place in places.items() if v in living}
            for kind, places in state.places.items()
        },
    }


@pytest.mark.parametrize("name", ["texts.h5", "videos.h5", "index.faiss"])
def test_a_damaged_index_is_built_anew_and_does_not_stop_the_folding(name: str, copy: Path) -> None:
    generation = current_generation(copy / "index")
    (generation / name).unlink()
    said: list[str] = []
    assert compact(copy, machine(said.append)) is not None
    assert any("damaged" in line and "built anew" in line for line in said)
    assert status_of(copy)["index"]["up_to_date"]
    assert compact(copy, machine()) is None  # there is nothing left to fold
    checked(copy)


def test_an_index_of_a_kind_that_is_too_large_by_now_becomes_one_that_fits(copy: Path) -> None:
    path = current_generation(copy / "index") / "index.json"
    content = read_sealed(path)
    content["extra"]["requested_kind"] = "ivf"
    path.write_bytes(seal(content))
    (path.parent / "texts.h5").unlink()
    assert compact(copy, machine()) is not None
    assert status_of(copy)["index"]["factory"] == "Flat"
    checked(copy)


def test_a_folded_collection_says_the_same_in_fewer_files(grown: Path, copy: Path) -> None:
    before, state = checked(grown), Collection(grown).state()
    folded = compact(copy, machine())
    assert folded is not None
    after = checked(copy)
    assert after["digest"] == before["digest"]
    assert (after["videos"], after["indexed"]) == (before["videos"], before["indexed"]) == (4, 4)
    assert folded.n_files == (before["files"], 3) and before["files"] > 10  # features and two selections
    assert folded.n_commits[1] == 4 < folded.n_commits[0]
    assert after["leftovers"] == []
    assert what_counts(Collection(copy).state()) == what_counts(state)
    assert [r.outcome for r in failures_of(copy, True)] == [r.outcome for r in failures_of(grown, True)]
    assert status_of(copy)["index"]["up_to_date"]
    for read in (features_of, embeddings_of):
        assert {p: repr(v) for p, v in read(copy).items()} == {p: repr(v) for p, v in read(grown).items()}


def test_searches_answer_the_same(grown: Path, copy: Path) -> None:
    queries, encoder = ["a red block", "two blue birds"], FakeEncoder()
    before = commands.search(grown, queries, 10, encoder=encoder)
    compact(copy, machine())
    assert commands.search(copy, queries, 10, encoder=encoder) == before


def test_what_is_folded_goes_on_growing_and_folds_again(grown: Path, copy: Path, tmp_path: Path) -> None:
    videos = grown.parent / "videos"
    compact(copy, machine())
    notes: list[str] = []
    run(copy, videos, machine=machine(notes.append))
    assert any("4 done before, 1 failed before" in note for note in notes)  # nothing is decoded again
    make_clip(tmp_path / "more.mp4", 21)
    run(copy, commands.Sources([str(videos), str(tmp_path / "more.mp4")]))
    assert checked(copy)["videos"] == 5
    assert compact(copy, machine()) is not None
    assert checked(copy)["videos"] == 5
    assert compact(copy, machine()) is None


def test_large_files_are_linked_and_not_written_again(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.compact.LARGE_BYTES", 1)
    before = checked(copy)["digest"]
    inodes = {p.stat().st_ino for p in (copy / "features").iterdir()}
    assert compact(copy, machine()) is not None
    assert checked(copy)["digest"] == before
    assert {p.stat().st_ino for p in (copy / "features").iterdir()} < inodes


def test_a_damaged_file_stops_it_and_nothing_is_removed(copy: Path) -> None:
    path = sorted((copy / "features").iterdir())[-1]
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    before = {p.name for p in (copy / "outcomes").iterdir()}
    with pytest.raises(IntegrityError, match=path.name):
        compact(copy, machine())
    assert before <= {p.name for p in (copy / "outcomes").iterdir()}


def test_a_search_that_a_compaction_overtakes_is_made_again(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the old index open when the files that this names go away."""
    from pipeline.search import Searcher

    expected = commands.search(copy, ["a red block"], 10, encoder=FakeEncoder())
    times: list[str] = []
    search = Searcher.search

    def late(self: Searcher, *arguments: object) -> object:
        if not times:
            times.append("once")
            compact(copy, machine())
        return search(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Searcher, "search", late)
    assert commands.search(copy, ["a red block"], 10, encoder=FakeEncoder()) == expected


def test_the_command_says_what_it_did(copy: Path) -> None:
    done = fineco("compact", "-c", copy)
    assert done.code == 0 and "folded into 3 in 4" in done.err
    assert "nothing to fold" in fineco("compact", "-c", copy).err
