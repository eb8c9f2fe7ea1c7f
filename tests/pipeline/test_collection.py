"""A collection on disk: commits are whole or absent, one writer at a time, and the last word on every video."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.collection import Collection, Snapshot
from pipeline.commits import Commit, Row, State
from pipeline.errors import FinecoError, IntegrityError, UsageError
from pipeline.files import FileRecord, read_sealed, seal, write_bytes
from pipeline.lock import Lock
from pipeline.repair import repair_collection
from pipeline.types import Outcome, TimedText, Video
from pipeline.verify import verify_collection

ROOT = Path(__file__).parents[2]
WEIRD_NAMES = [
    "/v/new\nline.mp4",
    "/v/cr\r\x1b[31m.mp4",
    "/v/\udcff\udc80.mp4",
    "/v/'\"\\.mp4",
    "/v/日本 \u2028.mp4",
    "/v/-i",
]


def video(number: int, path: str = "", texts: tuple[TimedText, ...] = ()) -> Video:
    return Video(f"id-{number}", f"{number:032x}", path or f"/videos/{number}.mp4", 1000 + number, 5, 6, None, texts)


def row(number: int, status: str = "ok", path: str = "", stage: str = "run", texts: tuple[str, ...] = ()) -> Row:
    source = video(number, path, tuple(TimedText(t) for t in texts))
    code = "" if status == "ok" else "why"
    outcome = Outcome(source.video_id, source.path, status, stage, code)  # type: ignore[arg-type]
    return Row.of(source, outcome, 2.5)


def data(content: bytes) -> Iterator[tuple[str, object]]:
    for kind in ("features", "embeddings/caption-0.25"):
        yield kind, lambda path: write_bytes(path, content)


def files_of(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def collection(tmp_path: Path) -> Collection:
    collection = Collection.create(tmp_path / "kitchen", {"model": "fake"})
    for name in ("caption-0.25", "all"):
        collection.add_selection(name, {"selector": name.partition("-")[0]})
    return collection


def add(collection: Collection, *rows: Row, stage: str = "run", with_data: bool = True) -> int:
    with collection.writing("test") as writer:
        return writer.commit(stage, rows, data(b"x" * 100) if with_data else [])  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------- creation


def test_configuration_comes_back(collection: Collection) -> None:
    collection.update({"model": "fake", "sampling": {"mode": "fps", "value": 0.5}}, {"name": "é", "spec": {"dim": 3}})
    back = Collection(collection.folder)
    assert (back.config, back.encoder) == (collection.config, collection.encoder)


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "holiday.mp4").write_bytes(b"")
    with pytest.raises(UsageError, match="is not a collection"):
        Collection.create(tmp_path, {})
    with pytest.raises(UsageError, match="is not a collection"):
        Collection.create(tmp_path / "holiday.mp4", {})
    assert files_of(tmp_path) == {"holiday.mp4"}
    with pytest.raises(UsageError, match=r"-c "):
        Collection(tmp_path)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"schema": 2}', '{"schema": 3}', '{"schema": 3, "config": [], "encoder": null}']
)
def test_a_damaged_configuration_is_named(content: str, collection: Collection) -> None:
    (collection.folder / "collection.json").write_text(content)
    with pytest.raises(IntegrityError, match=r"collection\.json"):
        Collection(collection.folder)


def test_a_pipe_in_the_place_of_a_file_is_refused_and_not_waited_for(collection: Collection) -> None:
    for name in ("collection.json", "embeddings/CURRENT"):
        (collection.folder / name).unlink(missing_ok=True)
        os.mkfifo(collection.folder / name)
        with pytest.raises(IntegrityError, match=name):
            Collection(collection.folder).current_selection()
        (collection.folder / name).unlink()
        collection.update(collection.config, collection.encoder)


def test_selections_are_kept_side_by_side(collection: Collection) -> None:
    assert collection.current_selection() is None
    collection.use_selection("caption-0.25", {"selector": "caption"})
    collection.use_selection("uniform-8", {"selector": "uniform"})
    assert collection.current_selection() == "uniform-8"
    assert collection.selection("caption-0.25") == {"selector": "caption"}
    with pytest.raises(IntegrityError, match=r"absent/selection\.json"):
        collection.selection("absent")
    (collection.folder / "embeddings" / "CURRENT").write_bytes(b"\xff\xfe")
    with pytest.raises(IntegrityError, match="CURRENT"):
        collection.current_selection()


# ------------------------------------------------------------------------------------------------------- commits


def test_commits_come_back_as_they_were(collection: Collection) -> None:
    texts = (TimedText("a\nb \udcff", 1.0, 2.5), TimedText("whole"))
    first = Row.of(video(1, texts=texts), Outcome("id-1", "/videos/1.mp4", "ok", "run", attempts=2, notes=("n",)), 2.5)
    with collection.writing("test") as writer:
        number = writer.commit("run", [first, row(2, "failed")], data(b"abc"))  # type: ignore[arg-type]
        state = writer.state
    commit = collection.read_commit(number)
    assert commit.rows == [first, row(2, "failed")]
    assert set(commit.files) == {"features/000001.h5", "embeddings/caption-0.25/000001.h5"}
    assert collection.open_file("features/000001.h5", commit.files).read_bytes() == b"abc"
    assert collection.state() == state
    assert commit.rows[0].video() == replace(video(1, texts=texts), duration_seconds=2.5)


@pytest.mark.parametrize("path", WEIRD_NAMES)
def test_any_name_survives_as_one_line_of_ascii(path: str, collection: Collection) -> None:
    add(collection, row(1, path=path, texts=(path,)))
    lines = (collection.folder / "outcomes" / "000001.jsonl").read_bytes().splitlines()
    assert len(lines) == 3
    assert all(line.isascii() and line.isprintable() for line in map(bytes.decode, lines))
    assert collection.state().paths == {"id-1": path}
    assert collection.read_commit(1).rows[0].texts == (TimedText(path),)


def test_any_damage_to_a_commit_is_found_and_nothing_is_removed(collection: Collection) -> None:
    """The names of the data files are covered too: a changed one would turn its file into debris."""
    add(collection, row(1, texts=("a text",)))
    path = collection.folder / "outcomes" / "000001.jsonl"
    whole = path.read_bytes()
    before = files_of(collection.folder)
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(IntegrityError, match=r"000001\.jsonl"):
            collection.read_commit(1)
    for damaged in (b"", whole[:-1], whole + b"\n", whole[: len(whole) // 2], b"[]\n", b"\xff" + whole, whole * 2):
        path.write_bytes(damaged)
        with pytest.raises(IntegrityError, match=r"000001\.jsonl"), collection.writing("test"):
            pass
    path.write_bytes(whole)
    assert files_of(collection.folder) == before
    with collection.writing("test"):
        pass


def test_a_missing_commit_is_damage_and_its_files_are_not_debris(collection: Collection) -> None:
    for number in (1, 2, 3):
        add(collection, row(number))
    (collection.folder / "outcomes" / "000002.jsonl").unlink()
    with pytest.raises(IntegrityError, match=r"000002\.jsonl"), collection.writing("test"):
        pass
    assert (collection.folder / "features" / "000002.h5").exists()


def test_a_data_file_is_checked_before_it_is_opened(collection: Collection) -> None:
    add(collection, row(1))
    records = collection.read_commit(1).files
    (collection.folder / "features" / "000001.h5").write_bytes(b"x" * 99 + b"y")
    with pytest.raises(IntegrityError, match=r"features/000001\.h5"):
        collection.open_file("features/000001.h5", records)
    with pytest.raises(IntegrityError, match="no commit names"):
        collection.open_file("features/000009.h5", records)


def test_debris_of_a_dead_process_is_removed_and_nothing_else(collection: Collection) -> None:
    add(collection, row(1))
    kept = files_of(collection.folder)
    folder = collection.folder
    (folder / "frames").mkdir()
    for name in ("features/000002.h5", "frames/000002.h5.tmp", "outcomes/000002.jsonl.tmp", "collection.json.tmp"):
        (folder / name).write_bytes(b"debris")
    (folder / "notes.txt").write_text("mine")
    (folder / "features" / "notes.txt").write_text("mine")
    with collection.writing("test"):
        assert files_of(folder) == kept | {"notes.txt", "features/notes.txt"}


def test_a_commit_that_the_disk_refuses_did_not_happen_and_can_be_tried_again(collection: Collection) -> None:
    def refuse(path: Path) -> FileRecord:
        raise FinecoError(f"cannot write {path}: No space left on device")

    add(collection, row(1))
    kept = files_of(collection.folder)
    with collection.writing("test") as writer:
        before = collection.state()
        with pytest.raises(FinecoError, match="No space left"):
            writer.commit("run", [row(2)], [*data(b"x"), ("frames", refuse)])  # type: ignore[list-item]
        assert writer.state == before == collection.state()
    with collection.writing("test") as writer:
        assert files_of(collection.folder) == kept
        assert writer.commit("run", [row(2)], data(b"x")) == 2  # type: ignore[arg-type]


KILL_SELF = """
    import os, signal, sys
    from pathlib import Path
    steps, die_at = 0, int(sys.argv[2])
    def step():
        global steps
        steps += 1
        if steps == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
    def killing(call):
        def wrapped(*args):
            step()
            result = call(*args)
            step()
            return result
        return wrapped
    os.fsync, os.replace = killing(os.fsync), killing(os.replace)
    from pipeline.collection import Collection, Snapshot
    from pipeline.commits import Row
    from pipeline.files import write_bytes
    from pipeline.types import Outcome
