"""Makes the scorer that is shipped for the built-in encoder: `python -m pipeline.training.builtin_scorer`.

Rendered videos show the scene that their caption speaks of, other scenes, and frames without a scene. No frame says
which scene the caption names. What can be learnt is that it names none of the empty frames, and that the scene a video
comes back to, or that its others resemble, is the likelier one. Where neither helps, as in `fineco demo`, whose videos
show every scene once and no empty frame, it has nothing to go by and does worse than evenly spaced frames.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from models.base import Encoder
from models.builtin.world import EMPTY_KINDS, EmptyKind, EmptyPainter, Painter, Scene, all_scenes, caption, distractors
from models.registry import load_encoder
from models.scorer import FrameScorer, save_scorer, score_frames_without_text
from models.scorer_file import BUILTIN
from pipeline.config import DEFAULT_KEEP
from pipeline.select import evenly_spaced, highest, parse_keep
from pipeline.store import round_features
from pipeline.training.checkpoints import write_weights
from pipeline.training.scorer import Lesson, Part, distil, facts_of, lesson, measure
from pipeline.types import Bool, FrameFeatures, TimedText, UInt8

SHOTS = (5, 12)  # of a video; each has so many frames:
SHOT_FRAMES = (2, 6)
SUBJECT_SHOTS = (1, 3)
EMPTY_SHARE = (0.2, 0.8)  # of the other shots
JPEG_QUALITY = (30, 92)
KEEP = parse_keep(DEFAULT_KEEP)


@dataclass(frozen=True, slots=True)
class Shot:
    """Some seconds of one scene, or of frames that show none."""

    shows: Scene | EmptyKind
    seed: int
    n_frames: int


@dataclass(frozen=True, slots=True)
class Story:
    """What one video shows, and the text that speaks of it."""

    shots: tuple[Shot, ...]
    text: str


def plan(n_videos: int, seed: str, held_out: bool, alike: float) -> list[Story]:
    """Draws videos.

    Args:
        held_out: About scenes that the built-in encoder never saw in training, or about those it did.
        alike: Share of the videos whose other scenes resemble the subject; in the rest they are any.
    """
    rng = random.Random(seed)
    scenes = [scene for scene in all_scenes() if scene.held_out == held_out]
    stories = []
    for _ in range(n_videos):
        subject = rng.choice(scenes)
        n_shots, n_subject = rng.randint(*SHOTS), rng.randint(*SUBJECT_SHOTS)
        n_empty = round(rng.uniform(*EMPTY_SHARE) * (n_shots - n_subject))
        shown: list[Scene | EmptyKind] = [subject] * n_subject
        shown += [rng.choice(EMPTY_KINDS) for _ in range(n_empty)]
        others = n_shots - len(shown)
        shown += distractors(subject, rng, others) if rng.random() < alike else rng.sample(all_scenes(), others)
        rng.shuffle(shown)
        shots = tuple(Shot(what, rng.randrange(1 << 32), rng.randint(*SHOT_FRAMES)) for what in shown)
        stories.append(Story(shots, caption(subject, rng)))
    return stories


def render(story: Story, side: int) -> UInt8:
    """(T, side, side, 3) frames of a video, one a second, as the encoder meets them: painted, compressed, resized."""
    frames = []
    for shot in story.shots:
        shows, quality = shot.shows, random.Random(shot.seed).randint(*JPEG_QUALITY)
        painter = Painter(shows, shot.seed) if isinstance(shows, Scene) else EmptyPainter(shows, shot.seed)
        for second in range(shot.n_frames):
            buffer = io.BytesIO()
            Image.fromarray(painter.frame(second)).save(buffer, "JPEG", quality=quality)
            with Image.open(buffer) as image:
                frames.append(np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)))
    return np.stack(frames)


def shows_nothing(story: Story) -> Bool:
    """(T,): which of the frames are empty."""
    return np.array([not isinstance(shot.shows, Scene) for shot in story.shots for _ in range(shot.n_frames)])


def lessons_of(stories: Sequence[Story], encoder: Encoder, workers: int) -> list[Lesson]:
    """What the videos teach, painted in `workers` processes."""
    vectors = encoder.encode_text([story.text for story in stories])
    paint = partial(render, side=encoder.spec.geometry.height)
    lessons = []
    with ExitStack() as stack:
        painted: Iterator[UInt8] = map(paint, stories)
        if workers > 1:
            pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(workers))
            painted = pool.imap(paint, stories, chunksize=4)
        for number, frames in enumerate(painted):
            rows = round_features(encoder.encode_frames(frames))
            features = FrameFeatures(str(number), rows, np.arange(len(rows), dtype=np.float64), 1.0)
            taught = lesson(features, [TimedText(stories[number].text)], vectors[number : number + 1], KEEP)
            if taught is None:
                raise ValueError(f"all frames of video {number} score alike")
            lessons.append(taught)
    return lessons


def empty_among_kept(scorer: FrameScorer, stories: Sequence[Story], lessons: Sequence[Lesson]) -> tuple[float, float]:
    """Shares of empty frames among the K that the scorer scores highest, and among those that uniform keeps."""
    rows = []
    for story, video in zip(stories, lessons, strict=True):
        empty = shows_nothing(story)
        kept = highest(score_frames_without_text(scorer, video.features.astype(np.float32)), KEEP)
        rows.append((empty[kept].mean(), empty[evenly_spaced(len(empty), KEEP)].mean()))
    by_scorer, by_uniform = np.mean(rows, axis=0)
    return float(by_scorer), float(by_uniform)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--videos", type=int, default=1200, help="to learn from; a tenth as many say when to stop")
    parser.add_argument("--workers", type=int, default=2, help="painting processes")
    parser.add_argument("--out", type=Path, default=BUILTIN)
    options = parser.parse_args()
    torch.set_num_threads(1)  # more threads round otherwise
    encoder = load_encoder("builtin", "cpu", "fp32")
    stories = {
        "training": plan(options.videos, f"training {options.seed}", held_out=False, alike=0.5),
        "validation": plan(options.videos // 10, f"validation {options.seed}", held_out=False, alike=0.5),
        "alike": plan(150, "held out, alike", held_out=True, alike=1.0),
        "any": plan(150, "held out, any", held_out=True, alike=0.0),
    }
    lessons = {part: lessons_of(videos, encoder, options.workers) for part, videos in stories.items()}
    scorer = distil(lessons["training"], lessons["validation"], options.seed, print)
    for part, what in (("alike", "other scenes resemble the caption's"), ("any", "other scenes are any")):
        measures = asdict(measure(scorer, lessons[part]))
        figures = ", ".join(f"{name} {value:.3g}" for name, value in measures.items())
        empty = empty_among_kept(scorer, stories[part], lessons[part])
        print(f"held-out scenes, {what}: {figures}; empty frames kept {empty[0]:.3f}, by uniform {empty[1]:.3f}")
    parts: dict[Part, list[Lesson]] = {
        "training": lessons["training"],
        "validation": lessons["validation"],
        "held out": lessons["alike"] + lessons["any"],
    }
    facts = facts_of(scorer, encoder, parts, "python -m pipeline.training.builtin_scorer", options.seed)
    record = write_weights(options.out, lambda path: save_scorer(path, scorer, facts))
    print(f"{options.out}: {record.size_bytes} bytes")


if __name__ == "__main__":
    main()
