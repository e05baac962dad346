"""`genescale pretrain`: a recipe and a corpus become a registered model."""

from __future__ import annotations

from collections.abc import Sequence

PRETRAIN_EPILOG = """\
RECIPE is the name of a shipped recipe or a TOML file. Any value of it can be changed:
  genescale pretrain geneformer-v1-10m --corpus s3://atlas/corpus@12 --set lanes=64 --set optimizer.learning_rate=5e-4

The same command again goes on with a run that was cut off.
"""


def pretrain(argv: Sequence[str]) -> int:
    """Pretrain an encoder and register it; prints where it is and how it did."""
    from genescale.platform.cli import begin, command_parser

    parser = command_parser("pretrain", "Pretrain an encoder on a corpus.", epilog=PRETRAIN_EPILOG)
    parser.add_argument("recipe", metavar="RECIPE", help="shipped recipe or TOML file")
    parser.add_argument("--corpus", required=True, metavar="URI[@VERSION]", help="corpus, at its newest version or one")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a value of the recipe")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="training workers; must divide `lanes`")
    parser.add_argument("--cpus-per-worker", type=int, default=1, metavar="N", help="processors of each worker")
    parser.add_argument("--output", default="runs", metavar="FOLDER", help="folder or s3:// for checkpoints and bundle")
    parser.add_argument("--name", default="", help="name of the run (default: from recipe and corpus)")
    arguments, settings = begin(parser, argv)

    from genescale.ingestion.corpus import Corpus, parse_reference
    from genescale.platform.cluster import ray_cluster
    from genescale.platform.progress import stage
    from genescale.platform.storage import Store
    from genescale.platform.tracking import open_tracker
    from genescale.training.pretrain import pretrain as run_pretraining
    from genescale.training.recipe import read_recipe

    config = read_recipe(arguments.recipe, arguments.set)
    store = Store(settings.storage)
    uri, version = parse_reference(arguments.corpus)
    corpus = Corpus.open(uri, store, version=version)
    with ray_cluster(settings), stage("pretrain") as progress:
        result = run_pretraining(
            config,
            corpus,
            settings=settings,
            store=store,
            storage_uri=arguments.output,
            tracker=open_tracker(settings),
            workers=arguments.workers,
            cpus_per_worker=arguments.cpus_per_worker,
            progress=progress,
            run_name=arguments.name,
        )
    print(f"run      {result.name} ({result.run_id})")
    speed = f", {result.tokens_per_s:,.0f} tokens/s" if result.steps > result.resumed_from else ""
    print(f"steps    {result.steps} ({result.resumed_from} done before){speed}")
    if result.held_out_before and result.held_out_after:
        before, after = result.held_out_before, result.held_out_after
        print(f"held out loss {before.loss:.4f} -> {after.loss:.4f}, masked genes right {after.masked_accuracy:.1%}")
    print(f"bundle   {result.bundle_uri}")
    print(f"model    models:/{result.model_version.name}/{result.model_version.version}")
    return 0
