"""Genes edited together: their interactions as a map, beside the sum of the single edits, and as a table."""

from __future__ import annotations

import numpy as np
import polars as pl

from genescale.ingestion.reports.report_figures import escaped, number
from genescale.perturbation.reports.axes import short
from genescale.perturbation.reports.heat_map import heat_map
from genescale.perturbation.reports.rows import Mark, Row, rows_figure
from genescale.perturbation.reports.screen_tables import LEVEL, SHIFT, STATE, ScreenTables, strength
from genescale.perturbation.reports.sections import ROWS_IN_TABLE, html_table
from genescale.perturbation.reports.sentences import interval, probability, signed, what

TOGETHER = "+"
MOST_GENES = 24
MOST_PAIRS = 25
PAIR_SERIES = ("both genes edited", "sum of the single edits")


def pairs(tables: ScreenTables) -> str:
    """Interactions of the pairs, combined minus the sum of the singles; nothing without pairs."""
    if tables.pairs is None or tables.pairs.is_empty():
        return ""
    parts = [_pairs_of(tables.pairs.filter(pl.col("readout") == name), name) for name in _drawn_readouts(tables)]
    text = (
        "<p>The interaction is the effect of editing genes together minus the sum of the effects of editing each "
        "alone, cell by cell: above zero, together they do more. A shift is no sum even for genes that have nothing to "
        "do with each other, so where there are matched controls, their interaction is subtracted (the excess).</p>"
    )
    return f"<h2>Interactions</h2>{text}{''.join(parts)}"


def _drawn_readouts(tables: ScreenTables) -> list[str]:
    return [name for name in tables.readouts if name == SHIFT or name.startswith(STATE)]


def _pairs_of(table: pl.DataFrame, readout: str) -> str:
    known = table.filter(pl.col("n_edited") > 0)
    if known.is_empty():
        return f"<h3>{escaped(what(readout).capitalize())}</h3><p>No cell has a pair and both of its single edits.</p>"
    column = "excess" if strength(known.with_columns(mean="interaction")) == "excess" else "interaction"
    ordered = known.sort(pl.col(column).abs(), "edit_id", descending=[True, False], nulls_last=True)
    head = f"<h3>{escaped(what(readout).capitalize())}</h3><p>{escaped(_pair_sentence(ordered, column))}</p>"
    figures = f"<div>{_map(ordered, column)}</div><div>{_ranked(ordered)}</div>"
    return f'{head}<div class="pair">{figures}</div>{_pair_table(ordered)}'


def _pair_sentence(ordered: pl.DataFrame, column: str) -> str:
    tested, found = ordered.filter(pl.col("p").is_not_null()), ordered.filter(pl.col("q") < LEVEL)
    best = (found if len(found) else ordered).row(0, named=True)
    value = f"{signed(best[column])}{interval(*(best[f'{_prefix(column)}ci_{end}'] for end in ('low', 'high')))}"
    if found.is_empty():
        return (
            f"None of {len(tested):,} tested sets of genes interacts at a false discovery rate of {LEVEL:.0%}; the "
            f"largest interaction is that of {best['symbol']}, {value}."
        )
    more, less = (len(found.filter(sign)) for sign in (pl.col(column) > 0, pl.col(column) < 0))
    return (
        f"{len(found):,} of {len(tested):,} tested sets of genes interact at a false discovery rate of {LEVEL:.0%}: "
        f"{more:,} do more together, {less:,} less. The largest interaction is that of {best['symbol']}, {value}."
    )


def _prefix(column: str) -> str:
    return "excess_" if column == "excess" else ""


