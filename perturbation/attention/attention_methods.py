"""How an analysis of attention was done, for the foot of its page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from genescale.ingestion.reports.report_figures import escaped
from genescale.perturbation.attention.list_tests import LEAST_UNITS
from genescale.perturbation.attention.matching import DETECTION_STEP, EXPRESSION_STEP, RANK_STEP
from genescale.platform.progress import clock
from genescale.training.evaluation.masked_genes import RANK_EDGES

if TYPE_CHECKING:
    from genescale.perturbation.attention.corpus_attention import AttentionResult


def methods(result: AttentionResult) -> str:
    """A list of definitions; every number on the page is defined in it."""
    config = result.config
    left_out = "; ".join(f"{count:,} {reason}" for reason, count in result.left_out.items())
    items = [
        ("Cells", f"{result.n_cells:,} looked at{f' ({left_out})' if left_out else ''}; seed {config.seed}."),
        (
            "Attention",
            "Softmax weights of every layer and head in float32. Genes look and are looked at; special tokens only "
            "receive. What a gene receives is the mean weight that the other genes of the cell give it, its own left "
            "out, times the tokens of the cell: 1 is what a head that looks at all tokens alike gives. Means over "
            "cells count every donor alike.",
        ),
        (
            "Matched genes",
            f"For each gene of a list in a cell, the {config.controls} nearest genes of the same cell that are not in "
            f"the list, by rank (steps of {RANK_STEP:.0%}), corpus median (steps of e^{EXPRESSION_STEP:g}) and "
            f"detection rate (steps of {DETECTION_STEP:g} in the arcsine of its root), squared steps added.",
        ),
        (
            "Tests",
            "Over genes: Wilcoxon signed-rank, two-sided, of the share of matched genes that receive less than the "
            f"gene, averaged over its cells, against one half; genes in {config.min_cells} cells at least. Over "
            f"donors: the same of the donors' means. Both need {LEAST_UNITS} units. The larger p-value counts "
            "(intersection-union); q is Benjamini and Hochberg's over all heads of all layers of a list. Tests over "
            "cells are not made: one gene differs from its matched genes in every cell alike, whatever the list.",
        ),
        (
            "Intervals",
            f"{config.confidence:.0%}, of the ratio of sums, expanded percentiles of {config.draws:,} resamples "
            "of the genes of the list (Student's t below eight).",
        ),
        (
            "Ranks",
            f"Bins end at {', '.join(f'{edge:,}' for edge in RANK_EDGES[1:])}. Width: exp of the entropy of a gene's "
            "row of weights, over the tokens of the cell. Heads differ: generalised Jensen-Shannon divergence of the "
            "heads' profiles over rank bins (Lin 1991), each over uniform attention.",
        ),
        (
            "Caution",
            "Attention says where a layer reads, not what a gene causes: values, the residual stream and later layers "
            "decide what becomes of it. Hold a finding against deletions (`genescale perturb screen`).",
        ),
        ("Provenance", "; ".join(f"{name} {value}" for name, value in result.provenance.items() if value)),
        ("Time", f"{clock(result.seconds)} (m:ss)"),
    ]
    listed = "".join(f"<dt>{escaped(name)}</dt><dd>{escaped(text)}</dd>" for name, text in items)
    return f"<h2>How it was measured</h2><dl>{listed}</dl>"
