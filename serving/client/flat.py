"""Cells as arrays, one after the other: what an Arrow stream is made of.

Axis suffixes: `n` cells, `z` genes or tokens of all cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

LARGEST_TOKEN = 2**32 - 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Flat:
    """Cells of one form: `indptr` of n + 1 says where each begins."""

    ids: list[str | None]
    indptr: npt.NDArray[np.int64]
    values_z: np.ndarray
    """Counts, or tokens when `names` is None."""
    names: list[str] | None
    """The names that occur."""
    codes_z: npt.NDArray[np.int64]
    """Which of `names` each gene has."""


def flat_cells(cells: Sequence[Mapping[str, Any]]) -> Flat | None:
    """Cells as arrays; None where they are of several forms, or not as the service wants them, which it will say."""
    parts = [_arrays(cell) for cell in cells]
    known = [part for part in parts if part is not None]
    of_tokens = {names is None for names, _ in known}
    if len(known) < len(parts) or len(of_tokens) != 1:
        return None
    named = [name for names, _ in known for name in names or ()]
    code_of = {name: code for code, name in enumerate(dict.fromkeys(named))}
    values = [value for _, values in known for value in values]
    return Flat(
        ids=[cell.get("id") for cell in cells],
        indptr=np.cumsum([0, *(len(values) for _, values in known)]),
        values_z=np.array(values, dtype=np.uint32 if of_tokens == {True} else np.float64),
        names=None if of_tokens == {True} else list(code_of),
        codes_z=np.array([code_of[name] for name in named], dtype=np.int64),
    )


def _arrays(cell: Mapping[str, Any]) -> tuple[list[str] | None, list[Any]] | None:
    """Names and counts, or None and tokens, of a cell in the JSON form; None where it is no such cell."""
    given, form = cell.get("id"), cell.keys() - {"id"}
    if not (given is None or isinstance(given, str)):
        return None
    if form == {"tokens"}:
        tokens = cell["tokens"]
        fits = isinstance(tokens, list) and all(type(one) is int and 0 <= one <= LARGEST_TOKEN for one in tokens)
        return (None, tokens) if fits else None
    if form == {"counts"} and isinstance(cell["counts"], Mapping):
        names, values = list(cell["counts"]), list(cell["counts"].values())
    elif form == {"genes", "values"}:
        names, values = cell["genes"], cell["values"]
    else:
        return None
    fits = isinstance(names, list) and isinstance(values, list) and len(names) == len(values)
    plain = fits and all(isinstance(one, str) for one in names) and all(type(one) in (int, float) for one in values)
    return (names, values) if plain else None
