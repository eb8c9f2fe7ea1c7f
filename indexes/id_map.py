"""The ids of an index: one for each (video, moment), the same in every build, and the way back to the video."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import IntegrityError
from pipeline.types import Int64

Int32 = NDArray[np.int32]

STEP = np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio: numbers that are near each other are no more so


def video_key(video_id: str) -> int:
    """The number of a video in every index: 63 bits of a hash of its id."""
    return int.from_bytes(hashlib.sha256(video_id.encode()).digest()[:8], "big") >> 1


def moment_ids(keys: Int64, counts: NDArray[np.integer]) -> Int64:
    """(sum of counts,) ids of the moments of some videos, in order: 63 bits of the video's key and the moment's number,
    mixed by the finaliser of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).

    Args:
        keys: (V,) of the videos.
        counts: (V,) how many moments each has.
    """
    ends = np.cumsum(counts)
    numbers = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)
    with np.errstate(over="ignore"):  # modulo 2**64 is meant
        mixed = np.repeat(keys, counts).astype(np.uint64) + (numbers.astype(np.uint64) + np.uint64(1)) * STEP
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    ids: Int64 = ((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(1)).astype(np.int64)
    return ids


class IdMap:
    """From ids of an index to the videos whose moments they are.

    Args:
        keys: (V,) of the videos.
        counts: (V,) moments of each.
        ids, videos: (M,) ids in ascending order, and the number (0 to V - 1) of the video of each.

    Raises:
        ValueError: They do not fit each other.
    """

    def __init__(self, keys: Int64, counts: Int32, ids: Int64, videos: Int32) -> None:
        if len(keys) != len(counts) or len(ids) != len(videos) or (len(counts) and counts.min() < 1):
            raise ValueError("columns of an id map do not fit each other")
        if np.any(ids[1:] <= ids[:-1]):
            raise ValueError("ids are not sorted and unique")
        if len(ids) != counts.sum(dtype=np.int64) or not np.array_equal(
            np.bincount(videos, minlength=len(keys)), counts
        ):
            raise ValueError("moments are missing")
        self.keys, self.counts, self.ids, self.videos = keys, counts, ids, videos

    @classmethod
    def of(cls, keys: Int64, counts: Int32) -> IdMap:
        """The map of some videos.

        Raises:
            ValueError: Two moments have one id, which is less likely than a bit flipped by chance.
        """
        ids = moment_ids(keys, counts)
        order = np.argsort(ids, kind="stable")
        videos = np.repeat(np.arange(len(keys), dtype=np.int32), counts)
        return cls(keys, counts, ids[order], videos[order])

    def __len__(self) -> int:
        return len(self.ids)

    def videos_of(self, ids: Int64) -> Int32:
        """(n,) numbers of the videos of some ids.

        Raises:
            IntegrityError: An id is not of this index.
        """
        at = np.minimum(np.searchsorted(self.ids, ids), max(len(self.ids) - 1, 0))
        if len(ids) and (len(self.ids) == 0 or not np.array_equal(self.ids[at], ids)):
            raise IntegrityError(
                "the index holds an id that the list beside it does not", "Run 'fineco index --force'."
            )
        return self.videos[at]

    def ids_of(self, videos: NDArray[np.integer]) -> Int64:
        """Ids of all moments of some videos."""
        return moment_ids(self.keys[videos], self.counts[videos])
