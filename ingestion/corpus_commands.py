"""`genescale corpus …`: look at a corpus, check it, change its layout, clean it, take it elsewhere."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from genescale.platform.cli import begin, command_parser

if TYPE_CHECKING:
    from genescale.ingestion.corpus import Corpus
    from genescale.ingestion.table.verify import VerifyReport
    from genescale.platform.progress import Progress
    from genescale.platform.settings import Settings
    from genescale.platform.storage import Store

ABOUT = "Look at a corpus, check it, change its layout, clean it, or take it elsewhere."
EPILOG = """\
A corpus is written URI or URI@VERSION (the newest version without @); `history` lists the versions.
Exit status: 0 done, 1 `verify` found faults or `diff` found differences, 2 the command could not be carried out.
"""
FAULTS_STATUS = 1
PINNED, NEWEST = "URI[@VERSION]", "URI"


def corpus(argv: Sequence[str]) -> int:
    """Run one of the actions on a corpus."""
    parser = command_parser("corpus", ABOUT, epilog=EPILOG)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _looking(actions)
    _changing(actions)
    arguments, settings = begin(parser, argv)

    from genescale.platform.storage import Store

    return ACTIONS[arguments.action](arguments, Store(settings.storage), settings)


def _action(actions: Any, name: str, about: str, address: str, *, detail: str = "") -> argparse.ArgumentParser:
    text = f"{about[0].upper()}{about[1:]}.{f' {detail}' if detail else ''}"
    parser: argparse.ArgumentParser = actions.add_parser(name, help=about, description=text, allow_abbrev=False)
    parser.add_argument("corpus", metavar=address)
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _looking(actions: Any) -> None:
    _action(actions, "show", "datasets, sizes, layout and vocabulary of a version", PINNED)
    _action(actions, "history", "every version and what made it", PINNED)
    diff = _action(
        actions,
        "diff",
        "datasets that differ between two versions, or two corpora of one vocabulary",
        PINNED,
        detail="Exit status 1 when anything differs.",
    )
    diff.add_argument("other", metavar="OTHER[@VERSION]")
    verify = _action(
        actions,
        "verify",
        "read every byte of a version and name what is damaged",
        PINNED,
        detail="Checks sizes, digests, page checksums, rows, tokens, cells that are there twice, and the files that "
        "were committed with the sources. Exit status 1 when anything is wrong.",
    )
    verify.add_argument("--against-source", action="store_true", help="make random cells again from their source files")
    verify.add_argument("--sample", type=int, default=1_000, metavar="N", help="cells to make again (default 1000)")
    verify.add_argument("--seed", type=int, default=0, metavar="N", help="which cells (default 0)")
    verify.add_argument("--gene-table", metavar="URI", help="the gene table, where sources were ingested with one")
    export = _action(actions, "export", "write a version as plain Parquet or as a Hugging Face dataset", PINNED)
    export.add_argument("output", metavar="FOLDER", help="a new or empty folder; local or s3://")
    export.add_argument("--format", required=True, choices=("parquet", "huggingface"), help="what to write")
    export.add_argument(
        "--dataset", action="append", default=[], metavar="NAME", help="only this dataset (may be repeated)"
    )
    export.add_argument("--file-cells", type=int, metavar="N", help="cells of one file, roughly (default 131072)")


def _changing(actions: Any) -> None:
    remove = _action(actions, "remove", "withdraw a dataset; earlier versions still hold it", NEWEST)
    remove.add_argument("dataset", metavar="DATASET")
    compact = _action(actions, "compact", "merge small parts; the same cells in the same order", NEWEST)
    compact.add_argument("--dataset", default="", metavar="NAME", help="only this dataset (default: all)")
    compact.add_argument("--part-mib", type=int, metavar="N", help="size of merged parts, roughly (default 64)")
    shuffle = _action(
        actions,
        "shuffle",
        "write the cells in random order for training, or add new datasets to such a corpus",
        PINNED,
        detail="A cell's place is a hash of the seed, its dataset and its source row. Run again after new datasets "
        "were ingested, only those are read and appended.",
    )
    shuffle.add_argument(
        "--output", required=True, metavar="URI", help="the shuffled corpus; made when it is not there"
    )
    shuffle.add_argument("--seed", type=int, metavar="N", help="key of the order (default: that of the output, or 0)")
    shuffle.add_argument("--part-cells", type=int, metavar="N", help="cells of a part, on average (default 65536)")
    shuffle.add_argument("--row-group-cells", type=int, metavar="N", help="cells decoded at once (default 4096)")
    shuffle.add_argument("--rebuild", action="store_const", const=True, help="make all parts anew")
    gc = _action(
        actions,
        "gc",
        "delete files that no version names and that are older than a grace period",
        NEWEST,
        detail="They are what writers left that died or lost a race. The grace period keeps what a running ingest has "
        "written and not committed; shorten it only while nobody writes.",
    )
    gc.add_argument("--older-than", default="24h", metavar="AGE", help="grace period: 24h (default), 30m, 7d")
    gc.add_argument("--dry-run", action="store_true", help="only say what would be deleted")


def _said(as_json: bool, facts: Any, text: Callable[[], str]) -> None:
    print(json.dumps(facts, indent=2) if as_json else text())


def _show(arguments: argparse.Namespace, store: Store, settings: Settings) -> int:
    from genescale.ingestion.corpus import Corpus
    from genescale.ingestion.table.corpus_text import corpus_facts, show_text

    facts = corpus_facts(Corpus.open(arguments.corpus, store))
    _said(arguments.json, facts, lambda: show_text(facts))
    return 0


def _history(arguments: argparse.Namespace, store: Store, settings: Settings) -> int:
    from genescale.ingestion.corpus import Corpus
    from genescale.ingestion.table.corpus_text import history_facts, history_text

    records = Corpus.open(arguments.corpus, store).history()
    _said(arguments.json, history_facts(records), lambda: history_text(records))
    return 0


def _diff(arguments: argparse.Namespace, store: Store, settings: Settings) -> int:
    from genescale.ingestion.corpus import Corpus
    from genescale.ingestion.table.corpus_text import diff_text
    from genescale.ingestion.table.diff import compare

    found = compare(Corpus.open(arguments.corpus, store), Corpus.open(arguments.other, store))
    _said(arguments.json, found.to_dict(), lambda: diff_text(found))
    return 0 if found.same else FAULTS_STATUS


def _verify(arguments: argparse.Namespace, store: Store, settings: Settings) -> int:
    from genescale.ingestion.corpus import Corpus
    from genescale.ingestion.table.corpus_text import verify_text
    from genescale.ingestion.table.verify import verify
    from genescale.platform.progress import stage

    found = Corpus.open(arguments.corpus, store)
    with stage("verify") as progress:
        report = verify(found, progress=progress)
        if arguments.against_source:
            report = _against_source(found, report, arguments, store, progress)
    _said(arguments.json, report.to_dict(), lambda: verify_text(report))
    return 0 if report.ok else FAULTS_STATUS


def _against_source(
    found: Corpus, report: VerifyReport, arguments: argparse.Namespace, store: Store, progress: Progress
) -> VerifyReport:
    from genescale.ingestion.annotation.gene_table import read_gene_table
    from genescale.ingestion.table.verify_source import against_source

    table = read_gene_table(arguments.gene_table, store) if arguments.gene_table else None
    options = {"sample": arguments.sample, "seed": arguments.seed}
    return against_source(found, report, **options, table=table, progress=progress)


def _remove(arguments: argparse.Namespace, store: Store, settings: Settings) -> int:
    from genescale.ingestion.corpus import Corpus

    newest = Corpus.open(arguments.corpus, store).remove(arguments.dataset)
    facts = {"removed": arguments.dataset, "uri": newest.uri, "version": newest.version, "cells": newest.n_cells}
    text = f"removed {arguments.dataset}: version {newest.version} has {newest.n_cells:,} cells"
    _said(arguments.json, facts, lambda: text)
    return 0


def _compact(arguments: argparse.Namespace, store: Store, settings: Settings) -> int:
    from genescale.ingestion.corpus import Corpus
    from genescale.ingestion.table.compact import DEFAULT_PART_MIB, compact
    from genescale.ingestion.table.corpus_text import compact_text
    from genescale.platform.cluster import ray_cluster
    from genescale.platform.progress import stage

    found = Corpus.open(arguments.corpus, store)
    part_mib = DEFAULT_PART_MIB if arguments.part_mib is None else arguments.part_mib
    with ray_cluster(settings), stage("compact") as progress:
        report = compact(found, dataset_id=arguments.dataset, part_mib=part_mib, progress=progress)
    _said(arguments.json, report.to_dict(), lambda: compact_text(report))
    return 0


def _shuffle(arguments: argparse.Namespace, store: Store, settings: Settings) -> int:
    from genescale.ingestion.corpus import Corpus
    from genescale.ingestion.table.corpus_text import shuffle_text
    from genescale.ingestion.table.shuffle import ShuffleConfig, shuffle
    from genescale.platform.cluster import ray_cluster
    from genescale.platform.progress import stage
    from genescale.platform.settings import build

    names = ("seed", "part_cells", "row_group_cells", "rebuild")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    config = build(ShuffleConfig, given, where="shuffle")
    found = Corpus.open(arguments.corpus, store)
    with ray_cluster(settings), stage("shuffle") as progress:
        report = shuffle(found, arguments.output, config=config, progress=progress)
    _said(arguments.json, report.to_dict(), lambda: shuffle_text(report))
    return 0


def _gc(arguments: argparse.Namespace, store: Store, settings: Settings) -> int:
    from genescale.ingestion.corpus import Corpus
    from genescale.ingestion.table.corpus_text import gc_text
    from genescale.ingestion.table.gc import collect_garbage, parse_age
    from genescale.platform.progress import stage

    age = parse_age(arguments.older_than)
    found = Corpus.open(arguments.corpus, store).at_newest()
    with stage("gc") as progress:
        report = collect_garbage(found, older_than=age, dry_run=arguments.dry_run, progress=progress)
    _said(arguments.json, report.to_dict(), lambda: gc_text(report))
    return 0


def _export(arguments: argparse.Namespace, store: Store, settings: Settings) -> int:
    from genescale.ingestion.corpus import Corpus
    from genescale.ingestion.table.corpus_text import export_text
    from genescale.ingestion.table.export import FILE_CELLS, export
    from genescale.platform.cluster import ray_cluster
    from genescale.platform.progress import stage

    found = Corpus.open(arguments.corpus, store)
    file_cells = FILE_CELLS if arguments.file_cells is None else arguments.file_cells
    with ray_cluster(settings), stage("export") as progress:
        report = export(
            found,
            arguments.output,
            format=arguments.format,
            datasets=arguments.dataset,
            file_cells=file_cells,
            progress=progress,
        )
    _said(arguments.json, report.to_dict(), lambda: export_text(report))
    return 0


ACTIONS: dict[str, Callable[[argparse.Namespace, Store, Settings], int]] = {
    "show": _show,
    "history": _history,
    "diff": _diff,
    "verify": _verify,
    "remove": _remove,
    "compact": _compact,
    "shuffle": _shuffle,
    "gc": _gc,
    "export": _export,
}
