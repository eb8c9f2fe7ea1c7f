"""The command line: options in, results on standard output, everything else on standard error.

Stages are imported inside the functions, so that `fineco --help` loads nothing but click.
"""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pipeline.errors import FinecoError

if TYPE_CHECKING:
    from pipeline.commands import Machine, Sources
    from pipeline.config import EmbedOptions, SelectOptions
    from pipeline.run import Summary

SELECTORS = ("caption", "topics", "uniform", "all")
FORMATS = ("table", "json", "jsonl", "csv", "paths")
SOME_FAILED, NO_HIT = 3, 4

Function = TypeVar("Function", bound=Callable[..., Any])


class Finite(click.FloatRange):
    """A finite number: a range alone lets NaN through."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


POSITIVE = Finite(min=0, min_open=True)


def options(*decorators: Callable[[Any], Any]) -> Callable[[Function], Function]:
    """Several options as one decorator, shown in the order in which they are given."""

    def decorate(function: Function) -> Function:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


collection_option = click.option(
    "-c", "--collection", "folder", type=click.Path(path_type=Path), required=True, help="Folder of the collection."
)
source_options = options(
    click.argument("sources", nargs=-1, metavar="[VIDEOS]..."),
    click.option(
        "--manifest",
        type=click.Path(path_type=Path),
        help="JSON lines or CSV file of videos: path, and perhaps id, captions with spans.",
    ),
    click.option("--retry-failed", is_flag=True, help="Try videos again that failed in an earlier run."),
)
sampling_options = options(
    click.option("--fps", type=float, help="Sampled frames per second of video.  [default: 1]"),
    click.option("--frames", "n_frames", type=int, help="Instead: so many frames a video, evenly spaced."),
    click.option("--keyframes", is_flag=True, help="Instead: only keyframes, which are fast to decode."),
)
encoder_options = options(
    click.option("--model", help="Encoder: builtin, open_clip:ARCH[/TAG].  [default: open_clip:PE-Core-B-16]"),
    click.option(
        "--precision", type=click.Choice(["auto", "fp32", "bf16"]), help="Arithmetic of the encoder.  [default: auto]"
    ),
    click.option(
        "--exact-resize", is_flag=True, default=None, help="Resize as the encoder's own preprocessing does (slower)."
    ),
)
device_option = click.option(
    "--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:N]", help="Where the encoder runs."
)
work_options = options(
    click.option("--workers", type=click.IntRange(min=1), help="Decoding processes.  [default: one per processor]"),
    click.option("--batch-size", type=click.IntRange(min=1), help="Frames per batch.  [default: 32, on a GPU 256]"),
)
limit_options = options(
    click.option(
        "--timeout", type=POSITIVE, default=60.0, show_default=True, help="Seconds a decoder may make no progress."
    ),
    click.option(
        "--max-pixels",
        type=click.IntRange(min=1),
        default=8192 * 4608,
        show_default=True,
        help="Largest frame, width times height.",
    ),
    click.option(
        "--max-memory", type=POSITIVE, default=4.0, show_default=True, help="GiB a decoding process may take."
    ),
)
selection_options = options(
    click.option("--selector", type=click.Choice(SELECTORS), help="Which frames are kept.  [default: caption]"),
    click.option("--keep", help="How many: a share such as 0.25, or a number such as 8.  [default: 0.25]"),
    click.option("--topics", type=click.Path(path_type=Path), help="File of texts, one a line, for --selector topics."),
)
kind_option = click.option(
    "--kind", type=click.Choice(["auto", "flat", "ivf"]), default="auto", show_default=True, help="What index to build."
)
format_option = click.option(
    "--format", "form", type=click.Choice(FORMATS), default="table", show_default=True, help="How to print the results."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


class Context:
    """What -v and -q say."""

    verbose = quiet = False

    def say(self, line: str) -> None:
        """A note on standard error."""
        if not self.quiet:
            _complain(line)


def _complain(line: str) -> None:
    """A line on standard error. A reader that went away, as `2>&1 | head` does, must not end a run."""
    with contextlib.suppress(OSError):
        click.echo("".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in line), err=True)


def _version(context: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            click.echo(f"fineco {version('fineco')}")
        except PackageNotFoundError:
            click.echo("fineco (not installed: run from its source folder)")
        context.exit()


class Commands(click.Group):
    """Lists the commands in the order in which they are used, not by the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("-v", "--verbose", count=True, help="Show where an error came from.")
