"""`fineco evaluate`: the published protocols over a collection."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pipeline.cli.options import SELECTORS, Context, cli, collection_option, device_option, machine_from, options

FILE = click.Path(path_type=Path)

annotations_argument = click.argument("annotations", type=FILE)
read_options = options(
    click.option("--dataset", help="Read the annotations as this format.  [default: told from the content]"),
    click.option("--only", type=FILE, help="Only videos of this list, one name a line."),
)
subset_option = click.option("--subset", help="Part of the annotations, e.g. validation or test.")
score_options = options(
    click.option(
        "--score",
        type=click.Choice(["rescore", "mean"]),
        default="rescore",
        show_default=True,
        help="rescore weighs frames by the query, as a search does; mean takes pooled vectors.",
    ),
    click.option(
        "--selector", type=click.Choice(SELECTORS), help="Only frames that this selector keeps.  [default: all]"
    ),
    click.option("--keep", help="How many of them: a share such as 0.25, or a number such as 4.  [default: 0.25]"),
    click.option("--topics", type=FILE, help="File of texts, one a line, for --selector topics."),
    click.option("--scorer", type=FILE, help="File that train-scorer made, for --selector scorer."),
    click.option("--model", help="A model over the collection's features, such as fineco:FOLDER: by its own score."),
)
report_options = options(
    click.option("--draws", type=click.IntRange(min=0), default=1000, show_default=True, help="Bootstrap resamples."),
    click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of everything drawn."),
    click.option("--json", "json_file", type=FILE, help="Write the whole report to this file."),
    click.option("--format", "form", type=click.Choice(["table", "json"]), default="table", help="What to print."),
)


@cli.group()
def evaluate() -> None:
    """Measure answers against annotated videos.

    Retrieval, multiple choice, questions, moments, as the papers do; every report names the annotations by their hash
    and how many of their videos the collection has. Videos are matched by id or file name, with or without extension.
    """


@evaluate.command()
@annotations_argument
@click.option("-c", "--collection", "folder", type=FILE, help="Folder of the collection.")
@click.option("--scores", type=FILE, help="Instead of a collection: a .npy of scores, texts x clips in file order.")
@read_options
@subset_option
@score_options
@click.option(
    "--by",
    type=click.Choice(["video", "moments"]),
    help="Score a clip as a whole, as papers do, or by the best of its moments, as an index finds it.  "
    "[default: video]",
)
@click.option("--dual-softmax", is_flag=True, help="Also figures with a dual softmax over all queries.")
@click.option(
    "--ties",
    type=click.Choice(["average", "optimistic", "pessimistic"]),
    default="average",
    show_default=True,
    help="How equal scores rank: half of them ahead, none (as some papers count), all.",
)
@device_option
@report_options
@click.pass_obj
def retrieval(context: Context, /, annotations: Path, folder: Path | None, scores: Path | None, **given: Any) -> None:
    """R@1/5/10, median and mean rank, both directions.

    ANNOTATIONS are YouCookII's (JSON, or MIL-NCE's CSV), MSR-VTT's (JSON or its zip, or the 1k-A CSV), or JSON lines or
    CSV of video, caption, and perhaps start and end. A caption with a span is about that part of its video.
    """
    from pipeline.annotations import read_captions
    from pipeline.evaluation.retrieval import evaluate_retrieval, evaluate_scores

    if given["by"] == "moments" and given["model"]:
        raise click.UsageError("--by moments: a --model scores whole clips; leave one of the two out.")
    rows, only = _restricted(read_captions(annotations, given["dataset"], given["subset"]), given["only"])
    dual = given["dual_softmax"]
    if folder is not None and scores is None:
        content = evaluate_retrieval(rows, _material(context, folder, given), dual, context.say)
    elif scores is not None and folder is None:
        if useless := [name for name in ("by", "selector", "keep", "topics", "scorer", "model") if given[name]]:
            raise click.UsageError(f"--{useless[0]} has no effect on ready --scores: leave it out.")
        content = evaluate_scores(rows, scores, _options(given), dual, context.say)
    else:
        raise click.UsageError("Give a collection (-c) or a matrix (--scores), one of the two.")
    _report(content, annotations, only, given)


@evaluate.command()
@annotations_argument
@collection_option
@read_options
@subset_option
@score_options
@device_option
@report_options
@click.pass_obj
def mc(context: Context, /, annotations: Path, folder: Path, **given: Any) -> None:
    """Multiple choice: which of five captions is the video's own.

    ANNOTATIONS are JSON lines of video, options and answer (a position from 0); or captions, and then a list is drawn
    from them with the seed: ours, not the official one.
    """
    from pipeline.annotations import read_captions, read_choices, recognise
    from pipeline.evaluation.choice import draw_choices, evaluate_choice

    captions: Any = None
    if (given["dataset"] or recognise(annotations)) == "choices":
        choices, only = _restricted(read_choices(annotations), given["only"])
    else:
        captions, only = _restricted(read_captions(annotations, given["dataset"], given["subset"]), given["only"])
        choices = draw_choices(captions, given["seed"])
    _report(evaluate_choice(choices, _material(context, folder, given), captions), annotations, only, given)


@evaluate.command()
@annotations_argument
@collection_option
@click.option("--answers", type=FILE, help="JSON list of the answers, or object answer -> number.")
@click.option("--classifier", is_flag=True, help="Train a linear classifier instead of comparing texts.")
@click.option("--train", type=FILE, help="Questions to train it on, about other videos.")
@click.option("--limit", type=click.IntRange(min=1), help="Ask only so many questions, drawn with the seed.")
@read_options
@score_options
@device_option
@report_options
@click.pass_obj
def qa(
    context: Context,
    /,
    annotations: Path,
    folder: Path,
    answers: Path | None,
    classifier: bool,
    train: Path | None,
    limit: int | None,
    **given: Any,
) -> None:
    """Open-ended questions: the answer out of a list.

    ANNOTATIONS are MSRVTT-QA's JSON, or JSON lines of video, question and answer. Without --classifier every question
    is put together with every answer, which is many texts to encode: try --limit first.
    """
    from pipeline.annotations import read_answers, read_questions
    from pipeline.evaluation.questions import evaluate_by_similarity, evaluate_classifier, most_frequent_answers

    if classifier != (train is not None):
        raise click.UsageError("--classifier and --train go together.")
    if classifier and given["model"]:
        raise click.UsageError("--classifier works on the collection's features; leave --model out.")
    questions, only = _restricted(read_questions(annotations, given["dataset"]), given["only"])
    if train is not None:
        examples = read_questions(train)
        listed = read_answers(answers) if answers else most_frequent_answers(examples)
        material = _material(context, folder, given)
        content = evaluate_classifier(questions, examples, listed, material, limit, context.say)
    elif answers is None:
        raise click.UsageError("Give the answers to choose from (--answers).")
    else:
        material = _material(context, folder, given)
        content = evaluate_by_similarity(questions, read_answers(answers), material, limit, context.say)
    _report(content, annotations, only, given)


@evaluate.command()
@annotations_argument
@collection_option
@read_options
@subset_option
@device_option
@report_options
@click.pass_obj
def moments(context: Context, /, annotations: Path, folder: Path, **given: Any) -> None:
    """How well the best moment of a video meets the annotated span.

    ANNOTATIONS are captions with start and end in seconds.
    """
    from pipeline.annotations import read_captions
    from pipeline.evaluation.moments import evaluate_moments

    rows, only = _restricted(read_captions(annotations, given["dataset"], given["subset"]), given["only"])
    _report(evaluate_moments(rows, _material(context, folder, given)), annotations, only, given)


def _options(given: dict[str, Any]) -> Any:
    from pipeline.config import SelectOptions, read_lines
    from pipeline.evaluation.material import Options

    topics, keep, scorer = given.get("topics"), given.get("keep"), given.get("scorer")
    selector = given.get("selector") or ("topics" if topics else "scorer" if scorer else "all")
    if keep and selector == "all":
        raise click.UsageError("--keep goes with a selector: --selector uniform, for example.")
    select = SelectOptions(selector, keep, read_lines(topics, "topic") if topics else None, scorer)
    ties = given.get("ties", "average")
    by: Any = given.get("by") or "video"
    score, draws, seed = given.get("score", "rescore"), given["draws"], given["seed"]
    return Options(score, by, select, given.get("model"), draws, seed, ties)


def _material(context: Context, folder: Path, given: dict[str, Any]) -> Any:
    from pipeline.collection import Collection
    from pipeline.evaluation.material import Material

    return Material(Collection(folder), _options(given), machine_from(context, given["device"]))


def _restricted(annotations: Any, path: Path | None) -> tuple[Any, dict[str, Any] | None]:
    """The annotations of the videos in a list, and what the report says of it."""
    if path is None:
        return annotations, None
    from pipeline.annotations import read_video_list, restrict

    videos = read_video_list(path)
    return restrict(annotations, videos), {"file": path.name, "sha256": videos.sha256, "videos": len(videos.names)}


def _report(content: dict[str, Any], annotations: Path, only: dict[str, Any] | None, given: dict[str, Any]) -> None:
    from pipeline.evaluation.report import report_text
    from pipeline.files import write_bytes
    from pipeline.output import to_json, write_stdout

    content["split"]["file"] = annotations.name
    if only:
        content["split"]["only"] = only
    facts = content.pop("facts", [])
    try:
        if given["json_file"]:
            write_bytes(given["json_file"], to_json(content).encode())
    finally:  # a full disk must not cost the figures too
        write_stdout(to_json(content) if given["form"] == "json" else report_text(content, facts))
