"""What captions beside videos bring a search, and what they lose for questions about what they do not say.

    python -m benchmarks.moments_with_captions [--seed 1] [--workers 2]    3 minutes on 2 cores

Videos are composed of painted shots as in `benchmarks.moments_at_scale`, eight shots each, a third of them empty.
Beside each stands a text about one of its scenes; `--selector caption --keep 0.25` keeps what it speaks of. Half of the
questions are about the scene that the text beside the right video says, in other words than it; half about a scene
that the text says nothing of. Beside it what `uniform` keeps, which looks at no text. "One mean" is how videos were
proposed before the index held moments.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.moments_at_scale import N_ASKED, Reader, bank_scenes, make_bank
from models.base import Encoder
from models.builtin.world import Scene, caption
from models.registry import load_encoder
from pipeline.commands import Machine, select
from pipeline.config import SelectOptions
from pipeline.demo_scale import Comparison, Shots, compare, index_composed, video_name, write_composed
from pipeline.output import format_table
from pipeline.types import Float32

SIZES = (64, 10_000)
SHOTS = 8
SHOT_FRAMES = (2, 6)
KEEPS = (("caption", "0.25"), ("uniform", "0.25"))
HEADER = ("videos", "selector", "the question is about", "proposed by", "vectors a video", "held", "R@1", "R@5")


def compose(
    shots: Shots, scenes: Sequence[Scene], n_videos: int, rng: random.Random
) -> tuple[list[Float32], list[str], list[int], list[bool]]:
    """Videos, the text beside each, and of each scene that is asked for its video and whether the text is about it.

    Args:
        scenes: Those of `shots.asked` and then of `shots.others`.
        n_videos: As many as there are scenes that are asked for, or more: no video has two of them.
    """
    n_asked = min(N_ASKED, n_videos)
    owners = rng.sample(range(n_videos), n_asked)
    asked_in = {video: scene for scene, video in enumerate(owners)}
    said = [scene % 2 == 0 for scene in range(n_asked)]
    videos, texts = [], []
    for video in range(n_videos):
        shown: list[int | None] = [
            None if rng.random() < 1 / 3 else rng.randrange(len(shots.asked), len(scenes)) for _ in range(SHOTS)
        ]
        about = rng.randrange(len(shots.asked), len(scenes))
        shown[0] = about  # something to speak of
        if video in asked_in:
            shown[1] = asked_in[video]
            about = asked_in[video] if said[asked_in[video]] else about
        rng.shuffle(shown)
        rows = [rng.choice(shots.empty) if s is None else [*shots.asked, *shots.others][s] for s in shown]
        videos.append(np.concatenate([shot[: rng.randint(*SHOT_FRAMES)] for shot in rows]))
        texts.append(caption(scenes[about], rng))
    return videos, texts, owners, said


def rows_of(comparison: Comparison, n_videos: int, selector: str, about: str) -> list[list[str]]:
    """Lines of the table: by one mean, by moments, and exhaustively."""
    found = (comparison.mean, comparison.moments, comparison.exhaustive)
    return [[f"{n_videos:,}", selector, about, *one.cells()] for one in found]


def measure(
    shots: Shots, scenes: Sequence[Scene], encoder: Encoder, n_videos: int, seed: int, folder: Path
) -> list[list[str]]:
    """Composes, selects both ways, indexes and searches; lines of the table."""
    rng = random.Random(f"captions {seed} {n_videos}")
    videos, texts, owners, said = compose(shots, scenes, n_videos, rng)
    questions = [caption(scenes[scene], rng) for scene in range(len(owners))]
    reader = Reader(encoder, questions)
    quiet = Machine(quiet=True, say=lambda line: None)
    collection = write_composed(folder, videos, reader, texts)
    rows = []
    for selector, keep in KEEPS:
        select(folder, SelectOptions(selector, keep), quiet, reader)
        index_composed(collection, reader, quiet)
        for about, wanted in (("what the text says", True), ("another scene", False)):
            asked = [scene for scene in range(len(owners)) if said[scene] == wanted]
            right = [video_name(owners[scene]) for scene in asked]
            found = compare(collection, [questions[scene] for scene in asked], right, reader)
            rows += rows_of(found, n_videos, f"{selector} {keep}", about)
    return rows


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description="What captions beside videos bring a search, and what they lose.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    encoder = load_encoder("builtin", "cpu", "fp32")
    shots, _ = make_bank(encoder, given.seed, given.workers)
    asked, others = bank_scenes(given.seed)
    for n_videos in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            rows = measure(shots, [*asked, *others], encoder, n_videos, given.seed, Path(folder) / "collection")
            print(format_table(rows, HEADER), flush=True)


if __name__ == "__main__":
    main()
