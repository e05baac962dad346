"""The page of a sweep: what won and how it does on the test part, what decided it, and every trial with its reason."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from genescale.ingestion.reports.report_figures import escaped
from genescale.ingestion.reports.report_style import STYLE
from genescale.platform.progress import clock
from genescale.training.sweeps.importance import METHOD, Importance
from genescale.training.sweeps.sweep_figures import STYLE as FIGURE_STYLE
from genescale.training.sweeps.sweep_figures import (
    importance_bars,
    learning_curves,
    parallel_coordinates,
    text_of,
)
from genescale.training.sweeps.sweep_spec import TuneSpec
from genescale.training.sweeps.trial_records import Trial

OWN_STYLE = """
.importance { display: grid; grid-template-columns: minmax(8rem, 14rem) minmax(0, 24rem) 4rem; gap: .35rem 1rem;
  align-items: center; font-size: .87rem; }
.importance .said { color: var(--soft); font-variant-numeric: tabular-nums; }
.finished { color: var(--good); } .stopped { color: var(--soft); } .failed { color: var(--bad); }
td.own { white-space: nowrap; } tr.best td { font-weight: 600; } td.why { color: var(--bad); max-width: 30rem; }
"""
STATES = {"finished": "✓ finished", "stopped": "◐ stopped early", "failed": "✗ failed", "running": "… running"}


def page(spec: TuneSpec, trials: Sequence[Trial], found: Importance, content: Mapping[str, Any]) -> str:
    """The whole page; `content` is what `sweep.json` holds."""
    title = f"Sweep: {content['label']}"
    parts = [
        _head(trials, content),
        _winner(content),
        _figures(spec, trials, found, content),
        _table(spec, trials, content),
        _spec(content),
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escaped(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}{FIGURE_STYLE}{OWN_STYLE}</style></head><body><main>{''.join(parts)}</main></body></html>\n"
    )


def _head(trials: Sequence[Trial], content: Mapping[str, Any]) -> str:
    origin, counts = content["origin"], content["counts"]
    lead = f"{origin['corpus_uri']}, version {origin['corpus_version']}<br>model {origin['parent'][:16]}"
    failed = counts["failed"]
    verdict = f"{trials[0].name} won with {content['score']} {trials[0].score:.4f}; {_headline(content)}"
    tiles = [
        (str(len(trials)), "trials"),
        (str(counts["finished"]), "ran to their end"),
        (str(counts["stopped"]), "stopped early"),
        (str(failed), "failed, each with its reason below"),
        (f"{trials[0].score:.4f}", f"best {content['score']}"),
        (_value(_main_row(content)["value"]), f"{_main_row(content)['name']} on the test part"),
        (f"{sum(len(trial.epochs) for trial in trials):,}", "epochs of all trials"),
        (clock(sum(trial.seconds for trial in trials)), "fitting time of all trials (m:ss)"),
    ]
    drawn = "".join(f"<div><b>{escaped(value)}</b><span>{escaped(name)}</span></div>" for value, name in tiles)
    return (
        f'<h1>Sweep of {escaped(content["label"])}</h1><p class="lead">{_lines(lead)}</p>'
        f'<div class="verdict">{escaped(verdict)}</div><div class="tiles">{drawn}</div>'
    )


def _main_row(content: Mapping[str, Any]) -> Mapping[str, Any]:
    head = content["winner"]["heads"][0]
    rows = [row for row in head["rows"] if row["metric"] == head["headline"]]
    return rows[0] if rows else head["rows"][0]


def _headline(content: Mapping[str, Any]) -> str:
    row, head = _main_row(content), content["winner"]["heads"][0]
    interval = f" ({_interval(row['interval'])})" if row["interval"] else ""
    return f"on {head['units']:,} {head['unit']} it had not seen, {row['name']} is {_value(row['value'])}{interval}."


def _winner(content: Mapping[str, Any]) -> str:
    won = content["winner"]
    drawn = "".join(
        f"<dt>{escaped(name.replace('_', ' '))}</dt><dd>{escaped(text_of(value))}</dd>"
        for name, value in won["sample"].items()
    )
    tables = "".join(_test(head) for head in won["heads"])
    return (
        f"<h2>The winner</h2><dl>{drawn}<dt>best epoch</dt><dd>{won['best_epoch']}</dd></dl>"
        f"{tables}<h3>Fit it again, without a sweep and without Ray</h3><pre>{escaped(won['command'])}</pre>"
    )


def _test(head: Mapping[str, Any]) -> str:
    baselines = list(dict.fromkeys(name for row in head["rows"] for name in row["baselines"]))
    columns = ["winner", "95% interval", "most frequent class" if head["headline"] != "r2" else "mean", *baselines]
    top = "".join(f'<th class="number">{escaped(column)}</th>' for column in columns)
    body = ""
    for row in head["rows"]:
        cells = [_value(row["value"]), _interval(row["interval"]), _value(row["majority"])]
        cells += [_value(row["baselines"].get(name)) for name in baselines]
        body += f"<tr><td>{escaped(row['name'])}</td>"
        body += "".join(f'<td class="number">{escaped(cell)}</td>' for cell in cells) + "</tr>"
    notes = "".join(f'<p class="soft">{escaped(note)}</p>' for note in head["notes"])
    for why in dict.fromkeys(head["not_measured"].values()):
        names = ", ".join(name for name, reason in head["not_measured"].items() if reason == why)
        notes += f'<p class="soft">Not measured: {escaped(names)}. {escaped(why)}</p>'
    return (
        f"<h3>{escaped(head['label'])}: the test part, looked at once ({head['units']:,} {escaped(head['unit'])})</h3>"
        f'<div class="wide"><table><thead><tr><th>measure</th>{top}</tr></thead><tbody>{body}</tbody></table></div>'
        f'{notes}<p class="soft">The whole evaluation is in <a href="report.html">report.html</a>.</p>'
    )


def _figures(spec: TuneSpec, trials: Sequence[Trial], found: Importance, content: Mapping[str, Any]) -> str:
    by_weight = [name for name, _ in found.shares]
    names = [*by_weight, *(name for name in spec.order if name not in by_weight)]
    if found.shares:
        left_out = f" Not compared, because only some trials draw them: {', '.join(found.left_out)}." * bool(
            found.left_out
        )
        weighed = importance_bars(found.shares) + (
            f'<p class="soft">Share of the variance of scores over {found.trials} trials; {escaped(METHOD)}. '
            f"Trials that were stopped count with the score they had.{escaped(left_out)}</p>"
        )
    else:
        weighed = f"<p>Not computed: {escaped(found.why_not)}</p>"
    folds = " Curves are of the first fold." if content["folds"] > 1 else ""
    return (
        f"<h2>What decided it</h2>{weighed}<h3>Settings and scores</h3>"
        f"{parallel_coordinates(spec, trials, names, content['score'])}"
        '<p class="soft">One line for each trial, from its settings to its score; the stronger, the better, and the '
        "winner in bold. Dashed: stopped early. Point at a line to read it.</p>"
        f"<h3>Learning curves</h3>{learning_curves(trials, content['score'])}"
        f'<p class="soft">The mark is the winner at its best epoch.{folds}</p>'
    )


def _table(spec: TuneSpec, trials: Sequence[Trial], content: Mapping[str, Any]) -> str:
    names = spec.order
    head = f'<th>trial</th><th>outcome</th><th class="number">{escaped(content["score"])}</th>'
    head += (
        '<th class="number minor">best epoch</th><th class="number minor">epochs</th><th class="number minor">s</th>'
    )
    head += "".join(f'<th class="number">{escaped(name.replace("_", " "))}</th>' for name in names)
    failed = any(trial.error for trial in trials)
    head += "<th>reason</th>" if failed else ""
    body = "".join(_row(trial, names, failed=failed, best=not rank) for rank, trial in enumerate(trials))
    return (
        f"<h2>All trials, best first</h2><div class='wide'><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _row(trial: Trial, names: Sequence[str], *, failed: bool, best: bool) -> str:
    score = "–" if trial.score is None else f"{trial.score:.4f}"
    cells = [
        f'<td class="own">{escaped(trial.name)}</td>',
        f'<td><span class="status {trial.status}">{STATES[trial.status]}</span></td>',
        f'<td class="number">{score}</td>',
        f'<td class="number minor">{trial.best_epoch or "–"}</td>',
        f'<td class="number minor">{len(trial.epochs)}</td>',
        f'<td class="number minor">{trial.seconds:.1f}</td>',
    ]
    cells += [f'<td class="number">{escaped(text_of(trial.sample.get(name, "–")))}</td>' for name in names]
    cells += [f'<td class="why">{escaped(trial.error)}</td>'] if failed else []
    return f"<tr{' class=best' if best else ''}>{''.join(cells)}</tr>"


def _spec(content: Mapping[str, Any]) -> str:
    return f"<h2>What was swept</h2><pre>{escaped(json.dumps(content['spec'], indent=1, default=str))}</pre>"


def _value(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _interval(limits: Sequence[float | None] | None) -> str:
    return f"{_value(limits[0])} to {_value(limits[1])}" if limits else "–"


def _lines(text: str) -> str:
    return "<br>".join(escaped(line) for line in text.split("<br>"))
