"""The demo at scale: many videos composed of features that painted scenes have, and what proposes the right ones.

Nothing is rendered. A shot is the features of the frames of one scene; a video is a row of shots, each shown in part.
Every scene that is asked for stands once, in one video; all others come as often as chance will have it. The videos
become a collection like any other, and each way to propose candidates is compared with the exhaustive search, which
scores every kept frame of every video.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from indexes.generations import current_generation, read_sidecar
from models.base import Encoder
from pipeline import store
from pipeline.collection import CONFIG_FILE, Collection, Snapshot, this_command
from pipeline.commands import Machine
from pipeline.commits import EMBEDDINGS, FEATURES, INDEX, Row
from pipeline.config import SelectOptions
from pipeline.embed import encode_texts
from pipeline.errors import FinecoError
from pipeline.files import FileRecord
from pipeline.gallery import FrameBlock, Gallery
from pipeline.lock import LOCK_FILE, Lock
from pipeline.rescore import rescore
from pipeline.search import Searcher
from pipeline.types import Bool, Float32, FrameFeatures, Int64, Outcome, TimedText

SELECT = SelectOptions("uniform", "0.25")
SHORTEST_SHOT = 2  # frames of a shot that a video shows at least
EMPTY_SHARE = 1 / 3  # of the shots, where there are empty ones
VIDEOS_PER_COMMIT = 500
SECONDS_A_FRAME = 1.0
N_HITS = 5
MADE_BY = {"made_by": "fineco demo"}  # in the configuration: what is composed here may be replaced without a question
BAR = 0.97  # of what the exhaustive search finds, what the index and the search must find
HEADER = ("what proposes candidates", "vectors a video", "the candidates hold it", "R@1", "R@5")


@dataclass(frozen=True, slots=True)
class Shots:
    """What videos are composed of: for each shot the features (n, D), float32 unit rows, in order of time.

    Attributes:
        asked: Of the Q scenes that are asked for, one shot each.
        others: Of other scenes.
        empty: Of no scene at all; may be none.
    """

    asked: Sequence[Float32]
    others: Sequence[Float32]
    empty: Sequence[Float32] = ()


@dataclass(frozen=True, slots=True)
class Found:
    """What one way to propose candidates finds: `held` is the share of the queries whose video is a candidate, and R@k
    of those whose video is among the k best after re-scoring; `vectors` is how many are compared, a video."""

    name: str
    vectors: float
    held: float
    recall_at_1: float
    recall_at_5: float

    @classmethod
    def of(cls, name: str, vectors: float, held: Bool, ranks: Int64) -> Found:
        """From what is known of each query: whether the candidates hold its video (Q,), and that video's rank (Q,)."""
        return cls(name, vectors, float(held.mean()), float((ranks <= 1).mean()), float((ranks <= N_HITS).mean()))

    def cells(self) -> list[str]:
        return [
            self.name,
            f"{self.vectors:.1f}",
            *(f"{x:.3f}" for x in (self.held, self.recall_at_1, self.recall_at_5)),
        ]


@dataclass(frozen=True, slots=True)
class Comparison:
    """The rows of the table: one mean of each video, its moments, and all of its kept frames."""

    mean: Found
    moments: Found
    exhaustive: Found

    @property
    def ratios(self) -> tuple[float, float]:
        """How often the candidates by moments hold the right video, and how often it comes out first, both as a part of
        how often it comes first exhaustively."""
        best = max(self.exhaustive.recall_at_1, 1e-9)
        return self.moments.held / best, self.moments.recall_at_1 / best

    @property
    def met(self) -> bool:
        return min(self.ratios) >= BAR


