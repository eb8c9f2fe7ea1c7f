"""Names to encoders: `builtin`, `open_clip:ARCHITECTURE[/TAG]`, `open_clip:local-dir:FOLDER`."""

from __future__ import annotations

from collections.abc import Callable
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


KINDS: Final[dict[str, Callable[[str, str, str], Encoder]]] = {"builtin": _load_builtin, "open_clip": _load_open_clip}


def load_encoder(name: str, device: str = "auto", precision: str = "auto") -> Encoder:
    """Loads the encoder of this name; `spec.name` then holds the name in full, with the tag taken.

    Without a tag it is open_clip's first for that architecture (PE-Core-B-16 has one, `meta`).

    Args:
        name: `builtin`, `open_clip:ARCHITECTURE[/TAG]` or `open_clip:local-dir:FOLDER`.
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
            "Choose builtin, open_clip:ARCHITECTURE[/TAG] or open_clip:local-dir:FOLDER; "
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
