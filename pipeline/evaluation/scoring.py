"""Texts against clips, a block of texts at a time: by pooled vectors, by weighted frames, or by a model's own score.

A clip of several parts, which are its moments, has the score of its best one; a model scores whole clips. Products are
taken in float64 and rounded to float32: equal texts and equal clips then have equal scores wherever they
stand, which a float32 matrix product does not promise, and ties are counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from models.base import VideoEncoder
from pipeline.evaluation.clips import Clips
from pipeline.evaluation.material import Material
from pipeline.rescore import rescore
from pipeline.types import Float32

BLOCK_BYTES = 16 * 2**20  # of one block of frame scores in float64, of which five are in memory; more is no faster
MODEL_BLOCK_BYTES = 256 * 2**20  # of one block of a model's scores: each block encodes all clips anew
TEXTS_AT_ONCE = 512  # for a model that scores pairs: each of them meets every clip beside it, needed or not
Block = tuple[int, Float32]  # number of its first text, scores (texts, clips)


def mean_blocks(texts: Float32, clips: Clips) -> Iterator[Block]:
    """Cosines of unit rows `texts` (M, D) with the pooled vectors of the clips' parts; the best of each clip."""
    means = clips.means().astype(np.float64).T
    at_once = max(1, BLOCK_BYTES // (8 * means.shape[1]))
    for start in range(0, len(texts), at_once):
        cosines = (texts[start : start + at_once].astype(np.float64) @ means).astype(np.float32)
        yield start, clips.best_of_parts(cosines)


def rescore_blocks(texts: Float32, clips: Clips, temperature: float) -> Iterator[Block]:
    """The score of `pipeline.rescore`, the softmax-weighted mean of a part's frame cosines; the best of each clip."""
    frames = clips.features.astype(np.float64).T
    at_once = max(1, BLOCK_BYTES // (8 * len(clips.features)))
    for start in range(0, len(texts), at_once):
        cosines = (texts[start : start + at_once].astype(np.float64) @ frames).astype(np.float32)
        yield start, clips.best_of_parts(rescore(cosines, clips.parts, temperature))


def model_blocks(model: VideoEncoder, texts: Sequence[str], clips: Clips) -> Iterator[Block]:
    """The model's own score of every pair, on its own scale."""
    features = clips.all()
    at_once = max(1, MODEL_BLOCK_BYTES // (4 * len(clips)))
    for start in range(0, len(texts), at_once):
        yield start, model.score_pairs(texts[start : start + at_once], features)


def own_scores(material: Material, texts: Sequence[Sequence[str]], clips: Sequence[Float32]) -> list[Float32]:
    """Each clip's scores with its own texts, by the material's score: one array (texts of the clip,) for each clip."""
    scores: list[Float32] = []
    at_once = max(1, TEXTS_AT_ONCE // max(map(len, texts), default=1))
    for start in range(0, len(clips), at_once):
        some, theirs = clips[start : start + at_once], texts[start : start + at_once]
        flat = [text for group in theirs for text in group]
        ends = np.cumsum([0, *map(len, theirs)])
        if material.model is not None:
            pairs = material.model.score_pairs(flat, some)
            scores += [pairs[a:b, i] for i, (a, b) in enumerate(pairwise(ends))]
            continue
        vectors = material.encode(flat)
        for rows, (a, b) in zip(some, pairwise(ends), strict=True):
            scores.append(clip_scores(material, vectors[a:b], rows))
    return scores


def clip_scores(material: Material, vectors: Float32, rows: Float32) -> Float32:
    """(M,) scores of text vectors (M, D) with one clip (T, D), by `mean` or `rescore`."""
    clip = Clips([rows])
    if material.options.score == "mean":
        blocks = mean_blocks(vectors, clip)
    else:
        blocks = rescore_blocks(vectors, clip, material.encoder.spec.temperature)
    return np.concatenate([block for _, block in blocks])[:, 0]
