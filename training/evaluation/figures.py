"""Figures of the heads' report as SVG: curves in the unit square, reliability, confusion, learning and numbers.

They follow the page's light or dark theme (classes `q0` … of `charts.CHART_STYLE`); every number that matters also
stands in a table or in a title. Axis suffixes: `c` classes, `k` bins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from genescale.ingestion.reports.report_figures import escaped, number
from genescale.training.evaluation.calibration import Reliability
from genescale.training.evaluation.charts import key, round_ticks, tick_text
from genescale.training.evaluation.figures_curves import Curve, Curves, thinned

SIDE, LEFT, BELOW, TOP, RIGHT = 300.0, 52.0, 46.0, 10.0, 14.0
MOST_CLASSES = 40
"""A confusion matrix of more classes is not drawn; its largest confusions are listed."""
NUMBERS_IN_CELLS = 12
MOST_LETTERS, LETTER = 30, 7.0
"""Of a class name beside a confusion matrix, and the width of one."""
POINTS_DRAWN = 2_000

FIGURE_STYLE = (
    ".pair{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:.5rem 2rem;max-width:54rem;align-items:start}"
    ".pair h3{margin:.4rem 0 0}.pair .chart{max-width:27rem}"
    ".chart .faint{fill:none;stroke:var(--q);stroke-width:1.1;opacity:.45}.chart .dashed{stroke-dasharray:4 4}"
    ".chart .chance{stroke:var(--soft);stroke-width:1;stroke-dasharray:3 4}"
    ".chart .frame{fill:none;stroke:var(--line)}.chart .cell{fill:var(--fill)}.chart .cell.wrong{fill:var(--odd)}"
    ".chart text.small{font-size:10.5px}.chart text.on{fill:#fff}.chart .column{fill:var(--bar)}"
    ".chart .dot{fill:var(--q);opacity:.35}.chart .best{stroke:var(--soft);stroke-width:1;stroke-dasharray:2 3}"
    "@media(max-width:44rem){.pair{grid-template-columns:1fr}}"
    "@media print{.chart .cell,.chart .column{print-color-adjust:exact;-webkit-print-color-adjust:exact}}"
)


def curve_figure(curves: Curves, *, x_title: str, y_title: str, label: str, diagonal: bool) -> str:
    """Single curves faint, their mean strong, and what chance would draw."""
    chance = (
        _line(0, 0, 1, 1, "chance")
        if diagonal
        else _line(0, curves.base, 1, curves.base, "chance")
        + _text(0.01, curves.base, "chance", anchor="start", dy=-5 if curves.base < 0.1 else 12)
    )
    several = len(curves.single) > 1
    faint = "".join(_path(curve, "faint q0") for curve in curves.single) if several else ""
    return _square(chance + faint + _path(curves.mean, "series q0"), x_title, y_title, label)


def reliability_figure(found: Reliability) -> str:
    """Accuracy over stated probability by bin, on the diagonal when probabilities are kept; columns: share of units."""
    held = np.flatnonzero(found.units_k > 0)
    tallest = max(int(found.units_k.max(initial=0)), 1)
    columns = "".join(
        f'<rect class="column" x="{_x(found.edges_k[k]) + 1:.1f}" '
        f'width="{_x(found.edges_k[k + 1]) - _x(found.edges_k[k]) - 2:.1f}" '
        f'y="{_y(0.25 * found.units_k[k] / tallest):.1f}" height="{SIDE * 0.25 * found.units_k[k] / tallest:.1f}">'
        f"<title>{found.units_k[k]:,} units with a probability of {found.edges_k[k]:.2f} to {found.edges_k[k + 1]:.2f}"
        "</title></rect>"
        for k in held
    )
    line = Curve(name="accuracy", x=found.confidence_k[held], y=found.accuracy_k[held])
    dots = "".join(
        f'<circle class="mark q0" cx="{_x(found.confidence_k[k]):.1f}" cy="{_y(found.accuracy_k[k]):.1f}" r="4">'
        f"<title>stated {found.confidence_k[k]:.3f}, right {found.accuracy_k[k]:.3f} of {found.units_k[k]:,}</title>"
        "</circle>"
        for k in held
    )
    drawn = columns + _line(0, 0, 1, 1, "chance") + _path(line, "series q0") + dots
    said = f"reliability, expected calibration error {found.error:.3f}"
    return _square(drawn, "stated probability of the predicted class", "share that is right", said)


def confusion_figure(confusion_cc: npt.NDArray[np.int64], classes: Sequence[str]) -> str:
    """Shares of each true class by predicted class, right ones in one colour and wrong ones in another."""
    count = len(classes)
    side = min(64.0, max(17.0, 440.0 / count))
    # Longer class names are cut, and whole in the title.
    letters = min(MOST_LETTERS, max(len(name) for name in classes))
    left = 14 + LETTER * letters
    head = left * 0.72 + 14
    share_cc = confusion_cc / np.maximum(confusion_cc.sum(axis=1, keepdims=True), 1)
    cells = "".join(
        _confusion_cell(share_cc[i, j], int(confusion_cc[i, j]), i, j, classes, left, head, side)
        for i in range(count)
        for j in range(count)
    )
    rows = "".join(
        f'<text x="{left - 6:.1f}" y="{head + (i + 0.5) * side + 4:.1f}" text-anchor="end">'
        f"{escaped(_short(name, letters))}<title>{escaped(name)}</title></text>"
        for i, name in enumerate(classes)
    )
    columns = "".join(
        f'<text transform="translate({left + (j + 0.5) * side + 3:.1f} {head - 7:.1f}) rotate(-45)">'
        f"{escaped(_short(name, letters))}<title>{escaped(name)}</title></text>"
        for j, name in enumerate(classes)
    )
    # The words below need some 350 units, however few classes there are.
    width, height = max(left + count * side + left * 0.72 + 8, left + 350), head + count * side + 26
    frame = (
        f'<rect class="frame" x="{left:.1f}" y="{head:.1f}" width="{count * side:.1f}" height="{count * side:.1f}"/>'
    )
    foot = (
        f'<text class="soft small" x="{left:.1f}" y="{head + count * side + 17:.1f}">'
        "rows: true class; columns: predicted class; shade: share of the row</text>"
    )
    return (
        f'<svg class="chart" style="max-width:{width:.0f}px" viewBox="0 0 {width:.0f} '
        f'{height:.0f}" role="img" aria-label="confusion matrix of {count} classes">'
        f"{cells}{frame}{rows}{columns}{foot}</svg>"
    )


def _confusion_cell(
    share: float, units: int, i: int, j: int, classes: Sequence[str], left: float, head: float, side: float
) -> str:
    if not units:
        return ""
    x, y = left + j * side, head + i * side
    # Small shares stay visible.
    kind, shade = ("cell" if i == j else "cell wrong"), 0.06 + 0.94 * share
    said = f"{units:,} of true {classes[i]} predicted as {classes[j]} ({share:.1%})"
    drawn = (
        f'<rect class="{kind}" x="{x + 0.5:.1f}" y="{y + 0.5:.1f}" width="{side - 1:.1f}" height="{side - 1:.1f}" '
        f'fill-opacity="{shade:.3f}"><title>{escaped(said)}</title></rect>'
    )
    if len(classes) > NUMBERS_IN_CELLS:
        return drawn
    ink = " on" if shade > 0.55 else ""
    return drawn + (
        f'<text class="small{ink}" x="{x + side / 2:.1f}" y="{y + side / 2 + 4:.1f}" text-anchor="middle" '
        f'pointer-events="none">{units:,}</text>'
    )


def learning_figure(
    history: Mapping[int, Sequence[Mapping[str, float]]],
    names: Sequence[str],
    *,
    best: Mapping[int, int],
    y_title: str,
) -> str:
    """Numbers of every epoch: one colour for each of `names`, one line a fold, a dashed rule at the best epoch."""
    lines = [
        (look, [(row.get("epoch", place + 1), row[name]) for place, row in enumerate(rows) if name in row])
        for look, name in enumerate(names)
        for rows in history.values()
    ]
    points = [point for _, line in lines for point in line]
    if not points:
        return ""
    xs, ys = _ends([x for x, _ in points]), _ends([y for _, y in points])
    drawn = "".join(
        _line_in(epoch, min(ys), epoch, max(ys), xs, ys, "best") for epoch in sorted(set(best.values())) if epoch
    )
    kind = "series" if len(history) == 1 else "faint"
    for look, line in lines:
        path = "".join(f"{'L' if i else 'M'}{_at(x, xs):.1f} {_up(y, ys):.1f}" for i, (x, y) in enumerate(line))
        drawn += f'<path class="{kind} q{look}" d="{path}"/>'
        if len(line) == 1:
            drawn += (
                f'<circle class="mark q{look}" cx="{_at(line[0][0], xs):.1f}" cy="{_up(line[0][1], ys):.1f}" r="3"/>'
            )
    shown = [name.replace("_", " ") for name in names]
    return _framed(drawn, xs, ys, "epoch", y_title, ", ".join(shown), whole=True) + key(shown, lines=True)


def numbers_figure(true_u: npt.NDArray[Any], predicted_u: npt.NDArray[Any], label: str) -> str:
    """Predicted over true numbers, at most two thousand evenly chosen of them, and the line of equality."""
    chosen = np.unique(np.linspace(0, len(true_u) - 1, min(len(true_u), POINTS_DRAWN)).astype(np.int64))
    both = _ends(np.concatenate([true_u[chosen], predicted_u[chosen]]).tolist())
    dots = "".join(
        f'<circle class="dot q0" cx="{_at(x, both):.1f}" cy="{_up(y, both):.1f}" r="2.4"/>'
        for x, y in zip(true_u[chosen].tolist(), predicted_u[chosen].tolist(), strict=True)
    )
    equal = _line_in(min(both), min(both), max(both), max(both), both, both, "chance")
    return _framed(equal + dots, both, both, f"true {label}", f"predicted {label}", f"{label}, predicted over true")


def _square(drawn: str, x_title: str, y_title: str, label: str) -> str:
    return _framed(drawn, [0.0, 1.0], [0.0, 1.0], x_title, y_title, label)


def _framed(
    drawn: str,
    xs: Sequence[float],
    ys: Sequence[float],
    x_title: str,
    y_title: str,
    label: str,
    *,
    whole: bool = False,
) -> str:
    """Axes with round ticks around what was drawn with `_at` and `_up` of the same values."""
    x_ticks, y_ticks = _ticks(xs), _ticks(ys)
    x_ticks = [tick for tick in x_ticks if not whole or tick == int(tick)]
    grid = "".join(
        f'<line class="grid-line" x1="{LEFT:g}" x2="{LEFT + SIDE:g}" y1="{_up(t, ys):.1f}" y2="{_up(t, ys):.1f}"/>'
        f'<text class="soft" x="{LEFT - 7:g}" y="{_up(t, ys) + 4:.1f}" text-anchor="end">{tick_text(t, y_ticks)}</text>'
        for t in y_ticks
    )
    grid += "".join(
        f'<text class="soft" x="{_at(t, xs):.1f}" y="{TOP + SIDE + 17:g}" text-anchor="middle">'
        f"{number(t) if whole else tick_text(t, x_ticks)}</text>"
        f'<line class="grid-line" x1="{_at(t, xs):.1f}" x2="{_at(t, xs):.1f}" y1="{TOP:g}" y2="{TOP + SIDE:g}"/>'
        for t in x_ticks
    )
    titles = (
        f'<text class="soft" x="{LEFT + SIDE / 2:g}" y="{TOP + SIDE + 36:g}" text-anchor="middle">{escaped(x_title)}'
        f'</text><text class="soft" transform="translate(12 {TOP + SIDE / 2:g}) rotate(-90)" text-anchor="middle">'
        f"{escaped(y_title)}</text>"
    )
    width, height = LEFT + SIDE + RIGHT, TOP + SIDE + BELOW
    return (
        f'<svg class="chart" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escaped(label)}">'
        f"{grid}{titles}{drawn}</svg>"
    )


def _ends(values: Sequence[float]) -> list[float]:
    return [float(min(values)), float(max(values))]


def _ticks(values: Sequence[float]) -> list[float]:
    return round_ticks(min(values), max(values), 5)


def _at(value: float, xs: Sequence[float]) -> float:
    low, high = _limits(xs)
    return LEFT + SIDE * (value - low) / (high - low)


def _up(value: float, ys: Sequence[float]) -> float:
    low, high = _limits(ys)
    return TOP + SIDE * (1 - (value - low) / (high - low))


def _limits(values: Sequence[float]) -> tuple[float, float]:
    ticks = _ticks(values)
    return min(ticks[0], *values), max(ticks[-1], *values)


def _line_in(x1: float, y1: float, x2: float, y2: float, xs: Sequence[float], ys: Sequence[float], kind: str) -> str:
    return (
        f'<line class="{kind}" x1="{_at(x1, xs):.1f}" y1="{_up(y1, ys):.1f}" x2="{_at(x2, xs):.1f}" '
        f'y2="{_up(y2, ys):.1f}"/>'
    )


def _x(share: float) -> float:
    return LEFT + SIDE * float(share)


def _y(share: float) -> float:
    return TOP + SIDE * (1 - float(share))


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{_x(x1):.1f}" y1="{_y(y1):.1f}" x2="{_x(x2):.1f}" y2="{_y(y2):.1f}"/>'


def _text(x: float, y: float, text: str, *, anchor: str, dy: float = 0.0) -> str:
    return (
        f'<text class="soft small" x="{_x(x):.1f}" y="{_y(y) + dy:.1f}" text-anchor="{anchor}">{escaped(text)}</text>'
    )


def _path(curve: Curve, kind: str) -> str:
    drawn = thinned(curve)
    points = zip(drawn.x.tolist(), drawn.y.tolist(), strict=True)
    path = "".join(f"{'L' if i else 'M'}{_x(x):.1f} {_y(y):.1f}" for i, (x, y) in enumerate(points))
    return f'<path class="{kind}" d="{path}"><title>{escaped(curve.name)}</title></path>'


def _short(name: str, letters: int) -> str:
    return name if len(name) <= letters else f"{name[: max(letters - 1, 1)]}…"
