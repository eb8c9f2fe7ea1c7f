"""Runs that are killed, stopped or crowded at any moment lose nothing and end as an unbroken run does."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.collection import Collection
from pipeline.verify import verify_collection
from videos import encode_video

N_VIDEOS = 12
N_KILLS = 30
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.fault


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dozen short videos, some with text beside them, and one that is none."""
    folder = tmp_path_factory.mktemp("videos")
    for i in range(N_VIDEOS):
        encode_video(folder / f"clip{i:02d}.mp4", n_frames=30 + 5 * i, size=(64 + 2 * i, 48))
        if i % 2:
            (folder / f"clip{i:02d}.txt").write_text(f"a caption about thing number {i}\n", "utf-8")
    (folder / "broken.mp4").write_bytes(b"no video at all" * 100)
    return folder


def start(folder: Path, collection: Path, seconds_per_batch: float = 0.0) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [
        sys.executable,
        str(ROOT / "tests" / "fake_run.py"),
        str(folder),
        str(collection),
        str(seconds_per_batch),
    ]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE, text=True)


def finish(folder: Path, collection: Path) -> str:
    """Runs to the end; returns the digest of what is there."""
    process = start(folder, collection)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 3, errors  # the broken one
    content = verify_collection(collection)
    assert content["problems"] == []
    assert content["videos"] == content["indexed"] == N_VIDEOS
    return str(content["digest"])


@pytest.fixture(scope="module")
def unbroken(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return finish(folder, tmp_path_factory.mktemp("unbroken") / "c")


def children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def gone(pids: list[int], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.05)
    return False


def running(
    folder: Path, collection: Path, seconds_per_batch: float, first_commits: int
) -> Iterator[subprocess.Popen[str]]:
    """A run that has made some commits."""
    process = start(folder, collection, seconds_per_batch)
    deadline = time.monotonic() + 30
    while len(list(collection.glob("outcomes/*.jsonl"))) < first_commits and time.monotonic() < deadline:
        time.sleep(0.01)
    yield process
    process.kill()
    process.wait()


def test_killed_at_thirty_random_moments_it_ends_as_an_unbroken_run(
    folder: Path, unbroken: str, tmp_path: Path
) -> None:
    rng = random.Random(20261120)
    kills = 0
    collection = tmp_path / "c0"
    while kills < N_KILLS:
        process = start(folder, collection, seconds_per_batch=0.03)
        try:
            process.wait(timeout=rng.uniform(0.2, 2.2))
            collection = tmp_path / f"c{kills}"  # it finished before it could be killed: a new one
        except subprocess.TimeoutExpired:
            workers = children(process.pid)
            process.kill()
            process.wait()
            kills += 1
            assert gone(workers), "decoding processes outlived the run"
    for broken in sorted(tmp_path.iterdir()):
        assert finish(folder, broken) == unbroken
        assert not list(broken.rglob("*.tmp"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_cleanly_with_the_line_to_resume(
    folder: Path, unbroken: str, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    collection = tmp_path / "c"
    for process in running(folder, collection, 0.2, 1):
        workers = children(process.pid)
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
        assert process.returncode == code
        assert "stopped; what was finished is kept" in errors
        assert "Go on with: " in errors
        assert "Traceback" not in errors
        assert gone(workers)
    assert finish(folder, collection) == unbroken


def test_a_second_signal_ends_it_at_once(folder: Path, unbroken: str, tmp_path: Path) -> None:
    collection = tmp_path / "c"
    for process in running(folder, collection, 3.0, 0):
        while not (collection / ".lock").exists() or not children(process.pid):
            time.sleep(0.02)
        time.sleep(0.7)
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        process.wait(timeout=10)
        assert time.monotonic() - started < 1.5
        assert process.returncode == 130
    assert finish(folder, collection) == unbroken


def test_a_second_run_is_refused_and_told_who_writes(folder: Path, tmp_path: Path) -> None:
    collection = tmp_path / "c"
    for process in running(folder, collection, 0.3, 1):
        other = start(folder, collection)
        _, errors = other.communicate(timeout=20)
        assert other.returncode == 2
        assert f"process {process.pid} on" in errors
        assert process.poll() is None


def test_a_killed_worker_costs_nothing(folder: Path, unbroken: str, tmp_path: Path) -> None:
    collection = tmp_path / "c"
    for process in running(folder, collection, 0.05, 1):
        for worker in children(process.pid):
            os.kill(worker, signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 3, errors
    assert verify_collection(collection)["digest"] == unbroken


def test_a_grown_folder_does_only_the_new_and_a_moved_video_is_not_new(folder: Path, tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    for name in ("clip00.mp4", "clip01.mp4", "clip01.txt"):
        (videos / name).write_bytes((folder / name).read_bytes())
    collection = tmp_path / "c"
    assert start(videos, collection).wait(60) == 0
    before = Collection(collection).commit_numbers()
    (videos / "clip00.mp4").rename(videos / "renamed.mp4")
    (videos / "new.mp4").write_bytes((folder / "clip02.mp4").read_bytes())
    assert start(videos, collection).wait(60) == 0
    state = Collection(collection).state()
    fresh = [c for c in Collection(collection).commits() if c.number not in before and "features/" in " ".join(c.files)]
    assert [row.outcome.path for c in fresh for row in c.rows] == [str(videos / "new.mp4")]
    assert sorted(state.paths.values()) == [str(videos / n) for n in ("clip01.mp4", "new.mp4", "renamed.mp4")]
    (videos / "clip01.mp4").unlink()
    assert start(videos, collection).wait(60) == 0
    assert verify_collection(collection)["indexed"] == 2
    (videos / "clip01.mp4").write_bytes((folder / "clip01.mp4").read_bytes())
    assert start(videos, collection).wait(60) == 0
    assert verify_collection(collection)["indexed"] == 3
