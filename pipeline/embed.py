"""Frames to features: batches that fill across videos, while the next frames are being decoded.

A feeder thread packs the decoder's frames into batches of one fixed size; the caller's thread runs the encoder on them.
A bounded queue between the two means that neither waits while the other has work, and that neither runs away.

Every batch has the same shape (the last is padded), so that a frame's vector does not depend on which other frames
happened to be in its batch, nor on where an earlier run was interrupted.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from models.base import Encoder
from pipeline.decode import DecodedFrame, DecodeEvent, VideoDecoded, VideoFailed
from pipeline.errors import VideoError
from pipeline.store import round_features
from pipeline.types import UNIT_TOLERANCE, Float32, FrameFeatures, UInt8, Video

QUEUED_BATCHES = 4
TEXTS_PER_BATCH = 64
POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class VideoEmbedded:
    """All features of a video; `decoded` says what the decoder learned of it."""

    decoded: VideoDecoded
    features: FrameFeatures


EmbedEvent = VideoEmbedded | VideoFailed | int  # int: so many frames were embedded


@dataclass(slots=True)
class _Assembly:
    """One attempt at one video, while its features come in."""

    video: Video
    attempt: int
    seconds: list[float] = field(default_factory=list)
    parts: list[NDArray[np.float16]] = field(default_factory=list)  # a long video's features, as they are stored
    n_embedded: int = 0
    decoded: VideoDecoded | None = None
    error: VideoError | None = None

    def complete(self) -> bool:
        return self.decoded is not None and self.n_embedded == len(self.seconds)


@dataclass(slots=True)
class _Batch:
    frames: UInt8  # (B, H, W, 3)
    owners: list[tuple[_Assembly, int]] = field(default_factory=list)  # whose the next n rows are
    n_frames: int = 0

    def add(self, assembly: _Assembly, frame: UInt8) -> None:
        self.frames[self.n_frames] = frame
        self.n_frames += 1
        if self.owners and self.owners[-1][0] is assembly:
            self.owners[-1] = (assembly, self.owners[-1][1] + 1)
        else:
            self.owners.append((assembly, 1))


_Item = _Batch | tuple[_Assembly, VideoDecoded] | VideoFailed | BaseException | None


class FrameEmbedder:
    """Runs an encoder over the frames of many videos.

    Args:
        encoder: Frames to unit vectors.
        batch_size: Frames per batch; halved for good when the device runs out of memory.
    """

    def __init__(self, encoder: Encoder, batch_size: int) -> None:
        self._encoder = encoder
        self.batch_size = batch_size
        self._capacity = batch_size  # what fits the device, as far as is known
        self.waited_seconds = 0.0  # for frames, with nothing to encode

    def embed(self, events: Iterable[DecodeEvent], stop: threading.Event) -> Iterator[EmbedEvent]:
        """Embeds decoded frames until the events end or `stop` is set.

        `events` is consumed in a thread of its own. Failures pass through; a video whose features are not finite, or
        whose single frame does not fit the device, fails with code `non_finite` or `memory`.
        """
        items: queue.Queue[_Item] = queue.Queue(maxsize=QUEUED_BATCHES)
        ended = threading.Event()  # set when nobody listens any more

        def put(item: _Item) -> bool:
            while not (stop.is_set() or ended.is_set()):
                try:
                    items.put(item, timeout=POLL_SECONDS)
                    return True
                except queue.Full:
                    continue
            return False

        def feed() -> None:
            try:
                for item in self._pack(events):
                    if not put(item):
                        return
                put(None)
            except BaseException as error:
                put(error)

        feeder = threading.Thread(target=feed, name="feeder", daemon=True)
        feeder.start()
        try:
            while not stop.is_set():
                asked = time.monotonic()
                try:
                    item = items.get(timeout=POLL_SECONDS)
                except queue.Empty:
                    continue
                finally:
                    self.waited_seconds += time.monotonic() - asked
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                yield from self._take(item)
        finally:
            ended.set()
            feeder.join(timeout=10)

    def _pack(self, events: Iterable[DecodeEvent]) -> Iterator[_Item]:
        """Frames to batches; the ends of videos in between, in order."""
        height, width = self._encoder.spec.geometry.height, self._encoder.spec.geometry.width
        open_videos: dict[str, _Assembly] = {}
        batch: _Batch | None = None
        for event in events:
            if isinstance(event, DecodedFrame):
                key = event.video.video_id
                assembly = open_videos.get(key)
                if assembly is None:
                    assembly = open_videos[key] = _Assembly(event.video, event.attempt)
                if batch is None:
                    batch = _Batch(np.empty((self.batch_size, height, width, 3), np.uint8))
                assembly.seconds.append(event.seconds)
                batch.add(assembly, event.data)
                if batch.n_frames == self.batch_size:
                    yield batch
                    batch = None
            elif isinstance(event, VideoDecoded):
                yield open_videos.pop(event.video.video_id), event
            else:
                open_videos.pop(event.video.video_id, None)
                yield event
        if batch is not None:
            batch.frames[batch.n_frames :] = 0
            yield batch

    def _take(self, item: _Batch | tuple[_Assembly, VideoDecoded] | VideoFailed) -> Iterator[EmbedEvent]:
        if isinstance(item, VideoFailed):
            yield item
        elif isinstance(item, tuple):
            assembly, decoded = item
            assembly.decoded = decoded
            if assembly.complete():
                yield self._finish(assembly)
        else:
            features = self._encode(item)
            start = 0
            for assembly, n in item.owners:
                rows = features[start : start + n] if isinstance(features, np.ndarray) else features
                start += n
                assembly.n_embedded += n
                if isinstance(rows, VideoError):
                    assembly.error = rows
                elif np.all(np.abs(np.linalg.norm(rows, axis=1) - 1) <= UNIT_TOLERANCE):  # False for NaN
                    assembly.parts.append(rows.astype(np.float16))
                else:
                    assembly.error = VideoError("non_finite", "the encoder gave vectors that are not finite", "embed")
                if assembly.complete():
                    yield self._finish(assembly)
            yield item.n_frames

    def _finish(self, assembly: _Assembly) -> VideoEmbedded | VideoFailed:
        decoded = assembly.decoded
        if decoded is None:
            raise RuntimeError("finished before it was decoded")
        if assembly.error is not None:
            return VideoFailed(assembly.video, assembly.attempt, assembly.error, False, decoded.seconds)
        features = FrameFeatures(
            assembly.video.video_id,
            np.concatenate(assembly.parts).astype(np.float32),
            np.array(assembly.seconds, np.float64),
            decoded.span_seconds,
        )
        return VideoEmbedded(decoded, features)

    def _encode(self, batch: _Batch) -> Float32 | VideoError:
        """Features of a whole batch, in pieces that fit the device; rounded as they will be stored."""
        parts: list[Float32] = []
        start = 0
        while start < batch.n_frames:
            frames = batch.frames[start : start + self._capacity]
            try:
                parts.append(self._encoder.encode_frames(frames))
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
            else:
                start += len(frames)
                continue
            # Out of memory. Outside the except block: the exception's traceback would keep the device's memory in use.
            if self._capacity == 1:
                return VideoError("memory", "one frame does not fit the device's memory", "embed")
            self._capacity = (self._capacity + 1) // 2
            release_memory()
        return round_features(np.concatenate(parts)[: batch.n_frames])

    @property
    def halved_to(self) -> int | None:
        """Batch size after running out of memory; None when it never did."""
        return self._capacity if self._capacity != self.batch_size else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of the encoder means that the device's memory is full."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


def release_memory() -> None:
    """Gives cached device memory back before the next try."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def encode_texts(encoder: Encoder, texts: list[str]) -> Float32:
    """(M, D) unit rows of any number of texts, in order."""
    if not texts:
        return np.zeros((0, encoder.spec.dim), np.float32)
    parts = [encoder.encode_text(texts[i : i + TEXTS_PER_BATCH]) for i in range(0, len(texts), TEXTS_PER_BATCH)]
    return np.concatenate(parts)
