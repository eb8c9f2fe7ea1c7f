"""Frames to features, with a decoder that is a list of events and an encoder in numpy."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Generator, Iterable, Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import FakeEncoder
from pipeline import embed
from pipeline.decode import DecodedFrame, DecodeEvent, VideoDecoded, VideoFailed
from pipeline.embed import EmbedEvent, FrameEmbedder, VideoEmbedded, encode_texts
from pipeline.errors import VideoError
from pipeline.store import round_features
from pipeline.types import Float32, UInt8, Video

SIZE = 8


def video(name: str) -> Video:
    return Video(name, name, f"/{name}.mp4", 1, 2, 3)


def picture(name: str, number: int) -> UInt8:
    rng = np.random.default_rng([number, *name.encode()])
    return rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)


def frame(name: str, number: int, attempt: int = 1) -> DecodedFrame:
    return DecodedFrame(video(name), attempt, number / 2, picture(name, number))


def done(name: str, attempt: int = 1) -> VideoDecoded:
    return VideoDecoded(video(name), attempt, 9.0, 0.5, 30, (), 1.0, 0.5)


def failed(name: str, retry: bool = False) -> VideoFailed:
    return VideoFailed(video(name), 1, VideoError("crash", "it died"), retry, 1.0)


def whole(name: str, n: int) -> list[DecodeEvent]:
    return [*(frame(name, i) for i in range(n)), done(name)]


def run(
    events: Iterable[DecodeEvent], encoder: FakeEncoder | None = None, batch_size: int = 4
) -> tuple[list[EmbedEvent], FrameEmbedder]:
    embedder = FrameEmbedder(encoder or FakeEncoder(), batch_size)
    return list(embedder.embed(events, threading.Event())), embedder


def features_of(events: list[EmbedEvent]) -> dict[str, Float32]:
    return {e.features.video_id: e.features.features for e in events if isinstance(e, VideoEmbedded)}


def one_by_one(name: str, numbers: Iterable[int]) -> Float32:
    """The oracle: every frame on its own."""
    encoder = FakeEncoder()
    return round_features(np.concatenate([encoder.encode_frames(picture(name, i)[None]) for i in numbers]))


def test_vectors_are_those_of_each_frame_alone_and_times_its_own() -> None:
    events, _ = run(whole("a", 3) + whole("b", 7) + whole("c", 1))
    found = [e for e in events if isinstance(e, VideoEmbedded)]
    assert [e.features.video_id for e in found] == ["a", "b", "c"]
    for event, n in zip(found, (3, 7, 1), strict=True):
        np.testing.assert_array_equal(event.features.features, one_by_one(event.features.video_id, range(n)))
        np.testing.assert_array_equal(event.features.pts_seconds, np.arange(n) / 2)
        assert event.features.span_seconds == 0.5
        assert event.decoded == done(event.features.video_id)


def test_batches_fill_across_videos_and_all_have_one_size() -> None:
    encoder = FakeEncoder()
    events, embedder = run([e for name in "abcdefghi" for e in whole(name, 1)], encoder)
    assert encoder.batch_sizes == [4, 4, 4]
    assert [e for e in events if isinstance(e, int)] == [4, 4, 1]
    assert len(features_of(events)) == 9
    assert embedder.halved_to is None


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    batch_size=st.integers(1, 7),
    data=st.data(),
)
def test_any_interleaving_gives_the_same_vectors(lengths: list[int], batch_size: int, data: st.DataObject) -> None:
    queues = {f"v{i}": whole(f"v{i}", n) for i, n in enumerate(lengths)}
    events: list[DecodeEvent] = []
    while queues:
        name = data.draw(st.sampled_from(sorted(queues)))
        events.append(queues[name].pop(0))
        if not queues[name]:
            del queues[name]
    found = features_of(run(events, batch_size=batch_size)[0])
    assert set(found) == {f"v{i}" for i in range(len(lengths))}
    for i, n in enumerate(lengths):
        np.testing.assert_array_equal(found[f"v{i}"], one_by_one(f"v{i}", range(n)))


def test_frames_are_copied_before_the_next_is_asked_for() -> None:
    """The decoder's view is overwritten as soon as the next event is asked for."""

    def reusing() -> Iterator[DecodeEvent]:
        view = np.empty((SIZE, SIZE, 3), np.uint8)
        for i in range(6):
            view[:] = picture("a", i)
            yield DecodedFrame(video("a"), 1, i / 2, view)
            view[:] = 77
        yield done("a")

    np.testing.assert_array_equal(features_of(run(reusing())[0])["a"], one_by_one("a", range(6)))


