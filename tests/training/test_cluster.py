"""From one machine to a cluster: the same command, another settings file, the same losses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from genescale.ingestion.corpus import Corpus
from genescale.platform.settings import StorageSettings
from genescale.platform.storage import Store

RECIPE = """
steps = 8
token_budget = 256
lanes = 2
held_out_cells = 24
checkpoint_every = 4
model_name = "{name}"
[encoder]
width = 32
layers = 2
heads = 2
feed_forward = 64
[optimizer]
learning_rate = 1e-2
zero_stage = 1
"""
LAPTOP = """
[tracking]
uri = "sqlite:///{folder}/laptop.db"
artifact_root = "{folder}/artifacts"
journal_folder = "{folder}/journal"
[cluster]
num_cpus = 2
num_gpus = 0
"""
CLUSTER = """
[storage]
endpoint_url = "{storage.endpoint_url}"
access_key_id = "{key}"
secret_access_key = "{secret}"
allowed_roots = ["{bucket}"]
[tracking]
uri = "sqlite:///{folder}/cluster.db"
artifact_root = "{bucket}/artifacts"
journal_folder = "{folder}/journal"
[cluster]
address = "{address}"
"""


def pretrained(folder: Path, settings: Path, corpus: str, output: str) -> dict[str, Any]:
    words = ["pretrain", str(folder / "recipe.toml"), "--corpus", corpus, "--output", output, "--name", "run"]
    command = [sys.executable, "-m", "genescale.platform.cli", *words, "--workers", "2", "--json"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [*command, "--settings", str(settings)], capture_output=True, text=True, timeout=280, env=environment
    )
    assert done.returncode == 0, done.stderr[-3_000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_cluster_takes_another_settings_file_and_gives_the_same_losses(
    tiny_corpus: Corpus, tmp_path: Path, s3_store: tuple[Store, str], s3_settings: StorageSettings
) -> None:
    from ray.cluster_utils import Cluster

    store, bucket = s3_store
    (tmp_path / "recipe.toml").write_text(RECIPE.format(name="model"))
    laptop, cluster_file = tmp_path / "laptop.toml", tmp_path / "cluster.toml"
    laptop.write_text(LAPTOP.format(folder=tmp_path))
    expected = pretrained(tmp_path, laptop, tiny_corpus.uri, str(tmp_path / "runs"))
    store.upload_folder(Path(tiny_corpus.uri), f"{bucket}/corpus")
    # As on Kubernetes: the head coordinates, each of two nodes has room for one worker.
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        keys = {"key": s3_settings.access_key_id.reveal(), "secret": s3_settings.secret_access_key.reveal()}
        values = {"storage": s3_settings, "bucket": bucket, "folder": tmp_path, "address": cluster.address}
        cluster_file.write_text(CLUSTER.format(**values, **keys))
        found = pretrained(tmp_path, cluster_file, f"{bucket}/corpus", f"{bucket}/runs")
    finally:
        cluster.shutdown()
    assert found["model_version"] == "models:/model/1"
    assert found["finished"]
    assert [step for step, _ in found["losses"]] == list(range(1, 9))
    assert dict(found["losses"]) == pytest.approx(dict(expected["losses"]), rel=1e-5)
    assert store.exists(f"{bucket}/runs/run/bundle/bundle.json")
