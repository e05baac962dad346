"""Medians: within 1 % of the exact ones, and the same bits in whatever order the data come."""

from __future__ import annotations

from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from genescale.ingestion.medians import Histogram, MediansConfig, compute_medians, measure_medians
from genescale.platform.errors import AtlasError, SettingsError
from genescale.platform.storage import Store


def values_of(n_values: int, n_genes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, n_genes, n_values), rng.lognormal(1.0, 2.0, n_values)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_error_is_below_one_percent(scale: float) -> None:
    genes, values = values_of(20_000, 50, 0)
    medians = Histogram.of(genes, values * scale).medians(50)
    exact = np.array([np.median(values[genes == g] * scale) for g in range(50)])
    assert np.abs(medians / exact - 1).max() <= 0.01


@given(st.lists(st.floats(1e-3, 1e4), min_size=1, max_size=12))
def test_error_is_below_one_percent_for_few_values(values: list[float]) -> None:
    median = Histogram.of(np.zeros(len(values), dtype=np.int64), np.array(values)).medians(1)[0]
    assert median == pytest.approx(np.median(values), rel=0.01)


@given(st.permutations(range(6)))
def test_any_order_of_merging_gives_the_same_bits(order: list[int]) -> None:
    genes, values = values_of(600, 20, 1)
    pieces = [Histogram.of(genes[i::6], values[i::6]) for i in range(6)]
    whole = Histogram.of(genes, values)
    merged = reduce(Histogram.__add__, (pieces[i] for i in order))
    pairs = reduce(Histogram.__add__, (pieces[a] + pieces[b] for a, b in zip(order[::2], order[1::2], strict=True)))
    for other in (merged, pairs, Histogram.from_bytes(merged.to_bytes())):
        assert other.keys_k.tolist() == whole.keys_k.tolist()
        assert other.counts_k.tolist() == whole.counts_k.tolist()
        assert other.medians(20).tobytes() == whole.medians(20).tobytes()


def test_genes_without_a_value_have_no_median() -> None:
    histogram = Histogram.of(np.array([1, 1, 3]), np.array([2.0, 2.0, 5.0]))
    medians = histogram.medians(5)
    assert np.isnan(medians[[0, 2, 4]]).all()
    assert medians[[1, 3]] == pytest.approx([2.0, 5.0], rel=0.01)
    assert histogram.observations(5).tolist() == [0, 2, 0, 1, 0]
    assert np.isnan(Histogram.empty().medians(2)).all()


def test_medians_of_atlases_are_the_exact_ones(
    tmp_path: Path, ray_local: None, write_atlas: Any, counts_of: Any, local_store: Store
) -> None:
    ids = [f"ENSG{i:011d}" for i in range(1, 61)]
    first, second = counts_of(80, seed=1).toarray(), counts_of(50, seed=2).toarray()
    first[:, 40] = 0  # never seen in the first file, absent from the second: left out
    second = second[:, :40]
    # A repeated column and a version suffix: one gene, summed before its median.
    names = [*ids[:59], f"{ids[0]}.4"]
    write_atlas("a.h5ad", sparse.csr_matrix(first), genes=names, var={"feature_name": [f"S{i}" for i in range(60)]})
    write_atlas("b.h5ad", sparse.csr_matrix(second), genes=ids[:40])
    sources = [str(tmp_path / "*.h5ad")]
    found = measure_medians(sources, store=local_store, config=MediansConfig(unit_nonzeros=400, window=128, name="t"))
    v = found.vocabulary
    assert (v.window, v.name, v.special) == (128, "t", {"<pad>": 0, "<mask>": 1, "<cls>": 2, "<eos>": 3})
    assert v.gene_ids == tuple(gene for i, gene in enumerate(ids[:59]) if i != 40)
    assert (found.n_cells, found.genes_left_out, found.ok) == (130, 1, True)
    assert v.symbol_of(ids[5]) == "S5"

    summed = first[:, :59].copy()
    summed[:, 0] += first[:, 59]
    rates = [summed / first.sum(1, keepdims=True) * 1e4, second / second.sum(1, keepdims=True) * 1e4]
    for gene, median, seen in zip(v.gene_ids, v.medians, found.observations, strict=True):
        place = ids.index(gene)
        pieces = [r[:, place][r[:, place] > 0] for r in rates if place < r.shape[1]]
        assert seen == sum(piece.size for piece in pieces)
        assert median == pytest.approx(np.median(np.concatenate(pieces)), rel=0.01)

    again = compute_medians(sources[::-1], store=local_store, config=MediansConfig(window=128))
    assert again == v, "units of another size, another order: the same bits"
    few = MediansConfig(min_observations=60)
    assert len(compute_medians(sources, store=local_store, config=few).gene_ids) == int(
        (found.observations >= 60).sum()
    )


def test_a_bad_file_is_reported_or_raised(
    tmp_path: Path, ray_local: None, write_atlas: Any, counts_of: Any, local_store: Store
) -> None:
    good, bad = write_atlas("good.h5ad", counts_of(10)), write_atlas("bad.h5ad", counts_of(10).toarray())
    both = [str(good), str(bad)]
    found = measure_medians(both, store=local_store)
    assert list(found.refused) == [str(bad)]
    assert found.n_cells == 10
    assert found.vocabulary == compute_medians([str(good)], store=local_store)
    with pytest.raises(AtlasError, match="dense array"):
        compute_medians(both, store=local_store)
    with pytest.raises(AtlasError, match="none of 1 files could be read"):
        measure_medians([str(bad)], store=local_store)


@pytest.mark.parametrize("values", [{"min_observations": 0}, {"window": 4}])
def test_config_out_of_range_is_refused(values: dict[str, int]) -> None:
    with pytest.raises(SettingsError):
        MediansConfig(**values)  # type: ignore[arg-type]
