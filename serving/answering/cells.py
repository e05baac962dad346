"""A cell of a request becomes tokens, by the same function as in ingestion, with an account of what was not used.

Axis suffixes: `g` names in the request, `t` tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from genescale.platform.errors import InputError
from genescale.platform.rank_value import rank_value_tokens
from genescale.platform.vocabulary import Vocabulary
from genescale.serving.schemas import CellAsked, CellFacts, Ignored, IgnoredGene, Merged, Reason
from genescale.serving.watching.noted import note_size

UNKNOWN = -1
# Named first where the list of ignored genes is cut: what a caller can act on.
REASONS: tuple[Reason, ...] = ("unknown", "no_median", "zero")


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedCell:
    """Tokens of one cell as the model takes them, those beyond the window, and what the answer says about it."""

    tokens: np.ndarray
    """`(t,)`, at most the window."""
    uncropped: np.ndarray
    """`(t,)`, all genes in rank order; the same as `tokens` where nothing was cropped."""
    facts: CellFacts

    @property
    def n_shown(self) -> int:
        """Genes that the model sees."""
        return self.facts.n_genes - (len(self.uncropped) - len(self.tokens))


class CellReader:
    """Turns the cells of one request into tokens; looks each gene name up once per request."""

    def __init__(self, vocabulary: Vocabulary, *, window: int, max_listed_genes: int) -> None:
        self.vocabulary, self.window, self.max_listed_genes = vocabulary, window, max_listed_genes
        self._token_of: dict[str, int] = {}

    def read(self, cell: CellAsked, *, where: str) -> PreparedCell:
        """Tokens of one cell; InputError names it by `where` when no gene of it can be used."""
        if cell.tokens is not None:
            return self.from_tokens(cell.id, np.asarray(cell.tokens, dtype=np.int64), f"{where}.tokens")
        if cell.counts is not None:
            names, values, where = list(cell.counts), list(cell.counts.values()), f"{where}.counts"
        else:
            names, values, where = cell.genes or [], cell.values or [], f"{where}.genes"
            check_names_differ(names, where)
        counts_g = np.asarray(values, dtype=np.float64)
        return self.from_counts(cell.id, names, self.lookup(names), counts_g, where)

    def from_counts(
        self, cell_id: str | None, names: Sequence[str], tokens_g: np.ndarray, counts_g: np.ndarray, where: str
    ) -> PreparedCell:
        """The cell of these counts; `tokens_g` is what `lookup` says of the names."""
        reasons_g = self._reasons(tokens_g, counts_g)
        used_g = reasons_g == _USED
        tokens, position_g = np.unique(tokens_g[used_g], return_inverse=True)
        if not len(tokens):
            raise _nothing_left(names, reasons_g, where)
        summed = np.bincount(position_g, weights=counts_g[used_g])
        everything = len(tokens) + len(self.vocabulary.special)
        ranked = rank_value_tokens(tokens, summed, self.vocabulary, window=self.window)
        whole = rank_value_tokens(tokens, summed, self.vocabulary, window=everything) if ranked.cropped else ranked
        facts = CellFacts(
            id=cell_id,
            n_genes=ranked.n_genes - ranked.n_unranked,
            n_tokens=len(ranked.input_ids),
            cropped=ranked.cropped,
            ignored=self._ignored(names, reasons_g),
            merged=self._merged(names, np.flatnonzero(used_g), tokens, position_g),
        )
        note_size(cells=1)
        return PreparedCell(tokens=ranked.input_ids, uncropped=whole.input_ids, facts=facts)

    def lookup(self, names: Sequence[str]) -> np.ndarray:
        """(g) int64: token of each name, UNKNOWN for a name of no gene."""
        new = [name for name in names if name not in self._token_of]
        self._token_of.update(zip(new, self.vocabulary.map_ids(new).tolist(), strict=True))
        return np.fromiter((self._token_of[name] for name in names), dtype=np.int64, count=len(names))

    def _reasons(self, tokens_g: np.ndarray, counts_g: np.ndarray) -> np.ndarray:
        """Index into REASONS of why each name is ignored, or _USED."""
        unknown_g = tokens_g == UNKNOWN
        medians_g = self.vocabulary.medians_t[np.where(unknown_g, 0, tokens_g)]
        conditions = [unknown_g, np.isnan(medians_g), counts_g == 0]
        return np.select(conditions, range(len(REASONS)), default=_USED)

    def _ignored(self, names: Sequence[str], reasons_g: np.ndarray) -> Ignored:
        by_reason = [np.flatnonzero(reasons_g == code).tolist() for code in range(len(REASONS))]
        listed = ((why, names[i]) for why, at in zip(REASONS, by_reason, strict=True) for i in at)
        genes = [IgnoredGene(gene=name, reason=why) for why, name in islice(listed, self.max_listed_genes)]
        n = [len(at) for at in by_reason]
        return Ignored(n=sum(n), unknown=n[0], no_median=n[1], zero=n[2], genes=genes)

    def _merged(
        self, names: Sequence[str], used: np.ndarray, tokens: np.ndarray, position_g: np.ndarray
    ) -> list[Merged]:
        repeated = np.flatnonzero(np.bincount(position_g) > 1)[: self.max_listed_genes]
        return [
            Merged(
                gene=self.vocabulary.gene_of_token(int(tokens[at])),
                names=[names[i] for i in used[position_g == at].tolist()],
            )
            for at in repeated
        ]

    def from_tokens(self, cell_id: str | None, given: np.ndarray, where: str) -> PreparedCell:
        """The cell of these gene tokens `(t,)` int64, with or without `<cls>` and `<eos>`."""
        genes = self._checked_genes(given, where)
        frame = 0 if self.vocabulary.cls is None else 2
        kept = genes[: self.window - frame]
        facts = CellFacts(
            id=cell_id,
            n_genes=len(genes),
            n_tokens=len(kept) + frame,
            cropped=len(kept) < len(genes),
            ignored=Ignored(n=0, unknown=0, no_median=0, zero=0, genes=[]),
            merged=[],
        )
        note_size(cells=1)
        return PreparedCell(tokens=self._framed(kept), uncropped=self._framed(genes), facts=facts)

    def _checked_genes(self, genes: np.ndarray, where: str) -> np.ndarray:
        v = self.vocabulary
        if (outside_t := (genes < 0) | (genes >= v.size)).any():
            raise InputError(
                f"token {genes[outside_t][0]} does not exist.",
                where=where,
                fix=f"Token ids run from 0 to {v.size - 1}.",
            )
        genes = genes[int(len(genes) > 0 and genes[0] == v.cls) :]
        genes = genes[: len(genes) - int(len(genes) > 0 and genes[-1] == v.eos)]
        if not len(genes):
            raise InputError("the cell has no gene.", where=where, fix="Give at least one gene token.")
        if np.isin(genes, list(v.special.values())).any():
            raise InputError("a special token stands among the genes.", where=where, fix="Leave out padding and masks.")
        tokens, times = np.unique(genes, return_counts=True)
        if (times > 1).any():
            most = int(times.argmax())
            name = v.gene_of_token(int(tokens[most]))
            raise InputError(f"token {tokens[most]} ({name}) stands there {times[most]} times.", where=where)
        return genes

    def _framed(self, genes: np.ndarray) -> np.ndarray:
        v = self.vocabulary
        whole = genes if v.cls is None or v.eos is None else np.concatenate([[v.cls], genes, [v.eos]])
        return whole.astype(v.token_dtype)


_USED = len(REASONS)


def check_names_differ(names: Sequence[str], where: str) -> None:
    """InputError for a name that stands twice: which of its counts is meant cannot be known."""
    if len(set(names)) < len(names):
        name, _ = Counter(names).most_common(1)[0]
        raise InputError(f"the gene '{name}' stands there twice.", where=where, fix="Name each gene once.")


def _nothing_left(names: Sequence[str], reasons_g: np.ndarray, where: str) -> InputError:
    if not len(names):
        return InputError("the cell has no counts.", where=where, fix="Give the raw count of each detected gene.")
    tally = ", ".join(f"{int((reasons_g == code).sum()):,} {why}" for code, why in enumerate(REASONS))
    return InputError(
        f"no gene of the cell can be ranked: of {len(names):,} names ({tally.replace('_', ' ')}) none is left.",
        where=where,
        fix=f"Name genes by Ensembl id or symbol; the first name given is {str(names[0])!r}.",
    )
