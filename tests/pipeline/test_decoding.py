"""Sampled frames against plain decoding: the same times and the same bits, whatever is left out."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from pipeline.decoding.container import Report
from pipeline.decoding.decoder import sample_frames
from pipeline.decoding.pixels import Resizer, to_jpeg
from pipeline.errors import VideoError
from pipeline.sampling import Sampling
from pipeline.types import DecodeLimits, FrameGeometry, UInt8
from videos import Clip, PlainFrame, encode_video, moving_picture, pixel_digest, plain_frames

LIMITS = DecodeLimits()
SAMPLINGS = {
    "1 fps": Sampling("fps", 1.0),
    "2 fps": Sampling("fps", 2.0),
    "0.5 fps": Sampling("fps", 0.5),
    "30 fps": Sampling("fps", 30.0),
    "7.3 fps": Sampling("fps", 7.3),
    "1 frame": Sampling("frames", 1),
    "5 frames": Sampling("frames", 5),
    "1000 frames": Sampling("frames", 1000),
    "keyframes": Sampling("keyframes"),
}
JITTER = np.cumsum(np.random.default_rng(5).integers(10, 90, 90))
HOLE = [i * 40 for i in range(30)] + [4200 + i * 40 for i in range(45)]

# name -> (container, arguments of encode_video, share of the frames that skipping may decode at 1 fps)
CLIPS: dict[str, tuple[str, Clip, float]] = {
    "h264 b-frames": ("mp4", {"gop": 250, "b_frames": 2}, 0.6),
    "h264 pyramid": ("mp4", {"gop": 60, "b_frames": 5, "options": {"x264-params": "b-pyramid=normal"}}, 0.5),
    "h264 open gop": ("mp4", {"gop": 24, "b_frames": 3, "options": {"x264-params": "open-gop=1"}}, 0.6),
    "h264 short gop": ("mp4", {"gop": 10, "b_frames": 2}, 0.35),
    "h264 no b-frames": ("mp4", {"gop": 15, "b_frames": 0}, 0.5),
    "h264 intra only": ("mp4", {"gop": 1}, 0.05),
    "h264 intra refresh": ("mp4", {"gop": 30, "options": {"x264-params": "intra-refresh=1"}}, 1.0),
    "h264 intra refresh in ts": (
        "ts",
        {"gop": 30, "fps": 25, "options": {"x264-params": "intra-refresh=1"}},
        1.0,
    ),
    "h264 fields": ("mp4", {"gop": 30, "b_frames": 2, "options": {"x264-params": "tff=1"}}, 0.7),
    "h264 several slices": ("mkv", {"gop": 30, "b_frames": 2, "options": {"x264-params": "slices=4"}}, 0.7),
    "h264 scene cuts": ("mkv", {"gop": 40, "options": {"sc_threshold": "100"}}, 0.7),
    "h264 in ts": ("ts", {"gop": 20, "b_frames": 2, "fps": 25}, 0.6),
    "h264 ntsc": ("mp4", {"gop": 48, "fps": Fraction(30000, 1001)}, 0.7),
    "h264 jitter": ("mp4", {"gop": 30, "pts": JITTER.tolist(), "time_base": Fraction(1, 1000)}, 0.7),
    "h264 hole": ("mkv", {"gop": 30, "pts": HOLE, "n_frames": 75, "time_base": Fraction(1, 1000)}, 0.7),
    "h264 4:4:4 10 bit": ("mp4", {"gop": 30, "pixel_format": "yuv444p10le"}, 0.7),
    "hevc": ("mp4", {"codec": "libx265", "gop": 48, "b_frames": 3, "options": {"preset": "veryfast"}}, 1.0),
    "hevc closed gop": (
        "mkv",
        {"codec": "libx265", "gop": 12, "options": {"x265-params": "open-gop=0:log-level=0"}},
        0.5,
    ),
    "mpeg4": ("mp4", {"codec": "mpeg4", "gop": 12, "b_frames": 2}, 0.7),
    "mpeg4 avi": ("avi", {"codec": "mpeg4", "gop": 24}, 1.0),
    "mpeg2": ("ts", {"codec": "mpeg2video", "gop": 12, "b_frames": 2, "fps": 25}, 0.7),
    "vp8": ("webm", {"codec": "libvpx", "gop": 20}, 0.6),
    "vp9": ("webm", {"codec": "libvpx-vp9", "gop": 20}, 0.6),
    "vp9 long gop": ("mp4", {"codec": "libvpx-vp9", "gop": 200}, 1.0),
    "av1": ("mp4", {"codec": "libsvtav1", "gop": 20}, 0.6),
    "av1 open gop": (
        "mkv",
        {"codec": "libsvtav1", "gop": 16, "options": {"svtav1-params": "lp=1:irefresh-type=1"}},
        1.0,
    ),
    "mjpeg": ("avi", {"codec": "mjpeg", "pixel_format": "yuvj420p"}, 0.05),
    "ffv1": ("mkv", {"codec": "ffv1"}, 0.15),
    "prores": ("mov", {"codec": "prores", "pixel_format": "yuv422p10le", "n_frames": 40}, 0.1),
}


def sampled(path: Path, sampling: Sampling, skip: bool = True) -> tuple[list[tuple[float, bytes]], Report]:
    report = Report()
    frames = sample_frames(str(path), sampling, report, LIMITS, skip=skip)
    return [(seconds, pixel_digest(frame)) for seconds, frame in frames], report


def expected_samples(frames: list[PlainFrame], sampling: Sampling) -> list[tuple[float, bytes]]:
    """The samples by the rule in words: the first frame of each cell of time, in exact arithmetic."""
    if sampling.mode == "keyframes":
        chosen = [frame for frame in frames if frame.keyframe]
    else:
        first, last = frames[0].seconds, frames[-1].seconds
        if sampling.mode == "fps":
            start, cell = Fraction(0), 1 / Fraction(str(sampling.value))
        else:
            n = min(int(sampling.value), len(frames))
            gap = (last - first) / (len(frames) - 1)
            cell = (last - first + gap) / n
            start = first + cell / 2 - gap / 2
        cells: dict[int, PlainFrame] = {}
        for frame in frames:
            cells.setdefault((frame.seconds - start) // cell, frame)
        chosen = [frame for number, frame in cells.items() if number >= 0 or sampling.mode == "fps"]
    return [(float(frame.seconds), frame.digest) for frame in chosen]


def assert_same(got: list[tuple[float, bytes]], expected: list[tuple[float, bytes]]) -> None:
    """Times first: a difference there is readable, one between pixels is not."""
    assert [seconds for seconds, _ in got] == pytest.approx([seconds for seconds, _ in expected], abs=1e-9)
    differing = [seconds for (seconds, a), (_, b) in zip(got, expected, strict=True) if a != b]
    assert differing == []


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Encodes a clip of `CLIPS` the first time it is asked for."""
    folder = tmp_path_factory.mktemp("clips")

    @functools.cache
    def make(name: str) -> Path:
        suffix, arguments, _ = CLIPS[name]
        return encode_video(folder / f"{len(list(folder.iterdir()))}.{suffix}", **arguments)

    return make


