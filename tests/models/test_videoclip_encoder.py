"""VideoCLIP as an encoder over a base: rows, pair scores, and what its spec says."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fakes import FakeEncoder
from models.base import VideoEncoder
from models.convert import convert
from models.registry import load_encoder
from models.s3d import S3D
from models.videoclip import VideoCLIP, text_batch
from models.videoclip_encoder import CLIPS_PER_BATCH, VideoCLIPEncoder, load_videoclip, typical_temperature
from pipeline.errors import FinecoError, IntegrityError, UsageError
from pipeline.types import Float32, check_unit_rows
from videoclip_models import TINY, tiny_state, write_vocabulary

TEXTS = ["red square", "a green circle, red", "", "word120 word121 word122"]


def base(seed: int = 0) -> FakeEncoder:
    """In S3D's place: windows of 30 frames at 30 frames a second."""
    encoder = FakeEncoder(dim=24, seed=seed)
    encoder.spec = replace(encoder.spec, name="s3d:/x", window=30, fps=30.0, licence="Apache-2.0")
    return encoder


def clip(seconds: int, seed: int = 0) -> Float32:
    rows = np.random.default_rng(seed).standard_normal((seconds, 24)).astype(np.float32)
    unit: Float32 = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videoclip")
    write_vocabulary(folder / "tokenizer")
    model = VideoCLIP(replace(TINY, tokenizer="tokenizer"))
    model.load_state_dict(tiny_state(), strict=True)
    model.save(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(folder: Path) -> VideoCLIPEncoder:
    return load_videoclip(folder, base())


@pytest.fixture(scope="module")
def model(folder: Path) -> VideoCLIP:
    return VideoCLIP.load(folder)


def test_it_is_a_video_encoder_over_its_base(folder: Path, encoder: VideoCLIPEncoder) -> None:
    assert isinstance(encoder, VideoEncoder)
    assert (encoder.device, encoder.precision) == ("cpu", "fp32")
    spec, below = encoder.spec, encoder.base.spec
    assert spec.name == f"videoclip:{folder}"
    assert (spec.dim, spec.context_length) == (48, 25)
    assert (spec.geometry, spec.mean, spec.std, spec.window, spec.fps) == (
        below.geometry,
        below.mean,
        below.std,
        30,
        30.0,
    )
    assert "CC-BY-NC" in spec.licence and "Apache-2.0" in spec.licence


def test_frames_are_the_bases(encoder: VideoCLIPEncoder) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    np.testing.assert_array_equal(encoder.encode_frames(frames), base().encode_frames(frames))


@pytest.mark.parametrize("seconds", [1, 12, 13, 40])
def test_a_video_gets_one_unit_row_for_each_second(encoder: VideoCLIPEncoder, model: VideoCLIP, seconds: int) -> None:
    rows = encoder.encode_video(clip(seconds))
    assert rows.shape == (seconds, 48) and rows.dtype == np.float32
    check_unit_rows("rows", rows)
    for start in range(0, seconds, 12):  # consecutive clips of 12 seconds, each on its own
        features = torch.from_numpy(clip(seconds)[start : start + 12])[None]
        with torch.no_grad():
            states = model.video_encoder(features, torch.ones(1, features.shape[1], dtype=torch.bool))[0, 1:-1]
        expected = torch.nn.functional.normalize(states, dim=-1).numpy()
        np.testing.assert_allclose(rows[start : start + 12], expected, atol=1e-6)


def test_an_empty_video_has_no_rows(encoder: VideoCLIPEncoder) -> None:
    assert encoder.encode_video(np.empty((0, 24), np.float32)).shape == (0, 48)
    with pytest.raises(ValueError, match="features"):
        encoder.encode_video(np.zeros((3, 25), np.float32))


def test_texts_are_normalised_pooled_states(encoder: VideoCLIPEncoder, model: VideoCLIP) -> None:
    rows = encoder.encode_text(TEXTS)
    check_unit_rows("rows", rows)
    ids = [[110, 112], [1, 111, 113, 1, 110], [], [120, 121, 122]]  # "a" and "," are unknown words
    with torch.no_grad():
        pooled = model.encode_text(*text_batch(ids, TINY))
    np.testing.assert_allclose(rows, torch.nn.functional.normalize(pooled, dim=-1).numpy(), atol=1e-6)
    assert encoder.encode_text([]).shape == (0, 48)


def test_a_long_text_is_cut(encoder: VideoCLIPEncoder) -> None:
    words = [f"word{120 + number}" for number in range(30)]
    rows = encoder.encode_text([" ".join(words), " ".join(words[:25]), " ".join(words[:24])])
    np.testing.assert_allclose(rows[0], rows[1], atol=1e-6)
    assert abs(rows[0] - rows[2]).max() > 1e-3


def test_more_texts_than_a_batch_come_back_in_order(encoder: VideoCLIPEncoder) -> None:
    many = [f"word{120 + number % 50} red" for number in range(300)]
    rows = encoder.encode_text(many)
    assert rows.shape == (300, 48)
    np.testing.assert_allclose(rows[290], encoder.encode_text([many[290]])[0], atol=1e-6)


def test_pair_scores_are_raw_dot_products_of_pooled_vectors(encoder: VideoCLIPEncoder, model: VideoCLIP) -> None:
    clips = [clip(1 + number % 30, seed=number) for number in range(CLIPS_PER_BATCH + 3)]
    scores = encoder.score_pairs(TEXTS, clips)
    assert scores.shape == (len(TEXTS), len(clips)) and scores.dtype == np.float32
    with torch.no_grad():
        text = model.encode_text(*text_batch(encoder._tokenizer(TEXTS), TINY))
        for number in (0, 17, 29, CLIPS_PER_BATCH + 1):
            features = torch.from_numpy(clips[number])[None]
            pooled = model.encode_video(features, torch.ones(features.shape[:2], dtype=torch.bool)).pooled[0]
            np.testing.assert_allclose(scores[:, number], (text @ pooled).numpy(), atol=1e-4)
    assert encoder.score_pairs([], clips).shape == (0, len(clips))
    assert encoder.score_pairs(TEXTS, []).shape == (len(TEXTS), 0)


def test_golden_similarities_through_the_encoder(encoder: VideoCLIPEncoder) -> None:
    """The fixture's words as text, its features as clips; rows without gaps only."""
    fixture = load_file(Path(__file__).parents[1] / "golden" / "videoclip_tiny" / "case_short.safetensors")
    names = [f"word{number}" for number in range(TINY.n_words)]
    names[110:114] = ["red", "green", "square", "circle"]
    words = [ids[mask][2:-1] for ids, mask in zip(fixture["caps"], fixture["cmasks"], strict=True)]
    texts = [" ".join(names[number] for number in ids.tolist()) for ids in words]
    clips = [rows[mask].numpy() for rows, mask in zip(fixture["vfeats"], fixture["vmasks"], strict=True)]
    np.testing.assert_allclose(encoder.score_pairs(texts, clips), fixture["sim_text_video"].numpy(), atol=1e-4)


def test_cosines_by_the_temperature_are_of_the_size_of_pair_scores(encoder: VideoCLIPEncoder, model: VideoCLIP) -> None:
    features = torch.from_numpy(clip(200))[None]
    with torch.no_grad():
        norms = model.encode_video(features, torch.ones(1, 200, dtype=torch.bool)).tokens.norm(dim=-1)
        states = model.text_states(*text_batch([list(range(110, 130))], TINY)).norm(dim=-1)
    product = float(norms.mean() * states.mean())
    assert 1 / encoder.spec.temperature == pytest.approx(product, rel=0.1)


def test_the_fingerprint_follows_weights_settings_and_base(folder: Path, tmp_path: Path) -> None:
    fingerprints = {load_videoclip(folder, base()).spec.fingerprint, load_videoclip(folder, base(1)).spec.fingerprint}
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    assert load_videoclip(other, base()).spec.fingerprint in fingerprints  # wherever it lies
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"max_video_tokens": 13}))
    fingerprints.add(load_videoclip(other, base()).spec.fingerprint)
    (other / "config.json").write_text(json.dumps(config))
    state = load_file(other / "videoclip.safetensors")
    state["video_encoder.videomlp.linear1.bias"][0] += 1
    save_file(state, other / "videoclip.safetensors")
    fingerprints.add(load_videoclip(other, base()).spec.fingerprint)
    assert len(fingerprints) == 4


