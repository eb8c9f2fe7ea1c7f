"""VideoCLIP's towers against golden numbers of the reference, and what they must do beyond its clips."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.bert import TowerConfig
from models.bert_pretrained import load_tokenizer
from models.videoclip import VideoCLIP, VideoCLIPConfig, VideoTower, masked_mean, text_batch
from pipeline.errors import FinecoError, IntegrityError, UsageError
from videoclip_models import TINY, tiny_state

SMALL = replace(TINY, hidden_size=16, intermediate_size=24, video_layers=2, text_layers=2, feature_dim=6)
GOLDEN = Path(__file__).parents[1] / "golden" / "videoclip_tiny"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def model() -> VideoCLIP:
    model = VideoCLIP(TINY)
    model.load_state_dict(tiny_state(), strict=True)
    return model.eval()


@pytest.fixture
def small() -> VideoCLIP:
    return VideoCLIP(SMALL).eval()


def check_states(model: VideoCLIP, case: Path, dtype: torch.dtype, relative: float = 1e-9) -> None:
    """At the tolerances of the fixtures' README, section 1."""
    fixture = load_file(case)
    suffix = "_f64" if dtype == torch.float64 else ""

    def assert_near(actual: Tensor, name: str, kept: Tensor | None = None, absolute: float = 2e-5) -> None:
        expected = fixture[name + suffix]
        assert actual.dtype == expected.dtype == dtype
        gap = (actual - expected).abs() if kept is None else (actual - expected).abs()[kept]
        bound = relative * float(expected.abs().max()) if dtype == torch.float64 else absolute
        assert gap.max() <= bound, name

    model.to(dtype)
    features, mask = fixture["vfeats"].to(dtype), fixture["vmasks"]
    with torch.no_grad():
        video = model.encode_video(features, mask)
        text = model.encode_text(fixture["caps"], fixture["cmasks"])
        assert_near(model.video_encoder.videomlp(features), "videomlp", mask)
        assert_near(model.text_states(fixture["caps"], fixture["cmasks"]), "text_hidden", fixture["cmasks"][:, 1:])
    assert_near(video.hidden, "video_hidden", torch.nn.functional.pad(mask, (1, 1), value=True))
    assert torch.equal(video.tokens, video.hidden[:, 1:-1])
    assert_near(video.pooled, "pooled_video")
    assert_near(text, "pooled_text")
    assert_near(text @ video.pooled.T, "sim_text_video", absolute=1e-4)


