"""The training loop: plan, steps, measurements and checkpoints, without Ray and without a tracker.

`train_loop` runs the same on one process with `TorchEngine` and on each of many workers with `DeepSpeedEngine`. What it
has to say goes to two callbacks: rows of measurements, and the moment to write a checkpoint. What is trained is said by
a `Plan` (which batches, what is measured between them) and a `State` (what is remembered): those of pretraining are
here, those of fine-tuning in `fitting/encoder_plan.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from genescale.platform.errors import IntegrityError
from genescale.training.batches import (
    BatchPlan,
    CellSource,
    StepBatch,
    evaluation_batches,
    prefetch,
    step_batches,
)
from genescale.training.cells import HeldOutSplit, hold_out
from genescale.training.engine import Engine
from genescale.training.flops import Utilisation
from genescale.training.masking import Masking
from genescale.training.meter import Meter
from genescale.training.meter import Row as Row
from genescale.training.recipe import PretrainConfig


class State(Protocol):
    """How far a run is: what a checkpoint remembers beside weights and optimiser."""

    @property
    def steps(self) -> int:
        """Optimiser steps done."""

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""

    @property
    def best(self) -> float | None:
        """Changes when what was just measured is the best of the run; such a state is worth a checkpoint."""

    def after(self, step: int) -> Any:
        """The state after one more step."""

    def noted(self, rows: list[Row]) -> Any:
        """The state when these rows were handed over."""

    def ended(self) -> Any:
        """The state of a run with nothing left to do."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""


AnyState = TypeVar("AnyState", bound=State)


class Plan(Protocol):
    """What is trained on, and what is measured between the steps."""

    @property
    def training(self) -> BatchPlan:
        """The cells that are trained on."""

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""

    @property
    def ends(self) -> Container[int]:
        """Steps after which a measurement is due beside those of the rhythm."""

    @property
    def accuracy(self) -> str:
        """Name of the share that the steps got right; empty where nothing is right or wrong."""

    def batches(self, source: CellSource, *, rank: int, workers: int, first: int) -> Iterator[StepBatch]:
        """The optimiser steps from `first` + 1 on as one worker sees them."""

    def begin(self, engine: Engine, source: CellSource, state: Any) -> tuple[Any, list[Row]]:
        """The state before the first step, and what was measured for it. Every worker calls it."""

    def measure(self, engine: Engine, source: CellSource, state: Any) -> tuple[Any, list[Row]]:
        """The state with a measurement, and its rows. Every worker calls it."""

    def gives_up(self, state: Any) -> bool:
        """Whether more steps would not help."""


class Rhythm(Protocol):
    """How often something is due, in steps; 0 is never."""

    @property
    def log_every(self) -> int: ...  # noqa: D102

    @property
    def evaluate_every(self) -> int: ...  # noqa: D102

    @property
    def checkpoint_every(self) -> int: ...  # noqa: D102


