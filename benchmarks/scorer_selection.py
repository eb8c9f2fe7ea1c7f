"""What the built-in encoder's scorer is worth for a search, by which of its frames are kept.

    python benchmarks/scorer_selection.py [--videos 120] [--workers 2]

Rendered videos about scenes that nobody was trained on; the video's caption is the query. R@1 by re-scoring and by
pooled vectors for `caption`, for the best frame of each part by the scorer (what `--selector scorer` keeps), for the
frames that it scores highest of all, for `uniform`, and for evenly spaced frames.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence

import numpy as np

from models.base import Encoder
from models.builtin.world import all_scenes, caption
from models.registry import load_encoder
from models.scorer import load_scorer, score_frames_without_text
from models.scorer_file import BUILTIN
from pipeline.moments import pool
from pipeline.rescore import rescore
from pipeline.select import best_of_parts, cosines, evenly_spaced, highest, parse_keep, uniform
from pipeline.training.builtin_scorer import SHOT_FRAMES, Shot, Story, lessons_of, plan
from pipeline.types import Float32

WAYS = ("caption", "best of parts", "highest", "uniform", "evenly spaced")


def each_once(n_videos: int) -> list[Story]:
    """Videos as the demo's: six to nine scenes, each once, no empty frame."""
    rng = random.Random("each scene once")
    scenes = all_scenes()
    stories = []
    for subject in rng.sample([scene for scene in scenes if scene.held_out], n_videos):
        shown = rng.sample([scene for scene in scenes if scene != subject], rng.randint(5, 8))
        shown.insert(rng.randrange(len(shown) + 1), subject)
        shots = tuple(Shot(scene, rng.randrange(1 << 32), rng.randint(*SHOT_FRAMES)) for scene in shown)
        stories.append(Story(shots, caption(subject, rng)))
    return stories


def measure(encoder: Encoder, stories: Sequence[Story], workers: int) -> list[list[str]]:
    """A row for each keep: R@1 re-scored / pooled of every way."""
    scorer = load_scorer(BUILTIN)
    features = [lesson.features.astype(np.float32) for lesson in lessons_of(stories, encoder, workers)]
    queries = encoder.encode_text([story.text for story in stories])
    rows = []
    for keep in map(parse_keep, ("0.25", "4")):
        cells = [str(keep.ratio or keep.count)]
        for way in WAYS:
            kept: list[Float32] = []
            for h, z in zip(features, queries, strict=True):
                predicted = score_frames_without_text(scorer, h)
                mask = {
                    "caption": highest(cosines(h, z), keep),
                    "best of parts": best_of_parts(predicted, keep),
                    "highest": highest(predicted, keep),
                    "uniform": uniform(h, keep).kept,
                    "evenly spaced": evenly_spaced(len(h), keep),
                }[way]
                kept.append(h[mask])
            offsets = np.cumsum([0, *map(len, kept)])
            frames, pooled = np.concatenate(kept), np.stack([pool(h, np.zeros(len(h), np.float32)) for h in kept])
            by_frames = np.stack([rescore(cosines(frames, z), offsets, encoder.spec.temperature) for z in queries])
            cells.append(" / ".join(f"{recall_at_1(scores):.2f}" for scores in (by_frames, queries @ pooled.T)))
        rows.append(cells)
    return rows


def recall_at_1(scores: Float32) -> float:
    """Share of rows whose own column is above all others."""
    return float(np.mean((scores >= scores.diagonal()[:, None]).sum(1) == 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=120)
    parser.add_argument("--workers", type=int, default=2, help="painting processes")
    options = parser.parse_args()
    encoder = load_encoder("builtin", "cpu", "fp32")
    kinds = {
        "resemble the caption's": plan(options.videos, "selection, alike", held_out=True, alike=1.0),
        "any": plan(options.videos, "selection, any", held_out=True, alike=0.0),
        "each once, no empty frame": each_once(options.videos),
    }
    print(f"| other scenes | keep | {' | '.join(WAYS)} |\n|{'---|' * (len(WAYS) + 2)}")
    for kind, stories in kinds.items():
        for row in measure(encoder, stories, options.workers):
            print(f"| {kind} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
