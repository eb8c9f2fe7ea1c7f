"""Damage to any file of a collection is found and named, and `verify --repair` makes just what is broken again."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import h5py
import pytest

from command_line import fineco
from fakes import FakeEncoder
from guards import Guard
from pipeline import commands, repair
from pipeline.collection import Collection
from pipeline.commits import Commit
from pipeline.config import SelectOptions
from pipeline.repair import repair_collection
from pipeline.verify import examine, verify_collection
from small_runs import files_in_use, machine, make_everything, make_videos, run

GUARDS = [
    Guard(
        (3,),
        "pipeline/files.py",
        "if full and sha256_of(path) != record.sha256:",
        "if False:",
        "test_every_damage_to_every_file[1]",
    ),
    Guard((3,), "pipeline/files.py", "if seal(content) != data:", "if False:", "test_every_damage_to_every_file[1]"),
    Guard(
        (3,),
        "pipeline/commits.py",
        'if json.loads(digest) != {"sha256": hashlib.sha256(body).hexdigest()}:',
        "if False:",
        "test_every_damage_to_every_file[1]",
    ),
    Guard(
        (3,),
        "pipeline/repair.py",
        "kept = {v: rows for v, rows in whole.items() if v in known}",
        "kept: dict[str, store.Rows] = {}",
        "test_one_damaged_row_costs_one_video",
    ),
]

pytestmark = pytest.mark.fault


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x04]) + data[at + 1 :]


def rewrite(path: Path, damage: Callable[[bytes], bytes]) -> None:
    path.write_bytes(damage(path.read_bytes()))


DAMAGE: list[Callable[[Path], None]] = [
    lambda path: rewrite(path, lambda data: flipped(data, min(8, len(data) - 1))),
    lambda path: rewrite(path, lambda data: flipped(data, len(data) // 2)),
    lambda path: rewrite(path, lambda data: flipped(data, len(data) - 2)),
    lambda path: rewrite(path, lambda data: data[: len(data) // 2]),
    lambda path: rewrite(path, lambda data: data + b"\0"),
    lambda path: rewrite(path, lambda data: data[:-1]),
    lambda path: rewrite(path, lambda data: b""),
    lambda path: path.unlink(),
]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_everything(tmp_path_factory.mktemp("built"))


@pytest.fixture(scope="module")
def whole(built: Path) -> str:
    """The digest of the undamaged collection."""
    content = verify_collection(built)
    assert content["problems"] == [] and content["videos"] == content["indexed"] == 4
    return str(content["digest"])


def check_repaired(built: Path, copy: Path, names: Iterable[str], damage: Callable[[Path], None], digest: str) -> None:
    """Each file in turn is damaged, found, named and made again."""
    for name in names:
        shutil.copytree(built, copy)
        damage(copy / name)
        problems = verify_collection(copy)["problems"]
        assert any(str(copy / name) in problem for problem in problems), (name, problems)
        found, hopeless = repair_collection(copy, machine(), FakeEncoder())
        assert ([p.message for p in found.problems], hopeless, found.leftovers) == ([], [], []), name
        assert (found.digest, found.n_indexed) == (digest, 4), name
        shutil.rmtree(copy)


def names_to_damage(built: Path) -> list[str]:
    """All files; an index without its pointer is no damaged index but none."""
    return [name for name in files_in_use(built) if name != "index/CURRENT"]


@pytest.mark.parametrize("number", range(3))
def test_any_damage_to_any_file(number: int, built: Path, whole: str, tmp_path: Path) -> None:
    """Every file once, each with one of the damages; all with all in the long suite."""
    names = names_to_damage(built)
    assert len(names) > 15
    for i in range(number, len(names), 3):
        check_repaired(built, tmp_path / "c", [names[i]], DAMAGE[i % len(DAMAGE)], whole)


@pytest.mark.long
@pytest.mark.parametrize("number", range(len(DAMAGE)))
def test_every_damage_to_every_file(number: int, built: Path, whole: str, tmp_path: Path) -> None:
    check_repaired(built, tmp_path / "c", names_to_damage(built), DAMAGE[number], whole)


def test_a_damaged_pointer_of_the_index(built: Path, whole: str, tmp_path: Path) -> None:
    check_repaired(built, tmp_path / "c", ["index/CURRENT"], DAMAGE[1], whole)


@pytest.fixture
def streamed(tmp_path: Path) -> Path:
    """A collection made by `run` alone: all of its videos in one file of features."""
    videos = make_videos(tmp_path / "videos")
    run(tmp_path / "kitchen", videos)
    return tmp_path / "kitchen"


def new_commits(collection: Path, before: int) -> list[Commit]:
    return [commit for commit in Collection(collection).commits() if commit.number > before]


def spoil_row(path: Path, dataset: str, row: int) -> None:
    """One byte of one row, as a failing disk does it."""
    with h5py.File(path, "r") as file:
        at = file[dataset].id.get_offset() + row * file[dataset].dtype.itemsize * (file[dataset].shape[-1])
    rewrite(path, lambda data: flipped(data, at + 1))


def test_one_damaged_row_costs_one_video(streamed: Path) -> None:
    """Of a file of features, the video whose row it is: it is embedded again, and nothing else is, nor selected."""
    before, last = verify_collection(streamed)["digest"], Collection(streamed).state().last_number
    spoil_row(streamed / "features" / "000001.h5", "features", 0)
    repair_collection(streamed, machine(), FakeEncoder())
    assert verify_collection(streamed)["digest"] == before
    done = [(c.stage, row.outcome.status) for c in new_commits(streamed, last) for row in c.rows]
    assert done == [("repair", "ok")] * 3 + [("repair", "failed"), ("embed", "ok")]


def test_a_damaged_selection_is_selected_again_and_nothing_is_decoded(streamed: Path, tmp_path: Path) -> None:
    before, last = verify_collection(streamed)["digest"], Collection(streamed).state().last_number
    shutil.rmtree(tmp_path / "videos")  # not even looked at
    spoil_row(streamed / "embeddings" / "caption-0.5" / "000001.h5", "vectors", 2)
    found, hopeless = repair_collection(streamed, machine(), FakeEncoder())
    assert (found.problems, hopeless, found.digest) == ([], [], before)
    stages = {(c.stage, row.outcome.status) for c in new_commits(streamed, last) for row in c.rows}
    assert stages == {("repair", "ok"), ("repair", "failed"), ("select", "ok")}


def test_a_damaged_line_of_a_commit_costs_its_own_video_only(streamed: Path) -> None:
    """Its rows are whole but nothing says any more whose: the index knows where the video is."""
    before, last = verify_collection(streamed)["digest"], Collection(streamed).state().last_number
    path = streamed / "outcomes" / "000001.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + flipped(lines[2], 40) + b"".join(lines[3:]))
    repair_collection(streamed, machine(), FakeEncoder())
    assert verify_collection(streamed)["digest"] == before
    decoded = [row.outcome.path for c in new_commits(streamed, last) if c.stage == "embed" for row in c.rows]
    assert len(decoded) == 1


def test_what_cannot_be_made_again_is_told_and_the_rest_is(streamed: Path, tmp_path: Path) -> None:
    (tmp_path / "videos" / "clip0.mp4").unlink()
    rewrite(streamed / "features" / "000001.h5", lambda data: data[:100])  # all four are lost
    found, hopeless = repair_collection(streamed, machine(), FakeEncoder())
    assert len(hopeless) == 1 and "clip0.mp4" in hopeless[0] and "[missing]" in hopeless[0]
    assert any("not made again yet" in problem.message for problem in found.problems)
    assert len(found.state.places["features"]) == 3


def test_another_video_in_its_place_is_not_taken_for_it(streamed: Path, tmp_path: Path) -> None:
    shutil.copy(tmp_path / "videos" / "clip1.mp4", tmp_path / "videos" / "clip0.mp4")
    rewrite(streamed / "features" / "000001.h5", lambda data: data[:100])
    _, hopeless = repair_collection(streamed, machine(), FakeEncoder())
    assert len(hopeless) == 1 and "[changed]" in hopeless[0]


def test_a_repair_that_was_killed_goes_on(streamed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = verify_collection(streamed)["digest"]
    rewrite(streamed / "features" / "000001.h5", lambda data: data[:100])
    with monkeypatch.context() as patch:
        patch.setattr(repair, "_make_again", lambda *_: sys.exit(9))
        with pytest.raises(SystemExit):
            repair_collection(streamed, machine(), FakeEncoder())
    (problem,) = examine(streamed).problems  # it is not forgotten that something is missing
    assert "4 videos, lost to damage" in problem.message
    repair_collection(streamed, machine(), FakeEncoder())
    content = verify_collection(streamed)
    assert (content["problems"], content["digest"]) == ([], before)


def test_the_command_mends_and_says_how(streamed: Path) -> None:
    good = fineco("verify", "--digest", "-c", streamed)
    assert good.code == 0 and len(good.out) == 65
    assert "Nothing is damaged." in fineco("verify", "--repair", "-c", streamed).err
    rewrite(streamed / "index" / "000001" / "index.faiss", lambda data: data + b"\0")
    done = fineco("verify", "-c", streamed)
    assert done.code == 1 and b"verify --repair" in done.out
    done = fineco("verify", "--digest", "--repair", "-c", streamed)
    assert (done.code, done.out) == (0, good.out)
    assert "Index built" in done.err


def test_equal_content_has_an_equal_digest_however_the_work_was_split(
    built: Path, whole: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one go or video by video, decoded first or streamed: with frames left out, which `run` does not store."""
    videos = built.parent / "videos"
    digests = set()
    for size in (1, 2, 1000):
        monkeypatch.setattr("pipeline.run.SHARD_VIDEOS", size)
        run(tmp_path / str(size), videos, select=SelectOptions("uniform", "3"))
        commands.select(tmp_path / str(size), SelectOptions("caption", "0.5"), machine(), FakeEncoder())
        digests.add(verify_collection(tmp_path / str(size))["digest"])
    assert len(digests) == 1 and whole not in digests
