"""Splits that people give: the ids of the cells, genes or donors of each part, in a file.

    FILE.json           {"train": [ids], "validation": [ids], "test": [ids]}, and "key": COLUMN when they are donors
    FILE.csv, .parquet  a row for each id: a column of ids (cell_id, gene_id or id), `part`, `fold` where it has many

The published layout (`attr_key`, `eval`) is understood, and so is the Parquet file that a run leaves (`split_file`).

Axis suffixes: `u` units (cells or genes), `g` groups, `c` classes.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from genescale.platform.errors import InputError
from genescale.platform.storage import Store
from genescale.training.labels.assignment import nearest_assignment
from genescale.training.labels.splits import PARTS, Split, split_of

ID_COLUMNS = ("cell_id", "gene_id", "unit_id", "id")
KEY_NAMES = ("key", "attr_key")
PART_NAMES = {"train": "train", "validation": "validation", "valid": "validation", "eval": "validation", "test": "test"}
_SHOWN = 5
_FORMS = 'Write {"train": […], "validation": […], "test": […]}, or a table with the columns id and part.'


class Shares(Protocol):
    """What a listed split takes from the request when no validation part is listed."""

    @property
    def fractions(self) -> tuple[float, ...]:
        """Train, validation, test."""

    @property
    def seed(self) -> int:
        """Draws the validation part."""

    @property
    def unit(self) -> str:
        """`cells` or `genes`."""


@dataclass(frozen=True, kw_only=True)
class ListedParts:
    """Ids of the parts of one split."""

    ids: Mapping[str, tuple[str, ...]]
    """By part: train, test, and validation (may be missing: it is then taken from train)."""
    key: str = ""
    """Column whose values the ids are; empty when they are ids of cells or genes."""
    where: str = "lists"

    def __post_init__(self) -> None:
        if missing := [part for part in ("train", "test") if not self.ids.get(part)]:
            raise InputError(f"no ids for the part '{missing[0]}'.", where=self.where, fix=_FORMS)
        counts = Counter(unit for ids in self.ids.values() for unit in ids)
        if doubled := [unit for unit, times in counts.items() if times > 1]:
            raise InputError(
                f"{len(doubled)} id(s) are listed twice, for example {', '.join(doubled[:_SHOWN])}.",
                where=self.where,
                fix="Name each id in one part, once.",
            )

    def names(self, ids_u: npt.NDArray[Any], groups_u: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """(u) whether a list names the unit, or its group where the lists name groups."""
        listed = [unit for ids in self.ids.values() for unit in ids]
        return np.isin((groups_u if self.key else ids_u).astype(str), np.array(listed, dtype=str))


def read_id_lists(uri: str, store: Store, *, fold: int = 0) -> ListedParts:
    """Read the parts of one split (of fold number `fold`, where a table has several); InputError for other contents."""
    data = store.read(uri)
    if uri.lower().endswith(".json"):
        return _from_json(data, uri)
    if uri.lower().endswith(".parquet"):
        rows = pq.read_table(pa.BufferReader(data)).to_pylist()
    else:
        text = data.decode("utf-8-sig", errors="replace")
        rows = list(csv.DictReader(io.StringIO(text), delimiter="\t" if uri.lower().endswith(".tsv") else ","))
    return _from_rows(rows, fold, uri)


def _from_json(data: bytes, uri: str) -> ListedParts:
    try:
        content = json.loads(data)
    except ValueError as error:
        raise InputError(f"not valid JSON: {error}.", where=uri) from None
    if not isinstance(content, Mapping):
        raise InputError("these are no parts with ids.", where=uri, fix=_FORMS)
    key = next((str(content[name]) for name in KEY_NAMES if name in content), "")
    ids = {name: value for name, value in content.items() if name not in KEY_NAMES}
    if any(not isinstance(value, list) for value in ids.values()):
        raise InputError("a part is no list of ids.", where=uri, fix=_FORMS)
    return _parts([(str(unit), name) for name, units in ids.items() for unit in units], key, uri)


def _from_rows(rows: Sequence[Mapping[str, Any]], fold: int, uri: str) -> ListedParts:
    columns = list(rows[0]) if rows else []
    id_column = next((name for name in ID_COLUMNS if name in columns), "")
    if not id_column or "part" not in columns:
        raise InputError(f"the columns are {', '.join(columns) or 'missing'}.", where=uri, fix=_FORMS)
    inside = [row for row in rows if str(row.get("fold", fold)) == str(fold)]
    if not inside:
        raise InputError(f"there is no fold {fold}.", where=uri, fix="Folds are counted from 0.")
    return _parts([(str(row[id_column]), str(row["part"])) for row in inside], "", uri)


def _parts(pairs: Sequence[tuple[str, str]], key: str, uri: str) -> ListedParts:
    ids: dict[str, list[str]] = {}
    for unit, name in pairs:
        part = PART_NAMES.get(name.strip().lower())
        if part is None:
            raise InputError(f"'{name}' is no part.", where=uri, fix="Parts are train, validation and test.")
        ids.setdefault(part, []).append(unit.strip())
    return ListedParts(ids={part: tuple(units) for part, units in ids.items()}, key=key, where=uri)


def listed_split(
    listed: ListedParts,
    ids_u: npt.NDArray[Any],
    groups_u: npt.NDArray[Any] | None,
    group: str,
    strata_u: npt.NDArray[np.int64],
    shares: Shares,
) -> tuple[Split, tuple[str, ...]]:
    """The split that the lists say, and notes on it. Units that no list names are left out, and counted in a note.

    Raises InputError when an id is not there, and when the lists name values of another column than `group`.
    """
    names_u = ids_u
    if listed.key:
        if groups_u is None or listed.key != group:
            raise InputError(
                f"the lists name values of '{listed.key}', but the cells are grouped by '{group or 'nothing'}'.",
                where=listed.where,
                fix=f"Set group = '{listed.key}'.",
            )
        names_u = groups_u
    known = set(names_u.tolist())
    unknown = [unit for ids in listed.ids.values() for unit in ids if unit not in known]
    if unknown:
        raise InputError(
            f"{len(unknown)} listed id(s) are not among the labelled {shares.unit}: {', '.join(unknown[:_SHOWN])}.",
            where=listed.where,
            fix="Take them out of the lists; ids that stand in several datasets are written DATASET/ID.",
        )
    number = {unit: PARTS.index(part) for part, ids in listed.ids.items() for unit in ids}
    part_u = np.array([number.get(name, -1) for name in names_u.tolist()], dtype=np.int64)
    notes = []
    if (left := int((part_u < 0).sum())) > 0:
        notes.append(f"{left:,} labelled {shares.unit} stand in no list and are not used.")
    if not listed.ids.get("validation"):
        part_u = _with_validation(part_u, names_u, strata_u, shares)
        notes.append("No validation part is listed; it was taken from the training part.")
    return split_of(part_u), tuple(notes)


def _with_validation(
    part_u: npt.NDArray[np.int64], names_u: npt.NDArray[Any], strata_u: npt.NDArray[np.int64], shares: Shares
) -> npt.NDArray[np.int64]:
    """Move a share of what the training list names (whole donors, where it names donors) to validation."""
    train = np.flatnonzero(part_u == PARTS.index("train"))
    groups, group_u = np.unique(names_u[train], return_inverse=True)
    if len(groups) < 2:
        raise InputError("one training id cannot be shared with validation.", where="lists", fix="List both parts.")
    share = shares.fractions[1] / (shares.fractions[0] + shares.fractions[1])
    counts_gc = np.zeros((len(groups), int(strata_u.max()) + 1))
    np.add.at(counts_gc, (group_u, strata_u[train]), 1)
    chosen_g = nearest_assignment(counts_gc, np.array([1 - share, share]), np.random.default_rng(shares.seed))
    moved_u = part_u.copy()
    moved_u[train[chosen_g[group_u] == 1]] = PARTS.index("validation")
    return moved_u
