"""Queries and lists of texts: clean, bounded, refused in one line, and told of when they are not wholly read."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import small_runs
from command_line import Done, fineco
from fakes import FakeEncoder
from guards import Guard
from models.base import caution_of_length
from models.builtin.model import CONTEXT_LENGTH, load_builtin
from models.s3d import Dictionary
from pipeline.commands import search
from pipeline.config import clean_line, read_lines
from pipeline.embed import text_cautions
from pipeline.errors import UsageError
from pipeline.texts import MAX_FILE_BYTES, MAX_TEXT_BYTES, MAX_TEXTS

GUARDS = [
    Guard(
        faults=(22,),
        file="pipeline/config.py",
        old="    if not cleaned:\n",
        new="    if False:\n",
        test="test_a_query_that_says_nothing_exits_2_in_two_lines[NUL]",
    ),
    Guard(
        faults=(22,),
        file="pipeline/cli/stages.py",
        old='clean_line(query, f"query {n}")',
        new="query",
        test="test_a_query_is_cleaned_before_it_is_used",
    ),
    Guard(
        faults=(22,),
        file="pipeline/texts.py",
        old="    if size > MAX_TEXT_BYTES:",
        new="    if False:",
        test="test_a_query_of_any_size_is_refused_above_64_kib",
    ),
    Guard(
        faults=(22,),
        file="pipeline/config.py",
        old="read_file(path, MAX_FILE_BYTES)",
        new="path.read_bytes()",
        test="test_a_list_that_is_no_small_file_is_refused_at_once[huge]",
    ),
    Guard(
        faults=(14, 22),
        file="pipeline/config.py",
        old="read_file(path, MAX_FILE_BYTES)",
        new="path.read_bytes()",
        test="test_a_list_that_is_no_small_file_is_refused_at_once[pipe]",
    ),
    Guard(
        faults=(22,),
        file="pipeline/commands.py",
        old="    for line in text_cautions(encoder, queries):",
        new="    for line in []:",
        test="test_a_query_that_is_not_wholly_read_is_told",
    ),
    Guard(
        faults=(22,),
        file="pipeline/run.py",
        old="    if selecting is not None and selecting.n_unread:",
        new="    if False:",
        test="test_captions_that_are_not_wholly_read_are_counted_in_the_summary",
    ),
    Guard(
        faults=(22,),
        file="models/builtin/model.py",
        old="        if not any(word in self._vocabulary for word in words):",
        new="        if False:",
        test="test_the_builtin_encoder_says_which_texts_it_cannot_read",
    ),
]

pytestmark = pytest.mark.fault


class CuttingEncoder(FakeEncoder):
    """Reads the first five characters of a text."""

    def encode_text(self, texts: Sequence[str]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        return super().encode_text([text[:5] for text in texts])

    def caution(self, text: str) -> str:
        return caution_of_length(text, lambda start: [ord(c) for c in start[:5]])


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("queries")
    small_runs.run(folder / "c", small_runs.make_videos(folder / "v", 2))
    return folder / "c"


@pytest.fixture
def kitchen(collection: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A collection whose encoder the command can load."""
    monkeypatch.setattr("models.registry.load_encoder", lambda name, device="auto", precision="auto": CuttingEncoder())
    return collection


def refused(done: Done) -> str:
    """The one line that says why."""
    assert done.code == 2 and done.out == b""
    lines = done.err.splitlines()
    assert len(lines) <= 2 and lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize("query", ["", " \t\n", "\0", "\u2003"], ids=["empty", "blank", "NUL", "wide blank"])
def test_a_query_that_says_nothing_exits_2_in_two_lines(query: str, kitchen: Path) -> None:
    assert refused(fineco("search", "birds", query, "-c", kitchen)) == "error: query 2 is empty"