def _map(ordered: pl.DataFrame, column: str) -> str:
    """Genes against genes, those with the largest interactions where they are many."""
    two = ordered.filter(pl.col("gene_id").str.count_matches(TOGETHER, literal=True) == 1)
    members = [tuple(text.split(TOGETHER)) for text in two["gene_id"].to_list()]
    symbols = [text.split(TOGETHER) for text in two["symbol"].to_list()]
    named: dict[str, str] = {}
    for pair, shown in zip(members, symbols, strict=True):
        for place, gene in enumerate(pair):
            if len(named) < MOST_GENES:
                named.setdefault(gene, shown[place] if len(shown) == 2 else gene)
    genes = sorted(named, key=lambda gene: named[gene])
    if len(genes) < 3:
        return ""
    at = {gene: place for place, gene in enumerate(genes)}
    values, marked = np.full((len(genes), len(genes)), np.nan), np.zeros((len(genes), len(genes)), dtype=bool)
    for (one, other), value, q in zip(members, two[column].to_list(), two["q"].to_list(), strict=True):
        if one in at and other in at and value is not None:
            for i, j in ((at[one], at[other]), (at[other], at[one])):
                values[i, j], marked[i, j] = value, q is not None and q < LEVEL
    names = [named[gene] for gene in genes]
    figure = heat_map(values, names, names, what="interaction", label="interactions of pairs", marked=marked)
    all_genes = len({gene for pair in members for gene in pair})
    left_out = (
        f" The {len(genes)} genes of the largest interactions, of {all_genes:,}." if all_genes > len(genes) else ""
    )
    return f"<figure>{figure}<figcaption>* marks q &lt; {LEVEL:g}.{left_out}</figcaption></figure>"


def _ranked(ordered: pl.DataFrame) -> str:
    rows = [
        Row(
            name=row["symbol"],
            beside=number(row["n_edited"]),
            marks=[
                Mark(
                    series=0,
                    value=row["combined"],
                    low=None if row["ci_low"] is None else row["sum_of_singles"] + row["ci_low"],
                    high=None if row["ci_high"] is None else row["sum_of_singles"] + row["ci_high"],
                ),
                Mark(series=1, value=row["sum_of_singles"]),
            ],
        )
        for row in ordered.filter(pl.col("combined").is_not_null()).head(MOST_PAIRS).iter_rows(named=True)
    ]
    figure = rows_figure(
        rows, PAIR_SERIES, title="mean effect", beside="cells", label="pairs beside the sum of singles"
    )
    caption = (
        f"The {len(rows)} largest interactions. The line is the 95 % interval of the interaction, drawn around the sum "
        "of the single edits: where it leaves the hollow mark out, the pair is not additive."
    )
    return f"<figure>{figure}<figcaption>{caption}</figcaption></figure>"


def _pair_table(ordered: pl.DataFrame) -> str:
    heads = (
        ("genes", "name"), ("cells", "number"), ("donors", "number minor"), ("together", "number"),
        ("sum of singles", "number"), ("interaction", "number"), ("excess", "number"), ("p", "number minor"),
        ("q", "number"),
    )  # fmt: skip
    body = "".join(
        f'<tr><td class="name">{escaped(short(row["symbol"], 60))}</td>'
        f'<td class="number">{number(row["n_edited"])}</td>'
        f'<td class="number minor">{number(row["n_donors"])}</td><td class="number">{signed(row["combined"])}</td>'
        f'<td class="number">{signed(row["sum_of_singles"])}</td><td class="number">{signed(row["interaction"])}</td>'
        f'<td class="number">{signed(row["excess"])}</td><td class="number minor">{escaped(probability(row["p"]))}</td>'
        f'<td class="number">{escaped(probability(row["q"]))}</td></tr>'
        for row in ordered.head(ROWS_IN_TABLE).iter_rows(named=True)
    )
    shown = min(len(ordered), ROWS_IN_TABLE)
    more = f" of {len(ordered):,}" if len(ordered) > shown else ""
    return f"<details><summary>{shown:,}{more} interactions in numbers</summary>{html_table(heads, body)}</details>"


def has_pairs(cell_shifts: pl.DataFrame) -> bool:
    """Whether any set of genes was edited together whose genes were each edited alone as well."""
    ids = cell_shifts.filter(pl.col("role") == "edit")["gene_id"].unique().to_list()
    single = {text for text in ids if TOGETHER not in text}
    return any(set(text.split(TOGETHER)) <= single for text in ids if TOGETHER in text)
