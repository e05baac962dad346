"""`genescale embed`, `genescale finetune` and `genescale tune`."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

    from genescale.platform.bundle import Bundle
    from genescale.platform.settings import Settings
    from genescale.training.fitting.finetune import FinetuneResult

MODEL_HELP = "models:/NAME@ALIAS, models:/NAME/VERSION, or a bundle folder (local or s3://)"
EMBED_EPILOG = """\
example:
  genescale embed models:/genescale@champion --corpus s3://lake/corpus --output s3://lake/embeddings \\
      --h5ad atlas.h5ad atlas_embedded.h5ad

The output folder holds Parquet files (cell_id, dataset_id, source_row, embedding, metadata) and manifest.json. The same
command again goes on with a run that was cut off."""
FINETUNE_EPILOG = """\
example:
  genescale finetune models:/genescale@champion --corpus s3://lake/corpus@12 --label cell_type --group donor_id \\
      --name cell-types --set epochs=50 --set class_weights=balanced

--config FILE is a TOML file of the same settings; --set changes one. Known settings: label, group, split, fractions,
encoder, frozen_layers, layer, pooling, epochs, patience, learning_rate, encoder_learning_rate, schedule,
warmup_fraction, weight_decay, gradient_clip, cells_per_batch, tokens_per_batch, hidden, dropout, class_weights,
min_cells_per_class, max_cells, seed, device."""
TUNE_EPILOG = """\
SPEC.toml:
  [search]
  learning_rate = { low = 1e-4, high = 1e-1, log = true }
  hidden = { choices = [0, 64] }
  [finetune]
  label = "cell_type"
  [sweep]
  trials = 16