@pytest.mark.parametrize("name", CLIPS)
def test_samples_are_the_bits_of_plain_decoding(name: str, clip: Callable[[str], Path]) -> None:
    frames = plain_frames(clip(name))
    assert len({frame.digest for frame in frames}) == len(frames) > 30  # else a wrong frame could pass
    for sampling in SAMPLINGS.values():
        expected = expected_samples(frames, sampling)
        assert_same(sampled(clip(name), sampling)[0], expected)
        assert_same(sampled(clip(name), sampling, skip=False)[0], expected)


@pytest.mark.parametrize("name", CLIPS)
def test_skipping_decodes_only_what_the_samples_need(name: str, clip: Callable[[str], Path]) -> None:
    n_frames = len(plain_frames(clip(name)))
    _, report = sampled(clip(name), Sampling("fps", 1.0))
    assert report.skipping
    assert report.n_decoded <= CLIPS[name][2] * n_frames
    assert sampled(clip(name), Sampling("fps", 1.0), skip=False)[1].n_decoded == n_frames


def test_frames_of_avi_without_presentation_times_come_in_the_order_they_are_shown(tmp_path: Path) -> None:
    """What FFmpeg says of packets there is the decoding order: taken for times, it scrambles or loses frames."""
    # one thread and no look-ahead rate control: two encodings of the same pictures must be the same bits
    same_bits = {"x264-params": "b-adapt=0:mbtree=0:threads=1:lookahead-threads=1"}
    path = encode_video(tmp_path / "a.avi", gop=30, b_frames=3, options=same_bits)
    shown = plain_frames(encode_video(tmp_path / "a.mp4", gop=30, b_frames=3, options=same_bits))
    for sampling in (Sampling("fps", 1000.0), Sampling("fps", 2.0), Sampling("frames", 5)):
        assert_same(sampled(path, sampling)[0], expected_samples(shown, sampling))


