"""Which video of a collection an annotation means: by id, else file name, else file name without its extension."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.errors import UsageError
from pipeline.types import Video


@dataclass(frozen=True, slots=True)
class Matched:
    """Annotated name -> video of the collection; and the names that it does not have, sorted."""

    found: dict[str, Video]
    missing: tuple[str, ...]


def match_videos(names: Iterable[str], videos: Iterable[Video]) -> Matched:
    """Finds the video of each name.

    YouTube ids and MSR-VTT's `video7010` are file names without their extension as people keep them.

    Raises:
        UsageError: A name fits two videos of the collection: which one was annotated cannot be told.
    """
    wanted = set(names)
    by_id: dict[str, list[Video]] = {}
    by_name: dict[str, list[Video]] = {}
    by_stem: dict[str, list[Video]] = {}
    for video in videos:
        file_name = os.path.basename(video.path)
        for table, key in ((by_id, video.video_id), (by_name, file_name), (by_stem, os.path.splitext(file_name)[0])):
            if key in wanted:
                table.setdefault(key, []).append(video)
    found: dict[str, Video] = {}
    for name in wanted:
        candidates = by_id.get(name) or by_name.get(name) or by_stem.get(name) or []
        if len(candidates) > 1:
            paths = ", ".join(sorted(video.path for video in candidates)[:3])
            raise UsageError(
                f"the annotated video {name!r} fits {len(candidates)} videos of the collection: {paths}",
                "Name the whole file in the annotations, or make a collection of the right videos only.",
            )
        if candidates:
            found[name] = candidates[0]
    return Matched(found, tuple(sorted(wanted - found.keys())))
