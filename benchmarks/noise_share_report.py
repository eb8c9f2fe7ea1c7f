"""Intervals, tables and the plot of the study, from its finished runs."""

from __future__ import annotations

import functools
import json
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.noise_share_grid import (
    BY_SHARE,
    DECAYS,
    FORMS,
    NOISES,
    NOISIEST,
    RATIOS,
    SHARES,
    WEIGHTS,
    fineco,
    only_once,
    with_settings,
)
from benchmarks.noise_share_runs import Budget, Hits, Setup
from benchmarks.noise_share_videos import N_FRAMES, Noise, Sizes
from pipeline.files import write_bytes

DRAWS = 2000
SELECTORS = ("all", "uniform", "topics", "scorer", "caption")
WAYS = {  # of the lines in the plot
    "all": "mean pooling",
    "all, re-scored": "all 32 frames, re-scored",
    "caption, re-scored": "4 frames by caption, re-scored",
}
Runs = Sequence[tuple[Setup, dict[str, Hits], float]]


@dataclass(frozen=True, slots=True)
class Figure:
    """A share of queries with its 95 % interval, in per cent."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1f} [{self.low:.1f}, {self.high:.1f}]"


class Results:
    """The runs, several seeds of one setup together."""

    def __init__(self, runs: Runs) -> None:
        self._hits: dict[Setup, dict[int, dict[str, Hits]]] = {}
        self._found: dict[Setup, dict[int, float]] = {}
        for setup, hits, found in runs:
            of = replace(setup, seed=0)
            self._hits.setdefault(of, {})[setup.seed] = hits
            self._found.setdefault(of, {})[setup.seed] = found

    def setups(self) -> list[Setup]:
        """Every setup, as seed 0."""
        return list(self._hits)

    def seeds(self, setup: Setup) -> list[int]:
        """Which seeds there are."""
        return sorted(self._hits.get(only_once(setup), {}))

    def ways(self, setup: Setup) -> list[str]:
        """The names of the ways that every seed was searched."""
        return list(next(iter(self._hits[setup].values())))

    def hits(self, setup: Setup, way: str, seeds: Sequence[int] | None = None) -> NDArray[np.float64] | None:
        """(seeds, queries) of these seeds, or of all that there are; None where one was not searched this way."""
        of = self._hits.get(only_once(setup), {})
        seeds = self.seeds(setup) if seeds is None else seeds
        if not seeds or any(way not in of[seed] for seed in seeds):
            return None
        return np.stack([of[seed][way] for seed in seeds]).astype(np.float64)

    def recall(self, setup: Setup, way: str) -> Figure | None:
        """R@1."""
        hits = self.hits(setup, way)
        return None if hits is None else interval(hits)

    def gain(self, setup: Setup, way: str, over: Setup, over_way: str | None = None) -> Figure | None:
        """Difference of two R@1, query by query and seed by seed."""
        both = sorted({*self.seeds(setup)} & {*self.seeds(over)})
        a, b = self.hits(setup, way, both), self.hits(over, over_way or way, both)
        return None if a is None or b is None else interval(a - b)

    def frames_found(self, setup: Setup) -> float | None:
        """Mean over seeds, in per cent."""
        of = self._found.get(only_once(setup))
        return 100 * float(np.mean(list(of.values()))) if of else None


def interval(values: NDArray[np.float64]) -> Figure:
    """The mean of (seeds, queries) with a percentile bootstrap in which both queries and seeds are drawn anew."""
    n_seeds, n_queries = values.shape
    by_seed = resamples(n_queries) @ values.T / n_queries
    means = np.take_along_axis(by_seed, np.random.default_rng(1).integers(n_seeds, size=by_seed.shape), axis=1).mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Figure(100 * float(values.mean()), 100 * float(low), 100 * float(high))


@functools.cache
def resamples(n: int) -> NDArray[np.float64]:
    """(DRAWS, n): how often each of n queries is drawn."""
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=DRAWS).astype(np.float64)


# ---------------------------------------------------------------------------------------------------------- tables


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown; what is missing is a dash."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join("–" if cell is None else str(cell) for cell in row) + " |" for row in lines)


def share_name(n_relevant: int) -> str:
    """1/16 for 2 frames of 32."""
    return "1" if n_relevant == N_FRAMES else f"1/{N_FRAMES // n_relevant}"


def signed(gain: Figure) -> str:
    """With its sign."""
    return f"{gain.value:+.1f} [{gain.low:+.1f}, {gain.high:+.1f}]"


def by_share(results: Results, noise: Noise) -> str:
    """R@1 of both losses in the three ways, and what the frame loss adds."""
    rows: list[list[object]] = []
    for way, name in WAYS.items():
        rows.append([f"VideoCLIP's loss, {name}", *(results.recall(Setup(noise, n), way) for n in SHARES)])
        rows.append([f"+ FineCo's loss, {name}", *(results.recall(fineco(Setup(noise, n)), way) for n in SHARES)])
        gains = [results.gain(fineco(Setup(noise, n)), way, Setup(noise, n)) for n in SHARES]
        rows.append(["*difference*", *(g and f"*{signed(g)}*" for g in gains)])
    found = [(results.frames_found(Setup(noise, n)), results.frames_found(fineco(Setup(noise, n)))) for n in SHARES]
    cells = [f"{a:.0f} / {b:.0f}" if a is not None and b is not None else None for a, b in found]
    rows.append(["relevant frames found by the caption, without / with", *cells])
    return table(["share of relevant frames", *map(share_name, SHARES)], rows)


def by_selector(results: Results) -> str:
    """Every selector at the noisiest share: pooled vector alone, and re-scored, for both losses."""
    rows: list[list[object]] = []
    for noise in NOISES:
        for selector in SELECTORS:
            cells = [
                results.recall(setup, way)
                for setup in (Setup(noise, NOISIEST), fineco(Setup(noise, NOISIEST)))
                for way in (selector, f"{selector}, re-scored")
            ]
            rows.append([noise, f"`{selector}`", 32 if selector == "all" else 4, *cells])
        texts = [results.recall(setup, "text") for setup in (Setup(noise, NOISIEST), fineco(Setup(noise, NOISIEST)))]
        rows.append([noise, "no frame: query against caption", 0, texts[0], None, texts[1], None])
    header = ["other scenes", "selector", "frames", "VideoCLIP's loss", "re-scored", "+ FineCo's loss", "re-scored"]
    return table(header, rows)


def by_setting(results: Results, noise: Noise, n_relevant: int) -> str:
    """The grid: what each ratio, form and weight adds to VideoCLIP's loss alone."""
    base = Setup(noise, n_relevant)
    rows: list[list[object]] = [["VideoCLIP's loss alone", "", "", len(results.seeds(base)), *_figures(results, base)]]
    for form in FORMS:
        for ratio in RATIOS:
            for weight in WEIGHTS:
                setup = Setup(noise, n_relevant, weight=weight, ratio=ratio, form=form)
                if results.seeds(setup):
                    cells = _figures_and_gains(results, setup, base)
                    rows.append([form, ratio, weight, len(results.seeds(setup)), *cells])
    return table(["form", "ratio", "weight", "seeds", *WAYS.values(), "relevant frames found"], rows)


