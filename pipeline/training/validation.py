"""How good a model is while it trains: text-to-video retrieval among the clips that were set aside."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from pipeline.evaluate import rank_rows
from pipeline.training.batches import collate, middle_part
from pipeline.training.examples import Examples, Rows
from pipeline.training.objective import Trainable
from pipeline.types import Float32

CLIPS_PER_BATCH = 64
TEXTS_PER_BATCH = 1024
RECALL_AT = (1, 5, 10)


@torch.no_grad()
def pair_scores(
    model: Trainable, examples: Examples, rows: Rows, max_tokens: int, device: str = "cpu"
) -> tuple[Float32, NDArray[np.int64]]:
    """Scores every text against every clip.

    Args:
        rows: The texts; their clips are the gallery, each distinct one once. Of a clip longer than `max_tokens` the
            middle is seen.

    Returns:
        (M, C) scores, and the right clip of each text (M,).
    """
    clips, right = np.unique(
        np.column_stack([examples.videos[rows], examples.spans[rows]]), axis=0, return_inverse=True
    )
    first = np.zeros(len(clips), np.intp)
    first[right[::-1]] = rows[::-1]
    cut = middle_part(clips[:, 1:], max_tokens)
    by_length = np.argsort(cut[:, 1] - cut[:, 0], kind="stable")  # little padding
    videos: Float32 | None = None
    for start in range(0, len(clips), CLIPS_PER_BATCH):
        some = by_length[start : start + CLIPS_PER_BATCH]
        batch = collate(examples, first[some], cut[some]).to(device)
        pooled = model.encode_video(batch.features, batch.mask).pooled.float().cpu().numpy()
        if videos is None:
            videos = np.empty((len(clips), pooled.shape[1]), np.float32)
        videos[some] = pooled
    assert videos is not None
    parts = []
    for start in range(0, len(rows), TEXTS_PER_BATCH):
        inputs = examples.texts.inputs(rows[start : start + TEXTS_PER_BATCH])
        text = model.encode_text(*(i.to(device) for i in inputs)).float()
        text = F.normalize(text, dim=-1) if model.similarity == "cosine" else text
        parts.append(text.cpu().numpy() @ videos.T)
    return np.concatenate(parts), right.reshape(-1)


def retrieval(scores: Float32, right: NDArray[np.int64]) -> dict[str, float]:
    """R@1, R@5, R@10 in percent, their mean, and the median rank.

    Ties are half lost, so a model that scores all alike is at chance (docs/METHOD.md section 5).
    """
    ranks = rank_rows(scores, right).average
    recalls = {f"R@{k}": float(100 * np.mean(ranks <= k)) for k in RECALL_AT}
    return {**recalls, "mean recall": sum(recalls.values()) / len(recalls), "median rank": float(np.median(ranks))}


def validate(
    model: Trainable, examples: Examples, rows: Rows, max_tokens: int, device: str = "cpu"
) -> dict[str, float]:
    """`retrieval` of a model that is in evaluation mode."""
    return retrieval(*pair_scores(model, examples, rows, max_tokens, device))
