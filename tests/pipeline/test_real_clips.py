"""Whole runs over real clips with the built-in encoder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from models.base import Encoder
from pipeline import commands
from pipeline.catalog import content_digest
from pipeline.collection import Collection
from pipeline.commands import Machine, Sources
from pipeline.config import EmbedOptions, SelectOptions
from pipeline.sampling import Sampling
from pipeline.types import FrameFeatures
from small_runs import checked, embeddings_of, features_of, ignore

FPS = 1.0


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    from models.registry import load_encoder

    return load_encoder("builtin", "cpu")


def options(exact_resize: bool = False) -> EmbedOptions:
    return EmbedOptions(sampling=Sampling("fps", FPS), exact_resize=exact_resize)


def machine(workers: int) -> Machine:
    return Machine(workers=workers, quiet=True, say=ignore)


def durations(shared: Path) -> dict[str, float]:
    lines = (shared / "data" / "sources.jsonl").read_text("utf-8").splitlines()
    return {row["video"]: row["duration"] for row in map(json.loads, lines)}


def check_times(features: dict[str, FrameFeatures], seconds: dict[str, float]) -> None:
    """A frame for every second that has begun, each in a second of its own."""
    assert features.keys() == seconds.keys()
    for name, duration in seconds.items():
        times = features[name].pts_seconds
        assert abs(len(times) - duration * FPS) <= 1.01, name
        assert times[0] >= 0 and times[-1] <= duration, name
        assert np.all(np.diff(np.floor(times * FPS)) >= 1), name


def by_name(collection: Path) -> dict[str, FrameFeatures]:
    return {Path(path).name: f for path, f in features_of(collection).items()}


def test_all_clips_whatever_the_number_of_processes(shared: Path, tmp_path: Path, encoder: Encoder) -> None:
    folder = shared / "data" / "videos"
    for workers in (1, 2):
        collection = tmp_path / str(workers)
        half = SelectOptions("uniform", "0.5")
        summary = commands.run(collection, Sources([str(folder)]), options(), half, machine(workers), encoder=encoder)
        assert (summary.n_ok, summary.any_failed) == (33, False)
        content = checked(collection)
        assert (content["videos"], content["indexed"]) == (33, 33)
    assert checked(tmp_path / "1")["digest"] == checked(tmp_path / "2")["digest"]

    paths = Collection(collection).state().paths
    assert paths == {content_digest(str(p), p.stat().st_size): str(p) for p in folder.iterdir()}
    features = by_name(collection)
    check_times(features, durations(shared))
    for name, video in features.items():
        np.testing.assert_allclose(np.linalg.norm(video.features, axis=1), 1, atol=1e-3, err_msg=name)
    for path, embedding in embeddings_of(collection).items():
        np.testing.assert_allclose(np.linalg.norm(embedding.vector), 1, atol=1e-6, err_msg=path)
        assert embedding.n_frames == len(features[Path(path).name].features)
        assert len(embedding.features) == -(-embedding.n_frames // 2)


def embed(collection: Path, clips: Sequence[Path], encoder: Encoder, exact: bool) -> dict[str, FrameFeatures]:
    sources = Sources([str(clip) for clip in clips])
    assert commands.embed(collection, sources, options(exact), machine(1), encoder).n_ok == len(clips)
    return by_name(collection)


def test_the_fast_resize_is_close_to_the_exact_one(shared: Path, tmp_path: Path, encoder: Encoder) -> None:
    """Measured over all clips: 0.9989 in the mean for the built-in encoder, whose input is small."""
    clips = sorted((shared / "data" / "videos").iterdir())[::4]
    fast = embed(tmp_path / "fast", clips, encoder, exact=False)
    exact = embed(tmp_path / "exact", clips, encoder, exact=True)
    cosines = np.concatenate([np.sum(fast[name].features * exact[name].features, axis=1) for name in exact])
    for name, video in exact.items():
        np.testing.assert_array_equal(video.pts_seconds, fast[name].pts_seconds, err_msg=name)
    assert cosines.mean() >= 0.998
    assert cosines.min() < 0.9999  # they are not the same run twice
