"""Commands that look at a collection or at the machine, and the demo: status, failures, verify, doctor, demo."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from pipeline.cli.options import Context, cli, collection_option, format_option, json_option, machine_from


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

    if not run_demo(folder, videos, seed, machine_from(context, "cpu", workers=workers)):
        sys.exit(1)
