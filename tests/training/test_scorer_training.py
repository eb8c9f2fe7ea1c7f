"""Distilling captions into a scorer: what teaches, what is learnt, how it is measured, and the command."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import pipeline.cli.scorer  # registers the command
from command_line import fineco
from fakes import FakeEncoder
from models.builtin.world import Scene
from models.registry import load_encoder
from models.scorer import FrameScorer, load_scorer, score_frames_without_text
from models.scorer_file import BUILTIN, read_facts
from pipeline import store
from pipeline.collection import Collection, Snapshot
from pipeline.commands import Machine
from pipeline.commits import FEATURES, Row
from pipeline.config import DEFAULT_KEEP
from pipeline.errors import FinecoError, UsageError
from pipeline.progress import Progress
from pipeline.select import LEAST_COSINE, caption, parse_keep
from pipeline.training import scorer as training
from pipeline.training.builtin_scorer import empty_among_kept, lessons_of, plan, render, shows_nothing
from pipeline.training.scorer import Lesson, distil, lesson, measure, rank_correlation, read_lessons, train_scorer
from pipeline.types import Float32, FrameFeatures, Outcome, TimedText

DIM = 16
KEEP = parse_keep(DEFAULT_KEEP)
QUIET = Machine(quiet=True, say=lambda line: None)
assert pipeline.cli.scorer


def unit(rows: NDArray[Any]) -> Float32:
    unit_rows: Float32 = (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)
    return unit_rows


def planted(seed: int, n_frames: int = 24) -> tuple[Float32, str, Float32]:
    """A video whose text is about some of its frames; the others are noise, which looks alike in all videos.

    Which word the text is does not show in the noise, so a scorer must tell noise from the rest.
    """
    rng = np.random.default_rng(seed)
    word = f"word{seed}"
    topic = FakeEncoder(dim=DIM).encode_text([word])[0]
    noise = np.eye(DIM, dtype=np.float32)[:3]
    shown = rng.permutation(n_frames) < n_frames // 4
    rows = np.where(shown[:, None], topic, noise[rng.integers(0, 3, n_frames)])
    return unit(rows + 0.1 * rng.standard_normal(rows.shape)), word, topic


def planted_lessons(n: int, seed: int = 0) -> list[Lesson]:
    found = []
    for number in range(n):
        rows, word, topic = planted(1000 * seed + number)
        features = FrameFeatures(f"{seed}-{number}", rows, np.arange(len(rows), dtype=np.float64), 1.0)
        one = lesson(features, [TimedText(word)], topic[None], KEEP)
        assert one is not None
        found.append(one)
    return found


@pytest.fixture(scope="module")
def taught() -> FrameScorer:
    return distil(planted_lessons(120), planted_lessons(20, seed=1), seed=0)


# -------------------------------------------------------------------------------------------------------- measures


def spearman_by_loops(a: Sequence[float], b: Sequence[float]) -> float:
    def ranks(values: Sequence[float]) -> list[float]:
        return [sum(w < v for w in values) + (sum(w == v for w in values) + 1) / 2 for v in values]

    x, y = ranks(a), ranks(b)
    mx, my = sum(x) / len(x), sum(y) / len(y)
    cross = sum((p - mx) * (q - my) for p, q in zip(x, y, strict=True))
    norm = math.sqrt(sum((p - mx) ** 2 for p in x) * sum((q - my) ** 2 for q in y))
    return cross / norm if norm else 0.0


def test_rank_correlation_is_spearmans_with_ties_sharing_their_rank() -> None:
    rng = np.random.default_rng(0)
    for n in (2, 3, 10, 50):
        for levels in (2, 4, 1000):
            a, b = (rng.integers(0, levels, n).astype(np.float32) for _ in range(2))
            assert rank_correlation(a, b) == pytest.approx(spearman_by_loops(a.tolist(), b.tolist()), abs=1e-12)
    rising = np.arange(7, dtype=np.float32)
    assert rank_correlation(rising, np.exp(rising)) == pytest.approx(1)
    assert rank_correlation(rising, -rising) == pytest.approx(-1)
    assert rank_correlation(rising, np.ones(7, np.float32)) == 0


def test_the_measures_count_what_is_kept_in_common_at_the_same_number(taught: FrameScorer) -> None:
    lessons = planted_lessons(5, seed=2)
    by_scorer, by_uniform, correlations = [], [], []
    for video in lessons:
        scores = score_frames_without_text(taught, video.features.astype(np.float32)).tolist()
        kept, n = set(np.flatnonzero(video.kept).tolist()), len(scores)
        best = sorted(range(n), key=lambda i: (-scores[i], i))[: len(kept)]
        middles = [math.floor((i + 0.5) * n / len(kept)) for i in range(len(kept))]
        by_scorer.append(len(kept & set(best)) / len(kept))
        by_uniform.append(len(kept & set(middles)) / len(kept))
        correlations.append(spearman_by_loops(scores, video.scores.tolist()))
    found = measure(taught, lessons)
    assert found.videos == 5
    assert found.kept_by_scorer == pytest.approx(np.mean(by_scorer))
    assert found.kept_by_uniform == pytest.approx(np.mean(by_uniform))
    assert found.rank_correlation == pytest.approx(np.mean(correlations))


# -------------------------------------------------------------------------------------------------------- lessons


def test_the_teacher_is_caption_with_its_spans() -> None:
    rng = np.random.default_rng(3)
    rows, vectors = unit(rng.standard_normal((20, DIM))), unit(rng.standard_normal((2, DIM)))
    features = FrameFeatures("v", rows, np.arange(20, dtype=np.float64), 1.0)
    texts = [TimedText("early", 3.0, 6.0), TimedText("late", 12.0, 12.5)]
    one, expected = lesson(features, texts, vectors, KEEP), caption(features, KEEP, texts, vectors)
    assert one is not None
    np.testing.assert_array_equal(one.scores, expected.scores)
    np.testing.assert_array_equal(one.kept, expected.kept)
    np.testing.assert_array_equal(one.features, rows.astype(np.float16))
    assert (one.scores == LEAST_COSINE).any()


def test_a_video_that_says_nothing_about_an_order_teaches_nothing() -> None:
    rows = unit(np.random.default_rng(3).standard_normal((6, DIM)))
    times = np.arange(6, dtype=np.float64)
    assert lesson(FrameFeatures("v", rows, times, 1.0), [TimedText("later", 99.0, 100.0)], rows[:1], KEEP) is None
    still = FrameFeatures("v", np.repeat(rows[:1], 6, axis=0), times, 1.0)
    assert lesson(still, [TimedText("a")], rows[1:2], KEEP) is None


def test_a_videos_part_depends_on_its_id_alone_and_each_part_gets_its_share() -> None:
    nothing = np.zeros((1, 1), np.float16), np.zeros(1, np.float32), np.ones(1, np.bool_)
    parts = [Lesson(f"video {n}", *nothing).part for n in range(2000)]
    assert parts == [Lesson(f"video {n}", *nothing).part for n in range(2000)]
    shares = {part: n / 2000 for part, n in Counter(parts).items()}
    assert shares == {
        "training": pytest.approx(0.8, abs=0.03),
        "validation": pytest.approx(0.1, abs=0.03),
        "held out": pytest.approx(0.1, abs=0.03),
    }


def test_the_loss_is_the_cross_entropy_of_two_softmaxes_over_each_videos_frames() -> None:
    lessons = [*planted_lessons(2), *(lesson_with_a_span() for _ in range(1))]
    torch.manual_seed(0)
    scorer = FrameScorer(DIM, 8)
    expected = []
    for video in lessons:
        predicted = score_frames_without_text(scorer, video.features.astype(np.float32)).astype(np.float64)
        worst = min(s for s in video.scores.tolist() if s > LEAST_COSINE)
        scores = np.array([max(s, worst) for s in video.scores.tolist()])
        wanted = training.SHARPNESS * (scores - scores.mean()) / scores.std()
        p, q = np.exp(wanted) / np.exp(wanted).sum(), np.exp(predicted) / np.exp(predicted).sum()
        expected.append(-(p * np.log(q)).sum())
    found = training._loss(scorer, [training._Frames.of(video) for video in lessons])
    assert found.item() == pytest.approx(np.mean(expected), rel=1e-5)


def lesson_with_a_span() -> Lesson:
    rows = unit(np.random.default_rng(8).standard_normal((9, DIM)))
    features = FrameFeatures("spanned", rows, np.arange(9, dtype=np.float64), 1.0)
    one = lesson(features, [TimedText("a", 2.0, 5.0)], rows[:1], KEEP)
    assert one is not None
    return one


def test_a_long_videos_step_sees_some_frames_in_the_context_of_all() -> None:
    whole = training._Frames.of(planted_lessons(1)[0])
    some = whole.some(5, torch.Generator().manual_seed(0))
    rows = [int((whole.features == row).all(1).nonzero()[0, 0]) for row in some.features]
    assert len(set(rows)) == 5
    assert torch.equal(some.statistics, whole.statistics[rows])
    assert torch.equal(some.logits, whole.logits[rows])
    assert torch.equal(some.mean, whole.mean)
    assert whole.some(24, torch.Generator()) is whole


# -------------------------------------------------------------------------------------------------------- learning


def test_what_captions_have_in_common_is_learnt_and_holds_for_other_videos(taught: FrameScorer) -> None:
    found = measure(taught, planted_lessons(30, seed=5))
    assert found.kept_by_scorer > 0.9
    assert found.kept_by_uniform < 0.5
    assert found.rank_correlation > 0.6


def test_nothing_is_learnt_from_scores_at_random() -> None:
    rng = np.random.default_rng(0)
    shuffled = []
    for video in planted_lessons(120):
        order = rng.permutation(len(video.scores))
        shuffled.append(Lesson(video.video_id, video.features, video.scores[order], video.kept[order]))
    found = measure(distil(shuffled[:100], shuffled[100:], seed=0), planted_lessons(30, seed=5))
    assert found.kept_by_scorer < 0.6


def test_the_same_seed_gives_the_same_scorer_and_leaves_the_callers_numbers_alone() -> None:
    train, other = planted_lessons(40), planted_lessons(8, seed=1)
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    first = distil(train, other, seed=3)
    assert torch.equal(torch.rand(1), expected)
    second, third = distil(train, other, seed=3), distil(train, other, seed=4)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
    assert not torch.equal(first.state_dict()["layers.0.weight"], third.state_dict()["layers.0.weight"])


def test_the_best_epoch_is_what_remains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever comes after it, and however bad: a learning rate at which training goes astray."""
    monkeypatch.setattr(training, "LEARNING_RATE", 0.3)
    monkeypatch.setattr(training, "PATIENCE", 3)
    reached = []
    real = measure

    def recorded(scorer: FrameScorer, lessons: Sequence[Lesson]) -> training.Measures:
        reached.append(real(scorer, lessons))
        return reached[-1]

    monkeypatch.setattr(training, "measure", recorded)
    validation, said = planted_lessons(8, seed=1), list[str]()
    scorer = distil(planted_lessons(64), validation, 0, said.append)
    correlations = [m.rank_correlation for m in reached]
    best = int(np.argmax(correlations))
    assert real(scorer, validation).rank_correlation == correlations[best]
    assert len(correlations) == best + 1 + 3
    assert said == [f"{len(correlations)} epochs; number {best + 1} was the best on 8 other videos"]


