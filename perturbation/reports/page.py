"""The report of a screen as one HTML page that needs no network and no script; every text from outside is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from genescale.ingestion.reports.report_figures import escaped
from genescale.ingestion.reports.report_style import STYLE
from genescale.perturbation.reports.axes import FIGURE_STYLE
from genescale.perturbation.reports.made_sections import left_out, made_of, methods, two_passes
from genescale.perturbation.reports.pair_sections import pairs
from genescale.perturbation.reports.screen_tables import SHIFT, ScreenTables, settings_of
from genescale.perturbation.reports.sections import detection, ranking
from genescale.perturbation.reports.sentences import headline
from genescale.perturbation.reports.state_sections import cell_types, classes, states
from genescale.perturbation.reports.target_sections import affected, targets
from genescale.training.evaluation.charts import CHART_STYLE

TITLES = {
    "delete": "Genes deleted in silico",
    "overexpress": "Genes overexpressed in silico",
    "inhibit": "Genes inhibited in silico",
    "activate": "Genes activated in silico",
    "replace": "Genes set to another rank in silico",
}
PAGE_STYLE = (
    ".verdict.open{border-left-color:var(--soft)}.verdict div+div{margin-top:.5rem;font-weight:400;font-size:1rem}"
    ".interval{font-size:.76rem;white-space:nowrap}.tiles b{font-size:1.25rem}code{font-size:.88em}"
    ".key svg{display:inline-block}"
)


def page(tables: ScreenTables, files: Sequence[str]) -> str:
    """The whole page; `files` are the names of the tables that lie beside it."""
    kind = str(tables.effects["kind"][0]) if len(tables.effects) else ""
    title = TITLES.get(kind, "In-silico screen")
    body = "".join(
        (
            f'<h1>{escaped(title)}</h1><p class="lead">{_lead(tables)}</p>',
            headline(tables),
            ranking(tables, SHIFT),
            states(tables),
            classes(tables),
            pairs(tables),
            targets(tables),
            affected(tables),
            cell_types(tables),
            detection(tables, SHIFT),
            two_passes(tables),
            left_out(tables),
            methods(tables),
            made_of(tables, files),
        )
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escaped(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}{CHART_STYLE}{FIGURE_STYLE}{PAGE_STYLE}</style></head><body><main>{body}</main></body></html>\n"
    )


def _lead(tables: ScreenTables) -> str:
    """Model, corpus and choice of cells, a line each, as far as the record says."""
    identity = tables.record.get("identity", {})
    identity = identity if isinstance(identity, Mapping) else {}
    lines = []
    if identity.get("model_digest"):
        lines.append(f"model {_model(tables.record, identity)}")
    if identity.get("corpus_uri"):
        lines.append(f"cells of {identity['corpus_uri']}@{identity.get('corpus_version', '?')}")
    if identity.get("source"):
        lines.append(f"cells of {identity['source']}")
    where = settings_of(tables.record, "cells").get("where")
    if where:
        lines.append(f"where {where}")
    return "<br>".join(escaped(line) for line in lines) or escaped(tables.uri)


def _model(record: Mapping[str, Any], identity: Mapping[str, Any]) -> str:
    digest = str(identity["model_digest"])[:12]
    name = record.get("model") or identity.get("model")
    return f"{name} ({digest})" if name else digest
