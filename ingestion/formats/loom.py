"""Loom files, version 2 and 3: a dense matrix of genes × cells, further layers, and attributes of both.

Whole columns of chunks are read, so that each chunk is inflated once. A matrix whose chunks run along all cells, and
every matrix in object storage, where a column touches the whole file, is read once from start to end.

The format: https://linnarssonlab.org/loompy/format
Axis suffixes: `g` genes, `n` cells.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import html
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from genescale.ingestion.atlas import Atlas, Matrix
from genescale.ingestion.formats.dataframes import scalar_text
from genescale.ingestion.formats.dense_matrix import MAX_BAND_BYTES, DenseMatrix
from genescale.ingestion.formats.hdf5_safety import check_written, opened
from genescale.ingestion.formats.hdf5_tree import HdfArray, HdfGroup
from genescale.ingestion.formats.memory_frame import MemoryFrame, RangeReader
from genescale.ingestion.formats.scratch import (
    Triplets,
    TurnedMatrix,
    check_room,
    scratch_errors,
    scratch_folder,
    scratch_matrix,
)
from genescale.ingestion.formats.tree import Array, Group, as_text
from genescale.ingestion.slots import choose_slot, ordered_layers
from genescale.platform.errors import AtlasError
from genescale.platform.storage import Entry, Store, is_remote

SLOT = "X"
SAMPLED_GENES = 64
# The widest column of chunks that is held at once, and genes that are read at once where columns are wider.
COLUMN_BYTES = MAX_BAND_BYTES
GENES_BYTES = 16 * 1024 * 1024
CELL_NAMES = ("CellID", "obs_names", "cell_id", "cell_names", "Cell", "barcode", "barcodes")
GENE_NAMES = (
    "Accession",
    "ensembl_id",
    "gene_ids",
    "feature_id",
    "Gene",
    "var_names",
    "gene_names",
    "gene",
    "GeneName",
)
TEXTS = ("organism_ontology_term_id", "organism", "title", "Species")
_FIX = "Write it again with loompy, or convert it to h5ad with anndata."


@contextlib.contextmanager
def open_loom(
    uri: str, store: Store, entry: Entry, *, counts_slot: str = "auto", allow_fractional: bool = False
) -> Iterator[Atlas]:
    """Open a loom file; see `opening.open_atlas`. `X` is its main matrix, `layers/NAME` its layers."""
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(local_copy(uri, store, entry)) if is_remote(uri) else store
        file = stack.enter_context(opened(uri, source, etag=entry.etag))
        root = HdfGroup(file, uri)
        shape = _shape(file, uri)
        candidates = _candidates(file, shape, uri, stack)
        slot = choose_slot(candidates, counts_slot, where=uri, allow_fractional=allow_fractional)
        yield Atlas(
            entry=entry,
            kind="loom",
            slot=slot,
            obs=_frame(root, "col_attrs", "obs", CELL_NAMES, shape[1]),
            var=_frame(root, "row_attrs", "var", GENE_NAMES, shape[0]),
            texts=_texts(root),
            notes=("the matrix is stored gene by gene: all of it is read once",) if slot.matrix.sequential else (),
        )


class _Copy(Store):
    """A store that answers with a copy of one file on this machine."""

    def __init__(self, path: Path, store: Store) -> None:
        super().__init__(store.settings)
        self._path = path

    def open(self, uri: str) -> BinaryIO:
        """The copy, whatever the address."""
        return self._path.open("rb")


@contextlib.contextmanager
def local_copy(uri: str, store: Store, entry: Entry) -> Iterator[Store]:
    """A store whose `open` reads a scratch copy of this one file; the copy is removed at the end."""
    check_room(entry.size_bytes, uri)
    with contextlib.ExitStack() as stack:
        with scratch_errors(uri):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="genescale-", dir=scratch_folder()))
            path = store.download(uri, Path(folder) / "atlas")
        if store.stat(uri).etag != entry.etag:
            raise AtlasError("the file changed while it was downloaded.", where=uri, fix="Run the command again.")
        yield _Copy(path, store)


def _shape(file: h5py.File, uri: str) -> tuple[int, int]:
    """Genes and cells of the main matrix."""
    matrix = file.get("matrix")
    if not isinstance(matrix, h5py.Dataset) or matrix.ndim != 2:
        raise AtlasError("a loom file without a matrix of genes × cells.", where=uri, fix=_FIX)
    return int(matrix.shape[0]), int(matrix.shape[1])


def _candidates(
    file: h5py.File, shape: tuple[int, int], uri: str, stack: contextlib.ExitStack
) -> dict[str, Callable[[], Matrix]]:
    """Openers of the layers and of the main matrix, in the order of looking for counts."""
    layers = file.get("layers")
    names = ordered_layers(list(layers)) if isinstance(layers, h5py.Group) else []
    found = {f"layers/{name}": layers[name] for name in names} | {SLOT: file["matrix"]}
    return {
        slot: functools.partial(_matrix, item, shape, f"{uri}: {slot}", uri, stack)
        for slot, item in found.items()
        if isinstance(item, h5py.Dataset) and item.shape == shape
    }


def _matrix(dataset: h5py.Dataset, shape: tuple[int, int], where: str, uri: str, stack: contextlib.ExitStack) -> Matrix:
    turned = Turned(dataset, where, uri)
    if min(turned.band, shape[1]) * shape[0] * dataset.dtype.itemsize <= COLUMN_BYTES:
        return LoomMatrix(turned, where=where, sequential=is_remote(uri))
    by_gene = GeneBlocks(turned)
    by_rows = stack.enter_context(
        scratch_matrix(
            by_gene.triplets,
            n_cells=shape[1],
            n_genes=shape[0],
            dtype=dataset.dtype,
            where=where,
            layout="dense",
            nnz=None,
        )
    )
    return TurnedMatrix(by_rows, "dense", by_gene.sample_values)


class LoomMatrix(DenseMatrix):
    """A matrix of genes × cells that is read by columns of chunks."""

    def __init__(self, array: Turned, *, where: str, sequential: bool) -> None:
        super().__init__(array, where=where)
        self.sequential = sequential


class Turned(HdfArray):
    """A dataset of genes × cells seen as cells × genes; its band is the width of a chunk."""

    def __init__(self, dataset: h5py.Dataset, where: str, uri: str) -> None:
        super().__init__(dataset, uri)
        self.where, self.shape = where, self.shape[::-1]
        # Without chunks a column takes one small read for each gene.
        self.band = int(dataset.chunks[1]) if dataset.chunks else int(dataset.shape[1])

    def check_written(self) -> None:
        """AtlasError when chunks have no storage; a copy of a remote file can be looked through like a local one."""
        check_written(self._dataset, self._uri)

    def numbers(self, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """Cells start … stop-1 (n, g) in the machine's byte order."""
        self._check_size()
        values = self._dataset[:, start:stop]
        return np.ascontiguousarray(values.T, dtype=values.dtype.newbyteorder("="))

    def genes(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Genes start … stop-1 of all cells (g, n)."""
        self._check_size()
        values = self._dataset[start:stop]
        return values.astype(values.dtype.newbyteorder("="), copy=False)

    def gene_step(self) -> int:
        """Genes that are read at once: whole chunks within the bound of memory."""
        gene_bytes = max(1, self.shape[0] * self.dtype.itemsize)
        fitting = max(1, GENES_BYTES // gene_bytes)
        tall = int(self._dataset.chunks[0]) if self._dataset.chunks else 1
        return max(fitting // tall * tall, 1) if fitting >= tall else fitting


@dataclasses.dataclass(frozen=True)
class GeneBlocks:
    """A matrix of genes × cells read gene by gene."""

    array: Turned

    def triplets(self) -> Iterator[Triplets]:
        """Cells, genes and values (each z) of all values that are not zero."""
        n_genes, step = self.array.shape[1], self.array.gene_step()
        for first in range(0, n_genes, step):
            block = self.array.genes(first, min(first + step, n_genes))
            genes_z, cells_z = np.nonzero(block)
            yield cells_z, genes_z + first, block[genes_z, cells_z]

    def sample_values(self) -> npt.NDArray[Any]:
        """Values of some genes, spread over the matrix."""
        n_genes = self.array.shape[1]
        places = np.unique(np.linspace(0, n_genes - 1, SAMPLED_GENES).astype(np.int64))
        rows = [self.array.genes(int(place), int(place) + 1).ravel() for place in places]
        return np.concatenate([row[row != 0] for row in rows])


def _frame(root: Group, folder: str, path: str, names: Sequence[str], rows: int) -> MemoryFrame:
    """The attributes of cells or genes that are one value each; the first of `names` that is there is the index.

    Cells without names are counted from 0.
    """
    group = root.get(folder)
    if not isinstance(group, Group):
        raise AtlasError(f"a loom file without {folder}.", where=root.where, fix=_FIX)
    items = {name: group.get(name) for name in group.names()}
    flat = {name: item for name, item in items.items() if isinstance(item, Array) and len(item.shape) == 1}
    name = next((name for name in names if name in flat), None)
    if name is None and path == "var":
        raise AtlasError(
            f"{folder} names no genes: it has {', '.join(flat) or 'nothing'}.",
            where=root.where,
            fix=f"Add one of {', '.join(names[:5])}.",
        )
    index = _attribute(flat[name], 0, len(flat[name])) if name else pa.array(np.arange(rows))
    columns: dict[str, RangeReader] = {name: functools.partial(_attribute, item) for name, item in flat.items()}
    return MemoryFrame(path, index.cast(pa.string()), columns, rows=rows, uri=root.where)


def _attribute(item: Array, start: int, stop: int) -> pa.Array:
    """A range of an attribute in its own type."""
    if item.is_text:
        # Loom 2 writes characters beyond ASCII as XML entities.
        texts = item.texts(start, stop)
        return pa.array([html.unescape(text) if "&" in text else text for text in texts], pa.string())
    values = item.numbers(start, stop)
    wide = {"f": np.float64, "i": np.int64, "u": np.int64, "b": np.bool_}[values.dtype.kind]
    return pa.array(values.astype(wide))


def _texts(root: Group) -> dict[str, str]:
    """Single texts about the data: attributes of the file (loom 2), or datasets in `attrs` (loom 3)."""
    found = {name: as_text(root.attrs[name]) for name in TEXTS if name in root.attrs}
    return found | {name: text for name in TEXTS if (text := scalar_text(root, f"attrs/{name}"))}
