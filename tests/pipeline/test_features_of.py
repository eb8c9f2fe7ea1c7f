"""Features of another collection as the input of a head: `--features-of`."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fakes import FakeEncoder
from pipeline import commands
from pipeline.collection import Collection
from pipeline.commands import Sources
from pipeline.config import EmbedOptions
from pipeline.errors import UsageError
from pipeline.sampling import Sampling
from pipeline.types import Float32, UInt8
from small_runs import FPS5, checked, embeddings_of, features_of, machine, make_clip, make_videos, run


class FakeHead:
    """A video encoder over the fake one: every row leans towards the mean of its video."""

    device, precision = "cpu", "fp32"

    def __init__(self, base: FakeEncoder | None = None, nan: bool = False) -> None:
        self.base = base or FakeEncoder()
        self.spec = FakeEncoder(seed=99).spec
        self.frames_seen = 0
        self._nan = nan

    def encode_frames(self, frames: UInt8) -> Float32:
        self.frames_seen += len(frames)
        return self.base.encode_frames(frames)

    def encode_video(self, features: Float32) -> Float32:
        rows = features + features.mean(axis=0)
        unit: Float32 = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
        return unit * np.float32(np.nan) if self._nan else unit

    def encode_text(self, texts: Sequence[str]) -> Float32:
        return self.base.encode_text(texts)

    def score_pairs(self, texts: Sequence[str], clips: Sequence[Float32]) -> Float32:
        raise NotImplementedError


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_videos(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, videos: Path) -> Path:
    collection = tmp_path_factory.mktemp("base") / "c"
    run(collection, videos)
    return collection


def test_stored_features_give_what_decoding_gives(tmp_path: Path, videos: Path, base: Path) -> None:
    decoded, stored = FakeHead(), FakeHead()
    run(tmp_path / "decoded", videos, decoded)
    summary = run(tmp_path / "stored", Sources(features_of=base), stored, embed=EmbedOptions())
    assert decoded.frames_seen > 0 and stored.frames_seen == 0
    assert summary.n_ok == len(features_of(base))
    assert checked(tmp_path / "stored")["digest"] == checked(tmp_path / "decoded")["digest"]
    # the texts came along
    assert {e.selector for e in embeddings_of(tmp_path / "stored").values()} == {"caption", "uniform"}


def test_a_video_that_the_other_collection_lacks_is_decoded(tmp_path: Path, videos: Path, base: Path) -> None:
    more = tmp_path / "more"
    shutil.copytree(videos, more)
    make_clip(more / "new.mp4", 9)
    head = FakeHead()
    summary = run(tmp_path / "c", Sources([str(more)], features_of=base), head, embed=EmbedOptions())
    assert summary.n_ok == len(features_of(base)) + 1
    assert head.frames_seen > 0
    run(tmp_path / "all", more, FakeHead())
    assert checked(tmp_path / "c")["digest"] == checked(tmp_path / "all")["digest"]


def test_it_does_nothing_the_second_time(tmp_path: Path, base: Path) -> None:
    sources: dict[str, Any] = {"videos": Sources(features_of=base), "embed": EmbedOptions()}
    run(tmp_path / "c", encoder=FakeHead(), **sources)
    assert run(tmp_path / "c", encoder=FakeHead(), **sources).n_ok == 0


def test_vectors_that_are_not_finite_fail_their_video(tmp_path: Path, base: Path) -> None:
    summary = run(tmp_path / "c", Sources(features_of=base), FakeHead(nan=True), embed=EmbedOptions())
    assert summary.codes == {"non_finite": len(features_of(base))}


@pytest.mark.parametrize(
    ("encoder", "options", "message"),
    [
        (FakeEncoder(), EmbedOptions(), "not built on another encoder"),
        (FakeHead(FakeEncoder(seed=5)), EmbedOptions(), "is built on fake"),
        (FakeHead(), EmbedOptions(Sampling("fps", 2.0)), "sampling: .* was made with"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_made(
    tmp_path: Path, base: Path, encoder: Any, options: EmbedOptions, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        commands.run(tmp_path / "c", Sources(features_of=base), options, machine=machine(), encoder=encoder)
    assert not (tmp_path / "c").exists()


def test_the_sampling_is_taken_over(tmp_path: Path, base: Path) -> None:
    run(tmp_path / "c", Sources(features_of=base), FakeHead(), embed=EmbedOptions())
    assert Collection(tmp_path / "c").config["sampling"] == {"mode": "fps", "value": 5.0}
    assert FPS5.sampling == Sampling("fps", 5.0)
