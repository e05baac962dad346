"""Vectors of reference cells that can be searched: cosine distances, exactly or by a graph.

Axis suffixes: `n` reference cells, `q` asked cells, `d` width, `k` neighbours, `c` candidates.

Encoders give vectors that share one large common part: cosines of unlike cells differ in the third decimal, and float32
keeps seven. Between vectors of length 1 the cosine distance is half the squared Euclidean distance, which does not
change when one point is taken off both. So the mean of the unit vectors is taken off before anything is rounded, faiss
(Douze and others, "The Faiss library", 2024) looks for candidates in float32, and their distances are worked out in
float64.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from genescale.platform.errors import IntegrityError

Search = Literal["exact", "graph"]
# Links per cell and width of the search while the graph is made (Malkov and Yashunin 2018: M and efConstruction).
LINKS, BUILD_WIDTH = 32, 100
# Width of a search in the graph: 0.99 of the true 50 nearest and more (docs/neighbours.md has the measurement).
SEARCH_WIDTH = 256
# Candidates beyond k, so that rounding in float32 cannot lose a neighbour.
SPARE = 32


def unit_vectors(vectors_nd: np.ndarray, *, what: str) -> np.ndarray:
    """Vectors scaled to length 1, (n, d) float64; IntegrityError for one without a direction."""
    wide_nd = np.asarray(vectors_nd, dtype=np.float64)
    lengths_n = np.linalg.norm(wide_nd, axis=1, keepdims=True)
    if not (np.isfinite(lengths_n) & (lengths_n > 0)).all():
        raise IntegrityError("an embedding is zero or not finite, so it has no direction.", where=what)
    found: np.ndarray = wide_nd / lengths_n
    return found


def distances_between(asked_qd: np.ndarray, found_qcd: np.ndarray) -> np.ndarray:
    """Cosine distances (q, c) float64 of centred unit vectors: (q, d) against (q, c, d)."""
    apart_qcd = found_qcd.astype(np.float64) - asked_qd[:, None, :]
    found: np.ndarray = np.einsum("qcd,qcd->qc", apart_qcd, apart_qcd) / 2
    return found


class VectorIndex:
    """Centred unit vectors in a faiss index; searching is safe from several threads."""

    def __init__(self, index: Any, search: Search) -> None:
        self._index, self.search = index, search

    @classmethod
    def empty(cls, width: int, search: Search) -> VectorIndex:
        """An index without vectors."""
        import faiss

        if search == "exact":
            return cls(faiss.IndexFlatL2(width), search)
        index = faiss.IndexHNSWFlat(width, LINKS, faiss.METRIC_L2)
        index.hnsw.efConstruction = BUILD_WIDTH
        return cls(index, search)

    @classmethod
    def read(cls, path: Path, search: Search) -> VectorIndex:
        """The index in a local file, mapped into memory, which processes of one machine share.

        Raises IntegrityError for a file that holds no such index. Check its digest before: faiss trusts what it reads.
        """
        import faiss

        try:
            index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError as error:
            raise IntegrityError("holds no index that faiss can read.", where=path.name) from error
        if not isinstance(index, faiss.IndexFlatL2 if search == "exact" else faiss.IndexHNSWFlat):
            raise IntegrityError(f"holds a {type(index).__name__}, not an index for {search} search.", where=path.name)
        return cls(index, search)

    def write(self, path: Path) -> None:
        """Write the index into a local file."""
        import faiss

        faiss.write_index(self._index, str(path))

    @property
    def size(self) -> int:
        """Vectors in the index."""
        return int(self._index.ntotal)

    @property
    def width(self) -> int:
        """Numbers of one vector."""
        return int(self._index.d)

    def add(self, centred_nd: np.ndarray) -> None:
        """Append vectors; the first one added is row 0."""
        self._index.add(np.ascontiguousarray(centred_nd, dtype=np.float32))

    def rows(self, rows_n: np.ndarray) -> np.ndarray:
        """The vectors of these rows, (n, d) float32."""
        found: np.ndarray = self._index.reconstruct_batch(np.ascontiguousarray(rows_n, dtype=np.int64))
        return found

    def nearest(
        self, asked_qd: np.ndarray, k: int, *, without_n: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows (q, k) int64 and cosine distances (q, k) float64 of the nearest vectors, nearest first.

        Ties go to the smaller row. `without_n` are rows that may not be found; at least k others must be left.
        """
        rows_qc = self._candidates(np.ascontiguousarray(asked_qd, dtype=np.float32), k, without_n)
        missing_qc = rows_qc < 0
        vectors_qcd = self.rows(np.where(missing_qc, 0, rows_qc).ravel()).reshape(*rows_qc.shape, self.width)
        distances_qc = np.where(missing_qc, np.inf, distances_between(asked_qd, vectors_qcd))
        order_qk = np.lexsort((rows_qc, distances_qc), axis=1)[:, :k]
        return np.take_along_axis(rows_qc, order_qk, axis=1), np.take_along_axis(distances_qc, order_qk, axis=1)

    def _candidates(self, asked_qd: np.ndarray, k: int, without_n: np.ndarray | None) -> np.ndarray:
        wanted = min(k + SPARE, self.size)
        width = max(SEARCH_WIDTH, 2 * wanted)
        while True:
            rows_qc: np.ndarray = self._index.search(asked_qd, wanted, params=self._parameters(width, without_n))[1]
            # A graph may end in a pocket of equal cells before it has found k: look further then.
            enough = bool(((rows_qc >= 0).sum(axis=1) >= k).all())
            if enough or self.search == "exact" or width >= 2 * self.size:
                return rows_qc
            width *= 4

    def _parameters(self, width: int, without_n: np.ndarray | None) -> Any:
        import faiss

        kept = {} if without_n is None else {"sel": faiss.IDSelectorNot(faiss.IDSelectorBatch(without_n))}
        if self.search == "graph":
            return faiss.SearchParametersHNSW(efSearch=width, **kept)  # type: ignore[attr-defined]
        return faiss.SearchParameters(**kept)
