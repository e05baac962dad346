"""Shared out: whole groups over parts, so that sizes come as near to the wished ones as the groups allow.

Axis suffixes: `g` groups, `c` classes, `p` parts.

Greedy assignment, largest group first and then in several seeded orders, each improved by moving and exchanging single
groups until nothing gets nearer; the nearest is taken.
"""

from __future__ import annotations

import numpy as np

RESTARTS = 64
"""Seeded starting orders that are tried at most; the nearest to the wished sizes is kept."""
IMPROVED_GROUPS = 2_000
"""With more groups than that the greedy assignment is exact to a few units, and moves would take minutes."""
GROUPS_TRIED = 1_500
"""Restarts x groups at most: with many groups one order already comes near, and each round of moves costs more."""


def whole_numbers(wished_p: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers with sum `total` near `wished_p`, each at least one when `total` allows it."""
    least = 1 if total >= len(wished_p) else 0
    given_p = np.maximum(np.floor(wished_p).astype(np.int64), least)
    while given_p.sum() != total:
        step = 1 if given_p.sum() < total else -1
        # The part that is furthest from its wish in the direction of the step, never below the least.
        room_p = np.where((step > 0) | (given_p > least), step * (wished_p - given_p), -np.inf)
        given_p[int(np.argmax(room_p))] += step
    return given_p


def nearest_assignment(counts_gc: np.ndarray, fractions_p: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Part (int64) of each group, so that each class of `counts_gc` is spread as near to `fractions_p` as possible.

    No part is empty when there are as many groups as parts.
    """
    wished_pc = fractions_p[:, None] * counts_gc.sum(axis=0)[None, :]
    best_g, best_cost = np.zeros(len(counts_gc), dtype=np.int64), np.inf
    for first in [True, *[False] * int(np.clip(GROUPS_TRIED // len(counts_gc), 0, RESTARTS))]:
        order = generator.permutation(len(counts_gc))
        if first:
            order = order[np.argsort(-counts_gc.sum(axis=1)[order], kind="stable")]
        part_g = fill_empty(greedy_assignment(counts_gc, wished_pc, order), counts_gc, len(fractions_p))
        if len(counts_gc) <= IMPROVED_GROUPS:
            part_g = _improve(part_g, counts_gc, wished_pc)
        cost = distance(held(part_g, counts_gc, len(fractions_p)), wished_pc)
        if cost < best_cost - 1e-9:
            best_g, best_cost = part_g, cost
    return best_g


def distance(held_pc: np.ndarray, wished_pc: np.ndarray) -> float:
    """How many units too many or too few the parts hold, summed over parts and classes."""
    return float(np.abs(held_pc - wished_pc).sum())


def held(part_g: np.ndarray, counts_gc: np.ndarray, n_parts: int) -> np.ndarray:
    """Units of each class in each part, (p, c) float64."""
    held_pc = np.zeros((n_parts, counts_gc.shape[1]))
    np.add.at(held_pc, part_g, counts_gc)
    return held_pc


def greedy_assignment(counts_gc: np.ndarray, wished_pc: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Part (int64) of each group: one after the other in `order`, each where it brings the parts nearest."""
    held_pc = np.zeros_like(wished_pc)
    part_g = np.zeros(len(counts_gc), dtype=np.int64)
    for group in order:
        gain_p = np.abs(held_pc - wished_pc).sum(axis=1) - np.abs(held_pc + counts_gc[group] - wished_pc).sum(axis=1)
        part_g[group] = int(np.argmax(gain_p))
        held_pc[part_g[group]] += counts_gc[group]
    return part_g


def fill_empty(part_g: np.ndarray, counts_gc: np.ndarray, n_parts: int) -> np.ndarray:
    """Give each empty part the smallest group of a part that has more than one; changes and returns `part_g`."""
    size_g = counts_gc.sum(axis=1)
    for part in range(n_parts):
        if not (part_g == part).any():
            spare = [g for g in np.argsort(size_g, kind="stable") if (part_g == part_g[g]).sum() > 1]
            part_g[spare[0]] = part
    return part_g


def _improve(part_g: np.ndarray, counts_gc: np.ndarray, wished_pc: np.ndarray) -> np.ndarray:
    held_pc = held(part_g, counts_gc, len(wished_pc))
    cost = distance(held_pc, wished_pc)
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
    return part_g


def _best_step(
    part_g: np.ndarray, counts_gc: np.ndarray, held_pc: np.ndarray, wished_pc: np.ndarray
) -> tuple[float, list[tuple[int, int]]] | None:
    """The move or exchange of single groups that brings the parts nearest, with the cost after it."""
    error_pc = held_pc - wished_pc
    rest_p = np.abs(error_pc).sum(axis=1)
    best: tuple[float, list[tuple[int, int]]] | None = None
    for source in range(len(wished_pc)):
        inside = np.flatnonzero(part_g == source)
        for target in range(len(wished_pc)):
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
