"""S3D-HowTo100M as an `Encoder`: 30 frames, one second, to one vector."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from models.base import EncoderSpec
from models.s3d import DIM, MAX_WORDS
from models.s3d_weights import StoredS3D, read_s3d
from pipeline.errors import FinecoError
from pipeline.types import Float32, FrameGeometry, UInt8, check_shape

WINDOW: Final = 30
FPS: Final = 30.0
# The short side to 224 and the centre cut out; ffmpeg's scaler, with which the published features were made, is bicubic
# unless told otherwise.
GEOMETRY: Final = FrameGeometry(224, 224, "shortest", "bicubic")
# MIL-NCE compared the vectors as they came, by the dot product; the cosines of unit vectors, which VideoCLIP takes and
# which are used here, never had a temperature. This one is what contrastive training commonly starts from.
TEMPERATURE: Final = 0.07
TEXTS_PER_BATCH = 256


class S3DEncoder:
    """S3D on one device; build it with `load_s3d`."""

    def __init__(self, name: str, stored: StoredS3D, device: str, precision: str) -> None:
        self.device = device
        self.precision = precision
        self._dictionary = stored.dictionary
        self._dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        model = stored.model.to(device=device, dtype=self._dtype).eval().requires_grad_(False)
        # As the stem lays out what it passes on; otherwise every call would put the weights in that order.
        self._model = model.to(memory_format=torch.channels_last_3d)
        self._white = torch.tensor(255.0, device=device)
        self.spec = EncoderSpec(
            name=name,
            dim=DIM,
            geometry=GEOMETRY,
            mean=(0.0, 0.0, 0.0),
            std=(1.0, 1.0, 1.0),
            window=WINDOW,
            temperature=TEMPERATURE,
            context_length=MAX_WORDS,
            weights_sha256=stored.sha256,
            licence=stored.licence,
            fps=FPS,
        )

    def preprocess(self, frames: UInt8) -> Tensor:
        """(B, 30, 224, 224, 3) uint8 RGB -> (B, 3, 30, 224, 224) in [0, 1], in the model's precision, on the device."""
        # torch wants to own writable, contiguous memory; frames from shared memory may be neither
        pixels = torch.from_numpy(np.require(frames, requirements=["C", "W"])).to(self.device)
        return pixels.permute(0, 4, 1, 2, 3).float().div_(self._white).to(self._dtype)

    @torch.inference_mode()
    def encode_frames(self, frames: UInt8) -> Float32:
        """(B, 30, 224, 224, 3) uint8 RGB, one second of video each -> (B, 512) float32 unit rows.

        Raises torch's out-of-memory error when B is too large for the device.
        """
        geometry = self.spec.geometry
        check_shape("frames", frames, (None, self.spec.window, geometry.height, geometry.width, 3), np.uint8)
        if len(frames) == 0:
            return np.empty((0, DIM), np.float32)
        return _unit_rows(self._model(self.preprocess(frames)).video_embedding)

    @torch.inference_mode()
    def encode_text(self, texts: Sequence[str]) -> Float32:
        """B texts -> (B, 512) float32 unit rows.

        Words that the dictionary does not know are left out, and so are known ones after the 16th; a text of which
        nothing is left is all padding, which has a vector like any other.
        """
        rows = np.empty((len(texts), DIM), np.float32)
        for start in range(0, len(texts), TEXTS_PER_BATCH):
            ids = self._dictionary.ids(texts[start : start + TEXTS_PER_BATCH]).to(self.device)
            rows[start : start + len(ids)] = _unit_rows(self._model.text_embedding(ids))
        return rows

    def caution(self, text: str) -> str:
        """That the dictionary knows no word of a text, or that only its start is read."""
        n_known = self._dictionary.count(text)
        if not n_known:
            return "S3D's dictionary knows none of its words, so its answers mean nothing"
        return f"only the first {MAX_WORDS} of its {n_known} known words are read" if n_known > MAX_WORDS else ""


def load_s3d(folder: Path, device: str, precision: str) -> S3DEncoder:
    """Loads a folder that `models.s3d_weights.convert_s3d` wrote.

    Args:
        folder: With s3d.safetensors, words.json and config.json.
        device: As torch names it.
        precision: `fp32` or `bf16`.

    Raises:
        UsageError: There is no such folder.
        IntegrityError: The folder is incomplete, damaged, or holds another kind of model.
        FinecoError: The model does not fit the device.
    """
    name = f"s3d:{os.path.abspath(folder)}"
    stored = read_s3d(folder)
    try:
        return S3DEncoder(name, stored, device, precision)
    except torch.OutOfMemoryError as error:
        raise FinecoError(f"{name} does not fit the memory of {device}", "Use --device cpu.") from error


def _unit_rows(features: Tensor) -> Float32:
    unit: Float32 = F.normalize(features.float(), dim=-1).cpu().numpy()
    return unit
