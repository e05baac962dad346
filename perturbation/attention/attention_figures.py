"""Figures of attention as SVG, which follow the page's theme: heat maps of ratios, rows of heads, and the graph.

Every number also stands in a table or in a title. Axis suffixes: `i` rows, `j` columns of a heat map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from genescale.ingestion.reports.report_figures import escaped, number
from genescale.training.evaluation.charts import Mark, MarkRow, mark_rows

if TYPE_CHECKING:
    import networkx

CELL, NAMES, HEAD = 34.0, 92.0, 76.0
LETTER = 6.6
MOST_DRAWN_EDGES = 60
GRAPH_SIDE, GRAPH_MARGIN = 720.0, 56.0
LIMITS = (1.5, 2.0, 3.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
"""Ratios at which the colour is full; the first that nine in ten ratios keep below."""

ATTENTION_STYLE = (
    ".heat .more{fill:var(--fill)}.heat .less{fill:var(--odd)}.heat .frame{fill:none;stroke:var(--line)}"
    ".heat text{font-variant-numeric:tabular-nums}.heat text.in{font-size:10px;pointer-events:none}"
    ".heat text.on{fill:var(--back)}.heat .sure{fill:none;stroke:var(--ink);stroke-width:1.6}"
    ".graph line{stroke:var(--soft)}.graph circle{fill:var(--back);stroke:var(--fill);stroke-width:1.6}"
    ".graph circle.listed{fill:var(--odd);stroke:var(--odd)}.graph marker path{fill:var(--soft)}"
    ".graph text{paint-order:stroke;stroke:var(--back);stroke-width:3.5px;stroke-linejoin:round}"
    ".scale i{display:inline-block;width:1.5rem;height:.8rem;vertical-align:-.1rem}.scale{font-size:.86rem}"
    ".scale i.more{background:var(--fill)}.scale i.less{background:var(--odd)}"
    ".panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(19rem,100%),1fr));gap:.4rem 1.6rem}"
    ".panels h3{margin:.5rem 0 0}"
    "@media print{.heat rect{print-color-adjust:exact;-webkit-print-color-adjust:exact}}"
)


def full_colour(ratios: np.ndarray) -> float:
    """The ratio (and its inverse) from which on a heat map has its full colour."""
    known = np.abs(np.log(ratios[np.isfinite(ratios) & (ratios > 0)]))
    reached = float(np.exp(np.quantile(known, 0.9))) if known.size else LIMITS[0]
    return next((limit for limit in LIMITS if limit >= reached), LIMITS[-1])


def ratio_map(
    ratios_ij: np.ndarray,
    row_names: Sequence[str],
    column_names: Sequence[str],
    *,
    full: float,
    label: str,
    column_title: str,
    sure_ij: np.ndarray | None = None,
    beside: Sequence[Sequence[str]] | None = None,
) -> str:
    """Ratios as colours: blue above one, orange below, full from `full` on; the outlined cells are sure.

    NaN stays empty. beside: what a cell's title says after its ratio.
    """
    rows, columns = ratios_ij.shape
    names_wide = max(NAMES, 16 + LETTER * max(len(name) for name in row_names))
    slanted = max(len(name) for name in column_names) * LETTER > CELL - 4
    head = HEAD if slanted else 22.0
    drawn = "".join(
        _ratio_cell(
            float(ratios_ij[i, j]),
            names_wide + j * CELL,
            head + i * CELL,
            full,
            sure=bool(sure_ij is not None and sure_ij[i, j]),
            said=f"{row_names[i]}, {column_names[j]}: {number(float(ratios_ij[i, j]))}"
            + (f" {beside[i][j]}" if beside else ""),
        )
        for i in range(rows)
        for j in range(columns)
        if math.isfinite(ratios_ij[i, j])
    )
    drawn += "".join(
        f'<text x="{names_wide - 7:.1f}" y="{head + (i + 0.5) * CELL + 4:.1f}" text-anchor="end">{escaped(name)}</text>'
        for i, name in enumerate(row_names)
    )
    for j, name in enumerate(column_names):
        x = names_wide + (j + 0.5) * CELL
        turned = f'transform="translate({x:.1f} {head - 6:.1f}) rotate(-45)"'
        placed = f'x="{x:.1f}" y="{head - 6:.1f}" text-anchor="middle"'
        drawn += f"<text {turned if slanted else placed}>{escaped(name)}</text>"
    width = names_wide + columns * CELL + (HEAD * 0.75 if slanted else 8)
    height = head + rows * CELL + 22
    drawn += (
        f'<rect class="frame" x="{names_wide:.1f}" y="{head:.1f}" width="{columns * CELL:.1f}" '
        f'height="{rows * CELL:.1f}"/><text class="soft" x="{names_wide + columns * CELL / 2:.1f}" '
        f'y="{height - 5:.1f}" text-anchor="middle">{escaped(column_title)}</text>'
    )
    return (
        f'<svg class="chart heat" style="max-width:{width:.0f}px" viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        f'aria-label="{escaped(label)}">{drawn}</svg>'
    )


def _ratio_cell(ratio: float, x: float, y: float, full: float, *, sure: bool, said: str) -> str:
    steps = math.log(ratio) / math.log(full) if ratio > 0 else -1.0
    shade = min(abs(steps), 1.0)
    kind = "more" if steps > 0 else "less"
    outline = (
        f'<rect class="sure" x="{x + 2:.1f}" y="{y + 2:.1f}" width="{CELL - 4:.1f}" height="{CELL - 4:.1f}"/>'
        if sure
        else ""
    )
    ink = " on" if shade > 0.6 else ""
    return (
        f'<rect class="{kind}" x="{x + 0.5:.1f}" y="{y + 0.5:.1f}" width="{CELL - 1:.1f}" height="{CELL - 1:.1f}" '
        f'fill-opacity="{shade:.3f}"><title>{escaped(said)}</title></rect>{outline}'
        f'<text class="in{ink}" x="{x + CELL / 2:.1f}" y="{y + CELL / 2 + 3.5:.1f}" text-anchor="middle">'
        f"{ratio_text(ratio)}</text>"
    )


def ratio_text(ratio: float) -> str:
    """A ratio in at most four characters."""
    return f"{ratio:.2f}" if ratio < 9.995 else f"{ratio:.1f}" if ratio < 99.95 else f"{ratio:.0f}"


def ratio_key(full: float, *, sure: str = "") -> str:
    """What the colours of a heat map mean."""
    shades = (1.0, 0.5)
    less = "".join(f'<i class="less" style="opacity:{shade}"></i>' for shade in shades)
    more = "".join(f'<i class="more" style="opacity:{shade}"></i>' for shade in reversed(shades))
    outlined = f" · outlined: {escaped(sure)}" if sure else ""
    return f'<p class="scale soft">1/{full:g} and less {less} 1 {more} {full:g} and more{outlined}</p>'


def head_rows(heads: pl.DataFrame, column: str, *, axis_title: str, label: str) -> str:
    """A row for each layer: a hollow mark for each head, a filled one for their mean."""
    drawn = []
    for layer in heads["layer"].unique().sort().to_list():
        values = heads.filter(pl.col("layer") == layer)[column].to_list()
        marks = [Mark(series=0, value=float(np.mean(values))), *(Mark(series=1, value=value) for value in values)]
        drawn.append(MarkRow(name=f"layer {layer}", beside="", marks=marks))
    return mark_rows(drawn, ("mean over heads", "one head"), axis_title=axis_title, label=label)


def list_rows(lists: pl.DataFrame, names: Sequence[str]) -> str:
    """The ratio of each list to its matched genes by layer, mean over heads, with intervals."""
    means = lists.filter((pl.col("head") == 0) & pl.col("ratio").is_not_null() & pl.col("ratio").is_finite())
    rows = []
    for layer in means["layer"].unique().sort().to_list():
        for name in names:
            for row in means.filter((pl.col("layer") == layer) & (pl.col("list") == name)).iter_rows(named=True):
                mark = Mark(series=0, value=row["ratio"], low=row["ci_low"], high=row["ci_high"])
                shown = f"layer {layer}, {name}" if len(names) > 1 else f"layer {layer}"
                rows.append(MarkRow(name=shown, beside=f"{row['n_genes']:,}", marks=[mark]))
    if not rows:
        return ""
    title = "attention to a gene of the list over attention to its matched genes (1: the same)"
    return mark_rows(rows, ("ratio",), axis_title=title, label="Lists against matched genes by layer")


def graph_figure(nodes: pl.DataFrame, edges: pl.DataFrame, *, order: str) -> str:
    """The strongest edges, genes of one component placed by springs in a box of their own; listed genes filled."""
    import networkx

    strongest = edges.head(MOST_DRAWN_EDGES)
    if not len(strongest):
        return ""
    graph = networkx.DiGraph()
    for row in strongest.iter_rows(named=True):
        graph.add_edge(row["source"], row["target"], strength=row[order])
    place = _placed(graph)
    known = {row["gene_id"]: row for row in nodes.iter_rows(named=True)}
    most = float(strongest[order].max())  # type: ignore[arg-type]
    lines = "".join(
        _edge(place[row["source"]], place[row["target"]], row, row[order] / most, order)
        for row in reversed(strongest.to_dicts())
    )
    dots = "".join(_node(place[name], known[name]) for name in graph.nodes)
    return (
        f'<svg class="chart graph" style="max-width:{GRAPH_SIDE:g}px" viewBox="0 0 {GRAPH_SIDE:g} {GRAPH_SIDE:g}" '
        f'role="img" aria-label="The {len(strongest)} strongest edges between {len(graph)} genes">'
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0L8 4L0 8z"/></marker></defs>'
        f"{lines}{dots}</svg>"
    )


def _placed(graph: networkx.DiGraph) -> dict[str, tuple[float, float]]:
    """A place for each gene: every component by itself, or springs would drive the components to the rim."""
    import networkx

    parts = sorted(networkx.weakly_connected_components(graph), key=lambda part: (-len(part), min(part)))
    place: dict[str, tuple[float, float]] = {}
    for part, box in zip(parts, _boxes([len(part) for part in parts], 0.0, 0.0, GRAPH_SIDE, GRAPH_SIDE), strict=True):
        # Of a set, the order changes from run to run, and the springs with it.
        shape = networkx.Graph()
        shape.add_nodes_from(sorted(part))
        shape.add_edges_from(sorted(graph.subgraph(part).edges))
        springs = networkx.kamada_kawai_layout(shape)
        place |= _stretched({name: (float(x), float(y)) for name, (x, y) in springs.items()}, *box)
    return place


def _boxes(
    sizes: Sequence[int], x: float, y: float, width: float, height: float
) -> list[tuple[float, float, float, float]]:
    """The rectangle divided among parts by their sizes: halved again and again, across its longer side."""
    if len(sizes) == 1:
        return [(x, y, width, height)]
    sums = np.cumsum(sizes)
    cut = int(np.argmin(np.abs(sums[:-1] - sums[-1] / 2))) + 1
    share = float(sums[cut - 1] / sums[-1])
    if width >= height:
        first, second = (x, y, width * share, height), (x + width * share, y, width * (1 - share), height)
    else:
        first, second = (x, y, width, height * share), (x, y + height * share, width, height * (1 - share))
    return _boxes(sizes[:cut], *first) + _boxes(sizes[cut:], *second)


def _stretched(
    places: dict[str, tuple[float, float]], x: float, y: float, width: float, height: float
) -> dict[str, tuple[float, float]]:
    """The places stretched to fill a box within its margins."""
    names, values = list(places), np.array(list(places.values()))
    low, span = values.min(axis=0), np.maximum(np.ptp(values, axis=0), 1e-9)
    margin = np.minimum(GRAPH_MARGIN, np.array([width, height]) * 0.3)
    values = np.array([x, y]) + margin + (values - low) / span * (np.array([width, height]) - 2 * margin)
    return {name: (float(a), float(b)) for name, (a, b) in zip(names, values, strict=True)}


def _edge(
    start: tuple[float, float], end: tuple[float, float], row: dict[str, object], share: float, order: str
) -> str:
    length = math.dist(start, end) or 1.0
    # The arrow ends at the rim of the dot.
    cut = min(7.0 / length, 0.4)
    (x1, y1), (x2, y2) = start, (end[0] - (end[0] - start[0]) * cut, end[1] - (end[1] - start[1]) * cut)
    said = f"{row['source_symbol']} looks at {row['target_symbol']}: {order} {number(float(row[order]))}, "  # type: ignore[arg-type]
    said += f"{row['n_cells']:,} cells"
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke-width="{0.6 + 2.2 * share:.2f}" '
        f'stroke-opacity="{0.35 + 0.5 * share:.2f}" marker-end="url(#tip)"><title>{escaped(said)}</title></line>'
    )


def _node(at: tuple[float, float], row: dict[str, object]) -> str:
    x, y = at
    kind = ' class="listed"' if row["lists"] else ""
    said = f"{row['gene_id']}: {row['n_cells']:,} cells, mean rank {number(float(row['mean_rank'] or 0))}"  # type: ignore[arg-type]
    said += f"; {row['lists']}" if row["lists"] else ""
    return (
        f'<circle{kind} cx="{x:.1f}" cy="{y:.1f}" r="5"><title>{escaped(said)}</title></circle>'
        f'<text x="{x:.1f}" y="{y - 8:.1f}" text-anchor="middle">{escaped(row["symbol"])}</text>'
    )
