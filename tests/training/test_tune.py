"""The sweep end to end: trials, winner, tracking, report, resume; with Ray, on a tiny model and corpus."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import tomllib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from genescale.ingestion.corpus import Corpus
from genescale.platform.bundle import Bundle, open_bundle
from genescale.platform.errors import ClusterError, InputError, IntegrityError, SettingsError
from genescale.platform.progress import SILENT
from genescale.platform.settings import build
from genescale.platform.tracking import MemoryTracker
from genescale.training.fitting.config import FinetuneConfig
from genescale.training.fitting.finetune import finetune
from genescale.training.sweeps.ray_tuning import Trials
from genescale.training.sweeps.sweep_spec import TuneSpec, spec_of
from genescale.training.sweeps.trial_records import SweepFolder, Trial
from genescale.training.sweeps.tune import BEST, TuneResult, tune

FINETUNE = {"epochs": 6, "fractions": [0.6, 0.2, 0.2], "cells_per_batch": 32, "device": "cpu"}


def make_spec(**changes: Any) -> TuneSpec:
    content: dict[str, Any] = {
        "search": {
            "learning_rate": {"low": 1e-6, "high": 1e-1, "log": True},
            "hidden": {"choices": [0, 16]},
            "depth": {"choices": [1, 2], "when": {"hidden": 16}},
            "layer": {"choices": ["last", "second_to_last"]},
            "seed": {"choices": [0, 7]},
        },
        "finetune": FINETUNE,
        "sweep": {"trials": 9, "seed": 3, "resources": {"cpu": 0.5}, "at_once": 2},
    }
    return spec_of({key: changes.get(key, value) for key, value in content.items()})


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
    folder = tmp_path_factory.mktemp("tune")
    more = {"model_name": "heads", "aliases": ["best"]}
    return run_sweep(make_spec(), tiny_bundle, tiny_corpus, folder, tracker, **more)


def test_every_trial_is_there_best_first(swept: TuneResult) -> None:
    assert [trial.number for trial in sorted(swept.trials, key=lambda t: t.number)] == list(range(9))
    assert {trial.status for trial in swept.trials} <= {"finished", "stopped"}
    scores = [trial.score or 0.0 for trial in swept.trials]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > scores[-1]
    assert len({trial.sample["learning_rate"] for trial in swept.trials}) == 9
    assert all(("depth" in trial.sample) == (trial.sample["hidden"] == 16) for trial in swept.trials)
    for trial in swept.trials:
        assert [row["epoch"] for row in trial.epochs] == list(range(1, len(trial.epochs) + 1))
        assert max(row["validation_score"] for row in trial.epochs) == trial.score


def test_the_winner_is_the_best_trial_fitted_again_on_train_and_validation(swept: TuneResult) -> None:
    best = swept.trials[0]
    assert {name: getattr(swept.best, name) for name in best.sample} == dict(best.sample)
    assert swept.best.refit
    assert swept.best.data_seed == 0, "a seed that was searched must not move the split"
    reached = max(epoch.validation_score for epoch in swept.winner.history[: len(best.epochs)])
    assert reached == pytest.approx(best.score), "the winner's fit does not do what its trial did"
    assert open_bundle(swept.winner.bundle.folder).lineage["finetune"]["learning_rate"] == best.sample["learning_rate"]


def test_winner_toml_gives_the_same_numbers_without_a_sweep(
    swept: TuneResult, tiny_bundle: Bundle, tiny_corpus: Corpus, tmp_path: Path
) -> None:
    config = build(FinetuneConfig, tomllib.loads(swept.winner_toml.read_text(encoding="utf-8")))
    assert config == swept.best
    assert swept.command.split()[:2] == ["genescale", "finetune"]
    assert str(swept.winner_toml) in swept.command
    again = finetune(tiny_bundle, tiny_corpus, config, tracker=MemoryTracker(), out=tmp_path)
    first, second = swept.winner.heads[0].predictions, again.heads[0].predictions
    assert np.array_equal(first.ids_u, second.ids_u)
    assert first.probabilities_uc is not None
    assert second.probabilities_uc is not None
    assert np.array_equal(first.probabilities_uc, second.probabilities_uc)
    assert again.macro_f1 == swept.winner.macro_f1


def test_the_sweep_is_tracked_as_one_family(swept: TuneResult, tracker: MemoryTracker) -> None:
    parent = tracker.runs[swept.run_id]
    children = [run for run in tracker.runs.values() if run.parent == parent.id]
    trials = {run.tags["trial"]: run for run in children if run.tags["stage"] == "trial"}
    assert set(trials) == {trial.name for trial in swept.trials}
    for trial in swept.trials:
        assert trials[trial.name].metrics[BEST] == [(0, trial.score)]
        assert len(trials[trial.name].metrics["validation_score"]) == len(trial.epochs)
        assert float(trials[trial.name].params["learning_rate"]) == trial.sample["learning_rate"]
    assert [run.id for run in children if run.tags["stage"] == "finetune"] == [swept.winner.run_id]
    assert all(run.status == "FINISHED" for run in tracker.runs.values())
    assert parent.metrics["test_macro_f1"][-1][1] == pytest.approx(swept.winner.macro_f1)
    assert {"sweep/winner.toml", "sweep/sweep.html", "sweep/sweep.json"} <= set(parent.files)
    assert tracker.resolve("models:/heads@best").digest == swept.winner.bundle.digest


def test_the_report_names_every_trial_and_the_winner(swept: TuneResult) -> None:
    page = swept.report.read_text(encoding="utf-8")
    content = json.loads(swept.report.with_suffix(".json").read_text(encoding="utf-8"))
    assert all(trial.name in page for trial in swept.trials)
    assert swept.command.replace("'", "&#x27;") in page
    assert content["winner"]["trial"] == swept.trials[0].name
    rows = {row["metric"]: row for row in content["winner"]["heads"][0]["rows"]}
    assert rows["macro_f1"]["value"] == pytest.approx(swept.winner.macro_f1)
    shares = dict(content["importance"]["shares"])
    assert sum(shares.values()) == pytest.approx(1)
    assert max(shares, key=lambda name: shares[name]) == "learning_rate"
    assert content["importance"]["left_out"] == ["depth"]
    assert "http" not in page.replace("http-equiv", ""), "the page must need no network"


class Notes:
    """A hook that leaves a line in a file for every start of a trial, and does what is asked of some of them."""

    def __init__(self, folder: Path, does: Mapping[int, str] = {}) -> None:
        self.path, self.does = str(folder / "starts.txt"), dict(does)

    def __call__(self, number: int, sample: Mapping[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(f"{number}\n")
        match self.does.get(number):
            case "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            case "raises":
                raise ValueError("the dog ate\nthe gradient")
            case "needs memory":
                np.empty(1 << 60, dtype=np.uint8)

    def starts(self) -> Counter[int]:
        path = Path(self.path)
        return Counter(int(line) for line in path.read_text(encoding="utf-8").split()) if path.exists() else Counter()


@pytest.mark.slow
def test_a_trial_that_breaks_fails_alone_and_says_why(
    ray_local: None, tiny_bundle: Bundle, tiny_corpus: Corpus, tmp_path: Path
) -> None:
    notes = Notes(tmp_path, {1: "dies", 2: "raises", 3: "needs memory"})
    spec = make_spec(
        search={"learning_rate": {"low": 1e-3, "high": 1e-1, "log": True}},
        sweep={"trials": 6, "sampler": "random", "at_once": 2},
    )
    tracker = MemoryTracker()
    result = run_sweep(spec, tiny_bundle, tiny_corpus, tmp_path, tracker, on_trial_start=notes)
    by_number = {trial.number: trial for trial in result.trials}
    assert [n for n in sorted(by_number) if by_number[n].status == "failed"] == [1, 2, 3]
    assert "killed" in by_number[1].error
    assert by_number[2].error == "ValueError: the dog ate the gradient"
    assert "MemoryError" in by_number[3].error
    assert all(by_number[number].score is not None for number in (0, 4, 5))
    page = result.report.read_text(encoding="utf-8")
    assert "the dog ate the gradient" in page
    assert {run.tags.get("status") for run in tracker.runs.values()} >= {"failed", "finished"}


class CutsOff:
    """A Progress that presses Ctrl-C when the first trial is done."""

    def __init__(self) -> None:
        self.unit = ""

    def start(self, total: int | None, unit: str) -> None:
        self.unit = unit

    def advance(self, done: int = 1, note: str = "") -> None:
        if self.unit == "trials" and done:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.slow
def test_a_sweep_that_was_cut_off_goes_on(
    ray_local: None, tiny_bundle: Bundle, tiny_corpus: Corpus, tmp_path: Path
) -> None:
    """One trial at a time: what was cut off draws what an undisturbed sweep draws, and repeats no finished trial."""
    search = {"learning_rate": {"low": 1e-6, "high": 1e-1, "log": True}}
    spec, tracker = make_spec(search=search, sweep={"trials": 4, "at_once": 1, "seed": 1}), MemoryTracker()
    handler, notes = signal.getsignal(signal.SIGINT), Notes(tmp_path)
    more: dict[str, Any] = {"on_trial_start": notes}
    with pytest.raises(KeyboardInterrupt):
        run_sweep(spec, tiny_bundle, tiny_corpus, tmp_path, tracker, progress=CutsOff(), **more)
    assert [run.status for run in tracker.runs.values() if run.tags["stage"] == "tune"] == ["KILLED"]
    assert signal.getsignal(signal.SIGINT) is handler
    result = run_sweep(spec, tiny_bundle, tiny_corpus, tmp_path, tracker, **more)
    assert len(result.trials) == 4
    assert notes.starts()[0] == 1, "a finished trial ran again"
    repeated = run_sweep(spec, tiny_bundle, tiny_corpus, tmp_path, tracker, **more)
    assert sum(notes.starts().values()) <= 5, "a finished sweep ran trials again"
    assert repeated.winner.bundle.digest == result.winner.bundle.digest
    assert Counter(run.tags["stage"] for run in tracker.runs.values()) == {"tune": 1, "trial": 4, "finetune": 1}
    shutil.rmtree(tmp_path / "sweep")
    shutil.rmtree(tmp_path / "winner")
    undisturbed = run_sweep(spec, tiny_bundle, tiny_corpus, tmp_path)
    drawn = [{trial.number: trial.sample for trial in found.trials} for found in (undisturbed, result)]
    assert drawn[0] == drawn[1]


@pytest.mark.slow
def test_a_sweep_whose_trials_all_fail_says_the_first_reason(
    ray_local: None, tiny_bundle: Bundle, tiny_corpus: Corpus, tmp_path: Path
) -> None:
    spec = make_spec(search={"dropout": {"choices": [0.0, 0.1]}}, sweep={"trials": 1, "sampler": "random"})
    with pytest.raises(ClusterError, match="the dog ate the gradient"):
        run_sweep(spec, tiny_bundle, tiny_corpus, tmp_path, on_trial_start=Notes(tmp_path, {0: "raises"}))


def test_impossible_sweeps_are_refused_before_any_trial(
    ray_local: None, tiny_bundle: Bundle, bare_bundle: Bundle, tiny_corpus: Corpus, tmp_path: Path
) -> None:
    search = {"dropout": {"choices": [0.0, 0.1]}}
    greedy = make_spec(search=search, sweep={"resources": {"cpu": 64}})
    with pytest.raises(SettingsError, match="64, and the whole Ray cluster has 2"):
        run_sweep(greedy, tiny_bundle, tiny_corpus, tmp_path)
    with pytest.raises(SettingsError, match="whole Ray cluster has 0"):
        run_sweep(make_spec(search=search, sweep={"resources": {"gpu": 0.5}}), tiny_bundle, tiny_corpus, tmp_path)
    folds = make_spec(search=search, finetune={**FINETUNE, "folds": 50})
    with pytest.raises(InputError, match="folds"):
        run_sweep(folds, tiny_bundle, tiny_corpus, tmp_path)
    assert not (tmp_path / "sweep").exists()


def test_another_sweep_never_goes_on_in_a_folder(
    swept: TuneResult, tiny_bundle: Bundle, tiny_corpus: Corpus, tmp_path: Path
) -> None:
    from genescale.training.fitting.finetune import prepare
    from genescale.training.sweeps.trial_records import SweepFolder
    from genescale.training.sweeps.tune import sweep_key

    spec = make_spec()
    other = dataclasses.replace(spec, sweep=dataclasses.replace(spec.sweep, trials=10))
    tasks = [prepare(tiny_bundle, tiny_corpus, config) for config in (spec.finetune, swept.best)]
    first, second = (sweep_key(tiny_bundle, tiny_corpus, s, tasks[0]) for s in (spec, other))
    assert first != second
    assert swept.uri.endswith(first[:16])
    with pytest.raises(IntegrityError, match="another sweep"):
        SweepFolder(swept.uri, second, tiny_corpus.store).open({})


def test_a_trial_whose_file_was_deleted_is_drawn_again_and_no_other(tiny_corpus: Corpus, tmp_path: Path) -> None:
    folder = SweepFolder(str(tmp_path), "key", tiny_corpus.store)
    ended = [Trial(number=number, sample={"seed": 7}, status="finished") for number in (0, 2)]
    for trial in ended:
        folder.keep(trial)
    trials = Trials(make_spec(search={"seed": {"choices": [0, 7]}}, sweep={"trials": 3}), folder, SILENT)
    drawn = trials.next()
    assert drawn is not None
    assert drawn.number == 1
    assert trials.next() is None
    assert [one for one in folder.trials().values() if one.ended] == ended
