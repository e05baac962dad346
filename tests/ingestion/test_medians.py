"""Medians: within 1 % of the exact ones, and the same bits in whatever order the data come."""

from __future__ import annotations

from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from genescale.ingestion.histograms import BINS, Histogram
from genescale.ingestion.median_files import read_histogram, write_beside
from genescale.ingestion.medians import MediansConfig, compute_medians, measure_medians
from genescale.platform.errors import AtlasError, IntegrityError, SettingsError
from genescale.platform.storage import Store


def values_of(n_values: int, n_genes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, n_genes, n_values), rng.lognormal(1.0, 2.0, n_values)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_error_is_below_eight_in_a_thousand(scale: float) -> None:
    genes, values = values_of(20_000, 50, 0)
    medians = Histogram.of(genes, values * scale).medians(50)
    exact = np.array([np.median(values[genes == g] * scale) for g in range(50)])
    assert np.abs(medians / exact - 1).max() <= 0.008


@settings(deadline=None)
@given(st.lists(st.floats(1e-3, 1e4), min_size=1, max_size=12))
def test_error_is_below_one_percent_for_few_values(values: list[float]) -> None:
    median = Histogram.of(np.zeros(len(values), dtype=np.int64), np.array(values)).medians(1)[0]
    assert median == pytest.approx(np.median(values), rel=0.01)


@settings(deadline=None)
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
    good, bad = write_atlas("good.h5ad", counts_of(10)), write_atlas("bad.h5ad", counts_of(10) * 0.37)
    both = [str(good), str(bad)]
    found = measure_medians(both, store=local_store)
    assert list(found.refused) == [str(bad)]
    assert found.n_cells == 10
    assert found.vocabulary == compute_medians([str(good)], store=local_store)
    with pytest.raises(AtlasError, match=r"bad\.h5ad.*not whole numbers|bad\.h5ad.*fractional"):
        compute_medians(both, store=local_store)
    with pytest.raises(AtlasError, match="none of 1 files could be read"):
        measure_medians([str(bad)], store=local_store)


def test_a_fault_deep_inside_leaves_the_whole_file_out(
    tmp_path: Path, ray_local: None, write_atlas: Any, counts_of: Any, local_store: Store
) -> None:
    """The first units of the file are good and counted: nothing of them may stay."""
    counts = counts_of(3_000, seed=3).tolil()
    counts[2_997, 5] = -4
    good, bad = write_atlas("good.h5ad", counts_of(30, seed=4)), write_atlas("bad.h5ad", counts.tocsr())
    config = MediansConfig(unit_nonzeros=2_000, counts_slot="X")
    found = measure_medians([str(bad), str(good)], store=local_store, config=config)
    assert list(found.refused) == [str(bad)]
    assert (found.n_cells, found.observations.max()) == (30, 30)


def test_exact_medians_are_exact(
    tmp_path: Path, ray_local: None, write_atlas: Any, counts_of: Any, local_store: Store
) -> None:
    first, second = counts_of(90, seed=5), counts_of(61, seed=6)
    write_atlas("a.h5ad", first), write_atlas("b.h5ad", second)
    config = MediansConfig(exact=True, unit_nonzeros=700)
    v = compute_medians([str(tmp_path / "*.h5ad")], store=local_store, config=config)
    dense = np.concatenate([first.toarray(), second.toarray()]).astype(np.float64)
    rates = dense / dense.sum(1, keepdims=True) * 1e4
    exact = [np.median(rates[:, g][rates[:, g] > 0]) for g in range(60)]
    assert v.medians.tolist() == exact


@settings(deadline=None)
@given(st.lists(st.sampled_from([0.5, 0.501, 0.6, 1.0, 2.0, 2.001, 900.0]), min_size=1, max_size=9))
def test_exact_medians_of_any_values(values: list[float]) -> None:
    """One gene between two others: the two middle values may share a bin, or lie in bins far apart."""
    genes = np.repeat([0, 2, 1], [3, len(values), 2])
    all_values = np.array([1.0, 5.0, 7.0, *values, 3.0, 4.0])
    histogram = Histogram.of(genes, all_values)
    bins = histogram.median_bins(4)
    own = all_values.astype(np.float32).view(np.int32) >> 16
    chosen = (own == bins[genes, 0]) | (own == bins[genes, 1])
    medians = histogram.exact_medians(4, genes[chosen], all_values[chosen])
    assert medians[:3].tolist() == [5.0, 3.5, np.median(values)]
    assert np.isnan(medians[3])
    with pytest.raises(IntegrityError, match="second pass"):
        histogram.exact_medians(4, genes[chosen][1:], all_values[chosen][1:])


def test_genes_with_few_observations_have_no_median_or_the_fallback(
    tmp_path: Path, ray_local: None, write_atlas: Any, counts_of: Any, local_store: Store
) -> None:
    from genescale.platform.vocabulary import Vocabulary

    counts = counts_of(80, seed=1).toarray()
    counts[20:, 50], counts[5:, 51] = 0, 0
    counts[:, 52] = 0
    counts[:20, 50], counts[:5, 51] = 3, 3
    ids = [f"ENSG{i:011d}" for i in range(1, 61)]
    source = [str(write_atlas("a.h5ad", sparse.csr_matrix(counts)))]
    found = measure_medians(source, store=local_store, config=MediansConfig(min_observations_for_median=20))
    v = found.vocabulary
    assert ids[52] not in v.gene_ids
    rows = {row["gene_id"]: row for row in found.table().to_pylist()}
    assert (rows[ids[50]]["observations"], rows[ids[50]]["origin"]) == (20, "measured")
    assert rows[ids[51]] == {
        "gene_id": ids[51], "symbol": "", "observations": 5, "median": None, "origin": "none"
    }  # fmt: skip
    assert np.isnan(v.medians_t[v.token(ids[51])])
    assert any("1 genes have no median" in warning for warning in found.warnings)

    given = Vocabulary.build(ids, np.arange(1.0, 61.0))
    local_store.write(str(tmp_path / "given.parquet"), given.to_parquet_bytes())
    config = MediansConfig(min_observations_for_median=20, fallback=str(tmp_path / "given.parquet"))
    found = measure_medians(source, store=local_store, config=config)
    rows = {row["gene_id"]: row for row in found.table().to_pylist()}
    assert (rows[ids[51]]["median"], rows[ids[51]]["origin"]) == (52.0, "fallback")
    assert any("fallback" in warning for warning in found.warnings)

    with pytest.raises(AtlasError, match="none has a median"):
        measure_medians(source, store=local_store, config=MediansConfig(min_observations_for_median=81))


