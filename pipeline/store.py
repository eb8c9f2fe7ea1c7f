"""HDF5 shards: the one home of h5py.

A shard is written once and never changed: built in memory, then written as bytes through `files.write_file` (temporary
name, fsync, rename). So a full disk is an ordinary error; HDF5 itself left zeros and crashed at exit. Datasets
are contiguous, ragged rows lie end to end with offsets. The reader trusts nothing: fixed names, hard links only, no
external or virtual storage, expected types and ranks, and no more bytes than the file has. Each video's rows carry a
digest of their own, checked whenever they are read: a search reads a few videos out of many shards and cannot wait for
the digests of whole files.

    frames/N.h5                  what `decode` leaves: the sampled frames as JPEG
    features/N.h5                what `embed` leaves: features of every sampled frame, float16
    embeddings/SELECTION/N.h5    what `select` leaves: kept frames, their scores and moments, the pooled vector
    index/GENERATION/videos.h5   what `index` leaves beside the vectors (pipeline.lookup)
    index/GENERATION/texts.h5    the texts that it was measured with (pipeline.text_vectors)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, TypeVar

import h5py
import numpy as np
from numpy.typing import NDArray

from pipeline.errors import IntegrityError
from pipeline.files import FileRecord, write_bytes
from pipeline.schema import (
    BY_FRAME,
    BY_MOMENT,
    BY_VIDEO,
    CONTENT_BYTES,
    EMBEDDINGS,
    FEATURES,
    FRAMES,
    ID_BYTES,
    KIND_DTYPE,
    MOMENTS_SCHEMA_VERSION,
    ROW_DIGEST_BYTES,
    SCHEMA_VERSION,
    SMALL,
    Schema,
)
from pipeline.types import Float32, Float64, FrameFeatures, Int64, Moments, UInt8, VideoEmbedding, check_times

Array = NDArray[Any]
Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class StoredVideo:
    """What every shard says of a video besides its rows."""

    video_id: str
    content: str
    duration_seconds: float


@dataclass(frozen=True, slots=True, repr=False)
class StoredFrames:
    """Sampled frames of one video as JPEGs, with their times and what one of them covers."""

    video: StoredVideo
    jpegs: Sequence[bytes]
    pts_seconds: Float64
    span_seconds: float


def round_features(features: Float32) -> Float32:
    """What the store keeps of (N, D) unit rows: float16, read back as float32. Selection runs on these, so that a
    selection made while streaming and one made later from the files are the same."""
    return features.astype(np.float16).astype(np.float32)


# ------------------------------------------------------------------------------------------------------- writing


def write_shard(
    path: Path, kind: str, schema: Schema, arrays: Mapping[str, Array], version: int = SCHEMA_VERSION
) -> FileRecord:
    """Writes arrays as one file of a kind and version, whole or absent.

    Raises:
        FinecoError: The disk refuses; nothing is left under the name.
    """
    columns = {n: np.ascontiguousarray(arrays[n], dtype=t) for n, (t, _) in schema.items() if n != "row_digests"}
    if "row_digests" in schema:
        columns["row_digests"] = _row_digests(kind, columns)
    with h5py.File(path.name, "w", driver="core", backing_store=False, libver="v110", track_order=True) as file:
        file.attrs.create("kind", kind.encode(), dtype=KIND_DTYPE)
        file.attrs.create("schema", version, dtype="<i8")
        for name in schema:
            file.create_dataset(name, data=columns[name], track_times=False)
        file.flush()
        image = file.id.get_file_image()
    return write_bytes(path, image)


def _pieces_of(row: int, columns: Mapping[str, Any], offsets: NDArray[np.int64]) -> dict[str, Array]:
    """A video's part of every column (arrays, or datasets of an open file), in the order of the schema."""
    where = slice(int(offsets[row]), int(offsets[row + 1]))
    pieces = {}
    for name, column in columns.items():
        if name in BY_VIDEO:
            pieces[name] = np.asarray(column[row : row + 1])
        elif name in BY_FRAME:
            pieces[name] = np.asarray(column[where])
        elif name == "jpeg_offsets":
            ends = np.asarray(column[where.start : where.stop + 1])
            pieces["jpeg"] = np.asarray(columns["jpeg"][int(ends[0]) : int(ends[-1])])
            pieces[name] = ends - ends[0]
        elif name == "moment_offsets":
            first, end = np.asarray(column[row : row + 2]).tolist()
            pieces |= {moments: np.asarray(columns[moments][first:end]) for moments in BY_MOMENT}
    return pieces


