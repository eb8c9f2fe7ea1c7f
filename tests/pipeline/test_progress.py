"""Progress with a clock of the test's own, into a StringIO, and on a real pseudo-terminal."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.progress import FIRST_LINE_SECONDS, LINE_SECONDS, Counts, Progress, duration, facts_of, fit

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys, time
import pipeline.progress
from pipeline.progress import Progress
pipeline.progress.FIRST_LINE_SECONDS = 0.1  # of the plain lines
with Progress({total}) as progress:
    progress.update(skipped=123_456, failures={failures})
    for _ in range({steps}):
        progress.update(videos_done=1, frames=2000, video_seconds=3600.0)
        time.sleep(0.05)
    progress.note("bad\\x1b[2J \\udc80 [red]name[/red].mp4: no video stream")
    time.sleep(0.3)
    print("a result")
print("after", file=sys.stderr)
"""


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def wait_for(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def on_terminal(columns: int, total: int | None, failures: int = 0, steps: int = 12, **environment: str) -> str:
    """What a terminal of this width receives on stderr."""
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    clean = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")}
    program = PROGRAM.format(total=total, failures=failures, steps=steps)
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=side,
        env={**clean, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8", **environment},
    ) as process:
        os.close(side)
        received = b""
        while True:
            try:
                received += os.read(main, 65536)
            except OSError:  # the other side is closed
                break
        stdout, _ = process.communicate(timeout=30)
    os.close(main)
    assert process.returncode == 0, received.decode()
    assert stdout == b"a result\n"  # the bar leaves stdout alone
    return received.decode()


def drawn_lines(received: str) -> list[str]:
    """Each drawing of the bar as a person sees it."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", received)
    return [line for line in re.split(r"[\r\n]+", text) if "videos" in line]


def test_counts_add_up_and_give_the_rates() -> None:
    clock = Clock()
    progress = Progress(10, quiet=True, clock=clock)
    progress.update(videos_done=1, frames=300, video_seconds=7200.0)
    progress.update(failures=1)
    clock.now += 60
    progress.update(videos_done=2, skipped=3, frames=300)
    got = progress.summary()
    assert got == Counts(3, 1, 3, 600, 7200.0, 60.0)
    assert (got.finished, got.worked) == (7, 4)
    assert got.frames_per_second == 10.0
    assert got.video_hours_per_hour == 120.0


def test_no_time_means_no_rate() -> None:
    assert Counts(frames=3, video_seconds=1.0).frames_per_second == 0.0
    assert Counts(frames=3, video_seconds=1.0).video_hours_per_hour == 0.0


def test_updates_from_many_threads_are_all_counted() -> None:
    progress = Progress(quiet=True)

    def work() -> None:
        for _ in range(2000):
            progress.update(videos_done=1, frames=2, video_seconds=0.5)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    got = progress.summary()
    assert (got.videos_done, got.frames, got.video_seconds) == (16_000, 32_000, 8000.0)


def test_a_signal_handler_may_use_it_in_the_middle_of_an_update() -> None:
    progress: Progress | None = None

    def interrupting_clock() -> float:
        nonlocal progress
        if progress is not None:
            interrupted, progress = progress, None
            interrupted.summary()
        return 0.0

    interrupted = Progress(quiet=True, clock=interrupting_clock)
    progress = interrupted
    thread = threading.Thread(target=lambda: interrupted.update(videos_done=1), daemon=True)
    thread.start()
    thread.join(timeout=5)
    assert not thread.is_alive()


def test_piped_lines_come_after_5_seconds_and_then_every_30() -> None:
    clock, stream = Clock(), io.StringIO()
    with Progress(1000, stream=stream, clock=clock) as progress:
        progress.update(videos_done=100, failures=2, skipped=200, frames=5000, video_seconds=36_000.0)
        clock.now += FIRST_LINE_SECONDS - 0.1
        time.sleep(0.5)
        assert stream.getvalue() == ""
        clock.now += 5.1
        assert wait_for(lambda: stream.getvalue().count("\n") == 1)
        clock.now += LINE_SECONDS - 0.1
        time.sleep(0.5)
        assert stream.getvalue().count("\n") == 1
        clock.now += 0.1  # a run that stands still says so
        assert wait_for(lambda: stream.getvalue().count("\n") == 2)
    first, second = stream.getvalue().splitlines()
    assert first == (
        "0:00:10  302/1,000 videos, 500 frames/s, 3,600 video-h/h, 200 skipped, 2 failed, 1 min left"
    )  # 698 videos at 102 in 10 s: 68 s
    assert second.startswith("0:00:40  302/1,000 videos, 125 frames/s")
    assert not any(thread.name == "progress" for thread in threading.enumerate())


def test_notes_are_lines_and_what_a_name_holds_is_shown_and_not_obeyed() -> None:
    stream = io.StringIO()
    with Progress(stream=stream) as progress:
        progress.note("évil\x1b[2J\nname\udcff.mp4: truncated")
    assert stream.getvalue() == "évil\\x1b[2J\\nname\\udcff.mp4: truncated\n"


def test_quiet_prints_nothing_and_counts_all_the_same() -> None:
    clock, stream = Clock(), io.StringIO()
    with Progress(5, quiet=True, stream=stream, clock=clock) as progress:
        progress.update(videos_done=1)
        progress.note("a line")
        clock.now += 100
        time.sleep(0.3)
    assert stream.getvalue() == ""
    assert progress.summary().videos_done == 1


def test_a_lost_stream_does_not_end_the_run() -> None:
    class Lost(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    clock = Clock()
    closed = io.StringIO()
    closed.close()
    for stream in (Lost(), closed):
        with Progress(5, stream=stream, clock=clock) as progress:
            clock.now += 100
            progress.note("nobody sees this")
            time.sleep(0.3)
            progress.update(videos_done=1)
        assert progress.summary().videos_done == 1


def test_the_time_left_follows_the_recent_rate_and_leaves_skipped_videos_out() -> None:
    clock, stream = Clock(), io.StringIO()
    with Progress(stream=stream, clock=clock) as progress:
        progress.update(skipped=5000)
        for _ in range(100):  # a slow start: 1 video in 10 s
            clock.now += 10
            progress.update(videos_done=1, frames=10)
        for _ in range(120):  # then 2 a second
            clock.now += 1
            progress.update(videos_done=2, frames=20)
        progress.set_total(5000 + 100 + 240 + 360)
        clock.now += LINE_SECONDS
        # 60 videos in the last minute (half of it idle), 360 to go; the whole run's rate would say 20 min
        assert wait_for(lambda: stream.getvalue().endswith("10 frames/s, 5,000 skipped, 6 min left\n"))
    assert "5,340/5,700 videos" in stream.getvalue().splitlines()[-1]


def test_a_few_long_videos_do_not_leave_the_estimate_without_a_rate() -> None:
    clock, stream = Clock(), io.StringIO()
    with Progress(30, stream=stream, clock=clock) as progress:
        for _ in range(12):  # one every 10 minutes
            clock.now += 600
            progress.update(videos_done=1)
        clock.now += 300
        assert wait_for(lambda: stream.getvalue().startswith("2:05:00", stream.getvalue().rfind("\n", 0, -1) + 1))
    assert stream.getvalue().endswith("12/30 videos, 3 h 09 min left\n")  # 10 videos in 6,300 s, 18 to go: 11,340 s


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "1 s"),
        (45.4, "45 s"),
        (59.6, "1 min"),
        (3569.0, "59 min"),
        (3590.0, "1 h 00 min"),
        (11_100.0, "3 h 05 min"),
        (86_399.0, "1 d 0 h"),
        (187_200.0, "2 d 4 h"),
    ],
)
def test_an_estimate_has_two_units_at_most(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_without_a_video_that_took_work_there_is_no_estimate() -> None:
    skipped = Counts(skipped=5, elapsed_seconds=10.0)
    assert [fact for _, fact in facts_of(skipped, skipped, 50)] == ["5/50 videos", "5 skipped"]


def test_on_a_narrow_line_the_least_important_facts_go_first() -> None:
    facts = facts_of(Counts(50, 3, 7, 900, 9000.0, 90.0), Counts(50, 3, 7, 900, 9000.0, 90.0), 600)
    full = "60/600 videos  10 frames/s  100 video-h/h  7 skipped  3 failed  15 min left"
    assert fit(facts, 100) == full
    assert fit(facts, len(full)) == full
    assert fit(facts, len(full) - 1) == "60/600 videos  10 frames/s  100 video-h/h  3 failed  15 min left"
    assert fit(facts, 50) == "60/600 videos  10 frames/s  3 failed  15 min left"
    assert fit(facts, 40) == "60/600 videos  3 failed  15 min left"
    assert fit(facts, 5) == "60/600 videos"


def test_a_terminal_of_80_columns_shows_one_line_with_everything_that_matters() -> None:
    received = on_terminal(80, 1_000_000, failures=12_345)
    lines = drawn_lines(received)
    assert len(lines) >= 3
    for line in lines:
        assert len(line) <= 80
        assert re.match("[━╸╺]{10}", line)
    assert re.search(r"━ 135,8\d\d/1,000,000 videos  [\d,]+ frames/s  12,345 failed  .+ left$", lines[-1])
    # the bar moves in place: only the note, the end of the bar and the line after it start new lines
    assert received.count("\n") == 3
    assert r"bad\x1b[2J \udc80 [red]name[/red].mp4: no video stream" in received
    assert received.endswith("\x1b[1A\x1b[2Kafter\r\n")  # the bar is gone
    assert received.rindex("\x1b[?25h") > received.rindex("\x1b[?25l")  # the cursor is back


@pytest.mark.parametrize(("columns", "total"), [(12, 1_000_000), (40, 1_000_000), (80, None), (200, 200_000)])
def test_any_width_is_one_line(columns: int, total: int | None) -> None:
    received = on_terminal(columns, total, steps=6)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", received)
    bars = [line for line in re.split(r"[\r\n]+", text) if "123," in line]
    assert bars
    assert all(len(line) <= columns for line in bars)
    if columns >= 40:
        assert all(re.match("[━╸╺]{10}", line) for line in bars)
    assert received.count("\n") == 3


def test_no_color_is_respected() -> None:
    assert re.search(r"\x1b\[[0-9;]+m", on_terminal(80, 200_000, steps=3))
    assert not re.search(r"\x1b\[[0-9;]*m", on_terminal(80, 200_000, steps=3, NO_COLOR="1"))


def test_a_dumb_terminal_gets_plain_lines_without_escape_codes() -> None:
    received = on_terminal(80, 200_000, steps=3, TERM="dumb")
    assert "\x1b" not in received
    assert r"bad\x1b[2J" in received
    assert re.search(r"^0:00:00  123,4\d\d/200,000 videos, ", received, re.MULTILINE)


def test_rich_is_imported_only_for_a_bar() -> None:
    program = (
        "import sys; from pipeline.progress import Progress\nwith Progress(quiet=True): pass\n"
        "sys.exit('rich' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0
