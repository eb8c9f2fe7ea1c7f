"""The scorer against slow loops: what it sees of a video, that only the video decides, and its file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from models import scorer as scorer_module
from models.builtin.model import load_builtin
from models.scorer import (
    N_STATISTICS,
    NEAR,
    FrameScorer,
    frame_inputs,
    load_scorer,
    save_scorer,
    score_frames_without_text,
    video_context,
)
from models.scorer_file import BUILTIN, ScorerFacts, default_scorer, read_facts
from pipeline.errors import UsageError
from pipeline.types import Float32

DIM = 6
FACTS = ScorerFacts("fake", "0123456789abcdef", DIM, 8, {"videos": 3})


def unit(n: int, seed: int = 0, dim: int = DIM) -> Float32:
    x = np.random.default_rng(seed).standard_normal((n, dim))
    rows: Float32 = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    return rows


def random_scorer(seed: int = 0, dim: int = DIM, hidden: int = 8) -> FrameScorer:
    """Weights large enough that every input matters."""
    torch.manual_seed(seed)
    scorer = FrameScorer(dim, hidden)
    for parameter in scorer.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    scorer.centre.copy_(torch.randn(len(scorer.centre)) * 0.1)
    scorer.spread.copy_(torch.rand(len(scorer.spread)) + 0.5)
    return scorer.eval()


def context_by_loops(h: Float32) -> tuple[list[float], list[list[float]]]:
    """`video_context`, one frame at a time."""
    rows = [[float(x) for x in row] for row in h]
    n = len(rows)

    def cosine(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True))

    mean = [sum(row[d] for row in rows) / n for d in range(len(rows[0]))]
    length = sum(m * m for m in mean) ** 0.5
    found = []
    for i in range(n):
        others = [cosine(rows[i], rows[j]) for j in range(n) if j != i]
        beside = [cosine(rows[i], rows[j]) for j in (i - 1, i + 1) if 0 <= j < n]
        near = [cosine(rows[i], rows[j]) for j in range(n) if j != i and abs(j - i) <= NEAR]
        about_others = [sum(others) / len(others), min(beside), max(beside), max(near)] if others else [0.0] * 4
        found.append([cosine(rows[i], mean) / length, *about_others])
    return mean, found


@pytest.mark.parametrize("n", [1, 2, 3, NEAR + 2, 60])
def test_the_context_is_what_the_loops_say(n: int) -> None:
    h = unit(n, seed=n)
    mean, statistics = video_context(torch.from_numpy(h))
    expected_mean, expected = context_by_loops(h)
    assert statistics.shape == (n, N_STATISTICS)
    np.testing.assert_allclose(mean, expected_mean, atol=1e-6)
    np.testing.assert_allclose(statistics, expected, atol=2e-6)


def test_a_score_is_the_networks_answer_to_frame_mean_product_distance_and_statistics() -> None:
    scorer, h = random_scorer(), unit(9)
    mean, statistics = context_by_loops(h)
    state = {name: tensor.double().numpy() for name, tensor in scorer.state_dict().items()}
    expected = []
    for row, more in zip(h.astype(np.float64), statistics, strict=True):
        m = np.array(mean)
        x = np.concatenate([row, m, row * m, np.abs(row - m), more])
        x = (x - state["centre"]) / state["spread"]
        for layer in ("0", "2"):
            x = state[f"layers.{layer}.weight"] @ x + state[f"layers.{layer}.bias"]
            x = np.array([v * 0.5 * (1 + torch.erf(torch.tensor(v / 2**0.5)).item()) for v in x])
        expected.append((state["layers.4.weight"] @ x + state["layers.4.bias"])[0])
    np.testing.assert_allclose(score_frames_without_text(scorer, h), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 7, NEAR, 50])
def test_a_long_video_in_pieces_scores_as_in_one(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, h = random_scorer(), unit(101)
    monkeypatch.setattr(scorer_module, "CHUNK", 1000)
    whole = score_frames_without_text(scorer, h)
    monkeypatch.setattr(scorer_module, "CHUNK", chunk)
    np.testing.assert_allclose(score_frames_without_text(scorer, h), whole, atol=1e-5)


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers the largest tensor that an operation made."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def test_no_intermediate_result_of_a_long_video_outgrows_its_features() -> None:
    """Ten hours at a frame a second: the cosines of all pairs would be 2250 times the features."""
    scorer, h = random_scorer(dim=16), unit(36_000, dim=16)
    with Largest() as largest:  # type: ignore[no-untyped-call]
        scores = score_frames_without_text(scorer, h)
    assert scores.shape == (36_000,)
    assert np.isfinite(scores).all()
    assert largest.numel <= h.size


def test_a_video_played_backwards_has_its_scores_backwards() -> None:
    scorer, h = random_scorer(), unit(40)
    forwards = score_frames_without_text(scorer, h)
    np.testing.assert_allclose(score_frames_without_text(scorer, h[::-1].copy()), forwards[::-1], atol=1e-5)
    assert np.ptp(forwards) > 0.1


def test_the_order_of_frames_changes_only_what_is_known_of_neighbours() -> None:
    h = torch.from_numpy(unit(50))
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    mean, statistics = video_context(h)
    shuffled_mean, shuffled = video_context(h[order])
    np.testing.assert_allclose(shuffled_mean, mean, atol=1e-6)
    np.testing.assert_allclose(shuffled[:, :2], statistics[order][:, :2], atol=1e-6)
    assert (shuffled[:, 2:] - statistics[order][:, 2:]).abs().max() > 0.1


def test_neither_padding_nor_other_videos_take_part_in_a_score() -> None:
    scorer, lengths = random_scorer(), (5, 1, 12, 8)
    videos = [unit(n, seed=n) for n in lengths]
    batch, mask = torch.full((4, 12, DIM), torch.nan), torch.zeros(4, 12, dtype=torch.bool)
    for row, video in enumerate(videos):
        at = torch.arange(12 - len(video), 12) if row == 3 else torch.arange(len(video))
        batch[row, at] = torch.from_numpy(video)
        mask[row, at] = True
    with torch.inference_mode():
        scores = scorer(batch, mask)
    for row, video in enumerate(videos):
        np.testing.assert_allclose(scores[row, mask[row]], score_frames_without_text(scorer, video), atol=1e-6)
    assert (scores[~mask] == 0).all()
    with torch.inference_mode():
        assert scorer(batch, torch.zeros_like(mask)).abs().max() == 0


def test_the_same_video_scores_the_same_to_the_bit() -> None:
    scorer, h = random_scorer(), unit(700)
    np.testing.assert_array_equal(score_frames_without_text(scorer, h), score_frames_without_text(scorer, h.copy()))
    read_only = h.copy()
    read_only.flags.writeable = False
    np.testing.assert_array_equal(score_frames_without_text(scorer, h), score_frames_without_text(scorer, read_only))


def test_features_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="features has shape"):
        score_frames_without_text(random_scorer(), unit(3, dim=DIM + 1))


def test_inputs_are_as_wide_as_the_network_expects() -> None:
    h = torch.from_numpy(unit(4))
    mean, statistics = video_context(h)
    assert frame_inputs(h, mean.expand(4, -1), statistics).shape == (4, len(FrameScorer(DIM).centre))


# ------------------------------------------------------------------------------------------------------------ file


def test_a_file_gives_back_the_scorer_and_the_facts(tmp_path: Path) -> None:
    scorer, path = random_scorer(), tmp_path / "scorer.safetensors"
    save_scorer(path, scorer, FACTS)
    assert read_facts(path) == FACTS
    h = unit(30)
    np.testing.assert_array_equal(score_frames_without_text(load_scorer(path), h), score_frames_without_text(scorer, h))


def test_the_same_scorer_is_written_with_the_same_bytes_every_time(tmp_path: Path) -> None:
    """Several keys of metadata would come in an order that is drawn for each file."""
    written = set()
    for _ in range(5):
        save_scorer(tmp_path / "scorer.safetensors", random_scorer(), FACTS)
        written.add((tmp_path / "scorer.safetensors").read_bytes())
    assert len(written) == 1


def test_the_facts_are_read_without_torch(tmp_path: Path) -> None:
    save_scorer(tmp_path / "scorer.safetensors", random_scorer(), FACTS)
    code = "import sys; from pathlib import Path; from models.scorer_file import read_facts; "
    code += f"read_facts(Path({str(tmp_path / 'scorer.safetensors')!r})); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def damaged(tmp_path: Path, how: str) -> Path:
    path = tmp_path / "scorer.safetensors"
    save_scorer(path, random_scorer(), FACTS)
    tensors = load_file(path)
    with safe_open(path, framework="numpy") as file:
        content = json.loads(file.metadata()["fineco"])
    if how == "absent":
        path.unlink()
    elif how == "folder":
        path.unlink()
        path.mkdir()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "no safetensors":
        path.write_bytes(b"not a scorer at all, but long enough to be one")
    elif how == "no metadata":
        save_file(tensors, path)
    else:
        changes = {
            "another kind": {"kind": "head"},
            "a later format": {"version": 2},
            "huge": {"hidden": 1 << 40},
            "other sizes": {"hidden": 9},
            "another fact": {"colour": "red"},
        }
        save_file(tensors, path, metadata={"fineco": json.dumps(content | changes[how])})
    return path


DAMAGES = (
    "absent, folder, cut, no safetensors, no metadata, another kind, a later format, huge, other sizes, another fact"
)


@pytest.mark.parametrize("how", DAMAGES.split(", "))
def test_what_is_no_scorer_is_refused_in_one_line_with_its_name(how: str, tmp_path: Path) -> None:
    path = damaged(tmp_path, how)
    with pytest.raises(UsageError, match=r"^scorer: .*scorer\.safetensors: ") as refused:
        load_scorer(path)
    assert "\n" not in refused.value.message
    assert refused.value.message.count("scorer.safetensors") == 1
    assert "train-scorer" in refused.value.hint
    if how == "a later format":
        assert "format 2" in refused.value.message


def test_another_encoders_features_are_refused_with_both_names() -> None:
    FACTS.check_encoder(Path("s"), "whatever its name", FACTS.fingerprint)
    with pytest.raises(UsageError) as refused:
        FACTS.check_encoder(Path("s"), "open_clip:ViT-B-32", "f" * 32)
    for word in ("fake", "0123456789ab", "open_clip:ViT-B-32", "f" * 12):
        assert word in refused.value.message
    assert "train-scorer" in refused.value.hint


def test_a_model_brings_its_own_scorer(tmp_path: Path) -> None:
    head = tmp_path / "models" / "head"
    head.mkdir(parents=True)
    model = f"fineco:{head}"
    assert default_scorer(model) is None
    (head.parent / "scorer.safetensors").touch()
    assert default_scorer(model) == head.parent / "scorer.safetensors"
    (head / "scorer.safetensors").touch()
    assert default_scorer(model) == head / "scorer.safetensors"
    assert default_scorer("builtin") == BUILTIN
    assert default_scorer("open_clip:PE-Core-B-16") is None


def test_the_shipped_scorer_belongs_to_the_shipped_encoder() -> None:
    facts, spec = read_facts(BUILTIN), load_builtin().spec
    facts.check_encoder(BUILTIN, spec.name, spec.fingerprint)
    assert load_scorer(BUILTIN).dim == spec.dim
    assert BUILTIN.stat().st_size < 300_000
    assert facts.distilled_from["held_out"]["kept_by_scorer"] > facts.distilled_from["held_out"]["kept_by_uniform"]
