"""Questions that an index is measured with, and their answers: against scoring every kept frame of every video."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fakes import FakeEncoder
from indexes.build import Probes
from indexes.generations import current_generation, read_sidecar
from indexes.id_map import video_key
from pipeline import commands, gallery, probes
from pipeline.gallery import Gallery
from pipeline.probes import EVERYDAY_TEXTS, N_QUESTIONS, make_probes, sampled_texts
from pipeline.rescore import Background
from pipeline.types import Float32
from small_galleries import DIM, SmallVideo, gallery_of, make_collection, random_video, unit
from small_runs import machine

TEMPERATURE = FakeEncoder().spec.temperature
VIDEOS = [random_video(number) for number in range(60)]
TEXTS = [f"text number {number}" for number in range(5)]
Encode = Callable[[Sequence[str]], Float32]


def encode(texts: Sequence[str]) -> Float32:
    return FakeEncoder().encode_text(texts) if texts else np.empty((0, DIM), np.float32)


def encode_nothing(texts: Sequence[str]) -> Float32:
    """Where the encoder cannot be had."""
    return np.empty((0, DIM), np.float32)


def made_of(
    folder: Path, *shards: Sequence[SmallVideo], texts: Sequence[str] = (), encode: Encode = encode
) -> tuple[Gallery, Probes, Background]:
    make_collection(folder, *shards)
    some = gallery_of(folder)
    return some, *make_probes(some, texts, encode, TEMPERATURE)


def score_slowly(query: Float32, frames: Float32) -> float:
    """The softmax-weighted mean of the frames' cosines."""
    cosines = [float(frame.astype(np.float64) @ query) for frame in frames]
    weights = [math.exp((cosine - max(cosines)) / TEMPERATURE) for cosine in cosines]
    return math.fsum(w * c for w, c in zip(weights, cosines, strict=True)) / math.fsum(weights)


def frames_of(some: Gallery, n_videos: int | None = None) -> dict[str, Float32]:
    """The kept frames of every video, or of the first by key, video by video in that order."""
    found: dict[int, Float32] = {}
    for block in some.frames(len(some) if n_videos is None else n_videos):
        for at, video in enumerate(block.videos.tolist()):
            found[video] = block.features[block.offsets[at] : block.offsets[at + 1]]
    return {some.video_ids[video]: found[video] for video in sorted(found)}


def answers_slowly(frames: dict[str, Float32], query: Float32) -> set[str]:
    """The videos that an exhaustive search finds first: several only where they are as good as equal."""
    scores = {video_id: score_slowly(query, rows) for video_id, rows in frames.items()}
    return {video_id for video_id, score in scores.items() if score >= max(scores.values()) - 1e-5}


def copies(video: SmallVideo, n: int) -> list[SmallVideo]:
    return [replace(video, video_id=f"{video.video_id} copy {number}") for number in range(n)]


# ----------------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("block_rows", [1, 40, 10_000])
def test_answers_are_those_of_an_exhaustive_loop_over_all_kept_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_rows: int
) -> None:
    monkeypatch.setattr(gallery, "BLOCK_ROWS", block_rows)
    monkeypatch.setattr(probes, "N_QUESTIONS", 20)
    three = copies(VIDEOS[3], 3)
    some, found, _ = made_of(
        tmp_path / "c", [*VIDEOS[:9], three[0]], VIDEOS[9:12], [*VIDEOS[12:], *three[1:]], texts=TEXTS
    )
    assert len(found.vectors) == len(found.right) == 20 + len(EVERYDAY_TEXTS)
    assert found.vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found.vectors, axis=1), 1, atol=1e-6)
    n_right, frames = [], frames_of(some)
    for query, right in zip(found.vectors, found.right, strict=True):
        assert right.dtype == np.int32
        names = [some.video_ids[video] for video in right.tolist()]
        assert len(set(names)) == len(names)
        assert set(names) == answers_slowly(frames, query)
        n_right.append(len(names))
    assert set(n_right) == {1, 4}  # the video with copies, and its copies, are as good


@pytest.mark.parametrize("temperature", [0.01, 1.0])
def test_answers_are_those_of_the_encoders_own_temperature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    """One good frame among bad ones beats fair ones throughout, or does not."""
    monkeypatch.setattr(probes, "EVERYDAY_TEXTS", ("asked for",))
    query = FakeEncoder().encode_text(["asked for"])[0]
    away = unit(np.eye(DIM)[0] - query[0] * query)
    at = [unit(c * query + math.sqrt(1 - c * c) * away) for c in (0.9, -0.9, 0.5)]
    videos = [SmallVideo("one good", np.stack([at[0], *[at[1]] * 5]), (6,)), SmallVideo("fair", at[2][None], (1,))]
    make_collection(tmp_path / "c", videos)
    some = gallery_of(tmp_path / "c")
    found, _ = make_probes(some, [], encode, temperature)
    (right,) = found.right[0].tolist()
    np.testing.assert_array_equal(found.vectors[0], query)
    assert some.video_ids[right] == ("one good" if temperature == 0.01 else "fair")


