"""Fine-tuning as a plan for `train_loop`: batches of labelled cells, a look at the validation part after each epoch.

Axis suffixes: `n` cells, `r` rows, `k` tokens that rows are read from, `h` heads, `c` outputs of all heads.

Cells are packed by the same batch plan as in pretraining: `lanes` micro-batches make a step, whatever the number of
workers. A step takes about `cells_per_batch` cells, fewer when a lane's share of them has more than `tokens_per_batch`
tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from genescale.platform.errors import CorpusError, IntegrityError
from genescale.platform.vocabulary import Vocabulary
from genescale.training.batches import BatchPlan, CellSource, PlannedStep, StepBatch, planned_steps, whole_epoch
from genescale.training.cells import Indices
from genescale.training.engine import Engine
from genescale.training.fitting.config import FinetuneConfig
from genescale.training.fitting.encoder_model import LabelledBatch
from genescale.training.fitting.epochs import Course, Epoch, judge
from genescale.training.fitting.examples import POOLED, Examples
from genescale.training.fitting.losses import all_row_weights, target_tensors
from genescale.training.heads.head import LinearHead
from genescale.training.heads.spec import HeadSpec
from genescale.training.meter import Row
from genescale.training.model import pack

CellsOf = Callable[[np.ndarray], Sequence[np.ndarray]]
"""From global corpus indices (n) int64 to the tokens of these cells."""
Origins = Callable[[Sequence[int]], list[tuple[str, int]]]
"""From global corpus indices to (dataset, row in its source file)."""


def by_index(indices: Sequence[int]) -> list[tuple[str, int]]:
    """The origins of a caller that knows none but the number in the corpus."""
    return [("corpus", int(index)) for index in indices]


class ExampleCells:
    """The cells of some examples as a source for the loop; a cell's number is its position in `index_n`."""

    def __init__(
        self, examples: Examples, vocabulary: Vocabulary, cells_of: CellsOf, origins: Origins = by_index
    ) -> None:
        self.vocabulary, self.lengths = vocabulary, examples.lengths_n
        self.donors: npt.NDArray[np.int32] = np.full(len(examples.index_n), -1, dtype=np.int32)
        self._index_n, self._cells_of, self._origins = examples.index_n, cells_of, origins

    def tokens(self, indices: Indices) -> list[np.ndarray]:
        """The tokens of these cells, in this order."""
        wanted = self._index_n[np.asarray(indices, dtype=np.int64)]
        return list(self._cells_of(wanted)) if len(wanted) else []

    def warm(self, indices: npt.NDArray[np.integer]) -> None:
        """A step reads its cells itself; labelled cells are few."""

    def origin(self, indices: Sequence[int]) -> list[tuple[str, int]]:
        """(dataset, row in its source file) of these cells."""
        return self._origins([int(index) for index in self._index_n[np.asarray(indices, dtype=np.int64)]])


