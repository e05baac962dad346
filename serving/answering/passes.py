"""Passes through the model: what requests want, cut to a token budget, and carried out several requests at a time.

A *pass* is a piece of one request that fits the budget. Passes of different requests run together when the budget has
room; an embedder answers a cell with the same bits whatever else is in its batch (on the CPU), so nobody can tell.

Axis suffixes: `n` cells, `t` tokens, `d` width, `s` states, `k` genes of an edited cell.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar

import numpy as np

from genescale.perturbation.perturb import CellEmbedder, EditAnswer, EditRequest, Readouts, perturb_cells
from genescale.perturbation.readouts.states import States
from genescale.platform.errors import GenescaleError, InputError
from genescale.serving.schemas import Layer, Measure

if TYPE_CHECKING:
    from genescale.training.heads.predict import HeadModel

T = TypeVar("T")
Rows = Literal["mean_genes", "cls", "genes"]
"""What is read from a cell: one row, pooled as the name says, or one row for each gene."""


class ServedEmbedder(CellEmbedder, Protocol):
    """What passes need of an embedder."""

    def embed_genes(self, cells: Sequence[np.ndarray], *, layer: Layer) -> list[np.ndarray]:
        """One vector per token of each cell `(t, d)` float32."""


@dataclass(frozen=True, kw_only=True, eq=False)
class EmbedPass:
    """Cells to embed in one go."""

    cells: Sequence[np.ndarray]
    layer: Layer
    pooling: Rows
    cost: int
    """Tokens that go through the model, at most the budget."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """How edited cells are compared with unedited ones, for a whole request."""

    layer: Layer
    measure: Measure
    states_sd: np.ndarray | None = None
    """(s, d) float64: vectors of states; the answers have a movement toward each, in this order."""
    gene_shifts_of: tuple[int, ...] = ()
    """Tokens of genes whose own shifts are wanted."""
    n_furthest: int = 0
    """How many of the genes that moved furthest are wanted beside them."""
    head: str = ""
    """Label of the head of cell classes whose change is wanted; empty for none."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PerturbPass:
    """Cells and the edits to try on each of them in one go."""

    cells: Sequence[np.ndarray]
    edits: Sequence[Sequence[EditRequest]]
    comparison: Comparison
    cost: int
    """Tokens that go through the model (edited cells and those they are compared with), at most the budget."""
    uncropped: Mapping[int, np.ndarray] = field(default_factory=dict)
    """All genes in rank order of the cells (by position) that a refilling deletion needs."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassifyPass:
    """Cells to answer with the model's heads in one go."""

    cells: Sequence[np.ndarray]
    genes: frozenset[int] | None
    """Tokens that a gene head answers for; None means every gene of the cells."""
    cost: int
    """Tokens that go through the model, at most the budget."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Classified:
    """What the heads say of some cells: one row a cell, or one row a gene of a cell."""

    tokens_r: np.ndarray
    """(r) int64: the gene of each row; empty for heads of cells."""
    answers: tuple[np.ndarray, ...]
    """One array (r, c) float32 for each head: probabilities, or numbers with c = 1."""


class Classifier(Protocol):
    """Heads on an encoder."""

    def classify(self, cells: Sequence[np.ndarray], genes: frozenset[int] | None) -> Classified:
        """Answers of every head, rows in the order of the cells."""

    def of_classes(self, label: str) -> HeadModel:
        """The one head of cell classes that answers `label`; raises InputError for none."""


Pass = EmbedPass | PerturbPass | ClassifyPass


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome(Generic[T]):
    """What a pass gave, or why it failed, and the seconds that the model worked for it and its companions."""

    value: T
    forward_s: float


RunPass = Callable[[Pass], Awaitable[Outcome[Any]]]


class Model(Protocol):
    """What the HTTP side asks of a model, wherever it runs."""

    async def embed(self, cells: Sequence[np.ndarray], layer: Layer, pooling: Rows) -> Outcome[np.ndarray]:
        """Rows `(r, d)` float32 in the order of `cells`: one for each, or one for each gene of each."""

    async def perturb(
        self,
        cells: Sequence[np.ndarray],
        edits: Sequence[EditRequest],
        comparison: Comparison,
        uncropped: Mapping[int, np.ndarray],
    ) -> Outcome[list[list[EditAnswer]]]:
        """Each edit of each cell, in the order given."""

    async def classify(self, cells: Sequence[np.ndarray], genes: frozenset[int] | None) -> Outcome[Classified]:
        """Answers of every head; raises InputError for a model without one."""

    async def ping(self) -> None:
        """Return when the model is loaded, warm and answers."""


def split_embedding(
    cells: Sequence[np.ndarray], layer: Layer, pooling: Rows, *, tokens_per_pass: int
) -> list[EmbedPass]:
    """Passes that hold `cells` in order, none above the budget unless it is a single cell."""
    return [
        EmbedPass(cells=[cells[i] for i in part], layer=layer, pooling=pooling, cost=min(cost, tokens_per_pass))
        for part, cost in _runs(len(cells), lambda at, _: len(cells[at]), tokens_per_pass)
    ]


def split_perturbation(
    cells: Sequence[np.ndarray],
    edits: Sequence[EditRequest],
    comparison: Comparison,
    uncropped: Mapping[int, np.ndarray],
    *,
    tokens_per_pass: int,
) -> list[PerturbPass]:
    """Passes that hold every edit of every cell, cells in order and within a cell the edits in order."""
    pairs = [(cell, edit) for cell in range(len(cells)) for edit in range(len(edits))]

    def cost_of(at: int, first: bool) -> int:
        cell, edit = pairs[at]
        # The unedited cell is embedded once a pass; in a full window an overexpression compares with a cut cell of its
        # own. Counting that one always keeps the cost an upper bound.
        baseline = first or pairs[at - 1][0] != cell
        return len(cells[cell]) * (1 + baseline + (edits[edit].kind == "overexpress"))

    return [
        _perturb_pass([pairs[at] for at in part], cells, edits, comparison, uncropped, cost=min(cost, tokens_per_pass))
        for part, cost in _runs(len(pairs), cost_of, tokens_per_pass)
    ]


def _perturb_pass(
    pairs: Sequence[tuple[int, int]],
    cells: Sequence[np.ndarray],
    edits: Sequence[EditRequest],
    comparison: Comparison,
    uncropped: Mapping[int, np.ndarray],
    *,
    cost: int,
) -> PerturbPass:
    wanted: dict[int, list[EditRequest]] = {}
    for cell, edit in pairs:
        wanted.setdefault(cell, []).append(edits[edit])
    return PerturbPass(
        cells=[cells[cell] for cell in wanted],
        edits=list(wanted.values()),
        comparison=comparison,
        cost=cost,
        uncropped={at: uncropped[cell] for at, cell in enumerate(wanted) if cell in uncropped},
    )


def split_classification(
    cells: Sequence[np.ndarray], genes: frozenset[int] | None, *, tokens_per_pass: int
) -> list[ClassifyPass]:
    """Passes that hold `cells` in order, none above the budget unless it is a single cell."""
    return [
        ClassifyPass(cells=[cells[i] for i in part], genes=genes, cost=min(cost, tokens_per_pass))
        for part, cost in _runs(len(cells), lambda at, _: len(cells[at]), tokens_per_pass)
    ]


def join_perturbation(parts: Iterable[list[list[EditAnswer]]], n_edits: int) -> list[list[EditAnswer]]:
    """Answers of all passes of one request, `n_edits` to a cell again."""
    flat = [answer for part in parts for cell in part for answer in cell]
    return [flat[at : at + n_edits] for at in range(0, len(flat), n_edits)]


def _runs(n: int, cost_of: Callable[[int, bool], int], budget: int) -> list[tuple[range, int]]:
    """Consecutive positions, and their cost, whose costs sum to at most `budget`; a single one may exceed it.

    `cost_of` is told whether a position is the first of its run.
    """
    runs: list[tuple[range, int]] = []
    start, total = 0, 0
    for at in range(n):
        cost = cost_of(at, at == start)
        if at > start and total + cost > budget:
            runs.append((range(start, at), total))
            start, total, cost = at, 0, cost_of(at, True)
        total += cost
    return [*runs, (range(start, n), total)]


def carry_out(
    embedder: ServedEmbedder, passes: Sequence[Pass], classifier: Classifier | None = None
) -> list[Outcome[object]]:
    """Run passes of any requests together; `value` of a pass that failed is its exception.

    The exception is a value, because one request's failure must not become that of its companions.
    """
    began = time.perf_counter()
    values: dict[int, object] = {}
    for positions in _alike(passes):
        try:
            values.update(zip(positions, _embed(embedder, [passes[i] for i in positions]), strict=True))
        except Exception as error:  # noqa: BLE001
            values.update(dict.fromkeys(positions, error))
    for position, one in enumerate(passes):
        if not isinstance(one, EmbedPass):
            try:
                values[position] = (
                    _perturb(embedder, one, classifier)
                    if isinstance(one, PerturbPass)
                    else _existing(classifier).classify(one.cells, one.genes)
                )
            except Exception as error:  # noqa: BLE001
                values[position] = error
    forward_s = time.perf_counter() - began
    return [Outcome(value=values[position], forward_s=forward_s) for position in range(len(passes))]


def _alike(passes: Sequence[Pass]) -> list[list[int]]:
    """Positions of embedding passes, those with the same options together."""
    groups: dict[tuple[Layer, Rows], list[int]] = {}
    for position, one in enumerate(passes):
        if isinstance(one, EmbedPass):
            groups.setdefault((one.layer, one.pooling), []).append(position)
    return list(groups.values())


def _embed(embedder: ServedEmbedder, passes: Sequence[Pass]) -> list[np.ndarray]:
    alike = [one for one in passes if isinstance(one, EmbedPass)]
    cells, layer, pooling = [cell for one in alike for cell in one.cells], alike[0].layer, alike[0].pooling
    if pooling == "genes":
        of_cells = _gene_rows(embedder, cells, layer)
        rows_rd, counts_n = np.concatenate(of_cells), np.array([len(rows_gd) for rows_gd in of_cells])
    else:
        rows_rd, counts_n = embedder.embed_cells(cells, layer=layer, pooling=pooling), np.ones(len(cells), dtype=int)
    if not np.isfinite(rows_rd).all():
        raise GenescaleError("the model gave embeddings that are not finite numbers.", fix="Check its weights.")
    ends_n, last = np.cumsum(counts_n), np.cumsum([len(one.cells) for one in alike]) - 1
    return np.split(rows_rd, ends_n[last[:-1]])


def _gene_rows(embedder: ServedEmbedder, cells: Sequence[np.ndarray], layer: Layer) -> list[np.ndarray]:
    """Embeddings `(g, d)` of the genes of each cell, without those of special tokens."""
    special = list(embedder.vocabulary.special.values())
    rows = embedder.embed_genes(cells, layer=layer)
    return [rows_td[~np.isin(cell, special)] for cell, rows_td in zip(cells, rows, strict=True)]


def _perturb(embedder: CellEmbedder, one: PerturbPass, classifier: Classifier | None) -> list[list[EditAnswer]]:
    comparison = one.comparison
    readouts = _readouts(comparison, classifier)
    answers = perturb_cells(embedder, one.cells, one.edits, readouts=readouts, uncropped=one.uncropped)
    if not comparison.n_furthest:
        return answers
    # Here and not at the HTTP side: only what is asked for leaves the replica.
    return [[_only_wanted_genes(answer, comparison) for answer in of_cell] for of_cell in answers]


def _readouts(comparison: Comparison, classifier: Classifier | None) -> Readouts:
    readouts = Readouts(
        layer=comparison.layer,
        measure=comparison.measure,
        gene_shifts_of="all" if comparison.n_furthest else comparison.gene_shifts_of or None,
        head=_existing(classifier).of_classes(comparison.head) if comparison.head else None,
    )
    if comparison.states_sd is None:
        return readouts
    # The caller says of what model, layer and pooling the states are: nothing but their width can be checked.
    states = States(
        names=tuple(str(at) for at in range(len(comparison.states_sd))),
        vectors_sd=comparison.states_sd,
        layer=readouts.layer,
        pooling=readouts.pooling,
    )
    return replace(readouts, states=states)


def _only_wanted_genes(answer: EditAnswer, comparison: Comparison) -> EditAnswer:
    kept_k = np.isin(answer.gene_tokens, comparison.gene_shifts_of)
    kept_k[furthest_genes(answer, comparison.n_furthest)] = True
    return replace(answer, gene_tokens=answer.gene_tokens[kept_k], gene_cosine_values=answer.gene_cosine_values[kept_k])


def furthest_genes(answer: EditAnswer, n: int) -> np.ndarray:
    """Positions in `gene_tokens` of the `n` genes whose embeddings moved furthest, the furthest first."""
    # Of equal shifts the lower token comes first: the order must not depend on what else was asked for.
    return np.lexsort((answer.gene_tokens, answer.gene_cosine_values))[:n]


def _existing(classifier: Classifier | None) -> Classifier:
    if classifier is None:
        raise InputError(
            "this model has no head.", fix="Serve a model that `genescale finetune` made; /v1/info lists its heads."
        )
    return classifier


async def classify_in_passes(
    run: RunPass, cells: Sequence[np.ndarray], genes: frozenset[int] | None, *, tokens_per_pass: int
) -> Outcome[Classified]:
    """Answers of every head for `cells` in order, from passes that `run` carries out."""
    done = await _all(run, split_classification(cells, genes, tokens_per_pass=tokens_per_pass))
    parts: list[Classified] = [one.value for one in done]
    joined = Classified(
        tokens_r=np.concatenate([part.tokens_r for part in parts]),
        answers=tuple(np.concatenate(arrays) for arrays in zip(*(part.answers for part in parts), strict=True)),
    )
    return Outcome(value=joined, forward_s=_total_s(done))


async def embed_in_passes(
    run: RunPass, cells: Sequence[np.ndarray], layer: Layer, pooling: Rows, *, tokens_per_pass: int
) -> Outcome[np.ndarray]:
    """Rows `(r, d)` of `cells` in order, from passes that `run` carries out."""
    done = await _all(run, split_embedding(cells, layer, pooling, tokens_per_pass=tokens_per_pass))
    return Outcome(value=np.concatenate([one.value for one in done]), forward_s=_total_s(done))


async def perturb_in_passes(
    run: RunPass,
    cells: Sequence[np.ndarray],
    edits: Sequence[EditRequest],
    comparison: Comparison,
    uncropped: Mapping[int, np.ndarray],
    *,
    tokens_per_pass: int,
) -> Outcome[list[list[EditAnswer]]]:
    """Each edit of each cell in order, from passes that `run` carries out."""
    passes = split_perturbation(cells, edits, comparison, uncropped, tokens_per_pass=tokens_per_pass)
    done = await _all(run, passes)
    return Outcome(value=join_perturbation((one.value for one in done), len(edits)), forward_s=_total_s(done))


async def _all(run: RunPass, passes: Sequence[Pass]) -> list[Outcome[Any]]:
    # One after the other: a large request must not fill the queue, or a small one behind it would wait for all of it.
    # It also ends with its caller: passes that were not begun are not worth their time then.
    outcomes = []
    for one in passes:
        outcome = await run(one)
        if isinstance(outcome.value, Exception):
            raise outcome.value
        outcomes.append(outcome)
    return outcomes


def _total_s(outcomes: Sequence[Outcome[Any]]) -> float:
    return sum(outcome.forward_s for outcome in outcomes)
