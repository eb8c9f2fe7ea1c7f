"""Names and paths are data: one line in a log, the same bytes in every format, nothing written elsewhere."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from threading import Event

import pytest

from command_line import fineco
from fakes import FakeEncoder
from guards import Guard
from other_user import as_nobody, open_folder
from pipeline import commands
from pipeline.catalog import find_videos
from pipeline.commands import Machine, Sources
from pipeline.decode import DecodedFrame, DecodeEvent, DecodePool
from pipeline.errors import FinecoError, UsageError
from pipeline.inspect import failures_of
from pipeline.types import Outcome, Video
from small_runs import FPS5, HALF, checked, make_clip, make_videos, run

GUARDS = [
    Guard(
        faults=(13,),
        file="pipeline/progress.py",
        old='"".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)',
        new="line",
        test="test_hostile_names_are_one_line_each_and_come_back_byte_for_byte",
    ),
    Guard(
        faults=(13,),
        file="pipeline/output.py",
        old='text.encode("utf-8", "surrogateescape")',
        new='text.encode("utf-8", "replace")',
        test="test_hostile_names_are_one_line_each_and_come_back_byte_for_byte",
    ),
    Guard(
        faults=(13,),
        file="pipeline/output.py",
        old='        lines.append(f"{hit.rank:>3}  {hit.score:.3f}  {span:<{width}}  {visible(hit.path)}")',
        new='        lines.append(f"{hit.rank:>3}  {hit.score:.3f}  {span:<{width}}  {hit.path}")',
        test="test_hostile_names_are_one_line_each_and_come_back_byte_for_byte",
    ),
    Guard(
        faults=(14,),
        file="pipeline/catalog.py",
        old="        if not stat.S_ISREG(status.st_mode):  #",
        new="        if stat.S_ISDIR(status.st_mode):  #",
        test="test_a_folder_of_traps_ends_and_names_each",
    ),
    Guard(
        faults=(14,),
        file="pipeline/sources.py",
        old="if (status.st_dev, status.st_ino) in census.visited:",
        new="if False:",
        test="test_links_in_a_circle_are_walked_once",
    ),
    Guard(
        faults=(14,),
        file="pipeline/sources.py",
        old="    if isinstance(error, PermissionError):",
        new="    if False:",
        test="test_what_may_not_be_read_is_unreadable_for_another_user_too",
    ),
    Guard(
        faults=(14,),
        file="pipeline/run.py",
        old='elif event.error.stage == "decode" and not check_unchanged(event.video):',
        new="elif False:",
        test="test_a_file_that_goes_away_is_done_when_it_is_back[before]",
    ),
    Guard(
        faults=(14,),
        file="pipeline/run.py",
        old="    if decoded.from_store or check_unchanged(decoded.video):",
        new="    if True:",
        test="test_a_file_that_goes_away_is_done_when_it_is_back[while]",
    ),
    Guard(
        faults=(14, 24),
        file="pipeline/manifest.py",
        old="    if not os.path.isfile(path):",
        new="    if False:",
        test="test_a_manifest_from_anywhere_is_refused_at_once[device-is not a file]",
    ),
    Guard(
        faults=(14, 24),
        file="pipeline/manifest.py",
        old="        if len(line) > MAX_LINE_BYTES:",
        new="        if False:",
        test="test_a_manifest_from_anywhere_is_refused_at_once[one long line-longer than 4194304 bytes]",
    ),
]

pytestmark = pytest.mark.fault

NAMES = [
    b"two words.mp4",
    b"new\nline.mp4",
    b"failed: forged.mp4: no such [code]\n.mp4",
    b"-i.mp4",
    b"--help.mp4",
    b"%d.mp4",
    b"%s%n.mp4",
    b"quote'\"`.mp4",
    b"$(touch pwned);|&.mp4",
    b"n" * 251 + b".mp4",
    b"caf\xe9 \xff.mp4",
    "\u202egpj.\u2066exe.mp4".encode(),
    b"\x1b[2J\x1b]0;title\x07.mp4",
    b"<img src=x onerror=alert(1)>.mp4",
    b"a..b.mp4",
    b"\\..\\..\\x.mp4",
    b"http:..x.mp4",
    b"concat:a|b.mp4",
    b"=1+1.mp4",
    b"[abc]*?.mp4",
]


@pytest.fixture
def kitchen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.registry.load_encoder", lambda name, device="auto", precision="auto": FakeEncoder())


def everything(folder: Path) -> set[bytes]:
    return {os.path.join(top, name) for top, folders, names in os.walk(os.fsencode(folder)) for name in folders + names}


@pytest.mark.usefixtures("kitchen")
def test_hostile_names_are_one_line_each_and_come_back_byte_for_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    videos = tmp_path / "v"
    videos.mkdir()
    clip = make_clip(videos / "clip.mp4", 0)
    for number, name in enumerate(NAMES):  # the same video, with bytes at its end that make it another content
        with open(os.fsencode(videos) + b"/" + name, "xb") as file:
            file.write(clip.read_bytes() + b"\0\0\0\x0cfree" + number.to_bytes(4, "big"))
        with open(os.fsencode(videos) + b"/x%02d " % number + name[-200:], "xb") as file:
            file.write(b"no video %d" % number)
    clip.unlink()
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    before = everything(tmp_path)
    said: list[str] = []
    collection = tmp_path / "c\n\x1b[1m"
    noisy = Machine(workers=1, batch_size=8, say=said.append)
    summary = run(collection, videos, machine=noisy)
    assert summary.n_ok == len(NAMES) and summary.n_failed == len(NAMES)

    notes = capfd.readouterr().err
    assert sum(line.startswith("failed: ") for line in notes.splitlines()) == len(NAMES)
    assert all(c.isprintable() or c == "\n" for c in notes)
    new = everything(tmp_path) - before
    assert all(path.startswith(os.fsencode(collection)) for path in new)

    wanted = {os.path.join(os.fsencode(videos), name) for name in NAMES}
    found: dict[str, list[bytes]] = {}
    for form in ("json", "jsonl", "csv", "paths", "table"):
        done = fineco("search", "red", "-c", collection, "-k", 100, "--format", form)
        assert done.code == 0, done.err
        text = done.out.decode("utf-8", "surrogateescape")
        if form == "json":
            found[form] = [os.fsencode(hit["path"]) for answer in json.loads(text) for hit in answer["hits"]]
        elif form == "jsonl":
            found[form] = [os.fsencode(json.loads(line)["path"]) for line in text.splitlines()]
        elif form == "csv":
            rows = list(csv.DictReader(text.splitlines(keepends=True)))
            found[form] = [os.fsencode(row["path"]) for row in rows]
        elif form == "paths":
            assert all(path + b"\n" in done.out for path in wanted)
        else:
            lines = text.splitlines()
            assert len(lines) == len(NAMES) and all(line.isprintable() for line in lines)
    for form, paths in found.items():
        assert set(paths) == wanted and len(paths) == len(wanted), form
    for command in (("status",), ("failures",), ("verify",)):
        out = fineco(*command, "-c", collection).out.decode()
        assert all(c.isprintable() or c == "\n" for c in out)
    assert len(fineco("failures", "-c", collection).out.splitlines()) == 1 + len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_hostile_name_in_a_manifest_is_the_same_file(name: bytes, tmp_path: Path) -> None:
    path = os.path.join(os.fsencode(tmp_path), name)
    with open(path, "wb") as file:
        file.write(b"x")
    manifest = tmp_path / "m.jsonl"
    manifest.write_text(json.dumps({"path": os.fsdecode(name)}))
    (found,) = find_videos([], manifest)
    assert os.fsencode(found.path) == path and isinstance(found, Video)


def test_a_path_that_leaves_its_folder_is_read_and_nothing_is_written_there(tmp_path: Path) -> None:
    make_videos(tmp_path / "v", 1)
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "m.jsonl").write_text('{"path": "../v/../v/clip0.mp4", "id": "..-x"}\n')
    before = everything(tmp_path)
    run(tmp_path / "c", Sources([], tmp_path / "lists" / "m.jsonl"))
    assert {path for path in everything(tmp_path) - before if not path.startswith(os.fsencode(tmp_path / "c"))} == set()
    for bad in ("../../x", "a/b", "", "x" * 129, "a\n", "é"):
        (tmp_path / "lists" / "m.jsonl").write_text(json.dumps({"path": "../v/clip0.mp4", "id": bad}))
        if bad:
            with pytest.raises(UsageError, match="is not text of 1 to 128"):
                find_videos([], tmp_path / "lists" / "m.jsonl")


def test_links_in_a_circle_are_walked_once(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"x")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert [Path(found.path).name for found in find_videos([tmp_path])] == ["a.mp4"]


def test_a_folder_of_traps_ends_and_names_each(tmp_path: Path) -> None:
    videos = make_videos(tmp_path / "v", 2)
    (videos / "loop").symlink_to(videos)
    (videos / "up").symlink_to("..")
    (videos / "self.mp4").symlink_to("self.mp4")
    (videos / "gone.mp4").symlink_to("nowhere.mp4")
    (videos / "null.mp4").symlink_to("/dev/null")
    (videos / "zero.mp4").symlink_to("/dev/zero")
    os.mkfifo(videos / "pipe.mp4")
    (videos / "folder.mp4").mkdir()
    (videos / "empty.mp4").touch()
    make_clip(videos / "folder.mp4" / "inside.mp4", 5)
    summary = run(tmp_path / "v" / "c", videos)
    assert (summary.n_ok, summary.counts.failed_now) == (3, 6)
    codes = {Path(row.outcome.path).name: row.outcome.code for row in failures_of(videos / "c", skipped=True)}
    assert codes == {
        "self.mp4": "missing",
        "gone.mp4": "missing",
        "null.mp4": "not_a_file",
        "zero.mp4": "not_a_file",
        "pipe.mp4": "not_a_file",
        "empty.mp4": "empty",
    }
    assert run(videos / "c", videos).counts.done_before == 3  # the collection inside is no source of its own


def test_what_may_not_be_read_is_unreadable_for_another_user_too() -> None:
    with open_folder() as folder:
        for name, mode in (("open.mp4", 0o644), ("shut.mp4", 0)):
            (folder / name).write_bytes(name.encode())
            (folder / name).chmod(mode)
        (folder / "shut").mkdir(mode=0)

        def search() -> str:
            found = list(find_videos([folder]))
            return "\n".join(f"{o.code} {o.message}" if isinstance(o, Outcome) else "ok" for o in found)

        refused = "unreadable may not be read by this user (permission denied)"
        assert as_nobody(search) == f"ok\n{refused}\n{refused}"


@pytest.mark.parametrize("when", ["before", "while"])
def test_a_file_that_goes_away_is_done_when_it_is_back(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    videos = make_videos(tmp_path / "v", 2)
    decode = DecodePool.decode
    lost = videos / "clip1.mp4"

    def losing(pool: DecodePool, todo: Iterable[Video], stop: Event) -> Iterator[DecodeEvent]:
        if when == "before":
            lost.rename(tmp_path / "away")
        for event in decode(pool, todo, stop):
            if isinstance(event, DecodedFrame) and event.video.path == str(lost) and lost.exists():
                lost.rename(tmp_path / "away")
            yield event

    with monkeypatch.context() as patch:
        patch.setattr(DecodePool, "decode", losing)
        summary = run(tmp_path / "c", videos)
    assert (summary.n_ok, summary.codes) == (1, {"changed": 1})
    (tmp_path / "away").rename(lost)
    summary = run(tmp_path / "c", videos)  # without --retry-failed: it was no fault of the video
    assert (summary.n_ok, summary.any_failed) == (1, False)
    assert checked(tmp_path / "c")["indexed"] == 2


def make_manifest(kind: str, path: Path) -> None:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "link to itself":
        path.symlink_to(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "one long line":
        with path.open("wb") as file:
            file.truncate(1 << 28)
    elif kind == "NULs":
        path.write_bytes(b"\0" * 100 + b"\n")
    elif kind == "nested":
        path.write_bytes(b"[" * 100_000 + b"\n")
    elif kind == "UTF-16":
        path.write_bytes('{"path": "a.mp4"}\n'.encode("utf-16"))
    elif kind == "duplicate ids":
        path.write_text('{"path": "a.mp4", "id": "i"}\n\n{"path": "b.mp4", "id": "i"}\n')


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("pipe", "is not a file"),
        ("device", "is not a file"),
        ("link to itself", "is not a file"),
        ("folder", "is not a file"),
        ("one long line", "longer than 4194304 bytes"),
        ("NULs", "not JSON"),
        ("nested", "nested too deeply"),
        ("UTF-16", "UTF-16"),
        ("duplicate ids", ":3: the id of another path on"),
    ],
)
def test_a_manifest_from_anywhere_is_refused_at_once(kind: str, reason: str, tmp_path: Path) -> None:
    make_manifest(kind, tmp_path / "m.jsonl")
    done = fineco("run", "--manifest", tmp_path / "m.jsonl", "-c", tmp_path / "c", "--model", "builtin")
    assert done.code == 2 and done.err.startswith("error: ") and reason in done.err
    assert len(done.err.splitlines()) <= 2
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("stage", ["run", "decode"])
def test_a_collection_that_cannot_be_made_is_said_in_two_lines(stage: str, tmp_path: Path) -> None:
    videos = make_videos(tmp_path / "v", 1)
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "file", tmp_path / "file" / "c", tmp_path / "pipe", Path("/proc/c"), Path("/dev/full")):
        with pytest.raises(FinecoError) as refused:
            if stage == "run":
                commands.run(place, Sources([str(videos)]), FPS5, HALF, Machine(quiet=True), encoder=FakeEncoder())
            else:
                commands.decode(place, Sources([str(videos)]), FPS5, Machine(quiet=True))
        assert str(place) in str(refused.value) and str(refused.value).count("\n") == 1
    assert (tmp_path / "file").read_text() == "x"
