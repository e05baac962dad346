"""Do cells of one type from different donors lie among each other, and cells of different types apart?

Axis suffixes: `n` cells, `d` width, `b` batches (donors, datasets), `k` neighbours.

Everything about batches is measured *within* one cell type: donors differ in the types they have, and that is biology.

Silhouette (Rousseeuw 1987) of a cell: (b - a) / max(a, b), with a the mean Euclidean distance to cells of its own
group and b that to the nearest other group. High for cell types is good; for batches within a type near 0 is good.
`mixing` is the mean over types of the mean of 1 - |silhouette of batches| (Luecken et al. 2022).

Rejection rate (kBET, Büttner et al. 2019): for a tested cell with k nearest neighbours of its type, n_b of them of
batch b, and f_b the share of batch b in the type,

    chi² = sum over b of (n_b - k f_b)² / (k f_b)

is compared with the chi-square distribution of B - 1 degrees of freedom; the rate is the share of tested cells whose p
is below 0.05. k is a quarter of the mean batch size, as published, and at least 10. The test takes neighbours as
independent draws, which they are not quite, so the same rate with batches shuffled among the cells stands beside it.

Inverse Simpson index: 1 / sum over b of (n_b / k)², the effective number of batches among the neighbours (Korsunsky et
al. 2019, here with equal weights for the k neighbours), beside the value of the whole type.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LEAST_CELLS = 10
"""Of a batch within a type; batches with fewer cells are left out there, and counted."""
LEVEL = 0.05
LEAST_NEIGHBOURS = 10


@dataclass(frozen=True, kw_only=True)
class TypeMixing:
    """How the batches of one cell type mix."""

    name: str
    cells: int
    batches: int
    left_out: int
    """Cells of batches with fewer than LEAST_CELLS cells of this type."""
    k: int
    tests: int
    """Cells whose neighbourhood is tested: all of them."""
    rejection: float
    rejection_shuffled: float
    """The same with batches shuffled among the cells: what perfect mixing would give."""
    silhouette_batch: float
    inverse_simpson: float
    inverse_simpson_whole: float


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """Cell types against batches in one embedding."""

    label: str
    batch: str
    cells: int
    silhouette_label: float
    """Mean over cells of the silhouette of cell types; NaN with fewer than two types."""
    silhouette_by_type: dict[str, float]
    types: tuple[TypeMixing, ...]
    """Types with at least two batches of LEAST_CELLS cells."""
    untested: dict[str, int]
    """Cells of the other types."""
    unlabelled: int
    """Cells without a type or a batch."""

    @property
    def mixing(self) -> float:
        """Mean over types of 1 - |silhouette of batches|; NaN where no type has two batches."""
        return _mean([1.0 - abs(one.silhouette_batch) for one in self.types])

    @property
    def rejection(self) -> float:
        """Mean rejection rate over types."""
        return _mean([one.rejection for one in self.types])

    @property
    def rejection_shuffled(self) -> float:
        """Mean rejection rate over types with shuffled batches."""
        return _mean([one.rejection_shuffled for one in self.types])


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def measure_mixing(
    vectors_nd: np.ndarray, types_n: np.ndarray, batches_n: np.ndarray, *, label: str, batch: str, seed: int = 0
) -> Mixing:
    """Mixing of `batches_n` within `types_n` (texts; empty = unknown, left out and counted)."""
    known_n = (types_n != "") & (batches_n != "")
    vectors_nd, types_n, batches_n = vectors_nd[known_n], types_n[known_n], batches_n[known_n]
    by_type = _silhouettes(vectors_nd, types_n)
    found, untested = [], {}
    for name in np.unique(types_n).tolist():
        at = types_n == name
        one = _type_mixing(name, vectors_nd[at], batches_n[at], seed=seed)
        if one is None:
            untested[name] = int(at.sum())
        else:
            found.append(one)
    return Mixing(
        label=label,
        batch=batch,
        cells=int(known_n.sum()),
        silhouette_label=float(by_type.mean()) if len(by_type) else float("nan"),
        silhouette_by_type={
            str(name): float(by_type[types_n == name].mean()) for name in np.unique(types_n) if len(by_type)
        },
        types=tuple(found),
        untested=untested,
        unlabelled=int((~known_n).sum()),
    )


def _silhouettes(vectors_nd: np.ndarray, groups_n: np.ndarray) -> np.ndarray:
    """Silhouette of each cell; empty where it is not defined (fewer than two groups, or every cell its own)."""
    from sklearn.metrics import silhouette_samples

    n_groups = len(np.unique(groups_n))
    if not 2 <= n_groups < len(groups_n):
        return np.zeros(0)
    scores: np.ndarray = silhouette_samples(vectors_nd.astype(np.float64), groups_n)
    return scores


def _type_mixing(name: str, vectors_nd: np.ndarray, batches_n: np.ndarray, *, seed: int) -> TypeMixing | None:
    batches, counts = np.unique(batches_n, return_counts=True)
    kept_n = np.isin(batches_n, batches[counts >= LEAST_CELLS])
    left_out = int((~kept_n).sum())
    vectors_nd, batches_n = vectors_nd[kept_n], batches_n[kept_n]
    _, codes_n, counts_b = np.unique(batches_n, return_inverse=True, return_counts=True)
    if len(counts_b) < 2:
        return None
    k = min(max(LEAST_NEIGHBOURS, int(counts_b.mean() / 4)), len(codes_n) - 1)
    near_nk = neighbours(vectors_nd, k)
    shuffled_n = np.random.default_rng([seed, len(codes_n)]).permutation(codes_n)
    shares_nb = _counts(codes_n, near_nk, len(counts_b)) / k
    return TypeMixing(
        name=name,
        cells=len(codes_n),
        batches=len(counts_b),
        left_out=left_out,
        k=k,
        tests=len(codes_n),
        rejection=rejection_rate(codes_n, near_nk),
        rejection_shuffled=rejection_rate(shuffled_n, near_nk),
        silhouette_batch=float(_silhouettes(vectors_nd, codes_n).mean()),
        inverse_simpson=float((1 / (shares_nb**2).sum(axis=1)).mean()),
        inverse_simpson_whole=float(1 / ((counts_b / counts_b.sum()) ** 2).sum()),
    )


def neighbours(vectors_nd: np.ndarray, k: int) -> np.ndarray:
    """(n, k) int64: the nearest other cells by Euclidean distance."""
    from sklearn.neighbors import NearestNeighbors

    found: np.ndarray = NearestNeighbors(n_neighbors=k).fit(vectors_nd).kneighbors(return_distance=False)
    return found


def rejection_rate(codes_n: np.ndarray, near_nk: np.ndarray, *, level: float = LEVEL) -> float:
    """Share of cells whose neighbourhood `near_nk` has other shares of batches `codes_n` than the whole.

    The formula and its source stand at the top of this file.
    """
    from scipy.stats import chi2

    counts_b = np.bincount(codes_n)
    expected_b = near_nk.shape[1] * counts_b / counts_b.sum()
    observed_nb = _counts(codes_n, near_nk, len(counts_b))
    statistic_n = ((observed_nb - expected_b) ** 2 / expected_b).sum(axis=1)
    return float((chi2.sf(statistic_n, df=len(counts_b) - 1) < level).mean())


def _counts(codes_n: np.ndarray, near_nk: np.ndarray, n_batches: int) -> np.ndarray:
    """(n, b) float64: neighbours of each batch."""
    flat = np.repeat(np.arange(len(near_nk)), near_nk.shape[1]) * n_batches + codes_n[near_nk].ravel()
    return np.bincount(flat, minlength=len(near_nk) * n_batches).reshape(len(near_nk), n_batches).astype(np.float64)
