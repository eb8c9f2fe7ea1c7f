"""The command line: options in, results on standard output, everything else on standard error.

Each module here defines commands; stages are imported inside their functions, so that `fineco --help` loads nothing but
click.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback

import click

from pipeline.cli import convert, evaluate, inspect, scorer, stages, train
from pipeline.cli.options import Context, cli, complain
from pipeline.errors import FinecoError

__all__ = ["cli", "convert", "evaluate", "inspect", "main", "scorer", "stages", "train"]


STDOUT_ERRORS = (errno.ENOSPC, errno.EBADF, errno.EIO)


def main() -> None:
    """The `fineco` command. Every error is one line or two; a traceback only with -v."""
    _open_standard_streams()
    context = Context()
    try:
        cli(sys.argv[1:] or ["--help"], prog_name="fineco", obj=context, standalone_mode=False)
        sys.stdout.flush()
    except click.UsageError as error:
        complain(f"error: {error.format_message()}\n  {_usage_hint(error)}")
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        complain("error: stopped")
        sys.exit(130)
    except FinecoError as error:
        if context.verbose:
            traceback.print_exc()
        complain(f"error: {error}")
        sys.exit(error.exit_code)
    except BrokenPipeError:  # the reader has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)
    except Exception as error:
        if context.verbose:
            traceback.print_exc()
        if isinstance(error, OSError) and error.errno in STDOUT_ERRORS and error.filename is None:  # help, version
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter tries once more at its end
            complain(f"error: cannot write the results: {error.strerror}")
            sys.exit(1)
        first_line = str(error).strip().partition("\n")[0]
        complain(f"error: unexpected {type(error).__name__}: {first_line}")
        complain("  This is a fault in fineco; 'fineco -v ...' shows where.")
        sys.exit(1)


def _open_standard_streams() -> None:
    """Where a stream was closed (`>&-`), its number would go to the next file that is opened, and whatever writes to
    the stream would write into that file. Notes may be lost; results may not: to write them is to fail."""
    for number, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, flags)
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)


def _usage_hint(error: click.UsageError) -> str:
    if isinstance(error, click.NoSuchOption) and error.option_name in ("-q", "--quiet", "-v", "--verbose"):
        return f"It goes before the command: fineco {error.option_name} COMMAND ..."
    return f"See '{error.ctx.command_path if error.ctx else 'fineco'} --help'."
