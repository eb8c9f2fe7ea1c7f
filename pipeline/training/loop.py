"""The training loop: batches in, weights out, restartable at any step."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import FinecoError, UsageError
from pipeline.training.batches import CLIPS, Batch, batch_size_of, epoch_batches, random_of, training_batch
from pipeline.training.checkpoints import Journal
from pipeline.training.distributed import Group
from pipeline.training.examples import Examples, Rows, Split
from pipeline.training.neighbours import nearest_videos
from pipeline.training.objective import Losses, Objective, Trainable, follow, moving_average
from pipeline.training.options import TrainOptions
from pipeline.training.validation import validate

LOG_STEPS = 20
BETAS = (0.9, 0.98)  # as VideoCLIP's
METRIC = "mean recall"
DEFAULTS = TrainOptions()

Model = TypeVar("Model", bound=nn.Module)


class Watcher(Protocol):
    """Who is told how it goes."""

    def step(self, progress: float, losses: dict[str, float], n_clips: int) -> None:
        """After every step; `losses` are empty between the steps that are logged."""
        ...

    def validated(self, epoch: int, metrics: dict[str, float], best: bool) -> None:
        """After every epoch; epoch 0 is before the first step."""
        ...


@dataclass(slots=True)
class Trained:
    """What a training gave.

    Attributes:
        best_epoch: Whose weights the model has; 0: no epoch was better than the start.
        metrics: Of the validation after it; empty without validation.
        epochs, steps: Done in all.
        history: All metrics, in order.
    """

    best_epoch: int
    metrics: dict[str, float]
    epochs: int
    steps: int
    history: list[dict[str, Any]] = field(default_factory=list)


def train(
    model: Model,
    examples: Examples,
    options: TrainOptions = DEFAULTS,
    which: Split | None = None,
    device: str = "cpu",
    journal: Journal | None = None,
    group: Group | None = None,
    watcher: Watcher | None = None,
    stop: Callable[[], bool] = lambda: False,
    best_weights: Callable[[nn.Module], None] = lambda model: None,
) -> Trained | None:
    """Trains a model in place; it ends with the weights of the best epoch (the last one's without validation).

    Args:
        model: A `Trainable` module, such as models.fineco.FineCoHead.
        which: The texts to train on and to validate with; None: train on all, validate with none.
        device: As torch names it.
        journal: Where state and metrics are kept; None: nowhere. With a state in it, training goes on from there.
        group: The processes that train together.
        stop: Asked after every step; once it says yes the state is saved and the training ends unfinished.
        best_weights: Called with the model whenever it is the best so far.

    Returns:
        The outcome; None when it was stopped.

    Raises:
        UsageError: Too few videos.
        FinecoError: The loss is not finite.
    """
    every = np.arange(len(examples))
    run = _Run(model, examples, options, which or Split(every, every[:0]), device, journal, group or Group())
    devices = [torch.device(device)] if device.startswith("cuda") else []
    with torch.random.fork_rng(devices):  # every step seeds the generators anew
        return run.go(watcher, stop, best_weights)


class _Step(nn.Module):
    """A batch to its losses, as the module whose gradients DDP averages."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self._objective = objective

    def forward(self, batch: Batch, progress: float) -> Losses:
        return self._objective(cast(Trainable, self.model), batch, progress)


class _Run:
    """One training: the model with everything that changes beside it."""

    def __init__(
        self,
        model: nn.Module,
        examples: Examples,
        options: TrainOptions,
        which: Split,
        device: str,
        journal: Journal | None,
        group: Group,
    ) -> None:
        self._model = model.to(device)
        self._examples, self._options, self._which = examples, options, which
        self._device, self._journal, self._group = device, journal, group
        self._videos = examples.videos[which.training]
        self._batch_size = batch_size_of(self._videos, options.batch_size, group.size)
        if self._batch_size < 2:
            n = len(np.unique(self._videos))
            raise UsageError(
                f"{n} video(s) with texts to train on, for {group.size} process(es)",
                "A text is contrasted with the other videos of its batch: at least two are needed for each process.",
            )
        self._average = moving_average(model) if options.objective.frame_ema else None
        objective = Objective(options.objective, self._average, group, options.precision)
        self._losses = group.wrap(_Step(self._model, objective))
        self._optimiser = torch.optim.AdamW(_parameter_groups(model, options.weight_decay), lr=0.0, betas=BETAS)
        self._epoch = self._place = self._step = self._stale = 0  # place: batches done of the epoch
        self._best: dict[str, Any] = {}
        self._sums = {"loss": 0.0, "pair loss": 0.0, "frame loss": 0.0, "gradient": 0.0, "steps": 0.0}
        self._history: list[dict[str, Any]] = []

    @property
    def _trainable(self) -> Trainable:
        return cast(Trainable, self._model)

    def go(
        self, watcher: Watcher | None, stop: Callable[[], bool], best_weights: Callable[[nn.Module], None]
    ) -> Trained | None:
        if self._journal and (state := self._journal.load()):
            self._restore(state)
        elif len(self._which.validation):
            self._validate(watcher, best_weights)  # what there is to improve on: an untrained residual head is its base
        with ThreadPoolExecutor(1, "batches") as ahead:
            while self._epoch < self._options.epochs and not self._is_stale():
                if not self._train_epoch(watcher, stop, ahead):
                    return None
                self._end_epoch(watcher, best_weights)
        if self._best.get("weights"):
            self._model.load_state_dict(self._best["weights"])
        self._model.eval()
        best_epoch = int(self._best.get("epoch", self._epoch))
        return Trained(best_epoch, self._best.get("metrics", {}), self._epoch, self._step, self._history)

    def _is_stale(self) -> bool:
        return 0 < self._options.patience <= self._stale

    def _train_epoch(self, watcher: Watcher | None, stop: Callable[[], bool], ahead: ThreadPoolExecutor) -> bool:
        """The rest of an epoch; False when stopped in it."""
        batches = self._batches()
        if not batches:
            raise UsageError("an epoch has no whole batch of distinct videos", "Use a smaller --batch-size.")
        coming = ahead.submit(self._batch, batches[self._place], self._place) if self._place < len(batches) else None
        while coming is not None:
            batch = coming.result()
            following = self._place + 1
            coming = ahead.submit(self._batch, batches[following], following) if following < len(batches) else None
            stopped = self._train_step(batch.to(self._device), len(batches), watcher, stop())
            if stopped:
                self._save()
                return False
            if self._journal and coming is not None and self._journal.is_due(self._step):
                self._save()
        return True

    def _batches(self) -> list[Rows]:
        options = self._options
        neighbours = None
        if options.hard_negatives:
            folder = self._journal.folder if self._journal else None
            neighbours = nearest_videos(
                self._trainable, self._examples, self._videos, options, self._epoch, self._device, folder, self._group
            )
        batches = epoch_batches(self._videos, self._batch_size, options.seed, self._epoch, neighbours)
        return [self._which.training[places] for places in batches]

    def _batch(self, rows: Rows, place: int) -> Batch:
        options = self._options
        rng = random_of(options.seed, CLIPS, self._epoch, place)
        part = self._group.part(len(rows))
        return training_batch(self._examples, rows, options.clips, (options.min_tokens, options.max_tokens), rng, part)

    def _train_step(self, batch: Batch, n_batches: int, watcher: Watcher | None, stop: bool) -> bool:
        """One step; returns whether any process wants to stop."""
        options = self._options
        progress = (self._epoch + self._place / n_batches) / options.epochs
        after = (self._epoch + (self._place + 1) / n_batches) / options.epochs
        for parameters in self._optimiser.param_groups:
            parameters["lr"] = options.lr * learning_rate_factor(progress, after, options.warmup)
        torch.manual_seed(_dropout_seed(options.seed, self._step, self._group.rank))
        self._model.train()
        self._optimiser.zero_grad()
        losses: Losses = self._losses(batch, progress)
        losses.total.backward()  # type: ignore[no-untyped-call]
        wish = torch.tensor(float(stop), device=self._device)
        numbers = self._group.average([losses.pair, losses.frame, losses.total, wish])
        norm = nn.utils.clip_grad_norm_(self._model.parameters(), options.clip_norm)
        self._optimiser.step()
        if self._average is not None:
            follow(self._average, self._model, options.objective.frame_ema)
        self._place += 1
        self._step += 1
        self._log(numbers, norm, watcher, after)
        return bool(numbers[3] > 0)

    def _log(self, numbers: list[Tensor], norm: Tensor, watcher: Watcher | None, progress: float) -> None:
        pair, frame, total, _ = (float(n.detach()) for n in numbers)
        if not math.isfinite(total):
            raise FinecoError(f"the loss is not finite at step {self._step}", "Use a lower --lr, or --precision fp32.")
        for name, value in (("loss", total), ("pair loss", pair), ("frame loss", frame), ("gradient", float(norm))):
            self._sums[name] += value
        self._sums["steps"] += 1
        shown: dict[str, float] = {}
        if self._step % LOG_STEPS == 0:
            n = self._sums["steps"]
            shown = {name: value / n for name, value in self._sums.items() if name != "steps"}
            lr = float(self._optimiser.param_groups[0]["lr"])
            scale = float(self._trainable.logit_scale().detach())
            self._record({"step": self._step, "epoch": self._epoch + 1, **shown, "lr": lr, "logit scale": scale})
            self._sums = dict.fromkeys(self._sums, 0.0)
        if watcher:
            watcher.step(progress, shown, self._batch_size)

    def _end_epoch(self, watcher: Watcher | None, best_weights: Callable[[nn.Module], None]) -> None:
        self._epoch += 1
        self._place = 0
        self._validate(watcher, best_weights)
        self._save()

    def _validate(self, watcher: Watcher | None, best_weights: Callable[[nn.Module], None]) -> None:
        self._model.eval()
        metrics: dict[str, float] = {}
        best = True
        if len(self._which.validation):
            if self._group.leads:
                rows = self._which.validation
                metrics = validate(self._trainable, self._examples, rows, self._options.max_tokens, self._device)
            metrics = self._group.say_to_all(metrics)
            best = not self._best or metrics[METRIC] > self._best["metrics"][METRIC]
            self._record({"step": self._step, "epoch": self._epoch, "validation": True, **metrics})
        if best:
            weights = copy.deepcopy(self._model.state_dict()) if metrics else {}
            self._best = {"epoch": self._epoch, "metrics": metrics, "weights": weights}
            if self._group.leads:
                best_weights(self._model)
        self._stale = 0 if best else self._stale + 1
        if watcher:
            watcher.validated(self._epoch, metrics, best)

    def _record(self, line: dict[str, Any]) -> None:
        self._history.append(line)
        if self._journal:
            self._journal.write(line)

    def _save(self) -> None:
        if self._journal is None:
            return
        state = {
            "epoch": self._epoch,
            "place": self._place,
            "step": self._step,
            "stale": self._stale,
            "best": self._best,
            "sums": self._sums,
            "history": self._history,
            "model": self._model.state_dict(),
            "average": self._average.state_dict() if self._average is not None else None,
            "optimiser": self._optimiser.state_dict(),
        }
        self._journal.save(state)

    def _restore(self, state: dict[str, Any]) -> None:
        self._epoch, self._place, self._step = state["epoch"], state["place"], state["step"]
        self._stale, self._best = state["stale"], state["best"]
        self._sums, self._history = state["sums"], state["history"]
        self._model.load_state_dict(state["model"])
        if self._average is not None:
            self._average.load_state_dict(state["average"])
        self._optimiser.load_state_dict(state["optimiser"])


def learning_rate_factor(before: float, after: float, warmup: float) -> float:
    """Share of the highest learning rate for the step from `before` to `after` (shares of the training): linear up,
    then linear down to 0 at the end."""
    rising = after / warmup if warmup else 1.0
    falling = (1 - before) / (1 - warmup) if warmup < 1 else 1.0
    return min(rising, falling, 1.0)


def _dropout_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]) >> 1


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
