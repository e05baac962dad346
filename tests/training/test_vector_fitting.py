"""Fitting heads on cached vectors: schedules, weights, stopping, several targets, numbers, depth, neighbours."""

from __future__ import annotations

import numpy as np
import pytest

from genescale.training.fitting.config import FinetuneConfig
from genescale.training.fitting.epochs import learning_rate_factor
from genescale.training.fitting.examples import Examples, cell_examples
from genescale.training.fitting.vector_fitting import fit_vectors
from genescale.training.heads.spec import HeadSpec


def test_learning_rate_rises_then_falls() -> None:
    for schedule, last in (("linear", 0.0), ("cosine", 0.0), ("constant", 1.0)):
        config = FinetuneConfig(schedule=schedule, warmup_fraction=0.1)  # type: ignore[arg-type]
        rates = [learning_rate_factor(step, 100, config) for step in range(101)]
        assert rates[0] == pytest.approx(1 / 11)
        assert rates[:11] == sorted(set(rates[:11]))
        assert max(rates) == rates[10] == 1.0
        assert rates[10:] == sorted(rates[10:], reverse=True)
        assert rates[100] == pytest.approx(last)


def planted_vectors(n: int, rare: float, seed: int) -> tuple[np.ndarray, Examples]:
    """Two overlapping classes, the second one rare."""
    generator = np.random.default_rng(seed)
    codes_n = (generator.random(n) < rare).astype(np.int64)
    cells_nd = generator.normal(size=(n, 4)) + codes_n[:, None] * np.array([1.2, 0, 0, 0])
    return cells_nd.astype(np.float32), cells_of(codes_n)


def cells_of(*targets: np.ndarray) -> Examples:
    """One row for each cell, with these targets."""
    n = len(targets[0])
    return cell_examples(np.arange(n), np.full(n, 10), targets)


def test_balanced_weights_find_more_of_a_rare_class() -> None:
    spec = HeadSpec(classes=("a", "b"), label="x", width=4, layer="last", pooling="cls", dropout=0.0)
    train, held_out = planted_vectors(1000, 0.08, 0), planted_vectors(1000, 0.08, 1)
    found = {}
    for weights in ("none", "balanced"):
        config = FinetuneConfig(epochs=10, class_weights=weights)  # type: ignore[arg-type]
        fitted = fit_vectors([spec], *train, *held_out, config)
        predicted_n = fitted.head.answer(held_out[0]).argmax(axis=1)
        found[weights] = predicted_n[held_out[1].targets[0] == 1].mean()
    assert found["balanced"] > found["none"] + 0.3


def test_early_stopping_waits_for_its_patience() -> None:
    """Labels without any signal: validation cannot go on improving for 200 epochs."""
    spec = HeadSpec(classes=("a", "b"), label="x", width=4, layer="last", pooling="cls")
    train, held_out = planted_vectors(60, 0.5, 0), planted_vectors(60, 0.5, 1)
    fitted = fit_vectors([spec], *train, *held_out, FinetuneConfig(epochs=200, patience=4))
    assert len(fitted.history) == fitted.best_epoch + 4
    assert len(fit_vectors([spec], *train, *held_out, FinetuneConfig(epochs=30, patience=0)).history) == 30
