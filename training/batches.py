"""The batch plan: which cells form which micro-batch, and the packed micro-batches made from it.

The plan is a pure function of (lengths, seed, epoch, token budget, lanes). Cells are shuffled, then cut into
micro-batches of at most `token_budget` tokens; step s takes micro-batches s x lanes ... (s + 1) x lanes - 1, one per
lane. `lanes` is fixed in the config; worker r of w computes lanes r, r + w, ... one after the other and adds their
gradients. So the optimiser sees the same global batches whatever the number of workers, and a run can say at any step
which cells it has seen. In one epoch every cell occurs once; lanes of the last step may be empty.

Shuffling is in blocks: blocks of neighbouring cells are put in random order, and cells are shuffled across groups of
them. A corpus of up to BLOCK_CELLS x BLOCKS cells is one group, a full shuffle. A larger one does not fit in memory,
and a full shuffle would decode a Parquet part for every cell.

Axes: n cells of the corpus, b cells of a micro-batch, t its tokens, m its masked positions.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from genescale.platform.errors import CorpusError, SettingsError
from genescale.platform.vocabulary import Vocabulary
from genescale.training.cells import CorpusCells as CorpusCells
from genescale.training.cells import Indices
from genescale.training.cells import MemoryCells as MemoryCells
from genescale.training.masking import Masking
from genescale.training.model import PackedBatch, pack

Item = TypeVar("Item")
BLOCK_CELLS, BLOCKS = 16_384, 16
# Keys of the streams drawn from one seed; masking has its own.
_ORDER_STREAM, _DROPOUT_STREAM = 2, 4


class CellSource(Protocol):
    """Where cells come from: a pinned corpus, or cells in memory."""

    vocabulary: Vocabulary
    lengths: npt.NDArray[np.integer]
    """(n) tokens of each cell."""
    donors: npt.NDArray[np.int32]
    """(n) number of each cell's donor; -1 where the donor is not known."""

    def tokens(self, indices: Indices) -> list[np.ndarray]:
        """The tokens of these cells, in this order."""

    def warm(self, indices: npt.NDArray[np.integer]) -> None:
        """Called in a thread with cells that will be asked for soon, in any order."""

    def origin(self, indices: Sequence[int]) -> list[tuple[str, int]]:
        """(dataset, row in its source file) of these cells: where a person finds them."""


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """One epoch: the shuffled cells and where micro-batches begin."""

    order: npt.NDArray[np.integer]
    starts: npt.NDArray[np.int64]
    """Rising positions in `order`; micro-batch i is order[starts[i]:starts[i + 1]]."""
    lanes: int

    @property
    def n_steps(self) -> int:
        """Optimiser steps of this epoch."""
        return -(-(len(self.starts) - 1) // self.lanes)

    def micro_batch(self, step: int, lane: int) -> npt.NDArray[np.integer]:
        """Cells of one lane in one step; empty when the last step does not fill every lane."""
        number = step * self.lanes + lane
        if number >= len(self.starts) - 1:
            return self.order[:0]
        return self.order[self.starts[number] : self.starts[number + 1]]

    def step_cells(self, step: int) -> npt.NDArray[np.integer]:
        """Cells of all lanes in one step."""
        first, last = step * self.lanes, min((step + 1) * self.lanes, len(self.starts) - 1)
        return self.order[self.starts[first] : self.starts[last]]


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchPlan:
    """The plan of every epoch over `cells` (indices into `lengths`)."""

    lengths: npt.NDArray[np.integer]
    cells: npt.NDArray[np.integer]
    seed: int
    token_budget: int
    """Tokens in a micro-batch at most."""
    lanes: int
    """Micro-batches in an optimiser step."""
    cell_budget: int = 0
    """Cells in a micro-batch at most; 0 sets no bound."""

    def __post_init__(self) -> None:
        if self.lanes < 1:
            raise SettingsError(f"lanes is {self.lanes}.", fix="Use 1 or more.")
        if len(self.cells) == 0:
            raise CorpusError("there are no cells to train on.", fix="Ingest some, or hold out fewer.")
        longest = int(self.lengths[self.cells].max())
        if longest > self.token_budget:
            raise SettingsError(
                f"token_budget {self.token_budget} is smaller than the longest cell ({longest} tokens).",
                fix=f"Use a token_budget of at least {longest}; a multiple of it wastes less.",
            )

    def epoch(self, epoch: int) -> EpochPlan:
        """The plan of one epoch; the same arguments give the same plan on every machine."""
        return _epoch_plan(self, epoch)

    def n_steps(self, epochs: int) -> int:
        """Optimiser steps of the first `epochs` epochs."""
        return sum(self.epoch(epoch).n_steps for epoch in range(epochs))

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, step within it) of the optimiser step after `step` steps."""
        epoch = 0
        while step >= self.epoch(epoch).n_steps:
            step -= self.epoch(epoch).n_steps
            epoch += 1
        return epoch, step


# Two: the epoch that is trained on and the one before or after it. One of 30 million cells takes 130 MB.
@lru_cache(maxsize=2)
def _epoch_plan(plan: BatchPlan, epoch: int) -> EpochPlan:
    order = _shuffled(plan.cells, np.random.Philox(np.random.SeedSequence([plan.seed, _ORDER_STREAM, epoch])))
    ends = np.zeros(len(order) + 1, dtype=np.int64)
    np.cumsum(plan.lengths[order], out=ends[1:])
    starts = [0]
    most = plan.cell_budget or len(order)
    while starts[-1] < len(order):
        full = int(np.searchsorted(ends, ends[starts[-1]] + plan.token_budget, side="right")) - 1
        starts.append(min(full, starts[-1] + most))
    return EpochPlan(order, np.array(starts, dtype=np.int64), plan.lanes)


def _shuffled(cells: npt.NDArray[np.integer], bits: np.random.Philox) -> npt.NDArray[np.integer]:
    draws = np.random.Generator(bits)
    block_starts = np.arange(0, len(cells), BLOCK_CELLS)
    block_starts = block_starts[np.argsort(draws.random(len(block_starts)), kind="stable")]
    groups = []
    for first in range(0, len(block_starts), BLOCKS):
        blocks = [cells[start : start + BLOCK_CELLS] for start in block_starts[first : first + BLOCKS]]
        group = np.concatenate(blocks)
        # Sorting uniform keys rests on the raw stream alone; `permutation` may change between NumPy releases.
        groups.append(group[np.argsort(draws.random(len(group)), kind="stable")])
    return np.concatenate(groups)


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Cells that are computed together, masked and packed."""

    packed: PackedBatch
    masked_positions: torch.Tensor
    """(m) int64 indices into the stream."""
    labels: torch.Tensor
    """(m) int64 tokens that stood there."""
    n_masked: int
    """m, or 0 for an empty lane: its single token is computed for the sake of collectives and weighs nothing."""
    dropout_seed: int
    """Dropout of this micro-batch is drawn from this seed, on whichever worker it is computed."""

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same micro-batch on `device`."""
        positions, labels = (x.to(device, non_blocking=True) for x in (self.masked_positions, self.labels))
        return MicroBatch(self.packed.to(device), positions, labels, self.n_masked, self.dropout_seed)


class Lane(Protocol):
    """Cells that are computed together, with what is to be learned from them."""

    @property
    def dropout_seed(self) -> int:
        """Dropout is drawn from this seed, on whichever worker it is computed."""

    def to(self, device: torch.device | str) -> Lane:
        """The same on `device`."""


@dataclass(frozen=True, eq=False)
class StepBatch:
    """What one worker needs for one optimiser step, and the global counts of that step."""

    step: int
    """Steps done once this one is: the first is 1."""
    epoch: int
    micro_batches: Sequence[Lane]
    """The worker's lanes: `MicroBatch` in pretraining."""
    masked: int
    """Masked tokens of all lanes."""
    tokens: int
    """Tokens of all lanes."""
    squares: int = 0
    """Sum of the squared lengths of the cells of all lanes: what attention costs."""
    weight: float | None = None
    """What the loss is divided by, over all lanes; None means `masked`."""

    @property
    def divisor(self) -> float:
        """What the loss of this step is divided by."""
        return self.masked if self.weight is None else self.weight


