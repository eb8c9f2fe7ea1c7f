"""Open-ended questions (docs/METHOD.md section 5): one answer out of a list, 1,500 for MSRVTT-QA.

Two ways. Without training, "question answer" is a text like any other, and the answer whose text is most like the video
wins: that is as many texts as questions times answers. Or a linear classifier over the video's mean, the question's
vector and their product, trained on another part of the dataset.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.annotations import Annotations, Question
from pipeline.embed import encode_texts
from pipeline.errors import UsageError
from pipeline.evaluate import accuracy_metrics, mean_metrics
from pipeline.evaluation.clips import Clips
from pipeline.evaluation.matching import Matched
from pipeline.evaluation.material import Material, intervals_of, result_of, split_of
from pipeline.evaluation.scoring import clip_scores, own_scores
from pipeline.progress import duration
from pipeline.types import Float32

N_ANSWERS = 1500
NOTE_SECONDS = 30.0
EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 20, 256, 3e-3, 1e-2

Say = Callable[[str], None]


def most_frequent_answers(annotations: Annotations[Question]) -> tuple[str, ...]:
    """The `N_ANSWERS` most frequent answers; of equal ones those that come first in the alphabet."""
    counts = Counter(row.answer for row in annotations.rows)
    return tuple(sorted(counts, key=lambda answer: (-counts[answer], answer))[:N_ANSWERS])


def evaluate_by_similarity(
    annotations: Annotations[Question],
    answers: Sequence[str],
    material: Material,
    limit: int | None = None,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Share of the questions whose right answer makes the text most like the video, as the content of a report.

    Args:
        limit: So many of the questions, drawn with the seed.

    Raises:
        UsageError: No annotated video is there, or one is ambiguous.
    """
    matched, asked = _asked(annotations, material, limit)
    rows = material.read({video.video_id: video for video in matched.found.values()}.values())
    by_question: dict[str, list[int]] = {}
    for number, row in enumerate(asked):
        by_question.setdefault(row.question, []).append(number)
    say(
        f"{len(asked)} questions ({len(by_question)} different) x {len(answers)} answers: "
        f"{len(by_question) * len(answers):,} texts to encode"
    )
    scores: list[Float32] = [np.empty(0, np.float32)] * len(asked)
    started = last = time.monotonic()
    for done, (question, numbers) in enumerate(by_question.items(), 1):
        texts = [f"{question} {answer}" for answer in answers]
        clips = [rows[matched.found[asked[number].video].video_id].features for number in numbers]
        if material.model is not None:
            found = own_scores(material, [texts] * len(clips), clips)
        else:
            vectors = encode_texts(material.encoder, texts)
            found = [clip_scores(material, vectors, clip) for clip in clips]
        for number, score in zip(numbers, found, strict=True):
            scores[number] = score
        now = time.monotonic()
        if done < len(by_question) and (done == 1 or now - last >= NOTE_SECONDS):
            last = now
            left = (now - started) / done * (len(by_question) - done)
            say(f"  {done} of {len(by_question)} questions, about {duration(left)} left")
    options = material.options
    place = {answer: i for i, answer in enumerate(answers)}
    right = [place.get(row.answer, -1) for row in asked]
    metrics = accuracy_metrics(scores, right, options.draws, options.seed)
    content = _content(annotations, matched, asked, right, len(answers), material)
    return content | {"results": [result_of("similarity of 'question answer'", metrics)]}


