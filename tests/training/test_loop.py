"""The loop in memory: it learns, it keeps the best, it stops early, and it is a function of its seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from models.fineco import FineCoHead
from pipeline.errors import FinecoError, UsageError
from pipeline.training import neighbours
from pipeline.training.examples import Examples, Split
from pipeline.training.loop import learning_rate_factor, train
from pipeline.training.neighbours import video_means
from pipeline.training.options import ObjectiveOptions, TrainOptions
from pipeline.training.validation import pair_scores, retrieval, validate
from small_trainings import random_rows, shake, small_examples, small_head, unit

EVERY = np.arange(10)
FAST = TrainOptions(epochs=40, batch_size=10, lr=1e-2)


def changed(options: TrainOptions = FAST, **changes: Any) -> TrainOptions:
    names = TrainOptions.__dataclass_fields__
    return TrainOptions(**{**{name: getattr(options, name) for name in names}, **changes})


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("residual", [True, False])
def test_ten_random_clips_are_learnt_by_heart(hard: bool, residual: bool) -> None:
    examples, head = small_examples(), small_head(residual=residual)
    before = validate(head.eval(), examples, EVERY, 256)
    trained = train(head, examples, changed(hard_negatives=hard, batch_size=5 if hard else 10))
    assert trained is not None and trained.metrics == {}
    assert before["R@1"] < 50
    assert validate(head, examples, EVERY, 256)["R@1"] == 100


@pytest.mark.parametrize("form", ["each", "set"])
def test_the_frame_loss_finds_the_frames_that_a_text_speaks_of(form: Any) -> None:
    """Eighteen frames of twenty are title cards, which the base takes to be like every text."""
    rng, card = np.random.default_rng(0), random_rows(1, 77)
    said = random_rows(32, 5)
    features, shown = [], []
    for number in range(32):
        rows = unit(card + 0.7 * random_rows(20, 100 + number))
        places = rng.choice(20, 2, replace=False)
        rows[places] = unit(said[number] + 0.7 * random_rows(2, 200 + number))
        features.append(rows)
        shown.append(set(places.tolist()))
    texts = unit(said + card)

    @torch.no_grad()
    def found(head: FineCoHead) -> float:
        states = head.eval().encode_video(torch.from_numpy(np.stack(features)), torch.ones(32, 20, dtype=torch.bool))
        scores = torch.einsum("btd,bd->bt", states.tokens, head.encode_text(torch.from_numpy(texts)))
        best = [set(row.tolist()) for row in scores.topk(2).indices]
        return float(np.mean([len(a & b) / 2 for a, b in zip(best, shown, strict=True)]))

    shares = [found(small_head(width=32))]
    for weight in (0.0, 1.0):
        head, objective = small_head(width=32), ObjectiveOptions(ratio=0.1, form=form, frame_weight=weight)
        train(head, Examples.of_arrays(features, texts), changed(batch_size=32, objective=objective))
        shares.append(found(head))
    base, without, trained = shares
    assert base < 0.3 and trained > 0.7 and trained > without + 0.2, shares


def test_one_seed_gives_one_result_and_another_seed_another() -> None:
    def weights(seed: int, noise: int) -> list[float]:
        torch.manual_seed(noise)  # of no consequence: every step seeds anew
        head = small_head(dropout=0.3)
        torch.manual_seed(noise)
        train(head, small_examples(), changed(epochs=3, batch_size=4, seed=seed))
        return head.video_out.weight.detach().flatten().tolist()

    assert weights(0, 1) == weights(0, 2) != weights(1, 1)


def test_the_callers_random_numbers_are_left_alone() -> None:
    head, examples = small_head(), small_examples()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(head, examples, changed(epochs=1))
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)


def test_the_best_epoch_is_kept_and_patience_ends_the_training() -> None:
    examples, head = small_examples(20), small_head()
    which = Split(np.arange(10), np.arange(10, 20))  # random: training on some does not help the others
    trained = train(head, examples, changed(epochs=50, patience=3), which)
    assert trained is not None
    validations = [line for line in trained.history if "validation" in line]
    best = max(validations, key=lambda line: line["mean recall"])
    assert trained.best_epoch == best["epoch"] and trained.epochs == best["epoch"] + 3 < 50
    assert validations[0]["epoch"] == 0  # what there was to improve on
    assert validate(head, examples, which.validation, 256) == trained.metrics
    assert {name: best[name] for name in trained.metrics} == trained.metrics


def test_overlapped_clips_train_too() -> None:
    examples, head = small_examples(tokens=(30, 60)), small_head()
    trained = train(head, examples, changed(clips="overlapped", max_tokens=12, epochs=5))
    assert trained is not None and trained.steps == 5


def test_bf16_trains_and_losses_are_finite() -> None:
    head = small_head()
    train(head, small_examples(), changed(precision="bf16"))
    assert validate(head, small_examples(), EVERY, 256)["R@1"] == 100
    assert {p.dtype for p in head.parameters()} == {torch.float32}


def test_one_video_is_too_few() -> None:
    with pytest.raises(UsageError, match=r"1 video\(s\) with texts"):
        train(small_head(), small_examples(1), FAST)


def test_a_loss_that_is_not_finite_ends_the_training() -> None:
    head = small_head()
    with torch.no_grad():
        head.video_out.bias.fill_(torch.nan)
    with pytest.raises(FinecoError, match="the loss is not finite at step 1"):
        train(head, small_examples(), FAST)


def test_the_learning_rate_rises_and_falls_in_straight_lines() -> None:
    n = 10
    factors = [learning_rate_factor(step / n, (step + 1) / n, 0.2) for step in range(n)]
    np.testing.assert_allclose(factors, [0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])
    assert learning_rate_factor(0, 0.1, 0.0) == 1 and learning_rate_factor(0.5, 0.6, 1.0) == 0.6


# ------------------------------------------------------------------------------------------------------ validation


def test_a_tie_is_half_lost() -> None:
    n = 20
    constant = retrieval(np.zeros((n, n), np.float32), np.arange(n))
    assert constant["R@1"] == 0 and constant["median rank"] == 1 + (n - 1) / 2
    assert retrieval(np.eye(n, dtype=np.float32), np.arange(n)) == {
        "R@1": 100.0,
        "R@5": 100.0,
        "R@10": 100.0,
        "mean recall": 100.0,
        "median rank": 1.0,
    }


@torch.no_grad()
def test_several_texts_of_one_clip_share_its_place_in_the_gallery() -> None:
    features = [random_rows(8, n) for n in range(3)]
    spans = np.array([[0, 8], [0, 8], [2, 4], [0, 8]])
    examples = Examples.of_arrays(features, random_rows(4), np.array([0, 0, 0, 2]), spans)
    head = shake(small_head())
    scores, right = pair_scores(head, examples, np.array([3, 0, 1, 2]), 256)
    assert scores.shape == (4, 3) and right.tolist() == [2, 0, 0, 1]
    for row, text in enumerate((3, 0, 1, 2)):
        for clip, rows in enumerate((features[0], features[0][2:4], features[2])):
            pooled = head.encode_video(torch.from_numpy(rows)[None], torch.ones(1, len(rows), dtype=torch.bool)).pooled
            expected = head.encode_text(*examples.texts.inputs(np.array([text]))) @ pooled.T
            assert scores[row, clip] == pytest.approx(float(expected), abs=1e-5)


# ------------------------------------------------------------------------------------------------------ neighbours


def test_the_nearest_videos_are_those_of_the_greatest_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    examples, head, videos = small_examples(40), small_head().eval(), np.arange(5, 40)
    vectors = video_means(head, examples, videos, 256, "cpu")
    cosines = vectors @ vectors.T - 9 * np.eye(35)
    exact = neighbours._search(head, examples, videos, 256, "cpu")
    assert exact.shape == (40, 34) and np.all(exact[:5] == -1)
    np.testing.assert_array_equal(exact[5:, :10], videos[np.argsort(-cosines, axis=1)[:, :10]])
    monkeypatch.setattr(neighbours, "EXACT_VIDEOS", 0)
    by_faiss = neighbours._search(head, examples, videos, 256, "cpu")
    np.testing.assert_array_equal(by_faiss[:, :10], exact[:, :10])
