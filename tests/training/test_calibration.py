"""The temperature of re-scoring follows the videos: the mean where all frames fit, the best where few do."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from models.fineco import FineCoHead, HeadConfig
from pipeline.rescore import rescore
from pipeline.training.calibration import calibrate
from pipeline.training.examples import Examples
from pipeline.training.validation import retrieval

DIM, START = 24, 0.1


def untrained() -> FineCoHead:
    """A head that changes nothing."""
    torch.manual_seed(0)
    return FineCoHead(HeadConfig(DIM, DIM, DIM, width=16, layers=1, heads=2, intermediate=32)).eval()


def unit(rows: NDArray[np.float64]) -> NDArray[np.float32]:
    normalised: NDArray[np.float32] = (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)
    return normalised


def videos(share: float, noise: float, n: int = 60, length: int = 16) -> Examples:
    """Videos of which a share of the frames shows, blurred by noise, what the text says."""
    rng = np.random.default_rng(0)
    texts = unit(rng.standard_normal((n, DIM)))
    features = []
    for text in texts:
        frames = rng.standard_normal((length, DIM))
        fitting = rng.permutation(length)[: round(share * length)]
        frames[fitting] = text * np.sqrt(DIM) + noise * frames[fitting]
        features.append(unit(frames))
    return Examples.of_arrays(features, texts)


def test_noisy_frames_that_all_fit_are_averaged_and_a_single_one_that_fits_is_found() -> None:
    every = np.arange(60)
    all_fit = calibrate(untrained(), videos(1.0, 5.0), every, START, 256).temperature
    one_fits = calibrate(untrained(), videos(1 / 16, 0.5), every, START, 256).temperature
    assert one_fits < all_fit


def test_no_other_of_the_tried_temperatures_ranks_better() -> None:
    examples = videos(0.25, 1.5)
    calibrated = calibrate(untrained(), examples, np.arange(60), START, 256)
    found = calibrated.temperature
    features = [examples.bank.rows(v, 0, 16).astype(np.float32) for v in range(60)]
    texts = examples.texts.inputs(np.arange(60))[0].numpy()
    offsets = np.arange(61) * 16
    cosines = texts @ np.concatenate(features).T

    def recall(temperature: float) -> float:
        scores = np.stack([rescore(row, offsets, temperature) for row in cosines])
        return retrieval(scores, np.arange(60))["mean recall"]

    recalls = {START * 2.0**k: recall(START * 2.0**k) for k in range(-3, 8)}
    assert recalls[found] == max(recalls.values()) > min(recalls.values())
    assert calibrated.metrics["mean recall"] == recalls[found]


def test_texts_of_one_clip_and_clips_of_one_video_are_kept_apart() -> None:
    rng = np.random.default_rng(1)
    features = [unit(rng.standard_normal((12, DIM))) for _ in range(3)]
    spans = np.array([[0, 6], [6, 12], [0, 12], [0, 12], [3, 9]])
    of = np.array([0, 0, 1, 1, 2])
    vectors = unit(np.stack([features[v][a:b].mean(0) for v, (a, b) in zip(of, spans, strict=True)]).astype(float))
    examples = Examples.of_arrays(features, vectors, of, spans)
    assert calibrate(untrained(), examples, np.arange(5), START, 256).temperature > START / 16


def test_many_texts_are_sampled() -> None:
    examples = videos(1.0, 0.1, n=900, length=2)
    assert calibrate(untrained(), examples, np.arange(900), START, 256).temperature == START  # all are equally good
