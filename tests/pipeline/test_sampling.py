"""Cells of time in exact arithmetic."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UsageError
from pipeline.sampling import CellPicker, Sampling, fps_picker, frames_picker

TIME_BASES = st.sampled_from([Fraction(1, 1000), Fraction(1, 90000), Fraction(1001, 30000), Fraction(1, 15360)])
TICKS = st.lists(st.integers(-5000, 500_000), min_size=1, max_size=80, unique=True).map(sorted)


def picked(picker: CellPicker, ticks: list[int]) -> list[int]:
    return [pts for pts in ticks if picker.pick(pts)]


@given(
    ticks=TICKS,
    time_base=TIME_BASES,
    fps=st.sampled_from([Fraction(1), Fraction(2), Fraction(1, 2), Fraction(30), Fraction(73, 10), Fraction(1, 3)]),
    zero=st.fractions(-1000, 1000, max_denominator=90),
)
def test_each_cell_gives_its_first_frame(ticks: list[int], time_base: Fraction, fps: Fraction, zero: Fraction) -> None:
    first: dict[int, int] = {}
    for pts in ticks:
        first.setdefault(((pts - zero) * time_base) // (1 / fps), pts)
    assert picked(fps_picker(float(fps), zero, time_base), ticks) == list(first.values())


def test_a_frame_on_a_boundary_belongs_to_the_cell_it_starts() -> None:
    """At 30000/1001 frames a second, 30 frames are a millisecond longer than a second."""
    ticks = list(range(0, 100))
    assert picked(fps_picker(1.0, Fraction(0), Fraction(1001, 30000)), ticks) == [0, 30, 60, 90]
    assert picked(fps_picker(1.0, Fraction(0), Fraction(1, 30)), ticks) == [0, 30, 60, 90]
    assert picked(fps_picker(30.0, Fraction(0), Fraction(1, 30)), ticks) == ticks


def test_no_drift_over_a_day() -> None:
    """The float 0.1 is not a tenth; a cell a day later still starts on the tick."""
    picker = fps_picker(0.1, Fraction(0), Fraction(1, 90000))
    day = 86400 * 90000
    assert picker.cell(day) == 8640
    assert picker.cell(day - 1) == 8639


def test_a_hole_gives_nothing_and_a_late_frame_is_no_second_sample() -> None:
    picker = fps_picker(1.0, Fraction(0), Fraction(1, 10))
    assert picked(picker, [0, 5, 42, 48, 51, 38, 44, 60]) == [0, 42, 51, 60]


@pytest.mark.parametrize(("n", "expected"), [(1, [44]), (2, [22, 67]), (3, [14, 44, 74]), (5, [8, 26, 44, 62, 80])])
def test_frames_are_centred_on_a_video_of_constant_rate(n: int, expected: list[int]) -> None:
    """90 frames: n parts of equal length, each shown by a frame at its middle (or one of two)."""
    ticks = list(range(90))
    picker, span = frames_picker(n, ticks, Fraction(1, 30))
    samples = picked(picker, ticks)
    assert len(samples) == n
    assert all(abs(pts + 0.5 - 90 / n * (k + 0.5)) <= 0.5 for k, pts in enumerate(samples))
    assert samples == pytest.approx(expected, abs=1)
    assert span == pytest.approx(3 / n)


@given(n_ticks=st.integers(1, 300), n=st.integers(1, 400), first=st.integers(-1000, 1000), step=st.integers(1, 3003))
def test_a_constant_rate_gives_as_many_frames_as_asked_for(n_ticks: int, n: int, first: int, step: int) -> None:
    ticks = [first + i * step for i in range(n_ticks)]
    picker, _ = frames_picker(n, ticks, Fraction(1, 90000))
    samples = picked(picker, ticks)
    assert len(samples) == min(n, n_ticks)
    gaps = {b - a for a, b in itertools.pairwise(samples)}
    assert not gaps or max(gaps) - min(gaps) <= step  # even, but for the rounding to a frame


@given(ticks=TICKS, n=st.integers(1, 100))
def test_an_uneven_rate_gives_at_most_as_many(ticks: list[int], n: int) -> None:
    picker, _ = frames_picker(n, ticks, Fraction(1, 1000))
    assert len(picked(picker, ticks)) <= min(n, len(ticks))


@given(ticks=TICKS, n=st.integers(1, 100))
def test_no_video_is_left_without_a_frame(ticks: list[int], n: int) -> None:
    picker, _ = frames_picker(n, ticks, Fraction(1, 1000))
    assert picked(picker, ticks)


@pytest.mark.parametrize("value", [0, -1, 1001, float("nan"), float("inf")])
def test_a_senseless_rate_is_refused(value: float) -> None:
    with pytest.raises(UsageError, match="--fps"):
        Sampling("fps", value)


@pytest.mark.parametrize("value", [0, -3, 2.5, float("nan"), float("inf")])
def test_a_senseless_number_of_frames_is_refused(value: float) -> None:
    with pytest.raises(UsageError, match="--frames"):
        Sampling("frames", value)


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        (Sampling(), "1 frame/s"),
        (Sampling("fps", 0.5), "0.5 frames/s"),
        (Sampling("frames", 8), "8 frames a video"),
        (Sampling("keyframes"), "keyframes"),
    ],
)
def test_a_sampling_says_what_it_is(sampling: Sampling, words: str) -> None:
    assert sampling.describe() == words
