"""The first screen of the report: what was found, in sentences that are worked out from the numbers beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from genescale.ingestion.reports.report_figures import escaped
from genescale.perturbation.reports.screen_tables import CLASS, LEVEL, SHIFT, STATE, ScreenTables, strength

DOING = {
    "delete": "Deleting",
    "overexpress": "Overexpressing",
    "inhibit": "Inhibiting",
    "activate": "Activating",
    "replace": "Setting the rank of",
}
MOST_NAMED = 3


def headline(tables: ScreenTables) -> str:
    """The verdict: a sentence on the cell shift, and one on each state and head; and the tiles."""
    told = [sentence(tables.of(readout), readout) for readout in _headed(tables)]
    found = tables.effects.filter((pl.col("q") < LEVEL) & pl.col("readout").is_in(_headed(tables)))
    kind = "" if len(found) else "open"
    text = "".join(f"<div>{escaped(line)}</div>" for line in told)
    tiles = "".join(f"<div><b>{escaped(value)}</b><span>{escaped(name)}</span></div>" for value, name in _tiles(tables))
    return f'<div class="verdict {kind}">{text}</div><div class="tiles">{tiles}</div>'


def sentence(effects: pl.DataFrame, readout: str) -> str:
    """What the screen says of one read-out; `effects` are its rows, strongest first."""
    usable = effects.filter(pl.col("n_edited") > 0)
    if usable.is_empty():
        return f"No cell was edited, so there is nothing to say of {what(readout)}."
    tested = usable.filter(pl.col("p").is_not_null())
    if tested.is_empty():
        best = usable.row(0, named=True)
        return (
            f"{_doing(best)} {best['symbol']} has the largest {what(readout)}, {signed(best['mean'])}"
            f"{interval(best['ci_low'], best['ci_high'])}. Nothing is tested: no edit has matched controls."
        )
    found = tested.filter(pl.col("q") < LEVEL)
    above, below = (found.filter(sign) for sign in (pl.col("excess") > 0, pl.col("excess") < 0))
    if found.is_empty():
        best = tested.row(0, named=True)
        if len(tested) == 1:
            return (
                f"The one tested edit, {best['symbol']}, does not differ from its matched controls in {what(readout)}: "
                f"excess {_excess(best)}."
            )
        return (
            f"None of {len(tested):,} tested edits differs from its matched controls in {what(readout)} at a false "
            f"discovery rate of {LEVEL:.0%}; the largest excess is that of {best['symbol']}, {_excess(best)}."
        )
    differ = "edits differ from their" if len(found) > 1 else "edits differs from its"
    head = f"{len(found):,} of {len(tested):,} tested {differ} matched controls in {what(readout)} at a false "
    head += f"discovery rate of {LEVEL:.0%} ({len(above):,} above, {len(below):,} below). "
    first = above.row(0, named=True) if len(above) else below.row(-1, named=True)
    side = "above" if len(above) else "below"
    return head + f"{_doing(first)} {first['symbol']} is furthest {side} them, by {_excess(first)}."


def what(readout: str) -> str:
    """A read-out in words."""
    if readout.startswith(STATE):
        return f"movement toward '{readout.removeprefix(STATE)}'"
    if readout.startswith(CLASS):
        return f"change in the probability of '{readout.removeprefix(CLASS)}'"
    return "cell shift" if readout == SHIFT else readout.replace("_", " ")


def signed(value: float | None) -> str:
    """A small number with three digits."""
    return "–" if value is None or value != value else f"{value:.3g}"


def probability(value: float | None) -> str:
    """A p or q with two digits; a dash where there is none, and a bound where it is too small for a number."""
    if value is None:
        return "–"
    return "<1e-300" if value < 1e-300 else f"{value:.2g}"


def interval(low: float | None, high: float | None) -> str:
    """A 95 % interval in brackets; empty when there is none."""
    return "" if low is None or high is None or low != low else f" (95 %: {signed(low)} to {signed(high)})"


def named(symbols: Sequence[str]) -> str:
    """A list of names, the first few written out."""
    shown = ", ".join(symbols[:MOST_NAMED])
    return shown + (f" and {len(symbols) - MOST_NAMED:,} more" if len(symbols) > MOST_NAMED else "")


def _headed(tables: ScreenTables) -> list[str]:
    """The read-outs that get a sentence: the shift, every state, and no class (they are in their own part)."""
    return [readout for readout in tables.readouts if not readout.startswith(CLASS)]


def _doing(row: Mapping[str, Any]) -> str:
    return DOING.get(str(row["kind"]), str(row["kind"]).capitalize())


def _excess(row: Mapping[str, Any]) -> str:
    told = f"{signed(row['excess'])}{interval(row['excess_ci_low'], row['excess_ci_high'])}"
    if row["q"] is None:
        return told
    q = probability(row["q"])
    return f"{told}, q {q}" if q.startswith("<") else f"{told}, q = {q}"


def _tiles(tables: ScreenTables) -> list[tuple[str, str]]:
    first = tables.of(tables.readouts[0])
    shifts = tables.cell_shifts
    tested, found = first.filter(pl.col("p").is_not_null()), first.filter(pl.col("q") < LEVEL)
    donors = shifts["donor_id"].drop_nulls().n_unique()
    edited = shifts.filter((pl.col("role") == "edit") & (pl.col("outcome") == "edited"))
    largest = first.select(pl.col(strength(first)).max()).item()
    return [
        (f"{shifts.select('dataset_id', 'source_row').n_unique():,}", "cells"),
        (f"{donors:,}" if donors else "not known", "donors"),
        (f"{len(first):,}", "edits"),
        (f"{len(edited):,}", "edited cells compared"),
        (f"{len(tested):,}", "edits tested against matched controls"),
        (f"{len(found):,}", f"found at q < {LEVEL:g}"),
        (signed(largest), f"largest {'excess shift' if len(tested) else 'mean shift'}"),
        (str(first["over"].drop_nulls().first() or "–") + "s", "intervals are over"),
    ]
