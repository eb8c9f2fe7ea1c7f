"""Files of weights and arrays from anywhere: one line says why one is refused, and nothing of it is ever run."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from command_line import fineco
from fakes import FakeEncoder
from guards import Guard
from models.builtin import model as builtin
from models.convert import convert
from models.fineco import describe_head, save_weights
from models.fineco_encoder import load_fineco, read_base_name
from models.s3d_weights import read_s3d
from models.scorer import load_scorer
from models.scorer_file import BUILTIN as SCORER
from models.scorer_file import read_facts
from models.videoclip import VideoCLIP
from pipeline.errors import FinecoError, IntegrityError, UsageError
from small_trainings import small_head
from videoclip_models import TINY

GUARDS = [
    Guard(
        faults=(21,),
        file="models/s3d_weights.py",
        old='torch.load(path, map_location="cpu", weights_only=True)',
        new='torch.load(path, map_location="cpu", weights_only=False)',
        test="test_every_loader_refuses_every_hostile_file_and_runs_nothing[s3d's weights-pickle]",
    ),
    Guard(
        faults=(21,),
        file="models/convert.py",
        old='content = torch.load(path, map_location="cpu", weights_only=True)',
        new='content = torch.load(path, map_location="cpu", weights_only=False)',
        test="test_every_loader_refuses_every_hostile_file_and_runs_nothing[videoclip's checkpoint-torch]",
    ),
    Guard(
        faults=(21,),
        file="models/s3d_weights.py",
        old='mmap_mode="r", allow_pickle=False)',
        new="allow_pickle=True)",
        test="test_every_loader_refuses_every_hostile_file_and_runs_nothing[s3d's dictionary-objects]",
    ),
    Guard(
        faults=(21,),
        file="pipeline/evaluation/retrieval.py",
        old='np.load(path, mmap_mode="r", allow_pickle=False)',
        new="np.load(path, allow_pickle=True)",
        test="test_a_matrix_of_scores_is_numbers_or_refused[objects]",
    ),
    Guard(
        faults=(21,),
        file="models/fineco_encoder.py",
        old="    if not path.is_file():  # a pipe",
        new="    if not path.exists():  # a pipe",
        test="test_every_loader_refuses_every_hostile_file_and_runs_nothing[head's settings-pipe]",
    ),
    Guard(
        faults=(21,),
        file="models/builtin/model.py",
        old='if sha256 != json.loads(DIGEST.read_text("utf-8")):',
        new="if False:",
        test="test_one_flipped_bit_of_the_builtin_weights_is_found",
    ),
    Guard(
        faults=(21,),
        file="models/weights.py",
        old="tensor.is_floating_point() and not",
        new="False and not",
        test="test_weights_that_are_not_finite_are_refused_by_name[nan-head]",
    ),
    Guard(
        faults=(21,),
        file="models/open_clip_weights.py",
        old='if ":" in str(model["vision_cfg"].get("timm_model_name")):',
        new="if False:",
        test="test_a_folder_that_names_an_address_makes_no_connection",
    ),
]

pytestmark = pytest.mark.fault


@pytest.fixture(autouse=True)
def _no_waiting() -> Iterator[None]:
    """A loader that waits for the writer of a pipe fails its test."""

    def late(number: int, frame: object) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


class Evil:
    """Pickled, it makes a file when it is read."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.canary),)


def numpy_file(description: str, data: bytes) -> bytes:
    """A .npy of version 1 with any header."""
    header = description.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def tensors_file(header: bytes, claimed: int | None = None, data: bytes = b"") -> bytes:
    """A safetensors file with any header, of any claimed length."""
    return struct.pack("<Q", len(header) if claimed is None else claimed) + header + data


def make_hostile(kind: str, path: Path, canary: Path) -> None:
    """Writes one of HOSTILE."""
    if kind == "torch":
        evil = Evil(canary)
        torch.save({"model": {"mmmodel.x": torch.zeros(2)}, "state_dict": evil, "more": evil}, path)
    elif kind == "old torch":
        torch.save({"model": Evil(canary)}, path, _use_new_zipfile_serialization=False)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Evil(canary), protocol=2))
    elif kind == "objects":
        np.save(path.with_suffix(".npy"), np.array([Evil(canary)], dtype=object), allow_pickle=True)
        path.with_suffix(".npy").rename(path)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "link to itself":
        path.symlink_to(path)
    elif kind == "cut short":
        save_file({"a": torch.zeros(1000)}, path)
        path.write_bytes(path.read_bytes()[:-500])
    else:
        path.write_bytes(BYTES[kind])


