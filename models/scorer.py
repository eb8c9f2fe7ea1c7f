"""The scorer: a small network that predicts a frame's FineCo score from the frame and its video, without any text.

docs/METHOD.md section 2: it is trained on scores that captions gave (pipeline.training.scorer), and stands in for them
where a collection has none. What it sees of a frame x_i is x_i itself, the mean m of its video's frames, their product
and distance in each dimension, and how like the rest of the video the frame is.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from models.scorer_file import ScorerFacts, read_facts
from models.weights import check_finite
from pipeline.errors import UsageError
from pipeline.types import Float32, check_shape

HIDDEN = 64
NEAR = 16  # frames on both sides among which the likest one is looked for: all of them would cost T x T
CHUNK = 128  # frames at a time, so that a video of ten hours needs no more memory than its features
N_STATISTICS = 5


class FrameScorer(nn.Module):
    """Scores frames by their features and those of their video; of two frames of one video, the higher matters more.

    Args:
        dim: Length of a feature (D).
        hidden: Width of both hidden layers.
    """

    centre: Tensor
    spread: Tensor

    def __init__(self, dim: int, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.dim, self.hidden = dim, hidden
        n_inputs = 4 * dim + N_STATISTICS
        # what the inputs were like in training: the features of one encoder share most of their direction
        self.register_buffer("centre", torch.zeros(n_inputs))
        self.register_buffer("spread", torch.ones(n_inputs))
        self.layers = nn.Sequential(
            nn.Linear(n_inputs, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, 1)
        )

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """(B, T, D) unit rows, (B, T) bool -> (B, T) scores; 0 where the mask is False.

        A video's scores depend on its own valid frames alone, in their order.
        """
        scores = features.new_zeros(mask.shape)
        for row, valid in enumerate(mask):
            if valid.any():
                scores[row, valid] = self.score_video(features[row, valid])
        return scores

    def score_video(self, features: Tensor) -> Tensor:
        """(T, D) unit rows of one whole video -> (T,) scores, in memory and time that grow with T alone."""
        mean, statistics = video_context(features)
        parts = [
            self.score_frames(features[some], mean.expand(len(features[some]), -1), statistics[some])
            for some in _chunks(len(features))
        ]
        return torch.cat(parts)

    def score_frames(self, features: Tensor, means: Tensor, statistics: Tensor) -> Tensor:
        """Frames of any videos with the context of each: (F, D), (F, D), (F, N_STATISTICS) -> (F,) scores."""
        inputs = (frame_inputs(features, means, statistics) - self.centre) / self.spread
        scores: Tensor = self.layers(inputs)
        return scores.squeeze(-1)


def frame_inputs(features: Tensor, means: Tensor, statistics: Tensor) -> Tensor:
    """What the network sees of each frame: (F, 4 D + N_STATISTICS)."""
    return torch.cat([features, means, features * means, (features - means).abs(), statistics], dim=-1)


def video_context(features: Tensor) -> tuple[Tensor, Tensor]:
    """What a video says about its frames.

    Args:
        features: (T, D) unit rows.

    Returns:
        The mean row (D,), not normalised; and for each frame (T, N_STATISTICS): the cosine to the mean, the mean
        cosine to the other frames, the lower and the higher cosine to the two frames beside it, and the highest to the
        frames at most NEAR away. They are 0, but for the first, where there is no other frame.
    """
    n = len(features)
    total = features.sum(0)
    mean = total / n
    direction = F.normalize(mean, dim=0)
    columns = []
    for some in _chunks(n):
        frames = features[some]
        start, end = some.start, some.start + len(frames)
        first = max(0, start - NEAR)
        around = features[first : end + NEAR]
        places = torch.arange(start, end, device=features.device)
        apart = (torch.arange(first, first + len(around), device=features.device) - places[:, None]).abs()
        cosines = frames @ around.T
        beside = apart == 1
        others = frames @ total - (frames * frames).sum(1)
        columns.append(
            torch.stack(
                [
                    frames @ direction,
                    others / max(n - 1, 1),
                    cosines.masked_fill(~beside, 2.0).amin(1),
                    cosines.masked_fill(~beside, -2.0).amax(1),
                    cosines.masked_fill((apart == 0) | (apart > NEAR), -2.0).amax(1),
                ],
                dim=1,
            )
        )
    statistics = torch.cat(columns)
    if n == 1:
        statistics[:, 1:] = 0
    return mean, statistics


def _chunks(n: int) -> list[slice]:
    return [slice(start, start + CHUNK) for start in range(0, n, CHUNK)]


def score_frames_without_text(scorer: FrameScorer, features: Float32) -> Float32:
    """What the scorer says of every frame of one video.

    Args:
        features: (N, D) float32 unit rows of the whole video, in order of time.

    Returns:
        (N,) float32; only their order within the video means anything.
    """
    check_shape("features", features, (None, scorer.dim), np.float32)
    with torch.inference_mode():
        scores: Float32 = scorer.score_video(torch.from_numpy(np.require(features, requirements=["C", "W"]))).numpy()
    return scores


def save_scorer(path: Path, scorer: FrameScorer, facts: ScorerFacts) -> None:
    """Writes one safetensors file; the same scorer and facts give the same bytes."""
    facts = replace(facts, dim=scorer.dim, hidden=scorer.hidden)
    save_file({name: t.contiguous() for name, t in scorer.state_dict().items()}, path, metadata=facts.metadata())


def load_scorer(path: Path) -> FrameScorer:
    """Loads a scorer, on the CPU: it costs little, and so its scores do not depend on where the encoder ran.

    Raises:
        UsageError: The file is not a scorer. Whose features it scores is for the caller to check (`read_facts`).
    """
    facts = read_facts(path)
    scorer = FrameScorer(facts.dim, facts.hidden)
    try:
        state = load_file(path)
        check_finite(state)
        scorer.load_state_dict(state, strict=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"scorer: {path}: {reason}", "Give a file that 'fineco train-scorer' made.") from error
    return scorer.eval()
