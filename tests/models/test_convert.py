"""Published checkpoints to folders: what is taken, what is refused, and that nothing in a checkpoint runs."""

from __future__ import annotations

import argparse
import collections
import enum
import functools
import os
import pickle
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import models.convert
from command_line import fineco
from models.convert import convert, convert_videoclip, read_checkpoint
from models.videoclip import VideoCLIP
from pipeline.errors import FinecoError, IntegrityError, UsageError
from videoclip_models import TINY, UNUSED, reference_state, tiny_state, write_vocabulary


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save(tmp_path / "checkpoint_best.pt", reference_state())


def save(path: Path, state: dict[str, Any], prefix: str = "mmmodel.", **others: object) -> Path:
    torch.save({"model": {prefix + name: tensor for name, tensor in state.items()}, **others}, path)
    return path


def assert_is_tiny(folder: Path, half: bool = False) -> None:
    # heads and longest clip are in no tensor: the released model's are taken
    loaded = VideoCLIP.load(folder)
    assert (loaded.config.video_layers, loaded.config.text_layers, loaded.config.feature_dim) == (3, 4, 24)
    assert (loaded.config.hidden_size, loaded.config.n_words, loaded.config.n_positions) == (48, 200, 64)
    expected = tiny_state()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[name].half().float() if half else expected[name]), name


def test_golden_checkpoint_converts_and_loads(shared: Path, tmp_path: Path) -> None:
    golden = shared / "golden" / "videoclip_tiny"
    (tmp_path / "out").mkdir()
    converted = convert_videoclip(golden / "checkpoint_like.pt", tmp_path / "out", released=TINY)
    assert (converted.config, converted.n_tensors, len(converted.unused)) == (TINY, 128, 6)
    assert VideoCLIP.load(tmp_path / "out").config == TINY
    assert_is_tiny(tmp_path / "out")


def test_what_is_unused_is_named_and_left_out(checkpoint: Path, tmp_path: Path) -> None:
    converted = convert(tmp_path / "out", checkpoint)
    assert converted is not None and converted.unused == UNUSED
    assert_is_tiny(tmp_path / "out")
    files = sorted((tmp_path / "out").iterdir())
    assert [file.name for file in files] == ["config.json", "videoclip.safetensors"]
    assert files[0].stat().st_mode == files[1].stat().st_mode  # others may read both, or neither
    assert VideoCLIP.load(tmp_path / "out").config.tokenizer == "bert-base-uncased"


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    state = {name: t.half() if t.is_floating_point() else t for name, t in reference_state().items()}
    convert(tmp_path / "out", save(tmp_path / "half.pt", state))
    assert_is_tiny(tmp_path / "out", half=True)


def change_unknown(state: dict[str, Any]) -> str:
    state["video_encoder.colour"] = torch.zeros(3)
    return r"unknown: video_encoder\.colour\n"


def change_missing(state: dict[str, Any]) -> str:
    for number in range(4):
        del state[f"text_encoder.encoder.layer.{number}.output.LayerNorm.bias"]
    return r"missing: text_encoder\.encoder\.layer\.0\.output\.LayerNorm\.bias, .* and 1 more"


def change_layer(state: dict[str, Any]) -> str:
    for name in [name for name in state if ".layer.1." in name]:
        del state[name]
    return r"missing: video_encoder\.bert\.encoder\.layer\.1\."


def change_shape(state: dict[str, Any]) -> str:
    state["video_encoder.videomlp.linear2.bias"] = torch.zeros(7)
    return r"of another shape: video_encoder\.videomlp\.linear2\.bias \(7,\) instead of \(48,\)"


def change_vital(state: dict[str, Any]) -> str:
    del state["text_encoder.embeddings.word_embeddings.weight"]
    return r"no matrix mmmodel\.text_encoder\.embeddings\.word_embeddings\.weight"


def change_infinite(state: dict[str, Any]) -> str:
    state["video_encoder.videomlp.linear2.bias"][3] = torch.nan
    return r"not finite: video_encoder\.videomlp\.linear2\.bias"


def change_type(state: dict[str, Any]) -> str:
    state["video_encoder.videomlp.linear2.bias"] = [1.0]
    return r"not tensors: mmmodel\.video_encoder\.videomlp\.linear2\.bias"


CHANGES = [change_unknown, change_missing, change_layer, change_shape, change_vital, change_infinite, change_type]