def compose(shots: Shots, n_scenes: Sequence[int], seed: int) -> tuple[list[Float32], NDArray[np.intp]]:
    """Features of videos with so many shots each, drawn from `seed`; a shot shows its first frames, 2 to all of them.

    Returns:
        For each video its (N, D), and for each query scene the number of its video (Q,).
    """
    rng = np.random.default_rng(seed)
    ends = np.cumsum(n_scenes)
    total, n_asked, n_others = int(ends[-1]), len(shots.asked), len(shots.others)
    shown = n_asked + rng.integers(n_others, size=total)
    if shots.empty:
        empty = n_asked + n_others + rng.integers(len(shots.empty), size=total)
        shown = np.where(rng.random(total) < EMPTY_SHARE, empty, shown)
    places = rng.choice(total, n_asked, replace=False)
    shown[places] = np.arange(n_asked)
    bank = [*shots.asked, *shots.others, *shots.empty]
    longest = np.array([len(shot) for shot in bank])[shown]
    lengths = rng.integers(np.minimum(SHORTEST_SHOT, longest), longest + 1).tolist()
    parts = [bank[shot][:length] for shot, length in zip(shown.tolist(), lengths, strict=True)]
    videos = [np.concatenate(parts[end - n : end]) for end, n in zip(ends.tolist(), n_scenes, strict=True)]
    return videos, np.searchsorted(ends, places, side="right")


def video_name(number: int) -> str:
    """The id of a composed video."""
    return f"composed-{number:06d}"


def write_composed(
    folder: Path, videos: Sequence[Float32], encoder: Encoder, texts: Sequence[str] | None = None
) -> Collection:
    """A new collection with the features (N, D) of some videos, in the place of an earlier one that was made here.

    Args:
        texts: Beside each video; None: there are none.

    Raises:
        FinecoError: There is something else in `folder`, or somebody else writes to it.
    """
    _remove_earlier(folder)
    config = {
        **MADE_BY,
        "model": encoder.spec.name,
        "precision": encoder.precision,
        "sampling": {"mode": "fps", "value": 1 / SECONDS_A_FRAME},
        "exact_resize": False,
    }
    collection = Collection.create(folder, config)
    record = {
        "name": encoder.spec.name,
        "fingerprint": encoder.spec.fingerprint,
        "precision": encoder.precision,
        "spec": asdict(encoder.spec),
    }
    collection.update(config, record)
    with collection.writing(this_command()) as writer:
        for start in range(0, len(videos), VIDEOS_PER_COMMIT):
            rows, stored = [], []
            for number, features in enumerate(videos[start : start + VIDEOS_PER_COMMIT], start):
                name, duration = video_name(number), SECONDS_A_FRAME * len(features)
                times = SECONDS_A_FRAME * np.arange(len(features), dtype=np.float64)
                of_frames = FrameFeatures(name, store.round_features(features), times, SECONDS_A_FRAME)
                stored.append((store.StoredVideo(name, name, duration), of_frames))
                outcome = Outcome(name, f"composed/{number:06d}", "ok", "embed")
                beside = (TimedText(texts[number]),) if texts else ()
                rows.append(Row(outcome, name, 0, 0, 0, duration, beside))
            writer.commit("embed", rows, [(FEATURES, _write_features(stored))])
    return collection


def _write_features(rows: Sequence[tuple[store.StoredVideo, FrameFeatures]]) -> Callable[[Path], FileRecord]:
    return lambda path: store.write_features(path, rows)


def _remove_earlier(folder: Path) -> None:
    if not Collection.exists(folder):
        return
    if any(Collection(folder).config.get(name) != value for name, value in MADE_BY.items()):
        raise FinecoError(f"{folder} is a collection that is not the demo's", "Choose another place with --folder.")
    last = (CONFIG_FILE, LOCK_FILE)  # what it is known by, should this be cut short
    with Lock(folder, this_command()):
        for path in sorted(folder.iterdir(), key=lambda path: path.name in last):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def index_composed(collection: Collection, encoder: Encoder, machine: Machine) -> None:
    """Builds the index of the selection in use, and says what `fineco index` would say."""
    from pipeline.indexing import build_collection_index

    with collection.writing(this_command()) as writer:  # there are no files, so none could be gone
        report = build_collection_index(writer, "auto", None, machine.say, bury=False, get_encoder=lambda: encoder)
    if report is not None:
        machine.say(report.describe())


