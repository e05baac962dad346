"""The manifests of the service: what Serve is told is what the product reads, and it fits the nodes asked for."""

from __future__ import annotations

import importlib
import shutil
import tomllib
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from genescale.platform.settings import Settings, build
from genescale.serving.config import ServingConfig
from tests.infra.test_manifests import cluster_of, pods_of, rendered, services_of

ROOT = Path(__file__).resolve().parents[2]
PORT = 8000
INGRESS_CPUS = 0.1


@pytest.fixture(scope="module", params=["serve", "serve-gpu"])
def objects(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed: manifests are not rendered")
    return rendered(request.param)


@pytest.fixture(scope="module")
def service(objects: list[dict[str, Any]]) -> dict[str, Any]:
    (service,) = services_of(objects)
    return service


@pytest.fixture(scope="module")
def deployed(service: dict[str, Any]) -> dict[str, Any]:
    """What Serve is told."""
    told: dict[str, Any] = yaml.safe_load(service["spec"]["serveConfigV2"])
    return told


@pytest.fixture(scope="module")
def config(deployed: dict[str, Any]) -> ServingConfig:
    """The config that the product makes of it."""
    values = dict(deployed["applications"][0]["args"])
    del values["model"], values["settings"]
    return build(ServingConfig, values, where="args")


@pytest.fixture(scope="module")
def workers(service: dict[str, Any]) -> dict[str, Any]:
    (group,) = cluster_of(service)["workerGroupSpecs"]
    return dict(group)


def of_kind(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    return next(one for one in objects if one["kind"] == kind)


def test_serve_reads_what_it_is_told(deployed: dict[str, Any]) -> None:
    from ray.serve.schema import ServeDeploySchema

    with warnings.catch_warnings():
        # Ray spells its own schema in a way that pydantic has deprecated.
        warnings.simplefilter("ignore")
        read = ServeDeploySchema.model_validate(deployed)
    (application,) = read.applications
    module, _, name = application.import_path.partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    # Code comes with the image.
    assert not application.runtime_env
    assert (application.route_prefix, read.http_options.port) == ("/", PORT)


def test_nobody_asks_without_a_key(
    objects: list[dict[str, Any]], service: dict[str, Any], config: ServingConfig
) -> None:
    assert config.has_keys
    assert not config.api_keys
    for _, pod in pods_of(service):
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        (mount,) = [m for m in pod["spec"]["containers"][0]["volumeMounts"] if m["name"] == "keys"]
        assert config.keys_file.startswith(f"{mount['mountPath']}/")
        assert mount["readOnly"]
        # A secret that is mounted with subPath never changes: keys could not be taken back without a restart.
        assert "subPath" not in mount
        assert "secret" in volumes["keys"]


def test_what_the_replicas_ask_for_is_there_and_no_two_models_share_a_node(
    config: ServingConfig, workers: dict[str, Any]
) -> None:
    asked = workers["template"]["spec"]["containers"][0]["resources"]
    cpus, gpus = float(asked["requests"]["cpu"]), float(asked["limits"].get("nvidia.com/gpu", 0))
    nodes = workers["replicas"]
    assert workers["minReplicas"] == workers["maxReplicas"] == nodes >= 2
    total = config.replicas * config.num_cpus + config.ingress_replicas * INGRESS_CPUS
    total += config.jobs.workers * config.jobs.num_cpus
    assert total <= nodes * cpus
    assert config.replicas * config.num_gpus <= nodes * gpus
    assert 2 * config.num_cpus > cpus or 2 * config.num_gpus > gpus > 0
    assert config.ingress_replicas >= 2
    assert (config.num_gpus > 0) == (config.device == "cuda")


def test_jobs_are_kept_where_the_storage_may_write_and_apart_from_what_they_read(
    objects: list[dict[str, Any]], config: ServingConfig
) -> None:
    settings = build(Settings, tomllib.loads(of_kind(objects, "ConfigMap")["data"]["genescale.toml"]))
    assert config.jobs.on
    roots = tuple(f"{root}/" for root in settings.storage.allowed_roots)
    for address in (config.jobs.uri, *config.jobs.allowed_roots):
        assert f"{address}/".startswith(roots)


def test_nothing_that_is_being_answered_is_cut_off(
    service: dict[str, Any], deployed: dict[str, Any], config: ServingConfig, workers: dict[str, Any]
) -> None:
    limits, pod = config.limits, workers["template"]["spec"]
    longest_s = limits.body_timeout_s + limits.deadline_s
    assert deployed["http_options"]["request_timeout_s"] > longest_s
    assert service["spec"]["rayClusterDeletionDelaySeconds"] > longest_s
    command = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert command[0] == "sleep"
    assert limits.deadline_s < int(command[1]) < pod["terminationGracePeriodSeconds"]


def test_a_pod_is_ready_when_its_proxy_answers(workers: dict[str, Any]) -> None:
    (container,) = workers["template"]["spec"]["containers"]
    ready, alive = (" ".join(container[name]["exec"]["command"]) for name in ("readinessProbe", "livenessProbe"))
    assert f"localhost:{PORT}/-/healthz" in ready
    assert "local_raylet_healthz" in ready
    # A pod is not killed because the model is busy, or away for a moment.
    assert str(PORT) not in alive


def test_the_budget_and_the_policy_select_the_pods(objects: list[dict[str, Any]], service: dict[str, Any]) -> None:
    labels = {name: pod["metadata"]["labels"] for name, pod in pods_of(service)}
    budget, policy = of_kind(objects, "PodDisruptionBudget")["spec"], of_kind(objects, "NetworkPolicy")["spec"]
    assert budget["selector"]["matchLabels"].items() <= labels["models"].items()
    assert not budget["selector"]["matchLabels"].items() <= labels["head"].items()
    assert budget["minAvailable"] < cluster_of(service)["workerGroupSpecs"][0]["replicas"]
    for one in labels.values():
        assert policy["podSelector"]["matchLabels"].items() <= one.items()
    from_others = [rule for rule in policy["ingress"] if "namespaceSelector" in rule["from"][0]]
    assert sorted(port["port"] for rule in from_others for port in rule["ports"]) == [PORT, 8265]


def test_the_head_answers_nothing_and_forgets_nothing(service: dict[str, Any]) -> None:
    cluster = cluster_of(service)
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert service["spec"]["excludeHeadPodFromServeSvc"]
    options = cluster["gcsFaultToleranceOptions"]
    assert options["redisAddress"]
    assert "value" not in options["redisPassword"]


def test_both_variants_tell_serve_the_same_but_for_the_hardware() -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed: manifests are not rendered")
    told = []
    for name in ("serve", "serve-gpu"):
        (service,) = services_of(rendered(name))
        deployed = yaml.safe_load(service["spec"]["serveConfigV2"])
        arguments = deployed["applications"][0]["args"]
        for hardware in ("device", "num_cpus", "num_gpus", "ingress_replicas", "tokens_per_batch"):
            arguments.pop(hardware, None)
        told.append(deployed)
    assert told[0] == told[1]
