"""Sizes, crops and padding against what torchvision and open_clip make of the same picture."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.geometry import crop_or_pad, fit_pixels, resized_size
from pipeline.types import FrameGeometry, UInt8
from videos import moving_picture

SHAPES = [
    (360, 640),
    (640, 360),
    (224, 224),
    (225, 224),
    (321, 181),
    (181, 321),
    (32, 1920),
    (7, 5),
    (1, 1),
    (240, 427),
]


@pytest.mark.parametrize(
    ("geometry", "frame", "expected"),
    [
        # shortest: 427 * 224 / 240 = 398.53, cut and not rounded
        (FrameGeometry(224, 224), (240, 427), (224, 398)),
        (FrameGeometry(224, 224), (427, 240), (398, 224)),
        (FrameGeometry(224, 224), (1080, 1080), (224, 224)),
        (FrameGeometry(224, 224), (32, 1920), (224, 13440)),
        (FrameGeometry(224, 224), (1, 3), (224, 672)),
        # not square: the larger of the two ratios, so that the crop has something to cut everywhere
        (FrameGeometry(100, 200), (300, 300), (200, 200)),
        (FrameGeometry(100, 200), (100, 500), (100, 500)),
        (FrameGeometry(224, 224, "squash"), (32, 1920), (224, 224)),
        (FrameGeometry(100, 200, "squash"), (7, 5), (100, 200)),
        (FrameGeometry(384, 384, "longest"), (360, 640), (216, 384)),
        (FrameGeometry(384, 384, "longest"), (640, 360), (384, 216)),
        (FrameGeometry(384, 384, "longest"), (2, 3840), (1, 384)),
        # bound: never larger, never longer than four times the bound
        (FrameGeometry(256, 256, "bound"), (1080, 1920), (256, 455)),
        (FrameGeometry(256, 256, "bound"), (100, 200), (100, 200)),
        (FrameGeometry(256, 256, "bound"), (512, 8192), (64, 1024)),
        (FrameGeometry(256, 256, "bound"), (1, 8192), (1, 1024)),
    ],
)
def test_resized_size(geometry: FrameGeometry, frame: tuple[int, int], expected: tuple[int, int]) -> None:
    assert resized_size(*frame, geometry) == expected


@given(
    height=st.integers(1, 9000),
    width=st.integers(1, 9000),
    bound=st.integers(1, 512),
    longest=st.integers(1, 512),
)
def test_sizes_keep_their_promises(height: int, width: int, bound: int, longest: int) -> None:
    resized = resized_size(height, width, FrameGeometry(bound, bound, "bound"))
    assert 1 <= min(resized) <= bound and max(resized) <= 4 * bound  # what a slot has room for
    assert resized[0] <= height and resized[1] <= width
    resized = resized_size(height, width, FrameGeometry(bound, longest, "longest"))
    assert 1 <= resized[0] <= bound and 1 <= resized[1] <= longest
    assert bound in resized or longest in resized
    resized = resized_size(height, width, FrameGeometry(bound, longest))
    assert resized[0] >= bound and resized[1] >= longest
    assert bound in resized or longest in resized


def numbered(height: int, width: int) -> UInt8:
    """Pixels that say where they are: (row, column, 7)."""
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows, columns, np.full_like(rows, 7)], axis=-1).astype(np.uint8)


@pytest.mark.parametrize(("extra", "start"), [(0, 0), (1, 0), (2, 1), (3, 2), (4, 2), (5, 2), (7, 4)])
def test_the_crop_is_torchvisions(extra: int, start: int) -> None:
    """Half a pixel is rounded to even, on either axis."""
    geometry = FrameGeometry(10, 10)
    for pixels in (numbered(10 + extra, 10), numbered(10, 10 + extra).transpose(1, 0, 2)[..., [1, 0, 2]]):
        cropped = crop_or_pad(pixels, geometry)
        assert cropped.shape == (10, 10, 3)
        assert (cropped[0, 0, 0], cropped[9, 0, 0]) == (start, start + 9)


def test_padding_surrounds_the_picture_with_the_fill() -> None:
    padded = crop_or_pad(numbered(4, 10), FrameGeometry(9, 10, "longest", fill=99))
    assert padded.shape == (9, 10, 3)
    assert (padded[:2] == 99).all() or (padded[:3] == 99).all()
    inside = np.flatnonzero((padded != 99).any(axis=(1, 2)))
    assert np.array_equal(padded[inside], numbered(4, 10))
    assert abs(inside[0] - (8 - inside[-1])) <= 1


def test_squash_and_bound_are_left_as_they_are() -> None:
    pixels = numbered(5, 9)
    assert crop_or_pad(pixels, FrameGeometry(5, 9, "squash")) is pixels
    assert crop_or_pad(pixels, FrameGeometry(64, 64, "bound")) is pixels


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_fitted_pixels_are_pillows(interpolation: str) -> None:
    picture = moving_picture(0, (64, 48))
    geometry = FrameGeometry(24, 24, interpolation="bicubic" if interpolation == "bicubic" else "bilinear")
    method = Image.Resampling.BICUBIC if interpolation == "bicubic" else Image.Resampling.BILINEAR
    expected = Image.fromarray(picture).resize((32, 24), method).crop((4, 0, 28, 24))
    fitted = fit_pixels(picture, geometry)
    assert np.array_equal(fitted, np.asarray(expected))
    assert fitted.flags.c_contiguous


def test_views_are_accepted() -> None:
    picture = moving_picture(1, (64, 48))
    turned = np.rot90(picture)
    assert np.array_equal(fit_pixels(turned, FrameGeometry(16, 16)), fit_pixels(turned.copy(), FrameGeometry(16, 16)))


@pytest.mark.slow
def test_pixels_are_those_of_torchvision_and_open_clip() -> None:
    """On every odd shape: Resize + CenterCrop, and open_clip's own preprocessing in its three resize modes."""
    import open_clip
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize  # type: ignore[import-untyped]

    for size in (224, 37):
        shortest = Compose([Resize(size, InterpolationMode.BICUBIC), CenterCrop(size)])
        for shape in SHAPES:
            picture = moving_picture(size, shape[::-1])
            image = Image.fromarray(picture)
            assert np.array_equal(fit_pixels(picture, FrameGeometry(size, size)), np.asarray(shortest(image))), shape
            for mode in ("shortest", "squash", "longest"):
                transform = open_clip.image_transform(
                    size, is_train=False, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), resize_mode=mode, fill_color=0
                )
                expected = np.rint(transform(image).permute(1, 2, 0).numpy() * 255).astype(np.uint8)
                geometry = {
                    "shortest": FrameGeometry(size, size),
                    "squash": FrameGeometry(size, size, "squash"),
                    "longest": FrameGeometry(size, size, "longest"),
                }[mode]
                assert np.array_equal(fit_pixels(picture, geometry), expected), (mode, shape, size)
