"""What lies in an HDF5 file of each kind: the columns with their types, and how a video's part of each is found."""

from __future__ import annotations

from collections.abc import Mapping

SCHEMA_VERSION = 2
MOMENTS_SCHEMA_VERSION = 3  # of what has moments: embeddings, and the lookup of an index
ID_BYTES = 128  # a manifest's longest id
CONTENT_BYTES = 32
ROW_DIGEST_BYTES = 16
KIND_DTYPE = "S16"  # of a shard's attribute

# name -> (dtype, rank). Lengths: V videos, M rows of all of them, D dimensions; offsets have V + 1 entries.
Schema = Mapping[str, tuple[str, int]]

VIDEOS: dict[str, tuple[str, int]] = {
    "video_ids": (f"S{ID_BYTES}", 1),
    "contents": (f"S{CONTENT_BYTES}", 1),
    "offsets": ("<i8", 1),
    "pts_seconds": ("<f8", 1),
    "span_seconds": ("<f8", 1),
    "duration_seconds": ("<f8", 1),
    "row_digests": ("|u1", 2),
}
# How a video's part of a dataset is found: by its row, by its frames' rows, or not at all.
BY_VIDEO = ("video_ids", "contents", "span_seconds", "duration_seconds", "vectors", "n_frames", "selectors")
BY_FRAME = ("pts_seconds", "features", "scores")
BY_MOMENT = ("moment_vectors", "moment_starts", "moment_ends", "moment_frames")
FRAMES: Schema = {**VIDEOS, "jpeg": ("|u1", 1), "jpeg_offsets": ("<i8", 1)}
FEATURES: Schema = {**VIDEOS, "features": ("<f2", 2)}
EMBEDDINGS: Schema = {
    **VIDEOS,
    "features": ("<f2", 2),
    "scores": ("<f4", 1),
    "vectors": ("<f4", 2),
    "n_frames": ("<i8", 1),
    "selectors": ("S16", 1),
    "moment_offsets": ("<i8", 1),
    "moment_vectors": ("<f2", 2),
    "moment_starts": ("<f8", 1),
    "moment_ends": ("<f8", 1),
    "moment_frames": ("<i8", 1),
}

# Columns that are small beside what they are about: read as a whole when a shard is opened.
SMALL = frozenset(BY_VIDEO) - {"vectors"} | {"offsets", "row_digests", "jpeg_offsets", "moment_offsets"}
