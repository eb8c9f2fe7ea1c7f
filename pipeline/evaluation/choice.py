"""Multiple choice (docs/METHOD.md section 5): a video and five sentences, of which one is its own."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np

from pipeline.annotations import Annotations, Caption, Choice
from pipeline.errors import UsageError
from pipeline.evaluate import accuracy_metrics
from pipeline.evaluation.material import Material, intervals_of, result_of, split_of
from pipeline.evaluation.scoring import own_scores

N_OPTIONS = 5


def draw_choices(annotations: Annotations[Caption], seed: int) -> Annotations[Choice]:
    """One question for each video: one of its captions, and others drawn from the captions of other videos.

    This list is ours. MSR-VTT has an official one, which figures in papers are of. Ours draws all options at random
    from the same captions with a fixed seed; it does not depend on which videos a collection has.

    Raises:
        UsageError: Captions with spans, or too few different ones.
    """
    captions: dict[str, list[str]] = {}
    for caption in annotations.rows:
        if caption.start_seconds is not None:
            raise UsageError("a list is drawn from captions of whole videos; these have spans")
        captions.setdefault(caption.video, []).append(caption.text)
    owners: dict[str, set[str]] = {}
    for video, texts in captions.items():
        for text in texts:
            owners.setdefault(text, set()).add(video)
    pool = list(owners)
    generator = np.random.default_rng(seed)
    choices = []
    for video, texts in captions.items():
        if len(pool) - len(set(texts)) < N_OPTIONS - 1:
            raise UsageError(f"{len(pool)} different captions are too few to draw {N_OPTIONS} options from")
        options = [texts[generator.integers(len(texts))]]
        while len(options) < N_OPTIONS:
            text = pool[generator.integers(len(pool))]
            if video not in owners[text] and text not in options:
                options.append(text)
        order = generator.permutation(N_OPTIONS).tolist()
        choices.append(Choice(video, tuple(options[i] for i in order), order.index(0)))
    return Annotations(annotations.dataset, annotations.subset, annotations.sha256, tuple(choices))


def evaluate_choice(
    annotations: Annotations[Choice], material: Material, drawn_from: Annotations[Caption] | None = None
) -> dict[str, Any]:
    """Share of the videos whose own sentence scores highest, as the content of a report.

    Args:
        drawn_from: The captions that `draw_choices` drew the list from, which the report says.

    Raises:
        UsageError: No annotated video is there, or one is ambiguous.
    """
    names = {choice.video for choice in annotations.rows}
    matched = material.match(names)
    rows = material.read({video.video_id: video for video in matched.found.values()}.values())
    asked = [choice for choice in annotations.rows if choice.video in matched.found]
    clips = [rows[matched.found[choice.video].video_id].features for choice in asked]
    scores = own_scores(material, [choice.options for choice in asked], clips)
    options = material.options
    metrics = accuracy_metrics(scores, [choice.answer for choice in asked], options.draws, options.seed)
    chance = float(np.mean([1 / len(choice.options) for choice in asked]))
    lines = "".join(json.dumps([c.video, c.options, c.answer]) + "\n" for c in annotations.rows)
    digest = hashlib.sha256(lines.encode()).hexdigest()
    origin = f"drawn with seed {options.seed}: ours, not the official list" if drawn_from else "as in the file"
    used = {"questions": len(asked), "videos": len({choice.video for choice in asked})}
    return {
        "protocol": "multiple choice",
        "split": split_of(drawn_from or annotations, names, matched, used),
        "scored": material.describe() | {"frames_per_clip": float(np.mean([len(clip) for clip in clips]))},
        "list": {"drawn": drawn_from is not None, "seed": options.seed if drawn_from else None, "sha256": digest},
        "chance": {"accuracy": chance},
        "facts": [["options", f"{origin}; sha256 {digest[:12]}"]],
        "ties": "a tie of k options counts 1 / k",
        **intervals_of(options, "questions"),
        "results": [result_of("highest score", metrics)],
    }
