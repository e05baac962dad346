"""The Ray Serve application: a model resolved once, its replicas, and the HTTP side in front of them.

    with ray_cluster(settings), service("models:/encoder@production", ServingConfig(port=0), settings) as running:
        print(running.url)

On a cluster whose Serve is run from a config file, `import_path: genescale.serving.app:application` builds the same
application from `args: {model: …, settings: …, replicas: …}`.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.config import BackpressureConfig, HTTPOptions
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from genescale.platform.bundle import Bundle
from genescale.platform.errors import ClusterError, SettingsError
from genescale.platform.settings import Settings, build, load_settings
from genescale.serving.access.draining import Drainer
from genescale.serving.answers import Answers
from genescale.serving.config import ServingConfig
from genescale.serving.facts import describe
from genescale.serving.gate import Gate
from genescale.serving.neighbours.answering import NeighborAnswers
from genescale.serving.neighbours.reference import IndexRelease, resolve_index
from genescale.serving.release import Release, resolve
from genescale.serving.replicas import CONSTRUCTOR_TRIES, ServedModel, cache_folder, model_deployment, prepare_process
from genescale.serving.routes import http_application
from genescale.serving.services import Services

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
    config: ServingConfig
    drainer: Drainer

    def stop(self) -> None:
        """Refuse what is new, finish what is being answered, then stop the application, its proxy and Serve itself."""
        self.drainer.drain(self.config.application, timeout_s=self.config.limits.deadline_s)
        serve.shutdown()


def start(model: str | Path | Bundle, config: ServingConfig, settings: Settings) -> RunningService:
    """Resolve `model` once and serve it on the Ray of this process; returns when the service is ready.

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
    release = resolve(model, settings, cache_folder(config))
    index = _index(release, config, settings)
    limits = config.limits
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
            _application(release, index, config, settings),
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
    return RunningService(url=_url(config), release=release, config=config, drainer=Drainer())


@contextlib.contextmanager
def service(model: str | Path | Bundle, config: ServingConfig, settings: Settings) -> Iterator[RunningService]:
    """`start` for the length of a block; nothing of it is left afterwards, downloads included."""
    with tempfile.TemporaryDirectory(prefix="genescale-model-") as folder:
        running = start(model, config if config.cache else replace(config, cache=folder), settings)
        try:
            yield running
        finally:
            running.stop()


def application(args: Mapping[str, Any]) -> serve.Application:
    """The application for a Serve config file: `args` are `model`, `settings` (a file) and fields of ServingConfig."""
    values = dict(args)
    settings = load_settings(values.pop("settings", None))
    model = values.pop("model", None)
    if not model:
        raise SettingsError("missing model.", where="args", fix="Name one, for example models:/encoder@production.")
    config = build(ServingConfig, values, where="args")
    release = resolve(str(model), settings, cache_folder(config))
    return _application(release, _index(release, config, settings), config, settings)


def _index(release: Release, config: ServingConfig, settings: Settings) -> IndexRelease | None:
    return resolve_index(config.index, release, settings, cache_folder(config)) if config.index else None


def _application(
    release: Release, index: IndexRelease | None, config: ServingConfig, settings: Settings
) -> serve.Application:
    """The HTTP side, bound to the model's replicas."""
    options = Ingress.options(  # type: ignore[attr-defined]
        num_replicas=config.ingress_replicas,
        ray_actor_options={"num_cpus": INGRESS_CPUS},
        max_ongoing_requests=config.max_admitted + INGRESS_HEADROOM,
        max_queued_requests=INGRESS_QUEUE,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=config.retry_after_s),
        max_constructor_retry_count=CONSTRUCTOR_TRIES,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=config.limits.deadline_s,
    )
    model = model_deployment(release, config, settings)
    bound: serve.Application = options.bind(model, release, index, config, settings)
    return bound


@serve.deployment
@serve.ingress()
class Ingress:
    """The HTTP side: gate, routes, tokens. It holds the vocabulary, never the weights."""

    def __init__(
        self,
        model: DeploymentHandle,
        release: Release,
        index: IndexRelease | None,
        config: ServingConfig,
        settings: Settings,
    ) -> None:
        prepare_process(settings, config)
        bundle = release.open(settings, cache_folder(config))
        reference = index.open(settings, cache_folder(config)) if index else None
        info = describe(release, bundle, config, reference=reference.facts if reference else None)
        answers = Answers(
            ServedModel(model, places=config.max_ongoing * config.replicas), bundle.vocabulary, info, config.limits
        )
        services = Services(
            answers=answers,
            neighbors=NeighborAnswers(answers, reference) if reference else None,
            retry_after_s=config.retry_after_s,
        )
        self._gate = http_application(services, config, echo_request_id=False)

    def __serve_build_asgi_app__(self) -> Gate:
        return self._gate

    def drain(self) -> int:
        """Take no new work; returns how many requests are still being answered."""
        return self._gate.drain()


def _check_room(config: ServingConfig) -> None:
    """Raise ClusterError when this machine's Ray can never place the replicas; Serve would wait for ever."""
    there = ray.cluster_resources()
    asked = {
        "CPU": config.replicas * config.num_cpus + config.ingress_replicas * INGRESS_CPUS,
        "GPU": config.replicas * config.num_gpus,
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
