"""Selecting again from stored features, without decoding or embedding: another selector, or what lacks a selection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pipeline import store
from pipeline.collection import Writer
from pipeline.commits import EMBEDDINGS, FEATURES, Commit, Row
from pipeline.errors import VideoError
from pipeline.interrupts import Interrupts
from pipeline.progress import Progress
from pipeline.run import Selecting
from pipeline.types import Outcome, TimedText, VideoEmbedding


def count_unselected(writer: Writer, selection: str) -> int:
    """How many videos have features but no embedding in a selection."""
    return len(_unselected(writer, selection))


def _unselected(writer: Writer, selection: str) -> set[str]:
    done = writer.state.places.get(f"{EMBEDDINGS}/{selection}", {})
    features = writer.state.places.get(FEATURES, {})
    return {v for v, place in features.items() if v not in done or done[v].content != place.content}


def select_stored(
    writer: Writer,
    make_selecting: Callable[[bool], Selecting],
    selection: str,
    progress: Progress,
    interrupts: Interrupts,
    only: set[str] | None = None,
) -> int:
    """Selects frames of every video that has features but lacks this selection; returns how many.

    Each shard of features gives one shard of embeddings.

    Args:
        make_selecting: Called with whether any text has to be encoded, which is when the encoder must be loaded.
        only: Ids of the videos that are meant; None: all.

    Raises:
        Interrupted: After the shard in progress was written.
    """
    missing = _unselected(writer, selection)
    if only is not None:
        missing &= only
    if not missing:
        return 0
    progress.set_total(len(missing))
    newer_texts = writer.newer_texts(FEATURES, missing)
    selecting: Selecting | None = None
    for commit in writer.collection.commits():
        number = commit.number
        if f"{FEATURES}/{number:06d}.h5" not in writer.records:
            continue
        rows = _rows_to_select(writer, commit, missing, newer_texts)
        if not rows:
            continue
        if selecting is None:
            selecting = make_selecting(any(row.texts for row in rows.values()))
        elif not selecting.has_encoder and any(row.texts for row in rows.values()):
            selecting = make_selecting(True)
        _select_shard(writer, number, rows, selecting, progress)
        interrupts.check()
    return len(missing)


def _rows_to_select(
    writer: Writer, commit: Commit, missing: set[str], newer_texts: dict[str, tuple[TimedText, ...]]
) -> dict[str, Row]:
    """Rows of a commit whose features are the video's latest, with its latest texts and path."""
    places = writer.state.places[FEATURES]
    rows = {}
    for row in commit.rows:
        video_id = row.outcome.video_id
        if row.outcome.status != "ok" or video_id not in missing or places[video_id].commit != commit.number:
            continue
        path = writer.state.paths.get(video_id, row.outcome.path)
        known = writer.state.known.get(path)
        outcome = Outcome(video_id, path, "ok", "select")
        texts = newer_texts.get(video_id, row.texts)
        times = (known.size_bytes, known.mtime_ns, known.ctime_ns) if known else (-1, -1, -1)
        rows[video_id] = Row(outcome, row.content, *times, row.duration_seconds, texts)
    return rows


def _select_shard(writer: Writer, number: int, rows: dict[str, Row], selecting: Selecting, progress: Progress) -> None:
    path = writer.collection.open_file(f"{FEATURES}/{number:06d}.h5", writer.records)
    embeddings: list[tuple[store.StoredVideo, VideoEmbedding]] = []
    with store.FeaturesShard(path) as shard:
        for at, video_id in enumerate(shard.video_ids):
            if video_id in rows:
                try:
                    embedding = selecting.select(shard.features(at), rows[video_id].texts)
                except VideoError as error:  # it stays without this selection, and the next command tries it again
                    rows[video_id] = _failed(rows[video_id], error)
                    progress.note(f"failed: {rows[video_id].outcome.path}: {error.message} [{error.code}]")
                    continue
                embeddings.append((shard.video(at), embedding))
                progress.update(videos_done=1, video_seconds=float(shard.durations[at]))
    kind = f"{EMBEDDINGS}/{selecting.plan.name}"
    files = [(kind, lambda target: store.write_embeddings(target, embeddings))] if embeddings else []
    writer.commit("select", list(rows.values()), files)


def _failed(row: Row, error: VideoError) -> Row:
    outcome = replace(row.outcome, status="failed", code=error.code, message=error.message)
    return replace(row, outcome=outcome)
