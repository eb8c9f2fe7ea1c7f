"""Text beside a video, of any size and encoding: bounded, decoded honestly, never run, never lost without a note."""

from __future__ import annotations

import json
import os
import resource
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import small_runs
from command_line import fineco
from guards import Guard
from pipeline import texts
from pipeline.inspect import status_of, text_problems_of
from pipeline.texts import MAX_FILE_BYTES, MAX_MARKS, MAX_TEXT_BYTES, clean_text, read_texts
from pipeline.types import TimedText

GUARDS = [
    Guard(
        faults=(22,),
        file="pipeline/texts.py",
        old="    _check_marks(text)\n    text = unicodedata",
        new="    text = unicodedata",
        test="test_no_file_takes_long[combining marks]",
    ),
    Guard(
        faults=(22,),
        file="pipeline/texts.py",
        old="for entry in entries[:MAX_TEXTS]:",
        new="for entry in entries:",
        test="test_no_file_takes_long[numbers instead of texts]",
    ),
    Guard(
        faults=(22,),
        file="pipeline/texts.py",
        old="            if left < 0:",
        new="            if False:",
        test="test_a_cue_without_end_is_cut_with_a_note",
    ),
    Guard(
        faults=(22,),
        file="pipeline/texts.py",
        old="if len(data) > left_bytes:",
        new="if False:",
        test="test_all_files_beside_a_video_are_bounded_together",
    ),
    Guard(
        faults=(22,),
        file="pipeline/texts.py",
        old="for name, kind in own[:MAX_FILES]:",
        new="for name, kind in own:",
        test="test_the_number_of_files_beside_a_video_is_bounded",
    ),
    Guard(
        faults=(22,),
        file="pipeline/texts.py",
        old='        raise ValueError("binary data, not text")',
        new="        pass",
        test="test_what_is_no_text_is_a_note[picture-.txt]",
    ),
    Guard(
        faults=(22,),
        file="pipeline/texts.py",
        old="and _fails(data, encoding)",
        new="and False",
        test="test_what_is_replaced_or_guessed_is_said[broken UTF-16]",
    ),
    Guard(
        faults=(22,),
        file="pipeline/texts.py",
        old="encoding = marked or _utf16_without_mark(data)",
        new="encoding = marked",
        test="test_what_is_replaced_or_guessed_is_said[UTF-16 without mark]",
    ),
    Guard(
        faults=(22,),
        file="pipeline/texts.py",
        old="in_cue, left = span is not None, MAX_TEXT_BYTES",
        new="in_cue, left, span = True, MAX_TEXT_BYTES, span or _SPAN.match('0:00:00.0 --> 0:00:01.0')",
        test="test_a_time_that_cannot_be_read_costs_its_cue_and_is_said",
    ),
    Guard(
        faults=(14, 22),
        file="pipeline/texts.py",
        old='    if not stat.S_ISREG(os.stat(path).st_mode):\n        raise ValueError("not a regular file")',
        new="    if False:\n        raise ValueError",
        test="test_a_device_beside_a_video_is_never_opened",
    ),
    Guard(
        faults=(22,),
        file="pipeline/catalog.py",
        old="            text_notes=notes,",
        new="            text_notes=(),",
        test="test_what_could_not_be_used_is_kept_with_the_video",
    ),
]

pytestmark = pytest.mark.fault

CUE = "1\n00:00:01,000 --> 00:00:02,000\n"


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return tmp_path / "clip.mp4"


def beside(clip: Path, suffix: str, content: bytes | str) -> Path:
    path = clip.with_name(clip.stem + suffix)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read_one(clip: Path) -> tuple[list[str], str]:
    """The texts, and the one note without the file's name ("" if there is none)."""
    found, notes = read_texts(clip)
    assert len(notes) < 2
    return [text.text for text in found], notes[0].partition("': ")[2] if notes else ""