@pytest.mark.parametrize("case", ["short", "holes"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_golden_states_and_similarities(model: VideoCLIP, case: str, dtype: torch.dtype) -> None:
    # Another processor may draw weights that differ in the last bit; the least mistake worth catching shows at 3e-6.
    check_states(model, GOLDEN / f"case_{case}.safetensors", dtype, relative=5e-7)


@pytest.mark.parametrize("case", ["full", "short", "holes"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_golden_states_with_the_stored_weights(shared: Path, case: str, dtype: torch.dtype) -> None:
    folder = shared / "golden" / "videoclip_tiny"
    stored = load_file(folder / "weights.safetensors")
    model = VideoCLIP(TINY).eval()
    model.load_state_dict({name: stored[name] for name in tiny_state()}, strict=True)
    check_states(model, folder / f"case_{case}.safetensors", dtype)


def test_a_long_video_is_consecutive_clips_pooled_together(model: VideoCLIP) -> None:
    """Against the reference's way with clips, one at a time: 12 + 12 + 6 tokens of one video, 14 of the other."""
    model.double()
    features = torch.randn(3, 30, 24, dtype=torch.float64)
    mask = torch.ones(3, 30, dtype=torch.bool)
    mask[0, 3:5] = False
    mask[1, 14:] = False
    mask[2, 12:24] = False  # a clip without a token plays no part
    with torch.no_grad():
        video = model.encode_video(features, mask)
        for row in range(3):
            states, ends = [], []
            for start in range(0, 30, 12):
                clip = slice(start, min(start + 12, 30))
                hidden = model.video_encoder(features[row : row + 1, clip], mask[row : row + 1, clip])[0]
                if mask[row, clip].any():
                    states.append(hidden[1:-1][mask[row, clip]])
                    ends.append(hidden[-1:])
            torch.testing.assert_close(video.tokens[row][mask[row]], torch.cat(states), rtol=0, atol=1e-12)
            torch.testing.assert_close(video.pooled[row], torch.cat(states + ends).mean(0), rtol=0, atol=1e-12)
            torch.testing.assert_close(video.hidden[row, -1], torch.cat(ends).mean(0), rtol=0, atol=1e-12)
    assert video.tokens.shape == (3, 30, 48) and video.hidden.shape == (3, 32, 48)


def test_the_batch_and_its_padding_do_not_matter(small: VideoCLIP) -> None:
    features = torch.randn(2, 40, 6)
    mask = torch.arange(40)[None] < torch.tensor([[7], [31]])
    together = small.encode_video(features, mask)
    for row, length in ((0, 7), (1, 31)):
        alone = small.encode_video(features[row : row + 1, :length], mask[row : row + 1, :length])
        torch.testing.assert_close(together.pooled[row], alone.pooled[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(together.tokens[row, :length], alone.tokens[0], rtol=0, atol=1e-5)


def test_masked_features_get_no_gradient(small: VideoCLIP) -> None:
    features = torch.randn(2, 30, 6, requires_grad=True)
    mask = torch.rand(2, 30) < 0.6
    small.encode_video(features, mask).pooled.sum().backward()  # type: ignore[no-untyped-call]
    assert features.grad is not None
    assert (features.grad[~mask] == 0).all() and (features.grad[mask] != 0).any(-1).all()


def test_a_video_without_tokens_is_finite(small: VideoCLIP) -> None:
    for length in (5, 30):
        features, mask = torch.randn(2, length, 6), torch.zeros(2, length, dtype=torch.bool)
        mask[1] = True
        video = small.encode_video(features, mask)
        assert video.pooled.isfinite().all()
        torch.testing.assert_close(video.pooled[0], video.hidden[0, -1])


def test_the_pair_score_is_the_mean_of_token_scores(small: VideoCLIP) -> None:
    """docs/METHOD.md section 2: what makes re-scoring by stored tokens exact ([SEP] is one of them)."""
    features, mask = torch.randn(1, 9, 6), torch.ones(1, 9, dtype=torch.bool)
    video, text = small.encode_video(features, mask), torch.randn(16)
    torch.testing.assert_close(video.pooled[0] @ text, (video.hidden[0, 1:] @ text).mean())


def test_dropout_is_for_training_only(small: VideoCLIP) -> None:
    features, mask = torch.randn(1, 9, 6), torch.ones(1, 9, dtype=torch.bool)
    ids, words = text_batch([[110, 111]], SMALL)
    assert torch.equal(small.encode_video(features, mask).pooled, small.encode_video(features, mask).pooled)
    small.train()
    assert not torch.equal(small.encode_video(features, mask).pooled, small.encode_video(features, mask).pooled)
    assert not torch.equal(small.encode_text(ids, words), small.encode_text(ids, words))


def test_a_tower_works_on_its_own_without_a_vocabulary() -> None:
    config = TowerConfig(n_layers=1, hidden_size=8, n_heads=2, intermediate_size=16, n_words=2, n_positions=34)
    tower = VideoTower(config, feature_dim=5)
    video = tower.encode(torch.randn(2, 70, 5), torch.ones(2, 70, dtype=torch.bool))
    video.pooled.sum().backward()  # type: ignore[no-untyped-call]
    learned = tower.bert.embeddings.word_embeddings.weight
    assert learned.shape == (2, 8) and learned.grad is not None and (learned.grad != 0).any(1).all()
    with pytest.raises(ValueError, match="clips of 33 tokens"):
        VideoTower(config, feature_dim=5, max_tokens=33)


def test_new_weights_are_berts_start(small: VideoCLIP) -> None:
    tower = VideoTower(TowerConfig(n_layers=1, hidden_size=192, intermediate_size=64), feature_dim=32)
    for name, tensor in tower.state_dict().items():
        if "LayerNorm" in name or name.endswith("bias"):
            assert torch.equal(tensor, torch.full_like(tensor, float(name.endswith("LayerNorm.weight")))), name
        else:
            assert abs(float(tensor.std()) / 0.02 - 1) < 0.1, name


def test_texts_are_laid_out_as_the_reference_does() -> None:
    ids, mask = text_batch([[7, 8], [], list(range(30))], SMALL)
    assert ids[0, :6].tolist() == [101, 102, 7, 8, 102, 0]
    assert ids[1, :4].tolist() == [101, 102, 102, 0]
    assert ids[2].tolist() == [101, 102, *range(25), 102]
    assert mask.sum(1).tolist() == [5, 3, 28] and not (mask[:, :-1] < mask[:, 1:]).any()
    assert text_batch([], SMALL)[0].shape == (0, 3)


def test_a_text_of_several_lengths_in_one_batch_is_the_text_alone(small: VideoCLIP) -> None:
    texts = [[110, 111, 112], [], list(range(110, 135))]
    together = small.encode_text(*text_batch(texts, SMALL))
    for row, text in enumerate(texts):
        torch.testing.assert_close(together[row], small.encode_text(*text_batch([text], SMALL))[0], rtol=0, atol=1e-6)


def test_masked_mean_looks_at_valid_places_only() -> None:
    states = torch.tensor([[[1.0], [math.nan], [3.0]]])
    assert masked_mean(states, torch.tensor([[True, False, True]])).tolist() == [[2.0]]


def test_saved_and_loaded_it_is_the_same_model(small: VideoCLIP, tmp_path: Path) -> None:
    small.save(tmp_path)
    loaded = VideoCLIP.load(tmp_path)
    assert loaded.config == SMALL and not loaded.training
    expected = small.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def damage_missing_config(folder: Path) -> str:
    (folder / "config.json").unlink()
    return "holds no config.json"


def damage_kind(folder: Path) -> str:
    edit(folder, kind="s3d")
    return "its kind is not 'videoclip'"


def damage_unknown(folder: Path) -> str:
    edit(folder, colour="red")
    return "unknown or missing: colour"


def damage_type(folder: Path) -> str:
    edit(folder, n_heads="4")
    return "n_heads is '4', not of type int"


def damage_size(folder: Path) -> str:
    edit(folder, text_layers=1)
    return "Unexpected key.*text_encoder.encoder.layer"


def damage_heads(folder: Path) -> str:
    edit(folder, n_heads=5)
    return "5 heads do not divide a width of 16"


def damage_weights(folder: Path) -> str:
    file = folder / "videoclip.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    return "cannot be loaded"


def damage_missing_weights(folder: Path) -> str:
    (folder / "videoclip.safetensors").unlink()
    return "holds no videoclip.safetensors"


def edit(folder: Path, **changes: object) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | changes))


@pytest.mark.parametrize(
    "damage",
    [
        damage_missing_config,
        damage_kind,
        damage_unknown,
        damage_type,
        damage_size,
        damage_heads,
        damage_weights,
        damage_missing_weights,
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(small: VideoCLIP, tmp_path: Path, damage: object) -> None:
    small.save(tmp_path)
    assert callable(damage)
    message = damage(tmp_path)
    with pytest.raises((IntegrityError, UsageError), match=message) as caught:
        VideoCLIP.load(tmp_path)
    assert "\n" not in caught.value.message


# BERT's own files, against the package transformers.

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "##s", "run", "'", "the", "cafe", "s", "."]
SPECIAL = {"[PAD]": 0, "[CLS]": 2, "[SEP]": 3}


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    return tmp_path


def test_tokens_are_those_of_transformers(vocabulary: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    texts = ["A CATS run.", "the Café's  zebra", "", " \n\t", "[SEP] cat", "cat\u4e2dcat", "a " * 700]
    reference = transformers.BertTokenizerFast.from_pretrained(vocabulary, do_lower_case=True)
    expected = reference(texts, add_special_tokens=False)["input_ids"]
    assert load_tokenizer(vocabulary, len(VOCABULARY), SPECIAL)(texts) == expected
    reference.save_pretrained(tmp_path / "other")
    assert (tmp_path / "other" / "tokenizer.json").is_file()
    assert load_tokenizer(tmp_path / "other", len(VOCABULARY), SPECIAL)(texts) == expected


def test_another_models_vocabulary_is_refused(vocabulary: Path) -> None:
    with pytest.raises(UsageError, match=r"another model: 14 words; expected: at most 13"):
        load_tokenizer(vocabulary, 13, SPECIAL)
    with pytest.raises(UsageError, match=r"another model: 14 words, \[CLS\] is 2; expected: .*\[CLS\] 101"):
        load_tokenizer(vocabulary, 14, {"[CLS]": 101, "[SEP]": 3})
    (vocabulary / "vocab.txt").unlink()
    with pytest.raises(UsageError, match=r"holds no vocab.txt or tokenizer.json"):
        load_tokenizer(vocabulary, 14, SPECIAL)
    (vocabulary / "tokenizer.json").write_text("{}")
    with pytest.raises(IntegrityError, match=r"tokenizer.json cannot be read as a tokenizer"):
        load_tokenizer(vocabulary, 14, SPECIAL)
    with pytest.raises(UsageError, match="no such folder: /nowhere/at/all"):
        load_tokenizer("/nowhere/at/all", 14, SPECIAL)


def test_without_the_package_the_extra_is_named(vocabulary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UsageError, match="is not installed") as caught:
        load_tokenizer(vocabulary, 14, SPECIAL)
    assert "pip install 'fineco[videoclip]'" in caught.value.hint


def test_a_hub_out_of_reach_is_one_line_with_two_ways_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for load in (lambda: load_tokenizer("bert-base-uncased", 30522, SPECIAL), VideoCLIP.from_bert):
        with pytest.raises(FinecoError, match="hub repository bert-base-uncased at https://") as caught:
            load()
        assert "\n" not in caught.value.message and "not in the cache" in caught.value.message
        assert "Run it once where the hub can be reached, or copy the folder" in caught.value.hint
    assert capfd.readouterr() == ("", "")


def save_bert(folder: Path, old_names: bool) -> Tensor:
    """A random BERT as transformers saves it, and its states of one text."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=40,
    )
    bert = transformers.BertModel(config).eval()
    bert.save_pretrained(folder)
    if old_names:
        state = load_file(folder / "model.safetensors")
        names = {name: "bert." + name for name in state}
        for new, old in ((".LayerNorm.weight", ".LayerNorm.gamma"), (".LayerNorm.bias", ".LayerNorm.beta")):
            names = {name: other.replace(new, old) for name, other in names.items()}
        old_state = {names[name]: tensor for name, tensor in state.items()}
        save_file(old_state | {"cls.predictions.bias": torch.zeros(50)}, folder / "model.safetensors")
    with torch.no_grad():
        states: Tensor = bert(torch.tensor([[1, 20, 21, 2]])).last_hidden_state
    return states


@pytest.mark.parametrize("old_names", [False, True])
def test_both_towers_start_from_bert(tmp_path: Path, old_names: bool) -> None:
    expected = save_bert(tmp_path, old_names)
    config = VideoCLIPConfig(video_layers=2, feature_dim=6, max_video_tokens=12, max_text_tokens=20)
    model = VideoCLIP.from_bert(tmp_path, config).eval()
    assert (model.config.text_layers, model.config.hidden_size, model.config.n_words) == (3, 16, 50)
    states = model.text_encoder(
        model.text_encoder.words(torch.tensor([[1, 20, 21, 2]])), torch.arange(4), torch.ones(1, 4).bool()
    )
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-5)
    video, text = model.video_encoder.bert.state_dict(), model.text_encoder.state_dict()
    assert text.keys() - video.keys() == {name for name in text if name.startswith("encoder.layer.2.")}
    assert all(torch.equal(tensor, text[name]) for name, tensor in video.items())
    assert VideoCLIP.from_bert(tmp_path, config).training


def test_another_kind_of_model_is_not_taken_for_bert(tmp_path: Path) -> None:
    save_bert(tmp_path, old_names=False)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu_new"}))
    with pytest.raises(IntegrityError, match="not a BERT's with exact GELU"):
        VideoCLIP.from_bert(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(IntegrityError, match="Missing key") as caught:
        VideoCLIP.from_bert(tmp_path, replace(SMALL, max_text_tokens=20))
    assert "\n" not in caught.value.message
