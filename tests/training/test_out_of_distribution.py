"""Units from elsewhere score high, units like those of training are spread evenly."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from scipy.spatial import distance
from sklearn.covariance import ledoit_wolf

from genescale.platform.errors import InputError
from genescale.training.evaluation.out_of_distribution import reference
from genescale.training.fitting.examples import gene_examples
from genescale.training.fitting.frozen import held_out_scores
from genescale.training.labels.splits import Split


def drawn(n: int, seed: int, *, width: int = 16, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of two classes of an elongated shape."""
    generator = np.random.default_rng(seed)
    codes = generator.integers(2, size=n)
    vectors = generator.normal(size=(n, width)) * np.linspace(0.1, 4, width) + shift
    vectors[:, 0] += 10 * codes
    return vectors.astype(np.float32), codes


def test_the_distance_is_mahalanobis_to_the_nearest_class() -> None:
    vectors, codes = drawn(300, 0)
    found = reference(vectors, codes).distances(vectors[:20])
    means = np.stack([vectors[codes == code].mean(axis=0) for code in (0, 1)]).astype(np.float64)
    covariance, _ = ledoit_wolf(vectors.astype(np.float64) - means[codes], assume_centered=True)
    inverse = np.linalg.inv(covariance)
    wanted = [min(distance.mahalanobis(vector, mean, inverse) for mean in means) for vector in vectors[:20]]
    assert found == pytest.approx(wanted, rel=1e-4)


def test_units_like_those_of_training_are_spread_evenly_and_others_stand_out() -> None:
    train, codes = drawn(2_000, 0)
    held_out, _ = drawn(1_000, 1)
    made = reference(train, codes, held_out)
    usual = made.scores(drawn(1_000, 2)[0])
    assert 0.45 < usual.mean() < 0.55
    assert 0.02 < (usual > 0.95).mean() < 0.09
    assert (made.scores(drawn(100, 3, shift=30.0)[0]) == 1.0).all()
    # Between two classes a unit is like neither, although it is near the middle of all.
    between = train[codes == 0].mean(axis=0, keepdims=True)
    assert made.scores(between + np.eye(16, dtype=np.float32)[:1] * 5)[0] > 0.99
    assert made.scores(between)[0] < 0.01


@pytest.mark.parametrize("held_out", [0, 60])
def test_scores_stay_honest_where_units_are_few(held_out: int) -> None:
    """With about as many units as dimensions, distances to one's own fit are far too small."""
    train, codes = drawn(60, 0, width=40)
    made = reference(train, codes, drawn(held_out, 1, width=40)[0])
    fresh = drawn(500, 2, width=40)[0]
    assert (made.scores(fresh) > 0.95).mean() < 0.15
    own = np.quantile(made.distances(train), 0.95)
    assert (made.distances(fresh) > own).mean() > 0.3


def test_numbers_have_one_middle_and_flat_directions_no_effect() -> None:
    vectors, _ = drawn(200, 0)
    vectors[:, 3] = 7.0
    made = reference(vectors)
    assert made.means_cd.shape == (1, 16)
    assert np.isfinite(made.scores(vectors)).all()
    assert made.scores(vectors + 100).tolist() == [1.0] * 200
    with pytest.raises(InputError, match="1 training units"):
        reference(vectors[:1])


def test_a_gene_has_the_mean_score_of_its_rows() -> None:
    """Twenty genes of three rows each; one test gene lies elsewhere in two of its three cells."""
    unit_r = np.repeat(np.arange(20), 3)
    codes_r = (unit_r % 2).astype(np.int64)
    codes_r[unit_r == 4] = -1
    vectors_rd = drawn(60, 5, width=6)[0]
    vectors_rd[:, 0] = 10 * np.abs(codes_r)
    far = np.flatnonzero(unit_r == 18)[:2]
    vectors_rd[far] += 100
    examples = gene_examples(
        np.arange(60), np.full(60, 9), np.arange(60), np.zeros(60, dtype=np.int64), unit_r, codes_r[::3]
    )
    split = Split(train=np.arange(12), validation=np.arange(12, 16), test=np.arange(16, 20))
    task = SimpleNamespace(
        examples=examples,
        folds=SimpleNamespace(splits=(split,)),
        specs=(SimpleNamespace(classes=("a", "b")),),
    )
    scores_u = held_out_scores(task, vectors_rd)  # type: ignore[arg-type]
    assert scores_u.shape == (4,)
    assert scores_u.argmax() == 2
    assert scores_u[2] >= 2 / 3
    assert (scores_u <= 1).all()
