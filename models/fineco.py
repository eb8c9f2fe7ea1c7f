"""The head that `fineco train` trains: VideoCLIP's video transformer over the features of any base encoder.

    docs/METHOD.md, sections 1 and 3       here
    h_1..h_T   tokens of the video         `tokens` (B, T, d) of `encode_video`
    z_v        video embedding             `pooled` (B, d)
    z_t        text embedding              `encode_text` (B, d)
    t          temperature                 1 / `logit_scale()` in the losses, `rescoring_temperature` in a search

The tower is VideoCLIP's (token MLP, BERT layers over `[CLS] v_1..v_32 [SEP]`, longer videos as consecutive clips); the
texts are vectors of the base encoder, through a small perceptron. With `residual` both only correct the base's vectors,
and start at no correction: an untrained head is the base encoder.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from models.bert import TowerConfig, initialise
from models.losses import Similarity
from models.videoclip import VideoStates, VideoTower, masked_mean

KIND = "head"  # in config.json
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "head.safetensors"
LARGEST_SCALE = 100.0  # of the logits, as in CLIP, or the base's own where that is larger


@dataclass(frozen=True, slots=True)
class HeadConfig:
    """What a head is.

    Attributes:
        input_dim: Length of a row of the base encoder's frame features.
        text_dim: Length of its text vectors.
        dim: Length of the head's vectors (d); with `residual` the same as both.
        width, layers, heads, intermediate: Of the transformer.
        max_tokens: Longest clip; longer videos are consecutive clips.
        dropout: In training.
        residual: The head's outputs are added to the base's vectors, which must share one space.
        similarity: `cosine` (unit vectors, learned scale) or `dot` (VideoCLIP's raw dot product, scale 1).
        temperature: 1 / logit scale at the start (`cosine`): the base encoder's own.
    """

    input_dim: int
    text_dim: int
    dim: int
    width: int = 256
    layers: int = 2
    heads: int = 4
    intermediate: int = 1024
    max_tokens: int = 32
    dropout: float = 0.1
    residual: bool = True
    similarity: Similarity = "cosine"
    temperature: float = 0.07

    def __post_init__(self) -> None:
        sizes = (self.input_dim, self.text_dim, self.dim, self.width, self.layers, self.heads, self.intermediate)
        if min(*sizes, self.max_tokens) < 1:
            raise ValueError(f"a size below 1 in {self}")
        if self.width % self.heads:
            raise ValueError(f"a width of {self.width} is no multiple of {self.heads} heads")
        if self.residual and not self.input_dim == self.text_dim == self.dim:
            raise ValueError(
                f"a residual head keeps the space of its base: frames {self.input_dim}, texts {self.text_dim} and "
                f"dim {self.dim} must be one number"
            )
        if self.similarity not in ("cosine", "dot"):
            raise ValueError(f"similarity {self.similarity!r}: 'cosine' or 'dot'")
        if not (0 <= self.dropout < 1 and self.temperature > 0):
            raise ValueError(f"dropout {self.dropout} lies from 0 to below 1, temperature {self.temperature} above 0")


class FineCoHead(nn.Module):
    """Video and text vectors of a common space, out of a base encoder's vectors; see the module's table."""

    rescoring_temperature: Tensor

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        self.similarity = config.similarity
        tower = TowerConfig(
            config.layers,
            config.width,
            config.heads,
            config.intermediate,
            n_words=2,  # [CLS] and [SEP] are vectors of the tower's own
            n_positions=config.max_tokens + 2,
            dropout=config.dropout,
        )
        self.video_tower = VideoTower(tower, config.input_dim, config.max_tokens)
        self.video_out = nn.Linear(config.width, config.dim)
        self.text_mlp = nn.Sequential(
            nn.Linear(config.text_dim, config.width),
            nn.GELU(),
            nn.LayerNorm(config.width),
            nn.Dropout(config.dropout),
        )
        self.text_out = nn.Linear(config.width, config.dim)
        for part in (self.video_out, self.text_mlp, self.text_out):
            part.apply(initialise)
        if config.residual:
            for layer in (self.video_out, self.text_out):
                nn.init.zeros_(layer.weight)
        # what a search weighs frames at; measured when the training ends (pipeline.training.calibration)
        self.register_buffer("rescoring_temperature", torch.tensor(config.temperature))
        self._largest = math.log(max(LARGEST_SCALE, 1 / config.temperature))
        self.log_scale = nn.Parameter(torch.tensor(-math.log(config.temperature))) if self._is_cosine else None

    @property
    def _is_cosine(self) -> bool:
        return self.similarity == "cosine"

    def encode_video(self, features: Tensor, mask: Tensor) -> VideoStates:
        """Rows of the base encoder (B, T, F) of any T, with their mask (B, T) bool -> states.

        Returns:
            `tokens` (B, T, d): unit rows for `cosine`; zero where the mask is false. `pooled` (B, d): the mean of the
            valid tokens, for `cosine` of unit length, so that it is what the selector `all` makes of the tokens.
            `hidden`: the tower's.
        """
        hidden = self.video_tower.encode(features, mask).hidden
        tokens = self._correct(self.video_out(hidden[:, 1:-1]), features)
        pooled = masked_mean(tokens, mask)
        return VideoStates(
            torch.where(mask.unsqueeze(-1), tokens, 0),
            F.normalize(pooled, dim=-1) if self._is_cosine else pooled,
            hidden,
        )

    def encode_text(self, text_features: Tensor) -> Tensor:
        """Text vectors of the base encoder (B, D) -> (B, d), unit rows for `cosine`."""
        return self._correct(self.text_out(self.text_mlp(text_features)), text_features)

    def logit_scale(self) -> Tensor:
        """What similarities are multiplied with in the losses: a scalar."""
        if self.log_scale is None:
            return torch.ones((), device=self.video_out.weight.device)
        if self.training:  # the parameter, as in CLIP: a limit in the graph would stop its gradient for good
            self.log_scale.data.clamp_(max=self._largest)
        return self.log_scale.exp()

    def _correct(self, output: Tensor, base: Tensor) -> Tensor:
        """In float32, also under autocast: corrections are small beside the base's vectors."""
        vectors = output.float()
        if self.config.residual:
            vectors = vectors + base.float()
        return F.normalize(vectors, dim=-1) if self._is_cosine else vectors


def describe_head(config: HeadConfig, base_name: str, base_fingerprint: str) -> bytes:
    """What config.json says of a head: its sizes, and the encoder whose features it takes."""
    content = {
        "kind": KIND,
        "head": asdict(config),
        "base": {"name": base_name, "fingerprint": base_fingerprint},
    }
    return json.dumps(content, indent=1).encode() + b"\n"


def save_weights(path: Path, model: nn.Module) -> None:
    """Writes the weights of a head, or of VideoCLIP's towers, in float32."""
    save_file({name: t.detach().float().cpu().contiguous() for name, t in model.state_dict().items()}, path)
