"""`genescale ingest`, `medians`, `corpus` and `simulate`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from genescale.platform.cli import begin, command_parser
from genescale.platform.errors import SettingsError

if TYPE_CHECKING:
    from genescale.ingestion.corpus import Corpus
    from genescale.ingestion.medians import Medians
    from genescale.ingestion.report import IngestReport
    from genescale.platform.storage import Store
    from genescale.platform.vocabulary import Vocabulary

SOURCE_HELP = "atlas file (.h5ad), glob or folder; local or s3://"
REFUSED_STATUS = 1


def ingest(argv: Sequence[str]) -> int:
    """Turn atlas files into rows of a corpus; exit status 1 when a file was refused."""
    parser = command_parser("ingest", "Turn atlas files into a corpus of token rows: one commit per file, each once.")
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help=SOURCE_HELP)
    parser.add_argument("--corpus", required=True, metavar="URI", help="the corpus; it is made when it is not there")
    parser.add_argument("--vocabulary", metavar="URI", help="gene vocabulary (default: the one the corpus has)")
    parser.add_argument("--dataset-id", metavar="NAME", help="name of the dataset (default: the file's name)")
    parser.add_argument("--min-genes", type=int, metavar="N", help="drop cells with fewer vocabulary genes (default 7)")
    parser.add_argument("--min-share", type=float, metavar="S", help="refuse files of which fewer ids are known (0.1)")
    _add_reading(parser)
    arguments, settings = begin(parser, argv)

    from genescale.ingestion.pipeline import IngestConfig
    from genescale.ingestion.pipeline import ingest as run
    from genescale.platform.cluster import ray_cluster
    from genescale.platform.progress import stage
    from genescale.platform.settings import build
    from genescale.platform.storage import Store

    names = ("dataset_id", "min_genes", "min_share", "counts_slot", "unit_nonzeros")
    config = build(IngestConfig, _given(arguments, names), where="ingest")
    store = Store(settings.storage)
    vocabulary = _vocabulary(arguments.vocabulary, arguments.corpus, store)
    with ray_cluster(settings), stage("ingest") as progress:
        report = run(
            arguments.sources, arguments.corpus, vocabulary=vocabulary, store=store, config=config, progress=progress
        )
    if arguments.json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        _print_ingest(report)
    return 0 if report.ok else REFUSED_STATUS


def medians(argv: Sequence[str]) -> int:
    """Compute gene medians from atlas files and write the vocabulary; exit status 1 when a file was refused."""
    parser = command_parser("medians", "Compute non-zero gene medians over atlas files, and the vocabulary they make.")
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help=SOURCE_HELP)
    parser.add_argument("--output", required=True, metavar="URI", help="vocabulary to write (.parquet or .tsv)")
    parser.add_argument("--name", default="", help="name to record in the vocabulary")
    parser.add_argument("--window", type=int, metavar="TOKENS", help="tokens per cell (default 4096)")
    parser.add_argument("--min-observations", type=int, metavar="N", help="leave out genes seen in fewer cells (1)")
    _add_reading(parser)
    arguments, settings = begin(parser, argv)

    from genescale.ingestion.medians import MediansConfig, measure_medians
    from genescale.platform.cluster import ray_cluster
    from genescale.platform.progress import stage
    from genescale.platform.settings import build
    from genescale.platform.storage import Store
    from genescale.platform.vocabulary_files import write_vocabulary

    names = ("name", "window", "min_observations", "counts_slot", "unit_nonzeros")
    config = build(MediansConfig, _given(arguments, names), where="medians")
    store = Store(settings.storage)
    with ray_cluster(settings), stage("medians") as progress:
        found = measure_medians(arguments.sources, store=store, config=config, progress=progress)
    write_vocabulary(found.vocabulary, arguments.output, store)
    if arguments.json:
        print(json.dumps({**found.to_dict(), "output": arguments.output}, indent=2))
    else:
        _print_medians(found, arguments.output)
    return 0 if found.ok else REFUSED_STATUS


def corpus(argv: Sequence[str]) -> int:
    """Show a corpus or its history, or remove a dataset from it."""
    parser = command_parser("corpus", "Show a corpus, its history, or remove a dataset.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, about in (("show", "datasets and size of a version"), ("history", "every version and what made it")):
        action = actions.add_parser(name, help=about)
        action.add_argument("corpus", metavar="URI[@VERSION]")
        action.add_argument("--json", action="store_true", help="print JSON")
    remove = actions.add_parser("remove", help="withdraw a dataset; earlier versions still hold it")
    remove.add_argument("corpus", metavar="URI")
    remove.add_argument("dataset", metavar="DATASET")
    arguments, settings = begin(parser, argv)

    from genescale.ingestion.corpus import Corpus
    from genescale.platform.storage import Store

    found = Corpus.open(arguments.corpus, Store(settings.storage))
    if arguments.action == "show":
        _show(found, arguments.json)
    elif arguments.action == "history":
        _history(found, arguments.json)
    else:
        newest = found.remove(arguments.dataset)
        print(f"removed {arguments.dataset}: version {newest.version} has {newest.n_cells:,} cells")
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


def _add_reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--counts-slot", metavar="SLOT", help="auto (default), X, raw.X or layers/NAME")
    parser.add_argument("--unit-nonzeros", type=int, metavar="N", help="stored counts that one task reads (8000000)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _given(arguments: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """The options that were given: the others keep the defaults of their config."""
    return {name: value for name in names if (value := getattr(arguments, name)) is not None}


def _pairs(texts: Sequence[str]) -> dict[str, str]:
    for text in texts:
        if "=" not in text:
            raise SettingsError(f"'{text}' is not KEY=VALUE.", fix="Write for example --set seed=7.")
    return {key.strip(): value for key, _, value in (text.partition("=") for text in texts)}


def _vocabulary(uri: str | None, corpus_uri: str, store: Store) -> Vocabulary:
    from genescale.ingestion.corpus import Corpus
    from genescale.platform.vocabulary import read_vocabulary

    return read_vocabulary(uri, store) if uri else Corpus.open(corpus_uri, store).vocabulary


def _print_ingest(report: IngestReport) -> None:
    from genescale.platform.text_table import text_table

    rows = [
        (
            s.dataset_id,
            s.status.replace("_", " "),
            s.tally.read,
            s.tally.kept,
            s.tally.n_dropped,
            s.tally.tokens,
            _genes(s),
        )
        for s in report.sources
    ]
    print(text_table(("dataset", "status", "read", "kept", "dropped", "tokens", "genes"), rows))
    for reason, cells in report.dropped.items():
        print(f"dropped  {cells:,} cells: {reason}")
    for source in report.sources:
        for note in source.notes:
            print(f"note     {source.dataset_id}: {note}")
    for source in report.of("refused"):
        assert source.failure is not None
        print(f"refused  [{source.failure.code}] {source.failure.message}")
    version = "none yet" if report.version is None else f"{report.corpus_uri}@{report.version}"
    speed = report.read / report.seconds if report.seconds else 0.0
    print(f"corpus   {version}")
    print(f"time     {report.seconds:.1f} s, {speed:,.0f} cells/s")


def _genes(source: Any) -> str:
    return f"{source.genes_mapped:,} of {source.genes_mapped + source.genes_dropped:,}" if source.genes_mapped else ""


def _print_medians(found: Medians, output: str) -> None:
    facts = found.to_dict()
    print(f"vocabulary  {output}: {found.vocabulary!r}")
    print(f"cells       {found.n_cells:,}")
    print(f"genes       {facts['genes']:,} kept, {found.genes_left_out:,} left out (too few observations)")
    if few := facts["genes_with_few_observations"]:
        print(f"warning     {few:,} genes were seen in fewer than 1,000 cells: their medians are rough")
    for failure in found.refused.values():
        print(f"refused     [{failure.code}] {failure.message}")


def _show(found: Corpus, as_json: bool) -> None:
    from genescale.platform.text_table import text_table

    datasets = found.datasets()
    tokens = int(sum(found.cells(["length"]).column(0).to_numpy())) if found.n_cells else 0
    if as_json:
        facts: Mapping[str, Any] = {
            "uri": found.uri,
            "version": found.version,
            "cells": found.n_cells,
            "tokens": tokens,
            "parts": len(found.parts),
            "vocabulary": {"name": found.vocabulary.name, "digest": found.vocabulary.digest},
            "datasets": [
                {"dataset_id": d.dataset_id, "cells": d.n_cells, "source": d.source_uri, "version": d.added_in_version}
                for d in datasets
            ],
        }
        print(json.dumps(facts, indent=2))
        return
    print(f"corpus      {found.uri}@{found.version}")
    print(f"cells       {found.n_cells:,} in {len(found.parts):,} parts, {tokens:,} tokens")
    print(f"vocabulary  {found.vocabulary!r}")
    rows = [(d.dataset_id, d.n_cells, f"@{d.added_in_version}", d.source_uri) for d in datasets]
    print(text_table(("dataset", "cells", "since", "source"), rows))


def _history(found: Corpus, as_json: bool) -> None:
    from genescale.platform.text_table import text_table

    records = found.history()
    if as_json:
        plain = [
            {
                "version": r.version,
                "time": r.time.isoformat(),
                "operation": r.operation,
                "dataset_id": r.dataset_id,
                **r.details,
            }
            for r in records
        ]
        print(json.dumps(plain, indent=2))
        return
    rows = [
        (
            f"@{r.version}",
            r.time.strftime("%Y-%m-%d %H:%M:%S"),
            r.operation,
            r.dataset_id,
            r.details.get("kept", r.details.get("cells", "")),
            ", ".join(f"{reason}: {n:,}" for reason, n in r.details.get("dropped", {}).items()),
        )
        for r in records
    ]
    print(text_table(("version", "time (UTC)", "operation", "dataset", "cells", "dropped"), rows))
