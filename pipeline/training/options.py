"""What a training is done with. Every field decides the result, so a resumed training must have the same."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from models.losses import Direction, Form
from pipeline.errors import UsageError


@dataclass(frozen=True, slots=True)
class ObjectiveOptions:
    """L = L_pair + weight * L_frame (docs/METHOD.md sections 1 and 3).

    Attributes:
        direction: Of the pair loss: `both`, `text_to_video` (fine-tuning for retrieval) or `video_to_text`.
        frame_weight: Of FineCo's frame loss; 0 is VideoCLIP's objective alone.
        ratio: Share of a clip's tokens that are positives. Below the share that fits the text, the loss pushes fitting
            tokens away (docs/STUDY.md).
        form: `each` or `set`.
        frame_temperature: Of the frame loss; None: the model's own, as it stands at that step (no gradient).
        weight_warmup: Share of all steps over which the frame weight grows from 0.
        frame_ema: Decay of a moving-average copy whose scores choose the positives; 0: the model itself chooses. The
            copy chooses and does nothing else: the loss contrasts the model's own scores.
    """

    direction: Direction = "both"
    frame_weight: float = 0.5
    ratio: float = 0.5
    form: Form = "each"
    frame_temperature: float | None = None
    weight_warmup: float = 0.1
    frame_ema: float = 0.0

    def __post_init__(self) -> None:
        _check_choice("direction", self.direction, ("both", "text_to_video", "video_to_text"))
        _check_choice("form", self.form, ("each", "set"))
        _check("frame weight", self.frame_weight, self.frame_weight >= 0, "0 or more")
        _check("ratio", self.ratio, 0 < self.ratio <= 1, "above 0 and up to 1")
        _check("weight warm-up", self.weight_warmup, 0 <= self.weight_warmup <= 1, "a share from 0 to 1")
        _check("frame EMA", self.frame_ema, 0 <= self.frame_ema < 1, "a decay from 0 to below 1, such as 0.99")
        if self.frame_temperature is not None:
            _check("frame temperature", self.frame_temperature, self.frame_temperature > 0, "above 0")


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """How a model is trained.

    Attributes:
        epochs: Passes over the texts.
        batch_size: Clips in a batch, over all processes; each of another video.
        lr: Highest learning rate: linear warm-up to it, then linear decay to 0.
        warmup: Share of all steps that the learning rate grows.
        weight_decay: Of matrices; biases, norms and the scale have none.
        clip_norm: Longest gradient.
        clips: `span`: the text's span, or the whole video. `overlapped`: clips of `min_tokens` to `max_tokens` tokens
            around a place inside the span (VideoCLIP's pre-training).
        max_tokens: Longest clip; of a longer one a random part is taken.
        min_tokens: Shortest clip of `overlapped`.
        hard_negatives: Batches of videos that are neighbours under the head as it is at the start of each epoch.
        precision: `fp32`, or `bf16`: the towers under autocast, losses and weights in float32.
        patience: Epochs without a better validation metric after which training ends; 0: never.
        seed: Of weights, order, crops and dropout.
    """

    epochs: int = 10
    batch_size: int = 128
    lr: float = 3e-4
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip_norm: float = 2.0
    clips: Literal["span", "overlapped"] = "span"
    max_tokens: int = 256
    min_tokens: int = 3
    hard_negatives: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    patience: int = 0
    seed: int = 0
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)

    def __post_init__(self) -> None:
        _check_choice("clips", self.clips, ("span", "overlapped"))
        _check_choice("precision", self.precision, ("fp32", "bf16"))
        _check("epochs", self.epochs, self.epochs >= 1, "1 or more")
        _check("batch size", self.batch_size, self.batch_size >= 2, "2 or more: in-batch negatives need two videos")
        _check("learning rate", self.lr, self.lr > 0, "above 0")
        _check("warm-up", self.warmup, 0 <= self.warmup <= 1, "a share from 0 to 1")
        _check("weight decay", self.weight_decay, self.weight_decay >= 0, "0 or more")
        _check("gradient clipping", self.clip_norm, self.clip_norm > 0, "above 0")
        _check("longest clip", self.max_tokens, self.max_tokens >= self.min_tokens, f"{self.min_tokens} tokens or more")
        _check("shortest clip", self.min_tokens, self.min_tokens >= 1, "1 token or more")
        _check("patience", self.patience, self.patience >= 0, "0 or more")


def _check(what: str, value: float, good: bool, wanted: str) -> None:
    if not good:  # NaN compares as False and lands here too
        raise UsageError(f"{what} {value:g}: it must be {wanted}")


def _check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{what} {value!r}: choose one of {', '.join(choices)}")
