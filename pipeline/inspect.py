"""What is in a collection, and what failed; and what this machine is like."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from indexes.generations import current_generation, read_sidecar
from pipeline.collection import Collection, Snapshot
from pipeline.commits import EMBEDDINGS, FEATURES, FRAMES, INDEX, Row
from pipeline.config import sampling_of
from pipeline.doctor import examine, problems
from pipeline.errors import FinecoError, UsageError
from pipeline.output import format_table, number_of, to_csv, to_json, visible
from pipeline.types import Outcome


def status_of(folder: Path) -> dict[str, Any]:
    """What a collection holds, as plain values."""
    collection = Collection(folder)
    snapshot = Snapshot(collection)
    state, records = snapshot.state, snapshot.records
    statuses = Counter(status for _, _, status, _ in state.latest.values())
    codes = Counter(code for _, _, status, code in state.latest.values() if status == "failed")
    selection = collection.current_selection()
    selected = state.places.get(f"{EMBEDDINGS}/{selection}", {})
    index: dict[str, Any] | None = None
    try:
        generation = current_generation(folder / INDEX)
        sidecar = read_sidecar(generation)
        index = {"generation": generation.name, "selection": sidecar.selection, **sidecar.report.to_json()}
        fresh = selection is not None and sidecar.extra.get("content") == state.index_content(selection)
        index["recall"] = round(sidecar.report.recall, 4) if sidecar.report.n_probes else None
        index["recall_goal"] = sidecar.extra.get("recall_goal")
        index["up_to_date"] = fresh and sidecar.selection == selection
    except UsageError:
        pass  # none yet, or one of an earlier version
    except FinecoError as error:
        index = {"problem": error.message}
    return {
        "collection": str(folder),
        "encoder": collection.encoder and {k: collection.encoder[k] for k in ("name", "fingerprint", "precision")},
        "sampling": sampling_of(collection.config).describe(),
        "videos": {"ok": len(state.paths), **{s: n for s, n in sorted(statuses.items()) if s != "ok"}},
        "failure_codes": dict(codes.most_common()),
        "text_problems": len(state.text_notes),
        "with_frames": len(state.places.get(FRAMES, {})),
        "with_features": len(state.places.get(FEATURES, {})),
        "selection": selection and {"name": selection, **collection.selection(selection), "videos": len(selected)},
        "outdated": f"{EMBEDDINGS}/{selection}" in state.outdated and not selected,
        "index": index,
        "bytes": sum(record.size_bytes for record in records.values()),
        "commits": state.last_number,
    }


def status_text(content: dict[str, Any]) -> str:
    """The status for a person."""
    encoder, selection, index = content["encoder"], content["selection"], content["index"]
    videos = ", ".join(f"{n} {status}" for status, n in content["videos"].items())
    lines = [
        ("collection", content["collection"]),
        ("encoder", f"{encoder['name']}, {encoder['precision']}" if encoder else "none yet"),
        ("sampling", content["sampling"]),
        ("videos", videos),
        ("features", number_of(content["with_features"], "video") + _frames_text(content)),
        ("selection", f"{selection['name']}, {number_of(selection['videos'], 'video')}" if selection else "none yet"),
    ]
    if index and "problem" in index:
        lines.append(("index", f"damaged: {index['problem']}: run 'fineco index --force'"))
    elif index:
        fresh = "up to date" if index["up_to_date"] else "out of date: run 'fineco index'"
        moments = f"{number_of(index['n_vectors'], 'moment')} of {number_of(index['n_videos'], 'video')}"
        lines.append(("index", f"{index['factory']}, {moments}, {fresh}"))
        questions = f"of {number_of(index['n_probes'], 'question')} ({index['probes']})"
        finds = f"the index finds {index['n_found']} that an exhaustive search finds first"
        lines.append(("recall", f"{questions} {finds} (goal {index['recall_goal']:g})"))
    elif content["outdated"]:
        lines.append(("index", "of an earlier version, without moments: run 'fineco select' and 'fineco index'"))
    else:
        step = "index" if selection and selection["videos"] else "select" if content["with_features"] else "run"
        lines.append(("index", f"none yet: run 'fineco {step}'"))
    lines.append(("on disk", f"{content['bytes'] / 1e6:.1f} MB in {number_of(content['commits'], 'commit')}"))
    if content["failure_codes"]:
        codes = ", ".join(f"{n} {code}" for code, n in content["failure_codes"].items())
        lines.append(("failures", f"{codes}: see 'fineco failures'"))
    if content["text_problems"]:
        n_videos = number_of(content["text_problems"], "video")
        lines.append(("texts", f"not all text beside {n_videos} could be used: see 'fineco failures --texts'"))
    width = max(len(name) for name, _ in lines)
    return "".join(f"{name:<{width}}  {visible(value)}\n" for name, value in lines)


def _frames_text(content: dict[str, Any]) -> str:
    return f", frames of {content['with_frames']}" if content["with_frames"] else ""


def failures_of(folder: Path, skipped: bool) -> list[Row]:
    """The last word on every path whose last word is a failure, sorted by path."""
    collection = Collection(folder)
    wanted = ("failed", "skipped") if skipped else ("failed",)

    def read() -> dict[str, Row]:
        latest: dict[str, Row] = {}
        for commit in collection.commits():
            for row in commit.rows:
                if row.outcome.stage in ("compact", "repair"):  # which repeat what was known
                    continue
                if row.outcome.status in wanted:
                    latest[row.outcome.path] = row
                else:
                    latest.pop(row.outcome.path, None)
        return latest

    latest = collection.stable(read)
    return [latest[path] for path in sorted(latest)]


def text_problems_of(folder: Path) -> list[Row]:
    """What of the text beside the videos could not be used: a row of code `text` for each note, sorted by path."""
    state = Snapshot(Collection(folder)).state
    return [
        Row(Outcome(state.latest[path][1], path, "ok", "catalog", "text", note))
        for path in sorted(state.text_notes)
        for note in state.text_notes[path]
    ]


def failures_text(rows: list[Row], form: str) -> str:
    """The failures in one of `output.FORMATS`."""
    outcomes = [row.outcome for row in rows]
    fields = ("path", "status", "stage", "code", "message", "attempts")
    if form in ("json", "jsonl"):
        content = [{field: getattr(o, field) for field in fields} for o in outcomes]
        return to_json(content) if form == "json" else "".join(json.dumps(c) + "\n" for c in content)
    if form == "paths":
        return "".join(f"{o.path}\n" for o in outcomes)
    if form == "csv":
        return to_csv([fields, *([getattr(o, field) for field in fields] for o in outcomes)])
    if not outcomes:
        return "no failures\n"
    return format_table([[o.code, o.stage, o.message, o.path] for o in outcomes], ["code", "stage", "why", "path"])


def doctor_report(as_json: bool) -> tuple[str, bool]:
    """What `fineco doctor` prints, and whether there is a problem."""
    findings = examine()
    faults = problems(findings)
    if as_json:
        return to_json([asdict(finding) for finding in findings]), bool(faults)
    width = max(len(finding.topic) for finding in findings)
    text = "".join(f"{finding.topic:<{width}}  {finding.value}\n" for finding in findings)
    for finding in findings:
        if finding.cure:
            text += f"{finding.level}: {finding.topic}: {finding.cure}\n"
    return text + ("no problems\n" if not faults else ""), bool(faults)
