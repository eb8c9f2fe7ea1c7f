"""Finds what `open_clip:...` names: an architecture, a file of weights, and how its frames are prepared.

Nothing here imports torch before it must: a wrong name or folder is told at once, not after 12 seconds of imports.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import FinecoError, IntegrityError, UsageError

LOCAL_DIR = "local-dir:"
CONFIG_NAME = "open_clip_config.json"
# In the order of preference: as open_clip publishes them, safetensors first.
WEIGHTS_NAMES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
HUB_TIMEOUT_SECONDS = 5
WAYS_ON = (
    "Without weights: --model builtin (small, knows only its own rendered world), "
    "or --model open_clip:local-dir:FOLDER with the files of another machine."
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Located:
    """A model that can be built.

    Attributes:
        name: In full, `open_clip:ARCHITECTURE/TAG` or `open_clip:local-dir:/FOLDER`.
        source: As open_clip takes it: the architecture, or `local-dir:/FOLDER`.
        weights: The file, safetensors or a `.bin` that loads as tensors only.
        preprocess: The tag's mean, std, interpolation and resize mode; empty for a folder (its own file says).
        quick_gelu: The weights were trained with QuickGELU, whatever the architecture's file says.
    """

    name: str
    source: str
    weights: Path
    preprocess: dict[str, Any]
    quick_gelu: bool


def locate(choice: str) -> Located:
    """Finds `ARCHITECTURE[/TAG]` (in the hub cache, else by download) or `local-dir:FOLDER`.

    Raises:
        UsageError: No such architecture, tag or folder; it lists the choices and the nearest.
        FinecoError: The weights cannot be had; it names what was tried and the ways on.
    """
    if choice.startswith(LOCAL_DIR):
        return _locate_folder(Path(choice.removeprefix(LOCAL_DIR)).expanduser())
    architecture, _, tag = choice.partition("/")
    if architecture not in (known := architectures()):
        raise UsageError(
            f"open_clip has no architecture {architecture!r}{nearest(architecture, known)}",
            f"Known: {', '.join(known)}." if known else "",
        )
    with quiet():
        import open_clip

    tags: list[str] = open_clip.list_pretrained_tags_by_model(architecture)
    if not tags:
        raise UsageError(
            f"open_clip publishes no weights for {architecture}",
            f"Choose another architecture, or give a folder: --model open_clip:{LOCAL_DIR}FOLDER.",
        )
    if tag and tag not in tags:
        raise UsageError(
            f"{architecture} has no weights tagged {tag!r}{nearest(tag, tags)}", f"Known: {', '.join(tags)}."
        )
    tag = tag or tags[0]  # open_clip's own order; the name says which one it was
    config: dict[str, Any] = open_clip.get_pretrained_cfg(architecture, tag)
    _check_transformers(f"open_clip:{architecture}/{tag}", open_clip.get_model_config(architecture))
    keys = ("mean", "std", "interpolation", "resize_mode", "fill_color")
    return Located(
        name=f"open_clip:{architecture}/{tag}",
        source=architecture,
        weights=_hub_weights(f"{architecture}/{tag}", config.get("hf_hub", ""), tags),
        preprocess={key: config[key] for key in keys if key in config},
        quick_gelu=bool(config.get("quick_gelu")),
    )


def architectures() -> list[str]:
    """The names of open_clip's architectures, read from its folder without importing it."""
    package = importlib.util.find_spec("open_clip")
    if package is None or package.origin is None:
        raise FinecoError("open_clip is not installed", "Run: pip install open-clip-torch")
    return sorted((file.stem for file in Path(package.origin).with_name("model_configs").glob("*.json")), key=str.lower)


def cached() -> list[str]:
    """`open_clip:ARCHITECTURE/TAG` of every published model whose weights are in the hub cache."""
    with quiet():
        import open_clip

    found: dict[str, str] = {}  # by repository: some are listed under two architectures
    for architecture, tag in open_clip.list_pretrained():
        repository, names = _hub_names(open_clip.get_pretrained_cfg(architecture, tag).get("hf_hub", ""))
        if repository and repository not in found and _in_cache(repository, names) is not None:
            found[repository] = f"open_clip:{architecture}/{tag}"
    return sorted(found.values())


def licence(weights: Path) -> str:
    """What the README beside the weights (the hub's model card) states, else `not stated`."""
    with suppress(OSError, UnicodeDecodeError):
        card = weights.with_name("README.md").read_text(encoding="utf-8")
        head = card.split("\n---", 1)[0] if card.startswith("---") else ""
        for key in ("license_name", "license"):  # `license: other` has its name beside it
            if stated := re.search(rf"^{key}:[ \t]*['\"]?([\w.+ -]+)", head, re.MULTILINE):
                return stated[1].strip()
    return "not stated"


