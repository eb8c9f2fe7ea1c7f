"""The `fineco` command in this process, with what it wrote and how it ended."""

from __future__ import annotations

import io
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
    with mock.patch.object(sys, "argv", ["fineco", *map(str, arguments)]), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as ended:
            code = ended.code
    out.flush()
    assert isinstance(out.buffer, io.BytesIO) and isinstance(code, int)
    return Done(code, out.buffer.getvalue(), err.getvalue())