def test_a_saved_histogram_grows_with_a_new_atlas(
    tmp_path: Path, ray_local: None, write_atlas: Any, counts_of: Any, local_store: Store
) -> None:
    """Adding an atlas later gives the same bits as reading both at once; the same atlas twice is refused."""
    ids = [f"ENSG{i:011d}" for i in range(1, 61)]
    a = write_atlas(
        "a.h5ad", counts_of(70, seed=1)[:, :50], genes=ids[:50], var={"feature_name": [f"S{i}" for i in range(50)]}
    )
    b = write_atlas("b.h5ad", counts_of(40, seed=2)[:, 8:], genes=ids[8:])
    both = measure_medians([str(a), str(b)], store=local_store)
    alone = measure_medians([str(a)], store=local_store)
    written = write_beside(alone, str(tmp_path / "v.parquet"), local_store)
    config = MediansConfig(earlier=(written["histogram"],))
    grown = measure_medians([str(b)], store=local_store, config=config)
    assert grown.vocabulary == both.vocabulary
    assert grown.table() == both.table()
    assert (grown.n_cells, sorted(grown.sources)) == (110, sorted(both.sources))
    again = write_beside(grown, str(tmp_path / "w.parquet"), local_store)
    at_once = write_beside(both, str(tmp_path / "u.parquet"), local_store)
    assert local_store.read(again["histogram"]) == local_store.read(at_once["histogram"])
    with pytest.raises(SettingsError, match="holds this file already"):
        measure_medians([str(a)], store=local_store, config=config)
    data = local_store.read(written["histogram"])
    local_store.write(written["histogram"], data[:-40])
    with pytest.raises(IntegrityError, match="no saved histogram"):
        read_histogram(written["histogram"], local_store)


def test_cells_that_ingestion_leaves_out_do_not_count(
    tmp_path: Path, ray_local: None, write_atlas: Any, counts_of: Any, local_store: Store
) -> None:
    counts = counts_of(60, seed=7)
    marks = np.arange(60) % 3 > 0
    source = write_atlas("a.h5ad", counts, obs={"is_primary_data": marks})
    alone = write_atlas("b.h5ad", counts[np.flatnonzero(marks)])
    found = measure_medians([str(source)], store=local_store)
    assert (found.n_cells, found.cells_left_out) == (40, 20)
    assert found.vocabulary == compute_medians([str(alone)], store=local_store)


def test_deep_and_shallow_cells_together() -> None:
    """Values far outside the bins that the first block of a file suggests are counted all the same."""
    from genescale.ingestion.annotation.genes import GeneMap
    from genescale.ingestion.atlas import Rows
    from genescale.ingestion.histograms import Counter
    from genescale.platform.vocabulary import Vocabulary

    rng, n_genes = np.random.default_rng(0), 40
    vocabulary = Vocabulary.build([f"ENSG{i:011d}" for i in range(n_genes)], np.full(n_genes, np.nan))
    targets = rng.permutation(vocabulary.token_ids)
    targets[3] = targets[4]
    fates = np.zeros(n_genes, np.uint8)
    counted = np.arange(n_genes) != 7
    genes = GeneMap("index", targets, fates, counted, np.zeros(n_genes, bool), 0)
    counter, parts = Counter(genes, vocabulary), []
    for scale in (1, 10_000, 10**8):
        dense = rng.poisson(0.5, (30, n_genes)) * rng.integers(1, scale + 1, (30, n_genes))
        cells = sparse.csr_matrix(dense)
        rows = Rows(cells.indptr.astype(np.int64), cells.indices, cells.data)
        sums = counter.sums(rows)
        assert sums.totals_n.tolist() == dense[:, counted].sum(1).tolist()
        counter.add(rows, sums, np.ones(30, dtype=bool))
        by_gene = np.zeros((30, n_genes))
        np.add.at(by_gene.T, targets - 4, dense.T.astype(float))
        parts.append(by_gene / np.maximum(dense[:, counted].sum(1, keepdims=True), 1) * 1e4)
    rates = np.concatenate(parts)
    n, g = np.nonzero(rates)
    expected, found = Histogram.of(g, rates[n, g]), counter.histogram()
    assert found.keys_k.tolist() == expected.keys_k.tolist()
    assert found.counts_k.tolist() == expected.counts_k.tolist()
    assert int(found.counts_k.sum()) == n.size
    assert BINS > 0


@pytest.mark.parametrize(
    "values",
    [{"min_observations": 0}, {"min_observations_for_median": 0}, {"window": 4}, {"exact": True, "earlier": ("a",)}],
)
def test_config_out_of_range_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        MediansConfig(**values)  # type: ignore[arg-type]