def _digest_of(kind: str, pieces: Mapping[str, Array]) -> bytes:
    """What a video's rows hold, in 16 bytes: the same wherever the rows lie, and in whichever file."""
    digest = hashlib.blake2b(kind.encode(), digest_size=ROW_DIGEST_BYTES)
    for name, piece in pieces.items():
        digest.update(f" {name} {len(piece)} ".encode())
        digest.update(np.ascontiguousarray(piece).data.cast("B") if piece.size else b"")
    return digest.digest()


def _row_digests(kind: str, columns: Mapping[str, Array]) -> UInt8:
    """(V, 16) digests of the rows of every video."""
    offsets = columns["offsets"]
    digests = [_digest_of(kind, _pieces_of(row, columns, offsets)) for row in range(len(offsets) - 1)]
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, ROW_DIGEST_BYTES)


def _video_arrays(videos: Sequence[StoredVideo], times: Sequence[Float64], spans: Sequence[float]) -> dict[str, Array]:
    return {
        "video_ids": np.array([v.video_id.encode() for v in videos], dtype=f"S{ID_BYTES}"),
        "contents": np.array([v.content.encode() for v in videos], dtype=f"S{CONTENT_BYTES}"),
        "offsets": offsets_of([len(t) for t in times]),
        "pts_seconds": np.concatenate([np.asarray(t, np.float64) for t in times]),
        "span_seconds": np.array(spans, np.float64),
        "duration_seconds": np.array([v.duration_seconds for v in videos], np.float64),
    }


