"""Genes with a class, and where they stand in cells: what a gene classifier learns from.

A gene is one token, whatever it was called: symbols, retired ids and repeats are resolved before anything is split,
so that no gene can stand on both sides of a split under two names.

Axis suffixes: `g` labelled genes, `r` rows (one gene in one cell), `t` token ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from genescale.ingestion.corpus import Corpus
from genescale.platform.errors import CorpusError, InputError, UnknownGeneError
from genescale.platform.storage import Store
from genescale.platform.vocabulary import Vocabulary
from genescale.training.labels.gene_lists import GeneLists, ListAddress, read_lists

CELLS_AT_ONCE = 2_048
ROWS_BETWEEN_CUTS = 4_000_000
"""Rows held at most, roughly, before those above `max_rows_per_gene` are thrown away."""
_SHOWN = 5
OUTSIDE, AMBIGUOUS, EXCLUDED = "outside the vocabulary", "a symbol of several genes", "left out by the address"


@dataclass(frozen=True, kw_only=True, eq=False)
class GeneLabels:
    """Distinct genes of a vocabulary with their class, in the order of their ids."""

    tokens_g: npt.NDArray[np.int64]
    codes_g: npt.NDArray[np.int64]
    """Positions in `classes`."""
    classes: tuple[str, ...]
    """In the order of the address, or else of the file."""
    ids_g: tuple[str, ...]
    symbols_g: tuple[str, ...]
    """For display; the id where no symbol is known."""
    left_out: Mapping[str, tuple[str, ...]]
    """Names that are no labelled gene, as written, by reason."""
    merged: tuple[str, ...]
    """Names, as written, of genes that stood in their class before: under the same name or under another."""

    @property
    def counts(self) -> dict[str, int]:
        """Genes of each class."""
        numbers = np.bincount(self.codes_g, minlength=len(self.classes)).tolist()
        return dict(zip(self.classes, numbers, strict=True))


def read_gene_lists(
    uri: str, store: Store, vocabulary: Vocabulary, *, classes: Sequence[str] | None = None
) -> GeneLabels:
    """Read gene classes (forms: `gene_lists`), and find each gene by id, symbol, retired id or alias.

    classes: those to read, in this order, instead of the ones that the address names. Raises InputError when a gene
    stands in two classes, fewer than two classes are there, or a class has no gene of the vocabulary.
    """
    address = ListAddress.parse(uri)
    if classes is not None:
        address = ListAddress(
            uris=address.uris, section=address.section, classes=tuple(classes), without=address.without
        )
    return gene_labels(read_lists(address, store), vocabulary, without=address.without, where=str(address))


def gene_labels(
    lists: GeneLists, vocabulary: Vocabulary, *, without: Sequence[str] = (), where: str = "genes"
) -> GeneLabels:
    """The same from lists in memory, `{class: [names]}`; `without`: genes that are left out."""
    if len(lists) < 2:
        raise InputError(f"{len(lists)} class(es) of genes: {', '.join(lists)}.", where=where, fix="Give two or more.")
    # One that this vocabulary does not hold is out anyway.
    excluded = {token for name in without if (token := vocabulary.find(name)) is not None}
    left_out: dict[str, list[str]] = {OUTSIDE: [], AMBIGUOUS: [], EXCLUDED: []}
    merged: list[str] = []
    names_by_token: dict[int, dict[int, str]] = {}
    for code, names in enumerate(lists.values()):
        for name in names:
            token = vocabulary.find(name)
            if token is None:
                left_out[_reason(name, vocabulary)].append(name)
            elif token in excluded:
                left_out[EXCLUDED].append(name)
            elif code in names_by_token.setdefault(token, {}):
                merged.append(name)
            else:
                names_by_token[token][code] = name
    _refuse_conflicts(names_by_token, tuple(lists), vocabulary, where)
    code_by_token = {token: next(iter(codes)) for token, codes in names_by_token.items()}
    tokens = sorted(code_by_token, key=vocabulary.gene_of_token)
    labels = GeneLabels(
        tokens_g=np.array(tokens, dtype=np.int64),
        codes_g=np.array([code_by_token[token] for token in tokens], dtype=np.int64),
        classes=tuple(lists),
        ids_g=tuple(vocabulary.gene_of_token(token) for token in tokens),
        symbols_g=tuple(vocabulary.symbol_of(vocabulary.gene_of_token(token)) for token in tokens),
        left_out={reason: tuple(names) for reason, names in left_out.items() if names},
        merged=tuple(merged),
    )
    _refuse_empty(labels, lists, vocabulary, where)
    return labels


def _reason(name: str, vocabulary: Vocabulary) -> str:
    try:
        vocabulary.token(name)
    except UnknownGeneError as error:
        return AMBIGUOUS if "names" in error.what else OUTSIDE
    return OUTSIDE


def _refuse_conflicts(
    names_by_token: Mapping[int, Mapping[int, str]], classes: Sequence[str], vocabulary: Vocabulary, where: str
) -> None:
    """InputError when a gene stands in two classes, under whatever names."""
    doubled = {token: codes for token, codes in names_by_token.items() if len(codes) > 1}
    if not doubled:
        return
    shown = []
    for token, codes in list(doubled.items())[:_SHOWN]:
        gene = vocabulary.gene_of_token(token)
        written = ", ".join(f"'{name}' in {classes[code]}" for code, name in codes.items())
        shown.append(f"{gene} ({vocabulary.symbol_of(gene)}): {written}")
    ids = ",".join(vocabulary.gene_of_token(token) for token in doubled) if len(doubled) <= _SHOWN else "ID,ID,…"
    raise InputError(
        f"{len(doubled):,} gene(s) stand in two classes: {'; '.join(shown)}{'; …' if len(doubled) > _SHOWN else ''}.",
        where=where,
        fix=f"Decide for one class in the lists, or leave such genes out: add ';without={ids}' to the address"
        f"{'' if '#' in where else ', after a #'}.",
    )


def _refuse_empty(labels: GeneLabels, lists: GeneLists, vocabulary: Vocabulary, where: str) -> None:
    for name, count in labels.counts.items():
        if not count:
            raise InputError(
                f"none of the {len(lists[name])} genes of class '{name}' is usable ({_summary(labels)}).",
                where=where,
                fix=f"Give Ensembl ids or symbols that {vocabulary.name or 'the vocabulary'} holds.",
            )


def _summary(labels: GeneLabels) -> str:
    parts = [f"{len(names)} {reason}: {', '.join(names[:_SHOWN])}" for reason, names in labels.left_out.items()]
    return "; ".join(parts) or "all in other classes"


@dataclass(frozen=True, kw_only=True, eq=False)
class GeneRows:
    """Where labelled genes stand: one row for one gene in one cell, by cell and then by position."""

    row_cell: npt.NDArray[np.int64]
    """(r) position of the cell in the indices that were given."""
    row_token: npt.NDArray[np.int64]
    """(r) position of the token in the cell."""
    gene: npt.NDArray[np.int64]
    """(r) position of the gene in the tokens that were given."""

    def __iter__(self) -> Iterator[npt.NDArray[np.int64]]:
        """The three columns, for `row_cell, row_token, gene = gene_rows(…)`."""
        return iter((self.row_cell, self.row_token, self.gene))

    def __len__(self) -> int:
        return len(self.gene)


def gene_rows(
    corpus: Corpus, cells: npt.ArrayLike, tokens_g: npt.ArrayLike, max_rows_per_gene: int = 0, seed: int = 0
) -> GeneRows:
    """Every place of the genes `tokens_g` in the cells with global indices `cells`, read a block at a time.

    max_rows_per_gene: cells that a gene is read from at most (0: all). They are the first in one seeded order of the
    cells, the same for every gene, so that genes share cells and few cells have to be encoded. Which they are does not
    depend on the order in which the cells are given. Raises CorpusError when no gene occurs in any cell.
    """
    index_n, wanted_g = np.asarray(cells, dtype=np.int64), np.asarray(tokens_g, dtype=np.int64)
    gene_t = np.full(corpus.vocabulary.size, -1, dtype=np.int64)
    gene_t[wanted_g] = np.arange(len(wanted_g))
    rank_n = np.argsort(np.argsort(_cell_keys(index_n, seed), kind="stable"), kind="stable")
    held, n_held = [np.zeros((3, 0), dtype=np.int64)], 0
    order = np.argsort(index_n, kind="stable")
    for start in range(0, len(order), CELLS_AT_ONCE):
        positions = order[start : start + CELLS_AT_ONCE]
        held.append(_places(corpus.tokens(index_n[positions].tolist()), positions, gene_t))
        n_held += held[-1].shape[1]
        if max_rows_per_gene and n_held > ROWS_BETWEEN_CUTS:
            held = [_first_rows(np.concatenate(held, axis=1), rank_n, max_rows_per_gene)]
            n_held = 0
    rows = np.concatenate(held, axis=1)
    if max_rows_per_gene:
        rows = _first_rows(rows, rank_n, max_rows_per_gene)
    if not rows.shape[1]:
        raise CorpusError(
            f"none of the {len(wanted_g)} labelled genes occurs in the {len(index_n):,} cells.",
            where=f"{corpus.uri}@{corpus.version}",
            fix="Choose other cells or genes.",
        )
    row_cell, row_token, gene = rows[:, np.lexsort((rows[1], rows[0]))]
    return GeneRows(row_cell=row_cell, row_token=row_token, gene=gene)


def _places(
    tokens: Sequence[npt.NDArray[np.integer]], positions: npt.NDArray[np.int64], gene_t: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """(3, r): cell, position in it, gene, of the labelled genes among these tokens."""
    lengths = np.array([len(cell) for cell in tokens], dtype=np.int64)
    gene = gene_t[np.concatenate(tokens).astype(np.int64)]
    place = np.arange(len(gene)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    found = gene >= 0
    return np.stack([np.repeat(positions, lengths)[found], place[found], gene[found]])


def _first_rows(rows: npt.NDArray[np.int64], rank_n: npt.NDArray[np.int64], most: int) -> npt.NDArray[np.int64]:
    """Of each gene the rows of the `most` cells that come first in the order `rank_n`."""
    rows = rows[:, np.lexsort((rank_n[rows[0]], rows[2]))]
    starts = np.flatnonzero(np.r_[True, rows[2][1:] != rows[2][:-1]]) if rows.shape[1] else np.zeros(0, dtype=int)
    nth = np.arange(rows.shape[1]) - np.repeat(starts, np.diff(np.r_[starts, rows.shape[1]]))
    return rows[:, nth < most]


def _cell_keys(index_n: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.uint64]:
    """A pseudo-random number for each cell that only depends on its index and the seed (splitmix64, Steele 2014)."""
    key = index_n.astype(np.uint64) + np.uint64(np.random.default_rng(seed).integers(2**63))
    key = (key + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return key ^ (key >> np.uint64(31))
