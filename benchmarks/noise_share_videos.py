"""Videos whose share of relevant frames is known: painted shots, embedded once, composed anew for every share.

A video shows one subject scene for a share of its frames and noise for the rest. Half of the noise shots show another
scene, half no subject at all. The other scenes are `alike`: they share two to four of the five attributes with the
subject; or they are `any`: scenes like the subjects of other videos. Every frame is painted, squeezed through JPEG and
embedded by the built-in encoder once; a video is then a list of rows of that bank, so that all shares are about the
same subjects, captions, queries and looks.
"""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models.base import Encoder
from models.builtin.world import EMPTY_KINDS, EmptyPainter, Painter, Scene, all_scenes, caption, distractors
from pipeline.files import write_file
from pipeline.types import Float32, UInt8

N_FRAMES = 32  # of a video, at one frame a second: the longest clip VideoCLIP takes
SHOT_FRAMES = 4  # of a painted shot; a subject shows all of them, noise two to four
LOOKS = N_FRAMES // SHOT_FRAMES  # of a subject: backgrounds, light and exact places
N_DISTRACTORS = 6  # shots of a video, and as many empty ones: enough to fill it
N_TEMPLATES = 5
JPEG_QUALITY = (25, 92)
BATCH = 64
BANK_VERSION = 1  # raise it when the same sizes would give other shots

