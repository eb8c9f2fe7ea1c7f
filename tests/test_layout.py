"""The rules of the house, checked on the source: who imports whom, what is kept out, what is shipped."""

from __future__ import annotations

import ast
import functools
import graphlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import indexes
import models
import pipeline

ROOT = Path(__file__).parents[1]
PACKAGES = ("pipeline", "models", "indexes")
MAX_LINES = 500
UNPICKLERS = {"pickle", "marshal", "shelve", "dill", "joblib"}
VAGUE_NAMES = {"utils", "util", "helpers", "common", "misc"}

# Third-party package -> the only modules (or packages, with what is in them) that may import it.
HOMES = {
    "av": ("pipeline.decoding", "pipeline.demo"),
    "h5py": ("pipeline.store",),
    "faiss": ("indexes",),
    "click": ("pipeline.cli",),
    "open_clip": ("models",),
}
# Ours -> what of ours it may import. The first match counts; the stages have tests of their own.
MAY_IMPORT = {
    "pipeline.types": (),
    "pipeline.errors": (),
    "pipeline.files": ("pipeline.errors", "pipeline.types"),
    "pipeline.decoding": (
        "pipeline.decoding",
        "pipeline.errors",
        "pipeline.geometry",
        "pipeline.sampling",
        "pipeline.types",
    ),
    "models": ("models", "pipeline.errors", "pipeline.geometry", "pipeline.types"),
    "indexes": ("indexes", "pipeline.errors", "pipeline.files", "pipeline.types"),
}
# Seconds to import: kept out of what every command loads (`--help` answers in 150 ms) and of the decode workers.
HEAVY = {"torch", "torchvision", "open_clip", "timm", "faiss", "av", "h5py"}
LIGHT = ("pipeline.cli", "pipeline.types", "pipeline.errors", "pipeline.files", "pipeline.config", "models.registry")


class Import(NamedTuple):
    target: str  # dotted module as written, with the name of a `from` import where that is a module of ours
    line: int
    at_load: bool  # runs when the module is imported: outside functions and TYPE_CHECKING


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


SOURCES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


@functools.cache
def parse(module: str) -> ast.Module:
    return ast.parse(SOURCES[module].read_text(encoding="utf-8"))


def iter_imports(node: ast.AST, at_load: bool = True) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, at_load) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = "." * child.level + (child.module or "")
            for alias in child.names:
                full = f"{base}.{alias.name}"
                yield Import(full if full in SOURCES else base, child.lineno, at_load)
        else:
            typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from iter_imports(child, at_load and not inside and not typing_only)


@functools.cache
def imports(module: str) -> tuple[Import, ...]:
    return tuple(iter_imports(parse(module)))


def within(module: str, places: tuple[str, ...]) -> bool:
    return any(module == place or module.startswith(f"{place}.") for place in places)


def breach(module: str, line: int, what: str) -> str:
    return f"{SOURCES[module].relative_to(ROOT)}:{line}: {what}"


def calls(module: str) -> Iterator[ast.Call]:
    return (node for node in ast.walk(parse(module)) if isinstance(node, ast.Call))


def test_each_package_imports_only_what_it_may() -> None:
    found = []
    for module in SOURCES:
        allowed = next((may for place, may in MAY_IMPORT.items() if within(module, (place,))), PACKAGES)
        for target, line, _ in imports(module):
            if target.startswith("."):
                found.append(breach(module, line, "a relative import: write the whole name"))
            elif within(target, PACKAGES) and not within(target, allowed):
                found.append(breach(module, line, f"imports {target}"))
    assert found == []


def test_stages_reach_encoders_through_the_registry() -> None:
    adapters = {
        node.module
        for node in ast.walk(parse("models.registry"))
        if isinstance(node, ast.ImportFrom) and any(alias.name.startswith("load_") for alias in node.names)
    }
    assert "models.open_clip" in adapters
    # training makes what the adapters load, and has to know its form
    outside = [module for module in SOURCES if not within(module, ("models", "pipeline.training"))]
    found = [breach(m, i.line, f"imports {i.target}") for m in outside for i in imports(m) if i.target in adapters]
    assert found == []


def test_nobody_imports_the_command_line() -> None:
    outside = [module for module in SOURCES if not within(module, ("pipeline.cli",))]
    assert [m for m in outside if any(within(i.target, ("pipeline.cli",)) for i in imports(m))] == []


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    graph = {module: {i.target for i in imports(module) if i.at_load and i.target in SOURCES} for module in SOURCES}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, naming the circle


def test_each_large_library_has_one_home() -> None:
    found = []
    for module in SOURCES:
        for target, line, _ in imports(module):
            library = target.partition(".")[0]
            if library in HOMES and not within(module, HOMES[library]):
                found.append(breach(module, line, f"imports {library}, which belongs in {', '.join(HOMES[library])}"))
    assert found == []


