"""`genescale ingest`, `medians`, `genes` and `simulate`."""

from __future__ import annotations

import argparse
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from genescale.ingestion.reading_options import (
    SOURCE_HELP,
    add_gene_options,
    add_matrix_options,
    add_reading_options,
    options_given,
)
from genescale.platform.cli import begin, command_parser
from genescale.platform.errors import SettingsError

if TYPE_CHECKING:
    from genescale.ingestion.median_files import Medians
    from genescale.platform.storage import Store
    from genescale.platform.vocabulary import Vocabulary

REFUSED_STATUS = 1


def ingest(argv: Sequence[str]) -> int:
    """Turn atlas files into rows of a corpus; exit status 1 when a file was refused."""
    parser = command_parser("ingest", "Turn atlas files into a corpus of token rows: one commit per file, each once.")
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help=SOURCE_HELP)
    parser.add_argument("--corpus", required=True, metavar="URI", help="the corpus; it is made when it is not there")
    parser.add_argument("--vocabulary", metavar="URI", help="gene vocabulary (default: the one the corpus has)")
    parser.add_argument("--dataset-id", metavar="NAME", help="name of the dataset (default: the file's name)")
    parser.add_argument(
        "--replace", action="store_const", const=True, help="let a source take the place of a dataset made otherwise"
    )
    parser.add_argument("--report", metavar="FOLDER", help="where report.html and report.json go (default: the corpus)")
    parser.add_argument("--no-tracking", action="store_true", help="do not record the run in MLflow")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_reading_options(parser)
    arguments, settings = begin(parser, argv)

    from genescale.ingestion.config import IngestConfig
    from genescale.ingestion.pipeline import ingest as run
    from genescale.ingestion.reports.report import as_json, summary
    from genescale.platform.cluster import ray_cluster
    from genescale.platform.progress import stage
    from genescale.platform.settings import build
    from genescale.platform.storage import Store

    config = build(IngestConfig, options_given(arguments, ("dataset_id", "replace")), where="ingest")
    store = Store(settings.storage)
    vocabulary = _vocabulary(arguments.vocabulary, arguments.corpus, store)
    with ray_cluster(settings), stage("ingest") as progress:
        report = run(
            arguments.sources, arguments.corpus, vocabulary=vocabulary, store=store, config=config, progress=progress
        )
    print(as_json(report.to_dict()) if arguments.json else summary(report))
    _kept(report, arguments, settings, store)
    return 0 if report.ok else REFUSED_STATUS


def _kept(report: Any, arguments: argparse.Namespace, settings: Any, store: Store) -> None:
    """Write the report and record the run, unless nothing was new."""
    from genescale.ingestion.reports.report import write_report
    from genescale.ingestion.reports.tracking_report import track_ingest
    from genescale.platform.storage import join

    if len(report.of("already_committed")) == len(report.sources) and not arguments.report:
        return
    # Two runs may begin in the same second.
    stamp = f"{re.sub(r'[^0-9T]', '', report.started.partition('+')[0])}-{secrets.token_hex(4)}"
    beside = join(report.corpus_uri, "_genescale", "reports", stamp) if report.version is not None else ""
    addresses = write_report(report, folder, store) if (folder := arguments.report or beside) else []
    if not arguments.json:
        for address in addresses:
            print(f"report      {address}")
    if not arguments.no_tracking:
        track_ingest(report, settings)


def medians(argv: Sequence[str]) -> int:
    """Compute gene medians from atlas files and write the vocabulary; exit status 1 when a file was refused."""
    parser = command_parser("medians", "Compute non-zero gene medians over atlas files, and the vocabulary they make.")
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help=SOURCE_HELP)
    parser.add_argument("--output", required=True, metavar="URI", help="vocabulary to write (.parquet or .tsv)")
    parser.add_argument("--name", default="", help="name to record in the vocabulary")
    parser.add_argument("--window", type=int, metavar="TOKENS", help="tokens per cell (default 4096)")
    parser.add_argument("--min-observations", type=int, metavar="N", help="leave out genes seen in fewer cells (1)")
    parser.add_argument(
        "--min-observations-for-median",
        type=int,
        metavar="N",
        help="genes seen in fewer cells get no median of their own and are not ranked (default 10)",
    )
    parser.add_argument("--fallback", metavar="URI", help="vocabulary whose medians stand in for genes without one")
    parser.add_argument(
        "--earlier",
        action="append",
        metavar="URI",
        help="add a histogram that an earlier run wrote (may be repeated)",
    )
    _flag(parser, "--exact", "read everything twice, for medians without rounding (else up to 0.8%% off)")
    add_matrix_options(parser)
    add_gene_options(parser)
    parser.add_argument("--where", metavar="SQL", help="count only cells whose obs meet this")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments, settings = begin(parser, argv)

    from genescale.ingestion.median_files import write_beside
    from genescale.ingestion.medians import MediansConfig, measure_medians
    from genescale.platform.cluster import ray_cluster
    from genescale.platform.progress import stage
    from genescale.platform.settings import build
    from genescale.platform.storage import Store
    from genescale.platform.vocabulary_files import write_vocabulary

    names = (
        "name", "window", "min_observations", "min_observations_for_median", "fallback", "earlier", "exact",
    )  # fmt: skip
    config = build(MediansConfig, options_given(arguments, names), where="medians")
    store = Store(settings.storage)
    with ray_cluster(settings), stage("medians") as progress:
        found = measure_medians(arguments.sources, store=store, config=config, progress=progress)
    write_vocabulary(found.vocabulary, arguments.output, store)
    beside = write_beside(found, arguments.output, store)
    if arguments.json:
        print(json.dumps({**found.to_dict(), "output": arguments.output, **beside}, indent=2))
    else:
        _print_medians(found, arguments.output, beside)
    return 0 if found.ok else REFUSED_STATUS


