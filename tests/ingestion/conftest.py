"""Small atlases, good and bad, written by anndata itself, and a vocabulary that fits them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import sparse

from genescale.platform.vocabulary import Vocabulary

N_GENES = 60
GENE_IDS = tuple(f"ENSG{i:011d}" for i in range(1, N_GENES + 1))
AtlasWriter = Callable[..., Path]


def random_counts(n_cells: int, *, seed: int = 0, n_genes: int = N_GENES) -> sparse.csr_matrix:
    """Counts of n_cells × n_genes, about a third of them positive, at least eight genes in every cell."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(0.6, (n_cells, n_genes)).astype(np.float32)
    counts[:, :8] += 1
    return sparse.csr_matrix(counts)


@pytest.fixture
def counts_of() -> Callable[..., sparse.csr_matrix]:
    return random_counts


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    """All test genes with different medians, one symbol and one retired id; a window that crops no test cell."""
    return Vocabulary.build(
        GENE_IDS,
        1 + np.arange(N_GENES) / 7,
        symbols=[f"GENE{i}" for i in range(1, N_GENES + 1)],
        window=64,
        name="test",
        aliases={"ENSG90000000001": GENE_IDS[0], "OLDNAME": GENE_IDS[1]},
    )


@pytest.fixture
def write_atlas(tmp_path: Path) -> AtlasWriter:
    """Write an h5ad file: `write_atlas("a.h5ad", counts, genes=…, obs=…, raw=…, layers=…)` returns its path."""

    def write(
        name: str,
        counts: Any,
        *,
        genes: Sequence[str] = GENE_IDS,
        obs: Mapping[str, Any] | None = None,
        var: Mapping[str, Any] | None = None,
        raw: Any = None,
        layers: Mapping[str, Any] | None = None,
        uns: Mapping[str, Any] | None = None,
        folder: Path | None = None,
    ) -> Path:
        import anndata
        import pandas

        n_cells = counts.shape[0]
        table = pandas.DataFrame(dict(obs or {}), index=[f"cell{i}" for i in range(n_cells)])
        columns = pandas.DataFrame(dict(var or {}), index=list(genes))
        data = anndata.AnnData(X=counts, obs=table, var=columns, layers=dict(layers or {}), uns=dict(uns or {}))
        if raw is not None:
            data.raw = anndata.AnnData(X=raw, obs=table, var=columns)
        path = (folder or tmp_path) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data.write_h5ad(path, compression="gzip")
        return path

    return write