@click.option("-q", "--quiet", is_flag=True, help="Print only results and errors.")
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version.")
@click.pass_context
def cli(context: click.Context, verbose: int, quiet: bool) -> None:
    """Make video collections searchable by text, offline.

    \b
    fineco run my-videos/ -c kitchen                   decode, embed, select, index
    fineco search "someone whisks eggs" -c kitchen     find videos and moments
    """
    said = context.ensure_object(Context)
    said.verbose, said.quiet = bool(verbose), quiet


def _sampling(fps: float | None, n_frames: int | None, keyframes: bool) -> Any:
    from pipeline.sampling import Sampling

    if (fps is not None) + (n_frames is not None) + keyframes > 1:
        raise click.UsageError("--fps, --frames and --keyframes: choose one.")
    if fps is not None:
        return Sampling("fps", fps)
    if n_frames is not None:
        return Sampling("frames", n_frames)
    return Sampling("keyframes", 0) if keyframes else None


def _machine(context: Context, device: str = "auto", **given: Any) -> Machine:
    from pipeline.commands import Machine
    from pipeline.types import DecodeLimits

    limits = DecodeLimits()
    if "timeout" in given:
        limits = DecodeLimits(
            max_pixels=given["max_pixels"],
            memory_bytes=int(given["max_memory"] * (1 << 30)),
            stall_seconds=given["timeout"],
        )
    return Machine(device, given.get("workers"), given.get("batch_size"), limits, context.quiet, context.say)


def _sources(given: dict[str, Any]) -> Sources:
    from pipeline.commands import Sources

    return Sources(given["sources"], given["manifest"], given["retry_failed"])


def _embed_options(given: dict[str, Any]) -> EmbedOptions:
    from pipeline.config import EmbedOptions

    sampling = _sampling(given["fps"], given["n_frames"], given["keyframes"])
    return EmbedOptions(
        sampling, given.get("model"), given.get("precision"), given.get("exact_resize"), given.get("size")
    )


def _select_options(given: dict[str, Any]) -> SelectOptions:
    from pipeline.config import SelectOptions, read_lines

    topics = given["topics"]
    selector = given["selector"] or ("topics" if topics else None)
    return SelectOptions(selector, given["keep"], read_lines(topics, "topic") if topics else None)


def _finish(context: Context, summary: Summary, what: str, folder: Path) -> None:
    """Says what was done; exits 3 when a video failed."""
    for line in summary.lines(what):
        context.say(line)
    if summary.any_failed:
        context.say(f"Some videos failed: fineco failures -c {shlex.quote(str(folder))}")
        sys.exit(SOME_FAILED)


@cli.command()
@source_options
@collection_option
@sampling_options
@encoder_options
@device_option
@selection_options
@kind_option
@work_options
@limit_options
@click.pass_obj
def run(context: Context, /, folder: Path, device: str, kind: str, **given: Any) -> None:
    """Do the whole job: decode, embed, select frames, build the index.

    VIDEOS are files, folders, quoted patterns, or a manifest (.jsonl, .csv). Text beside a video (clip.txt, .srt, .vtt,
    .json) is what `caption` selects by. The same command again does only what is new or was interrupted.
    """
    from pipeline import commands

    summary = commands.run(
        folder,
        _sources(given),
        _embed_options(given),
        _select_options(given),
        _machine(context, device, **given),
        kind,
    )
    _finish(context, summary, "indexed", folder)


