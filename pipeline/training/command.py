"""`fineco train`: from a collection and its texts to a folder that `fineco:FOLDER` names."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from models.base import Encoder
from models.device import choose_device, choose_precision, device_summary
from models.fineco import FineCoHead
from pipeline.collection import Collection, Snapshot, this_command
from pipeline.config import read_lines
from pipeline.errors import IntegrityError, Interrupted, UsageError
from pipeline.files import write_bytes
from pipeline.interrupts import Interrupts
from pipeline.lock import LOCK_FILE, Lock
from pipeline.output import number_of
from pipeline.training.bank import FeatureBank
from pipeline.training.calibration import calibrate
from pipeline.training.captions import SpokenOf, read_texts, video_numbers
from pipeline.training.checkpoints import Journal
from pipeline.training.display import Display
from pipeline.training.distributed import Group, join, leave
from pipeline.training.examples import Examples, Split, split, split_by_videos
from pipeline.training.loop import METRIC, Trained, train
from pipeline.training.options import ObjectiveOptions, TrainOptions
from pipeline.training.subjects import HEAD_OPTIONS, Head, Subject, Towers, recorded_encoder

RECORD = "training.json"
CLIP_TOKENS = 32  # longest clip of `overlapped` and of the towers, as VideoCLIP's (docs/METHOD.md section 3)
SPAN_TOKENS = 256
FEW_VIDEOS = 30  # R@10 among fewer is next to certain
TOWERS_LR = 5e-5  # VideoCLIP's, for towers that are trained already

DEFAULTS: dict[str, Any] = {
    **{f.name: f.default for f in fields(TrainOptions) if f.name != "objective"},
    **{f.name: f.default for f in fields(ObjectiveOptions)},
    "precision": "auto",
    "texts": None,
    "subset": None,
    "validation": 0.1,
    "validation_videos": None,
    "max_tokens": None,
    "lr": None,
    "weight_decay": None,
    "towers": None,
    "width": 256,
    "layers": 2,
    "heads": 4,
    "dropout": 0.1,
    "dim": None,
    "residual": True,
    "similarity": "cosine",
}
"""Every option of a training that decides its result. None: it follows from others."""


@dataclass(frozen=True, slots=True)
class Work:
    """How a training is done, which changes no result: device, files, and where messages go."""

    device: str = "auto"
    save_steps: int | None = None
    tensorboard: bool = False
    quiet: bool = False
    say: Callable[[str], None] = lambda line: None


def train_collection(
    folder: Path, output: Path, given: Mapping[str, Any], work: Work, encoder: Encoder | None = None
) -> dict[str, Any]:
    """Trains a head over the features of a collection, or goes on with a training that was stopped.

    Args:
        folder: The collection.
        output: The folder of the head; made if it is not there.
        given: Some of `DEFAULTS`, with other values. A training that goes on takes what is not given from its record.
        encoder: Instead of the collection's, which is loaded by name.

    Returns:
        The result as `training.json` has it: the best epoch, its metrics, the number of epochs and steps.

    Raises:
        UsageError: Options that differ from the recorded ones, no features, no texts, another encoder.
        Interrupted: After Ctrl-C or SIGTERM; the state is saved.
    """
    group, device = join(choose_device(work.device))
    say = work.say if group.leads else _ignore
    try:
        with ExitStack() as stack:
            if group.leads:
                _check_output(output)
                stack.enter_context(Lock(output, this_command()))
                stack.callback(_leave_nothing_unbegun, output)
            interrupts = stack.enter_context(Interrupts(this_command()))
            record = _read_record(output)
            options = merge(record.get("options", {}), given)
            if record.get("result"):
                say(f"This training is finished already: {summary(record['result'])}")
                return dict(record["result"])
            return _train(folder, output, options, record, work, encoder, group, device, say, interrupts)
    finally:
        leave(group)


def _train(
    folder: Path,
    output: Path,
    options: dict[str, Any],
    record: dict[str, Any],
    work: Work,
    encoder: Encoder | None,
    group: Group,
    device: str,
    say: Callable[[str], None],
    interrupts: Interrupts,
) -> dict[str, Any]:
    train_options = _train_options(options, device)
    collection = Collection(folder)
    snapshot = Snapshot(collection)
    bank = FeatureBank(snapshot)
    spoken_of = read_texts(
        snapshot,
        bank,
        Path(options["texts"]) if options["texts"] else None,
        options["subset"],
        options["clips"] == "overlapped",
        say,
    )
    which = _split(spoken_of, snapshot, bank, options)
    data = {
        "texts": len(which.training),
        "videos": len(np.unique(spoken_of.videos[which.training])),
        "validation texts": len(which.validation),
        "digest": spoken_of.digest(bank.video_ids, bank.lengths),
        "encoder": recorded_encoder(collection)["fingerprint"],
    }
    _check_same_data(record.get("data"), data, output)
    subject: Subject
    if options["towers"]:
        subject = Towers(options["towers"], collection, device)
    else:
        subject = Head(options, collection, bank.dim, device, say, encoder)
    if group.leads:
        record = {"options": options, "data": data, "collection": str(folder.absolute()), "result": None}
        _write_record(output, record)  # first: it makes the folder a training's
        subject.begin(output)
    texts = subject.texts(spoken_of, output, interrupts.check, group)
    examples = Examples(bank, spoken_of.videos, spoken_of.spans, texts)
    say(
        f"Training on {number_of(data['texts'], 'text')} of {number_of(data['videos'], 'video')}, validating with "
        f"{number_of(data['validation texts'], 'text')}; {device_summary(device, train_options.precision)}"
    )
    validating = len(np.unique(spoken_of.videos[which.validation]))
    if 0 < validating < FEW_VIDEOS:
        say(
            f"  {number_of(validating, 'video')} to validate with say little about which epoch is the best; "
            "--validation 0 trains on all and keeps the last"
        )
    torch.manual_seed(train_options.seed)
    model = subject.build()
    trained = _loop(model, subject, examples, train_options, which, output, work, group, device, interrupts)
    result = {"epochs": trained.epochs, "steps": trained.steps, "best epoch": trained.best_epoch, **trained.metrics}
    if group.leads:
        if isinstance(model, FineCoHead):
            result |= _measure_rescoring(model, examples, which, train_options.max_tokens, device, say)
        subject.save(output, model)
        _write_record(output, record | {"result": result})
    say(f"Trained: {summary(result)}")
    if len(which.validation) and trained.best_epoch == 0:
        say("  no epoch was better than the start, and the start is what was kept")
    return result


def _measure_rescoring(
    head: FineCoHead, examples: Examples, which: Split, max_tokens: int, device: str, say: Callable[[str], None]
) -> dict[str, Any]:
    """Gives the head the temperature that serves a search best, and says whether a search is better for the training.

    The epoch was chosen by pooled vectors, as the papers compare videos; what a search shows is ranked by re-scoring.
    """
    rows = which.validation if len(which.validation) else which.training
    start = float(head.rescoring_temperature)
    after = calibrate(head, examples, rows, start, max_tokens, device)
    head.rescoring_temperature.fill_(after.temperature)
    result: dict[str, Any] = {"re-scoring temperature": float(f"{after.temperature:.6g}")}
    if not len(which.validation):
        return result
    result["re-scored R@1"] = after.metrics["R@1"]
    if head.config.residual:  # which starts as its base
        before = calibrate(FineCoHead(head.config).to(device).eval(), examples, rows, start, max_tokens, device).metrics
        result["re-scored R@1 of the base"] = before["R@1"]
        say(
            f"Re-scored, as a search ranks: R@1 {after.metrics['R@1']:.1f}; the base without a head {before['R@1']:.1f}"
        )
        if after.metrics["mean recall"] < before["mean recall"]:
            say("  a search finds less with this head than with its base alone")
    return result


def _loop(
    model: nn.Module,
    subject: Subject,
    examples: Examples,
    options: TrainOptions,
    which: Split,
    output: Path,
    work: Work,
    group: Group,
    device: str,
    interrupts: Interrupts,
) -> Trained:
    """The training itself, with its files and its display. Raises Interrupted."""
    journal = Journal(output, work.save_steps, work.tensorboard, group.leads)
    with Display(options.epochs, work.quiet or not group.leads) as display:
        try:
            trained = train(
                model,
                examples,
                options,
                which,
                device,
                journal,
                group,
                display,
                interrupts.stop.is_set,
                lambda best: subject.save(output, best),
            )
        finally:
            journal.close()
    if trained is None:
        interrupts.check()
        raise Interrupted(15, this_command())  # another process of the group was told to stop
    return trained


def merge(recorded: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a training: what is given, else what is recorded, else the default.

    Raises:
        UsageError: A given option differs from the recorded one.
    """
    for field, value in given.items():
        if field in recorded and recorded[field] != value:
            raise UsageError(
                f"{field.replace('_', ' ')}: this training has {recorded[field]}, the command says {value}",
                "Use another folder (-o), or leave the option out to go on with what this one has.",
            )
    merged = {**DEFAULTS, **recorded, **given}
    if merged["towers"] and (useless := [name for name in HEAD_OPTIONS if name in given]):
        raise UsageError(f"--{useless[0]} is of a head, and --towers trains none", "Leave one of the two out.")
    return merged


