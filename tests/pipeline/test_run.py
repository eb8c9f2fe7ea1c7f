"""`run`, `embed` and `decode` end to end, in this process, with the fake encoder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import av
import numpy as np
import pytest

from fakes import FakeEncoder
from pipeline import commands
from pipeline.collection import Collection
from pipeline.commands import Machine, Sources
from pipeline.config import EmbedOptions, SelectOptions
from pipeline.decode import DecodedFrame, DecodeEvent, DecodePool
from pipeline.errors import FinecoError, UsageError
from pipeline.geometry import fit_pixels
from pipeline.inspect import failures_of, status_of
from pipeline.sampling import Sampling
from pipeline.select import n_kept, parse_keep
from pipeline.types import Float32, UInt8, Video
from small_runs import (
    CAPTIONS,
    FPS5,
    HALF,
    checked,
    commits,
    embeddings_of,
    features_of,
    machine,
    make_clip,
    make_videos,
    run,
)
from videos import encode_video


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with four clips in `videos/` and a finished collection of them in `c/`; not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    run(folder / "c", make_videos(folder / "videos"))
    return folder


@pytest.fixture
def own(finished: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A folder with two clips of the test's own, and where its collection will be."""
    videos = tmp_path / "videos"
    videos.mkdir()
    for name in ("clip0.mp4", "clip1.mp4", "clip1.txt"):
        shutil.copy(finished / "videos" / name, videos)
    return videos, tmp_path / "c"


class NoEncoder:
    """Fails when it is loaded."""

    def __call__(self, name: str, device: str, precision: str) -> FakeEncoder:
        raise AssertionError(f"{name} was loaded")


def no_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.registry.load_encoder", NoEncoder())


def no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*settings: object, **more: object) -> DecodePool:
        raise AssertionError("decoding processes were started")

    monkeypatch.setattr(commands, "start_pool", refuse)


# ------------------------------------------------------------------------------------------- the stages, one by one


def test_run_is_embed_then_select_then_index(finished: Path, tmp_path: Path) -> None:
    videos, stages = Sources([str(finished / "videos")]), tmp_path / "c"
    assert commands.embed(stages, videos, FPS5, machine(), FakeEncoder()).n_ok == 4
    assert commands.select(stages, HALF, machine(), FakeEncoder()) == 4
    assert commands.index(stages, machine=machine())
    assert checked(stages)["digest"] == checked(finished / "c")["digest"]
    assert checked(stages)["indexed"] == checked(finished / "c")["indexed"] == 4


def test_every_frame_is_embedded_once_at_its_time(finished: Path) -> None:
    features = features_of(finished / "c")
    assert {Path(path).name: len(f.features) for path, f in features.items()} == {
        "clip0.mp4": 5,
        "clip1.mp4": 8,
        "clip2.mp4": 10,
        "clip3.mp4": 13,
    }
    for video in features.values():
        # 30 frames/s: the first frame at or after k/5 s is frame 6k
        np.testing.assert_allclose(video.pts_seconds, np.arange(len(video.features)) / 5, atol=1e-6)


