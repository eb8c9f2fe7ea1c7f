"""What is found, under which identity, and what becomes of everything that is no video."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
import socket
import string
import tempfile
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import catalog
from pipeline.catalog import Known, check_unchanged, content_digest, find_videos
from pipeline.errors import FinecoError, UsageError, VideoError
from pipeline.sources import VIDEO_EXTENSIONS
from pipeline.types import Outcome, TimedText, Video


def make(path: Path, content: str | bytes | None = None) -> Path:
    """A file with content of its own: no decoder is asked here."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = str(path) if content is None else content
    path.write_bytes(os.fsencode(data) if isinstance(data, str) else data)
    return path


def find(*sources: str | Path, manifest: Path | None = None) -> list[Video | Outcome]:
    return list(find_videos(sources, manifest))


def names(found: Sequence[Video | Outcome], folder: Path) -> list[str]:
    """Relative paths of the videos, and code:path of everything else."""
    return [("" if isinstance(item, Video) else f"{item.code}:") + os.path.relpath(item.path, folder) for item in found]


def only_outcome(found: Sequence[Video | Outcome]) -> Outcome:
    (outcome,) = [item for item in found if isinstance(item, Outcome)]
    return outcome


def only_video(found: Sequence[Video | Outcome]) -> Video:
    (video,) = found
    assert isinstance(video, Video)
    return video


# ---- what is found


def test_a_folder_is_searched_to_the_bottom_in_order(tmp_path: Path) -> None:
    for name in ("b/x.mkv", "a.mp4", "c.MOV", "b/y/z.webm", "notes.txt", "a.jpg", "song.mp3", ".h.mp4", ".git/v.mp4"):
        make(tmp_path / name)
    make(tmp_path / "list.m3u8")
    make(tmp_path / "film.mp4/inside.avi")
    assert names(find(tmp_path), tmp_path) == ["a.mp4", "b/x.mkv", "b/y/z.webm", "c.MOV", "film.mp4/inside.avi"]


def test_no_playlist_and_no_image_is_a_video() -> None:
    refused = {".m3u8", ".m3u", ".mpd", ".sdp", ".ffconcat", ".pls", ".jpg", ".png", ".mp3", ".m4a", ".jsonl", ".csv"}
    assert not refused & VIDEO_EXTENSIONS
    assert all(extension[0] == "." and extension == extension.lower() for extension in VIDEO_EXTENSIONS)


def test_a_named_file_is_taken_whatever_its_extension(tmp_path: Path) -> None:
    sources = [make(tmp_path / name) for name in ("NO_EXTENSION", "song.m4a", ".hidden.mp4", "x.txt")]
    assert names(find(*sources), tmp_path) == ["NO_EXTENSION", "song.m4a", ".hidden.mp4", "x.txt"]


def test_paths_are_absolute_and_keep_the_names_of_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "real" / "a.mp4")
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    assert only_video(find("link/../link/a.mp4")).path == str(tmp_path / "link" / "a.mp4")


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    make(tmp_path / "a" / "one.mp4")
    make(tmp_path / "elsewhere" / "two.mp4")
    (tmp_path / "a" / "loop").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "up").symlink_to("..")
    (tmp_path / "a" / "out").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "a" / "self").symlink_to("self")
    assert names(find(tmp_path / "a"), tmp_path) == ["a/one.mp4", "a/out/two.mp4"]


def test_a_linked_file_is_found_and_is_the_content_it_links_to(tmp_path: Path) -> None:
    make(tmp_path / "a" / "one.mp4")
    (tmp_path / "a" / "two.mp4").symlink_to("one.mp4")
    assert names(find(tmp_path / "a"), tmp_path) == ["a/one.mp4", "duplicate:a/two.mp4"]
    assert names(find(tmp_path / "a" / "two.mp4"), tmp_path) == ["a/two.mp4"]


