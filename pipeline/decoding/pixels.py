"""Decoded frames to RGB pixels of the encoder's geometry, upright and with square pixels."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image

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
            method = Image.Resampling.BICUBIC if geometry.interpolation == "bicubic" else Image.Resampling.BILINEAR
            pixels = np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).resize(size[::-1], method))
        else:
            pixels = np.rot90(self._rgb(frame, size[::-1] if sideways else size), quarter_turns)
        return np.ascontiguousarray(crop_or_pad(pixels, geometry))

    def _rgb(self, frame: Any, size: tuple[int, int]) -> UInt8:
        method = self._geometry.interpolation.upper()
        resized = self._reformatter.reformat(
            frame, width=size[1], height=size[0], format="rgb24", interpolation=method, threads=1
        )
        return np.asarray(resized.to_ndarray(), dtype=np.uint8)


def resized_size(height: int, width: int, geometry: FrameGeometry) -> tuple[int, int]:
    """(height, width) a frame is resized to, before any crop or padding; never below 1 pixel."""
    if geometry.resize == "squash":
        return geometry.height, geometry.width
    if geometry.resize == "bound":
        # Only ever smaller; and a very long frame no longer than four times its bound, so that a slot can hold it.
        scale = min(1.0, geometry.height / min(height, width), 4 * geometry.height / max(height, width))
        return max(1, round(height * scale)), max(1, round(width * scale))
    if geometry.height == geometry.width and geometry.resize == "shortest":
        # torchvision's Resize(int): the longer side is cut to a whole number, not rounded
        if width <= height:
            return int(geometry.height * height / width), geometry.height
        return geometry.height, int(geometry.height * width / height)
    ratios = (height / geometry.height, width / geometry.width)
    ratio = min(ratios) if geometry.resize == "shortest" else max(ratios)
    return max(1, round(height / ratio)), max(1, round(width / ratio))


def crop_or_pad(pixels: UInt8, geometry: FrameGeometry) -> UInt8:
    """Cuts the centre out of (H, W, 3) pixels, or pads around it, to the geometry's size."""
    if geometry.resize in ("squash", "bound"):
        return pixels
    for axis, size in ((0, geometry.height), (1, geometry.width)):
        extra = pixels.shape[axis] - size
        if extra > 0:  # torchvision's CenterCrop rounds half to even
            start = round(extra / 2.0)
            pixels = pixels[start : start + size] if axis == 0 else pixels[:, start : start + size]
        elif extra < 0:
            before = -extra // 2
            widths = [(0, 0), (0, 0), (0, 0)]
            widths[axis] = (before, -extra - before)
            pixels = np.pad(pixels, widths, constant_values=geometry.fill)
    return pixels


def slot_bytes(geometry: FrameGeometry) -> int:
    """The most one frame of this geometry takes in shared memory."""
    width = 4 * geometry.height if geometry.resize == "bound" else geometry.width
    return geometry.height * width * 3


def to_jpeg(pixels: UInt8) -> bytes:
    """A JPEG of (H, W, 3) RGB pixels, without chroma subsampling (fine colours matter to an encoder)."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()
