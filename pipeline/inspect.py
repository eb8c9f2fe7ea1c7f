"""What is in a collection, what failed, and whether every byte is as it was written."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from indexes.generations import current_generation, read_sidecar
from pipeline import store
from pipeline.collection import Collection
from pipeline.commits import EMBEDDINGS, FEATURES, FRAMES, INDEX, Row, State
from pipeline.config import sampling_of
from pipeline.doctor import examine, problems
from pipeline.errors import FinecoError, IntegrityError, UsageError
from pipeline.files import FileRecord, check_file
from pipeline.output import format_table, number_of, to_csv, to_json, visible
from pipeline.search import LOOKUP_FILE
from pipeline.types import Outcome

SHARDS: dict[str, type[store.Shard]] = {
    FRAMES: store.FramesShard,
    FEATURES: store.FeaturesShard,
    EMBEDDINGS: store.EmbeddingsShard,
}


def status_of(folder: Path) -> dict[str, Any]:
    """What a collection holds, as plain values."""
    collection = Collection(folder)
    state = State()
    records: dict[str, FileRecord] = {}
    for commit in collection.commits():
        state.merge(commit)
        records.update(commit.files)
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
        index["up_to_date"] = fresh and sidecar.selection == selection
    except UsageError:
        pass  # none yet
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
        recall = f"recall@10 {index['recall_at_10']:.3f}"
        lines.append(("index", f"{index['factory']}, {number_of(index['n_vectors'], 'video')}, {recall}, {fresh}"))
    else:
        lines.append(("index", f"none yet: run 'fineco {'index' if selection and selection['videos'] else 'run'}'"))
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
    latest: dict[str, Row] = {}
    for commit in collection.commits():
        for row in commit.rows:
            if row.outcome.status in wanted:
                latest[row.outcome.path] = row
            else:
                latest.pop(row.outcome.path, None)
    return [latest[path] for path in sorted(latest)]


def text_problems_of(folder: Path) -> list[Row]:
    """What of the text beside the videos could not be used: a row of code `text` for each note, sorted by path."""
    state = Collection(folder).state()
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


def verify_collection(folder: Path) -> dict[str, Any]:
    """Reads and checks everything; returns the problems and a digest of the content.

    The digest covers ids, contents, times, features, selections and vectors of every video, in order of id, and nothing
    of how or when they were made.
    """
    collection = Collection(folder)
    found: list[str] = []
    state = State()
    records: dict[str, FileRecord] = {}
    for number in range(1, max(collection.commit_numbers(), default=0) + 1):  # one that is missing is damage too
        try:
            commit = collection.read_commit(number)
        except IntegrityError as error:
            found.append(error.message)
            continue
        state.merge(commit)
        records.update(commit.files)
    lines: list[bytes] = []
    for name, record in sorted(records.items()):
        try:
            check_file(folder / name, record)
            lines += _shard_lines(folder / name, name, state)
        except FinecoError as error:
            found.append(error.message)
    try:
        if selection := collection.current_selection():
            collection.selection(selection)
    except FinecoError as error:
        found.append(error.message)
    n_index = _verify_index(folder, found)
    digest = hashlib.sha256(b"".join(sorted(lines))).hexdigest()
    return {
        "collection": str(folder),
        "files": len(records),
        "bytes": sum(record.size_bytes for record in records.values()),
        "videos": len(state.paths),
        "indexed": n_index,
        "digest": digest,
        "problems": found,
    }


def _shard_lines(path: Path, name: str, state: State) -> list[bytes]:
    """A line for every video whose latest data is in this shard: what it is and a digest of its rows."""
    kind, _, stem = name.rpartition("/")
    lines = []
    with SHARDS[kind.partition("/")[0]](path) as shard:
        for row, video_id in enumerate(shard.video_ids):
            if state.places[kind].get(video_id) and state.places[kind][video_id].commit == int(stem.partition(".")[0]):
                lines.append(f"{video_id} {shard.contents[row]} {kind} {_row_digest(shard, row)}\n".encode())
    return lines


def _row_digest(shard: store.Shard, row: int) -> str:
    digest = hashlib.sha256()
    if isinstance(shard, store.FramesShard):
        frames = shard.frames(row)
        digest.update(frames.pts_seconds.tobytes())
        for jpeg in frames.jpegs:
            digest.update(jpeg)
    elif isinstance(shard, store.FeaturesShard):
        features = shard.features(row)
        digest.update(features.pts_seconds.tobytes() + features.features.tobytes())
    elif isinstance(shard, store.EmbeddingsShard):
        embedding = shard.embedding(row)
        for array in (embedding.vector, embedding.features, embedding.pts_seconds, embedding.scores):
            digest.update(array.tobytes())
        digest.update(embedding.selector.encode())
    return digest.hexdigest()


def _verify_index(folder: Path, found: list[str]) -> int | None:
    """Checks the index in use; returns how many videos it holds, None when there is none."""
    if not (folder / INDEX).exists():
        return None
    try:
        generation = current_generation(folder / INDEX)
        sidecar = read_sidecar(generation)
        for name, record in sidecar.files.items():
            check_file(generation / name, record)
        with store.Lookup(generation / LOOKUP_FILE) as lookup:
            if len(lookup) != sidecar.report.n_vectors:
                found.append(f"{generation}: {len(lookup)} videos, {sidecar.report.n_vectors} vectors")
        return sidecar.report.n_vectors
    except FinecoError as error:
        found.append(error.message)
        return None


def verify_text(content: dict[str, Any]) -> str:
    """The verification for a person."""
    indexed = "no index" if content["indexed"] is None else f"{content['indexed']} in the index"
    files, videos = number_of(content["files"], "file"), number_of(content["videos"], "video")
    found = content["problems"]
    lines = [f"{files}, {content['bytes'] / 1e6:.1f} MB, {videos}, {indexed}"]
    lines += [f"problem: {visible(problem)}" for problem in found]
    lines.append(number_of(len(found), "problem") if found else "everything is as it was written")
    lines.append(f"digest {content['digest']}")
    return "\n".join(lines) + "\n"


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
