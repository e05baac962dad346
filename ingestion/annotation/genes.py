"""Gene columns of an atlas: which column of the gene table names them, and what each of them is in a vocabulary.

Every column of the matrix gets a fate. Genes of the vocabulary's species belong to a cell's library size whether the
vocabulary knows them or not; spike-ins, genes of other species and features that are no genes do not.

Axis suffixes: `g` gene columns of the file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from genescale.ingestion.annotation.gene_checks import gene_notes, organism_notes, raise_if_unfit
from genescale.ingestion.annotation.gene_columns import AUTO_COLUMN, candidates, feature_marks
from genescale.ingestion.annotation.gene_columns import INDEX as INDEX
from genescale.ingestion.annotation.gene_columns import ensembl_column as ensembl_column
from genescale.ingestion.annotation.gene_columns import gene_columns as gene_columns
from genescale.ingestion.annotation.gene_columns import ids_and_symbols as ids_and_symbols
from genescale.ingestion.annotation.gene_columns import symbols as symbols
from genescale.ingestion.annotation.gene_names import COUNTED as COUNTED
from genescale.ingestion.annotation.gene_names import FATES as FATES
from genescale.ingestion.annotation.gene_names import Resolved, Resolver, resolver
from genescale.ingestion.annotation.gene_report import GeneReport as GeneReport
from genescale.ingestion.annotation.gene_report import gene_report as gene_report
from genescale.ingestion.annotation.gene_report import gene_report_of_table as gene_report_of_table
from genescale.ingestion.annotation.gene_report import gene_table_bytes as gene_table_bytes
from genescale.ingestion.annotation.gene_table import GeneTable
from genescale.ingestion.annotation.species import MITOCHONDRIAL_IDS, ensembl_share
from genescale.platform.errors import SettingsError
from genescale.platform.vocabulary import Vocabulary

if TYPE_CHECKING:
    from genescale.ingestion.atlas import Atlas

# A whole transcriptome, filtered by any usual rule, keeps more genes than this; panels of up to 6,000 genes and
# selections of variable genes have fewer.
MIN_GENES_MEASURED = 6_500
_COUNTED_CODES = np.array([fate in COUNTED for fate in FATES])
# Ids are surer than symbols: symbols are taken only when they name a quarter more genes.
_GAIN_OF_SYMBOLS = 1.25


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneRules:
    """How gene columns are named, and when too few of them are known."""

    gene_column: str = AUTO_COLUMN
    """Column of the gene table that names the genes: `auto`, `index` or its name."""
    gene_table: str = ""
    """Address of a table of symbols and Ensembl ids; without it the vocabulary's own symbols are used."""
    min_share: float = 0.1
    """Share of a file's Ensembl ids that the vocabulary must know: references list many that no vocabulary has."""
    min_share_of_symbols: float = 0.7
    """Share of a file's symbols that must name exactly one gene."""
    min_genes_measured: int = 0
    """Vocabulary genes that a file must have; 0 asks for 6,500, or a third of a smaller vocabulary."""
    ignore_organism: bool = False
    """Go by the gene names although the file declares another organism."""

    def __post_init__(self) -> None:
        if not (0 < self.min_share <= 1 and 0 < self.min_share_of_symbols <= 1):
            raise SettingsError("a share of genes lies outside 0 … 1.", fix="Use for example 0.1.")
        if self.min_genes_measured < 0:
            raise SettingsError(
                f"min_genes_measured is {self.min_genes_measured}.", fix="Use 0 for the default, or 1 or more."
            )
        if not self.gene_column:
            raise SettingsError("gene_column is empty.", fix="Use auto, index or the name of a column.")

    def genes_asked(self, vocabulary: Vocabulary) -> int:
        """Vocabulary genes that a file must have."""
        return self.min_genes_measured or min(MIN_GENES_MEASURED, len(vocabulary.gene_ids) // 3)


@dataclasses.dataclass(frozen=True, eq=False)
class GeneMap:
    """What each gene column of a file is.

    column: where the names stand in the file; targets_g: token id, -1 for columns that are dropped; fate_g: index into
    FATES; counted_g: whether it belongs to the library size; mito_g: mitochondrial gene; genes: names as the file has
    them; notes: what a user should know.
    """

    column: str
    targets_g: npt.NDArray[np.int32]
    fate_g: npt.NDArray[np.uint8]
    counted_g: npt.NDArray[np.bool_]
    mito_g: npt.NDArray[np.bool_]
    n_versioned: int
    notes: tuple[str, ...] = ()
    genes: tuple[str, ...] = ()

    @property
    def n_mapped(self) -> int:
        """Columns that are kept."""
        return int((self.targets_g >= 0).sum())

    @property
    def n_dropped(self) -> int:
        """Columns that are not kept."""
        return int((self.targets_g < 0).sum())

    @property
    def n_measured(self) -> int:
        """Vocabulary genes that the file has."""
        return int(np.unique(self.targets_g[self.targets_g >= 0]).size)

    @property
    def n_summed(self) -> int:
        """Columns that are added to another column of the same gene."""
        return self.n_mapped - self.n_measured

    def by_fate(self) -> dict[str, int]:
        """Columns of each fate, those that occur, in the order of FATES."""
        counts = np.bincount(self.fate_g, minlength=len(FATES)).tolist()
        return {fate: count for fate, count in zip(FATES, counts, strict=True) if count}


def map_genes(atlas: Atlas, vocabulary: Vocabulary, *, rules: GeneRules, table: GeneTable | None = None) -> GeneMap:
    """What the gene columns of an atlas are in a vocabulary.

    table: the content of `rules.gene_table`. Raises AtlasError when the file is of another species, when the vocabulary
    knows too small a share of its genes, or when it measures too few vocabulary genes to be compared.
    """
    if rules.gene_table and table is None:
        raise SettingsError(
            "the gene table was named but not read.", where=rules.gene_table, fix="Read it with `read_gene_table`."
        )
    lookup = resolver(vocabulary, table)
    columns = candidates(atlas.var, rules.gene_column, where=atlas.uri)
    column, found = _best(columns, feature_marks(atlas.var), lookup)
    raise_if_unfit(atlas, column, columns[column], found, lookup, rules)
    return GeneMap(
        column=column,
        targets_g=found.targets_g,
        fate_g=found.fate_g,
        counted_g=_COUNTED_CODES[found.fate_g],
        mito_g=_mitochondrial(found, symbols(atlas, columns), lookup),
        n_versioned=int(found.versioned_g.sum()),
        notes=(*gene_notes(columns[column], found), *organism_notes(atlas, lookup.home)),
        genes=tuple(columns[column]),
    )


def _best(columns: Mapping[str, Sequence[str]], marks: Sequence[str], lookup: Resolver) -> tuple[str, Resolved]:
    """The column that the vocabulary knows best, resolved; of two that it knows about as well, the one with ids."""
    by_ids = {name: ensembl_share(texts) >= 0.5 for name, texts in columns.items()}
    tried: dict[str, Resolved] = {}
    weights: dict[str, tuple[float, int]] = {}
    for name in sorted(columns, key=lambda name: not by_ids[name]):
        tried[name] = lookup.resolve(columns[name], marks)
        known = int((tried[name].targets_g >= 0).sum())
        gain = _GAIN_OF_SYMBOLS if by_ids[name] else 1
        # Where nothing is known, the column with most genes of another species explains why.
        weights[name] = (known * gain, tried[name].others.total())
        if known * gain >= len(marks):
            break
    best = max(weights, key=lambda name: weights[name])
    return best, tried[best]


def _mitochondrial(found: Resolved, beside: Sequence[str], lookup: Resolver) -> npt.NDArray[np.bool_]:
    """Genes of the mitochondrial genome (g): by id, by the symbol in the file, or by the vocabulary's symbol."""
    cores, symbol_g = pa.array(found.cores, pa.string()), pc.utf8_trim_whitespace(pa.array(beside, pa.string()))
    named = pc.or_(pc.is_in(cores, pa.array(sorted(MITOCHONDRIAL_IDS))), pc.starts_with(cores, "MT-"))
    marks = pc.or_(named, pc.starts_with(pc.utf8_upper(symbol_g), "MT-")).to_numpy(zero_copy_only=False)
    by_token = np.isin(found.targets_g, lookup.mitochondrial_tokens)
    mito_g: npt.NDArray[np.bool_] = (marks | by_token) & _COUNTED_CODES[found.fate_g]
    return mito_g
