"""What one name is in a vocabulary: its fate and its token.

Ids decide alone. A symbol counts only when it names one gene: by the pinned table where one is given, else by the
vocabulary's own symbols; former symbols give way to a gene that the same file names otherwise.

Axis suffixes: `g` gene columns of the file.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from genescale.ingestion.annotation.gene_table import GeneTable
from genescale.ingestion.annotation.species import (
    ENSEMBL_ID,
    HUMAN,
    MOUSE_OR_RAT,
    VIRUS,
    GeneName,
    mouse_spelled,
    read_name,
    species_of_ids,
    usual_names,
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


@dataclasses.dataclass(frozen=True, eq=False)
class Resolved:
    """What the names of one column are: fates and tokens (-1 for none), and what is worth telling of them."""

    cores: Sequence[str]
    """The names in upper case without genome prefix and version."""
    fate_g: npt.NDArray[np.uint8]
    targets_g: npt.NDArray[np.int32]
    one_to_one_g: npt.NDArray[np.bool_]
    """Whether the name leads to exactly one gene, inside the vocabulary or outside."""
    versioned_g: npt.NDArray[np.bool_]
    """Whether a version was taken off."""
    prefixed_g: npt.NDArray[np.bool_]
    """Whether the prefix of a genome was taken off."""
    others: Counter[str]
    """Other species seen, with the number of their genes."""


class _Answer(NamedTuple):
    fate: int
    token: int = UNMAPPED
    one_to_one: bool = False
    former: bool = False
    species: str = ""

    @property
    def code(self) -> int:
        """All but the species in one number, so that a column of answers is one array."""
        return (self.token + 1) << _TOKEN_SHIFT | self.former * _FORMER | self.one_to_one * _ONE_TO_ONE | self.fate


_FATE_BITS, _ONE_TO_ONE, _FORMER, _TOKEN_SHIFT = 0xF, 1 << 4, 1 << 5, 8
_UNKNOWN_ID, _UNKNOWN_SYMBOL = _Answer(UNKNOWN, one_to_one=True), _Answer(UNKNOWN)


class _Known:
    """Answers by name for a whole column at once; `otherwise` for names without one."""

    def __init__(self, answers: Mapping[str, _Answer], otherwise: _Answer) -> None:
        self._names = pa.array(answers, pa.string())
        self._codes = np.array([*(answer.code for answer in answers.values()), otherwise.code], dtype=np.int64)

    def codes(self, names_g: pa.Array) -> npt.NDArray[np.int64]:
        places_g = pc.fill_null(pc.index_in(names_g, self._names), len(self._names)).to_numpy()
        return self._codes[places_g]


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

    @functools.cached_property
    def mitochondrial_tokens(self) -> npt.NDArray[np.int32]:
        """Tokens of the genes whose symbol in the vocabulary says that they are mitochondrial."""
        symbols = enumerate(self.vocabulary.symbols)
        places = [place for place, symbol in symbols if symbol.upper().startswith("MT-")]
        return np.asarray(self.vocabulary.token_ids)[places].astype(np.int32)

    @functools.cached_property
    def _ids(self) -> _Known:
        return _Known({core: self._of_id(core) for core in (*self._retired, *self._by_id)}, _UNKNOWN_ID)

    @functools.cached_property
    def _symbols(self) -> _Known:
        names = dict.fromkeys((*self._retired, *self._by_id, *self._approved, *self._former))
        return _Known({core: self._of_symbol(core) for core in names}, _UNKNOWN_SYMBOL)

    def resolve(self, texts: Sequence[str], marks: Sequence[str]) -> Resolved:
        """Fates and tokens of a column of names (g); marks: what the table says of each, see `feature_marks`.

        Nearly all names are plain ids or plain symbols, which are looked up together; only the others are read one by
        one.
        """
        column, cores = pa.array(texts, pa.string()), list(texts)
        unmarked_g = np.fromiter((mark in ("", self.home) for mark in marks), np.bool_, len(cores))
        ids_g, symbols_g = (mask & unmarked_g for mask in usual_names(column, self.home))
        codes_g, others = np.empty(len(cores), dtype=np.int64), Counter[str]()
        codes_g[ids_g] = self._ids.codes(column.filter(pa.array(ids_g)))
        codes_g[symbols_g] = self._codes_of_symbols(column.filter(pa.array(symbols_g)))
        versioned_g, prefixed_g = np.zeros((2, len(cores)), dtype=np.bool_)
        for g in np.flatnonzero(~(ids_g | symbols_g)).tolist():
            name = read_name(texts[g])
            answer = self._answer(name, marks[g])
            codes_g[g], cores[g], versioned_g[g], prefixed_g[g] = answer.code, name.core, name.versioned, name.prefixed
            others.update([answer.species] if answer.species else [])
        codes_g[_contested(cores, codes_g)] = _Answer(AMBIGUOUS).code
        return Resolved(
            cores=cores,
            fate_g=(codes_g & _FATE_BITS).astype(np.uint8),
            targets_g=((codes_g >> _TOKEN_SHIFT) - 1).astype(np.int32),
            one_to_one_g=(codes_g & _ONE_TO_ONE) > 0,
            versioned_g=versioned_g,
            prefixed_g=prefixed_g,
            others=others,
        )

    def _codes_of_symbols(self, symbols_g: pa.Array) -> npt.NDArray[np.int64]:
        if self.table is None:
            return self._symbols.codes(symbols_g)
        # A published table has over 100,000 names: asking it is cheaper than turning it around.
        return np.array([self._of_symbol(core).code for core in symbols_g.to_pylist()], dtype=np.int64)

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
        if name.kind == "id" or self._token(name.core) is not None:
            return self._of_id(name.core, exact=not name.prefixed and not name.versioned)
        if name.core and self.home == HUMAN and mouse_spelled(name.spelled):
            return _Answer(OTHER_SPECIES, species=MOUSE_OR_RAT)
        return self._of_symbol(name.core)

    def _token(self, gene_id: str) -> int | None:
        token = self._by_id.get(gene_id)
        return self._retired.get(gene_id) if token is None else token

    def _of_id(self, core: str, *, exact: bool = True) -> _Answer:
        """What an id is; exact: nothing had to be taken off it."""
        if (token := self._token(core)) is None:
            return _UNKNOWN_ID
        return _Answer(MAPPED if exact and core in self._by_id else RENAMED, token, one_to_one=True)

    def _of_symbol(self, core: str) -> _Answer:
        """What a symbol is; one that is spelled as an id of the vocabulary is that id."""
        if self._token(core) is not None:
            return self._of_id(core)
        former = False
        if self.table is not None:
            ids = self.table.find(core)
            if len(ids) != 1:
                return _Answer(AMBIGUOUS) if ids else _UNKNOWN_SYMBOL
            token, former = self._token(ids[0]), self.table.is_former(core)
        elif core in self._approved:
            if (token := self._approved[core]) is None:
                return _Answer(AMBIGUOUS)
        else:
            token, former = self._former.get(core), True
            if token is None:
                return _UNKNOWN_SYMBOL
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


def _contested(cores: Sequence[str], codes_g: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Places of former symbols (g) that lead to a gene which the file names otherwise as well.

    A symbol that was given up is often taken again: two names in one file are then two genes, not one.
    """
    former = np.flatnonzero(codes_g & _FORMER)
    tokens_g = codes_g >> _TOKEN_SHIFT
    reached: dict[int, set[str]] = {}
    for g in np.flatnonzero(np.isin(tokens_g, tokens_g[former])).tolist() if former.size else ():
        reached.setdefault(int(tokens_g[g]), set()).add(cores[g])
    return np.array([g for g in former.tolist() if len(reached[int(tokens_g[g])]) > 1], dtype=np.int64)
