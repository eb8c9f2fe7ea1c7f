"""The builtin encoder: a small convolutional frame tower and a small transformer over words, trained by `train.py`.

It imports torch, numpy and safetensors only, so that it is ready long before torchvision would be.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from models.base import EncoderSpec
from pipeline.errors import IntegrityError
from pipeline.types import Float32, FrameGeometry, UInt8

ABOUT = "it knows only rendered shapes (colour, size, place, motion): choose an open_clip model for real footage"
WEIGHTS = Path(__file__).with_name("weights.safetensors")
VOCABULARY = Path(__file__).with_name("vocabulary.json")
DIGEST = Path(__file__).with_name("digest.json")  # SHA-256 of both, as `train.py` wrote them

IMAGE_SIZE = 112
DIM = 128
WIDTHS = (24, 48, 96, 160)
GRID = IMAGE_SIZE // 16
TEXT_WIDTH, TEXT_HEADS, TEXT_LAYERS = 128, 4, 2
CONTEXT_LENGTH = 24
PAD, UNKNOWN = 0, 1
MEAN, STD = (0.45, 0.45, 0.45), (0.25, 0.25, 0.25)

_WORD = re.compile(r"[\w']+")


def tokenize(texts: Sequence[str], vocabulary: dict[str, int]) -> Tensor:
    """Lower-cased words to ids: (B, CONTEXT_LENGTH) int64; unknown words share one id, longer texts are cut."""
    ids = torch.zeros(len(texts), CONTEXT_LENGTH, dtype=torch.long)
    for row, text in enumerate(texts):
        words = _WORD.findall(text.lower())[:CONTEXT_LENGTH] or [""]
        ids[row, : len(words)] = torch.tensor([vocabulary.get(word, UNKNOWN) for word in words])
    return ids


def read_vocabulary() -> dict[str, int]:
    """Word -> id, from 2 on."""
    words: list[str] = json.loads(VOCABULARY.read_text("utf-8"))
    return {word: number for number, word in enumerate(words, 2)}


def digest_of(weights: Path, vocabulary: Path) -> str:
    """SHA-256 of both files, for both decide the vectors."""
    return hashlib.sha256(weights.read_bytes() + vocabulary.read_bytes()).hexdigest()


class FrameTower(nn.Module):
    """(B, 3, 112, 112) normalised pixels -> (B, DIM), not yet of unit length. Where things are is kept to the end."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for width in WIDTHS:  # each halves the picture: 56, 28, 14, 7
            layers += [nn.Conv2d(before, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            if width > WIDTHS[1]:
                layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            before = width
        layers += [nn.Conv2d(before, 32, 1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * GRID * GRID, DIM)]
        self.layers = nn.Sequential(*layers)

    def forward(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.layers(pixels)
        return features


class TextTower(nn.Module):
    """(B, CONTEXT_LENGTH) ids -> (B, DIM): the mean over the words of a small transformer."""

    def __init__(self, n_words: int) -> None:
        super().__init__()
        self.words = nn.Embedding(n_words, TEXT_WIDTH)
        self.positions = nn.Parameter(torch.zeros(CONTEXT_LENGTH, TEXT_WIDTH))
        layer = nn.TransformerEncoderLayer(
            TEXT_WIDTH, TEXT_HEADS, 2 * TEXT_WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, TEXT_LAYERS, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(TEXT_WIDTH)
        self.projection = nn.Linear(TEXT_WIDTH, DIM)

    def forward(self, ids: Tensor) -> Tensor:
        valid = ids != PAD
        hidden = self.encoder(self.words(ids) + self.positions, src_key_padding_mask=~valid)
        weights = valid.unsqueeze(-1).to(hidden.dtype)
        features: Tensor = self.projection(self.norm((hidden * weights).sum(1) / weights.sum(1)))
        return features


class DualEncoder(nn.Module):
    """Both towers and the logit scale of the contrastive loss."""

    def __init__(self, n_words: int) -> None:
        super().__init__()
        self.frames = FrameTower()
        self.text = TextTower(n_words)
        self.log_scale = nn.Parameter(torch.tensor(2.6593))  # log(1 / 0.07), as in CLIP


def normalise(frames: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32, normalised."""
    mean, std = (torch.tensor(v, device=frames.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    pixels = frames.permute(0, 3, 1, 2).float().div_(255)
    return ((pixels - mean) / std).contiguous(memory_format=torch.channels_last)


class BuiltinEncoder:
    """The shipped weights behind the `Encoder` protocol (models.base)."""

    def __init__(
        self, model: DualEncoder, vocabulary: dict[str, int], weights_sha256: str, device: str, precision: str
    ) -> None:
        self.device = device
        self.precision = precision
        self._vocabulary = vocabulary
        self._dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        # before bf16 rounds it: both precisions have one fingerprint
        temperature = float(1 / model.log_scale.detach().float().exp())
        self._model = model.to(device=device, dtype=self._dtype).eval()
        self.spec = EncoderSpec(
            name="builtin",
            dim=DIM,
            geometry=FrameGeometry(IMAGE_SIZE, IMAGE_SIZE, "squash", "bicubic"),
            mean=MEAN,
            std=STD,
            window=1,
            temperature=temperature,
            context_length=CONTEXT_LENGTH,
            weights_sha256=weights_sha256,
            licence="this project's",
        )

    @torch.inference_mode()
    def encode_frames(self, frames: UInt8) -> Float32:
        """(B, 112, 112, 3) uint8 RGB -> (B, 128) float32 unit rows."""
        pixels = normalise(torch.from_numpy(np.require(frames, requirements=["C", "W"])).to(self.device)).to(
            self._dtype
        )
        return _unit(self._model.frames(pixels))

    @torch.inference_mode()
    def encode_text(self, texts: Sequence[str]) -> Float32:
        """B texts -> (B, 128) float32 unit rows. Words it does not know count as one unknown word."""
        return _unit(self._model.text(tokenize(texts, self._vocabulary).to(self.device)))

    def caution(self, text: str) -> str:
        """That it knows no word of a text, or reads only its start."""
        words = _WORD.findall(text.lower())
        if not any(word in self._vocabulary for word in words):
            return "the built-in encoder knows none of its words, so its answers mean nothing"
        if len(words) > CONTEXT_LENGTH:
            return f"only its first {CONTEXT_LENGTH} of {len(words)} words are read"
        return ""


def _unit(features: Tensor) -> Float32:
    rows: Float32 = F.normalize(features.float(), dim=-1).cpu().numpy()
    return rows


def load_builtin(device: str = "cpu", precision: str = "fp32") -> BuiltinEncoder:
    """Loads the shipped weights.

    Args:
        device: As torch names it.
        precision: `fp32` or `bf16`.

    Raises:
        IntegrityError: The weights are missing or are not this model's.
    """
    try:
        vocabulary = read_vocabulary()
        model = DualEncoder(len(vocabulary) + 2)  # 0.03 s; on the meta device it would import dynamo and sympy: 5 s
        sha256 = digest_of(WEIGHTS, VOCABULARY)
        if sha256 != json.loads(DIGEST.read_text("utf-8")):
            raise ValueError("they are not those that came with fineco (SHA-256 differs)")
        state = {name: t.float() if t.is_floating_point() else t for name, t in load_file(WEIGHTS).items()}
        model.load_state_dict(state, strict=True, assign=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise IntegrityError(
            f"the builtin encoder's weights cannot be read: {reason}", "Install fineco again."
        ) from error
    return BuiltinEncoder(model.eval(), vocabulary, sha256, device, precision)
