"""What long footage shows beside its subject: distractors and empty frames of the rendered world."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from models.builtin.world import (
    ATTRIBUTES,
    EMPTY_KINDS,
    VALUES,
    EmptyKind,
    EmptyPainter,
    Scene,
    all_scenes,
    distractors,
)

STAR = Scene("red", "star", "small", "left", "right")


def n_shared(first: Scene, second: Scene) -> int:
    return sum(getattr(first, a) == getattr(second, a) for a in ATTRIBUTES)


@pytest.mark.parametrize("shared", [(2, 4), (4, 4), (0, 1)])
def test_distractors_share_so_many_attributes_and_never_all(shared: tuple[int, int]) -> None:
    world = set(all_scenes())
    found = distractors(STAR, random.Random(0), 600, shared)
    assert len(found) == 600
    assert world.issuperset(found)
    counts = Counter(n_shared(STAR, scene) for scene in found)
    assert set(counts) == set(range(shared[0], shared[1] + 1))
    assert min(counts.values()) > 600 / len(counts) * 0.8


def test_distractors_differ_in_every_attribute_and_take_every_other_value() -> None:
    found = distractors(STAR, random.Random(1), 600)
    for attribute, values in VALUES.items():
        assert {getattr(scene, attribute) for scene in found} == set(values)
        assert 0.25 < sum(getattr(s, attribute) == getattr(STAR, attribute) for s in found) / 600 < 0.95


def test_distractors_depend_on_the_generator_alone() -> None:
    assert distractors(STAR, random.Random(2), 9) == distractors(STAR, random.Random(2), 9)
    assert distractors(STAR, random.Random(2), 9) != distractors(STAR, random.Random(3), 9)


@pytest.mark.parametrize("shared", [(2, 5), (3, 2), (-1, 2)])
def test_distractors_that_cannot_be_are_refused(shared: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="increasing pair of 0 to 4"):
        distractors(STAR, random.Random(0), 1, shared)


@pytest.mark.parametrize("kind", EMPTY_KINDS)
def test_empty_frames_depend_on_kind_seed_size_and_time_alone(kind: EmptyKind) -> None:
    frame = EmptyPainter(kind, 1).frame(0.5)
    assert frame.shape == (240, 320, 3)
    assert frame.dtype == np.uint8
    painter = EmptyPainter(kind, 1)
    painter.frame(2.0)
    assert np.array_equal(frame, painter.frame(0.5))
    assert not np.array_equal(frame, EmptyPainter(kind, 2).frame(0.5))
    assert EmptyPainter(kind, 1, 60, 90).frame(0).shape == (60, 90, 3)


@pytest.mark.parametrize("kind", EMPTY_KINDS)
def test_empty_frames_have_no_colour(kind: EmptyKind) -> None:
    for seed in range(20):
        frame = EmptyPainter(kind, seed).frame(1.0).astype(int)
        assert np.percentile(frame.max(2) - frame.min(2), 99) < 45  # a shape but a white one has 100 and more


def test_a_blurred_scene_is_dim_and_has_no_edges() -> None:
    for seed in range(20):
        frame = EmptyPainter("blur", seed).frame(0).astype(int)
        assert frame.max() < 150
        assert np.abs(np.diff(frame, axis=0)).max() <= 3
        assert np.abs(np.diff(frame, axis=1)).max() <= 3


def test_fades_are_near_black_or_near_white() -> None:
    means = [float(EmptyPainter("fade", seed).frame(0).mean()) for seed in range(20)]
    assert all(mean < 20 or mean > 235 for mean in means)
    assert min(means) < 20 and max(means) > 235


def test_a_title_has_bars_that_stand_out_from_their_card() -> None:
    for seed in range(20):
        rows = EmptyPainter("title", seed).frame(0)[:, 160, 0].astype(int)  # down the middle, which every bar crosses
        edges = np.abs(np.diff(rows)) > 30
        assert 4 <= edges.sum() <= 10 and edges.sum() % 2 == 0


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'credits': one of background, blur, title, fade"):
        EmptyPainter("credits", 0)  # type: ignore[arg-type]
