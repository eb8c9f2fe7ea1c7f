"""Decoders that hang, die, eat memory or processor time, print without end or lie cost one video each, and nothing is
left running. A `sitecustomize.py` that only decoding processes heed makes them; a file's first bytes say which.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest

from guards import Guard
from pipeline.cli.options import Context, limit_options, machine_from
from pipeline.collection import Collection
from pipeline.decode import DecodedFrame, DecodePool, VideoFailed
from pipeline.errors import FinecoError
from pipeline.inspect import failures_of
from pipeline.sampling import Sampling
from pipeline.types import DecodeLimits, FrameGeometry, Video
from small_runs import checked, machine, run
from stories import decode_all, nothing_left_behind
from videos import encode_video, video

ONCE_A_SECOND = Sampling("fps", 1.0)
GEOMETRY = FrameGeometry(16, 16)
SOON = DecodeLimits(stall_seconds=1.5, memory_bytes=448 << 20)

# What a decoder that is wrong, or was taken over, does with a file of this beginning.
SITECUSTOMIZE = '''
import sys

if "pipeline.decoding.worker" in sys.orig_argv:
    import os, signal, stat, time
    import pipeline.decoding.decoder as decoder

    open_video = decoder.open_video

    def protocol():
        """The pipe to the parent."""
        return next(n for n in range(3, 20) if n not in (0, 1, 2) and is_pipe(n))

    def is_pipe(descriptor):
        try:
            return stat.S_ISFIFO(os.fstat(descriptor).st_mode)
        except OSError:
            return False

    def behave(descriptor, limits):
        wish = os.pread(descriptor, 64, 0).decode("latin-1").split("\\n")[0]
        if wish == "hang":
            time.sleep(600)
        elif wish == "abort":
            os.abort()
        elif wish == "kill":
            signal.raise_signal(signal.SIGKILL)
        elif wish == "eat":
            eaten = []
            while True:
                eaten.append(bytearray(64 << 20))
        elif wish == "raise":
            raise ZeroDivisionError("a fault of a library")
        elif wish == "spin":
            while True:
                pass
        elif wish == "slow":
            report = sys._getframe(1).f_locals["report"]
            while True:
                report.alive()
        elif wish == "print":
            os.write(1, b"to the stream that the protocol had\\n")
            try:
                for _ in range(100):
                    os.write(2, b"complaint\\n" * 100_000)
            except OSError:
                pass
        elif wish.startswith("say "):
            what = wish.removeprefix("say ")
            if what == "without end":
                for _ in range(100):
                    os.write(protocol(), b"x" * (1 << 16))
            else:
                os.write(protocol(), (what if what != "deep" else "[" * 100_000).encode("latin-1") + b"\\n")
            time.sleep(600)
        return open_video(descriptor, limits)

    decoder.open_video = behave
'''

pytestmark = pytest.mark.fault


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    with nothing_left_behind():
        yield


@pytest.fixture
def bad_decoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    monkeypatch.setenv("PYTHONPATH", str(folder))


def wishing(folder: Path, *wishes: str) -> list[Video]:
    """Files that make the decoder do this, each known by its wish."""
    videos = []
    for i, wish in enumerate(wishes):
        path = folder / f"wish{i}.mp4"
        path.write_text(wish + "\n" + "padding " * i)
        videos.append(video(path, wish))
    return videos


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> list[Video]:
    folder = tmp_path_factory.mktemp("good")
    return [video(encode_video(folder / f"good{n}.mp4", n_frames=n)) for n in (10, 40, 70)]


def failures(limits: DecodeLimits, videos: list[Video], good: list[Video]) -> dict[str, list[tuple[str, bool]]]:
    """Decodes the videos among good ones, which come whole; what became of each attempt."""
    with DecodePool(2, ONCE_A_SECOND, GEOMETRY, limits) as pool:
        stories = decode_all(pool, [good[0], *videos, *good[1:]])
    assert [len(stories[v.video_id].seconds) for v in good] == [1, 2, 3]
    assert all(stories[v.video_id].failures == [] for v in good)
    return {v.video_id: stories[v.video_id].failures for v in videos}


def test_decoders_that_hang_or_die_fail_alone(bad_decoders: None, good: list[Video], tmp_path: Path) -> None:
    found = failures(SOON, wishing(tmp_path, "hang", "abort", "kill", "eat", "raise"), good)
    assert found == {
        "hang": [("timeout", True), ("timeout", False)],
        "abort": [("crash", True), ("crash", False)],
        "kill": [("crash", True), ("crash", False)],  # as the system does when memory is short
        "eat": [("memory", False)],
        "raise": [("decode_error", False)],
    }


def test_a_hang_ends_within_two_seconds_of_the_limit(bad_decoders: None, tmp_path: Path) -> None:
    (hanging,) = wishing(tmp_path, "hang")
    with DecodePool(1, ONCE_A_SECOND, GEOMETRY, SOON) as pool:
        events = [e for e in pool.decode([hanging], threading.Event()) if isinstance(e, VideoFailed)]
    assert [event.error.code for event in events] == ["timeout", "timeout"]
    assert all(SOON.stall_seconds <= event.seconds < SOON.stall_seconds + 2 for event in events)


def test_processor_time_is_limited_between_packets_and_inside_one(
    bad_decoders: None, good: list[Video], tmp_path: Path
) -> None:
    """Neither is tried again: it would take as long. The one that spins never comes back to look at the clock."""
    started = time.monotonic()
    found = failures(DecodeLimits(cpu_seconds=0.5), wishing(tmp_path, "spin", "slow"), good)
    assert found == {"spin": [("cpu_time", False)], "slow": [("cpu_time", False)]}
    assert time.monotonic() - started < 10


def test_every_video_has_its_processor_time_for_itself(bad_decoders: None, tmp_path: Path) -> None:
    """One process, and less than what the videos take together."""
    videos = wishing(tmp_path, "slow") + [
        video(encode_video(tmp_path / f"{i}.mp4", n_frames=10, size=(64 + 2 * i, 48))) for i in range(2)
    ]
    with DecodePool(1, ONCE_A_SECOND, GEOMETRY, DecodeLimits(cpu_seconds=0.4)) as pool:
        process = pool._workers[0].process
        stories = decode_all(pool, [videos[0], *videos[1:], video(videos[0].path, "again")])
        assert pool._workers[0].process is process  # it looked at the clock itself: nobody had to kill it
    assert [story.failures for story in stories.values()] == [[("cpu_time", False)], [], [], [("cpu_time", False)]]


def test_what_a_decoder_prints_is_bounded(bad_decoders: None, tmp_path: Path) -> None:
    """A hundred megabytes of complaints, and some on the stream where the protocol was."""
    (printing,) = wishing(tmp_path, "print")
    with DecodePool(1, ONCE_A_SECOND, GEOMETRY, DecodeLimits()) as pool:
        assert decode_all(pool, [printing])["print"].failures == [("invalid", False)]
        assert os.fstat(pool._workers[0]._stderr.fileno()).st_size <= 1 << 20
        status, last_words = pool._workers[0].stop()
        assert status == -9 and len(last_words) <= 200
        pool._workers[0]._stderr = open(os.devnull, "r+b")  # it is stopped once more at the end


LIES = [
    '{"kind": "frame", "slot": 100000, "size": 768, "seconds": 0}',
    '{"kind": "done", "seconds": 1, "duration_seconds": 1, "span_seconds": 1, "n_decoded": 1, "notes": [], '
    '"cpu_seconds": 1}',
    "nonsense",
    '{"kind": "frame", "slot": 0, "size": -5, "seconds": 0}',
    '{"kind": "frame", "slot": 0, "size": 9, "seconds": 0}',
    '{"kind": "frame", "slot": 0, "size": 768, "seconds": NaN}',
    '{"kind": "done"}',
    "[]",
    "\\xff\\xfe",
    "deep",
    "without end",
]


@pytest.mark.parametrize(
    "lie", [pytest.param(lie, marks=pytest.mark.long if i > 2 else ()) for i, lie in enumerate(LIES)]
)
def test_a_decoder_that_lies_to_its_parent_is_a_dead_one(
    lie: str, bad_decoders: None, good: list[Video], tmp_path: Path
) -> None:
    liar, third = wishing(tmp_path, f"say {lie}"), good[2]
    with DecodePool(1, ONCE_A_SECOND, GEOMETRY, DecodeLimits()) as pool:
        stories = decode_all(pool, [*liar, third])
    assert stories[liar[0].video_id].failures == [("crash", True), ("crash", False)]
    assert stories[third.video_id].seconds == [0.0, 1.0, 2.0]


def test_a_slot_that_there_is_not_is_never_looked_at() -> None:
    with DecodePool(1, ONCE_A_SECOND, GEOMETRY, DecodeLimits(), jpeg=True) as pool:
        worker = pool._workers[0]
        for number, size in ((0, -1), (-1, 1), (worker.n_slots, 1), (0, worker.slot_bytes + 1)):
            with pytest.raises(ValueError, match="a slot that there is not"):
                worker.slot(number, size)


def test_a_run_among_bad_decoders_ends_with_every_outcome(
    bad_decoders: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    wishes = {v.path: v.video_id for v in wishing(folder, "abort", "eat", "print")}
    for n in (20, 40):
        encode_video(folder / f"good{n}.mp4", n_frames=n)
    collection = tmp_path / "c"
    summary = run(collection, folder, machine=replace(machine(workers=2), limits=SOON))
    assert (summary.n_ok, summary.any_failed) == (2, True)
    found = {wishes[row.outcome.path]: row.outcome for row in failures_of(collection, skipped=True)}
    assert {wish: (outcome.code, outcome.attempts) for wish, outcome in found.items()} == {
        "abort": ("crash", 2),
        "eat": ("memory", 1),
        "print": ("invalid", 1),
    }
    assert len(Collection(collection).state().paths) == 2
    checked(collection)
    assert "Traceback" not in capfd.readouterr().err


def test_the_defaults_of_the_options_are_those_of_the_limits() -> None:
    command = click.command()(limit_options(lambda **given: None))
    defaults: dict[str, Any] = {str(option.name): option.default for option in command.params}
    assert machine_from(Context(), **defaults).limits == DecodeLimits()
    given = machine_from(Context(), **{**defaults, "max_cpu": 7.0, "max_memory": 0.5, "timeout": 3.0}).limits
    assert given == DecodeLimits(cpu_seconds=7.0, memory_bytes=512 << 20, stall_seconds=3.0)


# ---- nothing is left running, whatever ends a pool


def test_a_pool_that_cannot_start_all_its_workers_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    start = subprocess.Popen
    started: list[subprocess.Popen[bytes]] = []

    def second_fails(*arguments: Any, **options: Any) -> Any:
        if started:
            raise OSError(11, "Resource temporarily unavailable")
        started.append(start(*arguments, **options))
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", second_fails)
    with pytest.raises(FinecoError, match=r"decoding processes do not start: .*temporarily unavailable"):
        DecodePool(2, ONCE_A_SECOND, GEOMETRY, DecodeLimits())
    assert started[0].returncode is not None


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_in_the_consumer_leaves_no_process(error: type[BaseException], good: list[Video]) -> None:
    with pytest.raises(error), DecodePool(2, Sampling("fps", 1000.0), GEOMETRY, DecodeLimits()) as pool:
        processes = [worker.process for worker in pool._workers]
        for event in pool.decode(good, threading.Event()):
            if isinstance(event, DecodedFrame):
                raise error
    assert all(process.returncode is not None for process in processes)


def _guard(faults: tuple[int, ...], file: str, old: str, new: str, test: str) -> Guard:
    return Guard(faults, f"pipeline/{file}", old, new, test)


DIE = "test_decoders_that_hang_or_die_fail_alone"
GUARDS = [
    _guard((10,), "decode.py", "now - worker.heard > limit", "now - worker.heard > 600", DIE),
    _guard((10,), "decode.py", "attempt == 1 and error.code", "error.code", DIE),
    _guard((10,), "decoding/worker.py", '(resource.RLIMIT_AS, limits["memory_bytes"]),', "", DIE),
    _guard(
        (9, 10),
        "decoding/worker.py",
        "resource.setrlimit(resource.RLIMIT_CPU,",
        "(lambda *ignored: None)(resource.RLIMIT_CPU,",
        "test_processor_time_is_limited_between_packets_and_inside_one",
    ),
    _guard(
        (9, 10),
        "decoding/worker.py",
        "if self.used() > self._seconds:",
        "if False:",
        "test_every_video_has_its_processor_time_for_itself",
    ),
    _guard(
        (10,),
        "decoding/worker.py",
        "            (resource.RLIMIT_FSIZE, PRINTED_BYTES),",
        "           ",
        "test_what_a_decoder_prints_is_bounded",
    ),
    _guard(
        (10,),
        "decode.py",
        "        if not (0 <= number < self.n_slots and 0 <= size <= self.slot_bytes):",
        "        if False:",
        "test_a_slot_that_there_is_not_is_never_looked_at",
    ),
    _guard(
        (10,),
        "decode.py",
        "            except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError):",
        "            except ArithmeticError:",
        "test_a_decoder_that_lies_to_its_parent_is_a_dead_one",
    ),
    _guard(
        (10,),
        "decode.py",
        "        except BaseException:\n            self.close()\n            raise\n",
        "        finally:\n            pass\n",
        "test_a_pool_that_cannot_start_all_its_workers_leaves_none",
    ),
    _guard(
        (10,),
        "decode.py",
        "        self.close()\n\n",
        "        pass\n\n",
        "test_an_error_in_the_consumer_leaves_no_process",
    ),
]
