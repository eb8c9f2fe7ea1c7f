"""Beside the vectors of an index: for each id, which shard and row hold its video, and where the video is."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import IntegrityError
from pipeline.files import FileRecord
from pipeline.store import Array, Schema, Shard, check_offsets, offsets_of, write_shard

LOOKUP_FILE = "videos.h5"
LOOKUP: Schema = {
    "ids": ("<i8", 1),
    "shards": ("<i4", 1),
    "rows": ("<i4", 1),
    "paths": ("|u1", 1),
    "path_offsets": ("<i8", 1),
}


def index_id(video_id: str) -> int:
    """The 64-bit id of a video in an index: 63 bits of a hash, the same in every collection."""
    return int.from_bytes(hashlib.sha256(video_id.encode()).digest()[:8], "big") >> 1


class Lookup(Shard):
    """For each id of an index: which shard and row hold its video, and its path. Sorted by id."""

    kind, schema = "lookup", LOOKUP

    def _read_videos(self) -> None:
        self.ids: NDArray[np.int64] = self._datasets["ids"][:]
        if np.any(self.ids[1:] <= self.ids[:-1]):
            raise ValueError("ids are not sorted and unique")
        self._check_length(len(self.ids), "shards", "rows")
        self._check_length(len(self.ids) + 1, "path_offsets")
        self._path_offsets: NDArray[np.int64] = self._datasets["path_offsets"][:]
        check_offsets("path_offsets", self._path_offsets, len(self._datasets["paths"]))

    def __len__(self) -> int:
        return len(self.ids)

    def find(self, identifier: int) -> tuple[int, int, str]:
        """(shard number, row, path) of an id.

        Raises:
            IntegrityError: The index holds an id that this file does not.
        """
        at = int(np.searchsorted(self.ids, identifier))
        if at == len(self.ids) or self.ids[at] != identifier:
            raise IntegrityError(f"{self.path}: no id {identifier}, which the index holds", "Run 'fineco index'.")
        start, stop = self._path_offsets[at : at + 2].tolist()
        path = bytes(self._datasets["paths"][start:stop]).decode("utf-8", "surrogateescape")
        return int(self._datasets["shards"][at]), int(self._datasets["rows"][at]), path

    def places(self) -> dict[int, list[tuple[int, int]]]:
        """Shard number -> (row, id) of every video in it."""
        found: dict[int, list[tuple[int, int]]] = {}
        columns = (self._datasets["shards"][:].tolist(), self._datasets["rows"][:].tolist(), self.ids.tolist())
        for number, row, identifier in zip(*columns, strict=True):
            found.setdefault(number, []).append((row, identifier))
        return found


def write_lookup(path: Path, rows: Sequence[tuple[int, int, int, str]]) -> FileRecord:
    """Writes (id, shard number, row, path) of every video of an index."""
    ordered = sorted(rows)
    paths = [row[3].encode("utf-8", "surrogateescape") for row in ordered]
    arrays: dict[str, Array] = {
        "ids": np.array([row[0] for row in ordered], np.int64),
        "shards": np.array([row[1] for row in ordered], np.int32),
        "rows": np.array([row[2] for row in ordered], np.int32),
        "paths": np.frombuffer(b"".join(paths), np.uint8),
        "path_offsets": offsets_of([len(p) for p in paths]),
    }
    return write_shard(path, "lookup", LOOKUP, arrays)
