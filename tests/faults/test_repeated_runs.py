"""The same command again: clocks change nothing, other settings are refused by name, doubles are told and done once."""

from __future__ import annotations

import itertools
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from command_line import fineco
from fakes import FakeEncoder
from guards import Guard
from pipeline.commands import Sources, search
from pipeline.config import SelectOptions
from pipeline.errors import UsageError
from pipeline.inspect import failures_of
from small_runs import checked, commits, embeddings_of, make_clip, make_videos, run

GUARDS = [
    Guard(
        faults=(18,),
        file="pipeline/catalog.py",
        old="record[:3] == (status.st_size, status.st_mtime_ns, status.st_ctime_ns):",
        new="record[:2] == (status.st_size, status.st_mtime_ns):",
        test="test_an_edit_that_puts_size_and_time_back_is_done_anew",
    ),
    Guard(
        faults=(18,),
        file="pipeline/catalog.py",
        old='digest = hashlib.sha256(b"%d\\n" % size)',
        new='digest = hashlib.sha256(b"%d\\n%d\\n" % (size, os.stat(path).st_mtime_ns))',
        test="test_times_of_files_change_nothing[1970]",
    ),
    Guard(
        faults=(18,),
        file="pipeline/run.py",
        old="summary.elapsed_seconds = time.monotonic() - started\n    if summary.n_ok",
        new="summary.elapsed_seconds = time.time() - 1.8e9\n    if summary.n_ok",
        test="test_a_clock_that_jumps_changes_nothing",
    ),
    Guard(
        faults=(23,),
        file="pipeline/config.py",
        old="        if field in recorded and recorded[field] != value:",
        new="        if False:",
        test="test_another_setting_exits_2_with_its_name_and_both_values[precision]",
    ),
    Guard(
        faults=(23,),
        file="pipeline/config.py",
        old="sampling is not None and sampling != sampling_of(recorded):",
        new="False:",
        test="test_another_setting_exits_2_with_its_name_and_both_values[fps]",
    ),
    Guard(
        faults=(23,),
        file="pipeline/config.py",
        old="    if collection and recorded and not change:",
        new="    if False:",
        test="test_another_setting_exits_2_with_its_name_and_both_values[keep]",
    ),
    Guard(
        faults=(24,),
        file="pipeline/catalog.py",
        old="                if not (video_id and earlier_has_id):",
        new="                if False:",
        test="test_a_file_that_lies_there_twice_is_done_once",
    ),
    Guard(
        faults=(24,),
        file="pipeline/catalog.py",
        old="                if not (video_id and earlier_has_id):",
        new="                if True:",
        test="test_two_ids_of_one_content_are_two_answers",
    ),
    Guard(
        faults=(24,),
        file="pipeline/manifest.py",
        old="    if problems:\n        more",
        new="    if False:\n        more",
        test="test_an_id_that_comes_twice_is_told_with_both_lines",
    ),
]

pytestmark = pytest.mark.fault


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    return make_videos(tmp_path / "v", 2)


# ------------------------------------------------------------------------------------------------------- clocks


@pytest.mark.parametrize("seconds", [0, -1e8, 4e9, 7e9], ids=["1970", "1966", "2096", "2191"])
def test_times_of_files_change_nothing(seconds: float, videos: Path, tmp_path: Path) -> None:
    run(tmp_path / "now", videos)
    for path in videos.iterdir():
        os.utime(path, (seconds, seconds))
    run(tmp_path / "then", videos)
    assert checked(tmp_path / "then")["digest"] == checked(tmp_path / "now")["digest"]
    summary = run(tmp_path / "now", videos)  # the same content under another time is done already
    assert (summary.counts.done_before, summary.n_ok) == (2, 0)


def test_a_clock_that_jumps_changes_nothing(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "steady", videos)
    now = time.time()
    jumps = itertools.cycle([now + 3e8, now - 3e8, 0.0, now])
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    summary = run(tmp_path / "jumping", videos)
    assert 0 < summary.elapsed_seconds < 60
    assert checked(tmp_path / "jumping")["digest"] == checked(tmp_path / "steady")["digest"]
    for file in (tmp_path / "jumping" / "outcomes").iterdir():
        rows = [json.loads(line) for line in file.read_text().splitlines()[2:]]
        assert all(0 <= row["seconds"] < 60 for row in rows)
    assert run(tmp_path / "jumping", videos).counts.done_before == 2


