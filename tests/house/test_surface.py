"""The public surface: commands, exported names and error codes are decisions, so a change shows up here."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import time
from pathlib import Path

import pytest

from genescale.platform import cli, errors

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = [
    "demo", "simulate", "vocabulary", "medians", "inspect", "genes", "ingest", "corpus",
    "pretrain", "finetune", "tune", "predict", "evaluate", "curve", "models", "embed", "perturb", "index", "serve",
]  # fmt: skip


def test_commands_are_the_agreed_ones() -> None:
    assert list(cli.COMMANDS) == COMMANDS


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module, function = cli.COMMANDS[name][0].split(":")
    command = getattr(importlib.import_module(module), function)
    try:
        status = command(["--help"])
    except SystemExit as stop:
        status = stop.code
    assert status == 0
    assert f"genescale {name}" in capsys.readouterr().out


def test_help_is_fast_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from genescale.platform.cli import main; main(['--help']);"
        "print([m for m in ('torch','ray','numpy','mlflow','pyarrow','deepspeed') if m in sys.modules])"
    )
    began = time.perf_counter()
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip().endswith("[]")
    # A generous bound for a busy machine: half a second is the target on an idle one.
    assert time.perf_counter() - began < 5


def test_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ingets"]) == 2
    assert "Did you mean 'ingest'?" in capsys.readouterr().err


def error_classes(kind: type[errors.GenescaleError]) -> list[type[errors.GenescaleError]]:
    return [kind, *(c for sub in kind.__subclasses__() for c in error_classes(sub))]


def test_error_codes_are_unique_and_drawn_in_the_tree() -> None:
    classes = [c for c in error_classes(errors.GenescaleError) if c.__module__ == errors.__name__]
    codes = [c.code for c in classes]
    assert len(codes) == len(set(codes))
    for c in classes:
        assert any(c.__name__ in line and f" {c.code} " in line for line in (errors.__doc__ or "").splitlines()), c


def test_client_needs_no_heavy_library() -> None:
    code = (
        "import sys, genescale.client;"
        "print([m for m in ('torch','ray','fastapi','pydantic','mlflow','pyarrow','boto3') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("path", sorted(ROOT.glob("*/recipes/*.toml")), ids=lambda path: path.name)
def test_recipes_are_read_by_the_command_that_takes_them(path: Path) -> None:
    from genescale.training.recipe import read_recipe

    assert read_recipe(path.stem).to_dict()


def test_public_functions_are_annotated() -> None:
    missing = []
    for layer in ("platform", "ingestion", "training", "perturbation", "serving"):
        for path in (ROOT / layer).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.returns is None:
                    missing.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert missing == []
