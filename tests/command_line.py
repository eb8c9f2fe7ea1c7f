"""The `fineco` command in this process, with what it wrote and how it ended."""

from __future__ import annotations

import io
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from unittest import mock

from pipeline.cli import main


@dataclass(frozen=True)
class Done:
    """A command that ended: its exit code, the bytes on standard output, the text on standard error."""

    code: int
    out: bytes
    err: str


def fineco(*arguments: object) -> Done:
    """`fineco ARGUMENTS`, with neither stream a terminal. A process of its own would import torch each time."""
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()
    code: object = 0
    on_ctrl_c = signal.getsignal(signal.SIGINT)  # a process that ends has no use for it any more
    with mock.patch.object(sys, "argv", ["fineco", *map(str, arguments)]), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as ended:
            code = ended.code
        finally:
            signal.signal(signal.SIGINT, on_ctrl_c)
    out.flush()
    assert isinstance(out.buffer, io.BytesIO) and isinstance(code, int)
    return Done(code, out.buffer.getvalue(), err.getvalue())
