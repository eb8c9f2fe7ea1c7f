"""S3D-G as trained on HowTo100M with MIL-NCE: a separable 3D Inception for clips, a bag of words for text.

Layers, names and order are those of METHOD.md section 4, so that the published weights load strictly. The poolings
between blocks pad at the far end only (TensorFlow's SAME), BatchNorm's epsilon is torch's own 1e-5, and no convolution
has a bias.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

DIM, FEATURE_DIM = 512, 1024
WORD_DIM, TEXT_WIDTH = 300, 2048
N_WORDS = 66_250  # rows of the published word table, the first one for padding
MAX_WORDS = 16

Size3 = tuple[int, int, int]
# Widths of an inception block: of branch 0, of branches 1 and 2 (before and after their 3x3x3), of branch 3.
_BLOCKS = {
    "mixed_3b": (64, (96, 128), (16, 32), 32),
    "mixed_3c": (128, (128, 192), (32, 96), 64),
    "mixed_4b": (192, (96, 208), (16, 48), 64),
    "mixed_4c": (160, (112, 224), (24, 64), 64),
    "mixed_4d": (128, (128, 256), (24, 64), 64),
    "mixed_4e": (112, (144, 288), (32, 64), 64),
    "mixed_4f": (256, (160, 320), (32, 128), 128),
    "mixed_5b": (256, (160, 320), (32, 128), 128),
    "mixed_5c": (384, (192, 384), (48, 128), 128),
}
_WORD = re.compile(r"[\w']+")


class Dictionary:
    """The words the text module knows; word number i (from 0) has row i + 1 of its table, row 0 is the padding.

    Args:
        words: In the order of the table.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = tuple(words)
        self._ids = {word: number for number, word in enumerate(self.words, 1)}

    def ids(self, texts: Sequence[str]) -> Tensor:
        """B texts -> (B, 16) int64: lower-cased words without the unknown ones, the first 16 of those, zeros after."""
        ids = torch.zeros(len(texts), MAX_WORDS, dtype=torch.long)
        for row, text in enumerate(texts):
            known = [self._ids[word] for word in _WORD.findall(text.lower()) if word in self._ids][:MAX_WORDS]
            ids[row, : len(known)] = torch.tensor(known, dtype=torch.long)
        return ids

    def count(self, text: str) -> int:
        """How many words of a text are known."""
        return sum(word in self._ids for word in _WORD.findall(text.lower()))


class S3DOutput(NamedTuple):
    """`video_embedding` (B, 512): after the last layer. `mixed_5c` (B, 1024): the mean before it."""

    video_embedding: Tensor
    mixed_5c: Tensor


class Conv(nn.Module):
    """A convolution with BatchNorm and ReLU; a `separable` one in two halves, over space and then over time."""

    def __init__(self, n_in: int, n_out: int, kernel: Size3 = (1, 1, 1), separable: bool = False) -> None:
        super().__init__()
        time, height, width = kernel
        first = (1, height, width) if separable else kernel
        self.conv1 = nn.Conv3d(n_in, n_out, first, padding=_half(first) if separable else 0, bias=False)
        self.bn1 = nn.BatchNorm3d(n_out)
        self.separable = separable
        if separable:
            second = (time, 1, 1)
            self.conv2 = nn.Conv3d(n_out, n_out, second, padding=_half(second), bias=False)
            self.bn2 = nn.BatchNorm3d(n_out)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(x)), inplace=True) if self.separable else x


