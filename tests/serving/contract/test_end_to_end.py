"""An application with the real service: keys, every question, jobs, a rollout and its way back, and a stop.

The service is the command that an operator starts, in a process of its own; the application has the client and httpx.
"""

from __future__ import annotations

import io
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest

from genescale.client import GenescaleClient
from genescale.platform import errors
from genescale.platform.settings import Settings, StorageSettings, TrackingSettings
from tests.serving.client_wire import object_of
from tests.serving.load import Load
from tests.serving.real_service import RealService, command, real_service

if TYPE_CHECKING:
    from genescale.ingestion.corpus import Corpus
    from genescale.platform.bundle import Bundle

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
DrawCell = Callable[[int, int], dict[str, float]]
EDIT = {"kind": "delete", "genes": ["GENE1"]}
SCOPES = "embed,perturb,classify,neighbors,jobs"
JOB_ENDS_S = 120.0


@dataclass(frozen=True, kw_only=True)
class World:
    """What stands around the service."""

    folder: Path
    environment: dict[str, str]
    arguments: list[str]
    tracker_file: Path
    keys: dict[str, str]
    """By name: `web` may ask questions, `ops` may do everything."""


@pytest.fixture
def world(
    s3_settings: StorageSettings,
    complete_bundle: Bundle,
    other_bundle: Bundle,
    reference_uri: str,
    reference_corpus: Corpus,
    tmp_path_factory: pytest.TempPathFactory,
) -> World:
    """A registry with two versions of a model, object storage for jobs, a reference, and two keys."""
    from genescale.platform.storage import Store
    from genescale.platform.tracking import open_tracker

    folder = tmp_path_factory.mktemp("e")
    Store(s3_settings).create_bucket("s3://e2e-jobs")
    tracking = TrackingSettings(uri=f"sqlite:///{folder / 'mlflow.db'}", artifact_root=str(folder / "artifacts"))
    tracker = open_tracker(Settings(storage=s3_settings, tracking=tracking))
    for bundle, alias in ((complete_bundle, "production"), (other_bundle, "candidate")):
        with tracker.run("train") as run:
            run.log_folder(bundle.folder, "bundle")
            tracker.register(run, "bundle", "encoder", aliases=(alias,))
    environment = {
        "GENESCALE_STORAGE__ENDPOINT_URL": s3_settings.endpoint_url,
        "GENESCALE_STORAGE__ACCESS_KEY_ID": s3_settings.access_key_id.reveal(),
        "GENESCALE_STORAGE__SECRET_ACCESS_KEY": s3_settings.secret_access_key.reveal(),
        "GENESCALE_TRACKING__URI": tracking.uri,
        "GENESCALE_TRACKING__ARTIFACT_ROOT": tracking.artifact_root,
    }
    keys = {}
    for name, scopes in (("web", SCOPES), ("ops", "admin")):
        made = ("serve", "keys", "new", name, "--file", "keys.toml", "--scopes", scopes)
        said = command(*made, environment=environment, folder=folder)
        (keys[name],) = re.findall(r"\bgsk_[A-Za-z0-9_-]{20,}", said)
    (folder / "serving.toml").write_text(
        "num_cpus = 0.8\ntracking_interval_s = 1.0\n[limits]\nmax_tokens = 20000\n[jobs]\nheartbeat_s = 0.5\n"
    )
    arguments = ["encoder=models:/encoder@production", "--config", "serving.toml", "--keys-file", "keys.toml"]
    arguments += ["--index", reference_uri, "--jobs-uri", "s3://e2e-jobs/made"]
    arguments += ["--jobs-roots", str(Path(reference_corpus.uri).parent)]
    return World(
        folder=folder,
        environment={**environment, "OPS_KEY": keys["ops"]},
        arguments=arguments,
        tracker_file=folder / "mlflow.db",
        keys=keys,
    )


@pytest.fixture
def running(world: World) -> Iterator[RealService]:
    with real_service(world.arguments, world.environment, world.folder) as service:
        yield service


def test_an_application_lives_with_the_service(
    world: World, running: RealService, reference_corpus: Corpus, draw_cell: DrawCell, counts_ng: np.ndarray
) -> None:
    with GenescaleClient(running.url, api_key=world.keys["web"]) as client:
        client_asks_everything(client, draw_cell, counts_ng)
        http = httpx.Client(base_url=running.url, timeout=60)
        with http:
            scopes_hold(http, world)
            jobs_are_done(http, world, client, reference_corpus)
            versions_change(http, world, running, draw_cell)
        requests_outlive_the_stop(world, running, draw_cell)
    assert running.process.returncode == 0, running.errors.read_text()
    said = running.said + running.errors.read_text()
    assert "Traceback" not in said
    assert not any(key in said for key in world.keys.values())
    the_tracker_knows(world)


