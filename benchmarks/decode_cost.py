"""What sampling a video costs in processor time: ffmpeg, plain decoding, and our decoder that skips what it can.

    python benchmarks/decode_cost.py [VIDEO] [--fps 1] [--rounds 5] [--size 224]

Makes 30 s of h264 720p30 with B-frames and grain unless a video is given. Each way samples and resizes the same frames
on one thread; the ways take turns, so that a busy machine slows all of them alike. CPU seconds are user plus system,
children included; the ratio to ffmpeg is taken within each round, and its median is what is promised (0.7 or less).
"""

from __future__ import annotations

import argparse
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av

from pipeline.decoding.container import Report
from pipeline.decoding.decoder import sample_frames
from pipeline.decoding.pixels import Resizer
from pipeline.sampling import Sampling
from pipeline.types import DecodeLimits, FrameGeometry

WIDTH, HEIGHT, RATE, SECONDS = 1280, 720, 30, 30
PROMISED_RATIO = 0.7
SOURCE = (
    f"testsrc2=size={WIDTH}x{HEIGHT}:rate={RATE}:duration={SECONDS},scroll=horizontal=0.002:vertical=0.001,"
    "noise=alls=10:allf=t,format=yuv420p"
)


def make_clip(path: Path) -> None:
    """Encodes moving shapes under grain: 3 B-frames in a pyramid, groups of 4 s. The shapes jump every second, which
    the encoder would otherwise answer with a keyframe exactly where the samples are."""
    with av.open(SOURCE, format="lavfi") as source, av.open(str(path), "w") as target:
        stream: Any = target.add_stream("libx264", rate=Fraction(RATE))
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = 4 * RATE, 3
        stream.codec_context.options = {"preset": "medium", "crf": "26", "sc_threshold": "0", "threads": "1"}
        for frame in source.decode(video=0):
            frame.pict_type = 0  # decoded raw frames say I, which the encoder would take for a wish
            target.mux(stream.encode(frame))
        target.mux(stream.encode(None))


def cpu_seconds() -> float:
    """Processor time of this process and of the children it has waited for."""
    usages = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def with_ffmpeg(path: Path, fps: float, size: int) -> int:
    """Frames that the ffmpeg command samples and resizes on one thread."""
    scale = f"scale='if(gt(iw,ih),-2,{size})':'if(gt(iw,ih),{size},-2)':flags=bicubic"
    filters = f"fps={fps},{scale},crop={size}:{size},format=rgb24"
    command = ["ffmpeg", "-v", "error", "-nostdin", "-threads", "1", "-filter_threads", "1", "-i", str(path), "-an"]
    command += ["-vf", filters, "-threads", "1", "-f", "rawvideo", "-"]
    output = subprocess.run(command, capture_output=True, check=True).stdout
    return len(output) // (size * size * 3)


def with_ours(path: Path, fps: float, size: int, skip: bool) -> tuple[int, Report]:
    """Frames that our decoder samples and resizes, and its report."""
    report, resizer = Report(), Resizer(FrameGeometry(size, size))
    n_frames = 0
    for _, frame in sample_frames(str(path), Sampling("fps", fps), report, DecodeLimits(), skip=skip):
        resizer(frame, report.pixel_aspect)
        n_frames += 1
    return n_frames, report


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", type=Path, nargs="?")
    parser.add_argument("--fps", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=224)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path: Path = given.video or Path(folder) / "clip.mp4"
        if given.video is None:
            print(f"making {SECONDS} s of {WIDTH}x{HEIGHT} h264 ...", file=sys.stderr)
            make_clip(path)
        ways: dict[str, Callable[[], int]] = {
            "plain decoding": lambda: with_ours(path, given.fps, given.size, False)[0],
            "skipping": lambda: with_ours(path, given.fps, given.size, True)[0],
        }
        if shutil.which("ffmpeg"):
            ways = {"ffmpeg -threads 1": lambda: with_ffmpeg(path, given.fps, given.size), **ways}
        else:
            print("no ffmpeg command: the ratios are to plain decoding", file=sys.stderr)
        report = with_ours(path, given.fps, given.size, True)[1]  # also warms the file cache
        n_plain = with_ours(path, given.fps, given.size, False)[1].n_decoded
        costs: dict[str, list[float]] = {name: [] for name in ways}
        sampled: dict[str, int] = {}
        for _ in range(given.rounds):
            for name, way in ways.items():
                before = cpu_seconds()
                sampled[name] = way()
                costs[name].append(cpu_seconds() - before)

    reference = next(iter(costs))
    print(f"{report.duration_seconds:.1f} s at {given.fps:g} fps to {given.size}x{given.size}, {given.rounds} rounds")
    print(f"frames decoded: {n_plain} plain, {report.n_decoded} skipping")
    print(f"{'way':20}{'frames':>8}{'CPU s':>9}{'video s per CPU s':>20}{'ratio (median, range)':>28}")
    for name, seconds in costs.items():
        ratios = [cost / base for cost, base in zip(seconds, costs[reference], strict=True)]
        cost, ratio = statistics.median(seconds), statistics.median(ratios)
        spread = f"{ratio:.2f}  ({min(ratios):.2f}-{max(ratios):.2f})"
        print(f"{name:20}{sampled[name]:>8}{cost:>9.2f}{report.duration_seconds / cost:>20.1f}{spread:>28}")
    if reference.startswith("ffmpeg"):
        verdict = "kept" if ratio <= PROMISED_RATIO else "BROKEN"
        print(f"promise (skipping at {PROMISED_RATIO:g} of ffmpeg or less): {verdict}")


if __name__ == "__main__":
    main()
