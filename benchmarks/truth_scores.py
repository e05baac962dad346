"""How well read-outs tell a regulator's direct targets from the rest: AUROCs with intervals over regulators.

    matched     the effect of a regulator's deletion on its direct target, against the effect of deleting genes at
                nearby ranks in the same cells on the same target; means over cells on both sides
    per cell    the same, single cells against single cells
    direct against ...   the excess over those controls, of direct targets against other genes under the same deletion:
                `indirect`, `markers` of the regulator's cell type, `echoes`, `unrelated` (nothing reaches them),
                and `all not reached`, which are all genes that the regulator does not reach, those of others included
    ..., by rank         the same with the share of controls that the effect lies above (cell by cell) in place of the
                excess, so that genes that any deletion moves far count no more than others

Axes: `z` records (a cell, a regulator, another gene of the cell), `c` controls, `k` regulators, `g` genes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from truth_cells import FIRST_GENE
from truth_effects import CellEffects

from genescale.ingestion.simulate_network import Network, truth_of

FEWEST_CELLS, DRAWS, BOOTSTRAPS = 4, 20, 2_000
NEGATIVES = ("indirect", "markers", "echoes", "unrelated", "all not reached")
NOT_REACHED = ("markers", "echoes", "unrelated", "others")
MATCHED, PER_CELL, RAW = "matched", "per cell", "raw, all not reached"


def classes_kg(network: Network) -> np.ndarray:
    """What each gene is to each regulator: direct, indirect, pair, markers, echoes, unrelated, others, self."""
    truth, at = truth_of(network), {gene: g for g, gene in enumerate(network.gene_ids)}
    regulators = {gene: k for k, gene in enumerate(truth["regulators"])}
    found = np.full((len(regulators), network.n_genes), "others", dtype="<U10")
    roles = np.array(network.roles)
    found[:, np.isin(roles, ("housekeeping", "background"))] = "unrelated"
    k, m, p = len(regulators), len(network.parent_m), len(network.pairs_p2)
    homes = np.arange(k) % network.config.cell_types
    for regulator, home in enumerate(homes):
        found[regulator, network.driver_g == k + m + p + home] = "markers"
        found[regulator, (network.driver_g == regulator) & (roles == "echo")] = "echoes"
    for edge in truth["edges"]:
        if edge["regulator"] in regulators:
            found[regulators[edge["regulator"]], at[edge["target"]]] = edge["class"]
    for pair in truth["pairs"]:
        for gene in pair["regulators"]:
            found[regulators[gene], [at[target] for target in pair["targets"]]] = "pair"
    for gene, regulator in regulators.items():
        found[regulator, at[gene]] = "self"
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class Records:
    """Effects of regulators' deletions and of their controls, on each gene of each cell."""

    regulator_z: np.ndarray
    gene_z: np.ndarray
    effect_z: dict[str, np.ndarray]
    """By read-out."""
    control_zc: dict[str, np.ndarray]
    """NaN where the control is the gene itself."""


Rows = Callable[[int, int], np.ndarray]
"""(number of a cell, position of the deleted gene) -> what that does to each gene of the cell (t,)."""


def records(cells: Sequence[CellEffects], regulator_of: Mapping[int, int], sources: Mapping[str, Rows]) -> Records:
    """What each source says of the deletion of every regulator and of its controls, in every cell.

    `regulator_of` numbers the regulators by gene; gene g is token g + 2.
    """
    regulators, genes = [], []
    effects: dict[str, list[np.ndarray]] = {name: [] for name in sources}
    controls: dict[str, list[np.ndarray]] = {name: [] for name in sources}
    for number, cell in enumerate(cells):
        genes_t = cell.tokens_t - FIRST_GENE
        for at, controls_c in cell.controls.items():
            if int(genes_t[at]) not in regulator_of:
                continue
            others = np.delete(np.arange(len(genes_t)), at)
            regulators.append(np.full(len(others), regulator_of[int(genes_t[at])]))
            genes.append(genes_t[others])
            itself_tc = np.arange(len(genes_t))[:, None] == controls_c
            for name, rows in sources.items():
                by_control_tc = np.stack([rows(number, int(control)) for control in controls_c], axis=1)
                effects[name].append(rows(number, at)[others])
                controls[name].append(np.where(itself_tc, np.nan, by_control_tc)[others])
    return Records(
        regulator_z=np.concatenate(regulators),
        gene_z=np.concatenate(genes),
        effect_z={name: np.concatenate(values) for name, values in effects.items()},
        control_zc={name: np.concatenate(values) for name, values in controls.items()},
    )