def offsets_of(lengths: Sequence[int]) -> NDArray[np.int64]:
    """Where each of some pieces begins when they lie end to end, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def write_frames(path: Path, rows: Sequence[StoredFrames]) -> FileRecord:
    """Writes the frames of one or more videos."""
    jpegs = [jpeg for row in rows for jpeg in row.jpegs]
    arrays = _video_arrays([r.video for r in rows], [r.pts_seconds for r in rows], [r.span_seconds for r in rows])
    arrays["jpeg"] = np.frombuffer(b"".join(jpegs), np.uint8)
    arrays["jpeg_offsets"] = offsets_of([len(jpeg) for jpeg in jpegs])
    return write_shard(path, "frames", FRAMES, arrays)


def write_features(path: Path, rows: Sequence[tuple[StoredVideo, FrameFeatures]]) -> FileRecord:
    """Writes the features of one or more videos."""
    features = [f for _, f in rows]
    arrays = _video_arrays([v for v, _ in rows], [f.pts_seconds for f in features], [f.span_seconds for f in features])
    arrays["features"] = np.concatenate([f.features for f in features], dtype=np.float16, casting="same_kind")
    return write_shard(path, "features", FEATURES, arrays)


def write_embeddings(path: Path, rows: Sequence[tuple[StoredVideo, VideoEmbedding]]) -> FileRecord:
    """Writes the selection and the pooled vector of one or more videos."""
    embeddings = [e for _, e in rows]
    arrays = _video_arrays(
        [v for v, _ in rows], [e.pts_seconds for e in embeddings], [e.span_seconds for e in embeddings]
    )
    arrays["features"] = np.concatenate([e.features for e in embeddings], dtype=np.float16, casting="same_kind")
    arrays["scores"] = np.concatenate([e.scores for e in embeddings])
    arrays["vectors"] = np.stack([e.vector for e in embeddings])
    arrays["n_frames"] = np.array([e.n_frames for e in embeddings], np.int64)
    arrays["selectors"] = np.array([e.selector.encode() for e in embeddings], "S16")
    moments = [e.moments for e in embeddings]
    arrays["moment_offsets"] = offsets_of([len(m) for m in moments])
    arrays["moment_vectors"] = np.concatenate([m.vectors for m in moments], dtype=np.float16, casting="same_kind")
    arrays["moment_starts"] = np.concatenate([m.start_seconds for m in moments])
    arrays["moment_ends"] = np.concatenate([m.end_seconds for m in moments])
    arrays["moment_frames"] = np.concatenate([m.n_frames for m in moments])
    return write_shard(path, "embeddings", EMBEDDINGS, arrays, MOMENTS_SCHEMA_VERSION)


def copy_rows(path: Path, rows: Sequence[Rows]) -> FileRecord:
    """Writes rows that `Shard.rows` read, out of one or more shards of one kind, as they are."""
    kind = rows[0].kind
    arrays: dict[str, Array] = {"offsets": offsets_of([len(r.pieces["pts_seconds"]) for r in rows])}
    for name in rows[0].pieces:
        arrays[name] = np.concatenate([r.pieces[name] for r in rows])
    if "jpeg_offsets" in arrays:
        arrays["jpeg_offsets"] = offsets_of(np.concatenate([np.diff(r.pieces["jpeg_offsets"]) for r in rows]).tolist())
    if "moment_frames" in arrays:
        arrays["moment_offsets"] = offsets_of([len(r.pieces["moment_frames"]) for r in rows])
    return write_shard(path, kind, _TYPES[kind].schema, arrays, _TYPES[kind].version)


# ------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True, slots=True, repr=False)
class Rows:
    """What a shard of some kind holds of one video: its part of every column."""

    kind: str
    pieces: dict[str, Array]

    @property
    def n_bytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces.values())


class Shard:
    """A shard opened for reading; use as a context manager.

    Args:
        whole: Read everything at once (a shard is some 64 MiB), for who looks at every row.

    Raises:
        IntegrityError: The file is not what its kind prescribes. Its digest is for the caller to check.
    """

    kind: ClassVar[str]
    schema: ClassVar[Schema]
    version: ClassVar[int] = SCHEMA_VERSION

    def __init__(self, path: Path, whole: bool = False) -> None:
        self.path = path
        try:
            self._file = h5py.File(path, "r", locking=False)
        except OSError as error:
            raise IntegrityError(f"{path}: not a readable HDF5 file ({error})", "Run 'fineco verify'.") from error
        try:
            self._datasets = self._check()
            self._read_videos()
            if whole:
                self._datasets = {name: dataset[:] for name, dataset in self._datasets.items()}
        except (KeyError, ValueError, TypeError, OSError, RuntimeError) as error:  # h5py raises any of them
            self._file.close()
            raise IntegrityError(f"{path}: {error}", "Run 'fineco verify' on the collection.") from error
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def _check(self) -> dict[str, Any]:
        """The datasets by name, after everything about them that could be a lie or a trap was looked at."""
        if (self._attribute("kind", KIND_DTYPE), self._attribute("schema", "<i8")) != (
            self.kind.encode(),
            self.version,
        ):
            raise ValueError(f"not a {self.kind} shard of schema {self.version}")
        size = self.path.stat().st_size
        datasets = {}
        for name, (dtype, rank) in self.schema.items():
            if not isinstance(self._file.get(name, getlink=True), h5py.HardLink):
                raise ValueError(f"{name} is missing or a link to elsewhere")
            dataset = self._file[name]
            if not isinstance(dataset, h5py.Dataset) or dataset.is_virtual or dataset.external is not None:
                raise ValueError(f"{name} is not a plain dataset")
            if dataset.chunks is not None or dataset.dtype != np.dtype(dtype) or dataset.ndim != rank:
                raise ValueError(f"{name} is {dataset.dtype} of rank {dataset.ndim}, expected {dtype} of rank {rank}")
            if dataset.size * dataset.dtype.itemsize > size:
                raise ValueError(f"{name} claims {dataset.shape}, more than the file holds")
            datasets[name] = dataset
        return datasets

    def _attribute(self, name: str, dtype: str) -> object:
        """An attribute's value. Its type is looked at before it is read: texts of any length lie in a heap, and one
        flipped bit in that made libhdf5 2.0 read it for ever."""
        attribute = h5py.h5a.open(self._file.id, name.encode())
        if attribute.dtype != np.dtype(dtype) or attribute.shape != ():
            raise ValueError(f"its attribute {name} is {attribute.dtype}")
        return self._file.attrs[name]

    def _read_videos(self) -> None:
        """Reads what is small, and checks that lengths and offsets fit each other."""
        get = self._datasets
        for name in [name for name in get if name in SMALL]:
            get[name] = get[name][:]  # once, and not again for every video: a read costs more than the bytes
        self.offsets: NDArray[np.int64] = get["offsets"]
        n_videos = len(self.offsets) - 1
        self.video_ids = [x.decode("ascii") for x in get["video_ids"].tolist()]
        self.contents = [x.decode("ascii") for x in get["contents"].tolist()]
        self.spans: Float64 = get["span_seconds"]
        self.durations: Float64 = get["duration_seconds"]
        self._row_digests: UInt8 = get["row_digests"]
        columns = (self.video_ids, self.contents, self.spans, self.durations, self._row_digests)
        if {len(x) for x in columns} != {n_videos} or self._row_digests.shape[1] != ROW_DIGEST_BYTES:
            raise ValueError("columns of different lengths")
        check_offsets("offsets", self.offsets, len(get["pts_seconds"]))
        self._check_lengths()

    def _check_lengths(self) -> None:
        """Checks that what only some kinds of shard have is as long as the rest."""

    def _check_length(self, expected: int, *names: str) -> None:
        for name in names:
            if len(self._datasets[name]) != expected:
                raise ValueError(f"{name} has {len(self._datasets[name])} rows, expected {expected}")

    def __len__(self) -> int:
        return len(self.video_ids)

    def video(self, row: int) -> StoredVideo:
        """Identity and length of the video in a row."""
        return StoredVideo(self.video_ids[row], self.contents[row], float(self.durations[row]))

    def check_row(self, row: int) -> None:
        """Raises IntegrityError unless a video's rows are as they were written; kinds add what is sound."""
        self.rows(row)

    def rows(self, row: int) -> Rows:
        """What there is of one video as it was written, for `copy_rows`."""
        return self._make(row, lambda pieces: Rows(self.kind, pieces))

    def row_digest(self, row: int) -> bytes:
        """The stored digest of a video's rows: equal for equal content of the same kind."""
        return bytes(self._row_digests[row])

    def _make(self, row: int, make: Callable[[dict[str, Array]], Made]) -> Made:
        """Calls `make` with the video's checked part of every column; what it objects to is damage in this file."""
        try:
            pieces = _pieces_of(row, self._datasets, self.offsets)
            if _digest_of(self.kind, pieces) != self.row_digest(row):
                raise ValueError("its rows changed since they were written (their digest differs)")
            return make(pieces)
        except (ValueError, OSError) as error:
            raise IntegrityError(
                f"{self.path}: video {self.video_ids[row]}: {error}", "Run 'fineco verify' on the collection."
            ) from error