# ----------------------------------------------------------------------------------------------------- collections


def texts_of(number: int) -> tuple[TimedText, ...]:
    """Of every fifth video none, of every third two, the second of them about a part."""
    if number % 5 == 0:
        return ()
    return TimedText(f"word{number}"), *([TimedText("word999", 3.0, 5.0)] if number % 3 == 0 else [])


def make_collection(folder: Path, n: int, texts: bool = True, encoder: FakeEncoder | None = None) -> Collection:
    """Stored features of planted videos, in commits of 25."""
    spec = (encoder or FakeEncoder(dim=DIM)).spec
    collection = Collection.create(folder, {"model": "fake"})
    collection.update(
        {"model": "fake"}, {"name": spec.name, "fingerprint": spec.fingerprint, "precision": "fp32", "spec": {}}
    )
    with collection.writing("test") as writer:
        for start in range(0, n, 25):
            rows, stored = [], []
            for number in range(start, min(start + 25, n)):
                features, _, _ = planted(number)
                outcome = Outcome(f"id{number}", f"/videos/{number}.mp4", "ok", "embed")
                rows.append(Row(outcome, f"{number:032x}", 1, 1, 1, 24.0, texts_of(number) if texts else ()))
                times = np.arange(len(features), dtype=np.float64)
                video = store.StoredVideo(outcome.video_id, f"{number:032x}", 24.0)
                stored.append((video, FrameFeatures(outcome.video_id, store.round_features(features), times, 1.0)))
            writer.commit("embed", rows, [(FEATURES, partial(store.write_features, rows=stored))])
    return collection