@dataclass(frozen=True, kw_only=True, eq=False)
class RunPlan:
    """What a config of pretraining means for one source of cells."""

    training: BatchPlan
    held_out: BatchPlan | None
    """None when the corpus is too small to keep cells back."""
    masking: Masking
    held_out_masking: Masking
    """Always the published shares, so that held-out losses of different recipes can be compared."""
    total_steps: int
    split: HeldOutSplit
    ends: Container[int] = ()
    accuracy: str = "masked_accuracy"

    @classmethod
    def of(cls, config: PretrainConfig, source: CellSource) -> RunPlan:
        """Plan a run; SettingsError or CorpusError when config and cells do not fit together."""
        split = hold_out(len(source.lengths), config.held_out_cells, seed=config.seed, donors=source.donors)

        def batch_plan(cells: np.ndarray) -> BatchPlan:
            return BatchPlan(
                lengths=source.lengths,
                cells=cells,
                seed=config.seed,
                token_budget=config.token_budget,
                lanes=config.lanes,
            )

        training = batch_plan(split.trained)
        return cls(
            training=training,
            split=split,
            held_out=batch_plan(split.held_out) if len(split.held_out) else None,
            masking=Masking(
                vocabulary=source.vocabulary,
                seed=config.seed,
                fraction=config.mask_fraction,
                mask_token_share=config.mask_token_share,
                random_gene_share=config.random_gene_share,
            ),
            held_out_masking=Masking(vocabulary=source.vocabulary, seed=config.seed),
            total_steps=config.steps or training.n_steps(config.epochs),
        )

    def batches(self, source: CellSource, *, rank: int, workers: int, first: int) -> Iterator[StepBatch]:
        """The optimiser steps from `first` + 1 on as one worker sees them."""
        place = {"rank": rank, "workers": workers}
        return step_batches(source, self.training, self.masking, **place, first=first, last=self.total_steps)

    def begin(self, engine: Engine, source: CellSource, state: TrainState) -> tuple[TrainState, list[Row]]:
        """Quality of the untrained model."""
        if state.before is not None:
            return state, []
        before = evaluate(engine, source, self)
        state = dataclasses.replace(state, before=before, best_loss=before.loss if before else None)
        return state, _held_out_rows(state.steps, before)

    def measure(self, engine: Engine, source: CellSource, state: TrainState) -> tuple[TrainState, list[Row]]:
        """Quality on the held-out cells."""
        state = state.measured(evaluate(engine, source, self))
        return state, _held_out_rows(state.steps, state.held_out)

    def gives_up(self, state: TrainState) -> bool:
        """Pretraining takes all its steps."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """Cells on each side and how they were told apart, for tracking and the model card."""
        return {
            "trained_cells": len(self.split.trained),
            "held_out_cells_found": len(self.split.held_out),
            "left_out_cells": self.split.left_out,
            "held_out_by": "donor" if self.split.by_donor else "cell",
        }


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Quality on cells that are never trained on, always with the same genes masked."""

    loss: float
    masked_accuracy: float


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """How far a pretraining run is."""

    steps: int = 0
    before: HeldOut | None = None
    """Held-out quality of the untrained model; None as well when no cells are held out."""
    held_out: HeldOut | None = None
    """Held-out quality after exactly these steps; None when it was not measured there."""
    best_loss: float | None = None
    """Lowest held-out loss of the run so far."""
    finished: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainState:
        """The state that `to_dict` gave; IntegrityError when something is missing."""
        try:
            parts = {name: HeldOut(**values[name]) if values[name] else None for name in ("before", "held_out")}
            best = values["best_loss"]
            return cls(steps=int(values["steps"]), finished=bool(values["finished"]), best_loss=best, **parts)
        except (KeyError, TypeError, ValueError) as error:
            raise IntegrityError(f"is no state of a training: {error}.", where="checkpoint") from error

    def measured(self, held_out: HeldOut | None) -> TrainState:
        """The same state with what was just measured."""
        losses = [loss for loss in (self.best_loss, held_out.loss if held_out else None) if loss is not None]
        return dataclasses.replace(self, held_out=held_out, best_loss=min(losses, default=None))

    @property
    def best(self) -> float | None:
        """Lowest held-out loss of the run so far."""
        return self.best_loss

    def after(self, step: int) -> TrainState:
        """The state after one more step, where nothing was measured yet."""
        return dataclasses.replace(self, steps=step, held_out=None)

    def noted(self, rows: list[Row]) -> TrainState:
        """Pretraining remembers no rows."""
        return self

    def ended(self) -> TrainState:
        """The state of a finished run."""
        return dataclasses.replace(self, finished=True)


@dataclass(frozen=True, kw_only=True)
class LoopResult:
    """What a loop did."""

    state: Any
    """Of the type it was started with."""
    tokens: int
    """Trained on by all workers, in this call."""
    seconds: float
    """Spent on steps, without measurements on held-out cells and checkpoints."""
    waited_s: float = 0.0
    """Of these, spent waiting for batches."""
    mfu: float | None = None
    """Model FLOP utilisation; None when it was not asked for or no step was left to do."""

    @property
    def tokens_per_s(self) -> float:
        """Real tokens (there is no padding) per second; 0 when no step was left to do."""
        return self.tokens / self.seconds if self.seconds else 0.0


