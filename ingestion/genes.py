"""Gene columns of an atlas file: which of them hold ids, what they are in a vocabulary, and how their counts add up.

Axis suffixes: `n` cells, `g` gene columns of the file.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from scipy import sparse

from genescale.ingestion.h5ad import ENSEMBL_ID, INDEX, CountBlock
from genescale.platform.errors import AtlasError
from genescale.platform.vocabulary import Vocabulary, canonical_id

UNMAPPED = -1


@dataclasses.dataclass(frozen=True, eq=False)
class GeneMap:
    """Where each gene column goes: `targets_g` holds a token id (or another number), -1 for columns that are dropped.

    column: where the ids stand in the file; n_summed: columns that share their target with another one.
    """

    column: str
    targets_g: npt.NDArray[np.int64]
    n_versioned: int

    @property
    def n_mapped(self) -> int:
        """Columns that are kept."""
        return int((self.targets_g >= 0).sum())

    @property
    def n_dropped(self) -> int:
        """Columns that are not kept; their counts still belong to the library size."""
        return int((self.targets_g < 0).sum())

    @property
    def n_summed(self) -> int:
        """Columns that are added to another column of the same gene."""
        mapped = self.targets_g[self.targets_g >= 0]
        return int(mapped.size - np.unique(mapped).size)


def ensembl_share(names: Sequence[str]) -> float:
    """Share of the names that look like Ensembl gene ids."""
    return sum(bool(ENSEMBL_ID.fullmatch(name.strip().upper())) for name in names) / max(len(names), 1)


def map_to_vocabulary(
    candidates: Mapping[str, Sequence[str]],
    vocabulary: Vocabulary,
    *,
    min_share: float,
    min_share_of_symbols: float,
    where: str,
) -> GeneMap:
    """Map gene columns through the candidate (index or id column) of which the vocabulary knows most.

    Raises AtlasError when it knows too few: of Ensembl ids `min_share` is enough (atlases list genes that no vocabulary
    holds), of symbols `min_share_of_symbols` is asked, because symbols of another species or era partly fit by chance.
    """
    mapped = {name: vocabulary.map_ids(list(ids)) for name, ids in candidates.items()}
    best = max(mapped, key=lambda name: int((mapped[name] >= 0).sum()))
    ids, tokens = candidates[best], mapped[best]
    share, are_ids = float((tokens >= 0).mean()), ensembl_share(ids) >= 0.5
    if share < (min_share if are_ids else min_share_of_symbols) or not share:
        known = int((tokens >= 0).sum())
        raise AtlasError(
            f"the vocabulary knows {known:,} of {len(ids):,} genes ({_seen(ids, are_ids)} in var {_named(best)}).",
            where=where,
            fix="Give human genes as Ensembl ids in the var index, or in var['ensembl_id'].",
        )
    versioned = sum(canonical_id(name) != name.strip().upper() for name in ids)
    return GeneMap(best, tokens.astype(np.int64), versioned)


def ensembl_column(candidates: Mapping[str, Sequence[str]], *, where: str) -> str:
    """The candidate that holds Ensembl gene ids; AtlasError when none does."""
    best = max(candidates, key=lambda name: ensembl_share(candidates[name]))
    if ensembl_share(candidates[best]) < 0.5:
        raise AtlasError(
            f"no Ensembl gene ids found ({_seen(candidates[best], False)} in var {_named(best)}).",
            where=where,
            fix="A new vocabulary needs ids: give them in the var index, or in var['ensembl_id'].",
        )
    return best


def _seen(ids: Sequence[str], are_ids: bool) -> str:
    if not are_ids:
        return f"symbols or other names such as '{next(iter(ids), '')[:40]}'"
    species = Counter(match[0] for name in ids if (match := re.match(r"ENS[A-Z]*?G(?=[0-9])", name.strip().upper())))
    return f"ids of the kind {species.most_common(1)[0][0]}…" if species else "unusual Ensembl ids"


def _named(column: str) -> str:
    return "index" if column == INDEX else f"column '{column}'"


def library_sizes(block: CountBlock) -> npt.NDArray[np.float64]:
    """Sum of the counts of each cell over all genes of the file (n)."""
    before = np.concatenate(([0.0], np.cumsum(block.counts)))
    return before[block.indptr[1:]] - before[block.indptr[:-1]]


def gathered(block: CountBlock, targets_g: npt.NDArray[np.int64], n_targets: int) -> sparse.csr_matrix:
    """Counts by target (n × n_targets, float64): dropped columns taken out, shared targets and repeated entries summed.

    Targets of a row come sorted. Counts are whole numbers, so sums are exact in any order.
    """
    targets = targets_g[block.indices]
    kept = targets >= 0
    kept_before = np.concatenate(([0], np.cumsum(kept)))
    matrix = sparse.csr_matrix(
        (block.counts[kept], targets[kept], kept_before[block.indptr]), shape=(len(block.indptr) - 1, n_targets)
    )
    matrix.sum_duplicates()
    return matrix
