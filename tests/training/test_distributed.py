"""Two processes with half a batch each do what one does with the whole."""

from __future__ import annotations

import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from small_trainings import make_collection, metrics_of, start_training, train_small

OPTIONS: dict[str, Any] = {"epochs": 4, "dropout": 0.0, "frame_ema": 0.9, "batch_size": 6}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_collection(tmp_path_factory.mktemp("training") / "kitchen", 24)


@pytest.mark.parametrize("hard", [False, True])
def test_two_processes_give_the_weights_of_one(collection: Path, tmp_path: Path, hard: bool) -> None:
    options = {**OPTIONS, "hard_negatives": hard}
    port = free_port()
    pair = [start_training(collection, tmp_path / "two", options, rank, 2, port) for rank in range(2)]
    train_small(collection, tmp_path / "one", **options)
    for process in pair:
        process.join(60)
        assert process.exitcode == 0, (tmp_path / "two.error").read_text()
    one, two = (load_file(tmp_path / name / "head.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, weights in one.items():
        torch.testing.assert_close(two[name], weights, atol=2e-6, rtol=0)
    # each line once, and with the losses of the whole batch
    first, second = metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two")
    assert [line["step"] for line in first] == [line["step"] for line in second]
    for a, b in zip(first, second, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_a_signal_to_one_process_stops_both_and_they_go_on_together(collection: Path, tmp_path: Path) -> None:
    options = {**OPTIONS, "epochs": 300}
    output, port = tmp_path / "out", free_port()
    pair = [start_training(collection, output, options, rank, 2, port) for rank in range(2)]
    deadline = time.monotonic() + 60
    while not any(line["step"] > 5 for line in metrics_of(output)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert pair[1].pid is not None
    pair[1].terminate()
    for process in pair:
        process.join(60)
        assert process.exitcode == 128 + signal.SIGTERM
    state = torch.load(output / "training" / "state.pt", weights_only=True)
    assert state["step"] >= metrics_of(output)[-1]["step"] > 0
