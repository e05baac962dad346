"""The report of heads: report.html, which needs no network and no script, and report.json with the same numbers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genescale.ingestion.reports.report_figures import escaped
from genescale.ingestion.reports.report_style import STYLE
from genescale.platform.errors import InputError
from genescale.training.evaluation.baselines import Baseline
from genescale.training.evaluation.charts import CHART_STYLE
from genescale.training.evaluation.figures import FIGURE_STYLE
from genescale.training.evaluation.measures import Evaluation, plain
from genescale.training.evaluation.predictions import Predictions
from genescale.training.evaluation.report_details import gene_table, learning, record, split_json, split_section
from genescale.training.evaluation.report_headline import against_baselines, headline_json, verdict
from genescale.training.evaluation.report_sections import REPORT_STYLE, sections

if TYPE_CHECKING:
    from genescale.training.labels.splitting import Folds

HTML, JSON = "report.html", "report.json"
History = Mapping[int, Sequence[Mapping[str, float]]]
"""By fold, one row of numbers per epoch (`Epoch.metrics()`), with or without `epoch`."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Head:
    """What is known of one head: what it predicted, what was measured, and the baselines beside it."""

    evaluation: Evaluation
    predictions: Predictions
    baselines: tuple[Baseline, ...] = ()


def write_report(
    folder: Path,
    title: str,
    config: Mapping[str, Any],
    evaluations: Sequence[Evaluation],
    predictions: Sequence[Predictions],
    baselines: Sequence[Sequence[Baseline]] = (),
    history: History | None = None,
    split: Folds | None = None,
    *,
    question: str = "",
    lineage: Mapping[str, Any] | None = None,
    counts: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    best_epochs: Mapping[int, int] | None = None,
) -> tuple[Path, Path]:
    """Write report.html and report.json into `folder`, and return their paths.

    evaluations, predictions, baselines: one each per head, in the same order; split: the Folds; counts: units that
    were used and left out; lineage: what the model and the cells are; notes: what the reader must know; best_epochs:
    by fold, the epoch (from 1) that was kept. Raises InputError when the heads do not fit together.
    """
    if not evaluations or len(evaluations) != len(predictions) or (baselines and len(baselines) != len(evaluations)):
        raise InputError("evaluations, predictions and baselines are not of the same heads.", where=title)
    beside = baselines or [()] * len(evaluations)
    heads = [
        Head(evaluation=e, predictions=p, baselines=tuple(b))
        for e, p, b in zip(evaluations, predictions, beside, strict=True)
    ]
    about = {"settings": plain(config), "lineage": plain(lineage or {}), "counts": plain(counts or {})}
    content = {
        "schema_version": 1,
        "title": title,
        "question": question,
        "notes": list(notes),
        "heads": [_head_json(head) for head in heads],
        "history": {str(fold): [dict(row) for row in rows] for fold, rows in (history or {}).items()},
        "best_epochs": {str(fold): epoch for fold, epoch in (best_epochs or {}).items()},
        "split": split_json(split),
        **about,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / JSON).write_text(json.dumps(plain(content), indent=2, allow_nan=False), encoding="utf-8")
    body = [
        f"<h1>{escaped(title)}</h1>",
        f'<p class="lead">{escaped(question)}</p>' if question else "",
        "".join(f"<p>{escaped(note)}</p>" for note in notes),
        *(_head(head, several=len(heads) > 1) for head in heads),
        learning(history or {}, best_epochs or {}),
        split_section(split, heads[0].predictions.unit),
        record(about),
    ]
    (folder / HTML).write_text(_page(title, "".join(body)), encoding="utf-8")
    return folder / HTML, folder / JSON


def _head_json(head: Head) -> dict[str, Any]:
    told = [baseline.to_json() for baseline in head.baselines]
    return {**head.evaluation.to_json(), "baselines": told, "verdict": headline_json(head.evaluation, head.baselines)}


def _head(head: Head, *, several: bool) -> str:
    name = f"<h2>{escaped(head.evaluation.label)}</h2>" if several else ""
    return (
        f"{name}{verdict(head.evaluation, head.baselines)}{against_baselines(head.evaluation, head.baselines)}"
        f"{sections(head.evaluation, head.predictions)}{gene_table(head.predictions)}"
    )


def _page(title: str, body: str) -> str:
    style = STYLE + CHART_STYLE + FIGURE_STYLE + REPORT_STYLE
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escaped(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style></head>'
        f"<body><main>{body}</main></body></html>\n"
    )
