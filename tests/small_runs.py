"""Whole commands on a few tiny videos with the fake encoder: what the tests of runs share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from fakes import FakeEncoder
from indexes.generations import current_generation
from models.base import Encoder
from pipeline import commands, store
from pipeline.collection import Collection
from pipeline.commands import Machine, Sources
from pipeline.commits import EMBEDDINGS, FEATURES
from pipeline.config import EmbedOptions, SelectOptions
from pipeline.run import Summary
from pipeline.sampling import Sampling
from pipeline.types import FrameFeatures, VideoEmbedding
from pipeline.verify import verify_collection
from videos import encode_video

FPS5 = EmbedOptions(sampling=Sampling("fps", 5.0))
HALF = SelectOptions("caption", "0.5")
LENGTHS = (30, 45, 60, 75)  # frames at 30 frames/s: 5, 8, 10 and 13 samples
CAPTIONS = {1: "a red block on a hill", 3: "two blue birds"}  # number of the clip -> the text beside it


def ignore(line: str) -> None:
    """Where notes go that a test does not look at."""


def machine(say: Callable[[str], None] = ignore, workers: int = 1) -> Machine:
    """Few processes, small batches, no output."""
    return Machine(workers=workers, batch_size=8, quiet=True, say=say)


def make_clip(path: Path, number: int) -> Path:
    """A clip unlike every other number's, of its own length."""
    return encode_video(
        path, n_frames=LENGTHS[number % len(LENGTHS)] + number // len(LENGTHS), size=(64 + 2 * number, 48)
    )


def make_videos(folder: Path, n: int = len(LENGTHS)) -> Path:
    """`clip0.mp4` and so on, two of them with a text beside."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(n):
        make_clip(folder / f"clip{number}.mp4", number)
        if number in CAPTIONS:
            (folder / f"clip{number}.txt").write_text(CAPTIONS[number] + "\n", "utf-8")
    return folder


def run(
    collection: Path, videos: Path | Sources, encoder: Encoder | None = None, select: SelectOptions = HALF, **more: Any
) -> Summary:
    """`fineco run` at 5 frames a second."""
    sources = videos if isinstance(videos, Sources) else Sources([str(videos)])
    options = {"machine": machine(), "embed": FPS5, **more}
    return commands.run(collection, sources, select=select, encoder=encoder or FakeEncoder(), **options)


def checked(collection: Path) -> dict[str, Any]:
    """What `fineco verify` says of a collection without a problem."""
    content = verify_collection(collection)
    assert content["problems"] == []
    return content


def features_of(collection: Path) -> dict[str, FrameFeatures]:
    """The latest features of every video, by the path where it was last found."""
    return _latest(collection, FEATURES, store.FeaturesShard, "features")


def embeddings_of(collection: Path, selection: str | None = None) -> dict[str, VideoEmbedding]:
    """The latest embedding of every video in a selection (the one in use unless named), by path."""
    kind = f"{EMBEDDINGS}/{selection or Collection(collection).current_selection()}"
    return _latest(collection, kind, store.EmbeddingsShard, "embedding")


def _latest(collection: Path, kind: str, shard_type: Any, read: str) -> dict[str, Any]:
    state = Collection(collection).state()
    found = {}
    for video_id in state.paths.keys() & state.places.get(kind, {}).keys():
        place = state.places[kind][video_id]
        with shard_type(collection / kind / f"{place.commit:06d}.h5") as shard:
            found[state.paths[video_id]] = getattr(shard, read)(shard.video_ids.index(video_id))
    return found


def commits(collection: Path) -> list[tuple[str, list[str]]]:
    """Stage and names of the files' kinds of every commit."""
    return [(c.stage, sorted(name.rpartition("/")[0] for name in c.files)) for c in Collection(collection).commits()]


def make_everything(folder: Path) -> Path:
    """A collection in `folder` with every kind of file: frames, features, two selections, several commits, an index."""
    videos, collection = make_videos(folder / "videos"), folder / "kitchen"
    (videos / "broken.mp4").write_bytes(b"no video" * 50)
    sources = Sources([str(videos)])
    commands.decode(collection, sources, FPS5, machine())
    with mock.patch("pipeline.run.SHARD_VIDEOS", 3):
        commands.run(collection, sources, FPS5, SelectOptions("uniform", "3"), machine(), encoder=FakeEncoder())
    commands.select(collection, HALF, machine(), encoder=FakeEncoder())
    commands.index(collection, machine=machine())
    return collection


def files_in_use(collection: Path) -> list[str]:
    """Relative names of all files of a collection but the lock and what belongs to earlier generations of its index."""
    current = current_generation(collection / "index").name
    names = sorted(p.relative_to(collection).as_posix() for p in collection.rglob("*") if p.is_file())
    return [n for n in names if n != ".lock" and (not n.startswith("index/0") or n.startswith(f"index/{current}/"))]
