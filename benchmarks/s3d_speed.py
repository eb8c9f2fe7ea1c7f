"""What a window of S3D costs, a second of video at 30 frames of 224 x 224: random weights.

python benchmarks/s3d_speed.py [--device cuda] [--batch 2] [--rounds 3]
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from models.device import choose_device, device_summary
from models.s3d import S3D, Dictionary
from models.s3d_encoder import S3DEncoder
from models.s3d_weights import StoredS3D


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", type=int, default=2, help="windows at a time")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    device = choose_device(options.device)
    frames = np.random.default_rng(0).integers(0, 256, (options.batch, 30, 224, 224, 3), dtype=np.uint8)
    for precision in ("fp32", "bf16"):
        stored = StoredS3D(S3D(n_words=8), Dictionary(["word"] * 7), "", "none")
        encoder = S3DEncoder("s3d", stored, device, precision)
        encoder.encode_frames(frames)
        wall, cpu = time.monotonic(), time.process_time()
        for _ in range(options.rounds):
            encoder.encode_frames(frames)
        n = options.rounds * options.batch
        wall, cpu = (time.monotonic() - wall) / n, (time.process_time() - cpu) / n
        print(f"{device_summary(device, precision)}: {wall:.2f} s a window, {cpu:.2f} processor seconds", flush=True)


if __name__ == "__main__":
    main()
