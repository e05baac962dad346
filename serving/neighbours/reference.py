"""A published reference that answers: its nearest cells, their labels, and how unlike all of them a cell is.

Axis suffixes: `q` asked cells, `d` width, `k` neighbours, `s` sampled reference cells.
"""

from __future__ import annotations

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
from genescale.serving.neighbours.index_folder import CELLS, GEOMETRY, VECTORS, IndexManifest, opened_folder
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
class Nearest:
    """What was found for some cells."""

    rows_qk: np.ndarray
    """int64 rows of the reference, nearest first."""
    distances_qk: np.ndarray
    """float64 cosine distances."""
    out_of_distribution_q: np.ndarray
    """float64: share of reference cells that are nearer to their own k-th neighbour than this cell is to its."""


class Reference:
    """An opened index; read only, and safe to ask from several threads."""

    def __init__(
        self, manifest: IndexManifest, index: VectorIndex, table: pa.Table, mean_d: np.ndarray, distances_ks: np.ndarray
    ) -> None:
        self.manifest, self._index, self._table = manifest, index, table
        self._mean_d, self._distances_ks = mean_d, distances_ks

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
        return cls(manifest, index, table.unify_dictionaries(), mean_d, distances_ks)

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
        found = [self._index.nearest(asked_qd[at : at + 1], k) for at in range(len(asked_qd))]
        distances_qk = np.concatenate([distances for _, distances in found])
        known_s = self._distances_ks[k - 1]
        return Nearest(
            rows_qk=np.concatenate([rows for rows, _ in found]),
            distances_qk=distances_qk,
            out_of_distribution_q=np.searchsorted(known_s, distances_qk[:, -1], side="left") / len(known_s),
        )

    def cells(self, rows: np.ndarray) -> list[dict[str, Any]]:
        """`cell_id`, `dataset_id` and labels (None where a cell has none) of these rows, in their order."""
        found: list[dict[str, Any]] = self._table.take(pa.array(rows.ravel())).to_pylist()
        return found
