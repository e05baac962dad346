"""Sentences about a planted truth that follow from the numbers of `evaluate_truth`, and say when nothing was found."""

from __future__ import annotations

import math

from genescale.serving.demo.estimates import FEWEST, Estimate
from genescale.serving.demo.truth import Ordering, PairResult, TruthResult

_NAMES = {"direct": "direct targets", "indirect": "indirect targets", "unrelated": "unrelated genes"}


# Folds (log2) up to here come about without any learning. A regulator's targets stand mostly in cells in which it is
# on; such cells hold more genes, and in a longer cell every deletion moves each gene less. In untrained encoders on
# simulated atlases (ten seeds) the lower ends of the intervals reached 0.11: a finding has to lie wholly above this.
MARGIN = 0.2


def headline(result: TruthResult) -> str:
    """One line for a summary table. Only what holds against control deletions counts."""
    steps = [_outcome(step.matched) for step in result.orderings[:2]]
    how = "found" if set(steps) == {FOUND} else "found in part" if FOUND in steps else "not found"
    return (
        f"direct > indirect > unrelated: {how} "
        f"({_percent(result.share_ordered_matched)} of {result.n_regulators} regulators against controls, "
        f"{_percent(result.share_ordered_raw)} without)"
    )


def verdicts(result: TruthResult) -> tuple[str, ...]:
    """What the report may say, a sentence for each question."""
    sentences = [_of_ordering(ordering, result) for ordering in result.orderings]
    return (*sentences, *([_of_pairs(result.pairs)] if result.pairs else []))


def _of_ordering(ordering: Ordering, result: TruthResult) -> str:
    return (
        f"{_outcome(ordering.matched)}: deleting a regulator moves its {_NAMES[ordering.more]} more than "
        f"{_NAMES[ordering.less]}. Compared with the deletion of {result.n_controls} unrelated genes and of other "
        f"regulators, the difference in log2 fold of the shift is {_interval(ordering.matched)}, above 0 for "
        f"{_percent(ordering.share_matched)} of {ordering.matched.n} regulators, rank AUC "
        f"{_number(ordering.auc_matched)}. Without controls, the difference in shift is {_interval(ordering.raw)}."
    )


def _of_pairs(pairs: PairResult) -> str:
    # That a joint deletion moves more than that of two unrelated genes is no finding: untrained encoders do the same.
    return (
        f"{_outcome(pairs.beyond_larger)}: deleting both regulators of a pair moves their shared targets more than the "
        f"stronger single deletion, each compared with as many unrelated genes: difference in log2 fold "
        f"{_interval(pairs.beyond_larger)}, above 0 for {_percent(pairs.share_beyond_larger)} of "
        f"{pairs.beyond_larger.n} pairs."
    )


FOUND = "Found"


def _outcome(fold: Estimate) -> str:
    if fold.n < FEWEST:
        return f"Not tested (fewer than {FEWEST} to compare)"
    if fold.low > MARGIN:
        return FOUND
    if fold.high < -MARGIN:
        return "The opposite was found"
    return "Not found (no larger than without learning)" if fold.above_zero else "Not found"


def _interval(estimate: Estimate) -> str:
    if math.isnan(estimate.mean):
        return "unknown"
    return f"{estimate.mean:+.4f} (95 % interval {estimate.low:+.4f} to {estimate.high:+.4f})"


def _percent(share: float) -> str:
    return "an unknown share" if math.isnan(share) else f"{100 * share:.0f} %"


def _number(value: float) -> str:
    return "unknown" if math.isnan(value) else f"{value:.2f}"
