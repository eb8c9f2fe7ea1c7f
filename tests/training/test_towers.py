"""Fine-tuning VideoCLIP's own towers: the same loop, whole checkpoints in and out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fakes import FakeEncoder
from models.base import Encoder, VideoEncoder
from models.fineco_encoder import load_fineco, read_base_name
from models.videoclip import VideoCLIP
from models.videoclip_encoder import load_videoclip
from pipeline.errors import UsageError
from pipeline.training import subjects
from pipeline.training.options import TrainOptions
from pipeline.types import TimedText
from small_trainings import DIM, make_collection, metrics_of, random_rows, train_small
from videoclip_models import TINY, write_vocabulary

SMALL = replace(TINY, hidden_size=32, intermediate_size=32, video_layers=1, text_layers=1, feature_dim=DIM, dropout=0.0)
EPOCHS: dict[str, Any] = {"epochs": 80, "validation": 0.0, "lr": 3e-3, "batch_size": 8}


@pytest.fixture
def towers(tmp_path: Path) -> Path:
    """A converted VideoCLIP of random weights, whose S3D is the fake encoder."""
    folder = tmp_path / "videoclip"
    folder.mkdir()
    torch.manual_seed(0)
    VideoCLIP(replace(SMALL, tokenizer="tokenizer")).save(folder)
    write_vocabulary(folder / "tokenizer")
    (folder / "s3d").mkdir()
    (folder / "s3d" / "config.json").write_text('{"kind": "s3d"}')
    return folder


@pytest.fixture
def collection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def load_encoder(name: str, device: str, precision: str) -> Encoder:
        assert name.startswith("s3d:") and name.endswith("/s3d")
        return FakeEncoder()

    monkeypatch.setattr(subjects, "load_encoder", load_encoder)
    texts = {n: [TimedText(f"word{n + 120} {'red' if n % 2 else 'green'} square")] for n in range(8)}
    return make_collection(tmp_path / "kitchen", 8, texts)


def test_fine_tuned_towers_learn_and_load_as_a_videoclip(towers: Path, collection: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    train_small(collection, output, towers=f"videoclip:{towers}", **EPOCHS)
    losses = [line["loss"] for line in metrics_of(output)]
    assert losses[-1] < 0.5 < losses[0]
    assert read_base_name(output) == f"s3d:{output / 's3d'}"
    encoder = load_fineco(output, FakeEncoder())
    assert isinstance(encoder, VideoEncoder)
    clips = [random_rows(4 + n % 7, n).astype(np.float16).astype(np.float32) for n in range(8)]
    texts = [f"word{n + 120} {'red' if n % 2 else 'green'} square" for n in range(8)]
    assert encoder.score_pairs(texts, clips).argmax(axis=1).tolist() == list(range(8))
    before = load_videoclip(towers, FakeEncoder())
    assert before.score_pairs(texts, clips).argmax(axis=1).tolist() != list(range(8))
    assert encoder.spec.fingerprint != before.spec.fingerprint


def test_the_towers_start_as_they_are(towers: Path, collection: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    train_small(collection, output, towers=f"videoclip:{towers}", **{**EPOCHS, "lr": 1e-12, "epochs": 1})
    before, after = VideoCLIP.load(towers).state_dict(), VideoCLIP.load(output).state_dict()
    for name, weights in before.items():
        torch.testing.assert_close(after[name], weights, atol=1e-9, rtol=0)


def test_the_defaults_are_videoclips(
    towers: Path, collection: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.training import command

    seen: list[TrainOptions] = []

    def loop(model: Any, subject: Any, examples: Any, options: TrainOptions, *rest: Any) -> None:
        seen.append(options)
        raise UsageError("enough")

    monkeypatch.setattr(command, "_loop", loop)
    for options in ({"towers": f"videoclip:{towers}", "lr": None}, {"lr": None}, {"clips": "overlapped", "lr": None}):
        with pytest.raises(UsageError, match="enough"):
            train_small(collection, tmp_path / str(len(seen)), **options)
    expected = [(5e-5, 0.0, 32), (3e-4, 0.01, 256), (3e-4, 0.01, 32)]
    assert [(o.lr, o.weight_decay, o.max_tokens) for o in seen] == expected


def test_options_of_a_head_are_refused(towers: Path, collection: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--width is of a head, and --towers trains none"):
        train_small(collection, tmp_path / "out", towers=f"videoclip:{towers}", width=64)
    with pytest.raises(UsageError, match="only VideoCLIP's can be trained"):
        train_small(collection, tmp_path / "out", towers="open_clip:ViT-B-32")


def test_features_of_another_encoder_are_refused(
    towers: Path, collection: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subjects, "load_encoder", lambda name, device, precision: FakeEncoder(seed=1))
    with pytest.raises(UsageError, match="encoder: this collection was made with fake"):
        train_small(collection, tmp_path / "out", towers=f"videoclip:{towers}")
