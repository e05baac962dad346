"""Shifts: how far an edit moved a cell, its remaining genes, or its distance to a goal state.

Legend: `k` genes that stand in both cells, `t` tokens of a cell, `d` width of an embedding.

All are cosines of embeddings of one layer, computed in float64. `1 - cosine` is called the *shift*: 0 where nothing
moved. The formulas are those of the published in-silico perturbation (Theodoris et al., Nature 2023, and its code at
commit ff551ee); there the mode is called

    remaining_genes   `cell` without states: mean over the genes that were not edited of cos(e_edited[g], e_original[g])
    cls               `cls` without states: cos(cls_edited, cls_original)
    goal_shift        with states: cos(c_edited, S) - cos(c_original, S), c = `<cls>` or the mean over the cell's genes

and `mean_pooled` = cos(mean_edited, mean_original) is ours: the same pooled vectors, compared with each other.
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


def shift_of(cosine_value: float) -> float:
    """`1 - cosine`: 0 where nothing moved, 1 where the embedding turned by a right angle."""
    return 1.0 - cosine_value


def gene_cosines(edited_kd: np.ndarray, original_kd: np.ndarray) -> np.ndarray:
    """Cosine `(k,)` float64 of each gene's embedding before and after; rows of both hold the same gene."""
    return cosine(edited_kd, original_kd)


def remaining_genes_cosine(cosines_k: np.ndarray) -> float:
    """Mean of the per-gene cosines of the genes that were not edited (published mode `cell`)."""
    if len(cosines_k) == 0:
        raise InputError("no gene remains to compare.", fix="Edit fewer genes of the cell.")
    return float(cosines_k.mean())


def mean_pooled(embeddings_td: np.ndarray) -> np.ndarray:
    """Mean `(d,)` float64 over the genes of a cell, edited ones included (published state vectors are such means)."""
    return np.asarray(embeddings_td, dtype=np.float64).mean(axis=0)


def goal_shift(edited_d: np.ndarray, original_d: np.ndarray, goal_d: np.ndarray) -> float:
    """`cos(edited, goal) - cos(original, goal)`: positive where the edit moved the cell toward the goal state."""
    return float(cosine(edited_d, goal_d) - cosine(original_d, goal_d))


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


def checked_goal(goal: np.ndarray, width: int) -> np.ndarray:
    """The goal vector `(d,)` as float64; InputError when it has another width, a NaN, or no length."""
    vector = np.asarray(goal, dtype=np.float64)
    if vector.shape != (width,):
        raise InputError(
            f"the goal has shape {vector.shape}; the model's embeddings have {width} values.",
            fix="Use the mean of embeddings of the same model and layer.",
        )
    if not np.isfinite(vector).all() or not vector.any():
        raise InputError("the goal holds values that are not finite, or only zeros.")
    return vector