@pytest.mark.parametrize("change", CHANGES)
def test_other_weights_are_refused_by_name(tmp_path: Path, change: Any) -> None:
    state: dict[str, Any] = reference_state()
    message = change(state)
    file = save(tmp_path / "other.pt", state)
    with pytest.raises(IntegrityError, match=message) as caught:
        convert(tmp_path / "out", file)
    assert "\n" not in caught.value.message
    assert sorted(tmp_path.iterdir()) == [file]


def test_files_that_are_no_such_checkpoint_are_refused(tmp_path: Path, checkpoint: Path) -> None:
    file = tmp_path / "other.pt"
    with pytest.raises(UsageError, match="no such file"):
        read_checkpoint(file)
    file.write_bytes(checkpoint.read_bytes()[:-5000])
    with pytest.raises(IntegrityError, match="cannot be read as a checkpoint"):
        read_checkpoint(file)
    file.write_text("hello")
    with pytest.raises(IntegrityError, match="cannot be read as a checkpoint"):
        read_checkpoint(file)
    with pytest.raises(IntegrityError, match=r"names without 'mmmodel\.': model\.video_encoder"):
        read_checkpoint(save(file, reference_state(), prefix="model."))
    contents: list[object] = [torch.zeros(3), {"state": {}}, {"model": {}}, [1]]
    for content in contents:
        torch.save(content, file)
        with pytest.raises(IntegrityError, match="no weights under 'model'"):
            read_checkpoint(file)


# What a fairseq checkpoint holds beside the weights: objects of classes that are not here when it is read.


class Choice(enum.Enum):
    HARD = "hard"


class Settings(dict[str, int]):
    pass


@dataclass
class Metadata:
    kind: Any = Any
    choice: Choice = Choice.HARD
    inner: dict[str, object] = field(default_factory=dict)


class Node:
    def __getstate__(self) -> dict[str, object]:
        return {"_metadata": Metadata(), "_content": {"a": 1}}

    def __setstate__(self, state: object) -> None:
        raise AssertionError("the checkpoint's own class was used")


def test_settings_of_any_class_are_passed_over(tmp_path: Path) -> None:
    args = argparse.Namespace(lr=[5e-5], task="mmtask", nested=argparse.Namespace(x=Node()))
    file = save(
        tmp_path / "fairseq.pt",
        reference_state(),
        args=args,
        cfg=Node(),
        task_state={},
        extra_state={
            "best": collections.defaultdict(list, a=[1]),
            "choice": Choice.HARD,
            "call": functools.partial(print, 1),
            "path": Path("a") / "b",
            "type": Metadata,
        },
        optimizer_history=[{"criterion_name": "MMLoss", "num_updates": 9, "lr_scheduler_state": {"best": None}}],
        last_optimizer_state={"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "loss_scale": 128.0},
    )
    with pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=True)
    state = read_checkpoint(file)
    assert state.keys() == reference_state().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in tiny_state().items())
    with pytest.raises(pickle.UnpicklingError):  # the stand-ins are gone again
        torch.load(file, weights_only=True)


def test_a_refusal_does_not_repeat_torchs_advice_to_unpickle(tmp_path: Path) -> None:
    file = save(tmp_path / "fairseq.pt", reference_state(), settings=Settings(a=1))
    with pytest.raises(IntegrityError, match="Can only SETITEM for dict") as caught:
        read_checkpoint(file)
    assert "weights_only" not in str(caught.value) and "\n" not in caught.value.message


class Malice:
    def __init__(self, function: Any, *arguments: object) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


@pytest.mark.parametrize(
    "harm",
    [
        lambda mark: Malice(os.system, f"touch {mark}"),
        lambda mark: Malice(os.mkdir, str(mark)),
        lambda mark: Malice(eval, f"__import__('pathlib').Path({str(mark)!r}).touch()"),
        lambda mark: Malice(exec, f"open({str(mark)!r}, 'w')"),
        lambda mark: Malice(subprocess.check_call, ["touch", str(mark)]),
        lambda mark: Malice(Path.touch, mark),
        lambda mark: Malice(getattr, Malice(Path, str(mark)), "touch"),
        lambda mark: Malice(collections.OrderedDict, Malice(open, str(mark), "w")),
    ],
    ids=["system", "mkdir", "eval", "exec", "subprocess", "method", "getattr", "nested"],
)
def test_nothing_in_a_checkpoint_runs(tmp_path: Path, harm: Any) -> None:
    mark = tmp_path / "ran"
    file = save(tmp_path / "malicious.pt", reference_state(), args=harm(mark))
    try:
        state: dict[str, Tensor] | None = read_checkpoint(file)
    except IntegrityError as refused:
        assert "\n" not in refused.message
        state = None
    assert not mark.exists()
    if state is not None:
        assert all(type(tensor) is Tensor for tensor in state.values())


