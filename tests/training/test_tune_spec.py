"""What a sweep may try is checked before anything runs, and what a trial draws follows from the spec and its number."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from genescale.ingestion.corpus import Corpus
from genescale.platform.errors import SettingsError, TrackingError
from genescale.platform.memory_tracker import MemoryRun, MemoryTracker
from genescale.platform.settings import build
from genescale.training.fitting.config import FinetuneConfig, TaskTarget
from genescale.training.sweeps.importance import importance
from genescale.training.sweeps.sampling import Drawing
from genescale.training.sweeps.sweep_spec import TuneSpec, read_spec, spec_of
from genescale.training.sweeps.tracking_trials import TrialRuns
from genescale.training.sweeps.trial import rungs
from genescale.training.sweeps.trial_records import SweepFolder, Trial, advanced, best_first
from genescale.training.sweeps.winner import winner_config, write_winner

SEARCH = {"learning_rate": {"choices": [1e-8, 3e-2]}}
SPACE = {
    "learning_rate": {"low": 1e-4, "high": 1e-1, "log": True},
    "hidden": {"choices": [0, 64]},
    "depth": {"low": 1, "high": 3, "when": {"hidden": 64}},
    "cells_per_batch": {"low": 16, "high": 128, "log": True},
    "encoder": {"choices": ["frozen", "trained"]},
    "frozen_layers": {"choices": [0, 1], "when": {"encoder": ["trained"]}},
}


def drawn_trials(spec: TuneSpec, count: int) -> list[Trial]:
    """Trials one after the other; the nearer the learning rate to 0.01, the better."""
    drawing, trials = Drawing(spec), []
    for number in range(count):
        sample = drawing.sample(number, trials)
        score = -abs(sample["learning_rate"] - 0.01)
        status = "stopped" if number % 3 else "finished"
        trials.append(Trial(number=number, sample=sample, status=status, score=score, steps=((3, score),)))
    return trials


def test_spec_file(tmp_path: Path) -> None:
    path = tmp_path / "sweep.toml"
    path.write_text(
        """
        [search]
        learning_rate = { low = 1e-4, high = 1e-1, log = true }
        hidden = { choices = [0, 64] }
        depth = { low = 1, high = 3, when = { hidden = 64 } }
        [finetune]
        label = "tissue"
        epochs = 12
        [sweep]
        trials = 8
        resources = { cpu = 0.5 }
        """,
        encoding="utf-8",
    )
    spec = read_spec(path)
    assert (spec.finetune.label, spec.finetune.epochs, spec.sweep.trials) == ("tissue", 12, 8)
    assert (spec.sweep.resources.cpu, spec.sweep.resources.gpu) == (0.5, 0.0)


def test_every_drawn_trial_is_valid_and_inside_its_ranges() -> None:
    spec = spec_of({"search": SPACE, "sweep": {"trials": 40}})
    trials = drawn_trials(spec, 40)
    for trial in trials:
        config = spec.trial_config(trial.sample)
        assert 1e-4 <= config.learning_rate <= 1e-1
        assert 16 <= config.cells_per_batch <= 128
        assert ("depth" in trial.sample) == (config.hidden == 64)
        assert ("frozen_layers" in trial.sample) == (config.encoder == "trained")
    assert {trial.sample["hidden"] for trial in trials} == {0, 64}
    assert {trial.sample.get("depth") for trial in trials} == {None, 1, 2, 3}


@pytest.mark.parametrize("sampler", ["optuna", "random"])
def test_a_draw_follows_from_its_number_and_the_trials_before(sampler: str) -> None:
    spec = spec_of({"search": SPACE, "sweep": {"sampler": sampler, "seed": 5}})
    trials = drawn_trials(spec, 14)
    for number in (3, 13):
        assert Drawing(spec).sample(number, trials[:number]) == trials[number].sample
    other = spec_of({"search": SPACE, "sweep": {"sampler": sampler, "seed": 6}})
    assert drawn_trials(other, 2)[1].sample != trials[1].sample


def test_optuna_learns_where_the_good_scores_are() -> None:
    search = {"learning_rate": {"low": 1e-5, "high": 1.0, "log": True}}
    late = {}
    for sampler in ("optuna", "random"):
        trials = drawn_trials(spec_of({"search": search, "sweep": {"sampler": sampler}}), 60)
        late[sampler] = sum(trial.score or -1 for trial in trials[30:]) / 30
    assert late["optuna"] > late["random"] / 2


def test_seeds_that_are_searched_leave_cells_and_splits_alone() -> None:
    spec = spec_of({"search": {"seed": {"low": 0, "high": 9}}, "finetune": {"seed": 4}})
    assert {spec.trial_config({"seed": seed}).drawing_seed for seed in range(10)} == {4}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "nothing to search"),
        ({"search": {"learning_rat": {"low": 0.1, "high": 0.2}}}, "Did you mean 'learning_rate'"),
        ({"search": {"label": {"choices": ["cell_type", "tissue"]}}}, "trials would not be comparable"),
        ({"search": {"learning_rate": {"low": 0.2, "high": 0.1}}}, "search: learning_rate: the range is empty"),
        ({"search": {"learning_rate": {"low": 0.0, "high": 0.1, "log": True}}}, "logarithmic"),
        ({"search": {"learning_rate": {"low": 0.1}}}, "low and high"),
        ({"search": {"learning_rate": {"low": 0.1, "high": 0.2, "choices": [1]}}}, "a range and choices"),
        ({"search": {"learning_rate": {"choices": []}}}, "no choices"),
        ({"search": {"hidden": {"choices": [64, 64]}}}, "stands there twice"),
        ({"search": {"hidden": {"choices": [[64]]}}}, "neither a number nor a text"),
        ({"search": {"hidden": {"low": 0.5, "high": 2}}}, "whole numbers"),
        ({"search": {"learning_rate": 0.1}}, "neither a range nor choices"),
        ({"search": {"dropout": {"low": 0.0, "high": 1.5}}}, "search: dropout: 1.5 is out of range"),
        ({"search": {"schedule": {"choices": ["linear", "steep"]}}}, "steep"),
        ({"search": {"layer": {"choices": ["lost"]}}}, "search: layer: 'lost'"),
        ({"search": {"frozen_layers": {"choices": [0, 1]}}}, "when = "),
        ({"search": {"depth": {"choices": [1, 2], "when": {"hiden": 64}}}}, "Did you mean 'hidden'"),
        ({"search": SEARCH, "sweeep": {}}, "Did you mean 'sweep'"),
        ({"search": SEARCH, "sweep": {"trials": 0}}, "trials"),
        ({"search": SEARCH, "sweep": {"resources": {"cpu": 0}}}, "resources: cpu"),
        ({"search": SEARCH, "sweep": {"resources": {"gpu": 1.5}}}, "resources: gpu"),
        ({"search": SEARCH, "finetune": {"refit": True}}, "refit"),
    ],
)
def test_specs_that_cannot_run_are_refused(content: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        spec_of(content)


def test_trials_report_where_the_scheduler_decides() -> None:
    sweep = spec_of({"search": SEARCH, "sweep": {"grace_epochs": 3, "reduction_factor": 3}}).sweep
    assert rungs(50, sweep) == (3, 9, 27)
    assert rungs(2, sweep) == ()
    assert rungs(50, spec_of({"search": SEARCH, "sweep": {"scheduler": "none"}}).sweep) == ()


def report(step: int, score: float) -> dict[str, Any]:
    epochs = [{"fold": 0, "epoch": step, "validation_score": score}]
    return {"step": step, "score": score, "best_epoch": step, "epochs": epochs, "seconds": 1.0}


def test_records_come_back_as_they_were_written(tiny_corpus: Corpus, tmp_path: Path) -> None:
    folder = SweepFolder(str(tmp_path), "key", tiny_corpus.store)
    assert folder.open({"spec": {}}) == {}
    folder.tracked_as("sweep", "run-1")
    trials = [
        Trial(number=0, sample={"learning_rate": 0.1, "hidden": 64}, status="failed", error="out of luck"),
        advanced(advanced(Trial(number=1, sample={"layer": "last"}), report(3, 0.5)), report(9, 0.7)),
    ]
    for trial in trials:
        folder.keep(trial)
    again = SweepFolder(str(tmp_path), "key", tiny_corpus.store)
    assert again.open({}) == {"sweep": "run-1"}
    assert list(again.trials().values()) == trials
    assert [trial.number for trial in best_first(trials)] == [1, 0]


def test_a_trial_that_is_tried_again_begins_its_curve_anew() -> None:
    trial = advanced(advanced(Trial(number=0, sample={}), report(3, 0.5)), report(9, 0.7))
    again = advanced(trial, report(3, 0.4))
    assert (again.steps, again.score, len(again.epochs)) == (((3, 0.4),), 0.4, 1)


def test_a_trial_whose_recording_broke_off_goes_on_in_the_run_it_began(
    tiny_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker, folder = MemoryTracker(), SweepFolder(str(tmp_path), "key", tiny_corpus.store)
    trial = Trial(number=0, sample={"hidden": 8}, status="finished", score=0.5)

    def away(*_: Any, **more: Any) -> None:
        raise TrackingError("cannot connect to MLflow.")

    with tracker.run("sweep") as sweep:
        runs = TrialRuns(tracker, sweep, folder)
        for broken in ("log_params", "log_metric_rows"):
            with monkeypatch.context() as patch:
                patch.setattr(MemoryRun, broken, away)
                assert not runs.record(trial).tracked
        assert runs.record_now(trial).tracked
    assert [run.name for run in tracker.runs.values()] == ["sweep", "trial-0000"]


def test_importance_finds_the_setting_that_decides() -> None:
    space = {name: SPACE[name] for name in ("learning_rate", "hidden", "depth")}
    spec = spec_of({"search": space, "sweep": {"sampler": "random"}})
    found = importance(spec, drawn_trials(spec, 40))
    shares = dict(found.shares)
    assert shares["learning_rate"] > 0.9
    assert sum(shares.values()) == pytest.approx(1)
    assert found.left_out == ("depth",)
    assert "fewer than" in importance(spec, drawn_trials(spec, 3)).why_not


def test_winner_toml_holds_every_setting(tmp_path: Path) -> None:
    shared = {"label": 'a "quoted" name', "group": "donor", "fractions": [0.6, 0.2, 0.2], "where": "tissue = 'lung'"}
    spec = spec_of({"search": SPACE, "finetune": shared})
    trial = Trial(number=3, sample={"learning_rate": 1e-05, "hidden": 64, "depth": 2}, score=0.5)
    config = winner_config(spec, trial)
    assert config.refit
    path = write_winner(tmp_path, config, trial, command="genescale finetune …")
    assert build(FinetuneConfig, tomllib.loads(path.read_text(encoding="utf-8"))) == config
    several = FinetuneConfig(tasks=(TaskTarget(label="a"), TaskTarget(label="b", kind="number", weight=0.5)))
    path = write_winner(tmp_path, several, trial, command="")
    assert build(FinetuneConfig, tomllib.loads(path.read_text(encoding="utf-8"))) == several
    trained = winner_config(spec, Trial(number=1, sample={"encoder": "trained"}))
    assert not trained.refit
