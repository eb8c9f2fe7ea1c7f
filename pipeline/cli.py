"""The command line: options in, results on standard output, everything else on standard error.

Stages are imported inside the functions, so that `fineco --help` loads nothing but click.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
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


class Positive(click.FloatRange):
    """A finite number above 0: a range alone lets NaN through."""

    def __init__(self) -> None:
        super().__init__(min=0, min_open=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


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
        "--timeout", type=Positive(), default=60.0, show_default=True, help="Seconds a decoder may make no progress."
    ),
    click.option(
        "--max-pixels",
        type=click.IntRange(min=1),
        default=8192 * 4608,
        show_default=True,
        help="Largest frame, width times height.",
    ),
    click.option(
        "--max-memory", type=Positive(), default=4.0, show_default=True, help="GiB a decoding process may take."
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

    def __init__(self, verbose: int, quiet: bool) -> None:
        self.verbose, self.quiet = verbose, quiet

    def say(self, line: str) -> None:
        """A note on standard error."""
        if not self.quiet:
            click.echo(line, err=True)


def _version(context: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
        try:
            click.echo(f"fineco {importlib.metadata.version('fineco')}")
        except importlib.metadata.PackageNotFoundError:
            click.echo("fineco, not installed: run from its source folder")
        context.exit()


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("-v", "--verbose", count=True, help="Say more; -vv shows where an error came from.")
@click.option("-q", "--quiet", is_flag=True, help="Say only results and errors.")
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version.")
@click.pass_context
def cli(context: click.Context, verbose: int, quiet: bool) -> None:
    """Make video collections searchable by text, offline.

    \b
    fineco run my-videos/ -c kitchen          decode, embed, select frames, index
    fineco search "someone whisks eggs" -c kitchen
    """
    context.obj = Context(verbose, quiet)


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


def _sources(sources: tuple[str, ...], manifest: Path | None, retry_failed: bool) -> Sources:
    from pipeline.commands import Sources

    return Sources(sources, manifest, retry_failed)


def _embed_options(given: dict[str, Any]) -> EmbedOptions:
    from pipeline.config import EmbedOptions

    sampling = _sampling(given["fps"], given["n_frames"], given["keyframes"])
    return EmbedOptions(
        sampling, given.get("model"), given.get("precision"), given.get("exact_resize"), given.get("size")
    )


def _select_options(selector: str | None, keep: str | None, topics: Path | None) -> SelectOptions:
    from pipeline.config import SelectOptions, read_lines

    if topics is not None and selector is None:
        selector = "topics"
    return SelectOptions(selector, keep, read_lines(topics, "topic") if topics else None)


def _finish(context: Context, summary: Summary, what: str, folder: Path) -> None:
    """Says what was done; exits 3 when a video failed."""
    for line in summary.lines(what):
        context.say(line)
    if summary.any_failed:
        context.say(f"Some videos failed: fineco failures -c {folder}")
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
def run(
    context: Context,
    /,
    sources: tuple[str, ...],
    manifest: Path | None,
    retry_failed: bool,
    folder: Path,
    device: str,
    selector: str | None,
    keep: str | None,
    topics: Path | None,
    kind: str,
    **given: Any,
) -> None:
    """Do the whole job: decode, embed, select frames, build the index.

    VIDEOS are files, folders, quoted patterns, or a manifest (.jsonl, .csv). Text beside a video (clip.txt, .srt, .vtt,
    .json) is what `caption` selects by. The same command again does only what is new or was interrupted.
    """
    from pipeline import commands

    summary = commands.run(
        folder,
        _sources(sources, manifest, retry_failed),
        _embed_options(given),
        _select_options(selector, keep, topics),
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
def decode(
    context: Context, /, sources: tuple[str, ...], manifest: Path | None, retry_failed: bool, folder: Path, **given: Any
) -> None:
    """Only decode: store sampled frames as JPEG, for `embed`.

    Of use when frames are to be embedded by several encoders, or on another machine; `run` needs no frames on disk.
    """
    from pipeline import commands

    machine = _machine(context, **given)
    summary = commands.decode(folder, _sources(sources, manifest, retry_failed), _embed_options(given), machine)
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
def embed(
    context: Context,
    /,
    sources: tuple[str, ...],
    manifest: Path | None,
    retry_failed: bool,
    folder: Path,
    device: str,
    **given: Any,
) -> None:
    """Only embed: compute the features of every sampled frame.

    Uses the frames that `decode` stored; VIDEOS without stored frames are decoded on the way.
    """
    from pipeline import commands

    machine = _machine(context, device, **given)
    summary = commands.embed(folder, _sources(sources, manifest, retry_failed), _embed_options(given), machine)
    _finish(context, summary, "embedded", folder)


@cli.command()
@collection_option
@selection_options
@device_option
@click.pass_obj
def select(
    context: Context, folder: Path, selector: str | None, keep: str | None, topics: Path | None, device: str
) -> None:
    """Choose frames again, with another selector, without decoding or embedding.

    Run `fineco index` afterwards. Each selection is kept; choosing one that is there takes no time.
    """
    from pipeline import commands

    n = commands.select(folder, _select_options(selector, keep, topics), _machine(context, device))
    context.say(f"{n} videos selected. Now: fineco index -c {folder}")


@cli.command()
@collection_option
@kind_option
@click.option("--memory", type=Positive(), help="GiB the index may take.  [default: half of what is free]")
@click.option("--force", is_flag=True, help="Build even if nothing changed.")
@click.pass_obj
def index(context: Context, folder: Path, kind: str, memory: float | None, force: bool) -> None:
    """Build the index of the selection in use; videos whose file is gone leave it."""
    from pipeline import commands

    memory_bytes = None if memory is None else int(memory * (1 << 30))
    commands.index(folder, kind, memory_bytes, _machine(context), force)


@cli.command()
@click.argument("queries", nargs=-1, metavar="[QUERY]...")
@collection_option
@click.option("-f", "--file", "query_file", type=click.Path(path_type=Path), help="File of queries, one a line.")
@click.option("-k", "n_hits", type=click.IntRange(min=1), default=10, show_default=True, help="Hits per query.")
@click.option("--threshold", type=float, help="Least score (cosine) of a hit.")
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
    """Say what is in a collection and whether everything is up to date."""
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
    """Read every byte of a collection and check it; prints a digest of its content.

    Two collections with the same videos, features and selection have the same digest, however they came about.
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
    """Examine this machine: versions, devices, models at hand, and a cure for every problem."""
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
    """Render videos, run the whole pipeline on them with the built-in encoder, search them, and measure the answers."""
    from pipeline.demo import run_demo

    if not run_demo(folder, videos, seed, _machine(context, "cpu", workers=workers)):
        sys.exit(1)


def main() -> None:
    """The `fineco` command. Every error is one line or two; a traceback only with -vv."""
    verbose = sum(len(a) - 1 for a in sys.argv[1:] if a.startswith("-v") and set(a[1:]) == {"v"}) >= 2
    try:
        cli(standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped", err=True)
        sys.exit(130)
    except FinecoError as error:
        if verbose:
            traceback.print_exc()
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # the reader has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)
    except Exception as error:
        if verbose:
            traceback.print_exc()
        click.echo(f"error: unexpected {type(error).__name__}: {error}", err=True)
        click.echo("  This is a fault in fineco; 'fineco -vv ...' shows where.", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
