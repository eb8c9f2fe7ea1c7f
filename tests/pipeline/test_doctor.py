"""`fineco doctor`: what a healthy machine shows, and one line with a cure for each thing that is wrong."""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import doctor
from pipeline.doctor import Finding, examine, problems, run_probe

HEALTHY: Mapping[str, Mapping[str, Any]] = {
    "av": {"version": "18.1.0", "ffmpeg": "8.1.2", "libraries": {"libavcodec": [62, 28, 102], "libavdevice": [1]}},
    "isolation": {"fences": ["Landlock 7", "seccomp"]},
    "faiss": {"version": "1.15.1", "gpu_build": True, "gpus": 1},
    "h5py": {"version": "3.16.0", "hdf5": "2.0.0"},
    "torch": {
        "stage": "",
        "torch": "2.15.0",
        "cuda": "13.2",
        "cuda_problem": "",
        "devices": [["NVIDIA H200", 150 << 30, True]],
        "torchvision": "0.29.2",
        "cached": ["open_clip:PE-Core-B-16/meta"],
    },
}


@pytest.fixture(autouse=True)
def a_good_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hides what this machine lacks, so that each test breaks one thing only."""
    (tmp_path / "models" / "builtin").mkdir(parents=True)
    (tmp_path / "models" / "builtin" / "model.safetensors").touch()
    monkeypatch.setattr(doctor, "_ROOT", tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.chdir(tmp_path)
    _installed(monkeypatch, "faiss-gpu", "torchvision", "torch", "av", "open-clip-torch")


def _installed(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    def version(name: str) -> str:
        if name not in names:
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.2.3"

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = [SimpleNamespace(metadata={"Name": name}) for name in names]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: found)


def _examine(**changes: Mapping[str, Any]) -> list[Finding]:
    """The findings of a healthy machine with these probes changed."""
    return examine(probe=lambda name: {**HEALTHY, **changes}[name])


def _values(findings: list[Finding], topic: str) -> list[str]:
    return [finding.value for finding in findings if finding.topic == topic]


def test_a_healthy_machine_has_no_problem_and_no_note() -> None:
    findings = _examine()
    assert [finding for finding in findings if finding.level != "ok"] == []
    assert _values(findings, "torch") == ["2.15.0, CUDA 13.2"]
    assert _values(findings, "cuda:0") == ["NVIDIA H200, 150.0 GiB, bf16"]
    assert _values(findings, "av") == ["18.1.0, FFmpeg 8.1.2 (libavcodec 62.28.102)"]
    assert _values(findings, "faiss") == ["1.15.1, built for GPUs, sees 1"]
    assert _values(findings, "h5py") == ["3.16.0, HDF5 2.0.0"]
    assert _values(findings, "model") == ["open_clip:PE-Core-B-16/meta in the hub cache"]
    assert {"python", "fineco", "numpy", "torchvision", "open_clip", "cpu"} <= {finding.topic for finding in findings}


def test_a_mismatched_torchvision_is_a_problem_with_its_cure() -> None:
    broken = {
        **{key: HEALTHY["torch"][key] for key in ("torch", "cuda", "cuda_problem", "devices")},
        "stage": "torchvision",
        "error": "RuntimeError: operator torchvision::nms does not exist",
    }
    (problem,) = problems(_examine(torch=broken))
    assert problem.topic == "torchvision"
    assert problem.value.startswith("1.2.3 does not work with torch 2.15.0: RuntimeError: operator")
    assert "torch torchvision" in problem.cure


def test_torch_that_does_not_import_is_a_problem() -> None:
    findings = _examine(torch={"stage": "torch", "error": "its process was killed by signal 4"})
    assert [problem.topic for problem in problems(findings)] == ["torch"]
    assert "killed by signal 4" in problems(findings)[0].value


def test_a_library_that_is_missing_or_broken_is_a_problem() -> None:
    (missing,) = problems(_examine(h5py={"error": "ModuleNotFoundError: No module named 'h5py'"}))
    assert (missing.topic, missing.value, missing.cure) == ("h5py", "not installed", "pip install h5py")
    (broken,) = problems(_examine(av={"error": "ImportError: libx.so"}))
    assert broken.value == "av 1.2.3 cannot be used: ImportError: libx.so"
    assert "--force-reinstall" in broken.cure
    (faiss,) = problems(_examine(faiss={"version": "1", "gpu_build": True, "error": "no libcublas"}))
    assert faiss.value == "faiss-gpu 1.2.3 cannot be used: no libcublas"


def test_both_builds_of_faiss_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    _installed(monkeypatch, "faiss_gpu", "faiss-cpu", "open-clip-torch")
    (problem,) = problems(_examine())
    assert problem.value == "faiss-cpu and faiss-gpu are both installed"
    assert problem.cure == "pip uninstall -y faiss-cpu faiss-gpu && pip install faiss-gpu"


@pytest.mark.parametrize(("gpu_build", "told"), [(False, "built for the CPU"), (True, "sees none")])
def test_faiss_that_misses_the_gpu_is_a_note(gpu_build: bool, told: str) -> None:
    findings = _examine(faiss={"version": "1.15.1", "gpu_build": gpu_build, "gpus": 0})
    (note,) = [finding for finding in findings if finding.level == "note"]
    assert note.topic == "faiss"
    assert told in note.value


def test_a_gpu_that_torch_cannot_use_is_a_problem_and_no_gpu_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = {key: value for key, value in HEALTHY["torch"].items() if key != "devices"}
    torch["cuda_problem"] = "The NVIDIA driver on your system is too old"
    monkeypatch.setattr(Path, "glob", lambda folder, pattern: iter([Path("x")] if "*.safe" in pattern else []))
    (note,) = [finding for finding in _examine(torch=torch) if finding.level == "note"]
    assert (note.topic, problems(_examine(torch=torch))) == ("gpu", [])
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    (problem,) = problems(_examine(torch=torch))
    assert "too old" in problem.value


def test_the_default_model_not_at_hand_is_a_note_with_the_way_offline() -> None:
    findings = _examine(torch={**HEALTHY["torch"], "cached": ["open_clip:ViT-B-32/openai"]})
    (note,) = [finding for finding in findings if finding.level == "note"]
    assert (note.topic, note.value) == ("default model", "open_clip:PE-Core-B-16 is not in the hub cache")
    assert "--model builtin" in note.cure


def test_missing_builtin_weights_are_a_problem(tmp_path: Path) -> None:
    (tmp_path / "models" / "builtin" / "model.safetensors").unlink()
    assert [problem.topic for problem in problems(_examine())] == ["model builtin"]


def test_a_disk_without_locks_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert _values(_examine(), f"file locking in {tmp_path}") == ["works"]

    def fail(file: object, operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    (problem,) = problems(_examine())
    assert problem.value == "does not work: No locks available"


def test_a_probe_survives_whatever_its_library_does(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong json')")  # in the user's folder: never imported
    assert run_probe("tell(a=1)\ntell(b=[2])") == {"a": 1, "b": [2]}
    assert run_probe("tell(a=1)\nimport nowhere") == {
        "a": 1,
        "error": "ModuleNotFoundError: No module named 'nowhere'",
    }
    assert run_probe("tell(a=1)\nimport os\nos.abort()") == {"a": 1, "error": "its process was killed by signal 6"}
    assert run_probe("raise SystemExit(3)") == {"error": "its process ended with code 3"}
    assert run_probe("print('chatter')\ntell(a=1)") == {"a": 1}
    began = time.monotonic()
    assert run_probe("tell(a=1)\nimport time\ntime.sleep(60)", seconds=1) == {"a": 1, "error": "no answer in 1 seconds"}
    assert time.monotonic() - began < 5


@pytest.mark.slow
def test_this_machine_can_be_examined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    findings = examine(Path(os.devnull).parent)
    usable = {finding.topic for finding in findings if finding.level == "ok"}
    assert {"torch", "torchvision", "open_clip", "av", "faiss", "h5py", "cpu"} <= usable


def test_it_says_what_holds_a_decoder_back() -> None:
    def isolation(**facts: Any) -> Finding:
        return next(f for f in _examine(isolation=facts) if f.topic == "decoder isolation")

    assert isolation(fences=["Landlock 7", "seccomp"]) == Finding("decoder isolation", "Landlock 7, seccomp")
    less = isolation(fences=["seccomp"])
    assert (less.value, less.level) == ("seccomp, no Landlock", "note") and "Linux 5.13" in less.cure
    assert isolation(fences=[]).value == "neither Landlock nor seccomp"
    assert isolation(error="no answer").value == "neither Landlock nor seccomp (no answer)"