def nearest(word: str, choices: Sequence[str]) -> str:
    """` (did you mean 'x'?)`, or nothing when none is near."""
    by_lower = {choice.lower(): choice for choice in choices}
    match = difflib.get_close_matches(word.lower(), by_lower, n=1)
    return f" (did you mean {by_lower[match[0]]!r}?)" if match else ""


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps the libraries' warnings and log lines off the user's terminal; their exceptions pass."""
    import warnings

    for library in ("open_clip", "huggingface_hub", "timm"):
        logging.getLogger(library).setLevel(logging.ERROR)
    root = logging.getLogger()
    # open_clip logs by the root logger's own functions, which also install a handler where there is none
    handler, drop = logging.NullHandler(), (lambda record: record.levelno > logging.ERROR)
    root.addHandler(handler)
    root.addFilter(drop)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.removeFilter(drop)
        root.removeHandler(handler)


def one_line(error: BaseException) -> str:
    """The first line of an error that says anything, or its type; none of the libraries' advice to unpickle."""
    if "weights_only" in str(error) or "allow_pickle" in str(error):
        return "it is not made of plain tensors and values; nothing of it was run"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def _locate_folder(folder: Path) -> Located:
    name = f"open_clip:{LOCAL_DIR}{folder}"
    if not folder.is_dir():
        raise UsageError(f"{name}: no such folder", f"Give the folder that holds {CONFIG_NAME} and the weights.")
    config_file = folder / CONFIG_NAME
    if not config_file.is_file():  # a pipe in its place would be waited for
        raise UsageError(f"{name}: it holds no {CONFIG_NAME}", "Copy that file from the model's hub page.")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise IntegrityError(f"{config_file} cannot be read: {one_line(error)}") from error
    model = config.get("model_cfg") if isinstance(config, dict) else None
    if not (
        isinstance(model, dict)
        and "embed_dim" in model
        and all(isinstance(model.get(part), dict) for part in ("vision_cfg", "text_cfg"))
    ):
        raise IntegrityError(f"{config_file}: no 'model_cfg' with embed_dim, vision_cfg and text_cfg")
    if ":" in str(model["vision_cfg"].get("timm_model_name")):
        raise IntegrityError(f"{config_file}: its vision tower is at an address; a folder is read without a network")
    _check_transformers(name, model)
    folder = folder.resolve()  # the name is stored with a collection and must work from any folder
    return Located(
        f"open_clip:{LOCAL_DIR}{folder}", f"{LOCAL_DIR}{folder}", _folder_weights(name, folder), {}, quick_gelu=False
    )


def _folder_weights(name: str, folder: Path) -> Path:
    for weights_name in WEIGHTS_NAMES:
        if (folder / weights_name).is_file():
            return folder / weights_name
    for pattern in ("*.safetensors", "*.bin"):
        files = sorted(file for file in folder.glob(pattern) if file.is_file())
        if len(files) == 1:
            return files[0]
        if files:
            found = ", ".join(file.name for file in files)
            raise UsageError(f"{name}: which weights? It holds {found}", f"Name the right one {WEIGHTS_NAMES[0]}.")
    raise UsageError(f"{name}: it holds no weights", f"Expected {WEIGHTS_NAMES[0]} or {WEIGHTS_NAMES[2]}.")


def _check_transformers(name: str, model: dict[str, Any]) -> None:
    """A tokenizer or text tower of the `transformers` package needs that package: say so before any download."""
    text = model.get("text_cfg", {})
    wanted = text.get("hf_tokenizer_name") or text.get("hf_model_name")
    if wanted and importlib.util.find_spec("transformers") is None:
        raise UsageError(
            f"{name} reads text with {wanted}, which needs the package transformers",
            "Run: pip install 'transformers[sentencepiece]'",
        )


def _hub_names(entry: str) -> tuple[str, tuple[str, ...]]:
    """open_clip's `owner/repository/[file]` as the repository and the files that may hold the weights."""
    repository, _, file = entry.rpartition("/")
    if not file:
        return repository, WEIGHTS_NAMES
    return repository, (Path(file).with_suffix(".safetensors").name, file)


def _in_cache(repository: str, names: Sequence[str]) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    for name in names:
        path = try_to_load_from_cache(repository, name)
        if isinstance(path, str):
            return Path(path)
    return None


def _hub_weights(choice: str, entry: str, tags: Sequence[str]) -> Path:
    """The weights from the hub cache, without any request, else from the hub."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    from huggingface_hub.utils.tqdm import disable_progress_bars

    repository, names = _hub_names(entry)
    if (path := _in_cache(repository, names)) is not None:
        return path
    if not sys.stderr.isatty():
        disable_progress_bars()
    reason = f"the repository holds none of {', '.join(names)}"
    with quiet():
        for name in names:
            try:
                # One request that fails at once: hf_hub_download repeats a failing one for 23 s and more.
                get_hf_file_metadata(hf_hub_url(repository, name), timeout=HUB_TIMEOUT_SECONDS)
                _log.info("downloading %s of %s", name, repository)
                path = Path(hf_hub_download(repository, name, etag_timeout=HUB_TIMEOUT_SECONDS))
                with suppress(Exception):  # the card only states the licence
                    hf_hub_download(repository, "README.md", etag_timeout=HUB_TIMEOUT_SECONDS)
                return path
            except Exception as error:  # of four libraries: HTTP, the hub's own, the socket, the disk
                if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
                    continue
                reason = one_line(error)
                break
    others = [tag for tag in tags if tag != choice.partition("/")[2]]
    raise FinecoError(
        f"the weights of open_clip:{choice} cannot be had: hub repository {repository} at {constants.ENDPOINT}: "
        f"{reason}; not in the cache {constants.HF_HUB_CACHE} either",
        WAYS_ON
        + (f" Other tags: {', '.join(others)}." if others else "")
        + (" HF_HUB_OFFLINE is set." if os.environ.get("HF_HUB_OFFLINE") else ""),
    )
