"""Lists of sources: a TOML or CSV file that names atlases, each with options of its own.

    [[source]]
    uri = "lung.h5ad"                  # relative to the list; globs and folders too
    dataset_id = "lung-2024"
    counts_slot = "layers/counts"
    obs = { cell_type = "CellType" }
    sha256 = "9f86d081884c7d65…"

A CSV list has a heading with `uri` and any of the options whose value is a text, a number or true/false.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import os
import re
import tomllib
from collections.abc import Mapping
from typing import Any

from genescale.ingestion.reading_options import FIELDS
from genescale.platform.address import is_remote, join
from genescale.platform.errors import SettingsError, did_you_mean
from genescale.platform.storage import Store

ENDINGS = (".toml", ".csv")
MAX_BYTES = 64 * 1024 * 1024
# Options of one source: those of the command, by the same names.
OPTIONS = ("dataset_id", "replace", *FIELDS)
OWN = ("uri", "sha256")
_SHA256 = re.compile(r"[0-9A-Fa-f]{64}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """One source as it was named: an address (file, glob or folder), its options, and where a list names it."""

    uri: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sha256: str = ""
    where: str = ""


def is_list(source: str) -> bool:
    """True for the name of a list."""
    return source.lower().endswith(ENDINGS)


def read_list(uri: str, store: Store) -> list[Item]:
    """The sources of a list; SettingsError names the list, the entry and the mistake."""
    try:
        text = store.read(uri, max_bytes=MAX_BYTES).decode("utf-8-sig")
        rows = _toml(text, uri) if uri.lower().endswith(".toml") else _csv(text, uri)
    except UnicodeDecodeError as error:
        raise SettingsError(f"not UTF-8 text: {error}.", where=uri, fix="Save the list as UTF-8.") from error
    if not rows:
        raise SettingsError("the list names no source.", where=uri, fix="Add [[source]] tables, or rows with a uri.")
    items = [_item(values, uri, where) for where, values in rows]
    first: dict[str, str] = {}
    for item in items:
        if item.uri in first:
            raise SettingsError(
                f"{item.uri} is named twice, first as {first[item.uri].removeprefix(f'{uri}: ')}.",
                where=item.where,
                fix="Name each source once.",
            )
        first[item.uri] = item.where
    return items


def _toml(text: str, uri: str) -> list[tuple[str, Mapping[str, Any]]]:
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"not valid TOML: {error}.", where=uri) from error
    for key in content:
        if key != "source":
            raise SettingsError(
                f"unknown key '{key}'.", where=uri, fix=did_you_mean(key, ["source"]) or "A list holds [[source]]."
            )
    tables = content.get("source", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise SettingsError("'source' is not a list of tables.", where=uri, fix="Write [[source]] before each.")
    return [(f"{uri}: source {number}", table) for number, table in enumerate(tables, 1)]


def _csv(text: str, uri: str) -> list[tuple[str, Mapping[str, Any]]]:
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        heading = [name.strip() for name in next(reader, [])]
        rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise SettingsError(f"not valid CSV: {error}.", where=uri) from error
    if "uri" not in heading or len(set(heading)) < len(heading):
        raise SettingsError(
            f"its first line is no heading with 'uri': {', '.join(heading[:10]) or 'it is empty'}.",
            where=uri,
            fix="Begin with a line such as uri,dataset_id,counts_slot, each name once.",
        )
    if "obs" in heading:
        raise SettingsError("'obs' has no place in CSV.", where=uri, fix='Use a TOML list: obs = {cell_type = "…"}.')
    for line, row in rows:
        if len(row) != len(heading):
            raise SettingsError(
                f"{len(row)} cells, but the heading has {len(heading)}.",
                where=f"{uri}: line {line}",
                fix="Mend the row.",
            )
    return [
        (f"{uri}: line {line}", {k: v.strip() for k, v in zip(heading, row, strict=True) if v.strip()})
        for line, row in rows
    ]


def _item(values: Mapping[str, Any], list_uri: str, where: str) -> Item:
    for name in values:
        if name not in OPTIONS and name not in OWN:
            hint = did_you_mean(name, (*OPTIONS, *OWN)) or f"Known options: {', '.join(sorted((*OPTIONS, *OWN)))}."
            raise SettingsError(f"unknown option '{name}'.", where=where, fix=hint)
    uri, sha256 = values.get("uri"), values.get("sha256", "")
    if not isinstance(uri, str) or not uri:
        raise SettingsError("no uri.", where=where, fix='Write uri = "…", relative to the list or complete.')
    if not isinstance(sha256, str) or (sha256 and not _SHA256.fullmatch(sha256)):
        raise SettingsError(f"sha256 is '{sha256}'.", where=where, fix="Write the 64 digits that `sha256sum` prints.")
    options = {name: value for name, value in values.items() if name not in OWN}
    return Item(uri=beside(list_uri, uri), options=options, sha256=sha256.lower(), where=where)


def beside(list_uri: str, uri: str) -> str:
    """An address of a list: complete, or relative to the folder of the list."""
    if "://" in uri or uri.startswith(("/", "~/")):
        return uri
    folder = list_uri.rpartition("/")[0]
    return join(folder, uri) if is_remote(list_uri) else os.path.join(folder, uri)
