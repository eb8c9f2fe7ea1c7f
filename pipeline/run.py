"""The streaming executor: videos in, features and selections out, in one pass without frames on disk.

    catalog -> decoding processes -> batches -> encoder -> selection -> shards

`run_videos` does it for `run` and `embed`, `decode_videos` writes frames instead. Both take up where an earlier run
stopped, record each video's outcome, and close a shard after so many videos, so many bytes or about a minute.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain

import numpy as np

from models.base import Encoder, VideoEncoder, caution_about
from pipeline import store
from pipeline.catalog import check_unchanged
from pipeline.collection import Snapshot, Writer
from pipeline.commits import EMBEDDINGS, FEATURES, FRAMES, Row
from pipeline.config import SelectionPlan, check_scorer
from pipeline.decode import DecodedFrame, DecodePool, VideoDecoded, VideoFailed
from pipeline.embed import EmbedEvent, FrameEmbedder, VideoEmbedded, encode_captions, encode_texts
from pipeline.errors import VideoError
from pipeline.interrupts import Interrupts
from pipeline.output import number_of
from pipeline.progress import Progress
from pipeline.sampling import Sampling
from pipeline.select import embed_video, select_frames
from pipeline.stored import stored_features, stored_frames
from pipeline.todo import CHANGED, Counts, Todo
from pipeline.types import (
    DecodeLimits,
    Float32,
    FrameFeatures,
    FrameGeometry,
    Outcome,
    TimedText,
    Video,
    VideoEmbedding,
)

SHARD_VIDEOS = 1000
SHARD_BYTES = 64 << 20
SHARD_SECONDS = 60.0
SKIP_CODES = frozenset({"no_video"})  # not a failure: there is nothing to index


@dataclass(slots=True)
class Summary:
    """What a run did."""

    counts: Counts
    n_ok: int = 0
    n_failed: int = 0
    n_skipped: int = 0
    n_frames: int = 0
    n_kept: int = 0
    video_seconds: float = 0.0
    elapsed_seconds: float = 0.0
    selectors: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    @property
    def any_failed(self) -> bool:
        """Whether a video failed now, or failed before and was not tried again."""
        return bool(self.n_failed or self.counts.failed_now or self.counts.failed_before)

    def lines(self, what: str) -> list[str]:
        """The summary at the end of a run, for a person."""
        lines = []
        if self.n_ok:
            rate = self.video_seconds / self.elapsed_seconds if self.elapsed_seconds else 0.0
            lines.append(
                f"{number_of(self.n_ok, 'video')} {what}: {number_of(self.n_frames, 'frame')} "
                f"of {self.video_seconds / 60:.1f} minutes in "
                f"{self.elapsed_seconds:.1f} s ({self.n_frames / self.elapsed_seconds:.0f} frames/s, "
                f"{rate:.0f} video-hours per hour)"
            )
        if self.n_kept:
            selectors = ", ".join(f"{n} by {selector}" for selector, n in self.selectors.most_common())
            lines.append(f"{self.n_kept} of {self.n_frames} frames kept; videos: {selectors}")
        if self.selectors["uniform"] and self.selectors["caption"]:
            lines.append("videos without text of their own keep frames that cover them (uniform)")
        if self.codes:
            lines.append("not done: " + ", ".join(f"{n} {code}" for code, n in self.codes.most_common()))
        return [*lines, *self.notes]


class _Shard:
    """Finished videos that wait to be written together."""

    def __init__(self, writer: Writer, stage: str, summary: Summary, progress: Progress) -> None:
        self._writer = writer
        self._stage = stage
        self._summary = summary
        self._progress = progress
        self._rows: list[Row] = []
        self._frames: list[store.StoredFrames] = []
        self._features: list[tuple[store.StoredVideo, FrameFeatures]] = []
        self._embeddings: list[tuple[store.StoredVideo, VideoEmbedding]] = []
        self._selection = ""
        self._n_bytes = 0
        self._since = 0.0

    def add_frames(self, decoded: VideoDecoded, frames: store.StoredFrames) -> None:
        self._frames.append(frames)
        self._ok(decoded, len(frames.jpegs), sum(map(len, frames.jpegs)))

    def add_features(self, decoded: VideoDecoded, features: FrameFeatures) -> None:
        self._features.append((_stored(decoded), features))
        self._ok(decoded, len(features.pts_seconds), features.features.nbytes // 2)

    def add_embedding(self, decoded: VideoDecoded, embedding: VideoEmbedding, selection: str) -> None:
        """Goes with `add_features` of the same video, before it."""
        self._embeddings.append((_stored(decoded), embedding))
        self._selection = selection
        self._n_bytes += (embedding.features.nbytes + embedding.moments.vectors.nbytes) // 2
        self._summary.n_kept += len(embedding.features)
        self._summary.selectors[embedding.selector] += 1

    def fail(self, failed: VideoFailed) -> None:
        """Records a video that cannot be done."""
        error = failed.error
        skipped = error.code in SKIP_CODES
        outcome = Outcome(
            failed.video.video_id,
            failed.video.path,
            "skipped" if skipped else "failed",
            error.stage,
            error.code,
            error.message,
            failed.attempt,
            round(failed.seconds, 3),
        )
        self._add(Row.of(failed.video, outcome))
        self._summary.codes[error.code] += 1
        if skipped:
            self._summary.n_skipped += 1
            self._progress.update(skipped=1)
        else:
            self._summary.n_failed += 1
            self._progress.update(failures=1)
            self._progress.note(f"failed: {failed.video.path}: {error.message} [{error.code}]")

    def _ok(self, decoded: VideoDecoded, n_frames: int, n_bytes: int) -> None:
        video = decoded.video
        outcome = Outcome(
            video.video_id,
            video.path,
            "ok",
            self._stage,
            attempts=decoded.attempt,
            seconds=round(decoded.seconds, 3),
            notes=decoded.notes,
        )
        self._n_bytes += n_bytes
        self._summary.n_ok += 1
        self._summary.n_frames += n_frames
        self._summary.video_seconds += decoded.duration_seconds
        self._progress.update(videos_done=1, video_seconds=decoded.duration_seconds)
        self._add(Row.of(video, outcome, decoded.duration_seconds))

    def _add(self, row: Row) -> None:
        if not self._rows:
            self._since = time.monotonic()
        self._rows.append(row)
        self.flush_if_due()

    def flush_if_due(self) -> None:
        full = len(self._rows) >= SHARD_VIDEOS or self._n_bytes >= SHARD_BYTES
        if full or (self._rows and time.monotonic() - self._since >= SHARD_SECONDS):
            self.flush()

    def flush(self) -> None:
        """Writes what is there as one commit. Outcomes that are not ok are in no data file."""
        if not self._rows:
            return
        files = []
        if self._frames:
            files.append((FRAMES, lambda path: store.write_frames(path, self._frames)))
        if self._features:
            files.append((FEATURES, lambda path: store.write_features(path, self._features)))
        if self._embeddings:
            kind = f"{EMBEDDINGS}/{self._selection}"
            files.append((kind, lambda path: store.write_embeddings(path, self._embeddings)))
        self._writer.commit(self._stage, self._rows, files)
        self._rows, self._frames, self._features, self._embeddings = [], [], [], []
        self._n_bytes = 0


def _stored(decoded: VideoDecoded) -> store.StoredVideo:
    return store.StoredVideo(decoded.video.video_id, decoded.video.content, decoded.duration_seconds)


class Selecting:
    """Selects frames by one plan; encodes each video's texts, and the topics once.

    Raises:
        UsageError: The plan's scorer cannot be read or was trained on features of another encoder.
    """

    def __init__(self, plan: SelectionPlan, encoder: Encoder | None) -> None:
        self.plan = plan
        self._encoder = encoder
        self._topic_vectors = None
        self.n_unread = 0  # texts that the encoder reads only a part of, or knows no word of
        if plan.selector == "topics" and encoder is not None:
            self._topic_vectors = encode_texts(encoder, list(plan.topics))
        self._predict: Callable[[Float32], Float32] | None = None
        if plan.scorer is not None:
            from models.scorer import load_scorer, score_frames_without_text

            if encoder is not None:
                check_scorer(plan, encoder.spec.name, encoder.spec.fingerprint)
            self._predict = partial(score_frames_without_text, load_scorer(plan.scorer))

    @property
    def has_encoder(self) -> bool:
        """Whether it can encode texts."""
        return self._encoder is not None

    def select(self, features: FrameFeatures, texts: Sequence[TimedText]) -> VideoEmbedding:
        """Scores, keeps and pools one video. Raises VideoError if its texts cannot be encoded."""
        plan = self.plan
        if plan.selector == "topics":
            topics = [TimedText(topic) for topic in plan.topics]
            selection = select_frames(features, "topics", plan.keep, topics, self._topic_vectors)
        elif plan.selector == "caption" and texts and self._encoder is not None:
            vectors = encode_captions(self._encoder, [t.text for t in texts])
            self.n_unread += sum(bool(caution_about(self._encoder, t.text)) for t in texts)
            selection = select_frames(features, "caption", plan.keep, texts, vectors)
        elif self._predict is not None:
            selection = select_frames(features, "scorer", plan.keep, predicted=self._predict(features.features))
        else:
            selection = select_frames(features, plan.selector, plan.keep)
        return embed_video(features, selection)


def run_videos(
    writer: Writer,
    todo: Todo,
    encoder: Encoder,
    selecting: Selecting | None,
    pool: DecodePool,
    batch_size: int,
    progress: Progress,
    interrupts: Interrupts,
    base: Snapshot | None = None,
) -> Summary:
    """Decodes and embeds what is to do, and selects frames if `selecting`; writes shards.

    Args:
        pool: Decoding processes, started for the encoder's geometry.
        base: A collection with features of the encoder's base, which need not be computed again.

    Raises:
        Interrupted: After the shard in progress was written.
        FinecoError: The disk is full, or decoding processes do not start.
    """
    summary = Summary(todo.counts)
    started = time.monotonic()
    shard = _Shard(writer, "run" if selecting else "embed", summary, progress)
    embedder = FrameEmbedder(encoder, batch_size)
    progress.set_total(todo.counts.to_do)
    try:
        for event in _embed_all(writer, todo, encoder, base, embedder, pool, interrupts.stop):
            if isinstance(event, int):
                progress.update(frames=event)
                shard.flush_if_due()
            elif isinstance(event, VideoFailed):
                _failed(shard, event, progress)
            else:
                _embedded(shard, event, selecting, progress)
        interrupts.check()
    finally:
        shard.flush()
        summary.elapsed_seconds = time.monotonic() - started
    if summary.n_ok and summary.elapsed_seconds > SHARD_SECONDS:
        share = embedder.waited_seconds / summary.elapsed_seconds
        bound = "decoding: more processors or --workers help" if share > 0.5 else "the encoder"
        summary.notes.append(f"the encoder waited {share:.0%} of the time for frames; the run was bound by {bound}")
    if selecting is not None and selecting.n_unread:
        cut = number_of(selecting.n_unread, "text")
        summary.notes.append(f"not wholly read by the encoder (too long, or no word it knows): {cut} beside the videos")
    if embedder.halved_to:
        summary.notes.append(f"the device ran out of memory; batches of {embedder.halved_to} frames fit")
    return summary


def _failed(shard: _Shard, event: VideoFailed, progress: Progress) -> None:
    if event.will_retry:
        progress.note(f"will try again alone: {event.video.path}: {event.error.message}")
    elif event.error.stage == "decode" and not check_unchanged(event.video):
        # no fault of what was found there, and it may come back: to be tried again without being asked
        error = VideoError(CHANGED, "the file changed or went away while it was read; run again")
        shard.fail(replace(event, error=error))
    else:
        shard.fail(event)


def _changed(decoded: VideoDecoded) -> VideoFailed | None:
    """A failure if the file changed while it was read: its frames may be of two different videos."""
    if decoded.from_store or check_unchanged(decoded.video):
        return None
    error = VideoError(CHANGED, "the file changed while it was read; run again")
    return VideoFailed(decoded.video, decoded.attempt, error, False, decoded.seconds)


def _embedded(shard: _Shard, event: VideoEmbedded, selecting: Selecting | None, progress: Progress) -> None:
    changed = _changed(event.decoded)
    if changed:
        shard.fail(changed)
        return
    if selecting:
        try:
            embedding = selecting.select(event.features, event.decoded.video.texts)
        except VideoError as error:
            shard.fail(VideoFailed(event.decoded.video, event.decoded.attempt, error, False, event.decoded.seconds))
            return
        shard.add_embedding(event.decoded, embedding, selecting.plan.name)
    shard.add_features(event.decoded, event.features)


def _embed_all(
    writer: Writer,
    todo: Todo,
    encoder: Encoder,
    base: Snapshot | None,
    embedder: FrameEmbedder,
    pool: DecodePool,
    stop: threading.Event,
) -> Iterator[EmbedEvent]:
    """Every video to do: from its stored features under the encoder's base, from stored frames, or from the video."""

    def source(video: Video) -> str:
        if base is not None and base.state.has(FEATURES, video):
            return "features"
        return "frames" if writer.state.has(FRAMES, video) else "video"

    def videos(wanted: str) -> Iterator[Video]:
        return (video for video in todo.videos() if source(video) == wanted)

    if base is not None and isinstance(encoder, VideoEncoder):
        for event in stored_features(base, videos("features"), encoder):
            if stop.is_set():
                return
            yield event
    frames = pool.decode(videos("video"), stop)
    if writer.state.places.get(FRAMES):
        frames = chain(stored_frames(writer, videos("frames"), pool.geometry), frames)
    yield from embedder.embed(frames, stop)


