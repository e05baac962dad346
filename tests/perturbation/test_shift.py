"""Shifts: cosines against hand-computed ones, and measures that a model cannot give."""

from __future__ import annotations

import math

import numpy as np
import pytest

from genescale.perturbation.readouts import shift
from genescale.platform.errors import InputError
from genescale.training.embedder import Embedder


def test_cosine_is_row_by_row_in_float64() -> None:
    a = np.array([[1, 0], [1, 1], [3, 4]], dtype=np.float32)
    b = np.array([[0, 2], [2, 2], [4, 3]], dtype=np.float32)
    values = shift.cosine(a, b)
    assert values.dtype == np.float64
    np.testing.assert_allclose(values, [0.0, 1.0, 24 / 25], atol=1e-15)


def test_cosine_does_not_lose_small_shifts_in_float32() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(size=768)
    aside = rng.normal(size=768)
    aside -= base * (aside @ base) / (base @ base)
    turned = base + 1e-4 * aside * np.linalg.norm(base) / np.linalg.norm(aside)
    # Turned by an angle of 1e-4, the cosine is 1 - 5e-9: below what float32 can tell from 1.
    assert 1 - shift.cosine(base, turned) == pytest.approx(5e-9, rel=1e-6)


def test_cosine_of_equal_vectors_never_exceeds_one() -> None:
    a = np.random.default_rng(1).normal(size=(1000, 7))
    assert shift.cosine(a, a).max() <= 1.0


def test_cosine_of_a_vector_without_length_is_nan() -> None:
    assert math.isnan(shift.cosine(np.zeros(3), np.ones(3)))


def test_genes_are_compared_one_by_one() -> None:
    edited, original = np.array([[1.0, 0], [0, 1]]), np.array([[1.0, 0], [1, 0]])
    assert shift.gene_cosines(edited, original).tolist() == [1.0, 0.0]


def test_measures_are_a_closed_set_and_cls_needs_the_token(framed: Embedder, bare: Embedder) -> None:
    for measure in shift.MEASURES:
        shift.check_measure(measure, framed.vocabulary)
    with pytest.raises(InputError, match="Did you mean 'mean_pooled'"):
        shift.check_measure("mean_poled", framed.vocabulary)
    with pytest.raises(InputError, match="begin with <cls>"):
        shift.check_measure("cls", bare.vocabulary)
