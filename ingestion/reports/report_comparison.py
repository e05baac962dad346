"""The sources of an ingest side by side: cells, depth and length, genes, and where the time went."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from genescale.ingestion.reports.distribution import Distribution, spreads
from genescale.ingestion.reports.findings import OUTLIER_FOLD
from genescale.ingestion.reports.report import IngestReport, SourceReport
from genescale.ingestion.reports.report_figures import (
    Scale,
    Segment,
    axis,
    cell_segments,
    escaped,
    fate_segments,
    histogram,
    legend,
    number,
    size,
    stacked_bar,
    step_segments,
)
from genescale.ingestion.tally import Tally

SPREAD_NAMES = {"depth": "counts per cell", "genes": "vocabulary genes per cell", "length": "tokens per cell"}
# One bar of a row: its pieces and what they are pieces of.
Bar = tuple[list[Segment], str]


def cell_bars(sources: Sequence[SourceReport]) -> str:
    """One bar of cells per source, the source that lost most first."""
    lost = sorted(sources, key=lambda s: (-s.tally.n_dropped / max(s.tally.read, 1), s.dataset_id))
    return _bars(lost, lambda s: [(cell_segments(s.tally.kept, s.tally.dropped), "cells")])


def _bars(sources: Sequence[SourceReport], bars: Callable[[SourceReport], list[Bar]]) -> str:
    """A row of bars per source; above the first row stands what each column of bars is made of."""
    rows = [(source, bars(source)) for source in sources]
    heads = "".join(f'<div class="head">{escaped(unit)}</div>' for _, unit in rows[0][1])
    cells = "".join(
        f'<div class="name">{escaped(source.dataset_id)}</div>'
        + "".join(
            f'<div class="cell">{stacked_bar(s, label=f"{source.dataset_id}, {unit}")}</div>' for s, unit in drawn
        )
        for source, drawn in rows
    )
    return f'<div class="grid of{len(rows[0][1])}"><div class="head first">source</div>{heads}{cells}</div>'


def distributions(report: IngestReport) -> str:
    """Small multiples on shared axes, sorted by depth, so that a source unlike the others stands out."""
    drawn = [(source, spreads(source.tally)) for source in report.sources if source.tally.kept]
    drawn = [(source, spread) for source, spread in drawn if any(one.total for one in spread.values())]
    if not drawn:
        return ""
    drawn.sort(key=lambda pair: (-(pair[1]["depth"].median or 0.0), pair[0].dataset_id))
    scales = {name: Scale.over([spread[name] for _, spread in drawn]) for name in SPREAD_NAMES}
    medians = {name: [m for _, spread in drawn if (m := spread[name].median) is not None] for name in SPREAD_NAMES}
    middles = {name: statistics.median(values) if values else None for name, values in medians.items()}
    heads = "".join(f'<div class="head">{label}</div>' for label in SPREAD_NAMES.values())
    axes = "".join(f"<div>{axis(scale) if scale else '&nbsp;'}</div>" for scale in scales.values())
    rows = "".join(_multiples(source, spread, scales, middles) for source, spread in drawn)
    told = "Kept cells of each source on shared logarithmic axes. Solid line: median of the source."
    if len(drawn) > 1:
        told += " Dashed: median of all sources; one in orange lies more than 8-fold away. Deepest source first."
    return (
        f"<h2>Depth and length</h2><p>{told}</p>"
        f'<div class="grid"><div class="head first">source</div>{heads}{rows}<div class="head first"></div>{axes}</div>'
    )


def _multiples(
    source: SourceReport,
    spread: dict[str, Distribution],
    scales: dict[str, Scale | None],
    middles: dict[str, float | None],
) -> str:
    cells = [f'<div class="name">{escaped(source.dataset_id)}</div>']
    for name, label in SPREAD_NAMES.items():
        one, scale, middle = spread[name], scales[name], middles[name]
        if scale is None or not one.total:
            cells.append('<div class="cell said">not recorded</div>')
            continue
        odd = name != "length" and _is_odd(one.median, middle)
        picture = histogram(one, scale, label=f"{source.dataset_id}, {label}", middle=middle, outlier=odd)
        said = f"median {number(_whole(one.median))}"
        said = f'<span class="flag">{said}</span>' if odd else said
        cells.append(f'<div class="cell">{picture}<div class="said">{said}</div></div>')
    return "".join(cells)


def _is_odd(value: float | None, middle: float | None) -> bool:
    return bool(value and middle) and not middle / OUTLIER_FOLD <= value <= middle * OUTLIER_FOLD  # type: ignore[operator]


def _whole(value: float | None) -> float | None:
    return None if value is None else round(value)


def genes(report: IngestReport) -> str:
    """What became of the genes of each source, and of the counts they hold."""
    drawn = [source for source in report.sources if source.genes_by_fate]
    if not drawn:
        return ""
    drawn.sort(key=lambda s: (s.share_of_counts if s.share_of_counts is not None else 2.0, s.dataset_id))
    total: dict[str, float] = {}
    for source in drawn:
        for fate, genes in source.genes_by_fate.items():
            total[fate] = total.get(fate, 0) + genes
    return (
        "<h2>Genes</h2><p>What became of the gene columns of each source, and which share of its counts they hold; "
        "sources with the smallest share of counts in the vocabulary first.</p>"
        f"{legend(fate_segments(total, unit='genes'))}{_bars(drawn, _gene_bars)}"
    )


def _gene_bars(source: SourceReport) -> list[tuple[list[Segment], str]]:
    genes = {fate: float(value) for fate, value in source.genes_by_fate.items()}
    counts = source.counts_by_fate
    return [(fate_segments(genes, unit="genes"), "genes"), (fate_segments(counts, unit="counts"), "counts")]


def throughput(report: IngestReport) -> str:
    """Where the work time went, step by step, and how fast each source was."""
    sources = [source for source in report.of("ingested") if source.seconds]
    if not sources:
        return ""
    steps = step_segments(_steps(report.total))
    work = sum(source.seconds for source in sources)
    read = report.total.read
    text = (
        f"{read:,} cells in {report.seconds:,.1f} s of the clock and {work:,.1f} s of work in all tasks: "
        f"{read / work:,.0f} cells per second of work."
    )
    if report.source_bytes:
        text += f" The sources hold {size(report.source_bytes)}{_written(report)}."
    drawn = f"{stacked_bar(steps, label='work time of all sources')}{legend(steps, values=True)}" if steps else ""
    rows = "".join(_speed(source) for source in sorted(sources, key=lambda s: s.tally.read / s.seconds))
    head = "".join(
        f'<th class="number">{name}</th>'
        for name in ("cells per second of work", "work time", "file", "parts", "step shares")
    )
    table = (
        f'<div class="wide"><table><thead><tr><th>dataset</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        if len(sources) > 1
        else ""
    )
    return f"<h2>Throughput</h2><p>{escaped(text)}</p>{drawn}{table}"


def _speed(source: SourceReport) -> str:
    cells = (
        f"{source.tally.read / source.seconds:,.0f}",
        f"{source.seconds:,.1f} s",
        size(source.size_bytes) if source.size_bytes else "–",
        size(source.part_bytes) if source.part_bytes else "–",
    )
    drawn = "".join(f'<td class="number">{cell}</td>' for cell in cells)
    steps = step_segments(_steps(source.tally))
    bar = stacked_bar(steps, label=f"{source.dataset_id}, work time") if steps else "–"
    return f'<tr><td class="name">{escaped(source.dataset_id)}</td>{drawn}<td class="steps">{bar}</td></tr>'


def _steps(tally: Tally) -> dict[str, float]:
    return {step: seconds for step, seconds in tally.seconds.items() if seconds > 0}


def _written(report: IngestReport) -> str:
    written = sum(source.part_bytes for source in report.of("ingested"))
    kept = report.total.kept
    return f"; their part files {size(written)}, {written / kept:,.0f} bytes per cell" if written and kept else ""
