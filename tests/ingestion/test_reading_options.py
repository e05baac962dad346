"""Options of the command line: each reaches its field of the config, and nothing else changes."""

from __future__ import annotations

import argparse
import dataclasses

import pytest

from genescale.ingestion.config import IngestConfig
from genescale.ingestion.reading_options import FIELDS, add_reading_options, options_given
from genescale.platform.errors import SettingsError
from genescale.platform.settings import build

# Set by the run itself, or by an option of the command's own.
NOT_READING = {"dataset_id", "replace", "gene_table_digest"}


def given(*argv: str) -> dict[str, object]:
    parser = argparse.ArgumentParser()
    add_reading_options(parser)
    return options_given(parser.parse_args(list(argv)))


def test_every_option_of_the_config_can_be_given() -> None:
    assert set(FIELDS) == {field.name for field in dataclasses.fields(IngestConfig)} - NOT_READING


def test_without_options_the_defaults_hold() -> None:
    assert given() == {}
    assert build(IngestConfig, given()) == IngestConfig()


@pytest.mark.parametrize(
    ("argv", "field", "value"),
    [
        (["--counts-slot", "layers/counts"], "counts_slot", "layers/counts"),
        (["--allow-fractional"], "allow_fractional", True),
        (["--allow-unfiltered"], "allow_unfiltered", True),
        (["--unit-nonzeros", "5000"], "unit_nonzeros", 5000),
        (["--gene-column", "gene_ids"], "gene_column", "gene_ids"),
        (["--gene-table", "t.parquet"], "gene_table", "t.parquet"),
        (["--min-share", "0.3"], "min_share", 0.3),
        (["--min-share-of-symbols", "0.4"], "min_share_of_symbols", 0.4),
        (["--min-genes-measured", "900"], "min_genes_measured", 900),
        (["--ignore-organism"], "ignore_organism", True),
        (["--min-genes", "200"], "min_genes", 200),
        (["--min-counts", "500"], "min_counts", 500.0),
        (["--max-mito-share", "0.1"], "max_mito_share", 0.1),
        (["--all-data"], "primary_only", False),
        (["--ignore-filter-pass"], "filter_pass", False),
        (["--where", "a = 1"], "where", "a = 1"),
        (["--max-empty-share", "0.9"], "max_empty_share", 0.9),
        (["--bad-values", "quarantine"], "bad_values", "quarantine"),
        (["--max-bad-cells", "0.2"], "max_bad_cells", 0.2),
        (["--duplicates", "keep_first"], "duplicates", "keep_first"),
        (["--obs", "cell_type=Cell Type", "--obs", "sex=a=b"], "obs", {"cell_type": "Cell Type", "sex": "a=b"}),
        (["--keep-obs", "stim", "--keep-obs", "batch"], "keep_obs", ("stim", "batch")),
    ],
)  # fmt: skip
def test_an_option_changes_its_field_only(argv: list[str], field: str, value: object) -> None:
    config = build(IngestConfig, given(*argv))
    assert getattr(config, field) == value
    assert dataclasses.replace(config, **{field: getattr(IngestConfig(), field)}) == IngestConfig()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--obs", "cell_type"], "is not COLUMN=NAME"),
        (["--obs", "=x"], "is not COLUMN=NAME"),
        (["--obs", "sex=a", "--obs", "sex=b"], "given as 'a' and as 'b'"),
    ],
)
def test_wrong_obs_options_are_told(argv: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        given(*argv)
