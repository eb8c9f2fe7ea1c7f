"""A training that is stopped or killed and started again ends as if nothing had happened."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import IntegrityError, UsageError
from pipeline.lock import Lock
from pipeline.training.checkpoints import Journal
from pipeline.training.command import Work
from small_trainings import kill_at, make_collection, metrics_of, start_training, train_small

EVERYTHING: dict[str, Any] = {"epochs": 8, "frame_ema": 0.9, "hard_negatives": True, "dropout": 0.2}


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_collection(tmp_path_factory.mktemp("training") / "kitchen", 24)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the other processes have: sums are split among threads, and so rounded otherwise with another number."""
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def weights(output: Path) -> bytes:
    return (output / "head.safetensors").read_bytes()


@pytest.mark.fault
def test_killed_twice_and_stopped_once_it_ends_with_the_same_weights_and_metrics(
    collection: Path, tmp_path: Path
) -> None:
    whole = train_small(collection, tmp_path / "whole", **EVERYTHING)
    output = tmp_path / "killed"
    rng = random.Random()
    steps = sorted(rng.sample(range(1, whole["steps"] - 6), 3))
    for step, number in zip(steps, (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM), strict=True):
        process = start_training(collection, output, EVERYTHING)
        kill_at(process, output, step, number)
        assert process.exitcode == (143 if number == signal.SIGTERM else -number)
    assert train_small(collection, output, **EVERYTHING) == whole, f"killed at {steps}"
    assert weights(output) == weights(tmp_path / "whole"), f"killed at {steps}"
    assert metrics_of(output) == metrics_of(tmp_path / "whole")


def test_ctrl_c_saves_the_state_and_says_how_to_go_on(collection: Path, tmp_path: Path) -> None:
    process = start_training(collection, tmp_path / "out", {"epochs": 50})
    kill_at(process, tmp_path / "out", 10, signal.SIGINT)
    assert process.exitcode == 130
    assert (tmp_path / "out.error").read_text() == (
        f"stopped; what was finished is kept\n  Go on with: fineco train -c {collection} -o {tmp_path / 'out'}"
    )


def test_a_finished_training_is_left_alone(collection: Path, tmp_path: Path) -> None:
    said: list[str] = []
    result = train_small(collection, tmp_path, epochs=1)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != ".lock"}
    assert train_small(collection, tmp_path, Work("cpu", quiet=True, say=said.append), epochs=1) == result
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != ".lock"}
    assert said[0].startswith("This training is finished already: 1 epoch, ")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lr": 0.5}, "lr: this training has 0.003, the command says 0.5"),
        ({"frame_ema": 0.9}, "frame ema: this training has 0.0, the command says 0.9"),
        ({"texts": "/other.jsonl"}, "texts: this training has None, the command says /other.jsonl"),
    ],
)
def test_another_option_than_it_was_started_with_is_refused_by_name(
    collection: Path, tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    train_small(collection, tmp_path, epochs=1)
    with pytest.raises(UsageError, match=message):
        train_small(collection, tmp_path, **{"epochs": 1, **given})


def test_a_stopped_training_does_not_go_on_with_other_videos(collection: Path, tmp_path: Path) -> None:
    process = start_training(collection, tmp_path / "out", {"epochs": 50})
    kill_at(process, tmp_path / "out", 1)
    other = make_collection(tmp_path / "kitchen", 25)
    with pytest.raises(UsageError, match=r"started with other videos or texts \(texts: 18, now 19\)"):
        train_small(other, tmp_path / "out", epochs=50)


def test_a_damaged_state_is_one_clear_error(collection: Path, tmp_path: Path) -> None:
    process = start_training(collection, tmp_path / "out", {"epochs": 50})
    kill_at(process, tmp_path / "out", 6)
    state = tmp_path / "out" / "training" / "state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(IntegrityError, match=r"state\.pt cannot be read"):
        train_small(collection, tmp_path / "out", epochs=50)


def test_half_a_line_of_metrics_and_lines_after_the_saved_state_go(collection: Path, tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for step in (0, 5, 10, 15):
        journal.write({"step": step, "loss": 1.0})
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 5, "lo')
    state = {"step": 10, "history": metrics_of(tmp_path)[:3]}
    journal.save(state)
    assert Journal(tmp_path).load() == state
    assert [line["step"] for line in metrics_of(tmp_path)] == [0, 5, 10]


def test_two_trainings_do_not_write_to_one_folder(collection: Path, tmp_path: Path) -> None:
    with Lock(tmp_path, "fineco train"), pytest.raises(UsageError, match="is being written by 'fineco train'"):
        train_small(collection, tmp_path, epochs=1)


def test_a_folder_with_other_files_is_not_written_to(collection: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="exists and is not a training"):
        train_small(collection, tmp_path, epochs=1)
