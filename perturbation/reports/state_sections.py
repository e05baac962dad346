"""Where edits move cells: toward start, goal and other states, and toward the classes of a head; and by cell type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl

from genescale.ingestion.reports.report_figures import escaped
from genescale.perturbation.reports.axes import axis_over, short
from genescale.perturbation.reports.heat_map import heat_map
from genescale.perturbation.reports.scatter import GREY, Cloud, Named, Rules, scatter
from genescale.perturbation.reports.screen_tables import (
    CLASS,
    LEVEL,
    SHIFT,
    STATE,
    ScreenTables,
    settings_of,
    strength,
)
from genescale.perturbation.reports.sections import ABOVE, BELOW, ranking, strongest
from genescale.perturbation.reports.sentences import sentence, what

MOST_ROWS, MOST_COLUMNS = 25, 20
LEAST_CELLS = 3
"""A mean over fewer edited cells is no statement on a cell type."""


def states(tables: ScreenTables) -> str:
    """The plane of start and goal, and for every state its ranked effects; nothing without states."""
    readouts = [readout for readout in tables.readouts if readout.startswith(STATE)]
    if not readouts:
        return ""
    start, goal = _start_and_goal(tables, readouts)
    text = (
        "<h2>Toward and away from states</h2><p>Movement toward a state is the edited cell's cosine with the state's "
        "mean embedding minus that of the unedited cell: above zero, the edit brings the cell nearer.</p>"
    )
    text += _plane(tables, start, goal) if start and goal else ""
    ordered = [name for name in (goal, start) if name] + [name for name in readouts if name not in (start, goal)]
    roles = {goal: " (goal)", start: " (start)"}
    return text + "".join(
        ranking(tables, name, heading=f"Toward '{name.removeprefix(STATE)}'{roles.get(name, '')}") for name in ordered
    )


def _start_and_goal(tables: ScreenTables, readouts: list[str]) -> tuple[str, str]:
    """Read-outs of the start and the goal as the screen's settings name them; of two states the two."""
    asked = states_asked(tables.record)
    found = [f"{STATE}{asked[role]}" if asked.get(role) else "" for role in ("start", "goal")]
    start, goal = (name if name in readouts else "" for name in found)
    return start, goal