@cli.command()
@source_options
@collection_option
@sampling_options
@click.option("--size", type=click.IntRange(min=16, max=4096), help="Short side of stored frames.  [default: 336]")
@click.option("--workers", type=click.IntRange(min=1), help="Decoding processes.  [default: one per processor]")
@limit_options
@click.pass_obj
def decode(context: Context, /, folder: Path, **given: Any) -> None:
    """Only decode: store sampled frames as JPEG, for `embed`.

    Of use when frames are to be embedded by several encoders, or on another machine; `run` needs no frames on disk.
    """
    from pipeline import commands

    machine = _machine(context, **given)
    summary = commands.decode(folder, _sources(given), _embed_options(given), machine)
    _finish(context, summary, "decoded", folder)


@cli.command()
@source_options
@collection_option
@sampling_options
@encoder_options
@device_option
@work_options
@limit_options
@click.pass_obj
def embed(context: Context, /, folder: Path, device: str, **given: Any) -> None:
    """Only embed: compute the features of every sampled frame.

    Uses the frames that `decode` stored; VIDEOS without stored frames are decoded on the way.
    """
    from pipeline import commands

    machine = _machine(context, device, **given)
    summary = commands.embed(folder, _sources(given), _embed_options(given), machine)
    _finish(context, summary, "embedded", folder)


@cli.command()
@collection_option
@selection_options
@device_option
@click.pass_obj
def select(context: Context, /, folder: Path, device: str, **given: Any) -> None:
    """Choose frames again, without decoding or embedding.

    Run `fineco index` afterwards. Each selection is kept; choosing one that is there takes no time.
    """
    from pipeline import commands

    n = commands.select(folder, _select_options(given), _machine(context, device))
    done = f"Frames of {n} videos chosen." if n else "Every video has this selection already; it is in use."
    context.say(f"{done} Now: fineco index -c {shlex.quote(str(folder))}")


@cli.command()
@collection_option
@kind_option
@click.option("--memory", type=POSITIVE, help="GiB the index may take.  [default: half of what is free]")
@click.option("--force", is_flag=True, help="Build even if nothing changed.")
@click.pass_obj
def index(context: Context, folder: Path, kind: str, memory: float | None, force: bool) -> None:
    """Build the index of the selection in use.

    Videos whose file is gone leave it, and come back when their file does and `run` finds it.
    """
    from pipeline import commands

    memory_bytes = None if memory is None else int(memory * (1 << 30))
    commands.index(folder, kind, memory_bytes, _machine(context), force)


@cli.command()
@click.argument("queries", nargs=-1, metavar="[QUERY]...")
@collection_option
@click.option("-f", "--file", "query_file", type=click.Path(path_type=Path), help="File of queries, one a line.")
@click.option("-k", "n_hits", type=click.IntRange(min=1), default=10, show_default=True, help="Hits per query.")
@click.option("--threshold", type=Finite(), help="Least score (cosine) of a hit.")
@format_option
@click.option("--no-rerank", is_flag=True, help="Rank by pooled vectors only: no re-scoring, no moments.")
@device_option
@click.pass_obj
def search(
    context: Context,
    /,
    queries: tuple[str, ...],
    folder: Path,
    query_file: Path | None,
    n_hits: int,
    threshold: float | None,
    form: str,
    no_rerank: bool,
    device: str,
) -> None:
    """Find videos, and the moments in them, by text.

    Exits 4 when no query has a hit above the threshold.
    """
    from pipeline.config import read_lines

    all_queries = [*queries, *(read_lines(query_file, "query") if query_file else ())]
    if not all_queries:
        raise click.UsageError("Say what to search for, or give a file of queries (-f).")
    if not all(query.strip() for query in all_queries):
        raise click.UsageError("A query is empty.")
    from pipeline import commands
    from pipeline.output import format_hits, write_stdout

    answers = commands.search(folder, all_queries, n_hits, threshold, not no_rerank, _machine(context, device))
    write_stdout(format_hits(all_queries, answers, form))
    if not any(answers):
        sys.exit(NO_HIT)


