"""The study's own parts (benchmarks/noise_share*.py): its videos, its measures, its intervals, its page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import noise_share_videos as videos
from benchmarks.noise_share_grid import FORMS, NOISES, NOISIEST, RATIOS, SHARES, WEIGHTS, fineco, runs
from benchmarks.noise_share_report import Results, interval, report, with_tables
from benchmarks.noise_share_runs import (
    Budget,
    Hits,
    Material,
    Outcome,
    Setup,
    Texts,
    Tower,
    first_hits,
    fit,
    frames_found,
    line_of,
    measure,
    read_lines,
)
from benchmarks.noise_share_videos import N_FRAMES, Noise, Sizes, Split, compose, paint, plan
from models.builtin.world import ATTRIBUTES, Scene

SIZES = Sizes(train=12, validation=4, test=8, empty=5)


@pytest.fixture(scope="module")
def splits() -> dict[str, Split]:
    return plan(SIZES)[0]


@pytest.fixture(scope="module")
def shots() -> list[videos.Shot]:
    return plan(SIZES)[1]


@pytest.fixture(scope="module")
def material(splits: dict[str, Split], shots: list[videos.Shot]) -> Material:
    """A perfect encoder's: a frame's vector is its scene's, a text's is that of the scene it speaks of."""
    rng = np.random.default_rng(0)
    of_scene: dict[Scene | None, np.ndarray] = {}
    for shot in shots:
        of_scene.setdefault(shot.scene, rng.standard_normal(16))
    bank = np.stack([of_scene[shot.scene] for shot in shots for _ in range(videos.SHOT_FRAMES)])
    bank = (bank / np.linalg.norm(bank, axis=1, keepdims=True)).astype(np.float32)
    texts = {name: Texts(*[bank[split.subject_rows[:, 0, 0]]] * 2) for name, split in splits.items()}
    return Material(splits, bank, texts, bank[:64], 0.04)


def shared(a: Scene, b: Scene) -> int:
    return sum(getattr(a, attribute) == getattr(b, attribute) for attribute in ATTRIBUTES)


def test_every_query_has_one_right_answer(splits: dict[str, Split], shots: list[videos.Shot]) -> None:
    asked = [*splits["test"].subjects, *splits["validation"].subjects]
    assert len(set(asked)) == len(asked) and all(scene.held_out for scene in asked)
    assert not any(scene.held_out for scene in splits["train"].subjects)
    for split in splits.values():
        shown = [shots[first // videos.SHOT_FRAMES].scene for first in split.distractor_rows[..., 0].ravel()]
        assert not set(shown) & set(asked)


def test_rows_are_those_of_the_shots(splits: dict[str, Split], shots: list[videos.Shot]) -> None:
    rows = [r for s in splits.values() for r in (s.subject_rows, s.distractor_rows, s.empty_rows)]
    assert sorted(np.concatenate([r.ravel() for r in rows])) == list(range(len(shots) * videos.SHOT_FRAMES))
    test = splits["test"]
    for number, subject in enumerate(test.subjects):
        assert {shots[row // videos.SHOT_FRAMES].scene for row in test.subject_rows[number].ravel()} == {subject}
        noise = [shots[row // videos.SHOT_FRAMES].scene for row in test.distractor_rows[number, :, 0]]
        assert all(scene is not None and 2 <= shared(scene, subject) <= 4 for scene in noise)
    assert all(shots[row // videos.SHOT_FRAMES].scene is None for row in test.empty_rows.ravel())


def test_query_and_caption_are_worded_differently(splits: dict[str, Split]) -> None:
    for split in splits.values():
        assert all(a != b for a, b in zip(split.captions, split.queries, strict=True))


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("n_relevant", SHARES)
def test_a_video_shows_its_subject_as_often_as_asked(splits: dict[str, Split], noise: Noise, n_relevant: int) -> None:
    test = splits["test"]
    rows, relevant = compose(test, noise, n_relevant, 3)
    assert rows.shape == relevant.shape == (SIZES.test, N_FRAMES)
    for number in range(SIZES.test):
        own = test.subject_rows[number].ravel()
        assert np.array_equal(rows[number][relevant[number]], own[:n_relevant])
        assert not np.isin(rows[number][~relevant[number]], own).any()
        if noise == "alike":
            possible = [*test.distractor_rows[number].ravel(), *test.empty_rows.ravel()]
            assert np.isin(rows[number][~relevant[number]], possible).all()


def test_a_smaller_share_only_adds_noise(splits: dict[str, Split]) -> None:
    few, many = (compose(splits["test"], "any", n, 3) for n in (2, 16))
    for number in range(SIZES.test):
        noise_of_many = many[0][number][~many[1][number]]
        assert np.array_equal(few[0][number][~few[1][number]][: len(noise_of_many)], noise_of_many)
    assert not np.array_equal(few[0], compose(splits["test"], "any", 2, 4)[0])


def test_paint_gives_the_frames_of_a_shot(shots: list[videos.Shot]) -> None:
    frames = paint(shots[0])
    assert frames.shape == (videos.SHOT_FRAMES, 112, 112, 3) and frames.dtype == np.uint8
    assert np.array_equal(frames, paint(shots[0])) and not np.array_equal(frames, paint(shots[1]))


def test_a_perfect_encoder_finds_by_caption_what_the_mean_drowns(material: Material) -> None:
    setup = Setup("any", 2, head="none")
    outcome = measure(fit(setup, Budget(), material), setup, material)
    assert outcome.hits["text"].all() and outcome.hits["caption"].all() and outcome.hits["caption, re-scored"].all()
    assert outcome.hits["all"].mean() < 1
    assert np.all(outcome.frames_found == 1)


def test_a_scorer_is_measured_when_asked_for(material: Material) -> None:
    setup = Setup("any", 4, head="none")
    outcome = measure(Tower(None, 0.04), setup, material, scorer=True)
    assert outcome.hits.keys() >= {"scorer", "scorer, re-scored"}


def test_the_frame_loss_changes_the_head_and_the_seed_decides_it(material: Material) -> None:
    setup, budget = Setup("any", 2), Budget(epochs=1, batch_size=8, width=16, intermediate=16)
    x = material.bank[compose(material.splits["test"], "any", 2, 0)[0]]
    plain, again, other = (fit(s, budget, material).tokens(x) for s in (setup, setup, fineco(setup)))
    assert np.array_equal(plain, again)
    assert not np.allclose(plain, other, atol=1e-5)


def test_a_tie_is_no_hit() -> None:
    assert first_hits(np.array([[0.5, 0.5, 0.1], [0.1, 0.9, 0.2], [0.3, 0.2, 0.25]])).tolist() == [False, True, False]


def test_frames_found_is_the_share_of_relevant_frames_among_as_many_best() -> None:
    scores = np.array([[0.9, 0.1, 0.8, 0.2], [0.1, 0.2, 0.3, 0.4]], np.float32)
    relevant = np.array([[True, True, False, False], [False, False, True, True]])
    assert frames_found(scores, relevant).tolist() == [0.5, 1.0]


def test_an_interval_draws_queries_and_seeds() -> None:
    rng = np.random.default_rng(1)
    hits = (rng.random((1, 400)) < 0.5).astype(float)
    one = interval(hits)
    error = 100 * float(hits.std() / np.sqrt(400))
    assert one.value == pytest.approx(100 * hits.mean())
    assert one.high - one.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    seeds_differ = np.stack([np.zeros(400), np.ones(400)])  # the same for every query: no query tells it
    assert (interval(seeds_differ).low, interval(seeds_differ).high) == (0, 100)
    assert interval(np.ones((3, 50))).low == 100


def test_runs_are_read_back_and_a_broken_line_is_none() -> None:
    setup = replace(fineco(Setup("any", 4)), seed=2)
    bits: Hits = np.arange(11) % 3 == 0
    line = line_of(setup, Outcome({"all": bits}, np.full(11, 0.25)))
    found = read_lines(["", line[:40], line])
    assert list(found) == [setup.key]
    assert found[setup.key][0] == setup and found[setup.key][2] == 0.25
    assert np.array_equal(found[setup.key][1]["all"], bits)


def test_a_gain_is_paired() -> None:
    hits = np.random.default_rng(0).random(200) < 0.5
    better = hits.copy()
    better[np.flatnonzero(~hits)[:10]] = True
    plain, ours = Setup("any", 2), fineco(Setup("any", 2))
    gain = Results([(plain, {"all": hits}, 0.0), (ours, {"all": better}, 0.0)]).gain(ours, "all", plain)
    assert gain is not None and gain.value == pytest.approx(5) and gain.low > 1
    more = replace(ours, seed=1)  # a seed of one side alone has nothing to be compared with
    results = Results([(plain, {"all": hits}, 0.0), (ours, {"all": better}, 0.0), (more, {"all": hits}, 0.0)])
    assert results.gain(ours, "all", plain) == gain
    assert results.recall(ours, "all") != Results([(ours, {"all": better}, 0.0)]).recall(ours, "all")


def test_without_noise_its_kind_makes_no_other_run() -> None:
    test = plan(SIZES)[0]["test"]
    assert np.array_equal(compose(test, "alike", N_FRAMES, 1)[0], compose(test, "any", N_FRAMES, 1)[0])
    assert not [setup for setup in runs(1) if setup.noise == "any" and setup.n_relevant == N_FRAMES]
    results = Results([(Setup("alike", N_FRAMES), {"all": np.ones(3, np.bool_)}, 1.0)])
    assert results.recall(Setup("any", N_FRAMES), "all") == results.recall(Setup("alike", N_FRAMES), "all")


def test_the_grid_is_whole_at_the_noisiest_share() -> None:
    planned = runs(3)
    assert len(planned) == len(set(planned))
    for noise in NOISES:
        here = {s for s in planned if s.noise == noise and s.n_relevant == NOISIEST and s.head == "new"}
        for seed in range(3):
            assert Setup(noise, NOISIEST, seed=seed) in here
            for form in FORMS:
                for ratio in RATIOS:
                    for weight in WEIGHTS:
                        assert Setup(noise, NOISIEST, weight=weight, ratio=ratio, form=form, seed=seed) in here


def test_only_the_tables_of_a_page_are_made_anew() -> None:
    page = "before\n<!-- table bar -->\nold\n<!-- end -->\nbetween\n<!-- table shares any -->\n<!-- end -->\nafter\n"
    made = with_tables(page, {"bar": "| 1 |", "shares any": "| 2 |"})
    assert made == (
        "before\n<!-- table bar -->\n| 1 |\n<!-- end -->\n"
        "between\n<!-- table shares any -->\n| 2 |\n<!-- end -->\nafter\n"
    )
    assert with_tables(made, {"bar": "| 1 |", "shares any": "| 2 |"}) == made


def test_a_report_of_part_of_the_runs_is_the_same_twice(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rng = np.random.default_rng(0)
    some = [
        (setup, {way: rng.random(20) < 0.5 for way in ("all", "all, re-scored", "caption, re-scored")}, 0.5)
        for setup in (Setup("any", 2), fineco(Setup("any", 2)), Setup("any", 8, seed=1))
    ]
    made = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        report(some, folder, SIZES, Budget(), "0" * 64)
        made.append([(folder / "study" / name).read_bytes() for name in ("results.json", "plot.svg")])
    assert made[0] == made[1]