def test_what_several_sources_show_is_listed_once(tmp_path: Path) -> None:
    one, two = make(tmp_path / "a" / "one.mp4"), make(tmp_path / "a" / "b" / "two.mp4")
    make(tmp_path / "a" / "b" / "again.mp4", two.read_bytes())
    make(tmp_path / "a" / "empty.mp4", b"")
    found = find(one, tmp_path / "a", tmp_path / "a" / "b", str(tmp_path / "**" / "*.mp4"), one)
    assert names(found, tmp_path / "a") == ["one.mp4", "b/again.mp4", "duplicate:b/two.mp4", "empty:empty.mp4"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.mp4", ["a1.mp4", "a2.mp4"]),
        ("a?.m*", ["a1.mp4", "a2.mp4", "a3.mkv"]),
        ("a[13].*", ["a1.mp4", "a3.mkv"]),
        ("*/a4.mp4", ["s/a4.mp4"]),
        ("s*", ["s/a4.mp4", "s/t/a5.mp4"]),
        ("**/*.mp4", ["a1.mp4", "a2.mp4", "s/a4.mp4", "s/t/a5.mp4"]),
        ("**/t/*", ["s/t/a5.mp4"]),
        ("s/**", ["s/a4.mp4", "s/t/a5.mp4"]),
        ("**/**/a5.mp4", ["s/t/a5.mp4"]),
        ("./s/../*.mkv", ["a3.mkv"]),
        ("*", ["a1.mp4", "a2.mp4", "a3.mkv", "s/a4.mp4", "s/t/a5.mp4"]),
    ],
)
def test_patterns_find_what_a_shell_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, expected: list[str]
) -> None:
    here = tmp_path / "[here]*"  # the current folder's own name is not a pattern
    for name in ("a1.mp4", "a2.mp4", "a3.mkv", "a4.txt", "s/a4.mp4", "s/t/a5.mp4", ".x/a6.mp4", ".a7.mp4"):
        make(here / name)
    (here / "s" / "loop").symlink_to(".")
    monkeypatch.chdir(here)
    assert sorted(names(find(pattern), here)) == expected


def test_a_path_that_exists_wins_over_the_pattern_it_looks_like(tmp_path: Path) -> None:
    make(tmp_path / "a1.mp4")
    make(tmp_path / "a[1].mp4")
    make(tmp_path / "s [2020]" / "b.mp4")
    assert names(find(tmp_path / "a[1].mp4"), tmp_path) == ["a[1].mp4"]
    assert names(find(tmp_path / "s [2020]" / "*.mp4"), tmp_path) == ["s [2020]/b.mp4"]


AWKWARD = [
    "new\nline.mp4",
    "-i.mp4",
    "100%d.mp4",
    'it\'s "x".mp4',
    " lead.mp4",
    "名前 ünï.mp4",
    "<img src=x>.mp4",
    "a" * 251 + ".mp4",
    os.fsdecode(b"\xff\xfe.mp4"),
    "\x1b[31m.mp4",
    "a|b;$(c).mp4",
    "\u202etfel.mp4",
]


@pytest.mark.parametrize("name", AWKWARD, ids=range(len(AWKWARD)))
def test_awkward_names_are_found_by_every_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = make(tmp_path / name, b"x")
    manifest = make(tmp_path / "m.jsonl", json.dumps({"path": name}))
    table = io.StringIO()
    csv.writer(table).writerows([["path"], [name]])
    rows = make(tmp_path / "m.csv", os.fsencode(table.getvalue()))
    monkeypatch.chdir(tmp_path)
    for found in (find(tmp_path), find(name), find(path), find("*.mp4"), find(manifest), find(rows)):
        video = only_video(found)
        assert video.path == str(path) and check_unchanged(video)


