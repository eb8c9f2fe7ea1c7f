"""Results as text: every format parses back to what went in, whatever the names and queries hold."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import FinecoError
from pipeline.output import clock, format_hits, format_table, number_of, to_json, visible, write_stdout
from pipeline.types import Hit, Moment

NOT_UTF8 = os.fsdecode(b"/v/caf\xe9.mp4")
HOSTILE = "/v/a\nb\x1b[31m\u202e,\"'.mp4"
HITS = (
    Hit(1, "id-1", NOT_UTF8, 0.75, (Moment(3.0, 4.5, 0.8), Moment(61.0, 62.0, 0.6))),
    Hit(2, "id-2", HOSTILE, 0.5),
)
QUERIES = ["a red kite", "nothing\nlike it"]
ANSWERS: list[tuple[Hit, ...]] = [HITS, ()]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0:00"), (3.5, "0:03.5"), (59.94, "0:59.9"), (59.96, "1:00"), (3599.99, "1:00:00"), (3723.4, "1:02:03.4")],
)
def test_a_time_reads_as_a_player_shows_it(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown


@given(st.floats(0, 1e6))
def test_a_shown_time_is_within_a_twentieth_of_a_second(seconds: float) -> None:
    value = 0.0
    for part in clock(seconds).split(":"):
        value = value * 60 + float(part)
    assert abs(value - seconds) <= 0.05 + 1e-6


@given(st.text())
def test_a_visible_name_is_one_line_without_control_characters(text: str) -> None:
    shown = visible(text)
    assert shown.isprintable()
    assert shown == text or not text.isprintable()


def test_undecodable_bytes_of_a_name_are_shown() -> None:
    assert visible(NOT_UTF8) == "/v/caf\\udce9.mp4"


def test_json_holds_every_query_and_hit() -> None:
    first, second = json.loads(format_hits(QUERIES, ANSWERS, "json"))
    assert (first["query"], second) == ("a red kite", {"query": "nothing\nlike it", "hits": []})
    assert [os.fsencode(hit["path"]) for hit in first["hits"]] == [os.fsencode(h.path) for h in HITS]
    assert first["hits"][0]["moments"][1] == {"start": 61.0, "end": 62.0, "score": 0.6}
    assert [(h["rank"], h["score"], h["video_id"]) for h in first["hits"]] == [(1, 0.75, "id-1"), (2, 0.5, "id-2")]


def test_json_lines_are_a_line_a_hit_in_plain_ascii() -> None:
    text = format_hits(QUERIES, ANSWERS, "jsonl")
    rows = [json.loads(line) for line in text.splitlines()]
    assert text.isascii()
    assert [(row["query"], row["path"]) for row in rows] == [("a red kite", h.path) for h in HITS]


def test_csv_reads_back_with_the_best_moment() -> None:
    rows = list(csv.DictReader(io.StringIO(format_hits(QUERIES, ANSWERS, "csv"), newline="")))
    assert [row["path"] for row in rows] == [h.path for h in HITS]
    assert [(row["start"], row["end"]) for row in rows] == [("3.000", "4.500"), ("", "")]
    assert [float(row["score"]) for row in rows] == [0.75, 0.5]


@pytest.mark.parametrize("formula", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_a_spreadsheet_is_given_no_formula(formula: str) -> None:
    text = format_hits([formula], [(Hit(1, formula, formula, -0.5),)], "csv")
    (row,) = csv.DictReader(io.StringIO(text, newline=""))
    assert (row["query"], row["video_id"], row["path"]) == (f"'{formula}",) * 3
    assert row["score"] == "-0.500000"  # a number stays one


def test_paths_are_each_named_once_in_order() -> None:
    text = format_hits(["a", "b"], [HITS, HITS[::-1]], "paths")
    assert text == f"{NOT_UTF8}\n{HOSTILE}\n"


def test_a_table_shows_a_hit_a_line_with_columns_aligned() -> None:
    lines = format_hits(["a"], [HITS], "table").splitlines()
    assert lines == [
        "  1  0.750  0:03-0:04.5, 1:01-1:02  /v/caf\\udce9.mp4",
        "  2  0.500                          /v/a\\nb\\x1b[31m\\u202e,\"'.mp4",
    ]


def test_several_queries_are_titled_and_apart() -> None:
    lines = format_hits(QUERIES, ANSWERS, "table").splitlines()
    assert lines[0] == "a red kite"
    assert lines[3:] == ["", "nothing\\nlike it", "  nothing above the threshold"]


def test_a_table_shows_three_moments_at_most() -> None:
    moments = tuple(Moment(s, s + 1.0, 0.5) for s in (1.0, 5.0, 9.0, 13.0))
    assert format_hits(["a"], [(Hit(1, "v", "/v", 0.5, moments),)], "table").count("-") == 3


@pytest.mark.parametrize("form", ["table", "json", "jsonl", "csv", "paths"])
def test_every_format_ends_its_last_line(form: str) -> None:
    assert format_hits(["a"], [HITS], form).endswith("\n")


def test_columns_are_as_wide_as_their_widest_cell_and_lines_have_no_trailing_blanks() -> None:
    table = format_table([["a\nb", "x"], ["longer", ""]], ["c", "what"])
    assert table == "c       what\na\\nb    x\nlonger\n"


def test_names_are_written_byte_for_byte(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    write_stdout(f"{NOT_UTF8} 名前\n")
    assert capfdbinary.readouterr().out == b"/v/caf\xe9.mp4 " + "名前\n".encode()


def test_a_full_disk_behind_standard_output_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.BytesIO):
        def write(self, data: object) -> int:
            raise OSError(28, "No space left on device")

    with (tmp_path / "out").open("wb") as target:
        full = Full()
        monkeypatch.setattr(full, "fileno", target.fileno, raising=False)
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(full))
        with pytest.raises(FinecoError, match=r"^cannot write the results: No space left on device$"):
            write_stdout("x")


@pytest.mark.parametrize(("count", "shown"), [(0, "0 videos"), (1, "1 video"), (2, "2 videos")])
def test_one_is_singular(count: int, shown: str) -> None:
    assert number_of(count, "video") == shown


def test_json_prints_paths_as_text() -> None:
    assert json.loads(to_json({"folder": Path("kitchen")})) == {"folder": "kitchen"}
