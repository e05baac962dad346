"""The training loop: plan, steps, measurements and checkpoints, without Ray and without a tracker.

`train_loop` runs the same on one process with `TorchEngine` and on each of many workers with `DeepSpeedEngine`. What it
has to say goes to two callbacks: rows of measurements, and the moment to write a checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from genescale.platform.errors import IntegrityError
from genescale.training.batches import (
    BatchPlan,
    CellSource,
    StepBatch,
    evaluation_batches,
    hold_out,
    prefetch,
    step_batches,
)
from genescale.training.engine import Engine
from genescale.training.masking import Masking
from genescale.training.recipe import PretrainConfig

Row = tuple[int, dict[str, float]]
"""(steps done, named measurements)."""
STATE_FILE = "training.json"


@dataclass(frozen=True, kw_only=True, eq=False)
class RunPlan:
    """What a config means for one source of cells."""

    training: BatchPlan
    held_out: BatchPlan | None
    """None when the corpus is too small to keep cells back."""
    masking: Masking
    held_out_masking: Masking
    """Always the published shares, so that held-out losses of different recipes can be compared."""
    total_steps: int

    @classmethod
    def of(cls, config: PretrainConfig, source: CellSource) -> RunPlan:
        """Plan a run; SettingsError or CorpusError when config and cells do not fit together."""
        trained, held_out = hold_out(len(source.lengths), config.held_out_cells, seed=config.seed)

        def batch_plan(cells: np.ndarray) -> BatchPlan:
            return BatchPlan(
                lengths=source.lengths,
                cells=cells,
                seed=config.seed,
                token_budget=config.token_budget,
                lanes=config.lanes,
            )

        training = batch_plan(trained)
        return cls(
            training=training,
            held_out=batch_plan(held_out) if len(held_out) else None,
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


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Quality on cells that are never trained on, always with the same genes masked."""

    loss: float
    masked_accuracy: float


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """How far a run is: what a checkpoint remembers beside weights and optimiser."""

    steps: int = 0
    before: HeldOut | None = None
    """Held-out quality of the untrained model; None as well when no cells are held out."""
    after: HeldOut | None = None
    finished: bool = False

    def write(self, folder: Path) -> None:
        """Put it into a checkpoint folder."""
        (folder / STATE_FILE).write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> TrainState:
        """Take it from a checkpoint folder; IntegrityError when it is not there or not whole."""
        try:
            values = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
            parts = {name: HeldOut(**values[name]) if values[name] else None for name in ("before", "after")}
            return cls(steps=int(values["steps"]), finished=bool(values["finished"]), **parts)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise IntegrityError(f"not a checkpoint: {error}.", where=str(folder / STATE_FILE)) from error


@dataclass(frozen=True, kw_only=True)
class LoopResult:
    """What a loop did."""

    state: TrainState
    tokens: int
    """Trained on by all workers, in this call."""
    seconds: float
    """Spent on steps, without measurements on held-out cells and checkpoints."""

    @property
    def tokens_per_s(self) -> float:
        """Real tokens (there is no padding) per second; 0 when no step was left to do."""
        return self.tokens / self.seconds if self.seconds else 0.0


def train_loop(
    engine: Engine,
    source: CellSource,
    plan: RunPlan,
    config: PretrainConfig,
    *,
    start: TrainState = TrainState(),
    on_rows: Callable[[list[Row]], None] = lambda rows: None,
    on_checkpoint: Callable[[TrainState], None] = lambda state: None,
) -> LoopResult:
    """Train from `start` to the end of the plan. Every worker calls it, and it calls back on every worker."""
    state = start
    if state.before is None:
        state = dataclasses.replace(state, before=evaluate(engine, source, plan))
        on_rows(_held_out_rows(state.steps, state.before))
    meter = _Meter(engine)
    batches = prefetch(
        step_batches(
            source,
            plan.training,
            plan.masking,
            rank=engine.rank,
            workers=engine.workers,
            first=state.steps,
            last=plan.total_steps,
        )
    )
    with contextlib.closing(batches):
        for batch in meter.waiting(batches):
            meter.add(batch, engine.step(batch))
            state = dataclasses.replace(state, steps=batch.step)
            last = batch.step == plan.total_steps
            checkpoint_due = batch.step % config.checkpoint_every == 0 and not last
            # Rows before a checkpoint: steps behind it are not done again, so what they measured must be out.
            if last or checkpoint_due or batch.step % config.log_every == 0:
                on_rows(meter.rows())
            if config.evaluate_every and batch.step % config.evaluate_every == 0 and not last:
                with meter.paused():
                    on_rows(_held_out_rows(batch.step, evaluate(engine, source, plan)))
            if checkpoint_due:
                with meter.paused():
                    on_checkpoint(state)
    if not state.finished:
        state = dataclasses.replace(state, after=evaluate(engine, source, plan), finished=True)
        on_rows(_held_out_rows(state.steps, state.after))
        on_checkpoint(state)
    return LoopResult(state=state, tokens=meter.all_tokens, seconds=meter.all_seconds)


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


@dataclass
class _Meter:
    """Sums of the steps since the last rows; they stay on the device until then, so that no step waits for it."""

    engine: Engine
    all_tokens: int = 0
    all_seconds: float = 0.0
    _began: float = field(default_factory=time.perf_counter)
    _waited: float = 0.0
    _paused: float = 0.0
    _batches: list[tuple[int, int, int]] = field(default_factory=list)
    _sums: list[torch.Tensor] = field(default_factory=list)

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
        self._batches.append((batch.step, batch.epoch, batch.tokens))
        self._sums.append(sums)

    def rows(self) -> list[Row]:
        """One row for each step since the last call; rates are of that whole stretch."""
        totals = self.engine.total(torch.stack(self._sums))
        seconds = time.perf_counter() - self._began - self._paused
        tokens = sum(tokens for _, _, tokens in self._batches)
        shared = {"tokens_per_s": tokens / seconds, "data_wait_share": min(1.0, self._waited / seconds)}
        rows = [
            (step, self._step_values(step, epoch, total))
            for (step, epoch, _), total in zip(self._batches, totals, strict=True)
        ]
        rows[-1][1].update(shared)
        norm = self.engine.gradient_norm()
        if norm is not None:
            rows[-1][1]["gradient_norm"] = norm
        self.all_tokens, self.all_seconds = self.all_tokens + tokens, self.all_seconds + seconds
        self._began, self._waited, self._paused = time.perf_counter(), 0.0, 0.0
        self._batches, self._sums = [], []
        return rows

    def _step_values(self, step: int, epoch: int, total: np.ndarray) -> dict[str, float]:
        nll, correct, masked = (float(value) for value in total)
        return {
            "loss": nll / masked,
            "masked_accuracy": correct / masked,
            "learning_rate": self.engine.learning_rate(step),
            "epoch": float(epoch),
        }


def curve(rows: Mapping[int, Mapping[str, float]], name: str) -> tuple[tuple[int, float], ...]:
    """(step, value) of one measurement, by rising step."""
    return tuple((step, rows[step][name]) for step in sorted(rows) if name in rows[step])
