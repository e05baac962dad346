"""`genescale perturb report`: redo the effects and the report of a finished screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

    from genescale.perturbation.reports.report import ScreenReportFiles
    from genescale.platform.storage import Store

EPILOG = """\
examples:
  genescale perturb report screen/
  genescale perturb report s3://lake/screens/tgfb --targets targets.gmt
  genescale perturb report screen/ --h5ad heart.h5ad heart-with-screen.h5ad

Nothing is computed by the model: the same screen gives the same report. report.html needs no network."""
SHOWN = 10


def report(argv: Sequence[str]) -> int:
    """Write effects, tables and report.html beside a screen, and print what was found."""
    from genescale.platform.cli import begin

    arguments, settings = begin(_parser(), argv)
    from genescale.perturbation.reports.report import report as write
    from genescale.platform.storage import Store

    store = Store(settings.storage)
    lists = _lists(arguments.targets, store) if arguments.targets else None
    made = write(arguments.screen, store, gene_lists=lists, draws=arguments.draws, seed=arguments.seed)
    if arguments.h5ad:
        from genescale.perturbation.reports.annotate import annotate_h5ad

        annotate_h5ad(arguments.h5ad[0], made.tables, arguments.h5ad[1], store)
    if arguments.json:
        _print_json(made)
    else:
        _print_text(made, arguments)
    return 0


def _parser() -> argparse.ArgumentParser:
    from genescale.platform.cli import command_parser

    parser = command_parser("perturb report", "Redo the effects and the report of a finished screen.", epilog=EPILOG)
    parser.add_argument("screen", metavar="SCREEN", help="the output folder of genescale perturb screen")
    parser.add_argument(
        "--targets",
        metavar="FILE",
        help="lists of genes (.gmt, .json, .csv, .txt, or a folder), such as known direct and indirect targets: are "
        "they moved more than matched genes? (needs a screen with gene_shifts or masked_genes)",
    )
    parser.add_argument("--h5ad", nargs=2, metavar=("IN", "OUT"), help="also copy an atlas with the tables in its uns")
    parser.add_argument("--draws", type=int, default=2000, metavar="N", help="bootstrap draws (default 2000)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    parser.add_argument("--json", action="store_true", help="print the found effects as JSON")
    return parser


def _lists(address: str, store: Store) -> Mapping[str, Sequence[str]]:
    from genescale.training.labels.gene_lists import ListAddress, read_lists

    return read_lists(ListAddress.parse(address), store)


def _print_json(made: ScreenReportFiles) -> None:
    import json

    import polars as pl

    from genescale.perturbation.reports.screen_tables import LEVEL

    effects = made.tables.effects
    found: dict[str, Any] = {
        "report": made.html,
        "files": list(made.files),
        "n_edits": effects["edit_id"].n_unique(),
        "readouts": list(made.tables.readouts),
        "found": effects.filter(pl.col("q") < LEVEL).to_dicts(),
    }
    print(json.dumps(found, indent=2))


def _print_text(made: ScreenReportFiles, arguments: argparse.Namespace) -> None:
    from genescale.perturbation.reports.screen_tables import CLASS
    from genescale.perturbation.reports.sentences import sentence

    tables = made.tables
    for readout in tables.readouts:
        if not readout.startswith(CLASS):
            print(sentence(tables.of(readout), readout))
    print("\n".join(effect_lines(tables.of(tables.readouts[0]), SHOWN)))
    print(f"\nreport: {made.html}")
    if arguments.h5ad:
        print(f"h5ad:   {arguments.h5ad[1]}")


def effect_lines(effects: Any, most: int) -> list[str]:
    """The strongest effects of one read-out as lines of a terminal."""
    rows = effects.filter(effects["n_edited"] > 0).head(most).to_dicts()
    if not rows:
        return []
    lines = [f"\n{'gene':<24} {'cells':>7} {'mean':>11} {'controls':>11} {'excess':>11} {'q':>9}"]
    for row in rows:
        numbers = [_shown(row[name]) for name in ("mean", "control_mean", "excess")]
        q = "–" if row["q"] is None else f"{row['q']:.2g}"
        lines.append(
            f"{row['symbol'][:24]:<24} {row['n_edited']:>7,} {numbers[0]:>11} {numbers[1]:>11} {numbers[2]:>11} {q:>9}"
        )
    return lines


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.3e}"