def by_settings(results: Results, way: str) -> str:
    """What some settings of the frame loss add to VideoCLIP's loss at each share."""
    rows: list[list[object]] = []
    for noise in NOISES:
        for settings in BY_SHARE:
            bases = [Setup(noise, n) for n in SHARES]
            gains = [results.gain(with_settings(base, settings), way, base) for base in bases]
            rows.append([noise, *settings, *(g and signed(g) for g in gains)])
    return table(["other scenes", "form", "ratio", "weight", *map(share_name, SHARES)], rows)


def _figures(results: Results, setup: Setup) -> list[object]:
    found = results.frames_found(setup)
    return [*(results.recall(setup, way) for way in WAYS), None if found is None else f"{found:.0f}"]


def _figures_and_gains(results: Results, setup: Setup, base: Setup) -> list[object]:
    cells: list[object] = []
    for way in WAYS:
        recall, gain = results.recall(setup, way), results.gain(setup, way, base)
        cells.append(None if recall is None or gain is None else f"{recall.value:.1f}, {signed(gain)}")
    found = results.frames_found(setup)
    return [*cells, None if found is None else f"{found:.0f}"]


def remedies(results: Results) -> str:
    """Warm-up of the weight and the moving-average copy, at the noisiest share, and what each adds to neither."""
    rows: list[list[object]] = []
    for noise in NOISES:
        base = fineco(Setup(noise, NOISIEST))
        rows.append([noise, "+ FineCo's loss", *_figures(results, base)])
        remedied = {"weight grows over the first half": replace(base, warmup=0.5)}
        remedied |= {f"moving average ({decay}) chooses": replace(base, average=decay) for decay in DECAYS}
        rows += [[noise, name, *_figures_and_gains(results, setup, base)] for name, setup in remedied.items()]
    return table(["other scenes", "", *WAYS.values(), "relevant frames found"], rows)


