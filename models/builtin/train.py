"""Trains the builtin encoder on rendered scenes: `python -m models.builtin.train`.

Frames of combinations that are not held out are painted, squeezed through video-like compression, and matched with
their captions by a symmetric contrastive loss. Partial captions fit several frames of a batch; all that fit are
positives, with equal weight. The same seed on the same machine and libraries gives the same weights.

`--videos` puts the setting of the FineCo paper in place of a part of the batch: videos of which a caption matches a
quarter of the frames, with no word on which. It is there to be compared, not used: where every frame has a caption of
its own, pairs of frames and captions teach more. With `--frames 6000 --steps 300`, held-out R@1 of frames, and of noisy
videos re-scored: pairs 0.89 and 0.49; `--videos 16` 0.55 and 0.09; with `--frame-weight 0.5` as well 0.27 and 0.03.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import random
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from models.builtin import model as builtin
from models.builtin.world import (
    ATTRIBUTES,
    EMPTY_KINDS,
    VALUES,
    EmptyKind,
    EmptyPainter,
    Painter,
    Scene,
    all_scenes,
    caption,
    distractors,
    partial_caption,
    vocabulary,
)
from models.losses import fineco_loss, frame_scores

PARTIAL_SHARE = 0.25
BATCH = 128
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.02
SHIFT_PX = 3  # frames are moved by up to so many pixels while training
CANDIDATES = 100

# Frames of a video in training and of one that is measured; of its scene, and without a scene. The rest: distractors.
VIDEO_FRAMES, VIDEO_RELEVANT, VIDEO_EMPTY = 8, 2, 2
NOISY_FRAMES, NOISY_RELEVANT, NOISY_EMPTY = 16, 2, 4
EMPTY_SHARE = 8  # one frame without a scene is painted for so many scenes

Shown = Scene | EmptyKind


def render(job: tuple[Shown, int]) -> NDArray[np.uint8]:
    """One frame as the encoder will meet it: a painted picture, compressed, at the encoder's size."""
    shown, seed = job
    rng = random.Random(seed)
    painter = Painter(shown, seed) if isinstance(shown, Scene) else EmptyPainter(shown, seed)
    frame = Image.fromarray(painter.frame(rng.uniform(0, 6)))
    buffer = io.BytesIO()
    frame.save(buffer, "JPEG", quality=rng.randrange(25, 92))
    with Image.open(buffer) as image:
        small = image.resize((builtin.IMAGE_SIZE, builtin.IMAGE_SIZE), Image.Resampling.BICUBIC)
    return np.asarray(small)


def render_many(jobs: list[tuple[Shown, int]], workers: int) -> NDArray[np.uint8]:
    """(N, 112, 112, 3) frames of the jobs, painted in `workers` processes."""
    if workers == 1:
        return np.stack([render(job) for job in jobs])
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        return np.stack(pool.map(render, jobs, chunksize=64))


def codes(shown: Sequence[Shown]) -> NDArray[np.int64]:
    """(N, 5) attribute values as numbers; -1 where there is no scene."""
    nothing = [-1] * len(ATTRIBUTES)
    return np.array(
        [[VALUES[a].index(getattr(s, a)) for a in ATTRIBUTES] if isinstance(s, Scene) else nothing for s in shown],
        np.int64,
    )


def video_rows(row: int, attributes: NDArray[np.int64], rng: random.Random) -> list[int]:
    """Draws the frames of a video about the scene of frame `row`: VIDEO_FRAMES rows of `attributes` (N, 5)."""
    shared = (attributes == attributes[row]).sum(1)
    scene, n_attributes = attributes[:, 0] >= 0, len(ATTRIBUTES)

    def draw(among: NDArray[np.bool_]) -> int:
        return int(rng.choice(np.flatnonzero(among)))

    rows = [draw(shared == n_attributes) for _ in range(VIDEO_RELEVANT)] + [draw(~scene) for _ in range(VIDEO_EMPTY)]
    while len(rows) < VIDEO_FRAMES:
        near = shared == rng.randint(2, n_attributes - 1)
        rows.append(draw(near if near.any() else scene & (shared < n_attributes)))
    return rows


def contrastive_loss(frames: Tensor, texts: Tensor, log_scale: Tensor, fits: Tensor) -> Tensor:
    """Symmetric cross-entropy over cosines; `fits` (B_text, B_frame) says which pairs are positives."""
    return _cross_entropy(F.normalize(texts, dim=-1) @ F.normalize(frames, dim=-1).T * _scale(log_scale), fits)


def video_loss(frames: Tensor, texts: Tensor, log_scale: Tensor, fits: Tensor, frame_weight: float) -> Tensor:
    """VideoCLIP's pair loss over videos, plus FineCo's loss over the frames of each (docs/METHOD.md section 1).

    Args:
        frames: (B, T, D), one video in each row.
        texts: (B, D), the caption of each video.
        log_scale: Scalar; a pair's score is the mean of its frames' cosines, times the scale.
        fits: (B_text, B_video) bool, which pairs are positives.
        frame_weight: Of FineCo's loss.
    """
    pooled = F.normalize(frames, dim=-1).mean(1)
    loss = _cross_entropy(F.normalize(texts, dim=-1) @ pooled.T * _scale(log_scale), fits)
    if frame_weight == 0:
        return loss
    scores = frame_scores(frames, texts, "cosine") * _scale(log_scale)
    mask = torch.ones_like(scores, dtype=torch.bool)
    return loss + frame_weight * fineco_loss(scores, mask, VIDEO_RELEVANT / VIDEO_FRAMES).mean()


