"""One run of the study: a head trained on videos of one noise share, then searched for in many ways.

The training is fineco's own (pipeline.training), and so are selection, pooling and re-scoring: what is measured here is
what `fineco train`, `fineco select` and `fineco search` compute, on features held in memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.noise_share_videos import N_FRAMES, Mask, Noise, Split, compose
from models.base import Encoder
from models.builtin.world import COLOURS, SHAPES
from models.fineco import FineCoHead, HeadConfig
from models.losses import Form
from models.scorer import score_frames_without_text
from pipeline.evaluate import rank_rows
from pipeline.moments import pool
from pipeline.rescore import rescore
from pipeline.select import Keep, select_frames
from pipeline.training.examples import Examples
from pipeline.training.loop import train
from pipeline.training.options import ObjectiveOptions, TrainOptions
from pipeline.training.scorer import Lesson, distil, lesson
from pipeline.types import Float32, Float64, FrameFeatures, TimedText

KEEP = Keep(count=4)  # of 32 frames, for every selector but `all`: an eighth
TEST_SEED = 0  # the same test videos for every run
TOPICS = [f"{'an' if colour[0] == 'o' else 'a'} {colour} {shape}" for colour in COLOURS for shape in SHAPES]
TEMPERATURE = 0.07  # a new head's, as CLIP's was; a residual head starts with the encoder's own

HeadKind = Literal["new", "residual", "none"]
Hits = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Budget:
    """What every training gets, whatever its loss; `long_` is for the runs that are trained longer and faster."""

    epochs: int = 15
    batch_size: int = 128
    lr: float = 2.5e-4
    long_epochs: int = 25
    long_lr: float = 3e-3
    width: int = 128
    layers: int = 1
    intermediate: int = 256
    dropout: float = 0.1


@dataclass(frozen=True, slots=True)
class Setup:
    """What distinguishes a run.

    Attributes:
        noise: What the frames beside the subject show.
        n_relevant: Frames of each video that show the subject, in training and in the test.
        head: `new`: a head that must learn from the videos which frames and words belong together; `residual`: one
            that corrects the encoder's vectors; `none`: the encoder alone, nothing is trained.
        weight, ratio, form: Of the frame loss; weight 0 is VideoCLIP's loss alone.
        warmup, average: Its two remedies: share of the training over which the weight grows; decay of the
            moving-average copy that chooses the positives.
        long: Trained longer and faster (see `Budget`).
        seed: Of the head's start, the training videos' composition, and the order.
    """

    noise: Noise
    n_relevant: int
    head: HeadKind = "new"
    weight: float = 0.0
    ratio: float = 0.25
    form: Form = "each"
    warmup: float = 0.0
    average: float = 0.0
    long: bool = False
    seed: int = 0

    @property
    def key(self) -> str:
        """A name for the run, the same in every process."""
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True, slots=True)
class Texts:
    """Vectors of the built-in encoder for a split's captions and queries (S, D)."""

    captions: Float32
    queries: Float32


