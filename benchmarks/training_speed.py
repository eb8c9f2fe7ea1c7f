"""How fast heads and VideoCLIP's towers train, and in how much memory: random features, no videos.

    python benchmarks/training_speed.py [--device cuda] [--dim 512] [--tokens 32] [--batch-size 128] [--towers]

Prints clips per second of wall time and of this process's processor time, and the peak memory (of a GPU: its own).
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np
import torch

from models.device import choose_device, device_summary
from models.fineco import FineCoHead, HeadConfig
from models.videoclip import VideoCLIP, VideoCLIPConfig
from pipeline.training.examples import Examples
from pipeline.training.loop import train
from pipeline.training.options import ObjectiveOptions, TrainOptions
from pipeline.training.subjects import TrainableVideoCLIP, WordPieces
from pipeline.types import Float32

EPOCHS = 3
WORDS = 16  # word pieces of a text


class Stopwatch:
    """Counts clips from the second epoch on: the first one compiles, allocates and fills caches."""

    def __init__(self) -> None:
        self.n_clips = 0
        self.wall = self.cpu = 0.0
        self._epoch = 0

    def step(self, progress: float, losses: dict[str, float], n_clips: int) -> None:
        if self._epoch:
            self.n_clips += n_clips

    def validated(self, epoch: int, metrics: dict[str, float], best: bool) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now, cpu = time.monotonic(), time.process_time()
        if epoch == 1:
            self._began, self._cpu_began = now, cpu
        self._epoch = epoch
        if epoch > 1:
            self.wall, self.cpu = now - self._began, cpu - self._cpu_began


def unit_rows(rng: np.random.Generator, *shape: int) -> Float32:
    rows = rng.standard_normal(shape, np.float32)
    unit: Float32 = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    return unit


def measure(options: argparse.Namespace, device: str, precision: str) -> str:
    """One training's figures as a line."""
    rng = np.random.default_rng(0)
    n_videos = 8 * options.batch_size
    features = [unit_rows(rng, options.tokens, options.dim).astype(np.float16) for _ in range(n_videos)]
    examples = Examples.of_arrays(features, unit_rows(rng, n_videos, options.dim))
    torch.manual_seed(0)
    model: torch.nn.Module = FineCoHead(HeadConfig(options.dim, options.dim, options.dim, temperature=0.05))
    if options.towers:
        config = VideoCLIPConfig(feature_dim=options.dim)
        model = TrainableVideoCLIP(VideoCLIP(config))
        ids = rng.integers(1000, config.n_words, (n_videos, WORDS)).tolist()
        examples = Examples(examples.bank, examples.videos, examples.spans, WordPieces(ids, config))
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    watch = Stopwatch()
    objective = ObjectiveOptions(frame_weight=options.frame_weight)
    chosen = TrainOptions(EPOCHS, options.batch_size, precision=precision, objective=objective)  # type: ignore[arg-type]
    train(model, examples, chosen, device=device, watcher=watch)
    if device.startswith("cuda"):
        memory = f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB of the GPU"
    else:
        memory = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB"
    n_parameters = sum(p.numel() for p in model.parameters()) / 1e6
    return (
        f"{precision}: {watch.n_clips / watch.wall:.0f} clips/s, {watch.n_clips / watch.cpu:.0f} a processor second; "
        f"peak {memory}; {n_parameters:.1f} M parameters"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dim", type=int, default=512, help="of a feature")
    parser.add_argument("--tokens", type=int, default=32, help="of a clip")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--frame-weight", type=float, default=0.5, help="of the frame loss; 0 leaves it out")
    parser.add_argument("--towers", action="store_true", help="VideoCLIP's own towers instead of a head")
    options = parser.parse_args()
    device = choose_device(options.device)
    print(
        f"{device_summary(device, 'fp32')}; {options.tokens} tokens of {options.dim}, batches of {options.batch_size}"
    )
    for precision in ("fp32", "bf16"):
        print(measure(options, device, precision), flush=True)


if __name__ == "__main__":
    main()
