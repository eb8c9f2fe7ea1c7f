"""Ctrl-C, SIGTERM and a closed terminal: what was finished is kept, nobody is left behind, no traceback is shown."""

from __future__ import annotations

import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fake_run import FAILED, call
from fakes import FakeEncoder
from guards import Guard
from pipeline import commands
from pipeline.collection import Collection
from pipeline.verify import verify_collection
from small_runs import make_videos
from stage_processes import ROOT, Job, are_gone, server, wait_until

pytestmark = pytest.mark.fault

GUARDS = [
    Guard(
        (15,),
        "pipeline/interrupts.py",
        "            os._exit(128 + number)",
        "            pass",
        "test_a_second_signal_ends_it_at_once",
    ),
    Guard(
        (15,),
        "pipeline/interrupts.py",
        "        self.stop.set()\n",
        "        raise KeyboardInterrupt\n",
        "test_a_signal_ends_a_stage_cleanly_with_the_line_to_resume[embed-SIGINT]",
    ),
    Guard(
        (15,),
        "pipeline/interrupts.py",
        "if self._cuts_off:",
        "if False:",
        "test_a_signal_ends_a_stage_cleanly_with_the_line_to_resume[index-SIGTERM]",
    ),
    Guard(
        (15,),
        "pipeline/interrupts.py",
        "if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:",
        "if True:",
        "test_nohup_is_obeyed",
    ),
    Guard(
        (15,),
        "pipeline/interrupts.py",
        "if number != signal.SIGHUP:  # which",
        "if True:  # which",
        "test_a_terminal_that_is_closed_ends_it_as_sigterm_does",
    ),
    Guard(
        (15,),
        "pipeline/decoding/worker.py",
        "for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):",
        "for number in ():",
        "test_a_signal_to_all_processes_at_once_loses_nothing[SIGTERM]",
    ),
    Guard(
        (15,),
        "pipeline/cli/loading.py",
        "        signal.signal(signal.SIGINT, signal.SIG_DFL)",
        "        pass",
        "test_ctrl_c_while_the_command_is_still_being_loaded_shows_no_traceback",
    ),
]
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
STAGES = {  # what is slow -> the stage to which that happens
    "catalog": "run",
    "decode": "decode",
    "embed": "run",
    "select": "select",
    "index": "index",
}
SOONEST = 3.0  # seconds in which a first signal ends a stage of this test, on a busy machine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos, and for each stage what an unbroken one starts with and leaves."""
    folder = tmp_path_factory.mktemp("signals")
    videos = make_videos(folder / "videos", 4)
    (videos / "broken.mp4").write_bytes(b"no video at all" * 100)
    assert call("run", videos, folder / "after-run") == FAILED
    shutil.copytree(folder / "after-run", folder / "before-select")
    shutil.copytree(folder / "after-run", folder / "after-select")
    assert call("select", videos, folder / "after-select") == 0
    shutil.copytree(folder / "after-select", folder / "before-index")
    shutil.copytree(folder / "after-select", folder / "after-index")
    assert call("index", videos, folder / "after-index") == 0
    assert call("decode", videos, folder / "after-decode") == FAILED
    return folder


class Stopped:
    """A stage that is in the middle of what is slow in it."""

    def __init__(self, folder: Path, what: str, tmp_path: Path, stage: str = "") -> None:
        self.stage = stage or STAGES[what]
        self.folder, self.videos, self.collection = folder, folder / "videos", tmp_path / "c"
        if (folder / f"before-{self.stage}").exists():
            shutil.copytree(folder / f"before-{self.stage}", self.collection)
        reached = tmp_path / "reached"
        self.job: Job = server().start(
            self.stage, self.videos, self.collection, prepare=("sabotage", "slow", [what, str(reached)])
        )
        wait_until(reached.exists)
        self.children = self.job.children()

    def check(self, number: signal.Signals) -> None:
        """What it left behind, and that the same command ends well."""
        assert self.job.wait() == CODES[number], self.job.errors
        assert "Traceback" not in self.job.errors
        assert are_gone(self.children)
        if self.collection.exists():
            assert [path for path in self.collection.rglob("*") if ".tmp" in path.name] == []
        if (self.collection / "collection.json").exists():
            assert verify_collection(self.collection)["problems"] == []
        job = server().start(self.stage, self.videos, self.collection)
        assert job.wait() in (0, FAILED), job.errors
        unbroken = self.folder / f"after-{self.stage}"
        assert verify_collection(self.collection) | {"collection": "", "files": 0, "bytes": 0} == verify_collection(
            unbroken
        ) | {"collection": "", "files": 0, "bytes": 0}


DEFAULT = [
    ("catalog", signal.SIGINT),
    ("decode", signal.SIGTERM),
    ("embed", signal.SIGINT),
    ("select", signal.SIGHUP),
    ("index", signal.SIGTERM),
]


