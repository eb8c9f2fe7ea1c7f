"""One writer at a time: the second is refused at once, whatever became of the lock's file; readers are not."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from command_line import fineco
from fake_run import FPS5, call
from fakes import FakeEncoder
from guards import Guard
from pipeline import commands
from pipeline.commands import Machine, Sources
from pipeline.errors import FinecoError, UsageError
from pipeline.lock import Lock
from pipeline.verify import verify_collection
from small_disks import mounted
from small_runs import make_videos
from stage_processes import Job, server, wait_until

pytestmark = pytest.mark.fault

GUARDS = [
    Guard(
        (16,),
        "pipeline/lock.py",
        "fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "pass",
        "test_every_other_writer_is_refused_at_once_and_told_by_whom",
    ),
    Guard(
        (17,),
        "pipeline/lock.py",
        "fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "pass",
        "test_the_variable_that_turns_hdf5s_locking_off_does_not_turn_ours_off[FALSE]",
    ),
    Guard(
        (16,),
        "pipeline/lock.py",
        "self._lock(self._descriptors[1])",
        "pass",
        "test_whoever_removes_or_replaces_the_file_of_the_lock_lets_no_second_writer_in[removed]",
    ),
    Guard(
        (16,),
        "pipeline/lock.py",
        "            if not os.path.samestat(os.fstat(self._descriptors[0]), os.lstat(self._path)):\n"
        "                return False\n",
        "            pass\n",
        "test_a_file_that_was_replaced_before_it_was_locked_is_not_the_lock",
    ),
    Guard(
        (16,),
        "pipeline/lock.py",
        "        if not stat.S_ISREG(os.fstat(self._descriptors[0]).st_mode):\n            raise self._strange()\n",
        "",
        "test_a_lock_that_is_no_plain_file_is_refused_and_left_alone[make_pipe]",
    ),
    Guard(
        (16,),
        "pipeline/commands.py",
        "        if Collection.exists(folder):\n            raise",
        "        if False:\n            raise",
        "test_a_collection_that_another_command_made_meanwhile_is_not_made_again",
    ),
]
SECONDS = 2.0  # in which a second writer is refused


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_videos(tmp_path_factory.mktemp("writers") / "videos", 3)


@pytest.fixture(scope="module")
def finished(videos: Path) -> Path:
    """A collection of one of the videos."""
    first = videos.parent / "first"
    first.mkdir()
    shutil.copy(videos / "clip0.mp4", first)
    assert call("run", first, videos.parent / "finished") == 0
    return videos.parent / "finished"


@pytest.fixture
def collection(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "c"))


def hold(videos: Path, collection: Path, seconds: float = 120.0) -> Job:
    """A run that is in the middle of encoding."""
    reached = collection.parent / "reached"
    reached.unlink(missing_ok=True)
    job = server().start("run", videos, collection, seconds, ("sabotage", "slow", ["embed", str(reached)]))
    wait_until(reached.exists)
    return job


@pytest.fixture(scope="module")
def held(finished: Path) -> Path:
    """The collection that `holder` writes to."""
    return Path(shutil.copytree(finished, finished.parent / "held"))


@pytest.fixture(scope="module")
def holder(videos: Path, held: Path) -> Iterator[Job]:
    job = hold(videos, held)
    yield job
    assert not job.ended_within(0)
    job.send(signal.SIGKILL)
    job.wait()


def refused(stage: str, videos: Path, collection: Path, by: str, **environment: str) -> None:
    started = time.monotonic()
    job = server().start(stage, videos, collection, environment=environment)
    assert job.wait() == 2, f"{stage}: {job.errors}"
    assert time.monotonic() - started < SECONDS
    assert f"error: {collection} is being written by {by}" in job.errors, stage


def test_every_other_writer_is_refused_at_once_and_told_by_whom(holder: Job, videos: Path, held: Path) -> None:
    for stage in ("run", "decode", "embed-frames", "embed-videos", "select", "index"):
        refused(stage, videos, held, f"'fineco run {videos} -c {held}' (process {holder.pid} on ")


def test_readers_work_during_a_run(holder: Job, held: Path) -> None:
    for arguments in (["status"], ["verify"], ["failures"], ["status", "--json"]):
        done = fineco(*arguments, "-c", held)
        assert (done.code, done.err) == (0, ""), arguments
    (hits,) = commands.search(held, ["a red block"], encoder=FakeEncoder())
    assert len(hits) == 1


@pytest.mark.parametrize("value", ["FALSE", "TRUE", "BEST_EFFORT", "no such value"])
def test_the_variable_that_turns_hdf5s_locking_off_does_not_turn_ours_off(
    holder: Job, videos: Path, held: Path, value: str
) -> None:
    refused("select", videos, held, "'fineco run ", HDF5_USE_FILE_LOCKING=value)


@pytest.mark.parametrize("value", ["FALSE", "no such value"])
def test_the_variable_of_hdf5s_locking_changes_nothing(
    videos: Path, finished: Path, tmp_path: Path, value: str
) -> None:
    digests = []
    for number, environment in enumerate(({}, {"HDF5_USE_FILE_LOCKING": value})):
        collection = Path(shutil.copytree(finished, tmp_path / str(number)))
        for stage in ("select", "index", "verify"):
            job = server().start(stage, videos, collection, environment=environment)
            assert job.wait() == 0, job.errors
        digests.append(verify_collection(collection)["digest"])
    assert digests[0] == digests[1]


def remove(lock: Path) -> None:
    lock.unlink()


def replace(lock: Path) -> None:
    lock.with_name("new").write_text("")
    lock.with_name("new").replace(lock)


@pytest.mark.parametrize("damage", [remove, replace], ids=["removed", "replaced"])
def test_whoever_removes_or_replaces_the_file_of_the_lock_lets_no_second_writer_in(
    holder: Job, videos: Path, held: Path, damage: Callable[[Path], None]
) -> None:
    damage(held / ".lock")
    refused("select", videos, held, "another process")


def test_a_file_that_was_replaced_before_it_was_locked_is_not_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = fcntl.flock
    locked: list[int] = []

    def flock(descriptor: int, how: int) -> None:
        if not locked:
            replace(tmp_path / ".lock")
        locked.append(os.fstat(descriptor).st_ino)
        plain(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with Lock(tmp_path, "first"):
        there = (tmp_path / ".lock").stat().st_ino
        assert there in locked[1:]
        assert "first" in (tmp_path / ".lock").read_text()


def make_folder(lock: Path) -> None:
    lock.mkdir()


def make_link(lock: Path) -> None:
    lock.with_name("precious").write_text("years of work")
    lock.symlink_to(lock.with_name("precious"))


def make_dead_link(lock: Path) -> None:
    lock.symlink_to(lock.with_name("absent"))


def make_pipe(lock: Path) -> None:
    os.mkfifo(lock)


@pytest.mark.parametrize("make", [make_folder, make_link, make_dead_link, make_pipe])
def test_a_lock_that_is_no_plain_file_is_refused_and_left_alone(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / ".lock")
    with pytest.raises(FinecoError, match=r"\.lock is not a plain file\n  It was not made by fineco: remove it"):
        Lock(tmp_path, "mine").__enter__()
    assert not (tmp_path / "absent").exists()
    if (tmp_path / "precious").exists():
        assert (tmp_path / "precious").read_text() == "years of work"


def test_a_lock_is_free_after_its_holder_was_killed_and_its_workers_do_not_have_it(
    videos: Path, collection: Path
) -> None:
    job = hold(videos, collection)
    workers = job.children()
    assert workers
    for worker in workers:
        opened = [os.readlink(link) for link in Path(f"/proc/{worker}/fd").iterdir()]
        assert opened
        assert not [path for path in opened if path.startswith(str(collection))]
    job.send(signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL
    started = time.monotonic()
    with Lock(collection, "next"):
        assert time.monotonic() - started < SECONDS


def test_of_two_runs_that_start_on_the_same_new_folder_one_makes_it(videos: Path, tmp_path: Path) -> None:
    collection = tmp_path / "c"
    jobs = [server().start("run", videos, collection, 0.1) for _ in range(2)]
    assert sorted(job.wait() for job in jobs) == [0, 2], [job.errors for job in jobs]
    content = verify_collection(collection)
    assert (content["problems"], content["indexed"]) == ([], 3)


def test_a_collection_that_another_command_made_meanwhile_is_not_made_again(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*arguments: Any) -> None:
        (tmp_path / "c").mkdir()
        (tmp_path / "c" / "collection.json").write_text('{"schema": 1, "config": {}, "encoder": null}')

    monkeypatch.setattr(commands, "set_sampling", load)  # while the encoder is being loaded
    with pytest.raises(UsageError, match="was made by another command meanwhile"):
        commands.run(tmp_path / "c", Sources([str(videos)]), FPS5, machine=Machine(quiet=True), encoder=FakeEncoder())
    assert '"config": {}' in (tmp_path / "c" / "collection.json").read_text()


def test_a_collection_on_a_disk_that_cannot_be_written_is_searched_and_refuses_a_run(
    videos: Path, finished: Path, tmp_path: Path
) -> None:
    with mounted(tmp_path / "disk", 4, lambda disk: shutil.copytree(finished, disk / "c"), read_only=True) as disk:
        for arguments in (["status"], ["verify"], ["failures"]):
            assert fineco(*arguments, "-c", disk / "c").code == 0
        assert commands.search(disk / "c", ["a red block"], encoder=FakeEncoder())[0]
        for stage in ("run", "decode", "select", "index"):
            job = server().start(stage, videos, disk / "c")
            assert job.wait() == 1
            assert f"error: cannot write to {disk / 'c'}: Read-only file system" in job.errors


@pytest.mark.long
def test_a_second_training_is_refused_at_once(tmp_path: Path) -> None:
    from small_trainings import make_collection

    kitchen = make_collection(tmp_path / "kitchen")
    with Lock(tmp_path / "out", "fineco train"):
        job = server("small_trainings", "pipeline.training.command").start("train", kitchen, tmp_path / "out")
        assert job.wait() == 2
        assert "is being written by 'fineco train'" in job.errors


def test_folders_that_are_gone_are_made_again_for_a_lock(tmp_path: Path) -> None:
    with Lock(tmp_path / "a" / "b", "mine"):
        assert (tmp_path / "a" / "b" / ".lock").exists()
