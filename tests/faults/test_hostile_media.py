"""A file or a name that points at other media makes nothing be opened: no file, no pipe, no address."""

from __future__ import annotations

import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from PIL import Image

from fakes import FakeEncoder
from guards import Guard
from pipeline import commands
from pipeline.commands import Sources
from pipeline.decode import DecodePool
from pipeline.decoding.container import Report
from pipeline.decoding.decoder import sample_frames
from pipeline.errors import VideoError
from pipeline.inspect import failures_of
from pipeline.sampling import Sampling
from pipeline.types import DecodeLimits, FrameGeometry
from small_runs import FPS5, checked, machine, run
from stories import decode_all
from videos import encode_video, moving_picture, video

ROOT = Path(__file__).parents[2]
GEOMETRY = FrameGeometry(16, 16)
ONCE_A_SECOND = Sampling("fps", 1.0)

HLS = "#EXTM3U\n#EXT-X-TARGETDURATION:2\n{extra}#EXTINF:2.0,\n{target}\n#EXT-X-ENDLIST\n"
MASTER = "#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=100000\n{target}\n"
SDP = "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n"
DASH = (
    '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" mediaPresentationDuration="PT2S">'
    '<Period><AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1000" codecs="avc1.64000a">'
    "<BaseURL>{target}</BaseURL></Representation></AdaptationSet></Period></MPD>"
)

pytestmark = pytest.mark.fault


@dataclass
class Canaries:
    """A server on this machine and a named pipe, and who came: paths asked for, and how often the pipe was opened."""

    address: str
    pipe: Path
    came: list[str] = field(default_factory=list)


@pytest.fixture
def canaries(tmp_path: Path) -> Iterator[Canaries]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found.came.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            return

    def wait_for_a_reader() -> None:
        descriptor = os.open(found.pipe, os.O_WRONLY)  # returns when somebody opens the other end
        found.came.append("pipe")
        os.close(descriptor)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        found = Canaries(f"http://127.0.0.1:{listener.server_address[1]}", tmp_path / "fifo.ts")
        os.mkfifo(found.pipe)
        threading.Thread(target=listener.serve_forever, args=(0.02,), daemon=True).start()
        writer = threading.Thread(target=wait_for_a_reader, daemon=True)
        writer.start()
        time.sleep(0.05)
        yield found
        came = list(found.came)
        reader = os.open(found.pipe, os.O_RDONLY | os.O_NONBLOCK)  # lets the thread go
        writer.join(5)
        os.close(reader)
        listener.shutdown()
        assert came == []


def hostile_files(folder: Path, canaries: Canaries) -> list[Path]:
    """Files of every sort that name other media, under every name; and a harmless `other.ts` that they name."""
    folder.mkdir(exist_ok=True)
    other = encode_video(folder / "other.ts", n_frames=10)
    (folder / "child.m3u8").write_text(HLS.format(extra="", target=other))
    texts = {
        "local": HLS.format(extra="", target=other),
        "relative": HLS.format(extra="", target="other.ts"),
        "http": HLS.format(extra="", target=f"{canaries.address}/segment.ts"),
        "key": HLS.format(extra=f'#EXT-X-KEY:METHOD=AES-128,URI="{canaries.address}/key"\n', target="other.ts"),
        "pipe": HLS.format(extra="", target=canaries.pipe),
        "descriptor": HLS.format(extra="", target="fd:"),
        "master": MASTER.format(target="child.m3u8"),
        "master of http": MASTER.format(target=f"{canaries.address}/child.m3u8"),
        "master of pipe": MASTER.format(target=canaries.pipe),
        "concat": "ffconcat version 1.0\nfile other.ts\n",
        "concat of pipe": f"ffconcat version 1.0\nfile {canaries.pipe}\n",
        "sdp": SDP,
        "dash": DASH.format(target=f"{canaries.address}/x.mp4"),
    }
    found = []
    for kind, text in texts.items():
        for i, suffix in enumerate(("m3u8", "mp4", "mkv", "ts")):
            path = folder / f"{kind}.{suffix}"
            path.write_text(text + i * "\n")  # no two are the same to the catalog
            found.append(path)
    return found


def test_files_that_name_other_media_are_refused(tmp_path: Path, canaries: Canaries) -> None:
    files = hostile_files(tmp_path / "videos", canaries)
    started = time.monotonic()
    with DecodePool(1, ONCE_A_SECOND, GEOMETRY, DecodeLimits()) as pool:
        stories = decode_all(pool, [video(path, path.name) for path in files])
    assert {name: story.failures for name, story in stories.items()} == {
        path.name: [("invalid", False)] for path in files
    }
    assert time.monotonic() - started < 20  # an SDP once made a decoder wait for six seconds


