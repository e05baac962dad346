"""Edited copies of cells, in chunks that go through the encoder together.

Legend: `t` tokens of a cell.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from genescale.perturbation.editing.cell import Cell
from genescale.perturbation.editing.edits import Edit, apply
from genescale.perturbation.editing.requests import EditRequest
from genescale.platform.vocabulary import Vocabulary

Place = tuple[int, int]
"""Which cell, and which of its requests."""
BaselineKey = tuple[int, bytes]


@dataclass(frozen=True, slots=True, eq=False)
class Variant:
    """One request applied to one cell."""

    place: Place
    request: EditRequest
    edit: Edit
    baseline_key: BaselineKey
    """Equal for variants that are compared with the same tokens."""


def variants_of(
    cells: Sequence[np.ndarray],
    requests: Sequence[Sequence[EditRequest]],
    vocabulary: Vocabulary,
    *,
    window: int,
    uncropped: Mapping[int, np.ndarray],
) -> Iterator[Variant]:
    """Each request of each cell in turn, applied; InputError for what cannot be edited.

    `uncropped` holds all genes in rank order of the cells (by position) that a refilling deletion needs.
    """
    for cell, (tokens_t, wanted) in enumerate(zip(cells, requests, strict=True)):
        checked = Cell.of(tokens_t, vocabulary)
        for at, request in enumerate(wanted):
            edit = apply(request, checked, vocabulary, window=window, uncropped_t=uncropped.get(cell))
            # A baseline is the cell itself or what a full window left of it, which is shorter.
            own = edit.baseline.tobytes() if len(edit.baseline) < len(tokens_t) else b""
            yield Variant((cell, at), request, edit, (cell, own))


def chunks(variants: Iterable[Variant], tokens_per_chunk: int) -> Iterator[list[Variant]]:
    """Neighbours together, none of whose chunks holds more tokens unless it is a single variant."""
    chunk: list[Variant] = []
    n_tokens = 0
    for variant in variants:
        length = len(variant.edit.tokens)
        if chunk and n_tokens + length > tokens_per_chunk:
            yield chunk
            chunk, n_tokens = [], 0
        chunk.append(variant)
        n_tokens += length
    if chunk:
        yield chunk