class LabelledCells:
    """Cells with the rows that are read from each: makes micro-batches."""

    def __init__(
        self,
        examples: Examples,
        specs: Sequence[HeadSpec],
        weights_hr: np.ndarray,
        specials: Sequence[int],
        *,
        gene_dropout: float = 0.0,
    ) -> None:
        self.examples, self.weights_hr, self.gene_dropout = examples, weights_hr, gene_dropout
        self._pooling, self._specials = specs[0].pooling, np.array(sorted(specials))
        self._targets = target_tensors(examples.targets)
        self._rows_by_cell = np.argsort(examples.row_cell_r, kind="stable")
        edges = np.arange(len(examples.index_n) + 1)
        self._starts = np.searchsorted(examples.row_cell_r[self._rows_by_cell], edges)
        self.weight_n = np.bincount(
            examples.row_cell_r, weights=weights_hr.sum(0, dtype=np.float64), minlength=len(examples.index_n)
        )

    def step(self, source: CellSource, planned: PlannedStep, seed: int) -> StepBatch:
        """Read and pack the cells of a step."""
        cells = iter(source.tokens(np.concatenate(planned.lanes)))
        places = zip(planned.lanes, planned.dropout_seeds(seed), strict=True)
        lanes = []
        for chosen, dropout_seed in places:
            thinned, ranks = self._thinned([next(cells) for _ in chosen], dropout_seed)
            lanes.append(self.lane(thinned, chosen, dropout_seed, ranks))
        # What is left of the cells of all workers, on average: for the meter.
        lengths = (source.lengths[planned.all_cells] * (1 - self.gene_dropout)).astype(np.int64)
        weight = float(self.weight_n[planned.all_cells].sum())
        return StepBatch(planned.number, planned.epoch, lanes, 0, int(lengths.sum()), int((lengths**2).sum()), weight)

    def _thinned(self, cells: Sequence[np.ndarray], seed: int) -> tuple[Sequence[np.ndarray], Sequence[np.ndarray]]:
        """The cells without a random share of their genes, and the ranks of the others, which stay what they were.

        One gene at least stays in each. With ranks closed up, a gene would stand higher than in any whole cell.
        """
        if not self.gene_dropout:
            return cells, [np.arange(len(cell)) for cell in cells]
        draws = np.random.default_rng(seed)
        ranks = [np.flatnonzero(self._kept(cell, draws)) for cell in cells]
        return [cell[kept] for cell, kept in zip(cells, ranks, strict=True)], ranks

    def _kept(self, cell: np.ndarray, draws: np.random.Generator) -> npt.NDArray[np.bool_]:
        odds = draws.random(len(cell))
        is_gene = ~np.isin(cell, self._specials)
        least = odds[is_gene].min(initial=1.0)
        return ~is_gene | (odds >= self.gene_dropout) | (odds == least)

    def lane(
        self,
        cells: Sequence[np.ndarray],
        chosen: np.ndarray,
        dropout_seed: int = 0,
        ranks: Sequence[np.ndarray] | None = None,
    ) -> LabelledBatch:
        """Pack these cells; `chosen` are their positions among the examples' cells, `ranks` as `pack` takes them."""
        if not len(chosen):
            return self._empty()
        packed = pack(cells, ranks)
        starts = np.concatenate([[0], np.cumsum(packed.lengths)])
        of_cell = [self._rows_by_cell[self._starts[cell] : self._starts[cell + 1]] for cell in chosen]
        token_k, row_k, share_k = [], [], []
        n_rows = 0
        for cell, start, rows in zip(cells, starts[:-1], of_cell, strict=True):
            for row in rows:
                tokens, share = self._read(cell, int(row))
                token_k.append(tokens + start)
                row_k.append(np.full(len(tokens), n_rows))
                share_k.append(np.full(len(tokens), share, dtype=np.float32))
                n_rows += 1
        rows = np.concatenate(of_cell)
        return LabelledBatch(
            packed=packed,
            token_k=torch.from_numpy(np.concatenate(token_k)),
            row_k=torch.from_numpy(np.concatenate(row_k)),
            share_k=torch.from_numpy(np.concatenate(share_k)),
            targets=tuple(target_r[rows] for target_r in self._targets),
            weights=torch.from_numpy(self.weights_hr[:, rows]),
            rows=rows,
            dropout_seed=dropout_seed,
        )

    def _read(self, cell: np.ndarray, row: int) -> tuple[np.ndarray, float]:
        """(positions in the cell, share of each) of the tokens that a row is read from."""
        token = int(self.examples.row_token_r[row])
        if token != POOLED:
            return np.array([token]), 1.0
        if self._pooling != "mean_genes":
            return np.array([0]), 1.0
        genes = np.flatnonzero(~np.isin(cell, self._specials))
        return genes, 1.0 / max(1, len(genes))

    def _empty(self) -> LabelledBatch:
        one = torch.zeros(1, dtype=torch.int64)
        return LabelledBatch(
            packed=pack([self._specials[:1]]),
            token_k=one,
            row_k=one,
            share_k=torch.ones(1),
            targets=tuple(torch.zeros(1, dtype=target_r.dtype) for target_r in self._targets),
            weights=torch.zeros(len(self._targets), 1),
            rows=np.zeros(0, dtype=np.int64),
        )


