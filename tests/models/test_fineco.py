"""The head: an untrained one is its base, pooling is what the pipeline does, long videos are consecutive clips."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from models.fineco import FineCoHead, HeadConfig
from small_trainings import DIM, random_rows, shake, small_head


def video(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(random_rows(n, seed))[None], torch.ones(1, n, dtype=torch.bool)


@torch.no_grad()
def test_an_untrained_residual_head_is_its_base() -> None:
    head = small_head().eval()
    features, mask = video(70)
    states = head.encode_video(features, mask)
    torch.testing.assert_close(states.tokens, features, atol=1e-6, rtol=0)
    torch.testing.assert_close(states.pooled, F.normalize(features.mean(1), dim=-1), atol=1e-6, rtol=0)
    text = torch.from_numpy(random_rows(5))
    torch.testing.assert_close(head.encode_text(text), text, atol=1e-6, rtol=0)
    assert float(head.logit_scale()) == pytest.approx(10.0)  # 1 / the base's temperature


@torch.no_grad()
def test_a_head_without_residual_starts_somewhere_else_in_a_space_of_its_own() -> None:
    head = small_head(residual=False, dim=24, input_dim=DIM, text_dim=7).eval()
    states = head.encode_video(*video(5))
    assert states.tokens.shape == (1, 5, 24) and states.pooled.shape == (1, 24)
    assert head.encode_text(torch.from_numpy(random_rows(3, dim=7))).shape == (3, 24)
    torch.testing.assert_close(states.tokens.norm(dim=-1), torch.ones(1, 5))


@torch.no_grad()
@pytest.mark.parametrize("residual", [True, False])
def test_pooled_is_the_unit_mean_of_unit_tokens(residual: bool) -> None:
    head = shake(small_head(residual=residual))
    features = torch.from_numpy(np.stack([random_rows(40, n) for n in range(3)]))
    mask = torch.arange(40) < torch.tensor([[40], [33], [1]])
    states = head.encode_video(features, mask)
    for tokens, valid, pooled in zip(states.tokens, mask, states.pooled, strict=True):
        torch.testing.assert_close(tokens[valid].norm(dim=-1), torch.ones(int(valid.sum())))
        torch.testing.assert_close(pooled, F.normalize(tokens[valid].mean(0), dim=0))
        assert not tokens[~valid].any()


@torch.no_grad()
def test_a_dot_head_pools_without_normalising_and_has_no_scale() -> None:
    head = shake(small_head(similarity="dot", residual=False))
    states = head.encode_video(*video(9))
    torch.testing.assert_close(states.pooled, states.tokens.mean(1))
    assert not torch.allclose(states.tokens.norm(dim=-1), torch.ones(1, 9), atol=0.01)
    assert float(head.logit_scale()) == 1.0 and head.log_scale is None
    # METHOD: the pair's score is the mean of its tokens' scores
    text = head.encode_text(torch.from_numpy(random_rows(1)))
    torch.testing.assert_close((states.pooled * text).sum(-1), (states.tokens @ text[0]).mean(1))


@torch.no_grad()
def test_a_video_does_not_depend_on_the_batch_or_on_padding() -> None:
    head = shake(small_head())
    features = torch.from_numpy(np.stack([random_rows(80, n) for n in range(3)]))
    mask = torch.arange(80) < torch.tensor([[80], [10], [40]])
    together = head.encode_video(features.where(mask.unsqueeze(-1), torch.nan).nan_to_num(7.0), mask)
    for number, n in enumerate((80, 10, 40)):
        alone = head.encode_video(features[number : number + 1, :n], mask[number : number + 1, :n])
        torch.testing.assert_close(together.tokens[number, :n], alone.tokens[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(together.pooled[number], alone.pooled[0], atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_token_sees_its_clip_and_no_other() -> None:
    head = shake(small_head(max_tokens=8))
    features, mask = video(20)
    before = head.encode_video(features, mask).tokens[0]
    features[0, 9] = torch.from_numpy(random_rows(1, 99))[0]  # in the second clip
    changed = (head.encode_video(features, mask).tokens[0] - before).norm(dim=-1) > 1e-6
    assert changed.tolist() == [False] * 8 + [True] * 8 + [False] * 4


def test_the_scale_stays_at_or_below_a_hundred_and_can_come_back() -> None:
    head = small_head(temperature=0.0101).train()
    assert head.log_scale is not None
    head.log_scale.data.fill_(9.0)
    head.logit_scale().backward()  # type: ignore[no-untyped-call]
    assert float(head.log_scale.detach()) == pytest.approx(math.log(100))
    assert head.log_scale.grad is not None and float(head.log_scale.grad) == pytest.approx(100, rel=1e-4)
    assert float(small_head(temperature=0.005).train().logit_scale().detach()) == pytest.approx(200)  # the base's own


def test_autocast_leaves_the_base_in_float32() -> None:
    head = small_head().eval()
    features, mask = video(12)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        states = head.encode_video(features, mask)
    assert states.tokens.dtype == torch.float32
    torch.testing.assert_close(states.tokens, features, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 8}, "a residual head keeps the space of its base"),
        ({"heads": 3}, "no multiple of 3 heads"),
        ({"layers": 0}, "a size below 1"),
        ({"similarity": "euclid"}, "'cosine' or 'dot'"),
        ({"temperature": 0.0}, "temperature 0.0 above 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    sizes: dict[str, Any] = {"input_dim": DIM, "text_dim": DIM, "dim": DIM, **changes}
    with pytest.raises(ValueError, match=message):
        FineCoHead(HeadConfig(**sizes))
