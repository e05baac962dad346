"""The numbers of one replica: how full its batches are, how long they take, and what it has in memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from genescale.platform.errors import InputError
from genescale.serving.answering.passes import Outcome, Pass
from genescale.serving.watching.reports import Report, families_of, process_name

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
LOAD_SECONDS = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
TOKENS = (64, 128, 256, 512, 1_024, 2_048, 4_096, 8_192, 16_384, 32_768, 65_536, 131_072)
SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
PASSES = (1, 2, 4, 8, 16, 32, 64, 128)
Source = TypeVar("Source")
Model = TypeVar("Model")


class Held(Protocol):
    """What is said of a model in memory."""

    @property
    def size_bytes(self) -> int:
        """Memory that it takes."""

    @property
    def working(self) -> int:
        """Requests that it works on."""


class ModelNumbers:
    """Counts the batches and the models of one replica; safe to use from its event loop and its threads.

    budget: tokens that a batch may hold. max_bytes: memory that models may take. held: the models in memory now.
    """

    def __init__(self, *, budget: int, max_bytes: int, held: Callable[[], Sequence[Held]]) -> None:
        self.process, self._budget = process_name("model"), budget
        self.registry = CollectorRegistry()
        self.seconds = self._histogram("batch_seconds", "Seconds of a batch on the model.", SECONDS)
        self.tokens = self._histogram("batch_tokens", "Tokens in a batch.", TOKENS)
        self.fill = self._histogram("batch_fill", "Share of the token budget that a batch used.", SHARES)
        self.passes = self._histogram("batch_passes", "Passes, of one or several requests, in a batch.", PASSES)
        self.cells = self._counter("cells", "Cells that went through the model.")
        self.failures = self._counter("failures", "Passes that failed, other than by a fault of their request.")
        self.loads = self._counter("loads", "Models that were loaded and warmed up.")
        self.load_failures = self._counter("load_failures", "Models that could not be loaded.")
        self.load_seconds = self._histogram("load_seconds", "Seconds to load and warm up a model.", LOAD_SECONDS)
        for name, about, read in (
            ("held", "Models in memory now.", lambda: len(held())),
            ("held_bytes", "Memory of the models in memory now.", lambda: sum(one.size_bytes for one in held())),
            ("held_limit_bytes", "Memory that models may take.", lambda: max_bytes),
            ("requests", "Requests that the replica works on now.", lambda: sum(one.working for one in held())),
        ):
            Gauge(f"genescale_model_{name}", about, registry=self.registry).set_function(read)
        _watch_gpu(self.registry)
        ProcessCollector(registry=self.registry)

    def ran(self, passes: Sequence[Pass], outcomes: Sequence[Outcome[object]]) -> None:
        """Count one batch, of at least one pass."""
        tokens = sum(one.cost for one in passes)
        self.seconds.observe(outcomes[0].forward_s)
        self.tokens.observe(tokens)
        self.fill.observe(tokens / self._budget)
        self.passes.observe(len(passes))
        self.cells.inc(sum(len(one.cells) for one in passes))
        self.failures.inc(
            sum(isinstance(one.value, Exception) and not isinstance(one.value, InputError) for one in outcomes)
        )

    def counting_loads(self, load: Callable[[Source], Model]) -> Callable[[Source], Model]:
        """`load`, counted and timed."""

        def counted(source: Source) -> Model:
            began = time.perf_counter()
            try:
                model = load(source)
            except BaseException:
                self.load_failures.inc()
                raise
            self.loads.inc()
            self.load_seconds.observe(time.perf_counter() - began)
            return model

        return counted

    async def report(self) -> Report:
        """All numbers now."""
        return Report(process=self.process, kind="model", families=families_of(self.registry))

    def _counter(self, name: str, about: str) -> Counter:
        return Counter(f"genescale_model_{name}", about, registry=self.registry)

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"genescale_model_{name}", about, registry=self.registry, buckets=buckets)


def _watch_gpu(registry: CollectorRegistry) -> None:
    """Memory of this process's GPU; nothing where torch sees none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return
    used = Gauge("genescale_model_gpu_bytes", "Bytes of GPU memory that tensors hold.", registry=registry)
    used.set_function(torch.cuda.memory_allocated)
    most = Gauge("genescale_model_gpu_peak_bytes", "The most of them since the start.", registry=registry)
    most.set_function(torch.cuda.max_memory_allocated)
