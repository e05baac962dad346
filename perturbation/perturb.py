"""A cell before and after its edits: the one path that the screen and the HTTP service both take.

Legend: `t` tokens of a cell, `k` genes that stand in both cells, `d` width of an embedding.

Every variant of every cell goes through the embedder in chunks of a token budget; the unedited cell goes once. On the
CPU an embedder answers a cell with the same bits whatever else is in its batch, so an answer does not depend on who
asked or what was asked beside it. (Nor on the number of threads, from 32 tokens a cell on: below, torch's
matrix products and attention with one and two threads were measured to differ in the last bits.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from genescale.perturbation.editing.edits import Edit, Kind, delete, gene_span, overexpress, parse_kind
from genescale.perturbation.readouts import shift
from genescale.perturbation.readouts.shift import Measure
from genescale.platform.errors import InputError
from genescale.platform.vocabulary import Vocabulary

if TYPE_CHECKING:
    from genescale.training.embedder import Layer, Pooling

# Tokens embedded per call: enough to fill a device's batches, few enough that their vectors fit in memory.
TOKENS_PER_CHUNK = 65_536
NO_STATE = np.zeros(0)
NOTHING_LEFT = "the edit leaves no gene in the cell"
NOTHING_TO_COMPARE = "no gene beside the edited ones stands in the cell"


class CellEmbedder(Protocol):
    """What a perturbation needs of an embedder (`genescale.training.embedder.Embedder` is one)."""

    @property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary of the model."""

    @property
    def width(self) -> int:
        """Length of one embedding."""

    @property
    def window(self) -> int:
        """Longest cell in tokens, special tokens included."""

    def embed_cells(self, cells: Sequence[np.ndarray], *, layer: Layer, pooling: Pooling) -> np.ndarray:
        """One vector per cell `(n, d)`."""

    def embed_genes(self, cells: Sequence[np.ndarray], *, layer: Layer) -> list[np.ndarray]:
        """One vector per token of each cell `(t, d)`."""


@dataclass(frozen=True, kw_only=True)
class EditRequest:
    """One edit to try on a cell: its kind and the tokens of its genes, edited together."""

    kind: Kind
    genes: tuple[int, ...]
    refill: bool = False
    """Delete from the uncropped cell, so that the next genes move up into the window."""

    def __post_init__(self) -> None:
        parse_kind(self.kind)
        if self.refill and self.kind != "delete":
            raise InputError("only a deletion can refill the window.", fix="Leave out refill.")


@dataclass(frozen=True, kw_only=True, eq=False)
class EditAnswer:
    """What one edit did to one cell."""

    request: EditRequest
    ranks: tuple[int | None, ...]
    """Rank of each gene of the request in the cell (0 = its first gene); None where the cell lacks it."""
    cosine: float | None
    """Cosine of the chosen measure; 1 where the edit changed nothing, None where `reason` says why there is none."""
    goal_shift: float | None = None
    """Movement toward the goal state; None when no goal was given or `reason` says why."""
    reason: str = ""
    gene_tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """Genes `(k,)` whose own cosines were asked for and that stand in both cells, by their rank in the edited cell."""
    gene_cosine_values: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """Cosine `(k,)` float64 of each of `gene_tokens` before and after."""
    n_compared: int = 0
    """Genes that stand in both cells and were not edited."""
    n_cut: int = 0
    n_refilled: int = 0

    @property
    def shift(self) -> float | None:
        """`1 - cosine`: 0 where nothing moved."""
        return None if self.cosine is None else shift.shift_of(self.cosine)

    @property
    def found(self) -> dict[int, int]:
        """Rank of each gene that the cell has."""
        return {gene: rank for gene, rank in self._by_gene if rank is not None}

    @property
    def absent(self) -> tuple[int, ...]:
        """Genes of the request that the cell lacks."""
        return tuple(gene for gene, rank in self._by_gene if rank is None)

    @property
    def gene_cosines(self) -> dict[int, float]:
        """`gene_tokens` and `gene_cosine_values` as one mapping."""
        return dict(zip(self.gene_tokens.tolist(), self.gene_cosine_values.tolist(), strict=True))

    @property
    def _by_gene(self) -> list[tuple[int, int | None]]:
        return list(zip(self.request.genes, self.ranks, strict=True))


GenesOfInterest = Sequence[int] | Literal["all"] | None


