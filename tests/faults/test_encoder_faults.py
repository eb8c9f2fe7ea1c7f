"""An encoder that runs out of memory or gives no numbers costs a video at most, wherever it happens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import small_runs
from command_line import fineco
from fakes import FakeEncoder
from guards import Guard
from models.base import Encoder
from pipeline import commands
from pipeline.collection import Collection
from pipeline.commands import Sources
from pipeline.config import SelectOptions
from pipeline.embed import TEXTS_PER_BATCH, encode_captions, encode_texts
from pipeline.errors import FinecoError, VideoError
from pipeline.inspect import failures_of
from pipeline.types import Float32, UInt8
from small_runs import CAPTIONS, checked, embeddings_of, features_of, machine, make_videos, run
from videos import encode_video

GUARDS = [
    Guard(
        faults=(19,),
        file="pipeline/embed.py",
        old="self._capacity = (self._capacity + 1) // 2",
        new="raise MemoryError",
        test="test_out_of_memory_halves_the_batch_and_a_run_ends_with_the_same_vectors",
    ),
    Guard(
        faults=(19,),
        file="pipeline/embed.py",
        old="            if self._capacity == 1:",
        new="            if self._capacity == 1:\n                raise MemoryError\n            if False:",
        test="test_a_frame_that_never_fits_fails_its_video_and_the_run_goes_on",
    ),
    Guard(
        faults=(19,),
        file="pipeline/embed.py",
        old="        at_once //= 2",
        new="        raise MemoryError",
        test="test_texts_that_do_not_fit_are_halved_to_the_same_vectors",
    ),
    Guard(
        faults=(19, 20),
        file="pipeline/run.py",
        old="        except VideoError as error:\n            shard.fail(VideoFailed(event.decoded.video",
        new="        except ZeroDivisionError as error:\n            shard.fail(VideoFailed(event.decoded.video",
        test="test_a_caption_that_cannot_be_encoded_fails_its_video_only[nan]",
    ),
    Guard(
        faults=(20,),
        file="pipeline/embed.py",
        old="                elif are_unit(rows):",
        new="                elif True:",
        test="test_a_frame_without_a_vector_fails_its_video_only[nan]",
    ),
    Guard(
        faults=(20,),
        file="pipeline/embed.py",
        old="    if not are_unit(rows):",
        new="    if False:",
        test="test_a_query_without_a_vector_is_one_line[zero]",
    ),
    Guard(
        faults=(20,),
        file="pipeline/embed.py",
        old="return round_features(encoded) if are_unit(encoded) else NOT_FINITE",
        new="return round_features(encoded)",
        test="test_a_head_without_a_vector_fails_its_video_only",
    ),
    Guard(
        faults=(20,),
        file="pipeline/reselect.py",
        old="except VideoError as error:",
        new="except ZeroDivisionError as error:",
        test="test_select_goes_on_without_a_caption_that_cannot_be_encoded",
    ),
]

pytestmark = pytest.mark.fault

VALUES = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf, "zero": 0.0, "long": 7.0}


class Spoiled(FakeEncoder):
    """Gives a white frame, or a text with the word `poison`, a row of one value; or runs out of memory for it."""

    def __init__(self, value: float | None, texts_at_once: int = 1000, **options: int) -> None:
        super().__init__(**options)
        self.value, self.texts_at_once = value, texts_at_once
        self.text_batches: list[int] = []

    def encode_frames(self, frames: UInt8) -> Float32:
        vectors = super().encode_frames(frames)
        white = frames.mean(axis=(1, 2, 3)) > 250
        if self.value is not None:
            vectors[white] = self.value
        return vectors

    def encode_text(self, texts: Sequence[str]) -> Float32:
        self.text_batches.append(len(texts))
        poisoned = np.array(["poison" in text for text in texts])
        if len(texts) > self.texts_at_once or (self.value is None and poisoned.any()):
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB (fake)")
        vectors = super().encode_text(texts)
        if self.value is not None:
            vectors[poisoned] = self.value
        return vectors


class SpoiledHead(FakeEncoder):
    """A model over the fake one; the vectors of a video of five rows are not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.base: Encoder = FakeEncoder()

    def encode_video(self, features: Float32) -> Float32:
        return np.full_like(features, np.nan) if len(features) == 5 else features

    def score_pairs(self, texts: Sequence[str], clips: Sequence[Float32]) -> Float32:
        raise NotImplementedError


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    return make_videos(tmp_path / "v", 3)


def failures(collection: Path) -> list[tuple[str, str, str]]:
    rows = [row.outcome for row in failures_of(collection, skipped=False)]
    return [(Path(row.path).name, row.code, row.stage) for row in rows]


def test_out_of_memory_halves_the_batch_and_a_run_ends_with_the_same_vectors(videos: Path, tmp_path: Path) -> None:
    run(tmp_path / "roomy", videos)
    summary = run(tmp_path / "tight", videos, FakeEncoder(max_batch=3))
    assert (summary.n_ok, summary.any_failed) == (3, False)
    assert "the device ran out of memory; batches of 2 frames fit" in summary.notes
    assert checked(tmp_path / "tight")["digest"] == checked(tmp_path / "roomy")["digest"]


def test_a_frame_that_never_fits_fails_its_video_and_the_run_goes_on(videos: Path, tmp_path: Path) -> None:
    summary = run(tmp_path / "c", videos, FakeEncoder(max_batch=0))
    assert (summary.n_ok, summary.codes) == (0, {"memory": 3})
    assert {code for _, code, _ in failures(tmp_path / "c")} == {"memory"}
    summary = run(tmp_path / "c", Sources([str(videos)], retry_failed=True))
    assert (summary.n_ok, summary.any_failed) == (3, False)


