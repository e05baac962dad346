"""The workers of a screen on Ray: a pool of actors that hold the model and work off units.

A worker writes what came of a unit itself, so nothing but its number travels back. A worker that dies is started again,
on another node if need be, and its unit with it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import ray
import ray.exceptions
import torch

from genescale.perturbation.screening.job import Job
from genescale.perturbation.screening.spec import ScreenConfig
from genescale.perturbation.screening.unit_work import UnitWorker
from genescale.platform.bundle import Bundle
from genescale.platform.errors import ClusterError, GenescaleError, SettingsError
from genescale.training.embed import original_error
from genescale.training.freight import Received, ship

# A unit whose worker dies so often (out of memory, say) stops the screen instead of being tried for ever.
TRIES_PER_UNIT = 4
# A unit in reserve saves a worker the way to the driver; with few units for each, it would keep others idle.
UNITS_IN_RESERVE, FEWEST_UNITS_EACH = 1, 8


class _Worker:
    """A Ray actor: holds the model and works off units."""

    def __init__(self, freight: Sequence[Any]) -> None:
        self.shipped, self.shipped_head, self.shipped_job = freight
        self.worker: UnitWorker | None = None

    def ready(self) -> None:
        """Answer as soon as the cluster has a place for this actor."""

    def run(self, unit: int) -> int:
        """Work off a unit and write its files."""
        # Not when it is made: what goes wrong there arrives without its cause.
        self.worker = self.worker or self._loaded()
        self.job.work_off(unit, self.worker)
        return unit

    def _loaded(self) -> UnitWorker:
        self.job: Job = ray.get(self.shipped_job)
        # An actor has one processor; more threads (an inherited setting) would fight each other for it.
        torch.set_num_threads(1)
        # Kept: their folders live as long as they do.
        self.received = [Received(one) for one in (self.shipped, self.shipped_head) if one is not None]
        return self.job.worker(*(one.bundle for one in self.received))


def run_on_ray(bundle: Bundle, head: Bundle | None, job: Job, units: Sequence[int]) -> Iterator[int]:
    """Work off `units` on a pool of actors, each with a GPU where there are any, else a processor; each as it ends.

    Raises SettingsError when a GPU is asked for and there is none, ClusterError when a worker failed again and again.
    """
    gpus = gpus_of(job.config)
    if job.config.compute.device == "cuda" and not gpus:
        raise SettingsError("this Ray cluster has no GPU.", where="device", fix="Use device 'auto' or 'cpu'.")
    places = {"num_cpus": 0 if gpus else 1, "num_gpus": 1 if gpus else 0}
    actor = ray.remote(**places, max_restarts=-1, max_task_retries=TRIES_PER_UNIT - 1)(_Worker)
    # Within a list, references arrive as such: each worker fetches what is behind them once.
    freight = [ship(bundle), None if head is None else ship(head), ray.put(job)]
    pool = [actor.remote(freight) for _ in range(min(len(units), workers_of(job.config)))]
    try:
        yield from _worked_off(pool, units)
    except ray.exceptions.RayError as error:
        if isinstance(ours := original_error(error), GenescaleError):
            raise ours from error
        raise ClusterError(
            f"a worker failed: {error}.", where=job.uri, fix="Run the same command again: finished units are kept."
        ) from error
    finally:
        for one in pool:
            ray.kill(one)


def _worked_off(pool: Sequence[Any], units: Sequence[int]) -> Iterator[int]:
    """Units as they end. Actors get work when the cluster has a place for them, and then hold one unit in reserve."""
    left = iter(units)
    in_reserve = UNITS_IN_RESERVE if len(units) >= FEWEST_UNITS_EACH * len(pool) else 0
    ready = {one.ready.remote(): one for one in pool}
    running: dict[Any, Any] = {}
    n_left = len(units)
    while n_left:
        (done,), _ = ray.wait([*ready, *running], num_returns=1)
        one = ready.pop(done, None)
        wanted = 1 + in_reserve
        if one is None:
            one, wanted = running.pop(done), 1
            n_left -= 1
            yield ray.get(done)
        running |= {one.run.remote(unit): one for unit in itertools.islice(left, wanted)}


def gpus_of(config: ScreenConfig) -> int:
    """GPUs of the running cluster that the screen may use."""
    return int(ray.cluster_resources().get("GPU", 0)) if config.compute.device != "cpu" else 0


def workers_of(config: ScreenConfig) -> int:
    """Processes that work on a screen in the running cluster."""
    return max(1, config.compute.workers or gpus_of(config) or int(ray.cluster_resources().get("CPU", 1)))
