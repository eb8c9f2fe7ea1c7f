"""Re-scoring at search time: FineCo with the query as the text, against the stored frames of each candidate.

The index proposes candidates by their pooled vectors; here the query meets the frames themselves, which gives the
candidate's final score and the moments that match (docs/METHOD.md section 3).

The score is the softmax-weighted mean of the frame cosines, at the encoder's own temperature (1 / logit scale): frames
weigh as the contrastive loss would have them weigh. Its ends are max (temperature 0) and VideoCLIP's pair score, the
plain mean (infinite). A query usually names a small part of a video, whose length nobody knows beforehand, so a
fixed share of the frames would drown it: on the demo's videos with every frame stored, R@1 was 0.67 for the mean of the
best quarter, 0.88 for that of the best eighth, and 0.98 for this.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.select import cosines
from pipeline.types import Float32, Float64, Moment, check_shape, check_times

MOMENT_LEVEL = 0.5
# Where between the query's background and the video's best frame a moment begins. Cosines of different encoders and
# queries live on different scales (0.2 can be excellent), so no fixed threshold can serve; halfway is the usual
# definition of a peak's width.

MAX_GAP_SPANS = 2.5
# Two stored frames with one unkept sample between them are 2 spans apart, with two between them 3; samples jitter by
# up to a source frame, so the limit lies in the middle. What was not kept is unknown, not a mismatch.


def score_frames(query: Float32, features: Float32) -> Float32:
    """Cosine of the query (D,) with every frame of `features` (K, D) -> (K,); both unit, float32."""
    check_shape("query", query, (None,), np.float32)
    check_shape("features", features, (None, len(query)), np.float32)
    return cosines(features, query)


def rescore(frame_scores: Float32, offsets: NDArray[np.integer], temperature: float) -> Float32:
    """Scores of C videos from the cosines of their stored frames.

    Args:
        frame_scores: (M,) float32, the frames of all videos one after another.
        offsets: (C + 1,) from 0 to M, increasing: video c has the frames [offsets[c], offsets[c + 1]).
        temperature: Of the softmax; above 0.

    Returns:
        (C,) float32 cosines. A video's score does not depend on the others.

    Raises:
        ValueError: The offsets do not divide the frames, a video has none, or the temperature is not above 0.
    """
    check_shape("frame_scores", frame_scores, (None,), np.float32)
    lengths = np.diff(offsets)
    if len(offsets) == 0 or offsets[0] != 0 or offsets[-1] != len(frame_scores) or np.any(lengths < 1):
        raise ValueError(f"offsets do not divide {len(frame_scores)} frames into videos of at least one frame")
    if not temperature > 0:
        raise ValueError(f"a temperature of {temperature}: it lies above 0")
    if len(lengths) == 0:
        return np.empty(0, np.float32)
    scores = frame_scores.astype(np.float64)
    best = np.repeat(np.maximum.reduceat(scores, offsets[:-1]), lengths)
    weights = np.exp((scores - best) / temperature)
    means = np.add.reduceat(weights * scores, offsets[:-1]) / np.add.reduceat(weights, offsets[:-1])
    return means.astype(np.float32)


def find_moments(
    frame_scores: Float32,
    pts_seconds: Float64,
    span_seconds: float,
    background: float,
    duration: float | None = None,
) -> tuple[Moment, ...]:
    """The parts of a video that match the query: runs of stored frames whose score stands out.

    Args:
        frame_scores: (K,) float32, K >= 1, cosines of the query with the stored frames, in order of time.
        pts_seconds: (K,) float64, non-decreasing.
        span_seconds: What one frame covers.
        background: What this query scores where nothing matches: the median frame score over all candidates.
        duration: Of the video in seconds, where known; no moment ends after it.

    Returns:
        At least one moment (the best frame belongs always), the best first; of equal scores the earlier first.
    """
    check_shape("frame_scores", frame_scores, (None,), np.float32)
    check_times("pts_seconds", pts_seconds, len(frame_scores))
    if len(frame_scores) == 0:
        raise ValueError("a video without frames has no moments")
    best = float(frame_scores.max())
    level = min(best, background + MOMENT_LEVEL * (best - background))  # the best frame counts below the background too
    members = np.flatnonzero(frame_scores >= level)
    too_far = np.diff(pts_seconds[members]) > MAX_GAP_SPANS * span_seconds
    frame_between = np.diff(members) > 1  # a stored frame that does not match
    runs = np.split(members, np.flatnonzero(too_far | frame_between) + 1)
    moments = []
    for run in runs:
        start, end = float(pts_seconds[run[0]]), float(pts_seconds[run[-1]]) + span_seconds
        if duration is not None:
            end = max(start, min(end, duration))  # a container may state less than it holds
        moments.append(Moment(start, end, float(frame_scores[run].max())))
    return tuple(sorted(moments, key=lambda moment: -moment.score))  # equal scores stay in order of time
