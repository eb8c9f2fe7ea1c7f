"""Where the scenes of a video lie, which frames cover it, and the moments that an index holds.

A moment is (video, start, end, unit vector): the kept frames of one scene, pooled. Scenes are decided once, without any
query, from the features of all sampled frames, by merging neighbours in time as Ward's clustering does: two groups of
a and b frames whose means lie a distance d apart cost `a * b / (a + b) * d * d` to merge, which is what the sum of the
squared distances of the frames from their group's mean grows by. For two single frames that is 1 - their cosine.

How many scenes there are is the video's to say. A merge is too dear where it costs more than a share of the video's own
variance, so that fast cuts, which make that large, stay apart, and a shot that moves holds together. Near-equal
neighbours always share a scene: a slide that is held for an hour has one vector.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.types import Bool, Float32, Float64, FrameFeatures, Int64, Moments

Starts = NDArray[np.intp]  # (G,) increasing, the first is 0: group g has the frames [starts[g], starts[g + 1])

SCENE_SHARE = 0.4
# Of the variance of a video's frames, what a merge inside a scene may cost. On composed videos whose scenes are known,
# as those of benchmarks/moments_at_scale.py, 0.2 to 1.0 find 0.95 to 1.07 times as many scenes as there are.
NEAR_EQUAL = 0.05  # what a merge may cost in any video: two frames with a cosine of 0.95 are the same picture

MAX_GAP_SPANS = 2.5
# Two samples with one between them that is missing are 2 spans apart, with two missing 3; samples jitter by up to a
# source frame, so the limit lies in the middle. Across a longer hole nobody knows what was shown: no moment spans it.

SHORTEST_MEAN = 1e-5  # a mean of unit vectors shorter than this is rounding noise without a direction

CLASSES_PER_OCTAVE = 2  # merges whose costs are of one class are done in one round; finer ones find nothing better
EQUAL = 2.0**-30  # squared distance of what is equal: its merges have a logarithm, and the shorter groups merge first
BLOCK_ROWS = 4096  # bounds the temporary differences of neighbours: 8 MB at 512 dimensions


def find_scenes(h: Float32) -> Starts:
    """First frames of the scenes of a video with the features `h` (N, D), N >= 1, unit rows in order of time."""
    mean = h.mean(axis=0, dtype=np.float64)
    variance = 1.0 - float(mean @ mean)  # the mean squared distance of unit rows from their mean
    return _merge_in_time(h, 1, max(NEAR_EQUAL, SCENE_SHARE * variance))


def divide_in_time(h: Float32, n_groups: int) -> Starts:
    """First frames of `n_groups` (1 to N) groups that cover a video: what lies together in time and looks alike."""
    return _merge_in_time(h, n_groups, np.inf)


def typical_frames(h: Float32, starts: Starts) -> NDArray[np.intp]:
    """(G,) the most typical frame of each group: the nearest to its mean; of equal ones the nearest to its middle."""
    lengths = _lengths(starts, len(h))
    groups = np.repeat(np.arange(len(starts)), lengths)
    closeness = np.einsum("nd,nd->n", h, np.add.reduceat(h, starts, axis=0)[groups])
    from_middle = np.abs(np.arange(len(h)) - np.repeat(starts + (lengths - 1) / 2, lengths))
    order = np.lexsort((from_middle, -closeness, groups))  # the last key decides first; stable, so then the earliest
    typical: NDArray[np.intp] = order[starts]
    return typical


def moments_of(features: FrameFeatures, kept: Bool, scores: Float32) -> Moments:
    """The moments of a video: the kept frames (N,) of each scene that has any, pooled as a video is.

    A moment lasts as long as its scene, of which it may have kept a single frame; it ends before the next scene begins,
    and where the video has a hole.

    Args:
        scores: (N,) what the selector gave the frames.
    """
    h, pts, span = features.features, features.pts_seconds, features.span_seconds
    holes = np.flatnonzero(np.diff(pts) > MAX_GAP_SPANS * span) + 1
    starts = np.union1d(find_scenes(h), holes)
    ends = np.append(starts[1:], len(h))
    frames = np.flatnonzero(kept)
    scene_of = np.searchsorted(starts, frames, side="right") - 1
    firsts = np.flatnonzero(_is_new(scene_of))
    used = scene_of[firsts]
    last_ends = pts[ends[used] - 1] + span
    next_starts = np.append(pts, np.inf)[ends[used]]
    vectors = pool_groups(h[frames], scores[frames], firsts)
    return Moments(vectors, pts[starts[used]], np.minimum(last_ends, next_starts), _lengths(firsts, len(frames)))


def pool(h: Float32, s: Float32) -> Float32:
    """The L2-normalised mean of the rows `h` (K, D), with their scores `s` (K,): a moment's vector, or a video's.

    Rows that cancel each other have no mean direction; then the best-scored row stands for all.
    """
    mean = h.mean(axis=0, dtype=np.float32)
    norm = np.linalg.norm(mean)
    if norm < SHORTEST_MEAN:
        mean = h[np.argmax(s)]
        norm = np.linalg.norm(mean)
    vector: Float32 = mean / norm
    return vector


def pool_groups(h: Float32, s: Float32, starts: Starts) -> Float32:
    """(G, D): `pool` of each of G groups of the rows `h` (K, D), of which group g has [starts[g], starts[g + 1])."""
    lengths = _lengths(starts, len(h))
    means = np.add.reduceat(h, starts, axis=0) / lengths[:, None].astype(np.float32)
    norms = np.linalg.norm(means, axis=1, keepdims=True)
    for group in np.flatnonzero(norms < SHORTEST_MEAN):
        part = slice(starts[group], starts[group] + lengths[group])
        means[group], norms[group] = pool(h[part], s[part]), 1.0
    vectors: Float32 = means / norms
    return vectors


def _merge_in_time(h: Float32, n_least: int, most_cost: float) -> Starts:
    """Merges neighbours, the cheapest first, until `n_least` groups are left or every merge costs over `most_cost`.

    One merge at a time would take as many steps as there are frames. So all that are locally cheapest are done in one
    round: those whose neighbours on both sides are of a higher class of cost, and of a run of one class every second.
    Those that are not among as many of the cheapest as are still to be done wait for a later round.
    """
    means, sizes, starts = h.astype(np.float32), np.ones(len(h)), np.arange(len(h))
    while len(starts) > n_least:
        before, after = sizes[:-1], sizes[1:]
        costs = before * after / (before + after) * (_squared_distances(means) + EQUAL)
        room = len(starts) - n_least
        needed = np.partition(costs, room - 1)[room - 1]  # no dearer merge is due yet
        classes = np.floor(CLASSES_PER_OCTAVE * np.log2(costs))
        classes[costs > min(most_cost, needed)] = np.inf
        chosen = _locally_cheapest(classes)
        if len(chosen) > room:
            chosen = np.sort(chosen[np.argsort(costs[chosen], kind="stable")[:room]])
        if len(chosen) == 0:
            break
        weights = (sizes[chosen] / (sizes[chosen] + sizes[chosen + 1])).astype(np.float32)[:, None]
        means[chosen] = weights * means[chosen] + (1 - weights) * means[chosen + 1]
        sizes[chosen] += sizes[chosen + 1]
        left = np.ones(len(starts), np.bool_)
        left[chosen + 1] = False
        means, sizes, starts = means[left], sizes[left], starts[left]
    return starts


def _squared_distances(means: Float32) -> Float64:
    """(G - 1,) of neighbouring rows. By differences: a difference of products would lose what is small in rounding."""
    found = np.empty(len(means) - 1)
    for first in range(0, len(found), BLOCK_ROWS):
        rows = means[first : first + BLOCK_ROWS + 1]
        block = rows[1:] - rows[:-1]
        found[first : first + BLOCK_ROWS] = np.einsum("gd,gd->g", block, block)
    return found


def _locally_cheapest(classes: Float64) -> NDArray[np.intp]:
    """Which merges to do at once, no two of one group; `classes` (G - 1,) is inf for those that are too dear."""
    firsts = np.flatnonzero(_is_new(classes))
    runs = classes[firsts]
    around = np.full(len(runs) + 2, np.inf)
    around[1:-1] = runs
    low = (runs < around[:-2]) & (runs < around[2:])
    lengths = _lengths(firsts, len(classes))
    every_second = (np.arange(len(classes)) - np.repeat(firsts, lengths)) % 2 == 0
    return np.flatnonzero(np.repeat(low, lengths) & every_second)


def _is_new(values: NDArray[Any]) -> Bool:
    """(n,) whether each value differs from the one before it; the first does."""
    new = np.ones(len(values), np.bool_)
    new[1:] = values[1:] != values[:-1]
    return new


def _lengths(starts: Starts, end: int) -> Int64:
    """(G,) how long the pieces of something of length `end` are, that begin at `starts`."""
    lengths = np.empty(len(starts), np.int64)
    lengths[:-1] = starts[1:] - starts[:-1]
    lengths[-1] = end - starts[-1]
    return lengths