def test_a_query_of_any_size_is_refused_above_64_kib(kitchen: Path) -> None:
    assert "at most 65536 are read" in refused(fineco("search", "x" * (MAX_TEXT_BYTES + 1), "-c", kitchen))
    assert fineco("search", "x " * (MAX_TEXT_BYTES // 2), "-c", kitchen).code == 0


@pytest.mark.parametrize("query", ["caf\udce9", "e" + "\u0301" * 50], ids=["not UTF-8", "marks"])
def test_a_query_that_is_no_text_is_refused(query: str, kitchen: Path) -> None:
    assert refused(fineco("search", query, "-c", kitchen)).startswith("error: query 1: text ")


def test_a_query_is_cleaned_before_it_is_used(kitchen: Path) -> None:
    done = fineco("search", "two\0 blue\n\tbirds cafe\u0301", "-c", kitchen, "--format", "jsonl")
    assert b'{"query": "two blue birds caf\\u00e9"' in done.out


@pytest.mark.parametrize("query", ["😀", "-", "$(touch x); `id`", "%s%n%d", "' OR 1=1 --", "../../etc/passwd"])
def test_odd_queries_are_only_words(query: str, kitchen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = fineco("search", "-c", kitchen, "--", query)
    assert done.code in (0, 4) and "error" not in done.err
    assert list(tmp_path.iterdir()) == []


def test_a_query_that_is_not_wholly_read_is_told(kitchen: Path) -> None:
    done = fineco("search", "birds", "birds on a hill", "-c", kitchen)
    assert done.code == 0
    assert "query 2: only its first 5 of 15 characters are read" in done.err and "query 1" not in done.err
    assert fineco("-q", "search", "birds on a hill", "-c", kitchen).err == ""


def test_captions_that_are_not_wholly_read_are_counted_in_the_summary(tmp_path: Path) -> None:
    videos = small_runs.make_videos(tmp_path / "v", 2)
    (videos / "clip0.txt").write_text("red\na text of seven words, all told\n")
    summary = small_runs.run(tmp_path / "c", videos, CuttingEncoder())
    assert any(line.endswith(": 2 texts beside the videos") for line in summary.notes)  # the other is clip1's
    summary = small_runs.run(tmp_path / "d", videos)
    assert not any("wholly" in line for line in summary.notes)


def test_many_such_queries_are_counted() -> None:
    lines = text_cautions(CuttingEncoder(), ["birds on"] * 25)
    assert len(lines) == 11 and lines[-1] == "(and 15 more such queries)"
    assert text_cautions(FakeEncoder(), ["birds on"] * 25) == []


@given(st.text(alphabet="ab c,", max_size=30), st.integers(1, 12))
def test_the_length_that_is_read_is_found_exactly(text: str, most: int) -> None:
    said = caution_of_length(text, lambda start: [ord(c) for c in start[:most]])
    assert bool(said) == any(c.isalpha() for c in text[most:])
    if said:
        assert said == f"only its first {most} of {len(text)} characters are read"


def test_the_builtin_encoder_says_which_texts_it_cannot_read() -> None:
    encoder = load_builtin()
    assert encoder.caution("a small red circle!") == ""
    for text in ("😀", "1, 2 ...", "zebrafish xylophone"):
        assert "knows none of its words" in encoder.caution(text)
        assert np.isfinite(encoder.encode_text([text])).all()
    long = "red " * (CONTEXT_LENGTH + 3)
    assert encoder.caution(long) == f"only its first {CONTEXT_LENGTH} of {CONTEXT_LENGTH + 3} words are read"


def test_a_dictionary_counts_the_words_that_it_knows() -> None:
    assert Dictionary(["red", "green"]).count("Red, the green one; RED") == 3


def make_list(kind: str, path: Path) -> None:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "link to itself":
        path.symlink_to(path)
    elif kind == "huge":
        with path.open("wb") as file:
            file.truncate(8 << 30)  # no bytes on disk, 8 GiB in memory
    elif kind == "too many":
        path.write_text("a\n" * (MAX_TEXTS + 1))
    elif kind == "one long line":
        path.write_text("ok\n\n" + "a" * (MAX_FILE_BYTES - 10))
    elif kind == "UTF-16":
        path.write_bytes("red circle\n".encode("utf-16"))
    elif kind == "binary":
        path.write_bytes(bytes(range(256)))
    elif kind == "NULs":
        path.write_bytes(b"\0\n" * 50)


LISTS = {
    "pipe": "not a regular file",
    "device": "not a regular file",
    "folder": "not a regular file",
    "link to itself": "Too many levels of symbolic links",
    "missing": "No such file or directory",
    "huge": "at most 10485760 are read",
    "too many": "100001 lines, at most 100000 are read",
    "one long line": ":3: text of 10485750 bytes, at most 65536 are read",
    "UTF-16": "not UTF-8 text",
    "binary": "not UTF-8 text",
    "NULs": "no topic in it",
}


@pytest.mark.parametrize("kind", LISTS)
def test_a_list_that_is_no_small_file_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    make_list(kind, path)
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))\n"
        "from pathlib import Path\n"
        "from pipeline.config import read_lines\n"
        "from pipeline.errors import UsageError\n"
        "try: read_lines(Path(sys.argv[1]), 'topic')\n"
        "except UsageError as error: print(error.message)"
    )
    if kind not in ("pipe", "device", "huge"):
        with pytest.raises(UsageError) as caught:
            read_lines(path, "topic")
        said = caught.value.message
    else:  # in a process of its own, which may hang or eat memory
        done = subprocess.run([sys.executable, "-c", program, path], timeout=20, capture_output=True, text=True)
        said = done.stdout + done.stderr[-200:]
    assert said.strip() == f"{path}{LISTS[kind]}" if LISTS[kind].startswith(":") else LISTS[kind] in said


@pytest.mark.parametrize("option", [("search", "-f"), ("select", "--selector", "topics", "--topics")])
def test_the_commands_refuse_a_pipe_in_two_lines(option: tuple[str, ...], kitchen: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "list.txt")
    started = time.monotonic()
    assert "not a regular file" in refused(fineco(*option, tmp_path / "list.txt", "-c", kitchen))
    assert time.monotonic() - started < 5


def test_the_same_rules_hold_from_python(collection: Path) -> None:
    with pytest.raises(UsageError, match="query 2 is empty"):
        search(collection, ["birds", "\0"], encoder=FakeEncoder())
    with pytest.raises(UsageError, match="at most 65536"):
        search(collection, ["x" * 100_000], encoder=FakeEncoder())


@given(st.text(max_size=40))
def test_a_clean_query_stays_as_it_is(text: str) -> None:
    try:
        cleaned = clean_line(text, "query 1")
    except UsageError as error:
        assert error.message.startswith("query 1")
        return
    assert clean_line(cleaned, "again") == cleaned != ""
    cleaned.encode("utf-8")
