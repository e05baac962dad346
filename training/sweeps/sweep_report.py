"""The report of a sweep: `sweep.html`, which needs no network and no script, and `sweep.json` with the same numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from genescale.training.evaluation.measures import METRIC_NAMES, Evaluation, plain
from genescale.training.fitting.finetune import FinetuneResult
from genescale.training.sweeps.importance import METHOD, Importance, importance
from genescale.training.sweeps.sweep_page import page
from genescale.training.sweeps.sweep_spec import TuneSpec
from genescale.training.sweeps.trial_records import Trial

HTML, JSON = "sweep.html", "sweep.json"


def write_sweep_report(
    folder: Path,
    spec: TuneSpec,
    trials: Sequence[Trial],
    winner: FinetuneResult,
    *,
    command: str,
    origin: Mapping[str, Any],
) -> Path:
    """Write both files into `folder`, `trials` best first; gives the path of the HTML page."""
    found = importance(spec, trials)
    content = sweep_content(spec, trials, winner, found, command=command, origin=origin)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / JSON).write_text(json.dumps(content, indent=1, default=str), encoding="utf-8")
    (folder / HTML).write_text(page(spec, trials, found, content), encoding="utf-8")
    return folder / HTML


def sweep_content(
    spec: TuneSpec,
    trials: Sequence[Trial],
    winner: FinetuneResult,
    found: Importance,
    *,
    command: str,
    origin: Mapping[str, Any],
) -> dict[str, Any]:
    """What `sweep.json` holds: plain values only."""
    states = ("finished", "stopped", "failed")
    content = {
        "schema_version": 1,
        "label": spec.finetune.label,
        "score": score_name(spec),
        "folds": winner.task.n_folds,
        "spec": asdict(spec),
        "origin": dict(origin),
        "counts": {state: sum(trial.status == state for trial in trials) for state in states},
        "trials": [asdict(trial) for trial in trials],
        "importance": {"method": METHOD, **asdict(found)},
        "winner": {
            "trial": trials[0].name,
            "sample": dict(trials[0].sample),
            "validation_score": trials[0].score,
            "best_epoch": winner.best_epoch,
            "command": command,
            "heads": [_head(head.evaluation, head.baselines) for head in winner.heads],
        },
    }
    return dict(plain(content))


def score_name(spec: TuneSpec) -> str:
    """What trials are compared by."""
    kinds = {target.kind for target in spec.finetune.targets}
    if len(spec.finetune.targets) > 1:
        return "mean validation score of the heads"
    return "validation R²" if kinds == {"number"} else "validation macro F1"


def _head(evaluation: Evaluation, baselines: Sequence[Any]) -> dict[str, Any]:
    """The test result of one head: its estimates with intervals, and the baselines beside them."""
    intervals = {name: [limit.low, limit.high] for name, limit in evaluation.intervals.intervals.items()}
    rows = [
        {
            "metric": name,
            "name": METRIC_NAMES[name],
            "value": value,
            "interval": intervals.get(name),
            "majority": evaluation.majority.get(name),
            "baselines": {_baseline(b): b.evaluation[name] for b in baselines if b.evaluation is not None},
        }
        for name, value in evaluation.estimates().items()
        if math.isfinite(value)
    ]
    return {
        "label": evaluation.label,
        "unit": evaluation.unit,
        "units": evaluation.units,
        "headline": evaluation.headline,
        "rows": rows,
        "notes": list(evaluation.intervals.notes),
        "not_measured": {_baseline(b): b.why_not for b in baselines if b.evaluation is None},
    }


def _baseline(baseline: Any) -> str:
    return " on ".join(filter(None, (baseline.name, baseline.features))).replace("_", " ")
