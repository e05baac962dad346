"""What a head said of cells or genes beside what is true of them: one record for measures, reports and files.

Axis suffixes: `u` units (cells or genes), `c` classes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from genescale.platform.errors import InputError

Unit = Literal["cells", "genes"]
NO_LABEL = -1
PROBABILITY_PREFIX = "probability."
METADATA_KEY = b"genescale.predictions"
_SUM_TOLERANCE = 1e-3
_ID_COLUMN = {"cells": "cell_id", "genes": "gene_id"}
_OPTIONAL = {
    "names_u": "symbol",
    "datasets_u": "dataset_id",
    "source_rows_u": "source_row",
    "groups_u": "group",
    "spread_u": "spread",
    "rows_u": "rows",
    "out_of_distribution_u": "out_of_distribution",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictions:
    """Predictions of one head; each unit was held out of the fit that predicted it, or has no label at all.

    Classes: `classes` and `probabilities_uc`, `true_u` int64 codes with -1 for no label. Numbers: no classes,
    `predicted_u` and `true_u` float64 with NaN for no label. Raises InputError when lengths or values do not fit.
    """

    label: str
    unit: Unit
    ids_u: npt.NDArray[Any]
    """Cell ids, or Ensembl ids of genes; texts."""
    fold_u: npt.NDArray[np.int64]
    """Fold whose held-out part the unit stands in; 0 with one split."""
    true_u: npt.NDArray[Any]
    classes: tuple[str, ...] = ()
    probabilities_uc: npt.NDArray[np.floating[Any]] | None = None
    predicted_u: npt.NDArray[np.floating[Any]] | None = None
    names_u: npt.NDArray[Any] | None = None
    """Gene symbols; texts."""
    datasets_u: npt.NDArray[Any] | None = None
    """Dataset of each cell, and its row in the dataset's source file, as the corpus has them."""
    source_rows_u: npt.NDArray[np.int64] | None = None
    groups_u: npt.NDArray[Any] | None = None
    """Donor (or whatever the split keeps together) of each unit; texts, empty where there is none."""
    spread_u: npt.NDArray[np.floating[Any]] | None = None
    """Genes: standard deviation, over the cells a gene was read from, of the probability of its predicted class."""
    rows_u: npt.NDArray[np.int64] | None = None
    """Genes: cells a gene was read from."""
    out_of_distribution_u: npt.NDArray[np.floating[Any]] | None = None
    """Share of the training units that lie nearer to their own kind than this unit does (0 … 1)."""

    def __post_init__(self) -> None:
        self._check_lengths()
        if self.kind == "classes":
            self._check_classes()
        elif not np.isfinite(self.values_u).all():
            self._refuse("a predicted number is not finite.")

    @property
    def kind(self) -> Literal["classes", "number"]:
        """Whether classes or numbers were predicted."""
        return "classes" if self.classes else "number"

    @property
    def probabilities(self) -> npt.NDArray[np.floating[Any]]:
        """(u, c) probabilities; InputError for a head that predicts numbers."""
        if self.probabilities_uc is None:
            self._refuse("numbers were predicted: there are no probabilities.")
        return self.probabilities_uc  # type: ignore[return-value]

    @property
    def codes_u(self) -> npt.NDArray[np.int64]:
        """Predicted class of each unit: the most probable, of equal ones the first."""
        return self.probabilities.argmax(axis=1).astype(np.int64)

    @property
    def values_u(self) -> npt.NDArray[np.floating[Any]]:
        """Predicted numbers; InputError for a head that predicts classes."""
        if self.predicted_u is None:
            self._refuse("classes were predicted: there are no numbers.")
        return self.predicted_u  # type: ignore[return-value]

    @property
    def labelled_u(self) -> npt.NDArray[np.bool_]:
        """Marks the units with a true label."""
        return ~np.isnan(self.true_u) if self.kind == "number" else self.true_u != NO_LABEL

    def __len__(self) -> int:
        return len(self.ids_u)

    def take(self, units: npt.NDArray[Any]) -> Predictions:
        """The same for some units: positions or a mask."""
        arrays = {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), np.ndarray)}
        return replace(self, **{name: value[units] for name, value in arrays.items()})

    def sorted(self) -> Predictions:
        """The same units by fold, dataset, row and id: one order, however they were predicted."""
        keys = (self.ids_u, self.source_rows_u, self.datasets_u, self.fold_u)
        return self.take(np.lexsort([key for key in keys if key is not None]))

    def table(self) -> pa.Table:
        """One row a unit: id, fold, true label, prediction, probability of it and of every class, and what is known.

        The schema's metadata hold label, unit and classes, so that `from_table` gives the same record back.
        """
        columns: dict[str, Any] = {_ID_COLUMN[self.unit]: _texts(self.ids_u)}
        for name in ("names_u", "datasets_u", "source_rows_u", "groups_u"):
            columns |= self._optional(name)
        columns["fold"] = pa.array(self.fold_u, pa.int64())
        columns |= self._class_columns() if self.kind == "classes" else self._number_columns()
        for name in ("spread_u", "rows_u", "out_of_distribution_u"):
            columns |= self._optional(name)
        about = {"schema_version": 1, "label": self.label, "unit": self.unit, "classes": list(self.classes)}
        return pa.table(columns).replace_schema_metadata({METADATA_KEY: json.dumps(about).encode()})

    @classmethod
    def from_table(cls, table: pa.Table) -> Predictions:
        """The record that `table` was made of; InputError when the table is not one of predictions."""
        metadata = table.schema.metadata or {}
        if METADATA_KEY not in metadata:
            raise InputError("the table holds no predictions.", fix="Give a predictions.parquet of `genescale`.")
        about = json.loads(metadata[METADATA_KEY])
        classes, unit = tuple(about["classes"]), about["unit"]
        known = {name: _numpy(table, column) for name, column in _OPTIONAL.items() if column in table.column_names}
        if classes:
            code = {name: number for number, name in enumerate(classes)}
            truths = [NO_LABEL if text is None else code[text] for text in table.column("label").to_pylist()]
            known["true_u"] = np.array(truths, dtype=np.int64)
            stacked = [_numpy(table, PROBABILITY_PREFIX + name) for name in classes]
            known["probabilities_uc"] = np.stack(stacked, axis=1)
        else:
            known["true_u"] = table.column("label").cast(pa.float64()).fill_null(np.nan).to_numpy()
            known["predicted_u"] = _numpy(table, "predicted")
        return cls(
            label=about["label"],
            unit=unit,
            classes=classes,
            ids_u=_numpy(table, _ID_COLUMN[unit]),
            fold_u=_numpy(table, "fold"),
            **known,
        )

    def _optional(self, name: str) -> Mapping[str, Any]:
        value = getattr(self, name)
        if value is None:
            return {}
        return {_OPTIONAL[name]: pa.array(value) if value.dtype.kind in "iuf" else _texts(value)}

    def _class_columns(self) -> Mapping[str, Any]:
        names = np.array(self.classes, dtype=object)
        known = zip(self.true_u.tolist(), self.labelled_u.tolist(), strict=True)
        labels = [self.classes[code] if has else None for code, has in known]
        probabilities_uc = self.probabilities
        each = {PROBABILITY_PREFIX + name: probabilities_uc[:, code] for code, name in enumerate(self.classes)}
        return {
            "label": pa.array(labels, pa.string()),
            "predicted": pa.array(names[self.codes_u].tolist(), pa.string()),
            "probability": pa.array(probabilities_uc.max(axis=1) if len(self) else probabilities_uc[:, 0]),
            **{name: pa.array(values) for name, values in each.items()},
        }

    def _number_columns(self) -> Mapping[str, Any]:
        return {
            "label": pa.array(self.true_u, pa.float64(), mask=~self.labelled_u),
            "predicted": pa.array(self.values_u),
        }

    def _check_lengths(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray) and len(value) != len(self.ids_u):
                self._refuse(f"{field.name} holds {len(value):,} values for {len(self.ids_u):,} {self.unit}.")
        if (self.probabilities_uc is None) != (not self.classes) or (self.predicted_u is None) == (not self.classes):
            self._refuse("give classes with probabilities_uc, or predicted_u alone.")

    def _check_classes(self) -> None:
        probabilities_uc = self.probabilities
        if probabilities_uc.shape != (len(self), len(self.classes)):
            self._refuse(f"probabilities of shape {probabilities_uc.shape} for {len(self.classes)} classes.")
        if len(set(self.classes)) != len(self.classes):
            self._refuse("two classes have the same name.")
        if self.true_u.dtype.kind not in "iu":
            self._refuse(f"true codes are {self.true_u.dtype}, not whole numbers.")
        if len(self) and not NO_LABEL <= self.true_u.min() <= self.true_u.max() < len(self.classes):
            self._refuse(f"a true code lies outside -1 … {len(self.classes) - 1}.")
        sums_u = probabilities_uc.sum(axis=1)
        if len(self) and not (probabilities_uc.min() >= 0 and np.abs(sums_u - 1).max() <= _SUM_TOLERANCE):
            self._refuse("probabilities of a unit are negative, no numbers, or do not sum to 1.")

    def _refuse(self, what: str) -> None:
        raise InputError(what, where=f"predictions of '{self.label}'")


def joined(parts: Sequence[Predictions]) -> Predictions:
    """The units of several folds one after the other; InputError when the parts are not of one head."""
    if not parts:
        raise InputError("there is no fold to join.", where="predictions")
    first = parts[0]
    if any((p.label, p.unit, p.classes) != (first.label, first.unit, first.classes) for p in parts):
        raise InputError("the folds differ in label, unit or classes.", where=f"predictions of '{first.label}'")
    arrays: dict[str, Any] = {}
    for field in fields(first):
        values = [getattr(part, field.name) for part in parts]
        if isinstance(values[0], np.ndarray):
            if any(value is None for value in values):
                raise InputError(f"a fold has no {field.name}.", where=f"predictions of '{first.label}'")
            arrays[field.name] = np.concatenate(values)
    return replace(first, **arrays)


def _texts(values: npt.NDArray[Any]) -> pa.Array:
    return pa.array([str(value) for value in values.tolist()], pa.string())


def _numpy(table: pa.Table, column: str) -> npt.NDArray[Any]:
    values: npt.NDArray[Any] = table.column(column).to_numpy()
    return values.astype(str) if values.dtype.kind == "O" else values
