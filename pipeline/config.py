"""What a collection is made with: options of a command against what the collection already says.

An option that is not given takes the collection's value; one that is given and differs is an error naming the field and
both values. So the same command resumes, and a shorter one does too.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.base import Encoder, EncoderSpec, VideoEncoder
from models.registry import DEFAULT_MODEL, absolute
from models.scorer_file import default_scorer, how_to_train, read_facts
from pipeline.collection import Collection
from pipeline.errors import UsageError
from pipeline.files import sha256_of
from pipeline.sampling import Sampling
from pipeline.select import SELECTORS, Keep, parse_keep
from pipeline.texts import MAX_FILE_BYTES, MAX_TEXTS, clean_text, read_file

DEFAULT_SAMPLING = Sampling("fps", 1.0)
DEFAULT_SELECTOR = "caption"
DEFAULT_KEEP = "0.25"
DEFAULT_FRAME_SIZE = 336  # short side of frames that `decode` stores: enough for the common encoders up to 336 pixels
NEW_COLLECTION = "Use another collection folder (-c), or leave the option out to go on with what this one has."


@dataclass(frozen=True, slots=True)
class EmbedOptions:
    """What decides the features. None: not given."""

    sampling: Sampling | None = None
    model: str | None = None
    precision: str | None = None
    exact_resize: bool | None = None
    frame_size: int | None = None


@dataclass(frozen=True, slots=True)
class SelectOptions:
    """What decides which frames are kept. None: not given."""

    selector: str | None = None
    keep: str | None = None
    topics: tuple[str, ...] | None = None
    scorer: Path | None = None


@dataclass(frozen=True, slots=True)
class SelectionPlan:
    """A selector with its settings, and the name of its folder in `embeddings/`."""

    selector: str
    keep: Keep
    topics: tuple[str, ...]
    name: str
    content: dict[str, Any]
    scorer: Path | None = None  # its file, for the selector of that name

    def needs_encoder(self, any_text: bool) -> bool:
        """Whether texts have to be encoded, of videos of which some or none (`any_text`) have any."""
        return self.selector == "topics" or (self.selector == "caption" and any_text)


def sampling_of(config: dict[str, Any]) -> Sampling:
    """The sampling a collection was made with."""
    return Sampling(config["sampling"]["mode"], config["sampling"]["value"])


def merge_config(recorded: dict[str, Any], options: EmbedOptions) -> dict[str, Any]:
    """The collection's configuration with the options taken in.

    Raises:
        UsageError: An option differs from what the collection was made with.
    """
    sampling = options.sampling
    if "sampling" in recorded and sampling is not None and sampling != sampling_of(recorded):
        _refuse("sampling", sampling_of(recorded).describe(), sampling.describe())
    given = {
        "sampling": None if sampling is None else {"mode": sampling.mode, "value": sampling.value},
        "model": None if options.model is None else absolute(options.model),
        "precision": options.precision if options.precision != "auto" else None,
        "exact_resize": options.exact_resize,
        "frame_size": options.frame_size,
    }
    merged = dict(recorded)
    for field, value in given.items():
        if value is None:
            continue
        if field in recorded and recorded[field] != value:
            _refuse(field, recorded[field], value)
        merged[field] = value
    return merged


def set_sampling(config: dict[str, Any], spec: EncoderSpec | None) -> None:
    """Settles how frames are sampled, once the encoder is known: by its own rate if it demands one.

    Args:
        spec: Of the encoder; None where frames are only stored.

    Raises:
        UsageError: The collection or the command has another rate than the encoder demands.
    """
    demanded = None if spec is None or spec.fps is None else Sampling("fps", spec.fps)
    wanted = demanded or DEFAULT_SAMPLING
    config.setdefault("sampling", {"mode": wanted.mode, "value": wanted.value})
    if demanded and spec and sampling_of(config) != demanded:
        raise UsageError(
            f"sampling: {spec.name} takes {demanded.describe()}, not {sampling_of(config).describe()}",
            "Leave the sampling options out, or use another collection folder (-c).",
        )


def share_sampling(config: dict[str, Any], base: Collection) -> None:
    """Takes over how another collection's frames were sampled, for its features are to be used.

    Raises:
        UsageError: The collection or the command has another sampling or resize.
    """
    for field in ("sampling", "exact_resize"):
        if field in config and config[field] != base.config.get(field):
            raise UsageError(
                f"{field}: {base.folder} was made with {base.config.get(field)}, this collection with {config[field]}",
                "Its features cannot be used here. Leave --features-of out, or use another collection folder (-c).",
            )
        if field in base.config:
            config[field] = base.config[field]


def check_base(base: Collection, encoder: Encoder) -> None:
    """Raises UsageError unless a collection has features of the very encoder that another is built on."""
    name = encoder.spec.name
    if not isinstance(encoder, VideoEncoder):
        raise UsageError(
            f"--features-of: {name} is not built on another encoder's features",
            "It is for models such as fineco:FOLDER and videoclip:FOLDER.",
        )
    recorded, wanted = base.encoder or {"name": "no encoder", "fingerprint": ""}, encoder.base.spec
    if recorded["fingerprint"] != wanted.fingerprint:
        raise UsageError(
            f"--features-of: {base.folder} was made with {recorded['name']} ({recorded['fingerprint'][:12]}), "
            f"{name} is built on {wanted.name} ({wanted.fingerprint[:12]})",
            "Leave it out to decode and embed the videos.",
        )


def _refuse(field: str, recorded: object, given: object) -> None:
    raise UsageError(f"{field}: this collection was made with {recorded}, the command says {given}", NEW_COLLECTION)


def check_encoder(collection: Collection, spec: EncoderSpec, precision: str) -> None:
    """Raises UsageError unless the collection's features come from this very encoder."""
    recorded = collection.encoder
    if recorded is None:
        return
    if recorded["fingerprint"] != spec.fingerprint:
        raise UsageError(
            f"encoder: this collection was made with {recorded['name']} ({recorded['fingerprint'][:12]}), "
            f"the command has {spec.name} ({spec.fingerprint[:12]})",
            "Vectors of two encoders cannot be compared. Use the encoder of the collection, or another folder (-c).",
        )
    if recorded["precision"] != precision:
        _refuse("precision", recorded["precision"], precision)


