"""Units: every row in exactly one of them, none larger than asked for; sources: what a folder, glob or file means."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genescale.ingestion.pipeline import IngestConfig, dataset_name
from genescale.ingestion.plan import cut
from genescale.ingestion.sources import find_sources
from genescale.platform.errors import AtlasError, SettingsError
from genescale.platform.settings import build
from genescale.platform.storage import Store


@given(st.lists(st.integers(0, 50), min_size=1, max_size=60), st.integers(1, 120), st.integers(1, 20))
def test_ranges_cover_every_row_once_within_bounds(row_sizes: list[int], max_nonzeros: int, max_cells: int) -> None:
    indptr = np.concatenate(([0], np.cumsum(row_sizes)))
    ranges = list(cut(indptr, max_nonzeros, max_cells))
    assert [row for start, stop in ranges for row in range(start, stop)] == list(range(len(row_sizes)))
    for start, stop in ranges:
        assert stop - start <= max_cells
        assert indptr[stop] - indptr[start] <= max_nonzeros or stop - start == 1
    assert len(ranges) == fewest(row_sizes, max_nonzeros, max_cells)


def fewest(row_sizes: list[int], max_nonzeros: int, max_cells: int) -> int:
    """How many ranges it takes when each is filled as far as it goes."""
    ranges, cells, values = 0, max_cells, 0
    for size in row_sizes:
        if cells == max_cells or values + size > max_nonzeros:
            ranges, cells, values = ranges + 1, 0, 0
        cells, values = cells + 1, values + size
    return ranges


@pytest.mark.parametrize(("n_cells", "max_cells"), [(10_100, 50_000), (9_999, 900), (10_001, 5_000)])
def test_ranges_are_about_equally_large(n_cells: int, max_cells: int) -> None:
    """Ranges that are filled as far as they go would leave a rest, and a worker that waits for the others."""
    row_sizes = np.random.default_rng(7).poisson(200, n_cells)
    indptr = np.concatenate(([0], np.cumsum(row_sizes)))
    sizes = [int(indptr[stop] - indptr[start]) for start, stop in cut(indptr, 500_000, max_cells)]
    assert len(sizes) > 2
    assert max(sizes) <= 1.01 * min(sizes)


def test_files_globs_and_folders(tmp_path: Path, local_store: Store) -> None:
    for name in ("b.h5ad", "a.h5ad", "sub/c.h5ad", "notes.txt", "odd.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")

    def names(*sources: str) -> list[str]:
        found = find_sources([str(tmp_path / source) for source in sources], local_store)
        return [Path(entry.uri).name for entry in found.files]

    assert names("") == ["a.h5ad", "b.h5ad", "c.h5ad"]
    assert names("*.h5ad", "b.h5ad") == ["a.h5ad", "b.h5ad"], "a file that is named twice is taken once"
    assert names("odd.bin") == ["odd.bin"], "a file that is named is tried whatever its ending"
    folder = find_sources([str(tmp_path)], local_store)
    assert [Path(uri).name for uri in folder.ignored] == ["notes.txt", "odd.bin"]
    for nothing in ("missing.h5ad", "*.nothing", "none"):
        with pytest.raises(AtlasError, match=r"no atlas is there"):
            names(nothing)


def test_dataset_names_are_safe_in_paths() -> None:
    assert dataset_name("s3://b/lung atlas (v2).h5ad") == "lung-atlas-v2"
    assert dataset_name("/x/..h5ad") == "dataset"
    assert dataset_name("/x/" + "a" * 300 + ".h5ad") == "a" * 100


@pytest.mark.parametrize("values", [{"min_genes": 0}, {"min_share": 0}, {"min_share": 1.5}, {"unit_nonzeros": 0}])
def test_config_out_of_range_is_refused(values: dict[str, float]) -> None:
    with pytest.raises(SettingsError):
        build(IngestConfig, values)
    with pytest.raises(SettingsError, match="Did you mean 'min_genes'"):
        build(IngestConfig, {"min_gene": 3})
