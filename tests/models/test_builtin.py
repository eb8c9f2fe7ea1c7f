"""The builtin encoder: its rendered world, its shipped weights and its training."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from models.builtin import model as builtin
from models.builtin import train as training
from models.builtin.model import CONTEXT_LENGTH, DIM, IMAGE_SIZE, PAD, UNKNOWN, BuiltinEncoder, load_builtin
from models.builtin.world import EMPTY_KINDS, VALUES, Painter, Scene, all_scenes, caption, partial_caption, vocabulary
from pipeline.errors import IntegrityError
from pipeline.types import Float32, UInt8, check_unit_rows

STAR = Scene("red", "star", "small", "left", "right")


@pytest.fixture(scope="module")
def encoder() -> BuiltinEncoder:
    return load_builtin()


def frames(n: int, seed: int) -> UInt8:
    return np.random.default_rng(seed).integers(0, 256, (n, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)


def unit_rows(rows: Float32) -> Float32:
    unit: Float32 = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


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
    painted: list[training.Shown] = []
    render = training.render

    def note(job: tuple[training.Shown, int]) -> UInt8:
        painted.append(job[0])
        return render(job)

    monkeypatch.setattr(training, "render", note)
    training.train(seed=0, n_frames=48, steps=1, workers=1, n_videos=2, log=False)
    assert len(painted) == 48 + 6
    assert held_out.isdisjoint(shown for shown in painted if isinstance(shown, Scene))


def test_training_is_reproducible_by_seed() -> None:
    states = [training.train(seed, n_frames=16, steps=2, workers=1, log=False)[0].state_dict() for seed in (3, 3, 4)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["frames.layers.0.weight"], states[2]["frames.layers.0.weight"])


def test_training_on_videos_is_reproducible_and_heeds_the_frame_loss() -> None:
    states = [
        training.train(3, 16, 1, 1, n_videos=n_videos, frame_weight=weight, log=False)[0].state_dict()
        for n_videos, weight in ((1, 0.5), (1, 0.5), (1, 0.0), (2, 0.5))
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    for other in states[2:]:
        assert not torch.equal(states[0]["frames.layers.0.weight"], other["frames.layers.0.weight"])


def test_more_videos_than_a_batch_holds_are_refused() -> None:
    with pytest.raises(ValueError, match="3 videos of 8 frames in a batch of 16 frames"):
        training.train(0, n_frames=16, steps=1, workers=1, n_videos=3, log=False)


def test_a_training_video_holds_its_scene_distractors_and_empty_frames() -> None:
    rng = random.Random(0)
    scenes = rng.choices(
        [s for s in all_scenes() if s.colour in ("red", "blue") and s.shape in ("star", "ring")], k=400
    )
    attributes = training.codes([*scenes, *EMPTY_KINDS])
    for row in range(100):
        shown = training.video_rows(row, attributes, rng)
        assert [r for r in shown if r < 400 and scenes[r] == scenes[row]] == shown[: training.VIDEO_RELEVANT]
        assert sum(r >= 400 for r in shown) == training.VIDEO_EMPTY
        for other in (r for r in shown[training.VIDEO_RELEVANT :] if r < 400):
            assert 2 <= (attributes[row] == attributes[other]).sum() <= 4


def test_video_loss_is_the_pair_loss_of_mean_scores_plus_the_weighted_frame_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    frames = torch.randn(3, 8, 5, generator=generator, dtype=torch.float64)
    texts = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    log_scale = torch.tensor(1.5, dtype=torch.float64)
    h = (frames / frames.norm(dim=-1, keepdim=True)).numpy()
    z = (texts / texts.norm(dim=-1, keepdim=True)).numpy()
    logits = np.array([[np.mean([np.exp(1.5) * z[m] @ h[b, t] for t in range(8)]) for b in range(3)] for m in range(3)])
    pair = frame = 0.0
    for i in range(3):
        pair += np.log(np.exp(logits[i]).sum()) - logits[i, i] + np.log(np.exp(logits[:, i]).sum()) - logits[i, i]
        exps = sorted(np.exp(np.exp(1.5) * h[i] @ z[i]))
        frame += np.mean([-np.log(p / (p + sum(exps[:6]))) for p in exps[6:]])  # the two highest against the other six
    eye = torch.eye(3, dtype=torch.bool)
    assert training.video_loss(frames, texts, log_scale, eye, 0.0).item() == pytest.approx(pair / 6, rel=1e-6)
    together = training.video_loss(frames, texts, log_scale, eye, 0.7).item()
    assert together == pytest.approx(pair / 6 + 0.7 * frame / 3, rel=1e-6)


def test_noisy_videos_hold_no_other_video_s_scene_and_are_mostly_noise() -> None:
    scenes, videos = training.plan_noisy_videos(random.Random(0))
    assert len(set(scenes)) == len(videos) == training.CANDIDATES
    for scene, video in zip(scenes, videos, strict=True):
        assert scene.held_out
        assert len(video) == training.NOISY_FRAMES
        assert [shown for shown in video if shown in scenes] == [scene] * training.NOISY_RELEVANT
        assert sum(not isinstance(shown, Scene) for shown in video) == training.NOISY_EMPTY


def test_noisy_recall_counts_what_each_way_of_scoring_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    class Oracle(BuiltinEncoder):
        """Rows of attributes: a caption's row is that of its scene, an empty frame's is at a right angle to all."""

        def __init__(self) -> None:
            self.spec = load_builtin().spec

        def encode_frames(self, frames: UInt8) -> Float32:
            rows = np.zeros((len(frames), 1 + sum(map(len, VALUES.values()))), np.float32)
            for row, frame in zip(rows, frames, strict=True):
                start = 1
                for code, values in zip(frame.astype(int), VALUES.values(), strict=True):
                    row[0 if code == 255 else start + code] = 1
                    start += len(values)
            return unit_rows(rows)

        def encode_text(self, texts: Sequence[str]) -> Float32:
            return self.encode_frames(training.codes([said[text] for text in texts]).astype(np.uint8))

    said: dict[str, Scene] = {}

    def name(scene: Scene, rng: random.Random) -> str:
        said[str(scene)] = scene
        return str(scene)

    def paint(jobs: list[tuple[training.Shown, int]], workers: int) -> UInt8:
        return training.codes([shown for shown, _ in jobs]).astype(np.uint8)

    monkeypatch.setattr(training, "caption", name)
    monkeypatch.setattr(training, "render_many", paint)
    by_mean, by_softmax = training.noisy_recall(Oracle(), seed=0, draws=1)
    assert by_softmax > 0.9  # a perfect encoder, held back by nothing but its temperature
    assert 0.3 < by_mean < by_softmax


def test_saved_weights_load_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, words = training.train(0, n_frames=16, steps=1, workers=1, log=False)
    training.save(model, words, tmp_path)
    monkeypatch.setattr(builtin, "WEIGHTS", tmp_path / builtin.WEIGHTS.name)
    monkeypatch.setattr(builtin, "VOCABULARY", tmp_path / builtin.VOCABULARY.name)
    monkeypatch.setattr(builtin, "DIGEST", tmp_path / builtin.DIGEST.name)
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