def test_a_second_attempt_has_nothing_of_the_first() -> None:
    first: list[DecodeEvent] = [frame("a", i) for i in (90, 91, 92)]
    second: list[DecodeEvent] = [*(frame("a", i, attempt=2) for i in range(5)), done("a", attempt=2)]
    events, _ = run([*first, *whole("b", 2), failed("a", retry=True), *second])
    found = features_of(events)
    np.testing.assert_array_equal(found["a"], one_by_one("a", range(5)))
    np.testing.assert_array_equal(found["b"], one_by_one("b", range(2)))
    assert [e.attempt for e in events if isinstance(e, VideoFailed)] == [1]


def test_a_failed_video_passes_and_its_frames_are_dropped() -> None:
    events, _ = run([frame("a", 0), *whole("b", 6), failed("a"), failed("c")])
    assert [e.video.video_id for e in events if isinstance(e, VideoFailed)] == ["a", "c"]
    assert set(features_of(events)) == {"b"}


def test_no_videos_and_no_frames() -> None:
    assert run([])[0] == []
    failure = failed("a")
    assert run([failure])[0] == [failure]


# ------------------------------------------------------------------------------------------------ device trouble


@pytest.mark.parametrize("fits", [1, 2, 3])
def test_out_of_memory_halves_the_batch_and_gives_the_same_vectors(fits: int) -> None:
    encoder = FakeEncoder(max_batch=fits)
    events, embedder = run(whole("a", 11) + whole("b", 3), encoder, batch_size=8)
    found = features_of(events)
    np.testing.assert_array_equal(found["a"], one_by_one("a", range(11)))
    np.testing.assert_array_equal(found["b"], one_by_one("b", range(3)))
    assert embedder.halved_to == {1: 1, 2: 2, 3: 2}[fits]
    assert sum(n > fits for n in encoder.batch_sizes) == {1: 3, 2: 2, 3: 2}[fits]  # and never tried again


def test_a_frame_that_does_not_fit_fails_its_video() -> None:
    events, _ = run(whole("a", 3) + whole("b", 3), FakeEncoder(max_batch=0))
    errors = [e.error for e in events if isinstance(e, VideoFailed)]
    assert [(e.code, e.stage) for e in errors] == [("memory", "embed")] * 2
    assert features_of(events) == {}


def test_memory_is_released_when_nothing_holds_it_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []  # one entry for each batch whose memory is in use
    in_use_at_release: list[bool] = []

    class Activations:
        pass

    class Greedy(FakeEncoder):
        def encode_frames(self, frames: UInt8) -> Float32:
            activations = Activations()
            held.append(1)
            weakref.finalize(activations, held.pop)
            return super().encode_frames(frames)

    monkeypatch.setattr(embed, "release_memory", lambda: in_use_at_release.append(bool(held)))
    run(whole("a", 3), Greedy(max_batch=1))
    assert in_use_at_release == [False, False]


def test_vectors_that_are_not_finite_fail_only_their_video() -> None:
    white = np.full((SIZE, SIZE, 3), 250, np.uint8)
    bright: list[DecodeEvent] = [DecodedFrame(video("bright"), 1, 0.0, white), done("bright")]
    events, _ = run([*whole("a", 2), *bright, *whole("b", 5)], FakeEncoder(nan_above=240))
    assert [(e.video.video_id, e.error.code) for e in events if isinstance(e, VideoFailed)] == [
        ("bright", "non_finite")
    ]
    np.testing.assert_array_equal(features_of(events)["a"], one_by_one("a", range(2)))
    np.testing.assert_array_equal(features_of(events)["b"], one_by_one("b", range(5)))


