"""Searching vectors: what is found is what a plain computation in float64 finds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from genescale.platform.errors import CorpusError, IntegrityError
from genescale.serving.neighbours.answering import votes
from genescale.serving.neighbours.building import indexed
from genescale.serving.neighbours.contract import LabelVote
from genescale.serving.neighbours.spread import group_codes, most_neighbors, reference_distances, sample
from genescale.serving.neighbours.vectors import Search, VectorIndex, unit_vectors

N, WIDTH, K = 400, 24, 12


@pytest.fixture(scope="module")
def alike() -> np.ndarray:
    """Vectors that share a common part 3,000 times as long as what tells them apart, as those of encoders may."""
    rng = np.random.default_rng(4)
    common_d = 3_000 * rng.normal(size=WIDTH) / np.sqrt(WIDTH)
    return (common_d + rng.normal(size=(N, WIDTH))).astype(np.float32)


def true_distances(asked_qd: np.ndarray, vectors_nd: np.ndarray) -> np.ndarray:
    """1 - cosine for every pair, in the longest floats there are."""
    a, b = asked_qd.astype(np.longdouble), vectors_nd.astype(np.longdouble)
    cosines_qn = (a @ b.T) / np.sqrt((a * a).sum(1)[:, None] * (b * b).sum(1)[None])
    return (1 - cosines_qn).astype(np.float64)


@pytest.mark.parametrize("search", ["exact", "graph"])
def test_the_nearest_are_those_of_a_plain_computation(alike: np.ndarray, search: Search) -> None:
    index, mean_d = indexed(alike, search)
    asked_qd = alike[:40] + np.random.default_rng(5).normal(scale=0.3, size=(40, WIDTH))
    rows_qk, distances_qk = index.nearest(unit_vectors(asked_qd, what="cells") - mean_d, K)
    true_qn = true_distances(asked_qd, alike)
    assert np.array_equal(rows_qk, np.argsort(true_qn, axis=1, kind="stable")[:, :K])
    # About 1e-6, where a cosine in float32 has steps of 6e-8 and an order of its own.
    assert distances_qk.max() < 1e-5
    assert np.allclose(distances_qk, np.take_along_axis(true_qn, rows_qk, axis=1), rtol=1e-3, atol=0)


def test_an_answer_does_not_depend_on_its_company(alike: np.ndarray) -> None:
    index, mean_d = indexed(alike, "exact")
    asked_qd = unit_vectors(alike[::7], what="cells") - mean_d
    rows_qk, distances_qk = index.nearest(asked_qd, K)
    for at in range(len(asked_qd)):
        one_rows, one_distances = index.nearest(asked_qd[at : at + 1], K)
        assert np.array_equal(one_rows[0], rows_qk[at])
        assert np.array_equal(one_distances[0], distances_qk[at])


def test_equally_near_cells_come_in_the_order_of_the_reference() -> None:
    vectors_nd = np.repeat(np.eye(4, 6, dtype=np.float32), 5, axis=0)[::-1].copy()
    index, mean_d = indexed(vectors_nd, "exact")
    rows_qk, distances_qk = index.nearest(unit_vectors(vectors_nd[:1], what="cells") - mean_d, 7)
    assert rows_qk[0].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert distances_qk[0, :5] == pytest.approx(0, abs=1e-12)
    assert distances_qk[0, 5:] == pytest.approx(1, abs=1e-6)


def test_more_equal_cells_than_candidates_are_still_k() -> None:
    vectors_nd = np.vstack([np.tile([[1.0, 0, 0]], (200, 1)), np.eye(3)[1:]]).astype(np.float32)
    index, mean_d = indexed(vectors_nd, "exact")
    rows_qk, _ = index.nearest(unit_vectors(vectors_nd[-1:], what="cells") - mean_d, 100)
    assert len(set(rows_qk[0].tolist())) == 100
    assert rows_qk[0, 0] == 201


@pytest.mark.parametrize("search", ["exact", "graph"])
def test_an_index_read_back_answers_the_same(alike: np.ndarray, search: Search, tmp_path: Path) -> None:
    index, mean_d = indexed(alike, search)
    index.write(tmp_path / "vectors.faiss")
    again = VectorIndex.read(tmp_path / "vectors.faiss", search)
    assert (again.size, again.width) == (N, WIDTH)
    asked_qd = unit_vectors(alike[:5], what="cells") - mean_d
    for here, there in zip(index.nearest(asked_qd, K), again.nearest(asked_qd, K), strict=True):
        assert np.array_equal(here, there)
    with pytest.raises(IntegrityError, match="not an index for"):
        VectorIndex.read(tmp_path / "vectors.faiss", "graph" if search == "exact" else "exact")


def test_a_file_that_is_no_index_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vectors.faiss").write_bytes(b"nothing that faiss wrote")
    with pytest.raises(IntegrityError, match="no index"):
        VectorIndex.read(tmp_path / "vectors.faiss", "exact")


@pytest.mark.parametrize("wrong", [0.0, np.nan, np.inf])
def test_a_vector_without_direction_is_refused(alike: np.ndarray, wrong: float) -> None:
    vectors_nd = alike.copy()
    vectors_nd[17] = wrong
    with pytest.raises(IntegrityError, match="no direction"):
        indexed(vectors_nd, "exact")


def test_reference_distances_leave_out_the_cell_itself(alike: np.ndarray) -> None:
    index, _ = indexed(alike, "exact")
    sampled_s = sample(N, 90, seed=3)
    assert len(set(sampled_s.tolist())) == 90
    assert np.array_equal(sampled_s, sample(N, 90, seed=3))
    true_sn = true_distances(alike[sampled_s], alike)
    true_sn[np.arange(90), sampled_s] = np.inf
    expected_ks = np.sort(np.sort(true_sn, axis=1)[:, :K].T, axis=1)
    assert np.allclose(reference_distances(index, sampled_s, K), expected_ks, rtol=1e-3, atol=0)


def test_reference_distances_can_be_those_to_cells_of_other_donors(alike: np.ndarray) -> None:
    index, _ = indexed(alike, "exact")
    donors = [None if at % 5 == 4 else f"donor-{at % 5}" for at in range(N)]
    codes_n = np.arange(N) % 5
    true_nn = true_distances(alike, alike)
    true_nn[codes_n[:, None] == codes_n[None]] = np.inf
    expected_ks = np.sort(np.sort(true_nn, axis=1)[:, :K].T, axis=1)
    values = pa.chunked_array([donors[:100], donors[100:]])
    found_ks = reference_distances(index, np.arange(N), K, codes_n=group_codes(values))
    assert np.allclose(found_ks, expected_ks, rtol=1e-3, atol=0)


@pytest.mark.parametrize("search", ["exact", "graph"])
def test_the_few_cells_outside_a_large_group_are_found(search: Search) -> None:
    rng = np.random.default_rng(8)
    vectors_nd = (np.array([8.0, *[0] * 15]) + rng.normal(size=(3_000, 16))).astype(np.float32)
    few_n = np.sort(rng.choice(3_000, 30, replace=False))
    vectors_nd[few_n] *= -1
    index, mean_d = indexed(vectors_nd, search)
    asked_qd = unit_vectors(vectors_nd[:5], what="cells") - mean_d
    rows_qk, _ = index.nearest(asked_qd, 30, without_n=np.setdiff1d(np.arange(3_000), few_n))
    assert [sorted(rows) for rows in rows_qk.tolist()] == [few_n.tolist()] * 5


def test_neighbours_are_as_many_as_every_cell_has() -> None:
    def most(sizes: list[int]) -> int:
        return most_neighbors(sum(sizes), np.repeat(np.arange(len(sizes)), sizes), column="donor_id")

    assert most([200, 150, 150]) == 100
    assert most([40, 15, 15]) == 30
    with pytest.raises(CorpusError, match="only 3 of the 400 cells differ from the others in 'donor_id'"):
        most([397, 3])
    with pytest.raises(CorpusError, match="only 0 of the 5 cells"):
        most([5])
    assert most([12, 12]) == 12
    assert (most_neighbors(5, None), most_neighbors(1_000, None)) == (4, 100)


def test_votes_come_by_number_then_by_nearness() -> None:
    assert votes(["b", None, "a", "a", "b", "c"]) == [
        LabelVote(label="b", n=2, share=2 / 6),
        LabelVote(label="a", n=2, share=2 / 6),
        LabelVote(label=None, n=1, share=1 / 6),
        LabelVote(label="c", n=1, share=1 / 6),
    ]
