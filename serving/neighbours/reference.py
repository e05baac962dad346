"""A published reference that answers: its nearest cells, their labels, and how unlike all of them a cell is.

Axis suffixes: `q` asked cells, `d` width, `k` neighbours, `s` sampled reference cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy
from safetensors import SafetensorError

from genescale.platform.errors import IntegrityError, SettingsError
from genescale.platform.settings import Settings
from genescale.serving.neighbours.examples import read_examples
from genescale.serving.neighbours.index_folder import (
    CELLS,
    EXAMPLES,
    GEOMETRY,
    MAP,
    VECTORS,
    IndexManifest,
    opened_folder,
)
from genescale.serving.neighbours.layout import PLACED_BY, placed, read_places, shown
from genescale.serving.neighbours.vectors import VectorIndex, unit_vectors
from genescale.serving.release import Release
from genescale.serving.schemas import CorpusFacts, ReferenceFacts

MEAN, DISTANCES = "mean_d", "distances_ks"
ID_COLUMNS = ("cell_id", "dataset_id")


@dataclass(frozen=True, kw_only=True)
class IndexRelease:
    """The index of a service: resolved once, at deploy, like its model."""

    address: str
    digest: str
    folder: str
    """Checked local copy on the machine that resolved it."""

    def open(self, settings: Settings, cache: Path) -> Reference:
        """The reference on this machine; IntegrityError when the index is another one by now."""
        address = self.folder if Path(self.folder).is_dir() else self.address
        found = Reference.open(address, settings, cache)
        if found.manifest.digest != self.digest:
            raise IntegrityError(
                f"the index has digest {found.manifest.digest[:12]}, {self.digest[:12]} was deployed.",
                where="index",
                fix="Write a changed index into a new folder and deploy again.",
            )
        return found


def resolve_index(address: str, release: Release, settings: Settings, cache: Path) -> IndexRelease:
    """The index at `address`, fetched and checked; SettingsError when it was made with another model."""
    folder, manifest = opened_folder(address, settings.storage, cache)
    if manifest.bundle_digest != release.digest:
        raise SettingsError(
            f"the index was made with model {manifest.bundle_digest[:12]}; "
            f"{release.name} version {release.version} is {release.digest[:12]}.",
            where="index",
            fix="Vectors of two models cannot be compared: run `genescale index` with the model that is served.",
        )
    return IndexRelease(address=address, digest=manifest.digest, folder=str(folder))


@dataclass(frozen=True, kw_only=True, eq=False)
class Examples:
    """A few reference cells with their genes."""

    rows_e: np.ndarray
    tokens: list[list[int]]
    """By example, as the corpus holds them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Nearest:
    """What was found for some cells."""

    rows_qk: np.ndarray
    """int64 rows of the reference, nearest first."""
    distances_qk: np.ndarray
    """float64 cosine distances."""
    out_of_distribution_q: np.ndarray
    """float64: share of reference cells that are nearer to their own k-th neighbour than this cell is to its."""
    places_q2: np.ndarray | None = None
    """float32: where the cells lie on the map of the reference; None without a map."""

    @property
    def places(self) -> list[list[float] | None]:
        """Where each cell lies, as an answer says it; None for each without a map."""
        return [None] * len(self.rows_qk) if self.places_q2 is None else shown(self.places_q2)


