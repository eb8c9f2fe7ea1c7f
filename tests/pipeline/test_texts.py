"""The text beside a video: every kind of file, what real ones look like, and what hostile ones cost."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import texts
from pipeline.texts import clean_text, names_beside, read_texts, texts_from_json
from pipeline.types import TimedText

# As YouTube writes it: a cue of 10 ms repeats each line, then the line stays while the next one appears word by word.
ROLLING_VTT = """WEBVTT
Kind: captions
Language: en

STYLE
::cue { color: red }

00:00:00.000 --> 00:00:02.500 align:start position:0%
\x20
hello<00:00:00.500><c> there</c><00:00:01.000><c> everyone.</c>

00:00:02.500 --> 00:00:02.510 align:start position:0%
hello there everyone.
\x20

NOTE two clock times on a line are what a reader may take for a cue

intro
00:00:02.510 --> 00:00:05.000 align:start position:0%
hello there everyone.
welcome<00:00:03.000><c> to</c><00:00:03.500><c> it</c>
"""


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return tmp_path / "clip.mp4"


def beside(clip: Path, suffix: str, content: str | bytes) -> Path:
    path = clip.with_name(clip.stem + suffix)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def strings(clip: Path) -> list[str]:
    return [text.text for text in read_texts(clip)[0]]


def test_a_video_without_files_beside_it_has_no_texts(clip: Path) -> None:
    assert read_texts(clip) == ((), ())


def test_a_folder_that_is_gone_is_a_note(tmp_path: Path) -> None:
    found, notes = read_texts(tmp_path / "gone" / "clip.mp4")
    assert found == () and "No such file" in notes[0]


def test_every_line_of_a_txt_is_a_text_as_written(clip: Path) -> None:
    beside(clip, ".txt", "a man  cooks\r\n\r\n  \nhe <i>eats</i> &amp; sleeps\n")
    assert read_texts(clip) == ((TimedText("a man cooks"), TimedText("he <i>eats</i> &amp; sleeps")), ())


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("one", [TimedText("one")]),
        (["one", "two"], [TimedText("one"), TimedText("two")]),
        ({"caption": "one"}, [TimedText("one")]),
        ({"caption": "one", "start": 1, "end": 2.5}, [TimedText("one", 1.0, 2.5)]),
        ({"captions": ["one", {"text": "two", "start": 0, "end": 3}]}, [TimedText("one"), TimedText("two", 0.0, 3.0)]),
        ({"title": "t", "description": "d", "views": 3}, [TimedText("t"), TimedText("d")]),
        ({"text": "all", "segments": [{"id": 0, "text": " a", "start": 0.0, "end": 1.5}]}, [TimedText("a", 0.0, 1.5)]),
    ],
)
def test_json_in_every_form(clip: Path, value: object, expected: list[TimedText]) -> None:
    beside(clip, ".json", json.dumps(value))
    assert read_texts(clip) == (tuple(expected), ())


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"text": "x", "start": 1}, "both a start and an end"),
        ({"text": "x", "start": 2, "end": 1}, "ends before it starts"),
        ({"text": "x", "start": float("nan"), "end": 1}, "finite"),
        ({"text": "x", "start": 0, "end": 10**400}, "finite"),
        ({"text": "x", "start": True, "end": 1}, "expected seconds"),
        ({"text": "x", "start": "0", "end": 1}, "expected seconds"),
        ({"text": "", "start": 0, "end": 1}, "without a text"),
        ({"words": "x"}, 'without "text"'),
        (7, "7 is not a text"),
        ([["x"]], "is not a text"),
        ("x" * 70_000, "70000 bytes"),
        ("caf\udce9", "not UTF-8"),
    ],
)
def test_a_bad_entry_is_a_problem_and_costs_no_other(entry: object, reason: str) -> None:
    found, problems = texts_from_json(["before", entry, "after"])
    assert found == [TimedText("before"), TimedText("after")]
    assert len(problems) == 1 and reason in problems[0]


def test_srt_loses_markup_and_keeps_words(clip: Path) -> None:
    beside(
        clip,
        ".srt",
        "\ufeff1\r\n00:00:01,000 --> 00:00:02,500\r\n{\\an8}<i>Tom &amp; Jerry</i>\r\n<font color=red>i <3 u</font>\r\n"
        "\r\n2\r\n00:00:03,000 --> 00:00:04,000\r\nin the year\r\n\r\n1984\r\n\r\n"
        "3\r\n00:00:05,000 --> 00:00:06,000\r\n<i></i>\r\n\r\n4\r\n0:0:7,5 --> 0:0:8,0\r\nnow\r\n2024\r\n",
    )
    assert read_texts(clip) == (
        (
            TimedText("Tom & Jerry i <3 u", 1.0, 2.5),
            TimedText("in the year 1984", 3.0, 4.0),
            TimedText("now 2024", 7.5, 8.0),
        ),
        (),
    )


def test_rolling_captions_say_every_line_once(clip: Path) -> None:
    beside(clip, ".vtt", ROLLING_VTT)
    assert read_texts(clip) == (
        (TimedText("hello there everyone.", 0.0, 2.51), TimedText("welcome to it", 2.51, 5.0)),
        (),
    )


def test_words_said_again_after_a_pause_are_said_again(clip: Path) -> None:
    beside(
        clip,
        ".srt",
        "1\n00:00:01,000 --> 00:00:02,000\nno\n\n2\n00:00:02,050 --> 00:00:03,000\nno\n\n"
        "3\n00:00:09,000 --> 00:00:10,000\nno\n",
    )
    assert read_texts(clip)[0] == (TimedText("no", 1.0, 3.0), TimedText("no", 9.0, 10.0))


def test_clock_times_in_the_words_are_words(clip: Path) -> None:
    beside(clip, ".srt", "1\n00:00:01,000 --> 00:00:02,000\nfrom 00:00:05,000 to 00:00:06,000: run\n")
    assert read_texts(clip)[0] == (TimedText("from 00:00:05,000 to 00:00:06,000: run", 1.0, 2.0),)


def test_vtt_without_hours_and_under_the_wrong_extension(clip: Path) -> None:
    beside(clip, ".srt", "WEBVTT\n\n00:01.000 --> 00:02,000\n<v Ann>hi&nbsp;there</v>\n\nNOTE\nnot said\n")
    assert read_texts(clip) == ((TimedText("hi there", 1.0, 2.0),), ())


def test_cues_that_end_before_they_start_are_left_out_with_one_note(clip: Path) -> None:
    cue = "1\n00:00:05,000 --> 00:00:02,000\nback\n\n"
    path = beside(clip, ".srt", cue * 3 + "4\n00:00:06,000 --> 00:00:06,000\nnow\n")
    found, notes = read_texts(clip)
    assert found == (TimedText("now", 6.0, 6.0),)
    assert notes == (f"{str(path)!r}: a cue ends before it starts (5.0 > 2.0) (and 2 more problems)",)


def test_own_files_are_the_stem_with_at_most_a_language(clip: Path) -> None:
    cue = "1\n00:00:00,000 --> 00:00:01,000\n{}\n"
    for suffix in (".srt", ".en.srt", ".zh-Hans.srt", ".pt_BR.SRT", ".en.forced.srt", ".info.srt", "2.srt", ".srt.bak"):
        beside(clip, suffix, cue.format(suffix))
    beside(clip, ".live_chat.json", '"no"')
    beside(clip, ".TXT", "first")
    beside(clip, ".vtt", "WEBVTT\n\n00:00.000 --> 00:01.000\n.srt\n")  # the same words at the same time
    found, notes = read_texts(clip)
    assert [text.text for text in found] == ["first", ".en.srt", ".pt_BR.SRT", ".srt", ".zh-Hans.srt"]
    assert notes == ()


def test_only_the_given_names_are_looked_at(clip: Path) -> None:
    beside(clip, ".txt", "one")
    beside(clip, ".json", '"two"')
    assert read_texts(clip, ["clip.json", "other.txt"])[0] == (TimedText("two"),)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_unicode_encodings_are_read_without_a_note(clip: Path, encoding: str) -> None:
    beside(clip, ".txt", "naïve 猫".encode(encoding))
    assert read_texts(clip) == ((TimedText("naïve 猫"),), ())


@pytest.mark.parametrize(
    ("data", "expected", "name"),
    [(b"caf\xe9 \x93x\x94", "café “x”", "Windows-1252"), (b"caf\xe9\x81", "café\x81", "Latin-1")],
)
def test_other_encodings_are_guessed_with_a_note(clip: Path, data: bytes, expected: str, name: str) -> None:
    beside(clip, ".txt", data)
    found, notes = read_texts(clip)
    assert found == (TimedText(expected),) and name in notes[0]


@pytest.mark.parametrize(
    ("suffix", "content", "reason"),
    [
        (".json", '{"caption": ', "not JSON"),
        (".json", "[" * 100_000, "nested too deeply"),
        (".json", '{"views": 3}', "none of caption"),
        (".srt", "hello", "no cue"),
        (".txt", "x" * (texts.MAX_FILE_BYTES + 1), "at most"),
    ],
)
def test_a_broken_file_is_a_note_that_names_it(clip: Path, suffix: str, content: str, reason: str) -> None:
    path = beside(clip, suffix, content)
    found, notes = read_texts(clip)
    assert found == () and len(notes) == 1
    assert notes[0].startswith(repr(str(path))) and reason in notes[0] and "\n" not in notes[0]


def test_what_is_no_file_is_a_note_and_is_never_opened(clip: Path) -> None:
    os.mkfifo(clip.with_suffix(".txt"))  # opening it would wait for ever
    clip.with_suffix(".json").mkdir()
    clip.with_suffix(".srt").symlink_to("nowhere")
    found, notes = read_texts(clip)
    assert found == () and [note.rsplit(": ")[-1] for note in notes] == [
        "not a regular file",
        "not a regular file",
        "No such file or directory",
    ]


def test_more_texts_than_the_limit_are_cut_with_a_note(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "MAX_TEXTS", 3)
    cues = "".join(f"{i}\n00:00:0{i},000 --> 00:00:0{i},500\nw{i}\n\n" for i in range(5))
    path = beside(clip, ".srt", cues)
    assert strings(clip) == ["w0", "w1", "w2"] and "more than 3 cues" in read_texts(clip)[1][0]
    path.unlink()
    beside(clip, ".txt", "a\nb\nc\nd\n")
    assert strings(clip) == ["a", "b", "c"] and "4 texts" in read_texts(clip)[1][0]


@pytest.mark.parametrize("filling", ["<a", "{\\", "\n", "1", "&", "00:00:00,000 ", "1,1  ", "x\t\t\t"])
def test_hostile_subtitles_take_linear_time(clip: Path, filling: str) -> None:
    beside(clip, ".srt", "1\n00:00:00,000 --> 00:00:01,000\nx" + filling * (2_000_000 // len(filling)) + "y")
    start = time.perf_counter()
    read_texts(clip)
    assert time.perf_counter() - start < 5  # quadratic takes minutes


def test_pysubs2_is_imported_only_for_subtitles(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pysubs2", None)  # an import of it now fails
    beside(clip, ".txt", "one")
    assert strings(clip) == ["one"]


@given(st.text())
def test_clean_text_is_one_stable_line_that_can_be_stored(text: str) -> None:
    clean = clean_text(text)
    assert clean_text(clean) == clean
    assert "\0" not in clean and "\n" not in clean and clean == clean.strip()
    clean.encode("utf-8")


def test_clean_text_composes_and_mends() -> None:
    assert clean_text("cafe\u0301\0 \x85 x") == "café x"
    assert clean_text("cut \ud83d") == "cut ?"  # valid in JSON, cannot be stored


@given(st.lists(st.text(alphabet="ab.-/ é\udcff", max_size=6)), st.text(alphabet="ab.é\udcff", min_size=1, max_size=3))
def test_names_beside_is_a_search_by_prefix(names: list[str], stem: str) -> None:
    ordered = sorted(name.replace("/", "_") for name in names)
    assert names_beside(stem, ordered) == [name for name in ordered if name.startswith(stem + ".")]
