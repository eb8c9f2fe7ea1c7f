"""Many small videos, one after the other: descriptors, processes, temporary files and memory stay as they were."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import pipeline.decode
from guards import Guard
from pipeline.decode import DecodedFrame, DecodeEvent, DecodePool, VideoDecoded
from pipeline.sampling import Sampling
from pipeline.types import DecodeLimits, FrameGeometry, Video
from small_runs import machine, run
from stories import children, nothing_left_behind
from videos import encode_video, video

N_WORKERS = 2
# How many videos, how many a process decodes before a new one takes its place, how far memory may grow (MiB).
SMALL = (60, 20, 30)
LARGE = pytest.param((10_000, 500, 30), marks=pytest.mark.long)

pytestmark = pytest.mark.fault


def small_videos(folder: Path, n: int) -> list[Path]:
    """Videos of two frames that differ in an atom that says nothing."""
    folder.mkdir()
    whole = encode_video(folder / "0.mp4", n_frames=2, size=(32, 32)).read_bytes()
    paths = [folder / f"{i}.mp4" for i in range(n)]
    for i, path in enumerate(paths):
        path.write_bytes(whole + b"\0\0\0\x10free" + i.to_bytes(8, "big"))
    return paths


@dataclass
class Use:
    """What this process and its children hold."""

    descriptors: int
    nameless_files: int
    temporary_files: int
    processes: int
    of_workers: int  # descriptors
    resident_mib: float

    @staticmethod
    def now(others: set[int]) -> Use:
        """Of now; `others` are processes that some other test started."""
        links = [os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if os.path.islink(entry.path)]
        workers = children() - others
        return Use(
            descriptors=len(links),
            nameless_files=sum("(deleted)" in link for link in links),
            temporary_files=len(os.listdir(tempfile.gettempdir())),
            processes=len(workers),
            of_workers=max(len(os.listdir(f"/proc/{pid}/fd")) for pid in workers),
            resident_mib=int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20,
        )


class Watch:
    """Looks at `DecodePool.decode` as it goes: the use after a fifth of the videos and at the end, and the workers."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.uses: list[Use] = []
        self.n_done = 0
        self.workers: set[int] = set()
        self.others = children()

    def __call__(self, pool: DecodePool, videos: Iterable[Video], stop: threading.Event) -> Iterator[DecodeEvent]:
        for event in self.decode(pool, videos, stop):
            yield event
            if not isinstance(event, DecodedFrame):
                assert isinstance(event, VideoDecoded), event
                self.n_done += 1
                self.workers.update(worker.process.pid for worker in pool._workers)
                if self.n_done in (self.n // 5, self.n - N_WORKERS):  # while all are at work
                    self.uses.append(Use.now(self.others))

    decode = staticmethod(DecodePool.decode)

    def check(self, jobs_per_worker: int, growth_mib: int) -> None:
        before, after = self.uses
        assert self.n_done == self.n
        assert after.processes == before.processes == N_WORKERS
        assert after.descriptors <= before.descriptors + 3  # files that are being written
        assert max(before.of_workers, after.of_workers) < 16  # one that starts reads modules
        assert after.nameless_files == before.nameless_files
        assert after.temporary_files == before.temporary_files
        assert after.resident_mib < before.resident_mib + growth_mib
        assert len(self.workers) >= self.n // jobs_per_worker - N_WORKERS


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with nothing_left_behind():
        yield
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("amount", [SMALL, LARGE])
def test_a_pool_holds_no_more_after_many_videos(
    amount: tuple[int, int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, jobs_per_worker, growth_mib = amount
    monkeypatch.setattr(pipeline.decode, "JOBS_PER_WORKER", jobs_per_worker)
    videos = [video(path) for path in small_videos(tmp_path / "videos", n)]
    watch = Watch(n)
    with DecodePool(N_WORKERS, Sampling("fps", 1.0), FrameGeometry(16, 16), DecodeLimits()) as pool:
        for _ in watch(pool, videos, threading.Event()):
            pass
    watch.check(jobs_per_worker, growth_mib)


@pytest.mark.parametrize("amount", [SMALL, LARGE])
def test_a_run_holds_no_more_after_many_videos(
    amount: tuple[int, int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, jobs_per_worker, growth_mib = amount
    monkeypatch.setattr(pipeline.decode, "JOBS_PER_WORKER", jobs_per_worker)
    small_videos(tmp_path / "videos", n)
    watch = Watch(n)

    def watched(pool: DecodePool, videos: Iterable[Video], stop: threading.Event) -> Iterator[DecodeEvent]:
        return watch(pool, videos, stop)

    monkeypatch.setattr(DecodePool, "decode", watched)
    summary = run(tmp_path / "c", tmp_path / "videos", machine=machine(workers=N_WORKERS))
    assert (summary.n_ok, summary.any_failed) == (n, False)
    watch.check(jobs_per_worker, growth_mib)
    assert not list((tmp_path / "c").rglob("*.tmp"))


GUARDS = [
    Guard(
        (10,),
        "pipeline/decode.py",
        "        self.send({}, descriptor)\n        os.close(descriptor)\n",
        "        self.send({}, descriptor)\n",
        "test_a_pool_holds_no_more_after_many_videos",
    ),
    Guard(
        (10,),
        "pipeline/decoding/worker.py",
        "    os.close(descriptor)\n",
        "",
        "test_a_pool_holds_no_more_after_many_videos",
    ),
    Guard(
        (10,),
        "pipeline/decode.py",
        "worker.jobs_done >= JOBS_PER_WORKER",
        "False",
        "test_a_pool_holds_no_more_after_many_videos",
    ),
]
