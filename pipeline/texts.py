"""The text beside a video: captions, titles and subtitles in files that share its name.

For `clip.mp4` these count, all that are there, in this order (the extension in any case):

    clip.txt                            every non-empty line is a text about the whole video
    clip.json                           "text", [text, ...] or an object with any of JSON_KEYS
    clip.srt clip.vtt clip.en-US.srt    cues with their time; one language suffix may stand between

A text is NFC, has single spaces and no NUL, and at most 64 KiB. Subtitle markup is removed and its HTML entities are
decoded; txt and json are plain text and stay as written; nothing in them is ever run. A file is UTF-8, or UTF-16 or
UTF-32 by its mark; whatever is read otherwise, replaced, cut or left out becomes a note. A broken file never costs the
video. Files, bytes, lines and texts are bounded, so that neither costs more than some seconds.
"""

from __future__ import annotations

import bisect
import html
import json
import os
import re
import stat
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline.types import TimedText

MAX_FILE_BYTES = 10 * 2**20
MAX_FILES = 100  # beside one video: a subtitle may come in many languages
MAX_FILES_BYTES = 32 * 2**20  # of all of them
MAX_TEXTS = 100_000
MAX_TEXT_BYTES = 64 * 2**10
MAX_MARKS = 30  # combining marks in a row, as Unicode's stream-safe form has it: NFC takes quadratic time on them
JSON_KEYS = ("caption", "captions", "texts", "title", "description", "segments")  # segments: what whisper writes

# Captions that roll repeat a line in the next cue; the cues touch, or are a few frames apart.
ROLLING_GAP_SECONDS = 0.1

