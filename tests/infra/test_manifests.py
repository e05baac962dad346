"""The Kubernetes manifests: they render, fit the schemas, are confined, and ask for what the product really takes."""

from __future__ import annotations

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


def rendered(name: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        ["kubectl", "kustomize", str(INFRA / "kubernetes" / name)], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return list(yaml.safe_load_all(done.stdout))


def jobs_of(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [one for one in objects if one["kind"] == "RayJob"]


def pods_of(job: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    cluster = job["spec"]["rayClusterSpec"]
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


@pytest.mark.shared
def test_ray_jobs_fit_the_schema_of_the_operator(objects: list[dict[str, Any]], shared_data: Path) -> None:
    definition = yaml.safe_load((shared_data / "kuberay" / "ray.io_rayjobs.yaml").read_text())
    versions = {one["name"]: one["schema"]["openAPIV3Schema"] for one in definition["spec"]["versions"]}
    schema = strict(versions["v1"]["properties"]["spec"])
    for job in jobs_of(objects):
        jsonschema.validate(job["spec"], schema)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**job["spec"], "backofLimit": 3}, schema)


def test_everything_else_fits_the_schemas_of_kubernetes(objects: list[dict[str, Any]]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import kubernetes_validate
    plain = [one for one in objects if one["kind"] != "RayJob"]
    # Checks look for pods, and do not find them inside Ray's kinds.
    for job in jobs_of(objects):
        plain += [
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, **pod["metadata"]}, "spec": pod["spec"]}
            for name, pod in pods_of(job)
        ]
    for one in plain:
        kubernetes_validate.validate(one, "1.33", strict=True)
    assert len({(one["kind"], one["metadata"]["name"]) for one in objects}) == len(objects)


def test_pods_are_confined(objects: list[dict[str, Any]]) -> None:
    for job in jobs_of(objects):
        for name, pod in pods_of(job):
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
    assert settings == load_settings(INFRA / "kubernetes" / "pretrain" / "settings.toml", {})
    assert settings.cluster.address == "auto"
    for job in jobs_of(objects):
        options = options_of(job["spec"]["entrypoint"])
        assert options["--output"].startswith(settings.storage.allowed_roots)


def test_versions_agree(objects: list[dict[str, Any]]) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for job in jobs_of(objects):
        assert f"\nray=={job['spec']['rayClusterSpec']['rayVersion']}\n" in PINS
        images = {container["image"] for _, pod in pods_of(job) for container in pod["spec"]["containers"]}
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