@dataclass(frozen=True, slots=True)
class Material:
    """What all runs share: the bank, its splits, and the vectors of all texts."""

    splits: Mapping[str, Split]
    bank: Float32
    texts: Mapping[str, Texts]
    topics: Float32
    temperature: float  # the encoder's own

    @classmethod
    def of(cls, splits: Mapping[str, Split], bank: Float32, encoder: Encoder) -> Material:
        texts = {
            name: Texts(encoder.encode_text(split.captions), encoder.encode_text(split.queries))
            for name, split in splits.items()
        }
        return cls(splits, bank, texts, encoder.encode_text(TOPICS), encoder.spec.temperature)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of each way to search, whether each query found its video first; and how well the frames were told apart.

    Attributes:
        hits: (S,) by the name of the way.
        frames_found: (S,) of the n frames that show the subject, the share among the n that score highest with the
            caption.
    """

    hits: dict[str, Hits]
    frames_found: Float64


@dataclass(frozen=True, slots=True)
class Tower:
    """A trained head, or the encoder itself, behind three plain functions."""

    head: FineCoHead | None
    temperature: float

    @torch.inference_mode()
    def tokens(self, videos: Float32) -> Float32:
        """(S, T, D) features -> (S, T, d) unit rows."""
        if self.head is None:
            return videos
        mask = torch.ones(videos.shape[:2], dtype=torch.bool)
        rows: Float32 = self.head.encode_video(torch.from_numpy(videos), mask).tokens.numpy()
        return rows

    @torch.inference_mode()
    def texts(self, vectors: Float32) -> Float32:
        """(M, D) text vectors -> (M, d) unit rows."""
        if self.head is None:
            return vectors
        rows: Float32 = self.head.encode_text(torch.from_numpy(vectors)).numpy()
        return rows


def fit(setup: Setup, budget: Budget, material: Material) -> Tower:
    """Trains what the setup says, on the training split."""
    if setup.head == "none":
        return Tower(None, material.temperature)
    rows, _ = compose(material.splits["train"], setup.noise, setup.n_relevant, 1 + setup.seed)
    examples = Examples.of_arrays(list(material.bank[rows]), material.texts["train"].captions)
    residual = setup.head == "residual"
    dim = material.bank.shape[1]
    config = HeadConfig(
        input_dim=dim,
        text_dim=dim,
        dim=dim,
        width=budget.width,
        layers=budget.layers,
        intermediate=budget.intermediate,
        max_tokens=N_FRAMES,
        dropout=budget.dropout,
        residual=residual,
        temperature=material.temperature if residual else TEMPERATURE,
    )
    objective = ObjectiveOptions(
        frame_weight=setup.weight,
        ratio=setup.ratio,
        form=setup.form,
        weight_warmup=setup.warmup,
        frame_ema=setup.average,
    )
    options = TrainOptions(
        epochs=budget.long_epochs if setup.long else budget.epochs,
        batch_size=budget.batch_size,
        lr=budget.long_lr if setup.long else budget.lr,
        seed=setup.seed,
        objective=objective,
    )
    torch.manual_seed(setup.seed)
    head = FineCoHead(config)
    train(head, examples, options)
    return Tower(head, 1 / float(head.logit_scale().detach()))


def measure(tower: Tower, setup: Setup, material: Material, split: str = "test", scorer: bool = False) -> Outcome:
    """Every way to search a split's videos.

    Args:
        scorer: Also distil a scorer from the training videos' captions, and select by it.
    """
    rows, relevant = compose(material.splits[split], setup.noise, setup.n_relevant, TEST_SEED)
    texts = material.texts[split]
    captions, queries = tower.texts(texts.captions), tower.texts(texts.queries)
    videos = frame_features(tower, material.bank[rows])
    topics = tower.texts(material.topics)
    predicted: list[Float32 | None] = [None] * len(videos)
    selectors = ["all", "uniform", "topics", "caption"]
    if scorer:
        distilled = distil(*lessons(tower, setup, material), seed=setup.seed)
        predicted = [score_frames_without_text(distilled, video.features) for video in videos]
        selectors.append("scorer")
    frame_scores = queries @ np.concatenate([video.features for video in videos]).T
    hits = {"text": first_hits(queries @ captions.T)}
    for selector in selectors:
        kept, vectors = [], []
        for number, video in enumerate(videos):
            own = captions[number : number + 1] if selector == "caption" else topics
            words = [TimedText("caption")] if selector == "caption" else [TimedText(topic) for topic in TOPICS]
            if selector not in ("caption", "topics"):
                words, own = [], own[:0]
            selection = select_frames(video, selector, KEEP, words, own, predicted[number])
            kept.append(selection.kept)
            vectors.append(pool(video.features[selection.kept], selection.scores[selection.kept]))
        hits[selector] = first_hits(queries @ np.stack(vectors).T)
        offsets = np.concatenate([[0], np.cumsum([k.sum() for k in kept])])
        stored = frame_scores[:, np.concatenate(kept)]
        hits[f"{selector}, re-scored"] = first_hits(np.stack([rescore(s, offsets, tower.temperature) for s in stored]))
    scores = np.einsum("std,sd->st", np.stack([video.features for video in videos]), captions)
    return Outcome(hits, frames_found(scores, relevant))


def frame_features(tower: Tower, videos: Float32) -> list[FrameFeatures]:
    """The tower's tokens of each video, one a second."""
    seconds = np.arange(videos.shape[1], dtype=np.float64)
    return [FrameFeatures(str(n), tokens, seconds, 1.0) for n, tokens in enumerate(tower.tokens(videos))]


def lessons(tower: Tower, setup: Setup, material: Material) -> tuple[list[Lesson], list[Lesson]]:
    """What the captions of training and of validation teach a scorer about their videos."""
    taught = []
    for name, seed in (("train", 1 + setup.seed), ("validation", TEST_SEED)):
        rows, _ = compose(material.splits[name], setup.noise, setup.n_relevant, seed)
        captions = tower.texts(material.texts[name].captions)
        videos = frame_features(tower, material.bank[rows])
        found = [
            lesson(video, [TimedText("caption")], z[None], KEEP) for video, z in zip(videos, captions, strict=True)
        ]
        taught.append([one for one in found if one is not None])
    return taught[0], taught[1]


def first_hits(scores: NDArray[np.floating]) -> Hits:
    """(S,): whether column i is the best of row i; a tie is none."""
    hits: Hits = rank_rows(scores).average <= 1
    return hits


def frames_found(scores: Float32, relevant: Mask) -> Float64:
    """(S,): of each video's n relevant frames, the share among the n highest scores."""
    n = int(relevant[0].sum())
    best = np.argsort(-scores, axis=1, kind="stable")[:, :n]
    found: Float64 = np.take_along_axis(relevant, best, axis=1).mean(axis=1)
    return found


def line_of(setup: Setup, outcome: Outcome) -> str:
    """A run as one line of JSON: bits as hexadecimal digits."""
    hits = {name: np.packbits(bits).tobytes().hex() for name, bits in outcome.hits.items()}
    found = float(outcome.frames_found.mean())
    return json.dumps({"setup": asdict(setup), "n": len(outcome.frames_found), "hits": hits, "frames found": found})


def read_lines(lines: Sequence[str]) -> dict[str, tuple[Setup, dict[str, Hits], float]]:
    """Runs by key; a line that was cut off by a kill is no run."""
    runs = {}
    for line in lines:
        try:
            run = json.loads(line)
        except ValueError:
            continue
        setup = Setup(**run["setup"])
        bits = {
            name: np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8))[: run["n"]].astype(np.bool_)
            for name, text in run["hits"].items()
        }
        runs[setup.key] = (setup, bits, float(run["frames found"]))
    return runs
