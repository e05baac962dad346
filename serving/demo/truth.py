"""What of a planted truth a deletion screen found: pure functions of the screen's per-gene shifts and the truth.

The shift of a gene is `1 - cosine` of its contextual embedding before and after the deletion, averaged over cells.
Three questions are asked, each within one deleted regulator first, so that a regulator counts once however many targets
it has:

    raw       does its deletion move direct targets more than indirect ones, and those more than unrelated genes?
    matched   the same for the *fold*: log2 of a gene's shift over its shift under the control deletions. Any deletion
              moves all later genes up by one rank, and some genes are more easily moved than others; neither has to do
              with the regulator. Controls are deleted unrelated genes, and regulators that do not reach the gene.
    pairs     does deleting both regulators of a pair move their shared targets more than the larger single deletion?
              Both in folds: over one deleted housekeeping gene, or over two, because any second deletion moves more.

Nothing here is asserted: the sentences of a report follow from these numbers (`verdicts.py`), "not found" among them.

Legend: `e` deleted regulators, `g` genes.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import polars as pl

from genescale.platform.errors import InputError
from genescale.serving.demo.estimates import Estimate, estimate, mean, rank_auc, share_positive

Class = Literal["direct", "indirect", "unrelated"]
CLASSES: tuple[Class, ...] = ("direct", "indirect", "unrelated")
TOGETHER = "+"
COLUMNS = ("gene_id", "affected_gene_id", "n_cells", "mean_shift")
# Means over fewer cells say little.
FEWEST_CELLS = 3
CONTROL_PAIRS = 3


@dataclass(frozen=True, kw_only=True)
class ClassShift:
    """Genes of one class, under the deletion of their regulator."""

    name: Class
    shift: Estimate
    fold: Estimate
    """log2 of the shift over the same gene's shift under control deletions."""
    n_pairs: int
    """(regulator, gene) pairs."""


@dataclass(frozen=True, kw_only=True)
class Ordering:
    """Whether one class moved more than another: differences within regulators."""

    more: Class
    less: Class
    raw: Estimate
    matched: Estimate
    share_raw: float
    """Share of regulators in which the mean of `more` is the larger one."""
    share_matched: float
    auc_raw: float
    """Chance that a gene of `more` moved further than one of `less` under the same deletion, mean over regulators."""
    auc_matched: float


@dataclass(frozen=True, kw_only=True)
class PairResult:
    """Shared targets of pairs that act together, mean over pairs.

    Each is the log2 fold of the shared targets' shift over the shift of the very same genes under control deletions:
    of two housekeeping genes for `both`, of one for a single deletion. So the second deleted token counts on both
    sides, in the same kind of cells. A sum of two folds means nothing, so none is compared.
    """

    both: Estimate
    larger_single: Estimate
    beyond_larger: Estimate
    """`both` minus `larger_single`, within pairs."""
    share_beyond_larger: float
    """Share of pairs in which `both` is the larger one."""


@dataclass(frozen=True, kw_only=True)
class TruthResult:
    """What a screen says about a planted truth."""

    classes: dict[str, ClassShift]
    orderings: tuple[Ordering, ...]
    """direct above indirect, indirect above unrelated, direct above unrelated."""
    share_ordered_raw: float
    """Share of regulators with direct > indirect > unrelated."""
    share_ordered_matched: float
    n_regulators: int
    n_controls: int
    """Unrelated genes that were deleted."""
    pairs: PairResult | None
    """None when no pair of the truth was screened together with both its single deletions."""


def screen_edits(truth: Mapping[str, Any], *, controls: int = 12, pairs: bool = True) -> tuple[str, ...]:
    """What to delete, for `ScreenConfig.genes`: regulators, controls, and with `pairs` the pairs as `A+B`.

    Controls are background genes, spread evenly over the list of them; they are detected about as often as regulators.
    Joint deletions are compared with joint deletions of housekeeping genes, which with their single ones come last.
    """
    background = _unrelated_of(truth, "background")
    places = np.unique(np.linspace(0, len(background) - 1, min(controls, len(background))).astype(int))
    edits = [*truth["regulators"], *(background[at] for at in places.tolist())]
    if pairs and truth["pairs"]:
        joint = control_pairs(truth)
        edits += [TOGETHER.join(pair["regulators"]) for pair in truth["pairs"]]
        edits += [*dict.fromkeys(gene for pair in joint for gene in pair), *(TOGETHER.join(pair) for pair in joint)]
    return tuple(edits)


