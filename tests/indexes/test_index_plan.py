"""Which index for how many vectors and how much memory."""

from __future__ import annotations

from dataclasses import replace

import pytest

from indexes import plan
from indexes.plan import plan_index
from pipeline.errors import UsageError

GB = 10**9


@pytest.mark.parametrize(
    ("n_moments", "memory_bytes", "factory"),
    [
        (1, 8 * GB, "Flat"),
        (100, 8 * GB, "Flat"),
        (100_000, 8 * GB, "Flat"),
        (100_000, GB // 10, "IVF1024,SQ8"),
        (100_001, 8 * GB, "IVF1024,Flat"),
        (1_000_000, 8 * GB, "IVF2048,Flat"),
        (1_000_000, 1 * GB, "IVF2048,SQ8"),
        (1_000_000, GB // 10, "IVF2048,RaBitQ"),
        (10_000_000, 24 * GB, "IVF8192,Flat"),
        (10_000_000, 8 * GB, "IVF8192,SQ8"),
        (10_000_000, 1 * GB, "IVF8192,RaBitQ"),
    ],
)
def test_the_most_exact_index_that_fits_is_chosen(n_moments: int, memory_bytes: int, factory: str) -> None:
    n_videos = -(-n_moments // 10)
    chosen = plan_index(n_videos, n_moments, 512, memory_bytes)
    assert chosen.factory == factory
    assert chosen.n_bytes <= memory_bytes
    assert (chosen.n_videos, chosen.n_vectors, chosen.dim) == (n_videos, n_moments, 512)
    assert chosen.n_train <= n_moments and chosen.n_train >= 39 * chosen.nlist  # else FAISS warns
    assert chosen.nprobe <= chosen.nlist
    counts = "1 moment of 1 video," if n_moments == 1 else f"{n_moments} moments of {n_videos} videos,"
    assert factory in chosen.describe() and counts in chosen.describe()


@pytest.mark.parametrize("memory_bytes", [8 * GB, GB, GB // 10])
def test_how_many_videos_the_moments_are_of_changes_no_choice(memory_bytes: int) -> None:
    """Every moment is a vector, whosever it is."""
    for n_moments in (100, 50_000, 100_001, 1_000_000):
        one, many = (plan_index(n, n_moments, 512, memory_bytes) for n in (1, n_moments))
        assert replace(one, n_videos=n_moments) == many


def test_no_memory_is_enough_for_the_smallest_and_the_plan_says_so() -> None:
    chosen = plan_index(90_000, 1_000_000, 512, 1)
    assert chosen.factory == "IVF2048,RaBitQ"
    assert "over the memory budget" in chosen.describe()


def test_half_of_the_free_memory_is_the_budget_when_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_available_bytes", lambda: 3 * GB)
    assert plan_index(90_000, 1_000_000, 512).factory == "IVF2048,SQ8"  # 2.06 GB of IVF,Flat are over 1.5
    monkeypatch.setattr(plan, "_available_bytes", lambda: 5 * GB)
    assert plan_index(90_000, 1_000_000, 512).factory == "IVF2048,Flat"


def test_free_memory_is_within_what_the_machine_has() -> None:
    assert 10**7 < plan._available_bytes() < 10**14


def test_a_wish_is_followed() -> None:
    assert plan_index(90_000, 1_000_000, 512, GB, "flat").factory == "Flat"
    assert plan_index(90, 5_000, 512, GB, "ivf").factory == "IVF128,Flat"


def test_too_few_vectors_for_cells_names_the_least_number() -> None:
    with pytest.raises(UsageError, match=f"at least {plan.LEAST_IVF} moments, there are 100"):
        plan_index(10, 100, 512, GB, "ivf")
    plan_index(1, plan.LEAST_IVF, 512, GB, "ivf")


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(UsageError, match="'hnsw'"):
        plan_index(10, 100, 512, GB, "hnsw")
