"""Published checkpoints to folders of this project's, once: VideoCLIP's here, S3D's in `models.s3d_weights`.

    checkpoint_best.pt (a fairseq dict)  ->  videoclip.safetensors, config.json, tokenizer/
    s3d_howto100m.pth, s3d_dict.npy      ->  s3d/ inside it, or a folder of its own

A fairseq checkpoint also holds settings, as objects of its own and other packages' classes. None of their code runs:
torch reads tensors and plain values only, and every other class that the file names is read as an empty stand-in.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from models.bert_pretrained import VOCABULARY_NAMES, load_tokenizer
from models.open_clip_weights import one_line
from models.s3d_weights import convert_s3d
from models.videoclip import VideoCLIP, VideoCLIPConfig
from pipeline.errors import FinecoError, IntegrityError, UsageError

PREFIX = "mmmodel."
# BERT's own pooling layers, which VideoCLIP does not run, and a counter that was once stored like a weight
UNUSED = re.compile(r"(video_encoder\.bert|text_encoder)\.(pooler\.dense\.(weight|bias)|embeddings\.position_ids)")
TOKENIZER_FOLDER, S3D_FOLDER = "tokenizer", "s3d"
NAMES_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Converted:
    """What became of a VideoCLIP checkpoint: its sizes, how many tensors were taken, the names of those left out."""

    config: VideoCLIPConfig
    n_tensors: int
    unused: tuple[str, ...]


def convert(
    out: Path,
    videoclip: Path | None = None,
    s3d: Path | None = None,
    dictionary: Path | None = None,
    tokenizer: Path | None = None,
) -> Converted | None:
    """Makes the folder `out`, whole or not at all: a VideoCLIP (with S3D in `out`/s3d where it is given), or an S3D.

    Args:
        out: The folder to make; it must not exist.
        videoclip: `checkpoint_best.pt`.
        s3d, dictionary: `s3d_howto100m.pth` and `s3d_dict.npy`, both or neither.
        tokenizer: Folder with BERT's vocabulary, copied beside VideoCLIP; None: by name from the hub when it is used.

    Returns:
        What became of VideoCLIP's checkpoint; None without one.

    Raises:
        UsageError: `out` exists, a file is not there, or the arguments do not go together.
        IntegrityError: A file is damaged, or of another model.
        FinecoError: The folder cannot be written.
    """
    if videoclip is None and s3d is None:
        raise UsageError("nothing to convert", "Give --videoclip checkpoint_best.pt, --s3d s3d_howto100m.pth, or both.")
    if (s3d is None) != (dictionary is None):
        raise UsageError(
            "S3D's weights and its dictionary go together", "Give --s3d s3d_howto100m.pth --dictionary s3d_dict.npy."
        )
    if tokenizer is not None and videoclip is None:
        raise UsageError("a tokenizer belongs to VideoCLIP", "Give --videoclip checkpoint_best.pt with it.")
    if out.exists():
        raise UsageError(f"{out} already exists", "Choose a new folder, or move that one away.")
    temporary = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    converted = None
    try:
        temporary.mkdir(parents=True)
        if videoclip is not None:
            converted = convert_videoclip(videoclip, temporary, tokenizer)
        if s3d is not None and dictionary is not None:
            convert_s3d(s3d, dictionary, temporary if videoclip is None else temporary / S3D_FOLDER)
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as written:
                    os.fsync(written.fileno())
        temporary.rename(out)
    except (OSError, SafetensorError) as error:
        raise FinecoError(
            f"{out} cannot be written: {one_line(error)}", "Free some space, or choose another place."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return converted


def convert_videoclip(
    checkpoint: Path, out: Path, tokenizer: Path | None = None, released: VideoCLIPConfig | None = None
) -> Converted:
    """Writes a fairseq checkpoint of VideoCLIP into the existing folder `out`, as `VideoCLIP.load` reads it.

    Args:
        checkpoint: A dict with the weights under "model", each name prefixed by `mmmodel.`; float32 or float16.
        out: An existing folder.
        tokenizer: Folder with vocab.txt or tokenizer.json, copied to `out`/tokenizer.
        released: What tensors do not tell: heads, longest clip and text, special ids. None: the released model's.

    Raises:
        UsageError: No such checkpoint, or a tokenizer of another model.
        IntegrityError: The file is damaged, or holds other weights than this model's and the unused; they are named.
    """
    state = read_checkpoint(checkpoint)
    unused = tuple(name for name in state if UNUSED.fullmatch(name))
    state = {name: tensor.float() for name, tensor in state.items() if name not in unused}
    config = _sizes(state, released or VideoCLIPConfig(), checkpoint)
    try:
        model = VideoCLIP(config)
    except ValueError as error:
        raise IntegrityError(f"{checkpoint} is not a VideoCLIP: {one_line(error)}") from error
    _check_names(checkpoint, state, model.state_dict())
    model.load_state_dict(state, strict=True)
    if tokenizer is not None:
        special = {"[PAD]": config.pad_id, "[CLS]": config.cls_id, "[SEP]": config.sep_id}
        load_tokenizer(tokenizer, config.n_words, special)
        model.config = config = replace(config, tokenizer=TOKENIZER_FOLDER)
        (out / TOKENIZER_FOLDER).mkdir()
        for name in VOCABULARY_NAMES:
            if (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, out / TOKENIZER_FOLDER / name)
    model.save(out)
    return Converted(config, len(state), unused)


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Reads the weights of a fairseq checkpoint, without their prefix `mmmodel.`, and runs nothing of its code.

    Raises:
        UsageError: No such file.
        IntegrityError: The file is damaged, or holds no such weights.
    """
    if not path.is_file():
        raise UsageError(f"no such file: {path}", "Give VideoCLIP's checkpoint_best.pt.")
    try:
        named = get_unsafe_globals_in_checkpoint(str(path))
        stand_ins = [(_dict if name == "collections.defaultdict" else _StandIn, name) for name in named]
        with safe_globals(stand_ins):  # type: ignore[arg-type]
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zipfile and torch each have their own
        raise IntegrityError(
            f"{path} cannot be read as a checkpoint: {_reason(error)}",
            "Get the file again; fineco runs no code in it.",
        ) from error
    weights = content.get("model") if isinstance(content, dict) else None
    if not isinstance(weights, Mapping) or not weights:
        raise IntegrityError(f"{path} is not a fairseq checkpoint: it holds no weights under 'model'")
    strange = [str(name) for name, value in weights.items() if not isinstance(value, Tensor)]
    if strange:
        raise IntegrityError(f"{path}: not tensors: {_some(strange)}")
    others = [str(name) for name in weights if not str(name).startswith(PREFIX)]
    if others:
        raise IntegrityError(f"{path} is not a VideoCLIP: names without {PREFIX!r}: {_some(others)}")
    return {str(name).removeprefix(PREFIX): tensor for name, tensor in weights.items()}