@dataclass(frozen=True, kw_only=True)
class GeneEffect:
    """One gene under the deletion of one regulator, over the cells that have both."""

    kind: str
    raw: float
    excess: float
    """Over the controls of the same cells."""
    matched: float
    """Chance that it lies above the mean of one control of each cell."""
    per_cell: float
    """Chance that it lies above one control, in one cell."""


def gene_effects(
    found: Records, readout: str, kinds_g: np.ndarray, regulator: int, draws: np.random.Generator
) -> list[GeneEffect]:
    """Every gene that enough cells have together with the regulator."""
    rows = found.regulator_z == regulator
    gene_z, x_z, y_zc = found.gene_z[rows], found.effect_z[readout][rows], found.control_zc[readout][rows]
    effects = []
    for gene in np.unique(gene_z):
        mine = gene_z == gene
        if mine.sum() < FEWEST_CELLS:
            continue
        x, y_c = x_z[mine], y_zc[mine]
        known = np.isfinite(y_c)
        effects.append(
            GeneEffect(
                kind=str(kinds_g[gene]),
                raw=float(x.mean()),
                excess=float(x.mean() - y_c[known].mean()),
                matched=wins(x.mean(), _drawn_means(y_c, draws)),
                per_cell=wins(np.broadcast_to(x[:, None], y_c.shape)[known], y_c[known]),
            )
        )
    return effects


def scores(found: Records, readout: str, kinds_kg: np.ndarray, *, seed: int = 0) -> dict[str, list[float]]:
    """AUROC of each comparison for each regulator, NaN where there is nothing to compare."""
    draws = np.random.default_rng(seed)
    ranked = [f"{name}, by rank" for name in NEGATIVES]
    by_regulator: dict[str, list[float]] = {name: [] for name in (MATCHED, PER_CELL, RAW, *NEGATIVES, *ranked)}
    for regulator, kinds_g in enumerate(kinds_kg):
        effects = gene_effects(found, readout, kinds_g, regulator, draws)
        direct = [one for one in effects if one.kind == "direct"]
        far = [one for one in effects if one.kind in NOT_REACHED]
        by_regulator[MATCHED].append(_mean([one.matched for one in direct]))
        by_regulator[PER_CELL].append(_mean([one.per_cell for one in direct]))
        by_regulator[RAW].append(auroc(*(np.array([one.raw for one in group]) for group in (direct, far))))
        for name in NEGATIVES:
            others = far if name == "all not reached" else [one for one in effects if one.kind == name]
            by_regulator[name].append(auroc(*(np.array([one.excess for one in group]) for group in (direct, others))))
            by_rank = (np.array([one.per_cell for one in group]) for group in (direct, others))
            by_regulator[f"{name}, by rank"].append(auroc(*by_rank))
    return by_regulator


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def _drawn_means(control_zc: np.ndarray, draws: np.random.Generator) -> np.ndarray:
    """Means over cells, of one control of each cell, drawn several times."""
    means = []
    keys_zc = np.where(np.isfinite(control_zc), 0.0, np.inf)
    for _ in range(DRAWS):
        chosen = np.argmin(keys_zc + draws.random(control_zc.shape), axis=1)
        means.append(control_zc[np.arange(len(control_zc)), chosen].mean())
    return np.array(means)


def wins(x: Any, y: Any) -> float:
    """Share of pairs in which x is the larger one, ties half."""
    return float(np.mean((x > y) + 0.5 * (x == y)))


def auroc(more: np.ndarray, less: np.ndarray) -> float:
    """Chance that one of `more` is larger than one of `less`, ties half; NaN where either is empty."""
    if not len(more) or not len(less):
        return float("nan")
    return wins(more[:, None], less[None, :])


def estimate(values: Sequence[float], *, seed: int = 0) -> dict[str, float]:
    """Mean over regulators with its 95 % percentile bootstrap interval."""
    known = np.array([value for value in values if np.isfinite(value)])
    if not len(known):
        return {"mean": float("nan"), "low": float("nan"), "high": float("nan"), "n": 0}
    draws = np.random.default_rng(seed).integers(0, len(known), (BOOTSTRAPS, len(known)))
    low, high = np.quantile(known[draws].mean(axis=1), [0.025, 0.975])
    return {"mean": float(known.mean()), "low": float(low), "high": float(high), "n": len(known)}
