"""Pretraining whose driver or node is lost."""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from genescale.ingestion.corpus import Corpus
from genescale.platform.settings import Settings
from genescale.training.cells import CorpusCells
from genescale.training.engine import TorchEngine
from genescale.training.loop import RunPlan, curve, train_loop
from genescale.training.model import new_model
from tests.training import disturbed_runs
from tests.training.disturbed_runs import CONFIG, Reference

SETTINGS = """
[tracking]
uri = "sqlite:///{folder}/mlflow.db"
artifact_root = "{folder}/artifacts"
journal_folder = "{folder}/journal"
[cluster]
num_cpus = 2
num_gpus = 0
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_driver_is_gone_on_with_by_resume(tiny_corpus: Corpus, tmp_path: Path, undisturbed: Reference) -> None:
    (tmp_path / "settings.toml").write_text(SETTINGS.format(folder=tmp_path))
    recipe = tmp_path / "recipe.toml"
    optimizer = "[optimizer]\nlearning_rate = 1e-2\nwarmup_steps = 3\nzero_stage = 1\n"
    shape = "[encoder]\nwidth = 32\nlayers = 2\nheads = 2\nfeed_forward = 64\n"
    shape += "hidden_dropout = 0.1\nattention_dropout = 0.1\n"
    values = {name: getattr(CONFIG, name) for name in ("token_budget", "lanes", "held_out_cells")}
    # More steps than the first driver will live to see.
    values |= {"steps": 4_000, "checkpoint_every": 4, "log_every": 2, "model_name": '"killed"'}
    recipe.write_text("".join(f"{name} = {value}\n" for name, value in values.items()) + shape + optimizer)
    command = [sys.executable, "-m", "genescale.platform.cli", "pretrain"]
    options = ["--settings", str(tmp_path / "settings.toml"), "--output", str(tmp_path / "runs")]
    began = [*command, str(recipe), "--corpus", tiny_corpus.uri, "--workers", "2", "--name", "killed", *options]
    driver = subprocess.Popen(began, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    ledger = tmp_path / "runs" / "killed" / "checkpoints" / "ledger.json"
    try:
        while not ledger.exists() and driver.poll() is None:
            time.sleep(0.1)
        time.sleep(random.SystemRandom().uniform(0, 2))
    finally:
        driver.kill()
        driver.wait()
    done = json.loads(ledger.read_text())[-1]["steps"]
    # Far enough for its schedule to be the same, near enough to finish: the rest is stopped by the clock.
    resumed = [*command, "--resume", "killed", "--workers", "1", "--max-hours", "1e-9", "--json", *options]
    answer = subprocess.run(resumed, capture_output=True, text=True, timeout=300, check=True)
    result = json.loads(answer.stdout)
    assert result["resumed_from"] >= 4
    assert result["resumed_from"] >= done
    assert not result["finished"]
    losses = dict(result["losses"])
    config = dataclasses.replace(CONFIG, steps=4_000, evaluate_every=0)
    source = CorpusCells(tiny_corpus)
    plan = RunPlan.of(config, source)
    model = new_model(config.encoder.for_vocabulary(source.vocabulary), seed=config.seed)
    engine = TorchEngine(model, config.optimizer, total_steps=plan.total_steps)
    rows: dict[int, dict[str, float]] = {}
    stop = max(losses)
    train_loop(
        engine,
        source,
        plan,
        dataclasses.replace(config, log_every=1, checkpoint_every=10**6),
        on_rows=lambda new: [rows.setdefault(step, {}).update(values) for step, values in new] and None,
        should_stop=lambda: max(rows) >= stop,
    )
    expected = dict(curve(rows, "loss"))
    assert losses == pytest.approx({step: expected[step] for step in losses}, rel=1e-3)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_lost_node_is_outlived(
    tiny_corpus: Corpus, settings_for: Callable[[Path], Settings], tmp_path: Path, undisturbed: Reference
) -> None:
    """In a process of its own: it joins a cluster of two nodes and loses one."""
    script = tmp_path / "lose_a_node.py"
    script.write_text(LOSE_A_NODE)
    arguments = [sys.executable, str(script), str(disturbed_runs.__file__), tiny_corpus.uri, str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-4_000:]
    assert (tmp_path / "lost").exists()
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["resumed_from"] >= CONFIG.checkpoint_every
    found = {int(step): loss for step, loss in result["losses"]}
    assert found == pytest.approx(dict(curve(undisturbed[1], "loss")), rel=1e-5)


LOSE_A_NODE = """
import json, runpy, sys, threading, time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from genescale.ingestion.corpus import Corpus
from genescale.platform.memory_tracker import MemoryTracker
from genescale.platform.settings import ClusterSettings, Settings, StorageSettings
from genescale.platform.storage import Store
from genescale.training.pretrain import pretrain

shared, folder = runpy.run_path(sys.argv[1]), Path(sys.argv[3])
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
# Before there are other nodes: the driver joins any node of its machine, and the one it joined must not be lost.
ray.init(address=cluster.address, log_to_driver=False)
nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
CONFIG = shared["CONFIG"]


class SlowCorpus(shared["DeadlyCorpus"]):
    def tokens(self, indices):
        time.sleep(0.4)
        return self.corpus.tokens(indices)


def lose() -> None:
    ledger = folder / "run" / "checkpoints" / "ledger.json"
    while not ledger.exists():
        time.sleep(0.1)
    # The two workers fill two of the three nodes: one that is not the driver's goes.
    free = ray._private.state.available_resources_per_node()
    busy = [node for node in nodes if free[node.node_id].get("CPU", 0) < 1]
    cluster.remove_node(busy[0], allow_graceful=False)
    (folder / "lost").touch()


threading.Thread(target=lose, daemon=True).start()
store = Store(StorageSettings())
result = pretrain(
    CONFIG,
    SlowCorpus(Corpus.open(sys.argv[2], store), folder / "unused", run=(store, "")),
    settings=Settings(cluster=ClusterSettings(address=cluster.address)),
    store=store,
    storage_uri=str(folder),
    tracker=MemoryTracker(),
    workers=2,
    run_name="run",
)
(folder / "result.json").write_text(json.dumps({"resumed_from": result.resumed_from, "losses": result.losses}))
ray.shutdown()
cluster.shutdown()
"""