@dataclass(frozen=True, kw_only=True)
class FitState:
    """How far a fit is."""

    steps: int = 0
    finished: bool = False
    history: tuple[Epoch, ...] = ()
    measured: bool = False
    """Whether the last epoch of the history was measured after exactly these steps."""
    losses: tuple[float, int] = (0.0, 0)
    """(sum, number) of the losses of the steps since that epoch."""
    patience: int = 0

    @property
    def best(self) -> float | None:
        """Number of the best epoch; None before the first ended."""
        return self.course.best_epoch or None

    @property
    def course(self) -> Course:
        """The same history, as one that can be asked for its best epoch."""
        course = Course(self.patience)
        for epoch in self.history:
            course.add(epoch)
        return course

    def after(self, step: int) -> FitState:
        """The state after one more step."""
        return dataclasses.replace(self, steps=step, measured=False)

    def noted(self, rows: list[Row]) -> FitState:
        """The state when the losses in these rows are counted."""
        found = [values["loss"] for _, values in rows if "loss" in values]
        return dataclasses.replace(self, losses=(self.losses[0] + sum(found), self.losses[1] + len(found)))

    def ended(self) -> FitState:
        """The state of a fit with nothing left to do."""
        return dataclasses.replace(self, finished=True)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; `order` ranks the checkpoints of epochs as `Course` ranks epochs."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["history"] = [dataclasses.asdict(epoch) for epoch in self.history]
        if self.measured:
            last = self.history[-1]
            ranks = (-last.validation_score, last.validation_loss)
            values["held_out"] = {"loss": last.validation_loss}
            values["order"] = [*(math.inf if math.isnan(rank) else rank for rank in ranks), last.number]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FitState:
        """The state that `to_dict` gave; IntegrityError when something is missing."""
        try:
            kept = {field.name: values[field.name] for field in dataclasses.fields(cls)}
            history = tuple(Epoch(**epoch) for epoch in kept.pop("history"))
            return cls(**{**kept, "history": history, "losses": tuple(kept["losses"])})
        except (KeyError, TypeError, ValueError) as error:
            raise IntegrityError(f"is no state of a fit: {error}.", where="checkpoint") from error


