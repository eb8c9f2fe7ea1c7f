"""Which frames of a video are sampled, by presentation time alone (never by index / fps).

Every mode is one rule: presentation time is divided into cells, and the first frame of each cell is the sample. A cell
without a frame (a hole in a variable-rate video) gives nothing, so no time is ever invented.

    --fps f      cell k is [k/f, (k+1)/f) on the video's time line
    --frames N   N cells of equal length over the video's length, shifted so that samples sit at their middles
    --keyframes  no cells: every frame the container marks as a keyframe
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from pipeline.errors import UsageError

MAX_FPS = 1000


@dataclass(frozen=True, slots=True)
class Sampling:
    """`mode` and its number: samples per second for `fps` (a float), how many for `frames`, nothing for `keyframes`."""

    mode: Literal["fps", "frames", "keyframes"] = "fps"
    value: float = 1.0

    def __post_init__(self) -> None:
        if self.mode == "fps" and not 0 < self.value <= MAX_FPS:
            raise UsageError(f"--fps {self.value:g}: choose a rate above 0 and up to {MAX_FPS} frames a second")
        if self.mode == "frames" and not (self.value >= 1 and float(self.value).is_integer()):
            raise UsageError(f"--frames {self.value:g}: choose a whole number of frames, 1 or more")

    def describe(self) -> str:
        """As a person says it: `1 frame/s`, `8 frames a video`, `keyframes`."""
        if self.mode == "fps":
            return f"{self.value:g} frame{'s' if self.value != 1 else ''}/s"
        return f"{self.value:g} frames a video" if self.mode == "frames" else "keyframes"


class CellPicker:
    """Says of each presentation time, given in order, whether it is the first of its cell.

    Args:
        rate: Cells per second.
        origin: Time of the start of cell 0, in ticks.
        time_base: Seconds per tick.
    """

    def __init__(self, rate: Fraction, origin: Fraction, time_base: Fraction) -> None:
        # cell = floor((pts - origin) * time_base * rate), in whole numbers because packets are many
        step = time_base * rate
        self._numerator = step.numerator * origin.denominator
        self._offset = step.numerator * origin.numerator
        self._denominator = step.denominator * origin.denominator
        self._last_cell: int | None = None

    def cell(self, pts: int) -> int:
        """Number of the cell that holds `pts` (ticks); negative before the origin."""
        return (pts * self._numerator - self._offset) // self._denominator

    def pick(self, pts: int) -> bool:
        """True when no earlier frame was picked in this cell or a later one."""
        cell = self.cell(pts)
        if self._last_cell is not None and cell <= self._last_cell:
            return False
        self._last_cell = cell
        return True


def fps_picker(fps: float, zero: Fraction, time_base: Fraction) -> CellPicker:
    """Cells of 1/fps seconds from the video's time 0, which lies at `zero` ticks."""
    return CellPicker(Fraction(fps).limit_denominator(10**6), zero, time_base)


def frames_picker(n_frames: int, all_pts: Sequence[int], time_base: Fraction) -> tuple[CellPicker, float]:
    """`n_frames` equal cells over the sorted presentation times of a whole video (ticks); and a cell's seconds.

    The cells start where the frame nearest each middle is the first one inside, so that a video of constant rate
    gives exactly `n_frames` frames, centred. With no more frames than asked for, every frame is a sample.
    """
    first, last = all_pts[0], all_pts[-1]
    gap = Fraction(last - first, max(1, len(all_pts) - 1)) or Fraction(1)
    length = last - first + gap
    n_frames = min(n_frames, len(all_pts))
    shift = length / (2 * n_frames) - gap / 2
    rate = n_frames / (length * time_base)
    picker = CellPicker(rate, first + shift, time_base)
    picker._last_cell = -1  # frames before the first middle are in no cell
    return picker, float(length * time_base / n_frames)
