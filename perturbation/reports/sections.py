"""The report's main part: ranked effects with intervals, the volcano, and effect against detection and rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from genescale.ingestion.reports.report_figures import escaped, number, percent
from genescale.perturbation.reports.axes import axis_over
from genescale.perturbation.reports.rows import Mark, Row, rows_figure
from genescale.perturbation.reports.scatter import GREY, Cloud, Named, Rules, scatter
from genescale.perturbation.reports.screen_tables import LEVEL, ScreenTables, strength
from genescale.perturbation.reports.sentences import interval, probability, signed, what

TOP = 25
ROWS_IN_TABLE = 200
ROWS_OPEN = 15
# Below this q is drawn: a bootstrap or permutation of a few thousand draws says no more.
SMALLEST_Q = 1e-12
ABOVE, BELOW = "q0", "q1"
SERIES = ("the edit", "its matched controls in the same cells")


def ranking(tables: ScreenTables, readout: str, *, top: int = TOP, heading: str = "") -> str:
    """The strongest edits of a read-out as marks with intervals beside their controls, and as a table."""
    effects = tables.of(readout).filter(pl.col("n_edited") > 0)
    if effects.is_empty():
        return ""
    drawn = strongest(effects, top)
    figure = rows_figure(
        [_row(row) for row in drawn.iter_rows(named=True)],
        SERIES,
        title="mean with 95 % interval",
        beside="cells",
        label=f"strongest edits by {what(readout)}",
    )
    by = "excess over matched controls" if strength(effects) == "excess" else "mean; there are no controls"
    caption = (
        f"The {len(drawn)} strongest of {len(effects):,} edits by {by}. Filled: mean over edited cells; the line is "
        f"its 95 % interval over {effects['over'][0]}s. Hollow: control edits of the same cells, other genes at near "
        "ranks and of near expression, edited in the same way. * marks q < 0.05."
    )
    title = heading or "Strongest effects"
    return (
        f'<h2>{escaped(title)}</h2><div class="pair"><div><figure>{figure}<figcaption>{caption}</figcaption></figure>'
        f"</div><div>{volcano(effects, readout)}{mixture(effects)}</div></div>{effect_table(effects)}"
    )


def strongest(effects: pl.DataFrame, top: int) -> pl.DataFrame:
    """The edits to draw: those testable first, and of both signs where the read-out has two."""
    if len(effects) <= top:
        return effects.filter(pl.col(strength(effects)).is_not_null())
    usable = effects.filter(pl.col("testable"))
    usable = usable if len(usable) else effects
    column = strength(usable)
    usable = usable.filter(pl.col(column).is_not_null())
    if len(usable) <= top:
        return usable
    if (usable[column] < 0).sum() > 0.25 * len(usable):
        by_size = usable.sort(pl.col(column).abs(), "edit_id", descending=[True, False]).head(top)
        return by_size.sort(column, "edit_id", descending=[True, False])
    return usable.head(top)


def volcano(effects: pl.DataFrame, readout: str) -> str:
    """Excess over controls against the false discovery rate; a sentence where nothing was tested."""
    tested = effects.filter(pl.col("q").is_not_null() & pl.col("excess").is_not_null())
    if tested.is_empty():
        return (
            '<p class="soft">No volcano: no edit has matched controls to be tested against. Screen with '
            "<code>controls</code> (ten are usual), or with every gene of the cells, which then serve as each other's "
            "controls.</p>"
        )
    excess_e = tested["excess"].to_numpy()
    height_e = -np.log10(np.maximum(tested["q"].to_numpy(), SMALLEST_Q))
    found_e = tested["q"].to_numpy() < LEVEL
    above_e, below_e = found_e & (excess_e > 0), found_e & (excess_e <= 0)
    x = axis_over(excess_e, "excess over matched controls", zero=True)
    # The line of the false discovery rate is always on the figure.
    y = axis_over([*height_e.tolist(), -1.2 * float(np.log10(LEVEL))], "−log10 q", zero=True)
    clouds = [
        Cloud(name=f"q ≥ {LEVEL:g}", look=GREY, x_p=excess_e[~found_e], y_p=height_e[~found_e], opacity=0.5),
        Cloud(name="above controls", look=ABOVE, x_p=excess_e[above_e], y_p=height_e[above_e]),
        Cloud(name="below controls", look=BELOW, x_p=excess_e[below_e], y_p=height_e[below_e]),
    ]
    order = np.lexsort((-np.abs(excess_e), -height_e))
    names = tested["symbol"].to_list()
    named = [
        Named(
            name=names[e],
            x=float(excess_e[e]),
            y=float(height_e[e]),
            look=ABOVE if excess_e[e] > 0 else BELOW,
            said=f"{names[e]}: excess {excess_e[e]:.3g}, q {probability(tested['q'][int(e)])}",
        )
        for e in order.tolist()
        if found_e[e]
    ]
    rules = Rules(x=(0.0,), y=(-float(np.log10(LEVEL)),))
    figure = scatter(clouds, named, x, y, label=f"volcano of {what(readout)}", rules=rules)
    caption = (
        f"Each dot is an edit. Right: larger than that of matched controls; dashed: q = {LEVEL:g} "
        "(Benjamini–Hochberg over the tested edits of this read-out)."
    )
    if (tested["q"] < SMALLEST_Q).any():
        caption += f" A q below {SMALLEST_Q:g} is drawn at {SMALLEST_Q:g}."
    return f"<figure>{figure}<figcaption>{caption}</figcaption></figure>"


def mixture(effects: pl.DataFrame) -> str:
    """Whether the effects fall into two kinds, as a mixture of two normals sees it; nothing for few edits."""
    from genescale.perturbation.statistics.mixture import FEWEST_EDITS, impact_mixture

    column = strength(effects)
    known = effects.filter(pl.col(column).is_finite())
    if len(known) < FEWEST_EDITS or known[column].n_unique() < FEWEST_EDITS:
        return ""
    found = impact_mixture(effects, column=column)
    if not found.separated:
        text = "One normal distribution describes the effects as well as two: there is no separate group of edits."
    else:
        n = int(found.edits["impact"].sum())
        text = (
            f"Two normal distributions describe the effects better than one: {n:,} of {len(known):,} edits belong to "
            f"the group with impact (mean {signed(found.impact_mean)}), the others lie around "
            f"{signed(found.other_mean)}. This describes the sample; it is no test."
        )
    return f'<p class="soft">{text}</p>'


def detection(tables: ScreenTables, readout: str) -> str:
    """Effect against detection and against rank: what an effect must not merely be."""
    effects = tables.of(readout).filter((pl.col("n_edited") > 0) & pl.col("detection_rate").is_not_null())
    if len(effects) < 3:
        return ""
    ranks = (
        tables.cell_shifts.filter((pl.col("role") == "edit") & pl.col("rank").is_not_null())
        .group_by("edit_id")
        .agg(median_rank=pl.col("rank").median())
    )
    effects = effects.join(ranks, on="edit_id", how="left", maintain_order="left")
    left = _against(effects, "detection_rate", "share of the cells that have the gene", readout)
    right = _against(
        effects.filter(pl.col("median_rank").is_not_null()), "median_rank", "median rank (0 = first)", readout
    )
    return (
        "<h2>Effect, detection and rank</h2><p>Editing a gene moves a cell also because a token of that rank is gone "
        "or moved, and a gene that few cells have is known less well. The mean (grey) may follow detection and rank; "
        "the excess over matched controls (blue) should not.</p>"
        f'<div class="pair"><div>{left}</div><div>{right}</div></div>'
    )


def _against(effects: pl.DataFrame, column: str, title: str, readout: str) -> str:
    if effects.is_empty():
        return ""
    x_e, mean_e = effects[column].cast(pl.Float64).to_numpy(), effects["mean"].to_numpy()
    excess = effects.filter(pl.col("excess").is_not_null())
    clouds = [Cloud(name="mean", look=GREY, x_p=x_e, y_p=mean_e, opacity=0.6)]
    values = [*mean_e.tolist(), *excess["excess"].to_list()]
    if len(excess):
        clouds.append(
            Cloud(
                name="excess over controls",
                look=ABOVE,
                x_p=excess[column].cast(pl.Float64).to_numpy(),
                y_p=excess["excess"].to_numpy(),
            )
        )
    x, y = axis_over(x_e, title, zero=True), axis_over(values, what(readout), zero=True)
    figure = scatter(clouds, [], x, y, label=f"{what(readout)} against {title}", rules=Rules(y=(0.0,)))
    told = f"Spearman correlation with {title}: mean {_rank_correlation(x_e, mean_e)}"
    if len(excess):
        told += f", excess {_rank_correlation(clouds[1].x_p, clouds[1].y_p)}"
    return f"<figure>{figure}<figcaption>{escaped(told)}.</figcaption></figure>"


def _rank_correlation(x_e: np.ndarray, y_e: np.ndarray) -> str:
    from scipy.stats import rankdata

    if len(x_e) < 3 or np.ptp(x_e) == 0 or np.ptp(y_e) == 0:
        return "–"
    return f"{np.corrcoef(rankdata(x_e), rankdata(y_e))[0, 1]:+.2f}"


def effect_table(effects: pl.DataFrame, *, rows: int = ROWS_IN_TABLE) -> str:
    """The strongest edits in numbers; the files have all."""
    shown = effects.head(rows)
    heads = (
        ("gene", "name"), ("id", "minor"), ("cells", "number"), ("donors", "number minor"),
        ("detected", "number minor"), ("mean", "number"), ("controls", "number"), ("excess", "number"),
        ("p", "number minor"), ("q", "number"), ("", ""),
    )  # fmt: skip
    body = "".join(_table_row(row) for row in shown.iter_rows(named=True))
    more = f" of {len(effects):,}; the tables beside this page have all" if len(effects) > len(shown) else ""
    opened = " open" if len(shown) <= ROWS_OPEN else ""
    return (
        f"<details{opened}><summary>{len(shown):,} edits in numbers{more}</summary>{html_table(heads, body)}</details>"
    )


def html_table(heads: Sequence[tuple[str, str]], body: str) -> str:
    """A table in a box that scrolls where it is wider than the screen."""
    head = "".join(f'<th class="{kind}">{escaped(name)}</th>' for name, kind in heads)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _row(row: dict[str, Any]) -> Row:
    marks = [Mark(series=0, value=row["mean"], low=row["ci_low"], high=row["ci_high"])]
    if row["control_mean"] is not None:
        marks.append(Mark(series=1, value=row["control_mean"]))
    name = f"{row['symbol']} *" if row["q"] is not None and row["q"] < LEVEL else row["symbol"]
    return Row(name=name, beside=number(row["n_edited"]), marks=marks)


def _table_row(row: dict[str, Any]) -> str:
    def under(text: str) -> str:
        return f'<br><span class="soft interval">{escaped(text.strip(" ()"))}</span>' if text else ""

    mean = signed(row["mean"]) + under(_span(row["ci_low"], row["ci_high"]))
    excess = signed(row["excess"]) + under(_span(row["excess_ci_low"], row["excess_ci_high"]))
    q = probability(row["q"])
    found = row["q"] is not None and row["q"] < LEVEL
    return (
        f'<tr><td class="name">{escaped(row["symbol"])}</td><td class="minor">{escaped(_short_id(row["gene_id"]))}</td>'
        f'<td class="number">{number(row["n_edited"])}</td><td class="number minor">{number(row["n_donors"])}</td>'
        f'<td class="number minor">{percent(row["detection_rate"])}</td><td class="number">{mean}</td>'
        f'<td class="number">{signed(row["control_mean"])}</td><td class="number">{excess}</td>'
        f'<td class="number minor">{escaped(probability(row["p"]))}</td>'
        f'<td class="number">{f"<b>{escaped(q)}</b>" if found else escaped(q)}</td>'
        f'<td class="soft">{escaped("" if row["testable"] else row["reason"] or "")}</td></tr>'
    )


def _span(low: float | None, high: float | None) -> str:
    return interval(low, high).replace("95 %: ", "")


def _short_id(gene_id: str) -> str:
    genes = gene_id.split("+")
    return gene_id if len(genes) <= 3 else f"{'+'.join(genes[:2])}+ {len(genes) - 2} more"
