"""`genescale demo`: one cell's way through the whole house, with a report at the end."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from genescale.platform.settings import Settings, StorageSettings
    from genescale.serving.demo.plan import Demo, DemoConfig
    from genescale.serving.demo.stages import Stage

QUICK_CELLS = 150
EPILOG = """\
examples:
  genescale demo                                       a simulated atlas with a planted truth
  genescale demo --atlas 'data/*.h5ad' --vocabulary token_dictionary_gc30M.pkl
  genescale demo --fresh                               clear the work folder and start over

Killed at any point, the same command goes on after its last finished stage. Object storage is an S3 endpoint on
loopback that holds objects in memory; after every stage its bucket is copied into WORK/object-storage. With --local
there is no endpoint: everything is written to that folder at once.
"""


def demo(argv: Sequence[str]) -> int:
    """Run `genescale demo`."""
    from genescale.platform import log
    from genescale.platform.cli import begin, command_parser
    from genescale.platform.settings import LogSettings

    parser = command_parser("demo", "Run the whole way once: from an atlas to answers and a report.", epilog=EPILOG)
    parser.add_argument("--work", default="genescale-work", metavar="FOLDER", help="the only folder written to")
    parser.add_argument(
        "--atlas", action="append", default=[], metavar="URI", help="h5ad file, glob or s3:// (repeatable)"
    )
    parser.add_argument("--vocabulary", default="", metavar="URI", help="vocabulary to use instead of a computed one")
    parser.add_argument("--local", action="store_true", help="plain folders instead of the embedded S3 endpoint")
    parser.add_argument("--fresh", action="store_true", help="clear the work folder first")
    parser.add_argument("--quick", action="store_true", help="a small atlas and a tiny encoder, to see the way only")
    parser.add_argument("--seed", type=int, default=0, help="of the simulation, the training and all draws")
    parser.add_argument("--recipe", default="", help="pretraining recipe: a name or a TOML file")
    parser.add_argument("--workers", type=int, default=0, help="training workers (default: one a processor, at most 2)")
    arguments, outside = begin(parser, argv)
    if outside.log == LogSettings():
        # The stage lines say what the log would.
        log.configure(LogSettings(level="WARNING"))

    from genescale.serving.demo.plan import DemoConfig, digest_of, find_sources
    from genescale.serving.demo.work import open_work

    config = DemoConfig(
        atlas=tuple(arguments.atlas),
        vocabulary=arguments.vocabulary,
        local=arguments.local,
        seed=arguments.seed,
        recipe="tiny" if arguments.quick else arguments.recipe,
        simulation={"cells_per_file": QUICK_CELLS} if arguments.quick else {},
        truth_cells=QUICK_CELLS if arguments.quick else DemoConfig.truth_cells,
        workers=arguments.workers,
    )
    sources = find_sources(config, outside)
    digest = digest_of(config, sources, outside)
    with open_work(Path(arguments.work), digest, fresh=arguments.fresh) as work, _storage(work.path, config) as storage:
        from genescale.platform.storage import Store
        from genescale.serving.demo.plan import BUCKET, Demo, demo_settings

        run = Demo(
            config=config,
            work=work,
            settings=demo_settings(work, storage),
            store=Store(storage),
            root=str(work.folder("object-storage")) if config.local else BUCKET,
        )
        _run(run, _stages(config, sources, outside))
    return 0


def _stages(config: DemoConfig, sources: tuple[str, ...], outside: Settings) -> list[Stage]:
    from genescale.serving.demo import ask, report, screening, stages

    first = (
        stages.Stage(name="atlas", label="Simulate an atlas", run=stages.simulate_atlas, needs_ray=False)
        if config.simulated
        else stages.Stage(
            name="atlas",
            label="Copy the atlas",
            run=functools.partial(stages.copy_atlas, sources=sources, outside=outside),
            needs_ray=False,
        )
    )
    vocabulary = (
        stages.Stage(
            name="vocabulary",
            label="Import the vocabulary",
            run=functools.partial(stages.import_vocabulary, outside=outside),
            needs_ray=False,
        )
        if config.vocabulary
        else stages.Stage(name="vocabulary", label="Medians and vocabulary", run=stages.compute_vocabulary)
    )
    return [
        first,
        vocabulary,
        stages.Stage(name="ingest", label="Ingest", run=stages.ingest_atlas),
        stages.Stage(name="pretrain", label="Pretrain and register", run=stages.pretrain_encoder),
        stages.Stage(name="embed", label="Embed the corpus", run=stages.embed_atlas),
        stages.Stage(name="head", label="Fit a cell-type head", run=stages.fit_head),
        stages.Stage(name="screen", label="Screen gene deletions", run=screening.screen_deletions),
        stages.Stage(name="ask", label="Serve and ask over HTTP", run=ask.ask_service),
        stages.Stage(name="report", label="Write the report", run=report.write_report, needs_ray=False),
    ]


@contextmanager
def _storage(work: Path, config: DemoConfig) -> Iterator[StorageSettings]:
    """Object storage for the run: plain folders, or the embedded endpoint filled with what earlier stages made."""
    from genescale.platform.settings import StorageSettings

    if config.local:
        yield StorageSettings()
        return
    from genescale.platform.storage import Store
    from genescale.serving.demo.object_storage import embedded_endpoint, load_bucket
    from genescale.serving.demo.plan import BUCKET

    with embedded_endpoint() as settings:
        load_bucket(Store(settings), BUCKET, work / "object-storage")
        yield settings


def _run(run: Demo, stages: Sequence[Stage]) -> None:
    from rich.console import Console

    from genescale.platform.cluster import ray_cluster
    from genescale.platform.progress import stage as stage_line
    from genescale.platform.tracking import open_tracker
    from genescale.serving.demo.object_storage import save_bucket
    from genescale.serving.demo.plan import BUCKET

    console = Console()
    began = time.monotonic()
    left = [stage for stage in stages if not run.work.finished(stage.name)]
    if left and len(left) < len(stages):
        console.print(
            f"going on after '{stages[len(stages) - len(left) - 1].label}' in {run.work.path}", highlight=False
        )
    with ExitStack() as cluster:
        for number, stage in enumerate(left):
            if number == 0:
                # Runs of a demo that was killed are still marked as running.
                open_tracker(run.settings).close_dangling()
            if stage.needs_ray:
                cluster.enter_context(ray_cluster(run.settings))
            started = time.monotonic()
            with stage_line(stage.label, console=console) as progress:
                made = stage.run(run, progress)
                if not run.config.local:
                    save_bucket(run.store, BUCKET, run.work.path / "object-storage")
            run.work.finish(stage.name, made, time.monotonic() - started)
    _summary(run, stages, console, time.monotonic() - began if left else 0.0)


def _summary(run: Demo, stages: Sequence[Stage], console: Console, elapsed_s: float) -> None:
    from rich.table import Table

    from genescale.platform.progress import clock
    from genescale.serving.demo.plan import settings_file
    from genescale.serving.demo.report import findings

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column, justify in (("stage", "left"), ("time", "right"), ("result", "left")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    facts: dict[str, str] = findings(run)
    for stage in stages:
        table.add_row(stage.label, clock(run.work.stages[stage.name]["elapsed_s"]), facts.get(stage.name, ""))
    console.print()
    console.print(table)
    settings, work = settings_file(run.work), run.work.path
    lines = [
        f"finished in {clock(elapsed_s)}" if elapsed_s else "already finished; --fresh starts over",
        "",
        f"  report           {work / 'report' / 'report.html'}",
        f"  corpus, results  {work / 'object-storage'}",
        f"  embedded h5ad    {work / 'embedded'}",
        f"  settings         {settings}",
        "",
        "go on with (after `source .venv/bin/activate`):",
        *(f"  {command}" for command in _commands(work, settings)),
    ]
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def _commands(work: Path, settings: Path) -> list[str]:
    """Commands to go on with, as they are typed."""
    from genescale.serving.demo.plan import MODEL_NAME

    model, corpus, reference = f"models:/{MODEL_NAME}@newest", work / "object-storage" / "corpus", work / "reference"
    return [
        # Without --embeddings: the run's belong to the corpus in the bucket, and this one is a copy of it.
        f"genescale index {model} --corpus {corpus} --output {reference} --settings {settings}",
        f"genescale serve {model} --index {reference} --settings {settings}",
        f"genescale corpus show {corpus}",
        f"mlflow ui --backend-store-uri sqlite:///{work / 'mlflow.db'}",
        f"python -m webbrowser {work / 'report' / 'report.html'}",
    ]
