"""Windows of frames, and encoders of whole videos; the oracle builds each window slowly from all frames of a video."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import FakeEncoder
from models.base import Encoder, VideoEncoder
from pipeline.decode import DecodedFrame, DecodeEvent, DecodePool, VideoDecoded, VideoFailed
from pipeline.decoding.pixels import Resizer
from pipeline.embed import EmbedEvent, FrameEmbedder, VideoEmbedded
from pipeline.errors import VideoError
from pipeline.sampling import Sampling, fps_picker
from pipeline.store import round_features
from pipeline.types import DecodeLimits, Float32, FrameFeatures, UInt8, Video
from pipeline.windows import WindowFiller, slot_at
from videos import encode_video, video

SIZE, WINDOW, FPS = 8, 6, 30.0
SPAN = WINDOW / FPS

Timed = Sequence[tuple[Fraction, UInt8]]  # frames with their times in seconds


class WindowEncoder(FakeEncoder):
    """Looks at the place of every pixel in its window; otherwise as the fake it is made from."""

    def __init__(self, max_batch: int | None = None, nan_above: float | None = None) -> None:
        super().__init__(size=SIZE, max_batch=max_batch, nan_above=nan_above)
        self.spec = replace(self.spec, window=WINDOW, fps=FPS)
        self._projection = (
            np.random.default_rng(1).standard_normal((WINDOW * SIZE * SIZE * 3, self.spec.dim)).astype(np.float32)
        )

    def encode_frames(self, frames: UInt8) -> Float32:
        assert frames.shape[1:] == (WINDOW, SIZE, SIZE, 3)
        self.batch_sizes.append(len(frames))
        if self.max_batch is not None and len(frames) > self.max_batch:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB (fake)")
        rows = [(window.reshape(-1) / np.float32(255) - np.float32(0.5)) @ self._projection for window in frames]
        vectors = np.stack([row / np.linalg.norm(row) for row in rows]).astype(np.float32)
        if self.nan_above is not None:
            vectors[frames.mean(axis=(1, 2, 3, 4)) > self.nan_above] = np.nan
        return vectors


class WholeEncoder:
    """A video encoder whose rows hang on all rows before and after them."""

    def __init__(self, base: FakeEncoder, spoil: str = "") -> None:
        self.base: Encoder = base
        self.spec = replace(base.spec, name="whole", dim=5)
        self.device, self.precision = base.device, base.precision
        self._spoil = spoil

    def encode_frames(self, frames: UInt8) -> Float32:
        return self.base.encode_frames(frames)

    def encode_text(self, texts: Sequence[str]) -> Float32:
        return self.base.encode_text(texts)[:, :5]

    def encode_video(self, features: Float32) -> Float32:
        if self._spoil == "memory" and len(features) > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB (fake)")
        if self._spoil == "error":
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
        mixed = np.cumsum(features[:, :5], axis=0) - features.mean(axis=0)[5:10]
        rows: Float32 = mixed / np.linalg.norm(mixed, axis=1, keepdims=True)
        if self._spoil == "nan":
            rows[-1] = np.nan
        return rows

    def score_pairs(self, texts: Sequence[str], clips: Sequence[Float32]) -> Float32:
        raise NotImplementedError


def slow_windows(frames: Timed, duration: float) -> dict[int, UInt8]:
    """The oracle: number of the window -> its frames, slot by slot, from all frames of a video and its length."""
    slots: dict[int, UInt8] = {}
    for seconds, pixels in frames:
        slots.setdefault(int(seconds * int(FPS)), pixels)  # the first frame of a cell
    windows = {}
    for number in {slot // WINDOW for slot in slots}:
        taken = []
        for slot in range(number * WINDOW, (number + 1) * WINDOW):
            earlier = [k for k in slots if (number - 1) * WINDOW <= k <= slot]
            inside = [k for k in slots if k // WINDOW == number]
            if slot > max(slots) and (slot + 0.5) / FPS > duration:
                taken.append(np.zeros((SIZE, SIZE, 3), np.uint8))
            else:
                taken.append(slots[max(earlier)] if earlier else slots[min(inside)])
        windows[number] = np.stack(taken)
    return windows


def check(features: FrameFeatures, frames: Timed, duration: float) -> None:
    """One video's rows and times against the oracle."""
    windows = slow_windows(frames, duration)
    numbers = sorted(windows)
    encoder = WindowEncoder()
    expected = round_features(np.concatenate([encoder.encode_frames(windows[n][None]) for n in numbers]))
    np.testing.assert_array_equal(features.features, expected)
    np.testing.assert_array_equal(features.pts_seconds, [n * WINDOW / FPS for n in numbers])
    assert features.span_seconds == SPAN


