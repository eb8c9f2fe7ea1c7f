"""The objective against the formulas of docs/METHOD.md, written out in loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.errors import UsageError
from pipeline.training.batches import Batch, collate
from pipeline.training.objective import Objective, follow, moving_average
from pipeline.training.options import ObjectiveOptions, TrainOptions
from small_trainings import shake, small_examples, small_head


@pytest.fixture(scope="module")
def batch() -> Batch:
    examples = small_examples(5, tokens=(4, 40))
    return collate(examples, np.arange(5), examples.spans)


def slow(head: Any, batch: Batch, direction: str, ratio: float, form: str, scale: float, frame_scale: float) -> Any:
    """Pair and frame loss in float64, term by term; a frame's score is <h_i, z_t> times `frame_scale`."""
    with torch.no_grad():
        states, text = head.encode_video(batch.features, batch.mask), head.encode_text(*batch.texts)
    h, v, z = (t.double().numpy() for t in (states.tokens, states.pooled, text))
    n = len(z)
    logits = scale * z @ v.T  # per text
    by_text = -sum(logits[i, i] - math.log(sum(math.exp(x) for x in logits[i])) for i in range(n)) / n
    by_video = -sum(logits[i, i] - math.log(sum(math.exp(x) for x in logits[:, i])) for i in range(n)) / n
    pair = {"both": by_text + by_video, "text_to_video": by_text, "video_to_text": by_video}[direction]
    frame = 0.0
    for i in range(n):
        s = [frame_scale * float(h[i, t] @ z[i]) for t in range(h.shape[1]) if batch.mask[i, t]]
        best = sorted(s, reverse=True)
        k = max(1, math.ceil(ratio * len(s)))
        positives, negatives = best[:k], sum(math.exp(x) for x in best[k:])
        if k == len(s):
            continue
        if form == "each":
            frame -= sum(math.log(math.exp(p) / (math.exp(p) + negatives)) for p in positives) / k / n
        else:
            good = sum(math.exp(p) for p in positives)
            frame -= math.log(good / (good + negatives)) / n
    return pair, frame


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("form", ["each", "set"])
@pytest.mark.parametrize("temperature", [None, 0.2])
@pytest.mark.parametrize("direction", ["both", "text_to_video"])
def test_the_loss_is_the_pair_loss_plus_the_weighted_frame_loss(
    batch: Batch, similarity: str, form: Any, temperature: float | None, direction: Any
) -> None:
    head = shake(small_head(similarity=similarity, residual=similarity == "cosine"))
    options = ObjectiveOptions(direction, 0.3, 0.25, form, temperature, weight_warmup=0.5)
    losses = Objective(options)(head, batch, progress=0.1)
    scale = float(head.logit_scale().detach())
    frame_scale = scale if temperature is None else 1 / temperature
    pair, frame = slow(head, batch, direction, 0.25, form, scale, frame_scale)
    assert losses.pair.item() == pytest.approx(pair, rel=1e-4)
    assert losses.frame.item() == pytest.approx(frame, rel=1e-4)
    assert losses.total.item() == pytest.approx(pair + 0.3 * 0.2 * frame, rel=1e-4)  # a fifth of the warm-up


def test_the_frame_loss_moves_both_towers_and_not_the_scale(batch: Batch) -> None:
    head = shake(small_head())
    Objective(ObjectiveOptions())(head, batch).frame.backward()  # type: ignore[no-untyped-call]
    moved = {name for name, p in head.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {"video_out.weight", "text_out.weight"} <= moved and "log_scale" not in moved


def test_the_weight_grows_over_its_warm_up_and_zero_leaves_the_pair_loss_alone(batch: Batch) -> None:
    objective = Objective(ObjectiveOptions(frame_weight=0.5, weight_warmup=0.2))
    assert [objective.weight(p) for p in (0.0, 0.1, 0.2, 1.0)] == [0.0, 0.25, 0.5, 0.5]
    assert Objective(ObjectiveOptions(frame_weight=0.5, weight_warmup=0.0)).weight(0.0) == 0.5
    losses = Objective(ObjectiveOptions(frame_weight=0.0))(shake(small_head()), batch)
    assert losses.total is losses.pair and losses.frame.item() > 0


def test_a_moving_average_chooses_the_positives_and_nothing_else(batch: Batch) -> None:
    head, other = shake(small_head()), shake(small_head(), seed=9)
    options = ObjectiveOptions(frame_weight=1.0, weight_warmup=0.0)
    own = Objective(options)(head, batch)
    same = Objective(options, moving_average(head))(head, batch)
    chosen = Objective(options, moving_average(other))(head, batch)
    assert same.frame.item() == own.frame.item()
    assert chosen.pair.item() == own.pair.item() and chosen.frame.item() > own.frame.item()


def test_the_moving_average_is_one() -> None:
    model, average = small_head(), moving_average(small_head())
    start, end = average.video_out.bias.clone(), shake(model).video_out.bias.detach()
    for _ in range(3):
        follow(average, model, 0.9)
    expected = 0.9**3 * start + (1 - 0.9**3) * end
    torch.testing.assert_close(average.video_out.bias, expected)
    assert not any(p.requires_grad for p in average.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.0}, "ratio 0: it must be above 0 and up to 1"),
        ({"frame_weight": float("nan")}, "frame weight nan"),
        ({"frame_ema": 1.0}, "frame EMA 1"),
        ({"form": "some"}, "form 'some': choose one of each, set"),
        ({"frame_temperature": -1.0}, "frame temperature -1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ObjectiveOptions(**options)


def test_training_options_out_of_range_are_refused() -> None:
    for options in ({"batch_size": 1}, {"lr": 0.0}, {"epochs": 0}, {"max_tokens": 2}, {"clips": "all"}):
        with pytest.raises(UsageError):
            TrainOptions(**options)
