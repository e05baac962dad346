"""Fine-tuning an encoder as a job of `worker.py`: in one process with plain torch, on Ray Train with DeepSpeed.

Axis suffixes: `r` rows, `d` width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from genescale.ingestion.corpus import Corpus
from genescale.platform.bundle import Bundle, open_bundle
from genescale.platform.errors import CorpusError
from genescale.platform.patience import patiently
from genescale.platform.storage import is_remote, join
from genescale.platform.vocabulary import Vocabulary
from genescale.training.checkpoints import Checkpoints
from genescale.training.embedder import pick_device, plan_batches
from genescale.training.engine import DeepSpeedEngine, Engine, OptimizerConfig, TorchEngine
from genescale.training.fitting.config import FinetuneConfig
from genescale.training.fitting.encoder_model import HeadedEncoder, LabelledRows
from genescale.training.fitting.encoder_plan import (
    CellsOf,
    ExampleCells,
    FitPlan,
    FitState,
    LabelledCells,
    Origins,
    by_index,
)
from genescale.training.fitting.epochs import own_randomness
from genescale.training.fitting.examples import Examples
from genescale.training.heads.head import LinearHead
from genescale.training.heads.spec import HeadSpec
from genescale.training.loop import LoopResult
from genescale.training.weights import load_encoder
from genescale.training.worker import Job, from_first_worker

FITTED = "fitted.safetensors"
ROWS_TO_STANDARDISE = 512
"""About so many training rows, evenly spaced, give the heads the mean and scale of their input."""


@dataclass(frozen=True, kw_only=True)
class FitRhythm:
    """How often something is due, in steps; a measurement is due where an epoch ends."""

    log_every: int = 10
    evaluate_every: int = 0
    checkpoint_every: int = 200


@dataclass(frozen=True, kw_only=True)
class FitJob(Job):
    """Heads and an encoder, and the examples of one fold."""

    config: FinetuneConfig
    specs: tuple[HeadSpec, ...]
    train: Examples
    validation: Examples
    bundle_uri: str
    """The bundle to start from: a local folder, or an address in the run's storage."""
    corpus: Corpus | None = None
    cells_of: CellsOf | None = None
    """Where the cells come from; None means the corpus."""
    rhythm: FitRhythm = FitRhythm()

    def training(self) -> EncoderFit:
        """Open the bundle and build the model."""
        return EncoderFit(self)

    def sources(self) -> tuple[CellsOf, Origins]:
        """Where cells come from, and how a person finds them."""
        corpus = self.corpus
        if corpus is None:
            if self.cells_of is None:
                raise CorpusError("there is no corpus to read cells from.", fix="Give the corpus of the examples.")
            return self.cells_of, by_index

        def tokens(index_n: np.ndarray) -> Sequence[np.ndarray]:
            return patiently(lambda: corpus.tokens(index_n.tolist()), patience=self.patience, what="reading cells")

        def origins(indices: Sequence[int]) -> list[tuple[str, int]]:
            found = corpus.cells(["dataset_id", "source_row"]).take(list(indices))
            return list(zip(found["dataset_id"].to_pylist(), found["source_row"].to_pylist(), strict=True))

        return self.cells_of or tokens, origins


class EncoderFit:
    """Encoder, heads, cells and plan on one worker; see `worker.Training`."""

    utilisation = None

    def __init__(self, job: FitJob) -> None:
        """Raises SettingsError when nothing would be trained."""
        self._job, self.rhythm = job, job.rhythm
        distributed = torch.distributed.is_initialized()
        device = _worker_device() if distributed else pick_device(job.config.device)
        with opened(job) as bundle, own_randomness(job.config.seed, torch.device("cpu")):
            self._model, vocabulary = HeadedEncoder(load_encoder(bundle), job.specs, job.config), bundle.vocabulary
        cells_of, origins = job.sources()
        rank = torch.distributed.get_rank() if distributed else 0
        standardise(self._model.to(device), job, cells_of, vocabulary, rank)
        heads: list[LinearHead] = list(self._model.heads)
        self.source = ExampleCells(job.train, vocabulary, cells_of, origins)
        self.plan = FitPlan(job.config, heads, job.train, job.validation, vocabulary, cells_of)
        self.engine = _engine(self._model, job.config, self.plan.total_steps, device, distributed=distributed)

    def state(self, values: Mapping[str, Any] | None) -> FitState:
        """The state in a checkpoint; a fresh one for None."""
        return self.plan.fresh() if values is None else FitState.from_dict(values)

    def finish(self, state: FitState, checkpoints: Checkpoints) -> None:
        """Store the weights of the best epoch."""
        # The first worker has committed every checkpoint once it answers.
        best = from_first_worker(self.engine.rank, checkpoints.best)
        with tempfile.TemporaryDirectory(prefix="genescale-best-") as scratch:
            self.engine.restore(checkpoints.fetch(best.name, Path(scratch)).saved)
            weights = self.engine.weights()
            if self.engine.rank == 0:
                save_file(weights, Path(scratch) / FITTED)
                address = join(self._job.home, FITTED)
                patiently(
                    lambda: self._job.store.upload(Path(scratch) / FITTED, address),
                    patience=self._job.patience,
                    what=f"writing {address}",
                )

    def outcome(self, result: LoopResult) -> dict[str, Any]:
        """The history of the fit."""
        return {"history": [dataclasses.asdict(epoch) for epoch in result.state.history]}


