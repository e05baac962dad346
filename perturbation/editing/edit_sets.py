"""What a screen tries on each cell: single genes, sets, pairs, every gene, or an anchor with every other gene.

Legend: `t` tokens of a cell.

Names are resolved once, before any work: ids, symbols, retired ids and aliases all lead to the token, and an unknown
name is an error that says the nearest one. What a single cell lacks is not decided here: an edit of a gene that the
cell lacks is asked all the same, and answered as absent.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from genescale.perturbation.editing.cell import gene_span
from genescale.perturbation.editing.requests import EditOptions, EditRequest
from genescale.platform.errors import InputError
from genescale.platform.vocabulary import Vocabulary

if TYPE_CHECKING:
    from genescale.platform.storage import Store

TOGETHER = "+"
DELETE = EditOptions()
_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class ListedEdit:
    """One edit that is tried on every cell."""

    edit_id: str
    """Gene ids joined by `+`, or the name of a set."""
    symbol: str
    """The same for display."""
    genes: tuple[int, ...]
    """Tokens, edited together."""


@dataclass(frozen=True, kw_only=True, eq=False)
class EditSet:
    """The edits of a screen; make it with one of its class methods.

    Beside the `listed` edits, `every_gene` edits all genes that a cell has one by one, and `anchor` edits it with each
    of them, the singles included.
    """

    vocabulary: Vocabulary
    options: EditOptions
    listed: tuple[ListedEdit, ...] = ()
    every_gene: bool = False
    anchor: int | None = None
    left_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Names that are no gene of the vocabulary, as written, by the set that holds them."""
    merged: tuple[str, ...] = ()
    """Edits, as written, that were named before, in other words or in another order."""

    @classmethod
    def of_genes(cls, names: Iterable[str], vocabulary: Vocabulary, options: EditOptions = DELETE) -> EditSet:
        """Each of `names` by itself; `A+B` edits both together. Raises UnknownGeneError, or InputError for none."""
        written = [name.strip() for name in names]
        edits = [_edit(_tokens(name.split(TOGETHER), vocabulary, name), vocabulary) for name in written]
        return _checked(edits, written, vocabulary, options)

    @classmethod
    def of_tokens(
        cls, edits: Iterable[Sequence[int]], vocabulary: Vocabulary, options: EditOptions = DELETE
    ) -> EditSet:
        """As `of_genes`, from tokens; the tokens of one edit are edited together."""
        listed = [_edit(tuple(int(gene) for gene in genes), vocabulary) for genes in edits]
        return _checked(listed, [edit.edit_id for edit in listed], vocabulary, options)

    @classmethod
    def of_all(cls, vocabulary: Vocabulary, options: EditOptions = DELETE) -> EditSet:
        """Every gene of each cell, one at a time."""
        return cls(vocabulary=vocabulary, options=options, every_gene=True)

    @classmethod
    def of_pairs(cls, names: Iterable[str], vocabulary: Vocabulary, options: EditOptions = DELETE) -> EditSet:
        """All pairs of the genes `names`, after each gene by itself (interactions need both)."""
        tokens = list(dict.fromkeys(_tokens(names, vocabulary, "pairs")))
        if len(tokens) < 2:
            raise InputError("pairs need two different genes at least.", where="pairs", fix="Name more genes.")
        groups = [*((gene,) for gene in tokens), *itertools.combinations(tokens, 2)]
        return cls.of_tokens(groups, vocabulary, options)

    @classmethod
    def of_anchor(cls, name: str, vocabulary: Vocabulary, options: EditOptions = DELETE) -> EditSet:
        """The gene `name` with every other gene of each cell, after all of these and itself one by one."""
        anchor = vocabulary.token(name)
        listed = _edit((anchor,), vocabulary)
        _check_ranks([listed], options)
        return cls(vocabulary=vocabulary, options=options, listed=(listed,), anchor=anchor)

    @classmethod
    def of_sets(
        cls, sets: Mapping[str, Iterable[str]], vocabulary: Vocabulary, options: EditOptions = DELETE
    ) -> EditSet:
        """Each named set edited together.

        Lists of gene sets hold names that a vocabulary lacks: those are in `left_out`. Raises InputError for a set of
        which nothing is left.
        """
        edits, left_out = [], {}
        for set_name, names in sets.items():
            names = list(names)
            found = {name: vocabulary.find(name) for name in names}
            tokens = tuple(dict.fromkeys(token for token in found.values() if token is not None))
            if not tokens:
                raise InputError(
                    f"none of its {len(names):,} genes is in the vocabulary ({', '.join(names[:_SHOWN])}).",
                    where=f"set {set_name}",
                    fix="Give Ensembl gene ids or symbols, or leave the set out.",
                )
            if lost := tuple(name for name, token in found.items() if token is None):
                left_out[set_name] = lost
            edits.append(ListedEdit(edit_id=set_name, symbol=set_name, genes=tokens))
        made = _checked(edits, list(sets), vocabulary, options, merge=False)
        return cls(vocabulary=vocabulary, options=options, listed=made.listed, left_out=left_out)

    @property
    def names(self) -> tuple[str, ...]:
        """Ids of the listed edits, in their order."""
        return tuple(edit.edit_id for edit in self.listed)

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides which edits are made, as JSON can hold it."""
        options = self.options
        return {
            "kind": options.kind,
            "refill": options.refill,
            "quartiles": options.quartiles,
            "rank": options.rank,
            "target_ranks": sorted(options.target_ranks.items()),
            "listed": [[edit.edit_id, list(edit.genes)] for edit in self.listed],
            "every_gene": self.every_gene,
            "anchor": self.anchor,
        }

    def of_cell(self, tokens_t: np.ndarray) -> list[EditRequest]:
        """The edits to try on one cell: the listed ones first, then those of its own genes in rank order.

        When the cell lacks the anchor and the kind cannot insert it, only the anchor itself is asked (and answered as
        absent). Genes that have no target rank (`replace`) are passed over; `without_rank` counts them.
        """
        requests = [self.options.request(edit.genes) for edit in self.listed]
        if not self.every_gene and self.anchor is None:
            return requests
        genes = [gene for gene in self._genes_of(tokens_t) if self.options.has_rank(gene)]
        if self.anchor is None:
            return requests + [self.options.request((gene,)) for gene in genes]
        if self.anchor not in genes and self.options.kind != "overexpress":
            return requests
        others = [gene for gene in genes if gene != self.anchor]
        singles = [self.options.request((gene,)) for gene in others]
        return requests + singles + [self.options.request((self.anchor, gene)) for gene in others]

    def most_edits(self, n_genes: int) -> int:
        """How many edits a cell of `n_genes` gets at most: exact for all but anchors and `replace`."""
        per_gene = 1 if self.every_gene else 2 if self.anchor is not None else 0
        return len(self.listed) + per_gene * n_genes

    def without_rank(self, tokens_t: np.ndarray) -> int:
        """Genes of a cell that are not edited because `replace` knows no rank for them."""
        if not self.every_gene and self.anchor is None:
            return 0
        return sum(not self.options.has_rank(gene) for gene in self._genes_of(tokens_t))

    def edit_id(self, genes: Sequence[int]) -> str:
        """The id of the edit of these tokens together: a set's name, or gene ids joined by `+`."""
        return self._named[tuple(genes)].edit_id if tuple(genes) in self._named else self.gene_id(genes)

    def symbol(self, genes: Sequence[int]) -> str:
        """The display name of the edit of these tokens together."""
        if tuple(genes) in self._named:
            return self._named[tuple(genes)].symbol
        return TOGETHER.join(self.vocabulary.symbol_of(self.vocabulary.gene_of_token(gene)) for gene in genes)

    def gene_id(self, genes: Sequence[int]) -> str:
        """Gene ids of these tokens joined by `+`."""
        return TOGETHER.join(self.vocabulary.gene_of_token(gene) for gene in genes)

    def _genes_of(self, tokens_t: np.ndarray) -> list[int]:
        return [int(gene) for gene in tokens_t[gene_span(tokens_t, self.vocabulary)]]

    @cached_property
    def _named(self) -> dict[tuple[int, ...], ListedEdit]:
        # The first name of genes that stand in two sets: requests carry tokens, not names.
        return {edit.genes: edit for edit in reversed(self.listed)}