def test_code_in_the_place_of_weights_is_refused(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    torch.save({"model": Malice(eval, f"open({str(mark)!r}, 'w')")}, tmp_path / "malicious.pt")
    with pytest.raises(IntegrityError, match="no weights under 'model'"):
        read_checkpoint(tmp_path / "malicious.pt")
    state: dict[str, Any] = reference_state() | {"video_encoder.videomlp.linear1.bias": Malice(eval, "1")}
    with pytest.raises(IntegrityError, match="not tensors"):
        read_checkpoint(save(tmp_path / "malicious.pt", state))
    assert not mark.exists()


# The folder.


def test_a_tokenizer_is_copied_and_checked(checkpoint: Path, tmp_path: Path) -> None:
    folder = write_vocabulary(tmp_path / "bert")
    (folder / "run_me.py").touch()
    convert(tmp_path / "out", checkpoint, tokenizer=folder)
    assert [path.name for path in (tmp_path / "out" / "tokenizer").iterdir()] == ["vocab.txt"]
    assert VideoCLIP.load(tmp_path / "out").config.tokenizer == "tokenizer"
    (folder / "vocab.txt").write_text("[PAD]\n[CLS]\n[SEP]\n[UNK]\n")
    with pytest.raises(UsageError, match="the tokenizer of another model"):
        convert(tmp_path / "other", checkpoint, tokenizer=folder)
    assert not (tmp_path / "other").exists()


def test_s3d_goes_inside_videoclip_or_alone(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert_s3d(weights: Path, dictionary: Path, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "words.json").write_text(f"{weights.name} {dictionary.name}")

    monkeypatch.setattr(models.convert, "convert_s3d", convert_s3d)
    s3d, dictionary = tmp_path / "s3d_howto100m.pth", tmp_path / "s3d_dict.npy"
    convert(tmp_path / "both", checkpoint, s3d, dictionary)
    assert (tmp_path / "both" / "s3d" / "words.json").read_text() == "s3d_howto100m.pth s3d_dict.npy"
    assert_is_tiny(tmp_path / "both")
    assert convert(tmp_path / "deep" / "alone", s3d=s3d, dictionary=dictionary) is None
    assert [path.name for path in (tmp_path / "deep" / "alone").iterdir()] == ["words.json"]


def test_the_folder_is_whole_or_absent(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(models.convert, "convert_s3d", full_disk)
    with pytest.raises(FinecoError, match=r"cannot be written: .*No space left"):
        convert(tmp_path / "out", checkpoint, checkpoint, checkpoint)
    assert sorted(tmp_path.iterdir()) == [checkpoint]


def test_an_existing_folder_is_left_alone(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="already exists"):
        convert(tmp_path / "out", checkpoint)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nothing to convert"),
        ({"s3d": Path("a")}, "go together"),
        ({"videoclip": Path("a"), "dictionary": Path("b")}, "go together"),
        ({"s3d": Path("a"), "dictionary": Path("b"), "tokenizer": Path("c")}, "a tokenizer belongs to VideoCLIP"),
    ],
)
def test_files_that_do_not_go_together_are_refused(tmp_path: Path, arguments: dict[str, Path], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        convert(tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_what_is_still_needed(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = fineco("convert", out, "--videoclip", checkpoint)
    assert done.code == 0, done.err
    needed = f"S3D is still needed: fineco convert {out / 's3d'} --s3d s3d_howto100m.pth --dictionary s3d_dict.npy\n"
    assert done.out == needed.encode()
    assert "128 tensors: 3 video and 4 text layers, width 48, 200 words; 6 unused" in done.err
    assert_is_tiny(out)
    again = fineco("convert", out, "--videoclip", checkpoint)
    assert (again.code, again.out) == (2, b"") and "already exists" in again.err