def summary(result: Mapping[str, Any]) -> str:
    """A result in one line."""
    line = f"{number_of(result['epochs'], 'epoch')}, {number_of(result['steps'], 'step')}"
    if METRIC in result:
        recalls = ", ".join(f"{name} {value:.1f}" for name, value in result.items() if name.startswith("R@"))
        line += f"; best after epoch {result['best epoch']}: {recalls}"
    return line


def _train_options(options: Mapping[str, Any], device: str) -> TrainOptions:
    defaults = TrainOptions()
    short = options["clips"] == "overlapped" or options["towers"]
    follow_from_others = {
        "max_tokens": CLIP_TOKENS if short else SPAN_TOKENS,
        "lr": TOWERS_LR if options["towers"] else defaults.lr,
        "weight_decay": 0.0 if options["towers"] else defaults.weight_decay,
    }
    values = {f.name: options[f.name] for f in fields(TrainOptions) if f.name != "objective"}
    values |= {name: value for name, value in follow_from_others.items() if values[name] is None}
    values["precision"] = choose_precision(options["precision"], device)
    objective = ObjectiveOptions(**{f.name: options[f.name] for f in fields(ObjectiveOptions)})
    return TrainOptions(**values, objective=objective)


def _split(spoken_of: SpokenOf, snapshot: Snapshot, bank: FeatureBank, options: Mapping[str, Any]) -> Split:
    if options["validation_videos"] is None:
        return split(spoken_of.videos, bank.video_ids, options["validation"])
    names = read_lines(Path(options["validation_videos"]), "video")
    numbers = video_numbers(snapshot, bank)
    chosen = [number for name in names if (number := numbers.get(name)) is not None]
    which = split_by_videos(spoken_of.videos, np.array(chosen, np.int64))
    if not len(which.validation):
        raise UsageError(
            f"{options['validation_videos']}: none of its videos has a text",
            "It names videos by id, file name, or file name without extension.",
        )
    return which