def in_one_file(path: Path, first: Path, second: Path) -> Path:
    """Two recordings in one MP4: the second's parameter sets stand before its first picture and nowhere else."""
    with av.open(str(first)) as a, av.open(str(second)) as b, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(a.streams.video[0])
        end = 0
        for packet in a.demux(video=0):
            if packet.dts is not None and packet.duration is not None:
                end = max(end, (packet.pts or 0) + packet.duration)
                packet.stream = stream
                target.mux(packet)
        record, prefix = b.streams.video[0].codec_context.extradata or b"", b""
        position = 6  # avcC: one sequence parameter set, a count, one picture parameter set
        for _ in range(2):
            size = int.from_bytes(record[position : position + 2], "big")
            prefix += size.to_bytes(4, "big") + record[position + 2 : position + 2 + size]
            position += size + 3
        for packet in b.demux(video=0):
            if packet.dts is not None and packet.pts is not None:
                copy = av.Packet(prefix + bytes(packet))
                copy.pts, copy.dts, copy.time_base = packet.pts + end, packet.dts + end, packet.time_base
                copy.duration, copy.is_keyframe, copy.stream = packet.duration, packet.is_keyframe, stream
                target.mux(copy)
                prefix = b""
    return path


def test_parameters_that_change_in_a_part_without_samples_are_not_lost(tmp_path: Path) -> None:
    """The group that brings them is dropped, and those behind it decode without an error, to other colours."""
    first = encode_video(tmp_path / "a.mp4", n_frames=69, gop=10, b_frames=2)
    second = encode_video(
        tmp_path / "b.mp4", n_frames=60, gop=6, b_frames=2, options={"x264-params": "chroma-qp-offset=6"}
    )
    path = in_one_file(tmp_path / "c.mp4", first, second)
    frames = plain_frames(path)
    assert len(frames) == 129
    for sampling in SAMPLINGS.values():
        assert_same(sampled(path, sampling)[0], expected_samples(frames, sampling))


