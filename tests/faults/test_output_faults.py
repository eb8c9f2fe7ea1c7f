"""Wherever the output goes, or cannot go: one line, no traceback, and no data lost or written into the wrong file."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fakes import FakeEncoder
from guards import Guard
from other_user import as_nobody, open_folder
from pipeline import commands
from pipeline.config import SelectOptions
from pipeline.inspect import status_of
from small_runs import checked, machine, make_videos, run

GUARDS = [
    Guard(
        faults=(25,),
        file="pipeline/output.py",
        old="        if isinstance(error, BrokenPipeError):",
        new="        if False:",
        test="test_a_reader_that_has_seen_enough_ends_every_command_quietly[failures]",
    ),
    Guard(
        faults=(25,),
        file="pipeline/cli/__init__.py",
        old="error.errno in REFUSED",
        new="False",
        test="test_a_full_disk_behind_standard_output_is_one_line[help]",
    ),
    Guard(
        faults=(25,),
        file="pipeline/output.py",
        old='        raise FinecoError(f"cannot write the results:',
        new='        raise RuntimeError(f"cannot write the results:',
        test="test_a_full_disk_behind_standard_output_is_one_line[status]",
    ),
    Guard(
        faults=(25,),
        file="pipeline/cli/__init__.py",
        old="    _open_standard_streams()\n    context",
        new="    context",
        test="test_closed_results_are_an_error_and_not_lost",
    ),
    Guard(
        faults=(25,),
        file="pipeline/cli/__init__.py",
        old="            os.open(os.devnull, flags)",
        new="            pass",
        test="test_no_file_takes_the_number_of_a_closed_stream",
    ),
    Guard(
        faults=(25,),
        file="pipeline/lock.py",
        old='raise FinecoError(\n                f"cannot write to',
        new='raise RuntimeError(\n                f"cannot write to',
        test="test_a_read_only_collection_is_one_line_for_another_user[index]",
    ),
]

pytestmark = pytest.mark.fault

ROOT = Path(__file__).parents[2]
FULL = Path("/dev/full")
# One for each way to print: click's own, and pipeline.output's. The rest go the same ways.
COMMANDS = {
    "help": ["--help"],
    "version": ["--version"],
    "help of a command": ["search", "--help"],
    "status": ["status", "-c", "COLLECTION"],
    "failures": ["failures", "-c", "COLLECTION"],
    "verify": ["verify", "--json", "-c", "COLLECTION"],
}
BY_CLICK = ("help", "version", "help of a command")  # which ends with 1 itself
LONG_COMMANDS = {
    "doctor": ["doctor"],
    "search": ["search", "red", "-c", "COLLECTION", "--format", "json"],
}
EACH_COMMAND = [*COMMANDS, *(pytest.param(name, marks=pytest.mark.long) for name in LONG_COMMANDS)]


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a failure, and named after the builtin encoder by whoever searches it."""
    folder = tmp_path_factory.mktemp("output")
    videos = make_videos(folder / "v", 1)
    (videos / "broken.mp4").write_bytes(b"no video at all")
    run(folder / "c", videos)
    return folder / "c"


@pytest.fixture(scope="module")
def builtin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A collection that `search` can load the encoder of."""
    folder = tmp_path_factory.mktemp("builtin")
    make_videos(folder / "v", 1)
    done = fineco("-q", "run", str(folder / "v"), "-c", str(folder / "c"), "--model", "builtin", "--workers", "1")
    assert done.returncode == 0, done.stderr
    return folder / "c"


def fineco(
    *arguments: str, stdout: int = subprocess.PIPE, before: Callable[[], object] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        preexec_fn=before,
        timeout=120,
        check=False,
    )


def arguments_of(name: str, request: pytest.FixtureRequest) -> list[str]:
    words = (COMMANDS | LONG_COMMANDS)[name]
    if "COLLECTION" not in words:
        return words
    folder = request.getfixturevalue("builtin" if name == "search" else "collection")
    return [str(folder) if word == "COLLECTION" else word for word in words]


def close(*numbers: int) -> Callable[[], object]:
    return lambda: os.closerange(min(numbers), max(numbers) + 1)


def close_input_and_notes() -> None:
    os.close(0)
    os.close(2)


@pytest.mark.parametrize("name", EACH_COMMAND)
def test_a_reader_that_has_seen_enough_ends_every_command_quietly(name: str, request: pytest.FixtureRequest) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = fineco(*arguments_of(name, request), stdout=writer)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (1 if name in BY_CLICK else 141, b"")


@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("name", EACH_COMMAND)
def test_a_full_disk_behind_standard_output_is_one_line(name: str, request: pytest.FixtureRequest) -> None:
    with FULL.open("wb") as full:
        done = fineco(*arguments_of(name, request), stdout=full.fileno())
    assert (done.returncode, done.stderr) == (1, b"error: cannot write the results: No space left on device\n")


@pytest.mark.parametrize("name", ["help", "status"])
def test_closed_results_are_an_error_and_not_lost(name: str, request: pytest.FixtureRequest) -> None:
    done = fineco(*arguments_of(name, request), before=close(1))
    assert (done.returncode, done.stderr) == (1, b"error: cannot write the results: Bad file descriptor\n")


def test_closed_input_and_notes_are_missed_by_nobody(collection: Path) -> None:
    done = fineco("failures", "-c", str(collection), before=close_input_and_notes)
    assert done.returncode == 0 and b"broken.mp4" in done.stdout
    done = fineco("status", "-c", str(collection / "none"), before=close_input_and_notes)
    assert (done.returncode, done.stdout, done.stderr) == (2, b"", b"")


def test_no_file_takes_the_number_of_a_closed_stream() -> None:
    """Else a library's message to standard error would be written into a shard."""
    program = (
        "import os, sys; from pipeline import cli\n"
        "sys.argv = ['fineco', 'status', '-c', 'none']\n"
        "try: cli.main()\n"
        "except SystemExit: os._exit(os.open('/', os.O_RDONLY))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, preexec_fn=close(0, 1, 2), timeout=60, check=False)
    assert done.returncode > 2


@pytest.mark.long
def test_a_run_without_any_stream_writes_what_a_run_with_them_does(builtin: Path, tmp_path: Path) -> None:
    videos = str(builtin.parent / "v")
    given = ("-q", "run", videos, "-c", str(tmp_path / "c"), "--model", "builtin", "--workers", "1")
    assert fineco(*given, before=close(0, 1, 2)).returncode == 0
    assert checked(tmp_path / "c")["digest"] == checked(builtin)["digest"]


@pytest.mark.parametrize("command", ["run", "select", "index"])
def test_a_read_only_collection_is_one_line_for_another_user(command: str) -> None:
    with open_folder() as folder:
        videos = make_videos(folder / "v", 1)
        run(folder / "c", videos)
        before = status_of(folder / "c")

        def work() -> str:
            if command == "run":
                run(folder / "c", videos)
            elif command == "select":
                commands.select(folder / "c", SelectOptions("uniform", "1"), machine(), FakeEncoder())
            else:
                commands.index(folder / "c", machine=machine(), force=True)
            return "no error"

        said = as_nobody(work)
        assert "Permission denied" in said and said.count("\n") <= 1, said
        assert said.startswith(("FinecoError: ", "UsageError: "))
        assert status_of(folder / "c") == before
        checked(folder / "c")
