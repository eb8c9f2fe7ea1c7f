"""The losses against golden numbers, slow formulas in plain Python, and what must hold for any clip."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from models.losses import Direction, Form, Similarity, fineco_loss, fineco_positives, frame_scores, videoclip_loss
from pipeline.select import Keep, n_kept

GOLDEN = Path(__file__).parents[1] / "golden"
RATIOS = (0.125, 0.25, 0.5, 1.0)
TEMPERATURES = (1.0, 0.05)
FORMS: dict[Form, str] = {"each": "A", "set": "B"}
SCORES = ("basic", "holes", "large", "long", "offset")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype, offset: bool = False) -> None:
    """At the tolerances of the fixtures' README, section 5."""
    gap = (actual.double() - expected).abs()
    if dtype == torch.float64:
        assert gap.max() <= 1e-9
    else:
        assert (gap <= (5e-3 if offset else 1e-4) + 1e-4 * expected.abs()).all(), gap.max()


def per_clip(losses: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    # clips share nothing, so the gradient of the sum holds each clip's own
    return torch.autograd.grad(losses.sum(), inputs)


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_golden_fineco_loss_and_gradient(name: str, dtype: torch.dtype) -> None:
    fixture = load_file(GOLDEN / "fineco_loss" / f"scores_{name}.safetensors")
    mask = fixture["mask"]
    for ratio in RATIOS:
        positives = fineco_positives(fixture["scores"].to(dtype), mask, ratio)
        assert torch.equal(positives, fixture[f"rho{ratio}.positives"])
        for form, letter in FORMS.items():
            for temperature in TEMPERATURES:
                scores = fixture["scores"].to(dtype).requires_grad_()
                losses = fineco_loss(scores, mask, ratio, form, temperature)
                (gradient,) = per_clip(losses, scores)
                key = f"form{letter}.rho{ratio}.tau{temperature}"
                offset = name == "offset" and temperature == 0.05
                assert losses.dtype == gradient.dtype == dtype
                assert_near(losses, fixture[f"{key}.loss"], dtype, offset)
                assert_near(gradient, fixture[f"{key}.grad_scores"], dtype, offset)
                assert (gradient[~mask] == 0).all()
                if ratio == 1.0:
                    assert (losses == 0).all() and (gradient == 0).all()


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_golden_fineco_loss_from_tokens_and_text(similarity: Similarity, dtype: torch.dtype) -> None:
    fixture = load_file(GOLDEN / "fineco_loss" / "end_to_end.safetensors")
    for ratio in RATIOS:
        for form, letter in FORMS.items():
            for temperature in TEMPERATURES:
                tokens = fixture["h"].to(dtype).requires_grad_()
                text = fixture["z_text"].to(dtype).requires_grad_()
                scores = frame_scores(tokens, text, similarity)
                assert_near(scores, fixture[f"{similarity}.scores"], dtype)
                losses = fineco_loss(scores, fixture["mask"], ratio, form, temperature)
                gradients = per_clip(losses, tokens, text)
                key = f"{similarity}.form{letter}.rho{ratio}.tau{temperature}"
                assert_near(losses, fixture[f"{key}.loss"], dtype)
                assert_near(gradients[0], fixture[f"{key}.grad_h"], dtype)
                assert_near(gradients[1], fixture[f"{key}.grad_z_text"], dtype)


def check_videoclip(fixture: dict[str, Tensor], prefix: str, direction: Direction) -> None:
    for dtype, suffix, relative, floor in ((torch.float64, "_f64", 1e-10, 1e-300), (torch.float32, "", 1e-4, 1e-6)):
        video = fixture["pooled_video"].to(dtype).requires_grad_()
        text = fixture["pooled_text"].to(dtype).requires_grad_()
        loss = videoclip_loss(video, text, direction)
        gradients = torch.autograd.grad(loss, (video, text))
        for actual, name in ((loss[None], "loss"), (gradients[0], "grad_video"), (gradients[1], "grad_text")):
            expected = fixture[f"{prefix}_{name}{suffix}"]
            assert (actual - expected).abs().max() <= max(relative * float(expected.abs().max()), floor), name


DIRECTIONS: list[tuple[str, Direction]] = [("mm", "both"), ("t2v", "text_to_video"), ("v2t", "video_to_text")]


@pytest.mark.parametrize(("prefix", "direction"), DIRECTIONS)
@pytest.mark.parametrize("case", ["b1", "b4", "b5_large"])
def test_golden_videoclip_loss_and_gradients(case: str, prefix: str, direction: Direction) -> None:
    check_videoclip(load_file(GOLDEN / "videoclip_losses" / f"{case}.safetensors"), prefix, direction)


@pytest.mark.parametrize(("prefix", "direction"), DIRECTIONS)
def test_golden_videoclip_loss_at_full_width(shared: Path, prefix: str, direction: Direction) -> None:
    check_videoclip(load_file(shared / "golden" / "videoclip_losses" / "b7_d768.safetensors"), prefix, direction)


# Slow formulas, straight from docs/METHOD.md, with Python's numbers.


def slow_fineco_loss(scores: list[float], ratio: float, form: str, temperature: float) -> float:
    e = [math.exp(score / temperature) for score in scores]
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    k = max(1, math.ceil(ratio * len(scores) - 1e-9))
    p, n = [e[i] for i in order[:k]], [e[i] for i in order[k:]]
    if not n:
        return 0.0
    if form == "each":
        return -sum(math.log(one / (one + sum(n))) for one in p) / k
    return -math.log(sum(p) / (sum(p) + sum(n)))


clips = st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=12)
forms = st.sampled_from(list(FORMS))
ratios = st.sampled_from([0.1, 0.125, 0.25, 0.3, 0.5, 1.0])


