"""Stand-ins that follow the project's own protocols, for tests that need no real model."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence

import numpy as np

from models.base import EncoderSpec
from pipeline.types import Float32, FrameGeometry, UInt8

GRID = 4  # a frame is seen as GRID x GRID mean colours


class FakeEncoder:
    """An encoder in numpy: a fixed projection of a frame's mean colours; texts by the hash of their words.

    A frame's vector depends on that frame alone. Frames that look alike get like vectors, and so do
    texts that share words.

    Args:
        dim: Length of a vector.
        size: Side of the input square in pixels, a multiple of GRID.
        seed: Another seed is another encoder, with another fingerprint.
        max_batch: Larger batches raise an out-of-memory error, as torch words it.
        nan_above: Frames whose mean grey is above this get a vector of NaN.
        seconds_per_batch: How long a batch takes, besides the arithmetic.
    """

    device = "cpu"
    precision = "fp32"

    def __init__(
        self,
        dim: int = 16,
        size: int = 8,
        seed: int = 0,
        max_batch: int | None = None,
        nan_above: float | None = None,
        seconds_per_batch: float = 0.0,
    ) -> None:
        self.spec = EncoderSpec(
            name="fake",
            dim=dim,
            geometry=FrameGeometry(size, size),
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            window=1,
            temperature=0.1,
            context_length=64,
            weights_sha256=hashlib.sha256(b"%d" % seed).hexdigest(),
            licence="none",
        )
        self.max_batch = max_batch
        self.nan_above = nan_above
        self.seconds_per_batch = seconds_per_batch
        self.batch_sizes: list[int] = []  # of every call, refused ones too
        self._projection = np.random.default_rng(seed).standard_normal((GRID * GRID * 3, dim)).astype(np.float32)

    def encode_frames(self, frames: UInt8) -> Float32:
        """(B, H, W, 3) uint8 -> (B, D) float32 unit rows; options of the class may spoil it."""
        self.batch_sizes.append(len(frames))
        if self.max_batch is not None and len(frames) > self.max_batch:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB (fake)")
        time.sleep(self.seconds_per_batch)
        side = self.spec.geometry.height // GRID
        cells = frames.reshape(len(frames), GRID, side, GRID, side, 3).astype(np.float32).mean(axis=(2, 4))
        colours = cells.reshape(len(frames), -1) / 255 - 0.5
        # Row by row: a matrix product may round a row differently with the number of rows beside it.
        vectors = np.stack([_unit(row @ self._projection) for row in colours])
        if self.nan_above is not None:
            vectors[frames.mean(axis=(1, 2, 3)) > self.nan_above] = np.nan
        return vectors

    def encode_text(self, texts: Sequence[str]) -> Float32:
        """B texts -> (B, D) float32 unit rows."""
        return np.stack([_unit(np.sum([self._word(w) for w in text.split() or [""]], axis=0)) for text in texts])

    def _word(self, word: str) -> Float32:
        seed = int.from_bytes(hashlib.sha256(word.lower().encode("utf-8", "surrogatepass")).digest()[:8], "big")
        return np.random.default_rng(seed).standard_normal(self.spec.dim).astype(np.float32)


def _unit(vector: Float32) -> Float32:
    norm = np.linalg.norm(vector)
    if norm < 1e-6:  # mid grey all over
        vector = np.ones_like(vector)
        norm = np.linalg.norm(vector)
    return (vector / norm).astype(np.float32)
