"""Secrets, private paths and buckets, planted everywhere and looked for in everything that leaves the service."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from genescale.platform.settings import Secret, Settings, StorageSettings, TrackingSettings
from tests.serving.real_service import RealService, command, real_service

if TYPE_CHECKING:
    from genescale.ingestion.corpus import Corpus
    from genescale.platform.bundle import Bundle

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ACCESS, STORED = "PLANTEDACCESSKEY0001", "planted-storage-secret-5c1d9e7a"
FIRST, SECOND = "planted-api-key-one-8f3b2c4d5e", "planted-api-key-two-1a2b3c4d5e"
PASSWORD, USER = "planted-tracker-password-77aa", "planted-tracker-user-31f0"
SECRETS = (ACCESS, STORED, FIRST, SECOND, PASSWORD)
BUCKET, FOLDER = "planted-private-bucket", "planted-private-folder"
PLACES = (BUCKET, FOLDER)
TRACE = "Traceback (most recent call last)"
ARROW, H5AD = "application/vnd.apache.arrow.stream", "application/x-hdf5"
CELLS = {"cells": [{"counts": {"GENE1": 3, "GENE2": 5, "GENE9": 1}}]}
PERTURB = {**CELLS, "edits": [{"kind": "delete", "genes": ["GENE1"]}]}


class Witness:
    """Everything that the service answered."""

    def __init__(self, url: str, key: str) -> None:
        self.seen: list[tuple[str, str]] = []
        self.client = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=60,
            event_hooks={"response": [self._note]},
        )

    def _note(self, response: httpx.Response) -> None:
        response.read()
        headers = "\n".join(f"{name}: {value}" for name, value in response.headers.items())
        asked = f"{response.request.method} {response.request.url.path} -> {response.status_code}"
        self.seen.append((asked, f"{headers}\n{response.content.decode('utf-8', 'replace')}"))

    def __enter__(self) -> Witness:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def ask(self, method: str, path: str, **more: Any) -> httpx.Response:
        return self.client.request(method, path, **more)


@pytest.fixture
def planted(
    s3_settings: StorageSettings, complete_bundle: Bundle, reference_uri: str, reference_corpus: Corpus, tmp_path: Path
) -> tuple[Path, dict[str, str], list[str]]:
    """A folder, an environment and arguments in which everything private carries a planted name."""
    from genescale.platform.storage import Store, join
    from genescale.platform.tracking import open_tracker

    private = tmp_path / FOLDER
    private.mkdir()
    storage = replace(s3_settings, access_key_id=Secret(ACCESS), secret_access_key=Secret(STORED))
    store = Store(storage)
    store.create_bucket(f"s3://{BUCKET}")
    for path in sorted(Path(reference_uri).rglob("*")):
        if path.is_file():
            store.upload(path, join(f"s3://{BUCKET}/index", *path.relative_to(reference_uri).parts))
    tracking = TrackingSettings(uri=f"sqlite:///{private / 'mlflow.db'}", artifact_root=str(private / "artifacts"))
    tracker = open_tracker(Settings(storage=storage, tracking=tracking))
    for _ in range(2):
        with tracker.run("train") as run:
            run.log_folder(complete_bundle.folder, "bundle")
            tracker.register(run, "bundle", "encoder", aliases=())
            newest = run.id
    # The second version is broken: its bytes are not those that were registered.
    (weights,) = (path for path in (private / "artifacts").rglob("model.safetensors") if newest in path.parts)
    weights.write_bytes(weights.read_bytes()[:-7] + b"changed")
    config = private / "serving.toml"
    config.write_text(
        f'index = "s3://{BUCKET}/index"\ncache = "{private}/cache"\ntracking_interval_s = 1.0\nnum_cpus = 0.8\n'
        f'[jobs]\nuri = "s3://{BUCKET}/jobs"\nallowed_roots = ["{Path(reference_corpus.uri).parent}"]\nlinks = false\n'
    )
    environment = {
        "GENESCALE_STORAGE__ENDPOINT_URL": storage.endpoint_url,
        "GENESCALE_STORAGE__ACCESS_KEY_ID": ACCESS,
        "GENESCALE_STORAGE__SECRET_ACCESS_KEY": STORED,
        "GENESCALE_TRACKING__URI": tracking.uri,
        "GENESCALE_TRACKING__ARTIFACT_ROOT": tracking.artifact_root,
        "MLFLOW_TRACKING_USERNAME": USER,
        "MLFLOW_TRACKING_PASSWORD": PASSWORD,
        "KEYS": f"{FIRST},{SECOND}",
    }
    return private, environment, ["models:/encoder/1", "--config", str(config), "--api-key-env", "KEYS"]


@pytest.fixture
def short_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the command runs: the names of Ray's sockets must stay short, so nothing planted is in it."""
    return tmp_path_factory.mktemp("p")


