"""Sweep the settings of a fit with Ray Tune, fit the best again, and measure it once on the test part.

Labels, folds and the vectors of every layer and pooling in the search space are settled once, before the first trial;
the vectors lie once in Ray's object store and trials read them where they lie. Trials see the train and validation
parts only.
The best settings are then fitted by the same `finetune` that the command line runs, on train and validation together,
measured on the test part, recorded and registered. A sweep that was cut off goes on where it was when it is started
again with the same model, corpus, labels and spec; anything else is another sweep, in a folder of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from genescale.ingestion.corpus import Corpus
from genescale.platform.bundle import Bundle
from genescale.platform.errors import ClusterError
from genescale.platform.progress import SILENT, Progress
from genescale.platform.storage import Store, join
from genescale.platform.tracking import Run, Tracker
from genescale.training.embedder import check_pooling, layers_to_run
from genescale.training.evaluation.baselines import BaselineConfig
from genescale.training.fitting.config import FinetuneConfig
from genescale.training.fitting.finetune import FinetuneResult, finetune, prepare, row_vectors
from genescale.training.fitting.task import Task
from genescale.training.freight import Received, ship
from genescale.training.sweeps.ray_tuning import Trials, at_once, run_trials
from genescale.training.sweeps.sweep_report import write_sweep_report
from genescale.training.sweeps.sweep_spec import TuneSpec
from genescale.training.sweeps.tracking_trials import BEST, TrialRuns, one_run
from genescale.training.sweeps.trial import TrialHook, TrialInputs, fold_rows, shared_vectors, vector_kind
from genescale.training.sweeps.trial_records import SweepFolder, Trial, best_first
from genescale.training.sweeps.winner import reproducing_command, winner_config, write_winner

VECTORS = "vectors"


@dataclass(frozen=True, kw_only=True, eq=False)
class TuneResult:
    """A finished sweep: all trials best first, and the best settings fitted again and measured on the test part."""

    best: FinetuneConfig
    trials: tuple[Trial, ...]
    winner: FinetuneResult
    run_id: str
    uri: str
    """Folder of the sweep's state."""
    report: Path
    """The HTML report; `sweep.json` beside it holds the same numbers."""
    winner_toml: Path
    command: str
    """What fits the winner again, without a sweep and without Ray."""


def tune(
    bundle: Bundle,
    corpus: Corpus,
    spec: TuneSpec,
    *,
    tracker: Tracker,
    out: Path,
    sweep_uri: str,
    store: Store,
    embeddings_uri: str = "",
    baselines: BaselineConfig | None = None,
    model_name: str = "",
    aliases: Sequence[str] = (),
    model_reference: str = "",
    on_trial_start: TrialHook | None = None,
    progress: Progress = SILENT,
) -> TuneResult:
    """Run the sweep, then fit the best settings again into `out` and record and register them as `finetune` does.

    Ray must be running (`ray_cluster`). `sweep_uri` is a folder that all nodes reach: it keeps the sweep's state and
    the vectors. `model_reference` is how the reproducing command names the model (the bundle's folder by default).
    `on_trial_start` is called in each trial's process. Raises InputError and its kinds before any training, and
    ClusterError when every trial failed, with the first reason.
    """
    _check_search(bundle, spec)
    at_once(spec.sweep)
    task = prepare(bundle, corpus, spec.finetune, store=store)
    key = sweep_key(bundle, corpus, spec, task)
    folder = SweepFolder(join(sweep_uri, f"sweep-{key[:16]}"), key, store)
    origin = _origin(bundle, corpus)
    runs = folder.open({"spec": asdict(spec), **origin})
    cache_uri = join(sweep_uri, VECTORS)
    inputs = _inputs(bundle, corpus, spec, task, store, embeddings_uri, cache_uri, progress)
    params = {**_sweep_params(spec), **origin}
    with one_run(tracker, folder, "sweep", runs.get("sweep", "")).run(
        f"tune {spec.finetune.label}", params=params, tags={"stage": "tune"}
    ) as run:
        trials = _swept(spec, folder, tracker, run, inputs, on_trial_start, progress)
        best = winner_config(spec, trials[0])
        out.mkdir(parents=True, exist_ok=True)
        winner = finetune(
            bundle,
            corpus,
            best,
            tracker=one_run(tracker, folder, "winner", runs.get("winner", "")),
            out=out,
            store=store,
            embeddings_uri=embeddings_uri if best.encoder == "frozen" else "",
            cache_uri=cache_uri,
            baselines=baselines,
            run_home=join(folder.uri, "winner"),
            model_name=model_name,
            aliases=aliases,
            parent_run=run.id,
            progress=progress,
        )
        command = reproducing_command(out / "winner.toml", corpus, model_reference or str(bundle.folder))
        return _told(run, spec, trials, best, winner, out=out, uri=folder.uri, command=command, origin=origin)


