"""An ingest in MLflow: what is recorded, and that a tracker that is away never costs the ingest."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from genescale.ingestion.plan import Failure
from genescale.ingestion.reports.report import IngestReport, SourceReport
from genescale.ingestion.reports.tracking_report import log_ingest, track_ingest
from genescale.ingestion.tally import Tally
from genescale.platform.memory_tracker import MemoryTracker
from genescale.platform.settings import Settings, TrackingSettings


def a_report(**recipe: object) -> IngestReport:
    tally = Tally(
        read=100, kept=90, dropped={"empty_cell": 10}, tokens=5_000, counts_by_fate={"mapped": 3.0, "unknown": 1.0},
        depth_bins=[0, 90],
    )  # fmt: skip
    gene_report = {"fates": {"mapped": {"genes": 2, "examples": []}, "unknown": {"genes": 1, "examples": []}}}
    failure = Failure(code="atlas", message="s3://lab/b.h5ad: truncated.")
    return IngestReport(
        corpus_uri="s3://lake/corpus",
        version=4,
        sources=(
            SourceReport(uri="a.h5ad", dataset_id="a", status="ingested", tally=tally, gene_report=gene_report),
            SourceReport(uri="b.h5ad", dataset_id="b", status="refused", failure=failure),
        ),
        seconds=2.0,
        recipe={"min_genes": 200, **recipe},
        vocabulary={"name": "v", "digest": "abc"},
    )


def test_what_is_recorded() -> None:
    tracker = MemoryTracker()
    run = tracker.runs[log_ingest(a_report(), tracker)]
    assert (run.name, run.status) == ("ingest", "FINISHED")
    assert run.params == {"sources": "2", "vocabulary.name": "v", "vocabulary.digest": "abc", "recipe.min_genes": "200"}
    assert run.tags["corpus"] == "s3://lake/corpus"
    assert (run.tags["corpus_version"], run.tags["outcome"]) == ("4", "refused")
    metrics = {name: rows[0][1] for name, rows in run.metrics.items()}
    assert (metrics["cells_read"], metrics["cells_kept"], metrics["cells_dropped"]) == (100, 90, 10)
    assert (metrics["tokens"], metrics["dropped.empty_cell"], metrics["cells_per_second"]) == (5_000, 10, 50)
    assert metrics["share_of_counts_mapped"] == 0.75
    assert metrics["sources_refused"] == 1
    assert 1 < metrics["median_depth"] < 1.2
    assert json.loads(run.files["report.json"])["version"] == 4
    assert run.files["report.html"].startswith(b"<!doctype html>")


def test_long_options_are_cut_and_stand_whole_in_the_file() -> None:
    tracker = MemoryTracker()
    run = tracker.runs[log_ingest(a_report(where="x = 1 OR " * 500, keep_obs=["a", "b"]), tracker)]
    assert len(run.params["recipe.where"]) == 500
    assert run.params["recipe.keep_obs"] == '["a", "b"]'
    assert len(json.loads(run.files["report.json"])["recipe"]["where"]) == 4_500


def test_an_ingest_in_sqlite(tmp_path: Path, settings_for: Callable[[Path], Settings]) -> None:
    from genescale.platform.tracking import open_tracker

    settings = settings_for(tmp_path)
    run_id = track_ingest(a_report(), settings)
    assert run_id
    recorded = open_tracker(settings).client.get_run(run_id)
    assert recorded.info.status == "FINISHED"
    assert recorded.data.metrics["cells_kept"] == 90
    assert recorded.data.params["recipe.min_genes"] == "200"
    assert recorded.data.tags["corpus_version"] == "4"
    (page,) = tmp_path.rglob("report.html")
    assert page.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "sqlite:////proc/nowhere/mlflow.db"])
def test_a_tracker_that_is_away_costs_a_warning(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    settings = Settings(tracking=TrackingSettings(uri=uri, artifact_root=str(tmp_path)))
    # The product's logger keeps its records to itself.
    logger = logging.getLogger("genescale")
    monkeypatch.setattr(logger, "propagate", True)
    with caplog.at_level(logging.WARNING):
        assert track_ingest(a_report(), settings) == ""
    assert "the ingest stands" in caplog.text


def test_a_tracker_that_breaks_in_the_middle_costs_a_warning(
    tmp_path: Path, settings_for: Callable[[Path], Settings]
) -> None:
    settings = settings_for(tmp_path)
    (tmp_path / "artifacts").write_text("a file where the folder should be")
    assert track_ingest(a_report(), settings) == ""
