"""Text in, videos and moments out.

The index proposes the videos whose moments are nearest to the query; then FineCo scores each of them again with the
query against its stored frames (docs/METHOD.md section 3), which also gives the moments that match.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from indexes.candidates import propose_videos
from indexes.generations import current_generation
from indexes.id_map import Int32, video_key
from indexes.search import VectorIndex
from models.base import Encoder
from pipeline import store
from pipeline.collection import Collection
from pipeline.commits import EMBEDDINGS, INDEX
from pipeline.config import clean_line
from pipeline.embed import encode_texts
from pipeline.errors import IntegrityError, UsageError
from pipeline.lookup import LOOKUP_FILE, Lookup
from pipeline.rescore import find_moments, rescore, score_frames
from pipeline.types import Float32, Hit, VideoEmbedding

CANDIDATES_PER_HIT = 4  # when more hits are asked for than a first page, which has as many as the index says
MAX_OPEN_SHARDS = 64


class Searcher:
    """A collection ready to be searched; use as a context manager.

    Args:
        collection: What to search.
        encoder: The encoder the collection was made with; only its text side is used.

    Raises:
        UsageError: No index yet, or another encoder.
        IntegrityError: The index is damaged.
    """

    def __init__(self, collection: Collection, encoder: Encoder) -> None:
        self._encoder = encoder
        self._folder = collection.folder
        generation = current_generation(collection.folder / INDEX)
        self._index = VectorIndex.open(generation, encoder.spec.fingerprint)
        self.selection: str = self._index.sidecar.selection
        self._lookup = Lookup(generation / LOOKUP_FILE)
        self._shards: dict[int, store.EmbeddingsShard] = {}

    def __enter__(self) -> Searcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files."""
        self._lookup.close()
        for shard in self._shards.values():
            shard.close()
        self._shards.clear()

    def __len__(self) -> int:
        return len(self._lookup)

    def search(
        self,
        queries: Sequence[str],
        k: int = 10,
        threshold: float | None = None,
        rescoring: bool = True,
        by_moment: bool = False,
    ) -> list[list[Hit]]:
        """The best `k` videos for each query, best first.

        Args:
            threshold: Least score (cosine) of a hit.
            rescoring: False ranks by the index alone: by the nearest moment's vector; hits then have no moments.
            by_moment: The best `k` moments of the candidates instead, several of a video: hits of one moment each. What
                matches and meets is one.

        Raises:
            UsageError: A query that is empty, too long or not text; k below 1; moments without re-scoring.
            FinecoError: The encoder gives a query no vector that can be compared.
        """
        if k < 1:
            raise UsageError(f"-k {k}: ask for at least one hit")
        if by_moment and not rescoring:
            raise UsageError("moments are found by re-scoring: they cannot be had without it")
        queries = [clean_line(query, f"query {n}") for n, query in enumerate(queries, 1)]
        vectors = np.concatenate([encode_texts(self._encoder, [query]) for query in queries])
        n_candidates = max(self._index.sidecar.report.candidates, CANDIDATES_PER_HIT * k) if rescoring else k
        answers = []
        for vector, (videos, cosines) in zip(vectors, self.candidates(vectors, n_candidates), strict=True):
            if not rescoring:
                found = self._plain(videos, cosines)
            elif by_moment:
                found = _one_by_one(self._rescored(vector, videos.tolist(), len(videos), True))
            else:
                found = self._rescored(vector, videos.tolist(), k)
            answers.append([hit for hit in found[:k] if threshold is None or hit.score >= threshold])
        return answers

    def candidates(self, vectors: Float32, n_videos: int) -> list[tuple[Int32, Float32]]:
        """What the index proposes for queries (Q, D): numbers of videos (C,), and the cosines of their nearest moments,
        best first."""
        return propose_videos(self._index.search, self._lookup.id_map, vectors, n_videos)

    def _plain(self, videos: NDArray[np.int32], cosines: Float32) -> list[Hit]:
        hits = []
        for rank, (video, cosine) in enumerate(zip(videos.tolist(), cosines.tolist(), strict=True), 1):
            shard, row, path = self._find(video)
            hits.append(Hit(rank, shard.video_ids[row], path, cosine))
        return hits

    def _rescored(self, query: Float32, videos: list[int], k: int, all_moments: bool = False) -> list[Hit]:
        """The best `k` of the candidates by FineCo's score of their stored frames against the query, with the moments
        that match, or all."""
        candidates: list[tuple[VideoEmbedding, str, float]] = []
        frame_scores = []
        for video in sorted(videos, key=self._lookup.place):  # shard by shard
            shard, row, path = self._find(video)
            embedding = shard.embedding(row)
            frame_scores.append(score_frames(query, embedding.features))
            candidates.append((embedding, path, float(shard.durations[row])))
        if not candidates:
            return []
        background, temperature = self._lookup.background.of(query), self._encoder.spec.temperature
        offsets = np.cumsum([0, *map(len, frame_scores)])
        scores = rescore(np.concatenate(frame_scores), offsets, temperature).tolist()
        order = sorted(range(len(scores)), key=lambda i: (-scores[i], candidates[i][0].video_id))
        hits = []
        for rank, i in enumerate(order[:k], 1):
            embedding, path, duration = candidates[i]
            found = (embedding.moments, embedding.span_seconds, background, temperature, duration or None, all_moments)
            moments = find_moments(frame_scores[i], *found)
            hits.append(Hit(rank, embedding.video_id, path, scores[i], moments))
        return hits

    def _find(self, video: int) -> tuple[store.EmbeddingsShard, int, str]:
        """The shard that has a video, its row there, and where it is; another video in that row is damage."""
        number, row, path = self._lookup.find(video)
        shard = self._shards.pop(number, None)
        if shard is None:
            shard = store.EmbeddingsShard(self._folder / EMBEDDINGS / self.selection / f"{number:06d}.h5")
            if len(self._shards) >= MAX_OPEN_SHARDS:
                self._shards.pop(next(iter(self._shards))).close()
        self._shards[number] = shard  # last used last
        if row >= len(shard) or video_key(shard.video_ids[row]) != self._lookup.id_map.keys[video]:
            raise IntegrityError(
                f"{shard.path}: row {row} is not the video that the index names", "Run 'fineco verify'."
            )
        return shard, row, path


def _one_by_one(hits: Sequence[Hit]) -> list[Hit]:
    """Every moment as a hit of its own, best first; of equal scores those of the better video first."""
    found = [replace(hit, score=moment.score, moments=(moment,)) for hit in hits for moment in hit.moments]
    ranked = sorted(found, key=lambda hit: -hit.score)
    return [replace(hit, rank=rank) for rank, hit in enumerate(ranked, 1)]
