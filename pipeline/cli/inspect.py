"""Commands that look after a collection or look at the machine, and the demo."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from pipeline.cli.options import (
    SOME_FAILED,
    Context,
    cli,
    collection_option,
    device_option,
    format_option,
    json_option,
    machine_from,
)


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
@click.option("--texts", is_flag=True, help="Instead: what of the text beside the videos could not be used.")
def failures(folder: Path, form: str, skipped: bool, texts: bool) -> None:
    """List the videos that failed, and why. `--format paths` gives names to look at or move away."""
    from pipeline.inspect import failures_of, failures_text, text_problems_of
    from pipeline.output import write_stdout

    write_stdout(failures_text(text_problems_of(folder) if texts else failures_of(folder, skipped), form))


@cli.command()
@collection_option
@json_option
@click.option("--digest", "only_digest", is_flag=True, help="Print only the digest; nothing when damaged.")
@click.option("--repair", is_flag=True, help="Mend what is damaged: make again just what cannot be saved.")
@device_option
@click.pass_obj
def verify(context: Context, folder: Path, as_json: bool, only_digest: bool, repair: bool, device: str) -> None:
    """Check every byte of a collection, and print a digest of it.

    Digests, ids, offsets, dimensions, norms, and the index against the store. Exits 1 when something is damaged, and
    names the file. Two collections with the same videos, features and selections have the same digest, however the work
    was split.

    --repair keeps all that is whole, in a damaged file too, and makes the rest again from the videos, which must be
    there unchanged. It exits 3 when a video is not.
    """
    from pipeline.output import to_json, write_stdout
    from pipeline.verify import verification, verify_collection, verify_text

    hopeless: list[str] = []
    if repair:
        from pipeline.repair import repair_collection

        found, hopeless = repair_collection(folder, machine_from(context, device))
        content = verification(found)
        for line in hopeless:
            context.say(f"cannot be made again: {line}")
    else:
        content = verify_collection(folder, context.say)
    if only_digest:
        for problem in content["problems"]:
            context.say(f"problem: {problem}")
        if not content["problems"]:
            write_stdout(f"{content['digest']}\n")
    else:
        write_stdout(to_json(content) if as_json else verify_text(content))
    if hopeless:
        sys.exit(SOME_FAILED)
    if content["problems"]:
        sys.exit(1)


@cli.command()
@collection_option
@click.pass_obj
def compact(context: Context, folder: Path) -> None:
    """Fold many small files into few.

    Of use after many small runs. The digest stays as it is, selections are kept, searching goes on meanwhile. Videos
    that are gone are forgotten with their data. Needs as much free space as the files that are folded.
    """
    from pipeline.compact import compact as fold

    folded = fold(folder, machine_from(context))
    if folded is not None:
        context.say(folded.describe())


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

    if not run_demo(folder, videos, seed, machine_from(context, "cpu", workers=workers)):
        sys.exit(1)
