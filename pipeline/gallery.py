"""What an index is built of: the living videos of one selection, with their moments and kept frames, shard by shard."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from indexes.id_map import IdMap, Int32, moment_ids, video_key
from pipeline import store
from pipeline.collection import Snapshot
from pipeline.commits import EMBEDDINGS
from pipeline.errors import IntegrityError
from pipeline.types import Float32, Int64

Integer = TypeVar("Integer", bound=np.signedinteger[Any])

DAMAGED = "Run 'fineco verify' on the collection."
BLOCK_ROWS = 8192  # kept frames that are looked at together: 16 MB at 512 dimensions


@dataclass(frozen=True, slots=True)
class _Part:
    """The V living videos of one shard: its commit; and their rows there, keys, numbers of moments and of frames."""

    number: int
    rows: NDArray[np.intp]
    keys: Int64
    counts: Int32
    lengths: Int64


@dataclass(frozen=True, slots=True)
class FrameBlock:
    """Kept frames of some videos.

    Attributes:
        videos: (V,) their numbers in the gallery's id map.
        features: (M, D) float32 unit rows, one video after another.
        offsets: (V + 1,): video v has the rows [offsets[v], offsets[v + 1]).
    """

    videos: Int32
    features: Float32
    offsets: Int64


class Gallery:
    """The videos of a selection that are indexed. Reads and checks every shard once when it is made.

    Args:
        snapshot: The collection as it stands.
        selection: Name of the selection.

    Attributes:
        id_map: Its moments; videos are numbered by ascending key.
        places: (V, 2) commit and row of every video, in the order of the id map.
        video_ids, paths, lengths: Of every video, in that order: its id, where it is, how many kept frames it has.
        dim: Of a vector.

    Raises:
        IntegrityError: A shard is damaged, or two videos have one key.
    """

    def __init__(self, snapshot: Snapshot, selection: str) -> None:
        self.dim = 0
        self._folder = snapshot.collection.folder / EMBEDDINGS / selection
        self._parts: list[_Part] = []
        alive = snapshot.state.indexable(selection)
        expected = Counter(alive.values())
        ids: list[str] = []
        for number in sorted(expected):
            name = f"{EMBEDDINGS}/{selection}/{number:06d}.h5"
            with store.EmbeddingsShard(snapshot.collection.open_file(name, snapshot.records)) as shard:
                self.dim = shard.dim
                rows = [row for row, v in enumerate(shard.video_ids) if alive.get(v) == number]
                if len(rows) != expected[number]:
                    missing = f"{expected[number] - len(rows)} of the {expected[number]} videos"
                    raise IntegrityError(f"{shard.path}: {missing} that its commit names are not in it", DAMAGED)
                ids += (some := [shard.video_ids[row] for row in rows])
                counts = np.diff(shard.moment_offsets)[rows].astype(np.int32)
                keys = np.array([video_key(v) for v in some], np.int64)
                lengths = np.diff(shard.offsets)[rows]
                self._parts.append(_Part(number, np.array(rows, np.intp), keys, counts, lengths))
        keys = _concatenated([part.keys for part in self._parts], np.int64)
        order = np.argsort(keys, kind="stable")
        self._keys = keys[order]
        if np.any(self._keys[1:] == self._keys[:-1]):
            at = int(np.flatnonzero(self._keys[1:] == self._keys[:-1])[0])
            raise IntegrityError(f"videos {ids[order[at]]} and {ids[order[at + 1]]} have one key in the index", DAMAGED)
        try:
            self.id_map = IdMap.of(self._keys, _concatenated([part.counts for part in self._parts], np.int32)[order])
        except ValueError as error:
            raise IntegrityError(f"the moments of {len(ids)} videos cannot be indexed: {error}", DAMAGED) from error
        numbers = np.repeat([part.number for part in self._parts], [len(part.rows) for part in self._parts])
        all_rows = _concatenated([part.rows for part in self._parts], np.intp)
        self.places: Int64 = np.stack([numbers, all_rows], axis=1).astype(np.int64).reshape(-1, 2)[order]
        self.lengths = _concatenated([part.lengths for part in self._parts], np.int64)[order]
        self.paths = [snapshot.state.paths[ids[at]] for at in order.tolist()]
        self.video_ids = [ids[at] for at in order.tolist()]

    def __len__(self) -> int:
        return len(self._keys)

    def moments(self) -> Iterator[tuple[Int64, Float32]]:
        """Ids (n,) and unit vectors (n, D) of the moments, a chunk for each shard."""
        for part in self._parts:
            with self._open(part.number) as shard:
                where = _rows_of(shard.moment_offsets, part.rows)
                yield moment_ids(part.keys, part.counts), _taken(shard.moment_vectors(), where)

    def frames(self, n_videos: int) -> Iterator[FrameBlock]:
        """The kept frames of the first `n_videos` videos by key, which are a sample by chance.

        They come in no order, in blocks of bounded size unless a single video is larger.
        """
        for part in self._parts:
            videos = np.searchsorted(self._keys, part.keys).astype(np.int32)
            wanted = np.flatnonzero(videos < n_videos)
            if len(wanted) == 0:
                continue
            lengths = part.lengths[wanted]
            cuts = np.flatnonzero(np.diff(np.cumsum(lengths) // BLOCK_ROWS)) + 1
            with self._open(part.number) as shard:
                for some in np.split(wanted, cuts):
                    features = np.concatenate([shard.kept_features(row) for row in part.rows[some].tolist()])
                    yield FrameBlock(videos[some], features, store.offsets_of(part.lengths[some].tolist()))

    def n_videos_of(self, n_frames: int) -> int:
        """How many of the first videos by key have so many kept frames at most together; one at least."""
        return max(1, int(np.searchsorted(np.cumsum(self.lengths), n_frames, side="right")))

    def _open(self, number: int) -> store.EmbeddingsShard:
        return store.EmbeddingsShard(self._folder / f"{number:06d}.h5")


def _rows_of(offsets: Int64, rows: NDArray[np.intp]) -> Int64:
    """What lies in the pieces `rows` of something that `offsets` divide, piece after piece."""
    lengths = offsets[rows + 1] - offsets[rows]
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    found: Int64 = np.repeat(offsets[rows], lengths) + within
    return found


def _taken(array: Float32, where: Int64) -> Float32:
    """Some rows; the array itself where that is all of them, in order."""
    if len(where) == len(array) and np.array_equal(where, np.arange(len(array))):
        return array
    return array[where]


def _concatenated(arrays: Sequence[NDArray[Integer]], dtype: type[Integer]) -> NDArray[Integer]:
    return np.concatenate([np.empty(0, dtype), *arrays])
