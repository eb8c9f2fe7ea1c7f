"""Frames to features: batches that fill across videos, while the next frames are being decoded.

A feeder thread packs the decoder's frames, or the windows they fill (pipeline.windows), into batches of one fixed size;
the caller's thread runs the encoder on them. A bounded queue between the two means that neither waits while the other
has work, and that neither runs away.

Every batch has the same shape (the last is padded), so that a frame's vector does not depend on which other frames
happened to be in its batch, nor on where an earlier run was interrupted.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.base import Encoder, VideoEncoder, caution_about
from pipeline.decode import DecodedFrame, DecodeEvent, VideoDecoded, VideoFailed
from pipeline.errors import FinecoError, VideoError
from pipeline.store import round_features
from pipeline.types import UNIT_TOLERANCE, Float32, FrameFeatures, UInt8, Video
from pipeline.windows import WindowFiller

QUEUED_BATCHES = 4
TEXTS_PER_BATCH = 64
CAUTIONS_SHOWN = 10
POLL_SECONDS = 0.2
NO_VECTOR = "The weights may be damaged, or too much for this device: try --device cpu, or another model."
NOT_FINITE = VideoError("non_finite", "the encoder gave vectors that are not finite", "embed")


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
    windows: WindowFiller | None  # None: each frame is an input of its own
    seconds: list[float] = field(default_factory=list)  # of each input
    parts: list[NDArray[np.float16]] = field(default_factory=list)  # a long video's features, as they are stored
    n_embedded: int = 0
    decoded: VideoDecoded | None = None
    error: VideoError | None = None

    def complete(self) -> bool:
        return self.decoded is not None and self.n_embedded == len(self.seconds)


@dataclass(slots=True)
class _Batch:
    inputs: UInt8  # (B, H, W, 3), or (B, window, H, W, 3)
    owners: list[tuple[_Assembly, int]] = field(default_factory=list)  # whose the next n rows are
    n_rows: int = 0

    def add(self, assembly: _Assembly, pixels: UInt8) -> None:
        self.inputs[self.n_rows] = pixels
        self.n_rows += 1
        if self.owners and self.owners[-1][0] is assembly:
            self.owners[-1] = (assembly, self.owners[-1][1] + 1)
        else:
            self.owners.append((assembly, 1))


class _Input(NamedTuple):
    """What the encoder makes one vector of; `pixels` may be a view that is valid until the next is asked for."""

    assembly: _Assembly
    seconds: float
    pixels: UInt8


_End = tuple[_Assembly, VideoDecoded]
_Item = _Batch | _End | VideoFailed | BaseException | None


class FrameEmbedder:
    """Runs an encoder over the frames of many videos.

    Args:
        encoder: Frames or windows of frames to unit vectors; a `VideoEncoder` then sees each video's as a whole.
        batch_size: Frames per batch, rounded down to whole windows but one at least; halved for good when the device
            runs out of memory.
    """

    def __init__(self, encoder: Encoder, batch_size: int) -> None:
        self._encoder = encoder
        self._video_encoder = encoder if isinstance(encoder, VideoEncoder) else None
        self._spec = self._video_encoder.base.spec if self._video_encoder else encoder.spec  # of the inputs
        self._batch_rows = max(1, batch_size // self._spec.window)
        self._capacity = self._batch_rows  # what fits the device, as far as is known
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
        size = (self._spec.geometry.height, self._spec.geometry.width, 3)
        shape = size if self._spec.window == 1 else (self._spec.window, *size)
        batch: _Batch | None = None
        for item in self._inputs(events):
            if not isinstance(item, _Input):
                yield item
                continue
            if batch is None:
                batch = _Batch(np.empty((self._batch_rows, *shape), np.uint8))
            item.assembly.seconds.append(item.seconds)
            batch.add(item.assembly, item.pixels)
            if batch.n_rows == self._batch_rows:
                yield batch
                batch = None
        if batch is not None:
            batch.inputs[batch.n_rows :] = 0
            yield batch

    def _inputs(self, events: Iterable[DecodeEvent]) -> Iterator[_Input | _End | VideoFailed]:
        """The encoder's inputs one by one: frames as they come, or windows as they fill up."""
        open_videos: dict[str, _Assembly] = {}
        for event in events:
            key = event.video.video_id
            if isinstance(event, VideoFailed):
                open_videos.pop(key, None)
                yield event
            elif isinstance(event, DecodedFrame):
                assembly = open_videos.get(key)
                if assembly is None:
                    windows = WindowFiller(self._spec) if self._spec.window > 1 else None
                    assembly = open_videos[key] = _Assembly(event.video, event.attempt, windows)
                if assembly.windows is None:
                    yield _Input(assembly, event.seconds, event.data)
                elif full := assembly.windows.add(event.seconds, event.data):
                    yield _Input(assembly, *full)
            else:
                assembly = open_videos.pop(key)
                if assembly.windows is not None:
                    yield _Input(assembly, *assembly.windows.finish(event.duration_seconds))
                yield assembly, event

    def _take(self, item: _Batch | _End | VideoFailed) -> Iterator[EmbedEvent]:
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
                elif are_unit(rows):
                    assembly.parts.append(rows.astype(np.float16))
                else:
                    assembly.error = NOT_FINITE
                if assembly.complete():
                    yield self._finish(assembly)
            yield item.n_rows * self._spec.window

    def _finish(self, assembly: _Assembly) -> VideoEmbedded | VideoFailed:
        decoded = assembly.decoded
        if decoded is None:
            raise RuntimeError("finished before it was decoded")
        rows: Float32 | VideoError | None = assembly.error
        if rows is None:
            rows = np.concatenate(assembly.parts).astype(np.float32)
            if self._video_encoder is not None:
                rows = encode_whole(self._video_encoder, rows)
        if isinstance(rows, VideoError):
            return VideoFailed(assembly.video, assembly.attempt, rows, False, decoded.seconds)
        span_seconds = assembly.windows.span_seconds if assembly.windows else decoded.span_seconds
        seconds = np.array(assembly.seconds, np.float64)
        return VideoEmbedded(decoded, FrameFeatures(assembly.video.video_id, rows, seconds, span_seconds))

    def _encode(self, batch: _Batch) -> Float32 | VideoError:
        """Features of a whole batch, in pieces that fit the device; rounded as they will be stored."""
        parts: list[Float32] = []
        start = 0
        while start < batch.n_rows:
            inputs = batch.inputs[start : start + self._capacity]
            try:
                parts.append(self._encoder.encode_frames(inputs))
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
            else:
                start += len(inputs)
                continue
            # Out of memory. Outside the except block: the exception's traceback would keep the device's memory in use.
            if self._capacity == 1:
                one = "one frame" if self._spec.window == 1 else f"one window of {self._spec.window} frames"
                return VideoError("memory", f"{one} does not fit the device's memory", "embed")
            self._capacity = (self._capacity + 1) // 2
            release_memory()
        return round_features(np.concatenate(parts)[: batch.n_rows])

    @property
    def halved_to(self) -> int | None:
        """Frames in a batch after running out of memory; None when it never did."""
        return self._capacity * self._spec.window if self._capacity != self._batch_rows else None


