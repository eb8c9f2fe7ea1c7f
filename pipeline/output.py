"""Results as text: tables for people, JSON, JSON lines, CSV and plain paths for scripts."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from pipeline.errors import FinecoError
from pipeline.types import Hit, Moment

FORMATS = ("table", "json", "jsonl", "csv", "paths")
SHOWN_MOMENTS = 3
READER_GONE = 128 + 13  # as the shell reports a program that SIGPIPE ended
CSV_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet would run what follows


def clock(seconds: float) -> str:
    """`1:02:03`, `2:03` or `0:03.5`: a time as a player shows it."""
    tenths = round(seconds * 10)
    minutes, rest = divmod(tenths, 600)
    text = f"{rest // 10:02d}" + (f".{rest % 10}" if rest % 10 else "")
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{text}" if hours else f"{minutes}:{text}"


def visible(text: str) -> str:
    """A name for one line of a terminal: control characters and undecodable bytes are shown, not obeyed."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def format_hits(queries: Sequence[str], answers: Sequence[Sequence[Hit]], form: str) -> str:
    """All answers in one of `FORMATS`."""
    pairs = list(zip(queries, answers, strict=True))
    if form == "json":
        content = [{"query": query, "hits": [_hit(hit) for hit in hits]} for query, hits in pairs]
        return json.dumps(content, indent=2) + "\n"
    if form == "jsonl":
        return "".join(json.dumps({"query": q, **_hit(hit)}) + "\n" for q, hits in pairs for hit in hits)
    if form == "csv":
        return _csv(pairs)
    if form == "paths":
        return "".join(f"{path}\n" for path in dict.fromkeys(hit.path for _, hits in pairs for hit in hits))
    return "\n".join(_table(query, hits, len(pairs) > 1) for query, hits in pairs)


def _hit(hit: Hit) -> dict[str, Any]:
    return {
        "rank": hit.rank,
        "score": round(hit.score, 6),
        "video_id": hit.video_id,
        "path": hit.path,
        "moments": [
            {"start": round(m.start_seconds, 3), "end": round(m.end_seconds, 3), "score": round(m.score, 6)}
            for m in hit.moments
        ],
    }


def _csv(pairs: Iterable[tuple[str, Sequence[Hit]]]) -> str:
    rows = [["query", "rank", "score", "start", "end", "video_id", "path"]]
    for query, hits in pairs:
        for hit in hits:
            best = hit.moments[0] if hit.moments else None
            span = [f"{best.start_seconds:.3f}", f"{best.end_seconds:.3f}"] if best else ["", ""]
            row = [query, str(hit.rank), f"{hit.score:.6f}", *span, hit.video_id, hit.path]
            rows.append(
                [f"'{x}" if i in (0, 5, 6) and x.startswith(CSV_FORMULA_STARTS) else x for i, x in enumerate(row)]
            )
    return to_csv(rows)


def to_csv(rows: Iterable[Sequence[object]]) -> str:
    """CSV with Unix line ends. `csv` quotes a lone carriage return only where lines end in one."""
    lines = []
    for row in rows:
        out = io.StringIO()
        csv.writer(out, lineterminator="\r\n").writerow(row)
        lines.append(out.getvalue().removesuffix("\r\n") + "\n")
    return "".join(lines)


def _table(query: str, hits: Sequence[Hit], titled: bool) -> str:
    lines = [visible(query)] if titled else []
    if not hits:
        lines.append("  nothing above the threshold" if titled else "nothing above the threshold")
    spans = [", ".join(_span(m) for m in hit.moments[:SHOWN_MOMENTS]) for hit in hits]
    width = max(map(len, spans), default=0)
    for hit, span in zip(hits, spans, strict=True):
        lines.append(f"{hit.rank:>3}  {hit.score:.3f}  {span:<{width}}  {visible(hit.path)}")
    return "\n".join(lines) + "\n"


def _span(moment: Moment) -> str:
    return f"{clock(moment.start_seconds)}-{clock(moment.end_seconds)}"


def format_table(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    """Aligned columns under a header."""
    table = [list(header), *[[visible(cell) for cell in row] for row in rows]]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    return "".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n" for row in table
    )


def write_stdout(text: str) -> None:
    """Writes to standard output, with file names byte for byte as they are on disk.

    Raises:
        SystemExit: The reader has seen enough, as `head` does.
        FinecoError: The disk is full, or the like.
    """
    try:
        sys.stdout.flush()
        sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape"))
        sys.stdout.buffer.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter tries once more at its end
        if isinstance(error, BrokenPipeError):
            sys.exit(READER_GONE)  # not left to click, which ends with 1
        raise FinecoError(f"cannot write the results: {error.strerror or error}") from error


def number_of(count: int, noun: str) -> str:
    """`1 video`, `2 videos`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def to_json(content: Any) -> str:
    """Indented JSON."""
    return json.dumps(content, indent=2, default=str) + "\n"
