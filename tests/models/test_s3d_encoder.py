"""S3D's published files to a folder and an encoder: what is checked, what is refused, what comes out."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from models.registry import load_encoder
from models.s3d import S3D, Dictionary
from models.s3d_encoder import S3DEncoder, load_s3d
from models.s3d_weights import _sha256, convert_s3d, read_s3d
from pipeline.errors import FinecoError, IntegrityError, UsageError
from pipeline.types import FrameGeometry, UInt8, check_unit_rows

SMALL = 64
WORDS = ["the", "onion", "cut", "don't", "crème", "pan", "heat"]


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Weights of an untrained network with eight words."""
    torch.manual_seed(0)
    return S3D(n_words=len(WORDS) + 1).state_dict()


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, state: dict[str, Tensor]) -> tuple[Path, Path]:
    """The two files as they are published."""
    folder = tmp_path_factory.mktemp("published")
    torch.save(state, folder / "s3d_howto100m.pth")
    np.save(folder / "s3d_dict.npy", np.array(WORDS))
    return folder / "s3d_howto100m.pth", folder / "s3d_dict.npy"


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, published: tuple[Path, Path]) -> Path:
    folder = tmp_path_factory.mktemp("models") / "s3d"
    convert_s3d(*published, folder)
    return folder


@pytest.fixture(scope="module")
def encoder(converted: Path) -> S3DEncoder:
    return load_s3d(converted, "cpu", "fp32")


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def small(request: pytest.FixtureRequest, converted: Path) -> S3DEncoder:
    """The encoder, told that its frames are a twelfth of their size: a window costs a tenth of a second."""
    encoder = load_s3d(converted, "cpu", request.param)
    encoder.spec = replace(encoder.spec, geometry=FrameGeometry(SMALL, SMALL))
    return encoder


