"""What there is to learn from: texts, each with the part of a video that it speaks of."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.training.bank import Bank, MemoryBank
from pipeline.types import check_shape

Rows = NDArray[np.intp]


class Texts(Protocol):
    """Texts as the model takes them."""

    def __len__(self) -> int: ...

    def inputs(self, rows: Rows) -> tuple[Tensor, ...]:
        """What `encode_text` of the model takes for these texts."""
        ...


class TextVectors:
    """Texts as vectors of the base encoder, (M, D), in memory or mapped from a file."""

    def __init__(self, vectors: NDArray[Any]) -> None:
        check_shape("text vectors", vectors, (None, None), vectors.dtype.type)
        self._vectors = vectors

    def __len__(self) -> int:
        return len(self._vectors)

    def inputs(self, rows: Rows) -> tuple[Tensor, ...]:
        return (torch.from_numpy(self._vectors[rows].astype(np.float32)),)


@dataclass(frozen=True, slots=True)
class Examples:
    """Texts and what they belong to.

    Attributes:
        bank: The features.
        videos: (M,) the video of each text.
        spans: (M, 2) the tokens [start, stop) of its video that each text speaks of; never empty.
        texts: The M texts.
    """

    bank: Bank
    videos: NDArray[np.int64]
    spans: NDArray[np.int64]
    texts: Texts

    def __post_init__(self) -> None:
        n_texts = len(self.texts)
        check_shape("videos", self.videos, (n_texts,), np.int64)
        check_shape("spans", self.spans, (n_texts, 2), np.int64)
        if n_texts == 0:
            raise ValueError("no texts")
        starts, stops = self.spans.T
        if np.any(starts < 0) or np.any(stops <= starts) or np.any(stops > self.bank.lengths[self.videos]):
            raise ValueError("a span is empty or reaches beyond its video")

    @classmethod
    def of_arrays(
        cls,
        features: Sequence[NDArray[Any]],
        text_vectors: NDArray[Any],
        videos: NDArray[np.integer[Any]] | Sequence[int] | None = None,
        spans: NDArray[np.integer[Any]] | None = None,
    ) -> Examples:
        """Examples held in memory.

        Args:
            features: One (T, D) array for each video.
            text_vectors: (M, D_text).
            videos: The video of each text; None: text i belongs to video i.
            spans: (M, 2) tokens [start, stop); None: whole videos.
        """
        bank = MemoryBank(features)
        of = np.asarray(np.arange(len(text_vectors)) if videos is None else videos, np.int64)
        whole = np.stack([np.zeros(len(of), np.int64), bank.lengths[of]], axis=1)
        return cls(
            bank,
            of,
            whole if spans is None else np.asarray(spans, np.int64),
            TextVectors(text_vectors),
        )

    def __len__(self) -> int:
        return len(self.videos)


@dataclass(frozen=True, slots=True)
class Split:
    """Which texts are trained on and which validate; no video is on both sides."""

    training: Rows
    validation: Rows


def split(videos: NDArray[np.int64], names: Sequence[str], share: float, most_videos: int = 2000) -> Split:
    """Sets aside the videos whose names have the lowest hashes: a grown collection keeps most of those who validate.

    Args:
        videos: (M,) the video of each text.
        names: Of every video, something that stays with it, such as its id.
        share: Of the videos with texts, rounded down.
        most_videos: More are not needed to tell a better model from a worse one.
    """
    candidates = np.unique(videos)
    named = [(zlib.crc32(names[v].encode("utf-8", "surrogateescape")), names[v], v) for v in candidates.tolist()]
    chosen = [video for _, _, video in sorted(named)[: min(int(share * len(named)), most_videos)]]
    return split_by_videos(videos, np.array(chosen, np.int64))


def split_by_videos(videos: NDArray[np.int64], validating: NDArray[np.int64]) -> Split:
    """The texts of these videos validate, all others train."""
    held_out = np.isin(videos, validating)
    return Split(np.flatnonzero(~held_out), np.flatnonzero(held_out))
