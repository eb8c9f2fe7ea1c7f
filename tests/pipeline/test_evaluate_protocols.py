"""The protocols over small collections: matching, spans, scores, selectors, against slow loops over what is stored."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import small_runs
from fakes import FakeEncoder
from models.base import Encoder, EncoderSpec
from pipeline.annotations import Annotations, Caption, Choice, Question, read_captions
from pipeline.collection import Collection
from pipeline.config import SelectOptions
from pipeline.errors import UsageError
from pipeline.evaluate import dual_softmax, rank_rows, retrieval_metrics, temporal_iou
from pipeline.evaluation import retrieval
from pipeline.evaluation.choice import draw_choices, evaluate_choice
from pipeline.evaluation.clips import Clips, VideoRows, rows_in_span
from pipeline.evaluation.matching import match_videos
from pipeline.evaluation.material import Material, Options
from pipeline.evaluation.moments import evaluate_moments
from pipeline.evaluation.questions import (
    classify,
    evaluate_by_similarity,
    evaluate_classifier,
    most_frequent_answers,
)
from pipeline.evaluation.retrieval import evaluate_retrieval, evaluate_scores, pair_up
from pipeline.evaluation.scoring import mean_blocks, rescore_blocks
from pipeline.rescore import find_moments, rescore, score_frames
from pipeline.select import pool
from pipeline.types import Float32, FrameFeatures, UInt8, Video

WORDS = ("red block", "two blue birds", "a hill", "someone sings", "a dog")


class FakeVideoModel:
    """A VideoEncoder over the fake encoder: its pair score is 7 times the mean cosine, minus the length."""

    def __init__(self, base: FakeEncoder) -> None:
        self.base: Encoder = base
        self.spec: EncoderSpec = replace(base.spec, name="fake video model", weights_sha256="f" * 64)
        self.device, self.precision = base.device, base.precision

    def encode_frames(self, frames: UInt8) -> Float32:
        return self.base.encode_frames(frames)

    def encode_text(self, texts: Sequence[str]) -> Float32:
        return -self.base.encode_text(texts)

    def encode_video(self, features: Float32) -> Float32:
        return features

    def score_pairs(self, texts: Sequence[str], clips: Sequence[Float32]) -> Float32:
        vectors = self.base.encode_text(texts)
        columns = [7 * (vectors @ clip.T).mean(axis=1) - len(clip) for clip in clips]
        return np.stack(columns, axis=1).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four videos of 5, 8, 10 and 13 frames at 5 a second; clip1 and clip3 have a text beside them."""
    folder = tmp_path_factory.mktemp("evaluated")
    small_runs.run(folder / "c", small_runs.make_videos(folder / "videos"))
    return folder / "c"


def material(folder: Path, model: FakeVideoModel | None = None, **options: Any) -> Material:
    chosen = Options(**{"draws": 0, **options})
    return Material(Collection(folder), chosen, small_runs.machine(), None if model else FakeEncoder(), model)


def captions(*rows: Caption, dataset: str = "captions") -> Annotations[Caption]:
    return Annotations(dataset, "", "0" * 64, rows)


def questions(*rows: tuple[str, str, str]) -> Annotations[Question]:
    return Annotations("questions", "", "1" * 64, tuple(Question(*row) for row in rows))


def one_each() -> Annotations[Caption]:
    return captions(*[Caption(f"clip{i}", WORDS[i]) for i in range(4)])


def values(content: dict[str, Any], number: int = 0) -> dict[str, float]:
    found: dict[str, float] = content["results"][number]["values"]
    return found


def stored(folder: Path) -> dict[str, FrameFeatures]:
    """Features by file name without its extension."""
    return {Path(path).stem: features for path, features in small_runs.features_of(folder).items()}


# --------------------------------------------------------------------------------------------------------- matching


def video(video_id: str, path: str) -> Video:
    return Video(video_id, video_id, path, 1, 1, 1)


