"""Multiple choice, moments and questions over a small collection, against slow loops over what is stored."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest

import small_runs
from fakes import FakeEncoder
from pipeline.annotations import Annotations, Caption, Choice, read_captions
from pipeline.collection import Collection
from pipeline.errors import UsageError
from pipeline.evaluate import temporal_iou
from pipeline.evaluation.choice import draw_choices, evaluate_choice
from pipeline.evaluation.material import Material, Options
from pipeline.evaluation.moments import evaluate_moments
from pipeline.evaluation.questions import (
    classify,
    evaluate_by_similarity,
    evaluate_classifier,
    most_frequent_answers,
)
from pipeline.moments import find_scenes, pool
from pipeline.probes import EVERYDAY_TEXTS
from pipeline.types import Float32, FrameFeatures
from small_evaluations import (
    WORDS,
    FakeVideoModel,
    captions,
    material,
    questions,
    random_unit,
    stored,
    values,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four videos of 5, 8, 10 and 13 frames at 5 a second; clip1 and clip3 have a text beside them."""
    folder = tmp_path_factory.mktemp("evaluated")
    small_runs.run(folder / "c", small_runs.make_videos(folder / "videos"))
    return folder / "c"


# --------------------------------------------------------------------------------------------------- multiple choice


def test_choices_are_scored_against_their_own_video_only(folder: Path) -> None:
    rows = tuple(Choice(f"clip{i}", WORDS, i) for i in range(4))
    annotations: Annotations[Choice] = Annotations("choices", "", "2" * 64, rows)
    features, encoder = stored(folder), FakeEncoder()
    right = 0
    for i in range(4):
        h = features[f"clip{i}"].features
        scores = [pool(h, np.zeros(len(h), np.float32)) @ text for text in encoder.encode_text(WORDS)]
        right += int(np.argmax(scores)) == i
    content = evaluate_choice(annotations, material(folder, score="mean"))
    assert values(content)["accuracy"] == right / 4
    assert content["chance"] == {"accuracy": 0.2}
    model = FakeVideoModel(encoder)  # for a given video it orders texts as the mean cosine does
    best = [int(np.argmax(model.score_pairs(WORDS, [features[f"clip{i}"].features])[:, 0])) == i for i in range(4)]
    assert values(evaluate_choice(annotations, material(folder, model)))["accuracy"] == sum(best) / 4


def test_a_drawn_list_has_one_own_caption_and_four_others_at_any_place() -> None:
    rows = [Caption(f"v{i}", f"text {(i * 3 + j) % 50}") for i in range(60) for j in range(2)]
    found = draw_choices(captions(*rows), 0)
    own = {video: {row.text for row in rows if row.video == video} for video in {row.video for row in rows}}
    assert [choice.video for choice in found.rows] == [f"v{i}" for i in range(60)]
    for choice in found.rows:
        assert len(set(choice.options)) == 5
        assert [option in own[choice.video] for option in choice.options] == [i == choice.answer for i in range(5)]
    assert {choice.answer for choice in found.rows} == set(range(5))
    assert draw_choices(captions(*rows), 0) == found != draw_choices(captions(*rows), 1)


def test_lists_that_cannot_be_drawn_are_told_so() -> None:
    with pytest.raises(UsageError, match="3 different captions are too few"):
        draw_choices(captions(*[Caption(f"v{i}", f"text {i}") for i in range(3)]), 0)
    with pytest.raises(UsageError, match="these have spans"):
        draw_choices(captions(Caption("v", "x", 1, 2)), 0)


def test_a_list_drawn_from_the_real_captions_asks_about_every_video(shared: Path) -> None:
    captions = read_captions(shared / "data" / "annotations" / "msrvtt_test_videodatainfo.json.zip")
    choices = draw_choices(captions, 0).rows
    own = {(caption.video, caption.text) for caption in captions.rows}
    assert len(choices) == 2990
    assert all([(c.video, o) in own for o in c.options].count(True) == 1 for c in choices)
    assert np.bincount([choice.answer for choice in choices]).min() > 500  # of 598 on average