def test_what_does_not_fit_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="takes features of length 24, those of fake have 16"):
        load_videoclip(folder, FakeEncoder(dim=16))
    with pytest.raises(UsageError, match=r"holds no config\.json"):
        load_videoclip(tmp_path, base())
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    (other / "tokenizer" / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n")
    with pytest.raises(UsageError, match="the tokenizer of another model"):
        load_videoclip(other, base())
    (other / "videoclip.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(IntegrityError, match="cannot be loaded as the weights"):
        load_videoclip(other, base())


def test_without_a_tokenizer_folder_the_hub_is_asked(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    shutil.rmtree(other / "tokenizer")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"tokenizer": "bert-base-uncased"}))
    with pytest.raises(FinecoError, match=r"vocab\.txt of hub repository bert-base-uncased"):
        load_videoclip(other, base())


def test_the_temperature_is_a_function_of_the_last_layer_norms(model: VideoCLIP) -> None:
    before = typical_temperature(model)
    copy = VideoCLIP(model.config)
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, parameter in copy.named_parameters():
            if "encoder.layer.3.output.LayerNorm" in name:  # of the text tower; the video tower has three layers
                parameter.mul_(2)
    assert typical_temperature(copy) == pytest.approx(before / 2, rel=1e-5)


def test_both_published_files_become_an_encoder_of_the_registry(tmp_path: Path) -> None:
    """Whole way: a fairseq checkpoint and S3D's two files, converted, loaded by name, pixels and texts to vectors."""
    torch.manual_seed(0)
    towers = VideoCLIP(replace(TINY, feature_dim=512))
    torch.save({"model": {f"mmmodel.{name}": t for name, t in towers.state_dict().items()}}, tmp_path / "best.pt")
    torch.save(S3D(n_words=3).state_dict(), tmp_path / "s3d.pth")
    np.save(tmp_path / "dict.npy", np.array(["red", "square"]))
    vocabulary = write_vocabulary(tmp_path / "bert")
    convert(tmp_path / "out", tmp_path / "best.pt", tmp_path / "s3d.pth", tmp_path / "dict.npy", vocabulary)
    encoder = load_encoder(f"videoclip:{tmp_path / 'out'}", device="cpu", precision="fp32")
    assert isinstance(encoder, VideoEncoder)
    assert (encoder.spec.dim, encoder.base.spec.dim, encoder.spec.fps) == (48, 512, 30.0)
    window = np.random.default_rng(0).integers(0, 256, (1, 30, 224, 224, 3), dtype=np.uint8)
    features = encoder.encode_frames(window)
    rows = encoder.encode_video(features)
    check_unit_rows("rows", rows)
    assert rows.shape == (1, 48)
    assert encoder.score_pairs(["red square"], [features]).shape == (1, 1)