def test_an_edit_that_puts_size_and_time_back_is_done_anew(videos: Path, tmp_path: Path) -> None:
    path = videos / "clip1.mp4"
    run(tmp_path / "c", videos)
    before = embeddings_of(tmp_path / "c")[str(path)]
    status = path.stat()
    other = make_clip(tmp_path / "other.mp4", 3).read_bytes()
    size = max(status.st_size, len(other))
    path.write_bytes(path.read_bytes().ljust(size, b"\0"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    run(tmp_path / "c", videos)
    time.sleep(0.02)  # the file system's clock ticks every few milliseconds
    path.write_bytes(other.ljust(size, b"\0"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    summary = run(tmp_path / "c", videos)
    assert (summary.counts.done_before, summary.n_ok) == (1, 1)
    after = embeddings_of(tmp_path / "c")[str(path)]
    assert after.n_frames != before.n_frames or not np.array_equal(after.vector, before.vector)
    assert checked(tmp_path / "c")["indexed"] == 2


# ----------------------------------------------------------------------------------------------- other settings


def longer(*values: Any, name: str) -> Any:
    """A case of the long suite: tests/pipeline/test_run.py refuses each of them from Python."""
    return pytest.param(*values, marks=pytest.mark.long, id=name)


@pytest.mark.parametrize(
    ("options", "field", "before", "now"),
    [
        pytest.param(["--fps", 2], "sampling", "5", "2", id="fps"),
        pytest.param(["--keep", "0.75"], "keep", "0.5", "0.75", id="keep"),
        longer(["--frames", 4], "sampling", "5", "4", name="frames"),
        longer(["--keyframes"], "sampling", "5", "keyframes", name="keyframes"),
        longer(["--precision", "bf16"], "precision", "fp32", "bf16", name="precision"),
        longer(["--exact-resize"], "exact_resize", "False", "True", name="resize"),
        longer(["--model", "builtin"], "model", "fake", "builtin", name="model"),
        longer(["--selector", "uniform"], "selector", "caption", "uniform", name="selector"),
    ],
)
def test_another_setting_exits_2_with_its_name_and_both_values(
    options: list[Any], field: str, before: str, now: str, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.registry.load_encoder", lambda *names: FakeEncoder())
    run(tmp_path / "c", videos)
    make_clip(videos / "new.mp4", 6)
    stood = commits(tmp_path / "c"), (tmp_path / "c" / "collection.json").read_bytes(), checked(tmp_path / "c")
    done = fineco("run", videos, "-c", tmp_path / "c", "--workers", 1, *options)
    assert done.code == 2 and len(done.err.splitlines()) == 2
    first = done.err.splitlines()[0]
    assert first.startswith(f"error: {field}: ") and before in first and now in first
    assert "{" not in first  # in words, not as the file has it
    stands = commits(tmp_path / "c"), (tmp_path / "c" / "collection.json").read_bytes(), checked(tmp_path / "c")
    assert stands == stood
    done = fineco("run", videos, "-c", tmp_path / "c", "--workers", 1)  # without it, it goes on
    assert done.code == 0 and checked(tmp_path / "c")["indexed"] == 3


# ------------------------------------------------------------------------------------------------------ doubles


def test_a_file_that_lies_there_twice_is_done_once(videos: Path, tmp_path: Path) -> None:
    (videos / "copy.mp4").write_bytes((videos / "clip0.mp4").read_bytes())
    os.link(videos / "clip0.mp4", videos / "hard.mp4")
    (videos / "soft.mp4").symlink_to("clip0.mp4")
    summary = run(tmp_path / "c", Sources([str(videos), str(videos / "clip0.mp4"), str(videos / "*.mp4")]))
    assert (summary.n_ok, summary.counts.skipped, summary.any_failed) == (2, 3, False)
    rows = [row.outcome for row in failures_of(tmp_path / "c", skipped=True)]
    assert {(row.code, row.status) for row in rows} == {("duplicate", "skipped")} and len(rows) == 3
    assert all(str(videos / "clip0.mp4") in row.message for row in rows)
    assert checked(tmp_path / "c")["indexed"] == 2


def test_two_ids_of_one_content_are_two_answers(videos: Path, tmp_path: Path) -> None:
    (videos / "copy.mp4").write_bytes((videos / "clip0.mp4").read_bytes())
    rows = [{"path": "clip0.mp4", "id": "first"}, {"path": "copy.mp4", "id": "second"}]
    (videos / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = run(tmp_path / "c", Sources([], videos / "m.jsonl"), select=SelectOptions("uniform", "2"))
    assert (summary.n_ok, summary.counts.skipped) == (2, 0)
    one, other = embeddings_of(tmp_path / "c").values()
    np.testing.assert_array_equal(one.vector, other.vector)
    (hits,) = search(tmp_path / "c", ["red"], encoder=FakeEncoder())
    assert sorted(hit.video_id for hit in hits) == ["first", "second"]


@pytest.mark.parametrize("name", ["m.jsonl", "m.csv"])
def test_an_id_that_comes_twice_is_told_with_both_lines(name: str, videos: Path, tmp_path: Path) -> None:
    rows = [("clip0.mp4", "a"), ("clip1.mp4", "b"), ("clip0.mp4", "a"), ("other.mp4", "a")]
    if name == "m.csv":
        content = "path,id\n" + "".join(f"{path},{video_id}\n" for path, video_id in rows)
    else:
        content = "\n".join(json.dumps({"path": path, "id": video_id}) for path, video_id in rows)
    (videos / name).write_text(content)
    first, last = (4, 5) if name == "m.csv" else (3, 4)
    with pytest.raises(UsageError) as refused:
        run(tmp_path / "c", Sources([], videos / name))
    assert f"{videos / name}:{last}: the id of another path on {videos / name}:{first}" in str(refused.value)
    assert not (tmp_path / "c").exists()
