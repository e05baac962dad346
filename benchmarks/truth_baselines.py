"""What needs no encoder: correlations of expression, and the oracle that knows the network.

Axes: `n` cells, `g` genes, `c` cell types.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from genescale.ingestion.simulate_network import Network

CORRELATION, WITHIN_TYPE, PARTIAL = "correlation", "correlation within types", "partial correlation"
CORRELATIONS = (CORRELATION, WITHIN_TYPE, PARTIAL)
# Shrinkage of the correlations towards none before they are inverted.
RIDGE = 0.05
TARGET_SUM = 10_000.0


def correlations(counts_ng: np.ndarray, types_n: np.ndarray) -> dict[str, np.ndarray]:
    """Three measures of how genes go together, (g, g) each, from log-normalised counts.

    `within types` subtracts the mean of the cell's type first: what can be done where the confounder has been labelled.
    `partial` is what is left between two genes when all others are known, from a regularised inverse.
    """
    depth_n1 = counts_ng.sum(axis=1, keepdims=True)
    logs_ng = np.log1p(counts_ng / depth_n1 * TARGET_SUM)
    means_cg = np.array([logs_ng[types_n == kind].mean(axis=0) for kind in np.unique(types_n)])
    residual_ng = logs_ng - means_cg[np.searchsorted(np.unique(types_n), types_n)]
    plain_gg = _correlation(logs_ng)
    return {CORRELATION: plain_gg, WITHIN_TYPE: _correlation(residual_ng), PARTIAL: _partial(plain_gg)}


def _correlation(values_ng: np.ndarray) -> np.ndarray:
    centred_ng = values_ng - values_ng.mean(axis=0)
    length_g = np.sqrt((centred_ng**2).sum(axis=0))
    scaled_ng = np.divide(centred_ng, length_g, out=np.zeros_like(centred_ng), where=length_g > 0)
    return scaled_ng.T @ scaled_ng


def _partial(correlation_gg: np.ndarray) -> np.ndarray:
    inverse_gg = np.linalg.inv((1 - RIDGE) * correlation_gg + RIDGE * np.eye(len(correlation_gg)))
    scale_g = np.sqrt(np.diag(inverse_gg))
    return -inverse_gg / np.outer(scale_g, scale_g)


class Oracle:
    """What the best possible model of masked genes makes of a deletion: it knows the network and the cell's type.

    A regulator with its mediators and all their targets is a tree of genes that are on or off, so what is seen of the
    cell gives the exact chance that a hidden gene of the tree is on. A gene that is not seen is off, or on and hidden;
    the latter with the share that pretraining hides. Its effect is the fall of the log-probability. Genes outside the
    tree of the deleted one are left as they are; so are shared targets of pairs, which this oracle passes over.
    """

    def __init__(self, network: Network, hidden_share: float) -> None:
        self.network, self.hidden = network, hidden_share
        config = network.config
        ambient = 1.0 - np.exp(-config.ambient_counts)
        self._off_g = network.off_g + (1.0 - network.off_g) * ambient
        self._on_g = np.maximum(network.on_g, self._off_g)
        self._leak = config.leak

    @cached_property
    def tree_g(self) -> np.ndarray:
        """Regulator at the root of each gene's tree; -1 for genes of none."""
        k, m = len(self.network.odds_ck[0]), len(self.network.parent_m)
        driver_g = self.network.driver_g
        root_g = np.where(driver_g < k, driver_g, -1)
        through = (driver_g >= k) & (driver_g < k + m)
        root_g[through] = self.network.parent_m[driver_g[through] - k]
        return root_g

    def effect(self, seen_g: np.ndarray, kind: int, deleted: int, gene: int) -> float:
        """Fall of the log-probability of `gene` when `deleted` is no longer seen; `seen_g` (g,) bool."""
        root = self.tree_g[gene]
        if root < 0 or root != self.tree_g[deleted]:
            return 0.0
        without_g = seen_g.copy()
        without_g[deleted] = False
        return float(np.log(self._chance(seen_g, kind, root, gene) / self._chance(without_g, kind, root, gene)))

    def _chance(self, seen_g: np.ndarray, kind: int, root: int, gene: int) -> float:
        """Chance that `gene` is on, given what is seen of all others."""
        prior = self.network.odds_ck[kind, root]
        k = len(self.network.odds_ck[0])
        joint = np.zeros(2)
        for on in (0, 1):
            weight_known, weight_gene = (prior if on else 1.0 - prior), 1.0
            genes = np.flatnonzero(self.network.driver_g == root)
            for other in genes:
                chance = self._chance_on(int(other), kind, bool(on))
                if other == gene:
                    weight_gene *= chance
                else:
                    weight_known *= self._seen(chance, bool(seen_g[other]))
            for mediator in np.flatnonzero(self.network.parent_m == root):
                known, with_gene = self._branch(seen_g, kind, int(mediator) + k, bool(on), gene)
                weight_known, weight_gene = weight_known * known, weight_gene * with_gene
            joint += weight_known * np.array([1.0, weight_gene])
        return float(joint[1] / joint[0])

    def _branch(self, seen_g: np.ndarray, kind: int, driver: int, root_on: bool, gene: int) -> tuple[float, float]:
        """Chance of what is seen below a mediator; and that `gene` is on given that (1 where it stands elsewhere)."""
        penetrance = self.network.config.mediator_penetrance if root_on else self._leak
        total, with_gene = 0.0, 0.0
        for on in (0, 1):
            weight, hit = (penetrance if on else 1.0 - penetrance), 1.0
            for other in np.flatnonzero(self.network.driver_g == driver):
                chance = self._chance_on(int(other), kind, bool(on))
                if other == gene:
                    hit = chance
                else:
                    weight *= self._seen(chance, bool(seen_g[other]))
            total += weight
            with_gene += weight * hit
        return total, with_gene / total

    def _chance_on(self, gene: int, kind: int, driven: bool) -> float:
        chance = self._on_g[gene] if driven else self._off_g[gene]
        if self.network.elsewhere_gc[gene, kind]:
            chance = max(chance, self.network.config.elsewhere_penetrance)
        return float(chance)

    def _seen(self, chance: float, seen: bool) -> float:
        visible = chance * (1.0 - self.hidden)
        return visible if seen else 1.0 - visible
