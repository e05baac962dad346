"""Cells as the service takes them, from what a caller has: mappings, parallel arrays or tokens, of Python or NumPy."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from genescale.platform.errors import InputError

Cell = Mapping[str, Any]
"""`{"counts": {gene: count}}`, `{"genes": [...], "values": [...]}` or `{"tokens": [...]}`, and `"id"` if wanted; or
just `{gene: count}`."""
Vector = Sequence[float] | np.ndarray

# A mapping with one of these holding more than a number is a cell; any other is the counts of one.
FORMS = ("counts", "genes", "tokens")


def cell_json(cell: Cell) -> dict[str, Any]:
    """One cell as JSON carries it."""
    if any(isinstance(cell.get(form), (Mapping, Sequence, np.ndarray)) for form in FORMS):
        return {str(key): plain(value) for key, value in cell.items()}
    return {"counts": plain(cell)}


def doubles(vector: Vector) -> list[float]:
    """A vector as JSON carries it, with every bit that it has."""
    values: list[float] = np.asarray(vector, dtype=np.float64).tolist()
    return values


def plain(value: Any) -> Any:
    """NumPy numbers and arrays as JSON can carry them."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    return value


def json_bytes(body: Mapping[str, Any]) -> bytes:
    """A body as strict JSON; InputError for NaN, infinity and what JSON has no word for."""
    try:
        return json.dumps(body, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode()
    except (TypeError, ValueError) as error:
        raise InputError(
            f"the question cannot be written as JSON: {error}.", fix="Give finite numbers, texts and arrays of them."
        ) from None