SLOW = {
    "combining marks": (".txt", ("a" + "\u0315" * 10_000 + "\u0300" * 10_000 + "\n") * 30),
    "numbers instead of texts": (".json", "[" + "1," * 4_000_000 + "1]"),
    "one text a million times": (".txt", "a\n" * 5_000_000),
    "lines in one cue": (".srt", CUE + "a\n" * 5_000_000),
    "cues": (".srt", (CUE + "x\n\n") * 270_000),
    "cues of WebVTT": (".vtt", "WEBVTT\n\n" + "00:01.000 --> 00:02.000\n<v a>x</v>\n\n" * 260_000),
    "one line": (".srt", CUE + "x" * 10_000_000),
    "an hour of digits": (".srt", "1\n" + "0" * 9_000_000 + ":00:01,000 --> 00:00:02,000\nfoo\n"),
    "nested JSON": (".json", "[" * 10_000_000),
    "a number of JSON": (".json", "[" + "9" * 10_000_000 + "]"),
}


@pytest.mark.long
@pytest.mark.parametrize("kind", SLOW)
def test_no_file_takes_long(kind: str, clip: Path) -> None:
    suffix, content = SLOW[kind]
    beside(clip, suffix, content[:MAX_FILE_BYTES])
    started = time.process_time()
    _, notes = read_texts(clip)
    assert time.process_time() - started < 8  # the slowest is 3 to 5 s
    assert len(notes) == 1  # and something of each was left out


@pytest.mark.long
def test_no_file_takes_much_memory(tmp_path: Path) -> None:
    for kind, (suffix, content) in SLOW.items():
        (tmp_path / kind).mkdir()
        beside(tmp_path / kind / "clip.mp4", suffix, content[:MAX_FILE_BYTES])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for kind in SLOW:
        read_texts(tmp_path / kind / "clip.mp4")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 800 * 1024  # KiB; a list of 5 million numbers


