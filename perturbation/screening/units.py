"""Units of work: runs of (cell, edits) that take about equally long, so that workers end together.

Legend: `n` chosen cells, `p` pieces.

A piece is one cell with some of its edits; a unit is one or more pieces and becomes one result file. Several small
cells share a unit; a long cell with thousands of deletions is spread over several. Cost is tokens through the encoder,
which is close to proportional to time within one screen.
"""

from __future__ import annotations

import numpy as np
import polars as pl

# Units of a screen when `tokens_per_unit` is 0: many more than workers, so that no worker waits long for the last one,
# and each of them seconds of work, so that Ray's 20 ms for each do not count. A GPU embeds about a hundred times as
# many tokens a second as a processor, and its units are larger.
UNITS_WISHED = 256
UNIT_TOKENS_CPU = (16_384, 262_144)
UNIT_TOKENS_GPU = (1_048_576, 8_388_608)


def auto_tokens_per_unit(total_tokens: int, *, on_gpu: bool) -> int:
    """The size of a unit that suits a screen of so many tokens."""
    least, most = UNIT_TOKENS_GPU if on_gpu else UNIT_TOKENS_CPU
    return int(np.clip(total_tokens // UNITS_WISHED, least, most))


def cut_pieces(
    own_n: np.ndarray, edits_n: np.ndarray, per_edit_n: np.ndarray, tokens_per_unit: int, *, split: bool = True
) -> pl.DataFrame:
    """Pieces in the order of the cells: `unit`, `row` (of the cell), `start` and `stop` (of its edits), `tokens`.

    `own_n` are the tokens that each piece of a cell costs before any edit (its unedited self, a first pass), `edits_n`
    how many edits the cell has, and `per_edit_n` (float) the mean tokens of one. A cell that fits into one unit is
    never split; a unit passes `tokens_per_unit` only when a single edit does, or a single cell that must not be split.
    """
    pieces: list[tuple[int, int, int, int, int]] = []
    unit, filled = 0, 0.0
    for row, (own, n_edits, per_edit) in enumerate(
        zip(own_n.tolist(), edits_n.tolist(), per_edit_n.tolist(), strict=True)
    ):
        start = 0
        while start < n_edits or (start == 0 == n_edits):
            cost = own + (n_edits - start) * per_edit
            stop = n_edits
            if filled and filled + cost > tokens_per_unit:
                unit, filled = unit + 1, 0.0
            if split and cost > tokens_per_unit:
                room = max(0.0, tokens_per_unit - own)
                fitting = n_edits if per_edit * n_edits <= room else int(room // per_edit)
                stop = min(n_edits, start + max(1, fitting))
                cost = own + (stop - start) * per_edit
            pieces.append((unit, row, start, stop, round(cost)))
            filled, start = filled + cost, stop
            if n_edits == 0:
                break
    schema = {"unit": pl.Int32, "row": pl.Int64, "start": pl.Int32, "stop": pl.Int32, "tokens": pl.Int64}
    return pl.DataFrame(pieces, schema=schema, orient="row")
