"""Do the genes of a list receive more attention than genes like them? Tests over genes and over donors, by head.

Axis suffixes: `l` layers, `h` heads and, last, their mean, `p` genes of the list, `n` cells, `o` donors, `r` resamples.

What is new to a reader of tests over cells: a gene has the same token in every cell, so any gene differs from its
matched ones in the same way again and again, and thousands of cells make any ten genes of no meaning significant. That
regulators as such receive attention is a statement about genes. It is tested over genes: by how many of its matched
genes each gene of the list beats, averaged over cells with donors alike, against one half (Wilcoxon's signed-rank test,
two-sided). That it is so in more than these donors is tested over donors in the same way. Reported is the larger of
the two p-values, a level for both statements at once (intersection-union: Berger, Technometrics 1982), with q-values
(Benjamini and Hochberg 1995) over all heads of all layers, and apart from these over the layers.

Genes of a list share matched genes, so their places are not independent: a matched gene that by chance receives little
lifts several of them. By Hajek's projection the variance of the mean place of p genes is (1 + p sum_c w_c^2) / 12p at
most, where w_c is the share of comparisons that gene c serves in; without sharing it is 1 / 12p, which the signed-rank
test takes for granted. Its z-value, and the interval, are therefore narrowed and widened by the root of that factor.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from scipy import stats

from genescale.perturbation.attention.list_shares import ListShares
from genescale.perturbation.attention.signed_rank import signed_rank
from genescale.perturbation.statistics.intervals import Clustered, intervals
from genescale.perturbation.statistics.multiple import benjamini_hochberg
from genescale.platform.vocabulary import Vocabulary

LEAST_UNITS = 6
"""Of genes or donors: with five, the smallest two-sided p-value of a signed-rank test is 0.0625."""
ALL_HEADS = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Donors:
    """Which donor each cell is of."""

    code_n: np.ndarray
    """(n) int64 positions in `names`."""
    names: tuple[str, ...]

    @property
    def weight_n(self) -> np.ndarray:
        """(n) weights that add up to the number of cells, with every donor alike."""
        cells_o = np.bincount(self.code_n, minlength=len(self.names))
        return len(self.code_n) / (len(self.names) * cells_o[self.code_n])


def list_table(
    found: ListShares, donors: Donors, *, min_cells: int, confidence: float, draws: int, seed: int
) -> pl.DataFrame:
    """One row per layer and head (1 = the first; head 0: the mean over the heads of the layer).

    share: of all attention of genes to other genes, per cell, that goes to the list; received, matched: mean attention
    to a gene of the list and to its matched genes, over that of a head that looks at all tokens alike; ratio: the
    first over the second, ci_low and ci_high its bootstrap interval over genes (`over` says so; over donors where the
    list has one gene only); place: mean share of matched genes that receive less; p_genes, p_donors, p, q: see the top
    of this file; donors_above: donors in which the place is above one half; testable, reason.
    """
    kept_p = found.cells_p >= min_cells
    counts = {"list": found.genes.name, "n_listed": len(found.genes.tokens), "n_genes": int(kept_p.sum())}
    with_list_n = found.genes_n > 0
    n_layers, n_heads = found.listed_plh.shape[1:]
    if not kept_p.any():
        return _untested(counts, n_layers, n_heads, f"no gene of the list is in {min_cells} cells with a matched gene")
    weight_p = found.weight_p[kept_p][:, None, None]
    listed_plh, matched_plh, place_plh = (
        sums[kept_p] / weight_p for sums in (found.listed_plh, found.matched_plh, found.place_plh)
    )
    place_olh = _by_donor(found.cell_place_nlh, donors, with_list_n)
    share_olh = _by_donor(found.cell_share_nlh, donors, with_list_n)
    ratio = _ratio(listed_plh.mean(axis=0), matched_plh.mean(axis=0))
    low, high, over = _interval(found, donors, listed_plh, matched_plh, confidence=confidence, draws=draws, seed=seed)
    sharing = shared_controls(found, len(place_plh))
    p_genes = deflated(_signed_rank(place_plh), sharing)
    p_donors = _signed_rank(place_olh) if len(place_olh) >= LEAST_UNITS else None
    if over == "genes":
        low, high = (ratio + (end - ratio) * np.sqrt(sharing) for end in (low, high))
    testable, reason = _testable(len(place_plh), len(place_olh))
    larger = p_genes if p_donors is None else np.maximum(p_genes, p_donors)
    numbers = {
        "share": share_olh.mean(axis=0),
        "received": listed_plh.mean(axis=0),
        "matched": matched_plh.mean(axis=0),
        "ratio": ratio,
        "ci_low": low,
        "ci_high": high,
        "place": place_plh.mean(axis=0),
        "p_genes": p_genes if testable else None,
        "p_donors": p_donors,
        "p": larger if testable else None,
        "q": _q_values(larger) if testable else None,
        "donors_above": (place_olh > 0.5).sum(axis=0),
    }
    counts |= {
        "n_cells": int(with_list_n.sum()),
        "n_donors": len(place_olh),
        "mean_controls": found.controls_pairs / max(int(found.cells_p.sum()), 1),
        "over": over,
        "testable": testable,
        "reason": reason,
    }
    return _rows(counts, numbers, n_layers, n_heads)


def gene_rows(found: ListShares, vocabulary: Vocabulary) -> pl.DataFrame:
    """One row per gene of the list that stands in a cell, layer and head (0: their mean), as `list_table` has them."""
    there_p = np.flatnonzero(found.cells_p > 0)
    n_layers, n_heads = found.listed_plh.shape[1:]
    gene, layer, head = (axis.ravel() for axis in np.indices((len(there_p), n_layers, n_heads)))
    at = there_p[gene]
    ids = [vocabulary.gene_of_token(token) for token in found.genes.tokens]
    columns = {
        "list": [found.genes.name] * len(at),
        "gene_id": [ids[p] for p in at],
        "symbol": [vocabulary.symbol_of(ids[p]) for p in at],
        "layer": layer + 1,
        "head": np.where(head == n_heads - 1, ALL_HEADS, head + 1),
        "n_cells": found.cells_p[at],
        "mean_rank": found.rank_p[at] / found.cells_p[at],
        "matched_mean_rank": found.matched_rank_p[at] / found.cells_p[at],
        "received": found.listed_plh[at, layer, head] / found.weight_p[at],
        "matched": found.matched_plh[at, layer, head] / found.weight_p[at],
        "place": found.place_plh[at, layer, head] / found.weight_p[at],
    }
    texts = dict.fromkeys(("list", "gene_id", "symbol"), pl.String)
    return pl.DataFrame(columns, schema_overrides=texts)


def significant(rows: pl.DataFrame, *, above: bool, level: float = 0.05) -> pl.DataFrame:
    """Rows of a list table whose q is below `level` and whose place is above (or below) that of matched genes."""
    side = pl.col("place") > 0.5 if above else pl.col("place") < 0.5
    return rows.filter(pl.col("testable") & (pl.col("q") < level) & side)


def shared_controls(found: ListShares, n_genes: int) -> float:
    """By how much shared matched genes inflate the variance of the mean place of `n_genes` (1: not at all)."""
    share_t = found.used_t / max(float(found.used_t.sum()), np.finfo(float).tiny)
    return 1.0 + n_genes * float((share_t**2).sum())


def deflated(p_lh: np.ndarray, inflation: float) -> np.ndarray:
    """Two-sided p-values of normal statistics whose variance is `inflation` times what their test took it for."""
    return 2.0 * stats.norm.sf(stats.norm.isf(p_lh / 2.0) / np.sqrt(inflation))


def _signed_rank(place_ulh: np.ndarray) -> np.ndarray:
    return signed_rank(place_ulh.reshape(len(place_ulh), -1) - 0.5).reshape(place_ulh.shape[1:])


def _by_donor(values_nlh: np.ndarray, donors: Donors, with_list_n: np.ndarray) -> np.ndarray:
    """(o, l, h) means over the cells of each donor that has any with the list."""
    codes, place_n = np.unique(donors.code_n[with_list_n], return_inverse=True)
    sums_olh = np.zeros((len(codes), *values_nlh.shape[1:]))
    np.add.at(sums_olh, place_n, values_nlh[with_list_n].astype(np.float64))
    return sums_olh / np.bincount(place_n)[:, None, None]


def _interval(
    found: ListShares,
    donors: Donors,
    listed_plh: np.ndarray,
    matched_plh: np.ndarray,
    *,
    confidence: float,
    draws: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray, str] | tuple[None, None, str]:
    """Interval of the ratio over genes, else donors, else cells, whatever there are two of."""
    units = [("genes", listed_plh, matched_plh)]
    if len(listed_plh) < 2:
        with_list_n = found.genes_n > 0
        cells = (found.cell_listed_nlh, found.cell_matched_nlh)
        ours, theirs = (_by_donor(values, donors, with_list_n) for values in cells)
        units.append(("donors", ours, theirs))
        ours, theirs = (values[with_list_n].astype(np.float64) for values in cells)
        units.append(("cells", ours, theirs))
    for name, ours_ulh, theirs_ulh in units:
        if len(ours_ulh) >= 2:
            # A mean of the first weighed by the second, divided by it, is the ratio of their sums.
            sums_eu, counts_eu = (values.reshape(len(values), -1).T for values in (ours_ulh, theirs_ulh))
            ends = intervals(
                Clustered(sums_eu=sums_eu, counts_eu=counts_eu), confidence=confidence, draws=draws, seed=seed
            )
            low_lh, high_lh = (end_e.reshape(ours_ulh.shape[1:]) for end_e in ends)
            return low_lh, high_lh, name
    return None, None, "nothing: there is one cell"


def _ratio(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    return np.divide(ours, theirs, out=np.full(ours.shape, np.nan), where=theirs > 0)


def _testable(n_genes: int, n_donors: int) -> tuple[bool, str]:
    if n_genes < LEAST_UNITS:
        return False, f"{n_genes} of its genes are in the cells: a rank test over genes needs {LEAST_UNITS}"
    if n_donors < LEAST_UNITS:
        return True, f"tested over genes alone: {n_donors} donor(s), a rank test over donors needs {LEAST_UNITS}"
    return True, ""


def _q_values(p_lh: np.ndarray) -> np.ndarray:
    """Benjamini-Hochberg over the heads of all layers, and apart over the layers (the last column)."""
    heads = benjamini_hochberg(p_lh[:, :-1].ravel()).reshape(p_lh[:, :-1].shape)
    return np.column_stack([heads, benjamini_hochberg(p_lh[:, -1])])


def _rows(
    counts: dict[str, object], numbers: dict[str, np.ndarray | None], n_layers: int, n_heads: int
) -> pl.DataFrame:
    layer, head = (axis.ravel() for axis in np.indices((n_layers, n_heads)))
    columns: dict[str, object] = {"layer": layer + 1, "head": np.where(head == n_heads - 1, ALL_HEADS, head + 1)}
    columns |= {name: None if values is None else values.ravel() for name, values in numbers.items()}
    made = pl.DataFrame({name: values for name, values in columns.items() if values is not None})
    missing = [pl.lit(None, dtype=pl.Float64).alias(name) for name, values in columns.items() if values is None]
    ordered = made.with_columns(*missing, **{name: pl.lit(value) for name, value in counts.items()})
    return ordered.select(*(name for name in LIST_COLUMNS)).cast({"donors_above": pl.Int64, "n_cells": pl.Int64})


def _untested(counts: dict[str, object], n_layers: int, n_heads: int, reason: str) -> pl.DataFrame:
    """Rows without numbers that say why."""
    numbers: dict[str, np.ndarray | None] = dict.fromkeys(_NUMBERS)
    numbers["donors_above"] = np.zeros((n_layers, n_heads), dtype=np.int64)
    counts |= {"n_cells": 0, "n_donors": 0, "mean_controls": 0.0, "over": "nothing", "testable": False}
    return _rows(counts | {"reason": reason}, numbers, n_layers, n_heads)


_NUMBERS = (
    "share", "received", "matched", "ratio", "ci_low", "ci_high", "place", "p_genes", "p_donors", "p", "q",
    "donors_above",
)  # fmt: skip
LIST_COLUMNS = (
    "list", "layer", "head", *_NUMBERS, "over", "testable", "reason",
    "n_listed", "n_genes", "n_cells", "n_donors", "mean_controls",
)  # fmt: skip
