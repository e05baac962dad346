"""Put predictions of cells into the h5ad file that the cells came from: label, probability, out-of-distribution score.

Axis suffixes: `n` cells of the file.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from genescale.ingestion.formats.obs import write_obs
from genescale.platform.errors import InputError
from genescale.platform.storage import Store
from genescale.training.embeddings import AnnotateReport, place_in_file
from genescale.training.evaluation.predictions import Predictions


def annotate_predictions(
    source_uri: str, predictions: Predictions, out: Path | str, *, store: Store, dataset_id: str = ""
) -> AnnotateReport:
    """Copy an atlas file to the local path `out` with the predictions of its cells in `obs`.

    Columns: `genescale_LABEL` (categorical, or the predicted number), `genescale_LABEL_probability`, and, where they
    were measured, `genescale_LABEL_out_of_distribution`. Cells without a prediction have no value, and are counted.
    Raises InputError for predictions of genes, or of cells that are not those of the file.
    """
    if predictions.unit != "cells" or predictions.datasets_u is None or predictions.source_rows_u is None:
        raise InputError(
            "these predictions do not say of which rows of which dataset they are.",
            where=f"predictions of '{predictions.label}'",
            fix="Give predictions of cells of a corpus.",
        )
    place = place_in_file(source_uri, predictions.table(), store, dataset_id=dataset_id, what="predictions")
    if len(np.unique(place.rows_n)) < len(place.rows_n):
        raise InputError("a cell is predicted twice.", where=f"predictions of '{predictions.label}'")
    of_file = predictions.take(place.chosen_n)
    name = "genescale_" + re.sub(r"[^A-Za-z0-9_.-]+", "_", predictions.label)
    columns: dict[str, Any] = {}
    if predictions.kind == "classes":
        labels: list[str | None] = [None] * place.n_cells
        for row, code in zip(place.rows_n.tolist(), of_file.codes_u.tolist(), strict=True):
            labels[row] = predictions.classes[code]
        columns[name] = labels
        columns[f"{name}_probability"] = _spread(place.n_cells, place.rows_n, of_file.probabilities.max(axis=1))
    else:
        columns[name] = _spread(place.n_cells, place.rows_n, of_file.values_u)
    if of_file.out_of_distribution_u is not None:
        scores_n = _spread(place.n_cells, place.rows_n, of_file.out_of_distribution_u)
        columns[f"{name}_out_of_distribution"] = scores_n
    write_obs(source_uri, Path(out), columns, store)
    return place.report(Path(out))


def _spread(n_cells: int, rows_n: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(n) float32 values at their rows of the file, NaN elsewhere."""
    spread_n = np.full(n_cells, np.nan, dtype=np.float32)
    spread_n[rows_n] = values
    return spread_n
