"""Measuring a training while it runs, and noticing when its loss is no number.

Sums of steps stay on the device until they are asked for, so that no step waits for the device.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from genescale.platform.errors import TrainingError
from genescale.training.batches import BatchPlan, CellSource, StepBatch
from genescale.training.engine import Engine
from genescale.training.flops import Utilisation, Work

Row = tuple[int, dict[str, float]]
"""(steps done, named measurements)."""
CELLS_NAMED = 20


@dataclass
class Meter:
    """Sums of the steps since the last rows."""

    engine: Engine
    source: CellSource
    plan: BatchPlan
    utilisation: Utilisation | None = None
    """What is needed to say how much of the devices is used; None leaves it out."""
    accuracy: str = "masked_accuracy"
    """Name of the share that was right; empty where nothing is right or wrong."""
    all_tokens: int = 0
    all_seconds: float = 0.0
    all_waited: float = 0.0
    _began: float = field(default_factory=time.perf_counter)
    _waited: float = 0.0
    _paused: float = 0.0
    _batches: list[tuple[int, int]] = field(default_factory=list)
    _work: Work = field(default_factory=Work)
    _all_work: Work = field(default_factory=Work)
    _sums: list[torch.Tensor] = field(default_factory=list)
    _lanes: list[torch.Tensor] = field(default_factory=list)

    def waiting(self, batches: Iterator[StepBatch]) -> Iterator[StepBatch]:
        """The same batches, with the time spent waiting for them counted."""
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - began
            if batch is None:
                return
            yield batch

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time in this block is not training time."""
        began = time.perf_counter()
        yield
        self._paused += time.perf_counter() - began

    def add(self, batch: StepBatch, sums: torch.Tensor) -> None:
        """Count one step."""
        self._batches.append((batch.step, batch.epoch))
        self._work += Work(tokens=batch.tokens, squares=batch.squares, masked=batch.masked)
        self._sums.append(sums)
        self._lanes.append(self.engine.lane_losses())

    def rows(self) -> list[Row]:
        """One row for each step since the last call; rates are of that whole stretch. Every worker must call it.

        Raises TrainingError, with the step and its cells, when a loss or the last gradient is no number.
        """
        totals = self.engine.total(torch.stack(self._sums))
        norm = self.engine.gradient_norm()
        self._refuse_what_is_no_number(totals, norm)
        seconds = time.perf_counter() - self._began - self._paused
        tokens = self._work.tokens
        shared = {"tokens_per_s": tokens / seconds, "data_wait_share": min(1.0, self._waited / seconds)}
        if self.utilisation is not None:
            shared["mfu"] = self.utilisation.share(self._work, seconds)
        rows = [
            (step, self._step_values(step, epoch, total))
            for (step, epoch), total in zip(self._batches, totals, strict=True)
        ]
        rows[-1][1].update(shared)
        if norm is not None:
            rows[-1][1]["gradient_norm"] = norm
        self.all_tokens, self.all_seconds = self.all_tokens + tokens, self.all_seconds + seconds
        self.all_waited, self._all_work = self.all_waited + self._waited, self._all_work + self._work
        self._began, self._waited, self._paused = time.perf_counter(), 0.0, 0.0
        self._batches, self._sums, self._lanes, self._work = [], [], [], Work()
        return rows

    @property
    def mfu(self) -> float | None:
        """Model FLOP utilisation of all steps so far; None when the peak is not known or nothing was done."""
        if self.utilisation is None or not self.all_seconds:
            return None
        return self.utilisation.share(self._all_work, self.all_seconds)

    def _refuse_what_is_no_number(self, totals: np.ndarray, norm: float | None) -> None:
        bad = np.flatnonzero(~np.isfinite(totals[:, 0]))
        if not len(bad) and (norm is None or math.isfinite(norm)):
            return
        index = int(bad[0]) if len(bad) else len(totals) - 1
        step = self._batches[index][0]
        what = f"the loss of step {step} is {totals[index, 0]}"
        lanes = self._lanes_without_a_number(self._lanes[index]) if len(bad) else []
        if not len(bad):
            what = f"the gradient of step {step} has the norm {norm}"
        elif len(lanes) == self.plan.lanes and step > 1:
            # One bad cell spoils one lane. All of them together say that the weights were no numbers any more.
            what, step, lanes = f"{what} in every lane, so step {step - 1} broke the weights", step - 1, []
        cells = self._cells(step, lanes or range(self.plan.lanes))
        named = ", ".join(f"{dataset} row {row}" for dataset, row in self.source.origin(cells[:CELLS_NAMED]))
        more = f" and {len(cells) - CELLS_NAMED} more" if len(cells) > CELLS_NAMED else ""
        raise TrainingError(
            f"{what}. Its cells: {named}{more}.",
            where=f"step {step}",
            fix="Look at these cells, or lower optimizer.learning_rate or raise its warm-up.",
        )

    def _lanes_without_a_number(self, own_losses: torch.Tensor) -> list[int]:
        losses = torch.zeros(self.plan.lanes, device=own_losses.device)
        losses[self.engine.rank :: self.engine.workers] = own_losses
        return [int(lane) for lane in np.flatnonzero(~np.isfinite(self.engine.total(losses)))]

    def _cells(self, step: int, lanes: Iterable[int]) -> list[int]:
        epoch, place = self.plan.locate(step - 1)
        return [int(cell) for lane in lanes for cell in self.plan.epoch(epoch).micro_batch(place, lane)]

    def _step_values(self, step: int, epoch: int, total: np.ndarray) -> dict[str, float]:
        loss, correct, weight = (float(value) for value in total)
        values = {
            "loss": loss / weight,
            "learning_rate": self.engine.learning_rate(step),
            "epoch": float(epoch),
        }
        return values | ({self.accuracy: correct / weight} if self.accuracy else {})
