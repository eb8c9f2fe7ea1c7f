"""Which runs the study makes, in which order, and how they are made: two processes, one line of JSON a run."""

from __future__ import annotations

import itertools
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

from benchmarks.noise_share_runs import Budget, Material, Setup, fit, line_of, measure
from benchmarks.noise_share_videos import N_FRAMES, Noise, Sizes, load_bank
from models.losses import Form
from models.registry import load_encoder

SHARES = tuple(N_FRAMES // parts for parts in (1, 2, 4, 8, 16))  # frames that show the subject
NOISIEST = SHARES[-1]
RATIOS = (0.125, 0.25, 0.5)
WEIGHTS = (0.1, 0.5, 1.0)
BY_SHARE: tuple[tuple[Form, float, float], ...] = (  # form, ratio, weight of what is measured at every share
    ("set", 0.125, 1.0),
    ("set", 0.25, 1.0),
    ("set", 0.5, 1.0),
    ("each", 0.25, 0.5),  # what `fineco train` did by default before this study
    ("each", 0.5, 0.5),
)
DECAYS = (0.9, 0.99)  # of the moving average, in a training of 90 steps
NOISES: tuple[Noise, ...] = get_args(Noise)
FORMS: tuple[Form, ...] = get_args(Form)

_material: Material | None = None
_budget = Budget()


def fineco(setup: Setup) -> Setup:
    """The same with FineCo's loss added, as in the plot's lines; chosen on validation videos, see docs/STUDY.md."""
    return replace(setup, weight=1.0, ratio=0.125, form="set")


def runs(n_seeds: int, shares: tuple[int, ...] = SHARES) -> list[Setup]:
    """Every run, what matters most first, none twice.

    Args:
        n_seeds: Of every training; the grid at other shares than the noisiest has one.
        shares: Relevant frames of a video, the noisiest share last.
    """
    seeds = range(n_seeds)
    noisiest = shares[-1]
    found: list[Setup] = [Setup(noise, n, head="none") for noise in NOISES for n in shares]
    for noise, n, seed in itertools.product(NOISES, shares[::-1], seeds):
        found += both(Setup(noise, n, seed=seed))
    for noise, seed in itertools.product(NOISES, seeds):
        found += grid(noise, noisiest, seed)
    for settings, noise, n, seed in itertools.product(BY_SHARE, NOISES, shares, seeds):
        found.append(with_settings(Setup(noise, n, seed=seed), settings))
    for noise, seed in itertools.product(NOISES, seeds):
        remedied = fineco(Setup(noise, noisiest, seed=seed))
        found += [replace(remedied, warmup=0.5), *(replace(remedied, average=decay) for decay in DECAYS)]
    for noise, seed in itertools.product(NOISES, seeds):
        found += both(Setup(noise, noisiest, seed=seed, long=True))
    for noise, n, seed in itertools.product(NOISES, (noisiest, shares[0]), seeds):
        found += both(Setup(noise, n, "residual", seed=seed))
    for n, noise in itertools.product(shares[-3::-2], NOISES):
        found += grid(noise, n, 0)
    return list(dict.fromkeys(map(only_once, found)))


def with_settings(setup: Setup, settings: tuple[Form, float, float]) -> Setup:
    """The same with FineCo's loss of this form, ratio and weight."""
    form, ratio, weight = settings
    return replace(setup, form=form, ratio=ratio, weight=weight)


def only_once(setup: Setup) -> Setup:
    """The same videos under one name: without noise, its kind decides nothing."""
    return replace(setup, noise="alike") if setup.n_relevant == N_FRAMES else setup


def both(setup: Setup) -> list[Setup]:
    """VideoCLIP's loss alone, and with FineCo's."""
    return [setup, fineco(setup)]


def grid(noise: Noise, n_relevant: int, seed: int) -> list[Setup]:
    """Ratio x form x weight (docs/METHOD.md section 1)."""
    return [
        Setup(noise, n_relevant, weight=weight, ratio=ratio, form=form, seed=seed)
        for ratio, form, weight in itertools.product(RATIOS, FORMS, WEIGHTS)
    ]


def with_scorer(setup: Setup) -> bool:
    """Whether a scorer is distilled too, which takes as long as the training: for the lines at the noisiest share."""
    return setup in both(Setup(setup.noise, NOISIEST, seed=setup.seed))


def make_runs(
    todo: list[Setup], work: Path, sizes: Sizes, budget: Budget, workers: int, done: Callable[[str], None]
) -> None:
    """Makes the runs in `workers` processes; `done` is given each one's line as it ends."""
    started = time.monotonic()
    # spawned, not forked: torch does not survive a fork
    with multiprocessing.get_context("spawn").Pool(workers, _start, (work, sizes, budget)) as pool:
        for number, (line, seconds) in enumerate(pool.imap_unordered(_make_run, todo), 1):
            done(line)
            passed = time.monotonic() - started
            left = passed / number * (len(todo) - number)
            print(f"{number}/{len(todo)}  {seconds:.0f} s  {left / 60:.0f} min left", flush=True)


def _start(work: Path, sizes: Sizes, budget: Budget) -> None:
    import torch

    global _material, _budget
    torch.set_num_threads(1)
    encoder = load_encoder("builtin", "cpu", "fp32")
    _material, _budget = Material.of(*load_bank(work, encoder, sizes, 1), encoder), budget


def _make_run(setup: Setup) -> tuple[str, float]:
    if _material is None:
        raise RuntimeError("a process without material")
    started = time.monotonic()
    outcome = measure(fit(setup, _budget, _material), setup, _material, scorer=with_scorer(setup))
    return line_of(setup, outcome), time.monotonic() - started
