"""A collection of the version before this one, which stored no moments: what it says, and how it is brought up to date.

`tests/golden/collection_schema_2` was made by that version: four rendered videos with captions, the built-in encoder.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from command_line import Done, fineco
from pipeline.collection import Collection
from pipeline.store import FeaturesShard

GOLDEN = Path(__file__).parents[1] / "golden" / "collection_schema_2"
QUERY = "a red star of huge size stays still at the right side"  # of video-003, at 0:33.8 to 0:39.3


def moved(line: bytes, before: str, after: str) -> bytes:
    """A line of a commit with another folder of videos, and its digest made again."""
    value = json.loads(line)
    digest = value.pop("digest")
    text = json.dumps(value, separators=(",", ":")).replace(before, after)
    assert (
        hashlib.blake2b(json.dumps(value, separators=(",", ":")).encode() + b"\n", digest_size=8).hexdigest() == digest
    )
    value = json.loads(text)
    digest = hashlib.blake2b(json.dumps(value, separators=(",", ":")).encode() + b"\n", digest_size=8).hexdigest()
    return json.dumps({**value, "digest": digest}, separators=(",", ":")).encode() + b"\n"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy of the golden collection whose videos lie in `tmp_path/videos`."""
    folder, videos = tmp_path / "c", tmp_path / "videos"
    shutil.copytree(GOLDEN, folder)
    videos.mkdir()
    for number in range(4):
        (videos / f"video-{number:03d}.mp4").write_bytes(b"nobody opens it")
    commit = folder / "outcomes" / "000001.jsonl"
    body = b"".join(moved(line, "/videos", str(videos)) for line in commit.read_bytes().splitlines()[1:])
    commit.write_bytes(b'{"sha256":"%s"}\n' % hashlib.sha256(body).hexdigest().encode() + body)
    return folder


def ok(*arguments: object) -> Done:
    done = fineco(*arguments)
    assert done.code == 0, done.err
    return done


def features_of(folder: Path) -> bytes:
    return (folder / "features" / "000001.h5").read_bytes()


def test_select_and_index_bring_it_up_to_date_without_decoding_or_embedding(old: Path) -> None:
    before = features_of(old)
    selected = ok("select", "-c", old)
    assert "nothing is decoded or embedded" in selected.err
    indexed = ok("index", "-c", old)
    assert "moments of 4 videos" in indexed.err
    assert features_of(old) == before
    found = json.loads(ok("search", QUERY, "-c", old, "-k", "1", "--format", "json").out)[0]["hits"][0]
    assert Path(found["path"]).name == "video-003.mp4"
    assert [(m["start"], m["end"]) for m in found["moments"]] == [(34.0, 40.0)]
    assert b"everything is as it was written" in ok("verify", "-c", old).out
    assert not list((old / "embeddings").glob("*/000001.h5"))
    assert "nothing is decoded" not in ok("select", "-c", old).err


def test_until_then_every_command_says_what_to_do_and_changes_nothing(old: Path) -> None:
    searched = fineco("search", QUERY, "-c", old)
    assert searched.code == 2
    assert "earlier version" in searched.err and f"fineco select -c {old}" in searched.err
    assert b"of an earlier version" in ok("status", "-c", old).out
    assert b"everything is as it was written" in ok("verify", "-c", old).out
    assert json.loads((old / "collection.json").read_bytes())["schema"] == 2
    assert (old / "embeddings" / "caption-0.25" / "000001.h5").exists()
    indexed = fineco("index", "-c", old)
    assert indexed.code == 2
    assert "no moments" in indexed.err and f"fineco select -c {old}" in indexed.err


def test_a_run_with_nothing_new_brings_it_up_to_date_too(old: Path) -> None:
    done = ok("run", "-c", old)
    assert "nothing is decoded or embedded" in done.err and "Index built" in done.err


def test_features_are_those_that_were_written(old: Path) -> None:
    with FeaturesShard(old / "features" / "000001.h5") as shard:
        assert len(shard) == 4
        for row in range(4):
            shard.check_row(row)


def test_a_writer_makes_it_a_collection_that_the_earlier_version_refuses(old: Path) -> None:
    with Collection(old).writing("test"):
        pass
    assert json.loads((old / "collection.json").read_bytes())["schema"] == 3


def test_a_version_that_is_not_known_is_refused(old: Path) -> None:
    path = old / "collection.json"
    content = json.loads(path.read_bytes())
    del content["sha256"]
    content["schema"] = 4
    sha256 = hashlib.sha256(json.dumps(content, indent=2).encode()).hexdigest()
    path.write_bytes(json.dumps({"sha256": sha256, **content}, indent=2).encode() + b"\n")
    done = fineco("status", "-c", old)
    assert done.code == 2 and "another version" in done.err