@pytest.mark.parametrize(
    ("what", "number"),
    [
        pytest.param(
            what, number, id=f"{what}-{number.name}", marks=() if (what, number) in DEFAULT else pytest.mark.long
        )
        for what in STAGES
        for number in CODES
    ],
)
def test_a_signal_ends_a_stage_cleanly_with_the_line_to_resume(
    folder: Path, tmp_path: Path, what: str, number: signal.Signals
) -> None:
    stopped = Stopped(folder, what, tmp_path)
    if what in ("decode", "embed"):
        wait_until(lambda: list(stopped.collection.glob("outcomes/*.jsonl")))
    stopped.job.send(number)
    assert stopped.job.ended_within(SOONEST)
    if what in ("decode", "embed"):
        assert Collection(stopped.collection).state().paths  # what was finished is kept
    errors = stopped.job.errors
    command = f"fineco {stopped.stage} {stopped.videos} -c {stopped.collection}"
    assert f"error: stopped; what was finished is kept\n  Go on with: {command}\n" in errors
    stopped.check(number)


def test_a_second_signal_ends_it_at_once(folder: Path, tmp_path: Path) -> None:
    collection, reached = tmp_path / "c", tmp_path / "reached"
    job = server().start("run", folder / "videos", collection, 20.0, ("sabotage", "slow", ["embed", str(reached)]))
    wait_until(reached.exists)
    time.sleep(0.3)  # into the encoder's twenty seconds
    job.send(signal.SIGINT)
    time.sleep(0.2)
    children = job.children()
    job.send(signal.SIGINT)
    assert job.ended_within(1.5)
    assert job.wait() == 130
    assert "Traceback" not in job.errors
    assert are_gone(children)
    assert server().start("run", folder / "videos", collection).wait() == FAILED
    assert verify_collection(collection)["digest"] == verify_collection(folder / "after-run")["digest"]


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)],
    ids=lambda number: number.name,
)
def test_a_signal_to_all_processes_at_once_loses_nothing(folder: Path, tmp_path: Path, number: signal.Signals) -> None:
    stopped = Stopped(folder, "decode", tmp_path)
    assert stopped.children
    for child in stopped.children:  # those that have started ignore it: the run ends them itself
        wait_until(lambda child=child: ignores(child, number))  # type: ignore[misc]
    stopped.job.send(number, to_group=True)
    assert stopped.job.ended_within(SOONEST)
    assert "crash" not in stopped.job.errors and "will try again" not in stopped.job.errors
    stopped.check(number)


