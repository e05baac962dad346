"""`genescale embed`: every cell of a corpus as a vector."""

from __future__ import annotations

from collections.abc import Sequence

from genescale.training.model_options import add_model_and_corpus, opened_model

EMBED_EPILOG = """\
example:
  genescale embed models:/genescale@champion --corpus s3://lake/corpus --output s3://lake/embeddings \\
      --h5ad atlas.h5ad atlas_embedded.h5ad

The output folder holds Parquet files (cell_id, dataset_id, source_row, embedding, metadata) and manifest.json. The same
command again goes on with a run that was cut off."""


def embed(argv: Sequence[str]) -> int:
    """Embed a corpus with a model, and put the result into an h5ad file when asked."""
    from genescale.platform.cli import begin, command_parser

    parser = command_parser("embed", "Embed every cell of a corpus.", epilog=EMBED_EPILOG)
    add_model_and_corpus(parser)
    parser.add_argument("--output", required=True, metavar="URI", help="folder for the result")
    parser.add_argument("--layer", default="second_to_last", help="last or second_to_last (default)")
    parser.add_argument("--pooling", default="mean_genes", help="mean_genes (default) or cls")
    parser.add_argument("--precision", default="float32", help="float32 (default) or bfloat16")
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    parser.add_argument(
        "--actors", type=int, default=0, metavar="N", help="processes that hold the model (0: automatic)"
    )
    parser.add_argument(
        "--h5ad",
        nargs=2,
        metavar=("IN", "OUT"),
        help='also copy the atlas file IN to OUT with the embeddings in obsm["X_genescale"]',
    )
    parser.add_argument("--dataset-id", default="", help="dataset of IN in the corpus, when there are several")
    arguments, settings = begin(parser, argv)

    from genescale.ingestion.corpus import Corpus
    from genescale.platform.cluster import ray_cluster
    from genescale.platform.progress import stage
    from genescale.platform.settings import build
    from genescale.platform.storage import Store
    from genescale.training.embed import EmbedConfig, embed_corpus
    from genescale.training.embeddings import annotate_h5ad

    names = ("layer", "pooling", "precision", "device", "actors")
    config = build(EmbedConfig, {name: getattr(arguments, name) for name in names}, where="options")
    store = Store(settings.storage)
    with opened_model(arguments.model, settings) as bundle:
        corpus = Corpus.open(arguments.corpus, store)
        with ray_cluster(settings), stage("embed") as progress:
            report = embed_corpus(
                bundle, corpus, out_uri=arguments.output, store=store, config=config, progress=progress
            )
    print(f"cells    {report.cells:,} ({report.cells - report.computed_cells:,} were there already)")
    print(f"tokens   {report.tokens:,}, {report.tokens_per_s:,.0f} tokens/s")
    print(f"output   {report.uri}")
    if arguments.h5ad:
        source, out = arguments.h5ad
        done = annotate_h5ad(source, arguments.output, out, store=store, dataset_id=arguments.dataset_id)
        print(f"h5ad     {out}: {done.embedded:,} of {done.cells:,} cells, {done.missing:,} not in the corpus (NaN)")
    return 0
