"""S3D's published files to a folder of this project's, once, and that folder back to a model.

    s3d_howto100m.pth, s3d_dict.npy  ->  s3d.safetensors, words.json, config.json

`config.json` is written last and holds the digest of the other two: a folder is whole, or it is no model.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.open_clip_weights import one_line
from models.s3d import N_WORDS, S3D, WORD_DIM, Dictionary
from pipeline.errors import FinecoError, IntegrityError, UsageError

WEIGHTS, WORDS, CONFIG = "s3d.safetensors", "words.json", "config.json"
LICENCE = "Apache-2.0"  # of S3D_HowTo100M, which publishes both files
_TABLE = "text_module.word_embd.weight"
_COUNTER = "num_batches_tracked"  # BatchNorm's step counter: some files lack it, and nothing here reads it
_AGAIN = "Make the folder again with 'fineco convert'."


@dataclass(frozen=True, slots=True)
class StoredS3D:
    """A converted model: in fp32 on the CPU, with its dictionary and the digest of both."""

    model: S3D
    dictionary: Dictionary
    sha256: str
    licence: str


def convert_s3d(weights: Path, dictionary: Path, out: Path) -> None:
    """Writes the published weights and dictionary as a folder that `read_s3d` reads.

    Args:
        weights: `s3d_howto100m.pth`, a state dict of plain tensors.
        dictionary: `s3d_dict.npy`, a one-dimensional array of unicode words.
        out: The folder to make; the files of an earlier conversion in it are replaced.

    Raises:
        UsageError: A file is not there, or `out` holds another kind of model.
        IntegrityError: A file is damaged, not plain data, or of another model.
        FinecoError: The folder cannot be written.
    """
    for path in (weights, dictionary):
        if not path.is_file():
            raise UsageError(f"{path}: no such file")
    config = out / CONFIG
    if config.exists() and _read_json(config).get("kind") != "s3d":
        raise UsageError(f"{out} already holds a model of another kind", "Choose another folder.")
    words = _read_dictionary(dictionary)
    given = _read_pickled(weights)
    state = _strict_state(given, _model_for(given), weights)
    _check_table(words, state[_TABLE], dictionary)
    try:
        out.mkdir(parents=True, exist_ok=True)
        config.unlink(missing_ok=True)
        save_file(state, out / WEIGHTS)
        (out / WORDS).write_text(json.dumps(words, ensure_ascii=False), "utf-8")
        facts = {"kind": "s3d", "sha256": _sha256(out), "licence": LICENCE}
        config.write_text(json.dumps(facts, indent=2) + "\n", "utf-8")
    except (OSError, SafetensorError) as error:
        raise FinecoError(f"{out} cannot be written: {one_line(error)}") from error


def read_s3d(folder: Path) -> StoredS3D:
    """Reads a folder that `convert_s3d` wrote.

    Raises:
        UsageError: There is no such folder.
        IntegrityError: The folder is incomplete, damaged, or holds another kind of model.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder", "Make one from the published files with 'fineco convert'.")
    config = _read_json(folder / CONFIG)
    if config.get("kind") != "s3d":
        raise IntegrityError(f"{folder} holds a model of kind {config.get('kind')!r}, expected 's3d'", _AGAIN)
    try:
        if not all((folder / name).is_file() for name in (WEIGHTS, WORDS)):
            raise ValueError(f"it holds no {WEIGHTS} or no {WORDS}")
        sha256 = _sha256(folder)
        if sha256 != config.get("sha256"):
            raise IntegrityError(f"{folder}: {WEIGHTS} and {WORDS} are not those that were converted", _AGAIN)
        words = json.loads((folder / WORDS).read_text("utf-8"))
        given = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise IntegrityError(f"{folder} cannot be read: {one_line(error)}", _AGAIN) from error
    model = _model_for(given)
    state = _strict_state(given, model, folder / WEIGHTS)
    _check_table(words, state[_TABLE], folder / WORDS)
    model.load_state_dict(state, strict=True)
    return StoredS3D(model.eval(), Dictionary(words), sha256, str(config.get("licence", "not stated")))


def _read_pickled(path: Path) -> Mapping[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zipfile and torch each have their own
        raise IntegrityError(
            f"{path} cannot be loaded as weights: {one_line(error)}",
            "Get the file again; fineco loads files that hold plain tensors only.",
        ) from error
    if not isinstance(state, Mapping):
        raise IntegrityError(f"{path} holds no state dict (a {type(state).__name__})")
    return state


def _model_for(given: Mapping[str, Any]) -> S3D:
    """A model with as many words as the given table; as the published one where that looks like no table."""
    table = given.get(_TABLE)
    if isinstance(table, Tensor) and table.dim() == 2 and table.shape[1] == WORD_DIM:
        return S3D(len(table))
    return S3D(N_WORDS)


def _strict_state(given: Mapping[str, Any], model: S3D, path: Path) -> dict[str, Tensor]:
    """Every tensor of the model, in its own shape, float32 and finite, and nothing else."""
    expected = model.state_dict()
    counters = {name: torch.zeros((), dtype=torch.long) for name in expected if name.endswith(_COUNTER)}
    given = counters | dict(given)
    missing = [name for name in expected if name not in given]
    surplus = [name for name in given if name not in expected]
    if missing or surplus:
        what = f"lacks {len(missing)} tensors ({missing[0]})" if missing else f"has {len(surplus)} more ({surplus[0]})"
        raise IntegrityError(f"{path} is not S3D: it {what}")
    state = {}
    for name, like in expected.items():
        tensor = given[name]
        if not isinstance(tensor, Tensor) or tensor.shape != like.shape:
            has = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise IntegrityError(f"{path} is not S3D: {name} is {has}, expected {tuple(like.shape)}")
        state[name] = tensor.to(like.dtype).contiguous()
        if not torch.all(torch.isfinite(state[name])):
            raise IntegrityError(f"{path} is damaged: {name} has values that are not finite")
    return state


def _read_dictionary(path: Path) -> list[str]:
    try:
        words = np.load(path, mmap_mode="r", allow_pickle=False)  # the file's own size bounds what its header claims
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        hint = ""
        if "Python objects" in str(error):
            hint = (
                "It holds Python objects, and loading those may run code. If you trust it: python -c "
                f"\"import numpy as n; n.save('words.npy', n.load('{path.name}', allow_pickle=True).astype(str))\""
            )
        raise IntegrityError(f"{path} is not an array of words: {one_line(error)}", hint) from error
    if not isinstance(words, np.ndarray) or words.dtype.kind != "U" or words.ndim != 1:
        raise IntegrityError(f"{path} is not a one-dimensional array of unicode words")
    listed: list[str] = words.tolist()
    return listed


def _check_table(words: Any, table: Tensor, path: Path) -> None:
    if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
        raise IntegrityError(f"{path} is not a list of words")
    if len(words) >= len(table):
        raise IntegrityError(f"{path} has {len(words)} words, the weights have room for {len(table) - 1}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.exists() and not path.is_file():
            raise ValueError("not a regular file")  # a pipe would be waited for
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise IntegrityError(f"{path} cannot be read: {one_line(error)}", _AGAIN) from error
    return content if isinstance(content, dict) else {}


def _sha256(folder: Path) -> str:
    """Of the weights and the words: both decide the vectors."""
    digest = hashlib.sha256()
    for name in (WEIGHTS, WORDS):
        with (folder / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