def genes(argv: Sequence[str]) -> int:
    """Harvest a table of gene symbols from atlases that carry symbols and Ensembl ids."""
    parser = command_parser(
        "genes",
        "Harvest a table of gene symbols from atlas files that carry both symbols and Ensembl ids.",
        epilog="Give the table to `genescale ingest --gene-table` for files that have symbols only.",
    )
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help=SOURCE_HELP)
    parser.add_argument("--output", required=True, metavar="URI", help="table to write (.parquet)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments, settings = begin(parser, argv)

    from genescale.ingestion.annotation.gene_table import harvest_table, write_gene_table
    from genescale.platform.storage import Store

    store = Store(settings.storage)
    table = harvest_table(arguments.sources, store)
    write_gene_table(table, arguments.output, store)
    facts = {"output": arguments.output, "symbols": table.num_rows}
    print(
        json.dumps(facts, indent=2) if arguments.json else f"gene table  {arguments.output}: {table.num_rows:,} symbols"
    )
    return 0


def simulate(argv: Sequence[str]) -> int:
    """Write a planted-truth atlas."""
    parser = command_parser("simulate", "Write a planted-truth atlas: h5ad files, and the truth in a side file.")
    parser.add_argument("--output", required=True, metavar="URI", help="folder for the files")
    parser.add_argument("--config", metavar="FILE", help="TOML file with settings of the simulation")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments, settings = begin(parser, argv)

    from genescale.ingestion.simulate import SimulateConfig
    from genescale.ingestion.simulate import simulate as run
    from genescale.platform.progress import stage
    from genescale.platform.settings import build, read_toml
    from genescale.platform.storage import Store

    values = read_toml(arguments.config) if arguments.config else {}
    config = build(SimulateConfig, {**values, **_pairs(arguments.set)}, where=arguments.config or "simulate")
    with stage("simulate") as progress:
        atlas = run(config, arguments.output, Store(settings.storage), progress=progress)
    if arguments.json:
        print(json.dumps({"files": atlas.files, "truth": atlas.truth_uri, "cells": atlas.n_cells}, indent=2))
        return 0
    for file in atlas.files:
        print(f"atlas   {file}")
    print(f"truth   {atlas.truth_uri}")
    print(f"cells   {atlas.n_cells:,} with {atlas.n_genes:,} genes")
    return 0


def _pairs(texts: Sequence[str]) -> dict[str, str]:
    for text in texts:
        if "=" not in text:
            raise SettingsError(f"'{text}' is not KEY=VALUE.", fix="Write for example --set seed=7.")
    return {key.strip(): value for key, _, value in (text.partition("=") for text in texts)}


def _vocabulary(uri: str | None, corpus_uri: str, store: Store) -> Vocabulary:
    from genescale.ingestion.corpus import Corpus
    from genescale.platform.vocabulary import read_vocabulary

    return read_vocabulary(uri, store) if uri else Corpus.open(corpus_uri, store).vocabulary


def _print_medians(found: Medians, output: str, beside: Mapping[str, str]) -> None:
    facts = found.to_dict()
    print(f"vocabulary  {output}: {found.vocabulary!r}")
    print(f"cells       {found.n_cells:,}")
    print(f"genes       {facts['genes']:,} kept, {found.genes_left_out:,} left out (too few observations)")
    for name, address in beside.items():
        print(f"{name:<11} {address}")
    for warning in found.warnings:
        print(f"warning     {warning}")
    for failure in found.refused.values():
        print(f"refused     [{failure.code}] {failure.message}")


def _flag(parser: argparse.ArgumentParser, option: str, about: str) -> None:
    parser.add_argument(option, action="store_const", const=True, help=about)
