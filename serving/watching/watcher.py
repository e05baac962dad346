"""The watcher: one process of the service that hears from all others, for scrapes and for the tracker.

It answers no question of callers and no question waits for it. It is part of the Serve application, so it comes back
when it dies, moves with the cluster, and ends with the service.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import ray
from prometheus_client import CollectorRegistry, ProcessCollector
from ray import serve

from genescale.platform.runs import Run
from genescale.platform.settings import Settings
from genescale.serving.config import ServingConfig
from genescale.serving.release import Release
from genescale.serving.watching.board import Board, Interval, versions_of
from genescale.serving.watching.deployment_run import DeploymentRun, watch_tracking
from genescale.serving.watching.reporter import WATCHER
from genescale.serving.watching.reports import Report, families_of, process_name

DEPLOYMENT_TAG = "genescale.deployment"
# What Serve waits for a replica to end; the tracker gets most of it.
END_WITHIN_S, GRACE_S = 5.0, 10.0
# Texts of the config that say how a service runs; every other text is a place or a secret.
SAID = ("host", "device", "attention", "application")


@dataclass(frozen=True, kw_only=True)
class Watched:
    """What is deployed, as its run records it: models, choices and limits; no key, place or bucket."""

    application: str
    models: tuple[dict[str, str], ...]
    config: dict[str, Any]
    interval_s: float
    began_s: float
    """Unix time of the deployment: a watcher that comes back counts its steps from there as well."""

    @property
    def params(self) -> dict[str, Any]:
        """Parameters of the run."""
        models = {one["name"]: {name: value for name, value in one.items() if name != "name"} for one in self.models}
        return {"model": models, "serving": self.config, "build": version("genescale"), "host": socket.gethostname()}

    @property
    def title(self) -> str:
        """A name for the run."""
        first = self.models[0]
        return f"serve {first['name']} {first['version']}" + (" and others" if len(self.models) > 1 else "")


def watched(releases: Mapping[str, Release], config: ServingConfig) -> Watched:
    """What a deployment of these models, by the names that they answer under, is."""
    return Watched(
        application=config.application,
        models=tuple(
            {"name": name, "registered": one.name, "version": one.version, "digest": one.digest}
            for name, one in releases.items()
        ),
        config=shown_config(config),
        interval_s=config.tracking_interval_s,
        began_s=time.time(),
    )


def shown_config(config: ServingConfig) -> dict[str, Any]:
    """The choices and limits of a config, and whether it has keys; nothing that names a place or opens a door."""

    def shown(values: Mapping[str, Any]) -> dict[str, Any]:
        kept = {name: value for name, value in values.items() if isinstance(value, int | float) or name in SAID}
        nested = {name: shown(value) for name, value in values.items() if isinstance(value, Mapping)}
        return {**kept, **{name: value for name, value in nested.items() if value}}

    return {**shown(asdict(config)), "has_keys": config.has_keys}


@serve.deployment
class Watcher:
    """Keeps the newest report of each process, and writes the deployment's run."""

    def __init__(self, deployed: Watched, settings: Settings) -> None:
        from genescale.platform import log

        log.configure(settings.log, secrets=settings.secrets)
        self._deployed, self._board, self._interval = deployed, Board(), Interval()
        self._name, self._interval_began_s = process_name("watcher"), time.monotonic()
        self._versions = {one["name"]: one["version"] for one in deployed.models}
        self._run = DeploymentRun(lambda: open_run(deployed, settings)) if deployed.interval_s else None
        self._registry = CollectorRegistry()
        watch_tracking(self._registry, self._run)
        ProcessCollector(registry=self._registry)
        self._ticks = asyncio.get_running_loop().create_task(self._every_interval()) if self._run else None

    async def report(self, report: Report) -> str:
        """Take a report; returns the id of the deployment's run, empty while there is none."""
        self._interval.add(self._board.take(report, time.monotonic()))
        return self._run.id if self._run else ""

    async def reports(self) -> list[Report]:
        """The newest report of each process, and one of the watcher itself."""
        now_s = time.monotonic()
        heard = self._board.reports(now_s)
        families = (*self._board.families(now_s), *families_of(self._registry))
        return [*heard, Report(process=self._name, kind="watcher", families=families)]

    async def __del__(self) -> None:
        # Serve calls this once, and waits, when it stops the replica.
        if self._run is None:
            return
        if self._ticks is not None:
            self._ticks.cancel()
        self._write()
        await asyncio.to_thread(self._run.end, timeout_s=END_WITHIN_S)

    async def _every_interval(self) -> None:
        while True:
            await asyncio.sleep(self._deployed.interval_s)
            self._write()

    def _write(self) -> None:
        """Hand the interval that ends now to the run, and changed versions."""
        if self._run is None:
            return
        now_s = time.monotonic()
        done, self._interval = self._interval, Interval()
        seconds, self._interval_began_s = now_s - self._interval_began_s, now_s
        processes = {f"{kind}_processes": float(self._board.fresh(kind, now_s)) for kind in ("http", "model")}
        step = round(time.time() - self._deployed.began_s)
        self._run.log({**done.metrics(max(seconds, 1e-3)), **processes}, step=step)
        served = versions_of(self._board.reports(now_s))
        changed = {name: now for name, now in served.items() if self._versions.get(name) != now}
        if changed:
            self._versions.update(changed)
            self._run.label({f"serving.{name}": now for name, now in changed.items()})


def watcher_deployment(releases: Mapping[str, Release], config: ServingConfig, settings: Settings) -> Any:
    """The watcher as a node of a Serve application; it needs no processor of its own."""
    return Watcher.options(  # type: ignore[attr-defined]
        name=WATCHER,
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=1_000,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=GRACE_S,
    ).bind(watched(releases, config), settings)


def open_run(deployed: Watched, settings: Settings) -> AbstractContextManager[Run]:
    """The deployment's run in the tracker: a new one, or the open one that a watcher before this one left."""
    from genescale.platform.tracking import open_tracker

    tracker, label = open_tracker(settings), _label(deployed)
    tags = {DEPLOYMENT_TAG: label, **{f"serving.{one['name']}": one["version"] for one in deployed.models}}
    return tracker.run(
        deployed.title, params=deployed.params, tags=tags, resume=tracker.left_open(DEPLOYMENT_TAG, label)
    )


def _label(deployed: Watched) -> str:
    """The same for every watcher of one deployment on one cluster, and for no other deployment."""
    said = json.dumps([ray.get_runtime_context().get_session_name(), deployed.application, deployed.params])
    return hashlib.sha256(said.encode()).hexdigest()[:16]
