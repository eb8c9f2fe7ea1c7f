"""BERT's layers, under the parameter names of its published weights, so that those load as they are.

Post-norm layers, exact GELU, LayerNorm's epsilon 1e-12 (docs/METHOD.md section 3). Both towers of VideoCLIP and
FineCo's head are made of these.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LAYER_NORM_EPSILON = 1e-12
INITIAL_STD = 0.02  # of every matrix and table before training
N_TOKEN_TYPES = 2  # only the first is used; the published weights hold both


@dataclass(frozen=True, slots=True)
class TowerConfig:
    """The size of one tower. The defaults are bert-base-uncased.

    Attributes:
        n_layers: Transformer layers.
        hidden_size: Width of a token's state (H), a multiple of `n_heads`.
        n_heads: Attention heads.
        intermediate_size: Width inside a layer's two-layer perceptron.
        n_words: Rows of the word table.
        n_positions: Rows of the position table: the longest sequence, special tokens included.
        dropout: Of states and of attention, in training.
    """

    n_layers: int = 12
    hidden_size: int = 768
    n_heads: int = 12
    intermediate_size: int = 3072
    n_words: int = 30522
    n_positions: int = 512
    dropout: float = 0.1


class Bert(nn.Module):
    """A sequence of vectors to a sequence of states."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        if config.hidden_size % config.n_heads:
            raise ValueError(f"{config.n_heads} heads do not divide a width of {config.hidden_size}")
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)

    def words(self, ids: Tensor) -> Tensor:
        """Ids (...) int64 -> rows of the word table (..., H)."""
        vectors: Tensor = self.embeddings.word_embeddings(ids)
        return vectors

    def forward(self, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Runs all layers.

        Args:
            tokens: (B, L, H) vectors: words, or what stands for them.
            positions: (L,) int64, rows of the position table.
            mask: (B, L) bool, true where a token is valid; at least one in each row. The others are not attended to.

        Returns:
            (B, L, H) states after the last layer; those of masked tokens mean nothing.
        """
        states: Tensor = self.encoder(self.embeddings(tokens, positions), mask)
        return states


class Embeddings(nn.Module):
    """Adds position and token type (always the first) to the tokens."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.n_words, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.n_positions, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(N_TOKEN_TYPES, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPSILON)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        places = self.position_embeddings(positions) + self.token_type_embeddings.weight[0]
        summed: Tensor = self.dropout(self.LayerNorm(tokens + places))
        return summed


class Encoder(nn.Module):
    """The layers, one after the other."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.n_layers))

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layer:
            states = layer(states, mask)
        return states


class Layer(nn.Module):
    """Attention, then a two-layer perceptron, each added to its input and normalised."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.intermediate = Intermediate(config)
        self.output = Output(config.intermediate_size, config)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        states = self.attention(states, mask)
        output: Tensor = self.output(self.intermediate(states), states)
        return output


class Attention(nn.Module):
    """Multi-head self-attention with its output."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.self = SelfAttention(config)
        self.output = Output(config.hidden_size, config)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        output: Tensor = self.output(self.self(states, mask), states)
        return output


class SelfAttention(nn.Module):
    """Every token attends to the valid ones."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.dropout = config.dropout
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (
            part(states).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # (B, heads, L, H / heads)
            for part in (self.query, self.key, self.value)
        )
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :], dropout_p=dropout)
        return attended.transpose(1, 2).flatten(2)


class Intermediate(nn.Module):
    """The perceptron's first layer."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)

    def forward(self, states: Tensor) -> Tensor:
        return F.gelu(self.dense(states))


class Output(nn.Module):
    """A linear layer, added to `residual` and normalised."""

    def __init__(self, width_in: int, config: TowerConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(width_in, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPSILON)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, states: Tensor, residual: Tensor) -> Tensor:
        output: Tensor = self.LayerNorm(self.dropout(self.dense(states)) + residual)
        return output


@torch.no_grad()
def initialise(module: nn.Module) -> None:
    """BERT's start of training: normal matrices and tables, biases 0, LayerNorms the identity. Use with `apply`."""
    if isinstance(module, nn.Linear | nn.Embedding):
        module.weight.normal_(std=INITIAL_STD)
    if isinstance(module, nn.Linear):
        module.bias.zero_()
    if isinstance(module, nn.LayerNorm):
        module.reset_parameters()
