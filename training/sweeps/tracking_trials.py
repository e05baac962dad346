"""A sweep in the tracker: one run for the sweep, a child for every trial, and one for the winner, each exactly once.

The driver alone writes. The id of a run is kept in the sweep's folder as soon as there is one, so a sweep that goes on
after a kill completes the runs it began instead of adding others. A tracker that is away does not stop the trials: what
could not be recorded is recorded at the end, and only then is its error raised.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

from genescale.platform.errors import TrackingError
from genescale.platform.tracking import Run, Tracker
from genescale.training.sweeps.trial_records import SweepFolder, Trial

BEST = "best_score"


class TrialRuns:
    """Records trials as children of the run of the sweep."""

    def __init__(self, tracker: Tracker, parent: Run, folder: SweepFolder) -> None:
        self.tracker, self.parent, self.folder = tracker, parent, folder
        # A kill, or a tracker that was away, may have come between the making of a run and the note of its id.
        self.begun: Mapping[str, str] | None = tracker.children(parent.id)

    def record(self, trial: Trial) -> Trial:
        """Record an ended trial unless that is done; unchanged when the tracker is away."""
        try:
            return self.record_now(trial)
        except TrackingError:
            self.begun = None
            return trial

    def record_now(self, trial: Trial) -> Trial:
        """Record an ended trial unless that is done; raises TrackingError."""
        if trial.tracked:
            return trial
        tags = {"stage": "trial", "trial": trial.name, "status": trial.status}
        if trial.error:
            tags["error"] = trial.error[:500]
        if self.begun is None:
            self.begun = self.tracker.children(self.parent.id)
        begun = trial.run_id or self.begun.get(trial.name, "")
        run = self.tracker.run(trial.name, params=dict(trial.sample), tags=tags, parent=self.parent.id, resume=begun)
        with run as child:
            trial = replace(trial, run_id=child.id)
            self.folder.keep(trial)
            child.log_metric_rows(curve(trial))
            child.log_metrics(_totals(trial))
        trial = replace(trial, tracked=True)
        self.folder.keep(trial)
        return trial


def curve(trial: Trial) -> list[tuple[int, dict[str, float]]]:
    """The measurements of each epoch of a trial's first fold, by epoch."""
    rows = [row for row in trial.epochs if not row["fold"]]
    skipped = ("fold", "epoch")
    return [
        (int(row["epoch"]), {name: value for name, value in row.items() if name not in skipped and value is not None})
        for row in rows
    ]


def _totals(trial: Trial) -> dict[str, float]:
    found = {"epochs": float(len(trial.epochs)), "seconds": trial.seconds, "attempts": float(trial.attempts)}
    if trial.score is not None:
        found |= {BEST: trial.score, "best_epoch": float(trial.best_epoch)}
    return found


def one_run(tracker: Tracker, folder: SweepFolder, name: str, run_id: str) -> Tracker:
    """A tracker whose next run is always the same one: `run_id`, or a new one that the folder remembers as `name`."""
    return cast("Tracker", _OneRun(tracker, folder, name, run_id))


class _OneRun:
    """See `one_run`; everything but the run is the tracker's own."""

    def __init__(self, tracker: Tracker, folder: SweepFolder, name: str, run_id: str) -> None:
        self._tracker, self._folder, self._name, self._run_id = tracker, folder, name, run_id

    @contextmanager
    def run(
        self,
        name: str,
        *,
        params: Mapping[str, Any] = {},
        tags: Mapping[str, Any] = {},
        parent: str | None = None,
        resume: str = "",
    ) -> Iterator[Run]:
        """The run that was begun before, or a new one that is remembered."""
        begun = resume or self._run_id or (self._tracker.children(parent).get(name, "") if parent else "")
        with self._tracker.run(name, params=params, tags=tags, parent=parent, resume=begun) as run:
            if run.id != self._run_id:
                self._folder.tracked_as(self._name, run.id)
                self._run_id = run.id
            yield run

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tracker, name)
