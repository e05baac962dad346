"""The evaluation of a model as one HTML page: what was found, each part with figure and table, and how it was measured.

The page needs no network and no script. Every text that comes from a file or a person is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from genescale.ingestion.reports.report_figures import escaped, number, percent
from genescale.ingestion.reports.report_style import STYLE
from genescale.platform.progress import clock
from genescale.training.evaluation.bundle_evaluation import BundleEvaluation
from genescale.training.evaluation.charts import CHART_STYLE, Mark, MarkRow, mark_rows
from genescale.training.evaluation.masked_genes import RANK_EDGES, SCORES, Score, ScoreRow
from genescale.training.evaluation.measured_cells import NUMBER_COLUMNS
from genescale.training.evaluation.mixing import LEAST_CELLS, LEVEL, Mixing
from genescale.training.evaluation.neighbourhoods import TABLES, ListCohesion, Neighbour, Neighbourhoods
from genescale.training.evaluation.umap_figure import FIGURE_STYLE, class_looks, number_looks, scatter

SERIES = {
    "model": "this model",
    "rank_bin_unseen": "frequency at the rank, genes shown elsewhere in the cell left out",
    "rank_bin": "frequency at the rank",
    "overall": "frequency at any rank",
}
SHORT = {"rank_bin_unseen": "rank, not shown", "rank_bin": "rank", "overall": "any rank"}
MOST_OPEN_COLUMNS = 1
PAGE_STYLE = (
    "figure{margin:0 0 1.2rem}figcaption{color:var(--soft);font-size:.88rem;max-width:52rem;margin:.2rem 0}"
    "td.genes{min-width:14rem;max-width:30rem}td.genes small{color:var(--soft)}"
    ".map-row{margin:.5rem 0 1.4rem}code{font-size:.85em}"
)


def page(evaluation: BundleEvaluation) -> str:
    """The whole page."""
    parts = [_head(evaluation)]
    if evaluation.overall:
        parts += [_hidden(evaluation), _columns(evaluation)]
    if evaluation.genes:
        parts.append(_genes(evaluation.genes))
    if evaluation.mixing:
        parts.append(_mixing(evaluation.mixing))
    if evaluation.coordinates_n2 is not None:
        parts.append(_maps(evaluation))
    parts.append(_methods(evaluation))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escaped(evaluation.title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}{CHART_STYLE}{FIGURE_STYLE}{PAGE_STYLE}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _head(evaluation: BundleEvaluation) -> str:
    facts = evaluation.provenance
    tiles = "".join(f"<div><b>{escaped(v)}</b><span>{escaped(n)}</span></div>" for v, n in _tiles(evaluation))
    sentence, good = verdict(evaluation)
    lead = [f"model {facts['model']} ({facts['bundle_digest'][:12]})", f"cells of {facts['corpus']}"]
    if facts["trained_on"]:
        same = " (the model may have seen these cells)" if _seen(evaluation) else ""
        lead.append(f"pretrained on {facts['trained_on']}{same}")
    return (
        f'<h1>Model evaluation</h1><p class="lead">{"<br>".join(escaped(line) for line in lead)}</p>'
        f'<div class="verdict {"good" if good else "bad"}">{escaped(sentence)}</div><div class="tiles">{tiles}</div>'
        + "".join(
            f'<p class="soft">Not measured: {escaped(part.replace("_", " "))} ({escaped(why)}).</p>'
            for part, why in evaluation.left_out_parts.items()
        )
    )


def _seen(evaluation: BundleEvaluation) -> bool:
    trained, measured = (str(evaluation.provenance[name]).rpartition("@")[0] for name in ("trained_on", "corpus"))
    return bool(trained) and trained == measured


def verdict(evaluation: BundleEvaluation) -> tuple[str, bool]:
    """One sentence on the model, and whether it is a good one."""
    row = evaluation.overall
    if row is None:
        return f"{len(evaluation.cells.index_n):,} cells measured.", True
    floor = f"{row.loss[row.best_floor].mean:.3f} of the best floor ({SERIES[row.best_floor]})"
    text = f"Hidden genes are found with a loss of {row.loss['model'].mean:.3f} nats against {floor}"
    gain = row.gain
    sure = gain.low if gain.low is not None else gain.mean
    if sure > 0:
        return f"{text}: {_scored(gain, 3)} nats better.", True
    if gain.mean > 0:
        return f"{text}: the difference of {_scored(gain, 3)} nats may be chance.", False
    return f"{text}: the model knows less than gene frequencies do.", False


def _tiles(evaluation: BundleEvaluation) -> list[tuple[str, str]]:
    found = [(f"{len(evaluation.cells.index_n):,}", "cells measured")]
    if row := evaluation.overall:
        found += [
            (f"{row.genes:,}", "hidden genes"),
            (f"{row.loss['model'].mean:.3f}", "loss, nats per hidden gene"),
            (percent(row.accuracy["model"].mean), f"right (best floor {percent(_best_accuracy(row))})"),
        ]
    if evaluation.genes:
        found.append((f"{evaluation.genes.compared:,}", "genes with a neighbourhood"))
    if mixing := evaluation.mixing:
        found.append((_figure(mixing.silhouette_label), f"silhouette of {mixing.label}"))
        if mixing.types:
            found.append((_figure(mixing.mixing), f"mixing of {mixing.batch} (1 is best)"))
            found.append((percent(mixing.rejection), f"rejected (shuffled {percent(mixing.rejection_shuffled)})"))
    return found


def _best_accuracy(row: ScoreRow) -> float:
    return max(row.accuracy[name].mean for name in SCORES[1:])


# --- hidden genes ----------------------------------------------------------------------------------------------------


def _hidden(evaluation: BundleEvaluation) -> str:
    rows = evaluation.by_rank
    assert evaluation.overall is not None
    return (
        "<h2>Hidden genes, by rank</h2>"
        f"<p>{percent(evaluation.config.mask_fraction)} of the genes of each cell are hidden as in pretraining, always "
        "the same ones, and the model names them from the others. Rank 1 is the gene with the highest rank value.</p>"
        f"<figure>{_figure_of(rows, 'rank of the hidden gene')}<figcaption>Loss by rank; lower is better. The line "
        f"through a mark is its 95 % interval over {escaped(evaluation.cells.resampled)}.</figcaption></figure>"
        f"{_score_table([*rows, evaluation.overall], 'rank')}"
    )


def _figure_of(rows: Sequence[ScoreRow], what: str) -> str:
    drawn = [
        MarkRow(
            name=row.name,
            beside=f"{row.genes:,}",
            marks=[
                Mark(series=i, value=row.loss[name].mean, **_interval(row.loss[name], shown=i == 0))
                for i, name in enumerate(SCORES)
            ],
        )
        for row in rows
    ]
    title = "mean loss, nats per hidden gene (number of hidden genes beside the name)"
    return mark_rows(drawn, list(SERIES.values()), axis_title=title, label=f"Loss by {what}")


def _interval(score: Score, *, shown: bool) -> dict[str, float | None]:
    return {"low": score.low, "high": score.high} if shown else {}


def _score_table(rows: Sequence[ScoreRow], first: str) -> str:
    kinds = ("name", "number minor", "number", "number", *["number minor"] * 3, "number", "number", "number minor")
    heads = (
        first, "cells", "hidden genes", "loss", *(f"floor: {SHORT[name]}" for name in SCORES[1:]),
        "better by (95 %)", "right", "best floor right",
    )  # fmt: skip
    body = []
    for row in rows:
        gain = _scored(row.gain, 3)
        body.append(
            (
                escaped(row.name), f"{row.cells:,}", f"{row.genes:,}", f"{row.loss['model'].mean:.3f}",
                *(f"{row.loss[name].mean:.3f}" for name in SCORES[1:]),
                f'<span class="{"good" if (row.gain.low or 0) > 0 else "soft"}">{gain}</span>',
                percent(row.accuracy["model"].mean), percent(_best_accuracy(row)),
            )
        )  # fmt: skip
    return table(heads, kinds, body)


def _columns(evaluation: BundleEvaluation) -> str:
    parts = []
    for place, (column, rows) in enumerate(evaluation.by_column.items()):
        if len(rows) < 2:
            continue
        opened = " open" if place < MOST_OPEN_COLUMNS or column == evaluation.config.label else ""
        parts.append(
            f"<details{opened}><summary><b>{escaped(column)}</b> {len(rows):,} values</summary>"
            f'<div class="inside"><figure>{_figure_of(rows, column)}</figure>{_score_table(rows, column)}</div>'
            "</details>"
        )
    if not parts:
        return ""
    return f"<h2>Hidden genes, by kind of cell</h2>{''.join(parts)}"


# --- genes -----------------------------------------------------------------------------------------------------------


def _genes(found: Neighbourhoods) -> str:
    head = (
        f"<h2>Gene neighbourhoods</h2><p>The {found.k} nearest of {found.compared:,} genes that occur in at least "
        f"{found.min_cells:,} of the measured cells. <b>In cells</b>: by the mean vector that the model makes of a "
        "gene in those cells. <b>Input</b>: by the vector that every cell starts with. Nearness is the cosine after "
        "the mean over genes is taken off; before that, the mean cosine of any two genes is "
        f"{found.mean_cosine['contextual']:.2f} in cells and {found.mean_cosine['input']:.2f} in the input.</p>"
    )
    body = [
        (
            f'<b title="{escaped(gene.gene_id)}">{escaped(gene.symbol)}</b>',
            f"{gene.cells:,}",
            _near(gene.contextual),
            _near(gene.input),
        )
        for gene in found.genes
    ]
    kinds = ("", "number minor", "genes", "genes minor")
    lists = _lists(found.lists, found.k) if found.lists else ""
    absent = ""
    if found.absent:
        listed = ", ".join(found.absent[:30]) + (" …" if len(found.absent) > 30 else "")
        absent = f'<p class="soft">{len(found.absent):,} asked genes occur in too few cells: {escaped(listed)}</p>'
    shown = table(("gene", "cells", "nearest in cells", "nearest in the input"), kinds, body)
    return f"{head}{lists}{absent}<details open><summary>{len(body):,} genes</summary>{shown}</details>"


def _near(genes: Sequence[Neighbour]) -> str:
    return ", ".join(
        f'<span title="{escaped(gene.gene_id)}">{escaped(gene.symbol)}</span> <small>{gene.cosine:.2f}</small>'
        for gene in genes
    )


def _lists(lists: Sequence[ListCohesion], k: int) -> str:
    body = []
    for one in lists:
        cells = [escaped(one.name), f"{one.genes:,}", f"{one.absent:,}", percent(one.expected)]
        for name in TABLES:
            sure = f"p {one.p_value[name]:.2g}" if math.isfinite(one.p_value[name]) else ""
            cells += [percent(one.share[name]), sure]
        body.append(tuple(cells))
    heads = ("list", "genes", "too rare", "by chance", "in cells", "", "input", "")
    kinds = ("name", "number", "number minor", *["number"] * 5)
    return (
        f"<h3>Do genes of a list lie together?</h3><p>Share of a gene's {k} nearest genes that are in its own list, "
        "mean over the list; p is the share of 1,000 random lists of the same size that reach it.</p>"
        f"{table(heads, kinds, body)}"
    )


# --- mixing ----------------------------------------------------------------------------------------------------------


def _mixing(mixing: Mixing) -> str:
    head = (
        f"<h2>Cell types apart, {escaped(mixing.batch)} together?</h2><p>Silhouette of {escaped(mixing.label)} over "
        f"{mixing.cells:,} cells: <b>{_figure(mixing.silhouette_label)}</b> (1: each type lies by itself; 0: types "
        f"overlap). Batches ({escaped(mixing.batch)}) are compared within each type only.</p>"
    )
    if not mixing.types:
        return (
            f'{head}<p class="soft">No type has two values of {escaped(mixing.batch)} with {LEAST_CELLS} cells each: '
            "nothing can be said of mixing.</p>"
        )
    body = [
        (
            escaped(one.name), f"{one.cells:,}", f"{one.batches:,}", f"{one.left_out:,}",
            _figure(mixing.silhouette_by_type.get(one.name)), _figure(one.silhouette_batch), f"{one.k:,}",
            percent(one.rejection), percent(one.rejection_shuffled),
            f"{one.inverse_simpson:.2f} of {one.inverse_simpson_whole:.2f}",
        )
        for one in sorted(mixing.types, key=lambda one: -one.cells)
    ]  # fmt: skip
    heads = (
        mixing.label, "cells", "batches", "cells left out", "silhouette of the type", "silhouette of batches", "k",
        "rejected", "rejected, shuffled", "batches among neighbours",
    )  # fmt: skip
    kinds = ("name", "number", "number minor", "number minor", *["number"] * 2, "number minor", *["number"] * 3)
    rest = ", ".join(f"{name} ({cells:,})" for name, cells in mixing.untested.items())
    untested = f'<p class="soft">One batch only, or too few cells: {escaped(rest)}.</p>' if rest else ""
    unknown = f'<p class="soft">{mixing.unlabelled:,} cells have no type or batch.</p>' if mixing.unlabelled else ""
    rows = [
        MarkRow(
            name=one.name,
            beside=f"{one.cells:,}",
            marks=[Mark(series=0, value=one.rejection), Mark(series=2, value=one.rejection_shuffled)],
        )
        for one in sorted(mixing.types, key=lambda one: -one.cells)
    ]
    chart = mark_rows(
        rows,
        ["batches as they are", "", "batches shuffled among the cells"],
        axis_title="share of cells whose neighbourhood is rejected (0 is perfect mixing)",
        label="Rejection rate by cell type",
    )
    return f"{head}<figure>{chart}</figure>{table(heads, kinds, body)}{untested}{unknown}"


# --- maps ------------------------------------------------------------------------------------------------------------


def _maps(evaluation: BundleEvaluation) -> str:
    assert evaluation.coordinates_n2 is not None
    cells, coordinates = evaluation.cells, evaluation.coordinates_n2
    config = evaluation.config
    drawn = []
    for column in dict.fromkeys([config.label, cells.batch, *cells.by]):
        values_n = cells.texts(column)
        if len(set(values_n.tolist()) - {""}):
            figure = scatter(coordinates, class_looks(values_n.tolist()), label=f"Cells coloured by {column}")
            drawn.append(f"<h3>{escaped(column)}</h3>{figure}")
    for column in NUMBER_COLUMNS[:1]:
        values = np.asarray(cells.table.column(column).to_numpy(), dtype=float)
        figure = scatter(coordinates, number_looks(values), label=f"Cells coloured by {column}")
        drawn.append(f"<h3>{escaped(column)}</h3>{figure}")
    return (
        "<h2>Maps of the cells</h2><p>UMAP of the cell embeddings. Distances between far clusters mean nothing; "
        "use the measures above to compare models. A class's number stands on it.</p>" + "".join(drawn)
    )


# --- how it was measured ---------------------------------------------------------------------------------------------


def _methods(evaluation: BundleEvaluation) -> str:
    config, cells = evaluation.config, evaluation.cells
    left_out = "; ".join(f"{count:,} {reason}" for reason, count in cells.left_out.items())
    bins = ", ".join(f"{edge:,}" for edge in RANK_EDGES[1:])
    items = [
        ("Cells", f"{len(cells.index_n):,} measured{f' ({left_out})' if left_out else ''}; seed {config.seed}."),
        (
            "Hidden genes",
            f"{percent(config.mask_fraction)} of each cell's genes, chosen by (seed, cell): 80 % stand as <mask>, 10 % "
            f"as a random gene, 10 % as they are. Loss is the mean of -ln p(gene) over hidden genes; right means that "
            f"the most likely gene is the hidden one. Bins of rank end at {bins}.",
        ),
        (
            "Floors",
            "Frequencies in the other measured cells (each cell's own counts are taken out), with Witten and Bell's "
            "share for genes that were not counted: at any rank; at the rank bin of the hidden gene; at that bin among "
            "genes that the cell does not show at places that are not hidden. They know the measured corpus, which is "
            "kind to them.",
        ),
        (
            "Intervals",
            f"95 %, percentiles of {config.bootstrap:,} resamples of {cells.resampled}; all hidden genes of a "
            "resampled group come together.",
        ),
        ("Embeddings", f"layer {config.layer}, pooling {config.pooling}, Euclidean distances."),
        (
            "Rejection rate",
            "For each cell and its k nearest cells of the same type: chi² = Σ (n_b − k f_b)² / (k f_b) over batches b, "
            f"against chi² with B − 1 degrees of freedom; rejected when p < {LEVEL:g}. k is a quarter of the mean "
            "batch size, 10 at least (kBET: Büttner et al., Nature Methods 2019). One test per cell, within each cell "
            f"type. Batches with fewer than {LEAST_CELLS} cells of a type are left out there.",
        ),
        (
            "Silhouettes",
            "(b − a) / max(a, b) of Rousseeuw 1987. Mixing is the mean over types of mean |silhouette of batches|, "
            "taken from 1 (as Luecken et al., Nature Methods 2022, per cell type). Batches among neighbours: inverse "
            "Simpson index of the k neighbours with equal weights (after Korsunsky et al., Nature Methods 2019).",
        ),
        ("Provenance", "; ".join(f"{name} {value}" for name, value in evaluation.provenance.items() if value)),
        ("Time", f"{clock(evaluation.seconds)} (m:ss)"),
    ]
    listed = "".join(f"<dt>{escaped(name)}</dt><dd>{escaped(text)}</dd>" for name, text in items)
    return f"<h2>How it was measured</h2><dl>{listed}</dl>"


def table(heads: Sequence[str], kinds: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of ready HTML cells; `kinds` are the classes of its columns."""
    head = "".join(f'<th class="{kind}">{escaped(name)}</th>' for name, kind in zip(heads, kinds, strict=True))
    body = "".join(
        "<tr>" + "".join(f'<td class="{kind}">{cell}</td>' for cell, kind in zip(row, kinds, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _scored(score: Score, decimals: int) -> str:
    interval = ""
    if score.low is not None and score.high is not None:
        interval = f" ({score.low:.{decimals}f} to {score.high:.{decimals}f})"
    return f"{score.mean:.{decimals}f}{interval}"


def _figure(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else number(round(value, 3)) if value else "0"