def test_a_cue_without_end_is_cut_with_a_note(clip: Path) -> None:
    beside(clip, ".srt", CUE + "word\n" * (MAX_TEXT_BYTES // 2) + "\n2\n00:00:03,000 --> 00:00:04,000\nb\n")
    found, note = read_one(clip)
    assert found[-1] == "b" and all(len(text) <= MAX_TEXT_BYTES for text in found)
    assert note.startswith(f"a cue of more than {MAX_TEXT_BYTES} characters")


def test_all_files_beside_a_video_are_bounded_together(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "MAX_FILES_BYTES", 250)
    for language in ("aa", "bb", "cc"):
        beside(clip, f".{language}.srt", CUE + f"{language} " * 20)
    found, notes = read_texts(clip)
    assert [text.text[:2] for text in found] == ["aa", "bb"]
    assert len(notes) == 1 and "clip.cc.srt" in notes[0] and "left out" in notes[0]


def test_the_number_of_files_beside_a_video_is_bounded(clip: Path) -> None:
    for number in range(130):
        beside(clip, f".en-x{number:03}.srt", CUE + f"text {number}")
    found, notes = read_texts(clip)
    assert len(found) == 100
    assert len(notes) == 1 and "130 files of text beside it, the first 100 are read" in notes[0]


JPEG = b"\xff\xd8\xff\xe0\0\x10JFIF\0\x01\x01" + bytes(range(256)) * 4


@pytest.mark.parametrize("suffix", [".txt", ".srt", ".vtt", ".json"])
@pytest.mark.parametrize("data", [JPEG, b"\x7fELF\x02\x01\x01" + b"\0" * 9 + b"\xff" * 9], ids=["picture", "program"])
def test_what_is_no_text_is_a_note(data: bytes, suffix: str, clip: Path) -> None:
    beside(clip, suffix, data)
    assert read_one(clip) == ([], "binary data, not text")


@pytest.mark.parametrize(
    ("data", "expected", "note"),
    [
        ("Привет мир".encode("utf-16-le"), "Привет мир", "UTF-16-LE without a byte order mark"),
        ("naïve 猫 ok".encode("utf-16-be"), "naïve 猫 ok", "UTF-16-BE without a byte order mark"),
        ("naïve 猫".encode("utf-32"), "naïve 猫", ""),
        (b"\0\0\xfe\xff" + "naïve 猫".encode("utf-32-be"), "naïve 猫", ""),
        (b"\xff\xfeh\0i\0 \0\0\xd8x\0", "hi \ufffdx", "broken UTF-16: 1 characters could not be read"),
        (b"\xff\xfeh\0i", "h\ufffd", "broken UTF-16: 1 characters could not be read"),
        (b"a\0b", "ab", "1 NUL characters in it, left out"),
        (b"caf\xe9 \x80", "café €", "not UTF-8, read as Windows-1252"),
        (b"caf\xe9 \x81", "café \x81", "not UTF-8, read as Latin-1"),
        ("a � stays".encode(), "a � stays", ""),
    ],
    ids=[
        *("UTF-16 without mark", "UTF-16-BE without mark", "UTF-32", "UTF-32-BE", "broken UTF-16", "cut UTF-16"),
        *("NUL", "Windows-1252", "Latin-1", "a replacement character of its own"),
    ],
)
def test_what_is_replaced_or_guessed_is_said(data: bytes, expected: str, note: str, clip: Path) -> None:
    beside(clip, ".txt", data)
    assert read_one(clip) == ([expected], note)


@pytest.mark.parametrize(
    "line",
    [
        "-00:00:01,000 --> 00:00:02,000",
        "00:00:01,000 --> 00:99:02,000",
        "99999999999999999999:00:01,000 --> 99999999999999999999:00:02,000",
        "x1,000 --> nan",
    ],
)
def test_a_time_that_cannot_be_read_costs_its_cue_and_is_said(line: str, clip: Path) -> None:
    beside(clip, ".srt", f"1\n{line}\nlost\n\n2\n00:00:03,000 --> 00:00:04,000\nkept\n")
    found, note = read_one(clip)
    assert found == ["kept"]
    assert note == f"a cue whose time cannot be read ({line[:60]!r})"


def test_a_recording_of_weeks_keeps_its_times(clip: Path) -> None:
    beside(clip, ".srt", "1\n123:00:01,5 --> 1234:00:02,25\nlong\n")
    assert read_texts(clip) == ((TimedText("long", 123 * 3600 + 1.5, 1234 * 3600 + 2.25),), ())


def test_times_of_json_are_finite_and_in_order(clip: Path) -> None:
    spans = ["1e400,2e400", "NaN,1", "5,1", "9" * 400 + "," + "9" * 401, "true,2", "-5,-1"]
    parts = [(i, *span.split(",")) for i, span in enumerate(spans)]
    segments = ",".join(f'{{"text":"{i}","start":{start},"end":{end}}}' for i, start, end in parts)
    beside(clip, ".json", '{"segments": [' + segments + "]}")
    found, notes = read_texts(clip)
    assert found == (TimedText("5", -5.0, -1.0),)  # before the start: it meets no frame
    assert "(and 4 more problems)" in notes[0]


def test_markup_is_removed_or_shown_and_never_run(clip: Path) -> None:
    markup = "<script>alert(1)</script>&lt;img onerror=x&gt; {\\an8}{\\t(0,5,\\fs9)}"
    beside(clip, ".srt", f"{CUE}{markup}$(touch x) `id` %n\n")
    assert read_one(clip) == (["alert(1)<img onerror=x> $(touch x) `id` %n"], "")


def test_a_device_beside_a_video_is_never_opened(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip.with_suffix(".txt").symlink_to("/dev/null")
    os.mkfifo(clip.with_suffix(".json"))
    clip.with_suffix(".vtt").symlink_to(clip.with_suffix(".vtt"))
    opened: list[object] = []
    monkeypatch.setattr("builtins.open", lambda path, *more, **options: opened.append(path))
    found, notes = read_texts(clip)
    assert opened == [] and found == () and len(notes) == 3


def test_a_file_that_grows_while_it_is_read_is_a_note(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = beside(clip, ".txt", "a\n" * 100)
    monkeypatch.setattr(texts, "MAX_FILE_BYTES", 200)
    fstat = os.fstat

    def grow(descriptor: int) -> os.stat_result:
        status = fstat(descriptor)
        with path.open("ab") as file:
            file.write(b"more")
        return status

    monkeypatch.setattr(os, "fstat", grow)
    assert read_one(clip) == ([], "it grew while it was read; at most 200 bytes are read")


def test_marks_are_text_up_to_a_limit() -> None:
    assert clean_text("e" + "\u0301" * MAX_MARKS) == "é" + "\u0301" * (MAX_MARKS - 1)
    with pytest.raises(ValueError, match="more than 30 combining marks"):
        clean_text("e" + "\u0301" * (MAX_MARKS + 1))


def test_what_could_not_be_used_is_kept_with_the_video(tmp_path: Path) -> None:
    videos, collection = small_runs.make_videos(tmp_path / "v", 2), tmp_path / "c"
    (videos / "clip0.srt").write_bytes(JPEG)
    said: list[str] = []
    small_runs.run(collection, videos, machine=small_runs.machine(said.append))
    note = f"{str(videos / 'clip0.srt')!r}: binary data, not text"
    assert note in said

    def kept() -> list[tuple[str, str, str]]:
        outcomes = [row.outcome for row in text_problems_of(collection)]
        return [(outcome.path, outcome.code, outcome.message) for outcome in outcomes]

    assert kept() == [(str(videos / "clip0.mp4"), "text", note)]
    assert status_of(collection)["text_problems"] == 1
    done = fineco("failures", "--texts", "-c", collection, "--format", "jsonl")
    assert done.code == 0 and json.loads(done.out)["message"] == note
    small_runs.run(collection, videos, machine=small_runs.machine(said.append))
    assert said.count(note) == 2  # every run says it again, and the record stays
    assert len(kept()) == 1
    (videos / "clip1.json").write_text("[")  # beside a video that is done, and whose texts stay the same
    small_runs.run(collection, videos)
    assert [path for path, _, _ in kept()] == [str(videos / "clip0.mp4"), str(videos / "clip1.mp4")]
    (videos / "clip0.srt").unlink()
    (videos / "clip1.json").unlink()
    small_runs.run(collection, videos)
    assert kept() == [] and status_of(collection)["text_problems"] == 0


FRAGMENTS = st.sampled_from(
    [
        "\n",
        "\n\n",
        "1\n",
        "00:00:01,000 --> 00:00:02,000",
        "WEBVTT\n",
        "{\\an8}",
        "<i>",
        "&lt;",
        "\0",
        "é",
        "\u0301",
        "-->",
    ]
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(FRAGMENTS | st.text(max_size=4), max_size=20).map("".join),
    st.sampled_from(["utf-8", "utf-16", "utf-16-le", "utf-32", "cp1252"]),
    st.sampled_from(["txt", "json", "srt", "vtt"]),
)
def test_any_file_gives_clean_texts_or_a_reason(content: str, encoding: str, kind: str) -> None:
    try:
        found, _ = texts._parse(content.encode(encoding, "replace"), kind)
    except ValueError as error:
        assert str(error)
        return
    for text in found:
        assert text.text == clean_text(text.text) != ""


@settings(max_examples=100)
@given(st.binary(max_size=300), st.sampled_from(["txt", "json", "srt", "vtt"]))
def test_any_bytes_give_texts_or_a_reason(data: bytes, kind: str) -> None:
    try:
        texts._parse(data, kind)
    except ValueError as error:
        assert str(error)
