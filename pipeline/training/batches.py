"""Which texts come in which batch, and which part of its video each one brings.

Both are pure functions of seed, epoch and batch, so that a training which is killed and started again goes on exactly
where it was. A batch holds one text of a video: another text of the same video would be a false negative.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.training.examples import Examples, Rows

ORDER, CLIPS = 0, 1  # streams of random numbers
NEIGHBOURS_PER_CLUSTER = 32  # of a video's nearest, so many come into one batch (docs/METHOD.md section 3)


def random_of(seed: int, *where: int) -> np.random.Generator:
    """Random numbers of one place in the training."""
    return np.random.default_rng([seed, *where])


def batch_size_of(videos: NDArray[np.int64], batch_size: int, world_size: int = 1) -> int:
    """The batch size asked for, or as many as there are videos, in equal parts for all processes."""
    most = min(batch_size, len(np.unique(videos)))
    return most - most % world_size


def epoch_batches(
    videos: NDArray[np.int64], batch_size: int, seed: int, epoch: int, neighbours: NDArray[np.int64] | None = None
) -> list[Rows]:
    """All batches of an epoch. What fills no batch of distinct videos is left out; it differs from epoch to epoch.

    Args:
        videos: (M,) the video of each text.
        neighbours: (V, k) of video v its nearest others, for batches of videos that are hard to tell apart.

    Returns:
        Batches of exactly `batch_size` places in `videos`.
    """
    rng = random_of(seed, ORDER, epoch)
    shuffled = rng.permutation(len(videos))
    if neighbours is not None:
        return _batches_of_neighbours(videos, shuffled, batch_size, neighbours, rng)
    # Rounds: first one text of every video, then a second one of those that have two, and so on.
    by_video = shuffled[np.argsort(videos[shuffled], kind="stable")]
    sorted_videos = videos[by_video]
    first_of_video = np.flatnonzero(np.r_[True, sorted_videos[1:] != sorted_videos[:-1]])
    rounds = np.arange(len(videos)) - np.repeat(first_of_video, np.diff(np.r_[first_of_video, len(videos)]))
    place = np.empty(len(videos), np.intp)
    place[shuffled] = np.arange(len(videos))
    return _distinct(videos, by_video[np.lexsort((place[by_video], rounds))], batch_size)


def _distinct(videos: NDArray[np.int64], order: Rows, batch_size: int) -> list[Rows]:
    """Cuts an order into batches; a text whose video is in the batch already waits for the next one."""
    batches: list[Rows] = []
    batch: list[int] = []
    present: set[int] = set()
    waiting: deque[int] = deque()
    rest = iter(order.tolist())
    skipped: deque[int] = deque()
    while True:
        row = waiting.popleft() if waiting else next(rest, None)
        if row is None:
            return batches
        video = int(videos[row])
        if video in present:
            skipped.append(row)
            continue
        present.add(video)
        batch.append(row)
        if len(batch) == batch_size:
            batches.append(np.array(batch, np.intp))
            batch, present = [], set()
            waiting.extendleft(reversed(skipped))
            skipped.clear()


def _batches_of_neighbours(
    videos: NDArray[np.int64],
    shuffled: Rows,
    batch_size: int,
    neighbours: NDArray[np.int64],
    rng: np.random.Generator,
) -> list[Rows]:
    """Batches made of clusters: a video with some of its nearest, then another with some of its own."""
    left: dict[int, list[int]] = {}
    for row in shuffled.tolist():
        left.setdefault(int(videos[row]), []).append(row)
    batches: list[Rows] = []
    seeds = deque(rng.permutation(sorted(left)).tolist())
    while len(left) >= batch_size:
        batch: dict[int, int] = {}
        while len(batch) < batch_size:
            seed = seeds[0]
            seeds.rotate(-1)
            if seed not in left:
                seeds.pop()
                continue
            if seed in batch:
                continue
            near = [v for v in neighbours[seed].tolist() if v in left and v not in batch and v != seed]
            some = rng.permutation(near)[: NEIGHBOURS_PER_CLUSTER - 1].tolist() if near else []
            for video in [seed, *some][: batch_size - len(batch)]:
                batch[video] = left[video].pop()
        for video in batch:
            if not left[video]:
                del left[video]
        batches.append(np.array(list(batch.values()), np.intp))
    return batches


@dataclass(frozen=True, slots=True)
class Batch:
    """Clips and texts, pair by pair: `features` (B, T, F) float32, `mask` (B, T) bool, `texts` for `encode_text`."""

    features: Tensor
    mask: Tensor
    texts: tuple[Tensor, ...]

    def to(self, device: str) -> Batch:
        return Batch(
            self.features.to(device, non_blocking=True),
            self.mask.to(device, non_blocking=True),
            tuple(t.to(device, non_blocking=True) for t in self.texts),
        )


def training_batch(
    examples: Examples,
    rows: Rows,
    clips: Literal["span", "overlapped"],
    n_tokens: tuple[int, int],
    rng: np.random.Generator,
    part: slice = slice(None),
) -> Batch:
    """A batch to train on.

    Args:
        clips: `span` or `overlapped`, see `TrainOptions.clips`.
        n_tokens: Least and most tokens of a clip (the least counts for `overlapped` alone).
        part: What this process takes of the batch; the clips are those of the whole batch whoever takes them.
    """
    spans, lengths = examples.spans[rows], examples.bank.lengths[examples.videos[rows]]
    cut = random_part(spans, n_tokens[1], rng) if clips == "span" else overlapping(spans, lengths, n_tokens, rng)
    return collate(examples, rows[part], cut[part])


def random_part(spans: NDArray[np.int64], most: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """At most `most` consecutive tokens of each span, (B, 2)."""
    spare = np.maximum(spans[:, 1] - spans[:, 0] - most, 0)
    starts = spans[:, 0] + rng.integers(0, spare + 1)
    return np.stack([starts, np.minimum(starts + most, spans[:, 1])], axis=1)


def middle_part(spans: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """The middle `most` tokens of each span, (B, 2): what validation sees of a long one."""
    spare = np.maximum(spans[:, 1] - spans[:, 0] - most, 0)
    starts = spans[:, 0] + spare // 2
    return np.stack([starts, np.minimum(starts + most, spans[:, 1])], axis=1)


def overlapping(
    spans: NDArray[np.int64], lengths: NDArray[np.int64], n_tokens: tuple[int, int], rng: np.random.Generator
) -> NDArray[np.int64]:
    """VideoCLIP's overlapped clips (docs/METHOD.md section 3): a token of the span, a clip of random length around it.

    The clip may reach beyond the span, which is the point: what is said is seldom shown at the same second. It is moved
    where it would reach beyond the video.
    """
    centres = rng.integers(spans[:, 0], spans[:, 1])
    sizes = np.minimum(rng.integers(n_tokens[0], n_tokens[1] + 1, len(spans)), lengths)
    starts = np.clip(centres - sizes // 2, 0, lengths - sizes)
    return np.stack([starts, starts + sizes], axis=1)


def collate(examples: Examples, rows: Rows, cut: NDArray[np.int64]) -> Batch:
    """The clips `cut` (B, 2) of the texts' videos, padded with zeros to the longest."""
    lengths = cut[:, 1] - cut[:, 0]
    features = np.zeros((len(rows), int(lengths.max()), examples.bank.dim), np.float32)
    for at, (video, (start, stop)) in enumerate(zip(examples.videos[rows].tolist(), cut.tolist(), strict=True)):
        features[at, : stop - start] = examples.bank.rows(video, start, stop)
    mask = np.arange(features.shape[1]) < lengths[:, None]
    return Batch(torch.from_numpy(features), torch.from_numpy(mask), examples.texts.inputs(rows))
