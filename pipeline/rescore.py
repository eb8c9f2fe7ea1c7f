"""Re-scoring at search time: FineCo with the query as the text, against the stored frames of each candidate.

The index proposes candidates by their moments; here the query meets the frames themselves, which gives the candidate's
final score and the moments that match (docs/METHOD.md section 3).

The score is the softmax-weighted mean of the frame cosines, at the encoder's own temperature (1 / logit scale): frames
weigh as the contrastive loss would have them weigh. Its ends are max (temperature 0) and VideoCLIP's pair score, the
plain mean (infinite). A query usually names a small part of a video, whose length nobody knows beforehand, so a
fixed share of the frames would drown it: on the demo's videos with every frame stored, R@1 was 0.67 for the mean of the
best quarter, 0.88 for that of the best eighth, and 0.98 for this.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.select import cosines
from pipeline.types import Float32, Moment, Moments, check_shape

MOMENT_LEVEL = 0.5
# Where between the query's background and the video's best frame a moment begins. Cosines of different encoders and
# queries live on different scales (0.2 can be excellent), so no fixed threshold can serve; halfway is the usual
# definition of a peak's width.

SURE_TEMPERATURES = 2.0
# Two frames whose cosines differ by less than this many temperatures match the query about as well, in the eyes of the
# loss that made them: the odds are below e**2. However near the background is, so much does not end a moment.

LONGEST_GAP_SPANS = 1.5
# One sample between two moments that was not kept is a gap of one span, two are 2; samples jitter by up to a source
# frame, so the limit lies in the middle. What was not kept is unknown, not a mismatch.


@dataclass(frozen=True, slots=True)
class Background:
    """What a query scores where nothing matches it.

    Attributes:
        frame_mean: (D,) float32: mean over the videos of the mean of their kept frames.
        unrelated: What an everyday text scores on it; None where no text could be encoded.
    """

    frame_mean: Float32
    unrelated: float | None

    def of(self, query: Float32) -> float:
        """The cosine of a query (D,) with the collection as a whole; in one that shows little else than what is asked
        for, where that is itself a match, what any text scores there."""
        cosine = float(query @ self.frame_mean)
        return cosine if self.unrelated is None else min(cosine, self.unrelated)


def score_frames(query: Float32, features: Float32) -> Float32:
    """Cosine of the query (D,) with every frame of `features` (K, D) -> (K,); both unit, float32."""
    check_shape("query", query, (None,), np.float32)
    check_shape("features", features, (None, len(query)), np.float32)
    return cosines(features, query)


def rescore(frame_scores: Float32, offsets: NDArray[np.integer], temperature: float) -> Float32:
    """Scores of C videos from the cosines of their stored frames.

    Args:
        frame_scores: (..., M) float32, the frames of all videos one after another, for any number of queries.
        offsets: (C + 1,) from 0 to M, increasing: video c has the frames [offsets[c], offsets[c + 1]).
        temperature: Of the softmax; above 0.

    Returns:
        (..., C) float32 cosines. A video's score does not depend on the others.

    Raises:
        ValueError: The offsets do not divide the frames, a video has none, or the temperature is not above 0.
    """
    check_shape("frame_scores", frame_scores, (None,) * max(frame_scores.ndim, 1), np.float32)
    lengths, n_frames = np.diff(offsets), frame_scores.shape[-1]
    if len(offsets) == 0 or offsets[0] != 0 or offsets[-1] != n_frames or np.any(lengths < 1):
        raise ValueError(f"offsets do not divide {n_frames} frames into videos of at least one frame")
    if not temperature > 0:
        raise ValueError(f"a temperature of {temperature}: it lies above 0")
    if len(lengths) == 0:
        return np.empty((*frame_scores.shape[:-1], 0), np.float32)
    scores, starts = frame_scores.astype(np.float64), offsets[:-1]
    best = np.repeat(np.maximum.reduceat(scores, starts, axis=-1), lengths, axis=-1)
    weights = np.exp((scores - best) / temperature)
    means = np.add.reduceat(weights * scores, starts, axis=-1) / np.add.reduceat(weights, starts, axis=-1)
    return means.astype(np.float32)


def find_moments(
    frame_scores: Float32,
    stored: Moments,
    span_seconds: float,
    background: float,
    temperature: float,
    duration: float | None = None,
    also_the_rest: bool = False,
) -> tuple[Moment, ...]:
    """The parts of a video that match the query: stored moments whose best frame stands out, joined where they meet.

    A moment of the store is never divided: its frames look alike, whatever is asked.

    Args:
        frame_scores: (K,) float32, cosines of the query with the kept frames, in order of time.
        stored: The moments of these frames.
        span_seconds: What one frame covers.
        background: What this query scores where nothing matches (`Background`).
        temperature: Of the encoder.
        duration: Of the video in seconds, where known; no moment ends after it.
        also_the_rest: Also the stored moments that do not stand out, each by itself.

    Returns:
        At least one moment (that of the best frame belongs always), the best first; of equal scores the earlier first.
    """
    check_shape("frame_scores", frame_scores, (int(stored.n_frames.sum()),), np.float32)
    scores = np.maximum.reduceat(frame_scores, stored.offsets[:-1])
    best = float(scores.max())
    level = best - max(MOMENT_LEVEL * (best - background), SURE_TEMPERATURES * temperature)
    members = np.flatnonzero(scores >= level)
    gaps = stored.start_seconds[members[1:]] - stored.end_seconds[members[:-1]]
    apart = np.diff(members) > 1  # a stored moment that does not match
    runs = np.split(members, np.flatnonzero(apart | (gaps > LONGEST_GAP_SPANS * span_seconds)) + 1)
    if also_the_rest:
        runs += list(np.flatnonzero(scores < level)[:, None])
    moments = []
    for run in runs:
        start, end = float(stored.start_seconds[run[0]]), float(stored.end_seconds[run[-1]])
        if duration is not None:
            end = max(start, min(end, duration))  # a container may state less than it holds
        moments.append(Moment(start, end, float(scores[run].max())))
    return tuple(sorted(moments, key=lambda moment: (-moment.score, moment.start_seconds)))
