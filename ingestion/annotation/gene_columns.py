"""The gene table of an atlas: which of its columns may name genes, and what it marks as something else than a gene."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import pyarrow as pa

from genescale.ingestion.annotation.species import ensembl_marks, ensembl_share, genome_species, read_name
from genescale.platform.errors import AtlasError, did_you_mean

if TYPE_CHECKING:
    from genescale.ingestion.atlas import Atlas, Frame

INDEX = "index"
AUTO_COLUMN = "auto"
GENE_ID_COLUMNS = (
    "ensembl_id", "ensembl_ids", "ensembl", "gene_ids", "gene_id", "feature_id", "Accession", "ensembl_gene_id", "id",
)  # fmt: skip
SYMBOL_COLUMNS = (
    "feature_name", "gene_symbols", "gene_symbol", "gene_name", "gene_names", "symbol", "Gene", "gene", "name",
)  # fmt: skip
TYPE_COLUMNS = ("feature_types", "feature_type", "feature_biotype")
GENOME_COLUMN = "genome"
SPIKE_IN, OTHER_FEATURE = "spike_in", "other_feature"
# What 10x and its readers call features that are no genes. Other values may be biotypes of genes, and stay genes.
NO_GENES = frozenset(
    (
        "antibody capture", "antibody", "adt", "protein", "protein expression", "hto", "multiplexing capture",
        "hashtag", "crispr guide capture", "crispr", "antigen capture", "custom", "peaks", "peak", "atac",
        "chromatin accessibility", "vdj", "vdj-t", "vdj-b",
    )
)  # fmt: skip
_SAMPLED = 100


def gene_columns(atlas: Atlas) -> dict[str, list[str]]:
    """Candidates for gene names, best known first: the index, columns named for ids, others that hold ids, symbols."""
    return candidates(atlas.var)


def candidates(var: Frame, named: str = AUTO_COLUMN, *, where: str = "") -> dict[str, list[str]]:
    """As `gene_columns`, or only the column that the user named; AtlasError when there is none of that name."""
    if named == INDEX:
        return {INDEX: var.index()}
    if named != AUTO_COLUMN:
        if named not in var.columns:
            fix = did_you_mean(named, [INDEX, *var.columns]) or f"Columns: {', '.join([INDEX, *var.columns][:20])}."
            raise AtlasError(f"the gene table has no column '{named}'.", where=f"{where}: {var.path}", fix=fix)
        return {named: _texts(var, named)}
    known = [name for name in (*GENE_ID_COLUMNS, *SYMBOL_COLUMNS) if name in var.columns]
    found = {INDEX: var.index(), **{name: _texts(var, name) for name in known}}
    if any(ensembl_share(texts) >= 0.5 for texts in found.values()):
        return found
    others = (name for name in var.columns if name not in known and _holds_ids(var, name))
    return {**found, **{name: _texts(var, name) for name in others}}


def _texts(var: Frame, name: str) -> list[str]:
    return [value or "" for value in var.column(name)[0]]


def _holds_ids(var: Frame, name: str) -> bool:
    """Whether the column looks like ids at its start, middle and end: its name does not say so."""
    first = var.typed(name, 0, min(1, var.rows))[0].type
    if not (pa.types.is_string(first) or pa.types.is_dictionary(first)):
        return False
    for start in sorted({0, var.rows // 2, max(var.rows - _SAMPLED, 0)}):
        values = [value for value in var.column(name, start, min(start + _SAMPLED, var.rows))[0] if value]
        if values and ensembl_share(values) >= 0.5:
            return True
    return False


def symbols(atlas: Atlas, read: Mapping[str, list[str]] | None = None) -> list[str]:
    """Gene symbols beside the ids; empty texts where the file has none. read: columns that were read before."""
    var, read = atlas.var, read or {}
    for name in SYMBOL_COLUMNS:
        if name in var.columns:
            values = read[name] if name in read else _texts(var, name)
            if ensembl_share(values) < 0.5 and any(values):
                return values
    names = read[INDEX] if INDEX in read else var.index()
    return ["" if is_id else name for name, is_id in zip(names, ensembl_marks(names), strict=True)]


def ensembl_column(columns: Mapping[str, Sequence[str]], *, where: str) -> str:
    """The candidate that holds Ensembl gene ids; AtlasError when none does."""
    best = max(columns, key=lambda name: ensembl_share(columns[name]))
    if ensembl_share(columns[best]) < 0.5:
        raise AtlasError(
            f"no Ensembl gene ids found (symbols or other names such as '{next(iter(columns[best]), '')[:40]}' in var "
            f"{column_label(best)}).",
            where=where,
            fix="A new vocabulary needs ids: give them in the var index, or in var['ensembl_id'].",
        )
    return best


def ids_and_symbols(atlas: Atlas) -> list[tuple[str, str]]:
    """(Symbol, Ensembl id) of the genes that have both, without versions; an empty list when the file lacks one."""
    columns = gene_columns(atlas)
    best = max(columns, key=lambda name: ensembl_share(columns[name]))
    if ensembl_share(columns[best]) < 0.5:
        return []
    pairs = []
    for text, symbol in zip(columns[best], symbols(atlas), strict=True):
        gene, named = read_name(text), read_name(symbol)
        if gene.kind == "id" and named.kind == "symbol" and named.spelled:
            pairs.append((named.spelled, gene.core))
    return pairs


def feature_marks(var: Frame) -> list[str]:
    """What the table itself says of each gene column: `spike_in`, `other_feature`, a species, or nothing."""
    marks = [""] * var.rows
    if GENOME_COLUMN in var.columns:
        marks = _by_value(_texts(var, GENOME_COLUMN), genome_species)
    for name in TYPE_COLUMNS:
        if name in var.columns:
            of_type = _by_value(_texts(var, name), _type_mark)
            marks = [new or old for new, old in zip(of_type, marks, strict=True)]
    return marks


def _by_value(values: list[str], read: Callable[[str], str]) -> list[str]:
    meaning = {value: read(value) for value in set(values)}
    return [meaning[value] for value in values]


def _type_mark(value: str) -> str:
    plain = value.strip().lower()
    return SPIKE_IN if plain in ("spike-in", "spike_in", "ercc") else OTHER_FEATURE if plain in NO_GENES else ""


def column_label(column: str) -> str:
    """A column of the gene table for messages."""
    return "index" if column == INDEX else f"column '{column}'"
