"""Synthetic counts for benchmarks: cells over the public V2 gene space, about 2,000 genes detected in each.

Genes have log-normal expression around their published median, cells have a log-normal depth and a shift of their own
per gene programme; the units of a cell are drawn one by one, so zeros, ones and long tails come as in real counts. A
tenth of the units falls on gene columns that no vocabulary knows. Cell i of a seed is the same in every file.

Axis suffixes: `n` cells, `g` genes of the file, `z` stored values.
"""

from __future__ import annotations

import csv
import dataclasses
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from genescale.ingestion.atlas import Rows
from genescale.platform.vocabulary import Vocabulary

SHARED = Path(os.environ.get("GENESCALE_SHARED", Path(__file__).resolve().parents[2] / "shared" / "data"))
V2_TABLE = SHARED / "vocabularies" / "geneformer_gc104M_genes.tsv"
UNKNOWN_GENES = 12_000
UNKNOWN_SHARE = 0.1
MEAN_UNITS = 3_400.0
DEPTH_SPREAD = 0.5
PROGRAMMES = 16


@dataclasses.dataclass(frozen=True, eq=False)
class GeneSpace:
    """Gene columns of a synthetic file and the odds that a unit falls on each, per programme (p × g)."""

    origin: str
    vocabulary: Vocabulary
    gene_ids: tuple[str, ...]
    symbols: tuple[str, ...]
    odds_pg: npt.NDArray[np.float64]

    @property
    def n_genes(self) -> int:
        return len(self.gene_ids)


def gene_space(seed: int = 0) -> GeneSpace:
    """The published V2 genes and medians where the shared data are there, simulated ones of the same size otherwise."""
    rng = np.random.default_rng(seed)
    if V2_TABLE.exists():
        with V2_TABLE.open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file, delimiter="\t") if row["median"]]
        ids, symbols = [row["ensembl_id"] for row in rows], [row["gene_name"] for row in rows]
        medians, origin = np.array([float(row["median"]) for row in rows]), "public V2 genes and medians"
    else:
        ids = [f"ENSG{i:011d}" for i in range(1, 20_272)]
        symbols, medians = [f"GENE{i}" for i in range(len(ids))], rng.lognormal(0.4, 0.8, len(ids))
        origin = "simulated genes and medians"
    vocabulary = Vocabulary.build(ids, medians, symbols=symbols, name="benchmark")
    level = rng.lognormal(0.0, 1.6, len(ids)) * np.maximum(medians, 0.05)
    unknown = rng.lognormal(0.0, 1.6, UNKNOWN_GENES)
    level = np.concatenate([level / level.sum() * (1 - UNKNOWN_SHARE), unknown / unknown.sum() * UNKNOWN_SHARE])
    odds_pg = level * rng.lognormal(0.0, 0.5, (PROGRAMMES, level.size))
    names = [*ids, *(f"ENSG9{i:010d}" for i in range(UNKNOWN_GENES))]
    labels = [*symbols, *(f"LOC{i}" for i in range(UNKNOWN_GENES))]
    order = sorted(range(level.size), key=names.__getitem__)
    return GeneSpace(
        origin=origin,
        vocabulary=vocabulary,
        gene_ids=tuple(names[i] for i in order),
        symbols=tuple(labels[i] for i in order),
        odds_pg=odds_pg[:, order] / odds_pg.sum(axis=1, keepdims=True),
    )


class CellSource:
    """Draws cells by number, in blocks, without keeping any."""

    def __init__(self, space: GeneSpace, seed: int = 0) -> None:
        self.space, self.seed = space, seed
        tables = [_alias_table(odds_g) for odds_g in space.odds_pg]
        self._keep_pg = np.array([keep for keep, _ in tables])
        self._other_pg = np.array([other for _, other in tables], dtype=np.int32)

    def rows(self, start: int, stop: int) -> Rows:
        """Counts of cells start … stop-1: float32 values, int32 genes, sorted."""
        indptr, indices, values = _draw(self._keep_pg, self._other_pg, start, stop, self.seed, MEAN_UNITS, DEPTH_SPREAD)
        return Rows(indptr, indices, values)

    def blocks(self, n_cells: int, block_cells: int) -> Iterator[tuple[int, Rows]]:
        """All cells from 0, some at a time, each block with the number of its first cell."""
        for start in range(0, n_cells, block_cells):
            yield start, self.rows(start, min(start + block_cells, n_cells))


