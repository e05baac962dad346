from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import pytest

from genescale.platform.errors import SettingsError
from genescale.platform.settings import Secret, Settings, build, load_settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    width: int = 4
    rate: float = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    name: str
    inner: Inner = Inner()
    kind: Literal["linear", "cosine"] = "linear"
    cap: int | None = None
    on: bool = False
    roots: tuple[str, ...] = ()


def test_file_then_environment(tmp_path: Path) -> None:
    file = tmp_path / "genescale.toml"
    file.write_text('[storage]\nendpoint_url = "http://a"\nregion = "eu"\n[cluster]\nnum_cpus = 3\n')
    settings = load_settings(file, {"GENESCALE_STORAGE__REGION": "us", "GENESCALE_CLUSTER__NUM_CPUS": "5", "HOME": "x"})
    assert (settings.storage.endpoint_url, settings.storage.region, settings.cluster.num_cpus) == ("http://a", "us", 5)


def test_environment_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "s.toml"
    file.write_text('[tracking]\nexperiment = "mine"\n')
    assert load_settings(environment={"GENESCALE_SETTINGS": str(file)}).tracking.experiment == "mine"


def test_defaults_need_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_settings(environment={}) == Settings()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "a", "inner": {"widht": 3}}, "unknown key 'widht'. Did you mean 'width'?"),
        ({"name": "a", "inner": {"width": "wide"}}, "inner: width: 'wide' is not a whole number."),
        ({"name": "a", "inner": {"width": 2.5}}, "2.5 is not a whole number."),
        ({"name": "a", "inner": 3}, "is a section"),
        ({"name": 3}, "3 is not a text."),
        ({"name": "a", "kind": "cubic"}, "'cubic' is not one of 'linear', 'cosine'."),
        ({"name": "a", "on": "maybe"}, "'maybe' is not true or false."),
        ({"name": "a", "inner": {"width": True}}, "True is not a whole number."),
        ({}, "missing name."),
    ],
)
def test_mistakes_are_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError) as error:
        build(Config, values, where="recipe.toml")
    assert message in str(error.value)
    assert str(error.value).startswith("recipe.toml")


def test_texts_become_the_declared_types() -> None:
    made = build(Config, {"name": "a", "inner": {"width": "8"}, "cap": "2", "on": "true", "roots": "a, b"})
    assert made == Config(name="a", inner=Inner(width=8), cap=2, on=True, roots=("a", "b"))


def test_unknown_variable_and_section_are_refused() -> None:
    with pytest.raises(SettingsError, match="GENESCALE_SECTION__KEY"):
        load_settings(environment={"GENESCALE_ENDPOINT": "x"})
    with pytest.raises(SettingsError, match="Did you mean 'storage'"):
        load_settings(environment={"GENESCALE_STORAG__REGION": "x"})


def test_broken_and_missing_files_are_named(tmp_path: Path) -> None:
    broken = tmp_path / "b.toml"
    broken.write_text("[storage\n")
    with pytest.raises(SettingsError, match=r"b\.toml: not valid TOML"):
        load_settings(broken, {})
    with pytest.raises(SettingsError, match="no such file"):
        load_settings(tmp_path / "none.toml", {})


def test_secrets_do_not_show() -> None:
    settings = load_settings(environment={"GENESCALE_STORAGE__SECRET_ACCESS_KEY": "hunter2"})
    assert "hunter2" not in f"{settings} {settings!r} {dataclasses.asdict(settings)}"
    assert settings.storage.secret_access_key.reveal() == "hunter2"
    assert Secret("a") != Secret("b")


@pytest.mark.parametrize(
    ("uri", "hidden"),
    [
        ("http://mlflow:p@ss:word@host:5000/path", ["p@ss:word"]),
        ("https://:only@host", ["only"]),
        ("https://host:5000/a@b:c@d", []),
        ("http://user@host", []),
        ("sqlite:///mlflow.db", []),
    ],
)
def test_the_password_in_the_trackers_address_is_a_secret(uri: str, hidden: list[str]) -> None:
    settings = build(Settings, {"tracking": {"uri": uri}, "storage": {"secret_access_key": "k"}})
    assert [secret.reveal() for secret in settings.secrets if secret] == ["k", *hidden]


def test_ranges_are_checked_where_they_enter() -> None:
    with pytest.raises(SettingsError, match="log"):
        load_settings(environment={"GENESCALE_LOG__FORMAT": "xml"})