def read(collection: Collection, say: list[str] | None = None) -> list[Lesson]:
    said = [] if say is None else say
    return read_lessons(Snapshot(collection), FakeEncoder(dim=DIM), Progress(quiet=True), said.append)


def test_the_lessons_are_what_caption_says_of_each_video_with_text(tmp_path: Path) -> None:
    lessons = read(make_collection(tmp_path / "c", 60))
    assert {one.video_id for one in lessons} == {f"id{n}" for n in range(60) if n % 5}
    for one in lessons:
        number = int(one.video_id[2:])
        rows, texts = store.round_features(planted(number)[0]), texts_of(number)
        features = FrameFeatures("v", rows, np.arange(len(rows), dtype=np.float64), 1.0)
        vectors = FakeEncoder(dim=DIM).encode_text([text.text for text in texts])
        expected = caption(features, KEEP, texts, vectors)
        np.testing.assert_array_equal(one.scores, expected.scores)
        np.testing.assert_array_equal(one.kept, expected.kept)


def test_texts_that_were_found_later_are_the_ones_that_teach(tmp_path: Path) -> None:
    collection = make_collection(tmp_path / "c", 10)
    with collection.writing("test") as writer:
        outcome = Outcome("id1", "/videos/1.mp4", "ok", "text")
        writer.commit("text", [Row(outcome, f"{1:032x}", 1, 1, 1, 24.0, (TimedText("word7"),))], [])
    one = next(one for one in read(collection) if one.video_id == "id1")
    expected = planted(1)[0] @ FakeEncoder(dim=DIM).encode_text(["word7"])[0]
    np.testing.assert_allclose(one.scores, expected, atol=2e-3)


