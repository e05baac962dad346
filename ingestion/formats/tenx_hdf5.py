"""10x Genomics HDF5 matrices of Cell Ranger 2 (`/GENOME/…`) and 3 and later (`/matrix/features/…`).

Features × barcodes stored barcode by barcode are cells × genes stored cell by cell, so rows are read as they lie.
Features that are no genes (antibodies, guides, peaks) stay as columns; `feature_type` and `genome` tell them apart.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import h5py
import numpy as np
import pyarrow as pa

from genescale.ingestion.atlas import Atlas
from genescale.ingestion.formats.hdf5_safety import opened
from genescale.ingestion.formats.hdf5_tree import HdfGroup
from genescale.ingestion.formats.memory_frame import MemoryFrame
from genescale.ingestion.formats.sparse_matrix import CsrMatrix, check_shape, compressed
from genescale.ingestion.formats.tree import Array, Group, as_text
from genescale.ingestion.formats.unfiltered import refuse_unfiltered
from genescale.ingestion.slots import choose_slot
from genescale.platform.errors import AtlasError
from genescale.platform.storage import Entry, Store

SLOT = "X"
HUMAN = re.compile(r"^(hg\d|grch\d|human|homo)", re.IGNORECASE)
# Columns of the gene table by the name that Cell Ranger gives them.
FEATURE_COLUMNS = {"name": "feature_name", "feature_type": "feature_type", "genome": "genome"}
_FIX = "Write it again with Cell Ranger, or convert it to h5ad with scanpy."


@contextlib.contextmanager
def open_tenx(
    uri: str,
    store: Store,
    entry: Entry,
    *,
    counts_slot: str = "auto",
    allow_fractional: bool = False,
    allow_unfiltered: bool = False,
) -> Iterator[Atlas]:
    """Open a 10x HDF5 file; see `opening.open_atlas`. Of several genomes in a file, the human one is taken."""
    with opened(uri, store, etag=entry.etag) as file:
        root = HdfGroup(file, uri)
        group, notes = _matrix_group(root)
        cells, genes = _names(group, "barcodes"), _genes(group)
        n_genes, n_cells = _shape(group)
        parts = compressed(
            group.array("data"), group.array("indices"), group.array("indptr"), n_cells, where=f"{uri}: {SLOT}"
        )
        matrix = CsrMatrix(parts, n_cells=n_cells, n_genes=n_genes)
        if not allow_unfiltered:
            refuse_unfiltered(matrix.stored_before, uri)
        slot = choose_slot({SLOT: lambda: matrix}, counts_slot, where=uri, allow_fractional=allow_fractional)
        yield Atlas(
            entry=entry,
            kind="10x-h5",
            slot=slot,
            obs=MemoryFrame("obs", cells, rows=n_cells, uri=uri),
            var=MemoryFrame("var", genes.pop("id"), genes, rows=n_genes, uri=uri),
            texts=_texts(file),
            notes=notes,
        )


def _matrix_group(root: Group) -> tuple[Group, tuple[str, ...]]:
    """The group of the matrix; of several genomes, the one that is human."""
    groups = {name: item for name in root.names() if isinstance(item := root.get(name), Group)}
    genomes = {name: group for name, group in groups.items() if group.get("barcodes") is not None}
    if len(genomes) == 1:
        return next(iter(genomes.values())), ()
    human = [name for name in genomes if HUMAN.match(name)]
    if len(human) == 1:
        others = ", ".join(sorted(genomes.keys() - set(human)))
        return genomes[human[0]], (f"of the genomes in this file, {human[0]} is taken and {others} left out",)
    raise AtlasError(
        f"it holds {len(genomes)} genomes ({', '.join(sorted(genomes))}), and {len(human) or 'none'} of them "
        "named as human.",
        where=root.where,
        fix="Split it into one file for each genome.",
    )


def _shape(group: Group) -> tuple[int, int]:
    """Features and barcodes, as the file says."""
    shape = group.array("shape").numbers()
    if shape.shape != (2,) or shape.dtype.kind not in "iu":
        raise AtlasError("the matrix does not say its shape.", where=group.where, fix=_FIX)
    n_genes, n_cells = (int(size) for size in shape)
    check_shape(n_cells, n_genes, where=group.where)
    return n_genes, n_cells


def _genes(group: Group) -> dict[str, pa.Array]:
    """Columns of the gene table; `id` is its index."""
    if isinstance(features := group.get("features"), Group):
        present = [name for name in FEATURE_COLUMNS if features.get(name) is not None]
        return {"id": _names(features, "id"), **{FEATURE_COLUMNS[name]: _names(features, name) for name in present}}
    ids = _names(group, "genes")
    genome = group.where.rpartition(": ")[2]
    columns = {"id": ids, "genome": pa.array(np.full(len(ids), genome, dtype=object), pa.string())}
    return {**columns, "feature_name": _names(group, "gene_names")} if group.get("gene_names") is not None else columns


def _names(group: Group, name: str) -> pa.Array:
    """An array of texts."""
    item = group.get(name)
    if not isinstance(item, Array):
        raise AtlasError(f"it has no '{name}', which every 10x matrix has.", where=group.where, fix=_FIX)
    return pa.array(item.texts(), pa.string())


def _texts(file: h5py.File) -> dict[str, str]:
    """What Cell Ranger writes about the run."""
    attrs = HdfGroup(file, "").attrs
    return {name: as_text(attrs[name]) for name in ("chemistry_description", "software_version") if name in attrs}
