"""The middle of the heads' report: folds, curves, confusion, calibration, numbers, groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from genescale.ingestion.reports.report_figures import escaped, number
from genescale.training.evaluation.calibration import BINS
from genescale.training.evaluation.charts import Mark, MarkRow, mark_rows
from genescale.training.evaluation.figures import (
    MOST_CLASSES,
    confusion_figure,
    curve_figure,
    numbers_figure,
    reliability_figure,
)
from genescale.training.evaluation.figures_curves import precision_recall_curves, roc_curves
from genescale.training.evaluation.measures import METRIC_NAMES, WITHIN_FOLDS, Evaluation
from genescale.training.evaluation.predictions import Predictions
from genescale.training.evaluation.report_headline import metric

REPORT_STYLE = (
    ".key svg{display:inline-block;margin:0 .4rem 0 0}.verdict.open{border-left-color:var(--soft)}"
    ".interval{font-size:.76rem}.tiles b{font-size:1.5rem}td.wrong{color:var(--odd);font-weight:600}"
    "tr.sum td{border-top:2px solid var(--line);font-weight:600}"
)
MOST_GROUPS_DRAWN = 40
MOST_CONFUSIONS = 15
LETTERS_BESIDE_MARKS = 21


def sections(evaluation: Evaluation, predictions: Predictions) -> str:
    """Everything about one head that is not its headline, its genes or the run."""
    measured = predictions.take(predictions.labelled_u)
    middle = _classes(evaluation, measured) if evaluation.kind == "classes" else _numbers(evaluation, measured)
    return middle + _groups(evaluation) + _folds(evaluation)


def _classes(evaluation: Evaluation, measured: Predictions) -> str:
    return _curves(evaluation, measured) + _confusion(evaluation) + _calibration(evaluation)


def _numbers(evaluation: Evaluation, measured: Predictions) -> str:
    figure = numbers_figure(measured.true_u, measured.values_u, evaluation.label)
    return f'<h2>Predicted against true</h2><div class="pair"><div>{figure}</div></div>'


def _curves(evaluation: Evaluation, measured: Predictions) -> str:
    code = evaluation.classes.index(evaluation.positive) if evaluation.positive else 0
    roc, pr = roc_curves(measured, code), precision_recall_curves(measured, code)
    if roc is None or pr is None:
        return "<h2>ROC and precision-recall</h2><p>No fold holds units of two classes: there are no curves.</p>"
    kinds = "classes" if len(evaluation.classes) > 2 else "folds"
    several = f"Faint: {kinds}; strong: their mean. " if len(roc.single) > 1 else ""
    spread = ""
    if len(evaluation.per_fold) > 1:
        said = [f"{METRIC_NAMES[m]} {metric(evaluation.mean[m])} ± {metric(evaluation.sd[m])}" for m in WITHIN_FOLDS]
        spread = f"Mean ± standard deviation over {len(evaluation.per_fold)} folds: {'; '.join(said)}."
    figures = (
        f"<div><h3>ROC, area {metric(evaluation['roc_auc'])}</h3>"
        + curve_figure(
            roc, x_title="false positive rate", y_title="true positive rate", label="ROC curves", diagonal=True
        )
        + f"</div><div><h3>Precision and recall, area {metric(evaluation['pr_auc'])}</h3>"
        + curve_figure(pr, x_title="recall", y_title="precision", label="precision-recall curves", diagonal=False)
        + "</div>"
    )
    text = escaped((several + spread).strip())
    return f'<h2>ROC and precision-recall</h2><p class="soft">{text}</p><div class="pair">{figures}</div>'


def _confusion(evaluation: Evaluation) -> str:
    drawn = (
        confusion_figure(evaluation.confusion_cc, evaluation.classes) if len(evaluation.classes) <= MOST_CLASSES else ""
    )
    largest = _largest_confusions(evaluation) if len(evaluation.classes) > 2 else ""
    head = "".join(
        f'<th class="{kind}">{name}</th>'
        for name, kind in (
            ("class", ""), (evaluation.unit, "number"), ("precision", "number"), ("recall", "number"), ("F1", "number"),
            ("ROC AUC against the rest", "number"),
        )
    )  # fmt: skip
    rows = "".join(
        f'<tr><td class="name">{escaped(row.name)}</td><td class="number">{row.support:,}</td>'
        + "".join(
            f'<td class="number">{metric(value)}</td>'
            for value in (
                row.precision if row.precision or row.f1 else _no_precision(evaluation, row.name),
                row.recall if row.support else None,
                row.f1,
                evaluation.roc_auc_per_class.get(row.name),
            )
        )
        + "</tr>"
        for row in evaluation.per_class
    )
    table = f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    return f"<h2>Classes</h2>{drawn}{largest}{table}"


def _no_precision(evaluation: Evaluation, name: str) -> float | None:
    """Precision of a class without true positives: 0, or nothing when it was never predicted."""
    return 0.0 if evaluation.confusion_cc[:, evaluation.classes.index(name)].sum() else None


def _largest_confusions(evaluation: Evaluation) -> str:
    wrong_cc = evaluation.confusion_cc.copy()
    np.fill_diagonal(wrong_cc, 0)
    order = np.argsort(-wrong_cc, axis=None, kind="stable")[:MOST_CONFUSIONS]
    rows = ""
    for true, predicted in zip(*np.unravel_index(order, wrong_cc.shape), strict=True):
        count = int(wrong_cc[true, predicted])
        if not count:
            break
        share = count / max(int(evaluation.confusion_cc[true].sum()), 1)
        rows += (
            f'<tr><td class="name">{escaped(evaluation.classes[true])}</td>'
            f'<td class="name">{escaped(evaluation.classes[predicted])}</td><td class="number">{count:,}</td>'
            f'<td class="number">{share:.1%}</td></tr>'
        )
    if not rows:
        return "<p>No unit was confused.</p>"
    return (
        "<details><summary>Largest confusions</summary><table><thead><tr><th>true</th><th>predicted</th>"
        f'<th class="number">{evaluation.unit}</th><th class="number">of the true class</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></details>"
    )


def _calibration(evaluation: Evaluation) -> str:
    if evaluation.reliability is None:
        return ""
    text = (
        f"Units by the probability of their predicted class, in {BINS} bins; on the diagonal a stated 80 % is right in "
        f"80 %. Expected calibration error {metric(evaluation['ece'])} (Guo et al. 2017), Brier score "
        f"{metric(evaluation['brier'])}. Columns: how many units, the tallest {evaluation.reliability.units_k.max():,}."
    )
    figure = reliability_figure(evaluation.reliability)
    return f'<h2>Calibration</h2><p class="soft">{escaped(text)}</p><div class="pair"><div>{figure}</div></div>'


def _groups(evaluation: Evaluation) -> str:
    rows = evaluation.per_group
    if not rows:
        return ""
    by_class = evaluation.kind == "classes"
    keys = ("accuracy", "macro_f1") if by_class else ("mae", "bias")
    names = ["accuracy", "macro F1"] if by_class else ["mean absolute error", "bias (mean error)"]
    values = np.array([row[keys[0]] for row in rows])
    text = (
        f"{len(rows)} held-out group{'s' if len(rows) > 1 else ''}. "
        f"{names[0].capitalize()}: {values.min():.3f} to {values.max():.3f}, median "
        f"{np.median(values):.3f}"
        + (f", standard deviation {values.std(ddof=1):.3f}." if len(values) > 1 else ".")
        + (" Macro F1 of a group is over the classes that occur in it." if by_class else "")
    )
    order = sorted(rows, key=lambda row: -row[keys[0]])
    shown = order if len(order) <= MOST_GROUPS_DRAWN else _spread_out(order)
    if len(shown) < len(order):
        text += f" Drawn are {len(shown)} of them, evenly spaced from best to worst; report.json has all."
    marks = [
        MarkRow(
            name=_short(str(row["group"])),
            beside=f"{row['units']:,}",
            marks=[Mark(series=place, value=row[each]) for place, each in enumerate(keys)],
        )
        for row in shown
    ]
    title = f"{' and '.join(names)} by group; beside the names: {evaluation.unit}"
    return f'<h2>Groups</h2><p class="soft">{escaped(text)}</p>' + mark_rows(
        marks, names, axis_title=title, label="spread over groups"
    )


def _short(name: str) -> str:
    """A group's name in the room that a row of marks has; report.json has it whole."""
    return name if len(name) <= LETTERS_BESIDE_MARKS else f"{name[: LETTERS_BESIDE_MARKS - 1]}…"


