"""An open atlas, whatever its file format: a matrix of stored counts, a table of cells and a table of genes.

Readers (`ingestion/formats/`) provide the three parts; everything above them works on this one class.

Axis suffixes: `n` cells, `g` genes of the file, `z` stored values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from genescale.platform.storage import Entry

Column = list[str | None]
Layout = Literal["csr", "csc", "dense", "triplets"]


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Stored values of consecutive cells, exactly as the file holds them, in the machine's byte order.

    indptr_n: int64, n+1, starts at 0; indices_z: gene columns, perhaps unsorted, repeated or out of range;
    values_z: any number type, perhaps explicit zeros.
    """

    indptr_n: npt.NDArray[np.int64]
    indices_z: npt.NDArray[Any]
    values_z: npt.NDArray[Any]


class Matrix(Protocol):
    """One matrix of cells × genes. Its structure is checked when it is opened, its values when they are used."""

    where: str
    """File and slot, for messages."""
    n_cells: int
    n_genes: int
    dtype: np.dtype[Any]
    layout: Layout
    sequential: bool
    """True when rows can only be had by reading the whole file once; then one task reads all of it."""

    @property
    def stored_before(self) -> npt.NDArray[np.int64]:
        """Values stored before each cell (n+1, rising from 0): what units are cut by."""

    def read(self, start: int, stop: int) -> Rows:
        """Stored values of cells start … stop-1; AtlasError when they cannot be read."""


class Frame(Protocol):
    """The table of cells (`obs`) or genes (`var`): read one column and one range of rows at a time."""

    path: str
    rows: int

    @property
    def columns(self) -> list[str]:
        """Names of the columns, without the index."""

    def index(self, start: int = 0, stop: int | None = None) -> list[str]:
        """Row names: ids of cells or genes."""

    def column(self, name: str, start: int = 0, stop: int | None = None) -> tuple[Column, str]:
        """Values as texts (None where missing), and a note that is empty when all is well."""

    def typed(self, name: str, start: int = 0, stop: int | None = None) -> tuple[pa.Array, str]:
        """Values in their own type (string, int64, float64 or bool; null where missing), and a note."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slot:
    """The place of the counts that was chosen, and why; `seen` says of every place that was looked at what it held."""

    name: str
    matrix: Matrix
    reason: str = ""
    seen: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Atlas:
    """An open, checked atlas file.

    kind: `h5ad`, `zarr`, `loom`, `10x-h5` or `mtx`; entry pins the content; texts: single texts of the file such as
    `organism_ontology_term_id`, `schema_version`, `title`; notes: what was decided or mended when it was opened.
    """

    def __init__(
        self,
        *,
        entry: Entry,
        kind: str,
        slot: Slot,
        obs: Frame,
        var: Frame,
        texts: Mapping[str, str] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.uri, self.entry, self.kind = entry.uri, entry, kind
        self.slot, self.matrix, self.slot_reason, self.slots_seen = slot.name, slot.matrix, slot.reason, slot.seen
        self.obs, self.var, self.texts, self.notes = obs, var, dict(texts or {}), tuple(notes)

    @property
    def n_cells(self) -> int:
        """Cells of the file."""
        return self.matrix.n_cells

    @property
    def n_genes(self) -> int:
        """Gene columns of the file."""
        return self.matrix.n_genes

    @property
    def stored(self) -> int:
        """Values stored in the matrix."""
        return int(self.matrix.stored_before[-1])

    def read(self, start: int, stop: int) -> Rows:
        """Stored values of cells start … stop-1, unchecked; see `counts.checked`."""
        return self.matrix.read(start, stop)

    def cell_ids(self, start: int, stop: int) -> list[str]:
        """Barcodes or names of the cells, as the file has them (they may repeat)."""
        return self.obs.index(start, stop)