def check_offsets(name: str, offsets: NDArray[np.int64], end: int) -> None:
    """Raises ValueError unless offsets lead from 0 to `end` and never back."""
    falls = np.any(offsets[1:] < offsets[:-1])  # compared, not subtracted: a difference of int64 can overflow
    if len(offsets) < 1 or offsets[0] != 0 or offsets[-1] != end or falls:
        raise ValueError(f"{name} do not fit the rows")


class FramesShard(Shard):
    """Sampled frames as `decode` left them."""

    kind, schema = "frames", FRAMES

    def _check_lengths(self) -> None:
        self._jpeg_offsets: NDArray[np.int64] = self._datasets["jpeg_offsets"]
        check_offsets("jpeg_offsets", self._jpeg_offsets, len(self._datasets["jpeg"]))
        if len(self._jpeg_offsets) != self.offsets[-1] + 1:
            raise ValueError("jpeg_offsets do not fit the frames")

    def check_row(self, row: int) -> None:
        self.frames(row)

    def frames(self, row: int) -> StoredFrames:
        """The frames of one video."""

        def make(pieces: dict[str, Array]) -> StoredFrames:
            check_times("pts_seconds", pieces["pts_seconds"], len(pieces["jpeg_offsets"]) - 1)
            jpegs = [pieces["jpeg"][a:b].tobytes() for a, b in pairwise(pieces["jpeg_offsets"].tolist())]
            return StoredFrames(self.video(row), jpegs, pieces["pts_seconds"], float(self.spans[row]))

        return self._make(row, make)


