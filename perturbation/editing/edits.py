"""Edits of one cell's tokens: delete genes, overexpress them, or move them to other ranks.

Legend: `t` tokens of a cell, `g` genes of a cell, `k` genes that stand in both cells and were not edited.

An edit is a pure function of a token array. It returns the edited tokens, the tokens to compare them with, where each
gene was found, and which positions of the two arrays hold the same gene. The rules of the first two are those of the
published code:

- *delete* takes the genes out; the cell becomes shorter. A cell that was cropped to the window is not refilled, unless
  its uncropped tokens are given.
- *overexpress* puts the genes at the front, after `<cls>`, in the order given. A gene that the cell lacks is inserted;
  when the window is full, the lowest-ranked other genes are cut, and cut from the cell to compare with as well.

The published options declare *inhibit* and *activate* and refuse them. What they document is done here (option
`perturb_rank_shift` of the published perturber): ranks are split into four quartiles, the first is the front; a gene
moves by 1, 2 or 3 of them to the middle of the quartile that it comes to, or to the very front (activate) or bottom
(inhibit) of the cell when it would leave it. Among `g` genes, rank r lies in quartile floor(4 r / g), counted from 0,
and the middle of quartile q is rank floor((2 q + 1) g / 8). Ours beside it:

- *inhibit* and *activate* to a chosen rank: a gene that already stands behind it (inhibit) or before it (activate)
  stays, so that neither kind ever does the opposite of its name.
- *replace* gives each gene the rank that is asked for, whether that is higher or lower.

A rank beyond the end of a cell is its last. Of genes that come to the same rank, the first keeps it and the others
follow: in the cell's order when they moved by quartiles, in the order given otherwise.

A gene that is not there is an answer, not an error: only overexpression can insert it, every other kind leaves the cell
as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from genescale.perturbation.editing.cell import Cell
from genescale.perturbation.editing.requests import EditRequest, Kind
from genescale.platform.errors import InputError
from genescale.platform.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True, eq=False)
class Edit:
    """What one edit did to one cell."""

    kind: Kind
    genes: tuple[int, ...]
    """Gene tokens that were to be edited, in the order given."""
    ranks: tuple[int | None, ...]
    """Rank of each of `genes` in the cell (0 = its first gene), None where the cell lacks the gene."""
    tokens: np.ndarray
    """Edited cell `(t,)`."""
    baseline: np.ndarray
    """Cell `(t,)` to compare with: the given one, except where a full window forced a cut."""
    kept: np.ndarray
    """Positions `(k,)` in `tokens` of the genes that stand in both cells and were not edited."""
    kept_baseline: np.ndarray
    """Positions `(k,)` in `baseline` of the same genes, in the same order."""
    n_cut: int = 0
    """Lowest-ranked genes that had to leave a full window (overexpress)."""
    n_refilled: int = 0
    """Genes that moved up into the window (delete with the uncropped cell)."""

    @property
    def absent(self) -> tuple[int, ...]:
        """The genes that the cell lacks."""
        return tuple(gene for gene, rank in zip(self.genes, self.ranks, strict=True) if rank is None)

    @property
    def found(self) -> bool:
        """Whether the cell has every gene of the edit."""
        return None not in self.ranks

    @property
    def changed(self) -> bool:
        """Whether the edit altered the cell at all."""
        return not np.array_equal(self.tokens, self.baseline)


def apply(
    request: EditRequest,
    tokens_t: np.ndarray | Cell,
    vocabulary: Vocabulary,
    *,
    window: int = 0,
    uncropped_t: np.ndarray | None = None,
) -> Edit:
    """Carry out `request` on one cell, given by its tokens or, where several edits are tried, as a checked `Cell`.

    `window` is the longest cell the model takes, special tokens included (0 = the vocabulary's). `uncropped_t` holds
    all genes of the cell in rank order; refilling deletions need it. Raises InputError for what cannot be edited.
    """
    match request.kind:
        case "overexpress":
            return overexpress(tokens_t, request.genes, vocabulary, window=window)
        case "delete":
            if request.refill and uncropped_t is None:
                raise InputError(
                    "a refilling deletion needs the genes beyond the window.",
                    fix="Give the uncropped cell, or leave out refill.",
                )
            return delete(tokens_t, request.genes, vocabulary, uncropped_t=uncropped_t if request.refill else None)
        case "replace":
            return replace_rank(request, tokens_t, vocabulary)
        case "inhibit" | "activate":
            return shift_rank(request, tokens_t, vocabulary)


def delete(
    tokens_t: np.ndarray | Cell, genes: Sequence[int], vocabulary: Vocabulary, *, uncropped_t: np.ndarray | None = None
) -> Edit:
    """Take `genes` out of a cell; with `uncropped_t`, let the next genes of the uncropped cell move up.

    `uncropped_t` holds all genes of the same cell in rank order, with or without special tokens. It must begin with the
    genes of `tokens_t`. Raises InputError when it does not, or when `genes` or `tokens_t` cannot be used.
    """
    cell = _cell(tokens_t, vocabulary)
    genes = _checked_genes(genes, vocabulary)
    ranks = cell.ranks(genes)
    others_at = cell.all_but(ranks)
    remaining = cell.genes[others_at]
    refill = remaining[:0] if uncropped_t is None else _refill(cell, uncropped_t, genes, vocabulary)
    return Edit(
        kind="delete",
        genes=genes,
        ranks=ranks,
        tokens=cell.with_genes(np.concatenate([remaining, refill])),
        baseline=cell.tokens,
        kept=np.arange(len(remaining)) + cell.first,
        kept_baseline=others_at + cell.first,
        n_refilled=len(refill),
    )


def overexpress(tokens_t: np.ndarray | Cell, genes: Sequence[int], vocabulary: Vocabulary, *, window: int = 0) -> Edit:
    """Put `genes` first, in the order given; insert those that the cell lacks.

    `window` is the longest cell the model takes, special tokens included (0 = the vocabulary's). Raises InputError when
    `genes` or `tokens_t` cannot be used, or more genes are given than the window holds.
    """
    cell = _cell(tokens_t, vocabulary)
    genes = _checked_genes(genes, vocabulary)
    ranks = cell.ranks(genes)
    others_at = cell.all_but(ranks)
    room = (window or vocabulary.window) - cell.n_special - len(genes)
    if room < 0:
        raise InputError(f"{len(genes)} genes do not fit into a window of {window or vocabulary.window} tokens.")
    n_cut = max(0, len(others_at) - room)
    cut_at, others_at = others_at[len(others_at) - n_cut :], others_at[: len(others_at) - n_cut]
    # Cut by gene, not by position: an edited gene that itself ranks last must not shield another one from the cut.
    return Edit(
        kind="overexpress",
        genes=genes,
        ranks=ranks,
        tokens=cell.with_genes(np.concatenate([np.asarray(genes, dtype=cell.tokens.dtype), cell.genes[others_at]])),
        baseline=cell.with_genes(np.delete(cell.genes, cut_at)) if n_cut else cell.tokens,
        kept=np.arange(len(others_at)) + cell.first + len(genes),
        # What was cut ranks below every other gene that stays, so those keep their positions.
        kept_baseline=others_at + cell.first,
        n_cut=n_cut,
    )


def replace_rank(request: EditRequest, tokens_t: np.ndarray | Cell, vocabulary: Vocabulary) -> Edit:
    """Give each gene of `request` its rank of `request.ranks`; the other genes keep their order."""
    cell = _cell(tokens_t, vocabulary)
    genes = _checked_genes(request.genes, vocabulary)
    return _moved("replace", cell, genes, dict(zip(genes, request.ranks, strict=True)))


def shift_rank(request: EditRequest, tokens_t: np.ndarray | Cell, vocabulary: Vocabulary) -> Edit:
    """Inhibit or activate genes, by rank quartiles or to a chosen rank (the rules stand at the top of this file)."""
    cell = _cell(tokens_t, vocabulary)
    genes = _checked_genes(request.genes, vocabulary)
    by_gene = {gene: rank for gene, rank in zip(genes, cell.ranks(genes), strict=True) if rank is not None}
    if request.rank is not None:
        bound = min if request.kind == "activate" else max
        return _moved(request.kind, cell, genes, {gene: bound(request.rank, rank) for gene, rank in by_gene.items()})
    quartiles = (request.quartiles or 1) * (-1 if request.kind == "activate" else 1)
    n_genes = cell.n_genes
    in_order = sorted(by_gene, key=by_gene.__getitem__)
    return _moved(
        request.kind, cell, genes, {gene: shifted_rank(by_gene[gene], n_genes, quartiles) for gene in in_order}
    )


def shifted_rank(rank: int, n_genes: int, quartiles: int) -> int:
    """The rank that a gene moves to by so many quartiles (negative: toward the front) in a cell of `n_genes`."""
    quartile = 4 * rank // n_genes + quartiles
    if quartile < 0:
        return 0
    return n_genes - 1 if quartile > 3 else (2 * quartile + 1) * n_genes // 8


def _moved(kind: Kind, cell: Cell, genes: tuple[int, ...], wanted: dict[int, int]) -> Edit:
    """The cell with each gene of `wanted` at its rank; those that the cell lacks are passed over."""
    ranks = cell.ranks(genes)
    lacking = {gene for gene, rank in zip(genes, ranks, strict=True) if rank is None}
    present = [gene for gene in wanted if gene not in lacking]
    slots = _slots([wanted[gene] for gene in present], cell.n_genes)
    others_at = cell.all_but(ranks)
    moved_g = np.empty_like(cell.genes)
    free_g = np.ones(cell.n_genes, dtype=bool)
    free_g[slots] = False
    moved_g[slots] = present
    moved_g[free_g] = cell.genes[others_at]
    return Edit(
        kind=kind,
        genes=genes,
        ranks=ranks,
        tokens=cell.with_genes(moved_g),
        baseline=cell.tokens,
        kept=np.flatnonzero(free_g) + cell.first,
        kept_baseline=others_at + cell.first,
    )


def _slots(wanted: Sequence[int], n_genes: int) -> np.ndarray:
    """Different ranks below `n_genes`, each as near to the wanted one as those before it in rank and list allow."""
    order = np.argsort(wanted, kind="stable")
    slots = np.zeros(len(wanted), dtype=np.int64)
    next_free = 0
    for at in order:
        slots[at] = next_free = max(next_free, wanted[at])
        next_free += 1
    # Those pushed over the end move up together.
    slots[order] = np.minimum(slots[order], n_genes - len(order) + np.arange(len(order)))
    return slots


def _cell(tokens_t: np.ndarray | Cell, vocabulary: Vocabulary) -> Cell:
    return tokens_t if isinstance(tokens_t, Cell) else Cell.of(tokens_t, vocabulary)


def _checked_genes(genes: Sequence[int], vocabulary: Vocabulary) -> tuple[int, ...]:
    tokens = tuple(int(gene) for gene in genes)
    if not tokens:
        raise InputError("an edit needs at least one gene.")
    if len(set(tokens)) < len(tokens):
        raise InputError("a gene stands twice in one edit.", fix="Name each gene once.")
    for token in tokens:
        if not 0 <= token < vocabulary.size or token in vocabulary.special.values():
            raise InputError(f"token {token} is no gene of the vocabulary.", where=vocabulary.name)
    return tokens


def _refill(cell: Cell, uncropped_t: np.ndarray, genes: tuple[int, ...], vocabulary: Vocabulary) -> np.ndarray:
    uncropped = Cell.of(uncropped_t, vocabulary).genes
    n_shown = cell.n_genes
    if not np.array_equal(uncropped[:n_shown], cell.genes):
        raise InputError(
            "the uncropped cell does not begin with the genes of the cell.",
            fix="Give both from the same counts and vocabulary.",
        )
    hidden = uncropped[n_shown:]
    n_removed = int(np.isin(cell.genes, genes).sum())
    return hidden[~np.isin(hidden, genes)][:n_removed].astype(cell.tokens.dtype)