def test_a_large_collection_is_sampled_by_the_hash_of_the_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collection, said = make_collection(tmp_path / "c", 60), list[str]()
    everything = [one.video_id for one in read(collection)]
    monkeypatch.setattr(training, "MOST_FRAMES", 24 * 10 + 5)
    assert [one.video_id for one in read(collection, said)] == everything[:10]
    assert said == ["10 of 48 videos with text are used: 245 frames are enough"]
    assert [training._hash(a) < training._hash(b) for a, b in pairwise(everything)] == [True] * 47


def test_a_scorer_is_trained_from_a_collection_and_says_where_it_comes_from(tmp_path: Path) -> None:
    encoder, output = FakeEncoder(dim=DIM), tmp_path / "new" / "scorer.safetensors"
    facts = train_scorer(make_collection(tmp_path / "kitchen", 150).folder, output, 5, QUIET, encoder)
    assert read_facts(output) == facts
    facts.check_encoder(output, "fake", encoder.spec.fingerprint)
    learnt = facts.distilled_from
    assert (learnt["source"], learnt["seed"], learnt["frames"]) == ("kitchen", 5, 24 * learnt["videos"])
    assert learnt["videos"] + learnt["validation_videos"] + learnt["held_out"]["videos"] == 120
    assert str(tmp_path).encode() not in output.read_bytes()
    held_out = [one for one in read(Collection(tmp_path / "kitchen")) if one.part == "held out"]
    assert measure(load_scorer(output), held_out).kept_by_scorer == learnt["held_out"]["kept_by_scorer"] > 0.8
    again = tmp_path / "again"
    train_scorer(tmp_path / "kitchen", again, 5, QUIET, encoder)
    assert again.read_bytes() == output.read_bytes()


def test_what_cannot_teach_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    encoder, output = FakeEncoder(dim=DIM), tmp_path / "scorer.safetensors"
    mute = make_collection(tmp_path / "mute", 10, texts=False).folder
    few = make_collection(tmp_path / "few", 6).folder
    empty = Collection.create(tmp_path / "empty", {"model": "fake"}).folder
    for folder, encoder_used, target, words in (
        (mute, encoder, output, "no video has a text"),
        (few, encoder, output, r"too few videos.*\(\d+ training, \d+ validation, \d+ held out\)"),
        (empty, encoder, output, "has no features yet"),
        (few, FakeEncoder(dim=DIM, seed=1), output, "encoder: this collection was made with fake"),
        (few, encoder, tmp_path, "is a folder"),
        (tmp_path / "nowhere", encoder, output, "is not a collection"),
    ):
        with pytest.raises(UsageError, match=words) as refused:
            train_scorer(folder, target, 0, QUIET, encoder_used)
        assert refused.value.hint
    assert not output.exists()


