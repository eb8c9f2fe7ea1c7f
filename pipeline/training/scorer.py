"""Distils `caption`'s scores into a scorer (models.scorer): videos with text teach what to keep of those without.

The teacher is `pipeline.select.caption` (docs/METHOD.md sections 1 and 2): a frame's score is the highest cosine to a
text that may speak of it. The scorer learns the order of the frames, each video for itself: a softmax over a video's
frames of what it predicts is drawn to one of the teacher's scores. Which videos teach, which say when to stop and which
are measured in the end depends on a hash of each video's id alone, so that a grown collection keeps its division.
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from models.base import Encoder
from models.scorer import HIDDEN, FrameScorer, frame_inputs, save_scorer, score_frames_without_text, video_context
from models.scorer_file import ScorerFacts
from pipeline import store
from pipeline.collection import Collection, Snapshot
from pipeline.commands import Machine
from pipeline.commits import FEATURES
from pipeline.config import DEFAULT_KEEP, check_encoder
from pipeline.embed import encode_texts
from pipeline.errors import UsageError
from pipeline.output import number_of
from pipeline.progress import Progress
from pipeline.select import LEAST_COSINE, Keep, best_first, caption, evenly_spaced, parse_keep
from pipeline.training.checkpoints import write_weights
from pipeline.types import Bool, Float32, FrameFeatures, TimedText, Video

Part = Literal["training", "validation", "held out"]

PARTS = 10  # one video in so many is for validation, and one is held out
BATCH_VIDEOS = 32
BATCH_FRAMES = 128  # at most so many of a video in one step; of a longer one, others each time
SHARPNESS = 2.0  # of the teacher's softmax, whose logits are so many standard deviations of the video's scores
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.05
MAX_EPOCHS, PATIENCE = 60, 6
SAY_SECONDS = 10.0
MOST_FRAMES = 500_000  # held in memory, as float16: 1 GB of 1024 dimensions
COMPARED_FRAMES = 20_000  # that say what the inputs are like
LEAST_SPREAD = 1e-4
MISSING = -1e9  # the logit of a place without a frame


@dataclass(frozen=True, slots=True)
class Lesson:
    """One video with what its captions say.

    Attributes:
        video_id: Decides the part.
        features: (T, D) unit rows as they are stored.
        scores: (T,) caption's; LEAST_COSINE where no text speaks of the frame.
        kept: (T,) caption's choice.
    """

    video_id: str
    features: NDArray[np.float16]
    scores: Float32
    kept: Bool

    @property
    def part(self) -> Part:
        """What the video is for."""
        number = _hash(self.video_id) % PARTS
        return "held out" if number == 0 else "validation" if number == 1 else "training"


@dataclass(frozen=True, slots=True)
class Measures:
    """How well scores without text stand for caption's: means over videos.

    Attributes:
        videos: How many.
        rank_correlation: Spearman's, of the two scores of a video's frames.
        kept_by_scorer: Share of the frames that caption keeps which are among as many that the scorer scores highest.
        kept_by_uniform: The same of evenly spaced frames: the control.
    """

    videos: int
    rank_correlation: float
    kept_by_scorer: float
    kept_by_uniform: float


def _hash(video_id: str) -> int:
    return int.from_bytes(hashlib.sha256(video_id.encode()).digest()[:8], "big")


def lesson(features: FrameFeatures, texts: Sequence[TimedText], vectors: Float32, keep: Keep) -> Lesson | None:
    """What a video teaches; None where no text speaks of any frame, or all frames score alike."""
    selection = caption(features, keep, texts, vectors)
    scores = selection.scores
    if selection.selector != "caption" or scores.max() == scores.min():
        return None
    return Lesson(features.video_id, features.features.astype(np.float16), scores, selection.kept)


def measure(scorer: FrameScorer, lessons: Sequence[Lesson]) -> Measures:
    """Compares a scorer with caption, on videos that it should not have seen."""
    rows = []
    for video in lessons:
        scores = score_frames_without_text(scorer, video.features.astype(np.float32))
        n_kept = int(video.kept.sum())
        evenly = evenly_spaced(len(scores), Keep(count=n_kept))
        shared = video.kept[best_first(scores)[:n_kept]].mean(), video.kept[evenly].mean()
        rows.append((rank_correlation(scores, video.scores), *shared))
    return Measures(len(rows), *(float(mean) for mean in np.mean(rows, axis=0)))


def rank_correlation(a: Float32, b: Float32) -> float:
    """Spearman's: the correlation of the ranks, where equal values share their mean rank; 0 if a side has one rank."""
    ranks = []
    for values in (a, b):
        _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
        rank = (np.cumsum(counts) - (counts - 1) / 2)[which]
        ranks.append(rank - rank.mean())
    x, y = ranks
    norm = np.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / norm) if norm > 0 else 0.0