def perturb_cell(
    embedder: CellEmbedder,
    tokens: np.ndarray,
    requests: Sequence[EditRequest],
    *,
    layer: Layer = "second_to_last",
    measure: Measure = "remaining_genes",
    goal: np.ndarray | None = None,
    gene_shifts_of: GenesOfInterest = None,
    uncropped: np.ndarray | None = None,
) -> list[EditAnswer]:
    """Answers to all `requests` on one cell, in their order.

    `goal` is a state's mean embedding `(d,)` of the same layer (`<cls>` vectors for the measure `cls`, means over genes
    otherwise). `gene_shifts_of` names genes whose own cosines are wanted, or `"all"`. `uncropped` holds all genes of
    the cell in rank order; refilling deletions need it. Raises InputError for what cannot be edited or compared.
    """
    cells = perturb_cells(
        embedder,
        [tokens],
        [requests],
        layer=layer,
        measure=measure,
        goal=goal,
        gene_shifts_of=gene_shifts_of,
        uncropped=None if uncropped is None else {0: uncropped},
    )
    return cells[0]


def perturb_cells(
    embedder: CellEmbedder,
    cells: Sequence[np.ndarray],
    requests: Sequence[Sequence[EditRequest]],
    *,
    layer: Layer = "second_to_last",
    measure: Measure = "remaining_genes",
    goal: np.ndarray | None = None,
    gene_shifts_of: GenesOfInterest = None,
    uncropped: Mapping[int, np.ndarray] | None = None,
) -> list[list[EditAnswer]]:
    """As `perturb_cell`, for several cells that each have their own requests; they share the embedder's batches."""
    comparison = _Comparison(embedder, layer, measure, goal, gene_shifts_of)
    tried = [
        _Tried(cell, at, request, _apply(request, tokens, embedder, (uncropped or {}).get(cell)))
        for cell, (tokens, wanted) in enumerate(zip(cells, requests, strict=True))
        for at, request in enumerate(wanted)
    ]
    answers: dict[tuple[int, int], EditAnswer] = {}
    moved = []
    for one in tried:
        unmoved = comparison.answer_without_embedding(one)
        if unmoved is None:
            moved.append(one)
        else:
            answers[one.cell, one.at] = unmoved
    for one, answer in comparison.answers(moved):
        answers[one.cell, one.at] = answer
    return [[answers[cell, at] for at in range(len(wanted))] for cell, wanted in enumerate(requests)]


@dataclass(frozen=True)
class _Tried:
    """One request applied to one cell."""

    cell: int
    at: int
    request: EditRequest
    edit: Edit


def _apply(request: EditRequest, tokens: np.ndarray, embedder: CellEmbedder, uncropped: np.ndarray | None) -> Edit:
    if request.kind == "overexpress":
        return overexpress(tokens, request.genes, embedder.vocabulary, window=embedder.window)
    if request.refill and uncropped is None:
        raise InputError(
            "a refilling deletion needs the genes beyond the window.",
            fix="Give the uncropped cell, or leave out refill.",
        )
    return delete(tokens, request.genes, embedder.vocabulary, uncropped_t=uncropped if request.refill else None)