class Reference:
    """An opened index; read only, and safe to ask from several threads."""

    def __init__(
        self,
        manifest: IndexManifest,
        index: VectorIndex,
        table: pa.Table,
        mean_d: np.ndarray,
        distances_ks: np.ndarray,
        *,
        places_n2: np.ndarray | None = None,
        examples: Examples | None = None,
    ) -> None:
        self.manifest, self._index, self._table = manifest, index, table
        self._mean_d, self._distances_ks = mean_d, distances_ks
        self.places_n2, self.examples = places_n2, examples

    @classmethod
    def open(cls, address: str, settings: Settings, cache: Path) -> Reference:
        """The reference in a local or `s3://` folder, checked against its digests; the latter copied into `cache`.

        Raises NotFoundError without an index, IntegrityError when a file is not what the manifest says.
        """
        folder, manifest = opened_folder(address, settings.storage, cache)
        index = VectorIndex.read(folder / VECTORS, manifest.search)
        try:
            table = pq.read_table(folder / CELLS, columns=[*ID_COLUMNS, *manifest.columns])
            geometry = safetensors.numpy.load_file(folder / GEOMETRY)
        except (pa.ArrowException, SafetensorError, OSError) as error:
            raise IntegrityError("the index cannot be read.", where=address) from error
        mean_d, distances_ks = geometry.get(MEAN), geometry.get(DISTANCES)
        if (
            mean_d is None
            or distances_ks is None
            or (index.size, table.num_rows) != (manifest.cells, manifest.cells)
            or (index.width, mean_d.shape) != (manifest.width, (manifest.width,))
            or distances_ks.shape != (manifest.max_neighbors, manifest.sampled)
        ):
            raise IntegrityError(
                "the files of the index do not fit one another.", where=address, fix="Make the index again."
            )
        places_n2, examples = None, None
        if MAP in manifest.files:
            places_n2 = read_places(folder / MAP, manifest.cells)
        if EXAMPLES in manifest.files:
            rows_e, tokens = read_examples(folder / EXAMPLES, manifest.cells)
            examples = Examples(rows_e=rows_e, tokens=tokens)
        return cls(
            manifest,
            index,
            table.unify_dictionaries(),
            mean_d,
            distances_ks,
            places_n2=places_n2,
            examples=examples,
        )

    @property
    def facts(self) -> ReferenceFacts:
        """What `/v1/info` and answers say about it: no address."""
        known = self.manifest
        return ReferenceFacts(
            digest=known.digest,
            corpus=CorpusFacts(version=known.corpus_version),
            cells=known.cells,
            columns=list(known.columns),
            layer=known.layer,
            pooling=known.pooling,
            search=known.search,
            max_neighbors=known.max_neighbors,
            apart=known.apart or None,
        )

    def nearest(self, vectors_qd: np.ndarray, k: int) -> Nearest:
        """The k nearest reference cells of each vector, as the model gave it: (q, d).

        Vectors are searched one by one, so that an answer does not depend on what is asked beside it.
        """
        asked_qd = unit_vectors(vectors_qd, what="cells") - self._mean_d
        # A cell's place comes from the same number of neighbours whatever was asked, so that it stays where it is.
        looked = k if self.places_n2 is None else min(max(k, PLACED_BY), self.manifest.max_neighbors)
        found = [self._index.nearest(asked_qd[at : at + 1], looked) for at in range(len(asked_qd))]
        rows_qk = np.concatenate([rows for rows, _ in found])
        distances_qk = np.concatenate([distances for _, distances in found])
        known_s = self._distances_ks[k - 1]
        return Nearest(
            rows_qk=rows_qk[:, :k],
            distances_qk=distances_qk[:, :k],
            out_of_distribution_q=np.searchsorted(known_s, distances_qk[:, k - 1], side="left") / len(known_s),
            places_q2=self._placed(rows_qk[:, :PLACED_BY], distances_qk[:, :PLACED_BY]),
        )

    def _placed(self, rows_qk: np.ndarray, distances_qk: np.ndarray) -> np.ndarray | None:
        return None if self.places_n2 is None else placed(self.places_n2[rows_qk], distances_qk)

    def labels(self, rows: np.ndarray, columns: Sequence[str]) -> pa.Table:
        """Ids and labels of these rows in their order, as columns."""
        return self._table.select([*ID_COLUMNS, *columns]).take(pa.array(rows))

    def places(self, rows: np.ndarray) -> list[list[float] | None]:
        """Where these rows lie on the map, in their order; None for each without a map."""
        if self.places_n2 is None:
            return [None] * rows.size
        found: list[list[float] | None] = shown(self.places_n2[rows.ravel()])
        return found

    def cells(self, rows: np.ndarray) -> list[dict[str, Any]]:
        """`cell_id`, `dataset_id` and labels (None where a cell has none) of these rows, in their order."""
        found: list[dict[str, Any]] = self._table.take(pa.array(rows.ravel())).to_pylist()
        return found
