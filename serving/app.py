"""The Ray Serve application: models resolved once, their replicas, and the HTTP side in front of them.

    with ray_cluster(settings), service("models:/encoder@production", ServingConfig(port=0), settings) as running:
        print(running.url)

On a cluster whose Serve is run from a config file, `import_path: genescale.serving.app:application` builds the same
application from `args: {model: …, settings: …, replicas: …}`; several models are `models: {NAME: …, NAME: …}`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray import serve
from ray.serve.config import BackpressureConfig, HTTPOptions
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from genescale.platform.errors import ClusterError, SettingsError
from genescale.platform.settings import Settings, build, load_settings
from genescale.serving.access.draining import Drainer
from genescale.serving.answering.published_states import PublishedStates, published_with
from genescale.serving.config import ServingConfig
from genescale.serving.gate import Gate
from genescale.serving.jobs.on_ray import jobs_on_ray, stop_supervisor
from genescale.serving.models.fleet import end_rollout
from genescale.serving.models.named import Models, check_sizes, resolve_all
from genescale.serving.models.record import Record
from genescale.serving.models.serving_side import RayModels, VersionMaker
from genescale.serving.models.state import ModelsState, initial_state
from genescale.serving.neighbours.reference import IndexRelease, resolve_index
from genescale.serving.release import Release
from genescale.serving.replicas import (
    CONSTRUCTOR_TRIES,
    HEALTH_CHECK_PERIOD_S,
    cache_folder,
    model_deployment,
    prepare_process,
)
from genescale.serving.routes import http_application
from genescale.serving.services import Services
from genescale.serving.watching.metrics_route import watch_of
from genescale.serving.watching.reporter import Reporter
from genescale.serving.watching.watcher import watcher_deployment

# Room at the HTTP side beyond admitted requests: for refusing others quickly, and for probes.
INGRESS_HEADROOM = 64
INGRESS_QUEUE = 256
# The HTTP side parses and renders; it waits most of the time, and must fit beside the model on a small machine.
INGRESS_CPUS = 0.1
ALL_HOSTS = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}


@dataclass(frozen=True, kw_only=True)
class RunningService:
    """A service that answers now."""

    url: str
    release: Release
    """Of the default model, as deployed."""
    releases: Mapping[str, Release]
    """Of every model by name, as deployed."""
    config: ServingConfig
    drainer: Drainer

    def stop(self) -> None:
        """Refuse what is new, finish what is being answered, then stop the application, its proxy and Serve itself."""
        end_rollout(self.config.application)
        self.drainer.drain(self.config.application, timeout_s=self.config.limits.deadline_s)
        serve.shutdown()
        Record(self.config.application).clear()


def start(models: Models, config: ServingConfig, settings: Settings) -> RunningService:
    """Resolve each model once and serve it on the Ray of this process; returns when the service is ready.

    Downloads go to `config.cache`. Raises ClusterError when Serve runs there already or the service does not come up,
    and whatever `resolve` raises when the model cannot be had.
    """
    if serve.status().proxies:
        raise ClusterError(
            "Ray Serve already runs on this cluster.",
            fix="Stop it with `serve shutdown`, or deploy beside it from a config file (docs: application).",
        )
    # Importing Serve made it talkative; what it says when it starts and stops is said better by who called.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if not settings.cluster.address:
        _check_room(config)
    config = replace(config, port=config.port or _free_port(config.host))
    releases = resolve_all(models, settings, cache_folder(config))
    check_sizes(releases, config.max_model_bytes)
    index = _index(releases, config, settings)
    states = published_with(releases.values(), config, settings)
    limits = config.limits
    # What an earlier service on this cluster rolled out is not what is deployed now.
    Record(config.application).clear()
    try:
        serve.start(
            proxy_location="HeadOnly",
            http_options=HTTPOptions(
                host=config.host,
                port=config.port,
                # A backstop: the gate answers before this, in our shape.
                request_timeout_s=limits.body_timeout_s + limits.deadline_s + 10,
            ),
            logging_config=_quiet(),
        )
        serve.run(
            _application(releases, index, states, config, settings),
            name=config.application,
            route_prefix="/",
            logging_config=_quiet(),
        )
    except RuntimeError as error:
        reason = _reason(error, config.application)
        serve.shutdown()
        raise ClusterError(f"the service did not come up: {reason}", where=f"{config.host}:{config.port}") from error
    except BaseException:
        serve.shutdown()
        raise
    default = next(iter(releases.values()))
    return RunningService(url=_url(config), release=default, releases=releases, config=config, drainer=Drainer())


@contextlib.contextmanager
def service(models: Models, config: ServingConfig, settings: Settings) -> Iterator[RunningService]:
    """`start` for the length of a block; nothing of it is left afterwards, downloads included."""
    with tempfile.TemporaryDirectory(prefix="genescale-model-") as folder:
        running = start(models, config if config.cache else replace(config, cache=folder), settings)
        try:
            yield running
        finally:
            running.stop()
            # On a cluster that stays, jobs go on without the service; on a Ray of our own they wait for the next start.
            if config.jobs.on and not settings.cluster.address:
                stop_supervisor(config)


def application(args: Mapping[str, Any]) -> serve.Application:
    """The application for a Serve config file.

    `args` are `model`, or `models` by name, `settings` (a file) and fields of ServingConfig.
    """
    values = dict(args)
    settings = load_settings(values.pop("settings", None))
    model, models = values.pop("model", None), values.pop("models", None)
    if bool(model) == bool(models):
        raise SettingsError(
            "give either a model or models.", where="args", fix="For example model: models:/encoder@production."
        )
    if models and not isinstance(models, Mapping):
        raise SettingsError("models is no table of names.", where="args", fix="Write NAME: MODEL for each.")
    config = build(ServingConfig, values, where="args")
    releases = resolve_all(models or str(model), settings, cache_folder(config))
    check_sizes(releases, config.max_model_bytes)
    states = published_with(releases.values(), config, settings)
    return _application(releases, _index(releases, config, settings), states, config, settings)


def _index(releases: Mapping[str, Release], config: ServingConfig, settings: Settings) -> IndexRelease | None:
    """The reference of the config, which must have been made with one of the models."""
    if not config.index:
        return None
    first, *others = releases.values()
    for release in others:
        with contextlib.suppress(SettingsError):
            return resolve_index(config.index, release, settings, cache_folder(config))
    return resolve_index(config.index, first, settings, cache_folder(config))


def _application(
    releases: Mapping[str, Release],
    index: IndexRelease | None,
    states: PublishedStates,
    config: ServingConfig,
    settings: Settings,
) -> serve.Application:
    """The HTTP side, bound to the replicas."""
    options = Ingress.options(  # type: ignore[attr-defined]
        num_replicas=config.ingress_replicas,
        ray_actor_options={"num_cpus": INGRESS_CPUS},
        max_ongoing_requests=config.max_admitted + INGRESS_HEADROOM,
        max_queued_requests=INGRESS_QUEUE,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=config.retry_after_s),
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        max_constructor_retry_count=CONSTRUCTOR_TRIES,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=config.limits.deadline_s,
    )
    initial = initial_state(releases)
    model = model_deployment(initial, config, settings)
    watcher = watcher_deployment(releases, config, settings)
    bound: serve.Application = options.bind(model, initial, index, states, config, settings, watcher=watcher)
    return bound


@serve.deployment
@serve.ingress()
class Ingress:
    """The HTTP side: gate, routes, tokens. It holds vocabularies, never weights."""

    def __init__(
        self,
        model: DeploymentHandle,
        initial: ModelsState,
        index: IndexRelease | None,
        states: PublishedStates,
        config: ServingConfig,
        settings: Settings,
        *,
        watcher: DeploymentHandle,
    ) -> None:
        prepare_process(settings, config)
        self._reporter = Reporter(lambda: watcher)
        reference = index.open(settings, cache_folder(config)) if index else None
        make = VersionMaker(model, reference, states, config, settings)
        self._models = RayModels(make, model, initial, config, settings)
        default = self._models.versions.default
        services = Services(
            answers=default.answers,
            neighbors=default.neighbors,
            release=default.release,
            models=self._models,
            retry_after_s=config.retry_after_s,
            jobs=jobs_on_ray(config, settings),
            deployment_run_id=self._reporter.run_id,
            other_reports=self._reporter.others,
        )
        self._gate = http_application(services, config, echo_request_id=False)
        self._reporter.start(watch_of(self._gate.app).report)

    def __serve_build_asgi_app__(self) -> Gate:
        return self._gate

    async def drain(self) -> int:
        """Take no new work; returns how many requests are still being answered."""
        left = self._gate.drain()
        if not left:
            # What was counted last is not lost with this process.
            await self._reporter.tell()
        return left

    async def prepare_version(self, release: Release) -> frozenset[str]:
        """Make a release ready to be adopted; what it can answer beside embeddings."""
        return (await asyncio.to_thread(self._models.versions.prepare, release)).able

    async def adopt(self, state: ModelsState) -> int:
        """Answer as `state` says from now on; returns the generation that answers."""
        return await asyncio.to_thread(self._models.versions.adopt, state)

    def in_work(self, release: Release) -> int:
        """Questions that a release is working on for this process."""
        return self._models.versions.in_work(release)

    async def forget(self, release: Release) -> None:
        """Let go of a release that nothing names any more."""
        # Versions take turns, and one that is made ready meanwhile takes its time.
        await asyncio.to_thread(self._models.versions.forget, release)


def _check_room(config: ServingConfig) -> None:
    """Raise ClusterError when this machine's Ray can never place the replicas; Serve would wait for ever."""
    there = ray.cluster_resources()
    asked = {
        "CPU": config.replicas * config.num_cpus + config.ingress_replicas * INGRESS_CPUS + config.jobs.cpus,
        "GPU": config.replicas * config.num_gpus + config.jobs.gpus,
    }
    for name, number in asked.items():
        if number > there.get(name, 0.0):
            raise ClusterError(
                f"the service asks for {number:g} {name}s, Ray has {there.get(name, 0.0):g}.",
                where="local Ray",
                fix="Ask for fewer replicas, for less per replica, or raise cluster.num_cpus or cluster.num_gpus.",
            )


def _reason(error: RuntimeError, name: str) -> str:
    """The last line of what went wrong: in a deployment that failed, else in the error itself (a proxy's, say)."""
    application = serve.status().applications.get(name)
    failed = [one.message for one in application.deployments.values() if one.message] if application else []
    lines = [line.strip() for line in (failed or [str(error)])[0].splitlines() if line.strip()]
    return lines[-1]


def _quiet() -> LoggingConfig:
    """The gate logs each request, with its id: Serve's own access log would say it again."""
    return LoggingConfig(log_level="WARNING", enable_access_log=False)


def _free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _url(config: ServingConfig) -> str:
    host = ALL_HOSTS.get(config.host, f"[{config.host}]" if ":" in config.host else config.host)
    return f"http://{host}:{config.port}"