def longer(results: Results) -> str:
    """Both losses at the noisiest share when trained longer and faster."""
    rows: list[list[object]] = []
    for noise in NOISES:
        base = Setup(noise, NOISIEST, long=True)
        rows.append([noise, "VideoCLIP's loss", *_figures(results, base)])
        rows.append([noise, "+ FineCo's loss", *_figures_and_gains(results, fineco(base), base)])
    return table(["other scenes", "", *WAYS.values(), "relevant frames found"], rows)


def aligned(results: Results) -> str:
    """The encoder as it is, and residual heads on top of it, with what FineCo's loss adds to the other."""
    rows: list[list[object]] = []
    for noise in NOISES:
        for n in SHARES:
            if n == N_FRAMES and noise != NOISES[0]:
                continue
            base = Setup(noise, n, "residual")
            where = ["none" if n == N_FRAMES else noise, share_name(n)]
            rows.append([*where, "encoder alone", *_figures(results, Setup(noise, n, "none"))])
            if results.seeds(base):
                rows.append([*where, "residual head, VideoCLIP's loss", *_figures(results, base)])
                adds = _figures_and_gains(results, fineco(base), base)
                rows.append([*where, "residual head, + FineCo's loss", *adds])
    return table(["other scenes", "share", "", *WAYS.values(), "relevant frames found"], rows)


def bar(results: Results) -> str:
    """The claim under test, at the noisiest share, with the same selection without FineCo's loss beside it."""
    rows: list[list[object]] = []
    for noise in NOISES:
        plain, ours = Setup(noise, NOISIEST), fineco(Setup(noise, NOISIEST))
        pooled, selected = results.recall(plain, "all"), results.recall(ours, "caption, re-scored")
        if pooled is None or selected is None:
            continue
        met = selected.value - pooled.value >= 10 and selected.low > pooled.high
        loss, way = (
            results.gain(ours, "caption, re-scored", plain),
            results.gain(plain, "caption, re-scored", plain, "all"),
        )
        rows.append([noise, pooled, selected, "met" if met else "not met", way and signed(way), loss and signed(loss)])
    header = [
        "other scenes",
        "VideoCLIP's loss, mean pooling",
        "+ FineCo's loss, 4 frames by caption, re-scored",
        "bar",
    ]
    return table([*header, "of which selection and re-scoring", "of which the loss"], rows)


# ------------------------------------------------------------------------------------------------------------ plot


