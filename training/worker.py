"""What every Ray Train worker of a run does, and what a run without Ray does in its own process.

`run_job` builds the training, goes on from the newest whole checkpoint if there is one, and runs `train_loop`; the
first worker commits the checkpoints and stores what came of it. A `Job` says which training: `PretrainJob` opens the
pinned corpus and writes a bundle, that of fine-tuning is in `fitting/encoder_worker.py`.
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
from typing import Any, Protocol

import torch

from genescale.ingestion.corpus import Corpus
from genescale.platform.bundle import write_bundle
from genescale.platform.errors import IntegrityError, StorageError, TrainingError
from genescale.platform.patience import PATIENT, Patience, patiently
from genescale.platform.storage import Store, join
from genescale.training.batches import CellSource
from genescale.training.cells import CorpusCells
from genescale.training.checkpoint_writer import CheckpointWriter
from genescale.training.checkpoints import Checkpoints
from genescale.training.engine import DeepSpeedEngine, Engine
from genescale.training.flops import Utilisation, peak_flops_per_s
from genescale.training.loop import LoopResult, Plan, Rhythm, RunPlan, TrainState, train_loop
from genescale.training.meter import Row
from genescale.training.model import new_model
from genescale.training.recipe import PretrainConfig
from genescale.training.run_files import BUNDLE, CHECKPOINTS

BUNDLE_KIND = "masked_gene_model"


class Training(Protocol):
    """What a job has built on its worker."""

    @property
    def engine(self) -> Engine:
        """Model, optimiser and workers."""

    @property
    def source(self) -> CellSource:
        """Where cells come from."""

    @property
    def plan(self) -> Plan:
        """What is trained on."""

    @property
    def rhythm(self) -> Rhythm:
        """How often something is due."""

    @property
    def utilisation(self) -> Utilisation | None:
        """What is needed to say how much of the devices is used; None leaves it out."""

    def state(self, values: Mapping[str, Any] | None) -> Any:
        """The state in a checkpoint; a fresh one for None."""

    def finish(self, state: Any, checkpoints: Checkpoints) -> None:
        """Store what came of a finished training. Every worker calls it."""

    def outcome(self, result: LoopResult) -> dict[str, Any]:
        """What the driver is told, as plain values."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker needs; travels through Ray."""

    store: Store
    workers: int
    home: str
    """Address of the run's folder."""
    keep: int
    """Newest checkpoints that stay; the best one stays as well."""
    deadline: float | None = None
    """Unix time at which the run writes a checkpoint and stops; None means never."""
    patience: Patience = PATIENT

    def training(self) -> Training:
        """Build what is trained, on this worker."""
        raise NotImplementedError


class Reporter(Protocol):
    """Where a worker puts what the driver should know."""

    def rows(self, rows: list[Row]) -> None:
        """Hand rows over."""

    def remark(self, text: str) -> None:
        """Hand a sentence over."""


def work(arguments: dict[str, Any]) -> dict[str, Any]:
    """Train on a Ray Train worker; the first worker's answer is the outcome of the run."""
    job: Job = arguments["job"]
    return run_job(job, lambda rank: _BoardReporter(arguments["board"], rank))


def run_job(job: Job, reporter_of: Callable[[int], Reporter]) -> dict[str, Any]:
    """Train, from the newest whole checkpoint on; what the training says of itself.

    `failed` in it holds the error of a run that another start would not mend: no checkpoint is whole, or the loss is no
    number. Other errors are raised, and Ray Train starts the workers again.
    """
    training = job.training()
    engine, reporter = training.engine, reporter_of(training.engine.rank)
    checkpoints = Checkpoints(job.store, join(job.home, CHECKPOINTS), patience=job.patience)
    try:
        start, restored = _restore(checkpoints, training, reporter, job.keep)
    except IntegrityError as error:
        return {"failed": error}
    # Says how far an earlier attempt came, so that progress is counted from there.
    reporter.rows([(start.steps, {})])
    writer = CheckpointWriter(
        job.store,
        checkpoints.uri,
        rank=engine.rank,
        workers=engine.workers,
        attempt=from_first_worker(engine.rank, lambda: secrets.token_hex(4)),
        keep=job.keep,
        patience=job.patience,
    )
    try:
        result = train_loop(
            engine,
            training.source,
            training.plan,
            training.rhythm,
            start=start,
            on_rows=reporter.rows,
            on_checkpoint=lambda state: writer.write(f"step_{state.steps:08d}", state.to_dict(), engine.snapshot()),
            should_stop=lambda: job.deadline is not None and time.time() >= job.deadline,
            utilisation=training.utilisation,
        )
        writer.wait()
    except TrainingError as error:
        # Every worker meets it at the same step; starting them again would only repeat it.
        return {"failed": _with_last_checkpoint(error, writer, restored)}
    if result.state.finished:
        training.finish(result.state, checkpoints)
    return {
        "steps": result.state.steps,
        "finished": result.state.finished,
        "tokens_per_s": result.tokens_per_s,
        "data_wait_share": result.waited_s / result.seconds if result.seconds else 0.0,
        "mfu": result.mfu,
        "resumed_from": start.steps,
        **training.outcome(result),
    }


