"""Splits keep groups together, come near the wished sizes, and are the same every time."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from genescale.platform.errors import InputError, SettingsError
from genescale.training.labels.splits import Split, grouped_split, random_split

FRACTIONS = (0.7, 0.15, 0.15)


def donors_of(sizes: list[int]) -> list[str]:
    return [f"donor-{donor}" for donor, size in enumerate(sizes) for _ in range(size)]


def assert_partition(split: Split, n: int) -> None:
    together = np.concatenate(list(split.parts().values()))
    assert sorted(together.tolist()) == list(range(n))
    assert all(len(part) for part in split.parts().values())


def size_error(split: Split, n: int, fractions: tuple[float, ...]) -> float:
    return sum(abs(len(part) - f * n) for part, f in zip(split.parts().values(), fractions, strict=True))


@pytest.mark.parametrize("sizes", [[5, 5, 5], [100, 1, 1], [40, 30, 20, 10, 9, 8, 7, 6], list(range(1, 60))])
def test_no_group_stands_in_two_parts(sizes: list[int]) -> None:
    groups = np.random.default_rng(0).permutation(donors_of(sizes))
    split = grouped_split(groups, FRACTIONS, seed=3)
    assert_partition(split, len(groups))
    held = [set(groups[part]) for part in split.parts().values()]
    assert all(not a & b for a, b in itertools.combinations(held, 2))


@pytest.mark.parametrize("seed", range(5))
def test_sizes_are_the_nearest_that_the_groups_allow(seed: int) -> None:
    """Against every possible assignment of eight groups."""
    sizes = np.random.default_rng(seed).integers(1, 60, size=8)
    groups, total = donors_of(sizes.tolist()), int(sizes.sum())
    wished = np.array(FRACTIONS) * total
    possible = (np.array(parts) for parts in itertools.product(range(3), repeat=8) if len(set(parts)) == 3)
    best = min(np.abs(np.bincount(parts, weights=sizes, minlength=3) - wished).sum() for parts in possible)
    assert size_error(grouped_split(groups, FRACTIONS, seed=seed), total, FRACTIONS) == pytest.approx(best)


def test_many_groups_meet_the_sizes_almost_exactly() -> None:
    groups = np.random.default_rng(1).integers(300, size=20_000).astype(str)
    assert size_error(grouped_split(groups, FRACTIONS), len(groups), FRACTIONS) < 0.001 * len(groups)


def test_labels_are_spread_over_the_parts() -> None:
    """Half of the donors have only 'a' cells, half only 'b': without looking at labels a part may miss a class."""
    groups = donors_of([20] * 20)
    labels = ["a" if int(group.split("-")[1]) % 2 else "b" for group in groups]
    split = grouped_split(groups, (0.6, 0.2, 0.2), seed=0, labels=labels)
    for part in split.parts().values():
        names, counts = np.unique(np.array(labels)[part], return_counts=True)
        assert names.tolist() == ["a", "b"]
        assert counts[0] == counts[1]


def test_the_same_seed_gives_the_same_split_and_another_another() -> None:
    groups = donors_of([10] * 30)
    first, again, other = (grouped_split(groups, FRACTIONS, seed) for seed in (7, 7, 8))
    assert first.test.tolist() == again.test.tolist()
    assert first.test.tolist() != other.test.tolist()


def test_too_few_groups_are_refused_with_the_way_out() -> None:
    with pytest.raises(InputError, match=r"2 group.*random"):
        grouped_split(donors_of([50, 50]), FRACTIONS)


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (0.9, 0.1, 0.1), (1.0, 0.0, 0.0), (1.2, -0.1, -0.1)])
def test_fractions_that_are_no_partition_are_refused(fractions: tuple[float, ...]) -> None:
    with pytest.raises(SettingsError, match="fractions"):
        grouped_split(donors_of([5, 5, 5]), fractions)
    with pytest.raises(SettingsError, match="fractions"):
        random_split(["a"] * 10, fractions)


def test_random_split_is_stratified() -> None:
    labels = np.array(["common"] * 1000 + ["rare"] * 40 + ["tiny"] * 3)
    split = random_split(labels, FRACTIONS, seed=2)
    assert_partition(split, len(labels))
    for part, fraction in zip(split.parts().values(), FRACTIONS, strict=True):
        assert abs((labels[part] == "common").sum() - 1000 * fraction) <= 1
        assert abs((labels[part] == "rare").sum() - 40 * fraction) <= 1.5
        assert (labels[part] == "tiny").sum() == 1


def test_random_split_of_many_small_classes_keeps_the_sizes() -> None:
    """Rounding must not push every class of four cells to the same side."""
    labels = np.repeat(np.arange(100), 8).astype(str)
    split = random_split(labels, (0.5, 0.25, 0.25))
    assert [len(part) for part in split.parts().values()] == [400, 200, 200]


def test_random_split_of_two_cells_is_refused() -> None:
    with pytest.raises(InputError, match="2 cell"):
        random_split(["a", "b"], FRACTIONS)
