"""Which videos a query is compared with frame by frame: those of the moments nearest to it, so many different ones."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from indexes.id_map import IdMap
from pipeline.types import Float32, Int64

MOMENTS_PER_VIDEO = 4  # asked for at first, for each video that is wanted
GROWTH = 4  # of what is asked for, when that was not enough: a video may have ten thousand moments that are alike


class MomentSearch(Protocol):
    """The nearest moments of each query: (ids, cosines), best first; none of the ids in `without`."""

    def __call__(self, queries: Float32, k: int, without: Int64 | None = None) -> list[tuple[Int64, Float32]]: ...


def propose_videos(
    search: MomentSearch, id_map: IdMap, queries: Float32, n_videos: int
) -> list[tuple[NDArray[np.int32], Float32]]:
    """For each query the `n_videos` videos with the nearest moments, or all that the index can reach.

    However the moments are spread: the moments of videos that were found are left out of the next, larger search, so a
    video of many like moments stands in nobody's way.

    Args:
        queries: (Q, D) unit rows.

    Returns:
        For each query numbers of videos (C,), and the cosine of each with its nearest moment (C,), best first.
    """
    first = search(queries, min(MOMENTS_PER_VIDEO * n_videos, len(id_map)))
    return [_fill(search, id_map, query, n_videos, *found) for query, found in zip(queries, first, strict=True)]


def _fill(
    search: MomentSearch, id_map: IdMap, query: Float32, n_videos: int, ids: Int64, cosines: Float32
) -> tuple[NDArray[np.int32], Float32]:
    asked = MOMENTS_PER_VIDEO * n_videos
    videos, best = _by_video(id_map, ids, cosines)
    while len(videos) < min(n_videos, len(id_map.keys)):
        asked = GROWTH * asked
        ids, cosines = search(query[None], min(asked, len(id_map)), id_map.ids_of(videos))[0]
        if len(ids) == 0:
            break  # the cells that are looked into hold no other video
        more, best_of_more = _by_video(id_map, ids, cosines)
        videos, best = np.concatenate([videos, more]), np.concatenate([best, best_of_more])
    return videos[:n_videos], best[:n_videos]


def _by_video(id_map: IdMap, ids: Int64, cosines: Float32) -> tuple[NDArray[np.int32], Float32]:
    """The videos of some moments, each with the first, which is the best, of its moments."""
    videos = id_map.videos_of(ids)
    first = np.sort(np.unique(videos, return_index=True)[1])
    return videos[first], cosines[first]


def search_index(
    index: Any, queries: Float32, k: int, without: Int64 | None = None, among: Int64 | None = None
) -> list[tuple[Int64, Float32]]:
    """The nearest `k` moments of each query in an index of FAISS, as it is set: (ids, cosines), best first.

    Fewer when the index, or the cells that it looks into, hold fewer.

    Args:
        queries: (Q, D) float32 unit rows.
        without: Ids that are left out.
        among: The only ids that are looked for; None: all.
    """
    k = min(k, index.ntotal)
    if k < 1:
        return [(np.empty(0, np.int64), np.empty(0, np.float32)) for _ in queries]
    params = _only(index, without, among)
    scores, ids = index.search(np.ascontiguousarray(queries, np.float32), k, params=params)
    return [_ranked(*row) for row in zip(ids, scores, strict=True)]


def _only(index: Any, without: Int64 | None, among: Int64 | None) -> Any:
    """FAISS's parameters of a search for some ids; None for a search for all."""
    import faiss as typed

    faiss: Any = typed  # its stubs do not know the fields of its parameters
    selector = None if among is None else faiss.IDSelectorBatch(among)
    if without is not None and len(without):
        others = faiss.IDSelectorNot(faiss.IDSelectorBatch(without))
        selector = others if selector is None else faiss.IDSelectorAnd(selector, others)
    if selector is None:
        return None
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is None:
        return faiss.SearchParameters(sel=selector)
    return faiss.SearchParametersIVF(sel=selector, nprobe=ivf.nprobe)


def _ranked(ids: Int64, scores: Float32) -> tuple[Int64, Float32]:
    """Without the places that FAISS could not fill (id -1); equal scores by ascending id."""
    order = np.lexsort((ids, -scores))
    order = order[ids[order] >= 0]
    return ids[order], scores[order]
