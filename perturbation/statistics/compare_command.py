"""`genescale perturb compare`: the edits of a screen against the same edits of a null run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

    import polars as pl

EPILOG = """\
example:
  genescale perturb compare s3://lake/screen_disease s3://lake/screen_healthy --output s3://lake/disease_against_healthy

Both are outputs of `genescale perturb screen` with the same kind of edit, best with controls. The output folder gets
comparison.parquet and comparison.csv: one row per edit and read-out with the difference, its interval, p and q."""
SHOWN = 10
NAME = "comparison"


def compare(argv: Sequence[str]) -> int:
    """Compare two finished screens edit by edit, write the table and print the clearest differences."""
    from genescale.platform.cli import begin

    arguments, settings = begin(_parser(), argv)
    from genescale.perturbation.reports.screen_tables import write_table
    from genescale.perturbation.screening.results import read_screen
    from genescale.perturbation.statistics.estimates import Drawing
    from genescale.perturbation.statistics.null_run import against_null_run
    from genescale.platform.storage import Store, join

    Drawing(confidence=arguments.confidence, draws=arguments.draws, seed=arguments.seed)
    store = Store(settings.storage)
    screen, null = (read_screen(uri, store) for uri in (arguments.screen, arguments.null_screen))
    table = against_null_run(
        screen.cell_shifts,
        null.cell_shifts,
        confidence=arguments.confidence,
        draws=arguments.draws,
        seed=arguments.seed,
    )
    write_table(table, NAME, arguments.output, store)
    address = join(arguments.output, f"{NAME}.parquet")
    if arguments.json:
        _print_json(table, address)
    else:
        _print_table(table, address, arguments.confidence)
    return 0


def _parser() -> argparse.ArgumentParser:
    from genescale.platform.cli import command_parser

    parser = command_parser("perturb compare", "Test the edits of a screen against a null screen.", epilog=EPILOG)
    parser.add_argument("screen", metavar="SCREEN", help="output of a finished screen")
    parser.add_argument("null_screen", metavar="NULL_SCREEN", help="output of the screen to compare with")
    parser.add_argument("--output", required=True, metavar="URI", help="folder for the table")
    parser.add_argument("--confidence", type=float, default=0.95, metavar="P", help="of the intervals (default 0.95)")
    parser.add_argument("--draws", type=int, default=2000, metavar="N", help="of the bootstrap (default 2000)")
    parser.add_argument("--seed", type=int, default=0, help="of those draws (default 0)")
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    return parser


def _print_json(table: pl.DataFrame, address: str) -> None:
    import json

    print(json.dumps({"table": address, "rows": table.to_dicts()}, indent=2))


def _print_table(table: pl.DataFrame, address: str, confidence: float) -> None:
    import polars as pl

    for readout in table["readout"].unique(maintain_order=True):
        rows = table.filter(pl.col("readout") == readout)
        n_testable = int(rows["testable"].sum())
        n_found = int((rows["q"] < 0.05).sum())
        print(f"{readout}: {n_testable:,} of {len(rows):,} edits can be tested, {n_found:,} differ (q < 0.05)")
        if not n_testable:
            for reason, number in rows["reason"].value_counts(sort=True).head(3).iter_rows():
                print(f"  {number:,} edits: {reason}")
            continue
        print(f"  {'edit':<24} {'difference':>11}   {confidence:.0%} interval {'':<11} {'p':>8} {'q':>8}")
        for row in rows.filter(pl.col("testable")).head(SHOWN).iter_rows(named=True):
            interval = f"{row['ci_low']:.2e} to {row['ci_high']:.2e}"
            p, q = f"{row['p']:.1e}", f"{row['q']:.1e}"
            print(f"  {row['symbol'][:24]:<24} {row['difference']:>11.2e}   {interval:<24} {p:>8} {q:>8}")
    print(f"\nwritten: {address}")