# ------------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True, slots=True)
class _Frames:
    """Frames of one video: features (T, D), context (D,) and (T, N_STATISTICS), the teacher's logits (T,)."""

    features: Tensor
    mean: Tensor
    statistics: Tensor
    logits: Tensor

    @classmethod
    def of(cls, video: Lesson) -> _Frames:
        """A whole video. What no text speaks of counts as the worst of what one speaks of."""
        features = torch.from_numpy(video.features)
        scores = np.maximum(video.scores, video.scores[video.scores > LEAST_COSINE].min())
        spread = max(float(scores.std()), float(np.finfo(np.float32).eps))
        logits = torch.from_numpy(((scores - scores.mean()) * (SHARPNESS / spread)).astype(np.float32))
        return cls(features, *video_context(features.float()), logits)

    def some(self, n: int, order: torch.Generator) -> _Frames:
        """At most n of them, in the context of all."""
        if len(self.logits) <= n:
            return self
        rows = torch.randperm(len(self.logits), generator=order)[:n]
        return _Frames(self.features[rows], self.mean, self.statistics[rows], self.logits[rows])


def _join(videos: Sequence[_Frames]) -> tuple[Tensor, Tensor, Tensor]:
    """All frames as FrameScorer.score_frames takes them."""
    return (
        torch.cat([video.features for video in videos]).float(),
        torch.cat([video.mean.expand(len(video.logits), -1) for video in videos]),
        torch.cat([video.statistics for video in videos]),
    )


def _loss(scorer: FrameScorer, videos: Sequence[_Frames]) -> Tensor:
    """Cross-entropy of the scorer's softmax over a video's frames against the teacher's, a mean over the videos."""
    scores = torch.split(scorer.score_frames(*_join(videos)), [len(video.logits) for video in videos])
    predicted = pad_sequence(list(scores), batch_first=True, padding_value=MISSING)
    wanted = pad_sequence([video.logits for video in videos], batch_first=True, padding_value=MISSING)
    return torch.nn.functional.cross_entropy(predicted, wanted.softmax(1))