def encode_whole(encoder: VideoEncoder, rows: Float32) -> Float32 | VideoError:
    """A whole video's (N, base dim) rows through its encoder: (N, D), rounded as they will be stored."""
    try:
        encoded = encoder.encode_video(rows)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return VideoError("memory", f"a video of {len(rows)} rows does not fit the device's memory", "embed")
    return round_features(encoded) if are_unit(encoded) else NOT_FINITE


def are_unit(rows: Float32) -> bool:
    """Whether every row of (N, D) has norm 1, which rules out NaN."""
    return bool(np.all(np.abs(np.linalg.norm(rows, axis=1) - 1) <= UNIT_TOLERANCE))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of the encoder means that the device's memory is full."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


def release_memory() -> None:
    """Gives cached device memory back before the next try."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def text_cautions(encoder: Encoder, queries: Sequence[str]) -> list[str]:
    """Lines about queries that the encoder reads only a part of, or knows no word of; the first ones, and a count."""
    found = [(n, caution) for n, query in enumerate(queries, 1) if (caution := caution_about(encoder, query))]
    lines = [f"query {n}: {caution}" for n, caution in found[:CAUTIONS_SHOWN]]
    return [*lines, *([f"(and {len(found) - len(lines)} more such queries)"] if len(found) > len(lines) else [])]


def encode_captions(encoder: Encoder, texts: list[str]) -> Float32:
    """(M, D) unit rows of any number of texts, in order; in smaller batches where the device's memory is full.

    Raises:
        VideoError: `memory`, if a single text does not fit; `non_finite`, if a text's vector is not a unit vector.
    """
    rows = np.zeros((len(texts), encoder.spec.dim), np.float32)
    at_once, start = TEXTS_PER_BATCH, 0
    while start < len(texts):
        some = texts[start : start + at_once]
        try:
            rows[start : start + len(some)] = encoder.encode_text(some)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        else:
            start += len(some)
            continue
        if at_once == 1:  # outside the except block, as in FrameEmbedder
            raise VideoError("memory", "one text does not fit the device's memory", "select")
        at_once //= 2
        release_memory()
    if not are_unit(rows):
        raise VideoError("non_finite", "the encoder gave a text a vector that is not finite", "select")
    return rows


def encode_texts(encoder: Encoder, texts: list[str]) -> Float32:
    """As `encode_captions`, for texts that are no single video's. Raises FinecoError where that raises VideoError."""
    try:
        return encode_captions(encoder, texts)
    except VideoError as error:
        raise FinecoError(f"{encoder.spec.name}: {error.message}", NO_VECTOR) from error