def sweep_key(bundle: Bundle, corpus: Corpus, spec: TuneSpec, task: Task) -> str:
    """Digest of everything that decides a sweep: model, corpus, spec, and the labels and folds as they were read."""
    content = [_origin(bundle, corpus), asdict(spec), task.digest()]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _origin(bundle: Bundle, corpus: Corpus) -> dict[str, Any]:
    return {"corpus_uri": corpus.uri, "corpus_version": corpus.version, "parent": bundle.digest}


def _sweep_params(spec: TuneSpec) -> dict[str, Any]:
    space = {
        name: {key: value for key, value in asdict(values).items() if value not in (None, (), False, {})}
        for name, values in spec.search.items()
    }
    return {"search": {name: json.dumps(values) for name, values in space.items()}, "sweep": asdict(spec.sweep)}


def _check_search(bundle: Bundle, spec: TuneSpec) -> None:
    """Everything a trial may draw fits the model; SettingsError or InputError before anything is computed."""
    layers = int(bundle.config["num_hidden_layers"])
    for sample in spec.combinations():
        config = spec.trial_config(sample)
        check_pooling(config.pooling, bundle.vocabulary)
        layers_to_run(config.layer, layers)


def _inputs(
    bundle: Bundle,
    corpus: Corpus,
    spec: TuneSpec,
    task: Task,
    store: Store,
    embeddings_uri: str,
    cache_uri: str,
    progress: Progress,
) -> TrialInputs:
    """What all trials share; vectors come from the cache when an earlier start of the sweep computed them."""
    folds, encoders = fold_rows(task), spec.possible("encoder")
    pairs = itertools.product(spec.possible("layer"), spec.possible("pooling")) if "frozen" in encoders else ()
    read = [dataclasses.replace(spec.finetune, layer=layer, pooling=pooling) for layer, pooling in pairs]
    kinds = {vector_kind(config): config for config in read}
    vectors = {}
    for kind, config in sorted(kinds.items()):
        vectors_rd = row_vectors(
            bundle,
            corpus,
            task,
            config,
            store=store,
            cache_uri=cache_uri,
            embeddings_uri=embeddings_uri,
            progress=progress,
        )
        vectors[kind] = shared_vectors(vectors_rd, folds)
    trains = set(encoders) != {"frozen"}
    return TrialInputs(
        spec=spec,
        width=task.specs[0].width,
        classes=tuple(head.classes for head in task.specs),
        folds=folds,
        vectors=vectors,
        corpus=corpus if trains else None,
        receive=functools.partial(Received, ship(bundle)) if trains else None,
    )


def _swept(
    spec: TuneSpec,
    folder: SweepFolder,
    tracker: Tracker,
    run: Run,
    inputs: TrialInputs,
    hook: TrialHook | None,
    progress: Progress,
) -> tuple[Trial, ...]:
    """All trials, best first, run and recorded."""
    tracked = TrialRuns(tracker, run, folder)
    trials = Trials(spec, folder, progress, tracked.record)
    run_trials(trials, inputs, hook)
    ranked = best_first([tracked.record_now(trial) for trial in trials.ended])
    if ranked[0].status == "failed":
        first = min(ranked, key=lambda trial: trial.number)
        raise ClusterError(
            f"every trial failed: {first.error}",
            where=folder.uri,
            fix="Correct the cause, then delete this folder and run again.",
        )
    return ranked


def _told(
    run: Run,
    spec: TuneSpec,
    trials: tuple[Trial, ...],
    best: FinetuneConfig,
    winner: FinetuneResult,
    *,
    out: Path,
    uri: str,
    command: str,
    origin: Mapping[str, Any],
) -> TuneResult:
    """The finished sweep, its files written into `out` and logged to its run."""
    toml = write_winner(out, best, trials[0], command=command)
    run.log_params({f"best_{name}": value for name, value in trials[0].sample.items()})
    run.log_metrics({BEST: trials[0].score or 0.0, **winner.heads[0].evaluation.tracked()})
    report = write_sweep_report(out, spec, trials, winner, command=command, origin=origin)
    for path in (toml, report, report.with_suffix(".json")):
        run.log_file(path, "sweep")
    return TuneResult(
        best=best,
        trials=trials,
        winner=winner,
        run_id=run.id,
        uri=uri,
        report=report,
        winner_toml=toml,
        command=command,
    )
