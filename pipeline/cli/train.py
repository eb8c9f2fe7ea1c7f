"""`fineco train`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from pipeline.cli.options import POSITIVE, Context, Finite, cli, collection_option, device_option, options

SHARE = Finite(min=0, max=1)

data_options = options(
    click.option(
        "--texts",
        type=click.Path(path_type=Path),
        help="Captions: JSON lines or CSV of video, caption and perhaps start, end; YouCookII's or MSR-VTT's files. "
        "[default: the texts found with the videos]",
    ),
    click.option("--subset", help="Which part of a file that has several.  [default: its training part]"),
    click.option(
        "--validation", type=SHARE, default=0.1, show_default=True, help="Share of the videos that validate; 0: none."
    ),
    click.option(
        "--validation-videos", type=click.Path(path_type=Path), help="Instead: file that names them, one a line."
    ),
    click.option(
        "--clips",
        type=click.Choice(["span", "overlapped"]),
        default="span",
        show_default=True,
        help="span: what a text speaks of. overlapped: short clips around a place in it (pre-training).",
    ),
    click.option("--max-tokens", type=click.IntRange(min=1), help="Of a clip.  [default: 256; overlapped, towers: 32]"),
    click.option(
        "--hard-negatives", is_flag=True, help="Make batches of videos that look alike, found anew in every epoch."
    ),
)
head_options = options(
    click.option("--towers", metavar="videoclip:FOLDER", help="Fine-tune VideoCLIP's own towers instead of a head."),
    click.option("--width", type=click.IntRange(min=1), default=256, show_default=True, help="Of the transformer."),
    click.option("--layers", type=click.IntRange(min=1), default=2, show_default=True, help="Of the transformer."),
    click.option("--heads", type=click.IntRange(min=1), default=4, show_default=True, help="Of the transformer."),
    click.option("--dropout", type=SHARE, default=0.1, show_default=True, help="While it trains."),
    click.option(
        "--residual/--no-residual",
        default=True,
        show_default=True,
        help="Correct the encoder's vectors, starting from them as they are, or make new ones.",
    ),
    click.option("--dim", type=click.IntRange(min=1), help="Length of new vectors.  [default: the encoder's]"),
    click.option(
        "--similarity",
        type=click.Choice(["cosine", "dot"]),
        default="cosine",
        show_default=True,
        help="dot: VideoCLIP's raw product.",
    ),
)
objective_options = options(
    click.option(
        "--direction",
        type=click.Choice(["both", "text_to_video", "video_to_text"]),
        default="both",
        show_default=True,
        help="Of the loss between pairs.",
    ),
    click.option(
        "--frame-weight",
        type=Finite(min=0),
        default=0.5,
        show_default=True,
        help="Of FineCo's loss within each clip; 0: VideoCLIP's objective alone.",
    ),
    click.option(
        "--ratio",
        type=Finite(min=0, max=1, min_open=True),
        default=0.5,
        show_default=True,
        help="Share of a clip's frames that are positives.",
    ),
    click.option(
        "--form",
        type=click.Choice(["each", "set"]),
        default="each",
        show_default=True,
        help="Each positive against the negatives, or all of them together.",
    ),
    click.option("--frame-temperature", type=POSITIVE, help="Of the frame loss.  [default: the model's own]"),
    click.option(
        "--weight-warmup",
        type=SHARE,
        default=0.1,
        show_default=True,
        help="Share of the training over which the frame weight grows.",
    ),
    click.option(
        "--frame-ema",
        type=Finite(min=0, max=1, max_open=True),
        default=0.0,
        show_default=True,
        help="Decay of a moving-average copy that chooses the positives, such as 0.99.",
    ),
)
schedule_options = options(
    click.option("--epochs", type=click.IntRange(min=1), default=10, show_default=True, help="Passes over the texts."),
    click.option(
        "--batch-size", type=click.IntRange(min=2), default=128, show_default=True, help="Clips, over all processes."
    ),
    click.option("--lr", type=POSITIVE, help="Highest learning rate.  [default: 3e-4, towers 5e-5]"),
    click.option(
        "--warmup", type=SHARE, default=0.1, show_default=True, help="Share of the training in which it grows."
    ),
    click.option("--weight-decay", type=Finite(min=0), help="Of matrices.  [default: 0.01, towers 0]"),
    click.option("--clip-norm", type=POSITIVE, default=2.0, show_default=True, help="Longest gradient."),
    click.option(
        "--patience",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        help="Stop after so many epochs without a better validation; 0: never.",
    ),
    click.option(
        "--precision",
        type=click.Choice(["auto", "fp32", "bf16"]),
        default="auto",
        show_default=True,
        help="Of the arithmetic; auto: bf16 where it is faster.",
    ),
    click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of everything random."),
)
work_options = options(
    device_option,
    click.option("--save-steps", type=click.IntRange(min=1), help="Save the state so often.  [default: every minute]"),
    click.option("--tensorboard", is_flag=True, help="Also write the metrics for TensorBoard."),
)


@cli.command()
@collection_option
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of what is trained.")
@data_options
@head_options
@objective_options
@schedule_options
@work_options
@click.pass_context
def train(
    click_context: click.Context,
    /,
    folder: Path,
    output: Path,
    device: str,
    save_steps: int | None,
    tensorboard: bool,
    **all_options: Any,
) -> None:
    """Train a head on stored features and their videos' texts.

    Nothing is decoded or embedded again. The result is the model fineco:OUTPUT, for `run`, `search` and all others. The
    same command goes on with a training that was stopped.

    \b
    On several GPUs:  torchrun --nproc-per-node N -m pipeline.cli train ...
    """
    from models.registry import absolute
    from pipeline.training.command import Work, train_collection

    given = {
        name: os.path.abspath(value) if isinstance(value, Path) else absolute(value) if name == "towers" else value
        for name, value in all_options.items()
        if click_context.get_parameter_source(name) is not ParameterSource.DEFAULT
    }
    context = click_context.find_object(Context) or Context()
    train_collection(folder, output, given, Work(device, save_steps, tensorboard, context.quiet, context.say))
