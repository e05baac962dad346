"""A sweep whose driver is killed goes on: finished trials are not repeated, and nothing is tracked twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import ray

from genescale.ingestion.corpus import Corpus
from genescale.platform.bundle import Bundle
from genescale.platform.tracking import MlflowTracker, open_tracker
from tests.training import sweep_driver


def trials_in(folder: Path) -> dict[int, Mapping[str, Any]]:
    """The trials' files, by number; a file that is being written is looked at later."""
    found = {}
    for path in folder.glob("sweep/sweep-*/trials/*.json"):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue
        found[int(content["number"])] = content
    return found


def children(tracker: MlflowTracker) -> Counter[str]:
    """Runs by what they are of: a trial by its name, others by their stage."""
    [experiment] = [e for e in tracker.client.search_experiments() if e.name != "Default"]
    runs = tracker.client.search_runs([experiment.experiment_id], max_results=1000)
    return Counter(run.data.tags.get("trial", run.data.tags["stage"]) for run in runs)


@pytest.mark.slow
def test_a_sweep_whose_driver_was_killed_repeats_no_finished_trial(
    ray_local: None, tiny_bundle: Bundle, tiny_corpus: Corpus, tmp_path: Path
) -> None:
    command = [sys.executable, sweep_driver.__file__, str(tiny_bundle.folder), tiny_corpus.uri, str(tmp_path)]
    (tmp_path / sweep_driver.HOLD).touch()
    with (tmp_path / "driver.log").open("w", encoding="utf-8") as log:
        driver = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while sum(trial["status"] != "running" for trial in trials_in(tmp_path).values()) < sweep_driver.HELD:
            assert driver.poll() is None, (tmp_path / "driver.log").read_text(encoding="utf-8")
            assert time.monotonic() < deadline, "the sweep did not get anywhere"
            time.sleep(0.05)
    finally:
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    ended = {number for number, trial in trials_in(tmp_path).items() if trial["status"] != "running"}
    assert len(ended) == sweep_driver.HELD, "the driver was to be killed in mid sweep"
    (tmp_path / sweep_driver.HOLD).unlink()

    # Ray's workers cannot import a file of the tests: the hook travels by value.
    ray.cloudpickle.register_pickle_by_value(sweep_driver)
    result = sweep_driver.run(tiny_bundle.folder, tiny_corpus.uri, tmp_path)
    assert sorted(trial.number for trial in result.trials) == list(range(sweep_driver.TRIALS))
    assert not [trial.error for trial in result.trials if trial.error]
    starts = Counter(int(path.name.split("-")[0]) for path in (tmp_path / "starts").iterdir())
    assert set(starts) == set(range(sweep_driver.TRIALS))
    assert all(starts[number] == 1 for number in ended), f"finished trials ran again: {starts}"
    expected = {f"trial-{number:04d}": 1 for number in range(sweep_driver.TRIALS)} | {"tune": 1, "finetune": 1}
    assert children(open_tracker(sweep_driver.settings_of(tmp_path))) == expected
