"""`genescale evaluate` and `genescale curve`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from genescale.training.model_options import add_model_and_corpus, opened_model

if TYPE_CHECKING:
    import argparse

    from genescale.training.evaluation.bundle_evaluation import BundleEvaluation
    from genescale.training.evaluation.curve_lines import CurveResult

EVALUATE_EPILOG = """\
example:
  genescale evaluate models:/genescale@champion --corpus s3://lake/corpus@12 --where "tissue = 'heart'" \\
      --by cell_type --by labels.region --batch donor_id --genes tf_classes.json --output heart

Measures hidden genes against gene frequencies, gene neighbourhoods, mixing of donors within cell types, and draws maps
of the cells. The folder gets report.html, report.json and cells.parquet; MLflow gets a run with the same. --genes takes
what `genescale finetune --genes` takes. Nothing is trained and no Ray is started."""
CURVE_EPILOG = """\
example:
  genescale curve models:/genescale@champion --corpus s3://lake/corpus@12 --label cell_type --group donor_id \\
      --cells 100,500,884,5000 --seeds 3 --where "tissue = 'heart'" --against "tissue != 'heart'" --output curve

Every point is fitted on so many labelled cells (the validation part among them) and measured on the same test cells,
which fulfil --where; --against draws the training cells elsewhere. Baselines get the same cells. The same command again
goes on with a curve that was cut off. --config FILE and --set KEY=VALUE give the settings of `genescale finetune`."""


def evaluate(argv: Sequence[str]) -> int:
    """Measure a pretrained model on cells of a corpus, and write a report."""
    from genescale.platform.cli import begin

    arguments, settings = begin(_evaluate_parser(), argv)

    from genescale.ingestion.corpus import Corpus
    from genescale.platform.progress import stage
    from genescale.platform.settings import build
    from genescale.platform.storage import Store
    from genescale.platform.tracking import open_tracker
    from genescale.training.evaluation.bundle_evaluation import evaluate_bundle
    from genescale.training.evaluation.measured_cells import EvaluateConfig

    config = build(EvaluateConfig, _evaluate_values(arguments), where="options")
    store = Store(settings.storage)
    with opened_model(arguments.model, settings) as bundle, stage("evaluate") as progress:
        found = evaluate_bundle(
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

        print(json.dumps(found.to_dict(), indent=1))
    else:
        _print_evaluation(found, arguments.output)
    return 0


def _evaluate_parser() -> argparse.ArgumentParser:
    from genescale.platform.cli import command_parser

    about = "Measure what a pretrained model knows of the cells of a corpus."
    parser = command_parser("evaluate", about, epilog=EVALUATE_EPILOG)
    _add_inputs(parser, "evaluation")
    parser.add_argument("--max-cells", type=int, metavar="N", help="cells drawn at random (default 2000; 0: all)")
    parser.add_argument(
        "--by", action="append", metavar="COLUMN", help="score values of this column apart (repeatable)"
    )
    parser.add_argument("--label", metavar="COLUMN", help="column with cell types (default cell_type)")
    parser.add_argument("--batch", metavar="COLUMN", help="column with donors (default donor_id, else dataset_id)")
    parser.add_argument("--genes", metavar="LISTS", help="gene lists to look up (default: the most frequent genes)")
    parser.add_argument("--neighbours", type=int, metavar="K", help="nearest genes that are listed (default 10)")
    parser.add_argument("--layer", help="last or second_to_last (default)")
    parser.add_argument("--pooling", help="mean_genes (default) or cls")
    parser.add_argument("--bootstrap", type=int, metavar="N", help="resamples for intervals (default 1000; 0: none)")
    parser.add_argument("--seed", type=int, help="of drawn cells, hidden genes, resamples and maps (default 0)")
    parser.add_argument("--device", help="auto (default), cpu or cuda")
    parser.add_argument(
        "--skip", action="append", metavar="PART", help="hidden_genes, neighbourhoods, mixing or umap (repeatable)"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def _add_inputs(parser: argparse.ArgumentParser, output: str) -> None:
    add_model_and_corpus(parser)
    parser.add_argument("--where", metavar="SQL", help="only cells that fulfil this condition on their columns")
    parser.add_argument("--output", default=output, metavar="URI", help=f"folder for the report (default {output})")


def _evaluate_values(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that were given; the defaults are those of the record."""
    left = {"model", "corpus", "output", "json", "settings"}
    return {name: value for name, value in vars(arguments).items() if name not in left and value is not None}


def _print_evaluation(found: BundleEvaluation, output: str) -> None:
    from genescale.platform.storage import join
    from genescale.platform.text_table import text_table
    from genescale.training.evaluation.bundle_evaluation import PAGE_NAME
    from genescale.training.evaluation.bundle_report import verdict

    if found.overall:
        rows = [
            (
                row.name,
                f"{row.genes:,}",
                *(f"{row.loss[name].mean:.3f}" for name in ("model", row.best_floor)),
                f"{row.accuracy['model'].mean:.1%}",
            )
            for row in (*found.by_rank, found.overall)
        ]
        print(text_table(("rank", "hidden genes", "loss", "best floor", "right"), rows))
        print()
    for one in found.genes.lists if found.genes else ():
        share = one.share["contextual"]
        print(f"list     {one.name}: {share:.1%} of neighbours are in it, {one.expected:.1%} by chance")
    if found.mixing:
        print(f"apart    {found.mixing.label}: silhouette {found.mixing.silhouette_label:.3f}")
        for kind in found.mixing.types:
            print(f"mixing   {kind.name}: {kind.rejection:.1%} rejected, {kind.rejection_shuffled:.1%} when shuffled")
    for part, why in found.left_out_parts.items():
        print(f"without  {part}: {why}")
    print(f"result   {verdict(found)[0]}")
    print(f"report   {join(output, PAGE_NAME)}")


