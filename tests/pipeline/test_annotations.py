"""Annotation files of every published format: what is read, what is refused and where, and the real files' counts."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.annotations import (
    Caption,
    Choice,
    Question,
    VideoList,
    read_answers,
    read_captions,
    read_choices,
    read_questions,
    read_video_list,
    recognise,
    restrict,
)
from pipeline.errors import UsageError

YOUCOOK: dict[str, Any] = {
    "database": {
        "aaa": {
            "duration": 99.5,
            "subset": "validation",
            "recipe_type": "226",
            "annotations": [{"segment": [47, 60], "id": 0, "sentence": "pick the ends off"}],
        },
        "bbb": {
            "subset": "training",
            "recipe_type": "113",
            "annotations": [{"segment": [1, 2.5], "id": 0, "sentence": "spread  margarine\n"}],
        },
    }
}
MSRVTT: dict[str, Any] = {
    "info": {},
    "videos": [
        {"video_id": "video1", "split": "train", "category": 9, "start time": 137.7, "end time": 149.4},
        {"video_id": "video7010", "split": "test", "category": 3, "start time": 401.5, "end time": 419.6},
    ],
    "sentences": [
        {"video_id": "video7010", "caption": "a man sings", "sen_id": 1},
        {"video_id": "video1", "caption": "a car drives", "sen_id": 2},
        {"video_id": "video7010", "caption": "someone sings", "sen_id": 3},
    ],
}


def write(folder: Path, content: Any, name: str = "file") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return path


def lines(*rows: Any) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def zipped(folder: Path, members: dict[str, str]) -> Path:
    path = folder / "annotations.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


# --------------------------------------------------------------------------------------------------------- formats


def test_youcookii_gives_one_subset_with_spans_and_recipes(tmp_path: Path) -> None:
    path = write(tmp_path, YOUCOOK)
    usual = read_captions(path)
    assert usual.rows == (Caption("aaa", "pick the ends off", 47.0, 60.0, "226"),)
    assert (usual.dataset, usual.subset) == ("youcookii", "validation")
    assert read_captions(path, subset="training").rows == (Caption("bbb", "spread margarine", 1.0, 2.5, "113"),)
    assert usual.clip_per_row


def test_milnce_csv_has_its_columns_in_any_order(tmp_path: Path) -> None:
    path = write(tmp_path, 'end,start,task,text,video_id\n60,47,226,"pick, then cut",xHr8\n')
    found = read_captions(path)
    assert found.rows == (Caption("xHr8", "pick, then cut", 47.0, 60.0, "226"),)
    assert (found.dataset, found.clip_per_row) == ("youcookii-milnce", True)


def test_msrvtt_captions_are_of_whole_videos_of_a_split(tmp_path: Path) -> None:
    """The times in the file are those of the film a clip was cut from."""
    path = write(tmp_path, MSRVTT)
    assert read_captions(path).rows == (
        Caption("video7010", "a man sings", label="3"),
        Caption("video7010", "someone sings", label="3"),
    )
    assert read_captions(path, subset="train").rows == (Caption("video1", "a car drives", label="9"),)


def test_a_zip_is_read_as_what_is_in_it(tmp_path: Path) -> None:
    plain = read_captions(write(tmp_path, MSRVTT))
    packed = zipped(tmp_path, {"data/x.json": json.dumps(MSRVTT), "readme.txt": "hello", "__MACOSX/x.json": "?"})
    found = read_captions(packed)
    assert found.rows == plain.rows
    assert found.sha256 == hashlib.sha256(packed.read_bytes()).hexdigest() != plain.sha256


def test_jsfusion_csv(tmp_path: Path) -> None:
    path = write(tmp_path, "key,vid_key,video_id,sentence\nret0,msr9770,video9770,a person connects\n")
    assert read_captions(path).rows == (Caption("video9770", "a person connects"),)
    assert recognise(path) == "msrvtt-1ka"


def test_our_captions_as_json_lines_and_as_csv(tmp_path: Path) -> None:
    rows = (Caption("a.mp4", "one"), Caption("b", "two", 1.5, 3.0))
    json_lines = lines({"video": "a.mp4", "caption": "one"}, "", {"video": "b", "text": "two", "start": 1.5, "end": 3})
    assert read_captions(write(tmp_path, json_lines)).rows == rows
    assert read_captions(write(tmp_path, "\ufeffvideo,caption,start,end\na.mp4,one,,\n\nb,two,1.5,3\n")).rows == rows
    assert not read_captions(write(tmp_path, json_lines)).clip_per_row


def test_choices(tmp_path: Path) -> None:
    path = write(tmp_path, lines({"video": "a", "options": ["x", "y"], "answer": 1}))
    assert read_choices(path).rows == (Choice("a", ("x", "y"), 1),)
    assert recognise(path) == "choices"


def test_questions_in_all_their_forms(tmp_path: Path) -> None:
    question = Question("video6513", "what plays?", "music")
    fields = {"question": "what plays?", "answer": "music"}
    for content in ({"0": {**fields, "video": "video6513"}}, [{**fields, "video_id": 6513, "id": 1}]):
        assert read_questions(write(tmp_path, content)).rows == (question,)
    assert read_questions(write(tmp_path, lines({**fields, "video": "video6513"}))).dataset == "questions"


def test_answers_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    assert read_answers(write(tmp_path, {"no": 1, "yes": 0})) == ("yes", "no")
    assert read_answers(write(tmp_path, ["yes", "no"])) == ("yes", "no")


def test_lists_of_videos_and_what_they_leave(tmp_path: Path) -> None:
    assert read_video_list(write(tmp_path, "video_id\nvideo0\nvideo7\n")).names == {"video0", "video7"}
    assert read_video_list(write(tmp_path, "405/-dh_uGa\n101/x\n")).names == {"-dh_uGa", "x"}
    found = read_captions(write(tmp_path, lines({"video": "a", "caption": "1"}, {"video": "b", "caption": "2"})))
    assert [row.video for row in restrict(found, VideoList(frozenset({"b", "c"}), "")).rows] == ["b"]
    with pytest.raises(UsageError, match="no annotated video is in the list"):
        restrict(found, VideoList(frozenset({"c"}), ""))


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(
    lambda text: text.replace("\0", "").strip()
)


@given(st.lists(st.tuples(texts, texts, st.none() | st.tuples(st.integers(0, 99), st.integers(0, 99))), min_size=1))
def test_any_captions_come_back_row_for_row(rows: list[tuple[str, str, tuple[int, int] | None]]) -> None:
    import tempfile

    written = [
        {"video": video, "caption": text} | ({} if span is None else {"start": span[0], "end": sum(span)})
        for video, text, span in rows
    ]
    with tempfile.TemporaryDirectory() as folder:
        found = read_captions(write(Path(folder), lines(*written))).rows
    assert len(found) == len(rows)
    for caption, (_, _, span) in zip(found, rows, strict=True):
        assert (caption.start_seconds, caption.end_seconds) == ((None, None) if span is None else (span[0], sum(span)))


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{", "not JSON"),
        ("[1]", "not an object"),
        ("[" * 100_000, "nested too deeply"),
        ({"caption": "x"}, "video is null, expected text"),
        ({"video": 7, "caption": "x"}, "video is 7"),
        ({"video": "a"}, "caption is null"),
        ({"video": "a", "caption": "  "}, "caption is"),
        ({"video": "a", "caption": "x", "start": 1}, "a span needs both"),
        ({"video": "a", "caption": "x", "start": 2, "end": 1}, "a span from 2 to 1 seconds"),
        ({"video": "a", "caption": "x", "start": -1, "end": 1}, "a span from -1"),
        ({"video": "a", "caption": "x", "start": True, "end": 1}, "start is True"),
        ({"video": "a", "caption": "x", "start": "soon", "end": 1}, "expected seconds"),
        ('{"video": "a", "caption": "x", "start": 0, "end": NaN}', "end is nan"),
        ('{"video": "a", "caption": "x", "start": 0, "end": 1' + "0" * 400 + "}", "too large"),
        ({"video": "a", "caption": "x" * 70_000}, "at most 65536"),
    ],
)
def test_a_bad_row_is_an_error_that_names_its_line(tmp_path: Path, row: Any, reason: str) -> None:
    path = write(tmp_path, lines({"video": "a", "caption": "fine"}, "", row))
    with pytest.raises(UsageError, match=r"bad rows") as caught:
        read_captions(path)
    assert f"{path}:3: " in str(caught.value) and reason in str(caught.value)


def test_a_broken_first_line_does_not_hide_what_the_file_is(tmp_path: Path) -> None:
    path = write(tmp_path, lines('{"video": ', {"video": "a", "caption": "fine"}))
    with pytest.raises(UsageError, match=f"{path}:1: not JSON"):
        read_captions(path)


def test_many_bad_rows_are_counted_and_the_first_are_shown(tmp_path: Path) -> None:
    path = write(tmp_path, lines(*[{"video": "a"}] * 25))
    with pytest.raises(UsageError, match=r"\(and 15 more\)"):
        read_captions(path, "captions")


@pytest.mark.parametrize(
    ("text", "where", "reason"),
    [
        ("video,caption\na,b\nc\n", 3, "1 fields, the header has 2"),
        ('video,caption\na,"b\n\nc"d\n', 2, "not CSV"),
        ('video,caption\na,b\nc,"d\n', 3, "not CSV"),
        ("end,start,task,text,video_id\n1,0,9,x,v\n1,zero,9,x,v\n", 3, "expected seconds"),
        ("key,vid_key,video_id,sentence\na,b,,x\n", 2, "video is"),
    ],
)
def test_bad_csv_rows_name_their_line(tmp_path: Path, text: str, where: int, reason: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        read_captions(path)
    assert f"{path}:{where}: " in str(caught.value) and reason in str(caught.value)


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda d: d["database"]["aaa"]["annotations"].append({"segment": [3]}), "database['aaa'].annotations[1]"),
        (lambda d: d["database"]["aaa"]["annotations"].append({"segment": [3, 1], "sentence": "x"}), "from 3 to 1"),
        (lambda d: d["database"].update(ccc=[]), "database['ccc']"),
    ],
)
def test_bad_places_of_a_json_file_are_named(tmp_path: Path, change: Any, place: str) -> None:
    content = json.loads(json.dumps(YOUCOOK))
    change(content)
    with pytest.raises(UsageError) as caught:
        read_captions(write(tmp_path, content))
    assert place in str(caught.value)


def test_a_sentence_of_an_unknown_video_is_refused(tmp_path: Path) -> None:
    content = {**MSRVTT, "sentences": [*MSRVTT["sentences"], {"video_id": "video9", "caption": "x"}]}
    with pytest.raises(UsageError, match=r"sentences\[3\]: its video_id 'video9' is not among"):
        read_captions(write(tmp_path, content))
    content["sentences"][-1] = {"video_id": ["unhashable"], "caption": "x"}
    with pytest.raises(UsageError, match=r"sentences\[3\]"):
        read_captions(write(tmp_path, content))


@pytest.mark.parametrize(
    "row", [{"options": ["x"], "answer": 0}, {"options": ["x", "y"], "answer": 2}, {"options": ["x", ""], "answer": 0}]
)
def test_bad_choices_name_their_line(tmp_path: Path, row: dict[str, Any]) -> None:
    path = write(tmp_path, lines({"video": "a", "options": ["x", "y"], "answer": 0}, {"video": "a", **row}))
    with pytest.raises(UsageError, match=f"{path}:2: "):
        read_choices(path)


@pytest.mark.parametrize("content", ["", "\n", "video_id\nvideo1\n", "{}", "[]", '{"yes": 0, "video": 1}', "a b c\n"])
def test_files_of_no_known_format_are_told_so(tmp_path: Path, content: str) -> None:
    with pytest.raises(UsageError, match=r"no annotation format|empty"):
        read_captions(write(tmp_path, content))


def test_a_format_can_be_forced_but_not_onto_other_content(tmp_path: Path) -> None:
    path = write(tmp_path, lines({"video": "a", "caption": "x", "options": ["x", "y"], "answer": 0}))
    assert recognise(path) == "choices"
    assert read_captions(path, "captions").rows == (Caption("a", "x"),)
    for dataset, reason in (("youcookii", "its content is choices"), ("imagenet", "unknown dataset")):
        with pytest.raises(UsageError, match=reason):
            read_captions(path, dataset)
    with pytest.raises(UsageError, match="choices has no questions"):
        read_questions(path)


def test_which_subset_is_asked_where_it_is_not_clear(tmp_path: Path) -> None:
    path = write(tmp_path, MSRVTT)
    with pytest.raises(UsageError, match=r"no subset 'val'.*\n.*test, train"):
        read_captions(path, subset="val")
    undecided = {**MSRVTT, "videos": [{**v, "split": s} for v, s in zip(MSRVTT["videos"], "ab", strict=True)]}
    with pytest.raises(UsageError, match=r"which subset\?\n.*a, b"):
        read_captions(write(tmp_path, undecided))
    with pytest.raises(UsageError, match="has no subsets"):
        read_captions(write(tmp_path, lines({"video": "a", "caption": "x"})), subset="test")


def test_what_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.annotation_files.MAX_FILE_BYTES", 10_000)
    bomb = zipped(tmp_path, {"x.json": '{"database": {' + " " * 1_000_000 + "}}"})
    assert bomb.stat().st_size < 10_000
    with pytest.raises(UsageError, match="unpacks to more than 10000 bytes"):
        read_captions(bomb)
    data = bomb.read_bytes().replace((1_000_016).to_bytes(4, "little"), (16).to_bytes(4, "little"))
    bomb.write_bytes(data)  # a directory that lies about the length
    with pytest.raises(UsageError, match=r"zip|unpacks|format|empty"):
        read_captions(bomb)
    with pytest.raises(UsageError, match="at most 10000 are read"):
        read_captions(write(tmp_path, " " * 10_001))


def test_zips_that_cannot_be_read_are_told_so(tmp_path: Path) -> None:
    two = zipped(tmp_path, {"a.json": "{}", "b.json": "{}"})
    with pytest.raises(UsageError, match="2 JSON files in it"):
        read_captions(two)
    whole = zipped(tmp_path, {"a.json": json.dumps(MSRVTT)}).read_bytes()
    for broken in (whole[:-40], whole[:60] + b"\xff" * 40 + whole[100:]):
        two.write_bytes(broken)
        with pytest.raises(UsageError, match="zip"):
            read_captions(two)


def test_files_that_are_no_text_are_told_so(tmp_path: Path) -> None:
    path = tmp_path / "latin.csv"
    path.write_bytes(b"video,caption\na,caf\xe9\n")
    with pytest.raises(UsageError, match=f"{path}:2: not UTF-8"):
        read_captions(path)
    with pytest.raises(UsageError, match="No such file"):
        read_captions(tmp_path / "absent")
    with pytest.raises(UsageError, match="not a file"):
        read_captions(tmp_path)


@pytest.mark.parametrize("content", ['{"a": "b"}', "[]", "[1]", "{", '["a", "a"]', "[" * 100_000])
def test_answers_that_are_no_list_are_told_so(tmp_path: Path, content: str) -> None:
    with pytest.raises(UsageError, match=r"answers|JSON|twice"):
        read_answers(write(tmp_path, content))


@pytest.mark.parametrize("content", ["", "video_id\n", '{"video": "a"}\n', "a,b\n"])
def test_what_is_no_list_of_videos_is_told_so(tmp_path: Path, content: str) -> None:
    with pytest.raises(UsageError, match=r"not a list of videos|no video in it"):
        read_video_list(write(tmp_path, content))


# -------------------------------------------------------------------------------------------------- the real files


@pytest.mark.parametrize(
    ("name", "subset", "dataset", "n_rows", "n_videos", "n_texts"),
    [
        ("youcookii_annotations_trainval.json", None, "youcookii", 3492, 457, None),
        ("youcookii_annotations_trainval.json", "training", "youcookii", 10337, 1333, None),
        ("milnce_validation_youcook.csv", None, "youcookii-milnce", 3350, 436, 3273),
        ("MSRVTT_JSFUSION_test.csv", None, "msrvtt-1ka", 1000, 1000, 995),
        ("msrvtt_test_videodatainfo.json.zip", None, "msrvtt", 59800, 2990, None),
        ("msrvtt_train_val_annotation.zip", "validate", "msrvtt", 9940, 497, None),
        ("../captions.jsonl", None, "captions", 66, 33, None),
        ("../moments.jsonl", None, "captions", 8, 1, None),
    ],
)
def test_the_published_files_have_their_published_counts(
    shared: Path, name: str, subset: str | None, dataset: str, n_rows: int, n_videos: int, n_texts: int | None
) -> None:
    found = read_captions(shared / "data" / "annotations" / name, subset=subset)
    assert found.dataset == dataset
    assert (len(found.rows), len({row.video for row in found.rows})) == (n_rows, n_videos)
    if n_texts is not None:
        assert len({row.text for row in found.rows}) == n_texts


def test_the_share_of_long_clips_is_the_documented_one(shared: Path) -> None:
    rows = read_captions(shared / "data" / "annotations" / "milnce_validation_youcook.csv").rows
    lengths = [row.end_seconds - row.start_seconds for row in rows if row.start_seconds is not None and row.end_seconds]
    assert 100 * sum(length > 32 for length in lengths) / len(rows) == pytest.approx(15.4, abs=0.05)


def test_every_msrvtt_test_video_has_twenty_captions(shared: Path) -> None:
    rows = read_captions(shared / "data" / "annotations" / "msrvtt_test_videodatainfo.json.zip").rows
    counts: dict[str, int] = {}
    for row in rows:
        counts[row.video] = counts.get(row.video, 0) + 1
    assert set(counts.values()) == {20}


def test_the_real_questions_answers_and_lists(shared: Path) -> None:
    folder = shared / "data" / "annotations"
    questions = read_questions(folder / "malmm_msrvtt_qa_val.json")
    answers = read_answers(folder / "malmm_msrvtt_qa_ans2label.json")
    assert (questions.dataset, len(questions.rows), len(answers)) == ("msrvtt-qa", 12278, 1500)
    assert sum(row.answer in set(answers) for row in questions.rows) == 11419
    assert len(read_answers(folder / "chatunivi_msrvtt_a_list.json")) == 4173
    sizes = {"MSRVTT_train.9k.csv": 9000, "MSRVTT_train.7k.csv": 7010, "youcookii_val_list.txt": 457}
    for name, size in sizes.items():
        assert len(read_video_list(folder / name).names) == size
    youcook = read_captions(folder / "youcookii_annotations_trainval.json")
    assert {row.video for row in youcook.rows} == read_video_list(folder / "youcookii_val_list.txt").names