def windows(count: int, seed: int = 0, size: int = SMALL) -> UInt8:
    """Coarse coloured noise (B, 30, size, size, 3)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 30, size // 8, size // 8, 3), dtype=np.uint8)
    return coarse.repeat(8, axis=2).repeat(8, axis=3)


# ----------------------------------------------------------------------------------------------------- the encoder


def test_the_spec_says_what_the_features_are(converted: Path, encoder: S3DEncoder) -> None:
    spec = encoder.spec
    assert spec.name == f"s3d:{converted}"
    assert (spec.dim, spec.window, spec.fps, spec.context_length) == (512, 30, 30.0, 16)
    assert spec.geometry == FrameGeometry(224, 224, "shortest", "bicubic")
    assert (spec.mean, spec.std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    assert spec.licence == "Apache-2.0"
    assert spec.weights_sha256 == json.loads((converted / "config.json").read_text())["sha256"]


def test_the_registry_loads_the_folder(converted: Path, encoder: S3DEncoder) -> None:
    other = load_encoder(f"s3d:{converted}", device="cpu", precision="fp32")
    assert isinstance(other, S3DEncoder)
    assert other.spec == encoder.spec


def test_frames_become_what_the_network_takes(encoder: S3DEncoder) -> None:
    frames = windows(2)
    found = encoder.preprocess(frames)
    assert found.shape == (2, 3, 30, SMALL, SMALL)
    np.testing.assert_array_equal(found.numpy(), (frames / np.float32(255)).transpose(0, 4, 1, 2, 3))


def test_vectors_are_the_networks_of_unit_length(state: dict[str, Tensor], small: S3DEncoder) -> None:
    model = S3D(len(WORDS) + 1).eval()
    model.load_state_dict(state)
    frames, texts = windows(2), ["Cut the onion", "", "don't heat"]
    with torch.inference_mode():
        video = (torch.from_numpy(frames).float() / 255).permute(0, 4, 1, 2, 3).contiguous()
        expected = F.normalize(model(video).video_embedding, dim=-1).numpy()
        expected_texts = F.normalize(model.text_embedding(Dictionary(WORDS).ids(texts)), dim=-1).numpy()
    for rows, exact in ((small.encode_frames(frames), expected), (small.encode_text(texts), expected_texts)):
        assert rows.dtype == np.float32
        check_unit_rows("rows", rows)
        if small.precision == "fp32":
            np.testing.assert_allclose(rows, exact, atol=1e-5)
        else:
            assert np.all(np.sum(rows * exact, axis=1) > 0.999)


def test_bf16_is_the_weights_and_not_the_model(encoder: S3DEncoder, converted: Path) -> None:
    half = load_s3d(converted, "cpu", "bf16")
    assert {parameter.dtype for parameter in half._model.parameters()} == {torch.bfloat16}
    assert (half.precision, half.spec) == ("bf16", encoder.spec)
    check_unit_rows("rows", half.encode_frames(windows(1, size=224)))


def test_a_row_depends_neither_on_its_neighbours_nor_on_the_memory_it_comes_in(small: S3DEncoder) -> None:
    batch, others = windows(3), windows(3, seed=1)
    others[1] = batch[1]
    strided = np.stack([others, batch], axis=1)[:, 0]
    strided.flags.writeable = False
    np.testing.assert_array_equal(small.encode_frames(strided)[1], small.encode_frames(batch)[1])


def test_texts_without_a_known_word_have_the_vector_of_padding(encoder: S3DEncoder) -> None:
    rows = encoder.encode_text(["", "zzzz unknownword", "!!", "onion"])
    check_unit_rows("texts", rows)
    np.testing.assert_array_equal(rows[1], rows[0])
    np.testing.assert_array_equal(rows[2], rows[0])
    assert not np.allclose(rows[3], rows[0])


def test_many_texts_come_back_in_order(encoder: S3DEncoder) -> None:
    texts = [WORDS[i % 7] + " " + WORDS[i // 7 % 7] for i in range(300)]
    rows = encoder.encode_text(texts)
    for i in (0, 255, 256, 299):
        np.testing.assert_allclose(rows[i], encoder.encode_text([texts[i]])[0], atol=1e-6)


def test_nothing_in_nothing_out(encoder: S3DEncoder) -> None:
    assert encoder.encode_frames(np.zeros((0, 30, 224, 224, 3), np.uint8)).shape == (0, 512)
    assert encoder.encode_text([]).shape == (0, 512)


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((1, 224, 224, 3), np.uint8),
        np.zeros((1, 32, 224, 224, 3), np.uint8),
        np.zeros((1, 30, 224, 224, 3), np.float32),
    ],
)
def test_other_windows_are_refused(encoder: S3DEncoder, wrong: UInt8) -> None:
    with pytest.raises(ValueError, match="frames"):
        encoder.encode_frames(wrong)


# ------------------------------------------------------------------------------------------------------ conversion


def test_every_weight_and_word_comes_through(converted: Path, state: dict[str, Tensor]) -> None:
    stored = read_s3d(converted)
    loaded = stored.model.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    assert stored.dictionary.words == tuple(WORDS)
    assert not stored.model.training


def test_weights_in_half_precision_and_without_counters_are_the_same_model(
    published: tuple[Path, Path], state: dict[str, Tensor], tmp_path: Path
) -> None:
    half = {name: t.half() for name, t in state.items() if not name.endswith("num_batches_tracked")}
    torch.save(half, tmp_path / "half.pth")
    convert_s3d(tmp_path / "half.pth", published[1], tmp_path / "out")
    loaded = read_s3d(tmp_path / "out").model.state_dict()
    assert all(torch.equal(loaded[name], tensor.float()) for name, tensor in half.items())
    assert {t.dtype for name, t in loaded.items() if name in half} == {torch.float32}


def test_the_same_files_give_the_same_digest_and_replace_an_earlier_conversion(
    published: tuple[Path, Path], converted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "s3d.safetensors").write_bytes(b"interrupted")
    convert_s3d(*published, out)
    convert_s3d(*published, out)
    assert read_s3d(out).sha256 == read_s3d(converted).sha256
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "s3d.safetensors", "words.json"]


def _without(state: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: tensor for key, tensor in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: _without(s, "fc.weight"), r"not S3D: it lacks 1 tensors \(fc.weight\)"),
        (lambda s: s | {"fc.scale": torch.ones(1)}, r"not S3D: it has 1 more \(fc.scale\)"),
        (lambda s: s | {"fc.bias": torch.ones(511)}, r"fc.bias is \(511,\), expected \(512,\)"),
        (lambda s: s | {"fc.bias": 3.0}, "fc.bias is float"),
        (lambda s: s | {"fc.bias": torch.full((512,), torch.nan)}, "fc.bias has values that are not finite"),
        (lambda s: s | {"text_module.word_embd.weight": torch.ones(3, 4)}, r"expected \(66250, 300\)"),
        (lambda s: s | {"text_module.word_embd.weight": torch.ones(7, 300)}, "7 words, the weights have room for 6"),
        (lambda s: [*s.values()], r"no state dict \(a list\)"),
        (lambda s: {"fc.bias": io.StringIO("anything")}, "cannot be loaded as weights"),
    ],
    ids=["missing", "surplus", "shape", "no tensor", "nan", "table", "too many words", "list", "objects"],
)
def test_other_weights_are_refused_in_one_line(
    published: tuple[Path, Path],
    state: dict[str, Tensor],
    tmp_path: Path,
    change: Callable[[dict[str, Any]], Any],
    message: str,
) -> None:
    light = {name: torch.ones((), dtype=tensor.dtype).expand(tensor.shape) for name, tensor in state.items()}
    torch.save(change(light), tmp_path / "other.pth")  # a hundredth of the size: one number for each tensor
    with pytest.raises(IntegrityError, match=message) as caught:
        convert_s3d(tmp_path / "other.pth", published[1], tmp_path / "out")
    assert "\n" not in caught.value.message
    assert not (tmp_path / "out").exists()


def test_damaged_weights_and_missing_files_are_refused(published: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "short.pth").write_bytes(published[0].read_bytes()[:100_000])
    with pytest.raises(IntegrityError, match=r"short\.pth cannot be loaded as weights"):
        convert_s3d(tmp_path / "short.pth", published[1], tmp_path / "out")
    with pytest.raises(UsageError, match=r"absent\.npy: no such file"):
        convert_s3d(published[0], tmp_path / "absent.npy", tmp_path / "out")


@pytest.mark.parametrize(
    ("array", "hint"),
    [
        (np.array(WORDS, dtype=object), "allow_pickle=True"),
        (np.array([WORDS]), ""),
        (np.arange(4), ""),
        (b"no array at all", ""),
    ],
    ids=["objects", "two dimensions", "numbers", "rubbish"],
)
def test_other_dictionaries_are_refused(published: tuple[Path, Path], tmp_path: Path, array: Any, hint: str) -> None:
    path = tmp_path / "dict.npy"
    if isinstance(array, bytes):
        path.write_bytes(array)
    else:
        np.save(path, array)
    with pytest.raises(IntegrityError, match=r"dict.npy is not .* of (unicode )?words") as caught:
        convert_s3d(published[0], path, tmp_path / "out")
    assert "\n" not in caught.value.message
    assert hint in caught.value.hint and bool(hint) == bool(caught.value.hint)


def test_the_hint_for_a_dictionary_of_objects_works(
    published: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "dict.npy", np.array(WORDS, dtype=object))
    with pytest.raises(IntegrityError) as caught:
        convert_s3d(published[0], tmp_path / "dict.npy", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    exec(caught.value.hint.partition('python -c "')[2].rpartition('"')[0])
    convert_s3d(published[0], tmp_path / "words.npy", tmp_path / "out")
    assert read_s3d(tmp_path / "out").dictionary.words == tuple(WORDS)


def test_another_models_folder_is_left_alone(published: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"kind": "videoclip"}')
    with pytest.raises(UsageError, match="already holds a model of another kind"):
        convert_s3d(*published, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_folder_that_cannot_be_written_is_said(published: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FinecoError, match="cannot be written"):
        convert_s3d(*published, tmp_path / "file" / "out")


# --------------------------------------------------------------------------------------------------------- reading


@pytest.fixture
def folder(converted: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy to damage; 37 MB, so not left behind."""
    copy = Path(shutil.copytree(converted, tmp_path / "s3d"))
    yield copy
    shutil.rmtree(copy)


