"""The arithmetic of an encoder's input: sizes, crops and padding, as torchvision and open_clip have them."""

from __future__ import annotations

import numpy as np
from PIL import Image

from pipeline.types import FrameGeometry, UInt8


def resize_pixels(pixels: UInt8, size: tuple[int, int], geometry: FrameGeometry) -> UInt8:
    """(H, W, 3) pixels resized by Pillow to `size` (height, width): the encoder's own preprocessing."""
    method = Image.Resampling.BICUBIC if geometry.interpolation == "bicubic" else Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).resize(size[::-1], method))


def fit_pixels(pixels: UInt8, geometry: FrameGeometry) -> UInt8:
    """(H, W, 3) pixels of any size to the geometry, contiguous, by Pillow."""
    size = resized_size(pixels.shape[0], pixels.shape[1], geometry)
    return np.ascontiguousarray(crop_or_pad(resize_pixels(pixels, size, geometry), geometry))


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