def evaluate_classifier(
    annotations: Annotations[Question],
    train: Annotations[Question],
    answers: Sequence[str],
    material: Material,
    limit: int | None = None,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Share of the questions a classifier answers rightly that was trained on `train`, as the content of a report.

    Beside it what always giving the most frequent answer of the training part would reach.

    Raises:
        UsageError: A part has no video in the collection, the two share a video, or nothing is left to train on.
    """
    place = {answer: i for i, answer in enumerate(answers)}
    matched, asked = _asked(annotations, material, limit)
    known, examples = _asked(train, material, None)
    evaluated = {video.video_id for video in matched.found.values()}
    shared = {video.video_id for video in known.found.values()} & evaluated
    if shared:
        raise UsageError(
            f"{len(shared)} videos are both in the training file and in the evaluated one",
            "Train on the dataset's training part: a classifier must not have seen the videos it is asked about.",
        )
    usable = [row for row in examples if row.answer in place]
    if not usable:
        raise UsageError("no training question has an answer of the list")
    videos = {video.video_id: video for found in (matched, known) for video in found.found.values()}
    rows = material.read(videos.values())
    row_of = {video_id: i for i, video_id in enumerate(rows)}
    means = Clips([video.features for video in rows.values()]).means()
    say(f"Training on {len(usable)} questions about {len({row.video for row in usable})} videos")

    def inputs(questions: Sequence[Question], found: Matched) -> tuple[NDArray[np.intp], Float32]:
        at = np.array([row_of[found.found[row.video].video_id] for row in questions], np.intp)
        return at, material.encode([row.question for row in questions])

    targets = np.array([place[row.answer] for row in usable])
    options = material.options
    scores = classify(means, inputs(usable, known), targets, inputs(asked, matched), len(answers), options.seed)
    right = [place.get(row.answer, -1) for row in asked]
    metrics = accuracy_metrics(scores, right, options.draws, options.seed)
    usual = int(np.bincount(targets).argmax())
    guess = mean_metrics({"accuracy": (np.array(right) == usual).astype(np.float64)}, options.draws, options.seed)
    content = _content(annotations, matched, asked, right, len(answers), material)
    trained = {
        "sha256": train.sha256,
        "questions": len(usable),
        "left_out": len(train.rows) - len(usable),
        "missing_videos": len(known.missing),
        "epochs": EPOCHS,
    }
    content["scored"] |= {"score": "classifier"}
    content["facts"].append(
        [
            "trained on",
            f"sha256 {train.sha256[:12]}, {len(usable)} of {len(train.rows)} questions "
            f"({len(known.missing)} videos missing), {EPOCHS} epochs, seed {options.seed}",
        ]
    )
    results = [
        result_of("linear classifier", metrics),
        result_of(f"always {answers[usual]!r}, for comparison", guess),
    ]
    return content | {"trained": trained, "results": results}


def classify(
    means: Float32,
    train: tuple[NDArray[np.intp], Float32],
    targets: NDArray[np.intp],
    asked: tuple[NDArray[np.intp], Float32],
    n_answers: int,
    seed: int,
) -> Float32:
    """Trains a linear classifier over [video, question, video * question] and scores the asked questions.

    Args:
        means: (V, D) unit rows, the videos' pooled vectors.
        train, asked: Of each question the row of its video in `means`, and its vector (n, D).
        targets: Of each training question the number of its answer.

    Returns:
        (questions asked, n_answers) float32 logits. The same seed gives the same on one machine.
    """
    import torch
    from torch.nn import functional as F

    dim = means.shape[1]
    video_rows = torch.from_numpy(means) * dim**0.5  # entries of about 1, whatever the dimension

    def batch(part: tuple[NDArray[np.intp], Float32], some: torch.Tensor) -> torch.Tensor:
        videos = video_rows[torch.from_numpy(part[0])[some]]
        questions = torch.from_numpy(part[1])[some] * dim**0.5
        return torch.cat([videos, questions, videos * questions], dim=1)

    layer = torch.nn.Linear(3 * dim, n_answers)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimiser = torch.optim.AdamW(layer.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    order_of = torch.Generator().manual_seed(seed)
    answers = torch.from_numpy(targets)
    for _ in range(EPOCHS):
        for some in torch.split(torch.randperm(len(answers), generator=order_of), BATCH):
            loss = F.cross_entropy(layer(batch(train, some)), answers[some])
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
    with torch.no_grad():
        parts = [layer(batch(asked, some)) for some in torch.split(torch.arange(len(asked[0])), BATCH)]
    logits: Float32 = torch.cat(parts).numpy()
    return logits


def _asked(annotations: Annotations[Question], material: Material, limit: int | None) -> tuple[Matched, list[Question]]:
    """The questions whose video is there, or `limit` of them in their order."""
    matched = material.match({row.video for row in annotations.rows})
    asked = [row for row in annotations.rows if row.video in matched.found]
    if limit is not None and limit < len(asked):
        chosen = np.random.default_rng(material.options.seed).choice(len(asked), limit, replace=False)
        asked = [asked[i] for i in sorted(chosen.tolist())]
    return matched, asked


def _content(
    annotations: Annotations[Question],
    matched: Matched,
    asked: Sequence[Question],
    right: Sequence[int],
    n_answers: int,
    material: Material,
) -> dict[str, Any]:
    names = {row.video for row in annotations.rows}
    used = {"questions": len(asked), "videos": len({row.video for row in asked})}
    reachable = sum(number >= 0 for number in right) / len(asked)
    return {
        "protocol": "question answering",
        "split": split_of(annotations, names, matched, used),
        "scored": material.describe(),
        "answers": n_answers,
        "reachable": reachable,
        "facts": [["answers", f"{n_answers} in the list; the right one is among them for {100 * reachable:.1f} %"]],
        "ties": "a tie of k answers counts 1 / k",
        **intervals_of(material.options, "questions"),
    }