@pytest.mark.parametrize("n_shards", [1, 3])
@pytest.mark.parametrize("n_equal", [1, 4, 5, 6, 12])
def test_a_question_that_too_many_videos_answer_alike_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_equal: int, n_shards: int
) -> None:
    monkeypatch.setattr(probes, "MOST_TIED", 5)
    monkeypatch.setattr(probes, "N_QUESTIONS", 0)
    monkeypatch.setattr(gallery, "BLOCK_ROWS", 20)
    texts = ("many answers", "one answer")
    monkeypatch.setattr(probes, "EVERYDAY_TEXTS", texts)
    asked = FakeEncoder().encode_text(texts)
    equal = copies(SmallVideo("equal", asked[:1], (1,)), n_equal)
    videos = [*VIDEOS[:10], *equal, *VIDEOS[10:20]]
    some, found, _ = made_of(tmp_path / "c", *(videos[at::n_shards] for at in range(n_shards)))
    if n_equal <= 5:
        np.testing.assert_array_equal(found.vectors, asked)
        assert {some.video_ids[v] for v in found.right[0].tolist()} == {video.video_id for video in equal}
        assert found.about == "2 everyday texts"
    else:
        np.testing.assert_array_equal(found.vectors, asked[1:])
        assert found.about == "1 everyday text"
    assert {some.video_ids[v] for v in found.right[-1].tolist()} == answers_slowly(frames_of(some), asked[1])


