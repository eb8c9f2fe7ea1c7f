"""The command that makes published checkpoints ready: convert."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.cli.options import Context, cli


@cli.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--videoclip", type=click.Path(path_type=Path), help="VideoCLIP's checkpoint_best.pt.")
@click.option("--s3d", type=click.Path(path_type=Path), help="S3D's s3d_howto100m.pth.")
@click.option("--dictionary", type=click.Path(path_type=Path), help="S3D's words, s3d_dict.npy.")
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    help="Folder with BERT's vocab.txt, copied into OUT.  [default: bert-base-uncased from the hub]",
)
@click.pass_obj
def convert(
    context: Context,
    out: Path,
    videoclip: Path | None,
    s3d: Path | None,
    dictionary: Path | None,
    tokenizer: Path | None,
) -> None:
    """Make published weights of VideoCLIP and S3D ready for use.

    The result is --model videoclip:OUT or s3d:OUT. With both, S3D goes into OUT/s3d: VideoCLIP works on
    S3D's features. Nothing in the given files is executed.
    """
    from models.convert import S3D_FOLDER, convert
    from pipeline.output import write_stdout

    context.say(f"converting into {out}")
    converted = convert(out, videoclip, s3d, dictionary, tokenizer)
    if converted is None:
        write_stdout(f"Ready: --model s3d:{out}\n")
        return
    config = converted.config
    context.say(
        f"{converted.n_tensors} tensors: {config.video_layers} video and {config.text_layers} text layers, "
        f"width {config.hidden_size}, {config.n_words} words; {len(converted.unused)} unused ones left out "
        "(BERT's poolers, position counters)"
    )
    if s3d is None:
        write_stdout(
            f"S3D is still needed: fineco convert {out / S3D_FOLDER} "
            "--s3d s3d_howto100m.pth --dictionary s3d_dict.npy\n"
        )
    else:
        write_stdout(f"Ready: --model videoclip:{out}\n")
