"""What is said about a collection is true, and no damaged byte goes unseen."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from command_line import fineco
from fakes import FakeEncoder
from indexes.generations import SIDECAR_FILE, current_generation
from pipeline import commands
from pipeline.commands import Sources
from pipeline.config import SelectOptions
from pipeline.doctor import Finding
from pipeline.files import read_sealed, seal, write_pointer
from pipeline.inspect import doctor_report, failures_of, failures_text, status_of, status_text
from pipeline.probes import EVERYDAY_TEXTS
from pipeline.verify import verify_collection
from small_runs import HALF, embeddings_of, machine, make_clip, make_videos, run

N_VIDEOS = 3
HALF_AS_RECORDED: dict[str, Any] = {"selector": HALF.selector, "keep": HALF.keep, "topics": []}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two commits: three videos and a failure, then one video more."""
    folder = tmp_path_factory.mktemp("built")
    videos = make_videos(folder / "videos", N_VIDEOS)
    (videos / "broken.mp4").write_text("not a video")
    (videos / "empty.mp4").write_bytes(b"")
    run(folder / "collection", videos)
    make_clip(videos / "later.mp4", 8)
    run(folder / "collection", videos)
    return folder / "collection"


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    """The same collection, to be spoilt."""
    return Path(shutil.copytree(built, tmp_path / "collection"))


def text_of(copy: Path) -> dict[str, str]:
    """The lines of the status by their first word or words."""
    return {line[:11].strip(): line[11:].strip() for line in status_text(status_of(copy)).splitlines()}


# -------------------------------------------------------------------------------------------------------- verify


def test_an_undamaged_collection_has_no_problem(built: Path) -> None:
    content = verify_collection(built)
    assert content["problems"] == []
    assert (content["videos"], content["indexed"]) == (N_VIDEOS + 1, N_VIDEOS + 1)
    files = [path for kind in ("features", "embeddings") for path in (built / kind).rglob("*.h5")]
    assert content["files"] == len(files) == 4
    assert content["bytes"] == sum(path.stat().st_size for path in files)


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


DAMAGES: tuple[Callable[[Path], None], ...] = (flip_a_byte, truncate, Path.unlink)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "name",
    [
        "features/000002.h5",
        "embeddings/caption-0.5/000003.h5",
        "index/000002/index.faiss",
        "index/000002/videos.h5",
        "index/000002/texts.h5",
        "index/000002/index.json",
        "outcomes/000001.jsonl",
    ],
)
def test_a_damaged_file_is_named(name: str, damage: Callable[[Path], None], copy: Path) -> None:
    damage(copy / name)
    problems = verify_collection(copy)["problems"]
    assert any(str(copy / name) in problem for problem in problems), problems
    done = fineco("verify", "-c", copy)
    assert (done.code, done.err) == (1, "")
    assert str(copy / name) in done.out.decode()
    assert f"\n{len(problems)} problem" in done.out.decode()
    assert json.loads(fineco("verify", "--json", "-c", copy).out)["problems"] == problems


@pytest.mark.parametrize("name", ["embeddings/CURRENT", "index/CURRENT"])
def test_a_pointer_to_what_is_not_there_is_damage(name: str, copy: Path) -> None:
    write_pointer(copy / name, "000099")
    (problem,) = verify_collection(copy)["problems"]
    assert "000099" in problem


def test_another_selection_has_another_digest_and_a_copy_the_same(built: Path, copy: Path) -> None:
    before = verify_collection(copy)
    commands.select(copy, SelectOptions("uniform", "3"), machine(), FakeEncoder())
    after = verify_collection(copy)
    assert after["problems"] == [] and after["digest"] != before["digest"]
    assert before == {**verify_collection(built), "collection": str(copy)}


def test_equal_content_has_an_equal_digest_however_it_came_about(built: Path, tmp_path: Path) -> None:
    run(tmp_path / "at-once", built.parent / "videos")
    assert verify_collection(tmp_path / "at-once")["digest"] == verify_collection(built)["digest"]


def test_verify_says_in_a_line_that_everything_is_well(built: Path) -> None:
    done = fineco("verify", "-c", built)
    assert (done.code, done.err) == (0, "")
    lines = done.out.decode().splitlines()
    assert lines[0].startswith("4 files, ") and lines[0].endswith(" 4 videos, 4 in the index")
    assert lines[1:] == ["everything is as it was written", f"digest {verify_collection(built)['digest']}"]


# -------------------------------------------------------------------------------------------------------- status


def test_status_counts_what_is_there(built: Path) -> None:
    content = status_of(built)
    assert content["videos"] == {"ok": 4, "failed": 2}
    assert content["failure_codes"] == {"invalid": 1, "empty": 1}
    assert (content["with_features"], content["with_frames"]) == (4, 0)
    assert content["selection"] == {"name": "caption-0.5", **HALF_AS_RECORDED, "videos": 4}
    assert content["index"]["n_videos"] == 4 and content["index"]["up_to_date"]
    assert content["index"]["n_vectors"] == sum(len(e.moments) for e in embeddings_of(built).values()) > 4
    assert content["index"]["n_probes"] == content["index"]["n_found"] == 1 + 4 + len(EVERYDAY_TEXTS)
    assert content["index"]["recall"] == 1.0
    assert content["outdated"] is False
    assert content["bytes"] == verify_collection(built)["bytes"]
    assert json.loads(fineco("status", "--json", "-c", built).out) == content


