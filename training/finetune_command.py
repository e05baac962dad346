"""`genescale finetune`: heads on a model, from a label column, gene lists or a ready task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genescale.training.model_options import add_head_outputs, changed_values, opened_model

if TYPE_CHECKING:
    import argparse

    from genescale.training.evaluation.bootstrap import Interval
    from genescale.training.fitting.config import FinetuneConfig
    from genescale.training.fitting.finetune import FinetuneResult, HeadResult
    from genescale.training.tasks.tasks import ReadyTask

_SHOWN = ("roc_auc", "macro_f1", "accuracy", "pr_auc", "ece", "r2", "spearman", "mae")
FINETUNE_EPILOG = """\
examples:
  genescale finetune models:/genescale@champion --corpus s3://lake/corpus@12 --label cell_type --group donor_id \\
      --name cell-types --set epochs=50 --set class_weights=balanced
  genescale finetune models:/genescale@champion --corpus s3://lake/corpus@12 --task dosage-sensitivity \\
      --genes lists.json
  genescale finetune --list-tasks

A task is a ready question: what is labelled, how it is split and fitted. --config FILE is a TOML file of settings, and
--set KEY=VALUE changes one; later ones win, in the order task, file, options, --set. --list-settings names them all.

The output folder gets the bundle, report.html and report.json with the baselines of the same folds, the predictions and
the split. The same command again takes up the vectors that are there."""


def finetune(argv: Sequence[str]) -> int:
    """Fit heads, print how they do on held-out cells or genes, and register them."""
    from genescale.platform.cli import begin

    arguments, settings = begin(_parser(), argv)
    if arguments.list_tasks or arguments.list_settings:
        print(_tasks_text() if arguments.list_tasks else _settings_text())
        return 0
    config, task = _config(arguments)

    from genescale.ingestion.corpus import Corpus
    from genescale.platform.progress import stage
    from genescale.platform.storage import Store
    from genescale.platform.tracking import open_tracker
    from genescale.training.evaluation.baselines import BaselineConfig
    from genescale.training.fitting.finetune import finetune as run_finetune

    store = Store(settings.storage)
    with opened_model(arguments.model, settings) as bundle, _ray(settings, config), stage("finetune") as progress:
        result = run_finetune(
            bundle,
            Corpus.open(arguments.corpus, store),
            config,
            tracker=open_tracker(settings),
            out=Path(arguments.output),
            store=store,
            embeddings_uri=arguments.embeddings,
            baselines=None if arguments.no_baselines else BaselineConfig(),
            title=task.title if task else "",
            question=task.question if task else "",
            run_home=arguments.state,
            model_name=arguments.name,
            aliases=arguments.alias or ["newest"],
            progress=progress,
        )
    print_result(result)
    return 0


def _parser() -> argparse.ArgumentParser:
    from genescale.platform.cli import command_parser
    from genescale.training.model_options import MODEL_HELP

    parser = command_parser(
        "finetune", "Fit heads on a model: classes or numbers of cells, classes of genes.", epilog=FINETUNE_EPILOG
    )
    parser.add_argument("model", nargs="?", default="", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--corpus", default="", metavar="URI[@VERSION]", help="corpus, at its newest version or one")
    parser.add_argument("--task", default="", metavar="NAME", help="a ready task, or a TOML file of one")
    parser.add_argument("--as-published", action="store_true", help="with --task: the published settings of the fit")
    parser.add_argument("--label", metavar="COLUMN", help="corpus column with the labels (default cell_type)")
    parser.add_argument("--number", action="store_true", help="the label is a number (age, dose)")
    parser.add_argument("--genes", default="", metavar="FILE", help="gene lists: the labels are those of genes")
    parser.add_argument("--where", metavar="SQL", help="only cells that fulfil this condition on their columns")
    parser.add_argument("--group", metavar="COLUMN", help="column that is never split (default donor_id)")
    parser.add_argument("--random-split", action="store_true", help="split cells at random, without groups")
    parser.add_argument("--folds", type=int, metavar="N", help="cross-validate with so many folds")
    parser.add_argument("--train-encoder", action="store_true", help="train the encoder too, above --frozen-layers")
    parser.add_argument("--lora", action="store_true", help="train low-rank additions to the encoder")
    parser.add_argument("--frozen-layers", type=int, metavar="K", help="lower layers that stay as they are")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that train the encoder together")
    parser.add_argument(
        "--state",
        metavar="URI",
        help="folder for checkpoints of a trained encoder, shared by nodes (default: OUTPUT/run)",
    )
    parser.add_argument("--no-baselines", action="store_true", help="do not fit simple classifiers to compare with")
    parser.add_argument("--config", metavar="FILE", help="TOML file with settings")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting")
    add_head_outputs(parser, "classifier")
    parser.add_argument("--list-tasks", action="store_true", help="print the ready tasks and stop")
    parser.add_argument("--list-settings", action="store_true", help="print every setting with its default and stop")
    return parser


def _config(arguments: argparse.Namespace) -> tuple[FinetuneConfig, ReadyTask | None]:
    """The settings of a task, then of --config, of the options with a name of their own, and of --set."""
    from genescale.platform.errors import SettingsError
    from genescale.platform.settings import build, read_toml
    from genescale.training.fitting.config import FinetuneConfig
    from genescale.training.tasks.tasks import load_task

    if not arguments.model or not arguments.corpus:
        raise SettingsError(
            "a model and a corpus are needed.", fix="Write: genescale finetune MODEL --corpus URI --label COLUMN."
        )
    changes = read_toml(arguments.config) if arguments.config else {}
    changes |= _options(arguments) | changed_values(arguments.set)
    if not arguments.task:
        genes = {"unit": "genes", "split": "random", "genes": arguments.genes} if arguments.genes else {}
        return build(FinetuneConfig, {**genes, **changes}, where=arguments.config or "options"), None
    task = load_task(arguments.task)
    return task.config(genes=arguments.genes, as_published=arguments.as_published, changes=changes), task


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("label", "where", "group", "folds", "frozen_layers", "workers")
    values = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    chosen = {
        "split": "random" if arguments.random_split else None,
        "kind": "number" if arguments.number else None,
        "encoder": "lora" if arguments.lora else "trained" if arguments.train_encoder else None,
    }
    return values | {name: value for name, value in chosen.items() if value}


def _ray(settings: Any, config: FinetuneConfig) -> Any:
    """Ray where several workers train; one process needs none."""
    import contextlib

    if config.workers == 1:
        return contextlib.nullcontext()
    from genescale.platform.cluster import ray_cluster

    return ray_cluster(settings)


def _tasks_text() -> str:
    import shutil

    from genescale.training.tasks.tasks import list_tasks

    width = min(shutil.get_terminal_size((120, 24)).columns, 120)
    return "\n\n".join(task.text(width) for task in list_tasks())


def _settings_text() -> str:
    import dataclasses

    from genescale.platform.text_table import text_table
    from genescale.training.fitting.config import FinetuneConfig

    rows = [(field.name, str(field.type), repr(field.default)) for field in dataclasses.fields(FinetuneConfig)]
    return text_table(("setting", "values", "default"), rows)


def print_result(result: FinetuneResult) -> None:
    """What a user wants to know of a fit: sizes, scores with intervals beside the baselines, and where things are."""
    counts = result.counts
    unit = result.task.unit
    several = f" (fold 1 of {counts['folds']})" if counts["folds"] > 1 else ""
    for part, count in counts[unit].items():
        groups = counts["groups"][part]
        print(f"{part:<12} {count:>8,} {unit}" + (f" of {len(groups)} groups" if groups else "") + several)
    for reason, count in counts["left_out"].items():
        if count:
            print(f"left out     {count:>8,} {reason}")
    for head in result.heads:
        _print_head(head)
    print(f"\nbest epoch   {result.best_epoch} of {len(result.history)}{several}")
    print(f"report       {result.report}")
    print(f"bundle       {result.bundle.folder}")
    if result.model_version:
        print(f"model        models:/{result.model_version.name}/{result.model_version.version}")


def _print_head(head: HeadResult) -> None:
    from genescale.platform.text_table import text_table
    from genescale.training.evaluation.measures import METRIC_NAMES

    found = head.evaluation
    print(f"\n{found.label}, {found.units:,} held-out {found.unit}")
    intervals = found.intervals.intervals
    columns = [
        ("the head", found.estimates(), intervals),
        ("majority" if found.classes else "mean", found.majority, {}),
    ]
    for baseline in head.baselines:
        if baseline.evaluation is not None:
            columns.append((f"{baseline.name}, {baseline.features}", baseline.evaluation.estimates(), {}))
    shown = [metric for metric in found.metrics if metric in _SHOWN]
    rows = [
        (name, *(_cell(values.get(metric), sure.get(metric)) for metric in shown)) for name, values, sure in columns
    ]
    print(text_table(("measured", *(METRIC_NAMES[metric] for metric in shown)), rows))
    for note in found.intervals.notes:
        print(f"note         {note}")
    why_not: dict[str, list[str]] = {}
    for baseline in head.baselines:
        if baseline.why_not:
            why_not.setdefault(baseline.why_not, []).append(f"{baseline.name}, {baseline.features}")
    for reason, names in why_not.items():
        print(f"not measured {'; '.join(names)}: {reason}")


def _cell(value: float | None, interval: Interval | None) -> str:
    if value is None or value != value:
        return "-"
    sure = f" ({interval.low:.3f} to {interval.high:.3f})" if interval and interval.low == interval.low else ""
    return f"{value:.3f}{sure}"
