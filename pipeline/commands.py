"""What the commands do, as functions: the command line is a thin skin over these, and so is a user's own script."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from indexes.generations import current_generation, read_sidecar
from models.base import Encoder
from pipeline.catalog import find_videos
from pipeline.collection import Collection, Snapshot, Writer, this_command
from pipeline.commits import EMBEDDINGS, FEATURES, FRAMES, INDEX
from pipeline.config import (
    DEFAULT_FRAME_SIZE,
    EmbedOptions,
    SelectionPlan,
    SelectOptions,
    check_base,
    check_encoder,
    check_scorer,
    merge_config,
    plan_selection,
    sampling_of,
    set_sampling,
    share_sampling,
)
from pipeline.embed import text_cautions
from pipeline.errors import UsageError
from pipeline.interrupts import Interrupts
from pipeline.lock import LOCK_FILE, Lock
from pipeline.output import number_of
from pipeline.progress import Progress
from pipeline.reselect import count_unselected, select_stored
from pipeline.run import Selecting, Summary, decode_videos, default_workers, run_videos, start_pool
from pipeline.todo import Todo
from pipeline.types import DecodeLimits, FrameGeometry, Hit, Video

CPU_BATCH, GPU_BATCH = 32, 256  # frames; a CPU gains nothing beyond (measured for ViT-B/32)


def say_on_stderr(line: str) -> None:
    """Where the commands' notes go unless the caller has a better place."""
    print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True)
class Machine:
    """How the work is done, which changes no result: processes, device, limits, and where messages go."""

    device: str = "auto"
    workers: int | None = None
    batch_size: int | None = None
    limits: DecodeLimits = field(default_factory=DecodeLimits)
    quiet: bool = False
    say: Callable[[str], None] = say_on_stderr

    def progress(self) -> Progress:
        return Progress(quiet=self.quiet)


@dataclass(frozen=True, slots=True)
class Sources:
    """Which videos: files, folders, patterns; and a manifest.

    Attributes:
        features_of: A collection of the encoder that the model's head is built on: its features are not computed again.
            Without sources, its videos are meant.
        again: Instead: videos as the collection knows them, whose data was lost.
    """

    sources: Sequence[str] = ()
    manifest: Path | None = None
    retry_failed: bool = False
    features_of: Path | None = None
    again: Sequence[Video] = ()

    def check(self) -> None:
        """Raises UsageError for a source that is not there or has no videos, before anything is loaded or made."""
        next(find_videos(self.sources, self.manifest), None)

    def __bool__(self) -> bool:
        return bool(self.sources or self.manifest)


class EncoderOnDemand:
    """The collection's encoder, loaded when first needed: a command with nothing to do does not wait for it."""

    def __init__(
        self, config: dict[str, Any], collection: Collection | None, machine: Machine, given: Encoder | None
    ) -> None:
        self._config, self._collection, self._machine, self._encoder = config, collection, machine, given

    def __call__(self) -> Encoder:
        if self._encoder is None:
            from models.device import device_summary
            from models.registry import cautions, load_encoder

            name = self._config["model"]
            self._encoder = load_encoder(name, self._machine.device, self._config.get("precision", "auto"))
            where = device_summary(self._encoder.device, self._encoder.precision)
            self._machine.say(f"Encoder {self._encoder.spec.name} on {where}")
            for caution in cautions(self._encoder.spec.name):
                self._machine.say(f"  {caution}")
        if self._collection is not None:
            check_encoder(self._collection, self._encoder.spec, self._encoder.precision)
        return self._encoder


def run(
    folder: Path,
    sources: Sources,
    embed: EmbedOptions = EmbedOptions(),
    select: SelectOptions = SelectOptions(),
    machine: Machine = Machine(),
    index_kind: str = "auto",
    encoder: Encoder | None = None,
) -> Summary:
    """Decodes, embeds and selects what is new, and builds the index: the whole job.

    Args:
        folder: The collection; made if it is not there.
        encoder: Instead of the one that `embed.model` names.

    Returns:
        What was done; `any_failed` says whether a video failed.

    Raises:
        UsageError: A wrong path, option or model, or a collection made otherwise. Nothing is changed.
        Interrupted: After Ctrl-C; what was finished is kept.
        FinecoError: The run cannot go on; what was finished is kept.
    """
    return _stream(folder, sources, embed, machine, encoder, select, index_kind)


def embed(
    folder: Path,
    sources: Sources,
    options: EmbedOptions = EmbedOptions(),
    machine: Machine = Machine(),
    encoder: Encoder | None = None,
) -> Summary:
    """Computes features of what is new: from `frames/` where `decode` left them, else from the videos.

    Without sources, of every video in `frames/`. Raises as `run`.
    """
    return _stream(folder, sources, options, machine, encoder, None, "")


