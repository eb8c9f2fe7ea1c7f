"""Trains the builtin encoder on rendered scenes: `python -m models.builtin.train`.

Frames of combinations that are not held out are painted, squeezed through video-like compression, and matched with
their captions by a symmetric contrastive loss. Partial captions fit several frames of a batch; all that fit are
positives, with equal weight. The same seed on the same machine and libraries gives the same weights.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import random
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from models.builtin import model as builtin
from models.builtin.world import ATTRIBUTES, Painter, Scene, all_scenes, caption, partial_caption, vocabulary

PARTIAL_SHARE = 0.25
BATCH = 128
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.02
SHIFT_PX = 3  # frames are moved by up to so many pixels while training
CANDIDATES = 100


def render(job: tuple[Scene, int]) -> NDArray[np.uint8]:
    """One frame of a scene as the encoder will meet it: a painted picture, compressed, at the encoder's size."""
    scene, seed = job
    rng = random.Random(seed)
    frame = Image.fromarray(Painter(scene, seed).frame(rng.uniform(0, 6)))
    buffer = io.BytesIO()
    frame.save(buffer, "JPEG", quality=rng.randrange(25, 92))
    with Image.open(buffer) as image:
        small = image.resize((builtin.IMAGE_SIZE, builtin.IMAGE_SIZE), Image.Resampling.BICUBIC)
    return np.asarray(small)


def render_many(jobs: list[tuple[Scene, int]], workers: int) -> NDArray[np.uint8]:
    """(N, 112, 112, 3) frames of the jobs, painted in `workers` processes."""
    if workers == 1:
        return np.stack([render(job) for job in jobs])
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        return np.stack(pool.map(render, jobs, chunksize=64))


def codes(scenes: list[Scene]) -> NDArray[np.int64]:
    """(N, 5) attribute values as numbers."""
    values = {a: sorted({getattr(s, a) for s in all_scenes()}) for a in ATTRIBUTES}
    return np.array([[values[a].index(getattr(s, a)) for a in ATTRIBUTES] for s in scenes], np.int64)


def contrastive_loss(frames: Tensor, texts: Tensor, log_scale: Tensor, fits: Tensor) -> Tensor:
    """Symmetric cross-entropy over cosines; `fits` (B_text, B_frame) says which pairs are positives."""
    logits = F.normalize(texts, dim=-1) @ F.normalize(frames, dim=-1).T * log_scale.exp().clamp(max=100)
    targets = fits.float()
    by_text = -(targets / targets.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1).mean()
    by_frame = -(targets / targets.sum(0, keepdim=True) * logits.log_softmax(0)).sum(0).mean()
    return (by_text + by_frame) / 2


def train(
    seed: int, n_frames: int, steps: int, workers: int, log: bool = True
) -> tuple[builtin.DualEncoder, dict[str, int]]:
    """Trains from scratch; returns the model and its vocabulary (word -> id)."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    scenes = [s for s in all_scenes() if not s.held_out]
    chosen = [rng.choice(scenes) for _ in range(n_frames)]
    frames = torch.from_numpy(render_many([(s, rng.randrange(1 << 40)) for s in chosen], workers))
    attributes = torch.from_numpy(codes(chosen))
    words = {word: number for number, word in enumerate(vocabulary(), 2)}
    model = builtin.DualEncoder(len(words) + 2).to(memory_format=torch.channels_last).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    order = torch.Generator().manual_seed(seed)
    started = time.monotonic()
    for step in range(steps):
        rows = torch.randint(n_frames, (min(BATCH, n_frames),), generator=order)
        texts, said = [], torch.ones(len(rows), len(ATTRIBUTES), dtype=torch.bool)
        for i, row in enumerate(rows.tolist()):
            if rng.random() < PARTIAL_SHARE:
                text, named = partial_caption(chosen[row], rng)
                said[i] = torch.tensor([a in named for a in ATTRIBUTES])
            else:
                text = caption(chosen[row], rng)
            texts.append(text)
        values = attributes[rows]
        fits = ((values[:, None] == values[None]) | ~said[:, None]).all(-1)
        dx, dy = torch.randint(-SHIFT_PX, SHIFT_PX + 1, (2,), generator=order).tolist()
        pixels = builtin.normalise(torch.roll(frames[rows], (dy, dx), (1, 2)))
        # bfloat16 where the processor has it is three times as fast; the loss stays in float32
        with torch.autocast("cpu", torch.bfloat16):
            frame_features = model.frames(pixels)
            text_features = model.text(builtin.tokenize(texts, words))
        loss = contrastive_loss(frame_features.float(), text_features.float(), model.log_scale, fits)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--frames", type=int, default=20_000, help="painted frames to train on")
    parser.add_argument("--steps", type=int, default=1100)
    parser.add_argument("--workers", type=int, default=2, help="painting processes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=builtin.WEIGHTS.parent, help="folder for weights and vocabulary")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, words = train(options.seed, options.frames, options.steps, options.workers)
    save(model, words, options.out)
    encoder = builtin.BuiltinEncoder(model, words, "", "cpu", "fp32")
    print(f"held-out text-to-frame R@1 over {CANDIDATES}: {held_out_recall(encoder, 1, 5):.3f}")


if __name__ == "__main__":
    main()
