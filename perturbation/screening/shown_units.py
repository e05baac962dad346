"""What is seen of a screen while it runs: progress with rate and time left, and the tracked run."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import polars as pl

from genescale.perturbation.screening.plan import Plan
from genescale.perturbation.screening.results import ScreenReport
from genescale.perturbation.screening.spec import ScreenConfig
from genescale.platform.progress import Progress, clock
from genescale.platform.runs import Run, Tracker, flat
from genescale.training.lineage import code_version

METRICS_EVERY_S = 10.0
LONGEST_PARAM = 400


class ShownUnits:
    """Progress in (cell, edit) pairs, with the rate of this run and the time that is left."""

    def __init__(self, plan: Plan, reused: set[int], progress: Progress, run: Run | None) -> None:
        units = plan.pieces.group_by("unit").agg(
            (pl.col("stop") - pl.col("start")).sum().alias("pairs"), pl.sum("tokens")
        )
        self.work = {
            unit: (pairs, tokens) for unit, pairs, tokens in units.select("unit", "pairs", "tokens").iter_rows()
        }
        self.progress, self.run = progress, run
        self.began = self.logged = time.monotonic()
        self.units_done, self.pairs_done, self.tokens_done = len(reused), 0, 0
        self.tokens_left = sum(tokens for unit, (_, tokens) in self.work.items() if unit not in reused)
        progress.start(plan.n_pairs, "cell-edit pairs")
        progress.advance(sum(self.work[unit][0] for unit in reused))

    def done(self, unit: int) -> None:
        """Say that a unit is complete."""
        pairs, tokens = self.work[unit]
        now = time.monotonic()
        self.units_done += 1
        self.pairs_done += pairs
        self.tokens_done += tokens
        self.tokens_left -= tokens
        took_s = max(now - self.began, 1e-9)
        rate, left_s = self.pairs_done / took_s, self.tokens_left * took_s / max(self.tokens_done, 1)
        self.progress.advance(pairs, note=f"{rate:,.0f} pairs/s, {clock(left_s)} left")
        if self.run is not None and now - self.logged >= METRICS_EVERY_S:
            self.logged = now
            self.run.log_metrics({"pairs_per_s": rate, "seconds_left": left_s}, step=self.units_done)


@contextlib.contextmanager
def tracked(
    tracker: Tracker | None, plan: Plan, config: ScreenConfig, *, uri: str, resume: str
) -> Iterator[Run | None]:
    """The run of a screen, the same again when it is continued; None without a tracker."""
    if tracker is None:
        yield None
        return
    origin = {name: value for name, value in plan.identity.items() if name != "config"}
    settings: Mapping[str, Any] = {name: value for name, value in asdict(config).items() if name != "compute"}
    with tracker.run("perturb screen", tags={"stage": "screen", **code_version()}, resume=resume) as run:
        # A run that goes on may do so with other settings of speed, which parameters would not allow.
        run.set_tags({f"compute.{name}": value for name, value in asdict(config.compute).items()})
        params = flat({**origin, **settings, "output": uri, "cells": len(plan.cells), "units": plan.n_units})
        run.log_params({name: _shortened(value) for name, value in params.items()})
        run.log_text(json.dumps(plan.identity, indent=2), "screen/_plan.json")
        yield run


def _shortened(value: str) -> str:
    """A text that a tracker takes as a parameter: lists of thousands of genes stand in the run's files."""
    return value if len(value) <= LONGEST_PARAM else f"{value[:LONGEST_PARAM]}… ({len(value):,} characters)"


def measured(report: ScreenReport) -> dict[str, float]:
    """The numbers of a finished screen that are compared between runs."""
    counted = ("cells", "edits", "pairs", "edited", "absent", "undefined", "controls", "sequences", "units")
    numbers = {name: float(getattr(report, f"n_{name}")) for name in counted}
    numbers |= {"worker_seconds": report.worker_seconds}
    if report.worker_seconds:
        numbers["sequences_per_worker_second"] = report.n_sequences / report.worker_seconds
    return numbers