def _stream(
    folder: Path,
    sources: Sources,
    options: EmbedOptions,
    machine: Machine,
    encoder: Encoder | None,
    select: SelectOptions | None,
    index_kind: str,
) -> Summary:
    from models.registry import DEFAULT_MODEL

    collection = Collection(folder) if Collection.exists(folder) else None
    base = Snapshot(Collection(sources.features_of)) if sources.features_of else None
    if sources or (collection is None and base is None):
        sources.check()
    config = merge_config(collection.config if collection else {}, options)
    config.setdefault("model", encoder.spec.name if encoder else options.model or DEFAULT_MODEL)
    if base is not None:
        share_sampling(config, base.collection)
    config.setdefault("exact_resize", False)
    plan = None if select is None else plan_selection(collection, select, False, config["model"])
    get_encoder = EncoderOnDemand(config, collection, machine, encoder)

    def load_fitting() -> Encoder:
        """The encoder, once everything that has to fit it does."""
        loaded = get_encoder()
        set_sampling(config, loaded.spec)
        if base is not None:
            check_base(base.collection, loaded)
        if plan is not None and plan.scorer is not None:
            check_scorer(plan, loaded.spec.name, loaded.spec.fingerprint)
        return loaded

    _check_place(folder, collection)
    if collection is None or collection.encoder is None:
        load_fitting()  # a model that cannot be had, or a scorer of another, must not leave anything behind
    collection = collection or _create(folder, config)
    with Interrupts(this_command()) as interrupts, collection.writing(this_command()) as writer:
        stored = sources.again or (base.videos(FEATURES) if base is not None else writer.videos(FRAMES))
        todo = _todo(writer, sources, stored, FEATURES, machine, interrupts)
        if plan is not None:
            collection.use_selection(plan.name, plan.content)
        summary = Summary(todo.counts)
        if todo.counts.to_do:
            with interrupts.at_once():
                loaded = load_fitting()
            config["precision"] = loaded.precision
            record = {
                "name": loaded.spec.name,
                "fingerprint": loaded.spec.fingerprint,
                "precision": loaded.precision,
                "spec": asdict(loaded.spec),
            }
            if (collection.config, collection.encoder) != (config, record):
                collection.update(config, record)
            pool = start_pool(
                machine.workers or default_workers(),
                sampling_of(config),
                loaded.spec.geometry,
                config["exact_resize"],
                machine.limits,
            )
            batch_size = machine.batch_size or (GPU_BATCH if loaded.device.startswith("cuda") else CPU_BATCH)
            selecting = Selecting(plan, loaded) if plan else None
            with pool, machine.progress() as progress:
                summary = run_videos(writer, todo, loaded, selecting, pool, batch_size, progress, interrupts, base)
        if plan is not None:
            _select_missing(writer, plan, get_encoder, machine, interrupts)
            _index(writer, index_kind, None, machine, interrupts, get_encoder)
    return summary


def _check_place(folder: Path, collection: Collection | None) -> None:
    """Raises UsageError, before a model is loaded, where no collection can be made or somebody else writes to it."""
    if collection is None:
        Collection.check_new(folder)
    if (folder / LOCK_FILE).exists():
        with Lock(folder, this_command()):
            pass


def _create(folder: Path, config: dict[str, Any]) -> Collection:
    """Makes the collection, under its lock: two commands may have found none there."""
    if not Collection.exists(folder):
        Collection.check_new(folder)
    with Lock(folder, this_command()):
        if Collection.exists(folder):
            raise UsageError(f"{folder} was made by another command meanwhile", "Give the same command again.")
        return Collection.create(folder, config)


def _todo(
    writer: Writer, sources: Sources, stored: Iterable[Video], wanted: str, machine: Machine, interrupts: Interrupts
) -> Todo:
    paths, manifest, retry = sources.sources, sources.manifest, sources.retry_failed
    with interrupts.at_once():  # a large file takes long to read
        todo = Todo(writer, paths, manifest, stored, wanted, retry, machine.say, interrupts.check)
    counts = todo.counts
    parts = [f"{counts.to_do} to do"]
    parts += [f"{counts.done_before} done before"] if counts.done_before else []
    parts += [f"{counts.failed_before} failed before (--retry-failed tries again)"] if counts.failed_before else []
    parts += [f"{counts.skipped} skipped"] if counts.skipped else []
    parts += [f"{counts.failed_now} not readable"] if counts.failed_now else []
    machine.say(f"{number_of(counts.found, 'video')} found: {', '.join(parts)}")
    return todo


def decode(
    folder: Path, sources: Sources, options: EmbedOptions = EmbedOptions(), machine: Machine = Machine()
) -> Summary:
    """Decodes what is new and stores the sampled frames as JPEG in `frames/`, for `embed`. Raises as `run`."""
    collection = Collection(folder) if Collection.exists(folder) else None
    if not sources.again:
        sources.check()
    config = merge_config(collection.config if collection else {}, options)
    config.setdefault("frame_size", DEFAULT_FRAME_SIZE)
    set_sampling(config, None)
    collection = collection or _create(folder, config)
    with Interrupts(this_command()) as interrupts, collection.writing(this_command()) as writer:
        if collection.config != config:
            collection.update(config, collection.encoder)
        todo = _todo(writer, sources, sources.again, FRAMES, machine, interrupts)
        if not todo.counts.to_do:
            return Summary(todo.counts)
        size = config["frame_size"]
        geometry = FrameGeometry(size, size, "bound")
        pool = start_pool(
            machine.workers or default_workers(), sampling_of(config), geometry, False, machine.limits, jpeg=True
        )
        with pool, machine.progress() as progress:
            return decode_videos(writer, todo, pool, progress, interrupts)