# What follows "clip.": the suffix is a language as in BCP 47, with "_" tolerated.
_SIDECAR = re.compile(r"(?:(?P<plain>txt|json)|(?:[a-z]{2,3}(?:[-_][a-z0-9]{2,8})*\.)?(?P<subtitle>srt|vtt))")
_ESCAPED = re.compile("[\udc80-\udcff]")
_MARKS = re.compile(rb"[^\0]{%d}" % (MAX_MARKS + 1))  # in a text's combining classes
_TIMING = re.compile(r"\d[.,]\d{1,3}[ \t]*-->")
_TIME = r"(?:(\d{1,4}):)?([0-5]?\d):([0-5]?\d)[.,](\d{1,3})"
_SPAN = re.compile(rf"[ \t]*{_TIME}[ \t]*-->[ \t]*{_TIME}(?![\d:.,])")
_NOT_TEXT = re.compile(rb"[\0-\x08\x0e-\x19\x1c-\x1f]")  # no encoding of one byte a character has them in a text
_BYTE_ORDER_MARKS = (  # UTF-32's first: UTF-16's is the start of it
    (b"\xff\xfe\0\0", "utf-32"),
    (b"\0\0\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
# No alternative may cross the next opening bracket: the search stays linear on a file of nothing but "<a<a<a".
_MARKUP = re.compile(r"</?[A-Za-z][^<>]*>|<[\d:.]+>|\{\\[^{}]*\}")


class Cue(NamedTuple):
    """One subtitle: its time in seconds and its lines, clean and not empty."""

    start: float
    end: float
    lines: tuple[str, ...]


def read_texts(
    video_path: Path, names_in_folder: Collection[str] | None = None
) -> tuple[tuple[TimedText, ...], tuple[str, ...]]:
    """The texts beside a video, and one line per thing that could not be used.

    Args:
        names_in_folder: The names to consider; any superset of the video's own files. None: list its folder.
    """
    if names_in_folder is None:
        try:
            names_in_folder = [entry.name for entry in video_path.parent.iterdir()]
        except OSError as error:
            return (), (f"{str(video_path.parent)!r}: {error.strerror or error}",)
    texts: list[TimedText] = []
    notes: list[str] = []
    own = list(_own_files(video_path.stem, names_in_folder))
    if len(own) > MAX_FILES:
        notes.append(f"{str(video_path)!r}: {len(own)} files of text beside it, the first {MAX_FILES} are read")
    left_bytes = MAX_FILES_BYTES
    for name, kind in own[:MAX_FILES]:
        path = video_path.with_name(name)
        try:
            data = read_file(path, MAX_FILE_BYTES)
            if len(data) > left_bytes:
                raise ValueError(f"left out: the files of text beside the video have more than {MAX_FILES_BYTES} bytes")
            left_bytes -= len(data)
            found, problems = _parse(data, kind)
        except (OSError, ValueError) as error:
            found, problems = [], [getattr(error, "strerror", None) or str(error)]
        texts += found
        notes += [f"{str(path)!r}: {line}" for line in _summary(problems)]
    unique = tuple(dict.fromkeys(texts))
    if len(unique) > MAX_TEXTS:
        notes.append(f"{str(video_path)!r}: {len(unique)} texts, the first {MAX_TEXTS} are used")
    return unique[:MAX_TEXTS], tuple(notes)


def read_file(path: Path, most_bytes: int) -> bytes:
    """The bytes of a regular file.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no regular file, or has more bytes.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("not a regular file")  # to open a pipe would wait for its writer, a device may do anything
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        if status.st_size > most_bytes:
            raise ValueError(f"{status.st_size} bytes, at most {most_bytes} are read")
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise ValueError(f"it grew while it was read; at most {most_bytes} bytes are read")
    return data


def is_sidecar(name: str) -> bool:
    """Whether a file of this name can hold the text of some video."""
    return name[-5:].lower().endswith((".txt", ".json", ".srt", ".vtt"))


def names_beside(stem: str, sorted_names: Sequence[str]) -> list[str]:
    """The names that start with `stem` and a dot, out of the sorted names of a folder."""
    first = bisect.bisect_left(sorted_names, stem + ".")
    return list(sorted_names[first : bisect.bisect_left(sorted_names, stem + "/")])  # "/" comes next after "."


def clean_text(text: str) -> str:
    """One line of NFC text without NUL; "" if nothing is left.

    Raises:
        ValueError: Over MAX_TEXT_BYTES, over MAX_MARKS, or with bytes that were not UTF-8 (as surrogateescape keeps
            them).
    """
    text = " ".join(text.replace("\0", "").split())
    if not text.isascii() and _ESCAPED.search(text):
        raise ValueError("text that is not UTF-8")
    # Half of a surrogate pair (an emoji cut in two) is valid in JSON and nowhere else: it becomes "?".
    size = len(text) if text.isascii() else len(text.encode("utf-8", "replace"))
    if size > MAX_TEXT_BYTES:
        raise ValueError(f"text of {size} bytes, at most {MAX_TEXT_BYTES} are read")
    if text.isascii():
        return text
    _check_marks(text)
    text = unicodedata.normalize("NFC", text.encode("utf-8", "replace").decode())
    _check_marks(text)  # where composing made the row longer, to clean it again would refuse it
    return text


def _check_marks(text: str) -> None:
    if _MARKS.search(bytes(map(unicodedata.combining, text))):
        raise ValueError(f"text with more than {MAX_MARKS} combining marks in a row")


def texts_from_json(value: object, keys: Collection[str] = JSON_KEYS) -> tuple[list[TimedText], list[str]]:
    """The texts of a parsed JSON value, and what is wrong with the rest.

    Args:
        value: A text; a list of texts or of {"text": ..., "start": seconds, "end": seconds}; or an object whose
            `keys` hold such values, where `start` and `end` belong to its `caption`.
    """
    if isinstance(value, dict):
        entries: list[object] = []
        for key in keys:
            if key == "caption" and ("start" in value or "end" in value):
                entries.append({name: value.get(name) for name in ("caption", "start", "end")})
            elif isinstance(content := value.get(key), list):
                entries += content
            elif content is not None:
                entries.append(content)
    else:
        entries = value if isinstance(value, list) else [value]
    texts: list[TimedText] = []
    problems: list[str] = []
    if len(entries) > MAX_TEXTS:
        problems.append(f"{len(entries)} texts in it, the first {MAX_TEXTS} are read")
    for entry in entries[:MAX_TEXTS]:
        try:
            text = _timed_text(entry)
        except ValueError as error:
            problems.append(str(error))
        else:
            if text.text:
                texts.append(text)
    return texts, problems


def _timed_text(entry: object) -> TimedText:
    """A text with or without a span. Raises ValueError with the reason if it is neither."""
    start = end = None
    if isinstance(entry, dict):
        start, end = entry.get("start"), entry.get("end")
        entry = entry.get("text", entry.get("caption"))
        if entry is None and start is None and end is None:
            raise ValueError('an object without "text"')
        for name, seconds in (("start", start), ("end", end)):
            if seconds is not None and (isinstance(seconds, bool) or not isinstance(seconds, int | float)):
                raise ValueError(f"{name} is {seconds!r:.40}, expected seconds")
        if start is not None and not entry:
            raise ValueError("a span without a text")
    if not isinstance(entry, str):
        raise ValueError(f"{json.dumps(entry, default=str):.40} is not a text")
    text = clean_text(entry)
    try:
        return TimedText(text, None if start is None else float(start), None if end is None else float(end))
    except OverflowError:
        raise ValueError("a span must be finite") from None


def _own_files(stem: str, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Name and kind (`txt`, `json`, `srt`, `vtt`) of the files that belong to the video `stem`, in reading order."""
    own: list[tuple[int, str, str]] = []
    for name in names:
        if name.startswith(stem + ".") and (match := _SIDECAR.fullmatch(name[len(stem) + 1 :].lower())):
            kind = match["plain"] or match["subtitle"]
            own.append((("txt", "json", "srt", "vtt").index(kind), name, kind))
    for _, name, kind in sorted(own):
        yield name, kind


def _parse(data: bytes, kind: str) -> tuple[list[TimedText], list[str]]:
    """Texts and problems of one file's bytes. Raises ValueError if nothing of it can be used."""
    content, problems = _decode(data)
    if kind == "txt":
        texts, more = texts_from_json(content.splitlines())
    elif kind == "json":
        try:
            value = json.loads(content)
        except RecursionError:
            raise ValueError("nested too deeply") from None
        except ValueError as error:
            raise ValueError(f"not JSON ({error})") from None
        texts, more = texts_from_json(value)
        if not texts and not more:
            more = [f"none of {', '.join(JSON_KEYS)} in it"]
    else:
        cues, more = _cues(content)
        texts = _unrolled(cues)
    return texts, problems + more


def _decode(data: bytes) -> tuple[str, list[str]]:
    """The bytes as text, with a problem if the encoding had to be guessed or something was replaced or removed.

    Raises:
        ValueError: It is not text.
    """
    marked = next((encoding for mark, encoding in _BYTE_ORDER_MARKS if data.startswith(mark)), None)
    encoding = marked or _utf16_without_mark(data)
    if encoding is not None:
        name = encoding.upper()
        problems = [] if marked else [f"{name} without a byte order mark"]
        text = data.decode(encoding, "replace")
        if (n_lost := text.count("\ufffd")) and _fails(data, encoding):
            problems.append(f"broken {name}: {n_lost} characters could not be read")
        return _without_nul(text, problems)
    try:
        return _without_nul(data.decode("utf-8-sig"), [])
    except UnicodeDecodeError:
        pass
    if _NOT_TEXT.search(data):
        raise ValueError("binary data, not text")
    try:
        return data.decode("cp1252"), ["not UTF-8, read as Windows-1252"]
    except UnicodeDecodeError:  # five bytes have no meaning there
        return data.decode("latin-1"), ["not UTF-8, read as Latin-1"]


def _fails(data: bytes, encoding: str) -> bool:
    try:
        data.decode(encoding)
    except UnicodeDecodeError:
        return True
    return False


def _utf16_without_mark(data: bytes) -> str | None:
    """The encoding of UTF-16 that says no byte order, by its NUL and control bytes: every second one of them, many."""
    if len(data) % 2 or b"\0" not in data or len(_NOT_TEXT.findall(data)) < len(data) / 5:
        return None
    for encoding, other in (("utf-16-le", data[::2]), ("utf-16-be", data[1::2])):
        if b"\0" not in other and not _fails(data, encoding):
            return encoding
    return None


def _without_nul(text: str, problems: list[str]) -> tuple[str, list[str]]:
    n_nul = text.count("\0")
    return text.replace("\0", ""), problems + ([f"{n_nul} NUL characters in it, left out"] if n_nul else [])


def _cues(content: str) -> tuple[list[Cue], list[str]]:
    """The cues of an SRT or WebVTT file, which of the two its first line tells."""
    import pysubs2

    is_vtt = content.lstrip().startswith("WEBVTT")
    prepared, problems = _prepare(content, is_vtt)
    events = pysubs2.SSAFile.from_string(prepared, "vtt", keep_html_tags=True)
    cues: list[Cue] = []
    for event in events:
        text = event.text.removesuffix("{}").replace("\0", ":").replace(r"\h", " ")
        try:
            lines = [clean_text(html.unescape(line)) for line in text.split(r"\N")]
            clean_text(" ".join(lines))  # the whole cue has the same limit
        except ValueError as error:
            problems.append(str(error))
            continue
        if event.end < event.start:
            problems.append(f"a cue ends before it starts ({event.start / 1000} > {event.end / 1000})")
        elif any(lines):
            cues.append(Cue(event.start / 1000, event.end / 1000, tuple(filter(None, lines))))
    if not events:
        problems.append("no cue in it")
    return cues, problems


def _prepare(content: str, is_vtt: bool) -> tuple[str, list[str]]:
    """Takes out, line by line, what pysubs2 1.8 misreads or is slow on: see the comments.

    In WebVTT an empty line ends the cue; what follows (NOTE, STYLE, an identifier) is not text. In SRT empty lines
    inside a cue are common, so it lasts until the next counter.
    """
    out: list[str] = []
    problems: list[str] = []
    lines = content.splitlines()
    n_cues = 0
    in_cue = False
    left = 0  # characters that the cue may still have
    for number, line in enumerate(lines):
        if _TIMING.search(line):
            n_cues += 1
            if n_cues > MAX_TEXTS:
                problems.append(f"more than {MAX_TEXTS} cues, the first ones are used")
                break
            span = _SPAN.match(line)
            in_cue, left = span is not None, MAX_TEXT_BYTES
            if span is None:
                problems.append(f"a cue whose time cannot be read ({line.strip()[:60]!r})")
            else:
                # A last line of digits would be dropped as the next counter; "{}" keeps it from being the last.
                out += ["{}", f"{_clock(*span.group(1, 2, 3, 4))} --> {_clock(*span.group(5, 6, 7, 8))}"]
        elif is_vtt and not line:
            in_cue = False
        elif line.strip().isdigit() and number + 1 < len(lines) and _TIMING.search(lines[number + 1]):
            continue  # the counter of the next cue
        elif in_cue and line.strip():  # runs of empty lines would take quadratic time
            # A line with two clock times, which word-timed captions are full of, would be taken for a cue.
            text = _MARKUP.sub("", line).replace(":", "\0")
            left -= len(text)
            if left < 0:
                problems.append(f"a cue of more than {MAX_TEXT_BYTES} characters, the rest of it is left out")
                in_cue = False
            else:
                out.append(text)
    return "\n".join([*out, "{}"]), problems


def _clock(hours: str | None, minutes: str, seconds: str, fraction: str) -> str:
    """A time in the one form that pysubs2 reads whole: of "100:00:01,000" it takes the last two digits for the hour."""
    return f"{hours or '0':0>4}:{minutes:0>2}:{seconds:0>2}.{fraction:0<3}"


def _unrolled(cues: Iterable[Cue]) -> list[TimedText]:
    """Cues as texts, without the lines that a cue repeats from the one it continues.

    Automatic captions show every line two or three times while they roll up. A line that goes on is one text whose
    span goes on; the same words said again after a pause are a new one.
    """
    texts: list[TimedText] = []
    shown = Cue(0.0, float("-inf"), ())
    for cue in cues:
        repeated = 0
        if shown.start <= cue.start <= shown.end + ROLLING_GAP_SECONDS:
            longest = min(len(shown.lines), len(cue.lines))
            repeated = next((n for n in range(longest, 0, -1) if shown.lines[-n:] == cue.lines[:n]), 0)
        if repeated < len(cue.lines):
            texts.append(TimedText(" ".join(cue.lines[repeated:]), cue.start, cue.end))
        elif texts:
            last = texts[-1]
            texts[-1] = TimedText(last.text, last.start_seconds, max(cue.end, last.end_seconds or 0.0))
        shown = cue
    return texts


def _summary(problems: list[str]) -> list[str]:
    """The first problem of a file and how many more there are: one line."""
    return problems[:1] if len(problems) < 2 else [f"{problems[0]} (and {len(problems) - 1} more problems)"]