def compare(collection: Collection, queries: Sequence[str], owners: Sequence[str], encoder: Encoder) -> Comparison:
    """Measures an indexed collection.

    Args:
        queries: Q texts.
        owners: For each the id of the one right video.
    """
    selection = collection.current_selection() or ""
    snapshot = Snapshot(collection)
    gallery = Gallery(snapshot, selection)
    number_of = {video_id: number for number, video_id in enumerate(gallery.video_ids)}
    right = np.array([number_of[owner] for owner in owners])
    vectors = np.concatenate([encode_texts(encoder, [query]) for query in queries])
    scores, n_frames = score_all(vectors, gallery.frames(len(gallery)), len(gallery), encoder.spec.temperature)
    n_candidates = read_sidecar(current_generation(collection.folder / INDEX)).report.candidates

    by_mean = nearest(vectors @ _means(snapshot, selection, number_of).T, n_candidates)
    held = by_mean[np.arange(len(right)), right]
    mean = Found.of("one mean per video", 1.0, held, ranks_of(np.where(by_mean, scores, -np.inf), right))

    everything = np.ones(len(right), np.bool_)
    kept = "every kept frame of every video (exhaustive)"
    exhaustive = Found.of(kept, n_frames / len(gallery), everything, ranks_of(scores, right))

    with Searcher(collection, encoder) as searcher:
        proposed = searcher.candidates(vectors, n_candidates)
        answers = [[hit.video_id for hit in hits] for hits in searcher.search(queries, N_HITS)]
    held = np.array([number in videos for number, (videos, _) in zip(right, proposed, strict=True)])
    pairs = zip(owners, answers, strict=True)
    ranks = np.array([ids.index(owner) + 1 if owner in ids else N_HITS + 1 for owner, ids in pairs])
    moments = Found.of("moments", len(gallery.id_map) / len(gallery), held, ranks)
    return Comparison(mean, moments, exhaustive)


def score_all(queries: Float32, blocks: Iterable[FrameBlock], n_videos: int, temperature: float) -> tuple[Float32, int]:
    """Every video scored with every query (Q, D) by all of its frames, as a search scores its candidates: (Q, V), and
    how many frames there were."""
    scores, n_frames = np.empty((len(queries), n_videos), np.float32), 0
    for block in blocks:
        scores[:, block.videos] = rescore(queries @ block.features.T, block.offsets, temperature)
        n_frames += len(block.features)
    return scores, n_frames


def nearest(cosines: Float32, n: int) -> Bool:
    """Which are the `n` highest in each row of (Q, V)."""
    chosen = np.zeros(cosines.shape, np.bool_)
    np.put_along_axis(chosen, np.argsort(-cosines, axis=1, kind="stable")[:, :n], True, axis=1)
    return chosen


def ranks_of(scores: Float32, right: NDArray[np.integer]) -> Int64:
    """(Q,) the rank, from 1, of the right video of each query among all (Q, V); videos that score as well come first,
    and so do all where it is no candidate (minus infinity)."""
    own = scores[np.arange(len(right)), right]
    ranks: Int64 = (scores >= own[:, None]).sum(axis=1)
    return ranks


def _means(snapshot: Snapshot, selection: str, number_of: dict[str, int]) -> Float32:
    """(V, D) the pooled vectors of the videos, one a video, in the order of the gallery."""
    folder = snapshot.collection.folder / EMBEDDINGS / selection
    places = snapshot.state.places[f"{EMBEDDINGS}/{selection}"]
    parts, numbers = [], list[int]()
    for commit in sorted({place.commit for place in places.values()}):
        with store.EmbeddingsShard(folder / f"{commit:06d}.h5") as shard:
            parts.append(shard.vectors())
            numbers += [number_of[video_id] for video_id in shard.video_ids]
    vectors = np.concatenate(parts)
    means: Float32 = np.empty_like(vectors)
    means[numbers] = vectors
    return means
