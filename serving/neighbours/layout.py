"""Reference cells in two dimensions, and where a further cell belongs among them.

UMAP keeps neighbourhoods and nothing else: near cells are near, the distance of two far groups means nothing. So a new
cell is not laid out again, which would move every other one: it comes to lie among its neighbours.

Axis suffixes: `n` reference cells, `m` those that are laid out, `q` asked cells, `k` neighbours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.numpy

from genescale.platform.errors import IntegrityError
from genescale.serving.neighbours.spread import sample
from genescale.serving.neighbours.vectors import VectorIndex

METHOD: Literal["umap"] = "umap"
PLACES = "places_n2"
PLACED_BY = 10
"""Neighbours that say where a cell lies, whatever number of them is asked for."""
LEAST_CELLS = 20
"""Fewer cells are a list, not a map."""
PLACED_AT_ONCE = 4_096
# Nearer than rounding can tell: the same cell.
SAME = 1e-9


def laid_out(index: VectorIndex, most: int, seed: int) -> np.ndarray | None:
    """(n, 2) float32: a place for each cell; None for fewer than LEAST_CELLS.

    Up to `most` cells are laid out by UMAP, drawn at random where there are more; the others are placed among them.
    """
    if index.size < LEAST_CELLS or most < LEAST_CELLS:
        return None
    # Imported here: it compiles for seconds, and a service that only shows a map needs none of it.
    from genescale.training.evaluation.umap_figure import umap_coordinates

    drawn_m = sample(index.size, most, seed)
    drawn_md = index.rows(drawn_m)
    places_m2 = umap_coordinates(drawn_md, seed=seed)
    if len(drawn_m) == index.size:
        return places_m2
    places_n2 = np.empty((index.size, 2), dtype=np.float32)
    places_n2[drawn_m] = places_m2
    rest = np.setdiff1d(np.arange(index.size), drawn_m, assume_unique=True)
    among = VectorIndex.empty(index.width, "exact")
    among.add(drawn_md)
    for start in range(0, len(rest), PLACED_AT_ONCE):
        rows = rest[start : start + PLACED_AT_ONCE]
        found_qk, distances_qk = among.nearest(index.rows(rows), PLACED_BY)
        places_n2[rows] = placed(places_m2[found_qk], distances_qk)
    return places_n2


def placed(places_qk2: np.ndarray, distances_qk: np.ndarray) -> np.ndarray:
    """(q, 2) float32: mean place of each cell's neighbours, weighted by 1 / distance²; at distance 0, that place."""
    nearest_q1 = distances_qk.min(axis=1, keepdims=True)
    scale_q1 = np.where(nearest_q1 > SAME, nearest_q1, 1.0)
    weights_qk = np.where(
        nearest_q1 > SAME, (scale_q1 / np.maximum(distances_qk, SAME)) ** 2, (distances_qk <= SAME).astype(np.float64)
    )
    weights_qk /= weights_qk.sum(axis=1, keepdims=True)
    found: np.ndarray = np.einsum("qk,qkc->qc", weights_qk, places_qk2.astype(np.float64)).astype(np.float32)
    return found


def shown(places_n2: np.ndarray) -> list[Any]:
    """Places as an answer says them: to three decimals, far below what an eye can tell on a map some ten wide."""
    return [[round(x, 3), round(y, 3)] for x, y in places_n2.tolist()]


def write_places(path: Path, places_n2: np.ndarray) -> None:
    """Write the places into a local file."""
    safetensors.numpy.save_file({PLACES: np.ascontiguousarray(places_n2)}, path)


def read_places(path: Path, n_cells: int) -> np.ndarray:
    """(n, 2) float32 from a local file; IntegrityError when it does not fit the index."""
    try:
        places_n2 = safetensors.numpy.load_file(path).get(PLACES)
    except (safetensors.SafetensorError, OSError) as error:
        raise IntegrityError("the map cannot be read.", where=path.name) from error
    if places_n2 is None or places_n2.shape != (n_cells, 2) or not np.isfinite(places_n2).all():
        raise IntegrityError("the map does not fit the index.", where=path.name, fix="Make the index again.")
    return places_n2
