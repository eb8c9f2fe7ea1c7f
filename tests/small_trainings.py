"""Tiny trainings: a collection of random features without any video, and processes that train and may be killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fakes import FakeEncoder
from models.fineco import FineCoHead, HeadConfig
from pipeline import store
from pipeline.collection import Collection
from pipeline.commits import FEATURES, Row
from pipeline.errors import FinecoError
from pipeline.training.command import Work, train_collection
from pipeline.training.display import Display
from pipeline.training.examples import Examples
from pipeline.types import Float32, FrameFeatures, Outcome, TimedText, Video

DIM = 16
WORDS = "red blue green small large round square fast slow bird fish stone leaf door lamp boat rope wheel".split()
TINY = {"width": 16, "layers": 1, "heads": 2}


def unit(vectors: Float32) -> Float32:
    rows: Float32 = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    return rows.astype(np.float32)


def random_rows(n: int, seed: int = 0, dim: int = DIM) -> Float32:
    return unit(np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32))


def small_examples(n: int = 10, seed: int = 0, tokens: tuple[int, int] = (3, 40)) -> Examples:
    """Random videos, a random text for each: nothing to learn but by heart."""
    lengths = np.random.default_rng(seed).integers(*tokens, n).tolist()
    features = [random_rows(length, seed + 1 + number) for number, length in enumerate(lengths)]
    return Examples.of_arrays(features, random_rows(n, seed + 1000))


def small_head(seed: int = 0, **changes: Any) -> FineCoHead:
    torch.manual_seed(seed)
    sizes = {"input_dim": DIM, "text_dim": DIM, "dim": DIM, "intermediate": 32, "dropout": 0.0, "temperature": 0.1}
    return FineCoHead(HeadConfig(**{**sizes, **TINY, **changes}))


def shake(head: FineCoHead, seed: int = 1) -> FineCoHead:
    """The head as if it had been trained: no weight is zero any more."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in head.parameters():
            if parameter.ndim:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return head.eval()


def caption_of(number: int) -> str:
    return f"{WORDS[number % len(WORDS)]} {WORDS[number // len(WORDS)]} number {number}"


def make_collection(
    folder: Path,
    n: int = 12,
    texts: Mapping[int, Sequence[TimedText]] | None = None,
    paths: Mapping[int, str] | None = None,
    shards: int = 2,
) -> Path:
    """Random features at 1 frame/s of n videos that do not exist, in some shards, each with a caption."""
    encoder = FakeEncoder()
    collection = Collection.create(folder, {"model": "fake"})
    spec = encoder.spec
    record = {"name": spec.name, "fingerprint": spec.fingerprint, "precision": "fp32", "spec": asdict(spec)}
    collection.update({"model": "fake"}, record)
    with collection.writing("test") as writer:
        for numbers in np.array_split(np.arange(n), shards):
            rows, features = [], []
            for number in numbers.tolist():
                own = tuple((texts or {}).get(number, [TimedText(caption_of(number))]))
                path = (paths or {}).get(number, f"/videos/clip{number}.mp4")
                video = Video(f"id-{number}", f"{number:032x}", path, 1, 2, 3, None, own)
                rows.append(Row.of(video, Outcome(video.video_id, path, "ok", "embed"), 2.0))
                length = 4 + number % 7
                stored = store.StoredVideo(video.video_id, video.content, float(length))
                times = np.arange(length, dtype=np.float64)
                features.append((stored, FrameFeatures(video.video_id, random_rows(length, number), times, 1.0)))
            writer.commit("embed", rows, [(FEATURES, lambda path, f=features: store.write_features(path, f))])  # type: ignore[misc]
    return folder


def train_small(collection: Path, output: Path, work: Work | None = None, **given: Any) -> dict[str, Any]:
    """`fineco train` with the fake encoder and a tiny head."""
    head = {} if given.get("towers") else {"dropout": 0.1, **TINY}
    options = {"batch_size": 4, "validation": 0.25, "lr": 3e-3, "precision": "fp32", **head, **given}
    return train_collection(collection, output, options, work or Work("cpu", quiet=True), FakeEncoder())


def metrics_of(output: Path) -> list[dict[str, Any]]:
    try:
        lines = (output / "metrics.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]


# ------------------------------------------------------------------------------------------- processes of their own

SECONDS_PER_STEP = 0.03


def start_training(
    collection: Path, output: Path, given: Mapping[str, Any], rank: int = 0, size: int = 1, port: int = 0
) -> BaseProcess:
    """A training in another process, slow enough to be hit in the middle; one of `size` that train together."""
    arguments = (str(collection), str(output), dict(given), rank, size, port)
    process: BaseProcess = _processes().Process(target=_train_process, args=arguments, daemon=True)
    process.start()
    return process


def _train_process(collection: str, output: str, given: dict[str, Any], rank: int, size: int, port: int) -> None:
    torch.set_num_threads(1)
    sys.argv = ["fineco", "train", "-c", collection, "-o", output]
    if size > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
        os.environ.update({**{name: str(value) for name, value in place.items()}, "MASTER_ADDR": "127.0.0.1"})
    else:
        shown = Display.step

        def slow_step(self: Display, progress: float, losses: dict[str, float], n_clips: int) -> None:
            time.sleep(SECONDS_PER_STEP)
            shown(self, progress, losses, n_clips)

        Display.step = slow_step  # type: ignore[method-assign]
    try:
        train_small(Path(collection), Path(output), Work("cpu", save_steps=3), **given)
    except FinecoError as error:
        Path(f"{output}.error").write_text(str(error))
        os._exit(error.exit_code)
    os._exit(0)


def kill_at(process: BaseProcess, output: Path, step: int, number: int = signal.SIGKILL) -> None:
    """Sends a signal once this process has brought the training's metrics to a step."""
    metrics, started = output / "metrics.jsonl", time.time_ns()
    deadline = time.monotonic() + 60
    while process.is_alive():
        lines = metrics_of(output)
        if lines and lines[-1]["step"] >= step and metrics.stat().st_mtime_ns > started:
            break
        if time.monotonic() > deadline:
            raise TimeoutError(f"no step {step}: {lines[-1:]}")
        time.sleep(0.005)
    if process.pid is not None and process.is_alive():
        os.kill(process.pid, number)
    process.join(60)


def _processes() -> Any:
    """New processes are forked from a server that has torch loaded: importing it takes seconds each time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["small_trainings", "torch._dynamo"])
    return context
