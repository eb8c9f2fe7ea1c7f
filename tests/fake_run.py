"""Every stage with the fake encoder, in processes of their own that a test can kill, stop or starve.

`serve` reads orders as lines of JSON on standard input and forks a process for each, so that nothing is imported twice;
it answers with the process's number, and with its exit code once it has ended (tests/stage_processes.py asks).
"""

from __future__ import annotations

import importlib
import json
import os
import selectors
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from fakes import FakeEncoder
from pipeline import commands
from pipeline.cli import main
from pipeline.commands import Machine, Sources
from pipeline.compact import compact as fold
from pipeline.config import EmbedOptions, SelectOptions
from pipeline.errors import FinecoError
from pipeline.repair import repair_collection
from pipeline.sampling import Sampling

FPS5 = EmbedOptions(sampling=Sampling("fps", 5.0))
SMALL = EmbedOptions(sampling=Sampling("fps", 5.0), frame_size=16)
CAPTION = SelectOptions("caption", "0.5")
UNIFORM = SelectOptions("uniform", "0.3")
FAILED = 3
WORKERS = 1


def machine() -> Machine:
    return Machine(workers=WORKERS, batch_size=8)


def decode(videos: Path, collection: Path, encoder: FakeEncoder) -> bool:
    return commands.decode(collection, Sources([str(videos)]), SMALL, machine()).any_failed


def embed_frames(videos: Path, collection: Path, encoder: FakeEncoder) -> bool:
    return commands.embed(collection, Sources(), EmbedOptions(), machine(), encoder).any_failed


def embed_videos(videos: Path, collection: Path, encoder: FakeEncoder) -> bool:
    return commands.embed(collection, Sources([str(videos)]), FPS5, machine(), encoder).any_failed


def select(videos: Path, collection: Path, encoder: FakeEncoder) -> bool:
    commands.select(collection, UNIFORM, machine(), encoder)
    return False


def index(videos: Path, collection: Path, encoder: FakeEncoder) -> bool:
    commands.index(collection, machine=machine())
    return False


def run(videos: Path, collection: Path, encoder: FakeEncoder) -> bool:
    return commands.run(collection, Sources([str(videos)]), FPS5, CAPTION, machine(), encoder=encoder).any_failed


def verify(videos: Path, collection: Path, encoder: FakeEncoder) -> bool:
    sys.argv = ["fineco", "verify", "-c", str(collection)]
    main()
    return False


def search(videos: Path, collection: Path, encoder: FakeEncoder) -> bool:
    return not commands.search(collection, ["a red block"], encoder=encoder)[0]


def compact(videos: Path, collection: Path, encoder: FakeEncoder) -> bool:
    fold(collection, machine())
    return False


def repair(videos: Path, collection: Path, encoder: FakeEncoder) -> bool:
    found, hopeless = repair_collection(collection, machine(), encoder)
    return bool(found.problems or hopeless)


def train(videos: Path, collection: Path, encoder: FakeEncoder) -> bool:
    """Over the collection in `videos`, into the folder `collection`."""
    from pipeline.training.command import Work
    from small_trainings import train_small

    train_small(videos, collection, Work("cpu", save_steps=2), epochs=3, frame_ema=0.9, hard_negatives=True)
    return False


Stage = Callable[[Path, Path, FakeEncoder], bool]
STAGES: dict[str, Stage] = {
    "decode": decode,
    "embed-frames": embed_frames,
    "embed-videos": embed_videos,
    "select": select,
    "index": index,
    "run": run,
    "compact": compact,
    "repair": repair,
    "verify": verify,
    "search": search,
    "train": train,
}
"""Name -> what does it: (videos, collection, encoder) -> whether something failed."""


def call(stage: str, videos: Path, collection: Path, seconds_per_batch: float = 0.0) -> int:
    """A stage as a command: its exit code; small shards, so that a dozen videos make many commits."""
    try:
        with mock.patch("pipeline.run.SHARD_VIDEOS", 2):
            failed = STAGES[stage](videos, collection, FakeEncoder(seconds_per_batch=seconds_per_batch))
    except FinecoError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except SystemExit as error:
        return int(error.code or 0)
    return FAILED if failed else 0


# ---------------------------------------------------------------------------------------------------- the server


def serve(modules: list[str]) -> None:
    """Forks a process for each order until standard input ends."""
    for module in modules:
        importlib.import_module(module)
    ended, wake = socket.socketpair()
    ended.setblocking(False)
    wake.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(wake.fileno())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipes: dict[int, tuple[int, str]] = {}  # process -> where its standard error comes from, and the file it goes to
    with selectors.DefaultSelector() as selector:
        selector.register(sys.stdin, selectors.EVENT_READ)
        selector.register(ended, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is ended:
                    ended.recv(100)
                    _reap(pipes)
                else:
                    line = os.read(sys.stdin.fileno(), 1 << 16)  # the client waits for an answer to each
                    if not line:
                        return
                    order = json.loads(line)
                    pid, pipe = _fork(order)
                    pipes[pid] = pipe, order["errors"]
                    print(json.dumps({"started": pid}), flush=True)


def _reap(pipes: dict[int, tuple[int, str]]) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        pipe, errors = pipes.pop(pid)
        with open(pipe, "rb", buffering=0) as source:
            os.set_blocking(pipe, False)
            Path(errors).write_bytes(source.read() or b"")
        print(json.dumps({"ended": pid, "code": os.waitstatus_to_exitcode(status)}), flush=True)


def _fork(order: dict[str, Any]) -> tuple[int, int]:
    """Process and the reading end of its standard error: a pipe, which no limit to files concerns."""
    pipe, errors = os.pipe()
    pid = os.fork()
    if pid:
        os.close(errors)
        return pid, pipe
    try:
        os.close(pipe)
        os.dup2(errors, 2)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(0, 1)
        os.environ.update(order["environment"])
        tempfile.tempdir = None  # TMPDIR may be among it
        sys.argv = ["fineco", order["stage"], order["videos"], "-c", order["collection"]]
        if order["prepare"]:
            module, name, arguments = order["prepare"]
            getattr(importlib.import_module(module), name)(*arguments)
        code = call(order["stage"], Path(order["videos"]), Path(order["collection"]), order["seconds_per_batch"])
    except BaseException:
        traceback.print_exc()
        code = 99
    os._exit(code)
