"""Decoding in processes: every event, in order, whatever becomes of a worker, and nothing left running."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import pipeline.decode
from pipeline.decode import DecodedFrame, DecodePool, VideoFailed
from pipeline.decoding.container import Report
from pipeline.decoding.decoder import sample_frames
from pipeline.decoding.pixels import Resizer
from pipeline.errors import FinecoError
from pipeline.sampling import Sampling
from pipeline.types import DecodeLimits, FrameGeometry, UInt8, Video
from stories import Story, decode_all, hear, nothing_left_behind
from videos import encode_video, video

ROOT = Path(__file__).parents[2]
GEOMETRY = FrameGeometry(32, 32)
EVERY_FRAME = Sampling("fps", 1000.0)
ONCE_A_SECOND = Sampling("fps", 1.0)


def worker_of(pool: DecodePool, wanted: Video) -> subprocess.Popen[bytes]:
    return next(w.process for w in pool._workers if w.job is not None and w.job[0] == wanted)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    with nothing_left_behind():
        yield


@pytest.fixture
def stop() -> Iterator[threading.Event]:
    """Ends a `decode` that would otherwise not end, so that a lost event is a failed test and not a hung one."""
    event = threading.Event()
    timer = threading.Timer(40.0, event.set)
    timer.start()
    yield event
    timer.cancel()


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Video]:
    folder = tmp_path_factory.mktemp("clips")
    return [video(encode_video(folder / f"{n}.mp4", n_frames=n, size=(64, 48), gop=15)) for n in (60, 61, 62, 63)]


@pytest.fixture
def four_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker can be four frames ahead of the consumer, no more: it is still at work when the first one is seen."""
    monkeypatch.setattr(pipeline.decode, "MAX_SLOTS", 4)


def directly(path: str, sampling: Sampling, geometry: FrameGeometry) -> tuple[list[float], list[UInt8]]:
    """The same frames without a process."""
    report, resizer = Report(), Resizer(geometry)
    frames = [(s, resizer(f, report.pixel_aspect)) for s, f in sample_frames(path, sampling, report, DecodeLimits())]
    return [seconds for seconds, _ in frames], [pixels for _, pixels in frames]


@pytest.mark.parametrize("n_workers", [1, 3])
def test_every_frame_of_every_video_comes_in_order_and_unchanged(
    n_workers: int, clips: list[Video], four_slots: None
) -> None:
    with DecodePool(n_workers, EVERY_FRAME, GEOMETRY, DecodeLimits()) as pool:
        stories = decode_all(pool, clips)
    for clip in clips:
        seconds, pixels = directly(clip.path, EVERY_FRAME, GEOMETRY)
        story = stories[clip.video_id]
        assert story.seconds == seconds
        assert len(seconds) == int(clip.video_id)  # many times the number of slots
        assert all(np.array_equal(a, b) for a, b in zip(story.pixels, pixels, strict=True))
        assert story.decoded is not None
        assert story.decoded.duration_seconds == pytest.approx(int(clip.video_id) / 30)
        assert story.decoded.n_decoded >= len(seconds)


def test_a_pool_serves_one_call_after_another(clips: list[Video]) -> None:
    with DecodePool(1, ONCE_A_SECOND, GEOMETRY, DecodeLimits()) as pool:
        assert decode_all(pool, clips[:2])["60"].seconds == [0.0, 1.0]
        assert decode_all(pool, clips[2:])["63"].seconds == [0.0, 1.0, 2.0]


def test_no_video_is_no_event() -> None:
    with DecodePool(1, ONCE_A_SECOND, GEOMETRY, DecodeLimits()) as pool:
        assert list(pool.decode([], threading.Event())) == []


def test_jpeg_frames_show_the_same_picture(clips: list[Video]) -> None:
    geometry = FrameGeometry(24, 24, resize="bound")
    with DecodePool(1, ONCE_A_SECOND, geometry, DecodeLimits(), jpeg=True) as pool:
        story = decode_all(pool, clips[:1])["60"]
    _, expected = directly(clips[0].path, ONCE_A_SECOND, geometry)
    for data, pixels in zip(story.pixels, expected, strict=True):
        shown = np.asarray(Image.open(io.BytesIO(data.tobytes())))
        assert shown.shape == pixels.shape == (24, 32, 3)
        assert np.abs(shown.astype(int) - pixels).mean() < 2


