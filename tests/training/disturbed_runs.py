"""Runs that are disturbed: their config, a corpus whose reader is killed, a tracker that is away.

Workers cannot import this module: its classes travel by value.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray

from genescale.ingestion.corpus import Corpus
from genescale.platform.errors import (
    TrackingError,
)
from genescale.platform.memory_tracker import MemoryRun, MemoryTracker
from genescale.platform.storage import Store
from genescale.training.engine import OptimizerConfig
from genescale.training.loop import LoopResult
from genescale.training.recipe import EncoderShape, PretrainConfig

CONFIG = PretrainConfig(
    encoder=EncoderShape(width=32, layers=2, heads=2, feed_forward=64, hidden_dropout=0.1, attention_dropout=0.1),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=3, zero_stage=1),
    steps=16,
    token_budget=256,
    lanes=2,
    held_out_cells=24,
    checkpoint_every=4,
    log_every=2,
    model_name="test-model",
)
# Reads of a worker: one for the held-out cells, then one for each training step, some of them ahead of the step. When
# this one is due, the first checkpoint needs no more of them.
DEADLY_READ = 9
Reference = tuple[LoopResult, dict[int, dict[str, float]], dict[str, np.ndarray]]


class DeadlyCorpus:
    """A corpus whose reader is killed with SIGKILL in mid-run: once over all workers, or each time.

    It dies when a checkpoint is stored and not before, so that the run has one to go on from.
    """

    def __init__(
        self,
        corpus: Corpus,
        marker: Path,
        *,
        run: tuple[Store, str],
        once: bool = True,
        rank: int | None = None,
        read: int = DEADLY_READ,
    ) -> None:
        self.corpus, self.marker, self.run, self.once = corpus, marker, run, once
        self.rank, self.read, self.reads = rank, read, 0

    def __getattr__(self, name: str) -> Any:
        if name == "corpus":  # asked for while unpickling, before there is anything to delegate to
            raise AttributeError(name)
        return getattr(self.corpus, name)

    def tokens(self, indices: Sequence[int]) -> list[np.ndarray]:
        import torch.distributed

        self.reads += 1
        chosen = self.rank is None or torch.distributed.get_rank() == self.rank
        if self.reads == self.read and chosen:
            self.await_a_checkpoint()
            if self.claims_the_death():
                os.kill(os.getpid(), signal.SIGKILL)
        return self.corpus.tokens(indices)

    def await_a_checkpoint(self) -> None:
        store, home = self.run
        while not store.exists(f"{home}/checkpoints/ledger.json"):
            time.sleep(0.02)

    def claims_the_death(self) -> bool:
        try:
            self.marker.touch(exist_ok=False)
        except FileExistsError:
            return not self.once
        return True


class AwayTracker(MemoryTracker):
    """A tracker that is away the first times it is given measurements or a model."""

    def __init__(self, refusals: int = 4) -> None:
        super().__init__()
        self.refusals, self.refused, self.askings = refusals, 0, 0

    @contextlib.contextmanager
    def run(self, *arguments: Any, **options: Any) -> Iterator[MemoryRun]:
        with super().run(*arguments, **options) as run:
            take = run.log_metric_rows

            def log_metric_rows(rows: Any, **more: Any) -> None:
                if self.refused < self.refusals:
                    self.refused += 1
                    raise TrackingError("cannot connect to MLflow.")
                take(rows, **more)

            run.log_metric_rows = log_metric_rows  # type: ignore[method-assign]
            yield run

    def register(self, *arguments: Any, **options: Any) -> Any:
        self.askings += 1
        if self.askings == 1:
            raise TrackingError("cannot connect to MLflow.")
        return super().register(*arguments, **options)


ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
