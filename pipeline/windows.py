"""Sampled frames to windows, for encoders that see W frames at a time (S3D: 30 frames, one second).

Slot k of a video is [k / fps, (k + 1) / fps) on its time line, which is also cell k of the sampler; window n holds the
slots n * W to (n + 1) * W - 1. How they are filled:

    a slot without a frame      the frame before it, also the last one of the window just before; at the start of a
                                video, or after a window without frames, the first frame of the window
    slots after the last frame  that frame until the video ends, then zeros, as the published features have them
                                (METHOD.md section 3)
    a window without a frame    is left out, so no time is invented; ffmpeg's fps filter, which the published features
                                went through, would show the frame before it over and over
"""

from __future__ import annotations

import math

import numpy as np

from models.base import EncoderSpec
from pipeline.types import UInt8

_ROUNDING = 1e-15  # relative: more than a double loses in `seconds * fps`, less than a tick of a video's clock


class WindowFiller:
    """Fills the windows of one video, one after the other, with frames that come in order of time, one a slot at most.

    Args:
        spec: Of the encoder; its window, its rate and its frames' size count.
    """

    def __init__(self, spec: EncoderSpec) -> None:
        if spec.fps is None:
            raise ValueError(f"{spec.name}: windows of {spec.window} frames need a sampling rate")
        self._fps = spec.fps
        self._shape = (spec.window, spec.geometry.height, spec.geometry.width, 3)
        self._number = 0
        self._window: UInt8 | None = None
        self._n_filled = 0

    @property
    def span_seconds(self) -> float:
        """How much video one window covers."""
        return self._shape[0] / self._fps

    def add(self, seconds: float, frame: UInt8) -> tuple[float, UInt8] | None:
        """Takes the next frame, a copy of it.

        Returns:
            The window before the frame's own, if this frame is the first of a new one: its start in seconds and its
            frames (window, H, W, 3).
        """
        number, place = divmod(slot_at(seconds, self._fps), self._shape[0])
        full, before = None, frame
        if self._window is not None and number <= self._number + 1:
            before = self._window[self._n_filled - 1]
        if self._window is None or number != self._number:
            if self._window is not None:
                self._window[self._n_filled :] = self._window[self._n_filled - 1]
                full = self._start(), self._window
            self._number, self._n_filled, self._window = number, 0, np.empty(self._shape, np.uint8)
        self._window[self._n_filled : place] = before
        self._window[place] = frame
        self._n_filled = place + 1
        return full

    def finish(self, duration_seconds: float) -> tuple[float, UInt8]:
        """The last window, after the video's last frame. A length of 0, where it is unknown, ends with that frame."""
        if self._window is None:
            raise ValueError("a video without frames has no windows")
        end = round(duration_seconds * self._fps) - self._number * self._shape[0]
        self._window[self._n_filled : max(end, self._n_filled)] = self._window[self._n_filled - 1]
        self._window[max(end, self._n_filled) :] = 0
        return self._start(), self._window

    def _start(self) -> float:
        return self._number * self._shape[0] / self._fps


def slot_at(seconds: float, fps: float) -> int:
    """The slot that holds a frame's time: where the time was rounded just below a slot's start, that slot."""
    return math.floor(seconds * fps * (1 + _ROUNDING))