def curve(argv: Sequence[str]) -> int:
    """Measure a task with more and more labelled cells, and write a report."""
    from genescale.platform.cli import begin

    arguments, settings = begin(_curve_parser(), argv)

    from genescale.ingestion.corpus import Corpus
    from genescale.platform.progress import stage
    from genescale.platform.settings import build
    from genescale.platform.storage import Store
    from genescale.platform.tracking import open_tracker
    from genescale.training.evaluation.curve import learning_curve
    from genescale.training.evaluation.curve_lines import CurveConfig
    from genescale.training.fitting.config import FinetuneConfig

    task = build(FinetuneConfig, _task_values(arguments), where=arguments.config or "options")
    names = ("cells", "seeds", "against", "baselines", "test_cells")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    config = build(CurveConfig, given, where="options")
    store = Store(settings.storage)
    with opened_model(arguments.model, settings) as bundle, stage("curve") as progress:
        found = learning_curve(
            bundle,
            Corpus.open(arguments.corpus, store),
            task,
            config,
            tracker=open_tracker(settings),
            out_uri=arguments.output,
            store=store,
            model=arguments.model,
            progress=progress,
        )
    if arguments.json:
        import json

        print(json.dumps(found.to_dict(), indent=1))
    else:
        _print_curve(found, arguments.output)
    return 0


def _curve_parser() -> argparse.ArgumentParser:
    from genescale.platform.cli import command_parser

    parser = command_parser("curve", "Measure a task with more and more labelled cells.", epilog=CURVE_EPILOG)
    _add_inputs(parser, "curve")
    parser.add_argument("--label", metavar="COLUMN", help="corpus column with the labels (default cell_type)")
    parser.add_argument("--group", metavar="COLUMN", help="column that is never split (default donor_id)")
    parser.add_argument("--genes", metavar="LISTS", help="gene lists: a gene task, read from so many cells")
    parser.add_argument("--random-split", action="store_true", help="split cells at random, without groups")
    parser.add_argument(
        "--cells", type=_sizes, metavar="N,N,…", help="labelled cells of the points (default 100,500,884,5000)"
    )
    parser.add_argument("--seeds", type=int, metavar="N", help="draws of each size (default 3)")
    parser.add_argument("--against", metavar="SQL", help="a second line: training cells that fulfil this instead")
    parser.add_argument(
        "--baseline",
        action="append",
        dest="baselines",
        metavar="NAME",
        help="logistic_regression and random_forest (the default), linear_svm, or none (repeatable)",
    )
    parser.add_argument("--test-cells", type=int, metavar="N", help="test cells at most (default 2000; 0: all)")
    parser.add_argument("--config", metavar="FILE", help="TOML file with settings of `genescale finetune`")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one of them")
    parser.add_argument("--json", action="store_true", help="print the points as JSON")
    return parser


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(size.replace("_", "")) for size in text.split(",") if size.strip())


def _task_values(arguments: argparse.Namespace) -> dict[str, Any]:
    """Settings from --config, then --set, then the options with a name of their own."""
    from genescale.platform.errors import SettingsError
    from genescale.platform.settings import read_toml

    values: dict[str, Any] = read_toml(arguments.config) if arguments.config else {}
    for text in arguments.set:
        key, sign, value = text.partition("=")
        if not sign:
            raise SettingsError(f"'{text}' is not KEY=VALUE.", where="--set", fix="For example --set epochs=50.")
        values[key.strip()] = value.strip()
    named = {name: getattr(arguments, name) for name in ("label", "group", "genes", "where")}
    values |= {name: value for name, value in named.items() if value is not None}
    if arguments.random_split:
        values["split"] = "random"
    if arguments.genes:
        values["unit"] = "genes"
    return values


def _print_curve(found: CurveResult, output: str) -> None:
    from genescale.platform.storage import join
    from genescale.platform.text_table import text_table
    from genescale.training.evaluation.curve import PAGE_NAME

    rows = [
        (line.name, f"{point.cells:,}", f"{point.mean:.4f}", f"{point.low:.4f} to {point.high:.4f}", f"{point.seeds}")
        for line in found.lines
        for point in line.points
    ]
    print(text_table(("line", "cells", found.metric, "range", "seeds"), rows))
    if found.config.against:
        print(f"\nother    training cells fulfil: {found.config.against}")
    for note in found.notes:
        print(f"note     {note}")
    print(f"test     {found.test_units:,} {found.unit}, the same at every point")
    print(f"points   {found.computed:,} fitted now, {found.reused:,} were there already")
    print(f"report   {join(output, PAGE_NAME)}")
