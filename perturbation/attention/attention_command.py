"""`genescale perturb attention`: what genes look at, from the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from genescale.training.model_options import add_model_and_corpus, opened_model

if TYPE_CHECKING:
    import argparse

    from genescale.perturbation.attention.corpus_attention import AttentionResult

EPILOG = """\
examples:
  genescale perturb attention models:/genescale@champion --corpus s3://lake/corpus --genes tfs.txt \\
      --where "cell_type = 'monocyte'" --max-cells 300 --output attention
  genescale perturb attention model/ --corpus corpus@12 --genes GATA4,TBX5,NKX2-5 --graph lists --graph-layers 5,6 \\
      --output heart

--genes takes gene names separated by commas, or lists as `genescale finetune --genes` does (JSON, GMT, CSV, TSV or
text; FILE#:NAME,NAME chooses some). The folder gets attention.html, attention.json, graph.graphml, and each table as
Parquet and CSV: lists, list_genes, heads, layers, between_ranks, genes, graph_nodes, graph_edges. Layers and heads
count from 1. No Ray is started."""
_NOT_SETTINGS = {"model", "corpus", "output", "json", "settings"}


def attention(argv: Sequence[str]) -> int:
    """Analyse where a model looks in the cells of a corpus, and write tables, a graph and a page."""
    from genescale.platform.cli import begin

    arguments, settings = begin(_parser(), argv)

    from genescale.ingestion.corpus import Corpus
    from genescale.perturbation.attention.config import AttentionConfig
    from genescale.perturbation.attention.corpus_attention import attend_corpus
    from genescale.platform.progress import stage
    from genescale.platform.settings import build
    from genescale.platform.storage import Store
    from genescale.platform.tracking import open_tracker

    config = build(AttentionConfig, _values(arguments), where="options")
    store = Store(settings.storage)
    with opened_model(arguments.model, settings) as bundle, stage("attention") as progress:
        result = attend_corpus(
            bundle,
            Corpus.open(arguments.corpus, store),
            config,
            tracker=open_tracker(settings),
            out_uri=arguments.output,
            store=store,
            model=arguments.model,
            progress=progress,
        )
    if arguments.json:
        import json

        print(json.dumps(result.to_dict(), indent=1))
    else:
        _print(result, arguments.output)
    return 0


def _parser() -> argparse.ArgumentParser:
    from genescale.platform.cli import command_parser

    about = "Where a model looks: gene lists against matched genes, ranks, and a graph of genes."
    parser = command_parser("perturb attention", about, epilog=EPILOG)
    add_model_and_corpus(parser)
    parser.add_argument("--output", required=True, metavar="URI", help="folder for the result")
    parser.add_argument(
        "--genes", metavar="LISTS", help="genes (A,B,C) or a file of lists to compare with matched genes"
    )
    parser.add_argument("--where", metavar="SQL", help="only cells that fulfil this condition on their columns")
    parser.add_argument("--max-cells", type=int, metavar="N", help="cells drawn at random (default 500; 0: all)")
    parser.add_argument("--seed", type=int, help="of that draw and of intervals (default 0)")
    parser.add_argument("--controls", type=int, metavar="N", help="matched genes for each gene (default 10)")
    parser.add_argument("--min-cells", type=int, metavar="N", help="cells that a gene or a pair needs (default 5)")
    parser.add_argument(
        "--graph", metavar="N|lists|none", help="genes of the graph: the N found in most cells and those "
        "of the lists (default 300), those of the lists alone, or no graph"
    )  # fmt: skip
    parser.add_argument("--graph-layers", metavar="N,N", help="layers it averages (default all)")
    parser.add_argument("--graph-heads", metavar="N,N", help="heads it averages (default all)")
    parser.add_argument("--edges", type=int, metavar="N", help="strongest edges that are kept (default 2000; 0: all)")
    parser.add_argument("--edge-order", metavar="NAME", help="relative (default) or lift, which does not favour hubs")
    parser.add_argument("--threshold", type=float, metavar="X", help="leave out edges at or below it (default 0)")
    parser.add_argument("--confidence", type=float, metavar="P", help="of intervals (default 0.95)")
    parser.add_argument("--draws", type=int, metavar="N", help="resamples behind an interval (default 2000)")
    parser.add_argument("--device", help="auto (default), cpu or cuda")
    parser.add_argument("--json", action="store_true", help="print the record as JSON")
    return parser


def _values(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that were given; the defaults are those of the config."""
    given = vars(arguments).items()
    return {name: value for name, value in given if name not in _NOT_SETTINGS and value is not None}


def _print(result: AttentionResult, output: str) -> None:
    from genescale.perturbation.attention.corpus_attention import PAGE
    from genescale.perturbation.attention.list_section import list_sentence
    from genescale.perturbation.attention.rank_section import rank_sentences
    from genescale.platform.storage import join

    print(f"cells    {result.n_cells:,} of {len(result.donors.names):,} donors, {result.seconds:.1f} s")
    for one in result.lists:
        print(f"list     {list_sentence(result, one)}")
        if one.outside:
            print(f"         {len(one.outside):,} of its names are not in the vocabulary")
    for sentence in rank_sentences(result):
        print(f"ranks    {sentence}")
    if result.tables.edges is not None and result.tables.nodes is not None:
        print(f"graph    {len(result.tables.edges):,} edges between {len(result.tables.nodes):,} genes")
    print(f"report   {join(output, PAGE)}")
