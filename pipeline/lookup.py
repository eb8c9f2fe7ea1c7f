"""Beside the vectors of an index: which video each moment is of, where the videos are, and what is common in them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from indexes.id_map import IdMap
from pipeline.files import FileRecord
from pipeline.rescore import Background
from pipeline.schema import MOMENTS_SCHEMA_VERSION, Schema
from pipeline.store import Array, Shard, check_offsets, offsets_of, write_shard
from pipeline.types import Float32, Int64

if TYPE_CHECKING:  # a search reads without what an index is built of
    from pipeline.gallery import Gallery

LOOKUP_FILE = "videos.h5"
LOOKUP: Schema = {
    "keys": ("<i8", 1),
    "counts": ("<i4", 1),
    "places": ("<i8", 2),
    "paths": ("|u1", 1),
    "path_offsets": ("<i8", 1),
    "moment_ids": ("<i8", 1),
    "moment_videos": ("<i4", 1),
    "frame_mean": ("<f4", 1),
    "unrelated": ("<f4", 1),
}


class Lookup(Shard):
    """What an index says of its videos, which are numbered by ascending key.

    Attributes:
        id_map: From the ids of the index to the videos.
        background: What a query scores where nothing matches.
    """

    kind, schema, version = "lookup", LOOKUP, MOMENTS_SCHEMA_VERSION

    def _read_videos(self) -> None:
        get = self._datasets
        self.id_map = IdMap(*(get[name][:] for name in ("keys", "counts", "moment_ids", "moment_videos")))
        if np.any(self.id_map.keys[1:] <= self.id_map.keys[:-1]):
            raise ValueError("keys are not sorted and unique")
        self._places: Int64 = get["places"][:]
        self._path_offsets: Int64 = get["path_offsets"][:]
        if self._places.shape != (len(self), 2) or len(self._path_offsets) != len(self) + 1:
            raise ValueError("columns of different lengths")
        check_offsets("path_offsets", self._path_offsets, len(get["paths"]))
        unrelated = get["unrelated"][:].tolist()
        self.background = Background(get["frame_mean"][:], unrelated[0] if unrelated else None)

    def __len__(self) -> int:
        return len(self.id_map.keys)

    def find(self, video: int) -> tuple[int, int, str]:
        """Commit, row and path of a video by its number."""
        start, stop = self._path_offsets[video : video + 2].tolist()
        path = bytes(self._datasets["paths"][start:stop]).decode("utf-8", "surrogateescape")
        return *self.place(video), path

    def place(self, video: int) -> tuple[int, int]:
        """Commit and row of a video by its number."""
        number, row = self._places[video].tolist()
        return number, row

    def places(self) -> dict[int, list[tuple[int, int]]]:
        """Commit -> (row, number of the video) of every video in its shard."""
        found: dict[int, list[tuple[int, int]]] = {}
        for video, (number, row) in enumerate(self._places.tolist()):
            found.setdefault(number, []).append((row, video))
        return found


def write_lookup(path: Path, gallery: Gallery, background: Background) -> FileRecord:
    """Writes what `Lookup` reads."""
    paths = [p.encode("utf-8", "surrogateescape") for p in gallery.paths]
    unrelated: list[float] = [] if background.unrelated is None else [background.unrelated]
    frame_mean: Float32 = background.frame_mean
    arrays: dict[str, Array] = {
        "keys": gallery.id_map.keys,
        "counts": gallery.id_map.counts,
        "places": gallery.places,
        "paths": np.frombuffer(b"".join(paths), np.uint8),
        "path_offsets": offsets_of([len(p) for p in paths]),
        "moment_ids": gallery.id_map.ids,
        "moment_videos": gallery.id_map.videos,
        "frame_mean": frame_mean,
        "unrelated": np.array(unrelated, np.float32),
    }
    return write_shard(path, "lookup", LOOKUP, arrays, MOMENTS_SCHEMA_VERSION)
