"""Which videos are hard to tell apart: nearest neighbours among the videos' mean vectors under the current model."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from pipeline.files import write_bytes
from pipeline.training.batches import collate, middle_part
from pipeline.training.checkpoints import WORK
from pipeline.training.distributed import Group
from pipeline.training.examples import Examples
from pipeline.training.objective import Trainable
from pipeline.training.options import TrainOptions
from pipeline.types import Float32

N_NEAREST = 64  # docs/METHOD.md section 3
EXACT_VIDEOS = 50_000  # compared with each other in blocks up to here, beyond that by FAISS
VIDEOS_PER_BATCH = 64
ROWS_PER_BLOCK = 1024
N_PROBES = 200  # that the index is measured with
FINGERPRINT = "mean vectors of a head in training"


def nearest_videos(
    model: Trainable,
    examples: Examples,
    videos: NDArray[np.int64],
    options: TrainOptions,
    epoch: int,
    device: str,
    folder: Path | None,
    group: Group,
) -> NDArray[np.int64]:
    """(V, k) nearest other videos of each video of the bank, as the model sees them at the start of this epoch.

    They are kept in a file until the next epoch: a training that starts again in the middle of one has another model by
    then.

    Args:
        videos: The videos to train on, in any number of copies; no others are neighbours.
        folder: Of the checkpoint; None: nothing is kept.
    """
    path = folder / WORK / f"neighbours-{epoch}.npy" if folder else None
    if path and path.exists() and group.size == 1:
        found: NDArray[np.int64] = np.load(path)
        return found
    table: NDArray[np.int64] | None = None
    if group.leads:
        if path and path.exists():
            table = np.load(path)
        else:
            table = _search(model, examples, np.unique(videos), options.max_tokens, device)
            if path:
                _keep(path, table)
    shared: NDArray[np.int64] = group.say_to_all(table)
    return shared


def _keep(path: Path, table: NDArray[np.int64]) -> None:
    content = io.BytesIO()
    np.save(content, table)
    write_bytes(path, content.getvalue())
    for old in path.parent.glob("neighbours-*.npy"):
        if old != path:
            old.unlink()


def _search(
    model: Trainable, examples: Examples, videos: NDArray[np.int64], max_tokens: int, device: str
) -> NDArray[np.int64]:
    vectors = video_means(model, examples, videos, max_tokens, device)
    k = min(N_NEAREST, len(videos) - 1)
    near = _by_faiss(vectors, k) if len(videos) > EXACT_VIDEOS else _exactly(vectors, k)
    table = np.full((len(examples.bank.lengths), k), -1, np.int64)
    table[videos] = np.where(near >= 0, videos[near], -1)
    return table


@torch.no_grad()
def video_means(
    model: Trainable, examples: Examples, videos: NDArray[np.int64], max_tokens: int, device: str
) -> Float32:
    """(V, d) unit vectors of whole videos (the middle of long ones)."""
    module = model
    assert isinstance(module, torch.nn.Module)
    module.eval()
    order = videos[np.argsort(examples.bank.lengths[videos], kind="stable")]
    first_text = np.zeros(len(examples.bank.lengths), np.intp)
    first_text[examples.videos] = np.arange(len(examples))
    means: dict[int, Float32] = {}
    for start in range(0, len(order), VIDEOS_PER_BATCH):
        some = order[start : start + VIDEOS_PER_BATCH]
        whole = np.stack([np.zeros(len(some), np.int64), examples.bank.lengths[some]], axis=1)
        batch = collate(examples, first_text[some], middle_part(whole, max_tokens)).to(device)
        pooled = F.normalize(model.encode_video(batch.features, batch.mask).pooled.float(), dim=-1).cpu().numpy()
        means.update(zip(some.tolist(), pooled, strict=True))
    return np.stack([means[v] for v in videos.tolist()])


def _exactly(vectors: Float32, k: int) -> NDArray[np.int64]:
    all_vectors = torch.from_numpy(vectors)
    found = []
    for start in range(0, len(vectors), ROWS_PER_BLOCK):
        scores = all_vectors[start : start + ROWS_PER_BLOCK] @ all_vectors.T
        scores[torch.arange(len(scores)), torch.arange(start, start + len(scores))] = -torch.inf  # itself
        found.append(scores.topk(k).indices)
    return torch.cat(found).numpy()


def _by_faiss(vectors: Float32, k: int) -> NDArray[np.int64]:
    """Through an index such as a search uses, in a folder that is gone afterwards."""
    from indexes.build import Probes, build_index
    from indexes.generations import current_generation, new_generation, write_sidecar
    from indexes.id_map import IdMap, moment_ids
    from indexes.plan import plan_index
    from indexes.search import VectorIndex

    n = len(vectors)
    keys, ones = np.arange(n, dtype=np.int64), np.ones(n, np.int32)
    id_map, ids = IdMap.of(keys, ones), moment_ids(keys, ones)
    probes = Probes(*_probes(vectors), "videos")
    plan = plan_index(n, n, vectors.shape[1])
    with tempfile.TemporaryDirectory() as folder:
        with new_generation(Path(folder)) as generation:
            report = build_index(plan, lambda: [(ids, vectors)], id_map, probes, generation)
            write_sidecar(generation, report, FINGERPRINT, "", {})
        index = VectorIndex.open(current_generation(Path(folder)), FINGERPRINT)
        near = np.full((n, k), -1, np.int64)
        for start in range(0, n, ROWS_PER_BLOCK):
            answers = index.search(vectors[start : start + ROWS_PER_BLOCK], k + 1)
            for row, (found, _) in enumerate(answers, start):
                videos = id_map.videos_of(found)
                others = videos[videos != row][:k]
                near[row, : len(others)] = others
    return near


def _probes(vectors: Float32) -> tuple[Float32, list[NDArray[np.int32]]]:
    """Some of the vectors, and the nearest other one of each."""
    some = np.linspace(0, len(vectors) - 1, N_PROBES).astype(np.intp)
    scores = vectors[some] @ vectors.T
    scores[np.arange(N_PROBES), some] = -np.inf
    return vectors[some], [np.array([nearest], np.int32) for nearest in scores.argmax(axis=1)]
