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

PARTS = ("train", "validation", "test")
RESTARTS = 64
"""Seeded starting orders that are tried at most; the nearest to the wished sizes is kept."""
GROUPS_TRIED = 1_500
"""Restarts x groups at most: with many groups one order already comes near, and each round of moves costs more."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """Cell positions (int64, rising) of the three parts; together they hold every position once."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray

    def parts(self) -> dict[str, np.ndarray]:
        """The parts by name, in the order train, validation, test."""
        return {"train": self.train, "validation": self.validation, "test": self.test}


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
    part_g = _nearest_assignment(counts_gc, fractions_p, np.random.default_rng(seed))
    return _split_of(part_g[group_n])


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
        given_p = _whole_numbers(wished_p, len(members))
        owed_p = wished_p - given_p
        part_n[members] = np.repeat(np.arange(len(PARTS)), given_p)
    split = _split_of(part_n)
    empty = [name for name, cells in split.parts().items() if not len(cells)]
    if empty:
        raise InputError(
            f"no class has enough cells for a {' and a '.join(empty)} part.",
            where="random split",
            fix="Use more cells.",
        )
    return split


def _split_of(part_n: np.ndarray) -> Split:
    return Split(**{name: np.flatnonzero(part_n == part).astype(np.int64) for part, name in enumerate(PARTS)})


def _whole_numbers(wished_p: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers with sum `total` near `wished_p`, each at least one when `total` allows it."""
    least = 1 if total >= len(wished_p) else 0
    given_p = np.maximum(np.floor(wished_p).astype(np.int64), least)
    while given_p.sum() != total:
        step = 1 if given_p.sum() < total else -1
        # The part that is furthest from its wish in the direction of the step, never below the least.
        room_p = np.where((step > 0) | (given_p > least), step * (wished_p - given_p), -np.inf)
        given_p[int(np.argmax(room_p))] += step
    return given_p


def _nearest_assignment(counts_gc: np.ndarray, fractions_p: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    wished_pc = fractions_p[:, None] * counts_gc.sum(axis=0)[None, :]
    best_g, best_cost = np.zeros(len(counts_gc), dtype=np.int64), np.inf
    for first in [True, *[False] * int(np.clip(GROUPS_TRIED // len(counts_gc), 0, RESTARTS))]:
        order = generator.permutation(len(counts_gc))
        if first:
            order = order[np.argsort(-counts_gc.sum(axis=1)[order], kind="stable")]
        part_g = _fill_empty(_greedy(counts_gc, wished_pc, order), counts_gc)
        part_g, cost = _improve(part_g, counts_gc, wished_pc)
        if cost < best_cost - 1e-9:
            best_g, best_cost = part_g, cost
    return best_g


def _cost(held_pc: np.ndarray, wished_pc: np.ndarray) -> float:
    return float(np.abs(held_pc - wished_pc).sum())


def _held(part_g: np.ndarray, counts_gc: np.ndarray, n_parts: int) -> np.ndarray:
    held_pc = np.zeros((n_parts, counts_gc.shape[1]))
    np.add.at(held_pc, part_g, counts_gc)
    return held_pc


def _greedy(counts_gc: np.ndarray, wished_pc: np.ndarray, order: np.ndarray) -> np.ndarray:
    held_pc = np.zeros_like(wished_pc)
    part_g = np.zeros(len(counts_gc), dtype=np.int64)
    for group in order:
        gain_p = np.abs(held_pc - wished_pc).sum(axis=1) - np.abs(held_pc + counts_gc[group] - wished_pc).sum(axis=1)
        part_g[group] = int(np.argmax(gain_p))
        held_pc[part_g[group]] += counts_gc[group]
    return part_g


def _fill_empty(part_g: np.ndarray, counts_gc: np.ndarray) -> np.ndarray:
    """Give each empty part the smallest group of a part that has more than one."""
    size_g = counts_gc.sum(axis=1)
    for part in range(len(PARTS)):
        if not (part_g == part).any():
            spare = [g for g in np.argsort(size_g, kind="stable") if (part_g == part_g[g]).sum() > 1]
            part_g[spare[0]] = part
    return part_g


def _improve(part_g: np.ndarray, counts_gc: np.ndarray, wished_pc: np.ndarray) -> tuple[np.ndarray, float]:
    held_pc = _held(part_g, counts_gc, len(wished_pc))
    cost = _cost(held_pc, wished_pc)
    # Each round lowers the cost or ends the search; the bound only guards against a corpus of very many tiny groups.
    for _ in range(4 * len(counts_gc)):
        step = _best_step(part_g, counts_gc, held_pc, wished_pc)
        if step is None or step[0] >= cost - 1e-9:
            break
        cost, changes = step
        for group, part in changes:
            held_pc[part_g[group]] -= counts_gc[group]
            held_pc[part] += counts_gc[group]
            part_g[group] = part
    return part_g, cost


def _best_step(
    part_g: np.ndarray, counts_gc: np.ndarray, held_pc: np.ndarray, wished_pc: np.ndarray
) -> tuple[float, list[tuple[int, int]]] | None:
    """The move or exchange of single groups that brings the parts nearest, with the cost after it."""
    error_pc = held_pc - wished_pc
    rest_p = np.abs(error_pc).sum(axis=1)
    best: tuple[float, list[tuple[int, int]]] | None = None
    for source in range(len(PARTS)):
        inside = np.flatnonzero(part_g == source)
        for target in range(len(PARTS)):
            if target == source:
                continue
            other = rest_p.sum() - rest_p[source] - rest_p[target]
            # A phantom group without cells turns an exchange into a move.
            outside = np.flatnonzero(part_g == target)
            gives_gc = counts_gc[inside]
            takes_gc = np.concatenate([np.zeros((1, counts_gc.shape[1])), counts_gc[outside]])
            for position, group in enumerate(inside):
                change_gc = takes_gc - gives_gc[position]
                cost_g = (
                    other
                    + np.abs(error_pc[source] + change_gc).sum(axis=1)
                    + np.abs(error_pc[target] - change_gc).sum(axis=1)
                )
                if len(inside) == 1:
                    cost_g[0] = np.inf
                chosen = int(np.argmin(cost_g))
                if best is None or cost_g[chosen] < best[0] - 1e-9:
                    exchange = [(int(outside[chosen - 1]), source)] if chosen else []
                    best = float(cost_g[chosen]), [(int(group), target), *exchange]
    return best
