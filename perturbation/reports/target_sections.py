"""Genes that move under edits: lists of genes held against matched ones, and the genes that move most."""

from __future__ import annotations

from typing import Any

import polars as pl

from genescale.ingestion.reports.report_figures import escaped, number
from genescale.perturbation.reports.rows import Mark, Row, rows_figure
from genescale.perturbation.reports.screen_tables import ScreenTables
from genescale.perturbation.reports.sections import ROWS_IN_TABLE, html_table
from genescale.perturbation.reports.sentences import interval, probability, signed
from genescale.perturbation.statistics.targets import GENE_SHIFT, MASKED_GENE, UNLISTED, target_summary

MOST_ROWS = 25
SERIES = {
    GENE_SHIFT: ("against matched genes", "raw shifts"),
    MASKED_GENE: ("against matched genes", "raw falls"),
}
MEASURES = {
    GENE_SHIFT: {"auroc_shift": "raw shift", "auroc": "fold over controls", "auroc_matched": "against matched genes"},
    MASKED_GENE: {"auroc_shift": "raw fall", "auroc": "fall beyond controls", "auroc_matched": "against matched genes"},
}
ABOUT = {
    GENE_SHIFT: "<p>Do the genes of a list move more under an edit than genes matched to them in how far control edits "
    "move them, and in how many cells they stand? 0.5 is chance. Raw shifts (hollow) also hold what any edit does at "
    "that rank; the matched comparison (filled) does not.</p>",
    MASKED_GENE: "<p>Hidden behind a mask, do the genes of a list become less probable under an edit than genes "
    "matched to them in how control edits change them, and in how many cells they stand? 0.5 is chance; below it they "
    "become more probable. Raw (hollow): without the control edits taken off. Genes that merely go with the edited one "
    "fall as well, and a small or briefly trained model finds nothing: set the correlation of expression within cell "
    "types, or the partial correlation, beside any claim.</p>",
}


def targets(tables: ScreenTables) -> str:
    """The listed genes against matched genes under each edit, for each read-out; nothing without lists."""
    if tables.targets is None or tables.targets.is_empty():
        return ""
    parts = [_of_readout(part, str(name)) for (name,), part in tables.targets.group_by("readout", maintain_order=True)]
    return f"<h2>Lists of genes</h2>{''.join(parts)}"


def _of_readout(table: pl.DataFrame, readout: str) -> str:
    known = table.filter(pl.col("auroc_matched").is_not_null())
    text = f"<h3>Read-out: {readout}</h3>{ABOUT[readout]}"
    if known.is_empty():
        return f"{text}<p>No edit moved enough genes of a list to compare.</p>"
    ordered = known.sort("p", "auroc_matched", descending=[False, True], nulls_last=True)
    drawn = ordered.filter(pl.col("against") == UNLISTED)
    drawn = drawn if len(drawn) else ordered
    figure = rows_figure(
        [_row(row) for row in drawn.head(MOST_ROWS).iter_rows(named=True)],
        SERIES[readout],
        title="AUROC with 95 % interval",
        beside="genes",
        label=f"lists of genes, {readout}",
        reference=0.5,
    )
    caption = (
        f"The {min(len(drawn), MOST_ROWS)} strongest of {len(drawn):,} pairs of edit and list (by p; lists against "
        "each other stand in the table). The interval is over the genes of the list, which move together: it says "
        "little of another list, so trust p, which compares with the same list under other edits."
    )
    return (
        f'{text}<div class="pair"><figure>{figure}<figcaption>{caption}</figcaption></figure>'
        f"<div>{_means(table)}</div></div>{_table(ordered)}"
    )


def _row(row: dict[str, Any]) -> Row:
    against = "" if row["against"] == UNLISTED else f" / {row['against']}"
    marks = [Mark(series=0, value=row["auroc_matched"], low=row["ci_low"], high=row["ci_high"])]
    if row["auroc_shift"] is not None:
        marks.append(Mark(series=1, value=row["auroc_shift"]))
    return Row(name=f"{row['symbol']}: {row['list']}{against}", beside=number(row["n_genes"]), marks=marks)


