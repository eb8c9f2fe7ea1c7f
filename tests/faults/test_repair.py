"""Damage to any file of a collection is found and named, and `verify --repair` makes just what is broken again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fakes import FakeEncoder
from pipeline import commands
from pipeline.commands import Sources
from pipeline.config import SelectOptions
from pipeline.repair import repair_collection
from pipeline.verify import verify_collection
from small_runs import FPS5, HALF, machine, make_videos

pytestmark = pytest.mark.fault

N_VIDEOS = 4


class Counting(FakeEncoder):
    """Counts the frames it encodes: what a repair should not do again."""

    n_frames = 0

    def encode_frames(self, frames):  # type: ignore[no-untyped-def]
        self.n_frames += len(frames)
        return super().encode_frames(frames)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A collection with every kind of file: frames, features, two selections, an index, several commits."""
    folder = tmp_path_factory.mktemp("built")
    videos = make_videos(folder / "videos", N_VIDEOS)
    (videos / "broken.mp4").write_bytes(b"no video" * 50)
    collection = folder / "kitchen"
    sources = Sources([str(videos)])
    commands.decode(collection, sources, FPS5, machine())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.run.SHARD_VIDEOS", 3)
        commands.run(collection, sources, FPS5, SelectOptions("uniform", "3"), machine(), encoder=FakeEncoder())
    commands.select(collection, HALF, machine(), encoder=FakeEncoder())
    commands.index(collection, machine=machine())
    return collection


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "kitchen"))


def files_of(collection: Path) -> list[str]:
    """Every file that is in use; the generation of an index before the current one is not."""
    current = (collection / "index" / "CURRENT").read_text().split()[0]
    names = sorted(p.relative_to(collection).as_posix() for p in collection.rglob("*") if p.is_file())
    return [n for n in names if n != ".lock" and (not n.startswith("index/0") or n.startswith(f"index/{current}/"))]


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x04]) + data[at + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "flipped at the start": lambda data: flipped(data, min(8, len(data) - 1)),
    "flipped in the middle": lambda data: flipped(data, len(data) // 2),
    "flipped at the end": lambda data: flipped(data, len(data) - 2),
    "half": lambda data: data[: len(data) // 2],
    "one byte short": lambda data: data[:-1],
    "empty": lambda data: b"",
    "a byte longer": lambda data: data + b"\0",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_any_damage_to_any_file_is_named_and_repaired(damage: str, built: Path, tmp_path: Path) -> None:
    whole = verify_collection(built)
    assert whole["problems"] == [] and whole["videos"] == whole["indexed"] == N_VIDEOS
    names = files_of(built)
    assert len(names) > 15
    for i, name in enumerate(names):
        copy = Path(shutil.copytree(built, tmp_path / str(i)))
        (copy / name).write_bytes(DAMAGE[damage]((copy / name).read_bytes()))
        problems = verify_collection(copy)["problems"]
        assert any(str(copy / name) in problem for problem in problems), (name, problems)
        found, hopeless = repair_collection(copy, machine(), FakeEncoder())
        assert ([p.message for p in found.problems], hopeless) == ([], []), name
        assert found.digest == whole["digest"], name
        assert found.n_indexed == N_VIDEOS


def test_a_missing_file_is_named_and_repaired(built: Path, tmp_path: Path) -> None:
    whole = verify_collection(built)
    for i, name in enumerate(files_of(built)):
        copy = Path(shutil.copytree(built, tmp_path / str(i)))
        (copy / name).unlink()
        if name == "index/CURRENT":  # as before the first index
            continue
        problems = verify_collection(copy)["problems"]
        assert any(str(copy / name) in problem for problem in problems), (name, problems)
        found, hopeless = repair_collection(copy, machine(), FakeEncoder())
        assert ([p.message for p in found.problems], hopeless) == ([], []), name
        assert found.digest == whole["digest"], name
