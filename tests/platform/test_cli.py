from __future__ import annotations

import pickle
import sys
import types
from collections.abc import Sequence

import pytest

from genescale.platform import cli
from genescale.platform.errors import GenescaleError, NotCountsError, UnknownGeneError


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("genescale_test_command")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(cli.COMMANDS, "try", (f"{module.__name__}:run", "a test command"))
    return module


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("genescale 0.")
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    assert [name for name in cli.COMMANDS if f"  {name} " not in shown] == []


def test_errors_raised_on_purpose_are_one_line(command: types.ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    def run(argv: Sequence[str]) -> int:
        raise NotCountsError("63 % of the values are fractional.", where="lung.h5ad: X", fix="Pass the raw matrix.")

    command.run = run  # type: ignore[attr-defined]
    assert cli.main(["try"]) == 2
    expected = "error [not_counts]: lung.h5ad: X: 63 % of the values are fractional. Pass the raw matrix.\n"
    assert capsys.readouterr().err == expected


def test_interrupt_and_missing_package(command: types.ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(argv: Sequence[str]) -> int:
        raise KeyboardInterrupt

    def bare(argv: Sequence[str]) -> int:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    command.run = interrupted  # type: ignore[attr-defined]
    assert cli.main(["try"]) == 130
    command.run = bare  # type: ignore[attr-defined]
    assert cli.main(["try"]) == 2
    assert "genescale[all]" in capsys.readouterr().err


def test_settings_option_reaches_the_command() -> None:
    parser = cli.command_parser("try", "A test.")
    arguments, settings = cli.begin(parser, [])
    assert arguments.settings is None
    assert settings.log.level == "INFO"


def test_errors_survive_a_worker_border() -> None:
    error = UnknownGeneError("no gene 'GTA4'.", where="request", fix="Did you mean 'GATA4'?")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is UnknownGeneError
    assert str(copy) == str(error)
    assert copy.code == "unknown_gene"
    assert isinstance(copy, GenescaleError)
