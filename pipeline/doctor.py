"""What `fineco doctor` tells: versions, devices, models at hand, and every problem with its cure.

Each library is imported in a process of its own, so that one that crashes at import is a line here, not a crash.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from models.device import cpu_multiplies_bf16, cpu_name
from models.registry import DEFAULT_MODEL

PROBE_SECONDS = 120.0  # importing torch from a cold network disk takes most of a minute
_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    Attributes:
        topic: What was looked at, e.g. `torch`.
        value: What was found.
        level: `ok`; `note` (works, but could be better or is missing an option); `problem` (something will fail).
        cure: What to do about a note or a problem; empty when ok.
    """

    topic: str
    value: str
    level: Literal["ok", "note", "problem"] = "ok"
    cure: str = ""


# A probe's facts as printed by its process, one JSON object, and `error` (one line) if it did not get to its end.
Facts = Mapping[str, Any]

_PROBES: Mapping[str, str] = {
    "av": """
import av
tell(version=av.__version__, ffmpeg=getattr(av, "ffmpeg_version_info", ""), libraries=av.library_versions)
""",
    "isolation": """
from pipeline.decoding.sandbox import lock_down
tell(fences=lock_down())
""",
    "faiss": """
import faiss
tell(version=faiss.__version__, gpu_build="GPU" in faiss.get_compile_options().split())
tell(gpus=faiss.get_num_gpus())
""",
    "h5py": """
import h5py
tell(version=h5py.__version__, hdf5=h5py.version.hdf5_version)
""",
    # One process, because each of these imports the one before; `stage` is the one under way.
    "torch": """
tell(stage="torch")
import torch
from models.device import cuda_problem
tell(torch=torch.__version__, cuda=torch.version.cuda or torch.version.hip or "", cuda_problem=cuda_problem())
if not cuda_problem():
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    tell(devices=[(p.name, p.total_memory, p.major >= 8) for p in found])
tell(stage="torchvision")
import torchvision
tell(torchvision=torchvision.__version__)
tell(stage="open_clip")
from models.registry import list_cached_encoders
tell(cached=list_cached_encoders())
tell(stage="")
""",
}

_PROBE_HEAD = """
import json, sys
sys.path.append(sys.argv[1])  # last: only for a checkout that is not installed
def tell(**facts):
    print("FACTS " + json.dumps(facts), flush=True)
"""


def examine(folder: Path = Path(), probe: Callable[[str], Facts] | None = None) -> list[Finding]:
    """Looks at this machine and this installation.

    Args:
        folder: Where collections will be (file locking is tried there).
        probe: Runs one of the named probes (default: in a process of its own, all at the same time).
    """
    with ThreadPoolExecutor(len(_PROBES)) as pool:
        facts = dict(zip(_PROBES, pool.map(probe or _probe, _PROBES), strict=True))
    stack = facts["torch"]
    return [
        Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        Finding("fineco", _version("fineco") or "not installed: run from its source folder"),
        *(Finding(package, _version(package) or "unknown version") for package in ("numpy", "pillow", "safetensors")),
        *_torch(stack),
        *_devices(stack),
        _library("av", facts["av"], lambda f: f"{f['version']}, FFmpeg {f['ffmpeg']} ({_libraries(f['libraries'])})"),
        _isolation(facts["isolation"]),
        *_faiss(facts["faiss"], bool(stack.get("devices"))),
        _library("h5py", facts["h5py"], lambda f: f"{f['version']}, HDF5 {f['hdf5']}"),
        *_models(stack),
        _locking(folder),
    ]


def problems(findings: Iterable[Finding]) -> list[Finding]:
    """Those that will make a command fail."""
    return [finding for finding in findings if finding.level == "problem"]


def _probe(name: str) -> Facts:
    return run_probe(_PROBES[name])


def run_probe(code: str, seconds: float = PROBE_SECONDS) -> Facts:
    """Runs `code` in a fresh interpreter; what it told before any end, and how it failed, under `error`."""
    # -P: a file named torch.py in the user's folder is not torch
    command = [sys.executable, "-P", "-W", "ignore", "-c", _PROBE_HEAD + code, str(_ROOT)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=seconds)
        output, failure = done.stdout, ""
        if done.returncode < 0:
            failure = f"its process was killed by signal {-done.returncode}"
        elif done.returncode:
            failure = (done.stderr.strip().splitlines() or [f"its process ended with code {done.returncode}"])[-1]
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
        failure = f"no answer in {seconds:g} seconds"
    facts: dict[str, Any] = {}
    for line in output.splitlines():
        if line.startswith("FACTS "):
            facts.update(json.loads(line.removeprefix("FACTS ")))
    return facts | ({"error": failure} if failure else {})


def _library(name: str, facts: Facts, describe: Callable[[Facts], str], distribution: str = "") -> Finding:
    distribution = distribution or name
    if "error" not in facts:
        return Finding(name, describe(facts))
    if installed := _version(distribution):
        cure = f"pip install --force-reinstall --no-deps {distribution}"
        return Finding(name, f"{distribution} {installed} cannot be used: {facts['error']}", "problem", cure)
    return Finding(name, "not installed", "problem", f"pip install {distribution}")


