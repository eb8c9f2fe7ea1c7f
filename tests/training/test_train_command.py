"""`fineco train` as it is typed, what it shows, and what the trained head is good for."""

from __future__ import annotations

import io
import json
import sys
import types
from pathlib import Path

import pytest

from command_line import fineco
from fakes import FakeEncoder
from models.fineco_encoder import load_fineco
from pipeline.errors import UsageError
from pipeline.lock import Lock
from pipeline.training.command import Work
from pipeline.training.display import Display
from small_trainings import make_collection, metrics_of, train_small


@pytest.fixture(scope="module")
def kitchen(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten real clips through the built-in encoder."""
    folder = tmp_path_factory.mktemp("real")
    captions = (shared / "data" / "captions.jsonl").read_text().splitlines()
    names = list(dict.fromkeys(json.loads(line)["video"] for line in captions))[:10]
    videos = [shared / "data" / "videos" / name for name in names]
    done = fineco("run", *videos, "-c", folder / "kitchen", "--model", "builtin", "--precision", "fp32")
    assert done.code == 0, done.err
    return folder / "kitchen"


@pytest.mark.slow
def test_real_clips_are_learnt_by_heart_and_found(kitchen: Path, shared: Path, tmp_path: Path) -> None:
    texts, output = shared / "data" / "captions.jsonl", tmp_path / "head"
    options = ["--validation", 0, "--epochs", 60, "--lr", 3e-3, "--width", 32, "--layers", 1, "--batch-size", 10]
    trained = fineco("train", "-c", kitchen, "--texts", texts, "-o", output, *options)
    assert trained.code == 0, trained.err
    assert "left out: 46 texts name a video that the collection does not have" in trained.err
    assert trained.out == b""
    again = fineco("train", "-c", kitchen, "-o", output)
    assert again.code == 0 and again.err.startswith("This training is finished already: 60 epochs")
    refused = fineco("train", "-c", kitchen, "-o", output, "--lr", 1)
    assert refused.code == 2 and "lr: this training has 0.003, the command says 1.0" in refused.err

    made = fineco(
        *("run", "-c", tmp_path / "found", "--model", f"fineco:{output}", "--features-of", kitchen),
        *("--precision", "fp32", "--selector", "all"),
    )
    assert made.code == 0, made.err
    # By the vectors that it was trained to bring together: the whole clip's mean, not its moments'.
    options = ["--score", "mean", "--by", "video", "--format", "json", "--draws", 0]
    evaluated = fineco("evaluate", "retrieval", texts, "-c", tmp_path / "found", *options)
    assert evaluated.code == 0, evaluated.err
    result = json.loads(evaluated.out)["results"][0]
    assert (result["direction"], result["queries"]) == ("text to video", 20)
    assert result["values"]["r1"] >= 0.95  # the order of decoding decides the batches, and so the last of them


def test_every_option_has_help_and_the_groups_are_told() -> None:
    done = fineco("train", "--help")
    assert done.code == 0
    for option in (b"--texts", b"--towers", b"--frame-ema", b"--hard-negatives", b"--tensorboard", b"--save-steps"):
        assert option in done.out


def test_metrics_have_the_losses_and_the_validations(tmp_path: Path) -> None:
    result = train_small(make_collection(tmp_path / "kitchen", 24), tmp_path / "out", epochs=10)
    lines = metrics_of(tmp_path / "out")
    steps = [line["step"] for line in lines if "validation" not in line]
    assert steps == list(range(20, result["steps"] + 1, 20))
    assert [line["epoch"] for line in lines if "validation" in line] == list(range(11))
    assert {"loss", "pair loss", "frame loss", "gradient", "lr", "logit scale", "step", "epoch"} == set(
        next(line for line in lines if "validation" not in line)
    )
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert record["result"] == result and record["options"]["epochs"] == 10


class Writer:
    """Stands in for TensorBoard's: what it was told."""

    told: list[tuple[str, float, int]] = []  # noqa: RUF012
    purged: list[int | None] = []  # noqa: RUF012

    def __init__(self, folder: str, purge_step: int | None = None) -> None:
        self.purged.append(purge_step)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.told.append((name, value, step))

    def flush(self) -> None: ...

    def close(self) -> None: ...


def test_tensorboard_gets_every_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    work = Work("cpu", tensorboard=True, quiet=True)
    train_small(make_collection(tmp_path / "kitchen", 24), tmp_path / "out", work, epochs=5)
    lines = metrics_of(tmp_path / "out")
    assert Writer.told == [(n, v, line["step"]) for line in lines for n, v in line.items() if isinstance(v, float)]
    assert Writer.purged == [None]


def test_without_tensorboard_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    collection = make_collection(tmp_path / "kitchen", 8)
    with pytest.raises(UsageError, match="TensorBoard") as caught:
        train_small(collection, tmp_path / "out", Work("cpu", tensorboard=True, quiet=True))
    assert "pip install tensorboard" in caught.value.hint


# --------------------------------------------------------------------------------------------------------- display


def test_a_pipe_gets_a_line_soon_and_then_seldom_with_rate_and_time_left() -> None:
    stream, now = io.StringIO(), 0.0
    with Display(10, stream=stream, clock=lambda: now) as display:
        for step in range(1, 101):
            now = float(step)
            display.step(step / 200, {"loss": 2.5} if step >= 4 else {}, 64)
        display.validated(5, {"R@1": 12.34, "R@5": 50.0, "mean recall": 31.0}, True)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 5
    assert lines[0] == "0:00:05  epoch 1/10, loss 2.500, 64 clips/s, 3 min left"
    assert lines[3] == "0:01:35  epoch 5/10, loss 2.500, 64 clips/s, 2 min left"
    assert lines[4] == "epoch 5/10  R@1 12.3  R@5 50.0  best so far"


def test_quiet_shows_nothing_and_a_closed_stream_ends_nothing() -> None:
    stream = io.StringIO()
    with Display(1, quiet=True, stream=stream) as display:
        display.validated(1, {"R@1": 1.0}, True)
    assert stream.getvalue() == ""
    with Display(1, stream=stream) as display:
        stream.close()
        display.validated(1, {"R@1": 1.0}, True)


def test_a_terminal_gets_one_line_that_moves() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with Display(2, stream=stream) as display:
        display.step(0.25, {"loss": 1.0}, 8)
        display.step(0.5, {}, 8)
        display.validated(1, {"R@1": 25.0}, True)
    assert "epoch 1/2  R@1 25.0  best so far" in stream.getvalue()


def test_a_training_that_is_refused_leaves_no_folder_and_takes_nobodys_lock(tmp_path: Path) -> None:
    folder = make_collection(tmp_path / "kitchen", 4)
    for collection, output in (("nowhere", "new"), ("kitchen", "kitchen")):
        with pytest.raises(UsageError):
            train_small(tmp_path / collection, tmp_path / output)
    assert not (tmp_path / "new").exists()
    with Lock(tmp_path / "busy", "another"), pytest.raises(UsageError, match="being written"):
        train_small(folder, tmp_path / "busy")
    assert (tmp_path / "busy" / ".lock").exists()


def test_the_head_brings_the_temperature_that_was_measured(tmp_path: Path) -> None:
    result = train_small(make_collection(tmp_path / "kitchen", 24), tmp_path / "out")
    assert load_fineco(tmp_path / "out", FakeEncoder()).spec.temperature == result["re-scoring temperature"]


def test_too_few_videos_to_validate_with_are_told(tmp_path: Path) -> None:
    lines: list[str] = []
    work = Work("cpu", quiet=True, say=lines.append)
    train_small(make_collection(tmp_path / "kitchen", 12), tmp_path / "some", work, epochs=1)
    assert any("3 videos to validate with say little" in line for line in lines)
    lines.clear()
    train_small(tmp_path / "kitchen", tmp_path / "none", work, epochs=1, validation=0.0)
    assert not any("validate with say little" in line for line in lines)


def test_a_training_that_was_in_vain_is_told(tmp_path: Path) -> None:
    lines: list[str] = []
    work = Work("cpu", quiet=True, say=lines.append)
    result = train_small(make_collection(tmp_path / "kitchen", 40), tmp_path / "out", work, epochs=1, lr=1e-12)
    assert result["best epoch"] == 0
    assert any("the start is what was kept" in line for line in lines)
