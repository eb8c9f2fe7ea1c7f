"""Names to encoders: `builtin`, `open_clip:ARCHITECTURE[/TAG]`, `open_clip:local-dir:FOLDER`, and the folders that
`fineco convert` and `fineco train` make: `s3d:FOLDER`, `videoclip:FOLDER`, `fineco:FOLDER`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from models.base import Encoder
from models.open_clip_weights import architectures, cached, locate, nearest
from pipeline.errors import UsageError

DEFAULT_MODEL: Final = "open_clip:PE-Core-B-16"


def _load_builtin(choice: str, device: str, precision: str) -> Encoder:
    if choice:
        raise UsageError(f"the built-in model takes no choice (got {choice!r})", "Use --model builtin.")
    from models.builtin.model import load_builtin
    from models.device import choose_device, choose_precision

    device = choose_device(device)
    return load_builtin(device, choose_precision(precision, device))


def _load_open_clip(choice: str, device: str, precision: str) -> Encoder:
    if not choice:
        raise UsageError("open_clip: which model?", f"For example --model {DEFAULT_MODEL}.")
    located = locate(choice)
    from models.device import choose_device, choose_precision
    from models.open_clip import load_open_clip

    device = choose_device(device)
    return load_open_clip(located, device, choose_precision(precision, device))


def _load_s3d(choice: str, device: str, precision: str) -> Encoder:
    from models.device import choose_device, choose_precision
    from models.s3d_encoder import load_s3d

    folder = _folder("s3d", choice, "'fineco convert' makes one of the released weights.")
    device = choose_device(device)
    return load_s3d(folder, device, choose_precision(precision, device))


def _load_videoclip(choice: str, device: str, precision: str) -> Encoder:
    from models.videoclip_encoder import load_videoclip

    folder = _folder("videoclip", choice, "'fineco convert' makes one of the released checkpoints.")
    return load_videoclip(folder, _load_s3d(str(folder / "s3d"), device, precision))


def _load_fineco(choice: str, device: str, precision: str) -> Encoder:
    from models.fineco_encoder import load_fineco, read_base_name

    folder = _folder("fineco", choice, "'fineco train' makes one.")
    return load_fineco(folder, load_encoder(read_base_name(folder), device, precision))


def _folder(kind: str, choice: str, how: str) -> Path:
    if not choice:
        raise UsageError(f"{kind}: which folder?", f"Write --model {kind}:FOLDER; {how}")
    folder = Path(choice)
    if not folder.is_dir():
        raise UsageError(f"{kind}: {folder} is not a folder", how[:1].upper() + how[1:])
    return folder


KINDS: Final[dict[str, Callable[[str, str, str], Encoder]]] = {
    "builtin": _load_builtin,
    "open_clip": _load_open_clip,
    "s3d": _load_s3d,
    "videoclip": _load_videoclip,
    "fineco": _load_fineco,
}
LOCAL_FOLDERS: Final = ("open_clip:local-dir:", "s3d:", "videoclip:", "fineco:")  # names that end in a folder


def absolute(name: str) -> str:
    """A model's name with its folder, if it names one, as an absolute path: a search may run from elsewhere."""
    prefix = next((prefix for prefix in LOCAL_FOLDERS if name.startswith(prefix) and name != prefix), None)
    return name if prefix is None else prefix + os.path.abspath(name.removeprefix(prefix))


def load_encoder(name: str, device: str = "auto", precision: str = "auto") -> Encoder:
    """Loads the encoder of this name; `spec.name` then holds the name in full, with the tag taken.

    Without a tag it is open_clip's first for that architecture (PE-Core-B-16 has one, `meta`).

    Args:
        name: `builtin`, `open_clip:ARCHITECTURE[/TAG]`, `open_clip:local-dir:FOLDER`, `s3d:FOLDER`,
            `videoclip:FOLDER` or `fineco:FOLDER`.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        precision: `auto`, `fp32` or `bf16`.

    Raises:
        UsageError: No such kind, architecture, tag, folder or device.
        FinecoError: The model cannot be had or loaded, with the ways on.
    """
    kind, _, choice = name.partition(":")
    if kind not in KINDS:
        names = {architecture: f"open_clip:{architecture}" for architecture in architectures()}
        if name.partition("/")[0] in names:
            raise UsageError(f"unknown model {name!r} (did you mean 'open_clip:{name}'?)")
        known = list_encoders()
        near = nearest(name, known) or (nearest(name, list(names)) and nearest(f"open_clip:{name}", known))
        raise UsageError(
            f"unknown model {name!r}{near}",
            "Choose builtin, open_clip:ARCHITECTURE[/TAG], open_clip:local-dir:FOLDER, fineco:FOLDER, videoclip:FOLDER "
            "or s3d:FOLDER; "
            f"the documented first choice is {DEFAULT_MODEL}.",
        )
    return KINDS[kind](choice, device, precision)


def cautions(name: str) -> list[str]:
    """What a user of this encoder should know before trusting its answers."""
    if name != "builtin":
        return []
    from models.builtin.model import ABOUT

    return [ABOUT]


def list_encoders() -> list[str]:
    """Every name `load_encoder` knows, without tags and folders. Imports neither torch nor open_clip."""
    return ["builtin", *(f"open_clip:{architecture}" for architecture in architectures())]


def list_cached_encoders() -> list[str]:
    """`open_clip:ARCHITECTURE/TAG` of every model whose weights are in the hub cache. Imports open_clip."""
    return cached()
