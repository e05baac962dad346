"""One trial by itself, without Ray: what it fits, and what it reports when."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from genescale.ingestion.corpus import Corpus
from genescale.platform.bundle import Bundle
from genescale.training.fitting.finetune import fit_frozen, prepare, row_vectors
from genescale.training.sweeps.sweep_spec import TuneSpec, spec_of
from genescale.training.sweeps.trial import TrialInputs, fold_rows, run_trial, shared_vectors, vector_kind

SHARED = {"epochs": 12, "patience": 0, "fractions": [0.6, 0.2, 0.2], "cells_per_batch": 32, "device": "cpu"}
SEARCH = {"learning_rate": {"low": 1e-4, "high": 1e-1}}


def make_spec(finetune: dict[str, Any] | None = None, **more: Any) -> TuneSpec:
    return spec_of({"search": SEARCH, "finetune": {**SHARED, **(finetune or {})}, **more})


def make_inputs(spec: TuneSpec, bundle: Bundle, corpus: Corpus) -> TrialInputs:
    task = prepare(bundle, corpus, spec.finetune)
    folds, vectors_rd = fold_rows(task), row_vectors(bundle, corpus, task, spec.finetune)
    return TrialInputs(
        spec=spec,
        width=task.specs[0].width,
        classes=tuple(head.classes for head in task.specs),
        folds=folds,
        vectors={vector_kind(spec.finetune): shared_vectors(vectors_rd, folds)},
        corpus=corpus,
        receive=lambda: SimpleNamespace(bundle=bundle),
    )


def reports_of(inputs: TrialInputs, **sample: Any) -> list[dict[str, Any]]:
    reports: list[dict[str, Any]] = []
    run_trial({"sample": sample}, inputs=inputs, report=reports.append)
    return reports


def test_a_trial_fits_what_finetune_fits_and_reports_at_its_rungs(tiny_bundle: Bundle, tiny_corpus: Corpus) -> None:
    spec = make_spec()
    reports = reports_of(make_inputs(spec, tiny_bundle, tiny_corpus), learning_rate=0.01)
    assert [report["step"] for report in reports] == [3, 9, 12]
    assert [report["ended"] for report in reports] == [False, False, True]
    config = spec.trial_config({"learning_rate": 0.01})
    task = prepare(tiny_bundle, tiny_corpus, config)
    fitted = fit_frozen(task, row_vectors(tiny_bundle, tiny_corpus, task, config), config, 0)
    curve = [row["validation_score"] for report in reports for row in report["epochs"]]
    assert curve == pytest.approx([epoch.validation_score for epoch in fitted.history])
    assert reports[-1]["best_epoch"] == fitted.best_epoch
    assert reports[-1]["score"] == pytest.approx(max(curve))


def test_folds_are_reported_one_by_one_with_their_mean(tiny_bundle: Bundle, tiny_corpus: Corpus) -> None:
    inputs = make_inputs(make_spec({"folds": 3, "epochs": 4}), tiny_bundle, tiny_corpus)
    reports = reports_of(inputs, learning_rate=0.01)
    assert [(report["step"], report["ended"]) for report in reports] == [(1, False), (2, False), (3, True)]
    best = [max(row["validation_score"] for row in report["epochs"]) for report in reports]
    assert [report["score"] for report in reports] == pytest.approx(
        [sum(best[: n + 1]) / (n + 1) for n in range(len(best))]
    )


def test_genes_and_nearest_neighbours(tiny_bundle: Bundle, tiny_corpus: Corpus, tmp_path: Path) -> None:
    genes = tmp_path / "genes.csv"
    rows = [f"GENE{i},{'marker' if i < 24 else 'other'}" for i in (*range(24), *range(40, 80))]
    genes.write_text("gene,class\n" + "\n".join(rows), encoding="utf-8")
    spec = make_spec(
        {"unit": "genes", "label": "marker", "genes": str(genes), "split": "random", "folds": 2, "epochs": 3}
    )
    inputs = make_inputs(spec, tiny_bundle, tiny_corpus)
    assert list(inputs.vectors) == [("second_to_last", "token")]
    assert reports_of(inputs, learning_rate=0.01)[-1]["score"] > 0.3
    near = dataclasses.replace(inputs, spec=make_spec({**dataclasses.asdict(spec.finetune), "head": "nearest"}))
    assert reports_of(near, learning_rate=0.01)[-1]["ended"]


@pytest.mark.parametrize("encoder", ["trained", "lora"])
def test_an_encoder_is_trained_in_the_trial(tiny_bundle: Bundle, tiny_corpus: Corpus, encoder: str) -> None:
    spec = make_spec({"encoder": encoder, "frozen_layers": 0, "epochs": 3, "max_cells": 120})
    frozen = make_inputs(make_spec({"epochs": 3, "max_cells": 120}), tiny_bundle, tiny_corpus)
    inputs = dataclasses.replace(frozen, spec=spec, vectors={})
    reports = reports_of(inputs, learning_rate=0.01)
    assert [row["epoch"] for report in reports for row in report["epochs"]] == [1, 2, 3]
    assert reports[-1]["ended"]
