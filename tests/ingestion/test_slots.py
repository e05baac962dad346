"""Where the counts are found: places are looked at in a fixed order, and every refusal says what each looked like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import sparse

from genescale.ingestion.counts import checked, exact_limit, refuse_equal_sums
from genescale.ingestion.opening import open_atlas
from genescale.platform.errors import AtlasError, NotCountsError
from genescale.platform.storage import Store


def logged(counts: sparse.csr_matrix, target_sum: float = 10_000) -> sparse.csr_matrix:
    out = normalised(counts, target_sum)
    out.data = np.log1p(out.data)
    return out


def normalised(counts: sparse.csr_matrix, target_sum: float = 10_000) -> sparse.csr_matrix:
    sums = np.asarray(counts.sum(axis=1)).ravel()
    return (sparse.diags(target_sum / sums) @ counts).tocsr().astype(np.float32)


def chosen(path: Path, store: Store, **options: Any) -> tuple[str, str]:
    with open_atlas(str(path), store, **options) as atlas:
        checked(atlas, 0, atlas.n_cells, allow_fractional=options.get("allow_fractional", False))
        return atlas.slot, atlas.slot_reason


def refused(path: Path, store: Store, **options: Any) -> str:
    with pytest.raises(NotCountsError) as caught:
        chosen(path, store, **options)
    assert str(path) in str(caught.value)
    assert caught.value.fix
    return str(caught.value)


def test_raw_comes_first_and_the_reason_tells_of_the_others(
    write_atlas: Any, counts_of: Any, local_store: Store
) -> None:
    counts = counts_of(40)
    slot, reason = chosen(write_atlas("a.h5ad", logged(counts), raw=counts), local_store)
    assert slot == "raw.X"
    assert "raw.X holds whole numbers up to" in reason
    assert "X: 100 % of" in reason
    assert "log-normalised" in reason
    assert "expm1 are constant at 10,000 ±" in reason


@pytest.mark.parametrize("name", ["counts", "raw_counts", "Raw Counts", "umi"])
def test_layers_that_are_counts_by_name_come_before_x(
    name: str, write_atlas: Any, counts_of: Any, local_store: Store
) -> None:
    counts = counts_of(40)
    layers = {"aaa": logged(counts), name: counts, "zzz": logged(counts)}
    slot, reason = chosen(write_atlas("a.h5ad", logged(counts), layers=layers), local_store)
    assert slot == f"layers/{name}"
    assert "zzz" not in reason, "layers of any name are looked at only when no other place holds counts"


def test_a_layer_of_any_name_is_taken_when_nothing_else_holds_counts(
    write_atlas: Any, counts_of: Any, local_store: Store
) -> None:
    counts = counts_of(40)
    slot, _ = chosen(write_atlas("a.h5ad", logged(counts), layers={"my_data": counts}), local_store)
    assert slot == "layers/my_data"


def test_a_name_proves_nothing(write_atlas: Any, counts_of: Any, local_store: Store) -> None:
    counts = counts_of(40)
    soup = counts.copy()
    soup.data = soup.data * np.float32(12.93)
    slot, reason = chosen(write_atlas("a.h5ad", counts, layers={"counts": soup}), local_store)
    assert slot == "X"
    assert "layers/counts:" in reason
    assert "ambient-corrected" in reason


def test_two_places_that_differ_must_be_chosen_between(write_atlas: Any, counts_of: Any, local_store: Store) -> None:
    counts, other = counts_of(40), counts_of(40)
    other.data[::50] += 1
    path = write_atlas("a.h5ad", other, layers={"counts": counts})
    text = refused(path, local_store)
    assert "layers/counts and X both look like counts but differ in 2" in text
    assert "--counts-slot layers/counts or --counts-slot X" in text
    assert chosen(path, local_store, counts_slot="X")[0] == "X"
    same = write_atlas("b.h5ad", counts, layers={"counts": counts})
    assert chosen(same, local_store)[0] == "layers/counts"


def test_places_of_different_width_are_compared_by_gene(write_atlas: Any, counts_of: Any, local_store: Store) -> None:
    import anndata
    import pandas

    counts = counts_of(40)

    def write(name: str, part: sparse.csr_matrix) -> Path:
        path = write_atlas(name, counts)
        data = anndata.AnnData(X=part, var=pandas.DataFrame(index=[f"ENSG{i:011d}" for i in range(60, 20, -1)]))
        data.raw = anndata.AnnData(X=counts, obs=data.obs, var=anndata.read_h5ad(path).var)
        data.write_h5ad(path)
        return path

    part = counts[:, ::-1][:, :40].tocsr()
    assert chosen(write("same.h5ad", part), local_store)[0] == "raw.X"
    part.data[::10] += 3
    assert "raw.X and X both look like counts but differ in" in refused(write("other.h5ad", part), local_store)


def test_no_counts_anywhere_tells_what_each_place_holds(write_atlas: Any, counts_of: Any, local_store: Store) -> None:
    counts = counts_of(40)
    scaled = counts.toarray() - counts.toarray().mean(axis=0)
    path = write_atlas("a.h5ad", scaled, layers={"cpm": normalised(counts, 1e6), "log": logged(counts)})
    text = refused(path, local_store)
    assert "no raw counts found" in text
    assert "X: " in text
    assert "are negative: this is scaled data" in text
    assert "layers/cpm" in text
    assert "row sums are constant at 1e+06" in text
    assert "layers/log" in text
    assert "log-normalised" in text


def test_rounded_normalised_values_are_no_counts(write_atlas: Any, counts_of: Any, local_store: Store) -> None:
    rounded = normalised(counts_of(40), 1e6)
    rounded.data = np.round(rounded.data)
    assert "normalised and rounded" in refused(write_atlas("a.h5ad", rounded), local_store)
    named = write_atlas("b.h5ad", rounded)
    with open_atlas(str(named), local_store, counts_slot="X") as atlas:
        block = checked(atlas, 0, 40)
        totals = np.add.reduceat(block.counts, block.indptr[:-1])
        with pytest.raises(NotCountsError, match="row sums are constant"):
            refuse_equal_sums(totals, int((block.counts == 1).sum()), atlas)


def test_counts_drawn_down_to_one_depth_are_counts(write_atlas: Any, local_store: Store) -> None:
    rng = np.random.default_rng(0)
    counts = sparse.csr_matrix(rng.multinomial(100, np.full(60, 1 / 60), size=50).astype(np.float32))
    assert chosen(write_atlas("a.h5ad", counts), local_store)[0] == "X"


def test_corrected_counts_need_a_word(write_atlas: Any, counts_of: Any, local_store: Store) -> None:
    soup = counts_of(40)
    soup.data = soup.data * np.random.default_rng(0).choice([1.0, 0.8, 3.3], soup.nnz).astype(np.float32) * 7
    path = write_atlas("a.h5ad", soup)
    assert "--allow-fractional" in refused(path, local_store)
    assert "--allow-fractional" in refused(path, local_store, counts_slot="X")
    assert chosen(path, local_store, allow_fractional=True)[0] == "X"
    with_whole = write_atlas("b.h5ad", soup, layers={"counts": counts_of(40)})
    assert chosen(with_whole, local_store, allow_fractional=True)[0] == "layers/counts", "whole numbers are better"


@pytest.mark.parametrize("change", [normalised, logged])
def test_allow_fractional_never_takes_normalised_values(
    change: Any, write_atlas: Any, counts_of: Any, local_store: Store
) -> None:
    path = write_atlas("a.h5ad", change(counts_of(40)))
    assert "normalised" in refused(path, local_store, allow_fractional=True)
    assert "normalised" in refused(path, local_store, allow_fractional=True, counts_slot="X")


def test_an_absent_slot_names_those_that_are_there(write_atlas: Any, counts_of: Any, local_store: Store) -> None:
    path = write_atlas("a.h5ad", counts_of(10), layers={"counts": counts_of(10)})
    with pytest.raises(AtlasError, match=r"raw\.X: this slot is absent\. The file has layers/counts, X\."):
        chosen(path, local_store, counts_slot="raw.X")
    with pytest.raises(AtlasError, match="'obsm/X' is no place for counts"):
        chosen(path, local_store, counts_slot="obsm/X")
    with pytest.raises(AtlasError, match="Did you mean 'layers/counts'"):
        chosen(path, local_store, counts_slot="layers/count")


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({7: -1.0}, "1 of 3,000 values (0.0333 %) are negative: this is scaled data; the first: -1 (cell 0, gene"),
        ({7: np.nan}, "are not finite numbers; the first: nan (cell 0, gene"),
        ({7: np.inf, 2_999: np.inf}, "inf (cell 49, gene ENSG00000000060)"),
        ({7: 2.0**25}, "exceed 16,777,216 and have lost digits in float32"),
        ({7: 0.5}, "are not whole numbers"),
    ],
)
def test_values_that_are_no_counts_are_shown_with_cell_and_gene(
    values: dict[int, float], text: str, write_atlas: Any, local_store: Store
) -> None:
    counts = sparse.csr_matrix(np.random.default_rng(0).integers(1, 30, (50, 60)).astype(np.float32))
    for place, value in values.items():
        counts.data[place] = value
    assert text in refused(write_atlas("a.h5ad", counts), local_store, counts_slot="X")


def test_at_most_five_positions_are_shown(write_atlas: Any, counts_of: Any, local_store: Store) -> None:
    counts = counts_of(30)
    counts.data[:] = -1
    assert refused(write_atlas("a.h5ad", counts), local_store, counts_slot="X").count("(cell") == 5


@pytest.mark.parametrize(("dtype", "limit"), [("float16", 2**11), ("float32", 2**24), ("float64", 2**53)])
def test_each_number_format_has_its_largest_exact_count(dtype: str, limit: int) -> None:
    assert exact_limit(np.dtype(dtype)) == limit
    assert np.dtype(dtype).type(limit) == limit
    assert np.dtype(dtype).type(limit) + np.dtype(dtype).type(1) == limit, "one more is lost"
