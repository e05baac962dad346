"""Settings: one TOML file and the environment become frozen dataclasses.

A settings file says where things live (object storage, MLflow, Ray, logs); what a run *does* stands in the recipe or
config of its stage, which is read by the same `build` below. Order: defaults, then the file, then
`GENESCALE_<SECTION>__<KEY>` variables. Unknown keys are errors that name the nearest known key.
"""

from __future__ import annotations

import dataclasses
import os
import re
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from genescale.platform.errors import SettingsError, did_you_mean

T = TypeVar("T")
ENVIRONMENT_PREFIX = "GENESCALE_"
# Variables with our prefix that are not settings: where the file is, and where tests find shared data.
NOT_SETTINGS = {"GENESCALE_SETTINGS", "GENESCALE_SHARED"}
DEFAULT_FILE = "genescale.toml"
_PASSWORD = re.compile(r"^https?://[^/@]*?:([^/]+)@")


class Secret:
    """A text that shows itself as `***` wherever it is printed; `reveal()` gives it."""

    __slots__ = ("_text",)

    def __init__(self, text: str = "") -> None:
        self._text = text

    def reveal(self) -> str:
        """The secret itself, for the one call that needs it."""
        return self._text

    def __bool__(self) -> bool:
        return bool(self._text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._text == self._text

    def __hash__(self) -> int:
        return hash(self._text)

    def __repr__(self) -> str:
        return "Secret('***')" if self._text else "Secret('')"

    __str__ = __repr__


NO_SECRET = Secret()


@dataclasses.dataclass(frozen=True, kw_only=True)
class StorageSettings:
    """Where atlases, corpora, checkpoints and bundles live."""

    endpoint_url: str = ""
    """S3 endpoint such as `https://s3.example.org`; empty means the provider's own."""
    region: str = "us-east-1"
    access_key_id: Secret = NO_SECRET
    """Empty means the usual AWS sources (environment, profile, instance role)."""
    secret_access_key: Secret = NO_SECRET
    allowed_roots: tuple[str, ...] = ()
    """Prefixes (`s3://bucket/folder`, `/data`) that may be read or written; empty allows all."""
    connect_timeout_s: float = 10.0
    """How long a connection to the object store may take."""
    read_timeout_s: float = 60.0
    """How long the object store may be silent during an answer."""
    attempts: int = 5
    """How often a request that the object store refuses or breaks off is made before it counts as failed."""

    def __post_init__(self) -> None:
        if not (self.connect_timeout_s > 0 and self.read_timeout_s > 0):
            raise SettingsError("a time limit of storage is not positive.", fix="Use for example read_timeout_s = 60.")
        if self.attempts < 1:
            raise SettingsError(f"storage.attempts is {self.attempts}.", fix="Use 1 or more.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrackingSettings:
    """Where MLflow records runs, artefacts and registered models."""

    uri: str = "sqlite:///mlflow.db"
    """MLflow tracking and registry address: `sqlite:///…` or `http(s)://…`."""
    artifact_root: str = "mlartifacts"
    """Folder or `s3://…` for artefacts when the address is SQLite; a server chooses its own."""
    experiment: str = "genescale"
    journal_folder: str = ""
    """Local folder for measurements that wait for MLflow; empty means `genescale-metrics` in the temporary folder."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusterSettings:
    """How Ray is started or joined."""

    address: str = ""
    """Empty starts a local Ray for this command; `auto` or `ray://host:port` joins a running one."""
    num_cpus: int = 0
    """Processors a local Ray may use; 0 means all of this machine."""
    num_gpus: int = -1
    """GPUs a local Ray may use; -1 means those it finds."""
    object_store_bytes: int = 512 * 1024 * 1024
    """Shared memory of a local Ray's object store."""
    temp_dir: str = ""
    """Folder for a local Ray's session files; empty means Ray's own choice."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogSettings:
    """How log lines look."""

    level: str = "INFO"
    format: str = "human"
    """`human` or `json` (one object a line)."""

    def __post_init__(self) -> None:
        if self.format not in ("human", "json"):
            raise SettingsError(f"log.format is '{self.format}'.", fix="Use 'human' or 'json'.")
        if self.level.upper() not in ("DEBUG", "INFO", "WARNING", "ERROR"):
            raise SettingsError(f"log.level is '{self.level}'.", fix="Use DEBUG, INFO, WARNING or ERROR.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that differs between a laptop and a cluster."""

    storage: StorageSettings = StorageSettings()
    tracking: TrackingSettings = TrackingSettings()
    cluster: ClusterSettings = ClusterSettings()
    log: LogSettings = LogSettings()

    @property
    def secrets(self) -> tuple[Secret, ...]:
        """What no log line may hold: the keys of object storage, and a password in the tracker's address."""
        # As it is written there: a library that fails prints the address it was given.
        found = _PASSWORD.search(self.tracking.uri)
        keys = (self.storage.access_key_id, self.storage.secret_access_key)
        return (*keys, Secret(found[1])) if found else keys


def load_settings(path: str | Path | None = None, environment: Mapping[str, str] | None = None) -> Settings:
    """Read settings from `path`, else `$GENESCALE_SETTINGS`, else ./genescale.toml if it is there.

    Raises SettingsError for a missing file, broken TOML, an unknown key or a value of the wrong type.
    """
    environment = os.environ if environment is None else environment
    chosen = path or environment.get("GENESCALE_SETTINGS") or (DEFAULT_FILE if Path(DEFAULT_FILE).is_file() else None)
    values = read_toml(chosen) if chosen else {}
    for name, text in environment.items():
        if name.startswith(ENVIRONMENT_PREFIX) and name not in NOT_SETTINGS:
            section, separator, key = name.removeprefix(ENVIRONMENT_PREFIX).lower().partition("__")
            if not separator:
                raise SettingsError(
                    f"environment variable {name} is not a setting.",
                    fix="Settings are written GENESCALE_SECTION__KEY, for example GENESCALE_STORAGE__ENDPOINT_URL.",
                )
            values = {**values, section: {**_section(values, section), key: text}}
    return build(Settings, values, where=str(chosen or "environment"))


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = values.get(name, {})
    if not isinstance(section, Mapping):
        raise SettingsError(f"'{name}' is a section, not a value.", fix=f"Write [{name}] and its keys below it.")
    return section


def read_toml(path: str | Path) -> dict[str, Any]:
    """Parse a TOML file; SettingsError names the file and the place of a mistake."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError("no such file.", where=str(path), fix="Check the path.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"not valid TOML: {error}.", where=str(path)) from error


def build(kind: type[T], values: Mapping[str, Any], *, where: str = "") -> T:
    """Make the dataclass `kind` from nested mappings, converting texts to the declared types.

    Raises SettingsError for unknown keys (naming the nearest known one) and for values of the wrong type.
    """
    hints = typing.get_type_hints(kind)
    fields = {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.init}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            hint = did_you_mean(key, fields) or f"Known keys: {', '.join(fields)}."
            raise SettingsError(f"unknown key '{key}'.", where=where, fix=hint)
    prefix = f"{where}: " if where else ""
    arguments = {key: _convert(value, fields[key], where=f"{prefix}{key}") for key, value in values.items()}
    try:
        return kind(**arguments)
    except TypeError as error:
        missing = [f.name for f in dataclasses.fields(kind) if f.name not in arguments and _required(f)]  # type: ignore[arg-type]
        raise SettingsError(f"missing {', '.join(missing) or error}.", where=where) from error


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _convert(value: Any, hint: Any, *, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        if value not in typing.get_args(hint):
            choices = ", ".join(repr(choice) for choice in typing.get_args(hint))
            raise SettingsError(f"{value!r} is not one of {choices}.", where=where)
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(value, next(a for a in typing.get_args(hint) if a is not type(None)), where=where)
    if origin is tuple:
        items = [item.strip() for item in value.split(",") if item.strip()] if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)):
            raise SettingsError(f"{value!r} is not a list.", where=where)
        return tuple(_convert(item, typing.get_args(hint)[0], where=where) for item in items)
    if origin in (dict, Mapping) or hint is dict:
        return _pairs(value, where=where)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise SettingsError("is a section, not a value.", where=where, fix="Write its keys below it.")
        return build(typing.cast("type[Any]", hint), value, where=where)
    return _convert_scalar(value, hint, where=where)


def _pairs(value: Any, *, where: str) -> dict[str, Any]:
    """A mapping as it is, or one written `key=value,key=value`."""
    if isinstance(value, Mapping):
        return dict(value)
    items = [item for item in value.split(",") if item.strip()] if isinstance(value, str) else None
    if items is None or any("=" not in item for item in items):
        raise SettingsError(f"{value!r} is not a table of keys and values.", where=where, fix="Write key=value.")
    return {key.strip(): text.strip() for key, _, text in (item.partition("=") for item in items)}


def _convert_scalar(value: Any, hint: Any, *, where: str) -> Any:
    if hint is Secret and isinstance(value, (str, Secret)):
        return value if isinstance(value, Secret) else Secret(value)
    if hint is bool:
        words = {"true": True, "false": False, "1": True, "0": False}
        if isinstance(value, str) and value.lower() in words:
            return words[value.lower()]
        if isinstance(value, bool):
            return value
    elif hint in (int, float):
        number = _number(value, hint)
        if number is not None:
            return number
    elif isinstance(value, hint):
        return value
    raise SettingsError(f"{value!r} is not {_TYPE_NAMES.get(hint, getattr(hint, '__name__', hint))}.", where=where)


def _number(value: Any, kind: type[int] | type[float]) -> int | float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = kind(value)
    except (ValueError, OverflowError):
        return None
    return None if kind is int and isinstance(value, float) and value != number else number


_TYPE_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    Secret: "a text",
}