# ---------------------------------------------------------------------------------------------------------- moments


def slow_moment(
    query: Float32, video: FrameFeatures, background: float, temperature: float, duration: float
) -> tuple[float, float]:
    """Start and end of the run of scenes around the best frame that stand out, scene by scene."""
    firsts = [*find_scenes(video.features).tolist(), len(video.features)]
    scores = [max(float(query @ row) for row in video.features[a:b]) for a, b in pairwise(firsts)]
    first = last = scores.index(max(scores))
    level = max(scores) - max((max(scores) - background) / 2, 2 * temperature)
    while first > 0 and scores[first - 1] >= level:
        first -= 1
    while last + 1 < len(scores) and scores[last + 1] >= level:
        last += 1
    end = float(video.pts_seconds[firsts[last + 1] - 1]) + video.span_seconds
    return float(video.pts_seconds[firsts[first]]), min(end, duration)


def test_the_moment_that_a_search_shows_first_is_held_against_its_span(folder: Path) -> None:
    """Queries are frames, where a text cannot lie, and anything: so the encoder is taught them."""
    videos = {name: stored(folder)[name] for name in ("clip0", "clip3")}
    anything = random_unit(np.random.default_rng(0), 150, 16)
    queries = np.concatenate([*(video.features for video in videos.values()), anything])
    taught = {f"query {i}": row for i, row in enumerate(queries)}

    class Taught(FakeEncoder):
        def encode_text(self, texts: Sequence[str]) -> Float32:
            plain = super().encode_text(texts)
            return np.stack([taught.get(text, row) for text, row in zip(texts, plain, strict=True)])

    opened = Material(Collection(folder), Options(draws=0), small_runs.machine(), Taught())
    matched = opened.match(set(videos)).found
    durations = {name: opened.read([video])[video.video_id].duration_seconds for name, video in matched.items()}
    assert durations == {"clip0": 1.0, "clip3": 2.5}  # the last frame of clip3 would last until 2.6
    frame_mean = np.mean([video.features.mean(axis=0) for video in videos.values()], axis=0)  # each counts as much
    unrelated = float(np.mean(FakeEncoder().encode_text(EVERYDAY_TEXTS) @ frame_mean))
    rows: list[Caption] = []
    expected, whole = [], []
    for (text, query), (name, video) in product(taught.items(), videos.items()):
        start = 0.1 * (len(rows) % round(10 * durations[name] - 3))  # inside the video
        level = min(float(query @ frame_mean), unrelated)
        found = slow_moment(query, video, level, FakeEncoder().spec.temperature, durations[name])
        rows.append(Caption(name, text, start, start + 0.4))
        expected.append(float(temporal_iou(*map(np.array, (*found, start, start + 0.4)))))
        whole.append(0.4 / durations[name])
    content = evaluate_moments(captions(*rows), opened)
    assert values(content)["mean_iou"] == pytest.approx(np.mean(expected), abs=1e-6)
    assert values(content)["r1_iou_0.5"] == np.mean(np.array(expected) >= 0.5)
    assert values(content, 1)["mean_iou"] == pytest.approx(np.mean(whole), abs=1e-6)
    assert content["scored"]["background_videos"] == 2


def test_a_sentence_annotated_twice_is_one_query_that_either_span_answers(folder: Path) -> None:
    once = evaluate_moments(captions(Caption("clip2", "x", 0, 2)), material(folder))
    twice = evaluate_moments(captions(Caption("clip2", "x", 50, 60), Caption("clip2", "x", 0, 2)), material(folder))
    assert twice["split"]["used"]["queries"] == 1
    assert values(twice) == values(once)
    with pytest.raises(UsageError, match="1 of 2 annotations have no start and end"):
        evaluate_moments(captions(Caption("clip2", "x", 0, 2), Caption("clip2", "y")), material(folder))


# -------------------------------------------------------------------------------------------------------- questions