Noise = Literal["alike", "any"]
Rows = NDArray[np.int32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Videos of each split, and shots without a subject that each split draws from."""

    train: int = 800
    validation: int = 150
    test: int = 500
    empty: int = 400


@dataclass(frozen=True, slots=True)
class Shot:
    """What one painter paints: a scene, or no subject at all."""

    scene: Scene | None
    seed: int


@dataclass(frozen=True, slots=True)
class Split:
    """Subjects with their texts, and what their videos are made of, as rows of the bank.

    Attributes:
        subjects: S scenes, no two alike.
        captions, queries: S texts each about the subject, in two different templates.
        subject_rows: (S, LOOKS, SHOT_FRAMES).
        distractor_rows: (S, N_DISTRACTORS, SHOT_FRAMES), scenes like the subject.
        empty_rows: (E, SHOT_FRAMES).
    """

    subjects: tuple[Scene, ...]
    captions: tuple[str, ...]
    queries: tuple[str, ...]
    subject_rows: Rows
    distractor_rows: Rows
    empty_rows: Rows


def plan(sizes: Sizes, seed: int = 0) -> tuple[dict[str, Split], list[Shot]]:
    """The screenplay: three splits, and the shots of the bank in the order of their rows.

    Test and validation ask for combinations that the encoder never saw; training takes others. No distractor, in any
    split, is a scene that test or validation ask for, so that every query has one right answer.
    """
    rng = random.Random(seed)
    held_out = rng.sample([s for s in all_scenes() if s.held_out], sizes.validation + sizes.test)
    parts = {
        "train": rng.sample([s for s in all_scenes() if not s.held_out], sizes.train),
        "validation": held_out[: sizes.validation],
        "test": held_out[sizes.validation :],
    }
    asked = set(held_out)
    shots: list[Shot] = []

    def add(scenes: list[Scene | None]) -> Rows:
        first = len(shots) * SHOT_FRAMES
        shots.extend(Shot(scene, rng.randrange(1 << 40)) for scene in scenes)
        return np.arange(first, len(shots) * SHOT_FRAMES, dtype=np.int32).reshape(len(scenes), SHOT_FRAMES)

    def like(subject: Scene) -> list[Scene | None]:
        found: list[Scene | None] = []
        while len(found) < N_DISTRACTORS:
            found += [s for s in distractors(subject, rng, N_DISTRACTORS) if s not in asked]
        return found[:N_DISTRACTORS]

    splits = {}
    for name, subjects in parts.items():
        templates = [rng.sample(range(N_TEMPLATES), 2) for _ in subjects]
        splits[name] = Split(
            tuple(subjects),
            tuple(caption(s, rng, first) for s, (first, _) in zip(subjects, templates, strict=True)),
            tuple(caption(s, rng, second) for s, (_, second) in zip(subjects, templates, strict=True)),
            np.stack([add([subject] * LOOKS) for subject in subjects]),
            np.stack([add(like(subject)) for subject in subjects]),
            add([None] * sizes.empty),
        )
    return splits, shots


def paint(shot: Shot, size: int = 112) -> UInt8:
    """(SHOT_FRAMES, size, size, 3): a shot at one frame a second, compressed, as the encoder will meet it."""
    rng = random.Random(shot.seed)
    if shot.scene is None:
        painter: Painter | EmptyPainter = EmptyPainter(rng.choice(EMPTY_KINDS), shot.seed)
    else:
        painter = Painter(shot.scene, shot.seed)
    start, quality = rng.uniform(0, 3), rng.randrange(*JPEG_QUALITY)
    frames = []
    for second in range(SHOT_FRAMES):
        buffer = io.BytesIO()
        Image.fromarray(painter.frame(start + second)).save(buffer, "JPEG", quality=quality)
        with Image.open(buffer) as image:
            frames.append(np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)))
    return np.stack(frames)


def embed_shots(shots: list[Shot], encoder: Encoder, workers: int) -> Float32:
    """(SHOT_FRAMES * number of shots, D) unit rows, rounded to float16 as the store does."""
    done = []
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        batch = []
        for number, frames in enumerate(pool.imap(paint, shots, chunksize=16), 1):
            batch.append(frames)
            if len(batch) * SHOT_FRAMES >= BATCH or number == len(shots):
                done.append(encoder.encode_frames(np.concatenate(batch)).astype(np.float16))
                batch = []
    return np.concatenate(done).astype(np.float32)


def load_bank(folder: Path, encoder: Encoder, sizes: Sizes, workers: int) -> tuple[dict[str, Split], Float32]:
    """The splits and the features of every painted frame; painted only when `folder` has not got them yet."""
    splits, shots = plan(sizes)
    key = repr((encoder.spec.fingerprint, asdict(sizes), BANK_VERSION))
    path = folder / f"bank-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        features = embed_shots(shots, encoder, workers).astype(np.float16)

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:  # given a name, numpy would add its own suffix
                np.save(file, features)

        write_file(path, write)
    return splits, np.load(path).astype(np.float32)


def compose(split: Split, noise: Noise, n_relevant: int, seed: int) -> tuple[Rows, Mask]:
    """One video for each subject: `n_relevant` of its frames show the subject, the others noise.

    A smaller number takes the subject's first frames and only adds noise, so that the videos of one seed differ between
    shares in nothing else. The subject's frames are one run, in a place drawn for each video.

    Returns:
        Rows of the bank (S, N_FRAMES), and which of them show the subject.
    """
    videos = np.empty((len(split.subjects), N_FRAMES), np.int32)
    relevant = np.zeros(videos.shape, np.bool_)
    for number in range(len(videos)):
        rng = random.Random(f"{seed}/{number}")
        shots = [*split.distractor_rows[number]]
        if noise == "any":  # what resembles another subject resembles this one no more than chance
            shots = [split.distractor_rows[rng.randrange(len(videos)), rng.randrange(N_DISTRACTORS)] for _ in shots]
        shots += [split.empty_rows[rng.randrange(len(split.empty_rows))] for _ in range(N_DISTRACTORS)]
        rng.shuffle(shots)
        lengths = [rng.randint(2, SHOT_FRAMES) for _ in shots]
        frames = np.concatenate([shot[:n] for shot, n in zip(shots, lengths, strict=True)])
        frames = np.concatenate([frames, *shots])[: N_FRAMES - n_relevant]  # rarely too few: they come again
        cuts = [0, *(cut for cut in np.cumsum(lengths).tolist() if cut < len(frames)), len(frames)]
        at = cuts[int(rng.random() * len(cuts))]
        subject = split.subject_rows[number].reshape(-1)[:n_relevant]
        videos[number] = np.concatenate([frames[:at], subject, frames[at:]])
        relevant[number, at : at + n_relevant] = True
    return videos, relevant