def decode_videos(writer: Writer, todo: Todo, pool: DecodePool, progress: Progress, interrupts: Interrupts) -> Summary:
    """Decodes what is to do and writes the sampled frames to `frames/` as JPEG.

    Raises:
        Interrupted: After the shard in progress was written.
    """
    summary = Summary(todo.counts)
    started = time.monotonic()
    shard = _Shard(writer, "decode", summary, progress)
    progress.set_total(todo.counts.to_do)
    frames: dict[str, tuple[list[bytes], list[float]]] = {}
    try:
        for event in pool.decode(todo.videos(), interrupts.stop):
            if isinstance(event, DecodedFrame):
                jpegs, times = frames.setdefault(event.video.video_id, ([], []))
                jpegs.append(event.data.tobytes())
                times.append(event.seconds)
                progress.update(frames=1)
            elif isinstance(event, VideoFailed):
                frames.pop(event.video.video_id, None)
                _failed(shard, event, progress)
            else:
                jpegs, times = frames.pop(event.video.video_id)
                changed = _changed(event)
                if changed:
                    shard.fail(changed)
                else:
                    row = store.StoredFrames(_stored(event), jpegs, np.array(times), event.span_seconds)
                    shard.add_frames(event, row)
        interrupts.check()
    finally:
        shard.flush()
        summary.elapsed_seconds = time.monotonic() - started
    return summary


def start_pool(
    n_workers: int, sampling: Sampling, geometry: FrameGeometry, exact: bool, limits: DecodeLimits, jpeg: bool = False
) -> DecodePool:
    """Decoding processes for an encoder's geometry."""
    return DecodePool(n_workers, sampling, replace(geometry, exact=exact), limits, jpeg)


def default_workers() -> int:
    """One decoding process for each processor this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
