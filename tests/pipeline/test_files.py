"""Files are whole or absent, and damage to them is found."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from pipeline.errors import FinecoError, IntegrityError
from pipeline.files import FileRecord, check_file, record_of, sha256_of, write_bytes, write_file

ROOT = Path(__file__).parents[2]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_writing_returns_length_and_digest(tmp_path: Path) -> None:
    data = os.urandom(100_000)
    record = write_bytes(tmp_path / "new" / "folder" / "x.bin", data)
    assert record == FileRecord(100_000, hashlib.sha256(data).hexdigest())
    assert record == record_of(tmp_path / "new" / "folder" / "x.bin")
    assert (tmp_path / "new" / "folder" / "x.bin").read_bytes() == data
    assert names(tmp_path / "new" / "folder") == ["x.bin"]


def test_an_empty_file_is_a_file(tmp_path: Path) -> None:
    check_file(tmp_path / "x", write_bytes(tmp_path / "x", b""))


def test_a_writer_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    write_bytes(tmp_path / "x", b"old")

    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "x", fail)
    assert (tmp_path / "x").read_bytes() == b"old"
    assert names(tmp_path) == ["x"]


def test_a_failing_rename_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.files.os.replace", refuse)
    with pytest.raises(FinecoError, match=r"cannot write .*x: No space left on device"):
        write_bytes(tmp_path / "x", b"new")
    assert names(tmp_path) == []


def test_a_read_only_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a disk refuses even to remove the temporary file that could not be made."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(FinecoError, match=r"cannot write .*Read-only file system"):
        write_bytes(tmp_path / "x", b"new")


def test_a_file_in_place_of_the_folder_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FinecoError, match=r"cannot write .*file/x"):
        write_bytes(tmp_path / "file" / "x", b"new")
    with pytest.raises(FinecoError, match="cannot write"):
        write_bytes(tmp_path / ("n" * 255), b"new")


def test_the_name_appears_only_after_its_bytes_are_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(descriptor: int) -> None:
        calls.append("fsync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def watched_replace(source: Path, target: Path) -> None:
        calls.append("rename")
        replace(source, target)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("this system does not tell the name of an open file")
    monkeypatch.setattr("pipeline.files.os.fsync", watched_fsync)
    monkeypatch.setattr("pipeline.files.os.replace", watched_replace)
    write_bytes(tmp_path / "x", b"new")
    assert calls == ["fsync x.tmp", "rename", f"fsync {tmp_path.name}"]


@pytest.mark.parametrize("damage", ["cut", "longer", "flipped", "gone", "folder"])
def test_damage_is_found(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    record = write_bytes(path, b"0123456789" * 100)
    check_file(path, record)
    data = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(data[:-1])
    elif damage == "longer":
        path.write_bytes(data + b"\0")
    elif damage == "flipped":
        path.write_bytes(data[:500] + b"\0" + data[501:])
    elif damage == "folder":
        path.mkdir()
        record = FileRecord(path.stat().st_size, record.sha256)
    with pytest.raises(IntegrityError, match=r"x\.bin"):
        check_file(path, record)
    if damage == "flipped":
        check_file(path, record, full=False)  # the length alone is as it was


def test_sha256_is_the_standard_one(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_of(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.fault
def test_a_kill_at_any_step_leaves_the_old_file_or_the_new(tmp_path: Path) -> None:
    code = textwrap.dedent("""
        import os, signal, sys
        from pathlib import Path
        from pipeline import files
        steps = 0
        def killing(call):
            def step(*args):
                global steps
                for _ in range(2):  # before and after
                    steps += 1
                    if steps == int(sys.argv[2]):
                        os.kill(os.getpid(), signal.SIGKILL)
                    if _ == 0:
                        result = call(*args)
                return result
            return step
        os.fsync, os.replace = killing(os.fsync), killing(os.replace)
        files.write_bytes(Path(sys.argv[1]), b"new")
    """)
    seen = []
    for step in range(1, 20):
        (tmp_path / "x").write_bytes(b"old")
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x"), str(step)], cwd=ROOT, timeout=30)
        seen.append((tmp_path / "x").read_bytes())
        assert set(names(tmp_path)) <= {"x", "x.tmp"}
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL
    assert seen == [b"old"] * 3 + [b"new"] * 4  # around fsync, rename, fsync of the folder; and unharmed


def test_a_file_has_the_mode_that_the_user_asked_for_whoever_wrote_it(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        path.unlink(missing_ok=True)
        path.write_bytes(b"x")
        path.chmod(0o600)

    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    write_file(tmp_path / "a", write)
    assert (tmp_path / "a").stat().st_mode == ordinary.stat().st_mode
