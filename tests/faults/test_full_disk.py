"""A full disk ends a stage with one clear line; nothing half-written stays, and the same command then goes on."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from command_line import fineco
from fake_run import FAILED, call
from fakes import FakeEncoder
from guards import Guard
from pipeline import commands
from pipeline.types import Hit
from pipeline.verify import verify_collection
from small_disks import leave_free, mounted
from small_runs import make_videos
from stage_processes import ROOT, Job, server

pytestmark = pytest.mark.fault

GUARDS = [
    Guard(
        (2,),
        "pipeline/files.py",
        "    except OSError as error:\n        _discard(temporary)\n",
        "    except OSError as error:\n",
        "test_a_limit_to_the_length_of_files_ends_a_stage_with_one_line[run]",
    ),
    Guard(
        (2,),
        "pipeline/todo.py",
        "        except OSError as error:",
        "        except KeyError as error:",
        "test_a_full_folder_for_temporary_files_is_said_to_be_full",
    ),
    Guard(
        (2,),
        "pipeline/training/checkpoints.py",
        "        except SafetensorError as error:",
        "        except KeyError as error:",
        "test_a_training_on_a_full_disk_says_so_and_goes_on_later",
    ),
    Guard(
        (2,),
        "pipeline/cli/__init__.py",
        "if isinstance(error, OSError) and error.errno in REFUSED:",
        "if False:",
        "test_a_full_disk_where_nobody_expects_it_is_no_fault_of_the_program",
    ),
]
QUERIES = ["a red block on a hill", "two blue birds"]
STAGES = ("decode", "embed-frames", "select", "index", "run")
SAID = ("File too large", "No space left on device")
CURED = "free some space"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos, and for each stage a collection before and after it."""
    folder = tmp_path_factory.mktemp("full")
    videos = make_videos(folder / "videos", 3)
    first = folder / "first"
    first.mkdir()
    shutil.copy(videos / "clip0.mp4", first)

    def make(stage: str, on: str = "", of: Path = videos, to: str = "") -> None:
        collection = folder / (to or f"after-{stage}")
        if on:
            shutil.copytree(folder / on, collection)
        assert call(stage, of, collection) in (0, FAILED)

    make("run", of=first, to="before-run")
    make("run", "before-run")
    make("select", "after-run")
    shutil.copytree(folder / "after-run", folder / "before-select")
    shutil.copytree(folder / "after-select", folder / "before-index")
    make("index", "after-select")
    make("decode")
    shutil.copytree(folder / "after-decode", folder / "before-embed-frames")
    make("embed-frames", "after-decode")
    return folder


def before(folder: Path, stage: str, to: Path) -> Path:
    source = folder / f"before-{stage}"
    return Path(shutil.copytree(source, to)) if source.exists() else to


def answers_of(collection: Path) -> list[list[Hit]] | None:
    if not (collection / "index").exists():
        return None
    return commands.search(collection, QUERIES, 10, encoder=FakeEncoder())


def check_refused(job: Job, collection: Path, old: list[list[Hit]] | None) -> None:
    """It ended with the one line; what was there before is as it was, and nothing half-written is there."""
    assert job.wait() == 1, job.errors
    errors = job.errors[job.errors.index("error: ") :]
    assert re.match(rf"error: cannot write ({collection}/|a temporary file in )", errors) and any(
        said in errors for said in SAID
    ), errors
    assert CURED in errors.lower()
    assert len(errors.splitlines()) == 2
    assert list(collection.rglob("*.tmp")) == []
    if (collection / "collection.json").exists():
        assert verify_collection(collection)["problems"] == []
        if old is not None:
            assert answers_of(collection) == old


def check_finishes(folder: Path, stage: str, collection: Path) -> None:
    job = server().start(stage, folder / "videos", collection)
    assert job.wait() == 0, job.errors
    unbroken = folder / f"after-{stage}"
    content = verify_collection(collection)
    assert content["problems"] == []
    assert content["digest"] == verify_collection(unbroken)["digest"]
    assert answers_of(collection) == answers_of(unbroken)


def longest_files(folder: Path, stage: str) -> list[int]:
    """Lengths of the files that a stage makes: a limit below each hits another one first."""
    old, new = (
        {
            p.relative_to(folder): p.stat().st_size
            for folder in (folder / f"{when}-{stage}",)
            for p in folder.rglob("*.*")
        }
        for when in ("before", "after")
    )
    return sorted({length for path, length in new.items() if path not in old and length})


def limit(folder: Path, stage: str, n_bytes: int, collection: Path) -> bool:
    """A stage under a limit; whether the limit was met with. It is finished without."""
    before(folder, stage, collection)
    old = answers_of(collection)
    job = server().start(stage, folder / "videos", collection, prepare=("sabotage", "limit_files", [n_bytes]))
    refused = job.wait() != 0
    if refused:
        check_refused(job, collection, old)
    check_finishes(folder, stage, collection)
    return refused


@pytest.mark.parametrize("stage", [pytest.param(s, marks=() if s == "run" else pytest.mark.long) for s in STAGES])
def test_a_limit_to_the_length_of_files_ends_a_stage_with_one_line(folder: Path, stage: str, tmp_path: Path) -> None:
    longest = longest_files(folder, stage)[-1]
    assert limit(folder, stage, longest - 1, tmp_path / "c")


