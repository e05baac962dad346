"""`genescale perturb`: a screen from the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

    import polars as pl

    from genescale.perturbation.screening.results import ScreenReport
    from genescale.platform.storage import Store

EPILOG = """\
examples:
  genescale perturb models:/genescale@champion --corpus s3://lake/corpus --output s3://lake/screen \\
      --genes GATA4,TBX5,GATA4+TBX5
  genescale perturb model/ --corpus corpus@12 --output screen --all --where cell_type=monocyte --max-cells 200 \\
      --figure screen.png

The output folder holds cell_shifts/*.parquet (one row per cell and edit), gene_shifts.parquet when --gene-shifts asks
for it, and _screen.json. The same command again continues an interrupted screen."""
SHOWN_GENES = 10


def perturb(argv: Sequence[str]) -> int:
    """Run a screen of edits over the cells of a corpus and print its strongest genes."""
    from genescale.platform.cli import begin

    arguments, settings = begin(_parser(), argv)
    import tempfile
    from pathlib import Path

    from genescale.ingestion.corpus import Corpus
    from genescale.perturbation.screening.plan import check_genes
    from genescale.perturbation.screening.screen import read_screen, screen
    from genescale.platform.cluster import ray_cluster
    from genescale.platform.progress import stage
    from genescale.platform.storage import Store
    from genescale.platform.tracking import fetch_bundle

    config = _config(arguments)
    store = Store(settings.storage)
    with tempfile.TemporaryDirectory(prefix="genescale-") as cache:
        bundle = fetch_bundle(arguments.model, settings, Path(cache))
        check_genes(config, bundle.vocabulary)
        corpus = Corpus.open(arguments.corpus, store)
        with ray_cluster(settings), stage("perturb") as progress:
            report = screen(bundle, corpus, config, out_uri=arguments.output, store=store, progress=progress)
    shifts = read_screen(arguments.output, store).cell_shifts
    if arguments.figure:
        _write_figure(shifts, arguments.figure, arguments.top_shown, store)
    if arguments.json:
        _print_json(report, shifts)
    else:
        _print_summary(report, shifts, arguments)
    return 0


def _parser() -> argparse.ArgumentParser:
    from genescale.platform.cli import command_parser

    parser = command_parser("perturb", "Delete or overexpress genes in the cells of a corpus.", epilog=EPILOG)
    parser.add_argument("model", metavar="MODEL", help="models:/NAME@ALIAS, models:/NAME/VERSION, or a bundle folder")
    parser.add_argument("--corpus", required=True, metavar="URI[@VERSION]", help="the cells to edit")
    parser.add_argument("--output", required=True, metavar="URI", help="folder for the result")
    parser.add_argument("--kind", default="delete", help="delete (default) or overexpress")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--genes", type=_names, default=(), metavar="A,B,C+D", help="ids or symbols; + edits together")
    which.add_argument("--all", action="store_true", help="every gene of each cell")
    which.add_argument("--top", type=int, metavar="N", help="the N genes that stand in most of the cells")
    parser.add_argument(
        "--where", action="append", default=[], metavar="COLUMN=VALUE", help="cells to take (repeatable)"
    )
    parser.add_argument("--max-cells", type=int, default=0, metavar="N", help="draw N of them at random (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of that draw (default 0)")
    parser.add_argument("--layer", default="second_to_last", help="last or second_to_last (default)")
    parser.add_argument(
        "--measure", default="remaining_genes", help="remaining_genes (default), cls or mean_pooled: what is compared"
    )
    parser.add_argument(
        "--gene-shifts", type=_names, default=(), metavar="all|A,B", help="also record how these genes themselves shift"
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    parser.add_argument("--figure", metavar="URI", help="write a PNG of the strongest genes")
    parser.add_argument("--top-shown", type=int, default=25, metavar="N", help="genes in the figure (default 25)")
    parser.add_argument("--json", action="store_true", help="print the record and the summary as JSON")
    return parser


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _config(arguments: argparse.Namespace) -> Any:
    from genescale.perturbation.editing.edits import parse_kind
    from genescale.perturbation.screening.plan import ScreenConfig
    from genescale.platform.settings import build

    every_gene = tuple(arguments.gene_shifts) == ("all",)
    values = {
        "kind": parse_kind(arguments.kind),
        "select": "detected" if arguments.all else "top_detected" if arguments.top is not None else "listed",
        "genes": arguments.genes,
        "where": arguments.where,
        "max_cells": arguments.max_cells,
        "seed": arguments.seed,
        "layer": arguments.layer,
        "measure": arguments.measure,
        "gene_shifts": "all" if every_gene else "listed" if arguments.gene_shifts else "none",
        "affected": () if every_gene else arguments.gene_shifts,
        "device": arguments.device,
    }
    return build(ScreenConfig, values | ({} if arguments.top is None else {"top": arguments.top}), where="options")


def _write_figure(shifts: pl.DataFrame, address: str, top: int, store: Store) -> None:
    from genescale.perturbation.reports.figures import draw_screen, png

    store.write(address, png(draw_screen(shifts, top=top)))


def _print_json(report: ScreenReport, shifts: pl.DataFrame) -> None:
    import dataclasses
    import json

    from genescale.perturbation.statistics.effects import summarise

    print(json.dumps({**dataclasses.asdict(report), "summary": summarise(shifts).to_dicts()}, indent=2))


def _print_summary(report: ScreenReport, shifts: pl.DataFrame, arguments: argparse.Namespace) -> None:
    from genescale.perturbation.statistics.effects import summarise

    print(
        f"{report.n_pairs:,} pairs of {report.n_cells:,} cells and {report.n_edits:,} edits: {report.n_edited:,} "
        f"edited, {report.n_absent:,} without the gene, {report.n_undefined:,} with nothing left to compare."
    )
    if report.n_units_reused:
        print(f"{report.n_units_reused:,} of {report.n_units:,} units were there from an earlier run.")
    summary = summarise(shifts)
    summary = summary.filter(summary["n_edited"] > 0).head(SHOWN_GENES)
    if len(summary):
        print(f"\n{'gene':<24} {'cells':>7} {'mean shift':>12}   95% interval over {summary['over'][0]}s")
    for row in summary.iter_rows(named=True):
        interval = "" if row["ci_low"] is None else f"{row['ci_low']:.3e} to {row['ci_high']:.3e}"
        print(f"{row['symbol'][:24]:<24} {row['n_edited']:>7,} {row['mean_shift']:>12.3e}   {interval}")
    print(f"\nresult: {report.uri}")
    if arguments.figure:
        print(f"figure: {arguments.figure}")
