"""Where a moment ends, in a search through the whole program: the same however common what is asked for is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fakes import FakeEncoder
from pipeline import commands
from pipeline.commands import Machine
from pipeline.config import SelectOptions
from pipeline.demo_scale import index_composed, write_composed
from pipeline.types import Float32, Hit

ENCODER = FakeEncoder(dim=64)
QUERY = "somebody opens the red door"
QUIET = Machine(quiet=True, say=lambda line: None)
STILL, OTHER = 60, 30  # frames of the two halves of a video


def unit(rows: NDArray[np.floating[Any]]) -> Float32:
    unit_rows: Float32 = (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)
    return unit_rows


def scene(rng: np.random.Generator, cosine: float, n: int, grain: float = 0.1) -> Float32:
    """A scene of n frames whose cosine with the query is about this; they differ as those of one held shot do."""
    query = ENCODER.encode_text([QUERY])[0]
    aside = rng.standard_normal(64).astype(np.float32)
    aside = unit(aside - (aside @ query) * query)
    return unit(cosine * query + np.sqrt(1 - cosine**2) * aside + grain * unit(rng.standard_normal((n, 64))))


def searched(folder: Path, videos: list[Float32], query: str = QUERY, k: int = 10) -> list[Hit]:
    collection = write_composed(folder, videos, ENCODER)
    commands.select(folder, SelectOptions("uniform", "0.25"), QUIET, ENCODER)
    index_composed(collection, ENCODER, QUIET)
    return commands.search(folder, [query], k, machine=QUIET, encoder=ENCODER)[0]


def spans(hit: Hit) -> list[tuple[float, float]]:
    return [(moment.start_seconds, moment.end_seconds) for moment in hit.moments]


@pytest.mark.parametrize(("n_alike", "n_others"), [(1, 0), (1, 100), (60, 40), (100, 0)])
def test_a_long_still_is_one_moment_however_many_show_it(tmp_path: Path, n_alike: int, n_others: int) -> None:
    rng = np.random.default_rng(7)
    alike = [np.concatenate([scene(rng, 0.7, STILL), scene(rng, 0.0, OTHER)]) for _ in range(n_alike)]
    others = [np.concatenate([scene(rng, 0.0, 8) for _ in range(4)]) for _ in range(n_others)]
    hits = searched(tmp_path / "c", alike + others)
    assert all(spans(hit) == [(0.0, STILL)] for hit in hits[: min(10, n_alike)])


@pytest.mark.parametrize("n_others", [0, 100])
def test_scenes_that_all_match_are_one_moment_in_a_collection_of_nothing_else(tmp_path: Path, n_others: int) -> None:
    """The query against the collection as a whole is then itself a match: it is no background to stand out from."""
    rng = np.random.default_rng(8)
    alike = [np.concatenate([scene(rng, c, 20) for c in (0.72, 0.66, 0.7)]) for _ in range(50)]
    others = [np.concatenate([scene(rng, 0.0, 8) for _ in range(4)]) for _ in range(n_others)]
    assert all(spans(hit) == [(0.0, 60.0)] for hit in searched(tmp_path / "c", alike + others))


def test_where_nothing_matches_moments_are_whole_scenes(tmp_path: Path) -> None:
    rng = np.random.default_rng(9)
    edges = [(5.0 * i, 5.0 * i + 5) for i in range(6)]
    hits = searched(tmp_path / "c", [np.concatenate([scene(rng, 0.0, 5) for _ in range(6)]) for _ in range(20)])
    assert len(hits) == 10
    for hit in hits:
        assert hit.moments and abs(hit.score) < 0.3
        starts, ends = {start for start, _ in edges}, {end for _, end in edges}
        assert all(start in starts and end in ends for start, end in spans(hit))


def test_two_scenes_that_match_with_another_between_are_two_moments(tmp_path: Path) -> None:
    rng = np.random.default_rng(10)
    video = np.concatenate([scene(rng, c, 20) for c in (0.7, 0.0, 0.65)])
    hits = searched(tmp_path / "c", [video, *(scene(rng, 0.0, 20) for _ in range(30))])
    assert spans(hits[0]) == [(0.0, 20.0), (40.0, 60.0)]
