"""Decoded frames to RGB pixels of the encoder's geometry, upright and with square pixels."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image

from pipeline.geometry import crop_or_pad, resize_pixels, resized_size
from pipeline.types import FrameGeometry, UInt8

JPEG_QUALITY = 95


class Resizer:
    """Turns decoded frames into RGB arrays of one geometry, upright and with square pixels."""

    def __init__(self, geometry: FrameGeometry) -> None:
        self._geometry = geometry
        self._reformatter = VideoReformatter()

    def __call__(self, frame: Any, pixel_aspect: float = 1.0) -> UInt8:
        """(H, W, 3) uint8 RGB of an av.VideoFrame whose pixels are `pixel_aspect` times as wide as high."""
        geometry = self._geometry
        # Counter-clockwise, as numpy turns; a damaged display matrix gives nonsense
        quarter_turns = round(frame.rotation / 90) % 4 if abs(frame.rotation) <= 360 else 0
        sideways = quarter_turns % 2 == 1
        shown = frame.height, max(1, round(frame.width * pixel_aspect))
        size = resized_size(*(shown[::-1] if sideways else shown), geometry)
        if geometry.exact:
            pixels = np.rot90(self._rgb(frame, (frame.height, frame.width)), quarter_turns)
            pixels = resize_pixels(pixels, size, geometry)
        else:
            pixels = np.rot90(self._rgb(frame, size[::-1] if sideways else size), quarter_turns)
        return np.ascontiguousarray(crop_or_pad(pixels, geometry))

    def _rgb(self, frame: Any, size: tuple[int, int]) -> UInt8:
        method = self._geometry.interpolation.upper()
        resized = self._reformatter.reformat(
            frame, width=size[1], height=size[0], format="rgb24", interpolation=method, threads=1
        )
        return np.asarray(resized.to_ndarray(), dtype=np.uint8)


def to_jpeg(pixels: UInt8) -> bytes:
    """A JPEG of (H, W, 3) RGB pixels, without chroma subsampling (fine colours matter to an encoder)."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()
