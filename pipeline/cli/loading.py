"""Ctrl-C before a command begins and after it has ended: without a traceback."""

from __future__ import annotations

import signal
import sys
import threading

_HERE = threading.current_thread() is threading.main_thread()
_before = signal.getsignal(signal.SIGINT)


def end_quietly() -> None:
    """From now on Ctrl-C ends this process, if Python would have raised KeyboardInterrupt."""
    if _HERE and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def done() -> None:
    """Everything is loaded. `python -m` comes to the command itself a little later."""
    if _HERE and sys.argv[:1] != ["-m"]:
        signal.signal(signal.SIGINT, _before)


end_quietly()