def plot(results: Results, file: Path) -> None:
    """R@1 against the share of relevant frames, a panel for each kind of noise; the same runs give the same bytes."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "fineco", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    colours = {"all": "#777777", "all, re-scored": "#1f77b4", "caption, re-scored": "#d62728"}
    figure, panels = pyplot.subplots(1, len(NOISES), figsize=(9.5, 4.4), sharey=True, layout="constrained")
    places = range(len(SHARES))
    for panel, noise in zip(panels, NOISES, strict=True):
        for way, name in WAYS.items():
            for loss, style, adds in (("VideoCLIP's loss", "--", False), ("+ FineCo's loss", "-", True)):
                setups = [Setup(noise, n) for n in SHARES]
                figures = [results.recall(fineco(setup) if adds else setup, way) for setup in setups]
                points = [(x, f) for x, f in zip(places, figures, strict=True) if f is not None]
                if not points:
                    continue
                x = [place for place, _ in points]
                label = f"{loss}, {name}"
                panel.plot(x, [f.value for _, f in points], style, marker="o", ms=3, color=colours[way], label=label)
                low, high = [f.low for _, f in points], [f.high for _, f in points]
                panel.fill_between(x, low, high, color=colours[way], alpha=0.13, linewidth=0)
        panel.set_title({"alike": "other scenes are like the subject", "any": "other scenes are any"}[noise])
        panel.set_xticks(list(places), [share_name(n) for n in SHARES])
        panel.set_xlabel("share of a video's frames that show its subject")
        panel.set_ylim(0, 102)
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("R@1 in %, 95 % intervals")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None, dpi=110)
    pyplot.close(figure)


# ---------------------------------------------------------------------------------------------------------- report


def report(runs: Runs, docs: Path, sizes: Sizes, budget: Budget, weights_sha256: str) -> None:
    """Writes docs/study/results.json and plot.svg, and the tables of docs/STUDY.md between their marks."""
    results = Results(runs)
    folder = docs / "study"
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "command": "python benchmarks/noise_share.py",
        "machine": f"{platform.machine()}, {os.cpu_count()} processors, no GPU",
        "encoder weights": weights_sha256,
        "videos": asdict(sizes),
        "budget": asdict(budget),
        "interval": f"95 %, percentile bootstrap over queries and seeds, {DRAWS} draws",
        "runs": [_entry(results, setup) for setup in results.setups()],
    }
    text = json.dumps(content, indent=1)
    write_bytes(folder / "results.json", re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", _one_line, text).encode() + b"\n")
    plot(results, folder / "plot.svg")
    tables = {
        "bar": bar(results),
        "shares alike": by_share(results, "alike"),
        "shares any": by_share(results, "any"),
        "selectors": by_selector(results),
        "settings all": by_settings(results, "all, re-scored"),
        "settings caption": by_settings(results, "caption, re-scored"),
        "settings mean": by_settings(results, "all"),
        "grid alike": by_setting(results, "alike", NOISIEST),
        "grid any": by_setting(results, "any", NOISIEST),
        **{f"grid {noise} {n}": by_setting(results, noise, n) for noise in NOISES for n in SHARES[:-1:2]},
        "remedies": remedies(results),
        "longer": longer(results),
        "aligned": aligned(results),
    }
    page = docs / "STUDY.md"
    if page.exists():
        write_bytes(page, with_tables(page.read_text("utf-8"), tables).encode())


def with_tables(page: str, tables: dict[str, str]) -> str:
    """The page with every part between `<!-- table NAME -->` and `<!-- end -->` made anew."""

    def made(match: re.Match[str]) -> str:
        return f"{match[1]}\n{tables[match[2]]}\n<!-- end -->"

    return re.sub(r"(<!-- table ([a-z0-9 ]+) -->)\n.*?<!-- end -->", made, page, flags=re.DOTALL)


def _entry(results: Results, setup: Setup) -> dict[str, object]:
    facts = {name: value for name, value in asdict(setup).items() if name != "seed"}
    figures: dict[str, object] = {}
    for way in results.ways(setup):
        hits, recall = results.hits(setup, way), results.recall(setup, way)
        if hits is not None and recall is not None:
            by_seed = [round(100 * float(value), 2) for value in hits.mean(axis=1)]
            figures[way] = [round(recall.value, 2), round(recall.low, 2), round(recall.high, 2), *by_seed]
    found = results.frames_found(setup)
    seeds = results.seeds(setup)
    return {**facts, "seeds": seeds, "R@1: mean, low, high, by seed": figures, "frames found": round(found or 0, 2)}


def _one_line(match: re.Match[str]) -> str:
    return f"[{' '.join(match[1].split())}]"
