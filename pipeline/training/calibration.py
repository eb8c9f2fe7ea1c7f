"""At which temperature a search should weigh the frames of a trained head's videos.

A search scores a video by the softmax-weighted mean of its frames' cosines (pipeline.rescore): at a low temperature by
its best frame, at a high one by the plain mean, which is what the pair loss trained. Which of them ranks best depends
on the videos: where all frames show what the text says, the mean does, and where few do, the best frames. So it is
measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from pipeline.rescore import rescore
from pipeline.training.batches import collate, middle_part
from pipeline.training.examples import Examples, Rows
from pipeline.training.objective import Trainable
from pipeline.training.validation import CLIPS_PER_BATCH, retrieval

MOST_TEXTS = 400  # enough to tell temperatures apart; each costs as many frames as the clips of all have
FACTORS = tuple(2.0**k for k in range(-3, 8))


@dataclass(frozen=True, slots=True)
class Rescoring:
    """The best temperature, and how well re-scoring ranks at it (`pipeline.training.validation.retrieval`)."""

    temperature: float
    metrics: dict[str, float]


@torch.no_grad()
def calibrate(
    model: Trainable, examples: Examples, rows: Rows, start: float, max_tokens: int, device: str = "cpu"
) -> Rescoring:
    """Finds the temperature at which re-scoring ranks the clips of these texts best: `start` times a power of 2.

    Args:
        model: In evaluation mode.
        rows: Texts that were not trained on, where there are some.
        start: A temperature in the middle of those tried; of equally good ones the nearest to it.
    """
    rows = rows[:: -(-len(rows) // MOST_TEXTS)]
    clips, first, right = np.unique(
        np.column_stack([examples.videos[rows], examples.spans[rows]]), axis=0, return_index=True, return_inverse=True
    )
    cut = middle_part(clips[:, 1:], max_tokens)
    tokens = []
    for first_clip in range(0, len(clips), CLIPS_PER_BATCH):
        some = slice(first_clip, first_clip + CLIPS_PER_BATCH)
        batch = collate(examples, rows[first[some]], cut[some]).to(device)
        states = model.encode_video(batch.features, batch.mask)
        tokens.append(F.normalize(states.tokens.float()[batch.mask], dim=-1))
    texts = F.normalize(model.encode_text(*(i.to(device) for i in examples.texts.inputs(rows))).float(), dim=-1)
    cosines = (texts @ torch.cat(tokens).T).cpu().numpy()
    offsets = np.cumsum([0, *(cut[:, 1] - cut[:, 0])])

    def at(factor: float) -> dict[str, float]:
        scores = np.stack([rescore(row, offsets, factor * start) for row in cosines])
        return retrieval(scores, right.reshape(-1))

    found = {factor: at(factor) for factor in FACTORS}
    best = max(FACTORS, key=lambda factor: (found[factor]["mean recall"], -abs(np.log2(factor))))
    return Rescoring(start * best, found[best])