@pytest.mark.parametrize("value", [0.0, np.inf, 3.0])
def test_vectors_that_are_not_unit_fail_their_video(value: float) -> None:
    class Wrong(FakeEncoder):
        def encode_frames(self, frames: UInt8) -> Float32:
            return np.full((len(frames), self.spec.dim), value, np.float32)

    events, _ = run(whole("a", 2), Wrong())
    assert [e.error.code for e in events if isinstance(e, VideoFailed)] == ["non_finite"]


def test_other_errors_of_the_encoder_are_not_hidden() -> None:
    class Broken(FakeEncoder):
        def encode_frames(self, frames: UInt8) -> Float32:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        run(whole("a", 2), Broken())


def test_words_of_out_of_memory() -> None:
    for error in (
        MemoryError(),
        RuntimeError("CUDA out of memory. Tried to allocate"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ):
        assert embed.is_out_of_memory(error)
    assert not embed.is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))


# ----------------------------------------------------------------------------------------------- threads and time


def slowly(events: Sequence[DecodeEvent], seconds: float) -> Iterator[DecodeEvent]:
    for event in events:
        if isinstance(event, DecodedFrame):
            time.sleep(seconds)
        yield event


def test_an_error_of_the_decoder_reaches_the_caller() -> None:
    def breaking() -> Iterator[DecodeEvent]:
        yield from whole("a", 8)
        raise OSError("the pool is gone")

    found: list[EmbedEvent] = []
    with pytest.raises(OSError, match="the pool is gone"):
        for event in FrameEmbedder(FakeEncoder(), 4).embed(breaking(), threading.Event()):
            found.append(event)
    assert set(features_of(found)) == {"a"}


def test_decoding_and_encoding_overlap() -> None:
    """24 batches: 1.2 s of decoding and 1.2 s of encoding take about 1.2 s together."""
    started = time.monotonic()
    encoder = FakeEncoder(seconds_per_batch=0.05)
    events, _ = run(slowly(whole("a", 48), 0.025), encoder, batch_size=2)
    elapsed = time.monotonic() - started
    assert len(features_of(events)["a"]) == 48
    assert 1.2 <= elapsed < 2.2


def test_a_slow_encoder_slows_the_decoder_down() -> None:
    asked = 0

    def counted() -> Iterator[DecodeEvent]:
        nonlocal asked
        for event in whole("a", 400):
            asked += 1
            yield event

    events = FrameEmbedder(FakeEncoder(seconds_per_batch=0.02), 2).embed(counted(), threading.Event())
    assert isinstance(events, Generator)
    next(events)
    time.sleep(0.3)
    ahead = asked
    events.close()
    assert ahead <= 2 * (embed.QUEUED_BATCHES + 4)


@pytest.mark.parametrize("where", ["encoder", "decoder", "nobody reads"])
def test_stopping_does_not_wait_for_the_rest(where: str) -> None:
    stop = threading.Event()
    n_before = threading.active_count()
    encoder = FakeEncoder(seconds_per_batch=0.05 if where == "encoder" else 0)
    source = slowly(whole("a", 10_000), 0.2 if where == "decoder" else 0)
    events = FrameEmbedder(encoder, 2).embed(source, stop)
    assert isinstance(events, Generator)
    next(events)
    started = time.monotonic()
    if where == "nobody reads":
        events.close()
    else:
        threading.Timer(0.1, stop.set).start()
        for _ in events:
            pass
    assert time.monotonic() - started < 3
    time.sleep(0.05)
    assert threading.active_count() <= n_before


# ---------------------------------------------------------------------------------------------------------- texts


def test_any_number_of_texts_is_encoded_in_order() -> None:
    encoder = FakeEncoder()
    texts = [f"text number {i}" for i in range(150)]
    vectors = encode_texts(encoder, texts)
    np.testing.assert_array_equal(vectors, np.concatenate([encoder.encode_text([t]) for t in texts]))
    assert encode_texts(encoder, []).shape == (0, encoder.spec.dim)