def test_they_are_refused_outside_the_sandbox_too(tmp_path: Path, canaries: Canaries) -> None:
    """The lists of containers and protocols hold by themselves."""
    for path in hostile_files(tmp_path / "videos", canaries):
        with pytest.raises(VideoError) as caught:
            next(sample_frames(str(path), ONCE_A_SECOND, Report(), DecodeLimits()))
        assert caught.value.code == "invalid", path.name


def test_only_the_containers_on_the_list_are_opened(tmp_path: Path) -> None:
    """These two are harmless, but as little on the list as a playlist: it is the list that refuses them."""
    Image.fromarray(moving_picture(1, (32, 32))).save(tmp_path / "picture.bmp")
    (tmp_path / "words.srt").write_text("1\n00:00:00,000 --> 00:00:02,000\nHello\n\n" * 20)
    for name in ("picture.bmp", "words.srt"):
        with pytest.raises(VideoError) as caught:
            next(sample_frames(str(tmp_path / name), ONCE_A_SECOND, Report(), DecodeLimits()))
        assert caught.value.code == "invalid"


@pytest.mark.parametrize("command", ["run", "decode", "embed"])
def test_no_command_opens_what_a_file_names(command: str, tmp_path: Path, canaries: Canaries) -> None:
    files = hostile_files(tmp_path / "videos", canaries)
    named = [*files, canaries.pipe]
    encode_video(tmp_path / "videos" / "good.mp4", n_frames=20)
    sources = Sources([str(tmp_path / "videos"), *map(str, named)])
    collection = tmp_path / "c"
    if command == "run":
        summary = run(collection, sources)
    elif command == "decode":
        summary = commands.decode(collection, sources, FPS5, machine())
    else:
        summary = commands.embed(collection, sources, FPS5, machine(), FakeEncoder())
    outcomes = {Path(row.outcome.path): row.outcome.code for row in failures_of(collection, skipped=True)}
    assert outcomes == {**dict.fromkeys(files, "invalid"), canaries.pipe: "not_a_file"}
    assert summary.n_ok == 2  # the good one and the one that the others name
    checked(collection)


def test_a_name_is_a_file_and_nothing_else(tmp_path: Path, canaries: Canaries, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    encode_video(tmp_path / "a.ts", n_frames=10)
    encode_video(tmp_path / "001.png", [moving_picture(1, (32, 32))], codec="png", pixel_format="rgb24")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "nowhere.mp4").symlink_to("gone.mp4")
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    (tmp_path / "link to pipe.mp4").symlink_to(canaries.pipe)
    missing = [
        *(f"{canaries.address}/a.mp4", "concat:a.ts|a.ts", "file:a.ts", "subfile,,start,0,end,100,,:a.ts"),
        *("%03d.png", "*.png", "-", "pipe:0", "fd:", "fd:0", "data:video/mp4;base64,AAAA", "lavfi:testsrc", "testsrc"),
        *("/dev/video99", "a\0b.ts", "", "nowhere.mp4", "loop.mp4", "a.ts/b.ts", "x" * 300),
    ]
    no_files = ["folder.mp4", "/dev/zero", "/dev/stdin", str(canaries.pipe), "link to pipe.mp4"]
    with DecodePool(1, ONCE_A_SECOND, GEOMETRY, DecodeLimits()) as pool:
        stories = decode_all(pool, [video(name, name) for name in missing + no_files])
    assert {name: story.failures for name, story in stories.items()} == {
        **{name: [("missing", False)] for name in missing},
        **{name: [("not_a_file", False)] for name in no_files},
    }


def test_files_with_such_names_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["%03d.mp4", "-", "concat:a|b.mp4", "http:a.mp4", "file:x.mp4", "a\nb.mp4"]
    whole = encode_video(tmp_path / "x.mp4", n_frames=10).read_bytes()
    for name in names:
        (tmp_path / name).write_bytes(whole)
    monkeypatch.chdir(tmp_path)
    with DecodePool(1, Sampling("fps", 1000.0), GEOMETRY, DecodeLimits()) as pool:
        stories = decode_all(pool, [video(name, name) for name in names])
    assert {name: len(story.seconds) for name, story in stories.items()} == dict.fromkeys(names, 10)