def _alias_table(odds_g: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Walker's table: a gene is drawn in constant time (Walker, ACM Trans. Math. Software 1977)."""
    keep_g, other_g = odds_g * odds_g.size, np.arange(odds_g.size)
    small, large = list(np.flatnonzero(keep_g < 1)), list(np.flatnonzero(keep_g >= 1))
    while small and large:
        poor, rich = small.pop(), large[-1]
        other_g[poor] = rich
        keep_g[rich] -= 1 - keep_g[poor]
        if keep_g[rich] < 1:
            small.append(large.pop())
    return keep_g, other_g


@numba.njit(cache=True, nogil=True)
def _mixed(state: Any) -> Any:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


@numba.njit(cache=True, nogil=True)
def _draw(keep_pg: Any, other_pg: Any, start: Any, stop: Any, seed: Any, mean_units: Any, spread: Any) -> Any:
    n, n_genes, golden = stop - start, keep_pg.shape[1], np.uint64(0x9E3779B97F4A7C15)
    indptr_n, held_g = np.zeros(n + 1, np.int64), np.zeros(n_genes, np.int32)
    room = int(n * mean_units * 0.7) + 40_000
    indices_z, values_z, at = np.empty(room, np.int32), np.empty(room, np.float32), 0
    for n_at in range(n):
        state = _mixed(np.uint64(seed * 1_000_003 + 17) * golden + np.uint64(start + n_at))
        normal = -6.0
        for _ in range(12):
            state += golden
            normal += (_mixed(state) >> np.uint64(11)) / 9007199254740992.0
        units = int(mean_units * np.exp(spread * normal - spread * spread / 2)) + 50
        state += golden
        programme = np.int64(_mixed(state) % np.uint64(keep_pg.shape[0]))
        for _ in range(units):
            state += golden
            drawn = _mixed(state)
            gene = np.int64(((drawn >> np.uint64(32)) * np.uint64(n_genes)) >> np.uint64(32))
            if (drawn & np.uint64(0xFFFFFFFF)) / 4294967296.0 >= keep_pg[programme, gene]:
                gene = np.int64(other_pg[programme, gene])
            held_g[gene] += 1
        if at + units > indices_z.size:
            more = indices_z.size + max(units, indices_z.size // 2)
            wider_indices, wider_values = np.empty(more, np.int32), np.empty(more, np.float32)
            wider_indices[:at], wider_values[:at] = indices_z[:at], values_z[:at]
            indices_z, values_z = wider_indices, wider_values
        for gene in range(n_genes):
            if held_g[gene]:
                indices_z[at], values_z[at] = gene, held_g[gene]
                held_g[gene] = 0
                at += 1
        indptr_n[n_at + 1] = at
    return indptr_n, indices_z[:at].copy(), values_z[:at].copy()


def write_h5ad(space: GeneSpace, rows: Rows, path: Path, *, compression: str | None) -> Path:
    """Write cells as anndata itself writes them."""
    import anndata
    import pandas
    from scipy import sparse

    n = len(rows.indptr_n) - 1
    counts = sparse.csr_matrix((rows.values_z, rows.indices_z, rows.indptr_n), shape=(n, space.n_genes))
    var = pandas.DataFrame({"feature_name": list(space.symbols)}, index=list(space.gene_ids))
    anndata.AnnData(counts, obs=cell_table(0, n), var=var).write_h5ad(path, compression=compression)
    return path


def write_large_h5ad(source: CellSource, n_cells: int, path: Path, *, block_cells: int = 4_096) -> Path:
    """Write many cells without holding them: gzip chunks of 65,536 values, compressed by ISA-L."""
    import anndata
    import h5py
    import pandas
    from isal import isal_zlib

    space, chunk = source.space, 65_536
    with h5py.File(path, "w") as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        matrix = file.create_group("X")
        matrix.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
        matrix.attrs["shape"] = np.array([n_cells, space.n_genes])
        arrays = {
            name: matrix.create_dataset(name, (0,), dtype, maxshape=(None,), chunks=(chunk,), compression="gzip")
            for name, dtype in (("data", "<f4"), ("indices", "<i4"))
        }
        waiting: dict[str, Any] = {"data": np.empty(0, "<f4"), "indices": np.empty(0, "<i4")}
        lengths, written = [], 0

        def flush(*, everything: bool) -> None:
            nonlocal written
            sizes = {len(values) for values in waiting.values()}
            whole = max(sizes) if everything else max(sizes) // chunk * chunk
            for name, values in waiting.items():
                arrays[name].resize((written + whole,))
                for at in range(0, whole, chunk):
                    piece = np.zeros(chunk, values.dtype)
                    piece[: len(values[at : at + chunk][: whole - at])] = values[at : at + chunk][: whole - at]
                    packed = isal_zlib.compress(piece.tobytes(), 1)
                    arrays[name].id.write_direct_chunk((written + at,), packed)
                waiting[name] = values[whole:]
            written += whole

        for _, rows in source.blocks(n_cells, block_cells):
            lengths.append(np.diff(rows.indptr_n))
            waiting["data"] = np.concatenate([waiting["data"], rows.values_z])
            waiting["indices"] = np.concatenate([waiting["indices"], rows.indices_z])
            flush(everything=False)
        flush(everything=True)
        matrix.create_dataset("indptr", data=np.concatenate(([0], np.cumsum(np.concatenate(lengths)))))
        anndata.io.write_elem(file, "obs", cell_table(0, n_cells))
        var = pandas.DataFrame({"feature_name": list(space.symbols)}, index=list(space.gene_ids))
        anndata.io.write_elem(file, "var", var)
    return path


def cell_table(start: int, stop: int) -> Any:
    """The obs columns that every CELLxGENE file has, with usual numbers of categories."""
    import pandas

    number = np.arange(start, stop)
    kinds = {"cell_type": 40, "tissue": 6, "disease": 3, "assay": 2, "donor_id": 25, "sex": 2, "development_stage": 20}
    columns = {
        name: pandas.Categorical.from_codes(number % size, [f"{name} {i}" for i in range(size)])
        for name, size in kinds.items()
    }
    obs = pandas.DataFrame(columns, index=[f"ACGTACGTACGT-{i}" for i in number])
    obs["is_primary_data"] = True
    return obs


class DrawnMatrix:
    """Cells that are drawn when they are read: an atlas of any size that nobody has to keep."""

    layout, sequential, where, dtype = "csr", False, "drawn cells", np.dtype(np.float32)

    def __init__(self, source: CellSource, n_cells: int) -> None:
        self.source, self.n_cells, self.n_genes = source, n_cells, source.space.n_genes
        # What a cell stores is known when it is drawn; units are cut by the mean.
        self.stored_before = np.arange(n_cells + 1, dtype=np.int64) * 2_030
        self.drawing_s = 0.0

    def read(self, start: int, stop: int) -> Rows:
        began = time.process_time()
        rows = self.source.rows(start, stop)
        self.drawing_s += time.process_time() - began
        return rows


class DrawnFrame:
    """The obs columns of `cell_table`, made for the rows that are asked for."""

    path = "obs"

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.columns = [str(name) for name in cell_table(0, 1).columns]

    def index(self, start: int = 0, stop: int | None = None) -> list[str]:
        return [f"ACGTACGTACGT-{i}" for i in range(start, self.rows if stop is None else stop)]

    def column(self, name: str, start: int = 0, stop: int | None = None) -> tuple[list[str | None], str]:
        return [str(value) for value in self._values(name, start, stop)], ""

    def typed(self, name: str, start: int = 0, stop: int | None = None) -> tuple[Any, str]:
        import pyarrow as pa

        return pa.array(self._values(name, start, stop).to_numpy(dtype=object).tolist()), ""

    def _values(self, name: str, start: int, stop: int | None) -> Any:
        return cell_table(start, self.rows if stop is None else stop)[name]


def drawn_atlas(source: CellSource, n_cells: int) -> Any:
    """An open atlas of drawn cells."""
    import pyarrow as pa

    from genescale.ingestion.atlas import Atlas, Slot
    from genescale.ingestion.formats.memory_frame import MemoryFrame
    from genescale.platform.storage import Entry

    space = source.space
    var = MemoryFrame(
        "var",
        pa.array(space.gene_ids, pa.string()),
        {"feature_name": pa.array(space.symbols, pa.string())},
        rows=space.n_genes,
        uri="drawn",
    )
    entry = Entry(uri="drawn", size_bytes=0, etag="drawn")
    slot = Slot(name="X", matrix=DrawnMatrix(source, n_cells))
    return Atlas(entry=entry, kind="drawn", slot=slot, obs=DrawnFrame(n_cells), var=var)