BYTES = {
    "empty": b"",
    "header of 4 EiB": tensors_file(b"{}", claimed=2**62),
    "header of 1 MB of blanks": tensors_file(b" " * 1_000_000),
    "nested header": tensors_file(b'{"a":' * 20_000),
    "offsets beyond the end": tensors_file(
        b'{"a":{"dtype":"F32","shape":[1000],"data_offsets":[0,4000]}}', data=b"x" * 16
    ),
    "tensor of 4 TB": tensors_file(b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'),
    "negative offsets": tensors_file(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[-16,0]}}', data=b"x" * 16),
    "zip": b"PK\x03\x04" + b"\0" * 100,
    "array of 4 TB": numpy_file("{'descr': '<U1000', 'fortran_order': False, 'shape': (1000000000,), }", b"\0" * 100),
}
HOSTILE = (
    *("torch", "old torch", "pickle", "objects", "pipe", "folder", "device", "link to itself", "cut short"),
    *BYTES,
)


def s3d_folder(file: Path) -> Path:
    folder = file.parent / "s3d"
    folder.mkdir()
    os.rename(file, folder / "s3d.safetensors")
    (folder / "words.json").write_text('["a"]')
    digest = hashlib.sha256()
    for name in ("s3d.safetensors", "words.json"):
        if (folder / name).is_file() and not (folder / name).is_symlink():  # its own digest, so that it is opened
            digest.update(hashlib.sha256((folder / name).read_bytes()).digest())
    (folder / "config.json").write_text(json.dumps({"kind": "s3d", "sha256": digest.hexdigest()}))
    return folder


def head_folder(file: Path) -> Path:
    folder = file.parent / "head"
    folder.mkdir()
    spec = FakeEncoder().spec
    (folder / "config.json").write_bytes(describe_head(small_head().config, spec.name, spec.fingerprint))
    os.rename(file, folder / "head.safetensors")
    return folder


def videoclip_folder(file: Path) -> Path:
    folder = file.parent / "videoclip"
    folder.mkdir()
    VideoCLIP(TINY).save(folder)
    (folder / "videoclip.safetensors").unlink()
    os.rename(file, folder / "videoclip.safetensors")
    return folder


def words_beside(file: Path) -> Path:
    np.save(file.parent / "words.npy", np.array(["red", "green"]))
    return file.parent / "words.npy"


def config_of_head(file: Path) -> str:
    file.rename(file.with_name("config.json"))
    return read_base_name(file.parent)


def config_of_videoclip(file: Path) -> VideoCLIP:
    file.rename(file.with_name("config.json"))
    return VideoCLIP.load(file.parent)