def states_asked(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The states that a screen's settings ask for: `column`, `start`, `goal`, `alternatives`."""
    asked = settings_of(record, "readouts").get("states")
    return asked if isinstance(asked, Mapping) else {}


def _plane(tables: ScreenTables, start: str, goal: str) -> str:
    goals = tables.of(goal)
    column = strength(goals)
    both = goals.select("edit_id", "symbol", "q", x=column).join(
        tables.of(start).select("edit_id", y=column), on="edit_id", maintain_order="left"
    )
    both = both.filter(pl.col("x").is_not_null() & pl.col("y").is_not_null())
    if both.is_empty():
        return ""
    x_e, y_e = both["x"].to_numpy(), both["y"].to_numpy()
    found_e = both.select((pl.col("q") < LEVEL).fill_null(False)).to_series().to_numpy()
    held = "excess" if column == "excess" else "mean"
    x = axis_over(x_e, f"{held} toward the goal, '{short(goal.removeprefix(STATE), 16)}'", zero=True)
    y = axis_over(y_e, f"{held} toward the start, '{short(start.removeprefix(STATE), 16)}'", zero=True)
    wanted_e = found_e & (x_e > 0) & (y_e < 0)
    clouds = [
        Cloud(name=f"q ≥ {LEVEL:g} for the goal", look=GREY, x_p=x_e[~found_e], y_p=y_e[~found_e], opacity=0.5),
        Cloud(name="toward the goal, away from the start", look=ABOVE, x_p=x_e[wanted_e], y_p=y_e[wanted_e]),
        Cloud(name="other", look=BELOW, x_p=x_e[found_e & ~wanted_e], y_p=y_e[found_e & ~wanted_e]),
    ]
    symbols = both["symbol"].to_list()
    order = np.argsort(-np.hypot(x_e / (np.ptp(x_e) or 1), y_e / (np.ptp(y_e) or 1)), kind="stable")
    named = [
        Named(name=symbols[e], x=float(x_e[e]), y=float(y_e[e]), look=ABOVE if wanted_e[e] else BELOW,
              said=f"{symbols[e]}: goal {x_e[e]:+.3g}, start {y_e[e]:+.3g}")
        for e in order.tolist()
        if found_e[e]
    ]  # fmt: skip
    figure = scatter(clouds, named, x, y, label="movement toward start and goal", rules=Rules(x=(0.0,), y=(0.0,)))
    caption = "Lower right: edits that bring cells nearer to the goal and further from the start."
    return f'<div class="one"><figure>{figure}<figcaption>{caption}</figcaption></figure></div>'


def classes(tables: ScreenTables) -> str:
    """Change of each class's probability for the strongest edits as a map; nothing without a head."""
    readouts = [readout for readout in tables.readouts if readout.startswith(CLASS)]
    if not readouts:
        return ""
    by_class = {readout: tables.of(readout) for readout in readouts}
    column = strength(by_class[readouts[0]])
    stacked = pl.concat(
        [table.select("edit_id", "symbol", "readout", "q", "testable", x=column) for table in by_class.values()]
    )
    largest = (
        stacked.filter(pl.col("x").is_not_null())
        .group_by("edit_id", "symbol")
        .agg(size=pl.col("x").abs().max(), tested=pl.col("testable").any())
        .sort("tested", "size", "edit_id", descending=[True, True, False])
        .head(MOST_ROWS)
    )
    kept = readouts[:MOST_COLUMNS]
    values, marked = np.full((2, len(largest), len(kept)), np.nan)
    for j, readout in enumerate(kept):
        held = largest.join(
            by_class[readout].select("edit_id", "q", x=column), on="edit_id", how="left", maintain_order="left"
        )
        values[:, j] = held["x"].fill_null(np.nan).to_numpy()
        marked[:, j] = held["q"].fill_null(1.0).to_numpy()
    held_as = "excess change in probability" if column == "excess" else "mean change in probability"
    figure = heat_map(
        values, largest["symbol"].to_list(), [name.removeprefix(CLASS) for name in kept], what=held_as,
        label="changes of class probabilities by edit", marked=marked < LEVEL,
    )  # fmt: skip
    told = "".join(f"<li>{escaped(sentence(by_class[name], name))}</li>" for name in kept)
    left_out = f" The first {len(kept)} of {len(readouts)} classes." if len(readouts) > len(kept) else ""
    return (
        "<h2>Classes of the head</h2><p>Change in the probability of each class when the edited cell is classified "
        f"instead of the unedited one; * marks q &lt; {LEVEL:g}.{left_out}</p>"
        f'<div class="pair"><figure>{figure}</figure><ul>{told}</ul></div>'
    )


def cell_types(tables: ScreenTables) -> str:
    """Mean shift of the strongest edits in each cell type; nothing where fewer than two types are known."""
    edited = tables.cell_shifts.filter(
        (pl.col("role") == "edit") & (pl.col("outcome") == "edited") & pl.col("cell_type").is_not_null()
    )
    counts = edited.select("dataset_id", "source_row", "cell_type").unique().group_by("cell_type").len()
    frequent = counts.sort(["len", "cell_type"], descending=[True, False]).head(MOST_COLUMNS)
    if len(frequent) < 2:
        return ""
    rows = strongest(tables.of(SHIFT).filter(pl.col("n_edited") > 0), MOST_ROWS)
    means = (
        edited.group_by("edit_id", "cell_type")
        .agg(pl.col("shift").mean(), pl.len())
        .filter(pl.col("len") >= LEAST_CELLS)
    )
    values = np.full((len(rows), len(frequent)), np.nan)
    at = {edit: place for place, edit in enumerate(rows["edit_id"].to_list())}
    column_of = {name: place for place, name in enumerate(frequent["cell_type"].to_list())}
    for edit, cell_type, shift, _ in means.iter_rows():
        if edit in at and cell_type in column_of and shift is not None:
            values[at[edit], column_of[cell_type]] = shift
    names = [f"{name} ({cells:,})" for name, cells in frequent.iter_rows()]
    figure = heat_map(values, rows["symbol"].to_list(), names, what="mean cell shift", label="mean shift by cell type")
    return (
        f"<h2>By cell type</h2><p>Mean {what(SHIFT)} of the strongest edits in the cells of each type (number of cells "
        f"in brackets); a stroke where fewer than {LEAST_CELLS} cells have the gene.</p><figure>{figure}</figure>"
    )
