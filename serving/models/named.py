"""`NAME=MODEL`: models that are served under names, and what each of them is now."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from genescale.platform.bundle import Bundle
from genescale.platform.errors import LimitError, SettingsError
from genescale.platform.settings import Settings
from genescale.serving.models.state import NAME, check_name
from genescale.serving.release import Release, resolve

Model = str | Path | Bundle
Models = Model | Mapping[str, Model]
"""One model, or several by name, the default first."""


def read_named(texts: Sequence[str]) -> Models:
    """One `MODEL`, or every `NAME=MODEL` of a command line; SettingsError when they are mixed or a name repeats."""
    pairs = [_pair(text) for text in texts]
    if len(pairs) == 1 and not pairs[0][0]:
        return pairs[0][1]
    found: dict[str, Model] = {}
    for name, address in pairs:
        if not name:
            raise SettingsError(
                f"'{address}' has no name.", where="MODEL", fix="Of several models each is written NAME=MODEL."
            )
        if name in found:
            raise SettingsError(f"two models are called '{name}'.", where="MODEL", fix="Give each its own name.")
        found[name] = address
    return found


def resolve_all(models: Models, settings: Settings, cache: Path) -> dict[str, Release]:
    """The release of each model under the name that it is served by; raises what `resolve` raises.

    A model without a name has that of the registry, or of its folder.
    """
    if not isinstance(models, Mapping):
        release = resolve(models, settings, cache)
        return {_usable(release.name): release}
    if not models:
        raise SettingsError("no model is named.", where="models", fix="Name one.")
    for name in models:
        check_name(name, "models")
    return {name: resolve(model, settings, cache) for name, model in models.items()}


def check_sizes(releases: Mapping[str, Release], max_bytes: int) -> None:
    """LimitError for a model that no replica could ever hold; each needs its local copy."""
    for name, release in releases.items():
        size_bytes = sum(file.stat().st_size for file in Path(release.folder).glob("*.safetensors"))
        if size_bytes > max_bytes:
            raise LimitError(
                f"'{name}' takes {size_bytes:,} bytes; a replica may hold {max_bytes:,}.",
                where="max_model_bytes",
                fix="Raise it, if the machine has the memory (--max-model-bytes).",
            )


def _pair(text: str) -> tuple[str, str]:
    """Name and address; the name is empty where none is written. A folder a=b is written ./a=b."""
    name, equals, address = text.partition("=")
    return (name, address) if equals and address and NAME.fullmatch(name) else ("", text)


def _usable(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("._-")[:64] or "model"
