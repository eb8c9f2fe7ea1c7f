"""The stages as commands: run, decode, embed, select, index, search."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from pipeline.cli.options import (
    POSITIVE,
    Context,
    Finite,
    cli,
    collection_option,
    device_option,
    embed_options_from,
    encoder_options,
    features_option,
    finish,
    format_option,
    kind_option,
    limit_options,
    machine_from,
    sampling_options,
    select_options_from,
    selection_options,
    source_options,
    sources_from,
    work_options,
)

NO_HIT = 4


@cli.command()
@source_options
@collection_option
@sampling_options
@encoder_options
@features_option
@device_option
@selection_options
@kind_option
@work_options
@limit_options
@click.pass_obj
def run(context: Context, /, folder: Path, device: str, kind: str, **given: Any) -> None:
    """Do the whole job: decode, embed, select, index.

    VIDEOS are files, folders, quoted patterns, or a manifest (.jsonl, .csv). Text beside a video (clip.txt, .srt, .vtt,
    .json) is what `caption` selects by. The same command again does only what is new or was interrupted.
    """
    from pipeline import commands

    summary = commands.run(
        folder,
        sources_from(given),
        embed_options_from(given),
        select_options_from(given),
        machine_from(context, device, **given),
        kind,
    )
    finish(context, summary, "indexed", folder)


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

    machine = machine_from(context, **given)
    summary = commands.decode(folder, sources_from(given), embed_options_from(given), machine)
    finish(context, summary, "decoded", folder)


@cli.command()
@source_options
@collection_option
@sampling_options
@encoder_options
@features_option
@device_option
@work_options
@limit_options
@click.pass_obj
def embed(context: Context, /, folder: Path, device: str, **given: Any) -> None:
    """Only embed: compute the features of every sampled frame.

    Uses the frames that `decode` stored; VIDEOS without stored frames are decoded on the way.
    """
    from pipeline import commands

    machine = machine_from(context, device, **given)
    summary = commands.embed(folder, sources_from(given), embed_options_from(given), machine)
    finish(context, summary, "embedded", folder)


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

    n = commands.select(folder, select_options_from(given), machine_from(context, device))
    done = f"Frames of {n} videos chosen." if n else "Every video has this selection already; it is in use."
    context.say(f"{done} Now: fineco index -c {shlex.quote(str(folder))}")


@cli.command()
@collection_option
@kind_option
@click.option("--memory", type=POSITIVE, help="GiB the index may take.  [default: half of what is free]")
@click.option(
    "--recall",
    type=click.FloatRange(0, 1, min_open=True),
    help="What of an exhaustive search to find.  [default: as before, at first 0.95]",
)
@click.option("--force", is_flag=True, help="Build even if nothing changed.")
@device_option
@click.pass_obj
def index(
    context: Context, folder: Path, kind: str, memory: float | None, recall: float | None, force: bool, device: str
) -> None:
    """Build the index of the selection in use, a vector a moment.

    What it finds is measured against an exhaustive search, with texts (for which the encoder may be loaded) and frames,
    and printed; below --recall a query does more.

    Videos whose file is gone leave it, and come back when their file does and `run` finds it.
    """
    from pipeline import commands

    memory_bytes = None if memory is None else int(memory * (1 << 30))
    commands.index(folder, kind, memory_bytes, machine_from(context, device), force, recall_goal=recall)


@cli.command()
@click.argument("queries", nargs=-1, metavar="[QUERY]...")
@collection_option
@click.option("-f", "--file", "query_file", type=click.Path(path_type=Path), help="File of queries, one a line.")
@click.option("-k", "n_hits", type=click.IntRange(min=1), default=10, show_default=True, help="Hits per query.")
@click.option("--threshold", type=Finite(), help="Least score (cosine) of a hit.")
@format_option
@click.option("--moments", is_flag=True, help="Moments one by one, best first, several of a video where it has them.")
@click.option("--no-rerank", is_flag=True, help="Rank by the index only: no re-scoring, no moments.")
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
    moments: bool,
    no_rerank: bool,
    device: str,
) -> None:
    """Find videos, and the moments in them, by text.

    Exits 4 when no query has a hit above the threshold.
    """
    from pipeline.config import clean_line, read_lines

    if moments and no_rerank:
        raise click.UsageError("--moments and --no-rerank: choose one. Moments are found by re-scoring.")
    given = [clean_line(query, f"query {n}") for n, query in enumerate(queries, 1)]
    all_queries = [*given, *(read_lines(query_file, "query") if query_file else ())]
    if not all_queries:
        raise click.UsageError("Say what to search for, or give a file of queries (-f).")
    from pipeline import commands
    from pipeline.output import format_hits, write_stdout

    machine = machine_from(context, device)
    answers = commands.search(folder, all_queries, n_hits, threshold, not no_rerank, machine, by_moment=moments)
    write_stdout(format_hits(all_queries, answers, form))
    if not any(answers):
        sys.exit(NO_HIT)
