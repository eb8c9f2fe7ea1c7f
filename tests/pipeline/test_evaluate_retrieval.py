"""Retrieval over a small collection and of ready matrices, against slow loops over what is stored."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import small_runs
from fakes import FakeEncoder
from indexes.generations import current_generation, read_sidecar
from pipeline.annotations import Caption, read_captions
from pipeline.collection import Collection
from pipeline.config import SelectOptions
from pipeline.errors import UsageError
from pipeline.evaluate import dual_softmax, rank_rows, retrieval_metrics
from pipeline.evaluation import retrieval
from pipeline.evaluation.material import ALL_FRAMES, Material, Options
from pipeline.evaluation.report import report_text
from pipeline.evaluation.retrieval import evaluate_retrieval, evaluate_scores, pair_up
from pipeline.moments import find_scenes, pool
from pipeline.rescore import rescore, score_frames
from pipeline.select import parse_keep, uniform
from small_evaluations import (
    WORDS,
    FakeVideoModel,
    best_score,
    captions,
    material,
    one_each,
    stored,
    values,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four videos of 5, 8, 10 and 13 frames at 5 a second; clip1 and clip3 have a text beside them."""
    folder = tmp_path_factory.mktemp("evaluated")
    small_runs.run(folder / "c", small_runs.make_videos(folder / "videos"))
    return folder / "c"


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


@pytest.mark.parametrize("score", ["rescore", "mean"])
@pytest.mark.parametrize("keep", [None, "0.5"])
@pytest.mark.parametrize("span", [None, (0.3, 1.1)])
def test_by_moments_ranks_as_slow_loops_over_scenes_do(
    folder: Path, score: str, keep: str | None, span: tuple[float, float] | None
) -> None:
    """Scenes are of all frames, whatever is kept of them and whichever part a caption is about."""
    texts = [f"{a} {b} {i}" for i, (a, b) in enumerate(product(WORDS, WORDS))]
    temperature = FakeEncoder().spec.temperature if score == "rescore" else None
    clips = []
    for number in range(4):
        video = stored(folder)[f"clip{number}"]
        kept = uniform(video.features, parse_keep(keep)).kept if keep else np.ones(len(video.features), np.bool_)
        if span is not None:
            kept &= (video.pts_seconds + video.span_seconds > span[0]) & (video.pts_seconds < span[1])
        scenes = np.split(np.arange(len(kept)), find_scenes(video.features)[1:])
        clips.append([video.features[frames[kept[frames]]] for frames in scenes if kept[frames].any()])
    vectors = FakeEncoder().encode_text(texts)
    matrix = np.array([[best_score(text, moments, temperature) for moments in clips] for text in vectors])
    right = [i % 4 for i in range(len(texts))]
    forth = retrieval_metrics(matrix, right, draws=0)
    back = retrieval_metrics(matrix.T, [[i for i in range(len(texts)) if i % 4 == j] for j in range(4)], draws=0)
    select = SelectOptions("uniform", keep) if keep else ALL_FRAMES
    rows = captions(*[Caption(f"clip{i % 4}", text, *(span or ())) for i, text in enumerate(texts)])
    content = evaluate_retrieval(rows, material(folder, score=score, by="moments", select=select))
    for result, metrics in zip(content["results"], (forth, back), strict=True):
        assert result["values"] == {name: getattr(metrics, name) for name in result["values"]}
    assert content["scored"]["by"] == "moments"
    assert content["scored"]["moments_per_clip"] == sum(map(len, clips)) / 4
    assert content["scored"]["frames_per_clip"] == sum(len(rows) for moments in clips for rows in moments) / 4
    by_video = evaluate_retrieval(rows, material(folder, score=score, select=select))
    assert by_video["scored"]["by"] == "video" and "moments_per_clip" not in by_video["scored"]
    if span is None:  # a second of a video may well rank the same either way
        assert by_video["results"] != content["results"]


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
    pooled = [pool(h[uniform(h, parse_keep("2")).kept], np.zeros(2, np.float32)) for h in kept]
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
        "by": "video",
        "frames_per_clip": 9,
    }
    assert content["intervals"] == {"level": 0.95, "draws": 20, "over": "queries", "seed": 4}
    n_moments = sum(len(embedding.moments) for embedding in small_runs.embeddings_of(folder).values())
    index = content["index"]
    assert index["questions"] == index["found"] > 4
    assert index == {
        "factory": "Flat",
        "videos": 4,
        "moments": n_moments,
        "selection": "caption-0.5",
        "questions": index["questions"],
        "found": index["found"],
    }
    assert content["chance"]["mean_rank"] == 2.5 and content["chance"]["r10"] == 1
    json.dumps(content)


def test_the_report_says_what_the_index_finds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sidecar = read_sidecar(current_generation(folder / "index"))
    report = replace(sidecar.report, n_probes=9, n_found=7, n_vectors=5)
    monkeypatch.setattr("indexes.generations.read_sidecar", lambda generation: replace(sidecar, report=report))
    content = evaluate_retrieval(one_each(), material(folder))
    content["split"]["file"] = "captions.jsonl"
    assert (
        "Flat, 5 moments of 4 videos, selection caption-0.5; of 9 questions it finds 7 that an exhaustive search finds "
        "first; the figures below do not use it"
    ) in report_text(content)


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


def test_the_module_says_how_large_a_held_matrix_may_be() -> None:
    assert retrieval.HELD_BYTES >= 4 * 3350 * 3350  # YouCookII goes through once