def test_a_program_among_the_videos_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python looks for modules in the current folder first, unless it is told not to."""
    encode_video(tmp_path / "a.mp4", n_frames=10)
    (tmp_path / "json.py").write_text("open('ran', 'w').close()\nraise SystemExit\n")
    monkeypatch.chdir(tmp_path)
    with DecodePool(1, ONCE_A_SECOND, GEOMETRY, DecodeLimits()) as pool:
        assert decode_all(pool, [video(Path("a.mp4"))])["a"].seconds == [0.0]
    assert not (tmp_path / "ran").exists()


def test_a_file_that_is_not_the_one_that_was_found_is_not_decoded(tmp_path: Path) -> None:
    path = encode_video(tmp_path / "a.mp4", n_frames=10)
    status = path.stat()
    recorded = {"size_bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "ctime_ns": status.st_ctime_ns}
    older = {**recorded, "ctime_ns": status.st_ctime_ns - 1}
    with DecodePool(1, ONCE_A_SECOND, GEOMETRY, DecodeLimits()) as pool:
        stories = decode_all(pool, [video(path, "same", **recorded), video(path, "other", **older)])
    assert stories["same"].seconds == [0.0]
    assert stories["other"].failures == [("changed", False)]


# ---- the sandbox

# Tried in a process of its own; each answers with the name of its error, or "done".
ATTEMPTS = """
import json, os, signal, socket, subprocess, sys, threading, ctypes
from pipeline.decoding import sandbox

folder, fence, port = sys.argv[1:]
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl(38, 1, 0, 0, 0)
os.close(os.open(folder + "/there", os.O_CREAT | os.O_WRONLY))
held = {"both": sandbox.lock_down, "files": lambda: sandbox.restrict_files(libc),
        "calls": lambda: sandbox.filter_calls(libc)}[fence]()

def fork():
    if os.fork() == 0:
        os._exit(0)

attempts = {
    "read": lambda: open("/etc/hostname").read(),
    "read own": lambda: open(folder + "/there").read(),
    "create": lambda: open(folder + "/new", "w"),
    "remove": lambda: os.unlink(folder + "/there"),
    "rename": lambda: os.rename(folder + "/there", folder + "/elsewhere"),
    "list": lambda: os.listdir(folder),
    "make folder": lambda: os.mkdir(folder + "/sub"),
    "tcp": lambda: socket.create_connection(("127.0.0.1", int(port)), 2),
    "chmod": lambda: os.chmod(folder, 0o777),
    "socket": lambda: socket.socket(),
    "unix": lambda: socket.socketpair(),
    "fork": fork,
    "signal": lambda: os.kill(os.getppid(), 0),
    "thread": lambda: threading.Thread(target=int).start(),
    "exec": lambda: os.execv(sys.executable, [sys.executable, "-c", "pass"]),
}
found = {}
for name, attempt in attempts.items():
    try:
        attempt()
        found[name] = "done"
    except OSError as error:
        found[name] = type(error).__name__
    except RuntimeError:
        found[name] = "RuntimeError"
print(json.dumps([held, found]))
"""
FILES = ("read", "read own", "create", "remove", "rename", "list", "make folder")
CALLS = ("tcp", "chmod", "socket", "unix", "fork", "signal", "exec")


@pytest.mark.parametrize("fence", ["both", "files", "calls"])
def test_a_locked_down_process_can_open_and_start_nothing(fence: str, tmp_path: Path, canaries: Canaries) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ATTEMPTS, str(tmp_path), fence, canaries.address.rpartition(":")[2]],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if fence == "files" and not done.stdout:  # nothing keeps it from becoming another program, which cannot be read
        pytest.skip(f"could not be tried: {done.stderr[-300:]}")
    held, found = json.loads(done.stdout)
    if not held:
        pytest.skip("this kernel has no such fence")
    refused = dict.fromkeys(FILES, "PermissionError")
    if "seccomp" in held:
        refused |= dict.fromkeys(CALLS, "PermissionError")
    assert {name: found[name] for name in refused} == refused
    assert found["thread"] == "done"
    if held[0].startswith("Landlock"):
        version = int(held[0].split()[1])
        assert found["tcp"] == "PermissionError" or version < 4
        assert found["signal"] == "PermissionError" or version < 6
        assert found["exec"] == "PermissionError"


STRACED = """
import sys, threading
from pathlib import Path
from pipeline.decode import DecodePool
from pipeline.sampling import Sampling
from pipeline.types import DecodeLimits, FrameGeometry, Video

