"""The builtin encoder: its rendered world, its shipped weights and its training."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from models.builtin import model as builtin
from models.builtin import train as training
from models.builtin.model import CONTEXT_LENGTH, DIM, IMAGE_SIZE, PAD, UNKNOWN, BuiltinEncoder, load_builtin
from models.builtin.world import Painter, Scene, all_scenes, caption, partial_caption, vocabulary
from pipeline.errors import IntegrityError
from pipeline.types import UInt8, check_unit_rows

STAR = Scene("red", "star", "small", "left", "right")


@pytest.fixture(scope="module")
def encoder() -> BuiltinEncoder:
    return load_builtin()


def frames(n: int, seed: int) -> UInt8:
    return np.random.default_rng(seed).integers(0, 256, (n, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)


def test_held_out_scenes_are_found_by_text(encoder: BuiltinEncoder) -> None:
    assert training.held_out_recall(encoder, seed=7, draws=2) >= 0.8


def test_shipped_weights_are_small() -> None:
    assert builtin.WEIGHTS.stat().st_size <= 8e6


def test_shipped_vocabulary_is_that_of_the_world() -> None:
    assert sorted(builtin.read_vocabulary()) == vocabulary()


def test_frames_and_texts_become_float32_unit_rows_of_one_space(encoder: BuiltinEncoder) -> None:
    for rows, n in ((encoder.encode_frames(frames(3, 0)), 3), (encoder.encode_text(["a red star", "ring"]), 2)):
        assert rows.shape == (n, DIM) == (n, encoder.spec.dim)
        assert rows.dtype == np.float32
        check_unit_rows("rows", rows)


def test_text_of_unknown_or_no_words_is_encoded(encoder: BuiltinEncoder) -> None:
    rows = encoder.encode_text(["zebra", "Omelette", "", "***", "red " * 100])
    check_unit_rows("rows", rows)
    assert np.allclose(rows[0], rows[1], atol=1e-5)
    assert not np.allclose(rows[0], rows[4], atol=1e-2)


def test_tokenizer_ignores_case_and_punctuation_and_cuts_long_texts() -> None:
    words = {"red": 2, "star": 3}
    ids = builtin.tokenize(["Red, STAR!", "a star", "red " * 100], words)
    assert ids.shape == (3, CONTEXT_LENGTH)
    assert ids[0].tolist() == [2, 3] + [PAD] * (CONTEXT_LENGTH - 2)
    assert ids[1, :3].tolist() == [UNKNOWN, 3, PAD]
    assert ids[2].tolist() == [2] * CONTEXT_LENGTH


def test_rows_do_not_depend_on_the_rest_of_the_batch(encoder: BuiltinEncoder) -> None:
    first, second = frames(8, 1), frames(8, 2)
    second[5] = first[5]
    assert np.array_equal(encoder.encode_frames(first)[5], encoder.encode_frames(second)[5])
    texts = encoder.encode_text(["a red star", "ring", "blue"])
    others = encoder.encode_text(["a red star", "a large green circle spins in the middle", ""])
    assert np.array_equal(texts[0], others[0])


def test_bf16_stays_close_to_fp32(encoder: BuiltinEncoder) -> None:
    painted = np.stack([training.render((STAR, seed)) for seed in range(4)])
    coarse = load_builtin("cpu", "bf16")
    assert coarse.spec.fingerprint == encoder.spec.fingerprint
    assert (encoder.encode_frames(painted) * coarse.encode_frames(painted)).sum(1).min() > 0.99
    texts = ["a small red star moves right on the left", "a ring"]
    assert (encoder.encode_text(texts) * coarse.encode_text(texts)).sum(1).min() > 0.99


@pytest.mark.parametrize("damage", ["missing", "cut", "other model"])
def test_weights_that_cannot_be_used_are_one_clear_error(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights.safetensors"
    if damage == "cut":
        path.write_bytes(builtin.WEIGHTS.read_bytes()[:1000])
    elif damage == "other model":
        save_file({"weight": torch.zeros(3)}, path)
    monkeypatch.setattr(builtin, "WEIGHTS", path)
    with pytest.raises(IntegrityError, match="builtin encoder's weights cannot be read"):
        load_builtin()


@pytest.mark.filterwarnings("error")
def test_frames_may_be_read_only(encoder: BuiltinEncoder) -> None:
    pixels = frames(2, 3)
    expected = encoder.encode_frames(pixels)
    pixels.flags.writeable = False
    assert np.array_equal(encoder.encode_frames(pixels), expected)


def test_loading_imports_nothing_slow() -> None:
    code = (
        "import sys; from models.builtin.model import load_builtin; load_builtin()\n"
        "print(sorted({'torchvision', 'open_clip', 'PIL', 'av', 'torch._dynamo', 'sympy'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_a_fifth_of_the_world_is_held_out_and_never_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = all_scenes()
    held_out = {scene for scene in scenes if scene.held_out}
    assert len(set(scenes)) == len(scenes)
    assert 0.17 < len(held_out) / len(scenes) < 0.23
    for attribute in ("colour", "shape", "size", "place", "motion"):  # every value is known from other combinations
        trained = Counter(getattr(scene, attribute) for scene in scenes if not scene.held_out)
        assert set(trained) == {getattr(scene, attribute) for scene in scenes}
    painted: list[Scene] = []
    render = training.render

    def note(job: tuple[Scene, int]) -> UInt8:
        painted.append(job[0])
        return render(job)

    monkeypatch.setattr(training, "render", note)
    training.train(seed=0, n_frames=48, steps=1, workers=1, log=False)
    assert len(painted) == 48
    assert held_out.isdisjoint(painted)


def test_training_is_reproducible_by_seed() -> None:
    states = [training.train(seed, n_frames=16, steps=2, workers=1, log=False)[0].state_dict() for seed in (3, 3, 4)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["frames.layers.0.weight"], states[2]["frames.layers.0.weight"])


def test_saved_weights_load_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, words = training.train(0, n_frames=16, steps=1, workers=1, log=False)
    training.save(model, words, tmp_path)
    monkeypatch.setattr(builtin, "WEIGHTS", tmp_path / builtin.WEIGHTS.name)
    monkeypatch.setattr(builtin, "VOCABULARY", tmp_path / builtin.VOCABULARY.name)
    pixels = frames(2, 0)
    before = BuiltinEncoder(model, words, "", "cpu", "fp32").encode_frames(pixels)
    assert np.allclose(load_builtin().encode_frames(pixels), before, atol=5e-3)  # float16 on disk


def test_loss_prefers_every_pair_that_fits() -> None:
    eye = torch.eye(3)
    scale = torch.tensor(2.0)
    matched = training.contrastive_loss(eye, eye, scale, eye.bool())
    assert matched < training.contrastive_loss(eye, eye.roll(1, 0), scale, eye.bool())
    same = torch.ones(3, 3)  # equal rows tell nothing apart: the loss is log(3), and lies there for any fit
    for fits in (torch.eye(3), torch.ones(3, 3)):
        loss = training.contrastive_loss(same, same, scale, fits.bool())
        assert loss.item() == pytest.approx(np.log(3), abs=1e-6)


def test_captions_name_every_attribute_in_words_of_the_vocabulary() -> None:
    rng = random.Random(0)
    words = set(vocabulary())
    captions = {caption(STAR, rng) for _ in range(300)}
    assert len(captions) > 50
    for text in captions:
        assert set(text.split()) <= words
        assert "red" in text and "star" in text and "left" in text
        assert any(word in text for word in ("small", "little", "tiny"))
        assert "right" in text
    for _ in range(100):
        text, said = partial_caption(STAR, rng)
        assert set(text.split()) <= words
        assert ("red" in text) == ("colour" in said)
        assert ("on the left" in text or "left side" in text or "left edge" in text) == ("place" in said)


def test_painting_depends_on_scene_seed_and_time_alone() -> None:
    frame = Painter(STAR, 1).frame(0.5)
    assert frame.shape == (240, 320, 3)
    assert frame.dtype == np.uint8
    painter = Painter(STAR, 1)
    painter.frame(2.0)
    assert np.array_equal(frame, painter.frame(0.5))
    assert not np.array_equal(frame, painter.frame(1.0))
    assert not np.array_equal(frame, Painter(STAR, 2).frame(0.5))


@pytest.mark.parametrize(("place", "row", "column"), [("left", 1, 0), ("right", 1, 2), ("top", 0, 1), ("bottom", 2, 1)])
def test_shape_is_painted_in_its_colour_at_its_place(place: str, row: int, column: int) -> None:
    frame = Painter(Scene("red", "circle", "large", place, "still"), 5).frame(0).astype(int)
    red = (frame[..., 0] - frame[..., 1] > 80) & (frame[..., 0] - frame[..., 2] > 80)
    thirds = red[:240, :318].reshape(3, 80, 3, 106).sum((1, 3))
    assert np.unravel_index(thirds.argmax(), (3, 3)) == (row, column)
