"""The first screen of the heads' report: how good, how sure, and whether it beats what is simple."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from genescale.ingestion.reports.report_figures import escaped
from genescale.training.evaluation.baselines import Baseline
from genescale.training.evaluation.baselines_features import FEATURE_NAMES
from genescale.training.evaluation.baselines_models import MODEL_NAMES
from genescale.training.evaluation.bootstrap import METHOD, Interval, difference
from genescale.training.evaluation.charts import Mark, MarkRow, mark_rows
from genescale.training.evaluation.measures import LOWER_IS_BETTER, METRIC_NAMES, Evaluation

SHORT_MODELS = {
    "logistic_regression": "Logistic",
    "random_forest": "Forest",
    "linear_svm": "SVM",
    "ridge_regression": "Ridge",
}
SHORT_FEATURES = {"rank_vectors": "ranks", "rank_averages": "average ranks", "log_expression": "expression"}
ABOVE, BELOW, UNDECIDED, NOTHING = "above", "below", "undecided", "no_baseline"


def metric(value: float | None) -> str:
    """A metric with three decimals; a dash where it has no value."""
    return "–" if value is None or value != value else f"{value:.3f}"


def span(found: Interval | None) -> str:
    """An interval in words, empty when there is none."""
    return "" if found is None or found.low != found.low else f"{found.low:.3f} to {found.high:.3f}"


def baseline_name(baseline: Baseline) -> str:
    """`Random forest on ranks`."""
    return f"{MODEL_NAMES[baseline.name]} on {FEATURE_NAMES[baseline.features]}"


def best_baseline(evaluation: Evaluation, baselines: Sequence[Baseline]) -> Baseline | None:
    """The measured baseline with the best headline metric; None without one."""
    sign = -1 if evaluation.headline in LOWER_IS_BETTER else 1
    measured = [(b, b.evaluation[evaluation.headline]) for b in baselines if b.evaluation is not None]
    known = [(b, value) for b, value in measured if value == value]
    return max(known, key=lambda pair: sign * pair[1])[0] if known else None


def headline_json(evaluation: Evaluation, baselines: Sequence[Baseline]) -> dict[str, Any]:
    """The verdict as data: the headline metric, the best baseline, the paired difference and what it says."""
    best = best_baseline(evaluation, baselines)
    if best is None or best.evaluation is None:
        return {"metric": evaluation.headline, "says": NOTHING}
    gain = difference(evaluation.intervals, best.evaluation.intervals, evaluation.headline)
    return {
        "metric": evaluation.headline,
        "says": _says(gain),
        "best_baseline": {"name": best.name, "features": best.features},
        "difference": evaluation[evaluation.headline] - best.evaluation[evaluation.headline],
        "low": None if gain is None else gain.low,
        "high": None if gain is None else gain.high,
    }


def verdict(evaluation: Evaluation, baselines: Sequence[Baseline]) -> str:
    """One sentence on the head, one on the best baseline, four numbers; with one class held out, why there are none."""
    if only := _only_class(evaluation):
        return f'<div class="verdict open">{escaped(_one_class(only, evaluation))}</div>'
    told, name = headline_json(evaluation, baselines), METRIC_NAMES[evaluation.headline]
    sure = span(evaluation.intervals.intervals.get(evaluation.headline))
    text = f"{name} {metric(evaluation[evaluation.headline])}" + (f" (95 %: {sure})" if sure else "") + ". "
    best = best_baseline(evaluation, baselines)
    if best is None or best.evaluation is None:
        why = "No baseline could be measured." if baselines else "No baseline was measured beside it."
        text += why
    else:
        text += (
            f"The best baseline, {_lower(baseline_name(best))}, has {metric(best.evaluation[evaluation.headline])}: "
        )
        text += _compared(told)
    kind = {ABOVE: "", BELOW: "bad"}.get(told["says"], "open")
    shown = [m for m in evaluation.metrics if m != evaluation.headline and m not in ("brier", "rmse")][:3]
    tiles = [(evaluation.headline, evaluation[evaluation.headline]), *((m, evaluation[m]) for m in shown)]
    drawn = "".join(f"<div><b>{metric(value)}</b><span>{METRIC_NAMES[m]}</span></div>" for m, value in tiles)
    return f'<div class="verdict {kind}">{escaped(text)}</div><div class="tiles">{drawn}</div>'


def _only_class(evaluation: Evaluation) -> str:
    """The class of all held-out units where they are all of one; else empty."""
    held_c = evaluation.confusion_cc.sum(axis=1)
    if evaluation.kind != "classes" or (held_c > 0).sum() != 1:
        return ""
    return evaluation.classes[int(held_c.argmax())]


def _one_class(only: str, evaluation: Evaluation) -> str:
    return (
        f"All {evaluation.units:,} held-out {evaluation.unit} are '{only}': accuracy is "
        f"{metric(evaluation['accuracy'])}, but "
        "whether the classes are told apart cannot be seen in this test part. Hold out more groups, or use "
        f'split = "balanced" with balance = ["{evaluation.label}"].'
    )


def against_baselines(evaluation: Evaluation, baselines: Sequence[Baseline]) -> str:
    """The head, every baseline and the majority as marks with intervals and as a table; how they were measured."""
    measured = [(b, b.evaluation) for b in baselines if b.evaluation is not None]
    rows = [("This head", evaluation), *((baseline_name(b), each) for b, each in measured)]
    shorts = ["This head", *(f"{SHORT_MODELS[b.name]}, {SHORT_FEATURES[b.features]}" for b, _ in measured)]
    marks = [
        _mark_row(name, each, evaluation.headline, place)
        for place, (name, (_, each)) in enumerate(zip(shorts, rows, strict=True))
    ]
    chance = evaluation.majority.get(evaluation.headline)
    simple = MODEL_NAMES["majority" if evaluation.kind == "classes" else "mean"]
    if chance is not None and chance == chance:
        marks.append(MarkRow(name=simple, beside=metric(chance), marks=[Mark(series=1, value=chance)]))
    drawable = [row for row in marks if row.marks]
    name = METRIC_NAMES[evaluation.headline]
    chart = (
        mark_rows(drawable, ["this head", "baselines"], axis_title=f"{name} with 95 % interval", label=f"{name} of all")
        if len(drawable) > 1
        else ""
    )
    head = "".join(f'<th class="number">{METRIC_NAMES[m]}</th>' for m in evaluation.metrics)
    body = "".join(_table_row(name, each.estimates(), each, evaluation) for name, each in rows)
    if evaluation.majority:
        body += _table_row(simple, evaluation.majority, None, evaluation)
    body += "".join(_absent_row(b, len(evaluation.metrics)) for b in baselines if b.evaluation is None)
    table = f'<div class="wide"><table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    return f"<h2>Beside simple classifiers</h2>{_how(evaluation, baselines)}{chart}{table}"


def _how(evaluation: Evaluation, baselines: Sequence[Baseline]) -> str:
    drawn = evaluation.intervals
    folds = len(evaluation.per_fold)
    told = [f"{evaluation.units:,} held-out {evaluation.unit} in {folds} fold{'s' if folds > 1 else ''}"]
    if evaluation.unlabelled:
        told.append(f"{evaluation.unlabelled:,} more have no label and were not measured")
    text = "; ".join(told) + ". "
    if baselines:
        text += "Baselines were fitted on the same training parts and measured on the same units. "
    text += (
        f"Intervals: {METHOD} over {drawn.drawn}, {drawn.draws:,} draws. "
        if drawn.draws
        else "There are no intervals. "
    )
    if folds > 1 and evaluation.kind == "classes":
        text += "ROC AUC and PR AUC are means over folds; the other numbers are over all units together. "
    if len(evaluation.classes) > 2:
        text += "ROC AUC and PR AUC are means over classes, each against the rest. "
    if evaluation.positive:
        text += f"PR AUC looks for '{evaluation.positive}'. "
    return f'<p class="soft">{escaped(text + " ".join(drawn.notes))}</p>' + _sizes(baselines)


def _sizes(baselines: Sequence[Baseline]) -> str:
    """What the baselines were fitted on, in one line."""
    folds = [fold for b in baselines if b.evaluation is not None for fold in b.facts.get("folds", ())]
    if not folds:
        return ""
    units = sorted({fold["training_units"] for fold in folds})
    shown = f"{units[0]:,}" if len(units) == 1 else f"{units[0]:,} to {units[-1]:,}"
    text = f"Baselines: fitted on {shown} training units of a fold"
    cells = {b.facts["cells"] for b in baselines if "cells" in b.facts}
    text += f", genes described by {max(cells):,} cells" if cells else ""
    late = sorted(
        {baseline_name(b) for b in baselines if any(f.get("not_converged") for f in b.facts.get("folds", ()))}
    )
    text += "; penalties of linear models chosen on the validation part."
    text += f" Stopped before they converged: {', '.join(late)}." if late else ""
    return f'<p class="soft">{escaped(text)}</p>'


def _mark_row(name: str, each: Evaluation, chosen: str, place: int) -> MarkRow:
    value, found = each[chosen], each.intervals.intervals.get(chosen)
    known = found is not None and found.low == found.low
    mark = Mark(
        series=min(place, 1),
        value=value,
        low=found.low if found is not None and known else None,
        high=found.high if found is not None and known else None,
    )
    return MarkRow(name=name, beside=metric(value), marks=[mark] if value == value else [])


def _table_row(name: str, values: Any, each: Evaluation | None, head: Evaluation) -> str:
    best = "<b>" if each is head else ""
    cells = ""
    for m in head.metrics:
        sure = span(each.intervals.intervals.get(m)) if each is not None else ""
        under = f'<br><span class="soft interval">{sure}</span>' if sure else ""
        cells += f'<td class="number">{best}{metric(values.get(m))}{"</b>" if best else ""}{under}</td>'
    return f'<tr><td class="name">{best}{escaped(name)}{"</b>" if best else ""}</td>{cells}</tr>'


def _absent_row(baseline: Baseline, columns: int) -> str:
    why = f"not measured: {baseline.why_not}"
    return (
        f'<tr><td class="name">{escaped(baseline_name(baseline))}</td>'
        f'<td class="long warning" colspan="{columns}">{escaped(why)}</td></tr>'
    )


def _says(gain: Interval | None) -> str:
    if gain is None or gain.low != gain.low:
        return UNDECIDED
    return ABOVE if gain.low > 0 else BELOW if gain.high < 0 else UNDECIDED


def _compared(told: dict[str, Any]) -> str:
    by = f"by {abs(told['difference']):.3f}"
    sure = (
        f" (95 % of the paired difference: {told['low']:+.3f} to {told['high']:+.3f})"
        if told["low"] is not None
        else ""
    )
    if told["says"] == ABOVE:
        return f"this head is above it {by}{sure}."
    if told["says"] == BELOW:
        return f"this head is below it {by}{sure}."
    side = "above" if told["difference"] > 0 else "below"
    return f"this head is {side} it {by}, " + ("which may be chance" if sure else "of unknown certainty") + f"{sure}."


def _lower(name: str) -> str:
    return name[0].lower() + name[1:]
