"""Killed at any step or moment, every stage ends as an unbroken one does when the same command is given again."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fake_run import FAILED, call
from fakes import FakeEncoder
from guards import Guard
from pipeline import commands
from pipeline.collection import Collection
from pipeline.types import Hit
from pipeline.verify import verify_collection
from small_runs import make_clip, make_videos
from stage_processes import Job, are_gone, server, wait_until

pytestmark = pytest.mark.fault

GUARDS = [
    Guard(
        (1,),
        "pipeline/files.py",
        "temporary = path.with_name(path.name + TEMPORARY_SUFFIX)",
        "temporary = path",
        "test_killed_at_any_step_of_what_it_writes_it_ends_as_an_unbroken_one[embed-frames]",
    ),
    Guard(
        (1,),
        "pipeline/training/checkpoints.py",
        "write_file(self.folder / WORK / STATE, lambda path: _write_state(path, state))",
        "_write_state(self.folder / WORK / STATE, state)",
        "test_a_training_killed_at_steps_of_every_kind_ends_with_the_same_weights",
    ),
    Guard(
        (6,),
        "indexes/generations.py",
        "shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()",
        "pass",
        "test_killed_in_the_middle_of_the_new_index_the_old_one_answers[index.faiss]",
    ),
    Guard(
        (1, 6),
        "indexes/generations.py",
        "write_pointer(index_folder / CURRENT, final.name)",
        '(index_folder / CURRENT).write_text(f"{final.name}\\n")',
        "test_killed_in_the_middle_of_the_new_index_the_old_one_answers[CURRENT]",
    ),
]
SEED = 20261124
SAMPLED_STEPS = {"select": 2, "index": 3, "run": 1, "compact": 3, "repair": 2}  # in the default suite
KILLS = 125
TRAINING_KILLS = 24
QUERIES = ["a red block on a hill", "two blue birds"]


@dataclass(frozen=True)
class Material:
    """Videos, and for each stage a collection before it and one after it that nothing broke."""

    videos: Path
    folder: Path
    seconds: dict[str, float] = field(default_factory=dict)  # that each stage takes
    outcomes: dict[str, object] = field(default_factory=dict)  # what is there after each stage

    def before(self, stage: str, to: Path) -> Path:
        """A collection in which the stage has something to do; for some there is none yet."""
        source = self.folder / f"before-{stage}"
        if source.exists():
            shutil.copytree(source, to)
        return to

    def after(self, stage: str) -> Path:
        return self.folder / f"after-{stage}"


def make_material(folder: Path, make: Callable[[Path], None]) -> Material:
    """Runs every stage once, unbroken, in this process."""
    videos = folder / "videos"
    make(videos)
    first = folder / "first"
    first.mkdir()
    for path in sorted(videos.glob("clip0*")):
        shutil.copy(path, first)
    material = Material(videos, folder)

    def before(stage: str, other: Path, *stages: tuple[str, Path]) -> None:
        """What another stage leaves (nothing where it is absent), and some stages on it."""
        collection = folder / f"before-{stage}"
        if other.exists():
            shutil.copytree(other, collection)
        for earlier, of in stages:
            assert call(earlier, of, collection) in (0, FAILED)

    def unbroken(stage: str) -> None:
        collection = material.before(stage, material.after(stage))
        started = time.monotonic()
        assert call(stage, videos, collection) == expected_code(stage)
        material.seconds[stage] = time.monotonic() - started

    unbroken("decode")
    before("embed-frames", material.after("decode"))
    unbroken("embed-frames")
    unbroken("embed-videos")
    before("run", folder / "none", ("run", first))
    unbroken("run")
    before("select", material.after("run"))
    unbroken("select")
    before(
        "index",
        folder / "before-run",
        ("select", first),
        ("index", first),
        ("embed-videos", videos),
        ("select", videos),
    )
    unbroken("index")
    before("compact", material.after("index"))
    unbroken("compact")
    before("repair", material.after("run"))
    damage(folder / "before-repair")
    unbroken("repair")
    return material


def damage(collection: Path) -> None:
    """A byte of a file of features, and one of a line of a commit."""
    for path in (next((collection / "features").iterdir()), collection / "outcomes" / "000002.jsonl"):
        data = bytearray(path.read_bytes())
        data[-200] ^= 4
        path.write_bytes(data)


STAGES = ("decode", "embed-frames", "embed-videos", "select", "index", "run", "compact", "repair")


def expected_code(stage: str) -> int:
    return FAILED if stage in ("decode", "embed-videos", "run") else 0  # they meet the broken video


def make_small(videos: Path) -> None:
    make_videos(videos, 3)
    spoil(videos)


def spoil(videos: Path) -> None:
    """One more that is no video, and one that is there twice."""
    (videos / "broken.mp4").write_bytes(b"no video at all" * 100)
    shutil.copy(min(videos.glob("clip*.mp4")), videos / "copy.mp4")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return make_material(tmp_path_factory.mktemp("small"), make_small)


def digest_of(collection: Path) -> str:
    content = verify_collection(collection)
    assert content["problems"] == []
    return str(content["digest"])


def answers_of(collection: Path) -> list[list[Hit]]:
    return commands.search(collection, QUERIES, 10, encoder=FakeEncoder())


def outcome_of(collection: Path) -> object:
    """The digest of all that is stored, and the answers to some queries where there is an index."""
    return digest_of(collection), answers_of(collection) if (collection / "index").exists() else None


def finish(material: Material, stage: str, collection: Path) -> None:
    """The same command once more, to the end; what is then there is what an unbroken one leaves."""
    job = server().start(stage, material.videos, collection)
    assert job.wait() == expected_code(stage), job.errors
    if stage not in material.outcomes:
        material.outcomes[stage] = outcome_of(material.after(stage))
    assert outcome_of(collection) == material.outcomes[stage]
    assert [path for path in collection.rglob("*") if ".tmp" in path.name] == []


# --------------------------------------------------------------------------------------------------- at every step


@pytest.fixture(scope="module")
def steps_of(small: Material, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    """Stage -> the steps it takes on disk."""
    folder = tmp_path_factory.mktemp("steps")
    known: dict[str, list[str]] = {}

    def steps(stage: str) -> list[str]:
        if stage not in known:
            collection, log = small.before(stage, folder / stage), folder / f"{stage}.log"
            prepare = ("sabotage", "count_steps", [str(collection), str(log)])
            job = server().start(stage, small.videos, collection, prepare=prepare)
            assert job.wait() == expected_code(stage), job.errors
            known[stage] = log.read_text("utf-8").splitlines()
        return known[stage]

    return steps


def kill_at(material: Material, stage: str, step: int, collection: Path) -> None:
    """Kills a stage at a step; finishes it."""
    material.before(stage, collection)
    before = answers_of(collection) if (collection / "index").exists() else None
    prepare = ("sabotage", "kill_at_step", [str(collection), step])
    job = server().start(stage, material.videos, collection, prepare=prepare)
    assert job.wait() == -signal.SIGKILL, job.errors
    if before is not None:
        assert answers_of(collection) in (before, answers_of(material.after(stage)))
    finish(material, stage, collection)


@pytest.mark.parametrize("stage", SAMPLED_STEPS)
def test_killed_at_some_steps_of_what_it_writes_it_ends_as_an_unbroken_one(
    small: Material, steps_of: Callable[[str], list[str]], stage: str, tmp_path: Path
) -> None:
    n = len(steps_of(stage))
    for step in random.Random(SEED + STAGES.index(stage)).sample(range(1, n + 1), SAMPLED_STEPS[stage]):
        kill_at(small, stage, step, tmp_path / str(step))


@pytest.mark.long
@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_any_step_of_what_it_writes_it_ends_as_an_unbroken_one(
    small: Material, steps_of: Callable[[str], list[str]], stage: str, tmp_path: Path
) -> None:
    steps = steps_of(stage)
    for step in range(1, len(steps) + 1):
        kill_at(small, stage, step, tmp_path / "c")
        shutil.rmtree(tmp_path / "c")
    print(f"{stage}: {len(steps)} kills")


@pytest.mark.parametrize("name", ["index.faiss", "CURRENT"])
def test_killed_in_the_middle_of_the_new_index_the_old_one_answers(
    small: Material, steps_of: Callable[[str], list[str]], name: str, tmp_path: Path
) -> None:
    collection = small.before("index", tmp_path / "c")
    old = answers_of(collection)
    halves = [n for n, step in enumerate(steps_of("index"), 1) if step.startswith(f"half of write {name}")]
    prepare = ("sabotage", "kill_at_step", [str(collection), halves[0]])
    assert server().start("index", small.videos, collection, prepare=prepare).wait() == -signal.SIGKILL
    (half,) = collection.rglob(f"{name}.tmp")
    assert half.stat().st_size > 0
    assert answers_of(collection) == old
    finish(small, "index", collection)
    assert answers_of(collection) != old


# ------------------------------------------------------------------------------------------------ at random moments


def make_hundred(videos: Path) -> None:
    videos.mkdir()
    for number in range(100):
        make_clip(videos / f"clip{number:02d}.mp4", number)
        if number % 7 == 0:
            (videos / f"clip{number:02d}.txt").write_text(f"a caption about thing number {number}\n", "utf-8")
    spoil(videos)


def kill_at_random(material: Material, rng: random.Random, stage: str, folder: Path, *prepare: object) -> int:
    """Kills a stage once, at any moment of it, and finishes it; returns how many workers it had then."""
    for attempt in range(100):
        collection = material.before(stage, folder / str(attempt))
        moment = rng.uniform(0, material.seconds[stage])
        job = server().start(stage, material.videos, collection, prepare=prepare)
        if job.ended_within(moment):  # before it could be killed
            continue
        workers = job.children()
        job.send(signal.SIGKILL)
        if job.wait() != -signal.SIGKILL:
            continue
        assert are_gone(workers), "decoding processes outlived the run"
        finish(material, stage, collection)
        return len(workers)
    raise AssertionError(f"{stage} was always faster than its killer")


def test_killed_at_some_random_moments_it_ends_as_an_unbroken_one(small: Material, tmp_path: Path) -> None:
    rng = random.Random(SEED)
    stages = ("run", "select", "index", "select", "decode", "index", "select", "embed-frames", "index", "select")
    workers = [kill_at_random(small, rng, stage, tmp_path / str(n)) for n, stage in enumerate(stages)]
    assert any(workers)


@pytest.mark.long
def test_killed_at_125_random_moments_of_a_hundred_videos_the_digest_is_always_the_same(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    material = make_material(tmp_path_factory.mktemp("hundred"), make_hundred)
    rng = random.Random(SEED)
    kills = {stage: 0 for stage in ("decode", "embed-frames", "select", "index", "run")}
    for _ in range(KILLS // len(kills)):
        for stage in kills:
            kill_at_random(material, rng, stage, tmp_path / "c", "sabotage", "two_workers", [])
            shutil.rmtree(tmp_path / "c")
            kills[stage] += 1
    print(f"{sum(kills.values())} kills: {kills}")


@pytest.mark.long
def test_a_killed_worker_costs_nothing(small: Material, tmp_path: Path) -> None:
    collection = small.before("run", tmp_path / "c")
    job = server().start("run", small.videos, collection, 0.1, ("sabotage", "two_workers", []))
    wait_until(lambda: len(job.children()) == 2)
    for worker in job.children():
        os.kill(worker, signal.SIGKILL)
    assert job.wait() == FAILED, job.errors
    assert digest_of(collection) == digest_of(small.after("run"))


# --------------------------------------------------------------------------------------------------------- a training


@pytest.mark.long
def test_a_training_killed_at_steps_of_every_kind_ends_with_the_same_weights(tmp_path: Path) -> None:
    from small_trainings import make_collection

    kitchen = make_collection(tmp_path / "kitchen", 12)
    trainer = server("small_trainings", "pipeline.training.command")

    def train(output: Path, *prepare: object) -> Job:
        return trainer.start("train", kitchen, output, prepare=prepare)

    def files(output: Path) -> dict[str, bytes]:
        names = ("head.safetensors", "metrics.jsonl", "config.json", "training.json")
        return {name: (output / name).read_bytes() for name in names}

    whole, log = tmp_path / "whole", tmp_path / "log"
    job = train(whole, "sabotage", "count_steps", [str(whole), str(log)])
    assert job.wait() == 0, job.errors
    steps = log.read_text("utf-8").splitlines()
    kinds: dict[str, list[int]] = {re.sub(r"\d+", "N", step): [] for step in steps}
    for number, step in enumerate(steps, 1):
        kinds[re.sub(r"\d+", "N", step)].append(number)
    rng = random.Random(SEED)
    halves = sorted((kind for kind in kinds if kind.startswith("half of")), key=lambda kind: "state.pt" not in kind)
    others = sorted(kinds.keys() - halves)
    for step in halves + rng.sample(others, TRAINING_KILLS - len(halves)):
        number = rng.choice(kinds[step])
        output = tmp_path / "out"
        job = train(output, "sabotage", "kill_at_step", [str(output), number])
        assert job.wait() == -signal.SIGKILL, job.errors
        job = train(output)
        assert job.wait() == 0, f"killed {step}: {job.errors}"
        assert files(output) == files(whole), step
        assert list(output.rglob("*.tmp")) == [], step
        shutil.rmtree(output)
    print(f"train: {TRAINING_KILLS} kills at {len(kinds)} kinds of {len(steps)} steps")


# --------------------------------------------------------------------------------------------------- the next command


def test_a_grown_folder_does_only_the_new_and_a_moved_video_is_not_new(small: Material, tmp_path: Path) -> None:
    videos, collection = tmp_path / "videos", tmp_path / "c"
    videos.mkdir()
    for name in ("clip0.mp4", "clip1.mp4", "clip1.txt"):
        shutil.copy(small.videos / name, videos)
    assert call("run", videos, collection) == 0
    before = Collection(collection).commit_numbers()
    (videos / "clip0.mp4").rename(videos / "renamed.mp4")
    shutil.copy(small.videos / "clip2.mp4", videos / "new.mp4")
    assert call("run", videos, collection) == 0
    state = Collection(collection).state()
    fresh = [c for c in Collection(collection).commits() if c.number not in before and "features/" in " ".join(c.files)]
    assert [row.outcome.path for c in fresh for row in c.rows] == [str(videos / "new.mp4")]
    assert sorted(state.paths.values()) == [str(videos / n) for n in ("clip1.mp4", "new.mp4", "renamed.mp4")]
    (videos / "clip1.mp4").unlink()
    assert call("run", videos, collection) == 0
    assert verify_collection(collection)["indexed"] == 2
    shutil.copy(small.videos / "clip1.mp4", videos)
    assert call("run", videos, collection) == 0
    assert verify_collection(collection)["indexed"] == 3
