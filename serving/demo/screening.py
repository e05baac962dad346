"""The demo's deletion screen, and what of a planted truth it found."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from genescale.perturbation.screening.results import read_screen
from genescale.perturbation.screening.screen import screen
from genescale.perturbation.screening.spec import CellsConfig, EditsConfig, ReadoutsConfig, ScreenConfig
from genescale.platform.progress import Progress
from genescale.serving.demo import figures
from genescale.serving.demo.page import Page
from genescale.serving.demo.plan import Demo
from genescale.serving.demo.stages import Made, bundle_of, characteristic_genes, corpus_of
from genescale.serving.demo.truth import evaluate_truth, screen_edits
from genescale.serving.demo.verdicts import headline, verdicts


def screen_deletions(demo: Demo, progress: Progress) -> Made:
    """Delete genes in cells of the corpus: the planted regulators and controls, or the atlas's characteristic genes."""
    uri, truth = demo.at("screen"), planted_truth(demo)
    report = screen(
        bundle_of(demo), corpus_of(demo), screen_config(demo, truth), out_uri=uri, store=demo.store, progress=progress
    )
    made: Made = {
        "uri": uri,
        "cells": report.n_cells,
        "edits": report.n_edits,
        "edited": report.n_edited,
        "absent": report.n_absent,
    }
    if truth:
        shifts = read_screen(uri, demo.store).gene_shifts
        assert shifts is not None, "the screen was asked for gene shifts. This is a bug."
        result = evaluate_truth(shifts, truth, seed=demo.config.seed)
        made["truth"] = {
            **dataclasses.asdict(result),
            "headline": headline(result),
            "verdicts": list(verdicts(result)),
        }
    return made


def screen_config(demo: Demo, truth: dict[str, Any]) -> ScreenConfig:
    """With a truth: its regulators, pairs and controls, and how every gene shifts; else characteristic genes."""
    seed = demo.config.seed
    if truth:
        # The truth is judged against deletions of unrelated genes, which are among the edits.
        return ScreenConfig(
            cells=CellsConfig(max_cells=demo.config.truth_cells, seed=seed),
            edits=EditsConfig(genes=screen_edits(truth), controls=0),
            readouts=ReadoutsConfig(gene_shifts=("all",)),
        )
    genes = characteristic_genes(corpus_of(demo), demo.config.screen_genes, seed=seed)
    return ScreenConfig(
        cells=CellsConfig(max_cells=demo.config.screen_cells, seed=seed), edits=EditsConfig(genes=genes, controls=0)
    )


def planted_truth(demo: Demo) -> dict[str, Any]:
    """The truth that was planted into a simulated atlas; empty for a real one."""
    uri = demo.made("atlas")["truth"]
    truth: dict[str, Any] = json.loads(demo.store.read(uri)) if uri else {}
    return truth


def describe_truth(truth: dict[str, Any], page: Page, folder: Path) -> None:
    """The section on planted truth: computed sentences, the figure and the numbers behind them."""
    page.heading("What of the planted truth was found")
    page.text(
        "The atlas was simulated, so it is known which genes each regulator drives. Deleting a regulator shifts the "
        f"embedding of every other gene; here those shifts are compared, over {truth['n_regulators']} regulators. The "
        "fold is log2 of a gene's shift over its shift under deletions that have nothing to do with it (unrelated "
        "genes and other regulators): 0 is no more than those do, 1 is twice as much."
    )
    for verdict in truth["verdicts"]:
        page.text(verdict)
    classes = truth["classes"]
    image = figures.class_shifts({name: one["fold"] for name, one in classes.items()}, folder / "truth.png")
    page.figure(image, "How a regulator's genes shift when it is deleted: mean over regulators, 95% intervals.")
    page.table(
        ["genes", "pairs", "mean shift", "log2 fold", "low", "high"],
        [
            [name, one["n_pairs"], one["shift"]["mean"], *(one["fold"][key] for key in ("mean", "low", "high"))]
            for name, one in classes.items()
        ],
    )
    page.table(
        ["compared", "difference of log2 fold", "low", "high", "regulators in which it holds", "rank AUC"],
        [
            [
                f"{one['more']} above {one['less']}",
                *(one["matched"][key] for key in ("mean", "low", "high")),
                f"{one['share_matched']:.0%}",
                one["auc_matched"],
            ]
            for one in truth["orderings"]
        ],
    )
    if pairs := truth["pairs"]:
        page.table(
            ["shared targets of a pair", "log2 fold", "low", "high"],
            [
                [name.replace("_", " "), *(one[key] for key in ("mean", "low", "high"))]
                for name, one in pairs.items()
                if isinstance(one, dict)
            ],
        )
