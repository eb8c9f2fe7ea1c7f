"""What the tests of evaluations share: annotations, material from a small collection, a video model in numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import small_runs
from fakes import FakeEncoder
from models.base import Encoder, EncoderSpec
from pipeline.annotations import Annotations, Caption, Question
from pipeline.collection import Collection
from pipeline.evaluation.material import Material, Options
from pipeline.types import Float32, FrameFeatures, UInt8

WORDS = ("red block", "two blue birds", "a hill", "someone sings", "a dog")


class FakeVideoModel:
    """A VideoEncoder over the fake encoder: its pair score is 7 times the mean cosine, minus the length."""

    def __init__(self, base: FakeEncoder) -> None:
        self.base: Encoder = base
        self.spec: EncoderSpec = replace(base.spec, name="fake video model", weights_sha256="f" * 64)
        self.device, self.precision = base.device, base.precision

    def encode_frames(self, frames: UInt8) -> Float32:
        return self.base.encode_frames(frames)

    def encode_text(self, texts: Sequence[str]) -> Float32:
        return -self.base.encode_text(texts)

    def encode_video(self, features: Float32) -> Float32:
        return features

    def score_pairs(self, texts: Sequence[str], clips: Sequence[Float32]) -> Float32:
        vectors = self.base.encode_text(texts)
        columns = [7 * (vectors @ clip.T).mean(axis=1) - len(clip) for clip in clips]
        return np.stack(columns, axis=1).astype(np.float32)


def material(folder: Path, model: FakeVideoModel | None = None, **options: Any) -> Material:
    chosen = Options(**{"draws": 0, **options})
    return Material(Collection(folder), chosen, small_runs.machine(), None if model else FakeEncoder(), model)


def captions(*rows: Caption, dataset: str = "captions") -> Annotations[Caption]:
    return Annotations(dataset, "", "0" * 64, rows)


def questions(*rows: tuple[str, str, str]) -> Annotations[Question]:
    return Annotations("questions", "", "1" * 64, tuple(Question(*row) for row in rows))


def one_each() -> Annotations[Caption]:
    return captions(*[Caption(f"clip{i}", WORDS[i]) for i in range(4)])


def values(content: dict[str, Any], number: int = 0) -> dict[str, float]:
    found: dict[str, float] = content["results"][number]["values"]
    return found


def stored(folder: Path) -> dict[str, FrameFeatures]:
    """Features by file name without its extension."""
    return {Path(path).stem: features for path, features in small_runs.features_of(folder).items()}


def best_score(text: Float32, moments: Sequence[Float32], temperature: float | None) -> float:
    """The best moment's score, by slow loops in float64: of its mean vector, or of its frames by a softmax at
    `temperature`. A moment is (T, D) unit rows."""
    scores = []
    for rows in moments:
        if temperature is None:
            mean = [sum(float(value) for value in column) for column in rows.T]
            dot = sum(a * float(b) for a, b in zip(mean, text, strict=True))
            scores.append(dot / math.hypot(*mean))
        else:
            cosines = [sum(float(a) * float(b) for a, b in zip(row, text, strict=True)) for row in rows]
            weights = [math.exp(cosine / temperature) for cosine in cosines]
            scores.append(sum(w * c for w, c in zip(weights, cosines, strict=True)) / sum(weights))
    return max(scores)


def random_unit(rng: np.random.Generator, n: int, dim: int = 8) -> Float32:
    x = rng.standard_normal((n, dim))
    unit: Float32 = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    return unit