@given(clips, ratios, forms, st.sampled_from([0.2, 1.0, 3.0]))
@settings(max_examples=100, deadline=None)
def test_fineco_loss_is_the_slow_formula(clip: list[float], ratio: float, form: Form, temperature: float) -> None:
    scores = torch.tensor([clip], dtype=torch.float64)
    loss = fineco_loss(scores, torch.ones_like(scores, dtype=torch.bool), ratio, form, temperature)
    assert float(loss) == pytest.approx(slow_fineco_loss(clip, ratio, form, temperature), rel=1e-9, abs=1e-9)


@given(clips, ratios, forms, st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_order_and_padding_do_not_matter(clip: list[float], ratio: float, form: Form, pad: int) -> None:
    scores = torch.tensor([clip], dtype=torch.float64)
    order = torch.randperm(len(clip), generator=torch.Generator().manual_seed(len(clip)))
    padded = torch.cat([scores[:, order], torch.full((1, pad), math.inf, dtype=torch.float64)], dim=1)
    padded[:, -1] = math.nan
    mask = torch.arange(len(clip) + pad)[None] < len(clip)
    plain = scores.clone().requires_grad_()
    other = padded.clone().requires_grad_()
    loss = fineco_loss(plain, torch.ones(1, len(clip), dtype=torch.bool), ratio, form)
    moved = fineco_loss(other, mask, ratio, form)
    torch.testing.assert_close(moved, loss, rtol=1e-12, atol=1e-12)
    (gradient,), (moved_gradient,) = per_clip(loss, plain), per_clip(moved, other)
    assert (moved_gradient[~mask] == 0).all()
    if len(set(clip)) == len(clip):  # among equal scores the earlier one is the positive
        torch.testing.assert_close(moved_gradient[:, : len(clip)], gradient[:, order], rtol=1e-12, atol=1e-12)


@given(st.integers(1, 400), st.floats(0.01, 1.0))
@settings(max_examples=200, deadline=None)
def test_as_many_positives_as_the_selector_keeps_frames(n: int, ratio: float) -> None:
    positives = fineco_positives(torch.zeros(1, n), torch.ones(1, n, dtype=torch.bool), ratio)
    assert int(positives.sum()) == n_kept(Keep(ratio=ratio), n)


def test_seven_hundredths_of_a_hundred_are_seven() -> None:
    assert 0.07 * 100 > 7
    assert int(fineco_positives(torch.randn(1, 100), torch.ones(1, 100, dtype=torch.bool), 0.07).sum()) == 7


def test_of_equal_scores_the_earlier_token_is_the_positive() -> None:
    scores = torch.tensor([[0.0, 1.0, 0.5] + [0.5] * 37])
    mask = torch.ones_like(scores, dtype=torch.bool)
    mask[0, 2] = False
    assert fineco_positives(scores, mask, 0.1).nonzero()[:, 1].tolist() == [1, 3, 4, 5]


@pytest.mark.parametrize("form", FORMS)
def test_a_step_raises_the_kept_scores_and_lowers_the_others(form: Form) -> None:
    scores = torch.randn(8, 20, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mask = torch.rand(8, 20, generator=torch.Generator().manual_seed(1)) < 0.8
    positives = fineco_positives(scores, mask, 0.25)
    (gradient,) = per_clip(fineco_loss(scores, mask, 0.25, form), scores)
    assert (gradient[positives] < 0).all()
    assert (gradient[mask & ~positives] > 0).all()
    torch.testing.assert_close(gradient.sum(1), torch.zeros(8), rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_clips_without_negatives_or_without_tokens_give_nothing(form: Form, dtype: torch.dtype) -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0], [9.0, 9.0, 9.0]], dtype=dtype).requires_grad_()
    mask = torch.tensor([[True, False, False], [False, False, False], [True, True, True]])
    (gradient,) = per_clip(losses := fineco_loss(scores, mask, 0.25, form), scores)
    assert losses[:2].tolist() == [0, 0] and losses[2] > 0
    assert (gradient[:2] == 0).all() and gradient.isfinite().all()
    (gradient,) = per_clip(losses := fineco_loss(scores, mask, 1.0, form), scores)
    assert (losses == 0).all() and (gradient == 0).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [1e3, 1e6, 1e30])