def run(
    events: Iterable[DecodeEvent], encoder: Encoder | None = None, batch_size: int = 2 * WINDOW
) -> tuple[list[EmbedEvent], FrameEmbedder]:
    embedder = FrameEmbedder(encoder or WindowEncoder(), batch_size)
    return list(embedder.embed(events, threading.Event())), embedder


def embedded(events: Iterable[EmbedEvent]) -> dict[str, FrameFeatures]:
    return {event.features.video_id: event.features for event in events if isinstance(event, VideoEmbedded)}


# --------------------------------------------------------------------------------------------------- real videos

MILLISECONDS = [0, 33, 67, 100, 133, 167, 200, 233, 267, 300, 333, 367, 400]
CLIPS = {
    "thirty": {"n_frames": 40},
    "whole_windows": {"n_frames": 2 * WINDOW},
    "ends_early_in_a_window": {"n_frames": 2 * WINDOW + 1},
    "one_frame": {"n_frames": 1},
    "twenty_five": {"n_frames": 33, "fps": 25},
    "sixty": {"n_frames": 50, "fps": 60},
    "slow": {"n_frames": 7, "fps": Fraction(7, 2)},  # most windows have one frame or none
    "ntsc": {"n_frames": 40, "fps": Fraction(30000, 1001)},
    "holes": {"n_frames": 9, "pts": [0, 40, 90, 95, 400, 405, 610, 611, 900], "time_base": Fraction(1, 600)},
    "long_hole": {"n_frames": 6, "pts": [0, 1, 2, 60, 61, 75], "time_base": Fraction(1, 30)},
    "milliseconds": {"n_frames": len(MILLISECONDS), "pts": MILLISECONDS, "time_base": Fraction(1, 1000)},
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("clips")
    made = {}
    for name, how in CLIPS.items():
        path = folder / f"{name}{'.mkv' if name == 'milliseconds' else '.mp4'}"
        made[name] = encode_video(path, b_frames=0, size=(32, 24), **how)  # type: ignore[arg-type]
    return made


def every_frame(path: Path) -> list[tuple[Fraction, UInt8]]:
    """All frames of a file in the encoder's geometry, with their exact times."""
    resizer = Resizer(WindowEncoder().spec.geometry)
    frames = []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            assert frame.pts is not None and frame.time_base is not None
            frames.append((frame.pts * frame.time_base, resizer(frame)))
    return [(seconds - frames[0][0], pixels) for seconds, pixels in frames]


@pytest.mark.parametrize("batch_size", [1, 4 * WINDOW])
def test_windows_of_real_videos_are_the_slow_ones(clips: dict[str, Path], batch_size: int) -> None:
    geometry = WindowEncoder().spec.geometry
    videos = [video(path, name) for name, path in clips.items()]
    with DecodePool(2, Sampling("fps", FPS), geometry, DecodeLimits()) as pool:
        events, _ = run(pool.decode(videos, threading.Event()), batch_size=batch_size)
    found = embedded(events)
    durations = {e.decoded.video.video_id: e.decoded.duration_seconds for e in events if isinstance(e, VideoEmbedded)}
    assert set(found) == set(clips)
    for name, path in clips.items():
        check(found[name], every_frame(path), durations[name])


def test_the_oracle_itself_on_a_video_that_one_can_count(clips: dict[str, Path]) -> None:
    frames = every_frame(clips["long_hole"])  # frames in slots 0, 1, 2; 60, 61; 75
    windows = slow_windows(frames, 77 / 30)
    assert sorted(windows) == [0, 10, 12]
    where: dict[int, list[int | None]] = {0: [0, 1, 2, 2, 2, 2], 10: [3, 4, 4, 4, 4, 4], 12: [5, 5, 5, 5, 5, None]}
    for number, places in where.items():
        for found, place in zip(windows[number], places, strict=True):
            np.testing.assert_array_equal(found, 0 if place is None else frames[place][1])


# ------------------------------------------------------------------------------------------------ made-up videos


def picture(name: str, slot: int) -> UInt8:
    return np.random.default_rng([slot, *name.encode()]).integers(1, 256, (SIZE, SIZE, 3), dtype=np.uint8)


def entry(name: str) -> Video:
    return Video(name, name, f"/{name}.mp4", 1, 2, 3)


def timed(name: str, slots: Iterable[int]) -> Timed:
    return [(Fraction(slot, 30), picture(name, slot)) for slot in slots]


def events_of(name: str, slots: Iterable[int], attempt: int = 1, duration: float = 0.0) -> list[DecodeEvent]:
    frames = [DecodedFrame(entry(name), attempt, float(s), pixels) for s, pixels in timed(name, slots)]
    return [*frames, VideoDecoded(entry(name), attempt, duration, 1 / FPS, 30, (), 1.0, 0.5)]


@settings(max_examples=60, deadline=None)
@given(
    slots=st.lists(st.sets(st.integers(0, 50), min_size=1, max_size=25), min_size=1, max_size=5),
    batch_size=st.integers(1, 5 * WINDOW),
    data=st.data(),
)
def test_any_interleaving_gives_the_slow_windows(slots: list[set[int]], batch_size: int, data: st.DataObject) -> None:
    durations = [data.draw(st.integers(0, 60)) / FPS for _ in slots]  # also shorter than where the last frame is
    queues = {f"v{i}": events_of(f"v{i}", sorted(some), duration=durations[i]) for i, some in enumerate(slots)}
    events: list[DecodeEvent] = []
    while queues:
        name = data.draw(st.sampled_from(sorted(queues)))
        events.append(queues[name].pop(0))
        if not queues[name]:
            del queues[name]
    found = embedded(run(events, batch_size=batch_size)[0])
    assert len(found) == len(slots)
    for i, some in enumerate(slots):
        check(found[f"v{i}"], timed(f"v{i}", sorted(some)), durations[i])


@pytest.mark.parametrize(("batch_size", "n_windows"), [(1, 1), (WINDOW, 1), (3 * WINDOW - 1, 2), (3 * WINDOW, 3)])
def test_a_batch_is_as_many_whole_windows_as_its_frames_make(batch_size: int, n_windows: int) -> None:
    encoder = WindowEncoder()
    events, embedder = run(events_of("a", range(7 * WINDOW)), encoder, batch_size)
    assert encoder.batch_sizes == [n_windows] * -(-7 // n_windows)  # the last is padded to the same size
    assert sum(event for event in events if isinstance(event, int)) == 7 * WINDOW
    assert embedder.halved_to is None


def test_frames_are_copied_before_the_next_is_asked_for() -> None:
    """The decoder's view is overwritten as soon as the next event is asked for."""
    slots = [0, 1, 4, 7, 8, 14]

    def reusing() -> Iterator[DecodeEvent]:
        view = np.empty((SIZE, SIZE, 3), np.uint8)
        for event in events_of("a", slots):
            if isinstance(event, DecodedFrame):
                view[:] = event.data
                yield replace(event, data=view)
                view[:] = 77
            else:
                yield event

    check(embedded(run(reusing())[0])["a"], timed("a", slots), 0.0)


def test_a_second_attempt_has_nothing_of_the_first() -> None:
    failure = VideoFailed(entry("a"), 1, VideoError("crash", "it died"), True, 1.0)
    first = events_of("a", [1, 2, 9, 10])[:-1]
    events, _ = run([*first, *events_of("b", [3]), failure, *events_of("a", [2, 8], attempt=2)])
    check(embedded(events)["a"], timed("a", [2, 8]), 0.0)
    check(embedded(events)["b"], timed("b", [3]), 0.0)


def test_out_of_memory_halves_the_windows_and_gives_the_same_vectors() -> None:
    encoder = WindowEncoder(max_batch=1)
    events, embedder = run(events_of("a", range(20)), encoder, batch_size=4 * WINDOW)
    check(embedded(events)["a"], timed("a", range(20)), 0.0)
    assert embedder.halved_to == WINDOW
    assert encoder.batch_sizes[:3] == [4, 2, 1]


def test_a_window_that_does_not_fit_fails_its_video() -> None:
    events, _ = run(events_of("a", range(20)), WindowEncoder(max_batch=0))
    errors = [event.error for event in events if isinstance(event, VideoFailed)]
    assert [(e.code, e.message) for e in errors] == [
        ("memory", "one window of 6 frames does not fit the device's memory")
    ]


def test_vectors_that_are_not_finite_fail_only_their_video() -> None:
    white = np.full((SIZE, SIZE, 3), 255, np.uint8)
    bright = [replace(e, data=white) if isinstance(e, DecodedFrame) else e for e in events_of("bright", range(WINDOW))]
    events, _ = run([*events_of("a", [0]), *bright, *events_of("b", [5])], WindowEncoder(nan_above=250))
    assert [(e.video.video_id, e.error.code) for e in events if isinstance(e, VideoFailed)] == [
        ("bright", "non_finite")
    ]
    assert set(embedded(events)) == {"a", "b"}


def test_a_window_encoder_without_a_rate_is_refused() -> None:
    with pytest.raises(ValueError, match="need a sampling rate"):
        WindowFiller(replace(WindowEncoder().spec, fps=None))


def test_a_video_holds_one_window_at_a_time() -> None:
    filler = WindowFiller(WindowEncoder().spec)
    given_out = [full for slot in range(3 * WINDOW) if (full := filler.add(slot / FPS, picture("a", slot)))]
    assert [start for start, _ in given_out] == [0.0, SPAN]
    assert sum(value.nbytes for value in (filler._window,) if value is not None) == WINDOW * SIZE * SIZE * 3


@settings(max_examples=500, deadline=None)
@given(
    tick=st.sampled_from([Fraction(1, 90000), Fraction(1, 1000), Fraction(1, 15360), Fraction(1001, 30000)]),
    fps=st.sampled_from([30.0, 25.0, 29.97, 1.0]),
    slot=st.integers(0, 3_000_000),
    beside=st.integers(-1, 1),
)
def test_a_slot_is_the_samplers_cell(tick: Fraction, fps: float, slot: int, beside: int) -> None:
    pts = max(0, round(slot / Fraction(fps).limit_denominator(10**6) / tick) + beside)
    assert slot_at(float(pts * tick), fps) == fps_picker(fps, Fraction(0), tick).cell(pts)


# ---------------------------------------------------------------------------------------------- whole videos


@pytest.mark.parametrize("base", [FakeEncoder(size=SIZE), WindowEncoder()], ids=["frames", "windows"])
@pytest.mark.parametrize("batch_size", [1, 2 * WINDOW])
def test_a_video_encoder_sees_the_stored_rows_of_the_whole_video(base: FakeEncoder, batch_size: int) -> None:
    encoder = WholeEncoder(base)
    assert isinstance(encoder, VideoEncoder)
    events = [*events_of("a", range(0, 40, 2)), *events_of("b", [3])]
    rows, whole = embedded(run(events, base)[0]), embedded(run(events, encoder, batch_size)[0])
    assert set(whole) == {"a", "b"}
    for name, features in whole.items():
        expected = round_features(encoder.encode_video(rows[name].features))
        np.testing.assert_array_equal(features.features, expected)
        np.testing.assert_array_equal(features.pts_seconds, rows[name].pts_seconds)
        assert features.span_seconds == rows[name].span_seconds


@pytest.mark.parametrize(("spoil", "code"), [("nan", "non_finite"), ("memory", "memory")])
def test_a_video_that_its_encoder_cannot_take_fails_alone(spoil: str, code: str) -> None:
    events = [*events_of("a", range(0, 40, 2)), *(events_of("b", [3, 20]) if spoil == "memory" else [])]
    found, _ = run(events, WholeEncoder(WindowEncoder(), spoil))
    assert [(e.video.video_id, e.error.code, e.error.stage) for e in found if isinstance(e, VideoFailed)] == [
        ("a", code, "embed")
    ]
    assert set(embedded(found)) == ({"b"} if spoil == "memory" else set())


def test_other_errors_of_a_video_encoder_are_not_hidden() -> None:
    with pytest.raises(RuntimeError, match="mat1"):
        run(events_of("a", [0]), WholeEncoder(WindowEncoder(), "error"))
