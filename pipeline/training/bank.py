"""Where a training's features come from: arrays in memory, or the mapped shards of a collection."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline import store
from pipeline.collection import Snapshot
from pipeline.commits import FEATURES
from pipeline.errors import UsageError
from pipeline.types import Float32, Float64, check_shape

OPEN_SHARDS = 256  # mapped at a time: each one holds a file descriptor, of which a process has 1024


class Bank(Protocol):
    """Features of many videos: `lengths` (V,) tokens of each, `dim` the length of a row."""

    lengths: NDArray[np.int64]
    dim: int

    def rows(self, video: int, start: int, stop: int) -> Float32:
        """(stop - start, dim) features of a part of one video."""
        ...


class MemoryBank:
    """Features held in memory.

    Args:
        features: One (T, D) array for each video, float32 or float16.
    """

    def __init__(self, features: Sequence[NDArray[Any]]) -> None:
        self._features = features
        self.lengths = np.array([len(f) for f in features], np.int64)
        self.dim = int(features[0].shape[1])
        for array in features:
            check_shape("features", array, (None, self.dim), array.dtype.type)
            if len(array) == 0:
                raise ValueError("a video without features")

    def rows(self, video: int, start: int, stop: int) -> Float32:
        return self._features[video][start:stop].astype(np.float32)


class FeatureBank:
    """The latest features of every video of a collection, mapped: a million videos cost no memory but their ids.

    Args:
        snapshot: Of the collection; its shards are compared with their digests, as an epoch reads every byte anyway.

    Attributes:
        video_ids: The id of each video, in order of shard and row.

    Raises:
        UsageError: There are no features.
        IntegrityError: A shard is damaged.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        collection = snapshot.collection
        self._folder = collection.folder
        places = {v: place.commit for v, place in snapshot.state.places.get(FEATURES, {}).items()}
        if not places:
            raise UsageError(f"{collection.folder} has no features to train on", "Run 'fineco run' or 'fineco embed'.")
        self._numbers = sorted(set(places.values()))
        video_ids: list[str] = []
        shards: list[int] = []
        starts: list[int] = []
        lengths: list[int] = []
        spans: list[float] = []
        self.dim = 0
        for at, number in enumerate(self._numbers):
            path = collection.open_file(f"{FEATURES}/{number:06d}.h5", snapshot.records)
            with store.FeaturesShard(path) as shard:
                self.dim = shard.dim
                for row, video_id in enumerate(shard.video_ids):
                    if places.get(video_id) == number:
                        video_ids.append(video_id)
                        shards.append(at)
                        starts.append(int(shard.offsets[row]))
                        lengths.append(int(shard.offsets[row + 1] - shard.offsets[row]))
                        spans.append(float(shard.spans[row]))
        self.video_ids = video_ids
        self.lengths = np.array(lengths, np.int64)
        self._spans = np.array(spans, np.float64)
        self._shards = np.array(shards, np.int32)
        self._starts = np.array(starts, np.int64)
        self._mapped = lru_cache(OPEN_SHARDS)(self._map)

    def rows(self, video: int, start: int, stop: int) -> Float32:
        first = int(self._starts[video])
        features, _ = self._mapped(int(self._shards[video]))
        return features[first + start : first + stop].astype(np.float32)

    def times(self, video: int) -> tuple[Float64, float]:
        """Time of every row of a video in seconds, and what one row covers."""
        first = int(self._starts[video])
        _, pts_seconds = self._mapped(int(self._shards[video]))
        return np.array(pts_seconds[first : first + int(self.lengths[video])]), float(self._spans[video])

    def _map(self, shard: int) -> tuple[NDArray[np.float16], Float64]:
        return store.map_features(self._path(shard))

    def _path(self, shard: int) -> Path:
        return self._folder / FEATURES / f"{self._numbers[shard]:06d}.h5"
