"""Signals that ask a command to stop: Ctrl-C, SIGTERM, and SIGHUP, which a terminal sends when it is closed."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType

from pipeline.errors import Interrupted

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """Turns the first signal into an event, so that the shard in progress is finished; the second one ends the process
    at once.

    Args:
        command: To go on with, for the message; none where there is nothing to go on with.
    """

    def __init__(self, command: str = "") -> None:
        self.stop = threading.Event()
        self._command = command
        self._number = 0
        self._cuts_off = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # `nohup` means it
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.stop.is_set():
            if number != signal.SIGHUP:  # which a closed terminal and its shell both send
                os._exit(128 + number)
            return
        self._number = number
        self.stop.set()
        if self._cuts_off:
            sys.unraisablehook = lambda unraisable: None  # what it cuts off in a library's clean-up is nobody's concern
            raise KeyboardInterrupt

    def check(self) -> None:
        """Raises Interrupted once a signal has come."""
        if self.stop.is_set():
            raise Interrupted(self._number, self._command)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """For work of which nothing stays unless it ends well: a signal cuts it off in the middle.

        Raises:
            Interrupted: A signal has come, before or in the middle.
        """
        self._cuts_off = True
        try:
            if not self.stop.is_set():
                yield
        except BaseException:
            if not self.stop.is_set():
                raise  # else: whatever a library made of it
        finally:
            self._cuts_off = False
        if self.stop.is_set():
            raise Interrupted(self._number, self._command)