def test_large_scores_do_not_overflow(form: Form, scale: float) -> None:
    scores = (torch.randn(4, 16, generator=torch.Generator().manual_seed(0)) * scale).requires_grad_()
    mask = torch.ones(4, 16, dtype=torch.bool)
    upside_down = fineco_positives(-scores, mask, 0.25)  # the worst choice: the loss is as large as the scores
    for positives in (None, upside_down):
        losses = fineco_loss(scores, mask, 0.25, form, 0.05, positives)
        (gradient,) = per_clip(losses, scores)
        assert losses.isfinite().all() and gradient.isfinite().all()
    assert (losses > scale).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_scores_are_computed_in_float32(form: Form, dtype: torch.dtype) -> None:
    rounded = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = torch.ones(4, 16, dtype=torch.bool)
    half, single = rounded.clone().requires_grad_(), rounded.float().requires_grad_()
    losses, expected = (fineco_loss(s, mask, 0.25, form, 0.05) for s in (half, single))
    assert losses.dtype == torch.float32 and torch.equal(losses, expected)
    assert torch.equal(per_clip(losses, half)[0], per_clip(expected, single)[0].to(dtype))
    tokens, text = torch.randn(2, 3, 8).to(dtype), torch.randn(2, 8).to(dtype)
    assert torch.equal(frame_scores(tokens, text), frame_scores(tokens.float(), text.float()))
    assert torch.equal(videoclip_loss(text, text), videoclip_loss(text.float(), text.float()))


def test_autocast_changes_nothing() -> None:
    tokens, text = 3 * torch.randn(2, 5, 64), 3 * torch.randn(2, 64)
    expected = frame_scores(tokens, text), videoclip_loss(tokens[:, 0], text)
    with torch.autocast("cpu", torch.bfloat16):
        actual = frame_scores(tokens, text), videoclip_loss(tokens[:, 0], text)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("form", FORMS)
def test_positives_chosen_elsewhere_are_the_ones_contrasted(form: Form) -> None:
    scores = torch.tensor([[2.0, 1.0, 0.0, 5.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True, False]])
    chosen = torch.tensor([[False, True, False, True]])  # the masked one does not count
    expected = -math.log(math.exp(1) / (math.exp(2) + math.exp(1) + math.exp(0)))
    assert float(fineco_loss(scores, mask, 0.25, form, positives=chosen)) == pytest.approx(expected, rel=1e-12)


def test_the_two_forms_agree_on_one_positive() -> None:
    scores, mask = torch.randn(5, 8, dtype=torch.float64), torch.ones(5, 8, dtype=torch.bool)
    torch.testing.assert_close(fineco_loss(scores, mask, 0.1, "each"), fineco_loss(scores, mask, 0.1, "set"))


@pytest.mark.parametrize("n", [2, 7])
def test_equal_scores_give_the_closed_forms(n: int) -> None:
    scores, mask = torch.full((1, 2 * n), 100.0), torch.ones(1, 2 * n, dtype=torch.bool)
    assert float(fineco_loss(scores, mask, 0.5, "each", 0.05)) == pytest.approx(math.log(n + 1), rel=1e-6)
    assert float(fineco_loss(scores, mask, 0.5, "set", 0.05)) == pytest.approx(math.log(2), rel=1e-6)


def test_videoclip_loss_is_the_slow_formula() -> None:
    video, text = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    e = [[math.exp(float(t @ v)) for v in video] for t in text]
    to_video = sum(-math.log(e[i][i] / sum(e[i])) for i in range(4)) / 4
    to_text = sum(-math.log(e[i][i] / sum(row[i] for row in e)) for i in range(4)) / 4
    assert float(videoclip_loss(video, text, "text_to_video")) == pytest.approx(to_video, rel=1e-12)
    assert float(videoclip_loss(video, text, "video_to_text")) == pytest.approx(to_text, rel=1e-12)
    assert float(videoclip_loss(video, text)) == pytest.approx(to_video + to_text, rel=1e-12)


def test_wrong_arguments_are_named() -> None:
    scores, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="ratio 0"):
        fineco_positives(scores, mask, 0)
    with pytest.raises(ValueError, match="temperature -1"):
        fineco_loss(scores, mask, temperature=-1)
    with pytest.raises(ValueError, match="form 'both'"):
        fineco_loss(scores, mask, form="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\(2, 3\) and .*\(2, 2\)"):
        fineco_loss(scores, mask[:, :2])
    with pytest.raises(ValueError, match="float32"):
        fineco_loss(scores, mask.float())
    with pytest.raises(ValueError, match="similarity 'l2'"):
        frame_scores(scores[:, None], scores, "l2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="direction 'v2t'"):
        videoclip_loss(scores, scores, "v2t")  # type: ignore[arg-type]
