"""A screen on Ray: actors that hold the model and work off units (`training/actors.py`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import ray

from genescale.perturbation.screening.job import Job
from genescale.perturbation.screening.spec import ScreenConfig
from genescale.platform.bundle import Bundle
from genescale.training.actors import actors_for, gpus_on, work_off
from genescale.training.freight import Received, ship


class _ScreenWork:
    """Works off units of a screen in a Ray actor."""

    def __init__(self, shipped: Any, shipped_head: Any, shipped_job: Any) -> None:
        self.job: Job = ray.get(shipped_job)
        # Kept: their folders live as long as they do.
        self.received = [Received(one) for one in (shipped, shipped_head) if one is not None]
        self.worker = self.job.worker(*(one.bundle for one in self.received))

    def __call__(self, unit: int) -> int:
        self.job.work_off(unit, self.worker)
        return unit


def run_on_ray(bundle: Bundle, head: Bundle | None, job: Job, units: Sequence[int]) -> Iterator[int]:
    """Work off `units` on a pool of actors, each with a GPU where there are any, else a processor; each as it ends.

    Raises SettingsError when a GPU is asked for and there is none, and what `work_off` raises.
    """
    freight = [ship(bundle), None if head is None else ship(head), ray.put(job)]
    gpus, size = gpus_of(job.config), workers_of(job.config)
    return work_off(units, _ScreenWork, freight, size=size, gpus=gpus, where=job.uri)


def gpus_of(config: ScreenConfig) -> int:
    """GPUs of the running cluster that the screen may use; SettingsError when it wants one and there is none."""
    return gpus_on(config.compute.device)


def workers_of(config: ScreenConfig) -> int:
    """Processes that work on a screen in the running cluster."""
    return actors_for(config.compute.workers, gpus_of(config))