def _check_same_data(recorded: Mapping[str, Any] | None, data: Mapping[str, Any], output: Path) -> None:
    if recorded is not None and recorded != data:
        field = next(name for name in data if recorded.get(name) != data[name])
        raise UsageError(
            f"{output} was started with other videos or texts ({field}: {recorded.get(field)}, now {data[field]})",
            "Use another folder (-o) to train on what the collection has now.",
        )


def _check_output(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output} is a file", "Choose a new or empty folder (-o).")
    there = {path.name.removesuffix(".tmp") for path in output.iterdir()} if output.exists() else set()
    if there - {LOCK_FILE} and RECORD not in there:
        raise UsageError(f"{output} exists and is not a training", "Choose a new or empty folder (-o).")


def _leave_nothing_unbegun(output: Path) -> None:
    """Removes the folder of a training that was refused before it began; called while its lock is held."""
    if {path.name for path in output.iterdir()} == {LOCK_FILE}:
        with suppress(OSError):
            (output / LOCK_FILE).unlink()
            output.rmdir()


def _read_record(output: Path) -> dict[str, Any]:
    path = output / RECORD
    try:
        record = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{path}: {error}", f"Remove {output} to train again.") from error
    if not isinstance(record, dict) or not isinstance(record.get("options"), dict):
        raise IntegrityError(f"{path}: not the record of a training", f"Remove {output} to train again.")
    return record


def _write_record(output: Path, record: Mapping[str, Any]) -> None:
    write_bytes(output / RECORD, json.dumps(record, indent=1).encode() + b"\n")


def _ignore(line: str) -> None:
    """Where the messages of all processes but one go."""
