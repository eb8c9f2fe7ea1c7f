"""The open_clip adapter against open_clip itself and against golden numbers."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import av
import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from models.open_clip import OpenClipEncoder, frame_geometry, load_open_clip
from models.open_clip_weights import Located, locate
from models.registry import load_encoder
from open_clip_models import TINY, save_random_model
from pipeline.decoding.pixels import Resizer
from pipeline.errors import IntegrityError
from pipeline.types import FrameGeometry, UInt8, check_unit_rows

pytestmark = pytest.mark.filterwarnings("error")  # torch warns of read-only memory, once a process


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(TINY, tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def encoder(tiny: Path) -> OpenClipEncoder:
    return load(tiny)


def load(folder: Path, precision: str = "fp32") -> OpenClipEncoder:
    return load_open_clip(locate(f"local-dir:{folder}"), "cpu", precision)


def frames(count: int, size: int = 32, seed: int = 0) -> UInt8:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def prepared(image: Image.Image, geometry: FrameGeometry) -> UInt8:
    """One RGB image through the decoder's own exact resizing: (1, H, W, 3)."""
    exact = FrameGeometry(
        geometry.height, geometry.width, geometry.resize, geometry.interpolation, geometry.fill, exact=True
    )
    return Resizer(exact)(av.VideoFrame.from_ndarray(np.asarray(image), format="rgb24"))[None]


def test_the_spec_says_what_the_folder_says(tiny: Path, encoder: OpenClipEncoder) -> None:
    spec = encoder.spec
    assert spec.name == f"open_clip:local-dir:{tiny}"
    assert (spec.dim, spec.context_length, spec.window) == (16, 12, 1)
    assert spec.geometry == FrameGeometry(32, 32)
    assert spec.mean == (0.48145466, 0.4578275, 0.40821073)
    assert spec.temperature == 0.07  # open_clip starts at 1 / 0.07
    assert spec.weights_sha256 == hashlib.sha256((tiny / "open_clip_model.safetensors").read_bytes()).hexdigest()
    assert spec.licence == "not stated"
    assert (encoder.device, encoder.precision) == ("cpu", "fp32")


def test_every_weight_is_the_files(tiny: Path, encoder: OpenClipEncoder) -> None:
    loaded = encoder._model.state_dict()
    stored = load_file(tiny / "open_clip_model.safetensors")
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in stored.items())


def test_vectors_are_those_of_open_clip(tiny: Path, encoder: OpenClipEncoder) -> None:
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tiny}")
    model.eval()
    pixels, texts = frames(3), ["a cat", "Two dogs & one very long sentence that will not fit into twelve tokens", ""]
    with torch.inference_mode():
        images = torch.stack([transform(Image.fromarray(frame)) for frame in pixels])
        expected_frames = model.encode_image(images, normalize=True).numpy()
        tokens = open_clip.get_tokenizer(f"local-dir:{tiny}")(texts)
        expected_texts = model.encode_text(tokens, normalize=True).numpy()
    assert torch.equal(encoder.preprocess(pixels), images)
    np.testing.assert_allclose(encoder.encode_frames(pixels), expected_frames, atol=1e-6)
    np.testing.assert_allclose(encoder.encode_text(texts), expected_texts, atol=1e-6)


def test_every_grey_level_is_normalised_to_the_same_bits(encoder: OpenClipEncoder) -> None:
    levels = np.arange(256, dtype=np.uint8).repeat(4 * 3).reshape(1, 32, 32, 3)
    transform = open_clip.image_transform(32, is_train=False, mean=encoder.spec.mean, std=encoder.spec.std)
    expected = transform(Image.fromarray(levels[0]))
    assert torch.equal(encoder.preprocess(levels)[0], expected)


@pytest.mark.parametrize("shape", [(90, 160), (160, 90), (32, 32), (33, 20), (7, 300)])
@pytest.mark.parametrize(
    "settings",
    [
        {"resize_mode": "shortest", "interpolation": "bicubic"},
        {"resize_mode": "shortest", "interpolation": "bilinear"},
        {"resize_mode": "squash", "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3},  # PE-Core
        {"resize_mode": "squash", "interpolation": "bicubic"},
        {"resize_mode": "longest", "interpolation": "bicubic", "fill_color": 127},
        {"resize_mode": "shortest", "interpolation": "random"},
        {"resize_mode": "shortest", "interpolation": "bilinear", "size": (24, 40)},
        {"resize_mode": "longest", "interpolation": "bilinear", "size": (40, 24)},
    ],
    ids=lambda settings: "-".join(str(value) for value in settings.values()),
)
def test_a_decoded_frame_is_prepared_as_open_clip_prepares_an_image(
    encoder: OpenClipEncoder, settings: dict[str, Any], shape: tuple[int, int]
) -> None:
    config = open_clip.get_model_preprocess_cfg(encoder._model) | settings
    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8))
    config = {key: value for key, value in config.items() if key != "mode"}
    size, fill = config.pop("size"), config.pop("fill_color", 0)
    transform = open_clip.image_transform(size, is_train=False, fill_color=fill, **config)
    spec = encoder.spec.__class__(
        **{name: getattr(encoder.spec, name) for name in encoder.spec.__slots__}
        | {"geometry": frame_geometry({**config, "size": size, "fill_color": fill})}
        | {"mean": tuple(config["mean"]), "std": tuple(config["std"])}
    )
    other = OpenClipEncoder(spec, encoder._model, encoder._tokenizer, "cpu", "fp32")
    assert torch.equal(other.preprocess(prepared(image, spec.geometry))[0], transform(image))