def test_nothing_planted_leaves_the_service(
    planted: tuple[Path, dict[str, str], list[str]], reference_corpus: Corpus, short_folder: Path
) -> None:
    private, environment, arguments = planted
    with (
        real_service(arguments, environment, short_folder) as running,
        Witness(running.url, FIRST) as witness,
        Witness(running.url, "not-a-key-0123456789") as stranger,
    ):
        ask_everything(witness, reference_corpus.uri)
        ask_wrongly(witness, stranger)
        run_jobs(witness, reference_corpus.uri)
        break_things(witness, running, environment, short_folder)
        # Two intervals of the deployment's run.
        time.sleep(2.5)
        witness.ask("GET", "/metrics")
        running.stop()
        assert running.process.returncode == 0, running.errors.read_text()
        answers = witness.seen + stranger.seen
        assert {"200", "401", "413", "422"} <= {asked.rpartition(" ")[2] for asked, _ in answers}
        # Logs may say which file and which line: they are for whoever runs the service. Answers are for anybody.
        found = leaks([*answers, ("stdout", running.said)], (*SECRETS, *PLACES, TRACE))
        found += leaks(files_below(running.errors, running.sessions), SECRETS)
        found += leaks(files_below(private / "artifacts", private / "mlflow.db"), SECRETS)
    assert found == []


def ask_everything(witness: Witness, corpus: str) -> None:
    for path, body in (
        ("/v1/embeddings", CELLS),
        ("/v1/tokens", CELLS),
        ("/v1/perturbations", PERTURB),
        ("/v1/classify", CELLS),
        ("/v1/neighbors", {**CELLS, "k": 2}),
    ):
        assert witness.ask("POST", path, json=body).status_code == 200, witness.seen[-1]
        assert witness.ask("POST", path, json=body, headers={"Accept": ARROW}).status_code == 200, witness.seen[-1]
    for path in ("/v1/info", "/v1/models", "/v1/models/encoder", "/metrics", "/readyz", "/healthz", "/openapi.json"):
        assert witness.ask("GET", path).status_code == 200, witness.seen[-1]
    for path in ("/docs", "/", "/v1/reference/map", "/v1/reference/examples", "/v1/nothing"):
        witness.ask("GET", path)


def ask_wrongly(witness: Witness, stranger: Witness) -> None:
    for path in ("/v1/embeddings", "/v1/perturbations", "/v1/classify", "/v1/neighbors", "/v1/tokens", "/v1/jobs"):
        for content, kind in (
            (b"{", "application/json"),
            (b'{"cells": [{"counts": {"GENE1": NaN}}]}', "application/json"),
            (b"[" * 100_000, "application/json"),
            (b"ARROW1 and nothing more", ARROW),
            (b"\x89HDF\r\n\x1a\n and nothing more", H5AD),
            (b"x", "text/plain"),
        ):
            answer = witness.ask("POST", path, content=content, headers={"Content-Type": kind})
            assert 400 <= answer.status_code < 500, witness.seen[-1]
    assert witness.ask("POST", "/v1/embeddings", json={"cells": CELLS["cells"] * 257}).status_code == 413
    assert stranger.ask("GET", "/v1/info").status_code == 401
    assert stranger.ask("POST", "/v1/embeddings", json=CELLS).status_code == 401


