"""A process that runs a sweep and may be killed: `python sweep_driver.py BUNDLE CORPUS FOLDER`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genescale.ingestion.corpus import Corpus
from genescale.platform.bundle import open_bundle
from genescale.platform.cluster import ray_cluster
from genescale.platform.settings import ClusterSettings, Secret, Settings, StorageSettings, TrackingSettings
from genescale.platform.storage import Store
from genescale.platform.tracking import open_tracker
from genescale.training.sweeps.sweep_spec import TuneSpec, spec_of
from genescale.training.sweeps.tune import TuneResult, tune

TRIALS, HELD, HOLD = 8, 3, "hold"


class Starts:
    """A hook that leaves a file for every start of a trial: `NUMBER-PROCESS-COUNT`.

    While the file `hold` is there, trials from number HELD on wait after that, so that the driver is killed in between.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.hold = folder, folder.parent / HOLD

    def __call__(self, number: int, sample: Mapping[str, Any]) -> None:
        self.folder.mkdir(exist_ok=True)
        before = len(list(self.folder.glob(f"{number}-*")))
        (self.folder / f"{number}-{os.getpid()}-{before}").touch()
        while number >= HELD and self.hold.exists():
            time.sleep(0.02)


def sweep_spec() -> TuneSpec:
    """Small trials, two at a time."""
    return spec_of(
        {
            "search": {"learning_rate": {"low": 1e-5, "high": 1e-1, "log": True}, "hidden": {"choices": [0, 64]}},
            "finetune": {"epochs": 6, "fractions": [0.6, 0.2, 0.2], "cells_per_batch": 32, "device": "cpu"},
            "sweep": {"trials": TRIALS, "at_once": 2, "seed": 1},
        }
    )


def settings_of(folder: Path) -> Settings:
    """MLflow on SQLite below the folder, and a small local Ray."""
    return Settings(
        storage=StorageSettings(access_key_id=Secret(), secret_access_key=Secret()),
        tracking=TrackingSettings(uri=f"sqlite:///{folder / 'mlflow.db'}", artifact_root=str(folder / "artifacts")),
        cluster=ClusterSettings(num_cpus=2, num_gpus=0),
    )


def run(bundle: Path, corpus: str, folder: Path) -> TuneResult:
    """Start the sweep, or go on with it."""
    store = Store(StorageSettings())
    return tune(
        open_bundle(bundle),
        Corpus.open(corpus, store),
        sweep_spec(),
        tracker=open_tracker(settings_of(folder)),
        out=folder / "winner",
        sweep_uri=str(folder / "sweep"),
        store=store,
        on_trial_start=Starts(folder / "starts"),
    )


if __name__ == "__main__":
    with ray_cluster(settings_of(Path(sys.argv[3]))):
        run(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
