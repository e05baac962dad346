"""Shifts: how far an edit moved a cell or its remaining genes.

Legend: `k` genes that stand in both cells, `d` width of an embedding.

All are cosines of embeddings of one layer. `1 - cosine` is called the *shift*: 0 where nothing moved, 1 where an
embedding turned by a right angle. The formulas are those of the published in-silico perturbation (Theodoris et al.,
Nature 2023, and its code at commit ff551ee); there the measure is called

    remaining_genes   `cell` without states: mean over the genes that were not edited of cos(e_edited[g], e_original[g])
    cls               `cls` without states: cos(cls_edited, cls_original)

and `mean_pooled` = cos(mean_edited, mean_original) is ours: the means over the genes of the cell, edited ones included,
as state vectors are made of (movements toward states: `readouts.states`).
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from genescale.platform.errors import InputError, did_you_mean
from genescale.platform.vocabulary import Vocabulary

Measure = Literal["remaining_genes", "cls", "mean_pooled"]
MEASURES: tuple[Measure, ...] = get_args(Measure)


def cosine(a_d: np.ndarray, b_d: np.ndarray) -> np.ndarray:
    """Cosine along the last axis, in float64; shapes broadcast. NaN where a vector has no length."""
    a, b = np.asarray(a_d, dtype=np.float64), np.asarray(b_d, dtype=np.float64)
    lengths = np.sqrt((a * a).sum(axis=-1) * (b * b).sum(axis=-1))
    dot = (a * b).sum(axis=-1)
    quotient = np.divide(dot, lengths, out=np.full(np.shape(dot), np.nan), where=lengths > 0)
    return np.clip(quotient, -1.0, 1.0)


def gene_cosines(edited_kd: np.ndarray, original_kd: np.ndarray) -> np.ndarray:
    """Cosine `(k,)` float64 of each gene's embedding before and after; rows of both hold the same gene."""
    return cosine(edited_kd, original_kd)


def check_measure(measure: str, vocabulary: Vocabulary) -> None:
    """InputError unless `measure` is one of MEASURES and cells of this vocabulary have what it compares."""
    if measure not in MEASURES:
        fix = did_you_mean(measure, MEASURES) or f"Use one of {', '.join(MEASURES)}."
        raise InputError(f"'{measure}' is no measure of a shift.", fix=fix)
    if measure == "cls" and vocabulary.cls is None:
        raise InputError(
            "the measure 'cls' needs a model whose cells begin with <cls>.",
            where=vocabulary.name,
            fix="Use 'remaining_genes' or 'mean_pooled'.",
        )