@pytest.mark.long
@pytest.mark.parametrize("stage", STAGES)
def test_any_limit_to_the_length_of_files_ends_a_stage_with_one_line(folder: Path, stage: str, tmp_path: Path) -> None:
    lengths = longest_files(folder, stage)
    limits = sorted({*(n - 1 for n in lengths), *(n // 2 for n in lengths), 2 * lengths[-1]})
    met = [limit(folder, stage, n, tmp_path / str(n)) for n in limits]
    print(f"{stage}: limits {limits}, met with {met}")
    assert met.count(True) >= len(lengths)


def fill(folder: Path, stage: str, free: int, disk: Path) -> bool:
    """A stage on a disk with so many bytes left; whether they did not suffice. It is finished with more."""
    collection = before(folder, stage, disk / f"c{free}")
    old = answers_of(collection)
    ballast = leave_free(disk, free)
    job = server().start(stage, folder / "videos", collection)
    refused = job.wait() != 0
    if refused:
        check_refused(job, collection, old)
    ballast.unlink()
    check_finishes(folder, stage, collection)
    shutil.rmtree(collection)
    return refused


def test_a_full_disk_ends_a_run_with_one_line(folder: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", 2) as disk:
        assert fill(folder, "run", 40 << 10, disk)


@pytest.mark.long
@pytest.mark.parametrize("stage", STAGES)
def test_a_disk_of_any_fullness_ends_a_stage_with_one_line(folder: Path, stage: str, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", 2) as disk:
        refused = [fill(folder, stage, free << 10, disk) for free in (0, 4, 8, 12, 16, 20, 28, 36, 48, 64, 80, 96, 512)]
    print(f"{stage}: {refused}")
    assert refused[0] and not refused[-1]


def test_a_full_folder_for_temporary_files_is_said_to_be_full(folder: Path, tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    shutil.copy(folder / "videos" / "clip0.mp4", videos)
    (videos / "clip0.txt").write_text("a long caption " * 2000, "utf-8")
    with mounted(tmp_path / "disk", 1) as disk:
        leave_free(disk, 4096)  # enough for Python to take it
        job = server().start("run", videos, tmp_path / "c", environment={"TMPDIR": str(disk)})
        assert job.wait() == 1, job.errors
        assert (
            f"error: cannot write a temporary file in {disk}: No space left on device\n  Free some space" in job.errors
        )
    assert server().start("run", videos, tmp_path / "c").wait() == 0
    assert verify_collection(tmp_path / "c")["indexed"] == 1


def test_a_full_disk_where_nobody_expects_it_is_no_fault_of_the_program(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pipeline.verify

    def refuse(folder: Path, say: object) -> None:
        raise OSError(28, "No space left on device", str(folder / "x"))

    monkeypatch.setattr(pipeline.verify, "verify_collection", refuse)
    done = fineco("verify", "-c", folder / "after-run")
    assert done.code == 1
    assert done.err.startswith(
        f"error: cannot write {folder / 'after-run' / 'x'}: No space left on device\n  Free some"
    )


@pytest.mark.parametrize(
    "arguments",
    [["status", "--json"], *(pytest.param(a, marks=pytest.mark.long) for a in (["verify", "--json"], ["failures"]))],
)
def test_a_report_to_a_full_disk_is_an_error(folder: Path, arguments: list[str]) -> None:
    command = [sys.executable, "-m", "pipeline.cli", arguments[0], "-c", str(folder / "after-run"), *arguments[1:]]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=60, check=False
        )
    assert done.returncode == 1
    assert done.stderr == "error: cannot write the results: No space left on device\n"


@pytest.mark.long
def test_a_training_on_a_full_disk_says_so_and_goes_on_later(tmp_path: Path) -> None:
    from small_trainings import make_collection

    kitchen = make_collection(tmp_path / "kitchen", 12)
    trainer = server("small_trainings", "pipeline.training.command")
    whole = tmp_path / "whole"
    assert trainer.start("train", kitchen, whole).wait() == 0
    lengths = sorted({path.stat().st_size for path in whole.rglob("*") if path.is_file() and path.stat().st_size})
    limits = [*(n - 1 for n in lengths), lengths[-1] // 2]  # the longest is the state: torch is in the middle of it
    print(f"train: limits {limits}")
    for n_bytes in limits:
        output = tmp_path / str(n_bytes)
        job = trainer.start("train", kitchen, output, prepare=("sabotage", "limit_files", [n_bytes]))
        assert job.wait() == 1, job.errors
        errors = job.errors[job.errors.index("error: ") :]
        assert errors.startswith(f"error: cannot write {output}/") and "File too large" in errors, (n_bytes, errors)
        assert "Free some space" in errors
        assert list(output.rglob("*.tmp")) == []
        job = trainer.start("train", kitchen, output)
        assert job.wait() == 0, (n_bytes, job.errors)
        for name in ("head.safetensors", "metrics.jsonl", "training.json"):
            assert (output / name).read_bytes() == (whole / name).read_bytes(), (n_bytes, name)