class FeaturesShard(Shard):
    """Features of every sampled frame."""

    kind, schema = "features", FEATURES

    def _check_lengths(self) -> None:
        self._check_length(int(self.offsets[-1]), "features")

    @property
    def dim(self) -> int:
        """Length of a row of features."""
        return int(self._datasets["features"].shape[1])

    def check_row(self, row: int) -> None:
        self.features(row)

    def features(self, row: int) -> FrameFeatures:
        """The features of one video, float32."""
        return self._make(
            row,
            lambda pieces: FrameFeatures(
                self.video_ids[row],
                pieces["features"].astype(np.float32),
                pieces["pts_seconds"],
                float(self.spans[row]),
            ),
        )


def map_features(path: Path) -> tuple[NDArray[np.float16], Float64]:
    """Features (M, D) and times (M,) of a whole shard, mapped into memory read-only: nothing is read until it is used.

    Datasets are contiguous in the file, so a map of the file holds them as they are.

    Raises:
        IntegrityError: The file is not a features shard.
    """
    with FeaturesShard(path) as shard:
        places = [(d.id.get_offset(), d.shape) for d in (shard._datasets["features"], shard._datasets["pts_seconds"])]
    whole = np.memmap(path, np.uint8, "r")
    (features_at, features_shape), (times_at, times_shape) = places
    features: NDArray[np.float16] = np.ndarray(features_shape, "<f2", whole, features_at)
    pts_seconds: Float64 = np.ndarray(times_shape, "<f8", whole, times_at)
    return features, pts_seconds


class EmbeddingsShard(Shard):
    """Kept frames, moments and pooled vectors of one selection."""

    kind, schema, version = "embeddings", EMBEDDINGS, MOMENTS_SCHEMA_VERSION

    def _check_lengths(self) -> None:
        self._check_length(int(self.offsets[-1]), "features", "scores")
        self._check_length(len(self), "vectors", "n_frames", "selectors")
        self.moment_offsets: Int64 = self._datasets["moment_offsets"]
        self._check_length(len(self) + 1, "moment_offsets")
        check_offsets("moment_offsets", self.moment_offsets, len(self._datasets["moment_frames"]))
        self._check_length(int(self.moment_offsets[-1]), *BY_MOMENT)

    @property
    def dim(self) -> int:
        """Length of a vector and of a row of features."""
        return int(self._datasets["vectors"].shape[1])

    def vectors(self) -> Float32:
        """(V, D) pooled unit vectors. The digest of the whole file is for the caller to check."""
        vectors: Float32 = self._datasets["vectors"][:]
        return vectors

    def moment_vectors(self) -> Float32:
        """(M, D) unit vectors of the moments of all videos: video v has [moment_offsets[v], moment_offsets[v + 1]).
        The digest of the whole file is for the caller to check."""
        vectors: Float32 = self._datasets["moment_vectors"][:].astype(np.float32)
        return vectors

    def kept_features(self, row: int) -> Float32:
        """(K, D) unit rows of the kept frames of one video. The digest of the whole file is for the caller to check."""
        first, end = self.offsets[row : row + 2].tolist()
        features: Float32 = self._datasets["features"][first:end].astype(np.float32)
        return features

    def check_row(self, row: int) -> None:
        self.embedding(row)

    def embedding(self, row: int) -> VideoEmbedding:
        """Everything the store has of one video."""
        return self._make(
            row,
            lambda pieces: VideoEmbedding(
                self.video_ids[row],
                pieces["vectors"][0],
                pieces["features"].astype(np.float32),
                Moments(
                    pieces["moment_vectors"].astype(np.float32),
                    pieces["moment_starts"],
                    pieces["moment_ends"],
                    pieces["moment_frames"],
                ),
                pieces["pts_seconds"],
                pieces["scores"],
                float(self.spans[row]),
                int(pieces["n_frames"][0]),
                pieces["selectors"][0].decode("ascii"),
            ),
        )


_TYPES: dict[str, type[Shard]] = {t.kind: t for t in (FramesShard, FeaturesShard, EmbeddingsShard)}


def open_shard(kind: str, path: Path) -> Any:
    """A shard, read whole, of a kind of data as collections name them: `frames`, `features`, `embeddings/SELECTION`."""
    return _TYPES[kind.partition("/")[0]](path, whole=True)
