"""What earlier commands stored, as events of a run: frames that `decode` left, features of another collection."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from models.base import VideoEncoder
from pipeline import store
from pipeline.collection import Snapshot
from pipeline.commits import FEATURES, FRAMES
from pipeline.decode import DecodedFrame, DecodeEvent, VideoDecoded, VideoFailed
from pipeline.embed import VideoEmbedded, encode_whole
from pipeline.errors import VideoError
from pipeline.geometry import fit_pixels
from pipeline.types import FrameGeometry, UInt8, Video

UNPACKED_FRAMES = 128  # at a time, of those that `decode` stored: a whole film would not fit in memory


def stored_frames(snapshot: Snapshot, videos: Iterable[Video], geometry: FrameGeometry) -> Iterator[DecodeEvent]:
    """Frames that `decode` left, as if they were being decoded."""

    def pixels(jpeg: bytes) -> UInt8:
        with Image.open(io.BytesIO(jpeg)) as image:
            return fit_pixels(np.asarray(image.convert("RGB")), geometry)

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as threads:
        for video, shard, row in _rows(snapshot, FRAMES, store.FramesShard, videos):
            started = time.monotonic()
            frames = shard.frames(row)
            for start in range(0, len(frames.jpegs), UNPACKED_FRAMES):
                some = slice(start, start + UNPACKED_FRAMES)
                unpacked = threads.map(pixels, frames.jpegs[some])
                for seconds, data in zip(frames.pts_seconds[some].tolist(), unpacked, strict=True):
                    yield DecodedFrame(video, 1, seconds, data)
            yield _decoded(video, frames.video, frames.span_seconds, started)


def stored_features(
    base: Snapshot, videos: Iterable[Video], encoder: VideoEncoder
) -> Iterator[VideoEmbedded | VideoFailed]:
    """Videos whose features under the encoder's base another collection has, as if they had just been embedded."""
    for video, shard, row in _rows(base, FEATURES, store.FeaturesShard, videos):
        started = time.monotonic()
        features = shard.features(row)
        rows = encode_whole(encoder, features.features)
        if isinstance(rows, VideoError):
            yield VideoFailed(video, 1, rows, False, time.monotonic() - started)
        else:
            decoded = _decoded(video, shard.video(row), features.span_seconds, started)
            yield VideoEmbedded(decoded, replace(features, features=rows))


def _rows(snapshot: Snapshot, kind: str, shard_type: Any, videos: Iterable[Video]) -> Iterator[tuple[Video, Any, int]]:
    """Each video with the open shard that has its data, and its row there. A shard's digest is checked once."""
    number, shard, rows = 0, None, {}
    checked: set[int] = set()
    try:
        for video in videos:
            wanted = snapshot.state.places[kind][video.video_id].commit
            if wanted != number or shard is None:
                if shard is not None:
                    shard.close()
                name = f"{kind}/{wanted:06d}.h5"
                if wanted not in checked:
                    snapshot.collection.open_file(name, snapshot.records)
                    checked.add(wanted)
                number, shard = wanted, shard_type(snapshot.collection.folder / name)
                rows = {video_id: row for row, video_id in enumerate(shard.video_ids)}
            yield video, shard, rows[video.video_id]
    finally:
        if shard is not None:
            shard.close()


def _decoded(video: Video, stored: store.StoredVideo, span_seconds: float, started: float) -> VideoDecoded:
    seconds = time.monotonic() - started
    return VideoDecoded(video, 1, stored.duration_seconds, span_seconds, 0, (), seconds, 0.0, from_store=True)
