"""What every Ray Train worker of a pretraining run does.

It opens the pinned corpus, builds the engine, goes on from the newest whole checkpoint if there is one, and runs
`train_loop`; the first worker commits the checkpoints and writes the bundle.
"""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from genescale.ingestion.corpus import Corpus
from genescale.platform.bundle import write_bundle
from genescale.platform.errors import IntegrityError, StorageError, TrainingError
from genescale.platform.patience import PATIENT, Patience, patiently
from genescale.platform.storage import Store, join
from genescale.training.cells import CorpusCells
from genescale.training.checkpoint_writer import CheckpointWriter
from genescale.training.checkpoints import Checkpoints
from genescale.training.engine import DeepSpeedEngine
from genescale.training.flops import Utilisation, peak_flops_per_s
from genescale.training.loop import RunPlan, TrainState, train_loop
from genescale.training.meter import Row
from genescale.training.model import new_model
from genescale.training.recipe import PretrainConfig
from genescale.training.run_files import BUNDLE, CHECKPOINTS

BUNDLE_KIND = "masked_gene_model"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker needs; travels through Ray."""

    config: PretrainConfig
    corpus: Corpus
    store: Store
    workers: int
    home: str
    """Address of the run's folder."""
    lineage: Mapping[str, Any]
    deadline: float | None = None
    """Unix time at which the run writes a checkpoint and stops; None means never."""
    patience: Patience = PATIENT


def work(arguments: dict[str, Any]) -> dict[str, Any]:
    """Train; the first worker's answer is the outcome of the run.

    `failed` in it holds the error of a run that another start would not mend: no checkpoint is whole, or the loss is no
    number. Other errors are raised, and Ray Train starts the workers again.
    """
    job: Job = arguments["job"]
    source = CorpusCells(job.corpus, patience=job.patience)
    plan = RunPlan.of(job.config, source)
    encoder = job.config.encoder.for_vocabulary(source.vocabulary)
    engine = DeepSpeedEngine(
        new_model(encoder, seed=job.config.seed, attention=job.config.attention),
        job.config.optimizer,
        total_steps=plan.total_steps,
        lanes=job.config.lanes,
    )
    reporter = _Reporter(arguments["board"], engine.rank)
    try:
        start, restored = _restore(job, engine, reporter)
    except IntegrityError as error:
        return {"failed": error}
    # Says how far an earlier attempt came, so that progress is counted from there.
    reporter.rows([(start.steps, {})])
    writer = CheckpointWriter(
        job.store,
        join(job.home, CHECKPOINTS),
        rank=engine.rank,
        workers=engine.workers,
        attempt=_from_first_worker(engine.rank, lambda: secrets.token_hex(4)),
        keep=job.config.keep,
        patience=job.patience,
    )
    try:
        result = train_loop(
            engine,
            source,
            plan,
            job.config,
            start=start,
            on_rows=reporter.rows,
            on_checkpoint=lambda state: writer.write(f"step_{state.steps:08d}", state.to_dict(), engine.snapshot()),
            should_stop=lambda: job.deadline is not None and time.time() >= job.deadline,
            utilisation=Utilisation(encoder=encoder, peak_flops_per_s=_peak_of_all(engine, job.config)),
        )
        writer.wait()
    except TrainingError as error:
        # Every worker meets it at the same step; starting them again would only repeat it.
        return {"failed": _with_last_checkpoint(error, writer, restored)}
    if result.state.finished:
        weights = engine.weights()
        if engine.rank == 0:
            _write_bundle(job, encoder.to_hf(), weights, result.state)
    return {
        "steps": result.state.steps,
        "finished": result.state.finished,
        "held_out_before": result.state.before,
        "held_out_after": result.state.held_out,
        "tokens_per_s": result.tokens_per_s,
        "data_wait_share": result.waited_s / result.seconds if result.seconds else 0.0,
        "mfu": result.mfu,
        "resumed_from": start.steps,
    }


class _Reporter:
    """The first worker's way to the driver; the others keep silent."""

    def __init__(self, board: Any, rank: int) -> None:
        self._board, self._speaks = board, rank == 0

    def rows(self, rows: list[Row]) -> None:
        """Hand rows over."""
        if self._speaks:
            import ray

            ray.get(self._board.add.remote(rows))

    def remark(self, text: str) -> None:
        """Hand a sentence over."""
        if self._speaks:
            import ray

            ray.get(self._board.say.remote(text))


def _restore(job: Job, engine: DeepSpeedEngine, reporter: _Reporter) -> tuple[TrainState, str]:
    """The state of the newest whole checkpoint, put into the engine, and its name; a fresh state when there is none."""
    checkpoints = Checkpoints(job.store, join(job.home, CHECKPOINTS), patience=job.patience)
    with tempfile.TemporaryDirectory(prefix="genescale-restore-") as scratch:
        # The first worker chooses, so that all take the same one; each checks the bytes that it reads.
        newest = _from_first_worker(engine.rank, lambda: _newest(checkpoints, Path(scratch)))
        if isinstance(newest, IntegrityError):
            raise newest
        if newest is None:
            return TrainState(), ""
        name, rejected = newest
        for reason in rejected:
            reporter.remark(f"A damaged checkpoint was passed over: {reason}")
        if rejected:
            reporter.remark(f"The run goes on from {name}.")
        restored = checkpoints.fetch(name, Path(scratch))
        engine.restore(restored.saved)
        return TrainState.from_dict(restored.state), name


def _newest(checkpoints: Checkpoints, scratch: Path) -> tuple[str, tuple[str, ...]] | IntegrityError | None:
    """(name, newer ones that are damaged) of the newest whole checkpoint; the error when none of them is whole."""
    try:
        found = checkpoints.newest_whole(scratch)
    except IntegrityError as error:
        return error
    return (found.name, found.rejected) if found else None


def _from_first_worker(rank: int, answer: Callable[[], Any]) -> Any:
    """What the first worker answers, on every worker."""
    box = [answer() if rank == 0 else None]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def _peak_of_all(engine: DeepSpeedEngine, config: PretrainConfig) -> float:
    return float(engine.total(torch.tensor([peak_flops_per_s(engine.device, config.optimizer.precision)]))[0])


def _with_last_checkpoint(error: TrainingError, writer: CheckpointWriter, restored: str) -> TrainingError:
    # What stopped the run is the other error.
    with contextlib.suppress(StorageError, TrainingError):
        writer.wait()
    last = writer.committed.name if writer.committed else restored
    good = f"The last good checkpoint is {last}." if last else "There is no checkpoint before it."
    return TrainingError(f"{error.what} {good}", where=error.where, fix=f"{error.fix} Nothing was registered.")


def _write_bundle(job: Job, config: dict[str, Any], weights: Mapping[str, Any], state: TrainState) -> None:
    measured = {"steps": state.steps, "held_out": dataclasses.asdict(state.held_out) if state.held_out else None}
    uri = join(job.home, BUNDLE)
    with tempfile.TemporaryDirectory(prefix="genescale-") as temporary:
        folder = Path(temporary) / BUNDLE
        write_bundle(
            folder,
            kind=BUNDLE_KIND,
            config=config,
            weights=weights,
            vocabulary=job.corpus.vocabulary,
            lineage={**job.lineage, **measured},
        )

        def store() -> None:
            # What an earlier attempt left there may have another lineage.
            job.store.delete_folder(uri)
            job.store.upload_folder(folder, uri)

        patiently(store, patience=job.patience, what=f"writing {uri}")
