"""Sentences about a planted truth that follow from the numbers of `evaluate_truth`, and say when nothing was found."""

from __future__ import annotations

import math

from genescale.serving.demo.estimates import FEWEST, Estimate
from genescale.serving.demo.truth import Ordering, PairResult, TruthResult

_NAMES = {"direct": "direct targets", "indirect": "indirect targets", "unrelated": "unrelated genes"}


def headline(result: TruthResult) -> str:
    """One line for a summary table."""
    steps = result.orderings[:2]
    if all(step.raw.above_zero for step in steps):
        how = "found"
    elif all(step.matched.above_zero for step in steps):
        how = "found against control deletions only"
    elif any(step.raw.above_zero or step.matched.above_zero for step in steps):
        how = "found in part"
    else:
        how = "not found"
    return (
        f"direct > indirect > unrelated: {how} "
        f"({_percent(result.share_ordered_raw)} of {result.n_regulators} regulators, "
        f"{_percent(result.share_ordered_matched)} against controls)"
    )


def verdicts(result: TruthResult) -> tuple[str, ...]:
    """What the report may say, a sentence for each question."""
    sentences = [sentence for ordering in result.orderings for sentence in _of_ordering(ordering, result)]
    return (*sentences, *(_of_pairs(result.pairs) if result.pairs else ()))


def _of_ordering(ordering: Ordering, result: TruthResult) -> tuple[str, str]:
    claim = f"deleting a regulator moves its {_NAMES[ordering.more]} more than {_NAMES[ordering.less]}"
    controls = f"the deletion of {result.n_controls} unrelated genes and of other regulators"
    return (
        f"{_outcome(ordering.raw)}: {claim}: difference in shift {_interval(ordering.raw)}, above 0 for "
        f"{_percent(ordering.share_raw)} of {ordering.raw.n} regulators, rank AUC {_number(ordering.auc_raw)}.",
        f"{_outcome(ordering.matched)}, compared with {controls}: {claim}: difference in log2 fold of the shift "
        f"{_interval(ordering.matched)}, above 0 for {_percent(ordering.share_matched)} of {ordering.matched.n} "
        f"regulators, rank AUC {_number(ordering.auc_matched)}.",
    )


def _of_pairs(pairs: PairResult) -> tuple[str, str]:
    return (
        f"{_outcome(pairs.both)}: deleting both regulators of a pair moves their shared targets more than "
        f"deleting two unrelated genes: log2 fold of the shift {_interval(pairs.both)}, over {pairs.both.n} pairs.",
        f"{_outcome(pairs.beyond_larger)}: deleting both regulators of a pair moves their shared targets more than the "
        f"stronger single deletion: difference {_interval(pairs.beyond_larger)}, above 0 for "
        f"{_percent(pairs.share_beyond_larger)} of {pairs.beyond_larger.n} pairs.",
    )


def _outcome(difference: Estimate) -> str:
    if difference.n < FEWEST:
        return f"Not tested (fewer than {FEWEST} to compare)"
    if difference.above_zero:
        return "Found"
    return "The opposite was found" if difference.below_zero else "Not found"


def _interval(estimate: Estimate) -> str:
    if math.isnan(estimate.mean):
        return "unknown"
    return f"{estimate.mean:+.4f} (95 % interval {estimate.low:+.4f} to {estimate.high:+.4f})"


def _percent(share: float) -> str:
    return "an unknown share" if math.isnan(share) else f"{100 * share:.0f} %"


def _number(value: float) -> str:
    return "unknown" if math.isnan(value) else f"{value:.2f}"