class FitPlan:
    """What a config means for the examples of one fold; see `loop.Plan`."""

    def __init__(
        self,
        config: FinetuneConfig,
        heads: Sequence[LinearHead],
        train: Examples,
        validation: Examples,
        vocabulary: Vocabulary,
        cells_of: CellsOf,
    ) -> None:
        self._config, self._heads = config, heads
        specs, specials = [head.spec for head in heads], sorted(vocabulary.special.values())
        weights_hr = all_row_weights(train.targets, specs, config)
        self._train = LabelledCells(train, specs, weights_hr, specials, gene_dropout=config.gene_dropout)
        unweighted = np.zeros((len(specs), validation.n_rows), dtype=np.float32)
        self._validation = LabelledCells(validation, specs, unweighted, specials)
        self._validation_source = ExampleCells(validation, vocabulary, cells_of)
        self.training = _batch_plan(config, train, np.flatnonzero(self._train.weight_n > 0))
        self._validating = _batch_plan(config, validation, np.arange(len(validation.index_n)))
        steps = np.cumsum([self.training.epoch(epoch).n_steps for epoch in range(config.epochs)])
        self.ends, self.total_steps = frozenset(steps.tolist()), int(steps[-1])
        self.accuracy = "" if all(spec.kind == "number" for spec in specs) else "train_accuracy"

    def fresh(self) -> FitState:
        """The state of a fit that has not begun."""
        return FitState(patience=self._config.patience)

    def batches(self, source: CellSource, *, rank: int, workers: int, first: int) -> Iterator[StepBatch]:
        """The optimiser steps from `first` + 1 on as one worker sees them."""
        place = {"rank": rank, "workers": workers, "first": first, "last": self.total_steps}
        for planned in planned_steps(source, self.training, **place):
            yield self._train.step(source, planned, self._config.seed)

    def begin(self, engine: Engine, source: CellSource, state: FitState) -> tuple[FitState, list[Row]]:
        """Heads that have not learned are not worth a measurement."""
        return state, []

    def measure(self, engine: Engine, source: CellSource, state: FitState) -> tuple[FitState, list[Row]]:
        """Judge the validation part, which ends an epoch."""
        outputs_rc = self._outputs(engine)
        edges = np.cumsum([head.spec.outputs for head in self._heads])[:-1]
        parts = np.split(outputs_rc, edges, axis=1)
        answers = [answers_from(head, part) for head, part in zip(self._heads, parts, strict=True)]
        total, number = state.losses
        judged = judge(self._heads, answers, self._validation.examples)
        epoch = judged.epoch(len(state.history) + 1, total / number if number else math.nan)
        history = (*state.history, epoch)
        row = (state.steps, {"epoch_ended": float(epoch.number), **epoch.metrics()})
        return dataclasses.replace(state, history=history, losses=(0.0, 0), measured=True), [row]

    def gives_up(self, state: FitState) -> bool:
        """Whether so many epochs as `patience` says have gone by without a better one."""
        return state.course.exhausted

    def _outputs(self, engine: Engine) -> np.ndarray:
        """What the heads give for every validation row, on every worker."""
        examples, width = self._validation.examples, sum(head.spec.outputs for head in self._heads)
        outputs_rc = torch.zeros(examples.n_rows, width)
        place = {"rank": engine.rank, "workers": engine.workers}
        for planned in whole_epoch(self._validating, **place):
            step = self._validation.step(self._validation_source, planned, self._config.seed)
            for lane in step.micro_batches:
                found = engine.evaluate([lane])
                rows = lane.rows  # type: ignore[attr-defined]
                outputs_rc[rows] = found[: len(rows)].float().cpu()
        # Every row is some worker's; the others hold zeros.
        return engine.total(outputs_rc.to(engine.device)).astype(np.float32)


def check_labels(parts: Mapping[str, Examples], specs: Sequence[HeadSpec], config: FinetuneConfig) -> None:
    """CorpusError for a part (by its name) in which no row has a label."""
    for name, examples in parts.items():
        if not all_row_weights(examples.targets, specs, config).any():
            raise CorpusError(
                f"no row of the {name} part has a label.",
                where=f"{name} part",
                fix="Give that part more cells, or split by another column.",
            )


def answers_from(head: LinearHead, outputs_rc: np.ndarray) -> np.ndarray:
    """Probabilities (r, c), or numbers (r, 1) in the target's unit, from what a head computes."""
    outputs = torch.from_numpy(outputs_rc)
    if head.spec.kind == "number":
        return (outputs * head.target_scale_1.cpu() + head.target_mean_1.cpu()).numpy()
    return torch.softmax(outputs, dim=1).numpy()


def _batch_plan(config: FinetuneConfig, examples: Examples, cells: np.ndarray) -> BatchPlan:
    # A cell longer than the budget makes a micro-batch of its own.
    longest = int(examples.lengths_n[cells].max(initial=1))
    return BatchPlan(
        lengths=examples.lengths_n,
        cells=cells,
        seed=config.seed,
        token_budget=max(config.tokens_per_batch, longest),
        lanes=config.lanes,
        cell_budget=max(1, config.cells_per_batch // config.lanes),
    )