def _means(table: pl.DataFrame) -> str:
    body = "".join(
        f'<tr><td class="name">{escaped(row["list"])}</td><td>{escaped(row["against"])}</td>'
        f'<td>{escaped(MEASURES[row["readout"]][row["measure"]])}</td><td class="number">{number(row["n_edits"])}</td>'
        f'<td class="number">{signed(row["mean"])}'
        f"{interval(row['ci_low'], row['ci_high']).replace('95 %: ', '')}</td></tr>"
        for row in target_summary(table).iter_rows(named=True)
        if row["n_edits"]
    )
    heads = (("list", "name"), ("against", ""), ("what", ""), ("edits", "number"), ("mean AUROC", "number"))
    return f"<h3>Over all edits</h3>{html_table(heads, body)}" if body else ""


def _table(ordered: pl.DataFrame) -> str:
    heads = (
        ("edit", "name"), ("list", ""), ("against", ""), ("genes", "number"), ("raw", "number minor"),
        ("over controls", "number minor"), ("matched", "number"), ("p", "number"), ("q", "number"),
    )  # fmt: skip
    body = "".join(
        f'<tr><td class="name">{escaped(row["symbol"])}</td><td>{escaped(row["list"])}</td>'
        f'<td>{escaped(row["against"])}</td><td class="number">{number(row["n_genes"])}</td>'
        f'<td class="number minor">{signed(row["auroc_shift"])}</td>'
        f'<td class="number minor">{signed(row["auroc"])}</td><td class="number">{signed(row["auroc_matched"])}</td>'
        f'<td class="number">{escaped(probability(row["p"]))}</td>'
        f'<td class="number">{escaped(probability(row["q"]))}</td></tr>'
        for row in ordered.head(ROWS_IN_TABLE).iter_rows(named=True)
    )
    shown = min(len(ordered), ROWS_IN_TABLE)
    more = f" of {len(ordered):,}" if len(ordered) > shown else ""
    return f"<details><summary>{shown:,}{more} comparisons in numbers</summary>{html_table(heads, body)}</details>"


def affected(tables: ScreenTables) -> str:
    """Genes that the edits move most, beside how far control edits move them; nothing without gene shifts."""
    if tables.gene_shifts is None:
        return ""
    head = "<h2>Genes that move</h2>"
    if tables.genes is None:
        return f"{head}<p>Too many pairs of edit and gene for one table, or none: see gene_shifts.parquet.</p>"
    known = tables.genes.filter(pl.col("top_log2_fold").is_not_null())
    table = known.sort("top_log2_fold", "affected_gene_id", descending=[True, False]).head(MOST_ROWS)
    names = table["affected_symbol"] if "affected_symbol" in table.columns else table["affected_gene_id"]
    body = "".join(
        f'<tr><td class="name">{escaped(name)}</td><td class="number">{number(row["n_edits"])}</td>'
        f'<td class="number">{signed(row["mean_shift"])}</td><td class="number">{signed(row["mean_log2_fold"])}</td>'
        f'<td class="name">{escaped(row["top_symbol"])}</td><td class="number">{signed(row["top_log2_fold"])}</td></tr>'
        for name, row in zip(names, table.iter_rows(named=True), strict=True)
    )
    heads = (
        ("gene", "name"), ("edits", "number"), ("mean shift", "number"), ("mean log2 fold", "number"),
        ("most under", "name"), ("log2 fold there", "number"),
    )  # fmt: skip
    text = (
        "How far each gene's own embedding moves, as a fold over its movement under control edits (or under the other "
        f"edits, where there are no controls). The {len(table)} of {len(tables.genes):,} genes with the largest fold "
        "under any edit; genes.csv has all, gene_shifts.parquet every pair."
    )
    return f"{head}<p>{text}</p>{html_table(heads, body)}"
