"""The small VideoCLIP of the golden fixtures: its sizes, its weights by their rule, a vocabulary that fits it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from models.videoclip import VideoCLIP, VideoCLIPConfig

TINY = VideoCLIPConfig(
    hidden_size=48,
    n_heads=4,
    intermediate_size=96,
    n_words=200,
    n_positions=64,
    video_layers=3,
    text_layers=4,
    feature_dim=24,
    max_video_tokens=12,
    max_text_tokens=25,
)
SEED = 20210928
UNUSED = (
    "video_encoder.bert.embeddings.position_ids",
    "video_encoder.bert.pooler.dense.weight",
    "video_encoder.bert.pooler.dense.bias",
    "text_encoder.embeddings.position_ids",
    "text_encoder.pooler.dense.weight",
    "text_encoder.pooler.dense.bias",
)


def reference_state() -> dict[str, Tensor]:
    """The reference's whole state dict in its own order, drawn by the rule of the fixtures' README, section 1."""
    shapes: dict[str, tuple[int, ...]] = {}
    own = VideoCLIP(TINY).state_dict()
    for tower, counter, weight, bias in (("video_encoder.", *UNUSED[:3]), ("text_encoder.", *UNUSED[3:])):
        for name, tensor in own.items():
            if not name.startswith(tower):
                continue
            if name.endswith("embeddings.word_embeddings.weight"):
                shapes[counter] = (1, TINY.n_positions)
            shapes[name] = tuple(tensor.shape)
        shapes |= {weight: (TINY.hidden_size, TINY.hidden_size), bias: (TINY.hidden_size,)}
    return {name: _draw(number, name, shape) for number, (name, shape) in enumerate(shapes.items())}


def tiny_state() -> dict[str, Tensor]:
    """What of it `VideoCLIP(TINY)` loads."""
    return {name: tensor for name, tensor in reference_state().items() if name not in UNUSED}


def write_vocabulary(folder: Path) -> Path:
    """Makes `folder` with a vocab.txt of 200 words that has BERT's special tokens where TINY expects them."""
    folder.mkdir()
    words = [f"word{number}" for number in range(TINY.n_words)]
    words[TINY.pad_id], words[1], words[TINY.cls_id], words[TINY.sep_id] = "[PAD]", "[UNK]", "[CLS]", "[SEP]"
    words[110:114] = ["red", "green", "square", "circle"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return folder


def _draw(number: int, name: str, shape: tuple[int, ...]) -> Tensor:
    if name.endswith("position_ids"):
        return torch.arange(shape[1])[None]
    r = torch.randn(shape, generator=torch.Generator().manual_seed(SEED + number))
    if "LayerNorm" in name:
        return 1 + 0.2 * r if name.endswith("weight") else 0.2 * r
    if name.endswith("embeddings.weight"):
        return 0.5 * r
    return r / shape[1] ** 0.5 if name.endswith("weight") else 0.1 * r
