"""Everything anndata wrote, ever: h5ad of each era and zarr of formats 2 and 3, as one Atlas.

The eras differ in names and encodings only: before 0.7 tables are arrays of records, sparse matrices are marked by
`h5sparse_format` and the raw matrix is called `raw.X`; from 0.7 on every value names its encoding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from genescale.ingestion.atlas import Atlas, Matrix
from genescale.ingestion.formats.dataframes import Frame, frame_length, scalar_text
from genescale.ingestion.formats.dense_matrix import DenseMatrix
from genescale.ingestion.formats.hdf5_safety import opened
from genescale.ingestion.formats.hdf5_tree import HdfGroup
from genescale.ingestion.formats.scratch import scratch_matrix, scratch_note
from genescale.ingestion.formats.sparse_matrix import CscMatrix, CsrMatrix, by_gene, check_shape, compressed
from genescale.ingestion.formats.tree import Array, Group, Node, as_text, check_encoding, encoding
from genescale.ingestion.slots import choose_slot, ordered_layers, slot_path
from genescale.platform.errors import AtlasError
from genescale.platform.storage import Entry, Store

ROOTS = {"anndata": ("0.1.0",), "dict": ("0.1.0",)}
MATRICES = {"csr_matrix": ("0.1.0",), "csc_matrix": ("0.1.0",), "array": ("0.1.0", "0.2.0")}
# Attributes of a sparse matrix that hold its kind and its shape, by era.
FORMATS = ("encoding-type", "h5sparse_format")
SHAPES = ("shape", "h5sparse_shape")
TEXTS = ("organism_ontology_term_id", "organism", "schema_version", "title", "default_embedding")


@contextlib.contextmanager
def open_anndata(
    uri: str, store: Store, entry: Entry, *, counts_slot: str = "auto", allow_fractional: bool = False
) -> Iterator[Atlas]:
    """Open an h5ad file, or a zarr folder or zip, check its structure, and find its counts.

    entry: what storage says of it; counts_slot: `auto`, `X`, `raw.X` or `layers/NAME`. Raises AtlasError, or
    NotCountsError when no place holds counts.
    """
    with contextlib.ExitStack() as stack:
        if is_zarr(uri, store):
            from genescale.ingestion.formats.zarr_tree import opened_zarr

            root: Group = stack.enter_context(opened_zarr(uri, store))
            kind = "zarr"
        else:
            root, kind = HdfGroup(stack.enter_context(opened(uri, store, etag=entry.etag)), uri), "h5ad"
        yield atlas_of(root, entry, kind, stack, counts_slot=counts_slot, allow_fractional=allow_fractional)


def is_zarr(uri: str, store: Store) -> bool:
    """True for a zip archive, and for a folder, which has no content of its own."""
    if not store.exists(uri):
        return True
    return store.read_range(uri, 0, 2) == b"PK"


def atlas_of(
    root: Group, entry: Entry, kind: str, stack: contextlib.ExitStack, *, counts_slot: str, allow_fractional: bool
) -> Atlas:
    """The atlas in an open tree; `stack` closes what its matrix needs."""
    if root.get("obs") is None or root.get("var") is None:
        raise AtlasError(
            f"no obs and var tables: it holds {', '.join(root.names()[:8]) or 'nothing'}.",
            where=entry.uri,
            fix="Give an anndata file, or convert it to h5ad with anndata or scanpy.",
        )
    check_encoding(root, ROOTS)
    notes: list[str] = []
    candidates = matrices(root, entry.uri, stack)
    genes = {name: partial(_gene_names, root, name) for name in candidates}
    slot = choose_slot(candidates, counts_slot, where=entry.uri, allow_fractional=allow_fractional, genes=genes)
    matrix = slot.matrix
    if isinstance(matrix, CscMatrix):
        notes.append(scratch_note(matrix.n_values, matrix.dtype, "csc"))
    return Atlas(
        entry=entry,
        kind=kind,
        slot=slot,
        obs=Frame(root, "obs", matrix.n_cells),
        var=Frame(root, _var_path(root, slot.name), matrix.n_genes),
        texts={name: text for name in TEXTS if (text := scalar_text(root, f"uns/{name}"))},
        notes=notes,
    )


def matrices(root: Group, uri: str, stack: contextlib.ExitStack) -> dict[str, Callable[[], Matrix]]:
    """Openers of every matrix of cells × genes, in the order of looking for counts."""
    layers = root.get("layers")
    names = ordered_layers(layers.names()) if isinstance(layers, Group) else []
    found: dict[str, Node] = {}
    for slot in ("raw.X", *(f"layers/{name}" for name in names), "X"):
        # Before 0.7 the raw matrix stood beside X, under a name with a dot.
        for path in (slot_path(slot, uri), slot):
            item = root.get(path)
            if item is not None and not _is_nothing(item):
                found.setdefault(slot, item)
    return {slot: partial(_matrix, item, f"{uri}: {slot}", stack) for slot, item in found.items()}


def _is_nothing(item: Node) -> bool:
    """True for what anndata writes for None."""
    return encoding(item).name == "null" or (isinstance(item, Array) and item.shape in ((), (0,)))


def _gene_names(root: Group, slot: str) -> list[str]:
    path = _var_path(root, slot)
    return Frame(root, path, frame_length(root, path)).index()


def _var_path(root: Group, slot: str) -> str:
    if slot != "raw.X":
        return "var"
    return "raw/var" if root.get("raw/var") is not None else "raw.var"


def _matrix(item: Node, where: str, stack: contextlib.ExitStack) -> Matrix:
    if isinstance(item, Array):
        check_encoding(item, MATRICES)
        return DenseMatrix(item, where=where)
    kind = _sparse_kind(item, where)
    n_cells, n_genes = _shape(item, where)
    data, indices, indptr = (_part(item, name, where) for name in ("data", "indices", "indptr"))
    parts = compressed(data, indices, indptr, n_cells if kind == "csr" else n_genes, where=where)
    if kind == "csr":
        return CsrMatrix(parts, n_cells=n_cells, n_genes=n_genes)
    stored = int(parts.starts[-1])
    turned = stack.enter_context(
        scratch_matrix(
            partial(by_gene, parts, n_cells),
            n_cells=n_cells,
            n_genes=n_genes,
            dtype=parts.data.dtype,
            where=where,
            layout="csc",
            nnz=stored,
        )
    )
    return CscMatrix(parts, turned)


def _part(item: Group, name: str, where: str) -> Array:
    part = item.get(name)
    if not isinstance(part, Array):
        raise AtlasError(f"the matrix has no '{name}'.", where=where, fix="Write the file again.")
    return part


def _sparse_kind(item: Group, where: str) -> str:
    if "h5sparse_format" in item.attrs:
        kind = as_text(item.attrs["h5sparse_format"])
    else:
        kind = check_encoding(item, MATRICES).removesuffix("_matrix")
    if kind in ("csr", "csc"):
        return kind
    raise AtlasError(
        f"it does not say how it is encoded ({kind or 'no encoding-type'}).",
        where=where,
        fix="Write it again with anndata as a CSR matrix.",
    )


def _shape(item: Group, where: str) -> tuple[int, int]:
    shape = np.asarray(next((item.attrs[name] for name in SHAPES if name in item.attrs), ()))
    if shape.shape != (2,) or shape.dtype.kind not in "iu" or (shape < 0).any():
        raise AtlasError("the matrix does not say its shape.", where=where, fix="Write the file again.")
    check_shape(int(shape[0]), int(shape[1]), where=where)
    return int(shape[0]), int(shape[1])
