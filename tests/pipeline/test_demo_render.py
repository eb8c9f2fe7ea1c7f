"""The demo's videos: real H.264 files whose right answers are known."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest

from models.builtin.world import Painter, Scene
from pipeline import demo
from pipeline.commands import Machine
from pipeline.demo import DemoVideo, plan_videos, render_videos
from pipeline.types import UInt8


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two or three scenes of about a second."""
    monkeypatch.setattr(demo, "SCENES", (2, 3))
    monkeypatch.setattr(demo, "SCENE_SECONDS", (0.8, 1.2))
    monkeypatch.setattr(demo, "SHORTEST", 0.0)


def render(folder: Path, n_videos: int, seed: int = 3) -> list[DemoVideo]:
    folder.mkdir(exist_ok=True)
    return render_videos(folder, n_videos, seed, workers=1, machine=Machine(say=lambda line: None))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def decode(path: Path) -> tuple[list[float], list[UInt8]]:
    with av.open(str(path)) as container:
        decoded = list(container.decode(video=0))
        pictures = [np.asarray(frame.to_ndarray(format="rgb24"), np.uint8) for frame in decoded]
        return [float(frame.time or 0) for frame in decoded], pictures


def test_every_query_has_one_answer_that_training_never_saw() -> None:
    videos = plan_videos(64, seed=0)
    shown = [cut.scene for video in videos for cut in video.cuts]
    for video in videos:
        answer = Scene(*video.cuts[video.answer].scene)
        assert answer.held_out
        assert shown.count(video.cuts[video.answer].scene) == 1
        assert video.query != video.caption
        for text in (video.query, video.caption):
            assert answer.colour in text
    assert len({video.name for video in videos}) == len({video.query for video in videos}) == 64


def test_videos_last_20_to_60_seconds_and_scenes_follow_each_other() -> None:
    for video in plan_videos(64, seed=1):
        assert video.cuts[0].start_seconds == 0
        assert 20 - 1 <= video.cuts[-1].end_seconds <= 60  # lengths are rounded to whole frames
        for one, following in pairwise(video.cuts):
            assert one.start_seconds < one.end_seconds == following.start_seconds


def test_plan_is_decided_by_the_seed() -> None:
    assert plan_videos(5, seed=0) == plan_videos(5, seed=0) != plan_videos(5, seed=1)


@pytest.mark.usefixtures("short")
def test_videos_decode_to_the_scenes_of_the_plan(tmp_path: Path) -> None:
    for video in render(tmp_path, 2):
        times, pictures = decode(tmp_path / video.name)
        assert times == pytest.approx(np.arange(len(times)) / demo.FPS, abs=1e-3)
        assert len(times) == round(video.cuts[-1].end_seconds * demo.FPS)
        with av.open(str(tmp_path / video.name)) as container:
            codec = container.streams.video[0].codec_context
            assert (codec.name, codec.pix_fmt, codec.has_b_frames) == ("h264", "yuv420p", True)
        for cut in video.cuts:
            first, last = round(cut.start_seconds * demo.FPS), round(cut.end_seconds * demo.FPS) - 1
            painter = Painter(Scene(*cut.scene), cut.seed, demo.HEIGHT, demo.WIDTH)
            for number in (first, last):
                painted = painter.frame((number - first) / demo.FPS).astype(np.float64)
                assert np.abs(painted - pictures[number]).mean() < 8
        assert (tmp_path / video.name).with_suffix(".txt").read_text("utf-8") == f"{video.caption}\n"


@pytest.mark.usefixtures("short")
def test_what_moves_is_seen_moving(tmp_path: Path) -> None:
    video = plan_videos(1, seed=0)[0]
    cut = demo.SceneCut(("red", "circle", "large", "centre", "right"), 5, 0.0, 1.0)
    demo.render_video(DemoVideo(video.name, (cut,), "", "", 0), tmp_path)
    _, pictures = decode(tmp_path / video.name)
    reds = [p[..., 0].astype(int) - p[..., 1] > 80 for p in pictures]
    centres = [np.nonzero(red)[1].mean() for red in reds]
    steps = np.diff(centres)
    assert np.median(steps) > 0.3  # pixels a frame; once a period it starts again from the left


@pytest.mark.usefixtures("short")
def test_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    render(tmp_path / "one", 2)
    render(tmp_path / "two", 2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.usefixtures("short")
def test_only_missing_videos_are_rendered(tmp_path: Path) -> None:
    videos = render(tmp_path, 2)
    before = contents(tmp_path)
    kept, lost = (tmp_path / video.name for video in videos)
    lost.unlink()
    lost.with_suffix(".txt").unlink()
    untouched = kept.stat().st_mtime_ns
    assert render(tmp_path, 2) == videos
    assert contents(tmp_path) == before
    assert kept.stat().st_mtime_ns == untouched


@pytest.mark.usefixtures("short")
def test_another_seed_replaces_the_videos(tmp_path: Path) -> None:
    render(tmp_path / "old", 2, seed=3)
    render(tmp_path / "old", 1, seed=4)
    render(tmp_path / "new", 1, seed=4)
    assert contents(tmp_path / "old") == contents(tmp_path / "new")
