"""Cells for benchmarks of training: real rank-value tokens where the shared data is at hand, else drawn ones.

Real: PBMC 3k and sorted PBMCs (Zheng et al. 2017) as the published tokenizer ranks them, and 500 cells of the published
pretraining corpus, which fill the window. Drawn: log-normal numbers of genes about as in those, and genes ranked by how
common they are plus noise.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from genescale.platform.vocabulary import SPECIAL_TOKENS, Vocabulary

ROOT = Path(__file__).resolve().parents[1]
WINDOW, N_GENES, FIRST_GENE = 2_048, 25_424, 2
FILES = ("tokens_pbmc3k_V1", "tokens_pbmc_facs_train_V1", "genecorpus_500_samples")
DRAWN_CELLS = 4_000


@dataclass(frozen=True, eq=False)
class CellPool:
    """Cells of one vocabulary and where they come from."""

    cells: list[np.ndarray]
    vocabulary: Vocabulary
    origin: str

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(cell) for cell in self.cells])


def vocabulary(n_genes: int = N_GENES, window: int = WINDOW) -> Vocabulary:
    """`<pad>` 0, `<mask>` 1 and genes from 2 on, as in the published V1 vocabulary; training needs no names."""
    names = [f"ENSG{number:011d}" for number in range(n_genes)]
    return Vocabulary.build(names, np.ones(n_genes), window=window, name="benchmark", special=SPECIAL_TOKENS[:2])


def cell_pool() -> CellPool:
    """All cells there are."""
    folder = Path(os.environ.get("GENESCALE_SHARED", ROOT.parent / "shared" / "data")) / "golden"
    paths = [folder / f"{name}.parquet" for name in FILES]
    if all(path.is_file() for path in paths):
        return CellPool(
            [cell for path in paths for cell in _read(path)], vocabulary(), "real cells: " + ", ".join(FILES)
        )
    return CellPool(_drawn(DRAWN_CELLS, seed=0), vocabulary(), "drawn cells (no shared data found)")


def _read(path: Path) -> list[np.ndarray]:
    import pyarrow.parquet as pq

    return [np.array(cell, dtype=np.uint16) for cell in pq.read_table(path, columns=["input_ids"])[0].to_pylist()]


def _drawn(n_cells: int, *, seed: int) -> list[np.ndarray]:
    draws = np.random.default_rng(seed)
    common_g = -0.0004 * np.arange(N_GENES)
    lengths_n = np.clip(draws.lognormal(6.5, 0.5, n_cells), 150, WINDOW).astype(int)
    return [_ranked(common_g + draws.gumbel(size=N_GENES), length) for length in lengths_n]


def _ranked(scores_g: np.ndarray, length: int) -> np.ndarray:
    return (np.argsort(-scores_g)[:length] + FIRST_GENE).astype(np.uint16)


def reduced(pool: CellPool, *, n_genes: int, window: int) -> CellPool:
    """The same cells with only their commonest genes, cropped: small enough to train many times."""
    counts = np.bincount(np.concatenate(pool.cells), minlength=N_GENES + FIRST_GENE)
    kept = np.sort(np.argsort(-counts, kind="stable")[:n_genes])
    new = np.zeros(len(counts), dtype=np.uint16)
    new[kept] = np.arange(n_genes) + FIRST_GENE
    cells = [new[cell][new[cell] > 0][:window] for cell in pool.cells]
    long_enough = [cell for cell in cells if len(cell) >= 8]
    return CellPool(long_enough, vocabulary(n_genes, window), f"{pool.origin}; {n_genes} commonest genes")