@cli.command()
@collection_option
@json_option
def status(folder: Path, as_json: bool) -> None:
    """Say what is in a collection, and whether it is up to date."""
    from pipeline.inspect import status_of, status_text
    from pipeline.output import to_json, write_stdout

    content = status_of(folder)
    write_stdout(to_json(content) if as_json else status_text(content))


@cli.command()
@collection_option
@format_option
@click.option("--skipped", is_flag=True, help="Also files that were skipped: no video in them, or duplicates.")
def failures(folder: Path, form: str, skipped: bool) -> None:
    """List the videos that failed, and why. `--format paths` gives names to look at or move away."""
    from pipeline.inspect import failures_of, failures_text
    from pipeline.output import write_stdout

    write_stdout(failures_text(failures_of(folder, skipped), form))


@cli.command()
@collection_option
@json_option
def verify(folder: Path, as_json: bool) -> None:
    """Check every byte of a collection, and print a digest of it.

    Exits 1 when something is damaged, and names the file. Two collections with the same videos, features and selection
    have the same digest, however they came about.
    """
    from pipeline.inspect import verify_collection, verify_text
    from pipeline.output import to_json, write_stdout

    content = verify_collection(folder)
    write_stdout(to_json(content) if as_json else verify_text(content))
    if content["problems"]:
        sys.exit(1)


@cli.command()
@json_option
def doctor(as_json: bool) -> None:
    """Examine this machine, with a cure for every problem.

    Versions, devices, models at hand, file locking. Exits 1 when there is a problem.
    """
    from pipeline.inspect import doctor_report
    from pipeline.output import write_stdout

    text, any_problem = doctor_report(as_json)
    write_stdout(text)
    if any_problem:
        sys.exit(1)


@cli.command()
@click.option(
    "--folder", type=click.Path(path_type=Path), default=Path("demo"), show_default=True, help="Where to work."
)
@click.option("--videos", type=click.IntRange(8, 800), default=64, show_default=True, help="How many to render.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of what is rendered.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes.  [default: one per processor]")
@click.pass_obj
def demo(context: Context, folder: Path, videos: int, seed: int, workers: int | None) -> None:
    """Try everything on rendered videos, and measure the answers.

    With the built-in encoder, which knows nothing but what is rendered here. Needs neither a network nor a GPU.
    """
    from pipeline.demo import run_demo

    if not run_demo(folder, videos, seed, _machine(context, "cpu", workers=workers)):
        sys.exit(1)


def main() -> None:
    """The `fineco` command. Every error is one line or two; a traceback only with -v."""
    context = Context()
    try:
        cli(sys.argv[1:] or ["--help"], prog_name="fineco", obj=context, standalone_mode=False)
        sys.stdout.flush()
    except click.UsageError as error:
        _complain(f"error: {error.format_message()}\n  {_usage_hint(error)}")
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        _complain("error: stopped")
        sys.exit(130)
    except FinecoError as error:
        if context.verbose:
            traceback.print_exc()
        _complain(f"error: {error}")
        sys.exit(error.exit_code)
    except BrokenPipeError:  # the reader has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)
    except Exception as error:
        if context.verbose:
            traceback.print_exc()
        first_line = str(error).strip().partition("\n")[0]
        _complain(f"error: unexpected {type(error).__name__}: {first_line}")
        _complain("  This is a fault in fineco; 'fineco -v ...' shows where.")
        sys.exit(1)


def _usage_hint(error: click.UsageError) -> str:
    if isinstance(error, click.NoSuchOption) and error.option_name in ("-q", "--quiet", "-v", "--verbose"):
        return f"It goes before the command: fineco {error.option_name} COMMAND ..."
    return f"See '{error.ctx.command_path if error.ctx else 'fineco'} --help'."


if __name__ == "__main__":
    main()
