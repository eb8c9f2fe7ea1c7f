"""What the commands share: the group, options, and the way from options to what the stages take."""

from __future__ import annotations

import contextlib
import math
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from pipeline.commands import Machine, Sources
    from pipeline.config import EmbedOptions, SelectOptions
    from pipeline.run import Summary

SELECTORS = ("caption", "topics", "uniform", "all", "scorer")
FORMATS = ("table", "json", "jsonl", "csv", "paths")
SOME_FAILED = 3

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
features_option = click.option(
    "--features-of",
    type=click.Path(path_type=Path),
    help="Collection of the encoder under a fineco: or videoclip: model: its features are used, nothing is decoded.",
)
sampling_options = options(
    click.option("--fps", type=float, help="Sampled frames per second of video.  [default: 1]"),
    click.option("--frames", "n_frames", type=int, help="Instead: so many frames a video, evenly spaced."),
    click.option("--keyframes", is_flag=True, help="Instead: only keyframes, which are fast to decode."),
)
encoder_options = options(
    click.option(
        "--model",
        help="Encoder: builtin, open_clip:ARCH[/TAG], fineco:FOLDER, ...  [default: open_clip:PE-Core-B-16]",
    ),
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
    click.option(
        "--max-cpu",
        type=POSITIVE,
        default=14_400.0,
        show_default=True,
        help="Seconds of processor time that decoding one video may take.",
    ),
)
selection_options = options(
    click.option(
        "--selector", "--select", type=click.Choice(SELECTORS), help="Which frames are kept.  [default: caption]"
    ),
    click.option("--keep", help="How many: a share such as 0.25, or a number such as 8.  [default: 0.25]"),
    click.option("--topics", type=click.Path(path_type=Path), help="File of texts, one a line, for --selector topics."),
    click.option(
        "--scorer",
        type=click.Path(path_type=Path),
        help="File that train-scorer made, for --selector scorer.  [default: the model's own]",
    ),
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
            complain(line)


def complain(line: str) -> None:
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


ORDER = (
    *("run", "decode", "embed", "select", "index", "search"),
    *("train", "train-scorer", "evaluate", "convert"),
    *("status", "failures", "verify", "compact", "doctor", "demo"),
)


class Commands(click.Group):
    """Lists the commands in the order in which they are used, not by the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(self.commands, key=ORDER.index)


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


def sampling_from(fps: float | None, n_frames: int | None, keyframes: bool) -> Any:
    from pipeline.sampling import Sampling

    if (fps is not None) + (n_frames is not None) + keyframes > 1:
        raise click.UsageError("--fps, --frames and --keyframes: choose one.")
    if fps is not None:
        return Sampling("fps", fps)
    if n_frames is not None:
        return Sampling("frames", n_frames)
    return Sampling("keyframes", 0) if keyframes else None


def machine_from(context: Context, device: str = "auto", **given: Any) -> Machine:
    from pipeline.commands import Machine
    from pipeline.types import DecodeLimits

    limits = DecodeLimits()
    if "timeout" in given:
        limits = DecodeLimits(
            max_pixels=given["max_pixels"],
            memory_bytes=int(given["max_memory"] * (1 << 30)),
            stall_seconds=given["timeout"],
            cpu_seconds=given["max_cpu"],
        )
    return Machine(device, given.get("workers"), given.get("batch_size"), limits, context.quiet, context.say)


def sources_from(given: dict[str, Any]) -> Sources:
    from pipeline.commands import Sources

    return Sources(given["sources"], given["manifest"], given["retry_failed"], given.get("features_of"))


def embed_options_from(given: dict[str, Any]) -> EmbedOptions:
    from pipeline.config import EmbedOptions

    sampling = sampling_from(given["fps"], given["n_frames"], given["keyframes"])
    return EmbedOptions(
        sampling, given.get("model"), given.get("precision"), given.get("exact_resize"), given.get("size")
    )


def select_options_from(given: dict[str, Any]) -> SelectOptions:
    from pipeline.config import SelectOptions, read_lines

    topics, scorer = given["topics"], given["scorer"]
    selector = given["selector"] or ("topics" if topics else "scorer" if scorer else None)
    return SelectOptions(selector, given["keep"], read_lines(topics, "topic") if topics else None, scorer)


def finish(context: Context, summary: Summary, what: str, folder: Path) -> None:
    """Says what was done; exits 3 when a video failed."""
    for line in summary.lines(what):
        context.say(line)
    if summary.any_failed:
        context.say(f"Some videos failed: fineco failures -c {shlex.quote(str(folder))}")
        sys.exit(SOME_FAILED)