def test_stored_frames_serve_embed_when_the_videos_are_gone(finished: Path, tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    shutil.copytree(finished / "videos", videos)
    summary = commands.decode(tmp_path / "c", Sources([str(videos)]), FPS5, machine())
    assert (summary.n_ok, summary.n_frames, summary.any_failed) == (4, 36, False)
    encoder = FakeEncoder(size=32)  # so small an input as the fake one's own shows how differently two resizers round
    commands.embed(tmp_path / "direct", Sources([str(videos)]), FPS5, machine(), encoder)
    shutil.rmtree(videos)
    summary = commands.embed(tmp_path / "c", Sources(), EmbedOptions(), machine(), encoder)
    assert (summary.n_ok, summary.n_frames, summary.any_failed) == (4, 36, False)
    direct = {Path(path).name: f for path, f in features_of(tmp_path / "direct").items()}
    for path, video in features_of(tmp_path / "c").items():
        expected = direct[Path(path).name]
        np.testing.assert_array_equal(video.pts_seconds, expected.pts_seconds)
        assert video.span_seconds == expected.span_seconds
        assert np.sum(video.features * expected.features, axis=1).min() > 0.99  # JPEG, and another resize
    checked(tmp_path / "c")


def test_run_takes_stored_frames_and_decodes_only_the_rest(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = finished / "videos"
    commands.decode(tmp_path / "c", Sources([str(source / "clip0.mp4")]), FPS5, machine())
    decoded: list[str] = []
    decode = DecodePool.decode

    def watched(pool: DecodePool, videos: Iterable[Video], stop: Event) -> Iterator[DecodeEvent]:
        for event in decode(pool, videos, stop):
            decoded.append(Path(event.video.path).name)
            yield event

    monkeypatch.setattr(DecodePool, "decode", watched)
    assert run(tmp_path / "c", source).n_ok == 4
    assert set(decoded) == {"clip1.mp4", "clip2.mp4", "clip3.mp4"}
    assert checked(tmp_path / "c")["indexed"] == 4


def test_stored_frames_do_not_pile_up_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A consumer slower than unpacking must not cost memory for the whole video."""
    encode_video(tmp_path / "long.mp4", n_frames=600, size=(32, 32))
    options = EmbedOptions(Sampling("fps", 30.0))
    commands.decode(tmp_path / "c", Sources([str(tmp_path / "long.mp4")]), options, machine())
    unpacked = 0
    most_ahead = 0
    encoder = FakeEncoder(seconds_per_batch=0.005)

    def counted(pixels: UInt8, geometry: Any) -> UInt8:
        nonlocal unpacked, most_ahead
        unpacked += 1
        most_ahead = max(most_ahead, unpacked - sum(encoder.batch_sizes))
        return fit_pixels(pixels, geometry)

    monkeypatch.setattr("pipeline.stored.fit_pixels", counted)
    commands.embed(tmp_path / "c", Sources(), EmbedOptions(), machine(), encoder)
    assert unpacked == 600
    assert most_ahead < 300


# ------------------------------------------------------------------------------------------------- again, and changes


def test_a_second_run_does_nothing(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_encoder(monkeypatch)
    no_decoding(monkeypatch)
    before = commits(finished / "c"), sorted((finished / "c" / "index").iterdir()), checked(finished / "c")
    said: list[str] = []
    videos = Sources([str(finished / "videos")])
    summary = commands.run(finished / "c", videos, machine=machine(said.append))
    assert (summary.n_ok, summary.n_failed, summary.counts.done_before, summary.any_failed) == (0, 0, 4, False)
    assert before == (commits(finished / "c"), sorted((finished / "c" / "index").iterdir()), checked(finished / "c"))
    assert said == ["4 videos found: 0 to do, 4 done before", "The index is up to date."]


def test_other_text_beside_a_video_selects_it_anew_without_embedding(own: tuple[Path, Path], tmp_path: Path) -> None:
    videos, collection = own
    run(collection, videos)
    before = embeddings_of(collection)
    (videos / "clip1.txt").write_text("something else entirely\n", "utf-8")
    encoder = FakeEncoder()
    run(collection, videos, encoder)
    assert encoder.batch_sizes == []
    assert commits(collection)[1:] == [("catalog", []), ("select", ["embeddings/caption-0.5"])]
    after = embeddings_of(collection)
    changed, same = str(videos / "clip1.mp4"), str(videos / "clip0.mp4")
    assert not np.array_equal(after[changed].scores, before[changed].scores)
    np.testing.assert_array_equal(after[same].vector, before[same].vector)
    run(tmp_path / "fresh", videos)
    assert checked(collection)["digest"] == checked(tmp_path / "fresh")["digest"]


def test_a_video_without_text_is_sampled_uniformly_and_says_so(finished: Path, tmp_path: Path) -> None:
    summary = run(tmp_path / "c", finished / "videos")
    assert summary.selectors == {"caption": len(CAPTIONS), "uniform": 4 - len(CAPTIONS)}
    assert "videos without text of their own keep frames that cover them (uniform)" in summary.lines("embedded")
    for path, embedding in embeddings_of(tmp_path / "c").items():
        assert embedding.selector == ("caption" if Path(path).with_suffix(".txt").exists() else "uniform")


@pytest.mark.parametrize("keep", ["0.25", "1.0", "1", "6"])
def test_as_many_frames_are_kept_as_asked(keep: str, finished: Path, tmp_path: Path) -> None:
    run(tmp_path / "c", finished / "videos", select=SelectOptions("caption", keep))
    kept = {path: len(e.features) for path, e in embeddings_of(tmp_path / "c").items()}
    n_frames = {path: len(f.features) for path, f in features_of(tmp_path / "c").items()}
    assert kept == {path: n_kept(parse_keep(keep), n) for path, n in n_frames.items()}


def test_a_video_that_changed_is_embedded_anew(own: tuple[Path, Path]) -> None:
    videos, collection = own
    run(collection, videos)
    make_clip(videos / "clip0.mp4", 7)
    assert run(collection, videos).n_ok == 1
    assert len(features_of(collection)[str(videos / "clip0.mp4")].features) == 13
    assert checked(collection)["indexed"] == 2


def test_a_video_is_found_where_it_was_moved_after_decode(own: tuple[Path, Path], tmp_path: Path) -> None:
    videos, collection = own
    commands.decode(collection, Sources([str(videos)]), FPS5, machine())
    (videos / "clip0.mp4").rename(videos / "moved.mp4")
    (videos / "clip1.txt").write_text("something else entirely\n", "utf-8")
    commands.decode(collection, Sources([str(videos)]), FPS5, machine())
    commands.embed(collection, Sources(), EmbedOptions(), machine(), FakeEncoder())
    commands.select(collection, HALF, machine(), FakeEncoder())
    commands.index(collection, machine=machine())
    assert set(Collection(collection).state().paths.values()) == {str(videos / "clip1.mp4"), str(videos / "moved.mp4")}
    assert checked(collection)["indexed"] == 2
    assert run(collection, videos).counts.done_before == 2
    assert [stage for stage, _ in commits(collection)] == ["decode", "catalog", "embed", "select"]


# ----------------------------------------------------------------------------------------------------------- failures


def test_failures_are_recorded_and_tried_again_only_when_asked(own: tuple[Path, Path]) -> None:
    videos, collection = own
    (videos / "broken.mp4").write_bytes(b"no video at all" * 100)
    (videos / "empty.mp4").write_bytes(b"")
    summary = run(collection, videos)
    assert (summary.n_ok, summary.n_failed, summary.counts.failed_now, summary.any_failed) == (2, 1, 1, True)
    rows = [row.outcome for row in failures_of(collection, skipped=False)]
    assert [(Path(o.path).name, o.stage, o.code) for o in rows] == [
        ("broken.mp4", "decode", "invalid"),
        ("empty.mp4", "catalog", "empty"),
    ]
    n_commits = len(commits(collection))
    summary = run(collection, videos)
    assert (summary.counts.to_do, summary.counts.failed_before, summary.any_failed) == (0, 1, True)
    assert len(commits(collection)) == n_commits
    summary = run(collection, Sources([str(videos)], retry_failed=True))
    assert (summary.counts.to_do, summary.n_failed) == (1, 1)
    make_clip(videos / "broken.mp4", 5)
    (videos / "empty.mp4").unlink()
    summary = run(collection, videos)
    assert (summary.n_ok, summary.any_failed) == (1, False)
    assert [Path(row.outcome.path).name for row in failures_of(collection, skipped=False)] == ["empty.mp4"]


def test_a_failed_video_is_done_when_it_is_retried_with_other_limits(own: tuple[Path, Path]) -> None:
    videos, collection = own
    small = replace(machine(), limits=replace(Machine().limits, max_frames=6))
    summary = run(collection, videos, machine=small)
    assert (summary.n_ok, summary.codes) == (1, {"max_frames": 1})
    summary = run(collection, Sources([str(videos)], retry_failed=True))
    assert (summary.n_ok, summary.any_failed) == (1, False)
    assert failures_of(collection, skipped=False) == []


def test_a_file_without_video_is_skipped_and_no_failure(own: tuple[Path, Path]) -> None:
    videos, collection = own
    with av.open(str(videos / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    summary = run(collection, videos)
    assert (summary.n_ok, summary.n_skipped, summary.any_failed) == (2, 1, False)
    assert [row.outcome.code for row in failures_of(collection, skipped=True)] == ["no_video"]
    assert run(collection, videos).counts.skipped == 1


def test_a_video_without_a_readable_frame_fails_alone(own: tuple[Path, Path]) -> None:
    videos, collection = own
    data = bytearray((videos / "clip1.mp4").read_bytes())
    start = data.index(b"mdat") + 4
    data[start : data.index(b"moov") - 4] = bytes(data.index(b"moov") - 4 - start)
    (videos / "blank.mp4").write_bytes(data)
    summary = run(collection, videos)
    assert (summary.n_ok, summary.n_failed) == (2, 1)
    assert checked(collection)["indexed"] == 2


def test_a_duplicate_is_skipped_and_no_failure(own: tuple[Path, Path]) -> None:
    videos, collection = own
    shutil.copy(videos / "clip0.mp4", videos / "copy.mp4")
    summary = run(collection, videos)
    assert (summary.n_ok, summary.counts.skipped, summary.any_failed) == (2, 1, False)
    (row,) = failures_of(collection, skipped=True)
    assert (row.outcome.code, row.outcome.path) == ("duplicate", str(videos / "copy.mp4"))
    assert checked(collection)["indexed"] == 2


@pytest.mark.parametrize("command", ["run", "decode"])
@pytest.mark.parametrize("change", ["content", "times"])
def test_a_file_that_changes_while_it_is_read_fails_and_the_next_run_does_it(
    command: str, change: str, own: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    videos, collection = own
    decode = DecodePool.decode
    touched = videos / "clip1.mp4"

    def meddling(pool: DecodePool, todo: Iterable[Video], stop: Event) -> Iterator[DecodeEvent]:
        meddled = False
        for event in decode(pool, todo, stop):
            if isinstance(event, DecodedFrame) and event.video.path == str(touched) and not meddled:
                meddled = True
                if change == "content":
                    with touched.open("ab") as file:
                        file.write(b"more")
                else:
                    touched.chmod(0o600)
            yield event

    def go() -> Any:
        if command == "run":
            return run(collection, videos)
        return commands.decode(collection, Sources([str(videos)]), FPS5, machine())

    with monkeypatch.context() as patch:
        patch.setattr(DecodePool, "decode", meddling)
        summary = go()
    assert (summary.n_ok, summary.codes) == (1, {"changed": 1})
    assert [row.outcome.path for row in failures_of(collection, skipped=False)] == [str(touched)]
    summary = go()
    assert (summary.n_ok, summary.any_failed) == (1, False)
    checked(collection)


# ------------------------------------------------------------------------------------------------- what is refused


class OtherPrecision(FakeEncoder):
    precision = "bf16"


@pytest.mark.parametrize(
    ("field", "given"),
    [
        ("sampling", {"embed": EmbedOptions(sampling=Sampling("fps", 2.0))}),
        ("sampling", {"embed": EmbedOptions(sampling=Sampling("frames", 5))}),
        ("model", {"embed": EmbedOptions(model="builtin")}),
        ("exact_resize", {"embed": EmbedOptions(exact_resize=True)}),
        ("precision", {"embed": EmbedOptions(precision="bf16")}),
        ("precision", {"encoder": OtherPrecision()}),
        ("encoder", {"encoder": FakeEncoder(seed=1)}),
        ("selector", {"select": SelectOptions("uniform", "0.5")}),
        ("keep", {"select": SelectOptions("caption", "0.25")}),
    ],
)
def test_another_configuration_is_refused_by_name_and_changes_nothing(
    field: str, given: dict[str, Any], own: tuple[Path, Path]
) -> None:
    videos, collection = own
    run(collection, videos)
    make_clip(videos / "new.mp4", 6)
    before = commits(collection), (collection / "collection.json").read_bytes(), checked(collection)
    with pytest.raises(UsageError) as refused:
        run(collection, videos, **{"encoder": FakeEncoder(), **given})
    assert refused.value.message.startswith(f"{field}: ")
    assert before == (commits(collection), (collection / "collection.json").read_bytes(), checked(collection))


@pytest.mark.parametrize(
    "given",
    [
        {"videos": Path("no/such/folder")},
        {"videos": Path("empty")},
        {"videos": Sources()},
        {"videos": Sources([], Path("no.csv"))},
        {"videos": Sources([], Path("bad.jsonl"))},
        {"embed": EmbedOptions(model="open_clip:local-dir:nowhere"), "encoder": None},
        {"embed": EmbedOptions(model="bultin"), "encoder": None},
        {"select": SelectOptions("caption", "none")},
        {"select": SelectOptions("captoin")},
        {"select": SelectOptions("topics")},
    ],
    ids=lambda given: " ".join(map(str, given.values())),
)
def test_a_mistake_leaves_no_folder(
    given: dict[str, Any], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jsonl").write_text('{"no": "path"}\n')
    options = {"videos": finished / "videos", "embed": FPS5, "select": HALF, "encoder": FakeEncoder(), **given}
    videos = options.pop("videos")
    sources = videos if isinstance(videos, Sources) else Sources([str(videos)])
    with pytest.raises(FinecoError):
        commands.run(tmp_path / "c", sources, machine=machine(), **options)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("source", ["no/such/folder", "empty"])
def test_decode_leaves_no_folder_for_a_wrong_path(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError):
        commands.decode(tmp_path / "c", Sources([source]), machine=machine())
    assert not (tmp_path / "c").exists()


def test_another_size_of_stored_frames_is_refused_by_name(own: tuple[Path, Path]) -> None:
    videos, collection = own
    commands.decode(collection, Sources([str(videos)]), FPS5, machine())
    with pytest.raises(UsageError, match=r"^frame_size: "):
        commands.decode(collection, Sources([str(videos)]), EmbedOptions(frame_size=100), machine())


# --------------------------------------------------------------------------------------------------------- manifests


def test_a_manifest_gives_ids_and_captions(finished: Path, tmp_path: Path) -> None:
    rows = [
        {"path": str(finished / "videos/clip3.mp4"), "id": "long", "caption": "a bird"},
        {"path": str(finished / "videos/clip2.mp4"), "id": "other"},
    ]
    manifest = tmp_path / "videos.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(tmp_path / "c", Sources([], manifest)).n_ok == 2
    state = Collection(tmp_path / "c").state()
    assert state.paths == {row["id"]: row["path"] for row in rows}
    kept = embeddings_of(tmp_path / "c")
    assert {path: e.selector for path, e in kept.items()} == {rows[0]["path"]: "caption", rows[1]["path"]: "uniform"}


def test_a_caption_with_a_span_keeps_frames_inside_it(tmp_path: Path) -> None:
    clip = encode_video(tmp_path / "clip.mp4", n_frames=300, size=(64, 48))
    manifest = tmp_path / "videos.csv"
    manifest.write_text("path,id,caption,start,end\nclip.mp4,a,a bird,4,5\nclip.mp4,a,a tree,8,8.5\n")
    run(tmp_path / "c", Sources([], manifest), select=SelectOptions("caption", "1.0"))
    kept = embeddings_of(tmp_path / "c")[str(clip)].pts_seconds
    expected = [t for t in np.arange(50) / 5 if 2.8 < t <= 6.0 or 6.8 < t <= 9.5]  # a second on both sides
    np.testing.assert_allclose(kept, expected, atol=1e-6)


def test_new_content_under_an_id_replaces_the_old(tmp_path: Path) -> None:
    make_clip(tmp_path / "clip.mp4", 0)
    manifest = tmp_path / "videos.csv"
    manifest.write_text("path,id\nclip.mp4,a\n")
    run(tmp_path / "c", Sources([], manifest))
    make_clip(tmp_path / "clip.mp4", 3)
    assert run(tmp_path / "c", Sources([], manifest)).n_ok == 1
    (embedding,) = embeddings_of(tmp_path / "c").values()
    assert embedding.n_frames == 13
    assert checked(tmp_path / "c")["indexed"] == 1


def test_a_later_batch_of_videos_has_no_influence_on_the_result(finished: Path, tmp_path: Path) -> None:
    """The digest does not depend on the order and the shards in which videos were done, nor on the processes."""
    for names in (("clip2", "clip0"), ("clip3", "clip1")):
        sources = Sources([str(finished / "videos" / f"{name}.mp4") for name in names])
        run(tmp_path / "c", sources, machine=machine(workers=2))
    assert checked(tmp_path / "c")["digest"] == checked(finished / "c")["digest"]


def test_status_counts_what_there_is(finished: Path) -> None:
    status = status_of(finished / "c")
    assert status["videos"] == {"ok": 4}
    assert (status["with_features"], status["selection"]["videos"], status["index"]["up_to_date"]) == (4, 4, True)


class SpoiledFrames(FakeEncoder):
    """Gives no vector that is a number for bright frames."""

    def encode_frames(self, frames: UInt8) -> Float32:
        vectors = super().encode_frames(frames)
        vectors[frames.mean(axis=(1, 2, 3)) > 250] = np.nan
        return vectors


def test_vectors_that_are_no_numbers_fail_their_video_only(own: tuple[Path, Path]) -> None:
    videos, collection = own
    encode_video(videos / "white.mp4", [np.full((48, 64, 3), 255, np.uint8)] * 10)
    summary = run(collection, videos, SpoiledFrames())
    assert (summary.n_ok, summary.codes) == (2, {"non_finite": 1})
    assert checked(collection)["indexed"] == 2
