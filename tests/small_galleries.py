"""Collections of videos that were never decoded: kept frames, moments and shards are as a test wants them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fakes import FakeEncoder
from pipeline import store
from pipeline.collection import Collection, Snapshot
from pipeline.commits import EMBEDDINGS, Row
from pipeline.gallery import Gallery
from pipeline.moments import pool, pool_groups
from pipeline.store import StoredVideo
from pipeline.types import Float32, Moments, Outcome, TimedText, VideoEmbedding

SELECTION = "all"
DIM = FakeEncoder().spec.dim


def unit(rows: Any) -> Float32:
    rows_of_one: Float32 = (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)
    return rows_of_one


@dataclass(frozen=True)
class SmallVideo:
    """A video: its kept frames (K, D), one a second, how many of them each moment has, and the texts beside it."""

    video_id: str
    frames: Float32
    moment_lengths: tuple[int, ...]
    texts: tuple[str, ...] = ()

    def embedding(self) -> VideoEmbedding:
        """What the store has of it, but for the rounding of moments' vectors."""
        h, n = store.round_features(self.frames), len(self.frames)
        s = np.linspace(0, 0.5, n, dtype=np.float32)
        starts = np.cumsum([0, *self.moment_lengths])[:-1]
        ends = np.cumsum(self.moment_lengths)
        moments = Moments(
            pool_groups(h, s, starts), starts.astype(float), ends.astype(float), np.array(self.moment_lengths, np.int64)
        )
        return VideoEmbedding(self.video_id, pool(h, s), h, moments, np.arange(float(n)), s, 1.0, n, SELECTION)


def random_video(number: int, most_frames: int = 12, texts: tuple[str, ...] = ()) -> SmallVideo:
    """Without any structure; a video is the same whichever others there are."""
    rng = np.random.default_rng(number)
    n_frames = int(rng.integers(1, most_frames + 1))
    cuts = np.flatnonzero(rng.random(n_frames - 1) < 0.4) + 1
    lengths = np.diff([0, *cuts.tolist(), n_frames]).tolist()
    return SmallVideo(f"clip-{number}", unit(rng.standard_normal((n_frames, DIM))), tuple(lengths), texts)


def path_of(folder: Path, video_id: str) -> Path:
    """Where the file of a video lies; one for the whole test, so that two collections may have the same videos."""
    return folder.parent / "videos" / f"{video_id}.mp4"


def row_of(folder: Path, video: SmallVideo, status: Any = "ok", stage: str = "run") -> Row:
    """Its row in a commit."""
    texts = tuple(TimedText(text) for text in video.texts)
    outcome = Outcome(video.video_id, str(path_of(folder, video.video_id)), status, stage)
    return Row(outcome, f"{hash_of(video):032x}", 1, 2, 3, float(len(video.frames)), texts)


def hash_of(video: SmallVideo) -> int:
    """In the place of its content's digest."""
    return int.from_bytes(video.video_id.encode()[:12].ljust(12), "big")


def add(folder: Path, videos: Sequence[SmallVideo], selection: str = SELECTION) -> None:
    """A commit of one shard with these videos, whose files are there, though empty."""
    stored = [(StoredVideo(v.video_id, f"{hash_of(v):032x}", float(len(v.frames))), v.embedding()) for v in videos]
    for video in videos:
        path_of(folder, video.video_id).parent.mkdir(exist_ok=True)
        path_of(folder, video.video_id).touch()
    collection = Collection(folder)
    collection.use_selection(selection, {"selector": selection, "keep": "1.0", "topics": []})
    with collection.writing("test") as writer:
        write = (f"{EMBEDDINGS}/{selection}", lambda path: store.write_embeddings(path, stored))
        writer.commit("run", [row_of(folder, video) for video in videos], [write])


def remove(folder: Path, *videos: SmallVideo) -> None:
    """A commit that says that the files of these videos are gone, as they are then."""
    with Collection(folder).writing("test") as writer:
        for video in videos:
            path_of(folder, video.video_id).unlink()
        writer.commit("index", [row_of(folder, video, "removed", "index") for video in videos], [])


def make_collection(folder: Path, *shards: Sequence[SmallVideo]) -> Collection:
    """A collection of the fake encoder with a shard for each of some lists of videos."""
    collection, spec = Collection.create(folder, {"model": "fake"}), FakeEncoder().spec
    record = {"name": spec.name, "fingerprint": spec.fingerprint, "precision": "fp32", "spec": asdict(spec)}
    collection.update({"model": "fake", "precision": "fp32"}, record)
    for videos in shards:
        add(folder, videos)
    return Collection(folder)


def gallery_of(folder: Path, selection: str = SELECTION) -> Gallery:
    """What an index would be built of."""
    return Gallery(Snapshot(Collection(folder)), selection)
