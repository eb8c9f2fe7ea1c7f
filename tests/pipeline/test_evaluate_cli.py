"""`fineco evaluate` as a user types it: what is printed, what is written, and what is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import small_runs
from command_line import fineco
from fakes import FakeEncoder

CAPTIONS = [
    {"video": f"clip{i}.mp4", "caption": text} for i, text in enumerate(("a red block", "birds", "a hill", "x"))
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    small_runs.run(folder / "c", small_runs.make_videos(folder / "videos"))
    return folder / "c"


@pytest.fixture
def folder(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A collection whose encoder the command can load."""
    monkeypatch.setattr("models.registry.load_encoder", lambda name, device="auto", precision="auto": FakeEncoder())
    return made


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    return write(tmp_path / "captions.jsonl", CAPTIONS)


def test_a_report_names_all_that_its_figures_depend_on(folder: Path, captions: Path, tmp_path: Path) -> None:
    write(captions, [*CAPTIONS, {"video": "gone.mp4", "caption": "nobody knows"}])
    saved = tmp_path / "new" / "report.json"
    done = fineco(
        *("evaluate", "retrieval", captions, "-c", folder, "--selector", "uniform", "--keep", 2, "--score", "mean"),
        *("--draws", 50, "--seed", 9, "--json", saved),
    )
    assert done.code == 0
    content = json.loads(saved.read_text())
    table = done.out.decode()
    digest = hashlib.sha256(captions.read_bytes()).hexdigest()
    assert content["split"]["sha256"] == digest and f"captions.jsonl, sha256 {digest[:12]}, 5 rows" in table
    assert content["split"]["missing"] == ["gone.mp4"]
    assert "4 of 5 videos found, 1 missing (gone.mp4): not the whole split" in table
    assert f"fake ({FakeEncoder().spec.fingerprint[:12]}), fp32" in table
    for fact in (
        "5 frames/s",
        "uniform, keep 2; 2.0 a clip",
        "mean: cosine",
        "50 bootstrap draws",
        "seed 9",
        "1 a video",
    ):
        assert fact in table
    forth = content["results"][0]
    low, high = forth["intervals"]["r1"]
    assert f"{100 * forth['values']['r1']:.1f} ({100 * low:.1f}-{100 * high:.1f})" in table
    assert [line.split("  ")[0] for line in table.splitlines()[-3:]] == [
        "text to video",
        "video to text",
        "chance, text to video",
    ]
    assert str(tmp_path) not in table + saved.read_text()  # a report can be shown to others


def test_the_same_command_gives_the_same_bytes(folder: Path, captions: Path) -> None:
    command = ("evaluate", "retrieval", captions, "-c", folder, "--format", "json", "--dual-softmax")
    first, second = fineco(*command), fineco(*command)
    assert first.code == 0 and first.out == second.out
    assert len(json.loads(first.out)["results"]) == 4


def test_a_clip_is_scored_as_a_whole_unless_by_moments_is_asked_for(folder: Path, captions: Path) -> None:
    command = ("evaluate", "retrieval", captions, "-c", folder, "--draws", 0)
    default = fineco(*command).out
    assert fineco(*command, "--by", "video").out == default
    assert "by         video: a clip has the score of all of its frames together" in default.decode()
    asked = fineco(*command, "--by", "moments").out.decode()
    assert "by         moments: a clip has the score of the best of its moments" in asked
    assert "every sampled frame; 9.0 a clip, in " in asked and "as a search ranks" not in asked
    means = fineco(*command, "--by", "moments", "--score", "mean", "--format", "json")
    assert json.loads(means.out)["scored"]["by"] == "moments"


def test_a_matrix_needs_no_collection(captions: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "s.npy", np.eye(4, dtype=np.float32))
    done = fineco("evaluate", "retrieval", captions, "--scores", tmp_path / "s.npy", "--dual-softmax", "--draws", 0)
    assert done.code == 0
    table = done.out.decode()
    assert "ready matrix s.npy" in table and "4, none looked for" in table and "intervals  none" in table
    assert "text to video, dual softmax (100)" in table


def test_a_list_of_videos_restricts_the_annotations(folder: Path, captions: Path, tmp_path: Path) -> None:
    only = tmp_path / "only.csv"
    only.write_text("video_id\nclip1.mp4\nclip2.mp4\n")
    done = fineco("evaluate", "retrieval", captions, "-c", folder, "--only", only)
    digest = hashlib.sha256(only.read_bytes()).hexdigest()[:12]
    assert f"2 rows, only videos of only.csv ({digest})" in done.out.decode()