def _scale(log_scale: Tensor) -> Tensor:
    return log_scale.exp().clamp(max=100)


def _cross_entropy(logits: Tensor, fits: Tensor) -> Tensor:
    targets = fits.float()
    by_text = -(targets / targets.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1).mean()
    by_frame = -(targets / targets.sum(0, keepdim=True) * logits.log_softmax(0)).sum(0).mean()
    return (by_text + by_frame) / 2


def train(
    seed: int,
    n_frames: int,
    steps: int,
    workers: int,
    n_videos: int = 0,
    frame_weight: float = 0.0,
    log: bool = True,
) -> tuple[builtin.DualEncoder, dict[str, int]]:
    """Trains from scratch.

    Args:
        seed: Of everything.
        n_frames: Painted frames to draw from, beside those without a scene.
        steps: Of BATCH frames each, or n_frames if that is less.
        workers: Painting processes.
        n_videos: So many times VIDEO_FRAMES frames of each batch come as videos, the others as pairs with a caption.
        frame_weight: Of FineCo's frame loss over the videos.
        log: Whether to print the loss now and then.

    Returns:
        The model and its vocabulary (word -> id).

    Raises:
        ValueError: A batch has fewer frames than its videos.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    n_pairs = min(BATCH, n_frames) - n_videos * VIDEO_FRAMES
    if n_pairs < 0:
        raise ValueError(f"{n_videos} videos of {VIDEO_FRAMES} frames in a batch of {min(BATCH, n_frames)} frames")
    scenes = [s for s in all_scenes() if not s.held_out]
    chosen = [rng.choice(scenes) for _ in range(n_frames)]
    empty = [rng.choice(EMPTY_KINDS) for _ in range(-(-n_frames // EMPTY_SHARE))] if n_videos else []
    frames = torch.from_numpy(render_many([(s, rng.randrange(1 << 40)) for s in [*chosen, *empty]], workers))
    attributes = codes([*chosen, *empty])
    words = {word: number for number, word in enumerate(vocabulary(), 2)}
    model = builtin.DualEncoder(len(words) + 2).to(memory_format=torch.channels_last).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    order = torch.Generator().manual_seed(seed)
    started = time.monotonic()
    for step in range(steps):
        spoken = torch.randint(n_frames, (n_pairs + n_videos,), generator=order).tolist()
        rows = spoken[:n_pairs] + [r for row in spoken[n_pairs:] for r in video_rows(row, attributes, rng)]
        texts, said = [], torch.ones(len(spoken), len(ATTRIBUTES), dtype=torch.bool)
        for i, row in enumerate(spoken):
            if rng.random() < PARTIAL_SHARE:
                text, named = partial_caption(chosen[row], rng)
                said[i] = torch.tensor([a in named for a in ATTRIBUTES])
            else:
                text = caption(chosen[row], rng)
            texts.append(text)
        wanted, there = torch.from_numpy(attributes[spoken]), torch.from_numpy(attributes[rows])
        fits = ((wanted[:, None] == there[None]) | ~said[:, None]).all(
            -1
        )  # (B_text, B_frame); all captions name a shape
        dx, dy = torch.randint(-SHIFT_PX, SHIFT_PX + 1, (2,), generator=order).tolist()
        pixels = builtin.normalise(torch.roll(frames[rows], (dy, dx), (1, 2)))
        # bfloat16 where the processor has it is three times as fast; the loss stays in float32
        with torch.autocast("cpu", torch.bfloat16):
            frame_features = model.frames(pixels)
            text_features = model.text(builtin.tokenize(texts, words))
        frame_features, text_features = frame_features.float(), text_features.float()
        parts = []
        if n_pairs:
            pairs = slice(0, n_pairs)
            parts.append(
                contrastive_loss(frame_features[pairs], text_features[pairs], model.log_scale, fits[pairs, pairs])
            )
        if n_videos:
            video_features = frame_features[n_pairs:].view(n_videos, VIDEO_FRAMES, -1)
            video_fits = fits[n_pairs:, n_pairs:].reshape(n_videos, n_videos, VIDEO_FRAMES).any(-1)
            parts.append(video_loss(video_features, text_features[n_pairs:], model.log_scale, video_fits, frame_weight))
        loss = torch.stack(parts).sum()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        if log and (step % 100 == 99 or step == steps - 1):
            print(f"step {step + 1}/{steps}  loss {loss.item():.3f}  {time.monotonic() - started:.0f} s", flush=True)
    return model.eval(), words


def save(model: builtin.DualEncoder, words: dict[str, int], folder: Path) -> None:
    """Writes the weights (float16, but for the normalisation's statistics) and the vocabulary."""
    state = {}
    for name, tensor in model.state_dict().items():
        half = tensor.is_floating_point() and "running" not in name
        state[name] = (tensor.half() if half else tensor).contiguous()
    save_file(state, folder / builtin.WEIGHTS.name)
    (folder / builtin.VOCABULARY.name).write_text(json.dumps(list(words)) + "\n", "utf-8")
    digest = builtin.digest_of(folder / builtin.WEIGHTS.name, folder / builtin.VOCABULARY.name)
    (folder / builtin.DIGEST.name).write_text(json.dumps(digest) + "\n", "utf-8")


def held_out_recall(encoder: builtin.BuiltinEncoder, seed: int, draws: int) -> float:
    """Text-to-frame R@1 among frames of 100 distinct held-out combinations, mean over draws."""
    rng = random.Random(seed)
    held_out = [s for s in all_scenes() if s.held_out]
    right = 0
    for _ in range(draws):
        scenes = rng.sample(held_out, CANDIDATES)
        frames = render_many([(s, rng.randrange(1 << 40)) for s in scenes], 1)
        similarity = encoder.encode_text([caption(s, rng) for s in scenes]) @ encoder.encode_frames(frames).T
        right += int((similarity.argmax(1) == np.arange(CANDIDATES)).sum())
    return right / (draws * CANDIDATES)


def plan_noisy_videos(rng: random.Random) -> tuple[list[Scene], list[list[Shown]]]:
    """100 held-out scenes, and a video for each: NOISY_FRAMES frames, those of the scene first.

    Half of the distractors resemble the video's own scene, which makes the moment hard to find; the others resemble
    scenes of other videos, which makes the video hard to find.
    """
    scenes = rng.sample([s for s in all_scenes() if s.held_out], CANDIDATES)

    def near(scene: Scene) -> Scene:
        while (other := distractors(scene, rng, 1)[0]) in scenes:
            pass
        return other

    videos: list[list[Shown]] = []
    for scene in scenes:
        video: list[Shown] = [scene] * NOISY_RELEVANT
        video += [rng.choice(EMPTY_KINDS) for _ in range(NOISY_EMPTY)]
        while len(video) < NOISY_FRAMES:
            video.append(near(scene if len(video) % 2 else rng.choice(scenes)))
        videos.append(video)
    return scenes, videos


def noisy_recall(encoder: builtin.BuiltinEncoder, seed: int, draws: int, workers: int = 1) -> tuple[float, float]:
    """Text-to-video R@1 among 100 noisy videos (`plan_noisy_videos`), mean over draws.

    Returns:
        By the mean of a video's frames, and by the softmax-weighted mean of its frames' cosines (docs/METHOD.md
        section 3).
    """
    rng = random.Random(seed)
    by_mean = by_softmax = 0
    for _ in range(draws):
        scenes, videos = plan_noisy_videos(rng)
        frames = render_many([(shown, rng.randrange(1 << 40)) for video in videos for shown in video], workers)
        features = torch.from_numpy(np.concatenate([encoder.encode_frames(f) for f in np.array_split(frames, 8)]))
        texts = torch.from_numpy(encoder.encode_text([caption(s, rng) for s in scenes]))
        pooled = F.normalize(features.view(CANDIDATES, NOISY_FRAMES, -1).mean(1), dim=-1)
        scores = (texts @ features.T).view(CANDIDATES, CANDIDATES, NOISY_FRAMES)
        rescored = ((scores / encoder.spec.temperature).softmax(-1) * scores).sum(-1)
        right = torch.arange(CANDIDATES)
        by_mean += int(((texts @ pooled.T).argmax(1) == right).sum())
        by_softmax += int((rescored.argmax(1) == right).sum())
    return by_mean / (draws * CANDIDATES), by_softmax / (draws * CANDIDATES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--frames", type=int, default=20_000, help="painted frames to train on")
    parser.add_argument("--steps", type=int, default=1100)
    parser.add_argument("--videos", type=int, default=0, help=f"of each batch, videos of {VIDEO_FRAMES} frames")
    parser.add_argument("--frame-weight", type=float, default=0.0, help="of FineCo's frame loss over the videos")
    parser.add_argument("--workers", type=int, default=2, help="painting processes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=builtin.WEIGHTS.parent, help="folder for weights and vocabulary")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not 0 <= options.videos * VIDEO_FRAMES <= min(BATCH, options.frames):
        parser.error(f"--videos {options.videos}: 0 to {BATCH // VIDEO_FRAMES} fit into a batch")
    model, words = train(
        options.seed, options.frames, options.steps, options.workers, options.videos, options.frame_weight
    )
    save(model, words, options.out)
    encoder = builtin.BuiltinEncoder(model, words, "", "cpu", "fp32")
    print(f"held-out text-to-frame R@1 over {CANDIDATES}: {held_out_recall(encoder, 1, 5):.3f}")
    by_mean, by_softmax = noisy_recall(encoder, 1, 5, options.workers)
    print(f"the same among noisy videos: {by_mean:.3f} by mean pooling, {by_softmax:.3f} re-scored")


if __name__ == "__main__":
    main()