def select(
    folder: Path, options: SelectOptions = SelectOptions(), machine: Machine = Machine(), encoder: Encoder | None = None
) -> int:
    """Selects frames of every stored video anew with another selector; returns for how many there was work.

    Neither decodes nor embeds frames. The encoder is loaded only when there is text to encode.
    """
    collection = Collection(folder)
    plan = plan_selection(collection, options, change=True)
    with Interrupts(this_command()) as interrupts, collection.writing(this_command()) as writer:
        if not writer.state.places.get(FEATURES):
            raise UsageError(f"{folder} has no features to select from", "Run 'fineco run' or 'fineco embed' first.")
        get_encoder = EncoderOnDemand(collection.config, collection, machine, encoder)
        collection.add_selection(plan.name, plan.content)
        n_selected = _select_missing(writer, plan, get_encoder, machine, interrupts)
        collection.use_selection(plan.name, plan.content)  # not before: an index of half of the videos helps nobody
        return n_selected


def _select_missing(
    writer: Writer, plan: SelectionPlan, get_encoder: EncoderOnDemand, machine: Machine, interrupts: Interrupts
) -> int:
    if not count_unselected(writer, plan.name):
        return 0
    kind = f"{EMBEDDINGS}/{plan.name}"
    if kind in writer.state.outdated and not writer.state.places.get(kind):
        machine.say(
            "An earlier version of fineco made this collection, without moments: frames are selected again from the "
            "stored features, nothing is decoded or embedded."
        )

    def make_selecting(any_text: bool) -> Selecting:
        with interrupts.at_once():
            return Selecting(plan, get_encoder() if plan.needs_encoder(any_text) else None)

    with machine.progress() as progress:
        return select_stored(writer, make_selecting, plan.name, progress, interrupts)


def index(
    folder: Path,
    kind: str = "auto",
    memory_bytes: int | None = None,
    machine: Machine = Machine(),
    force: bool = False,
    encoder: Encoder | None = None,
    recall_goal: float | None = None,
) -> bool:
    """Builds the index of the selection in use; returns False when it was up to date.

    What it finds is measured with texts, for which the encoder is loaded unless the index before it had them too.

    Args:
        recall_goal: What it should find of an exhaustive search's first answers; None: as the index before it, or 0.95.
    """
    collection = Collection(folder)
    get_encoder = EncoderOnDemand(collection.config, collection, machine, encoder)
    with Interrupts(this_command()) as interrupts, collection.writing(this_command()) as writer:
        return _index(writer, kind, memory_bytes, machine, interrupts, get_encoder, force, recall_goal)


def _index(
    writer: Writer,
    kind: str,
    memory_bytes: int | None,
    machine: Machine,
    interrupts: Interrupts,
    get_encoder: EncoderOnDemand,
    force: bool = False,
    recall_goal: float | None = None,
) -> bool:
    from pipeline.indexing import build_collection_index

    if not any(name.startswith(f"{EMBEDDINGS}/") for name in (*writer.state.places, *writer.state.outdated)):
        unselected = "No frames are selected yet: run 'fineco select' first."
        machine.say(unselected if writer.state.places.get(FEATURES) else "No video to index.")
        return False
    with interrupts.at_once():  # the index before it stays
        report = build_collection_index(
            writer, kind, memory_bytes, machine.say, force, get_encoder=get_encoder, recall_goal=recall_goal
        )
    machine.say(report.describe() if report else "The index is up to date.")
    return report is not None


def search(
    folder: Path,
    queries: Sequence[str],
    k: int = 10,
    threshold: float | None = None,
    rescoring: bool = True,
    machine: Machine = Machine(),
    encoder: Encoder | None = None,
    by_moment: bool = False,
) -> list[list[Hit]]:
    """The best `k` videos of a collection for each query with their moments, or (`by_moment`) the best `k` moments."""
    from pipeline.search import Searcher

    collection = Collection(folder)
    if collection.encoder is None:
        raise UsageError(f"{folder} has no features yet", f"Run 'fineco run VIDEOS -c {folder}'.")
    if encoder is None:
        read_sidecar(current_generation(folder / INDEX))  # a missing index is said before a model is loaded
        from models.registry import load_encoder

        encoder = load_encoder(collection.config["model"], machine.device, collection.encoder["precision"])
    for line in text_cautions(encoder, queries):
        machine.say(line)

    def answers(encoder: Encoder = encoder) -> list[list[Hit]]:
        with Searcher(collection, encoder) as searcher:
            return searcher.search(queries, k, threshold, rescoring, by_moment)

    return collection.stable(answers)