def plan_selection(
    collection: Collection | None, options: SelectOptions, change: bool, model: str | None = None
) -> SelectionPlan:
    """The selection a command means.

    Args:
        collection: None for one that is still to be made.
        change: `select` may choose another one than is in use; `run` and `index` may not.
        model: Name of the encoder, where the collection does not say it yet.

    Raises:
        UsageError: Options that do not go together, or that differ from the selection in use; no scorer for this
            encoder, or another encoder's.
    """
    name = collection.current_selection() if collection else None
    recorded = collection.selection(name) if collection and name else {}
    selector = options.selector or recorded.get("selector") or DEFAULT_SELECTOR
    same = selector == recorded.get("selector")
    keep = options.keep or (recorded.get("keep") if same else None) or DEFAULT_KEEP
    topics = options.topics if options.topics is not None else tuple(recorded.get("topics", ()) if same else ())
    if selector not in SELECTORS:
        raise UsageError(f"unknown selector {selector!r}", f"Choose one of {', '.join(SELECTORS)}.")
    if selector == "topics" and not topics:
        raise UsageError("selector topics needs a list of texts", "Give a file with one text a line: --topics FILE.")
    if topics and selector != "topics":
        raise UsageError(f"--topics goes with --selector topics, not {selector}")
    if options.scorer is not None and selector != "scorer":
        raise UsageError(f"--scorer goes with --selector scorer, not {selector}")
    content = {"selector": selector, "keep": keep, "topics": list(topics)}
    plan_name = selector if selector == "all" else f"{selector}-{keep}"
    if topics:
        plan_name += "-" + hashlib.sha256("\n".join(topics).encode()).hexdigest()[:8]
    scorer = None
    if selector == "scorer":
        model = model or (collection.config.get("model") if collection else None) or DEFAULT_MODEL
        scorer = _find_scorer(options.scorer, recorded.get("scorer_file") if same else None, model)
        content["scorer"] = sha256_of(scorer)
        plan_name += f"-{content['scorer'][:8]}"
    if collection and recorded and not change:
        field = next((f for f in content if recorded.get(f) != content[f]), None)
        if field is not None:
            before, now = (c.get(field) if field != "scorer" else c["scorer"][:12] for c in (recorded, content))
            raise UsageError(
                f"{field}: the selection in use was made with {before}, the command says {now}",
                f"Choose frames anew, without decoding or embedding, with 'fineco select -c {collection.folder}'.",
            )
    if scorer is not None:
        content["scorer_file"] = str(scorer)  # where to look first the next time; its digest alone says which it is
    plan = SelectionPlan(selector, parse_keep(keep), topics, plan_name, content, scorer)
    if collection and collection.encoder:
        check_scorer(plan, collection.encoder["name"], collection.encoder["fingerprint"])
    return plan


def _find_scorer(given: Path | None, recorded: str | None, model: str) -> Path:
    """The scorer's file, absolute: the one given, the one the selection was made with, or the one the model has."""
    if given is not None:
        read_facts(given)
        return given.absolute()
    if recorded is not None and Path(recorded).is_file():
        return Path(recorded)
    path = default_scorer(model)
    if path is None:
        lost = f"{recorded} is gone" if recorded else f"no scorer comes with {model}"
        raise UsageError(f"scorer: {lost}", "Give its file: --scorer FILE." if recorded else how_to_train(model))
    return path.absolute()


def check_scorer(plan: SelectionPlan, name: str, fingerprint: str) -> None:
    """Raises UsageError if the plan has a scorer and it was trained on another encoder's features."""
    if plan.scorer is not None:
        read_facts(plan.scorer).check_encoder(plan.scorer, name, fingerprint)


def read_lines(path: Path, what: str) -> tuple[str, ...]:
    """The non-empty lines of a text file, clean (`clean_line`).

    Raises:
        UsageError: It cannot be read, is not a regular file, too large, not UTF-8 text, or has none; or a line of it
            cannot be used.
    """
    hint = f"Give a text file with one {what} a line."
    try:
        text = read_file(path, MAX_FILE_BYTES).decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}", hint) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text", hint) from error
    except ValueError as error:
        raise UsageError(f"{path}: {error}", hint) from error
    numbered = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.replace("\0", "").strip()]
    if not numbered:
        raise UsageError(f"{path}: no {what} in it", hint)
    if len(numbered) > MAX_TEXTS:
        raise UsageError(f"{path}: {len(numbered)} lines, at most {MAX_TEXTS} are read", hint)
    return tuple(clean_line(line, f"{path}:{n}") for n, line in numbered)


def clean_line(text: str, place: str) -> str:
    """A query, a topic or a name as it is used: NFC, single spaces, no NUL.

    Args:
        place: Where it stands, for the message.

    Raises:
        UsageError: It is empty, longer than `texts.MAX_TEXT_BYTES`, or not text.
    """
    try:
        cleaned = clean_text(text)
    except ValueError as error:
        raise UsageError(f"{place}: {error}") from error
    if not cleaned:
        raise UsageError(f"{place} is empty", "Say in words what to look for.")
    return cleaned
