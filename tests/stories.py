"""What was heard of every video that a pool decoded, and what a pool must not leave behind."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.decode import DecodedFrame, DecodeEvent, DecodePool, VideoDecoded
from pipeline.types import UInt8, Video

# What may become of a damaged file: no process dies of it, and no error is without a name.
KNOWN_CODES = {"invalid", "no_video", "no_decoder", "no_frames", "max_pixels", "max_frames", "memory"}


@dataclass
class Story:
    """What was heard of one video."""

    seconds: list[float] = field(default_factory=list)  # of the last attempt
    pixels: list[UInt8] = field(default_factory=list)
    decoded: VideoDecoded | None = None
    failures: list[tuple[str, bool]] = field(default_factory=list)
    attempt: int = 1

    @property
    def over(self) -> bool:
        return self.decoded is not None or any(not will_retry for _, will_retry in self.failures)


def hear(stories: dict[str, Story], event: DecodeEvent) -> None:
    """Adds an event to its video's story, checking the promise of order on the way."""
    story = stories.setdefault(event.video.video_id, Story())
    assert not story.over
    if event.attempt != story.attempt:
        assert story.failures[-1][1], "a second attempt that was not announced"
        story.attempt, story.seconds, story.pixels = event.attempt, [], []
    if isinstance(event, DecodedFrame):
        assert not story.seconds or event.seconds > story.seconds[-1]
        story.seconds.append(event.seconds)
        story.pixels.append(event.data.copy())
    elif isinstance(event, VideoDecoded):
        story.decoded = event
    else:
        story.failures.append((event.error.code, event.will_retry))


def decode_all(pool: DecodePool, videos: Sequence[Video], seconds: float = 40.0) -> dict[str, Story]:
    """The stories of all videos; fails if one is not over after so many seconds."""
    stories: dict[str, Story] = {}
    stop = threading.Event()
    timer = threading.Timer(seconds, stop.set)
    timer.start()
    for event in pool.decode(videos, stop):
        hear(stories, event)
    timer.cancel()
    assert all(story.over for story in stories.values())
    assert set(stories) == {v.video_id for v in videos}
    return stories


def children() -> set[int]:
    """Processes that this one started and that still are, zombies included."""
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # a thread that has just ended
            found.update(int(pid) for pid in (task / "children").read_text().split())
    return found


@contextlib.contextmanager
def nothing_left_behind() -> Iterator[None]:
    """Fails if processes or descriptors that were not there before are left at the end."""
    before, descriptors = children(), len(os.listdir("/proc/self/fd"))
    yield
    assert children() <= before
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 1
