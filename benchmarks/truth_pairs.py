"""Pairs of regulators deleted together, and regulators against effectors by how far their deletion moves the cell.

Axes: `t` genes of one cell, `p` pairs of regulators.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from truth_baselines import CORRELATION
from truth_cells import FIRST_GENE, PlantedCells
from truth_effects import COSINE, LAST, READOUTS, cell_effects, nearest_ranks
from truth_scores import FEWEST_CELLS, auroc, wins

from genescale.training.model import MaskedGeneModel

EFFECTORS = ("direct target", "indirect target", "cooperative target", "marker")
NEIGHBOURS = 8
HOW = ("raw", "excess")
CELLS_PER_PAIR = 15


def candidate_pairs(planted: PlantedCells) -> tuple[list[tuple[int, int]], np.ndarray]:
    """Genes of all pairs of regulators with one home (of all, where there are no homes), and which cooperate (p)."""
    network = planted.network
    gene_of = {int(network.driver_g[g]): g for g in np.flatnonzero(np.array(network.roles) == "regulator")}
    together = {tuple(sorted(pair)) for pair in network.pairs_p2.tolist()}
    homes = np.arange(len(gene_of)) % network.config.cell_types
    anywhere = not network.config.home_activity
    pairs = [(a, b) for a, b in itertools.combinations(range(len(gene_of)), 2) if anywhere or homes[a] == homes[b]]
    return [(gene_of[a], gene_of[b]) for a, b in pairs], np.array([pair in together for pair in pairs])


def pair_scores(model: MaskedGeneModel, planted: PlantedCells) -> dict[str, Any]:
    """How far the joint deletion departs from the sum of the two single ones: |mean over cells of joint - sum| by gene.

    By read-out: `score`, the 95th percentile of that over the genes, for each pair; `shared targets`, for each
    cooperating pair the AUROC of its shared targets against its other genes.
    """
    pairs, cooperate_p = candidate_pairs(planted)
    found: dict[str, Any] = {name: {"score": [], "shared targets": []} for name in READOUTS}
    for pair, shared in zip(pairs, _targets(planted, pairs), strict=True):
        for name, by_gene in _interactions(model, planted, pair).items():
            means = {gene: abs(float(np.mean(v))) for gene, v in by_gene.items() if len(v) >= FEWEST_CELLS}
            found[name]["score"].append(float(np.quantile(list(means.values()), 0.95)) if means else float("nan"))
            if shared:
                found[name]["shared targets"].append(_told_apart(means, shared))
    return {**found, "cooperates": cooperate_p.tolist()}


def correlated_pairs(correlation_gg: np.ndarray, planted: PlantedCells) -> dict[str, Any]:
    """The same from expression: how the regulators correlate, and the lesser correlation of a gene with the two."""
    pairs, cooperate_p = candidate_pairs(planted)
    within = []
    for (a, b), shared in zip(pairs, _targets(planted, pairs), strict=True):
        both_g = np.minimum(correlation_gg[a], correlation_gg[b])
        if shared:
            within.append(_told_apart({g: both_g[g] for g in range(len(both_g)) if g not in (a, b)}, shared))
    scores = [float(correlation_gg[pair]) for pair in pairs]
    return {CORRELATION: {"score": scores, "shared targets": within}, "cooperates": cooperate_p.tolist()}


def _told_apart(value_of: Mapping[int, float], shared: set[int]) -> float:
    on, off = ([value for gene, value in value_of.items() if (gene in shared) == wanted] for wanted in (True, False))
    return auroc(np.array(on), np.array(off))


def _targets(planted: PlantedCells, pairs: Sequence[tuple[int, int]]) -> list[set[int]]:
    network = planted.network
    first_pair = len(network.odds_ck[0]) + len(network.parent_m)
    numbers = {frozenset(pair): at for at, pair in enumerate(network.pairs_p2.tolist())}
    shared = []
    for a, b in pairs:
        at = numbers.get(frozenset((int(network.driver_g[a]), int(network.driver_g[b]))))
        shared.append(set() if at is None else set(np.flatnonzero(network.driver_g == first_pair + at).tolist()))
    return shared


def _interactions(
    model: MaskedGeneModel, planted: PlantedCells, pair: tuple[int, int]
) -> dict[str, dict[int, list[float]]]:
    """Joint minus sum of singles, by read-out and gene, a value for each cell that has both regulators."""
    wanted = [gene + FIRST_GENE for gene in pair]
    cells = [cell for cell in planted.screened if np.isin(wanted, cell).all()][:CELLS_PER_PAIR]
    found: dict[str, dict[int, list[float]]] = {name: {} for name in READOUTS}
    for cell in cells:
        a, b = (int(np.flatnonzero(cell == token)[0]) for token in wanted)
        effects = cell_effects(model, planted.trained.vocabulary, cell, [], pairs=[(a, b)]).effects
        for name, values in effects.items():
            departs_t = values[a, b] - values[a,] - values[b,]
            for place in np.flatnonzero(np.isfinite(departs_t)):
                found[name].setdefault(int(cell[place]) - FIRST_GENE, []).append(float(departs_t[place]))
    return found


def effector_scores(model: MaskedGeneModel, planted: PlantedCells, *, n_cells: int) -> dict[str, list[float]]:
    """For each regulator (and mediator) the share of genes that drive nothing whose deletion moves the cell less.

    The cell shift is the mean over the remaining genes of 1 - cosine; `excess` is what it has over the deletions at
    the eight nearest ranks of the same cell.
    """
    roles = np.array(planted.network.roles)
    shifts: dict[str, dict[int, list[float]]] = {f"{name}, {how}": {} for name in (COSINE, LAST) for how in HOW}
    for cell in planted.screened[:n_cells]:
        everything = range(len(cell))
        effects = cell_effects(
            model, planted.trained.vocabulary, cell, everything, masked=False, attention=False
        ).effects
        for name in (COSINE, LAST):
            shift_t = np.array([np.nanmean(effects[name][at,]) for at in everything])
            near_t = np.array([shift_t[nearest_ranks(at, len(cell), NEIGHBOURS)].mean() for at in everything])
            for how, value_t in zip(HOW, (shift_t, shift_t - near_t), strict=True):
                for token, value in zip(cell.tolist(), value_t.tolist(), strict=True):
                    shifts[f"{name}, {how}"].setdefault(token - FIRST_GENE, []).append(value)
    found = {}
    for name, by_gene in shifts.items():
        effectors = _means(by_gene, np.isin(roles, EFFECTORS))
        for role in ("regulator", "mediator"):
            found[f"{role}: {name}"] = [wins(value, effectors) for value in _means(by_gene, roles == role)]
    return found


def _means(by_gene: dict[int, list[float]], chosen_g: np.ndarray) -> np.ndarray:
    return np.array(
        [np.mean(values) for gene, values in by_gene.items() if chosen_g[gene] and len(values) >= FEWEST_CELLS]
    )