def test_a_jpeg_of_noise_fits_its_slot(tmp_path: Path) -> None:
    noise = [np.random.default_rng(i).integers(0, 256, (256, 256, 3), dtype=np.uint8) for i in range(3)]
    path = encode_video(tmp_path / "noise.mkv", noise, codec="ffv1", fps=1, pixel_format="bgr0")
    with DecodePool(1, ONCE_A_SECOND, FrameGeometry(256, 256), DecodeLimits(), jpeg=True) as pool:
        story = decode_all(pool, [video(path)])["noise"]
    assert [Image.open(io.BytesIO(data.tobytes())).size for data in story.pixels] == [(256, 256)] * 3


@pytest.mark.fault
@pytest.mark.parametrize("deaths", [1, 2])
def test_a_killed_worker_costs_only_its_own_video_a_retry(
    deaths: int, clips: list[Video], four_slots: None, stop: threading.Event
) -> None:
    stories: dict[str, Story] = {}
    victim, killed = clips[1], 0
    with DecodePool(2, EVERY_FRAME, GEOMETRY, DecodeLimits()) as pool:
        for event in pool.decode(clips, stop):
            hear(stories, event)
            if event.video == victim and isinstance(event, DecodedFrame) and event.attempt > killed and killed < deaths:
                if event.attempt == 2:  # alone: no other video is being decoded
                    assert [w.job[0] for w in pool._workers if w.job] == [victim]
                worker_of(pool, victim).kill()
                killed += 1
    assert stories["61"].failures == [("crash", True), ("crash", False)][:deaths]
    assert (stories["61"].decoded is not None) == (deaths == 1)
    if deaths == 1:
        assert len(stories["61"].seconds) == 61  # every frame of the second attempt
    assert [len(stories[name].seconds) for name in ("60", "62", "63")] == [60, 62, 63]
    assert all(stories[name].failures == [] for name in ("60", "62", "63"))