@settings(max_examples=40)
@given(
    st.sets(
        st.text(alphabet=string.printable + "é猫\udcff", min_size=1, max_size=20).filter(
            lambda name: not set(name) & {"/", "\0"} and name[0] != "."
        ),
        min_size=1,
        max_size=6,
    )
)
def test_every_name_is_found_and_kept(found_names: set[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name in found_names:
            make(Path(folder) / (name + ".mp4"), name)
        assert names(find(folder), Path(folder)) == sorted(name + ".mp4" for name in found_names)


# ---- what cannot be a video


def test_what_is_no_file_is_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")  # opening it would wait for ever
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(tmp_path)  # the name of a socket may be 107 bytes long
        try:
            server.bind("socket.mp4")
        finally:
            os.chdir(here)
        (tmp_path / "device.mp4").symlink_to("/dev/zero")
        found = find(tmp_path)
    assert names(found, tmp_path) == [f"not_a_file:{name}.mp4" for name in ("device", "pipe", "socket")]
    messages = [item.message for item in found if isinstance(item, Outcome)]
    assert messages == [f"is {what}, not a file" for what in ("a device", "a named pipe", "a socket")]


def test_what_is_gone_empty_or_leads_nowhere_has_its_code(tmp_path: Path) -> None:
    make(tmp_path / "empty.mp4", b"")
    (tmp_path / "dangling.mp4").symlink_to("nowhere")
    (tmp_path / "self.mp4").symlink_to("self.mp4")
    found = find(tmp_path)
    assert names(found, tmp_path) == ["missing:dangling.mp4", "empty:empty.mp4", "missing:self.mp4"]
    assert all(isinstance(o, Outcome) and (o.status, o.stage) == ("failed", "catalog") for o in found)
    assert isinstance(found[0], Outcome) and "'nowhere'" in found[0].message
    expected = "path-" + hashlib.sha256(os.fsencode(tmp_path / "dangling.mp4")).hexdigest()[:27]
    assert found[0].video_id == expected and len(expected) == 32


def test_a_file_that_vanishes_during_the_search_is_missing(tmp_path: Path) -> None:
    make(tmp_path / "a.mp4")
    second = make(tmp_path / "b.mp4")
    search = find_videos([tmp_path])
    next(search)
    second.unlink()
    assert names(list(search), tmp_path) == ["missing:b.mp4"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_what_may_not_be_read_has_its_code(tmp_path: Path) -> None:
    make(tmp_path / "a.mp4").chmod(0)
    make(tmp_path / "b" / "c.mp4").parent.chmod(0)
    try:
        assert names(find(tmp_path), tmp_path) == ["unreadable:a.mp4", "unreadable:b"]
    finally:
        (tmp_path / "b").chmod(0o700)


def test_a_refusal_of_the_system_has_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, size: int) -> str:
        raise PermissionError(13, "Permission denied", path)

    make(tmp_path / "a.mp4")
    monkeypatch.setattr(catalog, "content_digest", refuse)
    assert names(find(tmp_path), tmp_path) == ["unreadable:a.mp4"]


def test_the_second_of_one_content_is_skipped_and_names_the_first(tmp_path: Path) -> None:
    make(tmp_path / "a" / "first.mp4", b"same")
    make(tmp_path / "b" / "second.mp4", b"same")
    make(tmp_path / "b" / "other.mp4", b"diff")
    found = find(tmp_path)
    assert names(found, tmp_path) == ["a/first.mp4", "b/other.mp4", "duplicate:b/second.mp4"]
    outcome = only_outcome(found)
    assert outcome.status == "skipped" and repr(str(tmp_path / "a" / "first.mp4")) in outcome.message
    assert len({item.video_id for item in found}) == 3


# ---- identity


def digest_oracle(data: bytes) -> str:
    """The rule of `content_digest` over bytes in memory."""
    hashed = b"%d\n" % len(data)
    if len(data) <= 2**20:
        hashed += data
    else:
        hashed += data[: 128 * 1024]
        for i in range(1, 9):
            start = 128 * 1024 + (len(data) - 2 * 128 * 1024 - 64 * 1024) * i // 9
            hashed += data[start : start + 64 * 1024]
        hashed += data[-128 * 1024 :]
    return hashlib.sha256(hashed).hexdigest()[:32]


@pytest.mark.parametrize("size", [1, 1000, 2**20, 2**20 + 1, 3 * 2**20 + 7])
def test_the_digest_follows_its_rule_wherever_the_file_lies(tmp_path: Path, size: int) -> None:
    data = (b"".join(i.to_bytes(4, "big") for i in range(size // 4 + 1)))[:size]
    path = make(tmp_path / "a.mp4", data)
    video = only_video(find(path))
    assert video.content == video.video_id == content_digest(str(path), size) == digest_oracle(data)
    (tmp_path / "moved").mkdir()
    assert only_video(find(path.rename(tmp_path / "moved" / "b.mov"))).video_id == video.video_id


@pytest.mark.parametrize("at", [0, 2**20 - 1])
def test_one_byte_of_a_small_file_is_another_content(tmp_path: Path, at: int) -> None:
    data = bytearray(2**20)
    before = content_digest(str(make(tmp_path / "a.mp4", bytes(data))), len(data))
    data[at] = 1
    assert content_digest(str(make(tmp_path / "a.mp4", bytes(data))), len(data)) != before


def test_a_file_that_shrinks_while_it_is_read_is_changed(tmp_path: Path) -> None:
    path = make(tmp_path / "a.mp4", b"123")
    with pytest.raises(VideoError, match="shorter") as error:
        content_digest(str(path), 4)
    assert (error.value.code, error.value.stage) == ("changed", "catalog")


def known_of(video: Video, content: str) -> Known:
    return Known(video.size_bytes, video.mtime_ns, video.ctime_ns, content)


def test_a_known_file_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path / "a.mp4")
    record = known_of(only_video(find(path)), "0" * 32)
    monkeypatch.setattr(catalog, "content_digest", None)  # a call would fail
    asked: list[str] = []

    def known(path: str) -> Known | None:
        asked.append(path)
        return record

    assert only_video(list(find_videos([path], known=known))).content == "0" * 32
    assert asked == [str(path)]


def test_an_edit_that_puts_mtime_and_size_back_is_seen(tmp_path: Path) -> None:
    path = make(tmp_path / "a.mp4", b"before")
    video = only_video(find(path))
    assert check_unchanged(video)
    edited = os.stat(path)
    while os.stat(path).st_ctime_ns == edited.st_ctime_ns:  # the file system's clock ticks every few ms
        path.write_bytes(b"after!")
        os.utime(path, ns=(edited.st_atime_ns, edited.st_mtime_ns))
    again = only_video(list(find_videos([path], known=lambda _: known_of(video, video.content))))
    assert (again.size_bytes, again.mtime_ns) == (video.size_bytes, video.mtime_ns)
    assert again.content == digest_oracle(b"after!") != video.content
    assert not check_unchanged(video) and check_unchanged(again)
    path.unlink()
    assert not check_unchanged(again)


# ---- manifests


def test_jsonl_gives_ids_and_texts_and_joins_the_rows_of_a_path(tmp_path: Path) -> None:
    one, two = make(tmp_path / "v" / "one.mp4"), make(tmp_path / "v" / "two.NONE")
    make(tmp_path / "v" / "one.txt", "beside\nfirst\n")
    rows: list[object] = [
        {"path": "v/one.mp4", "id": "one", "caption": "first", "license": "any"},
        {"path": str(two), "captions": ["x", {"text": "y", "start": 1, "end": 2}], "texts": ["z"], "caption": None},
        {"path": "./v/../v/one.mp4", "caption": "late", "start": 0.5, "end": 1},
    ]
    manifest = make(tmp_path / "m.jsonl", "\ufeff" + "\n\n".join(map(json.dumps, rows)) + "\n")
    found = find(manifest=manifest)
    assert find(manifest) == found
    assert [(v.path, v.video_id, v.texts) for v in found if isinstance(v, Video)] == [
        (str(two), digest_oracle(two.read_bytes()), (TimedText("x"), TimedText("y", 1.0, 2.0), TimedText("z"))),
        (str(one), "one", (TimedText("first"), TimedText("late", 0.5, 1.0), TimedText("beside"))),
    ]


def test_csv_gives_the_same(tmp_path: Path) -> None:
    make(tmp_path / "one.mp4")
    make(tmp_path / "two.mp4")
    manifest = make(
        tmp_path / "m.CSV",
        "path, id ,caption,start,end,note\r\n"
        'one.mp4,a-1,"first, with ""quotes"" and\nanother line",,,x\r\n\r\n'
        "one.mp4,,late,0.5,1,\r\n"
        "two.mp4,,,,,\r\n",
    )
    first, second = find(manifest)
    assert isinstance(first, Video) and isinstance(second, Video)
    assert first.video_id == "a-1" and second.video_id == second.content
    assert first.texts == (TimedText('first, with "quotes" and another line'), TimedText("late", 0.5, 1.0))
    assert second.texts == ()


BAD_LINES = [
    ('{"path": ', "not JSON: Expecting value (column 9)"),
    ("[1]", "not an object"),
    ('{"video": "a.mp4"}', 'no "path" (it has: video)'),
    ('{"path": 3}', 'no "path"'),
    ('{"path": "a\\u0000b"}', "cannot be a file name"),
    ('{"path": "\\ud800"}', "cannot be a file name"),
    ('{"path": "a", "id": "a b"}', "id 'a b'"),
    ('{"path": "a", "id": 7}', "id 7"),
    ('{"path": "a", "id": "' + "x" * 129 + '"}', "1 to 128"),
    ('{"path": "a", "caption": 7}', "7 is not a text"),
    ('{"path": "a", "caption": "x", "start": 1}', "both a start and an end"),
    ('{"path": "a", "caption": "x", "start": 2, "end": 1}', "ends before it starts"),
    ('{"path": "a", "caption": "x", "start": NaN, "end": 1}', "finite"),
    ('{"path": "a", "start": 1, "end": 2}', "without a text"),
    ('{"path": "a", "captions": [{"start": 1, "end": 2}]}', "without a text"),
    ('{"path": "a", "caption": "' + "x" * 70_000 + '"}', "70000 bytes"),
    ('{"path": "a", "caption": "caf\udce9"}', "not UTF-8"),
    ('{"path": ' + "[" * 100_000, "nested too deeply"),
    ('{"path": "a", "n": ' + "1" * 5000 + "}", "not JSON"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_stops_everything_with_its_place(tmp_path: Path, line: str, reason: str) -> None:
    manifest = make(tmp_path / "m.jsonl", '{"path": "ok.mp4"}\n\n' + line + '\n{"path": "ok.mp4"}\n')
    with pytest.raises(UsageError) as error:
        find_videos([manifest])  # before any search
    assert f"{manifest}:3: " in str(error.value) and reason in str(error.value)
    assert str(error.value).count("\n") == 1


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        ("file,caption\na,b\n", 1, "it has: file, caption"),
        ("path,path\na,b\n", 1, "every name once"),
        ("path;caption\na;b\n", 1, 'needs "path"'),
        ('path,caption\na,"x\ny"\nb\n', 4, "1 fields, the header has 2"),
        ("path,caption\na,b,c\n", 2, "3 fields"),
        ("path,caption,start,end\na,x,zero,1\n", 2, "start is 'zero'"),
        ("path,caption,start,end\na,x,inf,inf\n", 2, "finite"),
        ("path,caption,start,end\na,,0,1\n", 2, "without a text"),
        ('path,caption\na,b\nc,"x\nd,e\n', 3, "not CSV"),
        ("path\n" + "a" * 5_000_000 + "\n", 2, "longer than"),
    ],
)
def test_a_bad_row_of_a_csv_has_its_place(tmp_path: Path, content: str, line: int, reason: str) -> None:
    manifest = make(tmp_path / "m.csv", content)
    with pytest.raises(UsageError) as error:
        find_videos([manifest])
    assert f"{manifest}:{line}: " in str(error.value) and reason in str(error.value)


def test_the_first_ten_problems_are_shown_and_the_rest_counted(tmp_path: Path) -> None:
    manifest = make(tmp_path / "m.jsonl", "oops\n" * 25)
    with pytest.raises(UsageError) as error:
        find_videos([manifest])
    assert str(error.value).count("not JSON") == 10 and "(and 15 more)" in str(error.value)


def test_one_id_for_two_paths_is_an_error_with_both_places(tmp_path: Path) -> None:
    first = make(
        tmp_path / "a.jsonl", '{"path": "x.mp4", "id": "i"}\n{"path": "z.mp4"}\n{"path": "x.mp4", "id": "i"}\n'
    )
    second = make(tmp_path / "b.csv", "path,id\nw.mp4,\ny.mp4,i\n")
    with pytest.raises(UsageError) as error:
        find_videos([first, second])
    assert f"{second}:3: the id of another path on {first}:3" in str(error.value)
    assert str(error.value).count("\n") == 1


def test_two_ids_for_one_path_are_an_error_with_both_places(tmp_path: Path) -> None:
    manifest = make(tmp_path / "m.csv", "path,id\nx.mp4,i\ny.mp4,k\n./x.mp4,j\n")
    with pytest.raises(UsageError) as error:
        find_videos([manifest])
    assert f"{manifest}:4: another id for the path on {manifest}:2" in str(error.value)


def test_manifest_rows_of_one_content_with_ids_are_both_kept(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d"):
        make(tmp_path / f"{name}.mp4", b"same")
    rows = [{"path": "a.mp4", "id": "A"}, {"path": "b.mp4", "id": "B"}, {"path": "c.mp4"}]
    manifest = make(tmp_path / "m.jsonl", "\n".join(map(json.dumps, rows)))
    found = find(tmp_path, manifest=manifest)  # the folder shows all of them again, and one more
    assert names(found, tmp_path) == ["a.mp4", "b.mp4", "duplicate:c.mp4", "duplicate:d.mp4"]
    assert [item.video_id for item in found[:2]] == ["A", "B"]


def test_a_row_without_id_takes_its_content_from_a_later_row_with_one(tmp_path: Path) -> None:
    make(tmp_path / "a.mp4", b"same")
    make(tmp_path / "b.mp4", b"same")
    manifest = make(tmp_path / "m.jsonl", '{"path": "a.mp4"}\n{"path": "b.mp4", "id": "B"}\n')
    found = find(manifest)
    assert names(found, tmp_path) == ["a.mp4", "duplicate:b.mp4"] and found[1].video_id == "B"


def test_paths_whose_hashes_collide_are_all_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        make(tmp_path / name)
    manifest = make(tmp_path / "m.csv", "path,caption\na.mp4,x\nb.mp4,y\na.mp4,z\nc.mp4,w\n")
    monkeypatch.setattr("pipeline.manifest.hash", lambda text: 1, raising=False)
    texts = {Path(v.path).name: [t.text for t in v.texts] for v in find(manifest) if isinstance(v, Video)}
    assert texts == {"a.mp4": ["x", "z"], "b.mp4": ["y"], "c.mp4": ["w"]}


def test_a_row_whose_file_is_not_there_fails_under_its_id(tmp_path: Path) -> None:
    (tmp_path / "folder.mp4").mkdir()
    rows = [{"path": "gone.mp4", "id": "g"}, {"path": "folder.mp4"}, {"path": "x" * 300}, {"path": "m.jsonl/x"}]
    manifest = make(tmp_path / "m.jsonl", "\n".join(map(json.dumps, rows)))
    found = find(manifest)
    assert [item.code for item in found if isinstance(item, Outcome)] == ["missing", "not_a_file", "missing", "missing"]
    assert found[0].video_id == "g" and found[1].video_id.startswith("path-")


def test_a_manifest_must_be_a_file_of_a_known_kind(tmp_path: Path) -> None:
    make(tmp_path / "m.json", "{}")
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name, reason in (("m.json", "not a manifest"), ("pipe.jsonl", "not a file"), ("gone.csv", "no such manifest")):
        with pytest.raises(UsageError, match=reason):
            find_videos([], tmp_path / name)
    with pytest.raises(UsageError, match="UTF-16"):
        find_videos([make(tmp_path / "u.csv", "path\na\n".encode("utf-16"))])
    with pytest.raises(UsageError, match="no videos in"):
        list(find_videos([make(tmp_path / "empty.jsonl", "\n")]))


def test_a_folder_named_like_a_manifest_is_a_folder(tmp_path: Path) -> None:
    make(tmp_path / "x.csv" / "a.mp4")
    assert names(find(tmp_path / "x.csv"), tmp_path) == ["x.csv/a.mp4"]


def test_a_manifest_that_changes_between_its_readings_is_an_error(tmp_path: Path) -> None:
    make(tmp_path / "a.mp4")
    manifest = make(tmp_path / "m.jsonl", '{"path": "a.mp4"}\n')
    search = find_videos([manifest])
    with manifest.open("a") as file:
        file.write('{"path": "b.mp4"}\n')
    with pytest.raises(FinecoError, match="changed while"):
        list(search)


ROW_TEXT = st.text(alphabet=string.printable + "é猫", max_size=12)
SPAN = st.none() | st.tuples(st.integers(0, 50), st.integers(0, 50)).map(lambda t: (float(t[0]), float(sum(t))))


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 5), ROW_TEXT, SPAN), min_size=1, max_size=12), st.booleans())
def test_a_manifest_survives_the_way_there_and_back(
    rows: list[tuple[int, str, tuple[float, float] | None]], as_csv: bool
) -> None:
    expected: dict[str, list[TimedText]] = {}
    table: list[dict[str, object]] = []
    for number, caption, span in rows:
        text = " ".join(caption.split())
        row: dict[str, object] = {"path": f"v{number}.mp4", "id": f"id.{number}", "caption": caption}
        if span and text:
            row |= {"start": span[0], "end": span[1]}
        timed = TimedText(text, *(span or (None, None)))
        table.append(row)
        texts = expected.setdefault(f"id.{number}", [])
        if text and timed not in texts:
            texts.append(timed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in {number for number, _, _ in rows}:
            make(folder / f"v{number}.mp4", str(number))
        if as_csv:
            out = io.StringIO()
            writer = csv.DictWriter(out, ["path", "id", "caption", "start", "end"])
            writer.writeheader()
            writer.writerows(table)
            manifest = make(folder / "m.csv", out.getvalue())
        else:
            manifest = make(folder / "m.jsonl", "\n".join(map(json.dumps, table)))
        found = find(manifest)
    assert {v.video_id: list(v.texts) for v in found if isinstance(v, Video)} == expected
    assert [v.video_id for v in found] == [f"id.{n}" for n in dict.fromkeys(n for n, _, _ in reversed(rows))][::-1]


# ---- texts, messages, size


def test_texts_beside_are_attached_and_broken_ones_warned_of(tmp_path: Path) -> None:
    make(tmp_path / "a.mp4")
    make(tmp_path / "a.en.srt", "1\n00:00:01,000 --> 00:00:02,000\nhello\n")
    make(tmp_path / "a.json", "{")
    make(tmp_path / "a.b.txt", "of another video")
    warnings: list[str] = []
    video = only_video(list(find_videos([tmp_path], warn=warnings.append)))
    assert video.texts == (TimedText("hello", 1.0, 2.0),)
    assert len(warnings) == 1 and "a.json" in warnings[0]


def test_a_wrong_path_is_an_error_that_helps(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    with pytest.raises(UsageError) as error:
        find_videos([tmp_path / "vidoes" / "x" / "a.mp4"])
    assert "no such file or folder" in str(error.value)
    assert f"{tmp_path}, has 1 entries" in str(error.value) and f"{tmp_path / 'videos'}?" in str(error.value)
    for source, reason in (
        (str(tmp_path / "*.mp4"), "nothing matches"),
        ("https://example.org/a.mp4", "local files"),
        ("", "an empty name"),
        (str(tmp_path / "new\nline"), r"new\\nline"),
        ("x" * 5000, "no such file"),
    ):
        with pytest.raises(UsageError, match=reason):
            find_videos([source])
    with pytest.raises(UsageError, match="no videos were named"):
        find_videos([])


def test_nothing_found_says_what_was_seen(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "c.mp3", "README", ".x"):
        make(tmp_path / name)
    with pytest.raises(UsageError) as error:
        find(tmp_path)
    assert "4 files, none with the extension of a video (2 .txt, 1 .mp3, 1 without extension)" in str(error.value)
    assert "1 hidden" in str(error.value)


def test_an_empty_source_among_others_is_warned_of(tmp_path: Path) -> None:
    make(tmp_path / "full" / "sub" / "a.mp4")
    (tmp_path / "empty").mkdir()
    warnings: list[str] = []
    list(find_videos([tmp_path / "full", tmp_path / "empty", tmp_path / "full" / "sub"], warn=warnings.append))
    assert warnings == [f"{str(tmp_path / 'empty')!r}: no videos found there"]


@pytest.fixture
def many(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(5000):
        (folder / f"clip_{number:07d}.mp4").write_bytes(b"%d" % number)
    yield folder
    shutil.rmtree(folder)


def test_memory_per_video_stays_small(many: Path) -> None:
    tracemalloc.start()
    try:
        n = sum(isinstance(item, Video) for item in find_videos([many]))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert n == 5000 and peak / n < 400  # a Video with its strings is three times as much


def test_real_clips_and_odd_files(shared: Path) -> None:
    data = shared / "data"
    found = find(data / "videos", data / "odd", data / "odd" / "audio_only.mp3")
    codes = {Path(item.path).name: item.code for item in found if isinstance(item, Outcome)}
    videos = {Path(item.path).name for item in found if isinstance(item, Video)}
    assert codes["zero_bytes.mp4"] == "empty" and codes["webm_named.mp4"] == "duplicate"
    assert {"real_exo_dolbyvision_hdr.MOV", "animated.gif", "raw_annexb_nopts.h264", "audio_only.mp3"} <= videos
    assert not {"NO_EXTENSION", "README.md", "single_still.png", "001.jpg", "cover_art.m4a"} & videos
    assert len([item for item in found if item.path.startswith(str(data / "videos"))]) == 33