def test_videos_are_found_by_id_then_name_then_stem() -> None:
    videos = [video("id1", "/x/aa.mp4"), video("id2", "/x/-dh_u.webm"), video("aa", "/x/b.mp4")]
    matched = match_videos(["aa", "aa.mp4", "-dh_u", "id1", "zz", "aa.mkv"], videos)
    assert {name: found.video_id for name, found in matched.found.items()} == {
        "aa": "aa",
        "aa.mp4": "id1",
        "-dh_u": "id2",
        "id1": "id1",
    }
    assert matched.missing == ("aa.mkv", "zz")


def test_a_name_that_fits_two_videos_is_an_error_that_shows_both() -> None:
    videos = [video("1", "/x/aa.mp4"), video("2", "/y/aa.mkv"), video("3", "/y/b.mp4")]
    with pytest.raises(UsageError, match=r"'aa' fits 2 videos of the collection: /x/aa.mp4, /y/aa.mkv"):
        match_videos(["aa"], videos)
    assert match_videos(["b", "aa.mp4"], videos).missing == ()


# ------------------------------------------------------------------------------------------------------------ spans


def rows_of(pts: Sequence[float], span: float) -> VideoRows:
    return VideoRows(np.eye(len(pts), dtype=np.float32), np.array(pts, np.float64), span, 0.0)


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=12).map(sorted),
    st.integers(1, 6),
    st.integers(0, 45),
    st.integers(0, 9),
)
def test_a_span_has_the_rows_that_meet_it_or_the_nearest(pts: list[int], span: int, start: int, length: int) -> None:
    end = start + length
    meets = [i for i, t in enumerate(pts) if t + span > start and (t < end or t == start)]
    found = rows_in_span(rows_of(pts, span), start, end)
    if meets:
        assert list(range(found.start, found.stop)) == meets
    else:
        distances = [abs(t + span / 2 - (start + end) / 2) for t in pts]
        assert found.stop == found.start + 1
        assert distances[found.start] == min(distances)


def test_a_span_beside_the_frames_takes_the_nearest_one() -> None:
    video = rows_of([0, 1, 2, 10], 1)
    assert rows_in_span(video, 20, 25) == slice(3, 4)
    assert rows_in_span(video, 4, 5) == slice(2, 3)
    assert rows_in_span(video, 1.0, 1.0) == slice(1, 2)
    assert rows_in_span(rows_of([0, 10], 4), 8, 9) == slice(1, 2)  # the frame's middle counts, not its start or end
    assert rows_in_span(rows_of([0, 10], 4), 4, 5) == slice(0, 1)


# ----------------------------------------------------------------------------------------------------------- scores


def random_unit(rng: np.random.Generator, n: int, dim: int = 8) -> Float32:
    x = rng.standard_normal((n, dim))
    unit: Float32 = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    return unit


def whole(blocks: Any) -> Float32:
    return np.concatenate([block for _, block in blocks])


