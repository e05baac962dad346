"""`genescale index`: cells of a corpus as a reference in which a service finds neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from genescale.training.model_options import add_model_and_corpus, opened_model

if TYPE_CHECKING:
    import argparse

    from genescale.serving.neighbours.building import IndexReport

FROM_OPTIONS = (
    "where",
    "max_cells",
    "columns",
    "layer",
    "pooling",
    "search",
    "apart",
    "map_cells",
    "examples",
    "device",
    "seed",
)
INDEX_EPILOG = """\
examples:
  genescale index models:/genescale@champion --corpus s3://lake/corpus@12 --columns cell_type,tissue,disease \\
      --output s3://lake/references/census-12
  genescale index models:/genescale@champion --corpus s3://lake/corpus@12 --where "tissue = 'heart'" \\
      --embeddings s3://lake/embeddings --apart donor_id --output heart-reference
  genescale serve models:/genescale@champion --index heart-reference

Cells are embedded in this process. For many of them run `genescale embed` first, which uses every processor and GPU of
a cluster and goes on where it was cut off, and give its folder with --embeddings. Only the model that made an index can
be served with it. The labels in --columns, cell ids and dataset ids are what the service tells its callers, and the
genes of a few example cells (--examples 0 publishes none). UMAP lays out the map of the explorer page; its picture
depends on --seed, answers do not."""


def index(argv: Sequence[str]) -> int:
    """Write an index of a corpus for a model."""
    from genescale.platform.cli import begin

    arguments, settings = begin(_parser(), argv)

    from genescale.ingestion.corpus import Corpus
    from genescale.platform.progress import stage
    from genescale.platform.settings import build
    from genescale.platform.storage import Store
    from genescale.serving.neighbours.building import IndexConfig, build_index

    config = build(IndexConfig, {name: getattr(arguments, name) for name in FROM_OPTIONS}, where="options")
    store = Store(settings.storage)
    with opened_model(arguments.model, settings) as bundle:
        corpus = Corpus.open(arguments.corpus, store)
        with stage("index") as progress:
            report = build_index(
                bundle,
                corpus,
                out_uri=arguments.output,
                store=store,
                config=config,
                embeddings_uri=arguments.embeddings,
                progress=progress,
            )
    _print_report(report)
    return 0


def _parser() -> argparse.ArgumentParser:
    from genescale.platform.cli import command_parser

    parser = command_parser("index", "Make a reference in which a service finds neighbours.", epilog=INDEX_EPILOG)
    add_model_and_corpus(parser)
    parser.add_argument("--output", required=True, metavar="URI", help="folder for the index")
    parser.add_argument("--where", default="", metavar="SQL", help="only cells that fulfil this condition")
    parser.add_argument("--max-cells", type=int, default=0, metavar="N", help="cells drawn at random (0: all)")
    parser.add_argument(
        "--columns", default="cell_type,tissue", metavar="C,C,…", help="labels to answer with (cell_type,tissue)"
    )
    parser.add_argument("--embeddings", default="", metavar="URI", help="reuse what `genescale embed` wrote there")
    parser.add_argument("--layer", default="second_to_last", help="last or second_to_last (default)")
    parser.add_argument("--pooling", default="mean_genes", help="mean_genes (default) or cls")
    parser.add_argument("--search", default="auto", help="exact, graph, or auto (default: graph beyond 100,000 cells)")
    parser.add_argument(
        "--apart",
        default="",
        metavar="COLUMN",
        help="score what is unlike the reference by distances between cells that differ here, such as donor_id",
    )
    parser.add_argument(
        "--map-cells", type=int, default=20_000, metavar="N", help="cells laid out in two dimensions (20000; 0: no map)"
    )
    parser.add_argument(
        "--examples", type=int, default=3, metavar="N", help="cells of each label published as examples (3; 0: none)"
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    parser.add_argument("--seed", type=int, default=0, help="of drawn cells (default 0)")
    return parser


def _print_report(report: IndexReport) -> None:
    from genescale.serving.neighbours.index_folder import MAP

    made = report.manifest
    print(f"cells    {made.cells:,} of corpus version {made.corpus_version}, {made.search} search")
    for name, count in report.labelled.items():
        print(f"label    {name}: {count:,} cells have one")
    print(f"map      {'of all cells, by UMAP' if MAP in made.files else 'none'}")
    print(f"output   {report.uri} ({report.size_bytes:,} bytes, {made.digest[:12]})")
