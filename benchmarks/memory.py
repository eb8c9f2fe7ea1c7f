"""What a run's memory depends on: the length of a video, and the number of videos.

    python benchmarks/memory.py [--minutes 60] [--rows 10000] [--trace]

Takes a short video against a long one by each way that frames go, and a short manifest against a long one, every run
in a process of its own with an encoder that computes nothing. Peaks are of resident memory, in MiB: of the main
process, and of the largest decoding process. --trace says what of it Python and numpy allocated, and is slow.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np

from models.base import EncoderSpec
from pipeline import commands
from pipeline.config import EmbedOptions, SelectOptions
from pipeline.sampling import Sampling
from pipeline.types import Float32, FrameGeometry, UInt8

DIM = 512
FPS = 5
SIZE = (160, 120)
WORKERS = 2
N_FILES = 20  # tiny videos of the manifest; every further row is one of them with other bytes behind its end


class IdleEncoder:
    """Vectors of the usual length for nothing; some texts and frames are alike, which is of no interest here."""

    device: str = "cpu"
    precision: str = "fp32"

    def __init__(self) -> None:
        self.spec = EncoderSpec("idle", DIM, FrameGeometry(224, 224), (0, 0, 0), (1, 1, 1), 1, 1.0, 64, "", "none")

    def encode_frames(self, frames: UInt8) -> Float32:
        return np.eye(1, DIM, dtype=np.float32).repeat(len(frames), axis=0)

    def encode_text(self, texts: Sequence[str]) -> Float32:
        return np.eye(1, DIM, dtype=np.float32).repeat(len(texts), axis=0)


def make_video(path: Path, n_frames: int) -> None:
    """Low resolution, 5 frames/s, a brightness that wanders."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "ultrafast", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        for i in range(n_frames):
            frame = av.VideoFrame.from_ndarray(np.full((SIZE[1] * 3 // 2, SIZE[0]), i % 251, np.uint8), "yuv420p")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def make_manifest(folder: Path, n_rows: int) -> Path:
    """Rows that are all different videos, with a caption each."""
    folder.mkdir()
    originals = []
    for i in range(N_FILES):
        make_video(folder / "original.mp4", 5 + i)
        originals.append((folder / "original.mp4").read_bytes())
    (folder / "original.mp4").unlink()
    with (folder / "videos.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "id", "caption"])
        for i in range(n_rows):
            name = f"video-{i:07d}.mp4"
            (folder / name).write_bytes(originals[i % N_FILES] + i.to_bytes(8, "big"))
            writer.writerow([name, f"id-{i:07d}", f"what is to be seen in video {i} of this collection"])
    return folder / "videos.csv"


class ChildPeaks(threading.Thread):
    """Watches the peaks of the child processes. (`getrusage` counts what the parent had when it made them.)"""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most_kib = 0

    def run(self) -> None:
        while True:
            for task in Path("/proc/self/task").iterdir():
                with contextlib.suppress(OSError):  # a thread or a child that has just ended
                    for child in (task / "children").read_text().split():
                        status = Path(f"/proc/{child}/status").read_text()
                        if "pipeline.decoding" in Path(f"/proc/{child}/cmdline").read_text():
                            self.most_kib = max(self.most_kib, int(status.partition("VmHWM:")[2].split()[0]))
            time.sleep(0.1)


def work(how: str, source: Path, place: Path, trace: bool) -> None:
    """The process that is measured; prints its peak and that of its largest child."""
    sources = commands.Sources([str(source)])  # a manifest is known by its extension
    machine = commands.Machine(workers=WORKERS, batch_size=32, quiet=True, say=lambda line: None)
    options, encoder = EmbedOptions(sampling=Sampling("fps", float(FPS))), IdleEncoder()
    if trace:
        tracemalloc.start()
    peaks = ChildPeaks()
    peaks.start()
    if how == "run":
        commands.run(place, sources, options, SelectOptions(), machine, "flat", encoder)
    elif how == "embed":
        commands.embed(place, sources, options, machine, encoder)
    elif how == "decode":
        commands.decode(place, sources, options, machine)
    else:
        commands.embed(place, commands.Sources(), options, machine, encoder)
    if trace:
        print(f"peak of what Python allocated: {tracemalloc.get_traced_memory()[1] / 2**20:.1f} MiB", file=sys.stderr)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, peaks.most_kib / 1024)


def measure(how: str, source: Path, place: Path, trace: bool) -> tuple[float, float, float]:
    """Peaks in MiB of the main process and of its largest child, and seconds."""
    started = time.monotonic()
    root = str(Path(__file__).parents[1])
    command = [sys.executable, __file__, "--work", how, str(source), str(place), *(["--trace"] if trace else [])]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": root}, check=True, stdout=subprocess.PIPE)
    main, child = map(float, done.stdout.split())
    return main, child, time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=int, default=60)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        how, source, place = options.work
        work(how, Path(source), Path(place), options.trace)
        return
    print(f"{'what':<32} {'main':>7} {'decoder':>8} {'seconds':>8}   growth of main, decoder")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cases: dict[str, list[tuple[str, str, Path, Path]]] = {}
        for minutes in (1, options.minutes):
            clip = folder / f"{minutes}.mp4"
            make_video(clip, minutes * 60 * FPS)
            for how, place in (("embed", "direct"), ("decode", "stages"), ("embed stored frames", "stages")):
                label = f"{how}, {minutes} min"
                cases.setdefault(how, []).append((label, how, clip, folder / f"{place}{minutes}"))
        for rows in (options.rows // 10, options.rows):
            manifest = make_manifest(folder / f"rows{rows}", rows)
            for label in ("run", "the same run again"):
                case = (f"{label}, {rows} videos", "run", manifest, folder / f"c{rows}")
                cases.setdefault(label, []).append(case)
        for pair in cases.values():
            before: tuple[float, float] | None = None
            for label, how, source, place in pair:
                peak, child, seconds = measure(how, source, place, options.trace)
                growth = f"{peak - before[0]:+8.1f} {child - before[1]:+8.1f}" if before else ""
                print(f"{label:<32} {peak:>7.1f} {child:>8.1f} {seconds:>8.1f}   {growth}", flush=True)
                before = peak, child
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
