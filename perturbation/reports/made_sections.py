"""The end of the report: what was left out and why, the two passes, how it was measured, and what it was made of."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from genescale.ingestion.reports.report_figures import Segment, escaped, legend, number, percent, stacked_bar
from genescale.perturbation.reports.screen_tables import LEVEL, ScreenTables, settings_of
from genescale.perturbation.reports.sections import html_table
from genescale.perturbation.reports.sentences import signed
from genescale.perturbation.screening.two_pass import RANDOM, TOP
from genescale.platform.errors import InputError

OUTCOMES = {
    "edited": ("edited and compared", "#0072B2"),
    "absent": ("the cell lacks the gene", "#999999"),
    "undefined": ("no gene left to compare", "#D55E00"),
}
MOST_REASONS = 12
STRONGEST_SHARE = 0.02
"""Share of a cell's deletions that the report on two passes calls the strongest."""
HIDDEN = ("parts",)


def left_out(tables: ScreenTables) -> str:
    """Outcomes of all rows, and edits that could not be tested with the reason."""
    parts = []
    for role, name in (("edit", "Edits"), ("control", "Matched controls")):
        rows = tables.cell_shifts.filter(pl.col("role") == role)
        if len(rows):
            parts.append(_outcomes(rows, name))
    first = tables.of(tables.readouts[0])
    untested = first.filter(~pl.col("testable"))
    text = (
        f"<p>{len(untested):,} of {len(first):,} edits were not tested:</p>{_reasons(untested)}"
        if len(untested)
        else f"<p>All {len(first):,} edits were tested.</p>"
    )
    careful = first.filter(pl.col("testable") & (pl.col("reason") != ""))
    if len(careful):
        text += f"<p>{len(careful):,} of the tested edits need caution:</p>{_reasons(careful)}"
    cut = int(tables.cell_shifts["n_cut"].sum() or 0)
    if cut:
        text += (
            f"<p>{cut:,} genes at the end of full windows were cut to make room for inserted ones; edited and unedited "
            "cell were cut alike.</p>"
        )
    return f"<h2>What was left out</h2>{''.join(parts)}{text}"


def _outcomes(rows: pl.DataFrame, name: str) -> str:
    counts = dict(rows.group_by("outcome").len().iter_rows())
    segments = [
        Segment(shown, n, f"{number(n)} ({percent(n / len(rows))})", colour)
        for outcome, (shown, colour) in OUTCOMES.items()
        if (n := counts.get(outcome))
    ]  # fmt: skip
    head = f"<h3>{name}: {len(rows):,} pairs of cell and edit</h3>"
    return head + stacked_bar(segments, label=name) + legend(segments, values=True)


def _reasons(untested: pl.DataFrame) -> str:
    counts = (
        untested.group_by(pl.col("reason").fill_null("not said"))
        .agg(n=pl.len(), some=pl.col("symbol").sort().head(5))
        .sort("n", "reason", descending=[True, False])
    )
    body = "".join(
        f'<tr><td class="long">{escaped(row["reason"])}</td><td class="number">{row["n"]:,}</td>'
        f'<td class="soft">{escaped(", ".join(row["some"]))}{" …" if row["n"] > len(row["some"]) else ""}</td></tr>'
        for row in counts.head(MOST_REASONS).iter_rows(named=True)
    )
    return html_table((("why", ""), ("edits", "number"), ("such as", "")), body)