def read_sets(address: str, store: Store) -> dict[str, list[str]]:
    """Named gene sets of a file: JSON `{name: [genes]}`, GMT, CSV, TSV, or text (one set, named after the file)."""
    from genescale.training.labels.gene_lists import ListAddress, read_lists

    parsed = ListAddress.parse(address)
    without = {name.upper() for name in parsed.without}
    lists = read_lists(parsed, store)
    return {name: [gene for gene in genes if gene.upper() not in without] for name, genes in lists.items()}


def _tokens(names: Iterable[str], vocabulary: Vocabulary, where: str) -> tuple[int, ...]:
    tokens = tuple(vocabulary.token(name) for name in names)
    if not tokens:
        raise InputError("no gene is named.", where=where, fix="Give gene ids or symbols.")
    return tokens


def _edit(genes: tuple[int, ...], vocabulary: Vocabulary) -> ListedEdit:
    if len(set(genes)) < len(genes):
        raise InputError(
            f"a gene stands twice in {TOGETHER.join(vocabulary.gene_of_token(gene) for gene in genes)}.",
            fix="Name each gene of an edit once.",
        )
    ids = [vocabulary.gene_of_token(gene) for gene in genes]
    symbols = [vocabulary.symbol_of(gene) for gene in ids]
    return ListedEdit(edit_id=TOGETHER.join(ids), symbol=TOGETHER.join(symbols), genes=genes)


def _checked(
    edits: Sequence[ListedEdit],
    written: Sequence[str],
    vocabulary: Vocabulary,
    options: EditOptions,
    *,
    merge: bool = True,
) -> EditSet:
    """An edit set in which every edit stands once and has what its kind needs."""
    if not edits:
        raise InputError("a screen needs at least one edit.", where="edits", fix="Name genes, or edit all of them.")
    seen: dict[object, ListedEdit] = {}
    merged = []
    for edit, name in zip(edits, written, strict=True):
        # The order of genes is part of an overexpression: the first comes to the front.
        key = edit.genes if options.kind == "overexpress" else frozenset(edit.genes)
        if merge and key in seen:
            merged.append(name)
        else:
            seen[key if merge else edit.edit_id] = edit
    _check_ranks(seen.values(), options)
    return EditSet(vocabulary=vocabulary, options=options, listed=tuple(seen.values()), merged=tuple(merged))


def _check_ranks(edits: Iterable[ListedEdit], options: EditOptions) -> None:
    """InputError for a listed edit of a gene that `replace` knows no rank for."""
    for edit in edits:
        if not all(options.has_rank(gene) for gene in edit.genes):
            raise InputError(
                f"{edit.symbol} stands in no cell of the other state, so it has no rank to be given.",
                where="edits",
                fix="Leave it out, or take the ranks from other cells.",
            )
