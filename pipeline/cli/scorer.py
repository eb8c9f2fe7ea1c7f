"""`fineco train-scorer`: a scorer for collections without text."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.cli.options import Context, cli, collection_option, device_option, json_option, machine_from


@cli.command("train-scorer")
@collection_option
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="File to write the scorer to.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of everything that is drawn.")
@device_option
@json_option
@click.pass_obj
def train_scorer(context: Context, folder: Path, output: Path, seed: int, device: str, as_json: bool) -> None:
    """Learn from videos with text what to keep of others.

    The scorer predicts what `--selector caption` scores, from the frames alone, and is for collections of the same
    encoder: fineco select --selector scorer --scorer FILE. Prints how well it does on videos that taught it nothing.
    """
    from pipeline.output import format_table, to_json, write_stdout
    from pipeline.training.scorer import train_scorer

    facts = train_scorer(folder, output, seed, machine_from(context, device))
    learnt = facts.distilled_from
    if as_json:
        write_stdout(to_json({"scorer": str(output), "encoder": facts.encoder, **learnt}))
        return
    found = learnt["held_out"]
    rows = [
        ["videos it learnt from", str(learnt["videos"])],
        ["videos held out", str(found["videos"])],
        ["rank correlation with caption's scores", f"{found['rank_correlation']:.3f}"],
        ["caption's frames that it keeps", f"{found['kept_by_scorer']:.3f}"],
        ["caption's frames that uniform keeps", f"{found['kept_by_uniform']:.3f}"],
    ]
    write_stdout(format_table(rows, [str(output), "means over held-out videos"]))
