"""`genescale perturb screen`: a screen from a TOML file or from options."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

    from genescale.ingestion.corpus import Corpus
    from genescale.perturbation.readouts.states import States
    from genescale.perturbation.reports.report import ScreenReportFiles
    from genescale.perturbation.screening.estimate import ScreenEstimate
    from genescale.perturbation.screening.plan import Plan
    from genescale.perturbation.screening.results import ScreenReport
    from genescale.perturbation.screening.spec import ScreenConfig, ScreenSpec
    from genescale.platform.bundle import Bundle
    from genescale.platform.settings import Settings
    from genescale.platform.storage import Store

EPILOG = """\
SPEC.toml:
  model = "models:/genescale@champion"
  corpus = "s3://lake/corpus@12"
  output = "s3://lake/screens/tgfb"
  [cells]
  where = "cell_type = 'fibroblast'"
  max_cells = 200
  [edits]
  genes = ["TGFB1", "TGFBR1+TGFBR2"]     # or all = true, sets = "sets.gmt", pairs = [...], anchor = "TGFB1", top = 100
  [readouts]
  states = { column = "disease", start = "fibrosis", goal = "normal" }

examples:
  genescale perturb screen SPEC.toml --dry-run
  genescale perturb screen SPEC.toml --set cells.max_cells=50 --set edits.controls=5
  genescale perturb screen --model model/ --corpus corpus@12 --output screen --set edits.genes=GATA4,TBX5,GATA4+TBX5
  genescale perturb screen --model model/ --corpus corpus@12 --output screen --set edits.all=true

