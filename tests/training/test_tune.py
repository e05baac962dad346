"""The sweep: two trials work end to end, an interrupted one goes on, and a spec is checked before anything runs."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from genescale.ingestion.corpus import Corpus
from genescale.platform.bundle import Bundle, open_bundle
from genescale.platform.errors import SettingsError
from genescale.platform.tracking import MemoryTracker
from genescale.training.sweeps.sweep_spec import TuneSpec, read_spec, spec_of
from genescale.training.sweeps.tune import METRIC, TuneResult, tune

FINETUNE = {"epochs": 6, "fractions": [0.6, 0.2, 0.2], "cells_per_batch": 32, "device": "cpu"}
SEARCH = {"learning_rate": {"choices": [1e-8, 3e-2]}}


def two_trials(**sweep: Any) -> TuneSpec:
    return spec_of(
        {"search": SEARCH, "finetune": FINETUNE, "sweep": {"trials": 2, "at_once": 2, "sampler": "random", **sweep}}
    )


def run_sweep(
    spec: TuneSpec, bundle: Bundle, corpus: Corpus, folder: Path, tracker: MemoryTracker | None = None, **more: Any
) -> TuneResult:
    return tune(
        bundle,
        corpus,
        spec,
        tracker=tracker or MemoryTracker(),
        out=folder / "winner",
        sweep_uri=str(folder / "sweep"),
        store=corpus.store,
        **more,
    )


@pytest.fixture(scope="module")
def tracker() -> MemoryTracker:
    return MemoryTracker()


@pytest.fixture(scope="module")
def swept(
    tmp_path_factory: pytest.TempPathFactory,
    ray_local: None,
    tiny_bundle: Bundle,
    tiny_corpus: Corpus,
    tracker: MemoryTracker,
) -> TuneResult:
    spec = spec_of(
        {
            "search": {"learning_rate": {"low": 1e-6, "high": 1e-1, "log": True}, "hidden": {"choices": [0, 16]}},
            "finetune": FINETUNE,
            "sweep": {"trials": 4, "at_once": 2, "seed": 3},
        }
    )
    return run_sweep(
        spec, tiny_bundle, tiny_corpus, tmp_path_factory.mktemp("tune"), tracker, model_name="heads", aliases=["best"]
    )


def test_every_trial_is_there_best_first(swept: TuneResult) -> None:
    assert len(swept.trials) == 4
    assert not any(trial.error for trial in swept.trials)
    scores = [trial.macro_f1 for trial in swept.trials]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > scores[-1]
    assert all(1e-6 <= trial.sample["learning_rate"] <= 1e-1 for trial in swept.trials)
    assert len({trial.sample["learning_rate"] for trial in swept.trials}) == 4


def test_the_winner_is_the_best_trial_refitted(swept: TuneResult) -> None:
    best = swept.trials[0]
    assert swept.best.learning_rate == best.sample["learning_rate"]
    assert swept.best.hidden == best.sample["hidden"]
    assert swept.best.epochs == FINETUNE["epochs"]
    reached = max(epoch.validation_macro_f1 for epoch in swept.winner.history[: best.epochs])
    assert reached == pytest.approx(best.macro_f1), "the refit does not do what its trial did"
    assert open_bundle(swept.winner.bundle.folder).lineage["finetune"]["learning_rate"] == best.sample["learning_rate"]


def test_the_sweep_is_tracked_as_one_family(swept: TuneResult, tracker: MemoryTracker) -> None:
    parent = tracker.runs[swept.run_id]
    children = [run for run in tracker.runs.values() if run.parent == parent.id]
    trials = {run.tags["trial"]: run for run in children if run.tags["stage"] == "trial"}
    assert set(trials) == {trial.name for trial in swept.trials}
    for trial in swept.trials:
        assert trials[trial.name].metrics[METRIC] == [(0, trial.macro_f1)]
        assert float(trials[trial.name].params["learning_rate"]) == trial.sample["learning_rate"]
    assert [run.id for run in children if run.tags["stage"] == "finetune"] == [swept.winner.run_id]
    assert all(run.status == "FINISHED" for run in tracker.runs.values())
    assert parent.metrics["test_macro_f1"][-1][1] == pytest.approx(swept.winner.macro_f1)
    assert tracker.resolve("models:/heads@best").digest == swept.winner.bundle.digest


class CutsOff:
    """A Progress that presses Ctrl-C when the first trial is done."""

    def __init__(self) -> None:
        self.unit = ""

    def start(self, total: int | None, unit: str) -> None:
        self.unit = unit

    def advance(self, done: int = 1, note: str = "") -> None:
        if self.unit == "trials":
            signal.raise_signal(signal.SIGINT)


class Counts:
    """A Progress that remembers how many trials ended in this run."""

    def __init__(self) -> None:
        self.unit, self.trials = "", 0

    def start(self, total: int | None, unit: str) -> None:
        self.unit = unit

    def advance(self, done: int = 1, note: str = "") -> None:
        self.trials += done if self.unit == "trials" else 0


def test_a_sweep_that_was_cut_off_goes_on(
    ray_local: None, tiny_bundle: Bundle, tiny_corpus: Corpus, tmp_path: Path
) -> None:
    """The second run keeps the finished trial, does the other, and a third one has nothing to do."""
    spec, tracker = two_trials(at_once=1, seed=1), MemoryTracker()
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(spec, tiny_bundle, tiny_corpus, tmp_path, tracker, progress=CutsOff())
    assert [run.status for run in tracker.runs.values()] == ["KILLED"]
    assert signal.getsignal(signal.SIGINT) is handler
    again = Counts()
    result = run_sweep(spec, tiny_bundle, tiny_corpus, tmp_path, progress=again)
    assert len(result.trials) == 2
    assert again.trials == 1
    idle = Counts()
    repeated = run_sweep(spec, tiny_bundle, tiny_corpus, tmp_path, progress=idle)
    assert idle.trials == 0
    assert repeated.trials == result.trials
    assert repeated.winner.bundle.digest == result.winner.bundle.digest


def test_another_spec_starts_its_own_sweep(tiny_bundle: Bundle, tiny_corpus: Corpus) -> None:
    from genescale.training.sweeps.tune import sweep_key

    keys = {sweep_key(tiny_bundle, tiny_corpus, two_trials(seed=seed)) for seed in (1, 2)}
    assert len(keys) == 2
    assert sweep_key(tiny_bundle, tiny_corpus, two_trials(seed=1)) in keys


def test_spec_file(tmp_path: Path) -> None:
    path = tmp_path / "sweep.toml"
    path.write_text(
        """
        [search]
        learning_rate = { low = 1e-4, high = 1e-1, log = true }
        hidden = { choices = [0, 64] }
        cells_per_batch = { low = 16, high = 128, log = true }
        [finetune]
        label = "tissue"
        epochs = 12
        [sweep]
        trials = 8
        """,
        encoding="utf-8",
    )
    spec = read_spec(path)
    assert (spec.finetune.label, spec.finetune.epochs, spec.sweep.trials) == ("tissue", 12, 8)
    for _ in range(20):
        sample = {name: domain.sample() for name, domain in spec.space().items()}
        config = spec.trial_config(sample)
        assert 1e-4 <= config.learning_rate <= 1e-1
        assert config.hidden in (0, 64)
        assert 16 <= config.cells_per_batch <= 128
        assert config.label == "tissue"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "nothing to search"),
        ({"search": {"learning_rat": {"low": 0.1, "high": 0.2}}}, "Did you mean 'learning_rate'"),
        ({"search": {"learning_rate": {"low": 0.2, "high": 0.1}}}, "not below"),
        ({"search": {"learning_rate": {"low": 0.0, "high": 0.1, "log": True}}}, "logarithmic"),
        ({"search": {"learning_rate": {"low": 0.1}}}, "low and high"),
        ({"search": {"learning_rate": {"low": 0.1, "high": 0.2, "choices": [1]}}}, "stand alone"),
        ({"search": {"learning_rate": {"choices": []}}}, "stand alone"),
        ({"search": {"learning_rate": 0.1}}, "neither a range nor choices"),
        ({"search": {"dropout": {"low": 0.0, "high": 1.5}}}, "dropout"),
        ({"search": {"schedule": {"choices": ["linear", "steep"]}}}, "steep"),
        ({"search": SEARCH, "sweeep": {}}, "Did you mean 'sweep'"),
        ({"search": SEARCH, "sweep": {"trials": 0}}, "trials"),
        ({"search": SEARCH, "finetune": {"encoder": "trained"}}, "frozen encoder"),
    ],
)
def test_specs_that_cannot_run_are_refused(content: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        spec_of(content)