def _spread_out(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [rows[place] for place in np.linspace(0, len(rows) - 1, MOST_GROUPS_DRAWN).round().astype(int).tolist()]


def _folds(evaluation: Evaluation) -> str:
    if len(evaluation.per_fold) < 2:
        return ""
    head = "".join(f'<th class="number">{METRIC_NAMES[m]}</th>' for m in evaluation.metrics)
    rows = "".join(
        _fold_row(f"fold {int(row['fold']) + 1}", number(row["units"]), row, evaluation) for row in evaluation.per_fold
    )
    rows += _fold_row("mean", "", evaluation.mean, evaluation, kind="sum")
    rows += _fold_row("standard deviation", "", evaluation.sd, evaluation)
    rows += _fold_row("all units together", number(evaluation.units), evaluation.pooled, evaluation)
    return (
        f'<h2>Folds</h2><div class="wide"><table><thead><tr><th></th><th class="number">{evaluation.unit}</th>{head}'
        f"</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _fold_row(name: str, units: str, values: Mapping[str, float], evaluation: Evaluation, *, kind: str = "") -> str:
    cells = "".join(f'<td class="number">{metric(values.get(m))}</td>' for m in evaluation.metrics)
    return f'<tr class="{kind}"><td>{name}</td><td class="number">{units}</td>{cells}</tr>'
