"""The rules of the house: layer order, doors, names, file lengths, and the one name trap."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ORDER = ("platform", "ingestion", "training", "perturbation", "serving")
LONGEST_FILE = 400
CLIENT = "serving/client"
TOP_LEVEL = {
    *ORDER, "tests", "infra", "benchmarks", "docs", ".ci",
    "pyproject.toml", "README.md", "Makefile", "LOG.md", "CHANGELOG.md", "LICENSE", ".gitignore",
}  # fmt: skip
# A heavy library is imported in one file or folder only, so that one place knows its quirks.
DOORS: dict[str, tuple[str, ...]] = {
    "deepspeed": ("training/engine.py",),
    "mlflow": ("platform/tracking.py",),
    "boto3": ("platform/storage.py",),
    "botocore": ("platform/storage.py",),
    "pyarrow.fs": ("platform/storage.py",),
    "s3fs": (),
    "fsspec": (),
    "anndata": ("ingestion/",),
    "h5py": ("ingestion/",),
    "zarr": ("ingestion/",),
    "deltalake": ("ingestion/table/delta_table.py",),
    "faiss": ("serving/neighbours/",),
    "fastapi": ("serving/",),
    "pydantic": ("serving/",),
    "ray.serve": ("serving/",),
    "moto": ("serving/demo/object_storage.py",),
    "transformers": (),
    "torch": ("training/", "perturbation/", "serving/"),
    "rich": ("platform/progress.py", "serving/demo/"),
}
PICKLE_DOORS = ("platform/plain_pickle.py",)
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "handler"}


def product_files() -> list[Path]:
    return sorted(path for layer in ORDER for path in (ROOT / layer).rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Every module a file imports, at any depth, with its line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}:{node.lineno} relative import"
            yield node.lineno, node.module or ""
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def belongs(module: str, library: str) -> bool:
    return module == library or module.startswith(f"{library}.")


FILES = product_files()


def test_there_is_something_to_check() -> None:
    assert {relative(path).split("/")[0] for path in FILES} == set(ORDER)


def test_no_folder_hides_the_standard_library() -> None:
    # The client is a package of its own, whose names are its interface.
    assert [relative(p) for layer in ORDER for p in (ROOT / layer).rglob("__init__.py")] == [f"{CLIENT}/__init__.py"]
    code = "import platform, numpy, uuid; print(platform.system())"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip()


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_layers_import_downwards_only(path: Path) -> None:
    layer = relative(path).split("/")[0]
    for line, module in imports(path):
        assert module.split(".")[0] not in ORDER or module.split(".")[0] == "platform", (
            f"{relative(path)}:{line} imports a bare folder name"
        )
        # Under its second name the client would be imported twice, with classes that are not equal.
        assert not belongs(module, "genescale.serving.client"), f"{relative(path)}:{line}: write genescale.client"
        if module.startswith("genescale."):
            other = "serving" if belongs(module, "genescale.client") else module.split(".")[1]
            assert ORDER.index(other) <= ORDER.index(layer), f"{relative(path)}:{line} {layer} imports {other}"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_heavy_libraries_have_one_door(path: Path) -> None:
    for line, module in imports(path):
        for library, doors in DOORS.items():
            if belongs(module, library):
                where = f"{relative(path)}:{line} imports {library}"
                assert relative(path).startswith(doors or ("nowhere",)), f"{where}; its door is {doors or 'tests'}"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_platform_stays_light(path: Path) -> None:
    if relative(path).startswith("platform/") and path.name != "cluster.py":
        heavy = {"ray", "torch", "anndata", "deepspeed"}
        assert [m for _, m in imports(path) if m.split(".")[0] in heavy] == []


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_no_pickle_outside_its_door(path: Path) -> None:
    if relative(path) in PICKLE_DOORS:
        return
    text = path.read_text(encoding="utf-8")
    found = [m for _, m in imports(path) if m.split(".")[0] in {"pickle", "cloudpickle", "joblib", "dill", "shelve"}]
    assert found == []
    assert not re.search(r"allow_pickle\s*=\s*True", text)
    assert not re.search(r"\btorch\.save\(", text)
    # Published weights in pickled form are read as tensors alone.
    is_door = relative(path) == "training/published.py"
    loads = re.findall(r"\btorch\.load\(.*", text)
    assert [line for line in loads if not is_door or "weights_only=True" not in line] == []


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_files_stay_readable(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= LONGEST_FILE, f"{relative(path)} has {lines} lines: give one of its ideas a file of its own"
    assert path.stem not in VAGUE_NAMES


def test_every_package_is_listed() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {relative(path.parent) for path in FILES} | {"training/recipes", "training/tasks"}
    assert set(project["package-dir"].values()) == folders
    assert set(project["packages"]) == set(project["package-dir"])


def test_top_level_is_the_agreed_one() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    names = {line.split("/")[0] for line in listed.stdout.splitlines()}
    assert names <= TOP_LEVEL


def tracked_texts() -> list[Path]:
    kinds = {".py", ".md", ".toml", ".txt", ".sh", ".yaml", ".yml", ".json", ""}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    paths = [ROOT / line for line in listed.stdout.splitlines()]
    return [path for path in paths if path.suffix in kinds and path.is_file()]


def test_no_path_of_one_machine() -> None:
    pattern = re.compile(r"(?<![\w.])/(?:home|root|Users|work|mnt|opt)/\w")
    # A test may need some path that must not leak: it says so on its line.
    found = [
        f"{relative(path)}:{number}"
        for path in tracked_texts()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line) and "made-up path" not in line and path != Path(__file__)
    ]
    assert found == []