LOADERS: dict[str, Callable[[Path], object]] = {
    "scorer": load_scorer,
    "head": lambda file: load_fineco(head_folder(file), FakeEncoder()),
    "head's settings": config_of_head,
    "videoclip": lambda file: VideoCLIP.load(videoclip_folder(file)),
    "videoclip's settings": config_of_videoclip,
    "s3d": lambda file: read_s3d(s3d_folder(file)),
    "videoclip's checkpoint": lambda file: convert(file.parent / "out", videoclip=file),
    "s3d's weights": lambda file: convert(file.parent / "out", s3d=file, dictionary=words_beside(file)),
    "s3d's dictionary": lambda file: convert(file.parent / "out", s3d=words_beside(file), dictionary=file),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("loader", LOADERS)
def test_every_loader_refuses_every_hostile_file_and_runs_nothing(loader: str, kind: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    make_hostile(kind, tmp_path / "file", canary)
    with pytest.raises((IntegrityError, UsageError)) as refused:
        LOADERS[loader](tmp_path / "file")
    assert not canary.exists()
    assert str(tmp_path) in refused.value.message
    assert "\n" not in refused.value.message and "weights_only" not in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.long  # open_clip takes seconds to import
@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_open_clip_refuses_every_hostile_file_too(name: str, kind: str, tmp_path: Path) -> None:
    from models.registry import load_encoder
    from open_clip_models import TINY as SIZES

    folder = tmp_path / "model"
    folder.mkdir()
    settings = {"model_cfg": dict(SIZES), "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    make_hostile(kind, folder / name, tmp_path / "canary")
    with pytest.raises(FinecoError) as refused:
        load_encoder(f"open_clip:local-dir:{folder}", "cpu", "fp32")
    assert not (tmp_path / "canary").exists()
    assert "\n" not in refused.value.message


def poisoned(kind: str, value: float, folder: Path) -> object:
    """Loads a scorer, a head or a VideoCLIP one value of which is `value`."""
    if kind == "scorer":
        state = load_file(SCORER)
        state["layers.0.weight"][3, 5] = value
        save_file(state, folder / "scorer.safetensors", metadata=read_facts(SCORER).metadata())
        return load_scorer(folder / "scorer.safetensors")
    if kind == "head":
        head = small_head()
        head.text_out.weight.data[0, 0] = value
        spec = FakeEncoder().spec
        (folder / "config.json").write_bytes(describe_head(head.config, spec.name, spec.fingerprint))
        save_weights(folder / "head.safetensors", head)
        return load_fineco(folder, FakeEncoder())
    model = VideoCLIP(TINY)
    next(model.parameters()).data.view(-1)[0] = value
    model.save(folder)
    return VideoCLIP.load(folder)


@pytest.mark.parametrize("kind", ["scorer", "head", "videoclip"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")], ids=["nan", "inf"])
def test_weights_that_are_not_finite_are_refused_by_name(kind: str, value: float, tmp_path: Path) -> None:
    with pytest.raises((IntegrityError, UsageError), match=r"(weight|scale|bias)\w* has values that are not finite"):
        poisoned(kind, value, tmp_path)


def test_one_flipped_bit_of_the_builtin_weights_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = bytearray(builtin.WEIGHTS.read_bytes())
    weights[-1000] ^= 1
    (tmp_path / "weights.safetensors").write_bytes(weights)
    monkeypatch.setattr(builtin, "WEIGHTS", tmp_path / "weights.safetensors")
    with pytest.raises(IntegrityError, match="not those that came with fineco"):
        builtin.load_builtin()


def test_a_folder_that_names_an_address_makes_no_connection(tmp_path: Path) -> None:
    from models.open_clip_weights import locate

    vision = {"timm_model_name": "hf-hub:somebody/something", "image_size": 32}
    config = {"model_cfg": {"embed_dim": 16, "vision_cfg": vision, "text_cfg": {}}, "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"x")
    with pytest.raises(IntegrityError, match="its vision tower is at an address"):
        locate(f"local-dir:{tmp_path}")


@pytest.mark.parametrize(
    "kind",
    ["objects", "complex", "words", "nan", "other shape", "array of 4 TB", "zip", "pipe", "device", "empty", "folder"],
)
def test_a_matrix_of_scores_is_numbers_or_refused(kind: str, tmp_path: Path) -> None:
    rows = [{"video": "a.mp4", "caption": "x"}, {"video": "b.mp4", "caption": "y"}]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "scores.npy"
    arrays = {
        "complex": np.ones((2, 2), complex),
        "words": np.array([["a", "b"], ["c", "d"]]),
        "nan": np.full((2, 2), np.nan),
        "other shape": np.ones((2, 3)),
    }
    if kind in arrays:
        np.save(path, arrays[kind])
    else:
        make_hostile(kind, path, tmp_path / "canary")
    done = fineco("evaluate", "retrieval", tmp_path / "captions.jsonl", "--scores", path)
    assert done.code == 2, done.err
    assert done.err.startswith(f"error: {path}") or "scores.npy' is a directory" in done.err
    assert len(done.err.splitlines()) <= 2
    assert not (tmp_path / "canary").exists()


def test_the_table_of_loaders_has_all_that_read_weights() -> None:
    """A new `load_file`, `torch.load`, `safe_open` or `np.load` in models/ belongs into LOADERS."""
    root = Path(__file__).parents[2] / "models"
    readers = {p.stem for p in root.glob("*.py") if any(word in p.read_text("utf-8") for word in READS)}
    known = {"scorer", "scorer_file", "fineco_encoder", "videoclip", "s3d_weights", "convert", "bert_pretrained"}
    assert readers == known  # bert_pretrained: tests/models/test_videoclip.py


READS = (" load_file(", " torch.load(", " safe_open(", " np.load(")


def test_the_canary_sings_where_a_file_is_run(tmp_path: Path) -> None:
    """Else the tests above would prove nothing."""
    make_hostile("torch", tmp_path / "file", tmp_path / "canary")
    torch.load(tmp_path / "file", weights_only=False)
    assert (tmp_path / "canary").is_dir()
