"""A learning curve as one HTML page: the figure, the numbers, and how they were made."""

from __future__ import annotations

from genescale.ingestion.reports.report_figures import escaped
from genescale.ingestion.reports.report_style import STYLE
from genescale.platform.progress import clock
from genescale.training.evaluation.bundle_report import PAGE_STYLE, table
from genescale.training.evaluation.charts import CHART_STYLE, Line, log_lines
from genescale.training.evaluation.curve_draws import RELEVANT
from genescale.training.evaluation.curve_lines import MODEL, CurveLine, CurveResult

METRIC_NAMES = {
    "macro_f1": "macro F1",
    "roc_auc": "ROC AUC",
    "r2": "R²",
}


def page(result: CurveResult) -> str:
    """The whole page."""
    parts = [_head(result), _figure(result), _table(result), _methods(result)]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escaped(result.title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}{CHART_STYLE}{PAGE_STYLE}</style></head><body><main>{''.join(parts)}</main></body></html>\n"
    )


def metric_name(metric: str) -> str:
    """As a reader writes it."""
    return METRIC_NAMES.get(metric, metric.replace("_", " "))


def verdict(result: CurveResult) -> tuple[str, bool]:
    """What the largest point says of the model and its best baseline, and whether the model does as well."""
    (model, *_) = (line for line in result.lines if line.fit == MODEL and line.line == RELEVANT)
    last = model.points[-1]
    others = [
        (line.points[-1].mean, line.name)
        for line in result.lines
        if line.fit != MODEL and line.line == RELEVANT and line.points[-1].cells == last.cells
    ]
    text = f"{metric_name(result.metric)} {last.mean:.3f} with {last.cells:,} cells"
    if not others:
        return f"{text}.", True
    best, name = max(others)
    half = next((point.cells for point in model.points if point.mean >= best), None)
    reached = f"; {half:,} cells reach what {name} gets from {last.cells:,}" if half else ""
    return f"{text}, against {best:.3f} of {name}{reached}.", last.mean >= best


def _head(result: CurveResult) -> str:
    sentence, good = verdict(result)
    facts = result.provenance
    lead = (f"model {facts['model']} ({facts['bundle_digest'][:12]})", f"cells of {facts['corpus']}")
    tiles = [
        (f"{len(result.points):,}", "fits of the model"),
        (f"{result.config.seeds}", "seeds of each size"),
        (f"{result.test_units:,}", f"test {result.unit}, the same at every point"),
        (clock(result.seconds), "time of this run (m:ss)"),
    ]
    drawn = "".join(f"<div><b>{escaped(v)}</b><span>{escaped(n)}</span></div>" for v, n in tiles)
    return (
        f'<h1>{escaped(result.title)}</h1><p class="lead">{"<br>".join(escaped(line) for line in lead)}</p>'
        f'<div class="verdict {"good" if good else "bad"}">{escaped(sentence)}</div><div class="tiles">{drawn}</div>'
    )


def _figure(result: CurveResult) -> str:
    # Baselines of the second line stand in the table: more than seven lines cannot be told apart.
    shown = [line for line in result.lines if line.fit == MODEL or line.line == RELEVANT]
    lines = [
        Line(
            name=line.name,
            points=[(point.cells, point.mean, point.low, point.high, point.values) for point in line.points],
            faint=line.fit != MODEL,
        )
        for line in shown
    ]
    metric = metric_name(result.metric)
    cells = "labelled cells" if result.unit == "cells" else "cells that training genes are read in"
    title = f"{metric} by number of cells"
    return (
        f"<h2>{escaped(title[0].upper() + title[1:])}</h2>"
        f"<figure>{log_lines(lines, x_title=f'{cells} (logarithmic)', y_title=metric, label=title)}"
        "<figcaption>Large marks are means over seeds; for the model, small dots are the seeds and the band runs from "
        "the lowest to the highest.</figcaption></figure>"
    )


def _table(result: CurveResult) -> str:
    sizes = sorted({point.cells for line in result.lines for point in line.points})
    heads = ("line", *(f"{cells:,}" for cells in sizes))
    body = [(escaped(line.name), *(_cell(line, cells) for cells in sizes)) for line in result.lines]
    metric = metric_name(result.metric)
    return (
        f"<h2>In numbers</h2><p>{escaped(metric[0].upper() + metric[1:])}, mean ± standard deviation over seeds.</p>"
        f"{table(heads, ('name', *['number'] * len(sizes)), body)}"
    )


def _cell(line: CurveLine, cells: int) -> str:
    for point in line.points:
        if point.cells == cells:
            return f"{point.mean:.3f}" + (f" ± {point.sd:.3f}" if point.seeds > 1 else "")
    return "–"


def _methods(result: CurveResult) -> str:
    task, config = result.task, result.config
    genes = result.unit == "genes"
    points = (
        "A point reads its training genes in so many cells; test genes are read in other cells, always the same."
        if genes
        else "A point's cells are its training and validation cells together, drawn with the classes in proportion "
        "from those parts of one split; cells of a smaller point are among those of a larger one of the same seed."
    )
    items = [
        ("Points", points),
        ("Test", f"{result.test_units:,} {result.unit}; they fulfil: {task.where or 'anything'}."),
        (
            "Split",
            f"{task.split}{f' by {task.group}' if task.split in ('grouped', 'balanced') and not genes else ''}, "
            f"fractions {', '.join(f'{part:g}' for part in task.fractions)}, seed {task.seed}"
            + (f", {task.folds} folds" if task.folds else "")
            + ".",
        ),
        (
            "Fit",
            f"encoder {task.encoder}, head {task.head}, layer {task.layer}"
            + ("." if genes else f", pooling {task.pooling}.")
            + " The validation cells choose the epoch, and the penalty of the baselines.",
        ),
    ]
    if config.against:
        text = (
            f"Training cells of the second line fulfil: {config.against}. Its test cells are those of the first, and "
            "no cell of a test donor trains."
        )
        items.insert(1, ("Other cells", text))
    items += [("Note", note) for note in result.notes]
    items.append(("Provenance", "; ".join(f"{name} {value}" for name, value in result.provenance.items() if value)))
    listed = "".join(f"<dt>{escaped(name)}</dt><dd>{escaped(text)}</dd>" for name, text in items)
    return f"<h2>How it was measured</h2><dl>{listed}</dl>"