@pytest.mark.fault
@pytest.mark.parametrize("hangs", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_hanging_worker_is_killed_and_its_video_tried_again(
    hangs: int, clips: list[Video], four_slots: None, stop: threading.Event
) -> None:
    stories: dict[str, Story] = {}
    victim, stopped = clips[1], 0
    with DecodePool(2, EVERY_FRAME, GEOMETRY, DecodeLimits(stall_seconds=1.5)) as pool:
        for event in pool.decode(clips, stop):
            hear(stories, event)
            if event.video == victim and isinstance(event, DecodedFrame) and event.attempt > stopped < hangs:
                worker_of(pool, victim).send_signal(signal.SIGSTOP)
                stopped += 1
    assert stories["61"].failures == [("timeout", True), ("timeout", False)][:hangs]
    assert (stories["61"].decoded is not None) == (hangs == 1)
    assert [len(stories[name].seconds) for name in ("60", "62", "63")] == [60, 62, 63]


@pytest.mark.fault
def test_a_worker_that_hangs_after_waiting_for_slots_is_noticed(
    clips: list[Video], four_slots: None, stop: threading.Event
) -> None:
    """Its last word was that it waits; the slots it was given since then make a silence suspicious again."""
    with DecodePool(1, EVERY_FRAME, GEOMETRY, DecodeLimits(stall_seconds=1.5)) as pool:
        codes = []
        for event in pool.decode(clips[:1], stop):
            if isinstance(event, DecodedFrame) and event.seconds == 0.0:
                time.sleep(0.5)  # the ring is full, and the worker has said so, before the first slot is freed
                worker_of(pool, clips[0]).send_signal(signal.SIGSTOP)
            elif isinstance(event, VideoFailed):
                codes.append(event.error.code)
    assert codes == ["timeout", "timeout"]


def test_a_consumer_slower_than_the_stall_limit_is_not_a_hang(
    clips: list[Video], four_slots: None, stop: threading.Event
) -> None:
    stories: dict[str, Story] = {}
    with DecodePool(2, Sampling("fps", 4.0), GEOMETRY, DecodeLimits(stall_seconds=0.8)) as pool:
        slept = 0
        for event in pool.decode(clips[:3], stop):
            hear(stories, event)
            if isinstance(event, DecodedFrame) and (event.seconds in (0.0, 1.0)) and slept < 3:
                time.sleep(1.3)
                slept += 1
    assert {name: (len(story.seconds), story.failures) for name, story in stories.items()} == {
        "60": (8, []),
        "61": (9, []),
        "62": (9, []),
    }


def test_stop_ends_at_once(clips: list[Video], four_slots: None, stop: threading.Event) -> None:
    with DecodePool(2, EVERY_FRAME, GEOMETRY, DecodeLimits()) as pool:
        events = pool.decode(clips, stop)
        next(events)
        stop.set()
        started = time.monotonic()
        left = list(events)
    assert time.monotonic() - started < 2
    assert len(left) < 30  # of some 250


def test_stop_is_heard_while_nothing_happens(clips: list[Video], stop: threading.Event) -> None:
    with DecodePool(1, EVERY_FRAME, GEOMETRY, DecodeLimits()) as pool:
        for worker in pool._workers:
            worker.process.send_signal(signal.SIGSTOP)
        threading.Timer(0.3, stop.set).start()
        started = time.monotonic()
        assert list(pool.decode(clips, stop)) == []
        assert time.monotonic() - started < 2


def test_workers_that_cannot_start_end_the_command(
    clips: list[Video], monkeypatch: pytest.MonkeyPatch, stop: threading.Event
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with (
        pytest.raises(FinecoError, match="decoding processes do not start"),
        DecodePool(1, ONCE_A_SECOND, GEOMETRY, DecodeLimits()) as pool,
    ):
        list(pool.decode(clips, stop))


def test_a_video_over_the_memory_limit_fails_alone(tmp_path: Path, clips: list[Video]) -> None:
    black = [np.zeros((4608, 8192, 3), np.uint8)]  # 113 MB a frame
    big = encode_video(tmp_path / "big.mov", black, codec="png", pixel_format="rgb24")
    with DecodePool(1, ONCE_A_SECOND, GEOMETRY, DecodeLimits()) as pool:  # what a worker needs depends on the machine
        decode_all(pool, clips[:1])
        status = Path(f"/proc/{pool._workers[0].process.pid}/status").read_text()
        needed_kib = int(status.split("VmPeak:")[1].split()[0])
    with DecodePool(1, ONCE_A_SECOND, GEOMETRY, DecodeLimits(memory_bytes=(needed_kib << 10) + (60 << 20))) as pool:
        stories = decode_all(pool, [video(big), clips[0]])
    assert stories["big"].failures == [("memory", False)]
    assert stories["60"].decoded is not None


def test_a_name_that_is_not_utf8_is_decoded(tmp_path: Path, clips: list[Video]) -> None:
    path = os.path.join(os.fsencode(tmp_path), b"caf\xe9 'x'\n.mp4")
    os.link(clips[0].path, path)
    odd = Video("odd", "0" * 32, os.fsdecode(path), 0, 0, 0)
    with DecodePool(1, ONCE_A_SECOND, GEOMETRY, DecodeLimits()) as pool:
        assert decode_all(pool, [odd])["odd"].seconds == [0.0, 1.0]


def test_workers_never_load_torch(clips: list[Video]) -> None:
    with DecodePool(1, ONCE_A_SECOND, GEOMETRY, DecodeLimits()) as pool:
        decode_all(pool, clips[:1])
        maps = Path(f"/proc/{pool._workers[0].process.pid}/maps").read_text()
    assert "libavcodec" in maps
    assert "torch" not in maps and "faiss" not in maps and "hdf5" not in maps


@pytest.mark.fault
def test_workers_die_with_their_parent(tmp_path: Path, clips: list[Video]) -> None:
    """Killed without a chance to clean up, in the middle of a video whose ring is full."""
    script = (
        "import sys, threading, time\n"
        "import pipeline.decode\n"
        "from pipeline.sampling import Sampling\n"
        "from pipeline.types import DecodeLimits, FrameGeometry, Video\n"
        "pipeline.decode.MAX_SLOTS = 4\n"
        "pool = pipeline.decode.DecodePool(2, Sampling('fps', 30.0), FrameGeometry(32, 32), DecodeLimits())\n"
        "video = Video('v', '0' * 32, sys.argv[1], 0, 0, 0)\n"
        "for event in pool.decode([video], threading.Event()):\n"
        "    print(*(w.process.pid for w in pool._workers), flush=True)\n"
        "    time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, clips[0].path], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    with parent:
        assert parent.stdout is not None
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(workers) == 2
        parent.kill()
    deadline = time.monotonic() + 5
    while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in workers)


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    return False