def test_a_tags_settings_and_activation_reach_the_model(tiny: Path) -> None:
    plain = locate(f"local-dir:{tiny}")
    settings = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear", "resize_mode": "squash"}
    tagged = Located("open_clip:TINY/tag", plain.source, plain.weights, settings, quick_gelu=True)
    spec = load_open_clip(tagged, "cpu", "fp32").spec
    assert spec.geometry == FrameGeometry(32, 32, "squash", "bilinear")
    assert (spec.name, spec.mean, spec.std) == ("open_clip:TINY/tag", (0.5,) * 3, (0.5,) * 3)
    quick = load_open_clip(tagged, "cpu", "fp32")._model
    assert any(isinstance(part, open_clip.transformer.QuickGELU) for part in quick.modules())


def test_a_timm_tower_loads_from_a_folder(tmp_path: Path) -> None:
    vision = {"image_size": 160, "timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_proj": "linear"}
    settings = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "resize_mode": "squash"}
    config = {**TINY, "vision_cfg": {**vision, "timm_pool": ""}, "custom_text": True}
    encoder = load(save_random_model(config, tmp_path, preprocess=settings), "bf16")
    assert encoder.spec.geometry == FrameGeometry(160, 160, "squash", "bilinear")
    check_unit_rows("frames", encoder.encode_frames(frames(2, 160)))


def test_bf16_weights_give_nearly_the_same_vectors(tiny: Path, encoder: OpenClipEncoder) -> None:
    half = load(tiny, "bf16")
    assert {parameter.dtype for parameter in half._model.parameters()} == {torch.bfloat16}
    assert half.spec == encoder.spec
    for rows, exact in (
        (half.encode_frames(frames(4)), encoder.encode_frames(frames(4))),
        (half.encode_text(["a cat", "a dog"]), encoder.encode_text(["a cat", "a dog"])),
    ):
        assert rows.dtype == np.float32
        check_unit_rows("rows", rows)
        assert np.all(np.sum(rows * exact, axis=1) > 0.999)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_row_does_not_depend_on_its_neighbours(tiny: Path, precision: str) -> None:
    encoder, batch, other = load(tiny, precision), frames(5), frames(5, seed=1)
    other[2] = batch[2]
    np.testing.assert_array_equal(encoder.encode_frames(batch)[2], encoder.encode_frames(other)[2])
    texts, others = ["a", "b", "a cat"], ["x y z", "", "a cat"]
    np.testing.assert_array_equal(encoder.encode_text(texts)[2], encoder.encode_text(others)[2])


def test_many_texts_come_back_in_order(encoder: OpenClipEncoder) -> None:
    texts = [f"word {number}" for number in range(300)]
    rows = encoder.encode_text(texts)
    assert rows.shape == (300, 16)
    np.testing.assert_allclose(rows[[0, 255, 256, 299]], encoder.encode_text([texts[i] for i in (0, 255, 256, 299)]))


def test_a_text_beyond_the_context_is_cut(encoder: OpenClipEncoder) -> None:
    long, longer = "cat " * 50, "cat " * 5000
    np.testing.assert_allclose(encoder.encode_text([long]), encoder.encode_text([longer]))


def test_nothing_in_nothing_out(encoder: OpenClipEncoder) -> None:
    assert encoder.encode_frames(frames(0)).shape == (0, 16)
    assert encoder.encode_text([]).shape == (0, 16)


def test_read_only_and_strided_frames_are_taken_as_they_are(encoder: OpenClipEncoder) -> None:
    pixels = frames(4)
    expected = encoder.encode_frames(pixels[::2].copy())
    pixels.flags.writeable = False
    np.testing.assert_array_equal(encoder.encode_frames(pixels[::2]), expected)
    np.testing.assert_array_equal(encoder.encode_frames(pixels)[::2], encoder.encode_frames(pixels.copy())[::2])
    np.testing.assert_array_equal(pixels, frames(4))


