"""`fineco:FOLDER`: a head that `fineco train` made, over its base encoder, as an encoder of whole videos."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from models.base import Encoder, EncoderSpec, VideoEncoder, caution_about
from models.fineco import CONFIG_NAME, KIND, WEIGHTS_NAME, FineCoHead, HeadConfig
from models.videoclip import KIND as VIDEOCLIP_KIND
from models.weights import check_finite
from pipeline.errors import IntegrityError, UsageError
from pipeline.types import Float32, UInt8, check_shape

CLIPS_AT_ONCE = 64  # of a long video: ten hours at a frame a second are 1,125 clips


class FineCoEncoder:
    """A head and the encoder it was trained over; build it with `load_fineco`.

    The head runs in float32 whatever the base's precision, on the base's device, one video at a time: a video's vectors
    never depend on what else is in the run.
    """

    def __init__(self, spec: EncoderSpec, head: FineCoHead, base: Encoder) -> None:
        self.spec = spec
        self.base = base
        self.device = base.device
        self.precision = base.precision
        self._head = head.to(base.device).float().eval().requires_grad_(False)

    def encode_frames(self, frames: UInt8) -> Float32:
        """The base encoder's: frames to the rows that `encode_video` takes."""
        return self.base.encode_frames(frames)

    @torch.inference_mode()
    def encode_video(self, features: Float32) -> Float32:
        """(N, base dim) rows of one whole video, in order of time -> (N, D) float32 unit rows."""
        check_shape("features", features, (None, self.base.spec.dim), np.float32)
        if len(features) == 0:
            return np.empty((0, self.spec.dim), np.float32)
        return np.concatenate([_unit_rows(tokens) for tokens in self._tokens(features)])

    @torch.inference_mode()
    def encode_text(self, texts: Sequence[str]) -> Float32:
        """B texts -> (B, D) float32 unit rows. A text longer than the base's context is cut."""
        return _unit_rows(self._text(texts))

    def caution(self, text: str) -> str:
        """What the base says of how it reads a text."""
        return caution_about(self.base, text)

    @torch.inference_mode()
    def score_pairs(self, texts: Sequence[str], clips: Sequence[Float32]) -> Float32:
        """M texts, C clips as the base's rows (T_c, base dim) -> (M, C) float32.

        What the pair loss contrasts: the cosine of the text and the mean of the clip's tokens, or for a head trained
        with `dot` their dot product.
        """
        if not len(texts) or not len(clips):
            return np.empty((len(texts), len(clips)), np.float32)
        pooled = []
        for clip in clips:
            check_shape("clip", clip, (None, self.base.spec.dim), np.float32)
            mean = torch.cat(list(self._tokens(clip))).mean(dim=0)
            pooled.append(torch.nn.functional.normalize(mean, dim=0) if self._head.similarity == "cosine" else mean)
        scores: Float32 = (self._text(texts) @ torch.stack(pooled).T).cpu().numpy()
        return scores

    def _tokens(self, features: Float32) -> list[Tensor]:
        """The head's tokens, piece by piece: clips do not see each other, so a cut between them changes nothing."""
        rows = torch.from_numpy(np.ascontiguousarray(features)).to(self.device)
        pieces = rows.split(CLIPS_AT_ONCE * self._head.config.max_tokens)  # type: ignore[no-untyped-call]
        masks = (torch.ones(1, len(piece), dtype=torch.bool, device=self.device) for piece in pieces)
        return [self._head.encode_video(p.unsqueeze(0), m).tokens[0] for p, m in zip(pieces, masks, strict=True)]

    def _text(self, texts: Sequence[str]) -> Tensor:
        return self._head.encode_text(torch.from_numpy(self.base.encode_text(texts)).to(self.device))


def read_base_name(folder: Path) -> str:
    """The encoder that a folder's head is trained over, by name.

    Raises:
        UsageError: There is no head.
        IntegrityError: Its config.json is damaged.
    """
    content = _read_config(folder)
    if content["kind"] == VIDEOCLIP_KIND:
        return f"s3d:{folder / 's3d'}"
    return str(content["base"]["name"])


def load_fineco(folder: Path, base: Encoder) -> VideoEncoder:
    """Loads what `fineco train` made: a head, or VideoCLIP's towers.

    Args:
        base: The encoder of `read_base_name`.

    Raises:
        UsageError: There is no head, or it was trained over another encoder than `base`.
        IntegrityError: Its files are damaged.
    """
    content = _read_config(folder)
    if content["kind"] == VIDEOCLIP_KIND:
        from models.videoclip_encoder import load_videoclip

        return load_videoclip(folder, base)
    recorded = content["base"]
    if recorded["fingerprint"] != base.spec.fingerprint:
        raise UsageError(
            f"{folder} was trained over {recorded['name']} ({recorded['fingerprint'][:12]}), "
            f"here is {base.spec.name} ({base.spec.fingerprint[:12]})",
            "Use the very encoder it was trained over, or train again.",
        )
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise UsageError(f"{folder} has no {WEIGHTS_NAME}", "Its training has not come to the end of an epoch yet.")
    try:
        config = HeadConfig(**content["head"])
        head = FineCoHead(config).eval()
        state = load_file(path)
        check_finite(state)
        head.load_state_dict(state, strict=True)
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise IntegrityError(
            f"{path} cannot be loaded as the weights of {folder / CONFIG_NAME}: {reason}",
            "Restore both from a backup, or train again.",
        ) from error
    return FineCoEncoder(_spec(folder, head, base.spec, path), head, base)


def _spec(folder: Path, head: FineCoHead, base: EncoderSpec, weights: Path) -> EncoderSpec:
    digest = hashlib.sha256(weights.read_bytes())
    for what in (base.fingerprint, json.dumps(asdict(head.config), sort_keys=True)):
        digest.update(what.encode())
    # rounded, because the fingerprint must not hang on the last bit of a machine's arithmetic
    temperature = float(f"{float(head.rescoring_temperature):.6g}")
    return replace(
        base,
        name=f"fineco:{os.path.abspath(folder)}",
        dim=head.config.dim,
        temperature=temperature,
        weights_sha256=digest.hexdigest(),
    )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    if not path.is_file():  # a pipe in its place would be waited for
        raise UsageError(f"{folder} has no {CONFIG_NAME}", "'fineco train' makes such a folder.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise IntegrityError(f"{path} cannot be read: {error}", "Train again, or restore it from a backup.") from error
    kind = content.get("kind") if isinstance(content, dict) else None
    if kind == VIDEOCLIP_KIND:
        return dict(content)
    base = content.get("base") if kind == KIND else None
    if not isinstance(base, dict) or not all(isinstance(base.get(key), str) for key in ("name", "fingerprint")):
        raise IntegrityError(f"{path} does not describe a trained head", "'fineco train' makes such a folder.")
    if not isinstance(content.get("head"), dict):
        raise IntegrityError(f"{path} does not describe a trained head", "'fineco train' makes such a folder.")
    return dict(content)


def _unit_rows(vectors: Tensor) -> Float32:
    unit: Float32 = torch.nn.functional.normalize(vectors, dim=-1).cpu().numpy()
    return unit
