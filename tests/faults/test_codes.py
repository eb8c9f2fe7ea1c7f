"""Every code that a video can fail with is expected by some test."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = [path for package in ("pipeline", "models", "indexes") for path in sorted((ROOT / package).rglob("*.py"))]
MAKERS = {"VideoError": 0, "no_video": 1}  # a code is the argument of this number


def text_of(node: ast.AST) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def codes_in(path: Path) -> Iterator[str]:
    """The codes of a module: arguments of MAKERS, constants among them, and what why_refused returns."""
    tree = ast.parse(path.read_text("utf-8"))
    constants = {
        target.id: text
        for node in tree.body
        if isinstance(node, ast.Assign) and (text := text_of(node.value)) is not None
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in MAKERS:
            place = MAKERS[node.func.id]
            if len(node.args) > place:
                code = node.args[place]
                found = text_of(code) or (constants.get(code.id) if isinstance(code, ast.Name) else None)
                if found:
                    yield found
        elif isinstance(node, ast.Dict):  # as a worker sends them
            for key, value in zip(node.keys, node.values, strict=True):
                if key is not None and text_of(key) == "code" and (found := text_of(value)):
                    yield found
        elif isinstance(node, ast.FunctionDef) and node.name == "why_refused":
            for result in (n.value for n in ast.walk(node) if isinstance(n, ast.Return)):
                first = result.elts[0] if isinstance(result, ast.Tuple) else None
                yield from (text for part in ast.walk(first) if (text := text_of(part))) if first else ()


CODES = {code for path in SOURCES for code in codes_in(path)}


def test_the_codes_are_found_in_the_program() -> None:
    assert {
        *("invalid", "no_video", "no_frames", "max_pixels", "max_frames", "memory", "timeout", "crash", "non_finite"),
        *("missing", "unreadable", "empty", "not_a_file", "duplicate", "changed"),
    } <= CODES


def test_every_code_is_expected_by_a_test() -> None:
    expected: set[str] = set()
    for path in sorted((ROOT / "tests").rglob("*.py")):
        if path != Path(__file__):
            tree = ast.parse(path.read_text("utf-8"))
            expected |= {word for node in ast.walk(tree) if (text := text_of(node)) for word in text.split(":")}
    assert CODES - expected == set()