def test_an_earlier_scorer_stays_whole_when_the_disk_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "scorer.safetensors"
    output.write_bytes(b"the earlier one")

    def full(path: Path, scorer: FrameScorer, facts: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training, "save_scorer", full)
    with pytest.raises(FinecoError, match="No space left"):
        train_scorer(make_collection(tmp_path / "c", 60).folder, output, 0, QUIET, FakeEncoder(dim=DIM))
    assert output.read_bytes() == b"the earlier one"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["scorer.safetensors"]


def test_the_command_prints_its_measures_and_writes_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.registry.load_encoder", lambda name, device, precision: FakeEncoder(dim=DIM))
    folder, output = make_collection(tmp_path / "c", 100).folder, tmp_path / "s.safetensors"
    done = fineco("train-scorer", "-c", folder, "-o", output, "--seed", 2)
    assert done.code == 0, done.err
    held_out = read_facts(output).distilled_from["held_out"]
    assert f"{held_out['kept_by_scorer']:.3f}" in done.out.decode()
    assert "teach" in done.err
    hushed = fineco("-q", "train-scorer", "-c", folder, "-o", tmp_path / "t.safetensors", "--seed", 2, "--json")
    assert (hushed.code, hushed.err) == (0, "")
    assert json.loads(hushed.out)["held_out"] == held_out
    assert (tmp_path / "t.safetensors").read_bytes() == output.read_bytes()
    refused = fineco("train-scorer", "-c", tmp_path / "nowhere", "-o", output)
    assert (refused.code, refused.out) == (2, b"")
    assert refused.err.startswith("error: ")


# --------------------------------------------------------------------------------------- the built-in encoder's own


def test_the_rendered_videos_show_their_subject_others_and_nothing() -> None:
    stories = plan(40, "a seed", held_out=True, alike=0.5)
    assert stories == plan(40, "a seed", held_out=True, alike=0.5)
    assert stories != plan(40, "another", held_out=True, alike=0.5)
    for story in stories:
        scenes = [shot.shows for shot in story.shots if isinstance(shot.shows, Scene)]
        assert any(s.held_out and s.colour in story.text for s in scenes)
        empty = shows_nothing(story)
        assert 0 < empty.sum() < len(empty) == sum(shot.n_frames for shot in story.shots)
    frames = render(stories[0], 32)
    assert frames.shape == (len(shows_nothing(stories[0])), 32, 32, 3)
    assert frames.dtype == np.uint8


def test_about_scenes_of_training_no_held_out_scene_is_spoken_of() -> None:
    for story in plan(20, "a seed", held_out=False, alike=1.0):
        counts = Counter(shot.shows for shot in story.shots if isinstance(shot.shows, Scene))
        assert any(not scene.held_out and scene.colour in story.text for scene in counts)


def test_empty_frames_among_those_kept_are_counted() -> None:
    stories = plan(3, "a seed", held_out=False, alike=1.0)
    lessons = lessons_of(stories, FakeEncoder(dim=DIM), workers=1)
    torch.manual_seed(0)
    scorer = FrameScorer(DIM)
    shares = []
    for story, video in zip(stories, lessons, strict=True):
        scores = score_frames_without_text(scorer, video.features.astype(np.float32))
        best = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[: math.ceil(0.25 * len(scores))]
        shares.append(np.mean([shows_nothing(story)[i] for i in best]))
    found = empty_among_kept(scorer, stories, lessons)
    assert found[0] == pytest.approx(np.mean(shares))
    assert 0 < found[1] < 1


def test_the_shipped_scorer_avoids_empty_frames_of_scenes_that_nobody_was_trained_on() -> None:
    stories = plan(8, "a test's own", held_out=True, alike=0.5)
    lessons, scorer = lessons_of(stories, load_encoder("builtin", "cpu", "fp32"), workers=1), load_scorer(BUILTIN)
    by_scorer, by_uniform = empty_among_kept(scorer, stories, lessons)
    assert by_scorer < 0.15 < by_uniform
    found = measure(scorer, lessons)
    assert found.kept_by_scorer > found.kept_by_uniform + 0.1