def two_passes(tables: ScreenTables) -> str:
    """What the first pass chose and what its random fraction says of the genes left out; nothing otherwise."""
    config = settings_of(tables.record, "two_pass")
    if not config or "chosen" not in tables.cell_shifts.columns:
        return ""
    rows = tables.cell_shifts.filter((pl.col("outcome") == "edited") & pl.col("control_of").is_null())
    chosen, drawn = (rows.filter(pl.col("chosen") == name)["shift"] for name in (TOP, RANDOM))
    text = (
        f"A first pass ({escaped(config.get('first_pass', ''))}) scored every gene of every cell; exact edits were "
        f"then computed for the highest {percent(config.get('top_fraction'))} of each cell ({len(chosen):,} pairs) and "
        f"for a random {percent(config.get('control_fraction'))} of the others ({len(drawn):,} pairs). "
    )
    if len(chosen) and len(drawn):
        beside = signed(_mean(drawn))
        text += f"The chosen move cells by {signed(_mean(chosen))} on average, the random others by {beside}. "
    text += f"{_recall(tables, config)} A gene that is not listed was not found unimportant: it was not computed."
    return f"<h2>Two passes</h2><p>{text}</p>"


def _recall(tables: ScreenTables, config: Mapping[str, Any]) -> str:
    """How many of the strongest deletions were made, as the random fraction tells, or why that cannot be said."""
    from genescale.perturbation.screening.two_pass_effects import recall_estimate

    if tables.first_pass is None:
        return ""
    share = min(STRONGEST_SHARE, float(config.get("top_fraction", STRONGEST_SHARE)) or STRONGEST_SHARE)
    try:
        found = recall_estimate(tables.first_pass, tables.cell_shifts, share=share)
    except InputError as error:
        return f"How many of the strongest deletions were missed cannot be told: {escaped(error.what)}"
    return (
        f"Of the strongest {percent(share)} of each cell's deletions an estimated {percent(found.recall)} were made "
        f"(at least {percent(found.at_least)} with 95 % confidence, from {found.n_random:,} random deletions)."
    )


def _mean(values: pl.Series) -> float:
    return float(values.mean())  # type: ignore[arg-type]


def methods(tables: ScreenTables) -> str:
    """How effects, intervals and tests were worked out, in the words of a methods section."""
    first = tables.of(tables.readouts[0])
    over = str(first["over"].drop_nulls().first() or "cell")
    donors = (
        "Donors, not cells, are the units of interval and test: cells of one donor are no independent witnesses."
        if over == "donor"
        else "<b>Only one donor is known, so intervals and tests are over cells. They say how sure the effect is in "
        "this sample, not whether it holds in another donor.</b>"
    )
    paragraphs = (
        "<b>Shift.</b> A cell's genes in rank order are the model's input. An edit changes that order; the shift is "
        "1 − the cosine between the embeddings before and after, by default the mean over the genes that stand in both "
        "cells and were not edited. 0 means that nothing moved.",
        "<b>Mean and interval.</b> Means are taken over the cells of each donor and then over donors; intervals hold "
        f"in 95 % of such samples of {over}s. {donors}",
        "<b>Matched controls.</b> In the same cell the same edit is made to other genes at near ranks and of near "
        "expression. The excess is the edit's effect minus the mean of its controls, cell by cell.",
        "<b>Test.</b> Any two genes differ, so with enough cells every excess leaves zero. p therefore asks more: "
        "whether the edit lies further out than single matched genes do, in the same donors. q is p after Benjamini "
        f"and Hochberg over all tested edits of a read-out; q &lt; {LEVEL:g} is called found.",
        "<b>What it does not say.</b> Effects are properties of the model. They rank hypotheses; they are no "
        "measurement of a cell from which a gene was removed.",
    )
    return "<h2>How it was measured</h2>" + "".join(f"<p>{text}</p>" for text in paragraphs)


def made_of(tables: ScreenTables, files: Sequence[str]) -> str:
    """The files beside the page, and the screen's record."""
    record = {name: value for name, value in tables.record.items() if name not in HIDDEN}
    listed = "".join(f"<li><code>{escaped(name)}</code></li>" for name in files)
    shown = json.dumps(record, indent=2, default=str, ensure_ascii=False, sort_keys=True)
    return (
        f"<h2>Files and settings</h2><p>Beside this page:</p><ul>{listed}</ul><details><summary>The screen's record: "
        f"model, corpus, settings, counts</summary><pre>{escaped(shown)}</pre></details>"
    )