@contextlib.contextmanager
def opened(job: FitJob) -> Iterator[Bundle]:
    """The bundle that the job starts from; one in object storage is fetched for as long as the block lasts."""
    if not is_remote(job.bundle_uri):
        yield open_bundle(Path(job.bundle_uri))
        return
    with tempfile.TemporaryDirectory(prefix="genescale-bundle-") as scratch:
        yield open_bundle(job.store.download_folder(job.bundle_uri, Path(scratch) / "bundle"))


@torch.no_grad()
def standardise(model: HeadedEncoder, job: FitJob, cells_of: CellsOf, vocabulary: Vocabulary, rank: int) -> None:
    """Give every head mean and scale of the vectors that the untrained encoder makes of some training rows.

    Every worker must call it: the first computes, so that all have the same to the last bit.
    """

    def vectors() -> np.ndarray:
        some = _some_rows(job.train)
        labelled = LabelledCells(some, job.specs, np.zeros((len(job.specs), some.n_rows), np.float32), specials)
        source = ExampleCells(some, vocabulary, cells_of)
        rows_rd = np.empty((some.n_rows, job.specs[0].width), dtype=np.float32)
        for positions_n in plan_batches(some.lengths_n, job.config.tokens_per_batch):
            batch = labelled.lane(source.tokens(positions_n), positions_n)
            rows_rd[batch.rows] = model.vectors(batch.to(next(model.parameters()).device)).cpu().numpy()
        return rows_rd

    specials = sorted(vocabulary.special.values())
    model.eval()
    rows_rd = from_first_worker(rank, vectors)
    for head, target_r in zip(model.heads, job.train.targets, strict=True):
        assert isinstance(head, LinearHead)
        head.standardise(rows_rd)
        if head.spec.kind == "number":
            head.standardise_target(target_r)


def _some_rows(examples: Examples) -> Examples:
    rows = np.arange(examples.n_rows)[:: max(1, examples.n_rows // ROWS_TO_STANDARDISE)]
    cells_n, row_cell_r = np.unique(examples.row_cell_r[rows], return_inverse=True)
    return dataclasses.replace(
        examples,
        index_n=examples.index_n[cells_n],
        lengths_n=examples.lengths_n[cells_n],
        row_cell_r=row_cell_r.astype(np.int64),
        row_token_r=examples.row_token_r[rows],
        targets=tuple(target_r[rows] for target_r in examples.targets),
        unit_r=examples.unit_r[rows],
    )


def optimizer_config(config: FinetuneConfig) -> OptimizerConfig:
    """How the encoder's engine steps."""
    return OptimizerConfig(
        learning_rate=config.learning_rate,
        schedule=config.schedule,
        warmup_fraction=config.warmup_fraction,
        weight_decay=config.weight_decay,
        clip=config.gradient_clip,
        zero_stage=config.zero_stage,
        precision=config.precision,
    )


def _engine(
    model: HeadedEncoder, config: FinetuneConfig, total_steps: int, device: torch.device, *, distributed: bool
) -> Engine:
    options: dict[str, Any] = {"total_steps": total_steps, "objective": LabelledRows(model, config)}
    options |= {"compiled": config.compile, "average": config.weight_average}
    if distributed:
        return DeepSpeedEngine(model, optimizer_config(config), lanes=config.lanes, **options)
    return TorchEngine(model, optimizer_config(config), device=device, **options)


def _worker_device() -> torch.device:
    # As DeepSpeed chooses it.
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    )
