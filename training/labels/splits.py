"""Which cells train a head, which choose its best epoch, and which measure it.

Axis suffixes: `n` cells, `g` groups (donors), `c` classes, `p` parts (train, validation, test).

Cells of one donor resemble each other more than cells of two donors, so a score on cells whose donor was seen in
training says little about the next donor. `grouped_split` keeps each group in one part; `random_split` is there for
data without groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from genescale.platform.errors import InputError, SettingsError
from genescale.training.labels.assignment import nearest_assignment, whole_numbers

PARTS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class Split:
    """Positions of cells or genes (int64, rising) of the three parts: each once, and only id lists leave some out."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray

    def parts(self) -> dict[str, np.ndarray]:
        """The parts by name, in the order train, validation, test."""
        return {"train": self.train, "validation": self.validation, "test": self.test}


def at_most(units: np.ndarray, limit: int, seed: int, *, classes_of: np.ndarray | None = None) -> np.ndarray:
    """At most about `limit` of the units, drawn at random, in rising order; all of them when there are no more.

    classes_of: the class of every unit (by its number); of each class its share is drawn, and at least one unit.
    """
    if len(units) <= limit:
        return units
    shuffled = np.random.default_rng(seed).permutation(units)
    if classes_of is None:
        return np.sort(shuffled[:limit])
    share, kept = limit / len(units), []
    for code in np.unique(classes_of[units]):
        members = shuffled[classes_of[shuffled] == code]
        kept.append(members[: max(1, int(share * len(members)))])
    return np.sort(np.concatenate(kept))


def check_fractions(fractions: Sequence[float]) -> np.ndarray:
    """The three fractions as float64; SettingsError unless all are positive and sum to one."""
    fractions_p = np.asarray(fractions, dtype=np.float64)
    if fractions_p.shape != (3,) or (fractions_p <= 0).any() or abs(fractions_p.sum() - 1) > 1e-6:
        raise SettingsError(
            f"fractions {list(fractions)} are not three positive numbers with sum 1.",
            where="fractions",
            fix="Give train, validation and test, for example 0.8, 0.1, 0.1.",
        )
    return fractions_p


def grouped_split(
    groups: Sequence[str],
    fractions: Sequence[float] = (0.8, 0.1, 0.1),
    seed: int = 0,
    *,
    labels: Sequence[str] | None = None,
) -> Split:
    """Split cells so that no group stands in two parts, with part sizes as near to `fractions` as the groups allow.

    With `labels`, the cells of every class are spread as near to `fractions` as possible, not only their total.
    The same input gives the same split; `seed` decides among equally good ones. Raises InputError when there are
    fewer groups than parts. Method: greedy assignment, largest group first and then in several seeded orders, each
    improved by moving and exchanging single groups until nothing gets nearer; the nearest is taken.
    """
    fractions_p = check_fractions(fractions)
    names_g, group_n = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    if len(names_g) < len(PARTS):
        raise InputError(
            f"{len(names_g)} group(s) ({', '.join(names_g[:3])}) cannot fill train, validation and test.",
            where="grouped split",
            fix="Group by a column with at least three values, or split at random (a weaker test).",
        )
    class_n = np.zeros(len(group_n), dtype=np.int64) if labels is None else np.unique(labels, return_inverse=True)[1]
    counts_gc = np.zeros((len(names_g), int(class_n.max()) + 1))
    np.add.at(counts_gc, (group_n, class_n), 1)
    part_g = nearest_assignment(counts_gc, fractions_p, np.random.default_rng(seed))
    return split_of(part_g[group_n])


def random_split(labels: Sequence[str], fractions: Sequence[float] = (0.8, 0.1, 0.1), seed: int = 0) -> Split:
    """Split cells at random within each class; a class of at least three cells stands in every part.

    Raises InputError when no part arrangement is possible because there are fewer than three cells.
    """
    fractions_p = check_fractions(fractions)
    class_n = np.unique(np.asarray(labels, dtype=str), return_inverse=True)[1]
    if len(class_n) < len(PARTS):
        raise InputError(f"{len(class_n)} cell(s) cannot fill train, validation and test.", where="random split")
    generator = np.random.default_rng(seed)
    part_n = np.zeros(len(class_n), dtype=np.int64)
    # Rounding errors are carried from class to class, so that many small classes do not all round toward train.
    owed_p = np.zeros(len(PARTS))
    for code in range(int(class_n.max()) + 1):
        members = generator.permutation(np.flatnonzero(class_n == code))
        wished_p = fractions_p * len(members) + owed_p
        given_p = whole_numbers(wished_p, len(members))
        owed_p = wished_p - given_p
        part_n[members] = np.repeat(np.arange(len(PARTS)), given_p)
    split = split_of(part_n)
    empty = [name for name, cells in split.parts().items() if not len(cells)]
    if empty:
        raise InputError(
            f"no class has enough cells for a {' and a '.join(empty)} part.",
            where="random split",
            fix="Use more cells.",
        )
    return split


def split_of(part_n: np.ndarray) -> Split:
    """The split in which cell `n` stands in the part with number `part_n[n]`; in none where that is -1."""
    return Split(**{name: np.flatnonzero(part_n == part).astype(np.int64) for part, name in enumerate(PARTS)})
