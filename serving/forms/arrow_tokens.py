"""Tokens as an Arrow IPC stream: one row for each cell, beside what `arrow_answers` says of it

    tokens             list<uint32>, with <cls> and <eos> where the model has them
    genes, symbols     list<dictionary<utf8>>, in rank order

Axis suffixes: `t` tokens of one cell, `r` genes of all cells, `n` cells.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from genescale.serving.answering.cells import PreparedCell
from genescale.serving.forms.arrow_answers import cell_columns, stream_of
from genescale.serving.schemas_tokens import TokensFacts


def render_arrow(
    facts: TokensFacts,
    cells: Sequence[PreparedCell],
    tokens: Sequence[np.ndarray],
    names_by_token: Sequence[np.ndarray],
    *,
    frame: int,
) -> bytes:
    """The answer as one record batch.

    tokens: `(t,)` of each cell; names_by_token: gene id, then symbol, of each token; frame: special tokens on each
    side of a cell's genes.
    """
    genes = [tokens_t[frame : len(tokens_t) - frame] for tokens_t in tokens]
    used, codes_r = np.unique(np.concatenate(genes), return_inverse=True)
    ends_n = _ends(genes)
    named = {
        name: pa.ListArray.from_arrays(
            ends_n, pa.DictionaryArray.from_arrays(pa.array(codes_r, pa.int32()), pa.array(by_token[used], pa.utf8()))
        )
        for name, by_token in zip(("genes", "symbols"), names_by_token, strict=True)
    }
    flat = pa.array(np.concatenate(tokens).astype(np.uint32))
    lists = pa.ListArray.from_arrays(_ends(tokens), flat)
    return stream_of({**cell_columns(cells), "tokens": lists, **named}, facts)


def _ends(parts: Sequence[np.ndarray]) -> pa.Array:
    return pa.array(np.cumsum([0, *map(len, parts)]), pa.int32())
