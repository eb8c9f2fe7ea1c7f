"""What looking after a collection costs: making it, verify, compact, and reading its commits, on made-up vectors.

    python benchmarks/upkeep.py [--videos 50000] [--per-commit 100]

Prints seconds and peak memory of each, and checks that the digest stays the same.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from indexes.generations import current_generation
from pipeline import commands, store
from pipeline.collection import Collection
from pipeline.commits import Row
from pipeline.compact import compact
from pipeline.indexing import build_collection_index
from pipeline.select import embed_video, parse_keep, select_frames
from pipeline.types import FrameFeatures, Outcome
from pipeline.verify import verify_collection

DIM, FRAMES_PER_VIDEO = 512, 15


def make(folder: Path, n_videos: int, per_commit: int) -> Collection:
    """A collection of random features and their selections, as so many small runs leave it."""
    collection = Collection.create(folder, {"model": "made-up", "sampling": {"mode": "fps", "value": 1.0}})
    spec = {"dim": DIM, "temperature": 0.05}
    collection.update(collection.config, {"name": "made-up", "fingerprint": "0" * 64, "spec": spec})
    collection.use_selection("uniform-4", {"selector": "uniform", "keep": "4", "topics": []})
    rng = np.random.default_rng(0)
    times = np.arange(FRAMES_PER_VIDEO, dtype=np.float64)
    with collection.writing("benchmark") as writer:
        for start in range(0, n_videos, per_commit):
            rows, features, embeddings = [], [], []
            for number in range(start, min(start + per_commit, n_videos)):
                name = f"{number:032x}"
                vectors = rng.standard_normal((FRAMES_PER_VIDEO, DIM)).astype(np.float32)
                vectors = store.round_features(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
                video = store.StoredVideo(name, name, float(FRAMES_PER_VIDEO))
                of_frames = FrameFeatures(name, vectors, times, 1.0)
                features.append((video, of_frames))
                selection = select_frames(of_frames, "uniform", parse_keep("4"))
                embeddings.append((video, embed_video(of_frames, selection)))
                rows.append(Row(Outcome(name, f"/videos/{number}.mp4", "ok", "run"), name, 1, 1, 1, 15.0))
            files = [
                ("features", lambda path, f=features: store.write_features(path, f)),
                ("embeddings/uniform-4", lambda path, e=embeddings: store.write_embeddings(path, e)),
            ]
            writer.commit("run", rows, files)
        build_collection_index(writer, "auto", None, print, bury=False)
    return collection


def timed(what: str, act: Callable[[], object]) -> None:
    """Prints how long something takes, and the peak of this process's memory so far."""
    started = time.monotonic()
    act()
    peak = int(Path("/proc/self/status").read_text("ascii").split("VmHWM:")[1].split()[0]) / 1024
    print(f"{what:<40} {time.monotonic() - started:7.1f} s   peak so far {peak:6.0f} MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--videos", type=int, default=50_000)
    parser.add_argument("--per-commit", type=int, default=100)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp()) / "collection"
    machine = commands.Machine(quiet=True, say=lambda line: print(f"    {line}", file=sys.stderr))
    try:
        timed(f"making {given.videos} videos", lambda: make(folder, given.videos, given.per_commit))
        before = verify_collection(folder)
        n_bytes = before["bytes"] + sum(p.stat().st_size for p in current_generation(folder / "index").iterdir())
        print(f"{before['files']} files, {n_bytes / 1e9:.2f} GB")
        timed("verify", lambda: verify_collection(folder))
        timed("compact", lambda: print("   ", compact(folder, machine)))
        timed(
            "verify",
            lambda: print("    the digest is the same:", verify_collection(folder)["digest"] == before["digest"]),
        )
        timed("reading the commits, as every command does", lambda: Collection(folder).state())
    finally:
        shutil.rmtree(folder.parent)


if __name__ == "__main__":
    main()