"""
COMMIT = """
    with Collection(Path(sys.argv[1])).writing("dying") as writer:
        files = [(kind, lambda path: write_bytes(path, b"new" * 1000)) for kind in ("features", "embeddings/all")]
        writer.commit("run", [Row(Outcome("id-2", "/videos/2.mp4", "ok", "run"), content="2")], files)
"""
CREATE = """
    Collection.create(Path(sys.argv[1]), {"model": "new"})
"""


def run_until_killed(body: str, folder: Path, die_at: int) -> int:
    code = textwrap.dedent(KILL_SELF) + textwrap.dedent(body)
    return subprocess.run([sys.executable, "-c", code, str(folder), str(die_at)], cwd=ROOT, timeout=60).returncode


@pytest.mark.long
@pytest.mark.fault
def test_a_kill_at_any_step_of_a_commit_leaves_all_of_it_or_nothing(collection: Collection) -> None:
    add(collection, row(1))
    before = collection.state()
    kept = files_of(collection.folder)
    new = {"features/000002.h5", "embeddings/all/000002.h5", "outcomes/000002.jsonl"}
    whole_after = []
    for die_at in range(1, 40):
        code = run_until_killed(COMMIT, collection.folder, die_at)
        assert code in (0, -signal.SIGKILL)
        with collection.writing("next") as writer:
            whole = writer.state != before
            if whole:
                assert writer.state.places["features"]["id-2"].commit == 2
                assert set(writer.records) == {n for n in kept | new if n.endswith(".h5")}
            for name in writer.records:
                collection.open_file(name, writer.records)
        assert files_of(collection.folder) == (kept | new if whole else kept)
        whole_after.append(whole)
        if code == 0:
            break
        for name in new:
            (collection.folder / name).unlink(missing_ok=True)
    assert len(whole_after) == 19  # 3 files x (fsync, rename, fsync of the folder) x (before, after), and unharmed
    assert whole_after == sorted(whole_after)  # none until the last rename, all from then on
    assert whole_after.count(True) == 4


@pytest.mark.parametrize(
    "content",
    [
        b'{"schema": 1, "config": {}, "encoder": null}',
        *(seal({"schema": schema, "config": {}}) for schema in (0, 1, 4, None, "3")),
    ],
)
def test_a_collection_of_another_version_is_neither_read_nor_repaired(content: bytes, collection: Collection) -> None:
    (collection.folder / "collection.json").write_bytes(content)
    before = {p: p.read_bytes() for p in collection.folder.rglob("*") if p.is_file()}
    for act in (Collection, verify_collection, repair_collection):
        with pytest.raises(UsageError, match="another version"):
            act(collection.folder)
    assert {p: p.read_bytes() for p in collection.folder.rglob("*") if p.is_file()} == before


def as_of_the_version_before(folder: Path) -> None:
    """Makes the files of a collection what that version wrote, as far as they differ."""
    content = read_sealed(folder / "collection.json")
    (folder / "collection.json").write_bytes(seal({**content, "schema": 2}))
    for path in (folder / "outcomes").glob("*.jsonl"):
        commit = Commit.from_bytes(int(path.stem), path.read_bytes())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("pipeline.commits.COMMIT_SCHEMA", 2)
            path.write_bytes(commit.to_bytes())


def test_a_collection_without_moments_is_read_as_it_is_and_written_as_one_of_this_version(
    collection: Collection,
) -> None:
    collection.update({"model": "fake"}, {"name": "fake"})
    add(collection, row(1), row(2))
    folder = collection.folder
    as_of_the_version_before(folder)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    old = Collection(folder)
    state, records = Snapshot(old).state, Snapshot(old).records
    assert old.schema == 2 and (old.config, old.encoder) == (collection.config, collection.encoder)
    assert state.outdated == {"embeddings/caption-0.25"}
    assert state.places.keys() == {"features"} and state.places["features"].keys() == {"id-1", "id-2"}
    assert list(records) == ["features/000001.h5"]
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before  # reading changes nothing
    with old.writing("test") as writer:
        assert old.schema == 3
        written = read_sealed(folder / "collection.json")
        assert written == {"schema": 3, "config": {"model": "fake"}, "encoder": {"name": "fake"}}
        assert files_of(folder) >= {"features/000001.h5", "outcomes/000001.jsonl"}
        assert "embeddings/caption-0.25/000001.h5" not in files_of(folder)  # of use to nobody any more
        writer.commit("select", [row(1), row(2)], list(data(b"new"))[1:])  # type: ignore[arg-type]
    new = Collection(folder)
    assert new.schema == 3 and (new.config, new.encoder) == (collection.config, collection.encoder)
    assert new.state() == writer.state
    assert new.state().places["embeddings/caption-0.25"]["id-1"].commit == 2
    assert sorted(Snapshot(new).records) == ["embeddings/caption-0.25/000002.h5", "features/000001.h5"]


@pytest.mark.parametrize("schema", [1, 4, None, "3"])
def test_a_commit_of_an_unknown_version_is_refused(
    schema: object, collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(collection, row(1))
    commit = next(iter(collection.commits()))
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.commits.COMMIT_SCHEMA", schema)
        collection.commit_path(1).write_bytes(commit.to_bytes())
    with pytest.raises(IntegrityError, match=f"schema {schema}, expected 3"):
        collection.state()


@pytest.mark.fault
def test_a_kill_while_a_collection_is_made_lets_the_same_command_make_it(tmp_path: Path) -> None:
    for die_at in range(1, 20):
        folder = tmp_path / str(die_at)
        code = run_until_killed(CREATE, folder, die_at)
        if not Collection.exists(folder):
            Collection.create(folder, {"model": "new"})
        assert Collection(folder).config == {"model": "new"}
        if code == 0:
            break
    else:
        pytest.fail("it never survived")


# ---------------------------------------------------------------------------------------------------------- lock

HOLD = """
    import sys, time
    from pathlib import Path
    from pipeline.lock import Lock
    with Lock(Path(sys.argv[1]), "fineco run 'my videos'"):
        print("held", flush=True)
        time.sleep(60)
