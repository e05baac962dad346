"""From a finished screen to its statistics and its report: `OUTPUT` gets effects, tables and one HTML page."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import polars as pl

from genescale.perturbation.reports.page import page
from genescale.perturbation.reports.screen_tables import EFFECTS, GENES, PAIRS, TARGETS, ScreenTables, write_table
from genescale.platform.errors import InputError
from genescale.platform.storage import Store, join

HTML = "report.html"
Lists = Mapping[str, Sequence[str]] | pl.DataFrame
"""Gene ids or symbols by name of the list, or a table of `list`, `gene_id` and, for lists of one edit, `edit_id`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ScreenReportFiles:
    """Where the report stands, the tables beside it, and what they hold."""

    html: str
    """Address of the page."""
    files: tuple[str, ...]
    """Names of all files that were written, below the screen's address."""
    tables: ScreenTables


def report(
    screen_uri: str,
    store: Store,
    *,
    gene_lists: Lists | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> ScreenReportFiles:
    """Work out the effects of a finished screen and write tables and report beside it; the same again changes nothing.

    gene_lists: known direct and indirect targets, say, whose own shifts are held against matched genes (the screen must
    have recorded gene shifts, masked genes, or both). draws: of every bootstrap. Raises NotFoundError for a screen that
    is not finished, InputError where lists are given but neither was recorded.
    """
    from genescale.perturbation.screening.results import read_screen

    screen = read_screen(screen_uri, store)
    tables = screen_tables(
        screen_uri,
        screen.cell_shifts,
        screen.gene_shifts,
        dataclasses.asdict(screen.report),
        masked_genes=screen.masked_genes,
        gene_lists=gene_lists,
        draws=draws,
        seed=seed,
    )
    tables = dataclasses.replace(tables, first_pass=_first_pass(screen_uri, screen.report.parts, store))
    return write_report(tables, store)


def _first_pass(uri: str, parts: Mapping[str, str], store: Store) -> pl.DataFrame | None:
    from genescale.perturbation.screening.results import FIRST_PASS

    names = sorted(name for name in parts if name.startswith(f"{FIRST_PASS}/"))
    tables = [pl.read_parquet(io.BytesIO(store.read(join(uri, name)))) for name in names]
    return pl.concat(tables) if tables else None


def screen_tables(
    uri: str,
    cell_shifts: pl.DataFrame,
    gene_shifts: pl.DataFrame | None,
    record: Mapping[str, object],
    *,
    masked_genes: pl.DataFrame | None = None,
    gene_lists: Lists | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> ScreenTables:
    """The statistics of a screen's rows, as `report` writes them."""
    from genescale.perturbation.reports.pair_sections import has_pairs
    from genescale.perturbation.statistics.effects import effects_table
    from genescale.perturbation.statistics.pairs import pair_effects

    return ScreenTables(
        uri=uri,
        cell_shifts=cell_shifts,
        gene_shifts=gene_shifts,
        masked_genes=masked_genes,
        effects=effects_table(cell_shifts, draws=draws, seed=seed),
        record=record,
        pairs=pair_effects(cell_shifts, draws=draws, seed=seed) if has_pairs(cell_shifts) else None,
        genes=_genes(cell_shifts, gene_shifts),
        targets=_targets(cell_shifts, (gene_shifts, masked_genes), gene_lists, uri, draws, seed),
    )


def _genes(cell_shifts: pl.DataFrame, gene_shifts: pl.DataFrame | None) -> pl.DataFrame | None:
    """One row per affected gene; None where none was recorded, or where there are more pairs than one table holds."""
    from genescale.perturbation.statistics.genes import MOST_PAIRS, affected_genes, edit_ranks

    if gene_shifts is None or gene_shifts.is_empty():
        return None
    pairs = gene_shifts["edit_id"].n_unique() * gene_shifts["affected_gene_id"].n_unique()
    if pairs > MOST_PAIRS and not (gene_shifts["role"] == "control").any():
        return None
    return affected_genes(gene_shifts, edit_ranks=edit_ranks(cell_shifts))


def _targets(
    cell_shifts: pl.DataFrame,
    of_genes: Sequence[pl.DataFrame | None],
    lists: Lists | None,
    uri: str,
    draws: int,
    seed: int,
) -> pl.DataFrame | None:
    """The lists held against matched genes in every table of single genes that the screen has."""
    from genescale.perturbation.statistics.genes import edit_ranks
    from genescale.perturbation.statistics.targets import target_groups

    if lists is None:
        return None
    recorded = [table for table in of_genes if table is not None]
    if not recorded:
        raise InputError(
            "this screen did not record how single genes move, so lists of genes cannot be compared.",
            where=uri,
            fix='Screen with [readouts] gene_shifts = "all" (or the genes of the lists), or with masked_genes.',
        )
    ranks = edit_ranks(cell_shifts)
    return pl.concat(target_groups(one, lists, edit_ranks=ranks, draws=draws, seed=seed) for one in recorded)


def write_report(tables: ScreenTables, store: Store) -> ScreenReportFiles:
    """Write the tables (Parquet and CSV) and the page beside the screen."""
    given = {EFFECTS: tables.effects, PAIRS: tables.pairs, GENES: tables.genes, TARGETS: tables.targets}
    files: list[str] = []
    for name, table in given.items():
        if table is not None:
            write_table(table, name, tables.uri, store)
            files += [f"{name}.parquet", f"{name}.csv"]
    files.append("cell_shifts/*.parquet")
    if tables.gene_shifts is not None:
        files.append("gene_shifts.parquet")
    if tables.masked_genes is not None:
        files.append("masked_genes.parquet")
    store.write(join(tables.uri, HTML), page(tables, files).encode())
    return ScreenReportFiles(html=join(tables.uri, HTML), files=(*files, HTML), tables=tables)