class _BoardReporter:
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


def _restore(checkpoints: Checkpoints, training: Training, reporter: Reporter, keep: int) -> tuple[Any, str]:
    """The state of the newest whole checkpoint, put into the engine, and its name; a fresh state when there is none."""
    with tempfile.TemporaryDirectory(prefix="genescale-restore-") as scratch:
        # The first worker chooses, so that all take the same one; each checks the bytes that it reads.
        newest = from_first_worker(training.engine.rank, lambda: _newest(checkpoints, Path(scratch), keep))
        if isinstance(newest, IntegrityError):
            raise newest
        if newest is None:
            return training.state(None), ""
        name, rejected = newest
        for reason in rejected:
            reporter.remark(f"A damaged checkpoint was passed over: {reason}")
        if rejected:
            reporter.remark(f"The run goes on from {name}.")
        try:
            restored = checkpoints.fetch(name, Path(scratch))
        except IntegrityError as error:
            # Not the run's end: a worker that gave it up alone would leave the others waiting for it.
            raise StorageError(
                f"{name} was found whole by the first worker and cannot be read now: {error}",
                where=checkpoints.uri,
                fix="Start the run again.",
            ) from error
        training.engine.restore(restored.saved)
        return training.state(restored.state), name


def _newest(checkpoints: Checkpoints, scratch: Path, keep: int) -> tuple[str, tuple[str, ...]] | IntegrityError | None:
    """(name, newer ones that are damaged) of the newest whole checkpoint; the error when none of them is whole."""
    try:
        found = checkpoints.newest_whole(scratch)
    except IntegrityError as error:
        return error
    if found is None:
        return None
    checkpoints.note(found, keep)
    return found.name, found.rejected


def from_first_worker(rank: int, answer: Callable[[], Any]) -> Any:
    """What the first worker answers, on every worker."""
    if not torch.distributed.is_initialized():
        return answer()
    box = [answer() if rank == 0 else None]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def _with_last_checkpoint(error: TrainingError, writer: CheckpointWriter, restored: str) -> TrainingError:
    # What stopped the run is the other error.
    with contextlib.suppress(Exception):
        writer.wait()
    last = writer.committed.name if writer.committed else restored
    good = f"The last good checkpoint is {last}." if last else "There is no checkpoint before it."
    return TrainingError(f"{error.what} {good}", where=error.where, fix=f"{error.fix} Nothing was registered.")


# --- pretraining -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PretrainJob(Job):
    """Pretraining a recipe on a pinned corpus."""

    config: PretrainConfig
    corpus: Corpus
    lineage: Mapping[str, Any]

    def training(self) -> Pretraining:
        """Open the corpus and build the model."""
        return Pretraining(self)


class Pretraining:
    """The masked-gene model, its cells and its plan on one worker."""

    def __init__(self, job: PretrainJob) -> None:
        self.job, self.rhythm = job, job.config
        self.source = CorpusCells(job.corpus, patience=job.patience)
        self.plan = RunPlan.of(job.config, self.source)
        self.encoder = job.config.encoder.for_vocabulary(self.source.vocabulary)
        self.engine = DeepSpeedEngine(
            new_model(self.encoder, seed=job.config.seed, attention=job.config.attention),
            job.config.optimizer,
            total_steps=self.plan.total_steps,
            lanes=job.config.lanes,
            compiled=job.config.compile,
        )
        peak = torch.tensor([peak_flops_per_s(self.engine.device, job.config.optimizer.precision)])
        peak_of_all = float(self.engine.total(peak)[0])
        self.utilisation = Utilisation(encoder=self.encoder, peak_flops_per_s=peak_of_all)

    def state(self, values: Mapping[str, Any] | None) -> TrainState:
        """The state in a checkpoint; a fresh one for None."""
        return TrainState() if values is None else TrainState.from_dict(values)

    def finish(self, state: TrainState, checkpoints: Checkpoints) -> None:
        """Store the bundle."""
        weights = self.engine.weights()
        if self.engine.rank == 0:
            _write_bundle(self.job, self.encoder.to_hf(), weights, state)

    def outcome(self, result: LoopResult) -> dict[str, Any]:
        """Held-out quality before and after."""
        return {"held_out_before": result.state.before, "held_out_after": result.state.held_out}


def _write_bundle(job: PretrainJob, config: dict[str, Any], weights: Mapping[str, Any], state: TrainState) -> None:
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