def distil(
    training: Sequence[Lesson],
    validation: Sequence[Lesson],
    seed: int,
    say: Callable[[str], None] = lambda line: None,
) -> FrameScorer:
    """Trains a scorer, on the CPU, until the order of the validation videos' frames has stopped getting better.

    The same lessons and seed on the same machine and libraries give the same scorer.
    """
    order = torch.Generator().manual_seed(seed)
    videos = [_Frames.of(video) for video in training]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        scorer = FrameScorer(videos[0].features.shape[1], HIDDEN)
    inputs = frame_inputs(*_join([video.some(max(1, COMPARED_FRAMES // len(videos)), order) for video in videos]))
    scorer.centre.copy_(inputs.mean(0))
    scorer.spread.copy_(inputs.std(0, correction=0).clamp_min(LEAST_SPREAD))
    optimiser = torch.optim.AdamW(scorer.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    best, best_epoch, weights = -np.inf, 0, scorer.state_dict()
    spoke = time.monotonic()
    for epoch in range(1, MAX_EPOCHS + 1):
        for batch in torch.split(torch.randperm(len(videos), generator=order), BATCH_VIDEOS):
            loss = _loss(scorer, [videos[i].some(BATCH_FRAMES, order) for i in batch.tolist()])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        reached = measure(scorer, validation).rank_correlation
        if time.monotonic() - spoke > SAY_SECONDS:
            say(f"epoch {epoch}: rank correlation {reached:.3f} on {number_of(len(validation), 'other video')}")
            spoke = time.monotonic()
        if reached > best:
            best, best_epoch, weights = reached, epoch, copy.deepcopy(scorer.state_dict())
        elif epoch - best_epoch >= PATIENCE:
            break
    say(f"{number_of(epoch, 'epoch')}; number {best_epoch} was the best on {number_of(len(validation), 'other video')}")
    scorer.load_state_dict(weights)
    return scorer.eval()


# ----------------------------------------------------------------------------------------------------- collections


def read_lessons(snapshot: Snapshot, encoder: Encoder, progress: Progress, say: Callable[[str], None]) -> list[Lesson]:
    """What the videos of a collection teach whose text speaks of their frames, in order of the ids' hashes.

    A collection with more than MOST_FRAMES such frames is sampled: those first in that order are taken.
    """
    videos = {video.video_id: video for video in snapshot.videos(FEATURES) if video.texts}
    lengths: dict[str, int] = {}
    for commit, ids in _by_commit(snapshot, videos):
        with store.FeaturesShard(snapshot.collection.folder / FEATURES / f"{commit:06d}.h5") as shard:
            lengths.update((v, int(np.diff(shard.offsets)[row])) for row, v in enumerate(shard.video_ids) if v in ids)
    taken: dict[str, Video] = {}
    n_frames = 0
    for video_id in sorted(lengths, key=_hash):
        n_frames += lengths[video_id]
        if n_frames > MOST_FRAMES and taken:
            say(f"{len(taken)} of {len(lengths)} videos with text are used: {MOST_FRAMES} frames are enough")
            break
        taken[video_id] = videos[video_id]
    progress.set_total(len(taken))
    keep = parse_keep(DEFAULT_KEEP)
    lessons = []
    for commit, ids in _by_commit(snapshot, taken):
        vectors = encode_texts(encoder, [text.text for v in ids for text in taken[v].texts])
        ends = np.cumsum([len(taken[v].texts) for v in ids])
        own = dict(zip(ids, np.split(vectors, ends[:-1]), strict=True))
        path = snapshot.collection.open_file(f"{FEATURES}/{commit:06d}.h5", snapshot.records)
        with store.FeaturesShard(path) as shard:
            for row, video_id in enumerate(shard.video_ids):
                if video_id in own:
                    features = shard.features(row)
                    lessons.append(lesson(features, taken[video_id].texts, own[video_id], keep))
                    progress.update(videos_done=1, frames=len(features.features))
    return sorted((one for one in lessons if one is not None), key=lambda one: _hash(one.video_id))


def _by_commit(snapshot: Snapshot, videos: dict[str, Video]) -> Iterator[tuple[int, list[str]]]:
    """Numbers of the shards with features of these videos, and the ids in each."""
    places = snapshot.state.places.get(FEATURES, {})
    for number, ids in groupby(sorted(videos, key=lambda v: (places[v].commit, v)), key=lambda v: places[v].commit):
        yield number, list(ids)


def train_scorer(
    folder: Path, output: Path, seed: int = 0, machine: Machine = Machine(), encoder: Encoder | None = None
) -> ScorerFacts:
    """Distils a collection's captions into a scorer for its encoder, and writes it.

    Args:
        folder: A collection whose videos have texts; at least some dozens.
        output: The file to write.
        encoder: Instead of the collection's own, loaded by its name.

    Returns:
        The facts that the file holds; `distilled_from["held_out"]` are the `Measures` of videos it was not trained on.

    Raises:
        UsageError: No features, no texts, too few videos, or `output` is a folder.
        FinecoError: The encoder cannot be loaded, or the file not written.
    """
    snapshot = Snapshot(Collection(folder))
    collection = snapshot.collection
    if output.is_dir():
        raise UsageError(f"{output} is a folder", "Name the file to write: -o scorer.safetensors.")
    if collection.encoder is None:
        raise UsageError(f"{folder} has no features yet", f"Run 'fineco run VIDEOS -c {folder}'.")
    if not any(video.texts for video in snapshot.videos(FEATURES)):
        raise UsageError(
            f"{folder}: no video has a text, and a scorer learns from texts",
            "Put captions or subtitles beside the videos and run again, or take another collection of this encoder.",
        )
    if encoder is None:
        from models.registry import load_encoder

        encoder = load_encoder(collection.config["model"], machine.device, collection.encoder["precision"])
    check_encoder(collection, encoder.spec, encoder.precision)
    with machine.progress() as progress:
        lessons = read_lessons(snapshot, encoder, progress, machine.say)
    parts: dict[Part, list[Lesson]] = {"training": [], "validation": [], "held out": []}
    for one in lessons:
        parts[one.part].append(one)
    if not all(parts.values()):
        found = ", ".join(f"{len(videos)} {part}" for part, videos in parts.items())
        raise UsageError(
            f"{folder}: too few videos whose texts speak of their frames ({found})",
            "A scorer needs some dozens of them at the least, and is better for thousands.",
        )
    machine.say(f"{len(parts['training'])} of {number_of(len(lessons), 'video')} teach")
    scorer = distil(parts["training"], parts["validation"], seed, machine.say)
    facts = facts_of(scorer, encoder, parts, collection.folder.absolute().name, seed)
    write_weights(output, lambda path: save_scorer(path, scorer, facts))
    return facts


def facts_of(
    scorer: FrameScorer, encoder: Encoder, parts: dict[Part, list[Lesson]], source: str, seed: int
) -> ScorerFacts:
    """What the file of a scorer says of it."""
    distilled_from = {
        "source": source,
        "videos": len(parts["training"]),
        "frames": sum(len(video.scores) for video in parts["training"]),
        "validation_videos": len(parts["validation"]),
        "seed": seed,
        "held_out": asdict(measure(scorer, parts["held out"])),
    }
    return ScorerFacts(encoder.spec.name, encoder.spec.fingerprint, scorer.dim, scorer.hidden, distilled_from)
