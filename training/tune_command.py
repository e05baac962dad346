"""`genescale tune`: a sweep over the settings of a fit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genescale.training.model_options import MODEL_HELP, add_corpus, add_head_outputs, opened_model

if TYPE_CHECKING:
    from genescale.training.sweeps.tune import TuneResult

TUNE_EPILOG = """\
SPEC.toml:
  [search]
  learning_rate = { low = 1e-4, high = 1e-1, log = true }
  hidden = { choices = [0, 64] }
  [finetune]
  label = "cell_type"
  [sweep]
  trials = 16

The same command again goes on with a sweep that was cut off; trials that ended are not run again. The output folder
gets sweep.html, the winner's bundle and report, and winner.toml, which `genescale finetune --config` fits again without
Ray."""


def tune(argv: Sequence[str]) -> int:
    """Sweep the settings of a fit, print the trials, and register the refitted winner."""
    from genescale.platform.cli import begin, command_parser

    parser = command_parser("tune", "Sweep the settings of a fit on a model.", epilog=TUNE_EPILOG)
    parser.add_argument("spec", metavar="SPEC.toml", help="what to try")
    parser.add_argument("--model", required=True, metavar="MODEL", help=MODEL_HELP)
    add_corpus(parser)
    add_head_outputs(parser, "sweep")
    parser.add_argument("--sweep", metavar="URI", help="folder for the state of the sweep (default: OUTPUT/ray)")
    parser.add_argument("--no-baselines", action="store_true", help="do not fit simple classifiers to compare with")
    arguments, settings = begin(parser, argv)

    from genescale.ingestion.corpus import Corpus
    from genescale.platform.cluster import ray_cluster
    from genescale.platform.progress import stage
    from genescale.platform.storage import Store
    from genescale.platform.tracking import open_tracker
    from genescale.training.evaluation.baselines import BaselineConfig
    from genescale.training.sweeps.sweep_spec import read_spec
    from genescale.training.sweeps.tune import tune as run_tune

    spec = read_spec(arguments.spec)
    store = Store(settings.storage)
    out = Path(arguments.output).resolve()
    with opened_model(arguments.model, settings) as bundle, ray_cluster(settings), stage("tune") as progress:
        result = run_tune(
            bundle,
            Corpus.open(arguments.corpus, store),
            spec,
            tracker=open_tracker(settings),
            out=out,
            sweep_uri=arguments.sweep or str(out / "ray"),
            store=store,
            embeddings_uri=arguments.embeddings,
            baselines=None if arguments.no_baselines else BaselineConfig(),
            model_name=arguments.name,
            aliases=arguments.alias or ["newest"],
            model_reference=arguments.model,
            progress=progress,
        )
    _print_sweep(result)
    return 0


def _print_sweep(result: TuneResult) -> None:
    from genescale.platform.text_table import text_table
    from genescale.training.finetune_command import print_result

    rows = [
        (trial.name, trial.status, "-" if trial.score is None else f"{trial.score:.4f}", trial.best_epoch, drawn)
        for trial in result.trials
        for drawn in [", ".join(f"{name}={_short(value)}" for name, value in trial.sample.items())]
    ]
    print(text_table(("trial", "status", "validation", "best epoch", "settings"), rows))
    for trial in result.trials:
        if trial.error:
            print(f"failed       {trial.name}: {trial.error.splitlines()[0]}")
    print()
    print_result(result.winner)
    print(f"sweep        {result.report}")
    print(f"once more    {result.command}")


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