def ignores(pid: int, number: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    mask = next(line.split()[1] for line in status.splitlines() if line.startswith("SigIgn"))
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_reader_just_stops(folder: Path, tmp_path: Path, number: signal.Signals) -> None:
    reached = tmp_path / "reached"
    prepare = ("sabotage", "slow", ["verify", str(reached)])
    job = server().start("verify", folder / "videos", folder / "after-run", prepare=prepare)
    wait_until(reached.exists)
    job.send(number)
    assert job.ended_within(SOONEST)
    assert (job.wait(), job.errors.strip()) == (CODES[number], "error: stopped")


# -------------------------------------------------------------------------------------------------- the real command


def command(*arguments: object) -> subprocess.Popen[str]:
    """`fineco ARGUMENTS` in a session of its own, with signals as a shell leaves them."""

    def as_a_shell_does() -> None:
        os.setsid()
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        preexec_fn=as_a_shell_does,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def has_dealt_with(pid: int, number: int) -> Callable[[], bool]:
    """Whether a process has come as far as the program's own first line: Python catches Ctrl-C, then it is left to the
    system."""
    caught = False

    def has() -> bool:
        nonlocal caught
        status = Path(f"/proc/{pid}/status").read_text()
        mask = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
        catches = bool(int(mask, 16) >> (number - 1) & 1)
        was, caught = caught, catches or caught
        return was and not catches

    return has


def stop(process: subprocess.Popen[str], number: int) -> str:
    process.send_signal(number)
    out, errors = process.communicate(timeout=60)
    assert "Traceback" not in out + errors and "Exception ignored" not in errors, errors
    return out + errors


def test_ctrl_c_while_the_command_is_still_being_loaded_shows_no_traceback(folder: Path) -> None:
    process = command("verify", "-c", folder / "after-run")
    has = has_dealt_with(process.pid, signal.SIGINT)
    deadline = time.monotonic() + 30
    while not has() and time.monotonic() < deadline:
        pass  # without a pause: this takes a few hundredths of a second
    assert stop(process, signal.SIGINT) == ""  # and has not come to an answer
    assert process.returncode == -signal.SIGINT  # a shell shows 130


def test_ctrl_c_in_the_middle_of_loading_shows_no_traceback(folder: Path, tmp_path: Path) -> None:
    hit(0.5, folder / "videos", tmp_path / "c")


@pytest.mark.long
def test_ctrl_c_at_any_moment_shows_no_traceback(folder: Path, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    process = command("run", folder / "videos" / "clip0.mp4", "-c", begun, "--model", "builtin")
    assert process.communicate(timeout=60) and process.returncode == 0
    rng = random.Random(20261124)
    for number in range(30):
        collection = tmp_path / str(number)
        if number % 2:
            shutil.copytree(begun, collection)
        hit(rng.uniform(0, 5.0), folder / "videos", collection)


def hit(seconds: float, videos: Path, collection: Path) -> None:
    """Ctrl-C so long after the program's first line."""
    process = command("run", videos, "-c", collection, "--model", "builtin", "--workers", "1")
    wait_until(has_dealt_with(process.pid, signal.SIGINT))
    time.sleep(seconds)
    if process.poll() is None:
        stop(process, signal.SIGINT)
    assert process.returncode in (130, -signal.SIGINT, FAILED), seconds
    assert list(collection.rglob("*.tmp")) == []
    if (collection / "collection.json").exists():
        assert verify_collection(collection)["problems"] == []


def test_nohup_is_obeyed(folder: Path, tmp_path: Path) -> None:
    collection, reached = tmp_path / "c", tmp_path / "reached"
    shutil.copytree(folder / "before-select", collection)
    prepare = ("sabotage", "slow_under_nohup", ["select", str(reached)])
    job = server().start("select", folder / "videos", collection, prepare=prepare)
    wait_until(reached.exists)
    job.send(signal.SIGHUP)
    assert job.wait() == 0


def test_a_terminal_that_is_closed_ends_it_as_sigterm_does(folder: Path, tmp_path: Path) -> None:
    stopped = Stopped(folder, "select", tmp_path)
    for _ in range(2):  # from the terminal and from the shell
        stopped.job.send(signal.SIGHUP, to_group=True)
        time.sleep(0.05)
    assert stopped.job.ended_within(SOONEST)
    assert "stopped; what was finished is kept" in stopped.job.errors
    stopped.check(signal.SIGHUP)


@pytest.mark.long
def test_a_real_terminal_that_is_closed_leaves_a_whole_collection(folder: Path, tmp_path: Path) -> None:
    collection = tmp_path / "c"
    terminal, end = pty.openpty()
    pid = os.fork()
    if pid == 0:
        os.close(terminal)
        os.login_tty(end) if hasattr(os, "login_tty") else _login(end)
        os.environ.update({"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "xterm"})
        arguments = ["run", str(folder / "videos"), "-c", str(collection), "--model", "builtin", "--fps", "30"]
        os.execv(sys.executable, [sys.executable, "-m", "pipeline.cli", *arguments])
    os.close(end)
    wait_until((collection / "collection.json").exists, 60)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 129
    assert verify_collection(collection)["problems"] == []
    assert list(collection.rglob("*.tmp")) == []


def _login(end: int) -> None:
    import fcntl
    import termios

    os.setsid()
    fcntl.ioctl(end, termios.TIOCSCTTY, 0)
    for number in range(3):
        os.dup2(end, number)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_demo_that_is_stopped_while_it_renders_leaves_nobody_rendering(
    tmp_path: Path, number: signal.Signals
) -> None:
    process = command("demo", "--folder", tmp_path / "demo", "--videos", 32)
    wait_until(lambda: len(list(tmp_path.glob("demo/videos/*.mp4"))) > 2, 60)
    children = [
        int(child)
        for task in Path(f"/proc/{process.pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]
    assert children
    assert stop(process, number).endswith("error: stopped\n")
    assert process.returncode == CODES[number]
    assert are_gone(children, 10)


@pytest.mark.long
@pytest.mark.parametrize("number", list(CODES), ids=lambda number: number.name)
def test_a_signal_in_a_training_saves_its_state(tmp_path: Path, number: signal.Signals) -> None:
    from small_trainings import make_collection

    kitchen = make_collection(tmp_path / "kitchen", 12)
    trainer = server("small_trainings", "pipeline.training.command")
    whole, output, reached = tmp_path / "whole", tmp_path / "out", tmp_path / "reached"
    assert trainer.start("train", kitchen, whole).wait() == 0
    job = trainer.start("train", kitchen, output, prepare=("sabotage", "slow", ["train", str(reached)]))
    wait_until(reached.exists)
    job.send(number)
    assert job.wait() == CODES[number], job.errors
    assert "Go on with: fineco train" in job.errors and "Traceback" not in job.errors
    assert list(output.rglob("*.tmp")) == []
    assert trainer.start("train", kitchen, output).wait() == 0
    assert (output / "head.safetensors").read_bytes() == (whole / "head.safetensors").read_bytes()


def test_an_index_that_was_stopped_leaves_the_one_before(folder: Path, tmp_path: Path) -> None:
    def answers() -> object:
        return commands.search(tmp_path / "c", ["a red block on a hill"], encoder=FakeEncoder())

    stopped = Stopped(folder, "index", tmp_path)
    before = answers()
    stopped.job.send(signal.SIGINT)
    assert stopped.job.wait() == 130
    assert answers() == before