def test_the_answer_whose_text_is_most_like_the_video_wins(folder: Path) -> None:
    asked = questions(
        *[(f"clip{i}", "what is there?", word) for i, word in enumerate(WORDS[:4])], ("clip0", "who?", "x")
    )
    said: list[str] = []
    content = evaluate_by_similarity(asked, WORDS, material(folder, score="mean"), say=said.append)
    features, encoder = stored(folder), FakeEncoder()
    texts = encoder.encode_text([f"what is there? {word}" for word in WORDS])
    right = 0
    for i in range(4):
        h = features[f"clip{i}"].features
        right += int(np.argmax(texts @ pool(h, np.zeros(len(h), np.float32)))) == i
    assert values(content)["accuracy"] == right / 5
    assert content["reachable"] == 4 / 5
    assert said[0] == "5 questions (2 different) x 5 answers: 10 texts to encode"
    encoded: list[str] = []

    class Spy(FakeEncoder):
        def encode_text(self, texts: Sequence[str]) -> Float32:
            encoded.extend(texts)
            return super().encode_text(texts)

    evaluate_by_similarity(asked, WORDS, Material(Collection(folder), Options(), small_runs.machine(), Spy()))
    assert encoded == [f"{question} {word}" for question in ("what is there?", "who?") for word in WORDS]
    by_model = evaluate_by_similarity(asked, WORDS, material(folder, FakeVideoModel(encoder)))
    assert by_model["scored"]["score"] == "model"


def test_a_limit_draws_some_questions_by_the_seed(folder: Path) -> None:
    asked = questions(*[("clip0", f"what is {i}?", "a dog") for i in range(30)])
    content = evaluate_by_similarity(asked, WORDS, material(folder, seed=1), limit=7)
    assert content["split"]["used"]["questions"] == content["results"][0]["queries"] == 7
    assert content == evaluate_by_similarity(asked, WORDS, material(folder, seed=1), limit=7)


def test_a_classifier_learns_what_depends_on_video_and_question() -> None:
    """The answer is 1 where both signs agree: neither video nor question alone tells it, their product does."""
    rng = np.random.default_rng(0)
    means = random_unit(rng, 200)
    vectors = random_unit(rng, 3000)
    videos = rng.integers(0, 200, 3000)
    targets = (means[videos, 0] * vectors[:, 0] > 0).astype(np.intp)
    train, asked = slice(0, 2500), slice(2500, 3000)
    scores = classify(means, (videos[train], vectors[train]), targets[train], (videos[asked], vectors[asked]), 2, 0)
    assert np.mean(scores.argmax(axis=1) == targets[asked]) > 0.85
    again = classify(means, (videos[train], vectors[train]), targets[train], (videos[asked], vectors[asked]), 2, 0)
    assert np.array_equal(scores, again)


def test_a_trained_classifier_is_measured_on_other_videos(folder: Path) -> None:
    train = questions(
        *[(f"clip{i}", f"is it {word}?", word) for i in (0, 1) for word in WORDS[:3]], ("clip0", "?", "rare")
    )
    asked = questions(*[("clip2", f"is it {word}?", word) for word in WORDS[:3]], ("clip3", "?", "unheard of"))
    content = evaluate_classifier(asked, train, WORDS[:3], material(folder))
    assert values(content)["accuracy"] == 3 / 4  # the question gives the answer away; one has none in the list
    assert content["trained"]["questions"] == 6 and content["trained"]["left_out"] == 1
    assert values(content, 1)["accuracy"] == 1 / 4
    with pytest.raises(UsageError, match="1 videos are both in the training file and in the evaluated one"):
        evaluate_classifier(questions(("clip1.mp4", "?", "a hill")), train, WORDS, material(folder))
    with pytest.raises(UsageError, match="no training question has an answer of the list"):
        evaluate_classifier(asked, train, ["yes"], material(folder))


def test_the_most_frequent_answers_come_first() -> None:
    assert most_frequent_answers(questions(*[("v", "?", answer) for answer in "cabbac"])) == ("a", "b", "c")
    assert most_frequent_answers(questions(*[("v", "?", answer) for answer in "caca b"])) == ("a", "c", " ", "b")