def test_blocks_of_scores_are_those_of_search_and_index(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    rows = [random_unit(rng, n) for n in (1, 4, 7)]
    texts, clips = random_unit(rng, 9), Clips(rows)
    for block_bytes in (1, 300, 10**6):  # one text, a few, all at once
        monkeypatch.setattr("pipeline.evaluation.scoring.BLOCK_BYTES", block_bytes)
        weighted, mean = whole(rescore_blocks(texts, clips, 0.1)), whole(mean_blocks(texts, clips))
        for i, text in enumerate(texts):
            expected = rescore(score_frames(text, clips.features), clips.offsets, 0.1)
            assert weighted[i] == pytest.approx(expected, abs=1e-6)
            pooled = [pool(clip, np.zeros(len(clip), np.float32)) @ text for clip in rows]
            assert mean[i] == pytest.approx(pooled, abs=1e-6)


def test_equal_texts_and_equal_clips_have_equal_scores_wherever_they_stand() -> None:
    rng = np.random.default_rng(1)
    rows = [random_unit(rng, 5, 64) for _ in range(40)]
    texts = random_unit(rng, 37, 64)
    twice, clips = np.concatenate([texts, texts[::-1]]), Clips([*rows, *rows[::-1]])
    for blocks in (rescore_blocks(twice, clips, 0.05), mean_blocks(twice, clips)):
        scores = whole(blocks)
        assert np.array_equal(scores[:37], scores[37:][::-1])
        assert np.array_equal(scores[:, :40], scores[:, 40:][:, ::-1])


# -------------------------------------------------------------------------------------------------------- retrieval


@pytest.mark.parametrize("score", ["rescore", "mean"])
def test_retrieval_ranks_as_loops_over_the_stored_features_do(folder: Path, score: str) -> None:
    encoder, features = FakeEncoder(), stored(folder)
    rows = [Caption(f"clip{i % 4}.mp4", text) for i, text in enumerate(WORDS)]
    matrix = np.empty((5, 4), np.float32)
    for i, text in enumerate(encoder.encode_text(WORDS)):
        for j in range(4):
            h = features[f"clip{j}"].features
            if score == "mean":
                matrix[i, j] = pool(h, np.zeros(len(h), np.float32)) @ text
            else:
                matrix[i, j] = rescore(score_frames(text, h), np.array([0, len(h)]), encoder.spec.temperature)[0]
    content = evaluate_retrieval(captions(*rows), material(folder, score=score))
    forth = retrieval_metrics(matrix, [0, 1, 2, 3, 0], draws=0)
    back = retrieval_metrics(matrix.T, [[0, 4], [1], [2], [3]], draws=0)
    for result, metrics in zip(content["results"], (forth, back), strict=True):
        assert result["values"] == {name: getattr(metrics, name) for name in result["values"]}
        assert (result["queries"], result["items"]) == (metrics.n_queries, metrics.n_items)
    assert content["split"]["captions_per_video"] == {"least": 1, "mean": 1.25, "most": 2}


def test_a_large_matrix_goes_through_in_blocks_with_the_same_figures(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate_retrieval(one_each(), material(folder))
    monkeypatch.setattr("pipeline.evaluation.scoring.BLOCK_BYTES", 1)
    monkeypatch.setattr("pipeline.evaluation.retrieval.HELD_BYTES", 1)
    monkeypatch.setattr("pipeline.evaluation.retrieval.NOTE_SECONDS", 0.0)
    said: list[str] = []
    assert evaluate_retrieval(one_each(), material(folder), say=said.append) == whole
    assert "  3 of 4 texts scored" in said and any("scored again" in line for line in said)
    with pytest.raises(UsageError, match="a dual softmax needs the whole matrix of 4 x 4"):
        evaluate_retrieval(one_each(), material(folder), dual=True)


def test_a_span_is_scored_by_its_own_frames(folder: Path) -> None:
    """The second half of each video, searched by a text: the frames of the first half must not matter."""
    rows = [Caption(f"clip{i}", WORDS[i], 1.0, 1.2) for i in (2, 3)]
    content = evaluate_retrieval(captions(*rows), material(folder, score="mean"))
    assert content["split"]["used"] == {"texts": 2, "clips": 2, "videos": 2}
    assert content["scored"]["frames_per_clip"] == 1  # 5 frames a second: row 5 alone meets [1.0, 1.2)
    features = stored(folder)
    vectors = FakeEncoder().encode_text([WORDS[2], WORDS[3]])
    matrix = vectors @ np.stack([features[f"clip{i}"].features[5] for i in (2, 3)]).T
    assert values(content)["mean_rank"] == retrieval_metrics(matrix, draws=0).mean_rank


def test_captions_of_one_span_share_a_clip_except_in_youcookii() -> None:
    rows = [Caption("a", "x", 1, 2), Caption("a", "y", 1, 2), Caption("a", "z", 2, 3), Caption("b", "x")]
    assert pair_up(captions(*rows)).right.tolist() == [0, 0, 1, 2]
    assert pair_up(captions(*rows, dataset="youcookii-milnce")).right.tolist() == [0, 1, 2, 3]


def test_two_names_of_one_video_are_one_clip(folder: Path) -> None:
    rows = [Caption("clip0", "x"), Caption("clip0.mp4", "y"), Caption("clip1", "z")]
    content = evaluate_retrieval(captions(*rows), material(folder))
    assert content["split"]["used"] == {"texts": 3, "clips": 2, "videos": 2}


def test_missing_videos_are_counted_named_and_left_out(folder: Path) -> None:
    rows = [*one_each().rows, Caption("gone", "x"), Caption("away", "y")]
    content = evaluate_retrieval(captions(*rows), material(folder))
    split = content["split"]
    assert (split["videos"], split["found"], split["missing"]) == (6, 4, ["away", "gone"])
    assert (split["rows"], split["used"]["texts"]) == (6, 4)
    assert content["results"] == evaluate_retrieval(one_each(), material(folder))["results"]
    with pytest.raises(UsageError, match=r"none of the 1 annotated videos \(gone"):
        evaluate_retrieval(captions(Caption("gone", "x")), material(folder))


def test_a_selector_scores_only_what_it_keeps(folder: Path) -> None:
    content = evaluate_retrieval(one_each(), material(folder, select=SelectOptions("uniform", "2"), score="mean"))
    features = stored(folder)
    kept = [features[f"clip{i}"].features for i in range(4)]
    pooled = [pool(h[[len(h) // 4, 3 * len(h) // 4]], np.zeros(2, np.float32)) for h in kept]
    matrix = FakeEncoder().encode_text(WORDS[:4]) @ np.stack(pooled).T
    assert content["scored"]["frames_per_clip"] == 2
    assert content["scored"]["selector"] == "uniform" and content["scored"]["keep"] == "2"
    assert values(content)["mean_rank"] == retrieval_metrics(matrix, draws=0).mean_rank


def test_the_caption_selector_keeps_what_a_run_keeps(folder: Path) -> None:
    """By the texts beside the videos, never by the captions that are the queries."""
    opened = material(folder, select=small_runs.HALF)
    videos = opened.match({f"clip{i}" for i in range(4)}).found
    rows = opened.read(videos.values())
    embeddings = small_runs.embeddings_of(folder)
    for video in videos.values():
        kept = embeddings[video.path]
        assert np.array_equal(rows[video.video_id].features, kept.features)
        assert np.array_equal(rows[video.video_id].pts_seconds, kept.pts_seconds)


def test_queries_that_also_chose_the_frames_are_counted(folder: Path) -> None:
    rows = [Caption("clip1", small_runs.CAPTIONS[1]), Caption("clip2", "something else")]
    select = SelectOptions("caption", "0.5")
    assert evaluate_retrieval(captions(*rows), material(folder, select=select))["scored"]["queries_that_selected"] == 1
    assert "queries_that_selected" not in evaluate_retrieval(captions(*rows), material(folder))["scored"]


def test_a_video_models_own_score_ranks_the_pairs(folder: Path) -> None:
    model = FakeVideoModel(FakeEncoder())
    content = evaluate_retrieval(one_each(), material(folder, model))
    features = stored(folder)
    matrix = model.score_pairs(WORDS[:4], [features[f"clip{i}"].features for i in range(4)])
    assert values(content)["mean_rank"] == retrieval_metrics(matrix, draws=0).mean_rank
    assert content["scored"]["score"] == "model"
    assert content["scored"]["model_fingerprint"] == model.spec.fingerprint


def test_a_report_names_a_local_model_without_its_folder(folder: Path) -> None:
    model = FakeVideoModel(FakeEncoder())
    model.spec = replace(model.spec, name="fineco:/home/somebody/heads/good/")
    assert evaluate_retrieval(one_each(), material(folder, model))["scored"]["model"] == "fineco:good"


def test_models_and_encoders_of_other_features_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = FakeVideoModel(FakeEncoder(seed=5))
    monkeypatch.setattr("models.registry.load_encoder", lambda name, device, precision: other)
    with pytest.raises(UsageError, match=r"--model: fineco:x is built on fake \(.*the features of .* are from fake \("):
        evaluate_retrieval(one_each(), Material(Collection(folder), Options(model="fineco:x"), small_runs.machine()))
    monkeypatch.setattr("models.registry.load_encoder", lambda name, device, precision: FakeEncoder())
    with pytest.raises(UsageError, match="--model: builtin is not a model over another encoder's features"):
        evaluate_retrieval(one_each(), Material(Collection(folder), Options(model="builtin"), small_runs.machine()))
    with pytest.raises(UsageError, match="encoder: this collection was made with"):
        evaluate_retrieval(
            one_each(), Material(Collection(folder), Options(), small_runs.machine(), FakeEncoder(seed=5))
        )


def test_a_collection_without_features_is_told_so(tmp_path: Path) -> None:
    collection = Collection.create(tmp_path / "new", {})
    with pytest.raises(UsageError, match="has no features yet"):
        Material(collection, Options(), small_runs.machine(), FakeEncoder())


def test_the_report_holds_what_decides_the_figures(folder: Path) -> None:
    content = evaluate_retrieval(one_each(), material(folder, draws=20, seed=4))
    assert content["scored"] == {
        "encoder": "fake",
        "fingerprint": FakeEncoder().spec.fingerprint,
        "precision": "fp32",
        "sampling": "5 frames/s",
        "selector": "all",
        "keep": None,
        "score": "rescore",
        "temperature": 0.1,
        "frames_per_clip": 9,
    }
    assert content["intervals"] == {"level": 0.95, "draws": 20, "over": "queries", "seed": 4}
    assert content["index"] == {"factory": "Flat", "videos": 4, "selection": "caption-0.5", "recall_at_10": 1.0}
    assert content["chance"]["mean_rank"] == 2.5 and content["chance"]["r10"] == 1
    json.dumps(content)


# ---------------------------------------------------------------------------------------------------- ready matrices


def test_a_ready_matrix_is_ranked_in_the_order_of_the_annotations(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    scores = rng.standard_normal((30, 10)) / 50
    right = [i % 10 for i in range(30)]
    owners = [[i, i + 10, i + 20] for i in range(10)]
    rows = captions(*[Caption(f"video {i}", f"text {i}") for i in right])
    dtypes: tuple[type[np.floating[Any]], ...] = (np.float16, np.float32, np.float64)
    for dtype in dtypes:
        np.save(tmp_path / "s.npy", scores.astype(dtype))
        content = evaluate_scores(rows, tmp_path / "s.npy", Options(draws=0), dual=True)
        ranks = rank_rows(scores.astype(dtype), right)
        back, weighted = rank_rows(scores.astype(dtype).T, owners), dual_softmax(scores.astype(dtype))
        dual_back = rank_rows(dual_softmax(scores.astype(dtype).T), owners)
        expected = (ranks, back, rank_rows(weighted, right), dual_back)
        for number, directed in enumerate(expected):
            assert values(content, number)["mean_rank"] == directed.average.mean()
        assert [result["dual_softmax"] for result in content["results"]] == [None, None, 100, 100]


def test_scores_that_differ_only_in_float64_are_no_ties(tmp_path: Path) -> None:
    np.save(tmp_path / "s.npy", np.array([[1 + 1e-12, 1], [1, 1 + 1e-12]]))
    content = evaluate_scores(captions(Caption("a", "x"), Caption("b", "y")), tmp_path / "s.npy", Options(draws=0))
    for result in content["results"]:
        assert result["values"]["r1"] == 1 and result["tied"] == 0


def test_matrices_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    rows = captions(Caption("a", "x"), Caption("b", "y"))
    path = tmp_path / "s.npy"
    for array, reason in (
        (np.zeros((2, 3), np.float32), r"float32 of shape \(2, 3\), .* shape \(2, 2\)"),
        (np.zeros((2, 2), np.int64), "int64 of shape"),
        (np.array([[0, np.nan], [0, 0]], np.float32), "NaN"),
    ):
        np.save(path, array)
        with pytest.raises(UsageError, match=reason):
            evaluate_scores(rows, path, Options())
    np.save(path, np.array([[{}, 1], [2, 3]], object), allow_pickle=True)
    with pytest.raises(UsageError, match=r"not a \.npy file of numbers"):
        evaluate_scores(rows, path, Options())
    np.savez(tmp_path / "s.npz", np.zeros((2, 2)))
    with pytest.raises(UsageError, match="several arrays"):
        evaluate_scores(rows, tmp_path / "s.npz", Options())
    with pytest.raises(UsageError, match="No such file"):
        evaluate_scores(rows, tmp_path / "absent.npy", Options())


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


# ---------------------------------------------------------------------------------------------------------- moments


def test_a_moment_is_held_against_its_span(folder: Path) -> None:
    """The query is one frame's own vector, which a text cannot have: so the encoder is taught one."""
    features = stored(folder)["clip3"]
    target = features.features[9]

    class Taught(FakeEncoder):
        def encode_text(self, texts: Sequence[str]) -> Float32:
            return np.stack([target for _ in texts])

    frames = [stored(folder)[f"clip{i}"] for i in (2, 3)]
    scores = [score_frames(target, video.features) for video in frames]
    background = float(np.median(np.concatenate(scores)))  # of all the annotated videos, not of each alone
    true = [(1.6, 2.0), (1.6, 2.4)]
    expected, whole = [], []
    for video, s, (start, end) in zip(frames, scores, true, strict=True):
        duration = len(s) * video.span_seconds
        best = find_moments(s, video.pts_seconds, video.span_seconds, background, duration)[0]
        expected.append(float(temporal_iou(*map(np.array, (best.start_seconds, best.end_seconds, start, end)))))
        whole.append((end - start) / duration)
    assert expected == pytest.approx([1, 0.75], abs=0.01)  # with its own level, the first would be half as long
    opened = Material(Collection(folder), Options(draws=0), small_runs.machine(), Taught())
    content = evaluate_moments(captions(Caption("clip2", "y", *true[0]), Caption("clip3", "x", *true[1])), opened)
    assert content["scored"]["background_frames"] == sum(map(len, scores))
    assert values(content)["mean_iou"] == pytest.approx(np.mean(expected))
    assert values(content, 1)["mean_iou"] == pytest.approx(np.mean(whole), rel=0.1)  # the file's length is its own


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


# ------------------------------------------------------------------------------------------------- the real files


@pytest.mark.parametrize(
    ("name", "n_texts", "n_clips", "n_videos"),
    [
        ("milnce_validation_youcook.csv", 3350, 3350, 436),
        ("youcookii_annotations_trainval.json", 3492, 3492, 457),
        ("MSRVTT_JSFUSION_test.csv", 1000, 1000, 1000),
        ("msrvtt_test_videodatainfo.json.zip", 59800, 2990, 2990),
    ],
)
def test_published_splits_have_the_clips_that_papers_count(
    shared: Path, name: str, n_texts: int, n_clips: int, n_videos: int
) -> None:
    pairs = pair_up(read_captions(shared / "data" / "annotations" / name))
    assert (len(pairs.texts), len(pairs.clips)) == (n_texts, n_clips)
    assert len({clip.video for clip in pairs.clips}) == n_videos
    if n_texts == n_clips:
        assert np.array_equal(pairs.right, np.arange(n_texts))  # the diagonal
    else:
        assert set(np.bincount(pairs.right).tolist()) == {20}


def test_a_list_drawn_from_the_real_captions_asks_about_every_video(shared: Path) -> None:
    captions = read_captions(shared / "data" / "annotations" / "msrvtt_test_videodatainfo.json.zip")
    choices = draw_choices(captions, 0).rows
    own = {(caption.video, caption.text) for caption in captions.rows}
    assert len(choices) == 2990
    assert all([(c.video, o) in own for o in c.options].count(True) == 1 for c in choices)
    assert np.bincount([choice.answer for choice in choices]).min() > 500  # of 598 on average


def test_the_module_says_how_large_a_held_matrix_may_be() -> None:
    assert retrieval.HELD_BYTES >= 4 * 3350 * 3350  # YouCookII goes through once