def _torch(facts: Facts) -> list[Finding]:
    """torch, torchvision and open_clip import each other in this order; the first that fails stops the rest."""
    findings = []
    if "torch" in facts:
        build = f"CUDA {facts['cuda']}" if facts["cuda"] else "built without CUDA"
        findings.append(Finding("torch", f"{facts['torch']}, {build}"))
    if "torchvision" in facts:
        findings.append(Finding("torchvision", facts["torchvision"]))
    if "cached" in facts:
        findings.append(Finding("open_clip", _version("open-clip-torch") or "unknown version"))
    if "error" in facts:
        stage = facts.get("stage") or "torch"
        package = {"open_clip": "open-clip-torch"}.get(stage, stage)
        cure = f"pip install --force-reinstall {package}"
        if stage == "torchvision":  # it is compiled for one version of torch
            cure = "Install the pair together, from one index: pip install --force-reinstall torch torchvision"
        found = _version(package)
        value = f"{found} cannot be used: {facts['error']}" if found else f"not installed ({facts['error']})"
        if stage == "torchvision" and found:
            value = f"{found} does not work with torch {facts.get('torch')}: {facts['error']}"
        findings.append(Finding(stage, value, "problem", cure))
    return findings


def _devices(facts: Facts) -> list[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    bf16 = "bf16 in hardware" if cpu_multiplies_bf16() else "fp32 only (no AVX512-BF16 or AMX)"
    findings = [Finding("cpu", f"{cpu_name()}, {cores} of {os.cpu_count()} cores usable, {bf16}")]
    for number, (name, memory, has_bf16) in enumerate(facts.get("devices", ())):
        precision = "bf16" if has_bf16 else "fp32"
        findings.append(Finding(f"cuda:{number}", f"{name}, {memory / 2**30:.1f} GiB, {precision}"))
    problem = facts.get("cuda_problem", "")
    if problem and (any(Path("/dev").glob("nvidia[0-9]*")) or shutil.which("nvidia-smi")):
        cure = "Install a driver and a torch build for the same CUDA version (nvidia-smi tells the driver's)."
        findings.append(Finding("gpu", f"there is an NVIDIA GPU, but: {problem}", "problem", cure))
    elif problem:
        findings.append(Finding("gpu", f"none ({problem})", "note", "Models run on the CPU: slower, same results."))
    return findings


def _isolation(facts: Facts) -> Finding:
    """What a process that decodes can no longer do, tried in one that decodes nothing."""
    fences: list[str] = facts.get("fences", [])
    if len(fences) == 2:
        return Finding("decoder isolation", ", ".join(fences))
    missing = "no Landlock" if fences == ["seccomp"] else "no seccomp" if fences else "neither Landlock nor seccomp"
    value = ", ".join([*fences, missing]) + (f" ({facts['error']})" if "error" in facts else "")
    cure = "A file that takes a decoder over is held by less. Both are in Linux 5.13 or newer on x86-64 and arm64."
    return Finding("decoder isolation", value, "note", cure)


def _faiss(facts: Facts, cuda: bool) -> list[Finding]:
    def describe(found: Facts) -> str:
        if not found["gpu_build"]:
            return f"{found['version']}, built for the CPU"
        return f"{found['version']}, built for GPUs, sees {found['gpus']}"

    names = {str(d.metadata["Name"]).lower().replace("_", "-") for d in importlib.metadata.distributions()}
    installed = sorted(name for name in names if name == "faiss-cpu" or name.startswith("faiss-gpu"))
    linux = sys.platform == "linux" and platform.machine() == "x86_64"
    wanted = installed[-1] if installed else "faiss-gpu" if linux else "faiss-cpu"
    findings = [_library("faiss", facts, describe, wanted)]
    if len(installed) > 1:  # they share one folder: the last one installed wins, and removing either breaks both
        cure = f"pip uninstall -y {' '.join(installed)} && pip install {wanted}"
        findings.append(Finding("faiss", f"{' and '.join(installed)} are both installed", "problem", cure))
    if cuda and "error" not in facts and not facts["gpus"]:
        built = "its GPU build sees none" if facts["gpu_build"] else "it is built for the CPU"
        cure = "Indexes are built on the CPU: slower, same results. On Linux x86-64: pip install faiss-gpu"
        findings.append(Finding("faiss", f"torch sees a GPU, faiss does not: {built}", "note", cure))
    return findings


def _models(facts: Facts) -> list[Finding]:
    findings = []
    if any((_ROOT / "models" / "builtin").glob("*.safetensors")):
        findings.append(Finding("model builtin", "at hand (knows only its own rendered world)"))
    else:
        cure = "pip install --force-reinstall --no-deps fineco"
        findings.append(Finding("model builtin", "its weights are missing from this installation", "problem", cure))
    cached: list[str] = facts.get("cached", [])
    findings += [Finding("model", f"{name} in the hub cache") for name in cached]
    if "cached" in facts and not any(name.startswith(f"{DEFAULT_MODEL}/") for name in cached):
        cure = "It is downloaded at its first use; offline use --model builtin or --model open_clip:local-dir:FOLDER."
        findings.append(Finding("default model", f"{DEFAULT_MODEL} is not in the hub cache", "note", cure))
    return findings


def _locking(folder: Path) -> Finding:
    try:
        import fcntl
    except ImportError:
        return Finding("file locking", "not available on this system", "note", "Run one fineco at a time.")
    topic = f"file locking in {folder.resolve()}"
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except PermissionError:
        return Finding(topic, "not tried: this folder is not writable")
    except OSError as error:
        cure = "Put collections on a disk that can lock files (a local one; NFS needs its lock service)."
        return Finding(topic, f"does not work: {error.strerror or error}", "problem", cure)
    return Finding(topic, "works")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _libraries(versions: Mapping[str, Iterable[int]]) -> str:
    wanted = ("libavcodec", "libavformat", "libswscale")
    return ", ".join(f"{name} {'.'.join(map(str, versions[name]))}" for name in wanted if name in versions)
