"""Small files that unfold: huge pictures, many huge pictures, a million tiny ones. Each ends at its limit, alone."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from guards import Guard
from pipeline.decode import DecodedFrame, DecodePool, VideoDecoded, VideoFailed
from pipeline.decoding.container import Report
from pipeline.decoding.decoder import sample_frames
from pipeline.errors import VideoError
from pipeline.sampling import Sampling
from pipeline.types import DecodeLimits, FrameGeometry, Video
from videos import encode_video, video

ONCE_A_SECOND = Sampling("fps", 1.0)
GEOMETRY = FrameGeometry(32, 32)
MILLION = 1_000_000
DEFAULT = DecodeLimits()

pytestmark = pytest.mark.fault


def refused(path: Path, limits: DecodeLimits) -> tuple[str, str]:
    """The code and the message that decoding in this process ends with."""
    with pytest.raises(VideoError) as caught:
        for _ in sample_frames(str(path), Sampling("fps", 1000.0), Report(), limits):
            pass
    return caught.value.code, caught.value.message


def relabelled(path: Path, old: tuple[int, int], new: tuple[int, int]) -> Path:
    """The Matroska file with another width and height in its header."""

    def header(width: int, height: int) -> bytes:
        return b"\xb0\x82" + width.to_bytes(2, "big") + b"\xba\x82" + height.to_bytes(2, "big")

    data = path.read_bytes()
    assert data.count(header(*old)) == 1
    path.write_bytes(data.replace(header(*old), header(*new)))
    return path


def among_good(
    bomb: Video, folder: Path, limits: DecodeLimits = DEFAULT
) -> tuple[VideoDecoded | VideoFailed, int, float]:
    """Decodes the bomb between two good videos in one process, which come whole; what became of it, the most memory
    that the process had (bytes), and how long the bomb took (seconds)."""
    good = [video(encode_video(folder / f"good{i}.mp4", n_frames=40)) for i in range(2)]
    ends: dict[str, VideoDecoded | VideoFailed] = {}
    with DecodePool(1, ONCE_A_SECOND, GEOMETRY, limits) as pool:
        started = time.monotonic()
        for event in pool.decode([good[0], bomb, good[1]], threading.Event()):
            if event.video == bomb and not isinstance(event, DecodedFrame):
                status = Path(f"/proc/{pool._workers[0].process.pid}/status").read_text()
                seconds = time.monotonic() - started
            if not isinstance(event, DecodedFrame):
                assert event.video.video_id not in ends
                ends[event.video.video_id] = event
    assert all(isinstance(ends[v.video_id], VideoDecoded) for v in good)
    peak = int(status.split("VmHWM:")[1].split()[0]) << 10
    return ends[bomb.video_id], peak, seconds


def failed(end: VideoDecoded | VideoFailed) -> str:
    assert isinstance(end, VideoFailed) and not end.will_retry
    return end.error.code


@pytest.mark.parametrize("size", [(16000, 16000), (8192, 8192), (65535, 1024)])
def test_a_picture_over_the_limit_is_refused_before_it_is_decoded(size: tuple[int, int], tmp_path: Path) -> None:
    """A few kilobytes: a real picture whose header is made to say so."""
    path = encode_video(tmp_path / "bomb.mkv", codec="ffv1", n_frames=1, size=(256, 256), pixel_format="bgr0")
    started = time.monotonic()
    assert refused(relabelled(path, (256, 256), size), DecodeLimits())[0] == "max_pixels"
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("codec", ["libx264", "mjpeg", "libvpx"])
def test_a_frame_larger_than_declared_is_refused_by_the_decoder(codec: str, tmp_path: Path) -> None:
    """The container says 96x64; the pictures behind it are 640x480, over the limit."""
    pixel_format = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    path = encode_video(tmp_path / "liar.mkv", codec=codec, n_frames=3, size=(640, 480), pixel_format=pixel_format)
    relabelled(path, (640, 480), (96, 64))
    # within the limit it decodes, whatever the header says
    assert len(list(sample_frames(str(path), Sampling("fps", 1000.0), Report(), DecodeLimits()))) == 3
    code, message = refused(path, DecodeLimits(max_pixels=320 * 240))
    assert code == "max_pixels"
    # by the decoder, before there is a frame to look at; what H.264 says of itself is read when it is opened
    assert message == "its pictures are over 76800 pixels" or codec == "libx264"


def test_a_size_over_the_limit_that_is_declared_is_told(tmp_path: Path) -> None:
    path = encode_video(tmp_path / "large.mp4", n_frames=3, size=(640, 480))
    refusal = ("max_pixels", "640x480 is over 76800 pixels a frame")
    assert refused(path, DecodeLimits(max_pixels=320 * 240)) == refusal


def test_a_bomb_among_good_videos_costs_no_memory(tmp_path: Path) -> None:
    path = encode_video(tmp_path / "bomb.mkv", codec="ffv1", n_frames=1, size=(256, 256), pixel_format="bgr0")
    end, peak, seconds = among_good(video(relabelled(path, (256, 256), (16000, 16000))), tmp_path)
    assert failed(end) == "max_pixels"
    assert seconds < 5
    assert peak < 90 << 20


def test_a_real_picture_over_the_limit_is_not_decoded_to_see_what_it_is(tmp_path: Path) -> None:
    """Where the container does not say enough, FFmpeg decodes the first frames when it opens a file."""
    black = [np.zeros((4320, 7680, 3), np.uint8)]
    path = encode_video(tmp_path / "bomb.h264", black, options={"preset": "ultrafast"})
    end, peak, _ = among_good(video(path), tmp_path, DecodeLimits(max_pixels=1920 * 1080))
    assert failed(end) == "max_pixels"
    assert peak < 90 << 20


def a_million_frames(folder: Path) -> Path:
    """Raw H.264 of 16x16 pixels: groups of 100 frames, one after the other; 13 bytes a frame."""
    group = encode_video(
        folder / "group.h264",
        [np.full((16, 16, 3), i % 2 * 40, np.uint8) for i in range(100)],
        gop=100,
        b_frames=0,
        options={"x264-params": "aud=0:threads=1"},
    ).read_bytes()
    path = folder / "million.h264"
    with path.open("wb") as file:
        for _ in range(100):
            file.write(group * (MILLION // 10_000))
    return path


def test_a_million_frames_end_at_the_limit_of_processor_time(tmp_path: Path) -> None:
    path = a_million_frames(tmp_path)
    assert path.stat().st_size < 40 << 20
    end, peak, seconds = among_good(video(path), tmp_path, DecodeLimits(cpu_seconds=1.0))
    assert failed(end) == "cpu_time"
    assert seconds < 5
    assert peak < 300 << 20


def test_more_samples_than_allowed_end_it(tmp_path: Path) -> None:
    end, _, seconds = among_good(video(a_million_frames(tmp_path)), tmp_path, DecodeLimits(max_frames=50))
    assert failed(end) == "max_frames"
    assert seconds < 5


@pytest.mark.long
@pytest.mark.parametrize("sampling", [ONCE_A_SECOND, Sampling("frames", 7)], ids=["fps", "frames"])
def test_a_million_frames_decode_with_the_default_limits(sampling: Sampling, tmp_path: Path) -> None:
    bomb = video(a_million_frames(tmp_path))
    n_samples = 0
    with DecodePool(1, sampling, GEOMETRY, DecodeLimits()) as pool:
        for event in pool.decode([bomb], threading.Event()):
            if isinstance(event, DecodedFrame):
                n_samples += 1
            else:
                assert isinstance(event, VideoDecoded)
                assert event.n_decoded >= MILLION
                status = Path(f"/proc/{pool._workers[0].process.pid}/status").read_text()
    assert n_samples == (7 if sampling.mode == "frames" else pytest.approx(MILLION / 25, rel=0.5))
    assert int(status.split("VmHWM:")[1].split()[0]) < (600 << 10)


@pytest.mark.long
def test_a_real_picture_of_16000_is_refused_and_decodes_where_it_is_allowed(tmp_path: Path) -> None:
    black = [np.zeros((16000, 16000, 3), np.uint8)]
    bomb = video(encode_video(tmp_path / "real.mov", black, codec="png", pixel_format="gray"))
    end, peak, seconds = among_good(bomb, tmp_path)
    assert (failed(end), seconds < 5, peak < 90 << 20) == ("max_pixels", True, True)
    allowed = DecodeLimits(max_pixels=16000 * 16000, memory_bytes=6 << 30)
    assert isinstance(among_good(bomb, tmp_path, allowed)[0], VideoDecoded)
    short = DecodeLimits(max_pixels=16000 * 16000, memory_bytes=400 << 20)
    assert failed(among_good(bomb, tmp_path, short)[0]) == "memory"


@pytest.mark.long
def test_sixty_real_pictures_of_8192_end_at_a_limit(tmp_path: Path) -> None:
    black = [np.zeros((8192, 8192, 3), np.uint8)] * 3
    path = encode_video(tmp_path / "many.h264", black, options={"preset": "ultrafast"})
    path.write_bytes(path.read_bytes() * 20)
    assert path.stat().st_size < 8 << 20
    end, peak, seconds = among_good(video(path), tmp_path)
    assert (failed(end), seconds < 5, peak < 90 << 20) == ("max_pixels", True, True)
    allowed = DecodeLimits(max_pixels=8192 * 8192, cpu_seconds=2.0)
    end, peak, seconds = among_good(video(path), tmp_path, allowed)
    assert (failed(end), seconds < 20, peak < 2 << 30) == ("cpu_time", True, True)


GUARDS = [
    Guard(
        (9,),
        "pipeline/decoding/container.py",
        '                "max_pixels": str(limits.max_pixels),  # of the frames',
        "                # of the frames",
        "test_a_real_picture_over_the_limit_is_not_decoded_to_see_what_it_is",
    ),
    Guard(
        (9,),
        "pipeline/decoding/container.py",
        "    if context.width * context.height > limits.max_pixels:",
        "    if False:",
        "test_a_size_over_the_limit_that_is_declared_is_told",
    ),
    Guard(
        (9,),
        "pipeline/decoding/container.py",
        '    context.options = {"max_pixels": str(limits.max_pixels)}',
        "    context.options = {}",
        "test_a_frame_larger_than_declared_is_refused_by_the_decoder",
    ),
    Guard(
        (9,),
        "pipeline/decoding/decoder.py",
        "                if emitted > limits.max_frames:",
        "                if False:",
        "test_more_samples_than_allowed_end_it",
    ),
]