class _StandIn:
    """Takes the place of every class or function that a checkpoint names, and keeps nothing of what it is given."""

    def __new__(cls, *args: object, **kwargs: object) -> _StandIn:
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _dict(*args: object) -> dict[object, object]:
    return {}  # torch puts entries into plain dicts only


def _reason(error: Exception) -> str:
    # torch's reason stands between an advice to unpickle after all, which is not ours, and a link
    _, found, text = str(error).rpartition("WeightsUnpickler error:")
    if not found and "weights_only" in text:
        return one_line(error)
    return next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)


def _sizes(state: Mapping[str, Tensor], released: VideoCLIPConfig, path: Path) -> VideoCLIPConfig:
    """The sizes as the tensors have them."""

    def shape(name: str) -> tuple[int, int]:
        if name not in state or state[name].ndim != 2:
            raise IntegrityError(f"{path} is not a VideoCLIP: no matrix {PREFIX}{name}")
        rows, columns = state[name].shape
        return rows, columns

    def layers(tower: str) -> int:
        found = (re.match(rf"{tower}\.encoder\.layer\.(\d+)\.", name) for name in state)
        return 1 + max((int(match[1]) for match in found if match), default=0)

    video, text = "video_encoder.bert", "text_encoder"
    hidden_size, feature_dim = shape("video_encoder.videomlp.linear1.weight")
    return replace(
        released,
        hidden_size=hidden_size,
        intermediate_size=shape(f"{text}.encoder.layer.0.intermediate.dense.weight")[0],
        n_words=shape(f"{text}.embeddings.word_embeddings.weight")[0],
        n_positions=shape(f"{text}.embeddings.position_embeddings.weight")[0],
        video_layers=layers(re.escape(video)),
        text_layers=layers(text),
        feature_dim=feature_dim,
    )


def _check_names(path: Path, state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    unknown = [name for name in state if name not in expected]
    missing = [name for name in expected if name not in state]
    wrong = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    infinite = [name for name in expected if name in state and not state[name].isfinite().all()]
    kinds: dict[str, Any] = {"unknown": unknown, "missing": missing, "of another shape": wrong, "not finite": infinite}
    if found := [f"{kind}: {_some(names)}" for kind, names in kinds.items() if names]:
        raise IntegrityError(f"{path} is not a VideoCLIP: {'; '.join(found)}", "Nothing was converted.")


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more
