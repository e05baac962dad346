"""Do an edit's known targets move more than matched genes? Lists of genes, such as direct and indirect targets.

Legend: `a` affected genes of one edit, `l` those of a list.

Every gene's shift is taken as a fold over the same gene's shift under control edits (`genes.py`), so that neither the
position of the deleted token nor a gene's own mobility passes for biology. Three areas under the ROC curve (the chance
that a gene of the list beats one outside it) say what each step takes away:

    auroc_shift     raw shifts, list against all genes of no list
    auroc           folds, list against all genes of no list
    auroc_matched   folds, each listed gene against the MATCHED unlisted genes nearest to it in how far control edits
                    move them and in how many cells they stand; its interval is over the listed genes

Two read-outs can be held against lists, told by the table that is given (column `readout`): gene shifts, as above, and
changes of masked genes. There the raw value is the fall of the log-probability, its score the fall beyond that under
control edits (both in nats, instead of folds), so above one half says that the list is expected less than other genes.

Targets of one regulator move together, so its genes are no independent witnesses and a rank-sum test over genes would
promise far too much. p is the share of *other edits* under which the very same list has as large an `auroc` (two-sided
about one half); with fewer than FEWEST_OTHER_EDITS of them there is none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import polars as pl

from genescale.perturbation.statistics.genes import gene_folds, masked_gene_falls
from genescale.perturbation.statistics.intervals import Clustered, check_interval, intervals
from genescale.perturbation.statistics.matched_null import Floats
from genescale.perturbation.statistics.multiple import benjamini_hochberg
from genescale.platform.errors import InputError

UNLISTED = "unlisted"
MATCHED = 20
FEWEST_OTHER_EDITS = 19
MOST_OTHER_EDITS = 200
FEWEST_GENES = 3
NONE = np.zeros(0)
GENE_SHIFT, MASKED_GENE = "gene shift", "masked gene"
FEW_GENES = "fewer than 3 genes of the list (or to compare with) moved in these cells"
FEW_EDITS = "{n} other edits to compare with: too few for a p (19 are needed)"
Flags = npt.NDArray[np.bool_]
Lists = Mapping[str, Sequence[str]] | pl.DataFrame


@dataclass(frozen=True, kw_only=True, eq=False)
class _Edit:
    """Affected genes of one edit that have a score: a fold, or a fall."""

    edit_id: str
    symbol: str
    names_a: npt.NDArray[np.str_]
    other_names_a: npt.NDArray[np.str_]
    raw_a: Floats
    score_a: Floats
    baseline_a: Floats
    """log2 of the shift (or the change) under control edits, and log2 of the cells, in standard deviations `(a, 2)`."""
    areas: dict[tuple[object, ...], float] = field(default_factory=dict)
    """Areas found before: a list that holds for every edit is held against the same genes again and again."""

    def holds(self, genes: frozenset[str]) -> Flags:
        """Genes whose id or symbol is among these."""
        wanted = np.array(sorted(genes))
        return np.isin(self.names_a, wanted) | np.isin(self.other_names_a, wanted)


def target_groups(
    gene_shifts: pl.DataFrame,
    lists: Lists,
    *,
    edit_ranks: pl.DataFrame | None = None,
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> pl.DataFrame:
    """One row per edit, list, and what it is held against: the unlisted genes, and every other list of that edit.

    gene_shifts: a screen's gene shifts, or its masked genes; `readout` says which they were.
    lists: gene ids or symbols by name, the same for all edits; or a table with columns `list`, `gene_id` and, where
    lists belong to single edits, `edit_id`. Raises InputError for an empty list, one that no edit's genes are in, or an
    `edit_id` that was not screened.
    """
    check_interval(confidence, draws)
    readout = MASKED_GENE if "mean_change" in gene_shifts.columns else GENE_SHIFT
    of_edit = _lists_by_edit(lists, gene_shifts, readout)
    edits = _edits(_scored(gene_shifts, readout, edit_ranks))
    drawn = np.random.default_rng(seed).permutation(sorted(edits))
    rows = []
    for edit_id, groups in sorted(of_edit.items()):
        others = [edits[name] for name in drawn if name != edit_id][:MOST_OTHER_EDITS]
        for name, against in _contrasts(groups):
            rows.append(_row(edits.get(edit_id), edit_id, groups, name, against, others))
    table = _named(pl.DataFrame([row for row, _ in rows], schema=_SCHEMA, orient="row"), readout)
    low, high = _intervals([placements for _, placements in rows], confidence=confidence, draws=draws, seed=seed)
    return table.with_columns(
        ci_low=pl.Series(low, nan_to_null=True),
        ci_high=pl.Series(high, nan_to_null=True),
        over=pl.lit("gene"),
        q=pl.Series(benjamini_hochberg(table["p"].fill_null(np.nan).to_numpy()), nan_to_null=True),
        testable=pl.col("p").is_not_null(),
    )


_SCHEMA = {
    "edit_id": pl.String,
    "symbol": pl.String,
    "list": pl.String,
    "against": pl.String,
    "n_listed": pl.Int64,
    "n_genes": pl.Int64,
    "n_against": pl.Int64,
    "median": pl.Float64,
    "median_against": pl.Float64,
    "auroc_shift": pl.Float64,
    "auroc": pl.Float64,
    "auroc_matched": pl.Float64,
    "n_other_edits": pl.Int64,
    "p": pl.Float64,
    "reason": pl.String,
}


def _named(table: pl.DataFrame, readout: str) -> pl.DataFrame:
    """The read-out before all else, and its medians under their own names."""
    medians = ("median_log2_fold", "median_log2_fold_against"), ("median_fall", "median_fall_against")
    own, other = medians if readout == GENE_SHIFT else medians[::-1]
    named = table.rename(dict(zip(("median", "median_against"), own, strict=True)))
    named = named.with_columns(pl.lit(None, pl.Float64).alias(name) for name in other)
    first = [name for pair in medians for name in pair]
    at = list(table.columns).index("median")
    order = [*table.columns[:at], *first, *table.columns[at + 2 :]]
    return named.select(pl.lit(readout).alias("readout"), *order)


def target_summary(
    targets: pl.DataFrame, *, confidence: float = 0.95, draws: int = 2000, seed: int = 0
) -> pl.DataFrame:
    """Over all edits: mean of each AUROC for each list and what it is held against, interval over edits.

    Each edit counts once, however many targets it has.
    """
    rows = []
    for (readout, name, against), part in targets.group_by("readout", "list", "against", maintain_order=True):
        for measure in ("auroc_shift", "auroc", "auroc_matched"):
            values = part[measure].drop_nulls().to_numpy()
            one = Clustered(sums_eu=values[None, :], counts_eu=np.ones((1, len(values))))
            low, high = intervals(one, confidence=confidence, draws=draws, seed=seed)
            share = float((values > 0.5).mean()) if len(values) else float("nan")
            mean = float(values.mean()) if len(values) else float("nan")
            ends = max(0.0, float(low[0])), min(1.0, float(high[0]))
            rows.append((readout, name, against, measure, len(values), mean, *ends, share))
    names = ("readout", "list", "against", "measure", "n_edits", "mean", "ci_low", "ci_high", "share_above_half")
    schema = {name: pl.String if at < 4 else pl.Int64 if at == 4 else pl.Float64 for at, name in enumerate(names)}
    return pl.DataFrame(rows, schema=schema, orient="row", nan_to_null=True)


def auroc(more: Floats, less: Floats) -> float:
    """Chance that a value of `more` exceeds one of `less`, ties counting half (Mann-Whitney); NaN if one is empty."""
    return float(_placements(more, less).mean()) if len(more) and len(less) else float("nan")


def _placements(more: Floats, less: Floats) -> Floats:
    """For each value of `more`, the share of `less` that it exceeds."""
    ordered = np.sort(less)
    below, up_to = (np.searchsorted(ordered, more, side=side) for side in ("left", "right"))
    return (below + up_to) / (2 * len(ordered))


def _lists_by_edit(lists: Lists, gene_shifts: pl.DataFrame, readout: str) -> dict[str, dict[str, frozenset[str]]]:
    screened = gene_shifts.filter(pl.col("role") == "edit")["edit_id"].unique().sort().to_list()
    if isinstance(lists, pl.DataFrame):
        if missing := [name for name in ("list", "gene_id") if name not in lists.columns]:
            raise InputError(f"there is no column '{missing[0]}'.", where="lists", fix="Give list, gene_id[, edit_id].")
        table = lists if "edit_id" in lists.columns else lists.join(pl.DataFrame({"edit_id": screened}), how="cross")
    else:
        named = [(name, gene) for name, genes in lists.items() for gene in genes]
        if empty := [name for name, genes in lists.items() if not genes]:
            raise InputError(f"the list '{empty[0]}' is empty.", where="lists", fix="Give it genes, or leave it out.")
        table = pl.DataFrame(named, schema=["list", "gene_id"], orient="row").join(
            pl.DataFrame({"edit_id": screened}), how="cross"
        )
    if not len(table):
        raise InputError("there is no list of genes.", where="lists", fix="Give at least one list.")
    if unknown := sorted(set(table["edit_id"]) - set(screened)):
        raise InputError(f"the edit '{unknown[0]}' was not screened.", where="lists: edit_id", fix="Use its edit_id.")
    _check_known(table, gene_shifts, readout)
    found: dict[str, dict[str, frozenset[str]]] = {}
    # Equal lists of many edits are one object, so that to compare them costs nothing.
    known: dict[frozenset[str], frozenset[str]] = {}
    for (edit_id, name), part in table.group_by("edit_id", "list", maintain_order=True):
        genes = frozenset(part["gene_id"])
        found.setdefault(str(edit_id), {})[str(name)] = known.setdefault(genes, genes)
    return found


def _check_known(table: pl.DataFrame, gene_shifts: pl.DataFrame, readout: str) -> None:
    names = set(gene_shifts["affected_gene_id"]) | set(gene_shifts.get_column("affected_symbol", default=pl.Series([])))
    for (name,), part in table.group_by("list", maintain_order=True):
        if names.isdisjoint(part["gene_id"]):
            raise InputError(
                f"no gene of the list '{name}' is among the affected genes.",
                where=f"lists, read-out {readout}",
                fix="Name genes as the screen does, or record all genes.",
            )


def _scored(pairs: pl.DataFrame, readout: str, edit_ranks: pl.DataFrame | None) -> pl.DataFrame:
    """Rows of edits with `raw`, `score` (null without a baseline) and `baseline`, by which genes are matched."""
    if readout == GENE_SHIFT:
        table = gene_folds(pairs, edit_ranks=edit_ranks)
        logs = pl.when(pl.col("control_mean") > 0).then(pl.col("control_mean").log(2))
        return table.with_columns(raw="mean_shift", score="log2_fold", baseline=logs)
    table = masked_gene_falls(pairs, edit_ranks=edit_ranks)
    return table.with_columns(raw=-pl.col("mean_change"), score="fall", baseline="control_mean")


def _edits(scored: pl.DataFrame) -> dict[str, _Edit]:
    scored = scored.filter(pl.col("score").is_not_null())
    found = {}
    for (edit_id,), part in scored.group_by("edit_id", maintain_order=True):
        edited = str(part["gene_id"][0]).split("+")
        part = part.filter(~pl.col("affected_gene_id").is_in(edited)).sort("affected_gene_id")
        symbols = part["affected_symbol"] if "affected_symbol" in part.columns else part["affected_gene_id"]
        baseline = np.stack([part["baseline"].to_numpy(), np.log2(part["n_cells"].to_numpy())], axis=1)
        width = baseline.std(axis=0)
        found[str(edit_id)] = _Edit(
            edit_id=str(edit_id),
            symbol=str(part["symbol"][0]) if len(part) else str(edit_id),
            names_a=part["affected_gene_id"].to_numpy().astype(str),
            other_names_a=symbols.fill_null("").to_numpy().astype(str),
            raw_a=part["raw"].to_numpy(),
            score_a=part["score"].to_numpy(),
            baseline_a=(baseline - baseline.mean(axis=0)) / np.where(width > 0, width, 1.0),
        )
    return found


def _contrasts(groups: Mapping[str, frozenset[str]]) -> list[tuple[str, str]]:
    names = list(groups)
    lists = [(name, other) for at, name in enumerate(names) for other in names[at + 1 :]]
    return [(name, UNLISTED) for name in names] + lists


def _masks(edit: _Edit, groups: Mapping[str, frozenset[str]], name: str, against: str) -> tuple[Flags, Flags]:
    """Genes of a list and those it is held against; a gene of two lists is in neither side of their contrast."""
    inside_a = edit.holds(groups[name])
    if against == UNLISTED:
        return inside_a, ~edit.holds(frozenset().union(*groups.values()))
    other_a = edit.holds(groups[against])
    return inside_a & ~other_a, other_a & ~inside_a


def _row(
    edit: _Edit | None,
    edit_id: str,
    groups: Mapping[str, frozenset[str]],
    name: str,
    against: str,
    others: Sequence[_Edit],
) -> tuple[tuple[object, ...], Floats]:
    n_listed = len(groups[name])
    if edit is None:
        return (edit_id, edit_id, name, against, n_listed, 0, 0, *(None,) * 5, 0, None, FEW_GENES), NONE
    inside_a, other_a = _masks(edit, groups, name, against)
    n, n_other = int(inside_a.sum()), int(other_a.sum())
    start = (edit_id, edit.symbol, name, against, n_listed, n, n_other)
    if min(n, n_other) < FEWEST_GENES:
        return (*start, *(None,) * 5, 0, None, FEW_GENES), NONE
    inside, other = edit.score_a[inside_a], edit.score_a[other_a]
    area = auroc(inside, other)
    placements = _matched_placements(edit, inside_a, other_a)
    reference = np.array([_area(one, groups, name, against) for one in others])
    reference = reference[np.isfinite(reference)]
    p = _rank_p(area, reference) if len(reference) >= FEWEST_OTHER_EDITS else None
    medians = float(np.median(inside)), float(np.median(other))
    areas = auroc(edit.raw_a[inside_a], edit.raw_a[other_a]), area, float(placements.mean())
    reason = "" if p is not None else FEW_EDITS.format(n=len(reference))
    return (*start, *medians, *areas, len(reference), p, reason), placements


def _area(edit: _Edit, groups: Mapping[str, frozenset[str]], name: str, against: str) -> float:
    key = (groups[name], groups.get(against), *groups.values())
    if key not in edit.areas:
        inside_a, other_a = _masks(edit, groups, name, against)
        enough = min(inside_a.sum(), other_a.sum()) >= FEWEST_GENES
        edit.areas[key] = auroc(edit.score_a[inside_a], edit.score_a[other_a]) if enough else float("nan")
    return edit.areas[key]


def _rank_p(area: float, reference: Floats) -> float:
    as_far = int((np.abs(reference - 0.5) >= abs(area - 0.5)).sum())
    return (1 + as_far) / (1 + len(reference))


def _matched_placements(edit: _Edit, inside_a: Flags, other_a: Flags) -> Floats:
    """For each listed gene, the share of its matched genes whose fold it exceeds."""
    from scipy.spatial import cKDTree

    k = min(MATCHED, int(other_a.sum()))
    _, near_lk = cKDTree(edit.baseline_a[other_a]).query(edit.baseline_a[inside_a], k=range(1, k + 1))
    theirs_lk, ours_l = edit.score_a[other_a][near_lk], edit.score_a[inside_a]
    placements: Floats = ((theirs_lk < ours_l[:, None]) + 0.5 * (theirs_lk == ours_l[:, None])).mean(axis=1)
    return placements


def _intervals(
    placements: Sequence[Floats], *, confidence: float, draws: int, seed: int
) -> tuple[list[float], list[float]]:
    ends = []
    for values_l in placements:
        if not len(values_l):
            ends.append((float("nan"), float("nan")))
            continue
        one = Clustered(sums_eu=values_l[None, :], counts_eu=np.ones((1, len(values_l))))
        low, high = intervals(one, confidence=confidence, draws=draws, seed=seed)
        ends.append((max(0.0, float(low[0])), min(1.0, float(high[0]))))
    return [low for low, _ in ends], [high for _, high in ends]
