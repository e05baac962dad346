"""The vocabulary: gene id, symbol, token id, non-zero median, aliases and special tokens as one object.

A token without its median means nothing, so they travel together, in one Parquet file with a digest. Two published
layouts import exactly: 25,426 tokens (`<pad>` 0, `<mask>` 1; window 2,048) and 20,275 (`<cls>` 2 and `<eos>` 3 as well;
window 4,096). Reading and writing files is in `vocabulary_files.py`.

Axis suffixes: `t` token ids (0 … size-1). Arrays without a suffix are aligned with `gene_ids`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from genescale.platform.errors import UnknownGeneError, VocabularyError, did_you_mean

if TYPE_CHECKING:
    from pathlib import Path

    from genescale.platform.storage import Store

PAD, MASK, CLS, EOS = "<pad>", "<mask>", "<cls>", "<eos>"
SPECIAL_TOKENS = (PAD, MASK, CLS, EOS)
# The published layouts: sequences framed by <cls> and <eos> were trained on 4,096 positions, bare ones on 2,048.
FRAMED_WINDOW, BARE_WINDOW = 4_096, 2_048
LOW_MEDIAN = 0.05
TIED_GENES = 3
PLACEHOLDER_GENES = 20
_VERSIONED_ID = re.compile(r"(ENS[A-Z]*[0-9]{6,})\.[0-9]+")
_LONGEST_GENE_NAME = 64


def canonical_id(gene: str) -> str:
    """A gene id in upper case without its version: `ensg00000141510.12` becomes `ENSG00000141510`."""
    name = gene.strip().upper()
    match = _VERSIONED_ID.fullmatch(name)
    return match[1] if match else name


def inferred_window(special: Iterable[str]) -> int:
    """Tokens per cell that the published layout with these special tokens uses."""
    return FRAMED_WINDOW if CLS in special else BARE_WINDOW


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
    """Genes and special tokens with their ids; compares, hashes and is recorded by `digest`.

    token_ids: int32; medians: float64, NaN where a gene has none (both aligned with gene_ids, rising by token id).
    aliases: upper-case retired ids, synonyms and symbols -> gene id. Raises VocabularyError when the parts do not fit.
    """

    name: str
    window: int
    gene_ids: tuple[str, ...]
    symbols: tuple[str, ...]
    token_ids: npt.NDArray[np.int32]
    medians: npt.NDArray[np.float64]
    special: dict[str, int]
    aliases: dict[str, str]

    def __post_init__(self) -> None:
        tokens, medians = np.asarray(self.token_ids), np.asarray(self.medians, dtype=np.float64)
        if not len(self.gene_ids) == len(self.symbols) == tokens.size == medians.size:
            raise VocabularyError("gene ids, symbols, token ids and medians differ in number.", where=self.name)
        order = np.argsort(tokens, kind="stable")
        _set(self, "gene_ids", tuple(self.gene_ids[i] for i in order))
        _set(self, "symbols", tuple(self.symbols[i] for i in order))
        _set(self, "token_ids", _read_only(tokens[order].astype(np.int32)))
        _set(self, "medians", _read_only(medians[order]))
        _set(self, "special", dict(sorted(self.special.items(), key=lambda item: item[1])))
        _set(self, "aliases", {a: g for a, g in sorted(self.aliases.items()) if a != g})
        _check(self)

    @classmethod
    def build(
        cls,
        gene_ids: Sequence[str],
        medians: npt.ArrayLike,
        *,
        symbols: Sequence[str] | None = None,
        window: int | None = None,
        name: str = "",
        special: Sequence[str] = SPECIAL_TOKENS,
        aliases: Mapping[str, str] | None = None,
    ) -> Vocabulary:
        """A new vocabulary: special tokens first, then the genes in the order of their ids."""
        order = sorted(range(len(gene_ids)), key=lambda i: gene_ids[i].upper())
        values = np.asarray(medians, dtype=np.float64)
        return cls(
            name=name,
            window=inferred_window(special) if window is None else window,
            gene_ids=tuple(gene_ids[i].upper() for i in order),
            symbols=tuple(symbols[i] if symbols is not None else "" for i in order),
            token_ids=np.arange(len(special), len(special) + len(order), dtype=np.int32),
            medians=values[order] if len(order) == values.size else values,
            special={token: i for i, token in enumerate(special)},
            aliases=dict(aliases or {}),
        )

    @property
    def size(self) -> int:
        """Number of token ids: rows of an embedding table."""
        return len(self.gene_ids) + len(self.special)

    @property
    def pad(self) -> int:
        """Token id of `<pad>`."""
        return self.special[PAD]

    @property
    def mask(self) -> int:
        """Token id of `<mask>`."""
        return self.special[MASK]

    @property
    def cls(self) -> int | None:
        """Token id of `<cls>`, or None in layouts without it."""
        return self.special.get(CLS)

    @property
    def eos(self) -> int | None:
        """Token id of `<eos>`, or None in layouts without it."""
        return self.special.get(EOS)

    @property
    def token_dtype(self) -> type[np.uint16] | type[np.uint32]:
        """Smallest of uint16 and uint32 that holds every token id."""
        return np.uint16 if self.size <= 1 << 16 else np.uint32

    @cached_property
    def medians_t(self) -> npt.NDArray[np.float64]:
        """Medians by token id; NaN at special tokens and at genes without a median."""
        by_token_t = np.full(self.size, np.nan)
        by_token_t[self.token_ids] = self.medians
        return _read_only(by_token_t)

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of everything that decides tokens; the name is a label and does not count."""
        content = {
            "window": self.window,
            "special": self.special,
            "genes": list(zip(self.gene_ids, self.symbols, self.token_ids.tolist(), strict=True)),
            "medians": [value.hex() for value in self.medians.tolist()],
            "aliases": self.aliases,
        }
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode("ascii")).hexdigest()

    def gene_of_token(self, token: int) -> str:
        """Gene id (or the special token's text) behind a token id; raises VocabularyError outside the range."""
        try:
            return self._names_t[token] if token >= 0 else self._names_t[self.size]
        except IndexError:
            raise VocabularyError(
                f"token {token} does not exist.", where=self.name, fix=f"Token ids run from 0 to {self.size - 1}."
            ) from None

    def symbol_of(self, gene_id: str) -> str:
        """Symbol of a gene for display; the id itself where no symbol is known."""
        return self._symbol_by_id.get(gene_id) or gene_id

    def find(self, gene: str) -> int | None:
        """Token id of a gene given by id (version suffix allowed), symbol or alias; None when unknown or ambiguous."""
        token = self._token_by_name.get(gene.strip().upper())
        return self._token_by_name.get(canonical_id(gene)) if token is None else token

    def token(self, gene: str) -> int:
        """As `find`, but raises UnknownGeneError, which names the nearest symbol or why the name is ambiguous."""
        if (token := self.find(gene)) is not None:
            return token
        shown, where = gene.strip()[:_LONGEST_GENE_NAME], self.name or "the vocabulary"
        if twins := self._ambiguous.get(shown.upper()):
            raise UnknownGeneError(
                f"the symbol '{shown}' names {len(twins)} genes.", where=where, fix=f"Use an id: {', '.join(twins)}."
            )
        fix = did_you_mean(shown.upper(), self._near(shown.upper())) or "Use an Ensembl gene id or a gene symbol."
        raise UnknownGeneError(f"the gene '{shown}' is not in the vocabulary.", where=where, fix=fix)

    def map_ids(self, ids: Sequence[str]) -> npt.NDArray[np.int32]:
        """Token id of each gene id, symbol or alias; -1 where there is none (int32, aligned with `ids`)."""
        found = (self.find(gene) for gene in ids)
        return np.fromiter((-1 if token is None else token for token in found), dtype=np.int32, count=len(ids))

    def to_parquet_bytes(self) -> bytes:
        """This vocabulary as one Parquet file, which carries its digest."""
        from genescale.platform.vocabulary_files import to_parquet_bytes

        return to_parquet_bytes(self)

    @staticmethod
    def from_parquet_bytes(data: bytes, *, where: str = "vocabulary.parquet") -> Vocabulary:
        """Read `to_parquet_bytes`; raises VocabularyError, or IntegrityError when the digest does not fit."""
        from genescale.platform.vocabulary_files import from_parquet_bytes

        return from_parquet_bytes(data, where=where)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and other.digest == self.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        genes = f"{len(self.gene_ids):,} genes, window {self.window:,}"
        return f"Vocabulary({self.name or 'unnamed'}, {genes}, {self.digest[:12]})"

    def __getstate__(self) -> dict[str, Any]:
        # Lookup tables are cheap to rebuild and would triple what travels to a Ray worker.
        return {field.name: self.__dict__[field.name] for field in dataclasses.fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _read_only(self.token_ids), _read_only(self.medians)

    @cached_property
    def _names_t(self) -> list[str]:
        by_token = {token: name for name, token in self.special.items()}
        by_token |= dict(zip(self.token_ids.tolist(), self.gene_ids, strict=True))
        return [by_token[token] for token in range(self.size)]

    @cached_property
    def _symbol_by_id(self) -> dict[str, str]:
        return dict(zip(self.gene_ids, self.symbols, strict=True))

    @cached_property
    def _ambiguous(self) -> dict[str, list[str]]:
        """Symbols of several genes -> those genes; none of them may be chosen silently."""
        repeated = {name for name, times in Counter(s.upper() for s in self.symbols if s).items() if times > 1}
        genes: dict[str, list[str]] = {}
        for gene, symbol in zip(self.gene_ids, self.symbols, strict=True):
            if symbol.upper() in repeated:
                genes.setdefault(symbol.upper(), []).append(gene)
        return genes

    @cached_property
    def _token_by_name(self) -> dict[str, int]:
        """Upper-case names -> token id. Ids win over aliases, aliases over symbols; special tokens are no genes."""
        by_id = dict(zip(self.gene_ids, self.token_ids.tolist(), strict=True))
        symbols = {s.upper(): by_id[g] for g, s in zip(self.gene_ids, self.symbols, strict=True) if s}
        unique = {name: token for name, token in symbols.items() if name not in self._ambiguous}
        return unique | {alias: by_id[gene] for alias, gene in self.aliases.items()} | by_id

    def _near(self, name: str) -> Iterable[str]:
        """Symbols worth comparing with a misspelt name: comparing with all of them takes seconds."""
        near = [s for s in self.symbols if s[:1].upper() == name[:1] and abs(len(s) - len(name)) <= 2]
        return [s for s in near if sorted(s.upper()) == sorted(name)] or near


def _set(vocabulary: Vocabulary, field: str, value: object) -> None:
    object.__setattr__(vocabulary, field, value)


def _read_only(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    values.setflags(write=False)
    return values


def _check(vocabulary: Vocabulary) -> None:
    """Raise VocabularyError unless ids are unique, token ids complete, medians positive and aliases lead somewhere."""
    v, where = vocabulary, vocabulary.name
    if v.window < len(v.special) + 1:
        raise VocabularyError(f"a window of {v.window} tokens holds no gene.", where=where, fix="Use for example 2048.")
    if missing := [token for token in (PAD, MASK) if token not in v.special]:
        raise VocabularyError(f"the special token {missing[0]} is missing.", where=where)
    if unknown := [token for token in v.special if token not in SPECIAL_TOKENS]:
        raise VocabularyError(f"unknown special token {unknown[0]}.", where=where, fix=f"Known: {SPECIAL_TOKENS}.")
    if (CLS in v.special) != (EOS in v.special):
        raise VocabularyError("<cls> and <eos> come together or not at all.", where=where)
    if repeated := [gene for gene, times in Counter(v.gene_ids).items() if times > 1]:
        raise VocabularyError(f"{len(repeated)} gene ids are repeated, for example {repeated[0]}.", where=where)
    if odd := [gene for gene in v.gene_ids if not gene or gene != gene.strip().upper() or gene in v.special]:
        raise VocabularyError(f"the gene id {odd[0]!r} is empty, not upper-case or a special token.", where=where)
    ids = np.sort(np.concatenate([v.token_ids, np.fromiter(v.special.values(), dtype=np.int64)]))
    if not np.array_equal(ids, np.arange(ids.size)):
        raise VocabularyError(f"token ids are not 0 … {ids.size - 1} without gap or repeat.", where=where)
    if (bad := np.flatnonzero(~((v.medians > 0) & np.isfinite(v.medians)) & ~np.isnan(v.medians))).size:
        gene, value = v.gene_ids[bad[0]], v.medians[bad[0]]
        raise VocabularyError(
            f"the median of {gene} is {value}; a non-zero median is positive.",
            where=where,
            fix="Leave it empty if unknown.",
        )
    known = set(v.gene_ids)
    if lost := [
        alias for alias, gene in v.aliases.items() if gene not in known or alias in known or alias != alias.upper()
    ]:
        raise VocabularyError(
            f"the alias {lost[0]!r} is a gene id itself, not upper-case, or leads to no gene.", where=where
        )


def lint(vocabulary: Vocabulary) -> list[str]:
    """Warnings about medians that distort ranks; an empty list when there is nothing to warn of."""
    medians = vocabulary.medians[np.isfinite(vocabulary.medians)]
    warnings = []
    if absent := len(vocabulary.gene_ids) - medians.size:
        warnings.append(f"{absent:,} genes have no median: they are never ranked, only counted.")
    values, times = np.unique(medians, return_counts=True)
    for value, count in zip(values[times >= PLACEHOLDER_GENES], times[times >= PLACEHOLDER_GENES], strict=True):
        warnings.append(f"{count:,} genes share the median {value:.7g}: a placeholder, their ranks mean little.")
    if tied := int(times[(times >= TIED_GENES) & (times < PLACEHOLDER_GENES)].sum()):
        warnings.append(f"{tied:,} genes share their median with two or more others: ties are likely.")
    if low := int((medians < LOW_MEDIAN).sum()):
        warnings.append(
            f"{low:,} genes have a median below {LOW_MEDIAN}: when detected they move to the front of a cell."
        )
    return warnings


def read_vocabulary(uri: str, store: Store) -> Vocabulary:
    """The vocabulary at `uri`: our Parquet or TSV, a published token dictionary, or a folder with one published set."""
    from genescale.platform.vocabulary_files import read_any

    return read_any(uri, store)


def import_published(
    tokens: Path, medians: Path, *, names: Path | None = None, aliases: Path | None = None, name: str = ""
) -> Vocabulary:
    """A published set of dictionaries (pickles, read without running them) as a vocabulary.

    Raises VocabularyError when a file holds anything but texts and numbers, or when the dictionaries do not fit.
    """
    from genescale.platform.vocabulary_files import PublishedSet, from_published

    optional = {"names": names, "aliases": aliases}
    files = PublishedSet(
        tokens=(str(tokens), tokens.read_bytes()),
        medians=(str(medians), medians.read_bytes()),
        **{key: (str(path), path.read_bytes()) for key, path in optional.items() if path is not None},
    )
    return from_published(files, name=name or tokens.stem.removeprefix("token_dictionary").strip("_"))
