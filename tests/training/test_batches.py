"""The batch plan: every cell once, the same global batches for any number of workers, exact tails."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from genescale.platform.errors import CorpusError, SettingsError
from genescale.platform.vocabulary import Vocabulary
from genescale.training import batches
from genescale.training.batches import (
    BatchPlan,
    MemoryCells,
    MicroBatch,
    StepBatch,
    evaluation_batches,
    prefetch,
    step_batches,
)
from genescale.training.cells import hold_out
from genescale.training.masking import Masking

GENES, BUDGET, LANES = 60, 100, 4


@pytest.fixture(scope="module")
def source() -> MemoryCells:
    vocabulary = Vocabulary.build([f"ENSG{i:011d}" for i in range(GENES)], np.ones(GENES), window=32, name="test")
    draws = np.random.default_rng(0)
    cells = [
        np.concatenate([[2], draws.permutation(GENES)[: draws.integers(1, 31)] + 4, [3]]).astype(np.uint16)
        for _ in range(143)
    ]
    return MemoryCells(cells, vocabulary)


@pytest.fixture(scope="module")
def masking(source: MemoryCells) -> Masking:
    return Masking(vocabulary=source.vocabulary, seed=7)


def plan_of(source: MemoryCells, **changes: object) -> BatchPlan:
    values = {"cells": np.arange(len(source.lengths)), "seed": 3, "token_budget": BUDGET, "lanes": LANES}
    return BatchPlan(lengths=source.lengths, **{**values, **changes})  # type: ignore[arg-type]


def lanes_of(plan: BatchPlan, epoch: int) -> Iterator[np.ndarray]:
    planned = plan.epoch(epoch)
    for step, lane in itertools.product(range(planned.n_steps), range(plan.lanes)):
        yield planned.micro_batch(step, lane)


@pytest.mark.parametrize("lanes", [1, 3, 4, 7, 64])
@pytest.mark.parametrize("epoch", [0, 1])
def test_every_cell_once_an_epoch_and_within_the_budget(source: MemoryCells, lanes: int, epoch: int) -> None:
    plan = plan_of(source, lanes=lanes)
    groups = list(lanes_of(plan, epoch))
    assert sorted(int(cell) for group in groups for cell in group) == list(range(143))
    assert max(source.lengths[group].sum() for group in groups) <= BUDGET
    filled = [len(group) > 0 for group in groups]
    # Only the last step may have empty lanes, and it is never empty altogether.
    assert all(filled[: -(lanes - 1) or None])
    assert filled[-lanes]


def test_micro_batches_are_nearly_full(source: MemoryCells) -> None:
    sizes = [source.lengths[group].sum() for group in lanes_of(plan_of(source), 0) if len(group)]
    assert min(sizes[:-1]) > BUDGET - source.lengths.max()


def test_the_plan_is_a_pure_function(source: MemoryCells) -> None:
    def order(**changes: object) -> list[int]:
        return plan_of(source, **changes).epoch(0).order.tolist()

    assert order() == order()
    assert order(seed=4) != order()
    assert plan_of(source).epoch(1).order.tolist() != order()


def test_only_the_given_cells_are_planned(source: MemoryCells) -> None:
    cells = np.arange(0, 143, 2)
    assert sorted(plan_of(source, cells=cells).epoch(0).order.tolist()) == cells.tolist()


def test_a_large_corpus_is_shuffled_in_groups_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "BLOCK_CELLS", 10)
    monkeypatch.setattr(batches, "BLOCKS", 3)
    plan = BatchPlan(lengths=np.full(100, 5), cells=np.arange(100), seed=0, token_budget=50, lanes=1)
    order = plan.epoch(0).order
    assert sorted(order.tolist()) == list(range(100))
    first = order[:30]
    assert len({int(cell) // 10 for cell in first}) == 3
    assert (np.diff(first // 10) != 0).sum() > 10


def everything(
    source: MemoryCells, masking: Masking, *, workers: int, first: int = 0, last: int = 12
) -> dict[tuple[int, int], MicroBatch]:
    """Micro-batches by (step, lane), gathered from all workers."""
    found = {}
    for rank in range(workers):
        steps = step_batches(source, plan_of(source), masking, rank=rank, workers=workers, first=first, last=last)
        for batch in steps:
            for number, micro_batch in enumerate(batch.micro_batches):
                found[batch.step, rank + number * workers] = micro_batch
    return found


def same(one: MicroBatch, other: MicroBatch) -> bool:
    return (
        torch.equal(one.packed.tokens_t, other.packed.tokens_t)
        and torch.equal(one.masked_positions, other.masked_positions)
        and torch.equal(one.labels, other.labels)
        and one.dropout_seed == other.dropout_seed
        and one.n_masked == other.n_masked
    )


@pytest.mark.parametrize("workers", [2, 4])
def test_batches_do_not_depend_on_the_number_of_workers(source: MemoryCells, masking: Masking, workers: int) -> None:
    alone, shared = everything(source, masking, workers=1), everything(source, masking, workers=workers)
    assert alone.keys() == shared.keys()
    assert all(same(alone[place], shared[place]) for place in alone)
    assert len({batch.dropout_seed for batch in alone.values() if batch.n_masked}) > 30


def test_a_run_that_goes_on_sees_what_an_undisturbed_one_sees(source: MemoryCells, masking: Masking) -> None:
    steps_of_an_epoch = plan_of(source).epoch(0).n_steps
    for first in (1, steps_of_an_epoch - 1, steps_of_an_epoch, steps_of_an_epoch + 1):
        rest = everything(source, masking, workers=2, first=first)
        whole = everything(source, masking, workers=2)
        assert {step for step, _ in rest} == set(range(first + 1, 13))
        assert all(same(whole[place], rest[place]) for place in rest)


def test_masks_differ_between_epochs_but_not_between_batches_of_one(source: MemoryCells, masking: Masking) -> None:
    plan = plan_of(source)
    per_epoch = plan.epoch(0).n_steps
    steps = list(step_batches(source, plan, masking, rank=0, workers=1, first=0, last=2 * per_epoch))
    assert {step.epoch for step in steps[:per_epoch]} == {0}
    assert {step.epoch for step in steps[per_epoch:]} <= {1, 2}
    number = int(plan.epoch(0).order[0])
    expected = masking.mask(source.tokens([number])[0], epoch=0, cell=number)
    first = steps[0].micro_batches[0].packed
    np.testing.assert_array_equal(first.tokens_t[: first.lengths[0]].numpy(), expected.tokens)


@pytest.mark.parametrize("workers", [1, 2])
def test_counts_of_a_step_are_global(source: MemoryCells, masking: Masking, workers: int) -> None:
    per_step: dict[int, Counter[str]] = {}
    stated: dict[int, set[tuple[int, int]]] = {}
    for rank in range(workers):
        steps = step_batches(source, plan_of(source), masking, rank=rank, workers=workers, first=0, last=10)
        for batch in steps:
            counts = per_step.setdefault(batch.step, Counter())
            for micro_batch in batch.micro_batches:
                counts["masked"] += micro_batch.n_masked
                counts["tokens"] += len(micro_batch.packed.tokens_t) if micro_batch.n_masked else 0
            stated.setdefault(batch.step, set()).add((batch.masked, batch.tokens))
    assert stated == {step: {(counts["masked"], counts["tokens"])} for step, counts in per_step.items()}


def test_labels_stand_where_positions_point(source: MemoryCells, masking: Masking) -> None:
    batch: StepBatch = next(step_batches(source, plan_of(source), masking, rank=0, workers=1, first=0, last=1))
    order = plan_of(source).epoch(0)
    for lane, micro_batch in enumerate(batch.micro_batches):
        original = np.concatenate(source.tokens(order.micro_batch(0, lane).tolist())).astype(np.int64)
        np.testing.assert_array_equal(original[micro_batch.masked_positions.numpy()], micro_batch.labels.numpy())
        hidden = micro_batch.packed.tokens_t.numpy() == source.vocabulary.mask
        assert set(np.flatnonzero(hidden)) <= set(micro_batch.masked_positions.tolist())


def test_empty_lanes_weigh_nothing(source: MemoryCells, masking: Masking) -> None:
    plan = plan_of(source, cells=np.array([5]))
    batch = next(step_batches(source, plan, masking, rank=0, workers=1, first=0, last=1))
    assert [micro_batch.n_masked > 0 for micro_batch in batch.micro_batches] == [True, False, False, False]
    assert batch.tokens == source.lengths[5]


def test_evaluation_repeats_its_masks(source: MemoryCells, masking: Masking) -> None:
    runs = [
        [
            m
            for step in evaluation_batches(source, plan_of(source), masking, rank=1, workers=2)
            for m in step.micro_batches
        ]
        for _ in range(2)
    ]
    assert all(same(one, other) for one, other in zip(*runs, strict=True))


def test_locating_a_step_counts_whole_epochs(source: MemoryCells) -> None:
    plan = plan_of(source)
    first, second = plan.epoch(0).n_steps, plan.epoch(1).n_steps
    assert plan.locate(0) == (0, 0)
    assert plan.locate(first - 1) == (0, first - 1)
    assert plan.locate(first) == (1, 0)
    assert plan.locate(first + second) == (2, 0)
    assert plan.n_steps(2) == first + second


def test_workers_that_do_not_divide_the_lanes_are_refused(source: MemoryCells, masking: Masking) -> None:
    with pytest.raises(SettingsError, match=r"4 lanes.*3 workers"):
        next(step_batches(source, plan_of(source), masking, rank=0, workers=3, first=0, last=1))


def test_a_budget_below_the_longest_cell_is_refused(source: MemoryCells) -> None:
    with pytest.raises(SettingsError, match="token_budget 10"):
        plan_of(source, token_budget=10)


def test_no_cells_are_refused(source: MemoryCells) -> None:
    with pytest.raises(CorpusError):
        plan_of(source, cells=np.array([], dtype=np.int64))


def test_held_out_cells_are_kept_apart() -> None:
    split = hold_out(1_000, 50, seed=1)
    assert len(split.held_out) == 50
    assert not split.by_donor
    assert sorted([*split.trained, *split.held_out]) == list(range(1_000))
    assert hold_out(1_000, 50, seed=1).held_out.tolist() == split.held_out.tolist()
    assert hold_out(1_000, 50, seed=2).held_out.tolist() != split.held_out.tolist()
    assert len(hold_out(100, 50, seed=1).held_out) == 10
    assert len(hold_out(5, 50, seed=1).held_out) == 0


def test_held_out_donors_are_not_trained_on() -> None:
    donors = np.random.default_rng(0).integers(-1, 20, size=1_000)
    split = hold_out(1_000, 60, seed=1, donors=donors)
    assert split.by_donor
    assert len(split.held_out) == 60
    assert len(split.trained) + len(split.held_out) + split.left_out == 1_000
    assert split.left_out < 200
    assert not set(donors[split.trained]) & set(donors[split.held_out])
    assert -1 not in donors[split.held_out]
    assert hold_out(1_000, 60, seed=1, donors=donors).held_out.tolist() == split.held_out.tolist()
    others = {tuple(hold_out(1_000, 60, seed=seed, donors=donors).held_out) for seed in range(5)}
    assert len(others) == 5


@pytest.mark.parametrize("donors", [np.full(1_000, -1), np.arange(1_000) % 3])
def test_without_donors_small_enough_single_cells_are_held_out(donors: np.ndarray) -> None:
    split = hold_out(1_000, 60, seed=1, donors=donors)
    assert (split.by_donor, len(split.held_out), split.left_out) == (False, 60, 0)


def test_prefetching_keeps_order_and_items() -> None:
    assert list(prefetch(iter(range(100)), depth=3)) == list(range(100))


def test_an_error_of_the_producer_is_raised_in_its_place() -> None:
    def produce() -> Iterator[int]:
        yield 1
        raise CorpusError("a part is gone.")

    items = prefetch(produce())
    assert next(items) == 1
    with pytest.raises(CorpusError, match="gone"):
        next(items)


def test_leaving_early_stops_the_producer() -> None:
    closed = []

    def produce() -> Iterator[int]:
        try:
            yield from itertools.count()
        finally:
            closed.append(True)

    producer = produce()
    items = prefetch(producer, depth=1)
    assert [next(items), next(items)] == [0, 1]
    items.close()
    producer.close()  # type: ignore[attr-defined]
    assert closed == [True]
