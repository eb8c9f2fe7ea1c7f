"""What an evaluation takes from a collection: its encoder, the features of the annotated videos, how they were made."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from models.base import Encoder, VideoEncoder
from models.registry import LOCAL_FOLDERS
from pipeline import store
from pipeline.annotations import Annotations
from pipeline.collection import Collection, Snapshot
from pipeline.commands import Machine
from pipeline.commits import FEATURES, INDEX
from pipeline.config import SelectionPlan, SelectOptions, check_encoder, plan_selection, sampling_of
from pipeline.embed import encode_texts
from pipeline.errors import FinecoError, UsageError
from pipeline.evaluate import CONFIDENCE, DRAWS, MeanMetrics, TieRule
from pipeline.evaluation.clips import VideoRows
from pipeline.evaluation.matching import Matched, match_videos
from pipeline.run import Selecting
from pipeline.text_vectors import TextVectors
from pipeline.types import Float32, Video

ALL_FRAMES = SelectOptions("all")


@dataclass(frozen=True, slots=True)
class Options:
    """How texts are compared with clips.

    Attributes:
        score: `rescore` (frames weighted by a softmax, as a search ranks) or `mean` (pooled vectors).
        by: What `retrieval` scores a clip by: as a whole (`video`), or by the best of its `moments`; not with a model.
        select: Over which frames; the videos' own texts serve `caption`.
        model: A video model over this collection's features that scores pairs itself; then `score` plays no part.
        draws, seed: Of the bootstrap; the seed also draws lists and samples.
        ties: How the ranks of `retrieval` count ties.
    """

    score: str = "rescore"
    by: Literal["video", "moments"] = "video"
    select: SelectOptions = ALL_FRAMES
    model: str | None = None
    draws: int = DRAWS
    seed: int = 0
    ties: TieRule = "average"


def intervals_of(options: Options, over: str) -> dict[str, Any]:
    """How the intervals of a report were made, as its entry."""
    return {"intervals": {"level": CONFIDENCE, "draws": options.draws, "over": over, "seed": options.seed}}


def split_of(
    annotations: Annotations[Any], names: set[str], matched: Matched | None, used: dict[str, int]
) -> dict[str, Any]:
    """What was read and what of it was found (None: no collection was asked) and used, as an entry of a report."""
    return {
        "dataset": annotations.dataset,
        "subset": annotations.subset,
        "sha256": annotations.sha256,
        "rows": len(annotations.rows),
        "videos": len(names),
        "found": None if matched is None else len(matched.found),
        "missing": [] if matched is None else list(matched.missing),
        "used": used,
    }


def result_of(method: str, metrics: MeanMetrics) -> dict[str, Any]:
    """Means and their intervals, as an entry of a report."""
    intervals = {name: list(interval) for name, interval in metrics.intervals.items()}
    return {
        "method": method,
        "queries": metrics.n,
        "tied": metrics.tied,
        "values": metrics.values,
        "intervals": intervals,
    }


class Material:
    """A collection opened for evaluation. The encoder is loaded when first needed: a mistake is told before.

    Args:
        collection: Made by `fineco run` or `fineco embed`.
        options: What is compared, and how.
        machine: Device, and where notes go.
        encoder: Instead of loading the one the collection was made with.
        model: Instead of loading `options.model`.

    Raises:
        UsageError: No features, or a wrong selection.
    """

    def __init__(
        self,
        collection: Collection,
        options: Options,
        machine: Machine,
        encoder: Encoder | None = None,
        model: VideoEncoder | None = None,
    ) -> None:
        if collection.encoder is None:
            raise UsageError(
                f"{collection.folder} has no features yet", f"Run 'fineco run VIDEOS -c {collection.folder}'."
            )
        self._record: dict[str, Any] = collection.encoder
        self._snapshot = Snapshot(collection)
        self._collection, self._machine = collection, machine
        self._given_encoder, self._given_model = encoder, model
        self.options = options
        self.plan: SelectionPlan = plan_selection(None, options.select, True, collection.config.get("model"))

    @cached_property
    def model(self) -> VideoEncoder | None:
        """The model that scores pairs, if there is one.

        Raises:
            UsageError: It is none, or not one over this collection's features.
        """
        if self._given_model is not None or self.options.model is None:
            return self._given_model
        from models.registry import load_encoder

        name = self.options.model
        model = load_encoder(name, self._machine.device, self._record["precision"])
        if not isinstance(model, VideoEncoder):
            raise UsageError(
                f"--model: {name} is not a model over another encoder's features",
                "Leave --model out: texts are then encoded by the encoder the collection was made with.",
            )
        base, record = model.base.spec, self._record
        if base.fingerprint != record["fingerprint"]:
            raise UsageError(
                f"--model: {name} is built on {base.name} ({base.fingerprint[:12]}), the features of "
                f"{self._collection.folder} are from {record['name']} ({record['fingerprint'][:12]})",
                "Use a collection of the model's own base, or a model over this one.",
            )
        return model

    @cached_property
    def encoder(self) -> Encoder:
        """The encoder the collection was made with.

        Raises:
            UsageError: It is another one by now.
        """
        encoder = self.model.base if self.model is not None else self._given_encoder
        if encoder is None:
            from models.registry import cautions, load_encoder

            encoder = load_encoder(self._collection.config["model"], self._machine.device, self._record["precision"])
            for caution in cautions(encoder.spec.name):
                self._machine.say(caution)
        check_encoder(self._collection, encoder.spec, encoder.precision)
        return encoder

    def match(self, names: set[str]) -> Matched:
        """The collection's video of each annotated name.

        Raises:
            UsageError: It has none of them, or a name fits two.
        """
        matched = match_videos(names, self._snapshot.videos(FEATURES))
        if not matched.found:
            raise UsageError(
                f"{self._collection.folder} has none of the {len(matched.missing)} annotated videos "
                f"({', '.join(matched.missing[:3])} ...)",
                "Videos are matched by id, file name, or file name without extension.",
            )
        return matched

    def read(self, videos: Iterable[Video]) -> dict[str, VideoRows]:
        """The rows of some videos by id, after the selector; all are held in memory.

        Their scenes are those of all sampled frames, whatever the selector kept.

        Raises:
            IntegrityError: A shard is damaged.
        """
        places = self._snapshot.state.places[FEATURES]
        by_commit: dict[int, dict[str, Video]] = {}
        for video in videos:
            by_commit.setdefault(places[video.video_id].commit, {})[video.video_id] = video
        selecting = Selecting(self.plan, None if self.plan.selector == "all" else self.encoder)
        rows: dict[str, VideoRows] = {}
        for commit, wanted in sorted(by_commit.items()):
            path = self._collection.open_file(f"{FEATURES}/{commit:06d}.h5", self._snapshot.records)
            with store.FeaturesShard(path) as shard:
                for at, video_id in enumerate(shard.video_ids):
                    if video_id in wanted:
                        kept = selecting.select(shard.features(at), wanted[video_id].texts)
                        duration = float(shard.durations[at])
                        rows[video_id] = VideoRows(
                            kept.features, kept.moments, kept.pts_seconds, kept.span_seconds, duration
                        )
        return rows

    def encode(self, texts: list[str]) -> Float32:
        """(M, D) unit rows under the collection's encoder; each distinct text is encoded once."""
        distinct = list(dict.fromkeys(texts))
        vectors = encode_texts(self.encoder, distinct)
        row = {text: i for i, text in enumerate(distinct)}
        found: Float32 = vectors[[row[text] for text in texts]]
        return found

    def encode_readable(self, texts: Sequence[str]) -> Float32:
        """(n, D) float32 unit rows of those texts that the encoder reads as a whole, perhaps none."""
        spec, folder = self.encoder.spec, self._collection.folder / INDEX
        return TextVectors(folder, spec.fingerprint, spec.dim, lambda: self.encoder, self._machine.say)(texts)

    def describe(self) -> dict[str, Any]:
        """Encoder, sampling, selector and score, for a report."""
        content = {
            "encoder": _without_folder(self._record["name"]),
            "fingerprint": self._record["fingerprint"],
            "precision": self._record["precision"],
            "sampling": sampling_of(self._collection.config).describe(),
            "selector": self.plan.selector,
            "keep": None if self.plan.selector == "all" else self.plan.content["keep"],
        }
        if self.plan.topics:
            content["topics"] = list(self.plan.topics)
        if self.plan.scorer:
            content["scorer"] = self.plan.content["scorer"]
        if self.model is not None:
            spec = self.model.spec
            return content | {
                "score": "model",
                "model": _without_folder(spec.name),
                "model_fingerprint": spec.fingerprint,
            }
        if self.options.score == "rescore":
            return content | {"score": "rescore", "temperature": self.encoder.spec.temperature}
        return content | {"score": self.options.score}

    def own_texts(self, videos: Iterable[Video]) -> set[str]:
        """What the selector `caption` selected by: the texts beside the videos. Empty for other selectors."""
        return {text.text for video in videos for text in video.texts} if self.plan.selector == "caption" else set()

    def index(self) -> dict[str, Any] | None:
        """What the collection's index says of itself: its kind and size, and for how many of the questions that it was
        measured with it finds what an exhaustive search finds first; None without one."""
        from indexes.generations import current_generation, read_sidecar

        try:
            sidecar = read_sidecar(current_generation(self._collection.folder / INDEX))
        except UsageError:
            return None
        except FinecoError as error:  # nothing here is read from it
            self._machine.say(f"The index is damaged: {error.message}")
            return None
        report = sidecar.report
        return {
            "factory": report.factory,
            "videos": report.n_videos,
            "moments": report.n_vectors,
            "selection": sidecar.selection,
            "questions": report.n_probes,
            "found": report.n_found,
        }


def _without_folder(name: str) -> str:
    """`fineco:/home/me/heads/a` as `fineco:a`: a report may be shown to others; the fingerprint says which it is."""
    prefix = next((prefix for prefix in LOCAL_FOLDERS if name.startswith(prefix)), None)
    return name if prefix is None else prefix + os.path.basename(name.removeprefix(prefix).rstrip("/"))
