"""VideoCLIP as a `VideoEncoder`: S3D's rows, one a second, through the video tower; texts through the text tower."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from models.base import Encoder, caution_of_length
from models.bert import Bert
from models.bert_pretrained import Tokenizer, load_tokenizer
from models.videoclip import WEIGHTS_NAME, VideoCLIP, VideoStates, text_batch
from pipeline.errors import FinecoError, UsageError
from pipeline.types import Float32, UInt8, check_shape

LICENCE: Final = "CC-BY-NC-4.0 (VideoCLIP, as MMPT's README states it for most of it)"
TEXTS_PER_BATCH = 256
CLIPS_PER_BATCH = 64


class VideoCLIPEncoder:
    """Both towers on the base's device, in fp32; build it with `load_videoclip`.

    Rows are unit vectors, for an index of cosines. VideoCLIP itself compares raw dot products: `score_pairs`.
    """

    def __init__(self, name: str, model: VideoCLIP, tokenizer: Tokenizer, base: Encoder, weights_sha256: str) -> None:
        self.base = base
        self.device = base.device
        self.precision = base.precision
        self._config = model.config
        self._tokenizer = tokenizer
        temperature = typical_temperature(model)
        self._model = model.to(base.device).eval().requires_grad_(False)
        self.spec = replace(
            base.spec,
            name=name,
            dim=self._config.hidden_size,
            temperature=temperature,
            context_length=self._config.max_text_tokens,
            weights_sha256=weights_sha256,
            licence=f"{LICENCE}; {base.spec.licence} ({base.spec.name.partition(':')[0]})",
        )

    def encode_frames(self, frames: UInt8) -> Float32:
        """The base's rows, for `encode_video`: (B, 30, H, W, 3) uint8 RGB -> (B, 512) float32 unit rows with S3D."""
        return self.base.encode_frames(frames)

    @torch.inference_mode()
    def encode_video(self, features: Float32) -> Float32:
        """One whole video, of any length -> its token states as unit rows.

        Args:
            features: (N, base dim) float32 unit rows in order of time, one a second.

        Returns:
            (N, D) float32. Consecutive clips of 32 rows are encoded each on its own; [CLS] and [SEP] are no rows.
        """
        check_shape("features", features, (None, self.base.spec.dim), np.float32)
        if len(features) == 0:
            return np.empty((0, self.spec.dim), np.float32)
        return _unit_rows(self._states([features]).tokens[0])

    def encode_text(self, texts: Sequence[str]) -> Float32:
        """B texts -> (B, D) float32 unit rows. A text is cut after 61 word pieces."""
        return _unit_rows(self._pooled_text(texts))

    def caution(self, text: str) -> str:
        """That only the start of a text is read."""
        return caution_of_length(text, lambda start: self._tokenizer([start])[0][: self._config.max_text_tokens])

    def score_pairs(self, texts: Sequence[str], clips: Sequence[Float32]) -> Float32:
        """VideoCLIP's own pair score: the raw dot product of pooled text and pooled video.

        Args:
            texts: M of them.
            clips: C arrays (T_c, base dim) float32, the base's rows of each clip, T_c >= 1.

        Returns:
            (M, C) float32.
        """
        for clip in clips:
            check_shape("clip", clip, (None, self.base.spec.dim), np.float32)
        if not (len(texts) and len(clips)):
            return np.empty((len(texts), len(clips)), np.float32)
        with torch.inference_mode():
            starts = range(0, len(clips), CLIPS_PER_BATCH)
            video = torch.cat([self._states(clips[start : start + CLIPS_PER_BATCH]).pooled for start in starts])
            scores: Float32 = (self._pooled_text(texts) @ video.T).cpu().numpy()
        return scores

    def _states(self, clips: Sequence[Float32]) -> VideoStates:
        lengths = torch.tensor([len(clip) for clip in clips])
        features = pad_sequence([torch.tensor(clip) for clip in clips], batch_first=True)
        mask = torch.arange(features.shape[1]) < lengths[:, None]
        return self._model.encode_video(features.to(self.device), mask.to(self.device))

    @torch.inference_mode()
    def _pooled_text(self, texts: Sequence[str]) -> Tensor:
        rows = [torch.empty(0, self.spec.dim, device=self.device)]
        for start in range(0, len(texts), TEXTS_PER_BATCH):
            ids, mask = text_batch(self._tokenizer(texts[start : start + TEXTS_PER_BATCH]), self._config)
            rows.append(self._model.encode_text(ids.to(self.device), mask.to(self.device)))
        return torch.cat(rows)


def load_videoclip(folder: Path, base: Encoder) -> VideoCLIPEncoder:
    """Loads a folder that `fineco convert` or `VideoCLIP.save` wrote.

    Args:
        folder: With config.json and videoclip.safetensors, and perhaps tokenizer/.
        base: Makes the rows that the video tower takes: S3D.

    Raises:
        UsageError: A file is missing, the base's rows are of another length, or the tokenizer's package is missing.
        IntegrityError: The folder is damaged.
        FinecoError: The tokenizer cannot be had, or the model does not fit the device.
    """
    name = f"videoclip:{os.path.abspath(folder)}"
    model = VideoCLIP.load(folder)
    config = model.config
    if config.feature_dim != base.spec.dim:
        raise UsageError(
            f"{name} takes features of length {config.feature_dim}, those of {base.spec.name} have {base.spec.dim}",
            "VideoCLIP's features are S3D's: convert them into its folder s3d with 'fineco convert'.",
        )
    tokenizer_folder = folder / config.tokenizer
    source = tokenizer_folder if tokenizer_folder.is_dir() else config.tokenizer
    special = {"[PAD]": config.pad_id, "[CLS]": config.cls_id, "[SEP]": config.sep_id}
    tokenizer = load_tokenizer(source, config.n_words, special)
    try:
        return VideoCLIPEncoder(name, model, tokenizer, base, _sha256(folder, model, base))
    except torch.OutOfMemoryError as error:
        raise FinecoError(f"{name} does not fit the memory of {base.device}", "Use --device cpu.") from error


def typical_temperature(model: VideoCLIP) -> float:
    """The temperature at which cosine / temperature is about VideoCLIP's raw dot product: 1 / (|h| * |z|).

    A state is w * x + b with the last LayerNorm's w and b, where the entries of x have mean 0 and variance 1; so its
    squared length is about |w|^2 + |b|^2, whatever the input. A fixed function of the weights, which is what a spec
    needs; pooled vectors are means of states and somewhat shorter.
    """

    def typical_norm(tower: Bert) -> float:
        last = list(tower.encoder.layer)[-1].get_submodule("output.LayerNorm")
        return math.sqrt(sum(float(parameter.detach().double().square().sum()) for parameter in last.parameters()))

    product = typical_norm(model.video_encoder.bert) * typical_norm(model.text_encoder)
    # rounded, because the fingerprint must not hang on the last bit of a sum
    return float(f"{1 / product:.6g}")


def _sha256(folder: Path, model: VideoCLIP, base: Encoder) -> str:
    """Of the weights, of the settings beside them, and of all that decides the base's rows."""
    with (folder / WEIGHTS_NAME).open("rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    settings = asdict(model.config)
    del settings["tokenizer"]  # where the vocabulary was found changes nothing
    facts = {"weights": weights, "settings": settings, "base": base.spec.fingerprint}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _unit_rows(vectors: Tensor) -> Float32:
    unit: Float32 = F.normalize(vectors, dim=-1).cpu().numpy()
    return unit