"""
TRY = """
    import sys
    from pathlib import Path
    from pipeline.lock import Lock
    from pipeline.errors import FinecoError
    try:
        with Lock(Path(sys.argv[1]), "second"):
            print("taken")
    except FinecoError as error:
        print(error)
        sys.exit(error.exit_code)
"""


@pytest.mark.fault
def test_a_second_writer_is_refused_at_once_and_told_by_whom(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLD), str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        started = time.monotonic()
        with pytest.raises(UsageError, match=rf"'fineco run 'my videos'' \(process {holder.pid} on ") as refused:
            Lock(tmp_path, "second").__enter__()
        assert time.monotonic() - started < 2
        assert "Wait for it" in refused.value.hint
        again = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(TRY), str(tmp_path)],
            cwd=ROOT, capture_output=True, text=True, timeout=60,
            env={**os.environ, "HDF5_USE_FILE_LOCKING": "FALSE"},
        )  # fmt: skip
        assert again.returncode == 2
        assert f"process {holder.pid}" in again.stdout
    finally:
        holder.kill()
        holder.wait()
        if holder.stdout is not None:
            holder.stdout.close()
    started = time.monotonic()
    with Lock(tmp_path, "after a kill"):
        assert time.monotonic() - started < 2


def test_a_lock_that_was_given_back_is_free(tmp_path: Path) -> None:
    for _ in range(3):
        with Lock(tmp_path, "one after the other"), pytest.raises(UsageError, match=f"process {os.getpid()}"):
            Lock(tmp_path, "second").__enter__()
    assert (tmp_path / ".lock").read_bytes() == b""


def test_a_writer_that_cannot_read_the_collection_gives_the_lock_back(collection: Collection) -> None:
    add(collection, row(1))
    (collection.folder / "outcomes" / "000001.jsonl").write_text("damaged")
    for _ in range(2):
        with pytest.raises(IntegrityError), collection.writing("test"):
            pass


@pytest.mark.fault
def test_the_lock_holds_on_a_full_disk(tmp_path: Path) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
    done = subprocess.run(
        [sys.executable, "-c", limit + textwrap.dedent(TRY), str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "taken\n"), done.stderr


# --------------------------------------------------------------------------------------------------- merge rules


def merged(*commits: tuple[str, list[Row]]) -> State:
    """State after commits of (kinds of data files, separated by spaces; rows)."""
    state = State()
    for number, (kinds, rows) in enumerate(commits, 1):
        files = {f"{kind}/{number:06d}.h5": FileRecord(1, "") for kind in kinds.split()}
        state.merge(Commit(number, "run", files, rows))
    return state


def test_the_last_row_of_a_path_counts() -> None:
    state = merged(("", [row(1, "failed")]), ("features", [row(1)]), ("", [row(2, "failed"), row(2, "skipped")]))
    assert state.latest["/videos/1.mp4"] == (2, "id-1", "ok", "")
    assert state.latest["/videos/2.mp4"] == (3, "id-2", "skipped", "why")
    assert state.last_number == 3
    assert state.has("features", video(1))
    assert not state.has("features", video(2))
    assert state.known["/videos/1.mp4"].size_bytes == 1001


def test_data_of_other_content_is_no_data() -> None:
    state = merged(("features", [row(1)]))
    assert not state.has("features", replace(video(1), content="other"))
    assert not state.has("frames", video(1))


def test_a_moved_video_keeps_its_data_and_is_counted_once() -> None:
    state = merged(("features", [row(1)]), ("", [row(1, path="/elsewhere/1.mp4", stage="catalog")]))
    assert state.has("features", video(1))
    assert state.paths == {"id-1": "/elsewhere/1.mp4"}
    assert set(state.latest) == {"/elsewhere/1.mp4"}


def test_two_videos_that_swap_names_both_stay() -> None:
    state = merged(("features", [row(1, path="/a"), row(2, path="/b")]), ("", [row(1, path="/b"), row(2, path="/a")]))
    assert state.paths == {"id-1": "/b", "id-2": "/a"}
    assert {path: latest[1] for path, latest in state.latest.items()} == {"/a": "id-2", "/b": "id-1"}


def test_a_removed_video_leaves_and_comes_back() -> None:
    state = merged(("features", [row(1)]), ("", [row(1, "removed")]))
    assert state.paths == {}
    assert state.has("features", video(1))
    state.merge(Commit(3, "run", {}, [row(1, stage="catalog")]))
    assert state.paths == {"id-1": "/videos/1.mp4"}


def test_removing_a_path_does_not_remove_a_video_that_was_found_elsewhere() -> None:
    state = merged(("features", [row(1, path="/a")]), ("", [row(1, path="/b"), row(1, "removed", path="/a")]))
    assert state.paths == {"id-1": "/b"}


@pytest.mark.parametrize("status", ["ok", "failed", "skipped"])
def test_a_file_with_new_content_replaces_the_video_that_was_there(status: str) -> None:
    """A hit of the old video would show the new file."""
    state = merged(("features", [row(1, path="/a"), row(2, path="/b")]), ("features", [row(3, status, path="/a")]))
    assert state.paths == {"id-2": "/b"} | ({"id-3": "/a"} if status == "ok" else {})


def test_a_file_that_cannot_be_read_for_once_keeps_its_video() -> None:
    unreadable = Row(Outcome("path-0123", "/a", "failed", "catalog", "unreadable"))
    assert merged(("features", [row(1, path="/a")]), ("", [unreadable])).paths == {"id-1": "/a"}


@pytest.mark.parametrize("last", ["removed", "replaced"])
def test_selecting_anew_brings_no_video_back(last: str) -> None:
    """It works from features, and does not look whether the file is still there, nor what lies there now."""
    gone = row(1, "removed", path="/a") if last == "removed" else row(2, path="/a")
    stale = row(1, path="/a", stage="select")
    state = merged(("features", [row(1, path="/a")]), ("features", [gone]), ("embeddings/all", [stale]))
    assert state.paths == ({} if last == "removed" else {"id-2": "/a"})
    assert state.latest["/a"][1] == gone.outcome.video_id
    assert state.known["/a"].content == gone.content
    assert state.places["embeddings/all"]["id-1"].commit == 3


def test_other_texts_drop_only_what_was_selected_by_them() -> None:
    kinds = "features embeddings/caption-0.25 embeddings/caption-8 embeddings/uniform-8"
    state = merged((kinds, [row(1, texts=("old",)), row(2, texts=("same",))]))
    changed = video(1, texts=(TimedText("new"),))
    assert state.texts_changed(changed)
    assert not state.texts_changed(video(2, texts=(TimedText("same"),)))
    state.merge(Commit(2, "catalog", {}, [row(1, stage="catalog", texts=("new",)), row(2, texts=("same",))]))
    assert {kind for kind in kinds.split() if state.has(kind, changed)} == {"features", "embeddings/uniform-8"}
    assert {kind for kind in kinds.split() if state.has(kind, video(2))} == set(kinds.split())
    assert not state.texts_changed(changed)
    state.merge(Commit(3, "select", {"embeddings/caption-8/000003.h5": FileRecord(1, "")}, [row(1, texts=("new",))]))
    assert state.has("embeddings/caption-8", changed)


def test_state_on_disk_is_the_state_in_memory(collection: Collection) -> None:
    with collection.writing("test") as writer:
        writer.commit("run", [row(1), row(2, "failed")], data(b"a"))  # type: ignore[arg-type]
        writer.commit("catalog", [row(1, path="/moved", stage="catalog")], [])
        writer.commit("index", [Row(Outcome("id-1", "/moved", "removed", "index"))], [])
        expected = writer.state
    assert collection.state() == expected
    assert json.loads((collection.folder / "collection.json").read_text())["schema"] == 3