def client_asks_everything(client: GenescaleClient, draw_cell: DrawCell, counts_ng: np.ndarray) -> None:
    assert client.ready()
    info = client.info()
    assert info["provenance"]["model"]["version"] == "1"
    assert [head["label"] for head in info["heads"]] == ["cell_type", "tissue"]
    cells = [draw_cell(seed, 10 + 5 * seed) for seed in range(5)]
    embedded = client.embeddings(cells)
    assert embedded.embeddings.shape == (5, 16)
    assert embedded.model.version == "1"
    alone = np.concatenate([client.embeddings([cell]).embeddings for cell in cells])
    assert np.array_equal(embedded.embeddings, alone)
    assert client.gene_embeddings(cells[:1]).cells[0].embeddings.shape[1] == 16
    state = embedded.embeddings.mean(axis=0)
    (moved, _) = client.perturbations(cells[:2], [EDIT], states={"all": state}, head="cell_type").cells
    assert set(moved.edits[0].state_shifts) == {"all"}
    assert set(moved.edits[0].class_changes or {}) == {"b", "nk", "t"}
    assert [head.label for head in client.classify(cells[:1]).cells[0].heads] == ["cell_type", "tissue"]
    assert len(client.neighbors(cells[:1], k=4).cells[0].neighbors) == 4
    adata = object_of(counts_ng)
    client.embed_anndata(adata)
    assert np.isfinite(adata.obsm["X_genescale"]).all()
    with pytest.raises(errors.InputError, match="NOSUCH"):
        client.embeddings([{"NOSUCH": 1}])


def scopes_hold(http: httpx.Client, world: World) -> None:
    def status(key: str, method: str, path: str) -> int:
        return http.request(method, path, headers={"Authorization": f"Bearer {key}"}).status_code

    assert http.get("/v1/info").status_code == 401
    assert http.get("/healthz").status_code == http.get("/readyz").status_code == 200
    assert status(world.keys["web"], "GET", "/v1/models") == 200
    assert status(world.keys["web"], "POST", "/v1/models/encoder/rollout") == 403
    assert status(world.keys["web"], "GET", "/metrics") == 403
    assert status(world.keys["ops"], "GET", "/metrics") == 200


def jobs_are_done(http: httpx.Client, world: World, client: GenescaleClient, corpus: Corpus) -> None:
    import pyarrow.parquet as pq

    headers = {"Authorization": f"Bearer {world.keys['web']}"}
    asked = {"kind": "embed", "source": corpus.uri}
    first = http.post("/v1/jobs", json=asked, headers={**headers, "Idempotency-Key": "night-1"})
    assert first.status_code == 202, first.text
    again = http.post("/v1/jobs", json=asked, headers={**headers, "Idempotency-Key": "night-1"})
    assert again.json()["id"] == first.json()["id"]
    other = http.post("/v1/jobs", json={**asked, "layer": "last"}, headers={**headers, "Idempotency-Key": "night-1"})
    assert (other.status_code, other.json()["error"]["code"]) == (409, "conflict")
    # Too dear to be answered at once.
    dear: dict[str, Any] = {"cells": [{"counts": {f"GENE{at}": 1 for at in range(90)}}] * 16, "edits": [EDIT] * 40}
    later = http.post("/v1/perturbations", json=dear, headers=headers)
    assert later.status_code == 202, later.text
    assert later.headers["location"] == f"/v1/jobs/{later.json()['id']}"
    for job in (first.json()["id"], later.json()["id"]):
        told = ended(http, job, headers)
        assert told["state"] == "succeeded", told
        assert told["progress"]["done"] == told["progress"]["total"] > 0
    # The client asks the same in one call, and waits.
    later_answer = client.perturbations(dear["cells"], dear["edits"])
    assert [len(cell.edits) for cell in later_answer.cells] == [40] * 16
    assert client.wait_for_job(first.json()["id"]).state == "succeeded"
    file = client.job_result(first.json()["id"], world.folder / "embeddings.parquet")
    assert http.get(f"/v1/jobs/{first.json()['id']}").status_code == 401
    link = http.get(f"/v1/jobs/{first.json()['id']}/result", headers=headers)
    assert link.status_code == 307, link.text
    # The link needs no key of the service.
    content = httpx.get(link.headers["location"]).raise_for_status().content
    assert content == file.read_bytes()
    table = pq.read_table(io.BytesIO(content))
    assert table.num_rows == corpus.n_cells
    found = np.stack(table["embedding"].to_pylist()).astype(np.float32)
    tokens = [cell.tolist() for cell in corpus.tokens(range(corpus.n_cells))]
    expected = client.embeddings([{"tokens": cell} for cell in tokens]).embeddings
    order = {cell: at for at, cell in enumerate(corpus.cells(["cell_id"])["cell_id"].to_pylist())}
    rows = [order[cell] for cell in table["cell_id"].to_pylist()]
    assert np.allclose(found, expected[rows], rtol=1e-5, atol=1e-6)


