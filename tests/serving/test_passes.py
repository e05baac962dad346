"""Passes: within the budget, complete, in order, and one failure stays one failure."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genescale.perturbation.perturb import EditRequest
from genescale.platform.errors import InputError
from genescale.serving.answering.passes import (
    Comparison,
    EmbedPass,
    Outcome,
    carry_out,
    embed_in_passes,
    join_perturbation,
    split_embedding,
    split_perturbation,
)

COMPARISON = Comparison(layer="last", measure="remaining_genes")
LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=30)


def cells_of(lengths: Sequence[int]) -> list[np.ndarray]:
    return [np.full(length, position) for position, length in enumerate(lengths)]


@given(LENGTHS, st.integers(1, 120))
def test_cells_are_split_in_order_and_within_the_budget(lengths: list[int], budget: int) -> None:
    passes = split_embedding(cells_of(lengths), "last", "cls", tokens_per_pass=budget)
    assert [int(cell[0]) for one in passes for cell in one.cells] == list(range(len(lengths)))
    for one in passes:
        n_tokens = sum(len(cell) for cell in one.cells)
        assert n_tokens <= budget or len(one.cells) == 1
        assert one.cost == min(n_tokens, budget)


@given(LENGTHS, st.lists(st.sampled_from(["delete", "overexpress"]), min_size=1, max_size=6), st.integers(1, 200))
def test_edits_are_split_in_order_and_within_the_budget(lengths: list[int], kinds: list[Any], budget: int) -> None:
    edits = [EditRequest(kind=kind, genes=(10 + at,)) for at, kind in enumerate(kinds)]
    uncropped = {0: np.arange(3)}
    passes = split_perturbation(cells_of(lengths), edits, COMPARISON, uncropped, tokens_per_pass=budget)
    pairs = [
        (int(cell[0]), edit)
        for one in passes
        for cell, wanted in zip(one.cells, one.edits, strict=True)
        for edit in wanted
    ]
    assert pairs == [(cell, edit) for cell in range(len(lengths)) for edit in edits]
    for one in passes:
        # At the dearest, a cell is embedded unedited, once for each edit, and cut once for each overexpression.
        dearest = sum(
            len(cell) * (1 + len(wanted) + sum(edit.kind == "overexpress" for edit in wanted))
            for cell, wanted in zip(one.cells, one.edits, strict=True)
        )
        assert dearest <= budget or sum(map(len, one.edits)) == 1
        assert one.cost == min(dearest, budget)
        assert all(int(one.cells[at][0]) == 0 for at in one.uncropped)
    assert any(one.uncropped for one in passes)


def test_answers_are_joined_cell_by_cell() -> None:
    parts: list[Any] = [[["a0"]], [["a1"], ["b0", "b1"]], [["c0", "c1"]]]
    assert join_perturbation(parts, 2) == [["a0", "a1"], ["b0", "b1"], ["c0", "c1"]]


class Lengths:
    """An embedder whose vector is the cell's length; it cannot embed cells of 13 tokens on the last layer."""

    width = 1

    def embed_cells(self, cells: Sequence[np.ndarray], *, layer: str, pooling: str) -> np.ndarray:
        if layer == "last" and any(len(cell) == 13 for cell in cells):
            raise InputError("thirteen.")
        return np.asarray([[len(cell)] for cell in cells], dtype=np.float32)


def embed_pass(lengths: Sequence[int], layer: Any = "last") -> EmbedPass:
    return EmbedPass(cells=cells_of(lengths), layer=layer, pooling="cls", cost=sum(lengths))


def test_passes_with_different_options_share_a_batch() -> None:
    passes = [embed_pass([1, 2]), embed_pass([3], "second_to_last"), embed_pass([4]), embed_pass([5, 6, 7])]
    values: list[Any] = [outcome.value for outcome in carry_out(Lengths(), passes)]  # type: ignore[arg-type]
    assert [value[:, 0].tolist() for value in values] == [[1, 2], [3], [4], [5, 6, 7]]


def test_a_failing_group_does_not_fail_the_others() -> None:
    passes = [embed_pass([13]), embed_pass([2], "second_to_last")]
    failed, fine = carry_out(Lengths(), passes)  # type: ignore[arg-type]
    assert isinstance(failed.value, InputError)
    assert np.array_equal(fine.value, [[2]])  # type: ignore[arg-type]


def test_a_failed_pass_raises_and_ends_its_request() -> None:
    async def run(one: Any) -> Outcome[Any]:
        await asyncio.sleep(0)
        return carry_out(Lengths(), [one])[0]  # type: ignore[arg-type]

    async def embed(lengths: Sequence[int]) -> np.ndarray:
        return (await embed_in_passes(run, cells_of(lengths), "last", "cls", tokens_per_pass=5)).value

    assert asyncio.run(embed([1, 9, 2, 3, 4]))[:, 0].tolist() == [1, 9, 2, 3, 4]
    with pytest.raises(InputError, match="thirteen"):
        asyncio.run(embed([1, 13, 2]))


def test_a_large_request_leaves_room_for_others() -> None:
    waiting, most = 0, 0

    async def run(one: Any) -> Outcome[Any]:
        nonlocal waiting, most
        waiting += 1
        most = max(most, waiting)
        await asyncio.sleep(0)
        waiting -= 1
        return Outcome(value=np.zeros((len(one.cells), 1)), forward_s=0.0)

    asyncio.run(embed_in_passes(run, cells_of([5] * 50), "last", "cls", tokens_per_pass=5))
    assert most == 1