paths = sorted(Path(sys.argv[1]).iterdir())
for sampling, geometry, jpeg in (
    (Sampling("fps", 2.0), FrameGeometry(16, 16, exact=True), False),
    (Sampling("frames", 3), FrameGeometry(16, 16, "bound"), True),
):
    with DecodePool(1, sampling, geometry, DecodeLimits(), jpeg) as pool:
        videos = [Video(path.name, "0" * 32, str(path), 0, 0, 0) for path in paths]
        for event in pool.decode(videos, threading.Event()):
            pass
"""


@pytest.mark.skipif(shutil.which("strace") is None, reason="no strace")
def test_the_system_sees_nothing_opened_but_the_videos(tmp_path: Path, canaries: Canaries) -> None:
    """From the moment a worker is locked down it opens nothing, and the parent nothing but the files it was given."""
    folder = tmp_path / "videos"
    hostile_files(folder, canaries)
    for path in [*folder.glob("*.m3u8"), *folder.glob("*.ts")]:  # half of them are the same again
        if path.name != "other.ts":
            path.unlink()
    whole = encode_video(folder / "good.mkv", n_frames=30, gop=10).read_bytes()
    for i in range(8):
        cut = len(whole) * (i + 1) // 9
        (folder / f"mutant{i}.mkv").write_bytes(whole[:cut] + bytes(9) + whole[cut + 9 * (i % 2) :])
    log = tmp_path / "log"
    wanted = "trace=open,openat,openat2,creat,socket,connect,bind,execve,seccomp"
    try:
        done = subprocess.run(
            ["strace", "-f", "-o", str(log), "-e", wanted, "-e", "signal=none", sys.executable, "-c", STRACED, folder],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
    except subprocess.TimeoutExpired:
        pytest.skip("strace is too slow here")
    if done.returncode and "ptrace" in done.stderr:
        pytest.skip(f"strace may not be used here: {done.stderr.strip()[-200:]}")
    assert done.returncode == 0, done.stderr
    calls = [line.split(maxsplit=1) for line in log.read_text("utf-8", "replace").splitlines()]
    parent = calls[0][0]
    locked: set[str] = set()
    opened: list[str] = []
    for pid, call in calls:
        if call.startswith("seccomp("):
            locked.add(pid)
        elif pid in locked and re.search(r"= \d+$", call):
            opened.append(call)
    assert len(locked) == 2  # one worker after the other
    assert opened == []
    by_parent = {name for pid, call in calls if pid == parent for name in re.findall(rf'"({folder}[^"]*)"', call)}
    assert by_parent <= {str(folder), *map(str, folder.iterdir())}
    assert not any(call.startswith(("connect(", "bind(")) for _, call in calls)


def _guard(file: str, old: str, new: str, test: str) -> Guard:
    return Guard((8,), f"pipeline/{file}", old, new, test)


GUARDS = [
    _guard(
        "decoding/container.py",
        '                "format_whitelist": CONTAINERS,\n',
        "",
        "test_only_the_containers_on_the_list_are_opened",
    ),
    _guard(
        "decode.py",
        "        if not stat.S_ISREG(os.stat(video.path).st_mode):",
        "        if False:",
        "test_a_name_is_a_file_and_nothing_else",
    ),
    _guard("decode.py", '"-P", "-m"', '"-m"', "test_a_program_among_the_videos_is_not_run"),
    _guard(
        "decode.py",
        "    if regular and (not video.size_bytes or found == (video.size_bytes, video.mtime_ns, video.ctime_ns)):",
        "    if regular:",
        "test_a_file_that_is_not_the_one_that_was_found_is_not_decoded",
    ),
    _guard(
        "decoding/sandbox.py",
        "    return [*restrict_files(libc), *filter_calls(libc)]",
        '    return ["Landlock 7", "seccomp"]',
        "test_a_locked_down_process_can_open_and_start_nothing[both]",
    ),
    _guard(
        "decoding/sandbox.py",
        "(1 << n_rights) - 1",
        "(1 << n_rights) - 5",
        "test_a_locked_down_process_can_open_and_start_nothing[files]",
    ),
    _guard(
        "decoding/sandbox.py", "openat 257 56, ", "", "test_a_locked_down_process_can_open_and_start_nothing[calls]"
    ),
    _guard(
        "decoding/sandbox.py",
        "(ANY_BIT, 0, 1, CLONE_THREAD)",
        "(ANY_BIT, 0, 0, CLONE_THREAD)",
        "test_a_locked_down_process_can_open_and_start_nothing[calls]",
    ),
    _guard(
        "decoding/worker.py",
        "    isolation = lock_down()\n",
        '    isolation = ["none"]\n',
        "test_the_system_sees_nothing_opened_but_the_videos",
    ),
]
