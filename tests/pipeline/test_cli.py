"""The command line as a user or a script meets it: help, results, errors, exit codes, and nothing loaded in vain."""

from __future__ import annotations

import csv
import ctypes
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import pytest

from command_line import Done, fineco
from pipeline.cli import cli
from pipeline.files import read_pointer
from videos import encode_video

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "torchvision", "open_clip", "numpy", "av", "faiss", "h5py", "rich", "PIL")
HELP_SECONDS = 0.15  # of processor time
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1

NOT_UTF8 = b"caf\xe9.mp4"
TWO_LINES = b"two\nlines.mp4"


def process(
    *arguments: object, code: str = "", environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """`fineco` as a process of its own; `code` instead of the program, for looking inside."""
    program = ["-c", code] if code else ["-m", "pipeline.cli"]
    return subprocess.run(
        [sys.executable, *program, *map(str, arguments)],
        capture_output=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
    )


LOADED = f"""
import sys, time
from pipeline.cli import main
sys.argv[0] = "fineco"
try:
    main()
finally:
    print(*(m for m in {HEAVY} if m in sys.modules), time.process_time(), file=sys.stderr)
"""


def loaded_by(*arguments: object) -> tuple[list[str], float]:
    """Which heavy packages a command loads, and its processor time in seconds."""
    *modules, seconds = process(*arguments, code=LOADED).stderr.decode().splitlines()[-1].split()
    return modules, float(seconds)


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A collection of three clips with odd names and one broken file, run with the built-in encoder."""
    folder = tmp_path_factory.mktemp("kitchen")
    videos = folder / "videos"
    videos.mkdir()
    for number, name in enumerate((b"plain.mp4", NOT_UTF8, TWO_LINES)):
        clip = encode_video(folder / "clip.mp4", n_frames=30 + 15 * number, size=(64 + 2 * number, 48))
        os.rename(clip, os.fsencode(videos) + b"/" + name)
    (videos / "broken.mp4").write_text("not a video")
    done = fineco(*run_of(videos, folder / "collection"), "--fps", 2)
    assert done.code == 3, done.err
    assert done.out == b""
    return folder / "collection"


def run_of(videos: Path, collection: Path) -> tuple[object, ...]:
    return ("run", videos, "-c", collection, "--model", "builtin", "--precision", "fp32", "--workers", 1)


def search(kitchen: Path, *more: object) -> Done:
    return fineco("search", "a red ball", "-c", kitchen, "--device", "cpu", *more)


# ---------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("name", ["", *cli.commands])
def test_help_says_what_a_command_and_every_option_does(name: str) -> None:
    command = cli.commands[name] if name else cli
    done = fineco(*[name] * bool(name), "--help")
    assert (done.code, done.err) == (0, "")
    assert done.out.decode().startswith(f"Usage: fineco {name}".rstrip())
    summary = command.get_short_help_str(limit=80 - 4 - len("train-scorer"))  # what 80 columns have room for
    assert summary.endswith(".") and not summary.endswith("...")
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help and option.help.endswith((".", "]")), option.name


def test_help_shows_the_commands_in_the_order_of_their_use() -> None:
    lines = fineco("--help").out.decode().partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in lines][:6] == ["run", "decode", "embed", "select", "index", "search"]


def test_the_command_alone_shows_its_help() -> None:
    assert fineco() == fineco("--help") == fineco("-h")


def test_help_loads_nothing_heavy_and_is_quick() -> None:
    runs = [loaded_by("--help"), loaded_by("run", "--help"), loaded_by("search", "--help")]
    assert [modules for modules, _ in runs] == [[]] * 3
    code = "import sys, time, click; print(time.process_time(), file=sys.stderr)"
    click_alone = min(float(process(code=code).stderr.decode().splitlines()[-1]) for _ in runs)
    assert min(seconds for _, seconds in runs) < max(HELP_SECONDS, 2 * click_alone)  # a busy machine is slow with both


def test_version_is_said_installed_or_not() -> None:
    done = fineco("--version")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(b"fineco ")


@pytest.mark.parametrize("command", ["status", "failures"])
def test_looking_into_a_collection_loads_no_model_library(kitchen: Path, command: str) -> None:
    modules, _ = loaded_by(command, "-c", kitchen)
    assert not {"torch", "torchvision", "open_clip", "av"} & set(modules)


def test_searching_with_the_builtin_encoder_loads_neither_torchvision_nor_open_clip(kitchen: Path) -> None:
    modules, _ = loaded_by("search", "a red ball", "-c", kitchen, "--device", "cpu")
    assert "torch" in modules
    assert not {"torchvision", "open_clip", "av"} & set(modules)


# -------------------------------------------------------------------------------------------------------- errors

MISTAKES: dict[str, tuple[Sequence[object], str]] = {
    "no such command": (["serch"], "No such command 'serch'"),
    "no collection named": (["search", "x"], "Missing option '-c'"),
    "no collection there": (["search", "x", "-c", "{new}"], "is not a collection"),
    "status of nothing": (["status", "-c", "{new}"], "is not a collection"),
    "verify of nothing": (["verify", "-c", "{new}"], "is not a collection"),
    "index of nothing": (["index", "-c", "{new}"], "is not a collection"),
    "status of a file": (["status", "-c", "{file}"], "is not a collection"),
    "run into a file": (["run", "{video}", "-c", "{file}", "--model", "builtin"], "exists and is not a collection"),
    "run into a folder of files": (["run", "{video}", "-c", "{full}", "--model", "builtin"], "is not a collection"),
    "no videos named": (["run", "-c", "{new}", "--model", "builtin"], "no videos were named"),
    "video not there": (["run", "{new}/x.mp4", "-c", "{new}", "--model", "builtin"], "no such file or folder"),
    "near model": (["run", "{video}", "-c", "{new}", "--model", "biultin"], "did you mean 'builtin'"),
    "near architecture": (
        ["run", "{video}", "-c", "{new}", "--model", "ViT-B-23"],
        "did you mean 'open_clip:ViT-B-32'",
    ),
    "no such device": (["run", "{video}", "-c", "{new}", "--model", "builtin", "--device", "gpu"], "unknown device"),
    "two samplings": (["run", "{video}", "-c", "{new}", "--fps", 1, "--frames", 8], "choose one"),
    "fps of zero": (["run", "{video}", "-c", "{new}", "--model", "builtin", "--fps", 0], "--fps 0"),
    "fps not a number": (["run", "{video}", "-c", "{new}", "--model", "builtin", "--fps", "nan"], "--fps nan"),
    "timeout below zero": (["run", "{video}", "-c", "{new}", "--timeout", -1], "--timeout"),
    "memory not a number": (["run", "{video}", "-c", "{new}", "--max-memory", "nan"], "--max-memory"),
    "no pixels": (["decode", "{video}", "-c", "{new}", "--max-pixels", 0], "--max-pixels"),
    "keep none": (["run", "{video}", "-c", "{new}", "--model", "builtin", "--keep", 0], "cannot keep 0 frames"),
    "keep what": (["run", "{video}", "-c", "{new}", "--model", "builtin", "--keep", "few"], "cannot read 'few'"),
    "topics without texts": (
        ["run", "{video}", "-c", "{new}", "--model", "builtin", "--selector", "topics"],
        "needs a list of texts",
    ),
    "texts without topics": (
        ["run", "{video}", "-c", "{new}", "--model", "builtin", "--selector", "caption", "--topics", "{lines}"],
        "--topics goes with --selector topics",
    ),
    "topics file not there": (["select", "-c", "{kitchen}", "--topics", "{new}"], "No such file"),
    "topics file empty": (["select", "-c", "{kitchen}", "--topics", "{blank}"], "no topic in it"),
    "another sampling": (["run", "{video}", "-c", "{kitchen}", "--fps", 3], "sampling: this collection was made with"),
    "another model": (["run", "{video}", "-c", "{kitchen}", "--model", "open_clip:RN50"], "made with builtin"),
    "another selection": (["run", "{video}", "-c", "{kitchen}", "--keep", 3], "fineco select"),
    "nothing to search for": (["search", "-c", "{kitchen}"], "Say what to search for"),
    "an empty query": (["search", " ", "-c", "{kitchen}"], "query 1 is empty"),
    "query file not there": (["search", "-f", "{new}", "-c", "{kitchen}"], "No such file"),
    "query file empty": (["search", "-f", "{blank}", "-c", "{kitchen}"], "no query in it"),
    "query file not text": (["search", "-f", "{file}", "-c", "{kitchen}"], "not UTF-8 text"),
    "no hits wanted": (["search", "x", "-k", 0, "-c", "{kitchen}"], "'-k'"),
    "threshold not a number": (["search", "x", "--threshold", "nan", "-c", "{kitchen}"], "not a finite number"),
    "a quiet that comes late": (["status", "-q", "-c", "{kitchen}"], "fineco -q COMMAND"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_said_in_two_lines_and_leaves_nothing(mistake: str, kitchen: Path, tmp_path: Path) -> None:
    arguments, message = MISTAKES[mistake]
    places = {"new": tmp_path / "new", "kitchen": kitchen, "video": kitchen.parent / "videos" / "plain.mp4"}
    places |= {name: tmp_path / name for name in ("file", "blank", "lines", "full")}
    places["file"].write_bytes(b"\xff\xfe\x00text")
    places["blank"].write_text("\n \n")
    places["lines"].write_text("cooking\n")
    places["full"].mkdir()
    (places["full"] / "letter.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    done = fineco(*(str(argument).format(**places) for argument in arguments))
    assert (done.code, done.out) == (2, b"")
    lines = done.err.splitlines()
    assert lines[0].startswith("error: ") and len(lines) <= 2, done.err
    assert message in done.err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("flag", ["-v", "-vv"])
def test_a_traceback_only_when_asked_for(flag: str, tmp_path: Path) -> None:
    plain, asked = fineco("status", "-c", tmp_path), fineco(flag, "status", "-c", tmp_path)
    assert "Traceback" not in plain.err
    assert asked.err.startswith("Traceback") and asked.err.endswith(plain.err)
    assert asked.code == plain.code == 2


def test_a_fault_of_the_program_is_two_lines_as_well(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def status_of(folder: Path) -> dict[str, object]:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("pipeline.inspect.status_of", status_of)
    done = fineco("status", "-c", tmp_path)
    assert (done.code, done.out) == (1, b"")
    assert done.err.splitlines()[0] == "error: unexpected RuntimeError: first line"
    assert len(done.err.splitlines()) == 2


def test_a_name_in_an_error_cannot_command_the_terminal(tmp_path: Path) -> None:
    done = fineco("status", "-c", tmp_path / "a\x1b[31mb\x9b")
    assert "\\x1b[31mb\\x9b is not a collection" in done.err


def test_cuda_on_a_machine_without_it_says_why_and_leaves_no_folder(kitchen: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    arguments = (*run_of(kitchen.parent / "videos", new), "--device", "cuda")
    done = process(*arguments, environment={"CUDA_VISIBLE_DEVICES": ""})
    first, hint = done.stderr.decode().splitlines()
    assert done.returncode == 2
    assert first.startswith("error: device cuda: ") and len(first) > len("error: device cuda: ")
    assert "fineco doctor" in hint and "--device cpu" in hint
    assert not new.exists()


def test_a_read_only_collection_can_be_looked_at_but_not_changed(kitchen: Path, tmp_path: Path) -> None:
    copy = tmp_path / "read-only"
    shutil.copytree(kitchen, copy)
    for folder in (*copy.rglob("*"), copy):
        folder.chmod(folder.stat().st_mode & ~0o222)

    def like_a_user() -> None:  # root writes everywhere: without this capability it does not
        ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0)

    def ended(*arguments: object) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [sys.executable, "-m", "pipeline.cli", *map(str, arguments), "-c", str(copy)],
            capture_output=True,
            timeout=60,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            preexec_fn=like_a_user,
        )

    try:
        assert [ended(command).returncode for command in ("status", "verify", "failures")] == [0, 0, 0]
        refused = ended("index", "--force")
    finally:
        for folder in (copy, *copy.rglob("*")):
            folder.chmod(folder.stat().st_mode | 0o200)
    assert refused.returncode == 1
    lines = refused.stderr.decode().splitlines()
    assert len(lines) <= 2 and lines[0].startswith("error: ")
    assert str(copy) in lines[0] and "Permission denied" in lines[0]


# ------------------------------------------------------------------------------------------------------- results


def test_a_run_that_is_done_does_nothing_and_still_reports_its_failures(kitchen: Path) -> None:
    done = fineco(*run_of(kitchen.parent / "videos", kitchen))
    assert (done.code, done.out) == (3, b"")
    assert "0 to do" in done.err and "1 failed before" in done.err
    assert f"fineco failures -c {kitchen}" in done.err


def test_quiet_says_nothing_but_results_and_errors(kitchen: Path) -> None:
    done = fineco("-q", *run_of(kitchen.parent / "videos", kitchen))
    assert (done.code, done.out, done.err) == (3, b"", "")
    assert fineco("-q", "index", "-c", kitchen) == Done(0, b"", "")
    assert fineco("-q", "status", "-c", kitchen).out == fineco("status", "-c", kitchen).out
    assert fineco("-q", "status", "-c", kitchen / "nope").err.startswith("error: ")


def test_a_run_without_a_terminal_writes_plain_lines(kitchen: Path, tmp_path: Path) -> None:
    done = fineco(*run_of(kitchen.parent / "videos" / "plain.mp4", tmp_path / "c"), "--fps", 1)
    assert done.code == 0
    assert done.err.replace("\n", "").isprintable()


def test_json_names_every_query_and_file_exactly(kitchen: Path) -> None:
    (answer,) = json.loads(search(kitchen, "--format", "json").out)
    assert answer["query"] == "a red ball"
    assert {Path(os.fsencode(hit["path"]).decode("latin-1")).name.encode("latin-1") for hit in answer["hits"]} == {
        b"plain.mp4",
        NOT_UTF8,
        TWO_LINES,
    }
    assert [hit["rank"] for hit in answer["hits"]] == [1, 2, 3]
    scores = [hit["score"] for hit in answer["hits"]]
    assert scores == sorted(scores, reverse=True)
    assert all(0 <= m["start"] < m["end"] for hit in answer["hits"] for m in hit["moments"])


def test_every_format_tells_of_the_same_hits_in_the_same_order(kitchen: Path) -> None:
    (answer,) = json.loads(search(kitchen, "--format", "json").out)
    paths = [os.fsencode(hit["path"]) for hit in answer["hits"]]
    lines = search(kitchen, "--format", "jsonl").out.splitlines()
    assert [os.fsencode(json.loads(line)["path"]) for line in lines] == paths
    text = search(kitchen, "--format", "csv").out.decode("utf-8", "surrogateescape")
    assert [os.fsencode(row["path"]) for row in csv.DictReader(io.StringIO(text, newline=""))] == paths
    assert search(kitchen, "--format", "paths").out == b"".join(path + b"\n" for path in paths)
    table = search(kitchen).out.decode().splitlines()
    assert [line.split()[0] for line in table] == ["1", "2", "3"]
    assert any(line.endswith("two\\nlines.mp4") for line in table)
    assert any(line.endswith("caf\\udce9.mp4") for line in table)


def test_nothing_above_the_threshold_exits_4_with_an_answer_that_parses(kitchen: Path) -> None:
    expected = {"table": b"nothing above the threshold\n", "jsonl": b"", "paths": b""}
    for form, out in expected.items():
        done = search(kitchen, "--threshold", 2, "--format", form)
        assert (done.code, done.out, done.err) == (4, out, "")
    assert json.loads(search(kitchen, "--threshold", 2, "--format", "json").out)[0]["hits"] == []


def test_one_query_with_a_hit_is_enough(kitchen: Path) -> None:
    (answer,) = json.loads(search(kitchen, "--format", "json", "-k", 1).out)
    above = answer["hits"][0]["score"] - 1e-4
    assert search(kitchen, "xylophone", "--threshold", above).code == 0


def test_queries_come_from_a_file_with_a_mark_and_blank_lines(kitchen: Path, tmp_path: Path) -> None:
    file = tmp_path / "queries.txt"
    file.write_bytes(b"\xef\xbb\xbfa red ball\r\n\r\n  \n  two blue birds  \n")
    done = fineco("search", "first", "-f", file, "-c", kitchen, "--device", "cpu", "--format", "json", "-k", 1)
    answers = json.loads(done.out)
    assert [answer["query"] for answer in answers] == ["first", "a red ball", "two blue birds"]
    assert answers[1]["hits"] == json.loads(search(kitchen, "--format", "json", "-k", 1).out)[0]["hits"]


def test_pooled_ranking_has_no_moments(kitchen: Path) -> None:
    (answer,) = json.loads(search(kitchen, "--format", "json", "--no-rerank").out)
    assert len(answer["hits"]) == 3
    assert all(hit["moments"] == [] for hit in answer["hits"])


def test_select_says_what_to_do_next_and_status_that_it_is_due(kitchen: Path, tmp_path: Path) -> None:
    copy = tmp_path / "my kitchen"
    shutil.copytree(kitchen, copy)
    done = fineco("select", "-c", copy, "--selector", "uniform", "--keep", 2)
    assert (done.code, done.out) == (0, b"")
    assert done.err == f"Frames of 3 videos chosen. Now: fineco index -c '{copy}'\n"
    assert b"out of date: run 'fineco index'" in fineco("status", "-c", copy).out
    assert fineco("index", "-c", copy).code == 0
    assert b"up to date" in fineco("status", "-c", copy).out
    assert "already" in fineco("select", "-c", copy, "--selector", "uniform", "--keep", 2).err


# --------------------------------------------------------------------------------------------------------- pipes


def test_a_reader_that_has_seen_enough_ends_the_command_quietly(kitchen: Path) -> None:
    command = [sys.executable, "-m", "pipeline.cli", "failures", "--format", "paths", "-c", str(kitchen)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env=environment, timeout=60)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_reader_of_notes_that_goes_away_does_not_end_a_run(kitchen: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(kitchen, copy)
    command = [sys.executable, "-m", "pipeline.cli", "index", "--force", "-c", str(copy)]
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(command, stderr=writer, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60)
    finally:
        os.close(writer)
    assert done.returncode == 0
    assert b"up to date" in fineco("status", "-c", copy).out
    assert read_pointer(copy / "index" / "CURRENT") == "000002"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_results_that_cannot_be_written_are_an_error(kitchen: Path) -> None:
    command = [sys.executable, "-m", "pipeline.cli", "failures", "-c", str(kitchen)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=environment, timeout=60)
    assert done.returncode == 1
    assert done.stderr == b"error: cannot write the results: No space left on device\n"
