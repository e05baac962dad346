"""`genescale serve`: its options, its OpenAPI document, and a whole life as a process."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from genescale.client import GenescaleClient
from genescale.platform.errors import InputError, SettingsError, UnauthorizedError
from genescale.platform.settings import Secret
from genescale.serving.commands import FROM_OPTIONS, openapi_text, serve, serving_config
from genescale.serving.config import Limits, ServingConfig
from tests.serving.real_service import real_service, session_members

if TYPE_CHECKING:
    from genescale.platform.bundle import Bundle

ROOT = Path(__file__).resolve().parents[2]
KEY = "a-service-key-0123456789abcdef"


def options(**given: Any) -> argparse.Namespace:
    names = (*FROM_OPTIONS, "config", "api_key_env", "jobs_uri", "jobs_roots")
    return argparse.Namespace(**{**dict.fromkeys(names), **given})


def test_defaults_are_those_of_the_config() -> None:
    assert serving_config(options(), {}) == ServingConfig()


def test_options_win_over_the_file_and_keys_come_from_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "serving.toml"
    file.write_text("port = 9000\nreplicas = 2\n[limits]\nmax_cells = 7\n")
    given = options(config=str(file), port=0, api_key_env="KEYS")
    config = serving_config(given, {"KEYS": f"{KEY}, another-key-0123456789abc"})
    assert (config.port, config.replicas) == (0, 2)
    assert config.limits == Limits(max_cells=7)
    assert config.api_keys == (Secret(KEY), Secret("another-key-0123456789abc"))
    assert KEY not in repr(config)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prot = 1", "port"),
        ("port = 70000", "65535"),
        ("replicas = 0", "replicas"),
        ("num_cpus = 0", "num_cpus"),
        ("tokens_per_batch = 0", "tokens_per_batch"),
        ("max_queued = -1", "max_queued"),
        ("api_keys = ['short']", "16"),
        ("api_keys = ['ключ-длиннее-16-знаков']", "ASCII"),
        ("[limits]\nmax_cells = 0", "max_cells"),
        ("[limits]\nmax_cell = 5", "max_cells"),
        ("[limits]\ndeadline_s = -1", "deadline_s"),
    ],
)
def test_impossible_configs_are_refused_with_the_reason(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "serving.toml"
    file.write_text(text)
    with pytest.raises(SettingsError, match=said):
        serving_config(options(config=str(file)), {})


@pytest.mark.parametrize("environment", [{}, {"KEYS": ""}, {"KEYS": "  "}, {"KEYS": "short"}])
def test_an_empty_or_short_key_never_opens_a_service(environment: dict[str, str]) -> None:
    with pytest.raises(SettingsError):
        serving_config(options(api_key_env="KEYS"), environment)


def test_a_service_without_a_model_is_refused() -> None:
    with pytest.raises(SettingsError, match="MODEL"):
        serve([])


def test_the_committed_openapi_document_is_the_one_of_this_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert serve(["--openapi"]) == 0
    printed = capsys.readouterr().out
    assert printed == openapi_text()
    committed = (ROOT / "docs" / "openapi.json").read_text(encoding="utf-8")
    assert committed == printed, "run: genescale serve --openapi > docs/openapi.json"


def test_a_serve_config_file_builds_the_same_application(bundle: Bundle, tmp_path: Path) -> None:
    from genescale.serving.app import application

    settings = tmp_path / "genescale.toml"
    settings.write_text("")
    built = application({"model": str(bundle.folder), "settings": str(settings), "replicas": 2})
    assert type(built).__name__ == "Application"
    with pytest.raises(SettingsError, match="model"):
        application({"settings": str(settings)})
    with pytest.raises(InputError, match="replicas"):
        application({"model": str(bundle.folder), "settings": str(settings), "replica": 2})


def test_it_serves_until_it_is_told_to_stop_and_leaves_nothing(bundle: Bundle, tmp_path: Path) -> None:
    with real_service([str(bundle.folder), "--api-key-env", "KEYS"], {"KEYS": KEY}, tmp_path) as service:
        assert bundle.digest[:12] in service.said
        with GenescaleClient(service.url, api_key=KEY) as client:
            assert client.ready()
            assert client.embeddings([{"GENE1": 2}]).embeddings.shape == (1, 16)
        with GenescaleClient(service.url) as stranger, pytest.raises(UnauthorizedError):
            stranger.info()
        out = service.stop()
        left = session_members(service.process.pid)
    errors = service.errors.read_text()
    assert service.process.returncode == 0, errors
    assert "stopping" in out
    assert left == []
    for text in (service.said, errors):
        assert KEY not in text
        assert "Traceback" not in text
