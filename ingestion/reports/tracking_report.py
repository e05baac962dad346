"""An ingest as a run in MLflow: what went in, what came out, and the report's files. The corpus never waits for it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from genescale.ingestion.reports.distribution import spreads
from genescale.ingestion.reports.report import JSON_NAME, PAGE_NAME, IngestReport, as_json
from genescale.ingestion.reports.report_page import html
from genescale.platform.address import shown
from genescale.platform.errors import GenescaleError
from genescale.platform.log import get_logger
from genescale.platform.runs import Tracker
from genescale.platform.settings import Settings

RUN_NAME = "ingest"
# MLflow refuses longer values of a parameter or tag; what is cut stands whole in report.json.
LONGEST_VALUE = 500
log = get_logger(__name__)


def track_ingest(report: IngestReport, settings: Settings) -> str:
    """Record the run in the tracker of these settings; returns its id, or an empty text when that failed.

    A tracker that cannot be reached costs a warning and nothing else: the corpus is committed already, and its own
    history holds every number.
    """
    from genescale.platform.tracking import open_tracker

    try:
        return log_ingest(report, open_tracker(settings))
    except (GenescaleError, OSError) as error:
        log.warning("the ingest stands, but it could not be recorded in MLflow: %s", error)
        return ""


def log_ingest(report: IngestReport, tracker: Tracker) -> str:
    """Record a report as one run and return the run's id; errors of the tracker travel."""
    with tracker.run(RUN_NAME, params=_cut(params(report)), tags=_cut(tags(report))) as run:
        run.log_metrics(metrics(report))
        run.log_text(html(report), PAGE_NAME)
        run.log_text(as_json(report.to_dict()), JSON_NAME)
        return run.id


def params(report: IngestReport) -> dict[str, Any]:
    """What decided the rows: options that differ from their defaults, vocabulary, number of sources."""
    recipe = {f"recipe.{name}": value for name, value in report.recipe.items()}
    vocabulary = {f"vocabulary.{name}": value for name, value in report.vocabulary.items()}
    return {"sources": len(report.sources), **vocabulary, **recipe}


def tags(report: IngestReport) -> dict[str, str]:
    """Where the rows are: address and version of the corpus; outcome of the run."""
    version = "" if report.version is None else str(report.version)
    return {
        "genescale.kind": "ingest",
        "corpus": shown(report.corpus_uri),
        "corpus_version": version,
        "outcome": "ok" if report.ok else "refused",
    }


def metrics(report: IngestReport) -> dict[str, float]:
    """Cells, tokens, genes and speed of what was ingested now."""
    total = report.total
    found: dict[str, float] = {
        "sources_ingested": len(report.of("ingested")),
        "sources_already_committed": len(report.of("already_committed")),
        "sources_refused": len(report.of("refused")),
        "cells_read": total.read,
        "cells_kept": total.kept,
        "cells_dropped": total.n_dropped,
        "tokens": total.tokens,
        "cells_cropped": total.cropped,
        "seconds": report.seconds,
        "cells_per_second": report.cells_per_second,
        "source_bytes": report.source_bytes,
        **{f"dropped.{reason}": cells for reason, cells in total.dropped.items()},
    }
    for name, spread in spreads(total).items():
        if (median := spread.median) is not None:
            found[f"median_{name}"] = median
    if (share := report.share_of_counts) is not None:
        found["share_of_counts_mapped"] = share
    return found


def _cut(values: Mapping[str, Any]) -> dict[str, str]:
    texts = {
        name: value if isinstance(value, str) else json.dumps(value, default=str) for name, value in values.items()
    }
    return {
        name: text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 1]}…" for name, text in texts.items()
    }
