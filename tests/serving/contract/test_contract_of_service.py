"""The contract of the running service: Schemathesis's own command against Ray Serve, its proxy and the model."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from genescale.platform.settings import StorageSettings
from tests.serving.real_service import RealService, real_service

if TYPE_CHECKING:
    from genescale.ingestion.corpus import Corpus
    from genescale.platform.bundle import Bundle

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).resolve().parents[3]
KEY = "a-service-key-0123456789abcdef"
N_EXAMPLES = 10


@pytest.fixture
def running(
    s3_settings: StorageSettings,
    complete_bundle: Bundle,
    reference_uri: str,
    reference_corpus: Corpus,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[RealService]:
    """A service with a reference and jobs, so that every address has somebody who answers."""
    folder = tmp_path_factory.mktemp("c")
    (folder / "serving.toml").write_text(
        f'num_cpus = 0.8\nindex = "{reference_uri}"\n[limits]\nmax_cells = 8\nmax_edits = 8\n'
        f'[jobs]\nuri = "{folder}/jobs"\nallowed_roots = ["{Path(reference_corpus.uri).parent}"]\n'
    )
    arguments = [str(complete_bundle.folder), "--config", "serving.toml", "--api-key-env", "KEYS"]
    with real_service(arguments, {"KEYS": KEY}, folder) as service:
        yield service


def test_no_generated_question_breaks_the_running_service(running: RealService, tmp_path: Path) -> None:
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance"
    checks += ",response_schema_conformance,negative_data_rejection,unsupported_method,ignored_auth"
    run = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{running.url}/openapi.json"),
            *("--header", f"Authorization: Bearer {KEY}", "--checks", checks, "--continue-on-failure"),
            *("--max-examples", str(N_EXAMPLES), "--seed", "7", "--request-timeout", "60"),
            *("--generation-database", "none", "--no-color", "--warnings", "off"),
        ],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "SCHEMATHESIS_HOOKS": "tests.serving.contract.known_names",
        },
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert run.returncode == 0, run.stdout[-12_000:] + run.stderr[-2_000:]
    assert "Fuzzing" in run.stdout
    # It goes on as if nothing had been asked.
    headers = {"Authorization": f"Bearer {KEY}"}
    body = {"cells": [{"counts": {"GENE1": 3}}]}
    assert httpx.post(f"{running.url}/v1/embeddings", json=body, headers=headers, timeout=60).status_code == 200
    running.stop()
    assert running.process.returncode == 0
    assert "Traceback" not in running.said + running.errors.read_text()
