"""Progress on stderr: one line that moves on a terminal, plain lines now and then in a file or a pipe."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, TextIO, cast

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

FIRST_LINE_SECONDS = 5.0  # when piped: soon enough to see that it runs
LINE_SECONDS = 30.0  # and then seldom enough that a night's log stays readable

RECENT_SECONDS = 60.0
RECENT_VIDEOS = 10
# "Now" is the last minute and at least ten videos: the rates follow the disk and the GPU as they change, and one long
# video does not throw the time left about. The whole run would remember its slow start for hours.

POLL_SECONDS = 0.2
MARK_SECONDS = 1.0
MAX_MARKS = 3600  # bounds the memory while a single video takes hours

MIN_BAR = 10  # columns; facts are dropped before the bar gets shorter


@dataclass(frozen=True, slots=True)
class Counts:
    """What was done in `elapsed_seconds`. A video is counted once: as done, as a failure or as skipped.

    Attributes:
        skipped: Videos that needed no work, e.g. finished by an earlier run.
        frames: Sampled frames that went through.
        video_seconds: Length of the videos that went through, on their own time lines.
    """

    videos_done: int = 0
    failures: int = 0
    skipped: int = 0
    frames: int = 0
    video_seconds: float = 0.0
    elapsed_seconds: float = 0.0

    def since(self, earlier: Counts) -> Counts:
        """What was done after `earlier`."""
        return Counts(
            self.videos_done - earlier.videos_done,
            self.failures - earlier.failures,
            self.skipped - earlier.skipped,
            self.frames - earlier.frames,
            self.video_seconds - earlier.video_seconds,
            self.elapsed_seconds - earlier.elapsed_seconds,
        )

    @property
    def finished(self) -> int:
        """Videos with any outcome."""
        return self.videos_done + self.failures + self.skipped

    @property
    def worked(self) -> int:
        """Videos that took work; the time left depends on these alone."""
        return self.videos_done + self.failures

    @property
    def frames_per_second(self) -> float:
        return self.frames / self.elapsed_seconds if self.elapsed_seconds > 0 else 0.0

    @property
    def video_hours_per_hour(self) -> float:
        return self.video_seconds / self.elapsed_seconds if self.elapsed_seconds > 0 else 0.0


class Progress:
    """Counts what a run has done and shows it; safe to update from any thread.

    Nothing that happens to the stream (a closed terminal, a full disk behind a pipe) ends the run: the lines are lost.

    Args:
        total_videos: None while unknown; `set_total` may follow.
        quiet: Count only.
        stream: stderr by default.
        clock: Monotonic seconds; a test passes its own.
    """

    def __init__(
        self,
        total_videos: int | None = None,
        quiet: bool = False,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total_videos
        self._quiet = quiet
        self._stream = _Expendable(sys.stderr if stream is None else stream)
        self._clock = clock
        self._start = clock()
        self._counts = Counts()
        self._marks = deque([Counts()], maxlen=MAX_MARKS)
        # Never held while rich is called: rich holds its own lock when it asks for a drawing, which takes this one.
        # Reentrant, because a signal handler may call `note` while its own thread is inside `update`.
        self._lock = threading.RLock()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._live: Live | None = None

    def __enter__(self) -> Progress:
        if self._quiet:
            return self
        if self._stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):
            self._live = self._open_live()
        else:
            self._thread = threading.Thread(target=self._write_lines, name="progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._closed.set()
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def update(
        self, videos_done: int = 0, failures: int = 0, skipped: int = 0, frames: int = 0, video_seconds: float = 0.0
    ) -> None:
        """Adds to the counts. A video belongs in one of the first three: `update(failures=1)`."""
        with self._lock:
            c = self._counts
            self._counts = Counts(
                c.videos_done + videos_done,
                c.failures + failures,
                c.skipped + skipped,
                c.frames + frames,
                c.video_seconds + video_seconds,
                self._clock() - self._start,
            )
            if self._counts.elapsed_seconds - self._marks[-1].elapsed_seconds >= MARK_SECONDS:
                self._marks.append(self._counts)

    def set_total(self, total_videos: int) -> None:
        """Says how many videos there are, once that is known."""
        with self._lock:
            self._total = total_videos

    def note(self, line: str) -> None:
        """Prints a line above the bar. Control characters, which names of files may hold, are shown and not obeyed."""
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
        if self._quiet:
            return
        live = self._live
        if live is not None:
            live.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            self._write_line(line)

    def summary(self) -> Counts:
        """Everything done so far, and in how long; the caller makes the run's last line of it."""
        with self._lock:
            return self._now()

    def _now(self) -> Counts:
        return replace(self._counts, elapsed_seconds=self._clock() - self._start)

    def _state(self) -> tuple[Counts, Counts, int | None]:
        """The counts now, what was done recently, and the total."""
        with self._lock:
            now, marks = self._now(), self._marks
            while (
                len(marks) > 1
                and now.elapsed_seconds - marks[1].elapsed_seconds >= RECENT_SECONDS
                and now.worked - marks[1].worked >= RECENT_VIDEOS
            ):
                marks.popleft()
            return now, now.since(marks[0]), self._total

    def _write_lines(self) -> None:
        due = FIRST_LINE_SECONDS
        while not self._closed.wait(POLL_SECONDS):
            now, recent, total = self._state()
            if now.elapsed_seconds >= due:
                due = now.elapsed_seconds + LINE_SECONDS
                facts = [fact for _, fact in facts_of(now, recent, total)]
                self._write_line(f"{clock_time(now.elapsed_seconds)}  {', '.join(facts)}")

    def _write_line(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()

    def _open_live(self) -> Live:
        from rich.console import Console
        from rich.live import Live

        # stdout carries results and is left alone; what others write to stderr goes above the bar
        console = Console(file=cast("TextIO", self._stream), force_terminal=True)
        live = Live(
            get_renderable=lambda: self._draw(console.width), console=console, transient=True, redirect_stdout=False
        )
        live.start()
        return live

    def _draw(self, width: int) -> Table:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        now, recent, total = self._state()
        line = Table.grid(padding=(0, 1), pad_edge=False, expand=True)
        line.add_column(ratio=1)
        line.add_column(no_wrap=True)
        bar = ProgressBar(total=total, completed=now.finished, complete_style="green", finished_style="green")
        line.add_row(bar, Text(fit(facts_of(now, recent, total), width - MIN_BAR - 1)))
        return line


def facts_of(now: Counts, recent: Counts, total: int | None) -> list[tuple[int, str]]:
    """What there is to say, in the order it is shown; each with its rank, 0 for what is dropped last."""
    facts = [(0, f"{now.finished:,} videos" if total is None else f"{now.finished:,}/{total:,} videos")]
    if now.frames:
        facts.append((3, f"{recent.frames_per_second:,.0f} frames/s"))
    if now.video_seconds:
        facts.append((4, f"{recent.video_hours_per_hour:,.0f} video-h/h"))
    if now.skipped:
        facts.append((5, f"{now.skipped:,} skipped"))
    if now.failures:
        facts.append((2, f"{now.failures:,} failed"))
    if total is not None and now.finished < total and recent.worked and recent.elapsed_seconds > 0:
        facts.append((1, f"{duration((total - now.finished) * recent.elapsed_seconds / recent.worked)} left"))
    return facts


def fit(facts: list[tuple[int, str]], width: int) -> str:
    """The facts in one line of at most `width` columns, without those of the highest ranks where they do not fit."""
    for limit in range(max(rank for rank, _ in facts), 0, -1):
        line = "  ".join(fact for rank, fact in facts if rank <= limit)
        if len(line) <= width:
            return line
    return next(fact for rank, fact in facts if rank == 0)


def clock_time(seconds: float) -> str:
    """4000.2 -> `1:06:40`."""
    minutes, second = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"


def duration(seconds: float) -> str:
    """An estimate in two units at most: `45 s`, `12 min`, `3 h 05 min`, `2 d 4 h`."""
    minutes = round(seconds / 60)
    if seconds < 59.5:
        return f"{max(1, round(seconds))} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


class _Expendable:
    """A text stream whose failure does not matter."""

    # ValueError: closed, or a character its encoding lacks; RuntimeError: a signal handler writes into a write
    _FAILURES = (OSError, ValueError, RuntimeError)

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(*self._FAILURES):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(*self._FAILURES):
            self._stream.flush()

    def isatty(self) -> bool:
        try:
            return self._stream.isatty()
        except ValueError:
            return False

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:
        return self._stream.encoding or "utf-8"