The same command again goes on with a sweep that was cut off."""


def embed(argv: Sequence[str]) -> int:
    """Embed a corpus with a model, and put the result into an h5ad file when asked."""
    from genescale.platform.cli import begin, command_parser

    parser = command_parser("embed", "Embed every cell of a corpus.", epilog=EMBED_EPILOG)
    _add_inputs(parser)
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
    with _model(arguments.model, settings) as bundle:
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


def finetune(argv: Sequence[str]) -> int:
    """Fit a cell-class head, print how it does on held-out groups, and register it."""
    from genescale.platform.cli import begin, command_parser

    parser = command_parser("finetune", "Fit a cell-class head on a model.", epilog=FINETUNE_EPILOG)
    _add_inputs(parser)
    _add_outputs(parser, "classifier")
    parser.add_argument("--label", metavar="COLUMN", help="corpus column with the classes (default cell_type)")
    parser.add_argument("--group", metavar="COLUMN", help="column that is never split (default donor_id)")
    parser.add_argument("--random-split", action="store_true", help="split cells at random, without groups")
    parser.add_argument(
        "--train-encoder", action="store_true", help="train the encoder too, above --frozen-layers layers"
    )
    parser.add_argument("--frozen-layers", type=int, metavar="K", help="lower layers that stay as they are")
    parser.add_argument("--config", metavar="FILE", help="TOML file with settings")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting")
    arguments, settings = begin(parser, argv)

    from genescale.ingestion.corpus import Corpus
    from genescale.platform.progress import stage
    from genescale.platform.settings import build
    from genescale.platform.storage import Store
    from genescale.platform.tracking import open_tracker
    from genescale.training.fitting.finetune import FinetuneConfig
    from genescale.training.fitting.finetune import finetune as run_finetune

    config = build(FinetuneConfig, _finetune_values(arguments), where=arguments.config or "options")
    store = Store(settings.storage)
    with _model(arguments.model, settings) as bundle, stage("finetune") as progress:
        result = run_finetune(
            bundle,
            Corpus.open(arguments.corpus, store),
            config,
            tracker=open_tracker(settings),
            out=Path(arguments.output),
            store=store,
            embeddings_uri=arguments.embeddings,
            model_name=arguments.name,
            aliases=arguments.alias,
            progress=progress,
        )
    _print_result(result)
    return 0


def tune(argv: Sequence[str]) -> int:
    """Sweep the settings of a head, print the trials, and register the refitted winner."""
    from genescale.platform.cli import begin, command_parser

    parser = command_parser("tune", "Sweep the settings of a head on a frozen model.", epilog=TUNE_EPILOG)
    parser.add_argument("spec", metavar="SPEC.toml", help="what to try")
    parser.add_argument("--model", required=True, metavar="MODEL", help=MODEL_HELP)
    _add_corpus(parser)
    _add_outputs(parser, "sweep")
    parser.add_argument("--sweep", metavar="URI", help="folder for the state of the sweep (default: OUTPUT/ray)")
    arguments, settings = begin(parser, argv)

    from genescale.ingestion.corpus import Corpus
    from genescale.platform.cluster import ray_cluster
    from genescale.platform.progress import stage
    from genescale.platform.storage import Store
    from genescale.platform.tracking import open_tracker
    from genescale.training.sweeps.sweep_spec import read_spec
    from genescale.training.sweeps.tune import tune as run_tune

    spec = read_spec(arguments.spec)
    store = Store(settings.storage)
    out = Path(arguments.output).resolve()
    with _model(arguments.model, settings) as bundle, ray_cluster(settings), stage("tune") as progress:
        result = run_tune(
            bundle,
            Corpus.open(arguments.corpus, store),
            spec,
            tracker=open_tracker(settings),
            out=out,
            sweep_uri=arguments.sweep or str(out / "ray"),
            store=store,
            embeddings_uri=arguments.embeddings,
            model_name=arguments.name,
            aliases=arguments.alias,
            progress=progress,
        )
    print(f"{'trial':<18} {'macro F1':>8} {'epochs':>6}  settings")
    for trial in result.trials:
        drawn = ", ".join(f"{name}={_short(value)}" for name, value in trial.sample.items())
        print(f"{trial.name:<18} {trial.macro_f1:>8.4f} {trial.epochs:>6}  {'FAILED ' if trial.error else ''}{drawn}")
    print()
    _print_result(result.winner)
    return 0


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    _add_corpus(parser)


def _add_corpus(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--corpus", required=True, metavar="URI[@VERSION]", help="corpus, at its newest version or one")


def _add_outputs(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--output", default=default, metavar="FOLDER", help=f"local folder for bundle and scores (default {default})"
    )
    parser.add_argument("--embeddings", default="", metavar="URI", help="reuse what `genescale embed` wrote there")
    parser.add_argument("--name", default="", metavar="NAME", help="register the classifier under this name")
    parser.add_argument("--alias", action="append", default=[], help="alias of the registered version (repeatable)")


@contextlib.contextmanager
def _model(reference: str, settings: Settings) -> Iterator[Bundle]:
    """The bundle behind a reference, kept in a temporary folder as long as it is used."""
    from genescale.platform.tracking import fetch_bundle

    with tempfile.TemporaryDirectory(prefix="genescale-") as cache:
        yield fetch_bundle(reference, settings, Path(cache))


def _finetune_values(arguments: argparse.Namespace) -> dict[str, Any]:
    """Settings from --config, then --set, then the options with a name of their own."""
    from genescale.platform.errors import SettingsError
    from genescale.platform.settings import read_toml

    values: dict[str, Any] = read_toml(arguments.config) if arguments.config else {}
    for text in arguments.set:
        key, sign, value = text.partition("=")
        if not sign:
            raise SettingsError(f"'{text}' is not KEY=VALUE.", where="--set", fix="For example --set epochs=50.")
        values[key.strip()] = value.strip()
    named = {"label": arguments.label, "group": arguments.group, "frozen_layers": arguments.frozen_layers}
    values |= {name: value for name, value in named.items() if value is not None}
    if arguments.random_split:
        values["split"] = "random"
    if arguments.train_encoder:
        values["encoder"] = "trained"
    return values


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _print_result(result: FinetuneResult) -> None:
    cells, groups = result.counts["cells"], result.counts["groups"]
    for part, count in cells.items():
        print(f"{part:<12} {count:>8,} cells" + (f" of {len(groups[part])} groups" if groups[part] else ""))
    for reason, count in result.counts["left_out"].items():
        if count:
            print(f"left out     {count:>8,} cells: {reason}")
    print(f"\n{'class':<32} {'F1':>6} {'precision':>9} {'recall':>6} {'cells':>7}")
    for row in result.test.per_class:
        print(f"{row.name[:32]:<32} {row.f1:>6.3f} {row.precision:>9.3f} {row.recall:>6.3f} {row.support:>7,}")
    print(f"\nmacro F1     {result.macro_f1:.4f}   (always the most frequent class: {result.majority.macro_f1:.4f})")
    print(f"accuracy     {result.accuracy:.4f}   (always the most frequent class: {result.majority.accuracy:.4f})")
    print(f"best epoch   {result.best_epoch} of {len(result.history)}")
    print(f"bundle       {result.bundle.folder}")
    if result.model_version:
        print(f"model        models:/{result.model_version.name}/{result.model_version.version}")
