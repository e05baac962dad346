"""What one name is in a vocabulary: its fate and its token.

Ids decide alone. A symbol counts only when it names one gene: by the pinned table where one is given, else by the
vocabulary's own symbols; former symbols give way to a gene that the same file names otherwise.

Axis suffixes: `g` gene columns of the file.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from genescale.ingestion.gene_table import GeneTable
from genescale.ingestion.species import (
    ENSEMBL_ID,
    HUMAN,
    MOUSE_OR_RAT,
    VIRUS,
    GeneName,
    mouse_spelled,
    read_name,
    species_of_ids,
)
from genescale.platform.vocabulary import Vocabulary

UNMAPPED = -1
FATES: tuple[str, ...] = (
    "mapped", "renamed", "symbol", "unknown", "ambiguous", "spike_in", "other_species", "other_feature", "par_y",
)  # fmt: skip
"""What becomes of a gene column; the index is its code. mapped: an id of the vocabulary as it is written; renamed:
after a genome's prefix or a version was taken off, or by a retired id; symbol: by symbol; unknown: a gene outside the
vocabulary; ambiguous: a symbol of several genes; par_y: the copy of a gene on the Y chromosome."""
COUNTED = frozenset(("mapped", "renamed", "symbol", "unknown", "ambiguous", "par_y"))
"""Fates of genes of the right species, which make up a cell's library size."""
MAPPED, RENAMED, SYMBOL, UNKNOWN, AMBIGUOUS, SPIKE_IN, OTHER_SPECIES, OTHER_FEATURE, PAR_Y = range(len(FATES))


class Resolved(NamedTuple):
    """What the names of one column are: fates and tokens (-1 for none), and what is worth telling of them."""

    names: list[GeneName]
    fate_g: npt.NDArray[np.uint8]
    targets_g: npt.NDArray[np.int32]
    one_to_one_g: npt.NDArray[np.bool_]
    """Whether the name leads to exactly one gene, inside the vocabulary or outside."""
    others: Counter[str]
    """Other species seen, with the number of their genes."""


class _Answer(NamedTuple):
    fate: int
    token: int = UNMAPPED
    one_to_one: bool = False
    former: bool = False
    species: str = ""


class Resolver:
    """Looks names up in a vocabulary, with or without a table of symbols."""

    def __init__(self, vocabulary: Vocabulary, table: GeneTable | None = None) -> None:
        self.vocabulary, self.table = vocabulary, table
        self.home = species_of_ids(vocabulary.gene_ids)
        self._by_id = dict(zip(vocabulary.gene_ids, vocabulary.token_ids.tolist(), strict=True))
        self._retired, self._former = _aliases(vocabulary, self._by_id)
        self._approved: dict[str, int | None] = {}
        for gene, symbol in zip(vocabulary.gene_ids, vocabulary.symbols, strict=True):
            if symbol:
                key = symbol.upper()
                self._approved[key] = None if key in self._approved else self._by_id[gene]

    def resolve(self, texts: Sequence[str], marks: Sequence[str]) -> Resolved:
        """Fates and tokens of a column of names (g); marks: what the table says of each, see `feature_marks`."""
        names = [read_name(text) for text in texts]
        answers = [self._answer(name, mark) for name, mark in zip(names, marks, strict=True)]
        contested = _contested(names, answers)
        answers = [_Answer(AMBIGUOUS) if answer.former and answer.token in contested else answer for answer in answers]
        return Resolved(
            names,
            np.array([answer.fate for answer in answers], dtype=np.uint8),
            np.array([answer.token for answer in answers], dtype=np.int32),
            np.array([answer.one_to_one for answer in answers], dtype=np.bool_),
            Counter(answer.species for answer in answers if answer.species),
        )

    def _answer(self, name: GeneName, mark: str) -> _Answer:
        if mark == "spike_in" or name.kind == "spike_in":
            return _Answer(SPIKE_IN)
        if mark == "other_feature" or name.kind == "no_gene":
            return _Answer(OTHER_FEATURE)
        if name.kind == "virus":
            return _Answer(OTHER_SPECIES, species=VIRUS)
        species = name.species or mark
        if species and self.home and species != self.home:
            return _Answer(OTHER_SPECIES, species=species)
        if name.kind == "par_y":
            return _Answer(PAR_Y, one_to_one=True)
        if (token := self._token(name.core)) is not None:
            exact = name.core in self._by_id and not name.prefixed and not name.versioned
            return _Answer(MAPPED if exact else RENAMED, token, one_to_one=True)
        if name.kind == "id" or not name.core:
            return _Answer(UNKNOWN, one_to_one=bool(name.core))
        return self._symbol(name)

    def _token(self, gene_id: str) -> int | None:
        token = self._by_id.get(gene_id)
        return self._retired.get(gene_id) if token is None else token

    def _symbol(self, name: GeneName) -> _Answer:
        if self.home == HUMAN and mouse_spelled(name.spelled):
            return _Answer(OTHER_SPECIES, species=MOUSE_OR_RAT)
        if self.table is not None:
            ids = self.table.find(name.core)
            if len(ids) != 1:
                return _Answer(AMBIGUOUS if ids else UNKNOWN)
            token, former = self._token(ids[0]), self.table.is_former(name.core)
        elif name.core in self._approved:
            token, former = self._approved[name.core], False
            if token is None:
                return _Answer(AMBIGUOUS)
        else:
            token, former = self._former.get(name.core), True
            if token is None:
                return _Answer(UNKNOWN)
        if token is None:
            return _Answer(UNKNOWN, one_to_one=True)
        return _Answer(SYMBOL, token, one_to_one=True, former=former)


@functools.lru_cache(maxsize=4)
def resolver(vocabulary: Vocabulary, table: GeneTable | None = None) -> Resolver:
    """The resolver of a vocabulary and a table; kept, because one process maps many files with the same two."""
    return Resolver(vocabulary, table)


def _aliases(vocabulary: Vocabulary, by_id: dict[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """The vocabulary's retired ids and its former symbols."""
    retired: dict[str, int] = {}
    former: dict[str, int] = {}
    for alias, gene in vocabulary.aliases.items():
        (retired if ENSEMBL_ID.fullmatch(alias) else former)[alias] = by_id[gene]
    return retired, former


def _contested(names: Sequence[GeneName], answers: Sequence[_Answer]) -> set[int]:
    """Tokens that a former symbol leads to although the file names that gene otherwise as well.

    A symbol that was given up is often taken again: two names in one file are then two genes, not one.
    """
    wanted = {answer.token for answer in answers if answer.former}
    reached: dict[int, set[str]] = {}
    for name, answer in zip(names, answers, strict=True):
        if answer.token in wanted:
            reached.setdefault(answer.token, set()).add(name.core)
    return {token for token, cores in reached.items() if len(cores) > 1}
