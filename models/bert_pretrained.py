"""BERT's published files: its vocabulary as a tokenizer, its weights; from a folder or from the hub.

The files are read as what they are (a list of words, tensors), without the package transformers: importing that takes
seconds, and it makes an empty tokenizer, silently, where the vocabulary is missing.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from models.open_clip_weights import HUB_TIMEOUT_SECONDS, one_line, quiet
from pipeline.errors import FinecoError, IntegrityError, UsageError

VOCABULARY_NAMES = ("vocab.txt", "tokenizer.json")
WEIGHTS_NAME, CONFIG_NAME = "model.safetensors", "config.json"
OLD_NAMES = {".LayerNorm.gamma": ".LayerNorm.weight", ".LayerNorm.beta": ".LayerNorm.bias"}  # of the first BERT files
UNUSED = ("pooler.", "cls.", "embeddings.position_ids")  # the heads of BERT's own training; a counter, not a weight

Tokenizer = Callable[[Sequence[str]], list[list[int]]]


def load_tokenizer(source: str | Path, n_words: int, special: dict[str, int]) -> Tokenizer:
    """Reads a lower-cased BERT vocabulary.

    Args:
        source: Folder with vocab.txt or tokenizer.json, or a repository of the hub.
        n_words: Rows of the word table that the ids go to.
        special: Ids that the model expects, e.g. {"[CLS]": 101}.

    Returns:
        A function: texts to the ids of their word pieces, without special tokens, of any length.

    Raises:
        UsageError: No such folder, no vocabulary in it, one of another model, or the package for it is missing.
        FinecoError: The hub cannot be reached; it names what was tried and the ways on.
        IntegrityError: The file is damaged.
    """
    try:
        from tokenizers import BertWordPieceTokenizer
        from tokenizers import Tokenizer as Words
    except ImportError as error:
        raise UsageError(
            "VideoCLIP reads text in BERT's word pieces, and the package for it is not installed",
            "Run: pip install 'fineco[videoclip]'",
        ) from error
    file = _locate(source, VOCABULARY_NAMES, "the tokenizer", "to 'fineco convert' by --tokenizer FOLDER")
    words: Any
    try:
        words = BertWordPieceTokenizer(str(file)) if file.suffix == ".txt" else Words.from_file(str(file))
        words.no_truncation()
        words.no_padding()
    except Exception as error:  # the library knows only this one
        raise IntegrityError(f"{file} cannot be read as a tokenizer: {one_line(error)}") from error
    size = words.get_vocab_size(with_added_tokens=False)
    others = [
        f"{token} is {words.token_to_id(token)}" for token, id_ in special.items() if words.token_to_id(token) != id_
    ]
    if size > n_words or others:
        found = f"{size} words" + "".join(f", {other}" for other in others)
        expected = f"at most {n_words} words" + "".join(f", {token} {id_}" for token, id_ in special.items())
        raise UsageError(f"{file} is the tokenizer of another model: {found}; expected: {expected}")

    def tokenize(texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in words.encode_batch(list(texts), add_special_tokens=False)]

    return tokenize


def read_bert(source: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads a published BERT: its config.json, and its tensors under the names of `models.bert.Bert`, float32.

    Args:
        source: Folder with config.json and model.safetensors, or a repository of the hub (bert-base-uncased).

    Raises:
        UsageError: No such folder, or not these files in it.
        FinecoError: The hub cannot be reached; it names what was tried and the ways on.
        IntegrityError: A file is damaged, or of another kind of model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config_file, weights_file = (
        _locate(source, (name,), "the weights of BERT", "in place of the name") for name in (CONFIG_NAME, WEIGHTS_NAME)
    )
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
        tensors = load_file(weights_file)
    except (OSError, ValueError, SafetensorError) as error:
        raise IntegrityError(f"{weights_file.parent}: BERT's files cannot be read: {one_line(error)}") from error
    if not isinstance(config, dict) or config.get("model_type", "bert") != "bert" or config.get("hidden_act") != "gelu":
        raise IntegrityError(f"{config_file} is not a BERT's with exact GELU")
    state = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("bert.")
        for old, new in OLD_NAMES.items():
            name = name.replace(old, new)
        if not name.startswith(UNUSED):
            state[name] = tensor.float()
    return config, state


def _locate(source: str | Path, names: Sequence[str], what: str, how: str) -> Path:
    """The first of these files in the folder; else from the hub cache, without any request; else from the hub."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        for name in names:
            if (folder / name).is_file():
                return folder / name
        raise UsageError(f"{folder} holds no {' or '.join(names)}", f"Give the folder that holds {what}.")
    source = str(source)
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UsageError(f"no such folder: {source}", f"Give the folder that holds {what}.")
    return _from_hub(source, names, what, how)


def _from_hub(repository: str, names: Sequence[str], what: str, how: str) -> Path:
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.utils.tqdm import disable_progress_bars

    for name in names:
        if isinstance(path := try_to_load_from_cache(repository, name), str):
            return Path(path)
    if not sys.stderr.isatty():
        disable_progress_bars()
    name = names[0]
    try:
        with quiet():
            # One request that fails at once: hf_hub_download repeats a failing one for 23 s and more.
            get_hf_file_metadata(hf_hub_url(repository, name), timeout=HUB_TIMEOUT_SECONDS)
            return Path(hf_hub_download(repository, name, etag_timeout=HUB_TIMEOUT_SECONDS))
    except Exception as error:  # of four libraries: HTTP, the hub's own, the socket, the disk
        raise FinecoError(
            f"{what} cannot be had: {name} of hub repository {repository} at {constants.ENDPOINT}: {one_line(error)}; "
            f"not in the cache {constants.HF_HUB_CACHE} either",
            f"Run it once where the hub can be reached, or copy the folder of {repository} from another machine and "
            f"give it {how}." + (" HF_HUB_OFFLINE is set." if os.environ.get("HF_HUB_OFFLINE") else ""),
        ) from error
