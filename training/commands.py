"""`genescale pretrain`: a recipe and a corpus become a registered model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from genescale.platform.errors import SettingsError

if TYPE_CHECKING:
    from genescale.ingestion.corpus import Corpus
    from genescale.platform.settings import Settings
    from genescale.platform.storage import Store
    from genescale.training.estimate import Estimate
    from genescale.training.pretrain import PretrainResult
    from genescale.training.recipe import PretrainConfig

PRETRAIN_EPILOG = """\
RECIPE is the name of a shipped recipe or a TOML file. Any value of it can be changed:
  genescale pretrain geneformer-v1-10m --corpus s3://atlas/corpus@12 --set lanes=64 --set optimizer.learning_rate=5e-4
  genescale pretrain geneformer-v1-10m --corpus s3://atlas/corpus@12 --workers 12 --dry-run

A run that was cut off goes on with the same command, or by its name, on any number of workers:
  genescale pretrain --resume geneformer-v1-10m-3f9c0a11d2 --output s3://atlas/runs --workers 8
"""


def pretrain(argv: Sequence[str]) -> int:
    """Pretrain an encoder and register it; prints where it is and how it did."""
    from genescale.platform.cli import begin

    arguments, settings = begin(_parser(), argv)
    from genescale.platform.storage import Store

    store = Store(settings.storage)
    config, corpus, folder = _what_to_run(arguments, store)
    if arguments.dry_run:
        _print_estimate(_estimate(config, corpus, folder, arguments.workers or 1), as_json=arguments.json)
        return 0
    result = _run(arguments, settings, store, config, corpus, folder)
    if arguments.json:
        print(json.dumps(_values(result), indent=1))
    else:
        _print_result(result)
    return 0


def _parser() -> argparse.ArgumentParser:
    from genescale.platform.cli import command_parser

    parser = command_parser("pretrain", "Pretrain an encoder on a corpus.", epilog=PRETRAIN_EPILOG)
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", default="", help="shipped recipe or TOML file")
    parser.add_argument("--corpus", default="", metavar="URI[@VERSION]", help="corpus, at its newest version or one")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a value of the recipe")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="training workers; must divide `lanes`")
    parser.add_argument("--cpus-per-worker", type=int, default=1, metavar="N", help="processors of each worker")
    parser.add_argument("--output", default="runs", metavar="FOLDER", help="folder or s3:// for checkpoints and bundle")
    parser.add_argument("--name", default="", help="name of the run (default: from recipe and corpus)")
    parser.add_argument("--resume", default="", metavar="RUN", help="go on with this run (name or address)")
    parser.add_argument("--max-hours", type=float, default=0.0, metavar="H", help="stop with a checkpoint after this")
    parser.add_argument("--dry-run", action="store_true", help="print plan, memory and estimated time; train nothing")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _what_to_run(arguments: argparse.Namespace, store: Store) -> tuple[PretrainConfig, Corpus, str]:
    """(recipe, pinned corpus, address of the run's folder) of a new run or of one to go on with."""
    from genescale.platform.address import parse
    from genescale.platform.storage import join
    from genescale.training.batches import BLOCK_CELLS, BLOCKS
    from genescale.training.cells import training_corpus
    from genescale.training.pretrain import default_name
    from genescale.training.recipe import changed_recipe, read_recipe
    from genescale.training.run_files import RunFolder

    if arguments.resume:
        if arguments.recipe or arguments.corpus or arguments.name:
            raise SettingsError(
                "--resume takes recipe, corpus and name from the run.",
                fix="Leave them out; --set and --workers may stay.",
            )
        folder = RunFolder.find(store, arguments.resume, arguments.output)
        identity = folder.identity()
        arguments.workers = arguments.workers or int(folder.launch().get("workers", 1))
        pinned = identity.corpus_version
        corpus = training_corpus(identity.corpus_uri, store, version=pinned, group_cells=BLOCK_CELLS * BLOCKS)
        return changed_recipe(identity.recipe, arguments.set), corpus, folder.uri
    if not arguments.recipe or not arguments.corpus:
        raise SettingsError(
            "a recipe and a corpus are needed.", fix="Write: genescale pretrain RECIPE --corpus URI, or --resume RUN."
        )
    config = read_recipe(arguments.recipe, arguments.set)
    corpus = training_corpus(arguments.corpus, store, group_cells=BLOCK_CELLS * BLOCKS)
    return config, corpus, join(parse(arguments.output).uri, arguments.name or default_name(config, corpus))


def _run(
    arguments: argparse.Namespace, settings: Settings, store: Store, config: PretrainConfig, corpus: Corpus, folder: str
) -> PretrainResult:
    from genescale.platform.cluster import ray_cluster
    from genescale.platform.progress import stage
    from genescale.platform.tracking import open_tracker
    from genescale.training.pretrain import pretrain as run_pretraining

    output, _, name = folder.rpartition("/")
    with ray_cluster(settings), stage("pretrain") as progress:
        tracker = open_tracker(settings)
        # A run whose driver was killed is still marked as running.
        tracker.close_dangling()
        return run_pretraining(
            config,
            corpus,
            settings=settings,
            store=store,
            storage_uri=output,
            tracker=tracker,
            workers=arguments.workers or 1,
            cpus_per_worker=arguments.cpus_per_worker,
            progress=progress,
            run_name=name,
            max_hours=arguments.max_hours,
        )


def _print_result(result: PretrainResult) -> None:
    print(f"run      {result.name} ({result.run_id})")
    speed = f", {result.tokens_per_s:,.0f} tokens/s" if result.steps > result.resumed_from else ""
    speed += f", MFU {result.mfu:.1%}" if speed and result.mfu else ""
    print(f"steps    {result.steps} ({result.resumed_from} done before){speed}")
    for remark in result.remarks:
        print(f"note     {remark}")
    if result.model_version is None:
        print("stopped  its time was up; a checkpoint is written and nothing is registered. Go on with:")
        print(f"         genescale pretrain --resume {result.home}")
        return
    if result.held_out_before and result.held_out_after:
        before, after = result.held_out_before, result.held_out_after
        print(f"held out loss {before.loss:.4f} -> {after.loss:.4f}, masked genes right {after.masked_accuracy:.1%}")
    print(f"bundle   {result.bundle_uri}")
    print(f"model    models:/{result.model_version.name}/{result.model_version.version}")


def _values(result: PretrainResult) -> dict[str, Any]:
    import dataclasses

    values = dataclasses.asdict(result)
    values["model_version"] = result.model_version.reference if result.model_version else None
    values["unsent"] = result.unsent and {"rows": result.unsent.rows, "path": str(result.unsent.path)}
    return values


def _estimate(config: PretrainConfig, corpus: Corpus, folder: str, workers: int) -> dict[str, Any]:
    from genescale.training.cells import CorpusCells
    from genescale.training.estimate import estimate

    found: Estimate = estimate(config, CorpusCells(corpus), workers=workers)
    return {"run": folder, "corpus": f"{corpus.uri}@{corpus.version}", **found.to_dict()}


def _print_estimate(values: dict[str, Any], *, as_json: bool) -> None:
    print(json.dumps(values, indent=1) if as_json else "\n".join(_estimate_lines(values)))


def _estimate_lines(v: dict[str, Any]) -> list[str]:
    speed, devices = v["measured"], v["workers"]
    by_stage = [
        f"         ZeRO {stage}  {_gib(size)}{'  (this recipe)' if stage == v['zero_stage'] else ''}"
        for stage, size in v["memory_bytes"].items()
    ]
    return [
        f"run      {v['run']}",
        f"corpus   {v['corpus']}",
        f"cells    {v['cells']:,} to train on, {v['held_out_cells']:,} held out by {v['held_out_by']}",
        f"steps    {v['steps']:,}, which are {v['epochs']:.2f} epochs",
        f"tokens   {v['tokens']:,}; {v['tokens_per_step']:,.0f} a step, micro-batches {v['fill']:.1%} full",
        f"model    {v['parameters']:,} parameters; a checkpoint takes {_gib(v['checkpoint_bytes'])}",
        f"memory   of each of {devices} workers, estimated:",
        *by_stage,
        f"speed    {speed['tokens_per_s']:,.0f} tokens/s, MFU {speed['mfu']:.1%}, of one worker: measured now with "
        f"{speed['micro_batches']} micro-batches on {speed['device']}",
        f"time     {_duration(v['hours'])} on {devices} such devices, communication not counted",
    ]


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 1024**3:.2f} GiB"


def _duration(hours: float) -> str:
    if hours < 1 / 60:
        return f"{3600 * hours:.0f} s"
    return f"{60 * hours:.0f} min" if hours < 2 else f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"