def _flip_a_byte(folder: Path) -> None:
    with (folder / "s3d.safetensors").open("r+b") as file:
        file.seek(1_000_000)
        byte = file.read(1)[0]
        file.seek(1_000_000)
        file.write(bytes([byte ^ 1]))


def _other_words(folder: Path) -> None:
    (folder / "words.json").write_text(json.dumps(WORDS[::-1]))


def _other_kind(folder: Path) -> None:
    (folder / "config.json").write_text('{"kind": "videoclip"}')


def _no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_flip_a_byte, "not those that were converted"),
        (_other_words, "not those that were converted"),
        (_other_kind, "holds a model of kind 'videoclip', expected 's3d'"),
        (_no_json, "config.json cannot be read"),
        (lambda folder: (folder / "config.json").unlink(), "config.json cannot be read"),
        (lambda folder: (folder / "words.json").unlink(), "cannot be read"),
        (lambda folder: (folder / "s3d.safetensors").unlink(), "cannot be read"),
    ],
    ids=["weights", "words", "kind", "config", "no config", "no words", "no weights"],
)
def test_damaged_folders_are_refused_in_one_line(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    with pytest.raises(IntegrityError, match=message) as caught:
        load_s3d(folder, "cpu", "fp32")
    assert "\n" not in caught.value.message
    assert "fineco convert" in caught.value.hint


def test_weights_of_another_network_under_a_right_digest_are_refused(folder: Path) -> None:
    save_file(_without(load_file(folder / "s3d.safetensors"), "fc.bias"), folder / "s3d.safetensors")
    (folder / "config.json").write_text(json.dumps({"kind": "s3d", "sha256": _sha256(folder)}))
    with pytest.raises(IntegrityError, match="lacks 1 tensors"):
        read_s3d(folder)


def test_no_folder_is_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        read_s3d(tmp_path / "absent")
