"""Questions with known answers, by which an index is measured when it is built: what does it find of what there is?

The answer to a question is what an exhaustive search finds first, one that scores every kept frame of every video with
it as a search scores its candidates (`pipeline.rescore`). Where that would be too many frames, a sample of the videos
stands for all, and the index is asked for those alone. Questions are texts beside videos, as far as there are any; else
kept frames with noise; and everyday texts that are about no video in particular. Which ones depends on the videos
alone, never on their order, so that growing a collection changes few of them.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from indexes.build import Probes
from indexes.id_map import Int32, video_key
from pipeline.gallery import FrameBlock, Gallery
from pipeline.output import number_of
from pipeline.rescore import Background, rescore
from pipeline.types import Float32, Float64

N_QUESTIONS = 100  # beside the everyday texts
NOISE = 1.0  # length of what is added to a kept frame's unit vector: the question's cosine with it is then about 0.7
TIED = 1e-5  # scores this near the best are as good: copies of one video, and sums taken in another order
MOST_TIED = 100  # a question that more videos answer alike has no answer that an index could be measured by
EVERYDAY_TEXTS = (
    *("a person talks to the camera", "a close-up of two hands", "food on a plate", "somebody cooks in a kitchen"),
    *("a street with cars", "a dog runs", "mountains under a blue sky", "people dance", "text on a screen"),
    *("a football match", "a child plays with a toy", "a room with a table and chairs", "waves on a beach"),
    *("a crowd at night", "a building from outside", "an animal in the grass", "somebody writes on paper"),
    *("a car seen from behind", "a woman laughs", "a man sits at a desk", "a bird on a branch", "a train arrives"),
    *("a large red circle stays still in the centre", "a small blue square on the left", "a green triangle spins"),
    *("a white ring moves right at the top", "a big yellow star at the bottom", "a tiny purple cross moves up"),
    *("an orange diamond on the right", "a cyan crescent is falling"),
)
SCORED_FRAMES = 5_000_000  # takes a minute at 512 dimensions on one processor, and 10 GB to read
SCORES_AT_ONCE = 4_000_000  # cosines of questions and frames: 32 MB, of which some five are in memory
SCALE = float(1 << 40)  # of sums in whole numbers, which come to the same in any order


def sampled_texts(texts: Mapping[str, Sequence[str]]) -> list[str]:
    """A text of each of up to `N_QUESTIONS` videos. Args: texts: video id -> its texts, one or more."""
    chosen = heapq.nsmallest(N_QUESTIONS, texts, key=video_key)
    return [texts[video_id][video_key(video_id) % len(texts[video_id])] for video_id in chosen]


def make_probes(
    gallery: Gallery, texts: Sequence[str], encode: Callable[[Sequence[str]], Float32], temperature: float
) -> tuple[Probes, Background]:
    """Questions for an index over a gallery, with their answers; and the gallery's background, of the same videos.

    Args:
        texts: Beside the videos (`sampled_texts`).
        encode: Texts to unit rows (n, D) of those that can be encoded, perhaps none: then only kept frames ask.
        temperature: Of the encoder.
    """
    beside, everyday = encode(texts), encode(EVERYDAY_TEXTS)
    groups = (beside, everyday, disturbed_frames(gallery, N_QUESTIONS - len(beside)))
    asked = np.concatenate(groups)
    group_of = np.repeat(np.arange(len(groups)), [len(rows) for rows in groups])
    answers = _Answers(len(asked))
    total = np.zeros(asked.shape[1], np.int64)
    n_videos = gallery.n_videos_of(SCORED_FRAMES)
    for block in gallery.frames(n_videos):
        answers.add(block, _scores(asked, block, temperature))
        total += np.rint(_means(block) * SCALE).astype(np.int64).sum(axis=0)
    frame_mean = (total / SCALE / n_videos).astype(np.float32)
    unrelated = float((everyday @ frame_mean).mean()) if len(everyday) else None
    clear = [question for question, videos in enumerate(answers.videos) if len(videos) <= MOST_TIED]
    n_beside, n_everyday, n_frames = np.bincount(group_of[clear], minlength=len(groups)).tolist()
    about = [f"{number_of(n_beside, 'text')} beside videos"] if n_beside else []
    about += [number_of(n_everyday, "everyday text")] if n_everyday else []
    about += [f"{number_of(n_frames, 'kept frame')} with noise"] if n_frames else []
    if n_videos < len(gallery):
        about.append(f"asked of {n_videos} of the videos")
    right = [answers.videos[question] for question in clear]
    probes = Probes(asked[clear], right, ", ".join(about) or "none", n_videos)
    return probes, Background(frame_mean, unrelated)


def disturbed_frames(gallery: Gallery, n_frames: int) -> Float32:
    """(n, D) unit rows: of up to `n_frames` videos a kept frame each, plus noise of the same length."""
    n_videos = min(n_frames, len(gallery))  # the first by key
    rows = np.empty((n_videos, gallery.dim), np.float32)
    for block in gallery.frames(n_videos):
        for at, video in enumerate(block.videos.tolist()):
            frames = block.features[block.offsets[at] : block.offsets[at + 1]]
            key = int(gallery.id_map.keys[video])
            noise = np.random.default_rng(key).standard_normal(gallery.dim)
            row = frames[key % len(frames)] + NOISE * noise / np.linalg.norm(noise)
            rows[video] = row / np.linalg.norm(row)
    return rows


class _Answers:
    """For each of Q questions the videos that score best so far, as long as they are few enough to count.

    Attributes:
        videos: Their numbers; more than `MOST_TIED` where that many or more are equal.
    """

    def __init__(self, n_questions: int) -> None:
        self._best = np.full(n_questions, -np.inf, np.float32)
        self._scores: list[Float32] = [np.empty(0, np.float32)] * n_questions
        self.videos: list[Int32] = [np.empty(0, np.int32)] * n_questions

    def add(self, block: FrameBlock, scores: Float32) -> None:
        """Takes the scores (Q, V) of the videos of a block."""
        self._best = np.maximum(self._best, scores.max(axis=1))
        for question, best in enumerate((self._best - TIED).tolist()):
            new = scores[question] >= best
            old = self._scores[question] >= best
            if not (new.any() or not old.all()):
                continue
            some = np.concatenate([self._scores[question][old], scores[question][new]])
            best_first = np.argsort(-some, kind="stable")[: MOST_TIED + 1]  # what falls away is not above what stays
            self._scores[question] = some[best_first]
            self.videos[question] = np.concatenate([self.videos[question][old], block.videos[new]])[best_first]


def _scores(asked: Float32, block: FrameBlock, temperature: float) -> Float32:
    """(Q, V) scores of the videos of a block; some questions at a time where a single video has very many frames."""
    n_parts = 1 + len(asked) * len(block.features) // SCORES_AT_ONCE
    parts = [rescore(some @ block.features.T, block.offsets, temperature) for some in np.array_split(asked, n_parts)]
    return np.concatenate(parts)


def _means(block: FrameBlock) -> Float64:
    """(V, D) the mean of each video's kept frames."""
    lengths = np.diff(block.offsets)[:, None]
    means: Float64 = np.add.reduceat(block.features.astype(np.float64), block.offsets[:-1], axis=0) / lengths
    return means
