"""S3D against golden numbers of the reference, and against identities (METHOD.md section 4)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from models.s3d import MAX_WORDS, S3D, Dictionary, space_to_depth

GOLDEN = Path(__file__).parents[1] / "golden" / "s3d_howto100m"
SEED = 1000
# Of the weights as torch.randn drew them when the golden numbers were made: on other processors a last bit may differ.
SAME_BITS = "56d5557f62dc2f1c15312758d37e8e3bb5e4e4bcc97a19cd3c829713000fba3f"


def golden_state(model: S3D) -> dict[str, Tensor]:
    """The weights of the golden cases, drawn by golden/README.md's rule; BatchNorm's running statistics are stored."""
    state = load_file(GOLDEN / "bn_running_stats.safetensors")
    for index, (name, like) in enumerate(model.state_dict().items()):
        if name in state:
            continue
        drawn = torch.randn(like.shape, generator=torch.Generator().manual_seed(SEED + index))
        layer, kind = name.split(".")[-2:]
        if kind == "num_batches_tracked":
            state[name] = torch.zeros((), dtype=torch.long)
        elif layer.startswith("bn"):
            state[name] = 1 + 0.1 * drawn if kind == "weight" else 0.2 * drawn
        elif layer.startswith("conv"):
            state[name] = drawn * math.sqrt(2 / math.prod(like.shape[1:]))
        elif layer == "word_embd":
            state[name] = drawn
        elif kind == "weight":
            state[name] = drawn * math.sqrt(1 / like.shape[1])
        else:
            state[name] = 1 + 0.5 * drawn if "gating" in name else 0.1 * drawn
    return state


@pytest.fixture(scope="module")
def model() -> S3D:
    model = S3D().eval().requires_grad_(False)
    model.load_state_dict(golden_state(model), strict=True)
    return model


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest, model: S3D) -> Iterator[torch.dtype]:
    """The precision that the model is in during the test."""
    model.to(request.param)
    yield request.param
    model.float()


def tolerance(model: S3D, dtype: torch.dtype) -> float:
    if dtype == torch.float32:
        return 1e-3
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.float().numpy().tobytes())
    return 1e-9 if digest.hexdigest() == SAME_BITS else 2e-4


def check_case(model: S3D, case: dict[str, Tensor], dtype: torch.dtype) -> None:
    output, allowed = model(case["input"].to(dtype)), tolerance(model, dtype)
    suffix = "_f64" if dtype == torch.float64 else ""
    for name in ("video_embedding", "mixed_5c"):
        found, expected = getattr(output, name), case[name + suffix]
        assert found.dtype == dtype
        assert (found - expected).abs().max() <= allowed * expected.abs().max(), name


def test_names_order_shapes_and_golden_weights_are_those_recorded(model: S3D, shared: Path) -> None:
    recorded = json.loads((shared / "golden" / "s3d_howto100m" / "parameters.json").read_text())
    assert recorded["seed"] == SEED
    state = model.state_dict()
    assert list(state) == [entry["name"] for entry in recorded["parameters"]]
    for entry in recorded["parameters"]:
        tensor = state[entry["name"]]
        assert list(tensor.shape) == entry["shape"]
        if entry["rule"] != "stored":
            assert abs(float(tensor.double().sum()) - entry["sum"]) <= 1e-6 * entry["abs_sum"]


def test_golden_clip_of_sizes_that_do_not_halve_evenly(model: S3D, dtype: torch.dtype) -> None:
    check_case(model, load_file(GOLDEN / "case_b_odd.safetensors"), dtype)


def test_golden_clips_of_even_sizes(model: S3D, dtype: torch.dtype, shared: Path) -> None:
    check_case(model, load_file(shared / "golden" / "s3d_howto100m" / "case_a.safetensors"), dtype)


def test_every_stage_is_the_references(model: S3D) -> None:
    """Says where a mistake is; and the tail of each stage shows one in the padding."""
    case = load_file(GOLDEN / "case_b_odd.safetensors")
    found: dict[str, Tensor] = {}
    stages = {"stem" if name == "conv1" else name: part for name, part in model.named_children()}
    hooks = [
        part.register_forward_hook(lambda _part, _input, output, name=name: found.update({name: output}))
        for name, part in stages.items()
        if f"stage.{name}.shape" in case
    ]
    model(case["input"])
    for hook in hooks:
        hook.remove()
    assert len(found) == 13
    for name, output in found.items():
        assert list(output.shape) == case[f"stage.{name}.shape"].tolist(), name
        for tap, values in (
            ("channel_mean", output.mean(dim=(2, 3, 4))),
            ("channel_max", output.amax(dim=(2, 3, 4))),
            ("head", output[:, :6, :2, :3, :3]),
            ("tail", output[:, -6:, -2:, -3:, -3:]),
        ):
            expected = case[f"stage.{name}.{tap}"]
            assert (values - expected).abs().max() <= 1e-3 * expected.abs().max(), f"{name} {tap}"


def test_parameter_counts() -> None:
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in S3D().named_children()}
    assert counts.pop("text_module") == 21_540_536
    assert counts["fc"] == 524_800
    assert sum(counts.values()) == 9_670_800


def test_the_stem_is_one_convolution_over_the_pixels() -> None:
    """Space to depth and a 2x4x4 kernel, its first row dropped, equal a 4x8x8 kernel with stride 2."""
    torch.manual_seed(0)
    video = torch.rand(1, 3, 6, 8, 12, dtype=torch.float64)
    model = S3D(n_words=2).double().eval().requires_grad_(False)
    weight = model.conv1.conv1.weight
    whole = torch.zeros(64, 3, 4, 8, 8, dtype=torch.float64)
    for channel in range(24):
        cell, colour = divmod(channel, 3)
        dt, dh, dw = cell >> 2, cell >> 1 & 1, cell & 1
        whole[:, colour, dt::2, dh::2, dw::2] = weight[:, channel]
    expected = F.conv3d(F.pad(video, (2, 4, 2, 4, 0, 2)), whole, stride=2)
    found: list[Tensor] = []
    model.conv1.conv1.register_forward_hook(lambda _part, _input, output: found.append(output))
    model(video)
    torch.testing.assert_close(found[0], expected, atol=1e-12, rtol=0)


def test_space_to_depth_puts_each_pixel_where_it_says() -> None:
    video = torch.arange(2 * 3 * 4 * 2 * 6).reshape(2, 3, 4, 2, 6)
    cells = space_to_depth(video)
    assert cells.shape == (2, 24, 2, 1, 3)
    for b, c, t, h, w in np.ndindex(*video.shape):
        channel = ((t % 2 * 2 + h % 2) * 2 + w % 2) * 3 + c
        assert cells[b, channel, t // 2, h // 2, w // 2] == video[b, c, t, h, w]


def test_layout_in_memory_does_not_matter(model: S3D) -> None:
    video = load_file(GOLDEN / "case_b_odd.safetensors")["input"]
    expected = model(video).video_embedding
    found = model(video.contiguous(memory_format=torch.channels_last_3d)).video_embedding
    torch.testing.assert_close(found, expected, atol=0, rtol=1e-4)


@pytest.mark.parametrize("shape", [(1, 3, 5, 32, 32), (1, 3, 4, 31, 32), (1, 3, 4, 32, 30 + 1), (1, 1, 4, 32, 32)])
def test_odd_sizes_and_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \(B, 3, T, H, W\) with even T, H and W"):
        S3D(n_words=2)(torch.zeros(shape))
    with pytest.raises(ValueError, match="even T, H and W"):
        S3D(n_words=2)(torch.zeros(3, 4, 32, 32))


def test_gates_weigh_channels_between_nothing_and_all() -> None:
    model = S3D(n_words=2)
    nn.init.zeros_(model.gating.fc.weight)
    nn.init.zeros_(model.gating.fc.bias)
    x = torch.rand(1, 192, 2, 3, 3)
    torch.testing.assert_close(model.gating(x), x / 2)


# ---------------------------------------------------------------------------------------------------------- texts


@pytest.fixture(scope="module")
def texts() -> dict[str, list[str]]:
    loaded: dict[str, list[str]] = json.loads((GOLDEN / "text.json").read_text("utf-8"))
    return loaded


def test_golden_sentences(model: S3D, texts: dict[str, list[str]]) -> None:
    case = load_file(GOLDEN / "text.safetensors")
    words = np.load(GOLDEN / "s3d_dict_small.npy", allow_pickle=False).tolist()
    assert words == texts["words"]
    ids = Dictionary(words).ids(texts["sentences"])
    assert torch.equal(ids, case["sentence_ids"])
    torch.testing.assert_close(model.text_embedding(ids), case["sentence_embedding"], atol=1e-5, rtol=1e-5)


def test_golden_ids_over_the_whole_table(model: S3D) -> None:
    case = load_file(GOLDEN / "text.safetensors")
    found = model.text_embedding(case["token_ids"])
    torch.testing.assert_close(found, case["token_embedding"], atol=1e-5, rtol=1e-5)


def test_unknown_words_are_dropped_before_the_text_is_cut() -> None:
    dictionary = Dictionary(["a", "b", "c"])
    assert dictionary.ids(["zz " * 20 + "b, C!"])[0].tolist() == [2, 3] + [0] * (MAX_WORDS - 2)
    assert dictionary.ids(["a x " * 15 + "b c"])[0].tolist() == [1] * 15 + [2]
    assert dictionary.ids(["nothing known", ""]).tolist() == [[0] * MAX_WORDS] * 2
    assert dictionary.ids([]).shape == (0, MAX_WORDS)


def test_padding_takes_part_in_the_maximum(model: S3D) -> None:
    ids = torch.tensor([[5] * MAX_WORDS, [5] + [0] * (MAX_WORDS - 1)])
    full, padded = model.text_embedding(ids)
    assert not torch.allclose(full, padded)
