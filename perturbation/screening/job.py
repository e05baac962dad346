"""One screen as its workers know it, and what a worker does with a unit; needs no Ray."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from genescale.ingestion.corpus import Corpus
from genescale.perturbation.readouts.states import States
from genescale.perturbation.screening.plan import Plan
from genescale.perturbation.screening.results import write_unit
from genescale.perturbation.screening.screen_readouts import readouts_of
from genescale.perturbation.screening.spec import ScreenConfig
from genescale.perturbation.screening.unit_work import UnitWorker
from genescale.platform.bundle import Bundle
from genescale.platform.storage import Store
from genescale.training.embedder import Embedder
from genescale.training.heads.predict import load_heads


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """What every worker of one screen needs; travels to it once."""

    corpus: Corpus
    config: ScreenConfig
    plan: Plan
    states: States | None
    uri: str
    store: Store

    def worker(self, bundle: Bundle, head: Bundle | None = None) -> UnitWorker:
        """A worker with the model loaded."""
        compute = self.config.compute
        options: dict[str, Any] = {
            "device": compute.device,
            "tokens_per_batch": compute.tokens_per_batch,
            "attention": compute.attention,
        }
        embedder = Embedder.load(bundle, **options)
        model = None if head is None else load_heads(head, **options)
        return UnitWorker(self.plan, embedder, readouts_of(self.config, self.plan, self.states, model))

    def work_off(self, unit: int, worker: UnitWorker) -> None:
        """Answer one unit and write its files, its mark last."""
        done = worker.run(unit, self.corpus.tokens)
        write_unit(self.uri, unit, done.tables(), done.mark(), self.store)


def run_here(bundle: Bundle, head: Bundle | None, job: Job, units: Sequence[int]) -> Iterator[int]:
    """Work off `units` in this process, with all its threads; each as it ends."""
    worker = job.worker(bundle, head)
    for unit in units:
        job.work_off(unit, worker)
        yield unit
