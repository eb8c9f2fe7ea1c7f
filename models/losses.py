"""The losses: FineCo's contrast between a clip's own frames, and VideoCLIP's between the pairs of a batch.

    docs/METHOD.md, sections 1 and 3       here
    h_1..h_T   tokens of the clip          `tokens` (B, T, d)
    z_t        text embedding              `text` (B, d)
    s_i        score of token i            `scores` (B, T)
    K, P, N    positives, negatives        `n_positives`, `positives` (B, T), `negatives` (B, T)
    t          temperature                 `temperature`

float16 and bfloat16 inputs are computed in float32, also under autocast; float64 stays float64.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

RATIO_SLACK = 1e-9  # 0.07 * 100 is 7.000000000000001 in binary; without this its ceiling would be 8

Similarity = Literal["dot", "cosine"]
Form = Literal["each", "set"]
Direction = Literal["both", "text_to_video", "video_to_text"]


def frame_scores(tokens: Tensor, text: Tensor, similarity: Similarity = "dot") -> Tensor:
    """Scores every token of a clip against the clip's own text: s_i = <h_i, z_t>.

    Args:
        tokens: (B, T, d), one clip in each row.
        text: (B, d), the text of each clip.
        similarity: `dot` (VideoCLIP's raw dot product) or `cosine` (both sides are normalised).

    Returns:
        (B, T) scores, float32 or float64.

    Raises:
        ValueError: Unknown similarity.
    """
    h, z = _float32_or_more(tokens), _float32_or_more(text)
    if similarity == "cosine":
        h, z = F.normalize(h, dim=-1), F.normalize(z, dim=-1)
    elif similarity != "dot":
        raise ValueError(f"similarity {similarity!r}: 'dot' or 'cosine'")
    # not a matrix product: autocast and TF32 would round scores near 100 to whole numbers and tenths
    return (h * z.unsqueeze(1)).sum(dim=-1)


def n_positives(n_tokens: int, ratio: float) -> int:
    """K = max(1, ceil(ratio * T)) for T = `n_tokens`; the K of `pipeline.select`."""
    return max(1, math.ceil(ratio * n_tokens - RATIO_SLACK))


@torch.no_grad()
def fineco_positives(scores: Tensor, mask: Tensor, ratio: float = 0.5) -> Tensor:
    """The K highest valid scores of each clip; of equal scores the earlier token comes first.

    Args:
        scores: (B, T).
        mask: (B, T) bool, true where a token is valid.
        ratio: Share of the valid tokens, in (0, 1].

    Returns:
        (B, T) bool; none in a row without a valid token.

    Raises:
        ValueError: The ratio is out of range, or the shapes differ.
    """
    _check_shapes(scores, mask)
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio {ratio}: it lies above 0 and up to 1")
    k_of = torch.tensor([n_positives(n, ratio) for n in range(scores.shape[1] + 1)], device=scores.device)
    k = k_of[mask.sum(dim=1)]
    best_first = scores.masked_fill(~mask, -math.inf).argsort(dim=1, descending=True, stable=True)
    place = best_first.argsort(dim=1)
    return (place < k.unsqueeze(1)) & mask


def fineco_loss(
    scores: Tensor,
    mask: Tensor,
    ratio: float = 0.5,
    form: Form = "each",
    temperature: float = 1.0,
    positives: Tensor | None = None,
) -> Tensor:
    """FineCo's frame loss (docs/METHOD.md section 1): the K best tokens of a clip against all its others.

    `each`: -(1/K) * sum_P log( e^(s_p/t) / (e^(s_p/t) + sum_N e^(s_n/t)) )
    `set`:  -log( sum_P e^(s_p/t) / sum_(P+N) e^(s_i/t) )

    Both are softplus of "negatives minus positives", which is how they are computed: softplus(log sum_N - s_p/t) and
    softplus(log sum_N - log sum_P).

    Args:
        scores: (B, T), from `frame_scores`.
        mask: (B, T) bool, true where a token is valid; the others are in neither group and get no gradient.
        ratio: Share of the valid tokens that are positives, in (0, 1].
        form: `each` or `set`.
        temperature: t > 0; 1.0 for VideoCLIP's dot products.
        positives: (B, T) bool, chosen elsewhere (by a moving-average copy); None: by these scores, without gradient.

    Returns:
        (B,) one loss for each clip, float32 or float64. Exactly 0, with a gradient of exactly 0, where a clip has no
        negatives or no valid token.

    Raises:
        ValueError: Shapes that differ, an unknown form, a ratio or a temperature out of range.
    """
    _check_shapes(scores, mask)
    if form not in ("each", "set"):
        raise ValueError(f"form {form!r}: 'each' or 'set'")
    if not temperature > 0:
        raise ValueError(f"temperature {temperature}: it lies above 0")
    s = _float32_or_more(scores)
    if positives is None:
        positives = fineco_positives(s, mask, ratio)
    _check_shapes(scores, positives)
    positives = positives & mask
    negatives = mask & ~positives
    none = torch.finfo(s.dtype).min  # not -inf, whose differences are NaN in the gradient; e^none is exactly 0

    # The best negative is subtracted before the division: the differences of scores near 100 are exact, their
    # quotients by 0.05 would not be.
    best_negative = s.detach().masked_fill(~negatives, none).amax(dim=1, keepdim=True)
    shift = torch.where(negatives.any(dim=1, keepdim=True), best_negative, 0)
    x = torch.where(mask, s - shift, 0) / temperature
    log_sum_n = x.masked_fill(~negatives, none).logsumexp(dim=1)
    if form == "each":
        losses = torch.where(positives, _softplus(log_sum_n.unsqueeze(1) - x), 0)
        return losses.sum(dim=1) / positives.sum(dim=1).clamp(min=1)
    log_sum_p = x.masked_fill(~positives, none).logsumexp(dim=1)
    return torch.where(positives.any(dim=1), _softplus(log_sum_n - log_sum_p), 0)


def videoclip_loss(pooled_video: Tensor, pooled_text: Tensor, direction: Direction = "both") -> Tensor:
    """VideoCLIP's pair loss (docs/METHOD.md section 3): cross-entropy over raw dot products, row i with row i.

    Args:
        pooled_video, pooled_text: (B, d).
        direction: `text_to_video` (which video belongs to this text: fine-tuning for retrieval), `video_to_text`
            (multiple choice) or `both` (pre-training: their sum).

    Returns:
        A scalar, float32 or float64; each direction is a mean over the batch.

    Raises:
        ValueError: Unknown direction.
    """
    if direction not in ("both", "text_to_video", "video_to_text"):
        raise ValueError(f"direction {direction!r}: 'both', 'text_to_video' or 'video_to_text'")
    with torch.autocast(pooled_video.device.type, enabled=False):
        logits_per_text = _float32_or_more(pooled_text) @ _float32_or_more(pooled_video).T
    right = torch.arange(len(logits_per_text), device=logits_per_text.device)
    if direction == "text_to_video":
        return F.cross_entropy(logits_per_text, right)
    if direction == "video_to_text":
        return F.cross_entropy(logits_per_text.T, right)
    return F.cross_entropy(logits_per_text, right) + F.cross_entropy(logits_per_text.T, right)


def _float32_or_more(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _softplus(x: Tensor) -> Tensor:
    # F.softplus turns into x itself above 20, which is 2e-9 off
    return -F.logsigmoid(-x)


def _check_shapes(scores: Tensor, other: Tensor) -> None:
    if scores.ndim != 2 or other.shape != scores.shape or other.dtype != torch.bool:
        raise ValueError(
            f"scores (B, T) with a bool mask of the same shape expected, got {tuple(scores.shape)} and "
            f"{other.dtype} {tuple(other.shape)}"
        )
