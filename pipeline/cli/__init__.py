"""The command line: options in, results on standard output, everything else on standard error.

Each module here defines commands; stages are imported inside their functions, so that `fineco --help` loads nothing but
click.
"""

from __future__ import annotations

from pipeline.cli import loading  # isort: skip  # before all else

import errno
import os
import sys
import traceback

import click

from pipeline.cli import convert, evaluate, inspect, scorer, stages, train
from pipeline.cli.options import Context, cli, complain
from pipeline.errors import FinecoError
from pipeline.interrupts import Interrupts

REFUSED = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EBADF, errno.EIO})  # to be written

__all__ = ["cli", "convert", "evaluate", "inspect", "main", "scorer", "stages", "train"]


def main() -> None:
    """The `fineco` command. Every error is one line or two; a traceback only with -v."""
    _open_standard_streams()
    context = Context()
    try:
        with Interrupts() as interrupts, interrupts.at_once():  # commands that have something to finish have their own
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
        if isinstance(error, OSError) and error.errno in REFUSED:
            complain(f"error: cannot write {error.filename or 'the results'}: {error.strerror}")
            if error.filename:
                complain(
                    "  Free some space (TMPDIR chooses where temporary files go); the same command then continues."
                )
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter tries once more at its end
            sys.exit(1)
        first_line = str(error).strip().partition("\n")[0]
        complain(f"error: unexpected {type(error).__name__}: {first_line}")
        complain("  This is a fault in fineco; 'fineco -v ...' shows where.")
        sys.exit(1)
    finally:
        loading.end_quietly()


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


loading.done()