def control_pairs(truth: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Pairs of unrelated genes whose joint deletion is the control of a joint deletion.

    Housekeeping genes, because nearly every cell has both: a screen counts a joint deletion also where a cell has only
    one of the two, and a control that mostly deletes one gene would make every joint deletion look strong.
    """
    housekeeping = _unrelated_of(truth, "housekeeping")[: CONTROL_PAIRS + 1]
    return tuple(itertools.pairwise(housekeeping))


def _unrelated_of(truth: Mapping[str, Any], role: str) -> list[str]:
    roles = {gene["id"]: gene["role"] for gene in truth["genes"]}
    return [gene for gene in truth["unrelated"] if roles[gene] == role]


def evaluate_truth(gene_shifts: pl.DataFrame, truth: Mapping[str, Any], *, seed: int = 0) -> TruthResult:
    """Compare per-gene shifts (COLUMNS, as a screen writes them) with the truth that `genescale simulate` planted.

    Intervals are percentile bootstraps over regulators, drawn from `seed`. Raises InputError when a column is missing
    or none of the truth's regulators was deleted.
    """
    shifts = _Shifts.of(gene_shifts)
    reached = _reached(truth)
    regulators = [gene for gene in truth["regulators"] if gene in shifts.edits]
    if not regulators:
        raise InputError(
            "none of the planted regulators was deleted.", fix="Screen the genes that `screen_edits(truth)` names."
        )
    unrelated = [gene for gene in truth["unrelated"] if gene in shifts.genes]
    controls = [gene for gene in truth["unrelated"] if gene in shifts.edits]
    baseline_eg = _baseline(shifts, regulators, controls, _related(truth, reached))
    members = {
        regulator: {
            "direct": reached[regulator]["direct"],
            "indirect": reached[regulator]["indirect"],
            "unrelated": set(unrelated),
        }
        for regulator in regulators
    }
    raw = [{name: shifts.of_genes(e, members[e][name]) for name in CLASSES} for e in regulators]
    fold = [{name: shifts.of_genes(e, members[e][name], over=baseline_eg[e]) for name in CLASSES} for e in regulators]
    draws = np.random.default_rng(seed)
    orderings = tuple(_ordering(more, less, raw, fold, draws) for more, less in _COMPARED)
    return TruthResult(
        classes={name: _class_shift(name, raw, fold, draws) for name in CLASSES},
        orderings=orderings,
        share_ordered_raw=_share_ordered(raw),
        share_ordered_matched=_share_ordered(fold),
        n_regulators=len(regulators),
        n_controls=len(controls),
        pairs=_pairs(shifts, truth, draws),
    )


_COMPARED: tuple[tuple[Class, Class], ...] = (
    ("direct", "indirect"),
    ("indirect", "unrelated"),
    ("direct", "unrelated"),
)


class _Shifts:
    """The table as a matrix: shift of every gene under every edit, NaN where it was seen in too few cells."""

    def __init__(self, edits: Sequence[str], genes: Sequence[str], shift_eg: npt.NDArray[np.float64]) -> None:
        self.edits = {edit: at for at, edit in enumerate(edits)}
        self.genes = {gene: at for at, gene in enumerate(genes)}
        self.shift_eg = shift_eg

    @classmethod
    def of(cls, table: pl.DataFrame) -> _Shifts:
        if missing := [name for name in COLUMNS if name not in table.columns]:
            raise InputError(
                f"the table of gene shifts lacks {', '.join(missing)}.",
                fix="Give the gene_shifts of a screen that ran with gene_shifts = 'all'.",
            )
        kept = table.filter(pl.col("n_cells") >= FEWEST_CELLS, pl.col("mean_shift").is_finite())
        # Genes edited together are the same edit in either order.
        names = [_joint(text.split(TOGETHER)) for text in kept["gene_id"].to_list()]
        edits, edit_z = np.unique(np.array(names, dtype=str), return_inverse=True)
        genes, gene_z = np.unique(np.array(kept["affected_gene_id"].to_list(), dtype=str), return_inverse=True)
        shift_eg = np.full((len(edits), len(genes)), np.nan)
        shift_eg[edit_z, gene_z] = kept["mean_shift"].to_numpy()
        return cls(edits.tolist(), genes.tolist(), shift_eg)

    def row(self, edit: str) -> npt.NDArray[np.float64]:
        return self.shift_eg[self.edits[edit]]

    def of_genes(
        self, edit: str, genes: set[str] | Sequence[str], *, over: npt.NDArray[np.float64] | None = None
    ) -> npt.NDArray[np.float64]:
        """Shifts of these genes under the edit, or their log2 fold `over` others, without the edited genes."""
        edited = edit.split(TOGETHER)
        places = sorted(self.genes[gene] for gene in genes if gene in self.genes and gene not in edited)
        values = self.row(edit)[places]
        if over is not None:
            # Shifts are 1 - cosine, so never negative but for rounding: where one is not above 0 there is no fold.
            known = (values > 0) & (over[places] > 0)
            values = np.log2(values, out=np.full(len(places), np.nan), where=known) - np.log2(
                over[places], out=np.full(len(places), np.nan), where=known
            )
        return values[np.isfinite(values)]


def _reached(truth: Mapping[str, Any]) -> dict[str, dict[str, set[str]]]:
    """Direct and indirect targets of each regulator and mediator; what is both is direct."""
    drivers = [*truth["regulators"], *truth.get("mediators", [])]
    reached: dict[str, dict[str, set[str]]] = {gene: {"direct": set(), "indirect": set()} for gene in drivers}
    for edge in truth["edges"]:
        reached[edge["regulator"]][edge["class"]].add(edge["target"])
    for of_driver in reached.values():
        of_driver["indirect"] -= of_driver["direct"]
    return reached


def _related(truth: Mapping[str, Any], reached: Mapping[str, Mapping[str, set[str]]]) -> dict[str, set[str]]:
    """Genes that a regulator has to do with: its targets, itself, and all that of the partner it acts together with."""
    related = {gene: {gene}.union(*targets.values()) for gene, targets in reached.items()}
    own = {gene: set(genes) for gene, genes in related.items()}
    for pair in truth["pairs"]:
        first, second = pair["regulators"]
        shared = {*pair["targets"], *own[first], *own[second]}
        related[first] |= shared
        related[second] |= shared
    return related


def _baseline(
    shifts: _Shifts, regulators: Sequence[str], controls: Sequence[str], related: Mapping[str, set[str]]
) -> dict[str, npt.NDArray[np.float64]]:
    """Per regulator, the shift `(g,)` each gene has under the other deletions that have nothing to do with it."""
    names = list(shifts.genes)
    unrelated_eg = {
        edit: np.where([gene in related.get(edit, set()) for gene in names], np.nan, shifts.row(edit))
        for edit in (*regulators, *controls)
    }
    baseline = {}
    for regulator in regulators:
        # A partner's deletion is no control for this regulator's targets.
        others = [edit for edit in unrelated_eg if edit != regulator]
        baseline[regulator] = _column_means(np.array([unrelated_eg[edit] for edit in others]), len(names))
    return baseline


def _column_means(values_eg: npt.NDArray[np.float64], n_genes: int) -> npt.NDArray[np.float64]:
    """Mean of each column over its known values; NaN where none is known."""
    if not len(values_eg):
        return np.full(n_genes, np.nan)
    known = np.isfinite(values_eg)
    count = known.sum(axis=0)
    total = np.where(known, values_eg, 0.0).sum(axis=0)
    return np.divide(total, count, out=np.full(n_genes, np.nan), where=count > 0)


_ByClass = dict[Class, npt.NDArray[np.float64]]


def _class_shift(name: Class, raw: list[_ByClass], fold: list[_ByClass], draws: np.random.Generator) -> ClassShift:
    return ClassShift(
        name=name,
        shift=estimate([mean(one[name]) for one in raw], draws),
        fold=estimate([mean(one[name]) for one in fold], draws),
        n_pairs=sum(len(one[name]) for one in raw),
    )


def _ordering(
    more: Class, less: Class, raw: list[_ByClass], fold: list[_ByClass], draws: np.random.Generator
) -> Ordering:
    def differences(of: list[_ByClass]) -> list[float]:
        return [mean(one[more]) - mean(one[less]) for one in of]

    return Ordering(
        more=more,
        less=less,
        raw=estimate(differences(raw), draws),
        matched=estimate(differences(fold), draws),
        share_raw=share_positive(differences(raw)),
        share_matched=share_positive(differences(fold)),
        auc_raw=mean(np.array([rank_auc(one[more], one[less]) for one in raw])),
        auc_matched=mean(np.array([rank_auc(one[more], one[less]) for one in fold])),
    )


def _share_ordered(of: list[_ByClass]) -> float:
    means = np.array([[mean(one[name]) for name in CLASSES] for one in of])
    known = means[np.isfinite(means).all(axis=1)]
    return float((np.diff(known, axis=1) < 0).all(axis=1).mean()) if len(known) else float("nan")


def _pairs(shifts: _Shifts, truth: Mapping[str, Any], draws: np.random.Generator) -> PairResult | None:
    """Pairs that were deleted together and singly; None when none was, or no control pair was.

    A joint deletion is also recorded in cells that have only one of the two genes; a shared target is seldom on there.
    """

    def screened(pair: Sequence[str]) -> bool:
        return all(edit in shifts.edits for edit in (_joint(pair), *pair))

    pairs = [pair for pair in truth["pairs"] if screened(pair["regulators"])]
    controls = [pair for pair in control_pairs(truth) if screened(pair)]
    if not pairs or not controls:
        return None
    n_genes = len(shifts.genes)
    singles = dict.fromkeys(gene for pair in controls for gene in pair)
    one_g = _column_means(np.array([shifts.row(gene) for gene in singles]), n_genes)
    two_g = _column_means(np.array([shifts.row(_joint(pair)) for pair in controls]), n_genes)

    def folds(pair: Mapping[str, Any]) -> list[float]:
        singly = [mean(shifts.of_genes(gene, pair["targets"], over=one_g)) for gene in pair["regulators"]]
        return [mean(shifts.of_genes(_joint(pair["regulators"]), pair["targets"], over=two_g)), *singly]

    both, first, second = np.array([folds(pair) for pair in pairs]).T
    larger = np.maximum(first, second)
    return PairResult(
        both=estimate(both.tolist(), draws),
        larger_single=estimate(larger.tolist(), draws),
        beyond_larger=estimate((both - larger).tolist(), draws),
        share_beyond_larger=share_positive((both - larger).tolist()),
    )


def _joint(genes: Sequence[str]) -> str:
    return TOGETHER.join(sorted(genes))
