"""Every fault test fails when its guard is removed, and every fault has such a test."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from guards import Guard

ROOT = Path(__file__).parents[2]
FAULTS = range(1, 26)
TESTS_FAILED = 1  # pytest's exit status; what cannot be collected or was not found has others


def guards_of(path: Path) -> list[Guard]:
    """The guards that a test file lists as GUARDS."""
    spec = importlib.util.spec_from_file_location(f"guards_of_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return list(getattr(module, "GUARDS", ()))


GUARDS = [
    (path, guard)
    for path in sorted(Path(__file__).parent.glob("test_*.py"))
    if path != Path(__file__)
    for guard in guards_of(path)
]
NAMES = [f"{path.stem}-{guard.test}-{i}" for i, (path, guard) in enumerate(GUARDS)]


def test_every_fault_has_a_guarded_test() -> None:
    assert {fault for _, guard in GUARDS for fault in guard.faults} == set(FAULTS)


@pytest.mark.parametrize(("path", "guard"), GUARDS, ids=NAMES)
def test_a_guard_stands_where_the_list_says(path: Path, guard: Guard) -> None:
    assert (ROOT / guard.file).read_text("utf-8").count(guard.old) == 1
    assert f"def {guard.test.partition('[')[0]}(" in path.read_text("utf-8")


@pytest.mark.long
@pytest.mark.parametrize(("path", "guard"), GUARDS, ids=NAMES)
def test_without_its_guard_the_test_fails(path: Path, guard: Guard, tmp_path: Path) -> None:
    for name in ("pipeline", "models", "indexes", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    program = tmp_path / guard.file
    program.write_text(program.read_text("utf-8").replace(guard.old, guard.new), "utf-8")
    test = f"{tmp_path / path.relative_to(ROOT)}::{guard.test}"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "long or not long", test],
        cwd=tmp_path,
        env={"FINECO_SHARED": str(ROOT.parent / "shared"), **os.environ},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == TESTS_FAILED, done.stdout[-3000:] + done.stderr[-1000:]