@pytest.mark.parametrize("wrong", [np.zeros((1, 32, 30, 3), np.uint8), np.zeros((1, 32, 32, 3), np.float32)])
def test_frames_of_another_geometry_or_type_are_refused(encoder: OpenClipEncoder, wrong: UInt8) -> None:
    with pytest.raises(ValueError, match="frames"):
        encoder.encode_frames(wrong)


def test_loading_prints_and_logs_nothing(
    tiny: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    load(tiny)
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def _damage(folder: Path, kind: str) -> str:
    weights = folder / "open_clip_model.safetensors"
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
        return "cannot be loaded"
    if kind == "missing tensor":
        tensors = load_file(weights)
        del tensors["ln_final.weight"]
        save_file(tensors, weights)
        return "cannot be loaded"
    if kind == "pickle":
        weights.unlink()
        torch.save({"state_dict": io.StringIO("anything")}, folder / "open_clip_pytorch_model.bin")
        return "cannot be loaded"
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["preprocess_cfg"]["resize_mode"] = "stretch"
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return "unknown resize_mode 'stretch'"


@pytest.mark.parametrize("kind", ["truncated", "missing tensor", "pickle", "unknown resize mode"])
def test_damaged_files_are_refused_in_one_line(tiny: Path, tmp_path: Path, kind: str) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    message = _damage(folder, kind)
    with pytest.raises(IntegrityError, match=message) as caught:
        load(folder)
    assert "\n" not in caught.value.message


def test_plain_tensors_in_a_bin_file_load(tiny: Path, tmp_path: Path, encoder: OpenClipEncoder) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    torch.save(load_file(folder / "open_clip_model.safetensors"), folder / "open_clip_pytorch_model.bin")
    (folder / "open_clip_model.safetensors").unlink()
    np.testing.assert_array_equal(load(folder).encode_frames(frames(2)), encoder.encode_frames(frames(2)))


# Golden numbers of open_clip 3.3.0 for a stored model, images and texts (golden/README.md, section 6).


@pytest.fixture(scope="module")
def golden(shared: Path) -> Path:
    return shared / "golden" / "open_clip_tiny"


@pytest.fixture(scope="module")
def expected(golden: Path) -> dict[str, torch.Tensor]:
    with safe_open(golden / "expected.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)


@pytest.fixture(scope="module")
def model(golden: Path) -> OpenClipEncoder:
    encoder = load_encoder(f"open_clip:local-dir:{golden / 'model'}", device="cpu", precision="fp32")
    assert isinstance(encoder, OpenClipEncoder)
    return encoder


@pytest.fixture(scope="module")
def inputs(golden: Path) -> dict[str, list[str]]:
    loaded: dict[str, list[str]] = json.loads((golden / "inputs.json").read_text())
    return loaded


def test_golden_images(
    golden: Path, inputs: dict[str, list[str]], model: OpenClipEncoder, expected: dict[str, torch.Tensor]
) -> None:
    # From stored pixels: open_clip resizes before it converts to RGB, which only differs for the RGBA and L files.
    mean, std = torch.tensor(model.spec.mean).view(3, 1, 1), torch.tensor(model.spec.std).view(3, 1, 1)
    pixels = ((expected["preprocessed"] * std + mean) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    torch.testing.assert_close(model.preprocess(pixels), expected["preprocessed"], atol=1e-5, rtol=0)
    rows = model.encode_frames(pixels)
    np.testing.assert_allclose(rows, expected["image_embedding_normalized"].numpy(), atol=2e-5, rtol=0)
    for row, name in zip(rows, inputs["images"], strict=True):
        image = Image.open(golden / "images" / f"{name}.png").convert("RGB")
        whole = model.encode_frames(prepared(image, model.spec.geometry))[0]
        assert float(whole @ row) >= 0.9999, name


def test_golden_texts(inputs: dict[str, list[str]], model: OpenClipEncoder, expected: dict[str, torch.Tensor]) -> None:
    tokens = model._tokenizer(inputs["texts"])
    assert torch.equal(tokens, expected["token_ids"])
    rows = model.encode_text(inputs["texts"])
    np.testing.assert_allclose(rows, expected["text_embedding_normalized"].numpy(), atol=2e-5, rtol=0)
    images = expected["image_embedding_normalized"].numpy()
    np.testing.assert_allclose(images @ rows.T, expected["cosine_image_text"].numpy(), atol=2e-5, rtol=0)
    assert model.spec.temperature == 0.01
