"""Figures of a sweep as SVG text: parallel coordinates, learning curves, and bars of importance.

They follow the page's theme; the winner is told apart by colour, width and its name, never by colour alone. Every
number also stands in the table of trials or in a title.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from genescale.ingestion.reports.report_figures import escaped
from genescale.training.evaluation.charts import round_ticks, tick_text
from genescale.training.sweeps.sweep_spec import TuneSpec, Values, is_whole
from genescale.training.sweeps.trial_records import Trial

WIDTH, HEIGHT = 960.0, 340.0
LEFT, RIGHT, TOP, BOTTOM = 56.0, 70.0, 44.0, 30.0
MOST_AXES = 9
STYLE = """
.sweep { width: 100%; height: auto; display: block; margin: .6rem 0; }
.sweep text { font: 12px system-ui, sans-serif; fill: var(--ink); stroke: var(--back); stroke-width: 4px;
  stroke-linejoin: round; paint-order: stroke; } .sweep text.soft { fill: var(--soft); }
.sweep .rule { stroke: var(--line); stroke-width: 1; } .sweep .axis-line { stroke: var(--soft); stroke-width: 1; }
.sweep path { fill: none; stroke: var(--fill); stroke-width: 1.3; }
.sweep path.stopped { stroke-dasharray: 4 3; }
.sweep path.best { stroke: var(--odd); stroke-width: 3; }
.sweep path:hover { stroke: var(--odd); opacity: 1 !important; stroke-width: 3; }
.sweep circle.best { fill: var(--odd); } .sweep text.best { fill: var(--odd); font-weight: 600; }
.figure { overflow-x: auto; } .figure .sweep { min-width: 40rem; }
"""


@dataclass(frozen=True)
class Axis:
    """One vertical axis of parallel coordinates: places from 0 (bottom) to 1 (top), and labelled ticks."""

    title: str
    places: Mapping[int, float]
    """Place of each trial, by its number."""
    ticks: Sequence[tuple[float, str]]


def parallel_coordinates(spec: TuneSpec, trials: Sequence[Trial], names: Sequence[str], score_name: str) -> str:
    """A line for each scored trial across the settings `names` and its score; the better, the stronger."""
    scored = [trial for trial in trials if trial.score is not None and trial.status != "failed"]
    axes = [_setting_axis(name, spec.search[name], scored) for name in names[:MOST_AXES]]
    axes.append(_score_axis(score_name, scored))
    step = (WIDTH - LEFT - RIGHT) / (len(axes) - 1)
    xs = [LEFT + number * step for number in range(len(axes))]
    lines = [_trial_line(trial, rank, len(scored), axes, xs) for rank, trial in enumerate(scored)]
    frame = "".join(_drawn_axis(axis, x, last=x == xs[-1]) for axis, x in zip(axes, xs, strict=True))
    return _figure("".join(reversed(lines)) + frame, "parallel coordinates of the trials")


def _trial_line(trial: Trial, rank: int, count: int, axes: Sequence[Axis], xs: Sequence[float]) -> str:
    points = [(x, _up(axis.places[trial.number])) for axis, x in zip(axes, xs, strict=True)]
    opacity = 1.0 if not rank else 0.12 + 0.6 * (1 - rank / count) ** 2
    kind = "best" if not rank else trial.status
    return (
        f'<path class="{kind}" opacity="{opacity:.2f}" d="{_path(points)}"><title>{escaped(said(trial))}</title></path>'
    )


def _setting_axis(name: str, values: Values, trials: Sequence[Trial]) -> Axis:
    if values.choices:
        at = {value: (i + 0.5) / len(values.choices) for i, value in enumerate(values.choices)}
        ticks = [(at[value], _short(str(value))) for value in values.choices]
        places = {t.number: at[t.sample[name]] for t in trials if name in t.sample}
    else:
        low, high = float(values.low or 0), float(values.high or 0)
        scale = math.log if values.log else float
        span = scale(high) - scale(low)
        ticks = [((scale(v) - scale(low)) / span, text_of(v)) for v in _round_values(name, values)]
        places = {t.number: (scale(t.sample[name]) - scale(low)) / span for t in trials if name in t.sample}
    if any(name not in trial.sample for trial in trials):
        # Trials that do not draw the setting pass below its values.
        places = {number: 0.12 + 0.88 * place for number, place in places.items()}
        ticks = [(0.0, "not drawn"), *((0.12 + 0.88 * place, text) for place, text in ticks)]
        places |= {trial.number: 0.0 for trial in trials if name not in trial.sample}
    return Axis(title=name.replace("_", " "), places=places, ticks=ticks)


def _round_values(name: str, values: Values) -> list[float]:
    low, high = float(values.low or 0), float(values.high or 0)
    if not values.log:
        inside = [tick for tick in round_ticks(low, high, 4) if low <= tick <= high]
        return [tick for tick in inside if tick == int(tick)] if is_whole(name) else inside
    powers = range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
    return [10.0**power for power in powers] or [low, high]


def _score_axis(title: str, trials: Sequence[Trial]) -> Axis:
    scores = {trial.number: trial.score or 0.0 for trial in trials}
    ticks = round_ticks(min(scores.values()), max(scores.values()), 5)
    low, span = ticks[0], (ticks[-1] - ticks[0]) or 1.0
    return Axis(
        title=title,
        places={number: (score - low) / span for number, score in scores.items()},
        ticks=[((tick - low) / span, tick_text(tick, ticks)) for tick in ticks],
    )


def _drawn_axis(axis: Axis, x: float, *, last: bool) -> str:
    labels = "".join(
        f'<line class="axis-line" x1="{x - 3:.1f}" x2="{x + 3:.1f}" y1="{_up(place):.1f}" y2="{_up(place):.1f}"/>'
        f'<text class="soft" x="{x + (7 if last else -7):.1f}" y="{_up(place) + 4:.1f}" '
        f'text-anchor="{"start" if last else "end"}">{escaped(text)}</text>'
        for place, text in axis.ticks
    )
    return (
        f'<line class="axis-line" x1="{x:.1f}" x2="{x:.1f}" y1="{_up(1):.1f}" y2="{_up(0):.1f}"/>{labels}'
        f'<text x="{x:.1f}" y="22" text-anchor="middle">{escaped(axis.title)}</text>'
    )


def learning_curves(trials: Sequence[Trial], score_name: str) -> str:
    """The validation score of each epoch of each trial (of its first fold); a dashed line was stopped early."""
    curves = [(trial, _curve(trial)) for trial in trials]
    curves = [(trial, points) for trial, points in curves if points]
    ys = round_ticks(min(y for _, p in curves for _, y in p), max(y for _, p in curves for _, y in p), 5)
    longest = max(x for _, points in curves for x, _ in points)
    xs = [tick for tick in round_ticks(0, longest, 8) if tick == int(tick) and tick <= max(longest, 1)]
    right, low, span = WIDTH - RIGHT, ys[0], (ys[-1] - ys[0]) or 1.0

    def across(x: float) -> float:
        return LEFT + x / max(longest, 1) * (right - LEFT)

    def up(y: float) -> float:
        return _up((y - low) / span)

    grid = "".join(
        f'<line class="rule" x1="{LEFT:g}" x2="{right:g}" y1="{up(y):.1f}" y2="{up(y):.1f}"/>'
        f'<text class="soft" x="{LEFT - 8:g}" y="{up(y) + 4:.1f}" text-anchor="end">{tick_text(y, ys)}</text>'
        for y in ys
    )
    grid += "".join(
        f'<text class="soft" x="{across(x):.1f}" y="{_up(0) + 18:.1f}" text-anchor="middle">{x:g}</text>' for x in xs
    )
    drawn = ""
    for rank, (trial, points) in enumerate(curves):
        places = [(across(x), up(y)) for x, y in points]
        kind = "best" if not rank else trial.status
        opacity = 1.0 if not rank else 0.15 + 0.55 * (1 - rank / len(curves)) ** 2
        title = f"<title>{escaped(said(trial))}</title>"
        if len(places) == 1:
            places = [(places[0][0] - 4, places[0][1]), (places[0][0] + 4, places[0][1])]
        drawn = f'<path class="{kind}" opacity="{opacity:.2f}" d="{_path(places)}">{title}</path>{drawn}'
    best_x, best_y = next((p for p in curves[0][1] if p[0] == curves[0][0].best_epoch), curves[0][1][-1])
    mark = (
        f'<circle class="best" cx="{across(best_x):.1f}" cy="{up(best_y):.1f}" r="5"/><text class="best" '
        f'x="{min(across(best_x) + 9, right - 60):.1f}" y="{up(best_y) - 9:.1f}">{curves[0][0].name}</text>'
    )
    titles = (
        f'<text class="soft" x="{LEFT:g}" y="22">{escaped(score_name)} by epoch</text>'
        f'<text class="soft" x="{right + 22:g}" y="{_up(0) + 18:.1f}">epoch</text>'
    )
    return _figure(grid + drawn + mark + titles, "learning curves of the trials")


def importance_bars(shares: Sequence[tuple[str, float]]) -> str:
    """A bar for each setting, as rows of the page's own grid."""
    most = max(share for _, share in shares) or 1.0
    rows = "".join(
        f'<div class="name">{escaped(name.replace("_", " "))}</div><div class="cell"><div class="bar" role="img" '
        f'aria-label="{escaped(name)}: {share:.0%}"><i style="flex-grow:{share / most:.4f};background:var(--fill)"></i>'
        f'<i style="flex-grow:{1 - share / most:.4f}"></i></div></div><div class="said">{share:.0%}</div>'
        for name, share in shares
    )
    return f'<div class="importance">{rows}</div>'


def said(trial: Trial) -> str:
    """One line on a trial."""
    score = "no score" if trial.score is None else f"{trial.score:.4f}"
    drawn = ", ".join(f"{name} {text_of(value)}" for name, value in trial.sample.items())
    return f"{trial.name}: {score}, {trial.status}; {drawn}"


def text_of(value: Any) -> str:
    """A drawn value as people write it."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value)


def _curve(trial: Trial) -> list[tuple[int, float]]:
    rows = [row for row in trial.epochs if not row["fold"]]
    return [
        (int(row["epoch"]), float(row["validation_score"])) for row in rows if row.get("validation_score") is not None
    ]


def _up(place: float) -> float:
    return TOP + (1 - place) * (HEIGHT - TOP - BOTTOM)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "".join(f"{'L' if i else 'M'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(points))


def _short(text: str) -> str:
    return text if len(text) <= 16 else f"{text[:15]}…"


def _figure(drawn: str, label: str) -> str:
    return (
        f'<div class="figure"><svg class="sweep" viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" '
        f'aria-label="{escaped(label)}">{drawn}</svg></div>'
    )