The output folder gets cell_shifts/*.parquet (one row per cell and edit), effects.parquet and effects.csv, report.html,
gene_shifts.parquet and masked_genes.parquet when [readouts] gene_shifts and masked_genes ask for them, and
_screen.json. The same command again continues an interrupted screen: finished units are not computed again."""
SHOWN_GENES = 10


def screen(argv: Sequence[str]) -> int:
    """Say what a screen will cost, run or continue it, and write its effects and report."""
    from genescale.platform.cli import begin

    arguments, settings = begin(_parser(), argv)
    from genescale.platform.storage import Store

    spec, store = _spec(arguments), Store(settings.storage)
    with _opened(spec, settings, store) as opened:
        if arguments.dry_run:
            _say_estimate(_estimated(opened, _plan_alone(opened)), arguments)
            return 0
        report, estimate = _run(opened, settings, arguments)
    made = None if arguments.no_report else _write_report(report, store, settings)
    if arguments.figure:
        _write_figure(report, arguments.figure, store)
    if arguments.json:
        _print_json(report, estimate, made)
    else:
        _print_text(report, made)
    return 0


def _parser() -> argparse.ArgumentParser:
    from genescale.platform.cli import command_parser

    parser = command_parser(
        "perturb screen", "Try edits on the cells of a corpus, and test what they do.", epilog=EPILOG
    )
    parser.add_argument("spec", metavar="SPEC.toml", nargs="?", help="what to do; may be left out when options say it")
    parser.add_argument("--model", metavar="MODEL", help="models:/NAME@ALIAS, models:/NAME/VERSION, or a bundle folder")
    parser.add_argument("--corpus", metavar="URI[@VERSION]", help="the cells to edit")
    parser.add_argument("--output", metavar="URI", help="folder for the result")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="a setting of the spec (repeatable)"
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what the screen would cost")
    parser.add_argument("--no-report", action="store_true", help="leave out effects and report")
    parser.add_argument("--figure", metavar="URI", help="also write a PNG of the genes that shift cells most")
    parser.add_argument("--json", action="store_true", help="print the record, the estimate and the effects as JSON")
    return parser


def _spec(arguments: argparse.Namespace) -> ScreenSpec:
    from genescale.perturbation.screening.spec import ADDRESSES, read_spec
    from genescale.training.model_options import changed_values

    changes = changed_values(arguments.set)
    given = {name: value for name in ADDRESSES if (value := getattr(arguments, name))}
    return read_spec(arguments.spec, changes={**changes, **given})


@dataclass(frozen=True, kw_only=True, eq=False)
class _Opened:
    """A screen whose parts have been found and fit together."""

    spec: ScreenSpec
    bundle: Bundle
    head: Bundle | None
    corpus: Corpus
    states: States | None
    store: Store

    @property
    def config(self) -> ScreenConfig:
        return self.spec.config


@contextlib.contextmanager
def _opened(spec: ScreenSpec, settings: Settings, store: Store) -> Iterator[_Opened]:
    from genescale.ingestion.corpus import Corpus
    from genescale.perturbation.screening.plan import check_names
    from genescale.perturbation.screening.screen_readouts import check_head, given_states
    from genescale.training.model_options import opened_model

    with contextlib.ExitStack() as stack:
        bundle = stack.enter_context(opened_model(spec.model, settings))
        reference = spec.config.readouts.head
        head = stack.enter_context(opened_model(reference, settings)) if reference else None
        check_names(spec.config, bundle.vocabulary, store)
        check_head(spec.config, head)
        yield _Opened(
            spec=spec,
            bundle=bundle,
            head=head,
            corpus=Corpus.open(spec.corpus, store),
            states=given_states(spec.config, bundle, store),
            store=store,
        )


def _plan_alone(opened: _Opened) -> Plan:
    import torch

    return _planned(opened, gpus=torch.cuda.device_count() if opened.config.compute.device != "cpu" else 0)


def _planned(opened: _Opened, *, gpus: int) -> Plan:
    from genescale.perturbation.screening.screen import planned

    return planned(
        opened.bundle,
        opened.corpus,
        opened.config,
        out_uri=opened.spec.output,
        store=opened.store,
        states=opened.states,
        head=opened.head,
        gpus=gpus,
    )


def _estimated(opened: _Opened, plan: Plan, *, workers: int = 0) -> ScreenEstimate:
    """What the screen will cost, measured on one worker's share of this machine."""
    import os

    import torch

    from genescale.perturbation.screening.estimate import estimate
    from genescale.perturbation.screening.screen_readouts import readouts_of
    from genescale.training.embedder import Embedder
    from genescale.training.heads.predict import load_heads

    compute = opened.config.compute
    options: dict[str, Any] = {
        "device": compute.device,
        "tokens_per_batch": compute.tokens_per_batch,
        "attention": compute.attention,
    }
    embedder = Embedder.load(opened.bundle, **options)
    head = None if opened.head is None else load_heads(opened.head, **options)
    on_gpu = embedder.device.type == "cuda"
    alone = 1 if compute.run_in == "process" else torch.cuda.device_count() if on_gpu else os.cpu_count() or 1
    threads = torch.get_num_threads()
    torch.set_num_threads(threads if on_gpu or compute.run_in == "process" else 1)
    try:
        return estimate(
            plan,
            opened.corpus,
            embedder,
            readouts_of(opened.config, plan, opened.states, head),
            workers=min(workers or compute.workers or alone, plan.n_units),
        )
    finally:
        torch.set_num_threads(threads)


def _run(
    opened: _Opened, settings: Settings, arguments: argparse.Namespace
) -> tuple[ScreenReport, ScreenEstimate | None]:
    from genescale.perturbation.screening import results
    from genescale.perturbation.screening.screen import gpus_of_run
    from genescale.perturbation.screening.screen import screen as run_screen
    from genescale.platform.cluster import ray_cluster
    from genescale.platform.progress import stage
    from genescale.platform.tracking import open_tracker

    here = opened.config.compute.run_in == "process"
    # Ray tells of a worker that died on standard output, where the result belongs.
    with contextlib.redirect_stdout(sys.stderr), contextlib.nullcontext() if here else ray_cluster(settings):
        plan = _planned(opened, gpus=gpus_of_run(opened.config))
        estimate = None
        if results.finished(plan, opened.spec.output, opened.store) is None:
            estimate = _estimated(opened, plan, workers=1 if here else _ray_workers(opened.config))
            _say_before(estimate)
        with stage("screen") as progress:
            report = run_screen(
                opened.bundle,
                opened.corpus,
                opened.config,
                out_uri=opened.spec.output,
                store=opened.store,
                states=opened.states,
                head=opened.head,
                tracker=open_tracker(settings),
                plan=plan,
                progress=progress,
            )
    return report, estimate


def _ray_workers(config: ScreenConfig) -> int:
    from genescale.perturbation.screening.ray_workers import workers_of

    return workers_of(config)


def _say_before(estimate: ScreenEstimate) -> None:
    """On standard error, so that what is printed stays the result."""
    print(_estimate_text(estimate), file=sys.stderr)


def _say_estimate(estimate: ScreenEstimate, arguments: argparse.Namespace) -> None:
    import json

    print(json.dumps({"estimate": estimate.to_dict()}, indent=2) if arguments.json else _estimate_text(estimate))


def _estimate_text(estimate: ScreenEstimate) -> str:
    from genescale.platform.progress import clock

    controls = f" and up to {estimate.controls:,} controls" if estimate.controls else ""
    masked = f" and {estimate.masked_sequences:,} with masked genes" if estimate.masked_sequences else ""
    return "\n".join(
        [
            f"screen       {estimate.cells:,} cells, {estimate.edits:,} cell-edit pairs{controls}",
            f"passes       {estimate.sequences:,} sequences{masked}, {estimate.tokens:,} tokens, "
            f"{estimate.forward_flops / 1e12:,.2f} TFLOP",
            f"units        {estimate.units:,} of at most {estimate.tokens_per_unit:,} tokens",
            f"speed        {estimate.flops_per_s / 1e9:,.2f} GFLOP/s of one worker, measured on "
            f"{estimate.measured_sequences:,} sequences ({estimate.device})",
            f"time         {clock(estimate.seconds)} on {estimate.workers} worker(s)",
            f"result       {estimate.result_bytes / 1e6:,.1f} MB of cell shifts",
        ]
    )


def _write_report(report: ScreenReport, store: Store, settings: Settings) -> ScreenReportFiles:
    """Effects and report beside the screen, and copies in its tracked run."""
    from pathlib import Path
    from tempfile import TemporaryDirectory

    from genescale.perturbation.reports.report import report as write
    from genescale.platform.storage import join
    from genescale.platform.tracking import open_tracker

    made = write(report.uri, store)
    if report.run_id:
        with (
            TemporaryDirectory(prefix="genescale-") as scratch,
            open_tracker(settings).run("perturb screen", resume=report.run_id) as run,
        ):
            for name in ("report.html", "effects.csv"):
                run.log_file(store.download(join(report.uri, name), Path(scratch) / name), "screen")
    return made


def _write_figure(report: ScreenReport, address: str, store: Store) -> None:
    from genescale.perturbation.reports.figures import draw_screen, png
    from genescale.perturbation.screening.results import read_screen

    shifts = read_screen(report.uri, store).cell_shifts
    store.write(address, png(draw_screen(shifts.filter(shifts["role"] == "edit"))))


def _print_json(report: ScreenReport, estimate: ScreenEstimate | None, made: ScreenReportFiles | None) -> None:
    import dataclasses
    import json

    content = dataclasses.asdict(report)
    if estimate is not None:
        content["estimate"] = estimate.to_dict()
    if made is not None:
        content["effects"] = made.tables.effects.to_dicts()
        content["files"] = list(made.files)
    print(json.dumps(content, indent=2))


def _print_text(report: ScreenReport, made: ScreenReportFiles | None) -> None:
    from genescale.perturbation.reports.report_command import effect_lines

    print(
        f"{report.n_pairs:,} pairs of {report.n_cells:,} cells and {report.n_edits:,} edits: {report.n_edited:,} "
        f"edited, {report.n_absent:,} without the gene, {report.n_undefined:,} with nothing left to compare."
    )
    if report.n_not_chosen:
        print(f"{report.n_not_chosen:,} further deletions were scored by the first pass and not tried.")
    if report.n_controls or report.n_controls_missing:
        missing = f"; {report.n_controls_missing:,} could not be matched" if report.n_controls_missing else ""
        print(f"{report.n_controls:,} control edits of the same cells{missing}.")
    if report.left_out:
        print("left out: " + ", ".join(f"{n:,} {why}" for why, n in report.left_out.items()))
    if report.n_units_reused:
        print(f"{report.n_units_reused:,} of {report.n_units:,} units were there from an earlier run.")
    if made is not None:
        tables = made.tables
        print("\n".join(effect_lines(tables.of(tables.readouts[0]), SHOWN_GENES)))
        print(f"\nreport: {made.html}")
    print(f"result: {report.uri}")