class Gating(nn.Module):
    """Feature gating: each channel is weighted by what the means of all channels say of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.sigmoid(self.fc(x.mean(dim=(2, 3, 4))))
        return x * weights[:, :, None, None, None]


class Inception(nn.Module):
    """Four gated branches side by side: 1x1x1; twice 1x1x1 and a separable 3x3x3; pooling and 1x1x1."""

    def __init__(self, n_in: int, b0: int, b1: tuple[int, int], b2: tuple[int, int], b3: int) -> None:
        super().__init__()
        self.conv_b0 = Conv(n_in, b0)
        self.conv_b1_a = Conv(n_in, b1[0])
        self.conv_b1_b = Conv(b1[0], b1[1], (3, 3, 3), separable=True)
        self.conv_b2_a = Conv(n_in, b2[0])
        self.conv_b2_b = Conv(b2[0], b2[1], (3, 3, 3), separable=True)
        self.conv_b3_b = Conv(n_in, b3)
        self.gating_b0 = Gating(b0)
        self.gating_b1 = Gating(b1[1])
        self.gating_b2 = Gating(b2[1])
        self.gating_b3 = Gating(b3)
        self.n_out = b0 + b1[1] + b2[1] + b3

    def forward(self, x: Tensor) -> Tensor:
        branches = (
            self.gating_b0(self.conv_b0(x)),
            self.gating_b1(self.conv_b1_b(self.conv_b1_a(x))),
            self.gating_b2(self.conv_b2_b(self.conv_b2_a(x))),
            self.gating_b3(self.conv_b3_b(F.max_pool3d(x, 3, stride=1, padding=1))),
        )
        return torch.cat(branches, dim=1)


class TextModule(nn.Module):
    """(B, 16) word ids -> (B, 512): the maximum over the words, padding included, between two linear layers."""

    def __init__(self, n_words: int) -> None:
        super().__init__()
        self.word_embd = nn.Embedding(n_words, WORD_DIM)
        self.fc1 = nn.Linear(WORD_DIM, TEXT_WIDTH)
        self.fc2 = nn.Linear(TEXT_WIDTH, DIM)

    def forward(self, ids: Tensor) -> Tensor:
        words = F.relu(self.fc1(self.word_embd(ids)))
        embedding: Tensor = self.fc2(words.amax(dim=1))
        return embedding


class S3D(nn.Module):
    """Clips and texts to one space, where MIL-NCE compares them by the dot product (METHOD.md section 4).

    Args:
        n_words: Rows of the text module's table.
    """

    def __init__(self, n_words: int = N_WORDS) -> None:
        super().__init__()
        self.conv1 = Conv(24, 64, (2, 4, 4))
        self.conv_2b = Conv(64, 64)
        self.conv_2c = Conv(64, 192, (3, 3, 3), separable=True)
        self.gating = Gating(192)
        width = 192
        for name, widths in _BLOCKS.items():
            block = Inception(width, *widths)
            self.add_module(name, block)
            width = block.n_out
        self.fc = nn.Linear(FEATURE_DIM, DIM)
        self.text_module = TextModule(n_words)

    def forward(self, video: Tensor) -> S3DOutput:
        """Embeds clips.

        Args:
            video: (B, 3, T, H, W) RGB in [0, 1]; T, H and W even.

        Raises:
            ValueError: Another shape.
        """
        x = self.conv1(_stem_input(video))
        x = _pool_same(x, (1, 3, 3), (1, 2, 2))
        x = self.gating(self.conv_2c(self.conv_2b(x)))
        x = _pool_same(x, (1, 3, 3), (1, 2, 2))
        for name in _BLOCKS:
            if name == "mixed_4b":
                x = _pool_same(x, (3, 3, 3), (2, 2, 2))
            elif name == "mixed_5b":
                x = _pool_same(x, (2, 2, 2), (2, 2, 2))
            x = self.get_submodule(name)(x)
        mixed_5c = x.mean(dim=(2, 3, 4))
        return S3DOutput(self.fc(mixed_5c), mixed_5c)

    def text_embedding(self, token_ids: Tensor) -> Tensor:
        """(B, 16) int64 of `Dictionary.ids` -> (B, 512)."""
        embedding: Tensor = self.text_module(token_ids)
        return embedding


def space_to_depth(video: Tensor) -> Tensor:
    """(B, 3, T, H, W) -> (B, 24, T/2, H/2, W/2): channel ((dt * 2 + dh) * 2 + dw) * 3 + colour."""
    batch, colours, time, height, width = video.shape
    cells = video.reshape(batch, colours, time // 2, 2, height // 2, 2, width // 2, 2).permute(0, 2, 4, 6, 3, 5, 7, 1)
    # Channels last in memory, which every layer keeps: on a CPU 0.42 s a window instead of 1.01 s in bf16, 1.50 s
    # instead of 1.66 s in fp32 (measured, one thread).
    return cells.reshape(batch, time // 2, height // 2, width // 2, 8 * colours).permute(0, 4, 1, 2, 3)


def _stem_input(video: Tensor) -> Tensor:
    """What the first convolution sees. It has no padding of its own: the reference pads both ends (1 in time, 2 in
    space) and drops the first output of each axis, which is to pad one less at the front."""
    if video.dim() != 5 or video.shape[1] != 3 or any(n < 2 or n % 2 for n in video.shape[2:]):
        raise ValueError(f"a clip has shape {tuple(video.shape)}, expected (B, 3, T, H, W) with even T, H and W")
    return F.pad(space_to_depth(video), (1, 2, 1, 2, 0, 1))


def _pool_same(x: Tensor, kernel: Size3, stride: Size3) -> Tensor:
    """Maximum with TensorFlow's SAME padding as the reference has it: zeros, all at the far end of each axis."""
    padding = [n for k, s in zip(reversed(kernel), reversed(stride), strict=True) for n in (0, max(0, k - s))]
    return F.max_pool3d(F.pad(x, padding), kernel, stride, ceil_mode=True)


def _half(kernel: Size3) -> Size3:
    return kernel[0] // 2, kernel[1] // 2, kernel[2] // 2
