"""Annotation files as they are published, read whole: captions with spans, multiple choice, questions with answers.

    name               content
    youcookii          YouCookII's JSON: database -> video -> segments with a sentence; subsets, recipe numbers
    youcookii-milnce   MIL-NCE's CSV of its validation clips: end,start,task,text,video_id
    msrvtt             MSR-VTT's JSON: videos with a split, sentences; plain or inside its zip
    msrvtt-1ka         JSFusion's CSV of 1,000 pairs: key,vid_key,video_id,sentence
    msrvtt-qa          questions with one answer each: {id: {question, answer, video}} or a list of such objects
    captions           ours: JSON lines or CSV of video, caption (or text), perhaps start and end in seconds
    choices            ours: JSON lines of video, options, answer (the position of the right option, from 0)
    questions          ours: JSON lines of video, question, answer

The format is told from the content; nothing is guessed from a file's name. A file is data from elsewhere: its size and
what it unpacks to are bounded, and every row is checked. A bad row is an error that names its line (in a JSON file, its
place), because an evaluation that leaves rows out measures something else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

from pipeline.annotation_files import BadRow, csv_rows, json_lines, read_text
from pipeline.errors import UsageError
from pipeline.texts import clean_text

MAX_ROWS = 5_000_000
MAX_PROBLEMS_SHOWN = 10
DEFAULT_SUBSETS = {"youcookii": "validation", "msrvtt": "test"}
DATASETS = (
    "youcookii",
    "youcookii-milnce",
    "msrvtt",
    "msrvtt-1ka",
    "msrvtt-qa",
    "captions",
    "choices",
    "questions",
)
LINE_FORMATS = ("captions", "choices", "questions")
LINES_LOOKED_AT = 100  # to recognise JSON lines, of which some may be broken


@dataclass(frozen=True, slots=True)
class Caption:
    """A sentence about a video, or about the part of it from start to end in seconds (both None: all of it).

    `video` is its name there (an id, or a file's name); `label` the dataset's own class, a recipe or a category.
    """

    video: str
    text: str
    start_seconds: float | None = None
    end_seconds: float | None = None
    label: str = ""


@dataclass(frozen=True, slots=True)
class Choice:
    """A video, sentences to choose from, and the position of the right one."""

    video: str
    options: tuple[str, ...]
    answer: int


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a video and its one right answer."""

    video: str
    question: str
    answer: str


Row = TypeVar("Row", Caption, Choice, Question)


@dataclass(frozen=True, slots=True)
class Annotations(Generic[Row]):
    """The rows of one file, in its order.

    Attributes:
        dataset: One of `DATASETS`.
        subset: The part of the file that was read; "" where it has no parts.
        sha256: Of the file's bytes, as it lies on disk.
    """

    dataset: str
    subset: str
    sha256: str
    rows: tuple[Row, ...]

    @property
    def clip_per_row(self) -> bool:
        """Whether each row is a clip of its own, as YouCookII's protocol has it, even where two rows share a span."""
        return self.dataset.startswith("youcookii")


@dataclass(frozen=True, slots=True)
class _Content:
    """A file's text and what it was recognised as; `value` is its parsed JSON, None of CSV and JSON lines."""

    path: Path
    sha256: str
    text: str
    dataset: str
    value: Any


def read_captions(path: Path, dataset: str | None = None, subset: str | None = None) -> Annotations[Caption]:
    """The captions of a file of any of the formats that have them.

    Args:
        dataset: Forces a format; None tells it from the content.
        subset: Which part of a file with several; None takes the one it is usually evaluated on (validation of
            YouCookII, test of MSR-VTT), or the only one there.

    Raises:
        UsageError: No such file, format or subset; or a bad row, with its line and the reason.
    """
    content = _open(path, dataset)
    readers: dict[str, Callable[[_Content, str], Iterator[Caption | BadRow]]] = {
        "youcookii": _youcookii,
        "youcookii-milnce": _milnce,
        "msrvtt": _msrvtt,
        "msrvtt-1ka": _jsfusion,
        "captions": _own_captions,
    }
    if content.dataset not in readers:
        raise UsageError(f"{path}: {content.dataset} has no captions", f"Captions are in {', '.join(readers)}.")
    part = _subset_of(content, subset)
    return Annotations(content.dataset, part, content.sha256, _rows(path, readers[content.dataset](content, part)))


def read_choices(path: Path) -> Annotations[Choice]:
    """A multiple-choice list. Raises as `read_captions`."""
    content = _open(path, "choices")
    return Annotations(content.dataset, "", content.sha256, _rows(path, _own_choices(content)))


def read_questions(path: Path, dataset: str | None = None) -> Annotations[Question]:
    """Questions with their answers. Raises as `read_captions`."""
    content = _open(path, dataset)
    readers = {"msrvtt-qa": _msrvtt_qa, "questions": _own_questions}
    if content.dataset not in readers:
        raise UsageError(f"{path}: {content.dataset} has no questions", f"Questions are in {', '.join(readers)}.")
    return Annotations(content.dataset, "", content.sha256, _rows(path, readers[content.dataset](content)))


def recognise(path: Path) -> str:
    """Which of `DATASETS` a file is. Raises UsageError if it is none."""
    return _open(path, None).dataset


def read_answers(path: Path) -> tuple[str, ...]:
    """The answers a question may have: a JSON list, or an object answer -> number (in the order of the numbers).

    Raises:
        UsageError: It is neither, or an answer occurs twice.
    """
    text, _ = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not JSON ({error})", "Give a list of answers.") from error
    if isinstance(value, dict) and all(isinstance(number, int) for number in value.values()):
        value = sorted(value, key=value.__getitem__)
    if not isinstance(value, list) or not value or not all(isinstance(answer, str) for answer in value):
        raise UsageError(f"{path}: not a list of answers", 'Give ["yes", "no"] or {"yes": 0, "no": 1}.')
    if len(set(value)) < len(value):
        twice = next(answer for i, answer in enumerate(value) if answer in value[:i])
        raise UsageError(f"{path}: the answer {twice!r:.80} occurs twice")
    return tuple(value)


@dataclass(frozen=True, slots=True)
class VideoList:
    """Names of videos, and the SHA-256 of the file they are from."""

    names: frozenset[str]
    sha256: str


def restrict(annotations: Annotations[Row], videos: VideoList) -> Annotations[Row]:
    """The annotations of the listed videos. Raises UsageError if there is none."""
    rows = tuple(row for row in annotations.rows if row.video in videos.names)
    if not rows:
        raise UsageError("no annotated video is in the list of videos", "Both name videos in the same way.")
    return replace(annotations, rows=rows)


def read_video_list(path: Path) -> VideoList:
    """A list of videos: MSR-VTT's CSV of one column `video_id`, YouCookII's lines `recipe/id`, or a name a line.

    Raises:
        UsageError: It is something else, or empty.
    """
    text, sha256 = read_text(path)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if lines and lines[0] == "video_id":
        del lines[0]
    if bad := next((i for i, line in enumerate(lines, 1) if line[0] in '{["' or "," in line), 0):
        raise UsageError(
            f"{path}: not a list of videos (line {bad} of it: {lines[bad - 1][:40]!r})", "One name a line."
        )
    if not lines:
        raise UsageError(f"{path}: no video in it", "One name a line.")
    return VideoList(frozenset(line.rpartition("/")[2] for line in lines), sha256)


# ---------------------------------------------------------------------------------------------- bytes to known format


def _open(path: Path, dataset: str | None) -> _Content:
    if dataset is not None and dataset not in DATASETS:
        raise UsageError(f"unknown dataset {dataset!r}", f"Choose one of {', '.join(DATASETS)}.")
    text, sha256 = read_text(path)
    if not text.strip():
        raise UsageError(f"{path}: the file is empty")
    value, problem = None, ""
    if text.lstrip()[0] in "{[":
        try:
            value = json.loads(text)
        except RecursionError:
            problem = "nested too deeply"
        except ValueError as error:
            problem = str(error)
        if isinstance(value, dict) and isinstance(value.get("video"), str):  # JSON lines, of which there is one
            value = None
    found = _told_from(text, value)
    if dataset is None and found is None:
        reason = f"not one whole JSON value ({problem}), and " if problem else ""
        raise UsageError(
            f"{path}: {reason}no annotation format that is known here",
            'Known are lines such as {"video": "clip.mp4", "caption": "someone whisks eggs"}, and the files of '
            f"{', '.join(DATASETS)}.",
        )
    if dataset in LINE_FORMATS and value is None:
        found = dataset  # its rows say line by line what they lack
    if dataset is not None and found != dataset:
        what = f"its content is {found}" if found else f"its content is not that format{problem and f' ({problem})'}"
        raise UsageError(f"{path}: asked to read it as {dataset}, but {what}")
    return _Content(path, sha256, text, found or "", value)


def _told_from(text: str, value: Any) -> str | None:
    """The format of a file, by its outermost keys or its header."""
    if isinstance(value, dict):
        if isinstance(value.get("database"), dict):
            return "youcookii"
        if isinstance(value.get("videos"), list) and isinstance(value.get("sentences"), list):
            return "msrvtt"
        value = list(value.values())
    if isinstance(value, list):
        first = value[0] if value else None
        return "msrvtt-qa" if isinstance(first, dict) and {"question", "answer"} <= first.keys() else None
    line = next(line for line in text.splitlines() if line.strip())
    if line.lstrip().startswith("{"):
        kinds = {"choices": "options", "questions": "question", "captions": "video"}
        rows = [row for _, row in islice(json_lines(text), LINES_LOOKED_AT) if isinstance(row, dict)]
        named = [row.keys() for row in rows if isinstance(row.get("video"), str)]
        return next((kind for kind, key in kinds.items() if any(key in keys for keys in named)), None)
    header = {name.strip() for name in line.split(",")}
    if {"end", "start", "text", "video_id"} <= header:
        return "youcookii-milnce"
    if {"video_id", "sentence"} <= header:
        return "msrvtt-1ka"
    return "captions" if "video" in header and header & {"caption", "text"} else None


def _subset_of(content: _Content, wanted: str | None) -> str:
    """Which subset to read: the one wanted, the usual one, or the only one."""
    if content.dataset not in DEFAULT_SUBSETS:
        if wanted:
            raise UsageError(f"{content.path}: {content.dataset} has no subsets", "Leave --subset out.")
        return ""
    if content.dataset == "youcookii":
        there = [video.get("subset") for video in content.value["database"].values() if isinstance(video, dict)]
    else:
        there = [video.get("split") for video in content.value["videos"] if isinstance(video, dict)]
    names = sorted({name for name in there if isinstance(name, str)})
    default = DEFAULT_SUBSETS[content.dataset]
    part = wanted or (default if default in names else names[0] if len(names) == 1 else None)
    if part not in names:
        asked = f"no subset {wanted!r} in it" if wanted else "which subset?"
        raise UsageError(f"{content.path}: {asked}", f"It has {', '.join(names) or 'none'}; name one with --subset.")
    return part


def _rows(path: Path, found: Iterable[Row | BadRow]) -> tuple[Row, ...]:
    """All rows. Raises UsageError with the first bad ones."""
    rows: list[Row] = []
    problems: list[str] = []
    n_bad = 0
    for row in found:
        if isinstance(row, BadRow):
            n_bad += 1
            problems += [f"{path}:{row}"] if n_bad <= MAX_PROBLEMS_SHOWN else []
        else:
            rows.append(row)
        if len(rows) > MAX_ROWS:
            raise UsageError(f"{path}: more than {MAX_ROWS} rows")
    if problems:
        more = f"\n(and {n_bad - len(problems)} more)" if n_bad > len(problems) else ""
        raise UsageError("bad rows in the annotations:\n" + "\n".join(problems) + more)
    if not rows:
        raise UsageError(f"{path}: no row in it")
    return tuple(rows)


# ------------------------------------------------------------------------------------------------- the formats' rows


def _youcookii(content: _Content, subset: str) -> Iterator[Caption | BadRow]:
    for name, video in content.value["database"].items():
        if not isinstance(video, dict) or not isinstance(video.get("annotations"), list):
            yield BadRow(f"database[{name!r}]", 'no list "annotations"')
        elif video.get("subset") == subset:
            label = str(video.get("recipe_type", ""))
            for number, segment in enumerate(video["annotations"]):
                yield _checked(f"database[{name!r}].annotations[{number}]", _segment, name, segment, label)


def _segment(name: str, segment: Any, label: str) -> Caption:
    if not isinstance(segment, dict) or not isinstance(segment.get("segment"), list) or len(segment["segment"]) != 2:
        raise ValueError('no "segment" of two times')
    start, end = segment["segment"]
    return _caption(name, segment.get("sentence"), start, end, label)


def _milnce(content: _Content, subset: str) -> Iterator[Caption | BadRow]:
    for line, row in csv_rows(content.text):
        if isinstance(row, BadRow):
            yield row
        else:
            yield _checked(line, _timed, row["video_id"], row["text"], row["start"], row["end"], row.get("task", ""))


def _jsfusion(content: _Content, subset: str) -> Iterator[Caption | BadRow]:
    for line, row in csv_rows(content.text):
        yield row if isinstance(row, BadRow) else _checked(line, _caption, row["video_id"], row["sentence"])


def _msrvtt(content: _Content, subset: str) -> Iterator[Caption | BadRow]:
    # The times beside a video are those in the film it was cut from; the files people have are the cut clips.
    labels: dict[str, str | None] = {}
    for number, video in enumerate(content.value["videos"]):
        if not isinstance(video, dict) or not isinstance(video.get("video_id"), str):
            yield BadRow(f"videos[{number}]", 'no text "video_id"')
        else:
            labels[video["video_id"]] = str(video.get("category", "")) if video.get("split") == subset else None
    for number, sentence in enumerate(content.value["sentences"]):
        name = sentence.get("video_id") if isinstance(sentence, dict) else None
        if not isinstance(name, str) or name not in labels:
            yield BadRow(f"sentences[{number}]", f"its video_id {name!r:.40} is not among the videos")
        elif (label := labels[name]) is not None:
            yield _checked(f"sentences[{number}]", _caption, name, sentence.get("caption"), None, None, label)


def _msrvtt_qa(content: _Content) -> Iterator[Question | BadRow]:
    pairs = content.value.items() if isinstance(content.value, dict) else enumerate(content.value)
    for key, row in pairs:
        yield _checked(f"[{key!r}]", _question, row)


def _own_captions(content: _Content, subset: str) -> Iterator[Caption | BadRow]:
    for line, row in json_lines(content.text) if content.text.lstrip()[0] == "{" else csv_rows(content.text):
        if isinstance(row, BadRow):
            yield row
        else:
            start, end = (None if row.get(name) == "" else row.get(name) for name in ("start", "end"))
            yield _checked(line, _timed, row.get("video"), row.get("caption", row.get("text")), start, end)


def _own_choices(content: _Content) -> Iterator[Choice | BadRow]:
    for line, row in json_lines(content.text):
        yield row if isinstance(row, BadRow) else _checked(line, _choice, row)


def _own_questions(content: _Content) -> Iterator[Question | BadRow]:
    for line, row in json_lines(content.text):
        yield row if isinstance(row, BadRow) else _checked(line, _question, row)


# ------------------------------------------------------------------------------------------------ one row, its fields


def _checked(place: str, make: Callable[..., Row], *fields: Any) -> Row | BadRow:
    try:
        return make(*fields)
    except (ValueError, OverflowError) as error:
        return BadRow(place, str(error))


def _caption(video: Any, text: Any, start: Any = None, end: Any = None, label: str = "") -> Caption:
    video, text = _text("video", video), _text("caption", text)
    if start is None and end is None:
        return Caption(video, text, label=label)
    if start is None or end is None:
        raise ValueError("a span needs both a start and an end")
    start, end = _seconds("start", start), _seconds("end", end)
    if not 0 <= start <= end:
        raise ValueError(f"a span from {start:g} to {end:g} seconds")
    return Caption(video, text, start, end, label)


def _timed(video: Any, text: Any, start: Any, end: Any, label: str = "") -> Caption:
    """As `_caption`; the times may be text, as CSV has them."""
    try:
        start, end = (float(time) if isinstance(time, str) else time for time in (start, end))
    except ValueError:
        raise ValueError(f"start {start!r:.40}, end {end!r:.40}: expected seconds") from None
    return _caption(video, text, start, end, label)


def _choice(row: dict[str, Any]) -> Choice:
    options, answer = row.get("options"), row.get("answer")
    if not isinstance(options, list) or len(options) < 2:
        raise ValueError('no "options", a list of two sentences or more')
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(options):
        raise ValueError(f"answer {answer!r:.40}: expected a position from 0 to {len(options) - 1}")
    return Choice(_text("video", row.get("video")), tuple(_text("option", option) for option in options), answer)


def _question(row: Any) -> Question:
    if not isinstance(row, dict):
        raise ValueError("not an object")
    video = row.get("video", row.get("video_id"))
    if isinstance(video, int) and not isinstance(video, bool):
        video = f"video{video}"  # the official list numbers them
    return Question(_text("video", video), _text("question", row.get("question")), _text("answer", row.get("answer")))


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not (text := clean_text(value)):
        raise ValueError(f"{name} is {json.dumps(value, default=str):.40}, expected text")
    return text


def _seconds(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r:.40}, expected seconds")
    return float(value)
