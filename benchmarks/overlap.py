"""How well decoding and embedding overlap: a whole run against decoding alone and embedding alone, in one process.

    python benchmarks/overlap.py [VIDEO] [--copies 8] [--rounds 3]

Makes a 720p h264 clip with B-frames (needs the ffmpeg command) unless one is given, and takes it several times. Three
encoders: the built-in one; a stand-in for a GPU that takes as long as decoding does, but on no processor of this
machine; and with --vit FOLDER one that needs the same processors as decoding, where the sum is the least possible.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median

import numpy as np

from models.base import Encoder, EncoderSpec
from models.registry import load_encoder
from pipeline import commands
from pipeline.config import EmbedOptions, SelectOptions
from pipeline.decode import DecodedFrame, DecodeEvent, VideoDecoded
from pipeline.embed import FrameEmbedder
from pipeline.run import default_workers, start_pool
from pipeline.sampling import Sampling
from pipeline.types import DecodeLimits, Float32, FrameGeometry, UInt8, Video

BATCH = 32


class SleepingEncoder:
    """Takes a given time per frame without using the processor, as a GPU does."""

    device: str = "cpu"
    precision: str = "fp32"

    def __init__(self, seconds_per_frame: float) -> None:
        self.spec = EncoderSpec("sleeping", 8, FrameGeometry(224, 224), (0, 0, 0), (1, 1, 1), 1, 1.0, 1, "", "none")
        self._seconds = seconds_per_frame

    def encode_frames(self, frames: UInt8) -> Float32:
        time.sleep(self._seconds * len(frames))
        return np.eye(1, 8, dtype=np.float32).repeat(len(frames), axis=0)

    def encode_text(self, texts: Sequence[str]) -> Float32:
        return np.eye(1, 8, dtype=np.float32).repeat(len(texts), axis=0)


def make_clip(path: Path) -> None:
    """30 s of 720p with movement and grain, B-frames, groups of 4 s."""
    source = "testsrc2=size=1280x720:rate=30:duration=30,noise=alls=12:allf=t"
    encode = ["-c:v", "libx264", "-preset", "medium", "-crf", "26", "-g", "120", "-pix_fmt", "yuv420p"]
    subprocess.run(["ffmpeg", "-v", "error", "-f", "lavfi", "-i", source, *encode, str(path)], check=True)


def timed(work: Callable[[], object]) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started


def decode_alone(videos: list[Video], geometry: FrameGeometry) -> list[tuple[Video, list[UInt8]]]:
    frames: dict[str, list[UInt8]] = {v.video_id: [] for v in videos}
    with start_pool(default_workers(), Sampling("fps", 1.0), geometry, False, DecodeLimits()) as pool:
        for event in pool.decode(videos, threading.Event()):
            if isinstance(event, DecodedFrame):
                frames[event.video.video_id].append(event.data.copy())
    return [(v, frames[v.video_id]) for v in videos]


def embed_alone(encoder: Encoder, decoded: list[tuple[Video, list[UInt8]]]) -> None:
    def events() -> Iterator[DecodeEvent]:
        for video, frames in decoded:
            for i, frame in enumerate(frames):
                yield DecodedFrame(video, 1, float(i), frame)
            yield VideoDecoded(video, 1, float(len(frames)), 1.0, 0, (), 0.0, 0.0)

    for _ in FrameEmbedder(encoder, BATCH).embed(events(), threading.Event()):
        pass


def whole_run(encoder: Encoder, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as place:
        machine = commands.Machine(quiet=True, say=lambda line: None, batch_size=BATCH)
        options = EmbedOptions(sampling=Sampling("fps", 1.0))
        commands.run(
            Path(place) / "c", commands.Sources([str(folder)]), options, SelectOptions(), machine, "auto", encoder
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", nargs="?", type=Path)
    parser.add_argument("--copies", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vit", type=Path, help="local-dir folder of a ViT")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        clip = options.video or folder / "clip.src"
        if options.video is None:
            make_clip(clip.with_suffix(".mp4"))
            clip = clip.with_suffix(".mp4").rename(clip)
        for i in range(options.copies):  # a byte behind the end makes each a video of its own
            copy = Path(shutil.copy(clip, folder / f"copy{i}.mp4"))
            copy.write_bytes(copy.read_bytes() + bytes([i]))
        videos = [Video(p.stem, "0" * 32, str(p), 0, 0, 0) for p in sorted(folder.glob("copy*.mp4"))]
        decode_alone(videos[:1], FrameGeometry(224, 224))
        seconds = timed(lambda: decode_alone(videos, FrameGeometry(224, 224)))
        n_frames = sum(len(frames) for _, frames in decode_alone(videos, FrameGeometry(224, 224)))
        encoders: dict[str, Encoder] = {
            "builtin": load_encoder("builtin", "cpu"),
            "sleeping": SleepingEncoder(seconds / n_frames),
        }
        if options.vit:
            encoders["ViT"] = load_encoder(f"open_clip:local-dir:{options.vit}", "cpu")
        print(f"{len(videos)} videos, {n_frames} frames, {default_workers()} decoding processes, batches of {BATCH}")
        print(f"{'encoder':<10} {'decode s':>9} {'embed s':>9} {'run s':>9} {'run / slower':>13} {'run / sum':>10}")
        for name, encoder in encoders.items():
            rows = []
            for _ in range(options.rounds):
                decoded: list[tuple[Video, list[UInt8]]] = []
                decode = timed(lambda: decoded.extend(decode_alone(videos, encoder.spec.geometry)))  # noqa: B023
                embed = timed(lambda: embed_alone(encoder, decoded))  # noqa: B023
                run = timed(lambda: whole_run(encoder, folder))  # noqa: B023
                rows.append((decode, embed, run, run / max(decode, embed), run / (decode + embed)))
            middle = [median(column) for column in zip(*rows, strict=True)]
            print(
                f"{name:<10} "
                + " ".join(f"{value:>{w}.2f}" for value, w in zip(middle, (9, 9, 9, 13, 10), strict=True))
            )


if __name__ == "__main__":
    main()
