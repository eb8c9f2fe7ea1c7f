"""How a training looks on stderr: one line that moves on a terminal, plain lines now and then in a file or a pipe."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from pipeline.progress import FIRST_LINE_SECONDS, LINE_SECONDS, RECENT_SECONDS, clock_time, duration

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Display:
    """Shows the steps of a training; the `Watcher` of `train`.

    Args:
        epochs: How many there are.
        quiet: Show nothing.
        stream: stderr by default.
        clock: Monotonic seconds; a test passes its own.
    """

    def __init__(
        self,
        epochs: int,
        quiet: bool = False,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._epochs = epochs
        self._quiet = quiet
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._start = clock()
        self._due = FIRST_LINE_SECONDS
        self._loss = self._recall = ""
        self._clips = 0
        self._marks: deque[tuple[float, float, int]] = deque()  # seconds, progress, clips
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Display:
        if not self._quiet and self._stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            console = Console(file=self._stream, force_terminal=True)
            columns = (BarColumn(bar_width=None), TextColumn("{task.description}", markup=False))
            self._bar = Progress(*columns, console=console, transient=True, expand=True, redirect_stdout=False)
            self._task = self._bar.add_task("", total=1.0)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    @property
    def clips_per_second(self) -> float:
        """Of the last minute."""
        if len(self._marks) < 2:
            return 0.0
        (then, _, before), (now, _, clips) = self._marks[0], self._marks[-1]
        return (clips - before) / (now - then) if now > then else 0.0

    def step(self, progress: float, losses: dict[str, float], n_clips: int) -> None:
        """Counts a step; writes a line when one is due."""
        now = self._clock() - self._start
        self._clips += n_clips
        if losses:
            self._loss = f"loss {losses['loss']:.3f}"
        self._marks.append((now, progress, self._clips))
        while len(self._marks) > 2 and now - self._marks[1][0] > RECENT_SECONDS:
            self._marks.popleft()
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=progress, description="  ".join(self._facts(progress)))
        elif now >= self._due:
            self._due = now + LINE_SECONDS
            self._write(f"{clock_time(now)}  {', '.join(self._facts(progress))}")

    def validated(self, epoch: int, metrics: dict[str, float], best: bool) -> None:
        """A line for each validation."""
        if not metrics:
            return
        self._recall = f"R@1 {metrics['R@1']:.1f}"
        recalls = "  ".join(f"{name} {value:.1f}" for name, value in metrics.items() if name.startswith("R@"))
        when = f"epoch {epoch}/{self._epochs}" if epoch else "before training"
        self._write(f"{when}  {recalls}{'  best so far' if best and epoch else ''}")

    def _facts(self, progress: float) -> list[str]:
        epoch = min(int(progress * self._epochs) + 1, self._epochs)
        facts = [f"epoch {epoch}/{self._epochs}", self._loss, self._recall]
        if rate := self.clips_per_second:
            facts.append(f"{rate:,.0f} clips/s")
            (then, before, _), (now, _, _) = self._marks[0], self._marks[-1]
            if progress > before:
                facts.append(f"{duration((1 - progress) * (now - then) / (progress - before))} left")
        return [fact for fact in facts if fact]

    def _write(self, line: str) -> None:
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
            return
        with suppress(OSError, ValueError):  # a closed terminal or pipe must not end a training
            self._stream.write(line + "\n")
            self._stream.flush()