def upright(path: Path, geometry: FrameGeometry) -> UInt8:
    """The first frame as the encoder gets it."""
    report = Report()
    frames = sample_frames(str(path), Sampling("fps", 1.0), report, LIMITS)
    return Resizer(geometry)(next(frames)[1], report.pixel_aspect)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_rotated_videos_come_upright(degrees: int, exact: bool, tmp_path: Path) -> None:
    quarters = np.zeros((64, 96, 3), np.uint8)
    quarters[:32, :48], quarters[:32, 48:], quarters[32:, :48] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    path = encode_video(tmp_path / "a.mp4", [quarters], rotation=degrees)
    pixels = upright(path, FrameGeometry(64, 64, exact=exact)).astype(int)
    expected = np.rot90(quarters, degrees // 90)  # counter-clockwise, as the display matrix turns
    top, left = (expected.shape[0] - 64) // 2, (expected.shape[1] - 64) // 2
    assert np.abs(pixels - expected[top : top + 64, left : left + 64]).mean() < 12


@pytest.mark.parametrize("exact", [False, True])
def test_pixels_that_are_not_square_are_stretched(exact: bool, tmp_path: Path) -> None:
    """A ring twice as high as wide in the file, whose pixels are twice as wide as high, is a circle."""
    y, x = np.mgrid[0:96, 0:48]
    ring = (np.hypot((x - 23.5) * 2, y - 47.5) < 30).astype(np.uint8) * 255
    path = encode_video(tmp_path / "a.mp4", [np.repeat(ring[..., None], 3, axis=2)], pixel_aspect=Fraction(2))
    shown = upright(path, FrameGeometry(96, 96, exact=exact))[..., 0] > 127
    assert shown.any(axis=0).sum() == pytest.approx(60, abs=2)
    assert shown.any(axis=1).sum() == pytest.approx(60, abs=2)


@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuvj420p", "yuv444p10le", "yuv422p"])
@pytest.mark.parametrize("level", [0, 30, 128, 255])
def test_levels_survive_every_range_and_depth(pixel_format: str, level: int, tmp_path: Path) -> None:
    path = encode_video(tmp_path / "a.mp4", [np.full((48, 64, 3), level, np.uint8)] * 2, pixel_format=pixel_format)
    assert np.abs(upright(path, FrameGeometry(32, 32)).astype(int) - level).max() <= 3


@pytest.mark.parametrize("size", [(97, 65), (33, 200), (1, 1), (640, 2)])
def test_odd_sizes_fit_the_geometry(size: tuple[int, int], tmp_path: Path) -> None:
    path = encode_video(tmp_path / "a.mkv", codec="ffv1", n_frames=1, size=size, pixel_format="bgr0")
    for geometry in (FrameGeometry(32, 32), FrameGeometry(32, 32, "squash"), FrameGeometry(32, 32, "longest")):
        assert upright(path, geometry).shape == (32, 32, 3)
    bound = upright(path, FrameGeometry(32, 32, resize="bound")).shape
    assert min(bound[:2]) <= 32 and max(bound[:2]) <= 128


def test_exact_resizing_is_that_of_pillow(tmp_path: Path) -> None:
    """On a lossless file: what comes is what open_clip's own preprocessing makes of the same pixels."""
    picture = moving_picture(3, (120, 90))
    path = encode_video(tmp_path / "a.mkv", [picture], codec="ffv1", pixel_format="bgr0")
    expected = Image.fromarray(picture).resize((64, 48), Image.Resampling.BICUBIC).crop((8, 0, 56, 48))
    assert np.array_equal(upright(path, FrameGeometry(48, 48, exact=True)), np.asarray(expected))
    fast = upright(path, FrameGeometry(48, 48)).astype(int)
    assert np.abs(fast - np.asarray(expected)).mean() < 3


def test_jpegs_keep_fine_colours() -> None:
    stripes = np.zeros((32, 32, 3), np.uint8)
    stripes[:, ::2], stripes[:, 1::2] = (220, 40, 40), (40, 40, 220)
    shown = np.asarray(Image.open(io.BytesIO(to_jpeg(stripes)))).astype(int)
    assert np.abs(shown - stripes).mean() < 6


def test_the_limit_of_frames_ends_a_video(tmp_path: Path) -> None:
    path = encode_video(tmp_path / "a.mp4", n_frames=20)
    frames = sample_frames(str(path), Sampling("fps", 1000.0), Report(), DecodeLimits(max_frames=7))
    with pytest.raises(VideoError) as caught:
        for _ in frames:
            pass
    assert caught.value.code == "max_frames"


def test_the_report_says_what_the_video_is(tmp_path: Path) -> None:
    path = encode_video(tmp_path / "a.mp4", fps=25, n_frames=50, pixel_aspect=Fraction(4, 3))
    _, report = sampled(path, Sampling("fps", 2.0))
    assert report.duration_seconds == pytest.approx(2.0)
    assert report.span_seconds == 0.5
    assert report.pixel_aspect == pytest.approx(4 / 3)
    assert report.notes == []
    assert sampled(path, Sampling("frames", 4))[1].span_seconds == pytest.approx(0.5)


def test_real_clips_are_the_bits_of_plain_decoding(shared: Path) -> None:
    paths = sorted((shared / "data" / "videos").glob("*.mp4"))
    assert paths
    n_decoded = n_frames = 0
    for path in paths:
        twice, report = sampled(path, Sampling("fps", 2.0), skip=False)
        n_frames += report.n_decoded
        once = {int(seconds + 1e-9): (seconds, digest) for seconds, digest in reversed(twice)}
        assert_same(sampled(path, Sampling("fps", 2.0))[0], twice)
        got, report = sampled(path, Sampling("fps", 1.0))
        assert_same(got, [once[second] for second in sorted(once)])  # the first of each second's two
        n_decoded += report.n_decoded
    assert n_decoded < 0.7 * n_frames