def micro_batch(
    cells: Sequence[np.ndarray], indices: Indices, masking: Masking, *, epoch: int, dropout_seed: int = 0
) -> MicroBatch:
    """Mask and pack cells; `indices` are their numbers in the corpus, which the masks depend on."""
    if not len(indices):
        mask = masking.vocabulary.mask
        return MicroBatch(pack([np.array([mask])]), torch.zeros(1, dtype=torch.int64), torch.tensor([mask]), 0, 0)
    masked = [masking.mask(c, epoch=epoch, cell=int(i)) for c, i in zip(cells, indices, strict=True)]
    packed = pack([cell.tokens for cell in masked])
    starts = np.concatenate([[0], np.cumsum(packed.lengths)])
    positions = np.concatenate([cell.positions + start for cell, start in zip(masked, starts[:-1], strict=True)])
    labels = np.concatenate([cell.labels for cell in masked])
    return MicroBatch(packed, torch.from_numpy(positions), torch.from_numpy(labels), len(labels), dropout_seed)


def check_workers(lanes: int, workers: int) -> None:
    """SettingsError unless every worker gets the same number of lanes (DeepSpeed accumulates in step)."""
    if lanes % workers:
        raise SettingsError(
            f"{lanes} lanes cannot be shared evenly by {workers} workers.",
            fix=f"Use a number of workers that divides {lanes}, or change lanes (which changes the batches).",
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class PlannedStep:
    """The cells of one optimiser step, before they are read."""

    number: int
    """Steps done once this one is: the first is 1."""
    epoch: int
    lanes: tuple[npt.NDArray[np.integer], ...]
    """Cells of each lane of this worker; a lane may be empty."""
    all_cells: npt.NDArray[np.integer]
    """Cells of all lanes of all workers."""
    _place: tuple[int, int, range]

    def dropout_seeds(self, seed: int) -> list[int]:
        """The dropout seed of each lane of this worker."""
        epoch, step, lanes = self._place
        return [_dropout_seed(seed, epoch, step, lane) for lane in lanes]


def planned_steps(
    source: CellSource, plan: BatchPlan, *, rank: int, workers: int, first: int, last: int
) -> Iterator[PlannedStep]:
    """The optimiser steps `first` + 1 ... `last` as worker `rank` of `workers` sees them."""
    check_workers(plan.lanes, workers)
    epoch, step = plan.locate(first) if first < last else (0, 0)
    ahead = _Ahead(source, plan)
    for done in range(first, last):
        if step == plan.epoch(epoch).n_steps:
            epoch, step = epoch + 1, 0
        ahead.reach(epoch, step)
        yield _planned_step(plan, epoch, step, done + 1, range(rank, plan.lanes, workers))
        step += 1


def whole_epoch(plan: BatchPlan, *, rank: int, workers: int) -> Iterator[PlannedStep]:
    """Every cell of the plan once, in the order of its first epoch: for measurements."""
    for step in range(plan.epoch(0).n_steps):
        yield _planned_step(plan, 0, step, step + 1, range(rank, plan.lanes, workers))


def _planned_step(plan: BatchPlan, epoch: int, step: int, done: int, lanes: range) -> PlannedStep:
    planned = plan.epoch(epoch)
    cells = tuple(planned.micro_batch(step, lane) for lane in lanes)
    return PlannedStep(
        number=done, epoch=epoch, lanes=cells, all_cells=planned.step_cells(step), _place=(epoch, step, lanes)
    )


def step_batches(
    source: CellSource, plan: BatchPlan, masking: Masking, *, rank: int, workers: int, first: int, last: int
) -> Iterator[StepBatch]:
    """The masked optimiser steps `first` + 1 ... `last` as worker `rank` of `workers` sees them."""
    for planned in planned_steps(source, plan, rank=rank, workers=workers, first=first, last=last):
        yield _step_batch(source, planned, masking)


class _Ahead:
    """Has the cells of the next group of blocks read while those of the present one are trained on.

    Without it the first step in a group would wait for all its row groups at once.
    """

    def __init__(self, source: CellSource, plan: BatchPlan) -> None:
        self._source, self._plan = source, plan
        self._place: tuple[int, int] | None = None
        self._thread: threading.Thread | None = None

    def reach(self, epoch: int, step: int) -> None:
        """Training has come to this step."""
        group_cells = BLOCK_CELLS * BLOCKS
        planned = self._plan.epoch(epoch)
        place = (epoch, int(planned.starts[step * planned.lanes]) // group_cells)
        busy = self._thread is not None and self._thread.is_alive()
        # A corpus of one group is in memory after its first epoch begins.
        if place != self._place and not busy and len(planned.order) > group_cells:
            self._place = place
            self._thread = threading.Thread(target=self._warm, args=place, name="read-ahead", daemon=True)
            self._thread.start()

    def _warm(self, epoch: int, group: int) -> None:
        group_cells = BLOCK_CELLS * BLOCKS
        start = (group + 1) * group_cells
        order = self._plan.epoch(epoch).order
        if start >= len(order):
            order, start = self._plan.epoch(epoch + 1).order, 0
        self._source.warm(order[start : start + group_cells])


def evaluation_batches(
    source: CellSource, plan: BatchPlan, masking: Masking, *, rank: int, workers: int
) -> Iterator[StepBatch]:
    """Every cell of the plan once, with the same masks each time it is called."""
    for planned in whole_epoch(plan, rank=rank, workers=workers):
        yield _step_batch(source, planned, masking)


def _step_batch(source: CellSource, planned: PlannedStep, masking: Masking) -> StepBatch:
    # One read for all lanes of the worker: they often share Parquet parts.
    cells = iter(source.tokens(np.concatenate(planned.lanes)))
    batches = [
        micro_batch([next(cells) for _ in chosen], chosen, masking, epoch=planned.epoch, dropout_seed=seed)
        for chosen, seed in zip(planned.lanes, planned.dropout_seeds(masking.seed), strict=True)
    ]
    lengths = source.lengths[planned.all_cells].astype(np.int64)
    masked, tokens = int(masking.counts(lengths).sum()), int(lengths.sum())
    return StepBatch(planned.number, planned.epoch, tuple(batches), masked, tokens, int((lengths**2).sum()))


def _dropout_seed(seed: int, epoch: int, step: int, lane: int) -> int:
    return int(np.random.SeedSequence([seed, _DROPOUT_STREAM, epoch, step, lane]).generate_state(1, np.uint32)[0])


def prefetch(items: Iterable[Item], depth: int = 2) -> Generator[Item, None, None]:
    """The same items, made up to `depth` ahead by a thread; an error of theirs is raised here in its place."""
    ready: queue.Queue[tuple[str, object]] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(kind: str, value: object) -> bool:
        while not stopped.is_set():
            try:
                ready.put((kind, value), timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def work() -> None:
        try:
            for item in items:
                if not put("item", item):
                    return
            put("end", None)
        except BaseException as error:  # noqa: BLE001 - raised again in the consumer's thread
            put("error", error)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "error":
                raise value  # type: ignore[misc]
            if kind == "end":
                return
            yield value  # type: ignore[misc]
    finally:
        stopped.set()
        thread.join()
