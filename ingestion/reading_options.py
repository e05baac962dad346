"""Options of the command line that say how atlas files become rows: `ingest` and `inspect` share them.

An option that is not given is None, so that the defaults stand in one place, the config; `options_given` hands over the
others under the names of the config's fields.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from genescale.platform.errors import SettingsError

SOURCE_HELP = (
    "atlas file or folder (h5ad, zarr, loom, 10x HDF5, mtx), glob, folder of such files, or a list of sources "
    "(.toml, .csv); local or s3://"
)


def add_reading_options(parser: argparse.ArgumentParser) -> None:
    """Add every option that changes which rows are made."""
    add_matrix_options(parser)
    add_gene_options(parser)
    add_cell_options(parser)
    add_label_options(parser)


def add_matrix_options(parser: argparse.ArgumentParser) -> None:
    """Where counts stand, and what is accepted as counts."""
    group = parser.add_argument_group("counts")
    group.add_argument(
        "--counts-slot", metavar="SLOT", help="X, raw.X or layers/NAME (default auto: the first that holds counts)"
    )
    _flag(group, "--allow-fractional", "allow_fractional", True, "take counts corrected for ambient RNA (fractional)")
    _flag(group, "--allow-unfiltered", "allow_unfiltered", True, "take 10x matrices that hold every barcode")
    group.add_argument(
        "--unit-nonzeros", type=int, metavar="N", help="stored counts that one task reads (default 16000000)"
    )


def add_gene_options(parser: argparse.ArgumentParser) -> None:
    """Which column names the genes, and how much of it must be known."""
    group = parser.add_argument_group("genes")
    group.add_argument("--gene-column", metavar="NAME", help="var column with ids or symbols (default auto)")
    group.add_argument("--gene-table", metavar="URI", help="pinned table of symbols and retired ids")
    group.add_argument("--min-share", type=float, metavar="S", help="least share of known Ensembl ids (default 0.1)")
    group.add_argument("--min-share-of-symbols", type=float, metavar="S", help="least share of known symbols (0.7)")
    group.add_argument(
        "--min-genes-measured",
        type=int,
        metavar="N",
        help="vocabulary genes that a file must have (default 6500, or a third of a smaller vocabulary)",
    )
    _flag(group, "--ignore-organism", "ignore_organism", True, "go by gene names although the file declares another")


def add_cell_options(parser: argparse.ArgumentParser) -> None:
    """Which cells are kept."""
    group = parser.add_argument_group("cells")
    group.add_argument("--min-genes", type=int, metavar="N", help="drop cells with fewer vocabulary genes (default 7)")
    group.add_argument("--min-counts", type=float, metavar="N", help="drop cells with fewer counts (default 0)")
    group.add_argument("--max-mito-share", type=float, metavar="S", help="drop cells above this mitochondrial share")
    _flag(group, "--all-data", "primary_only", False, "keep cells whose is_primary_data is false")
    _flag(group, "--ignore-filter-pass", "filter_pass", False, "keep cells whose filter_pass is false")
    group.add_argument("--where", metavar="SQL", help="keep cells whose obs meet this, e.g. \"disease = 'normal'\"")
    group.add_argument("--max-empty-share", type=float, metavar="S", help="refuse files with more empty cells (0.5)")
    group.add_argument(
        "--bad-values",
        choices=("refuse", "quarantine"),
        help="a value that is no count refuses the file (default), or its cell",
    )
    group.add_argument("--max-bad-cells", type=float, metavar="S", help="share of such cells that is borne (0.001)")
    group.add_argument(
        "--duplicates",
        choices=("report", "keep_first", "keep_primary", "off"),
        help="cells with the same counts as another cell of the corpus (default report)",
    )


def add_label_options(parser: argparse.ArgumentParser) -> None:
    """Which obs columns go along."""
    group = parser.add_argument_group("obs columns")
    group.add_argument(
        "--obs", action="append", metavar="COLUMN=NAME", help="fill a column of the corpus from this obs column"
    )
    group.add_argument("--keep-obs", action="append", metavar="NAME", help="keep this obs column among the labels")


FIELDS = (
    "counts_slot",
    "allow_fractional",
    "allow_unfiltered",
    "unit_nonzeros",
    "gene_column",
    "gene_table",
    "min_share",
    "min_share_of_symbols",
    "min_genes_measured",
    "ignore_organism",
    "min_genes",
    "min_counts",
    "max_mito_share",
    "primary_only",
    "filter_pass",
    "where",
    "max_empty_share",
    "bad_values",
    "max_bad_cells",
    "duplicates",
    "obs",
    "keep_obs",
)


def options_given(arguments: argparse.Namespace, extra: Sequence[str] = ()) -> dict[str, Any]:
    """The options that were given, by the names of the config's fields; `extra` names options of the command's own.

    Raises SettingsError for an `--obs` that is not COLUMN=NAME.
    """
    given = {name: value for name in (*FIELDS, *extra) if (value := getattr(arguments, name, None)) is not None}
    if "obs" in given:
        given["obs"] = _pairs(given["obs"])
    return given


def _flag(group: Any, option: str, field: str, value: bool, about: str) -> None:
    group.add_argument(option, dest=field, action="store_const", const=value, default=None, help=about)


def _pairs(texts: Sequence[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in texts:
        column, mark, name = (piece.strip() for piece in text.partition("="))
        if not (column and mark and name):
            fix = "Write for example --obs cell_type=CellType."
            raise SettingsError(f"'{text}' is not COLUMN=NAME.", where="--obs", fix=fix)
        if pairs.setdefault(column, name) != name:
            fix = "Give one of them."
            raise SettingsError(f"{column} is given as '{pairs[column]}' and as '{name}'.", where="--obs", fix=fix)
    return pairs
