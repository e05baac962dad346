"""Cells of a request that came as an h5ad file: read by ingestion's own reader, tokenised as any other cells.

Counts and gene names are found as ingestion finds them, so a cell gets the tokens that it would get in a corpus. The
options of the request are query parameters, and so is what says which cells are meant.

Axis suffixes: `g` gene columns of the file, `z` stored values of one cell.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field

from genescale.platform.errors import AtlasError, InputError, LimitError
from genescale.serving.answering.cells import CellReader, PreparedCell
from genescale.serving.answering.intake import Intake
from genescale.serving.schemas import LONGEST_ID, LONGEST_NAME, Asked, FileFacts

if TYPE_CHECKING:
    from genescale.ingestion.annotation.genes import GeneMap
    from genescale.ingestion.atlas import Atlas
    from genescale.ingestion.counts import CountBlock

# Cells are read in blocks of about so many stored values.
VALUES_AT_ONCE = 1_000_000
# Ingestion asks for most genes of the vocabulary, because a corpus must be comparable; a question may be asked of less.
LEAST_GENES, LEAST_SHARE = 1, 0.1
_OPTION = re.compile(r"--([a-z]+(?:-[a-z]+)*)")


class FileOptions(Asked):
    """Which cells of an h5ad file are meant, and how it is read."""

    offset: int = Field(0, ge=0, description="Number of the first cell; 0 is the first of the file.")
    limit: Annotated[int, Field(ge=1)] | None = Field(None, description="Cells to read; all that follow without it.")
    counts_slot: Annotated[str, Field(min_length=1, max_length=256)] = Field(
        "auto", description="Where the raw counts stand: X, raw.X or layers/NAME; `auto` looks for them."
    )
    gene_column: Annotated[str, Field(min_length=1, max_length=256)] = Field(
        "auto", description="Column of `var` that names the genes, or `index`; `auto` takes what the model knows best."
    )
    allow_fractional: bool = Field(False, description="Take counts that were corrected for ambient RNA.")
    ignore_organism: bool = Field(False, description="Go by the gene names although the file declares another species.")


def read_file(body: bytes, options: FileOptions, intake: Intake) -> tuple[list[PreparedCell], FileFacts]:
    """Tokens of the cells that are meant, in the order of the file, and how the file was read.

    Raises InputError for a file that cannot be used, LimitError for one that is too large or has more cells than are
    allowed and `options` do not choose among them.
    """
    intake.check_number(len(body), intake.limits.max_file_bytes, "bytes of the file")
    # The readers of files are not needed by whoever never sends one.
    from genescale.ingestion.annotation.genes import GeneRules, map_genes
    from genescale.ingestion.upload import opened_upload

    limits = intake.limits
    rules = GeneRules(
        gene_column=options.gene_column,
        min_share=LEAST_SHARE,
        min_share_of_symbols=LEAST_SHARE,
        min_genes_measured=LEAST_GENES,
        ignore_organism=options.ignore_organism,
    )
    try:
        with opened_upload(
            body,
            counts_slot=options.counts_slot,
            allow_fractional=options.allow_fractional,
            max_unpacked_bytes=limits.max_unpacked_bytes,
            max_genes=limits.max_genes_per_cell,
        ) as atlas:
            chosen = _chosen(atlas.n_cells, options, intake)
            genes = map_genes(atlas, intake.vocabulary, rules=rules)
            cells = list(_cells(atlas, genes, chosen, options, intake))
            return cells, _facts(atlas, genes, chosen)
    except (AtlasError, LimitError) as error:
        # Those errors speak to who typed a command; the same choices are query parameters here.
        raise type(error)(_named(error.what), where=error.where, fix=_named(error.fix)) from None


def _chosen(n_cells: int, options: FileOptions, intake: Intake) -> range:
    if options.offset >= n_cells:
        raise InputError(f"the file has {n_cells:,} cells.", where="offset", fix="Number its cells from 0.")
    stop = n_cells if options.limit is None else min(n_cells, options.offset + options.limit)
    asked, allowed = stop - options.offset, intake.limits.max_cells
    if asked > allowed:
        raise LimitError(
            f"{asked:,} cells of the file are asked for; {allowed:,} are allowed.",
            where="limit",
            fix=f"Ask for some at a time with the query parameters offset and limit: the file has {n_cells:,}.",
        )
    return range(options.offset, stop)


def _cells(atlas: Atlas, genes: GeneMap, chosen: range, options: FileOptions, intake: Intake) -> Iterator[PreparedCell]:
    from genescale.ingestion.counts import checked, refuse_equal_sums, row_sums

    reader, names_g = intake.cell_reader(), np.array([name[:LONGEST_NAME] for name in genes.genes], dtype=object)
    for start, stop in _blocks(atlas, chosen, intake):
        block = checked(atlas, start, stop, allow_fractional=options.allow_fractional)
        n_ones = int(np.count_nonzero(block.counts == 1))
        refuse_equal_sums(row_sums(block.counts, block.indptr), n_ones, atlas)
        ids = atlas.cell_ids(start, stop)
        for at, cell_id in enumerate(ids):
            yield _cell(reader, cell_id, block, at, names_g, genes, where=f"cells[{start + at}]")


def _cell(
    reader: CellReader, cell_id: str, block: CountBlock, at: int, names_g: np.ndarray, genes: GeneMap, *, where: str
) -> PreparedCell:
    mine = slice(block.indptr[at], block.indptr[at + 1])
    indices_z, counts_z = block.indices[mine], block.counts[mine]
    if not (indices_z[1:] > indices_z[:-1]).all():
        # A file may store several counts for one gene; they belong together.
        indices_z, position_z = np.unique(indices_z, return_inverse=True)
        counts_z = np.bincount(position_z, weights=counts_z).astype(np.float64)
    tokens_z = genes.targets_g[indices_z].astype(np.int64)
    return reader.from_counts(cell_id[:LONGEST_ID], names_g[indices_z].tolist(), tokens_z, counts_z, where)


def _blocks(atlas: Atlas, chosen: range, intake: Intake) -> Iterator[tuple[int, int]]:
    """Row ranges of about VALUES_AT_ONCE stored values, none of a cell with more than are allowed."""
    before = atlas.matrix.stored_before[chosen.start : chosen.stop + 1]
    stored = np.diff(before).tolist()
    start, held = chosen.start, 0
    for row, n in zip(chosen, stored, strict=True):
        intake.check_number(n, intake.limits.max_genes_per_cell, f"cells[{row}]")
        if row > start and held + n > VALUES_AT_ONCE:
            yield start, row
            start, held = row, 0
        held += n
    yield start, chosen.stop


def _facts(atlas: Atlas, genes: GeneMap, chosen: range) -> FileFacts:
    return FileFacts(
        cells=atlas.n_cells,
        offset=chosen.start,
        counts_slot=atlas.slot,
        counts_reason=_named(atlas.slot_reason),
        gene_column=genes.column,
        genes=atlas.n_genes,
        genes_known=genes.n_mapped,
        notes=[*genes.notes],
    )


def _named(text: str) -> str:
    return _OPTION.sub(lambda found: found[1].replace("-", "_"), text)