def test_many_equal_videos_do_not_hide_one_that_is_better(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it comes before them, among them or after them."""
    monkeypatch.setattr(probes, "MOST_TIED", 3)
    monkeypatch.setattr(probes, "EVERYDAY_TEXTS", ("asked for",))
    monkeypatch.setattr(probes, "N_QUESTIONS", 0)
    monkeypatch.setattr(gallery, "BLOCK_ROWS", 4)
    query = FakeEncoder().encode_text(["asked for"])[0]
    best = SmallVideo("best", query[None], (1,))
    equal = copies(SmallVideo("good", unit(query + 0.1 * np.eye(DIM)[:1]), (1,)), 12)
    for at in (0, 6, 12):
        some, found, _ = made_of(tmp_path / str(at), [*equal[:at], best, *equal[at:]])
        assert [[some.video_ids[v] for v in right.tolist()] for right in found.right] == [["best"]]


# --------------------------------------------------------------------------------------------------------- questions


def test_texts_beside_videos_ask_where_there_are_any_and_frames_in_the_place_of_the_rest(tmp_path: Path) -> None:
    _, found, _ = made_of(tmp_path / "c", VIDEOS, texts=TEXTS)
    n_everyday, n_frames = len(EVERYDAY_TEXTS), len(VIDEOS)  # a frame of each video, for there are no hundred videos
    np.testing.assert_array_equal(found.vectors[: 5 + n_everyday], encode([*TEXTS, *EVERYDAY_TEXTS]))
    assert len(found.vectors) == 5 + n_everyday + n_frames
    assert found.about == f"5 texts beside videos, {n_everyday} everyday texts, {n_frames} kept frames with noise"


@pytest.mark.parametrize(("n_texts", "n_frames"), [(0, 30), (10, 20), (30, 0)])
def test_texts_and_frames_are_so_many_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_texts: int, n_frames: int
) -> None:
    monkeypatch.setattr(probes, "N_QUESTIONS", 30)
    texts = [f"another text {number}" for number in range(n_texts)]
    _, found, _ = made_of(tmp_path / "c", VIDEOS, texts=texts)
    parts = (
        (n_texts, "texts beside videos"),
        (len(EVERYDAY_TEXTS), "everyday texts"),
        (n_frames, "kept frames with noise"),
    )
    assert found.about == ", ".join(f"{n} {kind}" for n, kind in parts if n)
    assert len(found.vectors) == 30 + len(EVERYDAY_TEXTS)


def test_a_frame_asks_with_noise_of_its_own_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cosine with the question is about 0.7: a question that is a frame itself would be found too easily."""
    monkeypatch.setattr(probes, "N_QUESTIONS", 20)
    some, found, _ = made_of(tmp_path / "c", VIDEOS, encode=encode_nothing)
    nearest = []
    for frames, query in zip(
        frames_of(some, 20).values(), found.vectors, strict=True
    ):  # the first twenty by their keys
        cosines = frames @ query
        nearest.append(float(cosines.max()))
    assert 0.6 < np.mean(nearest) < 0.8 and max(nearest) < 0.95
    assert len(found.vectors) == 20


@pytest.mark.parametrize("at_once", [1, 500, 4_000_000])
def test_too_many_frames_are_asked_of_a_sample_of_the_videos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """The first by key, which is by chance; however many questions are scored at once."""
    monkeypatch.setattr(probes, "SCORES_AT_ONCE", at_once)
    some, _, _ = made_of(tmp_path / "a", VIDEOS)
    monkeypatch.setattr(probes, "SCORED_FRAMES", int(some.lengths[:11].sum()))
    some, found, background = made_of(tmp_path / "b", VIDEOS)
    assert found.n_videos == 11 and found.about.endswith("asked of 11 of the videos")
    frames = frames_of(some, 11)
    assert list(frames) == some.video_ids[:11]
    for query, right in zip(found.vectors, found.right, strict=True):
        assert {some.video_ids[video] for video in right.tolist()} == answers_slowly(frames, query)
    means = [rows.astype(np.float64).mean(axis=0) for rows in frames.values()]
    np.testing.assert_allclose(background.frame_mean, np.mean(means, axis=0), atol=1e-7)


def test_growing_a_collection_changes_few_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A video asks the same whichever others there are."""
    monkeypatch.setattr(probes, "N_QUESTIONS", 20)
    asked = []
    for n in (40, 44, 50):
        _, found, _ = made_of(tmp_path / str(n), VIDEOS[:n], encode=encode_nothing)
        asked.append({query.tobytes() for query in found.vectors})
    for before, after, n_new in zip(asked, asked[1:], (4, 6), strict=False):
        assert len(before) == len(after) == 20
        assert len(before - after) <= n_new
    some = gallery_of(tmp_path / "50")
    assert len({query.tobytes() for query in probes.disturbed_frames(some, 50)}) == 50
    assert asked[-1] <= {query.tobytes() for query in probes.disturbed_frames(some, 50)}


def test_without_an_encoder_only_frames_ask(tmp_path: Path) -> None:
    some, found, background = made_of(tmp_path / "c", VIDEOS, texts=TEXTS, encode=encode_nothing)
    assert found.about == f"{len(VIDEOS)} kept frames with noise"
    assert len(found.vectors) == len(VIDEOS)
    assert background.unrelated is None
    frames = frames_of(some)
    for query, right in list(zip(found.vectors, found.right, strict=True))[::7]:
        assert {some.video_ids[v] for v in right.tolist()} == answers_slowly(frames, query)


def test_a_question_is_none_where_every_video_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "MOST_TIED", 3)
    _, found, background = made_of(tmp_path / "c", copies(VIDEOS[0], 5))
    assert (len(found.vectors), len(found.right), found.about) == (0, 0, "none")
    assert found.vectors.shape == (0, DIM)
    assert background.unrelated is not None


def test_texts_are_one_of_each_of_the_first_videos_by_key() -> None:
    texts = {f"clip-{number}": [f"{number} of {n}" for n in range(1 + number % 3)] for number in range(250)}
    found = sampled_texts(texts)
    chosen = sorted(texts, key=video_key)[:N_QUESTIONS]
    assert found == [texts[v][video_key(v) % len(texts[v])] for v in chosen]
    assert len(found) == len(set(found)) == 100
    assert sampled_texts(dict(reversed(texts.items()))) == found
    fewer = {v: texts[v] for v in list(texts)[:240]}
    assert len(set(sampled_texts(fewer)) & set(found)) >= 90  # growing a collection changes few of them
    assert sampled_texts({}) == []


# ------------------------------------------------------------------------------------------- the order of the videos


def test_the_same_videos_in_other_shards_give_the_same_questions_answers_and_background_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    videos = [*VIDEOS, *copies(VIDEOS[3], 4)]
    shuffled = [videos[at] for at in np.random.default_rng(3).permutation(len(videos))]
    _, expected, background = made_of(tmp_path / "one", videos[:30], videos[30:], texts=TEXTS)
    monkeypatch.setattr(gallery, "BLOCK_ROWS", 50)
    for name, shards in (
        ("at once", [shuffled]),
        ("in many", [shuffled[:1], shuffled[1:5], shuffled[5:33], shuffled[33:]]),
        ("back", [videos[::-1]]),
    ):
        _, found, other = made_of(tmp_path / name, *shards, texts=TEXTS)
        np.testing.assert_array_equal(found.vectors, expected.vectors)
        assert [sorted(right.tolist()) for right in found.right] == [sorted(r.tolist()) for r in expected.right]
        assert found.about == expected.about
        assert other.frame_mean.tobytes() == background.frame_mean.tobytes()
        assert other.unrelated == background.unrelated


# -------------------------------------------------------------------------------------------------------- background


def test_the_background_is_the_mean_over_videos_of_the_mean_of_their_frames(tmp_path: Path) -> None:
    """A long video weighs as much as a short one."""
    long = SmallVideo("long", np.repeat(VIDEOS[0].frames[:1], 500, axis=0), (500,))
    some, _, background = made_of(tmp_path / "c", VIDEOS[:5], [long, *VIDEOS[5:8]])
    means = [frames.astype(np.float64).mean(axis=0) for frames in frames_of(some).values()]
    assert background.frame_mean.dtype == np.float32
    np.testing.assert_allclose(background.frame_mean, np.mean(means, axis=0), atol=1e-7)
    everyday = [float(vector @ background.frame_mean) for vector in encode(EVERYDAY_TEXTS)]
    assert background.unrelated == pytest.approx(np.mean(everyday), abs=1e-6)


def test_a_query_scores_at_most_what_any_text_does_on_the_background() -> None:
    mean = np.array([0.6, 0.0, 0.3], np.float32)
    one, other = np.array([1, 0, 0], np.float32), np.array([0, 1, 0], np.float32)
    assert Background(mean, 0.2).of(one) == pytest.approx(
        0.2
    )  # the collection shows little else than what is asked for
    assert Background(mean, 0.2).of(other) == pytest.approx(0.0)
    assert Background(mean, 0.7).of(one) == pytest.approx(0.6)
    assert Background(mean, None).of(one) == pytest.approx(0.6)
    assert Background(mean, -0.3).of(other) == pytest.approx(-0.3)
    assert type(Background(mean, None).of(one)) is float


# -------------------------------------------------------------------------------------------- with a collection's own


def test_an_encoder_that_cannot_be_loaded_gives_a_line_and_frames_only(tmp_path: Path) -> None:
    make_collection(tmp_path / "c", [replace(video, texts=(f"text {video.video_id}",)) for video in VIDEOS[:30]])
    said: list[str] = []
    assert commands.index(tmp_path / "c", machine=machine(said.append))  # no such model as `fake`
    report = read_sidecar(current_generation(tmp_path / "c" / "index")).report
    assert report.probes == "30 kept frames with noise"
    assert (report.n_probes, report.n_found) == (30, 30)
    (line,) = [line for line in said if "measured without" in line]
    assert "fake" in line


def test_texts_beside_the_videos_are_found_in_the_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Watched(FakeEncoder):
        def encode_text(self, texts: Sequence[str]) -> Float32:
            asked.extend(texts)
            return super().encode_text(texts)

    monkeypatch.setattr(probes, "N_QUESTIONS", 12)
    videos = [replace(v, texts=(f"text {v.video_id}",) if n % 3 == 0 else ()) for n, v in enumerate(VIDEOS[:30])]
    make_collection(tmp_path / "c", videos)
    assert commands.index(tmp_path / "c", machine=machine(), encoder=Watched())
    report = read_sidecar(current_generation(tmp_path / "c" / "index")).report
    n_everyday = len(EVERYDAY_TEXTS)
    assert report.probes == f"10 texts beside videos, {n_everyday} everyday texts, 2 kept frames with noise"
    assert sorted(asked) == sorted([*(text for v in videos for text in v.texts), *EVERYDAY_TEXTS])


def test_texts_that_the_encoder_does_not_read_as_a_whole_or_gives_no_vector_ask_nothing(tmp_path: Path) -> None:
    class Picky(FakeEncoder):
        def caution(self, text: str) -> str:
            return "only its first word is read" if text.startswith("long") else ""

        def encode_text(self, texts: Sequence[str]) -> Float32:
            rows = super().encode_text(texts)
            rows[[text.startswith("odd") for text in texts]] = np.nan
            return rows

    texts = {0: "long text", 1: "odd text", 2: "plain text"}
    videos = [replace(v, texts=(texts[n],) if n in texts else ()) for n, v in enumerate(VIDEOS[:20])]
    make_collection(tmp_path / "c", videos)
    assert commands.index(tmp_path / "c", machine=machine(), encoder=Picky())
    report = read_sidecar(current_generation(tmp_path / "c" / "index")).report
    assert report.probes.startswith(f"1 text beside videos, {len(EVERYDAY_TEXTS)} everyday texts, 20 kept frames")
