"""L = L_pair + weight * L_frame: VideoCLIP's contrast between the pairs of a batch, and FineCo's within each clip.

docs/METHOD.md, section 1              here
h_1..h_T   tokens of the clip          `states.tokens` (B, T, d)
z_v, z_t   video and text embedding    `states.pooled`, `text` (B, d)
s_i        score of token i            `scores` (B, T): dot product, or cosine
1 / t      logit scale                 `model.logit_scale()`; 1 for VideoCLIP's dot products
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from models.losses import Similarity, fineco_loss, fineco_positives, frame_scores, videoclip_loss
from models.videoclip import VideoStates
from pipeline.training.batches import Batch
from pipeline.training.distributed import Group
from pipeline.training.options import ObjectiveOptions

Model = TypeVar("Model", bound=nn.Module)


class Trainable(Protocol):
    """What a model must have to be trained; it is an nn.Module too."""

    similarity: Similarity

    def encode_video(self, features: Tensor, mask: Tensor) -> VideoStates: ...

    @property
    def encode_text(self) -> Callable[..., Tensor]: ...

    def logit_scale(self) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Losses:
    """Scalars with gradients: what is minimised, and its two parts (the frame part without its weight)."""

    total: Tensor
    pair: Tensor
    frame: Tensor


class Objective:
    """The loss of a batch under a model.

    Args:
        average: A moving-average copy of the model, which chooses the positives; None: the model's own scores do.
        group: The processes that share the batch.
        precision: `bf16`: the towers run under autocast; the losses are computed in float32 always.
    """

    def __init__(
        self,
        options: ObjectiveOptions,
        average: nn.Module | None = None,
        group: Group | None = None,
        precision: str = "fp32",
    ) -> None:
        self._options = options
        self._average = average
        self._group = group or Group()
        self._autocast = precision == "bf16"

    def weight(self, progress: float) -> float:
        """Of the frame loss, after this share of the training."""
        warmup = self._options.weight_warmup
        return self._options.frame_weight * (min(1.0, progress / warmup) if warmup else 1.0)

    def __call__(self, model: Trainable, batch: Batch, progress: float = 1.0) -> Losses:
        """The losses of a batch; of several processes each gives its part and gets the pair loss of the whole."""
        options = self._options
        states, text = self._encode(model, batch)
        scale = model.logit_scale()
        gather = self._group.gather
        pair = videoclip_loss(gather(states.pooled.float()) * scale, gather(text), options.direction)
        scores = frame_scores(states.tokens, text, model.similarity)
        positives = self._positives(batch, model.similarity)
        if options.frame_temperature is None:  # the frame loss follows the scale and does not push it
            scores, temperature = scores * scale.detach(), 1.0
        else:
            temperature = options.frame_temperature
        frame = fineco_loss(scores, batch.mask, options.ratio, options.form, temperature, positives).mean()
        weight = self.weight(progress)
        return Losses(pair + weight * frame if weight else pair, pair, frame)

    def _encode(self, model: Trainable, batch: Batch) -> tuple[VideoStates, Tensor]:
        with torch.autocast(batch.features.device.type, torch.bfloat16, enabled=self._autocast):
            return model.encode_video(batch.features, batch.mask), model.encode_text(*batch.texts).float()

    @torch.no_grad()
    def _positives(self, batch: Batch, similarity: Similarity) -> Tensor | None:
        if self._average is None:
            return None
        states, text = self._encode(self._average, batch)  # type: ignore[arg-type]
        return fineco_positives(frame_scores(states.tokens, text, similarity), batch.mask, self._options.ratio)


def moving_average(model: Model) -> Model:
    """A copy of a model that `follow` moves after it; it drops nothing out and learns nothing."""
    average = copy.deepcopy(model).eval().requires_grad_(False)
    return average


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    """One step of the moving average: a <- decay * a + (1 - decay) * m, for every weight."""
    for a, m in zip(average.parameters(), model.parameters(), strict=True):
        a.lerp_(m, 1 - decay)