def test_a_drawn_list_is_called_ours_and_a_given_one_is_not(folder: Path, tmp_path: Path) -> None:
    rows = [{"video": f"clip{i % 4}", "caption": f"text {i}"} for i in range(8)]
    drawn = fineco("evaluate", "mc", write(tmp_path / "c.jsonl", rows), "-c", folder, "--seed", 3)
    assert "drawn with seed 3: ours, not the official list" in drawn.out.decode()
    assert "8 rows" in drawn.out.decode() and "used       4 questions, 4 videos" in drawn.out.decode()
    choices = [{"video": "clip0", "options": ["x", "y"], "answer": 1}]
    given = fineco("evaluate", "mc", write(tmp_path / "m.jsonl", choices), "-c", folder)
    assert "as in the file" in given.out.decode() and "ours" not in given.out.decode()
    assert given.out.decode().splitlines()[-1].split() == ["chance", "50.0"]


def test_questions_and_moments(folder: Path, tmp_path: Path) -> None:
    asked = write(tmp_path / "q.jsonl", [{"video": "clip0", "question": "who?", "answer": "a man"}] * 2)
    (tmp_path / "a.json").write_text('["a man", "a dog"]')
    done = fineco("evaluate", "qa", asked, "-c", folder, "--answers", tmp_path / "a.json")
    assert "the right one is among them for 100.0 %" in done.out.decode()
    assert "2 questions (1 different) x 2 answers: 2 texts to encode" in done.err
    learnt = [{"video": "clip1", "question": "who?", "answer": "a man"}]
    train = write(tmp_path / "t.jsonl", learnt)
    done = fineco("evaluate", "qa", asked, "-c", folder, "--classifier", "--train", train)
    assert "1 of 1 questions (0 videos missing)" in done.out.decode()
    spans = write(tmp_path / "m.jsonl", [{"video": "clip3", "text": "birds", "start": 0, "end": 1}])
    done = fineco("-q", "evaluate", "moments", spans, "-c", folder)
    assert done.code == 0 and done.err == ""
    assert "whole video, for comparison" in done.out.decode() and "tied" not in done.out.decode()
    assert "stands out from is the mean of 1 annotated video\n" in done.out.decode()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("retrieval",), "a collection (-c) or a matrix (--scores)"),
        (("retrieval", "-c", "C", "--scores", "s.npy"), "one of the two"),
        (("retrieval", "--scores", "s.npy", "--model", "x"), "--model has no effect on ready --scores"),
        (("retrieval", "--scores", "s.npy", "--by", "moments"), "--by has no effect on ready --scores"),
        (("retrieval", "-c", "C", "--by", "moments", "--model", "x"), "--by moments: a --model scores whole clips"),
        (("mc",), "Missing option '-c'"),
        (("mc", "-c", "C", "--by", "moments"), "No such option"),
        (("qa", "-c", "C", "--classifier"), "--classifier and --train go together"),
        (("retrieval", "-c", "C", "--keep", "4"), "--keep goes with a selector"),
        (("retrieval", "-c", "C", "--selector", "topics"), "needs a list of texts"),
        (("retrieval", "-c", "C", "--subset", "test"), "has no subsets"),
        (("retrieval", "-c", "C", "--dataset", "youcookii"), "its content is captions"),
        (("retrieval", "-c", "nowhere"), "is not a collection"),
        (("moments", "-c", "C"), "have no start and end"),
        (("qa", "-c", "C"), "captions has no questions"),
    ],
)
def test_wrong_usage_is_one_clear_error(folder: Path, captions: Path, arguments: tuple[str, ...], reason: str) -> None:
    given = [str(folder) if argument == "C" else argument for argument in arguments[1:]]
    done = fineco("evaluate", arguments[0], captions, *given)
    assert (done.code, done.out) == (2, b"")
    assert done.err.startswith("error: ") and reason in done.err and "fault in fineco" not in done.err


def test_figures_are_printed_even_if_the_file_cannot_be_written(folder: Path, captions: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = fineco("evaluate", "retrieval", captions, "-c", folder, "--json", tmp_path / "file" / "r.json")
    assert done.code == 1 and "cannot write" in done.err
    assert "text to video" in done.out.decode()


def test_the_real_captions_and_scores_go_through(shared: Path) -> None:
    data = shared / "data"
    done = fineco(
        *("evaluate", "retrieval", data / "annotations" / "MSRVTT_JSFUSION_test.csv", "--dual-softmax", "--draws", 0),
        *("--ties", "optimistic"),  # as these figures were published
        *("--scores", data / "scores" / "msrvtt_1ka_text_video_cosine.npy", "--format", "json"),
    )
    results = json.loads(done.out)["results"]
    values = [[round(100 * r["values"][k], 6) for k in ("r1", "r5", "r10")] for r in results]
    assert values[:3] == [[48.0, 73.0, 82.9], [46.0, 74.1, 82.8], [52.8, 78.0, 85.8]]
    assert [r["tied"] for r in results] == [0, 9, 0, 9]  # captions that occur more than once
