"""The one protocol every encoder follows; the stages know nothing else of a model."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol, runtime_checkable

from pipeline.types import Float32, FrameGeometry, UInt8

PREPROCESSING_VERSION = 1  # raise it when the same pixels would give other vectors

_WORD = re.compile(r"\w")


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """What an encoder is, to the last fact that changes its vectors.

    Attributes:
        name: As the user names it, e.g. `open_clip:PE-Core-B-16/meta`.
        dim: Length of a vector (D).
        geometry: How a frame becomes the input (without `exact`, which belongs to the collection).
        mean, std: Per channel, of pixels scaled to [0, 1].
        window: Frames per vector (1: an image encoder).
        temperature: Of the contrastive loss it was trained with (1 / logit scale); FineCo's scores are cosine / it.
        context_length: Longest text in tokens.
        weights_sha256: Of the weights file.
        licence: Of the weights, as their publisher states it.
        fps: Sampled frames per second that it demands (30 for S3D's windows); None: any.
    """

    name: str
    dim: int
    geometry: FrameGeometry
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    window: int
    temperature: float
    context_length: int
    weights_sha256: str
    licence: str
    fps: float | None = None

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides the vectors; two encoders with one fingerprint are interchangeable."""
        facts = asdict(self)
        for word_only in ("name", "licence"):  # the same weights under another name are the same encoder
            del facts[word_only]
        if self.fps is None:
            del facts["fps"]  # so that an encoder that demands none keeps the fingerprint it had before there was one
        facts["preprocessing"] = PREPROCESSING_VERSION
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


class Encoder(Protocol):
    """Frames and text to unit vectors of one space."""

    spec: EncoderSpec
    device: str  # as torch names it: "cpu", "cuda:0"
    precision: str  # "fp32" or "bf16"

    def encode_frames(self, frames: UInt8) -> Float32:
        """(B, H, W, 3) uint8 RGB of the spec's geometry -> (B, D) float32 unit rows.

        An encoder whose window W is above 1 takes (B, window, H, W, 3): a row for each window of frames.

        Raises torch's out-of-memory error when B is too large for the device; the caller halves the batch.
        """
        ...

    def encode_text(self, texts: Sequence[str]) -> Float32:
        """B texts -> (B, D) float32 unit rows. A text longer than the context is cut."""
        ...


@runtime_checkable
class TextReader(Protocol):
    """An encoder that can say how it reads a text."""

    def caution(self, text: str) -> str:
        """What a reader of the answers should know, e.g. that only a part of the text is read; else ""."""
        ...


@runtime_checkable
class VideoEncoder(Encoder, Protocol):
    """An encoder whose vectors depend on the whole video: another encoder's rows go through a video transformer.

    `encode_frames` is the base's, and gives its rows; `spec` describes the rows of `encode_video`.
    """

    base: Encoder

    def encode_video(self, features: Float32) -> Float32:
        """(N, base.spec.dim) unit rows of one whole video, in order of time -> (N, D) float32 unit rows."""
        ...

    def score_pairs(self, texts: Sequence[str], clips: Sequence[Float32]) -> Float32:
        """M texts, C clips as their base's rows (T_c, base.spec.dim) -> (M, C) float32.

        The similarity of text and video that the model was trained with, on its own scale.
        """
        ...


def caution_about(encoder: Encoder, text: str) -> str:
    """What `encoder` says of how it reads a text; "" where there is nothing to say, or it cannot tell."""
    return encoder.caution(text) if isinstance(encoder, TextReader) else ""


def caution_of_length(text: str, tokens: Callable[[str], Sequence[int]]) -> str:
    """That only the start of a text is read, where the tokens that the encoder takes are those of a part of it."""
    whole = tokens(text)
    if not text or tokens(text[:-1]) != whole:
        return ""
    read, end = 0, len(text)  # a start of `end` characters has all the tokens, one of `read` has not
    while end - read > 1:
        middle = (read + end) // 2
        if tokens(text[:middle]) == whole:
            end = middle
        else:
            read = middle
    if not _WORD.search(text, end):
        return ""
    return f"only its first {end} of {len(text)} characters are read"
