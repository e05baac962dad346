"""The Kubernetes manifests: they render, fit the schemas, are confined, and ask for what the product really takes."""

from __future__ import annotations

import functools
import shlex
import shutil
import subprocess
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from genescale.platform.settings import Settings, build, load_settings
from genescale.training.recipe import read_recipe

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
FOLDERS = sorted(path.parent.name for path in (INFRA / "kubernetes").glob("*/kustomization.yaml"))
PINS = (INFRA / "requirements" / "cpu.txt").read_text()


@pytest.fixture(params=FOLDERS)
def objects(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What one folder renders to."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed: manifests are not rendered")
    return rendered(request.param)


@functools.cache
def render(name: str) -> str:
    done = subprocess.run(
        ["kubectl", "kustomize", str(INFRA / "kubernetes" / name)], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return done.stdout


def rendered(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(render(name)))


def jobs_of(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [one for one in objects if one["kind"] == "RayJob"]


def services_of(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [one for one in objects if one["kind"] == "RayService"]


def cluster_of(one: dict[str, Any]) -> dict[str, Any]:
    """The Ray cluster of a job or a service."""
    spec = one["spec"]
    cluster: dict[str, Any] = spec["rayClusterSpec"] if one["kind"] == "RayJob" else spec["rayClusterConfig"]
    return cluster


def pods_of(one: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    cluster = cluster_of(one)
    yield "head", cluster["headGroupSpec"]["template"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group["template"]


def strict(schema: Any) -> Any:
    """The same schema with unknown fields forbidden, and required fields optional where the cluster fills them in."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    properties = schema.get("properties")
    if isinstance(properties, dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
        filled = {name for name, part in properties.items() if isinstance(part, dict) and "default" in part}
        made["required"] = [name for name in schema.get("required", []) if name not in filled]
    if schema.get("x-kubernetes-int-or-string"):
        made = {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    return made


@functools.cache
def schema_of(file: Path) -> Any:
    # A megabyte each: the reader that is written in C is ten times as fast.
    definition = yaml.load(file.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    versions = {known["name"]: known["schema"]["openAPIV3Schema"] for known in definition["spec"]["versions"]}
    return strict(versions["v1"]["properties"]["spec"])


@pytest.mark.shared
def test_ray_kinds_fit_the_schemas_of_the_operator(objects: list[dict[str, Any]], shared_data: Path) -> None:
    for one in (*jobs_of(objects), *services_of(objects)):
        schema = schema_of(shared_data / "kuberay" / f"ray.io_{one['kind'].lower()}s.yaml")
        jsonschema.validate(one["spec"], schema)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**one["spec"], "backofLimit": 3}, schema)


def test_everything_else_fits_the_schemas_of_kubernetes(objects: list[dict[str, Any]]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import kubernetes_validate
    of_ray = (*jobs_of(objects), *services_of(objects))
    assert len(of_ray) == 1
    plain = [one for one in objects if one not in of_ray]
    # Checks look for pods, and do not find them inside Ray's kinds.
    for ray in of_ray:
        plain += [
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, **pod["metadata"]}, "spec": pod["spec"]}
            for name, pod in pods_of(ray)
        ]
    for one in plain:
        kubernetes_validate.validate(one, "1.33", strict=True)
    assert len({(one["kind"], one["metadata"]["name"]) for one in objects}) == len(objects)


def test_pods_are_confined(objects: list[dict[str, Any]]) -> None:
    for one in (*jobs_of(objects), *services_of(objects)):
        assert cluster_of(one)["authOptions"] == {"mode": "token"}
        for name, pod in pods_of(one):
            spec = pod["spec"]
            assert pod["metadata"]["labels"]["app.kubernetes.io/part-of"] == "genescale", name
            assert spec["automountServiceAccountToken"] is False
            assert spec["securityContext"]["runAsNonRoot"]
            assert spec["securityContext"]["runAsUser"] > 10_000
            for container in spec["containers"]:
                confined = container["securityContext"]
                assert confined["allowPrivilegeEscalation"] is False
                assert confined["readOnlyRootFilesystem"] is True
                assert confined["capabilities"]["drop"] == ["ALL"]
                assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]
                mounted = {mount["name"] for mount in container["volumeMounts"]}
                assert mounted == {volume["name"] for volume in spec["volumes"]}
                assert any(mount["mountPath"] == "/tmp" for mount in container["volumeMounts"])
    text = yaml.safe_dump_all(objects)
    assert "kind: Secret" not in text
    assert "secret_access_key" not in text
    assert {one["kind"] for one in objects} >= {"NetworkPolicy", "ServiceAccount"}


def test_a_job_asks_for_what_the_cluster_has_and_the_recipe_takes(objects: list[dict[str, Any]]) -> None:
    for job in jobs_of(objects):
        options = options_of(job["spec"]["entrypoint"])
        group = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
        resources = group["template"]["spec"]["containers"][0]["resources"]
        workers, cpus = int(options["--workers"]), int(options["--cpus-per-worker"])
        nodes = group["replicas"]
        assert group["minReplicas"] == group["maxReplicas"] == nodes
        assert workers % nodes == 0
        assert workers // nodes * cpus <= int(resources["requests"]["cpu"])
        gpus = int(resources["limits"].get("nvidia.com/gpu", 0))
        assert gpus in (0, workers // nodes)
        assert (gpus > 0) == job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0][
            "image"
        ].endswith("-cuda")
        recipe = read_recipe(options["recipe"], [options["--set"]] if "--set" in options else [])
        assert recipe.lanes % workers == 0
        # A try that is repeated must go on, so the run has a name of its own.
        assert options["--name"]
        assert options["--output"].startswith("s3://")
        assert "@" in options["--corpus"]


def options_of(entrypoint: str) -> dict[str, str]:
    words = shlex.split(entrypoint)
    assert words[:2] == ["genescale", "pretrain"]
    return {"recipe": words[2], **dict(zip(words[3::2], words[4::2], strict=True))}


def test_the_settings_of_the_cluster_are_settings(objects: list[dict[str, Any]]) -> None:
    content = next(one for one in objects if one["kind"] == "ConfigMap")["data"]["genescale.toml"]
    settings = build(Settings, tomllib.loads(content))
    folder = "serve" if services_of(objects) else "pretrain"
    assert settings == load_settings(INFRA / "kubernetes" / folder / "settings.toml", {})
    assert settings.cluster.address == "auto"
    for job in jobs_of(objects):
        options = options_of(job["spec"]["entrypoint"])
        assert options["--output"].startswith(settings.storage.allowed_roots)


def test_versions_agree(objects: list[dict[str, Any]]) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for one in (*jobs_of(objects), *services_of(objects)):
        assert f"\nray=={cluster_of(one)['rayVersion']}\n" in PINS
        images = {container["image"] for _, pod in pods_of(one) for container in pod["spec"]["containers"]}
        assert len(images) == 1
        assert images.pop().removesuffix("-cuda") == f"genescale:{version}"


def test_the_image_is_what_the_operator_needs() -> None:
    lines = (INFRA / "Dockerfile").read_text().splitlines()
    text = "\n".join(lines)
    # KubeRay's probes call them.
    assert "bash=" in text
    assert "wget=" in text
    assert [line.split()[1] for line in lines if line.startswith("USER ")] == ["10001"]
    assert 'ENTRYPOINT ["genescale"]' in lines
    assert not any(line.startswith("ADD ") for line in lines)
    kept = (INFRA / "Dockerfile.dockerignore").read_text().splitlines()
    for line in lines:
        if line.startswith("COPY ") and not line.startswith(("COPY --from", "COPY . ")):
            assert f"!{line.split()[1]}" in kept