@pytest.mark.parametrize("fits", [1, 2, 3, 40])
def test_texts_that_do_not_fit_are_halved_to_the_same_vectors(fits: int) -> None:
    texts = [f"text number {number}" for number in range(2 * TEXTS_PER_BATCH + 1)]
    encoder = Spoiled(0.0, texts_at_once=fits)
    np.testing.assert_array_equal(encode_texts(encoder, texts), FakeEncoder().encode_text(texts))
    assert sum(n > fits for n in encoder.text_batches) <= 6  # halved for good


def test_a_text_that_never_fits_is_an_error_of_its_caller() -> None:
    with pytest.raises(FinecoError, match=r"^fake: one text does not fit the device's memory"):
        encode_texts(Spoiled(0.0, texts_at_once=0), ["a"])
    with pytest.raises(VideoError) as failed:
        encode_captions(Spoiled(0.0, texts_at_once=0), ["a"])
    assert (failed.value.code, failed.value.stage) == ("memory", "select")


def test_other_errors_of_the_text_side_are_not_taken_for_memory() -> None:
    class Broken(FakeEncoder):
        def encode_text(self, texts: Sequence[str]) -> Float32:
            raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        encode_texts(Broken(), ["a"])


@pytest.mark.parametrize("value", VALUES)
def test_a_frame_without_a_vector_fails_its_video_only(value: str, videos: Path, tmp_path: Path) -> None:
    encode_video(videos / "white.mp4", [np.full((48, 64, 3), 255, np.uint8)] * 10)
    summary = run(tmp_path / "c", videos, Spoiled(VALUES[value]))
    assert (summary.n_ok, summary.codes) == (3, {"non_finite": 1})
    assert failures(tmp_path / "c") == [("white.mp4", "non_finite", "embed")]
    assert checked(tmp_path / "c")["indexed"] == 3
    assert all(np.isfinite(features.features).all() for features in features_of(tmp_path / "c").values())


@pytest.mark.parametrize(
    ("value", "code"),
    [(np.nan, "non_finite"), (np.inf, "non_finite"), (0.0, "non_finite"), (None, "memory")],
    ids=["nan", "inf", "zero", "memory"],
)
def test_a_caption_that_cannot_be_encoded_fails_its_video_only(
    value: float | None, code: str, videos: Path, tmp_path: Path
) -> None:
    (videos / "clip0.txt").write_text("fine\npoison\n")
    summary = run(tmp_path / "c", videos, Spoiled(value))
    assert (summary.n_ok, summary.codes) == (2, {code: 1})
    assert failures(tmp_path / "c") == [("clip0.mp4", code, "select")]
    assert checked(tmp_path / "c")["indexed"] == 2


def test_select_goes_on_without_a_caption_that_cannot_be_encoded(videos: Path, tmp_path: Path) -> None:
    collection = tmp_path / "c"
    (videos / "clip0.txt").write_text("poison\n")
    run(collection, videos, select=SelectOptions("uniform", "2"))
    commands.select(collection, SelectOptions("caption", "0.5"), machine(), Spoiled(np.nan))
    assert failures(collection) == [("clip0.mp4", "non_finite", "select")]
    assert len(embeddings_of(collection)) == 2
    assert commands.index(collection, machine=machine())
    assert checked(collection)["indexed"] == 2
    commands.select(collection, SelectOptions("caption", "0.5"), machine(), FakeEncoder())  # a sound one
    assert len(embeddings_of(collection)) == 3


def test_topics_that_cannot_be_encoded_are_one_error_before_any_work(videos: Path, tmp_path: Path) -> None:
    with pytest.raises(FinecoError, match="gave a text a vector that is not finite"):
        run(tmp_path / "c", videos, Spoiled(np.nan), SelectOptions("topics", "2", ("fine", "poison")))
    assert Collection(tmp_path / "c").state().paths == {}


def test_a_head_without_a_vector_fails_its_video_only(videos: Path, tmp_path: Path) -> None:
    summary = run(tmp_path / "c", videos, SpoiledHead())
    assert (summary.n_ok, summary.codes) == (2, {"non_finite": 1})  # clip0 has five samples
    assert failures(tmp_path / "c") == [("clip0.mp4", "non_finite", "embed")]


@pytest.mark.parametrize("value", [*VALUES, "memory"])
def test_a_query_without_a_vector_is_one_line(
    value: str, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "c", videos)
    spoiled = Spoiled(VALUES.get(value))
    monkeypatch.setattr("models.registry.load_encoder", lambda *names: spoiled)
    done = fineco("search", CAPTIONS[1], "poison", "-c", tmp_path / "c")
    assert (done.code, done.out) == (1, b"")
    assert done.err.startswith("error: fake: ") and len(done.err.splitlines()) == 2
    assert "unexpected" not in done.err
    assert fineco("search", CAPTIONS[1], "-c", tmp_path / "c").code == 0


def test_a_failure_in_one_video_leaves_the_vectors_of_the_others(videos: Path, tmp_path: Path) -> None:
    run(tmp_path / "sound", videos)
    encode_video(videos / "white.mp4", [np.full((48, 64, 3), 255, np.uint8)] * 10)
    run(tmp_path / "spoiled", videos, Spoiled(np.nan))
    sound, spoiled = (small_runs.features_of(tmp_path / name) for name in ("sound", "spoiled"))
    assert sound.keys() == spoiled.keys()
    for path, features in sound.items():
        np.testing.assert_array_equal(features.features, spoiled[path].features)