def test_status_reads_as_a_few_lines(built: Path) -> None:
    lines = text_of(built)
    assert lines["videos"] == "4 ok, 2 failed"
    assert lines["sampling"] == "5 frames/s"
    assert lines["selection"] == "caption-0.5, 4 videos"
    n_moments = status_of(built)["index"]["n_vectors"]
    assert lines["index"] == f"Flat, {n_moments} moments of 4 videos, up to date"
    n_everyday = len(EVERYDAY_TEXTS)
    n_questions = n_everyday + 5
    assert lines["recall"] == (
        f"of {n_questions} questions (1 text beside videos, {n_everyday} everyday texts, 4 kept frames with noise) "
        f"the index finds {n_questions} that an exhaustive search finds first (goal 0.95)"
    )
    assert lines["failures"].endswith("see 'fineco failures'")


def test_an_index_that_does_not_find_everything_says_so(copy: Path) -> None:
    generation = current_generation(copy / "index")
    content = read_sealed(generation / SIDECAR_FILE)
    content["report"] |= {"n_probes": 3, "n_found": 2, "probes": "3 texts", "nprobe": 0}
    (generation / SIDECAR_FILE).write_bytes(seal(content))
    assert status_of(copy)["index"]["recall"] == 0.6667
    found = "the index finds 2 that an exhaustive search finds first (goal 0.95)"
    assert text_of(copy)["recall"] == f"of 3 questions (3 texts) {found}"


def test_another_selection_makes_the_index_out_of_date(copy: Path) -> None:
    commands.select(copy, SelectOptions("uniform", "3"), machine(), FakeEncoder())
    assert text_of(copy)["index"].endswith("out of date: run 'fineco index'")
    commands.index(copy, machine=machine())
    assert text_of(copy)["index"].endswith("up to date")


def test_a_damaged_index_is_called_damaged_and_its_cure_cures_it(copy: Path) -> None:
    write_pointer(copy / "index" / "CURRENT", "000099")
    assert text_of(copy)["index"].startswith("damaged: ")
    assert text_of(copy)["index"].endswith("run 'fineco index --force'")
    commands.index(copy, machine=machine(), force=True)
    assert text_of(copy)["index"].endswith("up to date")


def test_no_index_says_what_to_run(copy: Path) -> None:
    shutil.rmtree(copy / "index")
    assert text_of(copy)["index"] == "none yet: run 'fineco index'"
    assert verify_collection(copy)["indexed"] is None


# ------------------------------------------------------------------------------------------------------ failures


def failed_names(folder: Path, skipped: bool = False) -> list[tuple[str, str]]:
    return [(Path(row.outcome.path).name, row.outcome.code) for row in failures_of(folder, skipped)]


def test_failures_are_listed_by_path_in_every_format(built: Path) -> None:
    rows = failures_of(built, skipped=False)
    videos = built.parent / "videos"
    paths = [str(videos / "broken.mp4"), str(videos / "empty.mp4")]
    assert [row.outcome.path for row in rows] == paths
    as_json: list[dict[str, Any]] = json.loads(failures_text(rows, "json"))
    assert [(o["path"], o["status"], o["code"]) for o in as_json] == [
        (paths[0], "failed", "invalid"),
        (paths[1], "failed", "empty"),
    ]
    assert [json.loads(line) for line in failures_text(rows, "jsonl").splitlines()] == as_json
    as_csv = list(csv.DictReader(io.StringIO(failures_text(rows, "csv"), newline="")))
    assert as_csv == [{field: str(value) for field, value in o.items()} for o in as_json]
    assert failures_text(rows, "paths").splitlines() == paths
    table = failures_text(rows, "table").splitlines()
    assert table[0].split() == ["code", "stage", "why", "path"]
    assert [line.split()[-1] for line in table[1:]] == paths


def test_no_failures_is_said_to_a_person_and_is_empty_for_a_script() -> None:
    assert failures_text([], "table") == "no failures\n"
    assert json.loads(failures_text([], "json")) == []
    assert failures_text([], "jsonl") == failures_text([], "paths") == ""
    assert failures_text([], "csv") == "path,status,stage,code,message,attempts\n"


def test_a_failure_that_was_mended_is_no_failure_any_more(copy: Path, tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    (videos / "mended.mp4").write_text("not a video yet")
    run(copy, Sources([str(videos)]))
    assert ("mended.mp4", "invalid") in failed_names(copy)
    make_clip(videos / "mended.mp4", 9)
    run(copy, Sources([str(videos)]))
    assert "mended.mp4" not in dict(failed_names(copy))


def test_duplicates_are_listed_when_asked_for(copy: Path, tmp_path: Path) -> None:
    original = copy.parent / "videos" / "clip0.mp4"
    original.parent.mkdir()
    make_clip(original, 10)
    shutil.copyfile(original, original.with_name("clip0-again.mp4"))
    run(copy, original.parent)
    assert "duplicate" not in dict(failed_names(copy)).values()
    assert [code for _, code in failed_names(copy, skipped=True)].count("duplicate") == 1


# -------------------------------------------------------------------------------------------------------- doctor


def test_the_doctor_exits_1_for_a_problem_and_0_for_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Finding("python", "3.11"), Finding("gpu", "none", "note", "Models run on the CPU.")]
    monkeypatch.setattr("pipeline.inspect.examine", lambda: found)
    text, any_problem = doctor_report(as_json=False)
    assert not any_problem
    assert text == "python  3.11\ngpu     none\nnote: gpu: Models run on the CPU.\nno problems\n"
    assert fineco("doctor").code == 0
    found.append(Finding("faiss", "not installed", "problem", "pip install faiss-cpu"))
    done = fineco("doctor")
    assert (done.code, done.err) == (1, "")
    assert done.out.decode().endswith("problem: faiss: pip install faiss-cpu\n")
    as_json = json.loads(fineco("doctor", "--json").out)
    assert [f["level"] for f in as_json] == ["ok", "note", "problem"]