def ended(http: httpx.Client, job: str, headers: dict[str, str]) -> dict[str, Any]:
    """A job as it stands at its end."""
    before_s = time.monotonic() + JOB_ENDS_S
    while True:
        told: dict[str, Any] = http.get(f"/v1/jobs/{job}", headers=headers).json()
        if told["state"] not in ("queued", "running"):
            return told
        assert time.monotonic() < before_s, told
        time.sleep(0.3)


def versions_change(http: httpx.Client, world: World, running: RealService, draw_cell: DrawCell) -> None:
    def roll(*arguments: str, code: int = 0) -> str:
        options = ("--url", running.url, "--api-key-env", "OPS_KEY")
        said = ("serve", "rollout", *arguments, *options)
        return command(*said, environment=world.environment, folder=world.folder, code=code)

    with Load(url=running.url, key=world.keys["web"], cell=draw_cell(3, 30)) as load:
        assert load.next_versions(20) == {"1"}
        # The reference belongs to version 1: losing it has to be meant.
        assert "--accept-losses" in roll("encoder@candidate", code=2)
        assert load.next_versions(20) == {"1"}
        roll("encoder@candidate", "--canary", "0.5", "--accept-losses")
        assert load.next_versions(20) == {"1", "2"}
        roll("encoder@candidate", "--accept-losses")
        assert load.next_versions(20) == {"2"}
        roll("encoder", "--back")
        assert load.next_versions(20) == {"1"}
        assert "nosuch" in roll("encoder@nosuch", code=2)
        assert load.next_versions(20) == {"1"}
    assert load.failures == []
    answers = [answer for _, answer in load.seen]
    by_version = {answer.model.version: answer.embeddings for answer in answers}
    assert not np.array_equal(by_version["1"], by_version["2"])
    for answer in answers:
        assert np.array_equal(answer.embeddings, by_version[answer.model.version])
    headers = {"Authorization": f"Bearer {world.keys['web']}"}
    told = http.get("/v1/models/encoder", headers=headers).json()
    assert (told["version"], told["candidate"], told["default"]) == ("1", None, True)
    assert http.post("/v1/embeddings?model=nosuch", json={"cells": []}, headers=headers).status_code in (404, 422)


def requests_outlive_the_stop(world: World, running: RealService, draw_cell: DrawCell) -> None:
    """What was begun before SIGTERM is answered; what comes later is told to come back, or finds nobody."""
    slow = {"cells": [{"counts": draw_cell(seed, 90)} for seed in range(8)], "edits": [EDIT] * 45}
    headers = {"Authorization": f"Bearer {world.keys['web']}"}
    statuses: list[int] = []

    def ask() -> None:
        statuses.append(
            httpx.post(f"{running.url}/v1/perturbations", json=slow, headers=headers, timeout=90).status_code
        )

    begun = [threading.Thread(target=ask) for _ in range(3)]
    for one in begun:
        one.start()
    time.sleep(0.3)
    assert "stopping" in running.stop()
    for one in begun:
        one.join()
    assert statuses == [200] * 3
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{running.url}/healthz")


def the_tracker_knows(world: World) -> None:
    """The deployment is a run that ended, with numbers; each job is a child of it."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{world.tracker_file}")
    experiments = [one.experiment_id for one in client.search_experiments()]
    runs = {run.info.run_id: run for run in client.search_runs(experiments)}
    children = {
        key: run.data.tags["mlflow.parentRunId"] for key, run in runs.items() if "mlflow.parentRunId" in run.data.tags
    }
    assert len(children) == 3
    (deployment,) = set(children.values())
    assert runs[deployment].info.status == "FINISHED"
    assert any(name.endswith("p95") or "p95" in name for name in runs[deployment].data.metrics)
    assert {runs[child].info.status for child in children} == {"FINISHED"}
