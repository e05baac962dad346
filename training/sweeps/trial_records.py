"""What is known of each trial, and the folder that keeps it: enough to go on with a sweep after any kill.

The folder of a sweep holds `sweep.json` (what is swept, and its tracked runs) and one small JSON file for each trial,
written when the trial is drawn, at each of its reports and at its end. A trial whose file says that it ended is never
run again. The files are plain text, the same on a disk and in object storage, whatever version of Ray wrote them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from genescale.platform.errors import IntegrityError, NotFoundError
from genescale.platform.settings import build
from genescale.platform.storage import Store, join

Status = Literal["running", "finished", "stopped", "failed"]
SWEEP_JSON, TRIALS = "sweep.json", "trials"
SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One trial of a sweep."""

    number: int
    sample: Mapping[str, Any]
    """The settings it drew."""
    status: Status = "running"
    """`finished` ran to its end, `stopped` was cut short by the scheduler, `failed` has an `error`."""
    epochs: tuple[Mapping[str, Any], ...] = ()
    """The learning curve: measurements of each epoch by name, with `fold` and `epoch`; None for what was no number."""
    steps: tuple[tuple[int, float], ...] = ()
    """What the scheduler saw: (epoch, or folds done; the best score up to then)."""
    score: float | None = None
    """Best validation score: macro F1, or R2 for numbers; with folds the mean over them."""
    best_epoch: int = 0
    seconds: float = 0.0
    attempts: int = 0
    """How often it was started."""
    error: str = ""
    run_id: str = ""
    """The tracker's run of it."""
    tracked: bool = False
    """Whether that run is complete."""

    @property
    def name(self) -> str:
        """Its name in tables and in the tracker."""
        return f"trial-{self.number:04d}"

    @property
    def ended(self) -> bool:
        """Whether nothing of it is left to do."""
        return self.status != "running"

    @property
    def rank(self) -> tuple[bool, float, int]:
        """Sorts the best first, failed ones last, equal ones by number."""
        score = -math.inf if self.score is None else self.score
        return (self.status == "failed", -score, self.number)


def best_first(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """The trials by their best validation score; failed ones last."""
    return tuple(sorted(trials, key=lambda trial: trial.rank))


class SweepFolder:
    """The folder of one sweep. `key` is the digest of everything that decides it."""

    def __init__(self, uri: str, key: str, store: Store) -> None:
        self.uri, self.key, self.store = uri, key, store

    def open(self, content: Mapping[str, Any]) -> dict[str, str]:
        """Begin the sweep, or go on with it; gives the ids of its tracked runs by name, none for a new one.

        Raises IntegrityError when the folder holds another sweep.
        """
        try:
            stored = self._content()
        except NotFoundError:
            self._write(self._about, {"schema_version": SCHEMA_VERSION, "key": self.key, "runs": {}, **content})
            return {}
        if stored.get("key") != self.key or stored.get("schema_version") != SCHEMA_VERSION:
            raise IntegrityError(
                "the folder holds another sweep.", where=self.uri, fix="Choose another folder with --sweep."
            )
        return dict(stored["runs"])

    def tracked_as(self, name: str, run_id: str) -> None:
        """Remember a tracked run by what it is of (`sweep` or `winner`)."""
        content = self._content()
        self._write(self._about, {**content, "runs": {**content["runs"], name: run_id}})

    def trials(self) -> dict[int, Trial]:
        """All trials that were drawn, by number, in rising order."""
        found = {}
        for entry in self.store.list(join(self.uri, TRIALS)):
            try:
                trial = _trial(json.loads(self.store.read(entry.uri)), where=entry.uri)
            except ValueError as error:
                raise IntegrityError(
                    "is not JSON.", where=entry.uri, fix="Delete the file: its trial runs again."
                ) from error
            found[trial.number] = trial
        return dict(sorted(found.items()))

    def keep(self, trial: Trial) -> None:
        """Write a trial's file."""
        self._write(join(self.uri, TRIALS, f"{trial.name}.json"), asdict(trial))

    @property
    def _about(self) -> str:
        return join(self.uri, SWEEP_JSON)

    def _content(self) -> dict[str, Any]:
        try:
            content: dict[str, Any] = json.loads(self.store.read(self._about))
        except ValueError as error:
            fix = "Delete the folder: the sweep starts anew."
            raise IntegrityError("is not JSON.", where=self._about, fix=fix) from error
        return content

    def _write(self, address: str, content: Mapping[str, Any]) -> None:
        self.store.write(address, json.dumps(content, indent=1, default=str).encode())


def advanced(trial: Trial, report: Mapping[str, Any]) -> Trial:
    """The trial after one more report (see `trial.py`); a trial that was tried again begins its curve anew."""
    started_again = bool(trial.steps) and report["step"] <= trial.steps[-1][0]
    epochs, steps = ((), ()) if started_again else (trial.epochs, trial.steps)
    return replace(
        trial,
        epochs=(*epochs, *report["epochs"]),
        steps=(*steps, (int(report["step"]), float(report["score"]))),
        score=float(report["score"]),
        best_epoch=int(report["best_epoch"]),
        seconds=float(report["seconds"]),
    )


def _trial(content: Mapping[str, Any], *, where: str) -> Trial:
    given = dict(content)
    epochs = tuple(given.pop("epochs", ()))
    steps = tuple((int(step), float(score)) for step, score in given.pop("steps", ()))
    return replace(build(Trial, given, where=where), epochs=epochs, steps=steps)
