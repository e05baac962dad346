"""The dashboard, the alerts and their runbook: every query names what the service really says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from genescale.platform.errors import GenescaleError
from genescale.serving.access.room import Room
from genescale.serving.access.scopes import SCOPES
from genescale.serving.answering.passes import EmbedPass, Outcome
from genescale.serving.jobs.records import State
from genescale.serving.watching.board import Board
from genescale.serving.watching.deployment_run import watch_tracking
from genescale.serving.watching.http_numbers import HttpNumbers
from genescale.serving.watching.job_numbers import JobNumbers
from genescale.serving.watching.model_numbers import ModelNumbers
from genescale.serving.watching.noted import PHASES, Noted
from genescale.serving.watching.reports import Report, families_of, page

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "infra" / "dashboards"
DASHBOARD = json.loads((FOLDER / "genescale-serving.json").read_text())
ALERTS = [
    rule
    for group in yaml.safe_load((FOLDER / "genescale-alerts.yaml").read_text())["groups"]
    for rule in group["rules"]
]
# What Prometheus adds to every series, and GPU numbers, which a machine without one does not say.
ADDED, OF_GPU = {"job", "instance"}, {"genescale_model_gpu_bytes", "genescale_model_gpu_peak_bytes"}
NAME = re.compile(r"\b(?:genescale|process)_[a-z0-9_]+\b|\bup\b")
SELECTOR = re.compile(r"([a-z][a-z0-9_]*)\s*\{([^}]*)\}")
GROUPING = re.compile(r"\b(?:by|on|without)\s*\(([^)]*)\)")
MATCHER = re.compile(r"([a-z_]+)\s*(=~|!~|!=|=)\s*\"([^\"]*)\"")


@dataclass(frozen=True, kw_only=True)
class Job:
    kind: str
    created_s: float


def said() -> dict[str, dict[str, set[str]]]:
    """Every sample that a service can say: its name, its labels, and the values they took here."""
    http = HttpNumbers(object(), Room(1, 1, retry_after_s=1), {"http": 1, "model": 1})
    http.shares = lambda: {("heart", "3"): 1.0}
    for problem in ("", "rate_limited", "overloaded", "internal", "deadline"):
        noted = Noted(model="heart", version="3", tokens=3, cells=1, problem=problem)
        noted.phases_s = dict.fromkeys(PHASES, 1.0)
        status = {"": 200, "internal": 500, "deadline": 504}.get(problem, 429)
        http.ended({"path": "/x", "method": "POST", "key_id": "web"}, noted, status, 0.1, question=True)
    model = ModelNumbers(budget=10, max_bytes=10, held=list)
    one = EmbedPass(cells=[np.arange(3)], layer="last", pooling="mean_genes", cost=3)
    model.ran([one], [Outcome(value=GenescaleError("x"), forward_s=0.1)])
    jobs = JobNumbers(dict, dict, places=1, most_waiting=1)
    for state in get_args(State):
        jobs.ended(Job(kind="screen", created_s=0.0), state, 1.0)
    jobs.ended(Job(kind="screen", created_s=0.0), "broken", None)
    board, registry = Board(), CollectorRegistry()
    watch_tracking(registry, None)
    reports = [http.report(), Report(process="model-1", kind="model", families=families_of(model.registry))]
    for report in reports:
        board.take(report, 0.0)
    watcher = Report(process="watcher-1", kind="watcher", families=(*board.families(1.0), *families_of(registry)))
    found: dict[str, dict[str, set[str]]] = {}
    for family in text_string_to_metric_families(page([*reports, jobs.report(), watcher])[0].decode()):
        for sample in family.samples:
            labels = found.setdefault(sample.name, {})
            for label, value in sample.labels.items():
                labels.setdefault(label, set()).add(value)
    return found | {"up": {}} | {name: {"process": set()} for name in OF_GPU}


SAID = said()


def queries() -> Iterator[tuple[str, str]]:
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            yield f"panel {panel['title']}", target["expr"]
    for rule in ALERTS:
        yield f"alert {rule['alert']}", rule["expr"]


QUERIES = list(queries())


@pytest.mark.parametrize(("where", "query"), QUERIES, ids=[f"{at}-{where}" for at, (where, _) in enumerate(QUERIES)])
def test_a_query_names_metrics_and_labels_that_exist(where: str, query: str) -> None:
    names = set(NAME.findall(re.sub(r'"[^"]*"', '""', query)))
    assert names, query
    assert names <= set(SAID), f"{where}: {names - set(SAID)} is said by no process"
    for name, matchers in SELECTOR.findall(query):
        for label, operator, value in MATCHER.findall(matchers):
            assert label in set(SAID[name]) | ADDED, f"{where}: {name} has no label {label}"
            known = SAID[name].get(label, set())
            # Reasons, outcomes, stages, phases and kinds are words of ours: a misspelt one would match nothing.
            if operator == "=" and label in {"reason", "outcome", "stage", "phase", "kind", "state"}:
                assert value in known, f"{where}: {label} is never {value!r}, but {sorted(known)}"
    grouped = {label.strip() for labels in GROUPING.findall(query) for label in labels.split(",")}
    known = ADDED.union(*(SAID[name] for name in names))
    assert grouped <= known, f"{where}: no metric of the query has {grouped - known}"


def test_everything_that_is_said_is_looked_at() -> None:
    asked = " ".join(query for _, query in QUERIES)
    # For a closer look only: how long loads take, and requests by replica, which "Busy" says better.
    spare = {"genescale_model_load_seconds", "genescale_model_requests"}
    families = {family_of(name) for name in SAID if name.startswith("genescale_")} - spare
    assert {name for name in families if not re.search(rf"\b{name}(_bucket|_sum|_count|_total)?\b", asked)} == set()


def family_of(sample: str) -> str:
    """The name of a histogram, where a sample is one of its three kinds."""
    stem = re.sub(r"_(bucket|sum|count)$", "", sample)
    return stem if f"{stem}_bucket" in SAID else sample


def test_the_dashboard_is_one_that_grafana_can_import() -> None:
    assert DASHBOARD["schemaVersion"] >= 36
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    assert set(re.findall(r"\$\{?([a-z]\w*)", json.dumps(DASHBOARD))) <= variables
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        columns, rows = range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        cells = {(x, y) for x in columns for y in rows}
        assert not cells & taken, f"{panel['title']} lies on another panel"
        assert max(x for x, _ in cells) < 24
        taken |= cells
        if panel["type"] != "row":
            assert panel["description"]
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: str(rule["alert"]))
def test_an_alert_says_how_bad_it_is_and_the_runbook_what_to_do(rule: Mapping[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("page", "ticket")
    assert rule["annotations"]["summary"]
    assert re.fullmatch(r"\d+m", rule.get("for", "0m"))
    runbook = (ROOT / "docs" / "operations.md").read_text()
    found = re.search(rf"^### {rule['alert']}\n(.*?)(?=^##|\Z)", runbook, re.M | re.S)
    assert found, f"docs/operations.md has no section for {rule['alert']}"
    assert len(found[1].split()) > 25


def test_the_runbook_knows_no_alert_that_was_removed() -> None:
    headings = re.findall(r"^### (Genescale\w+)$", (ROOT / "docs" / "operations.md").read_text(), re.M)
    assert sorted(headings) == sorted(rule["alert"] for rule in ALERTS)


def test_the_runbook_names_metrics_that_exist() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    known = {family_of(name) for name in SAID}
    assert set(re.findall(r"`(genescale_[a-z_]+)`", text)) <= known


def test_examples_for_prometheus_and_grafana_fit_together() -> None:
    scrape = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
    assert scrape["rule_files"] == ["genescale-alerts.yaml"]
    (job,) = scrape["scrape_configs"]
    # One target: any process answers for all, so two of one service would count everything twice.
    assert [len(one["targets"]) for one in job["static_configs"]] == [1]
    assert (job["job_name"], job["metrics_path"]) == ("genescale", "/metrics")
    assert "metrics" in SCOPES
    assert all('job="genescale"' in rule["expr"] for rule in ALERTS if "up{" in rule["expr"])
    (source,) = yaml.safe_load((FOLDER / "grafana-datasource.yaml").read_text())["datasources"]
    assert source["jsonData"]["timeInterval"] == scrape["global"]["scrape_interval"]
    (provider,) = yaml.safe_load((FOLDER / "grafana-dashboards.yaml").read_text())["providers"]
    assert provider["options"]["path"]
