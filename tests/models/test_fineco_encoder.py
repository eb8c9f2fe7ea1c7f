"""`fineco:FOLDER`: the same vectors as in training, for any length, over the right base and no other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fakes import FakeEncoder
from models.base import VideoEncoder
from models.fineco import FineCoHead, describe_head, save_weights
from models.fineco_encoder import CLIPS_AT_ONCE, load_fineco, read_base_name
from pipeline.errors import IntegrityError, UsageError
from pipeline.types import check_unit_rows
from small_trainings import random_rows, shake, small_head


def save(folder: Path, head: FineCoHead, base: FakeEncoder) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(describe_head(head.config, base.spec.name, base.spec.fingerprint))
    save_weights(folder / "head.safetensors", head)
    return folder


@pytest.fixture
def head() -> FineCoHead:
    return shake(small_head())


@pytest.fixture
def encoder(head: FineCoHead, tmp_path: Path) -> VideoEncoder:
    return load_fineco(save(tmp_path / "head", head, FakeEncoder()), FakeEncoder())


def test_it_is_an_encoder_of_whole_videos_over_its_base(encoder: VideoEncoder, tmp_path: Path) -> None:
    assert isinstance(encoder, VideoEncoder)
    base = FakeEncoder()
    assert read_base_name(tmp_path / "head") == "fake"
    spec = encoder.spec
    assert spec.name == f"fineco:{tmp_path / 'head'}"
    assert (spec.dim, spec.geometry, spec.window, spec.fps) == (16, base.spec.geometry, 1, None)
    frames = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    np.testing.assert_array_equal(encoder.encode_frames(frames), base.encode_frames(frames))


@torch.no_grad()
def test_it_encodes_as_training_does(encoder: VideoEncoder, head: FineCoHead) -> None:
    features = random_rows(50)
    states = head.encode_video(torch.from_numpy(features)[None], torch.ones(1, 50, dtype=torch.bool))
    rows = encoder.encode_video(features)
    np.testing.assert_allclose(rows, states.tokens[0].numpy(), atol=1e-6)
    check_unit_rows("rows", rows)
    texts = ["a red stone", "two birds"]
    expected = head.encode_text(torch.from_numpy(FakeEncoder().encode_text(texts))).numpy()
    np.testing.assert_allclose(encoder.encode_text(texts), expected, atol=1e-6)
    pooled = rows.mean(0) / np.linalg.norm(rows.mean(0))
    np.testing.assert_allclose(encoder.score_pairs(texts, [features]), expected @ pooled[:, None], atol=1e-6)


def test_pair_scores_are_of_each_text_and_each_clip(encoder: VideoEncoder) -> None:
    clips, texts = [random_rows(n, n) for n in (3, 40, 7)], ["a", "b c"]
    scores = encoder.score_pairs(texts, clips)
    assert scores.shape == (2, 3) and scores.dtype == np.float32
    for m, text in enumerate(texts):
        for c, clip in enumerate(clips):
            np.testing.assert_allclose(encoder.score_pairs([text], [clip]), scores[m : m + 1, c : c + 1], atol=1e-6)
    assert encoder.score_pairs([], clips).shape == (0, 3) and encoder.score_pairs(texts, []).shape == (2, 0)


@torch.no_grad()
def test_a_video_of_hours_is_encoded_piece_by_piece(encoder: VideoEncoder, head: FineCoHead) -> None:
    n = 2 * CLIPS_AT_ONCE * 32 + 45
    features = random_rows(n)
    whole = head.encode_video(torch.from_numpy(features)[None], torch.ones(1, n, dtype=torch.bool)).tokens[0]
    np.testing.assert_allclose(encoder.encode_video(features), whole.numpy(), atol=1e-6)


def test_a_video_is_the_same_whatever_was_encoded_before(encoder: VideoEncoder) -> None:
    first = encoder.encode_video(random_rows(77))
    for n in (1, 32, 33, 500):
        encoder.encode_video(random_rows(n, n))
    np.testing.assert_array_equal(encoder.encode_video(random_rows(77)), first)
    assert encoder.encode_video(random_rows(5)[:0]).shape == (0, 16)


def test_a_dot_head_scores_by_products_and_gives_unit_rows(tmp_path: Path) -> None:
    head = shake(small_head(similarity="dot", residual=False))
    encoder = load_fineco(save(tmp_path / "dot", head, FakeEncoder()), FakeEncoder())
    features, mask = random_rows(9), torch.ones(1, 9, dtype=torch.bool)
    with torch.no_grad():
        pooled = head.encode_video(torch.from_numpy(features)[None], mask).pooled[0]
        text = head.encode_text(torch.from_numpy(FakeEncoder().encode_text(["a"])))[0]
    np.testing.assert_allclose(encoder.score_pairs(["a"], [features]), [[float(pooled @ text)]], rtol=1e-5)
    check_unit_rows("rows", encoder.encode_video(features))
    check_unit_rows("texts", encoder.encode_text(["a"]))
    assert encoder.spec.temperature == 0.1  # for the cosines of a search, until a training has measured it


def test_the_fingerprint_knows_weights_base_and_sizes(tmp_path: Path) -> None:
    def fingerprint(name: str, head: FineCoHead, base: FakeEncoder) -> str:
        return load_fineco(save(tmp_path / name, head, base), base).spec.fingerprint

    same = fingerprint("a", shake(small_head()), FakeEncoder())
    assert fingerprint("b", shake(small_head()), FakeEncoder()) == same
    others = [
        fingerprint("c", shake(small_head(), seed=2), FakeEncoder()),
        fingerprint("d", shake(small_head()), FakeEncoder(seed=1)),
        fingerprint("e", shake(small_head(heads=4)), FakeEncoder()),
    ]
    assert len({same, *others}) == 4


def test_another_base_is_refused_by_name(head: FineCoHead, tmp_path: Path) -> None:
    folder = save(tmp_path / "head", head, FakeEncoder())
    other = FakeEncoder(seed=1)
    with pytest.raises(UsageError, match="was trained over fake") as caught:
        load_fineco(folder, other)
    assert FakeEncoder().spec.fingerprint[:12] in caught.value.message
    assert other.spec.fingerprint[:12] in caught.value.message


def test_a_folder_that_is_no_head_is_one_clear_error(head: FineCoHead, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no config\.json"):
        read_base_name(tmp_path)
    folder = save(tmp_path / "head", head, FakeEncoder())
    (folder / "head.safetensors").write_bytes((folder / "head.safetensors").read_bytes()[:-10])
    with pytest.raises(IntegrityError, match="cannot be loaded as the weights"):
        load_fineco(folder, FakeEncoder())
    (folder / "head.safetensors").unlink()
    with pytest.raises(UsageError, match=r"has no head\.safetensors"):
        load_fineco(folder, FakeEncoder())
    for content in ("[]", "{", json.dumps({"kind": "head"}), json.dumps({"kind": "head", "base": {"name": 1}})):
        (folder / "config.json").write_text(content)
        with pytest.raises(IntegrityError):
            read_base_name(folder)
