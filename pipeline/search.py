"""Text in, videos and moments out.

The index proposes candidates by their pooled vectors; then FineCo scores each candidate again with the query against
its stored frames (docs/METHOD.md section 3), which also gives the moments.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

import numpy as np

from indexes.generations import current_generation
from indexes.search import VectorIndex
from models.base import Encoder
from pipeline import store
from pipeline.collection import Collection
from pipeline.commits import EMBEDDINGS, INDEX
from pipeline.config import clean_line
from pipeline.embed import encode_texts
from pipeline.errors import IntegrityError, UsageError
from pipeline.lookup import LOOKUP_FILE, Lookup, index_id
from pipeline.rescore import find_moments, rescore, score_frames
from pipeline.types import Float32, Hit, VideoEmbedding

CANDIDATES = 100  # for a first page of answers; more when more answers are asked for
CANDIDATES_PER_HIT = 4
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
        self, queries: Sequence[str], k: int = 10, threshold: float | None = None, rescoring: bool = True
    ) -> list[list[Hit]]:
        """The best `k` videos for each query, best first.

        Args:
            threshold: Least score (cosine) of a hit.
            rescoring: False ranks by the pooled vectors alone; hits then have no moments.

        Raises:
            UsageError: A query that is empty, too long or not text; or k below 1.
            FinecoError: The encoder gives a query no vector that can be compared.
        """
        if k < 1:
            raise UsageError(f"-k {k}: ask for at least one hit")
        queries = [clean_line(query, f"query {n}") for n, query in enumerate(queries, 1)]
        n_candidates = max(CANDIDATES, CANDIDATES_PER_HIT * k) if rescoring else k
        vectors = np.concatenate([encode_texts(self._encoder, [query]) for query in queries])
        answers = []
        for vector, (ids, scores) in zip(vectors, self._index.search(vectors, n_candidates), strict=True):
            found = self._rescored(vector, ids.tolist()) if rescoring else self._plain(ids.tolist(), scores.tolist())
            answers.append([hit for hit in found[:k] if threshold is None or hit.score >= threshold])
        return answers

    def _plain(self, ids: list[int], scores: list[float]) -> list[Hit]:
        hits = []
        for rank, (identifier, score) in enumerate(zip(ids, scores, strict=True), 1):
            number, row, path = self._lookup.find(identifier)
            hits.append(Hit(rank, self._shard(number, row, identifier).video_ids[row], path, float(score)))
        return hits

    def _rescored(self, query: Float32, ids: list[int]) -> list[Hit]:
        """Candidates ranked by FineCo's score of their stored frames against the query."""
        candidates: list[tuple[VideoEmbedding, str, float]] = []
        frame_scores = []
        for (number, row, path), identifier in sorted((self._lookup.find(i), i) for i in ids):
            shard = self._shard(number, row, identifier)
            embedding = shard.embedding(row)
            frame_scores.append(score_frames(query, embedding.features))
            candidates.append((embedding, path, float(shard.durations[row])))
        if not candidates:
            return []
        background = float(np.median(np.concatenate(frame_scores)))
        offsets = np.cumsum([0, *map(len, frame_scores)])
        scores = rescore(np.concatenate(frame_scores), offsets, self._encoder.spec.temperature).tolist()
        order = sorted(range(len(scores)), key=lambda i: (-scores[i], candidates[i][0].video_id))
        hits = []
        for rank, i in enumerate(order, 1):
            embedding, path, duration = candidates[i]
            moments = find_moments(
                frame_scores[i], embedding.pts_seconds, embedding.span_seconds, background, duration or None
            )
            hits.append(Hit(rank, embedding.video_id, path, scores[i], moments))
        return hits

    def _shard(self, number: int, row: int, identifier: int) -> store.EmbeddingsShard:
        """The shard that has a video in this row, opened unless it is; another video there is damage."""
        shard = self._shards.pop(number, None)
        if shard is None:
            shard = store.EmbeddingsShard(self._folder / EMBEDDINGS / self.selection / f"{number:06d}.h5")
            if len(self._shards) >= MAX_OPEN_SHARDS:
                self._shards.pop(next(iter(self._shards))).close()
        self._shards[number] = shard  # last used last
        if row >= len(shard) or index_id(shard.video_ids[row]) != identifier:
            raise IntegrityError(
                f"{shard.path}: row {row} is not the video that the index names", "Run 'fineco verify'."
            )
        return shard