def test_stages_load_torch_only_when_called() -> None:
    """What a module imports on load, every command that names the module pays for."""
    stages = [m for m in SOURCES if within(m, ("pipeline",)) and not within(m, ("pipeline.training",))]
    assert not any(i.at_load and within(i.target, ("pipeline.training",)) for stage in stages for i in imports(stage))
    early = [(stage, i) for stage in stages for i in imports(stage) if i.at_load]
    slow = ("torch", "torchvision", "open_clip", "faiss")
    assert [breach(stage, i.line, f"imports {i.target} on load") for stage, i in early if within(i.target, slow)] == []


def loaded_by(modules: list[str]) -> set[str]:
    """The top-level packages in memory after importing `modules` in a new interpreter."""
    code = f"import sys, {', '.join(modules)}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_what_every_command_loads_is_light() -> None:
    assert loaded_by([module for module in LIGHT if module in SOURCES]) & HEAVY == set()


def test_a_decode_worker_never_loads_torch() -> None:
    loaded = loaded_by([module for module in SOURCES if within(module, ("pipeline.decoding",))])
    assert loaded & HEAVY == {"av"}


def dangers(call: ast.Call) -> Iterator[str]:
    name = ast.unparse(call.func)
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    for keyword, value in (("shell", "True"), ("allow_pickle", "True"), ("weights_only", "False")):
        if keywords.get(keyword) == value:
            yield f"{keyword}={value}"
    if name == "torch.load" and keywords.get("weights_only") != "True":
        yield "torch.load without weights_only=True"
    if name in {"eval", "exec", "os.system", "os.popen", "torch.hub.load"}:
        yield f"{name}()"


def test_nothing_runs_a_shell_or_unpickles() -> None:
    found = [breach(m, call.lineno, danger) for m in SOURCES for call in calls(m) for danger in dangers(call)]
    found += [breach(m, i.line, f"imports {i.target}") for m in SOURCES for i in imports(m) if i.target in UNPICKLERS]
    assert found == []


def test_videos_are_opened_in_one_place() -> None:
    """There the protocols and formats are restricted; the demo opens its own new files for writing."""
    outside = [module for module in SOURCES if module not in {"pipeline.decoding.container", "pipeline.demo"}]
    opens = [(m, call.lineno) for m in outside for call in calls(m) if ast.unparse(call.func) == "av.open"]
    assert [breach(m, line, "av.open()") for m, line in opens] == []


def test_indexes_are_read_and_written_in_one_place_each() -> None:
    """Read where the digest was checked and limits are set, written where a full disk is noticed."""
    homes = {"faiss.read_index": "indexes.search", "faiss.write_index": "indexes.build"}
    found = {(name, m) for m in SOURCES for call in calls(m) if (name := ast.unparse(call.func)) in homes}
    assert found == set(homes.items())


def test_files_are_short_and_named_for_what_they_do() -> None:
    lengths = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in SOURCES.items()}
    assert {module: n for module, n in lengths.items() if n > MAX_LINES} == {}
    assert [module for module in SOURCES if module.rpartition(".")[2] in VAGUE_NAMES] == []


def test_the_three_packages_come_from_this_checkout() -> None:
    """`models` is a common name: another distribution's package of that name must not answer for ours."""
    assert {Path(str(package.__file__)).parents[1] for package in (pipeline, models, indexes)} == {ROOT}


def test_common_package_names_are_kept_out_of_public_indexes() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "Private :: Do Not Upload" in project["classifiers"]


def test_the_wheel_holds_the_three_packages_whole_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns("__pycache__")
    for name in (*PACKAGES, "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", source)
    (source / "README.md").write_text("fineco\n")  # named by pyproject.toml; its text plays no part
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=source, capture_output=True, check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        shipped = {name for name in wheel.namelist() if ".dist-info/" not in name}
    files = (path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file())
    expected = {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}
    assert shipped == {name for name in expected if not name.endswith((".md", ".tmp"))}


def test_the_lock_pins_every_requirement_by_hash_and_names_no_place() -> None:
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    entries = re.split(r"\n(?=\S)", text.strip())
    assert [
        entry for entry in entries if not re.match(r"[a-z0-9-]+==\S+.*\\\n    --hash=sha256:[0-9a-f]{64}", entry)
    ] == []
    assert re.findall(r".*(?://|file:|^--|--find-links|--index|/home/|/tmp/).*", text, flags=re.MULTILINE) == []


def test_the_lock_satisfies_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *chain.from_iterable(project["optional-dependencies"].values())]
    names = {re.split(r"[^A-Za-z0-9-]", requirement)[0] for requirement in asked} - {project["name"]}
    locked = re.findall(
        r"^([a-z0-9-]+)==", (ROOT / "requirements.lock").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    assert names - set(locked) == set()