class _Comparison:
    """How edited cells are compared with unedited ones in one call."""

    def __init__(
        self,
        embedder: CellEmbedder,
        layer: Layer,
        measure: Measure,
        goal: np.ndarray | None,
        gene_shifts_of: GenesOfInterest,
    ) -> None:
        shift.check_measure(measure, embedder.vocabulary)
        self.embedder, self.layer, self.measure = embedder, layer, measure
        self.goal = None if goal is None else shift.checked_goal(goal, embedder.width)
        self.per_gene = gene_shifts_of is not None
        self.of_interest = None if gene_shifts_of in (None, "all") else np.asarray(gene_shifts_of, dtype=np.int64)
        # Only the <cls> vectors leave the device when nothing else is compared.
        self.cls_only = measure == "cls" and not self.per_gene

    def answer_without_embedding(self, one: _Tried) -> EditAnswer | None:
        """The answer to an edit that changed nothing or left nothing to compare; None for all others."""
        edit = one.edit
        genes = edit.tokens[gene_span(edit.tokens, self.embedder.vocabulary)]
        if len(genes) == 0:
            return self._answer(one, None, None, reason=NOTHING_LEFT)
        if not edit.changed:
            return self._answer(one, 1.0, 0.0, np.ones(len(edit.kept)))
        if len(edit.kept) == 0 and self.measure == "remaining_genes":
            return self._answer(one, None, None, reason=NOTHING_TO_COMPARE)
        return None

    def answers(self, moved: Sequence[_Tried]) -> Iterator[tuple[_Tried, EditAnswer]]:
        """Embed edited and unedited cells chunk by chunk and compare them."""
        originals: dict[tuple[int, bytes], _Embedded] = {}
        for chunk in _chunks(moved):
            originals = {key: value for key, value in originals.items() if key[0] >= chunk[0].cell}
            missing = {_baseline_key(one): one.edit.baseline for one in chunk if _baseline_key(one) not in originals}
            embedded = self._embed([*missing.values(), *(one.edit.tokens for one in chunk)])
            originals.update(zip(missing, embedded, strict=False))
            for one, edited in zip(chunk, embedded[len(missing) :], strict=True):
                yield one, self._compare(one, edited, originals[_baseline_key(one)])

    def _embed(self, cells: list[np.ndarray]) -> list[_Embedded]:
        if self.cls_only:
            vectors = list(self.embedder.embed_cells(cells, layer=self.layer, pooling="cls")[:, None, :])
        else:
            vectors = self.embedder.embed_genes(cells, layer=self.layer)
        needs_state = self.goal is not None or self.measure != "remaining_genes"
        return [
            _Embedded(vector, self._state(cell, vector) if needs_state else NO_STATE)
            for cell, vector in zip(cells, vectors, strict=True)
        ]

    def _state(self, tokens_t: np.ndarray, vectors_td: np.ndarray) -> np.ndarray:
        if self.measure == "cls":
            return np.asarray(vectors_td[0], dtype=np.float64)
        return shift.mean_pooled(vectors_td[gene_span(tokens_t, self.embedder.vocabulary)])

    def _compare(self, one: _Tried, edited: _Embedded, original: _Embedded) -> EditAnswer:
        edit, cosines_k = one.edit, None
        if not self.cls_only and (self.per_gene or self.measure == "remaining_genes"):
            cosines_k = shift.gene_cosines(edited.vectors_td[edit.kept], original.vectors_td[edit.kept_baseline])
        if self.measure == "remaining_genes":
            assert cosines_k is not None
            cosine = shift.remaining_genes_cosine(cosines_k)
        else:
            cosine = float(shift.cosine(edited.state_d, original.state_d))
        goal = None if self.goal is None else shift.goal_shift(edited.state_d, original.state_d, self.goal)
        return self._answer(one, cosine, goal, cosines_k)

    def _answer(
        self,
        one: _Tried,
        cosine: float | None,
        goal_shift: float | None,
        cosines_k: np.ndarray | None = None,
        *,
        reason: str = "",
    ) -> EditAnswer:
        edit = one.edit
        genes, values = np.zeros(0, dtype=np.int64), np.zeros(0)
        if self.per_gene and cosines_k is not None:
            genes, values = edit.tokens[edit.kept].astype(np.int64), cosines_k
            if self.of_interest is not None:
                wanted = np.isin(genes, self.of_interest)
                genes, values = genes[wanted], values[wanted]
        return EditAnswer(
            request=one.request,
            ranks=edit.ranks,
            cosine=cosine,
            goal_shift=None if self.goal is None else goal_shift,
            reason=reason,
            gene_tokens=genes,
            gene_cosine_values=values,
            n_compared=len(edit.kept),
            n_cut=edit.n_cut,
            n_refilled=edit.n_refilled,
        )


@dataclass(frozen=True)
class _Embedded:
    """Vectors of one cell: per token (or its `<cls>` alone), and its state vector where states are compared."""

    vectors_td: np.ndarray
    state_d: np.ndarray


def _baseline_key(one: _Tried) -> tuple[int, bytes]:
    return one.cell, one.edit.baseline.tobytes()


def _chunks(moved: Sequence[_Tried]) -> Iterator[list[_Tried]]:
    chunk: list[_Tried] = []
    n_tokens = 0
    for one in moved:
        if chunk and n_tokens + len(one.edit.tokens) > TOKENS_PER_CHUNK:
            yield chunk
            chunk, n_tokens = [], 0
        chunk.append(one)
        n_tokens += len(one.edit.tokens)
    if chunk:
        yield chunk