def train_loop(
    engine: Engine,
    source: CellSource,
    plan: Plan,
    rhythm: Rhythm,
    *,
    start: AnyState = TrainState(),  # type: ignore[assignment]
    on_rows: Callable[[list[Row]], None] = lambda rows: None,
    on_checkpoint: Callable[[AnyState], None] = lambda state: None,
    should_stop: Callable[[], bool] = lambda: False,
    utilisation: Utilisation | None = None,
) -> LoopResult:
    """Train from `start` to the end of the plan, or until a worker's `should_stop` says so where measurements are due.

    Every worker calls it, and it calls back on every worker. Raises TrainingError, with the step and its cells, when
    the loss is no number.
    """
    state, rows = plan.begin(engine, source, start)
    on_rows(rows)
    meter = Meter(engine, source, plan.training, utilisation, accuracy=plan.accuracy)
    batches = prefetch(plan.batches(source, rank=engine.rank, workers=engine.workers, first=state.steps))
    stopped = state.finished
    with contextlib.closing(batches):
        for batch in meter.waiting(batches if not stopped else iter(())):
            meter.add(batch, engine.step(batch))
            state = state.after(batch.step)
            last = batch.step == plan.total_steps
            due = _Due.at(batch.step, rhythm, plan.ends)
            # Rows before a checkpoint: steps behind it are not done again, so what they measured must be out.
            if last or due.anything:
                rows = meter.rows()
                on_rows(rows)
                state = state.noted(rows)
                stopped = not last and bool(engine.total(torch.tensor([float(should_stop())]))[0])
            if last:
                break
            best_before = state.best
            if due.evaluation:
                with meter.paused():
                    state, rows = plan.measure(engine, source, state)
                    on_rows(rows)
                if plan.gives_up(state):
                    state, stopped = state.ended(), True
            if due.checkpoint or stopped or state.best != best_before:
                with meter.paused():
                    on_checkpoint(state)
            if stopped:
                break
    if not stopped:
        state, rows = plan.measure(engine, source, state)
        on_rows(rows)
        state = state.ended()
        on_checkpoint(state)
    return LoopResult(
        state=state, tokens=meter.all_tokens, seconds=meter.all_seconds, waited_s=meter.all_waited, mfu=meter.mfu
    )


@dataclass(frozen=True, kw_only=True)
class _Due:
    """What is due after a step."""

    rows: bool
    evaluation: bool
    checkpoint: bool

    @classmethod
    def at(cls, step: int, rhythm: Rhythm, ends: Container[int]) -> _Due:
        def due(every: int) -> bool:
            return bool(every) and step % every == 0

        return cls(
            rows=due(rhythm.log_every),
            evaluation=due(rhythm.evaluate_every) or step in ends,
            checkpoint=due(rhythm.checkpoint_every),
        )

    @property
    def anything(self) -> bool:
        return self.rows or self.evaluation or self.checkpoint


def evaluate(engine: Engine, source: CellSource, plan: RunPlan) -> HeldOut | None:
    """Loss and accuracy on the held-out cells; None when there are none. Every worker must call it."""
    if plan.held_out is None:
        return None
    batches = evaluation_batches(source, plan.held_out, plan.held_out_masking, rank=engine.rank, workers=engine.workers)
    sums = torch.stack([engine.evaluate(batch.micro_batches) for batch in prefetch(batches)]).sum(0)
    nll, correct, masked = engine.total(sums)
    return HeldOut(loss=float(nll / masked), masked_accuracy=float(correct / masked))


def _held_out_rows(step: int, measured: HeldOut | None) -> list[Row]:
    if measured is None:
        return []
    return [(step, {"held_out_loss": measured.loss, "held_out_accuracy": measured.masked_accuracy})]


def curve(rows: Mapping[int, Mapping[str, float]], name: str) -> tuple[tuple[int, float], ...]:
    """(step, value) of one measurement, by rising step."""
    return tuple((step, rows[step][name]) for step in sorted(rows) if name in rows[step])