def run_jobs(witness: Witness, corpus: str) -> None:
    for source in (
        "file:///etc/passwd",
        "/etc/passwd",
        f"{corpus}/../../../etc/passwd",
        "s3://another-bucket/corpus",
        "http://169.254.169.254/latest/meta-data",
    ):
        answer = witness.ask("POST", "/v1/jobs", json={"kind": "embed", "source": source})
        assert 400 <= answer.status_code < 500, witness.seen[-1]
    good = witness.ask("POST", "/v1/jobs", json={"kind": "perturbations", **PERTURB})
    assert good.status_code == 202, witness.seen[-1]
    bad = witness.ask("POST", "/v1/jobs", json={"kind": "embed", "source": f"{corpus}-that-is-not-there"})
    states = {ended(witness, job.json()["id"]) for job in (good, bad) if job.status_code == 202}
    assert "succeeded" in states, witness.seen[-1]
    assert witness.ask("GET", f"/v1/jobs/{good.json()['id']}/result").status_code == 200
    witness.ask("GET", "/v1/jobs")


def ended(witness: Witness, job: str) -> str:
    """The state in which a job ends."""
    before_s = time.monotonic() + 120
    while (told := witness.ask("GET", f"/v1/jobs/{job}").json())["state"] in ("queued", "running"):
        assert time.monotonic() < before_s, told
        time.sleep(0.5)
    return str(told["state"])


def break_things(witness: Witness, running: RealService, environment: dict[str, str], folder: Path) -> None:
    said = command(
        *("serve", "rollout", "encoder/2", "--url", running.url, "--api-key-env", "KEYS"),
        environment=environment,
        folder=folder,
        code=2,
    )
    witness.seen.append(("the command rollout", said))
    witness.ask("GET", "/v1/models/encoder")
    replicas = running.pids_of("ModelReplica")
    assert replicas
    for pid in replicas:
        os.kill(pid, signal.SIGKILL)
    statuses = set()
    before_s = time.monotonic() + 60
    while time.monotonic() < before_s:
        statuses.add(witness.ask("POST", "/v1/embeddings", json=CELLS).status_code)
        if 200 in statuses and len(statuses) > 1:
            break
    # It was noticed, and it came back.
    assert 200 in statuses
    assert statuses - {200} <= {429, 500, 503}


def leaks(texts: list[tuple[str, str]] | Iterator[tuple[str, str]], forbidden: tuple[str, ...]) -> list[str]:
    """Where something stands that must not, with what is around it."""
    found = []
    for where, text in texts:
        for word in forbidden:
            at = text.find(word)
            if at >= 0:
                found.append(f"{where}: {text[max(0, at - 120) : at + 120]!r}")
    return found


def files_below(*places: Path) -> Iterator[tuple[str, str]]:
    for place in places:
        for path in [place] if place.is_file() else sorted(place.rglob("*")):
            if path.is_file() and not path.is_symlink():
                yield str(path), path.read_bytes().decode("latin-1")


def test_a_tracker_that_is_away_does_not_make_its_password_known(complete_bundle: Bundle, short_folder: Path) -> None:
    environment = {
        "GENESCALE_TRACKING__URI": f"http://{USER}:{PASSWORD}@127.0.0.1:9",
        "KEYS": FIRST,
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    }
    config = short_folder / "serving.toml"
    config.write_text("tracking_interval_s = 1.0\n")
    arguments = [str(complete_bundle.folder), "--config", str(config), "--api-key-env", "KEYS"]
    with (
        real_service(arguments, environment, short_folder) as running,
        Witness(running.url, FIRST) as witness,
    ):
        assert witness.ask("POST", "/v1/embeddings", json=CELLS).status_code == 200
        time.sleep(3.0)
        for path in ("/metrics", "/v1/info", "/v1/models"):
            assert witness.ask("GET", path).status_code == 200
        running.stop()
        assert running.process.returncode == 0
        found = leaks(
            [*witness.seen, ("stdout", running.said), *files_below(running.errors, running.sessions)], SECRETS
        )
    assert found == []
