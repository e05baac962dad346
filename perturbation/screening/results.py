"""The files of a screen: one Parquet part per unit of work, and a record that makes them complete.

    OUTPUT/_plan.json                         what is being computed, written first
    OUTPUT/cell_shifts/unit-00000.parquet     one row per (cell, edit); the last file a unit writes
    OUTPUT/gene_moments/unit-00000.parquet    sums behind the per-gene shifts, when they were asked for
    OUTPUT/gene_shifts.parquet                per (edit, affected gene), merged from them
    OUTPUT/_screen.json                       counts and digests, written last: without it a screen is not finished

Every name is a function of the plan, so a unit that runs twice writes the same file twice.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from genescale.perturbation.perturb import EditAnswer
from genescale.perturbation.screening.moments import Moments
from genescale.perturbation.screening.plan import SCREEN_SCHEMA_VERSION, Plan, edit_id, edit_symbol
from genescale.platform.errors import AlreadyExistsError, InputError, IntegrityError, NotFoundError
from genescale.platform.storage import Store, join
from genescale.platform.vocabulary import Vocabulary

PLAN_FILE, RECORD_FILE, GENE_SHIFTS_FILE = "_plan.json", "_screen.json", "gene_shifts.parquet"
OUTCOMES = ("edited", "absent", "undefined")
CELL_SHIFTS_SCHEMA = pa.schema(
    [
        pa.field("cell_id", pa.string(), nullable=False),
        pa.field("dataset_id", pa.string(), nullable=False),
        pa.field("source_row", pa.int64(), nullable=False),
        pa.field("cell_type", pa.string()),
        pa.field("donor_id", pa.string()),
        pa.field("gene_id", pa.string(), nullable=False),
        pa.field("symbol", pa.string(), nullable=False),
        pa.field("tokens", pa.list_(pa.int32()), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("outcome", pa.string(), nullable=False),  # one of OUTCOMES
        pa.field("found", pa.bool_(), nullable=False),  # the cell has every gene of the edit
        pa.field("rank", pa.int32()),  # of the highest-ranked gene of the edit, 0 = first
        pa.field("cosine", pa.float64()),
        pa.field("shift", pa.float64()),
        pa.field("goal_shift", pa.float64()),
        pa.field("n_compared", pa.int32(), nullable=False),
        pa.field("n_cut", pa.int32(), nullable=False),
    ]
)
MOMENTS_SCHEMA = pa.schema(
    [
        ("edit", pa.int32()),
        ("token", pa.int32()),
        ("count", pa.int64()),
        ("mean", pa.float64()),
        ("squares", pa.float64()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class ScreenReport:
    """What a screen did; `n_pairs` = edited + absent + undefined."""

    uri: str
    digest: str
    """Of everything that decides the numbers: model, corpus version, config."""
    identity: dict[str, Any]
    n_cells: int
    n_edits: int
    """Distinct edits."""
    n_pairs: int
    """(cell, edit) pairs, one row each in `cell_shifts`."""
    n_edited: int
    n_absent: int
    """Deletions of genes that the cell lacks: shift 0."""
    n_undefined: int
    """Edits after which no gene is left to compare: no shift."""
    n_gene_pairs: int
    """Rows of `gene_shifts`."""
    n_units: int
    n_units_reused: int
    """Units that an earlier, interrupted run had finished."""
    seconds: float
    parts: dict[str, str]
    """sha256 (hex) of each part below the screen's address."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Screen:
    """A finished screen, read back."""

    cell_shifts: pl.DataFrame
    gene_shifts: pl.DataFrame | None
    report: ScreenReport


def outcome_of(answer: EditAnswer) -> str:
    """`edited`, `absent` (a deletion that found none of its genes) or `undefined` (nothing left to compare)."""
    if answer.cosine is None:
        return "undefined"
    return "absent" if answer.request.kind == "delete" and not answer.found else "edited"


def cell_shifts_part(
    cells: Sequence[dict[str, Any]], answers: Sequence[Sequence[EditAnswer]], vocabulary: Vocabulary
) -> bytes:
    """The rows of one unit as Parquet: `cells` are rows of the plan, `answers` those of each cell."""
    rows = [
        {
            **{name: cell[name] for name in ("cell_id", "dataset_id", "source_row", "cell_type", "donor_id")},
            "gene_id": edit_id(answer.request.genes, vocabulary),
            "symbol": edit_symbol(answer.request.genes, vocabulary),
            "tokens": list(answer.request.genes),
            "kind": answer.request.kind,
            "outcome": outcome_of(answer),
            "found": not answer.absent,
            "rank": min(answer.found.values(), default=None),
            "cosine": answer.cosine,
            "shift": answer.shift,
            "goal_shift": answer.goal_shift,
            "n_compared": answer.n_compared,
            "n_cut": answer.n_cut,
        }
        for cell, of_cell in zip(cells, answers, strict=True)
        for answer in of_cell
    ]
    return _parquet(pa.Table.from_pylist(rows, schema=CELL_SHIFTS_SCHEMA))


def moments_part(moments: Moments) -> bytes:
    """Moments as Parquet."""
    arrays = (moments.edit_p, moments.token_p, moments.count_p, moments.mean_p, moments.squares_p)
    return _parquet(pa.Table.from_arrays([pa.array(values) for values in arrays], schema=MOMENTS_SCHEMA))


def read_moments(data: bytes) -> Moments:
    """Read `moments_part`."""
    table = pq.read_table(io.BytesIO(data))
    edit, token, count, mean, squares = (table[name].to_numpy() for name in MOMENTS_SCHEMA.names)
    return Moments(edit_p=edit, token_p=token, count_p=count, mean_p=mean, squares_p=squares)


def gene_shifts_table(moments: Moments, plan: Plan, vocabulary: Vocabulary) -> pl.DataFrame:
    """Per (edit, affected gene): cells, mean cosine, mean shift and the deviation between cells."""
    edits, edit_p = np.unique(moments.edit_p, return_inverse=True)
    ids = [edit_id(plan.edit_at(edit), vocabulary) for edit in edits.tolist()]
    symbols = [edit_symbol(plan.edit_at(edit), vocabulary) for edit in edits.tolist()]
    affected = [vocabulary.gene_of_token(token) for token in moments.token_p.tolist()]
    return pl.DataFrame(
        {
            "gene_id": pl.Series([ids[edit] for edit in edit_p], dtype=pl.String),
            "symbol": pl.Series([symbols[edit] for edit in edit_p], dtype=pl.String),
            "affected_gene_id": pl.Series(affected, dtype=pl.String),
            "affected_symbol": pl.Series([vocabulary.symbol_of(gene) for gene in affected], dtype=pl.String),
            "n_cells": moments.count_p,
            "mean_cosine": moments.mean_p,
            "mean_shift": 1.0 - moments.mean_p,
            "sd_shift": pl.Series(moments.deviation_p).fill_nan(None),
        }
    )


def unit_file(uri: str, kind: str, unit: int) -> str:
    """Address of one unit's part; `kind` is `cell_shifts` or `gene_moments`."""
    return join(uri, kind, f"unit-{unit:05d}.parquet")


def claim(plan: Plan, uri: str, store: Store) -> None:
    """Write the plan first; InputError when another screen has that address already."""
    content = json.dumps({"digest": plan.digest, **plan.identity}, indent=2, sort_keys=True)
    try:
        store.write(join(uri, PLAN_FILE), content.encode(), if_absent=True)
    except AlreadyExistsError:
        found = json.loads(store.read(join(uri, PLAN_FILE)))
        if found.get("digest") != plan.digest:
            changed = sorted(key for key, value in plan.identity.items() if found.get(key) != value)
            raise InputError(
                f"another screen stands there; it differs in {', '.join(changed)}.",
                where=uri,
                fix="Choose another output, or give the same model, corpus version and settings to continue it.",
            ) from None


def finished(plan: Plan, uri: str, store: Store) -> ScreenReport | None:
    """The record of this very screen when it is complete, else None."""
    try:
        report = read_report(uri, store)
    except NotFoundError:
        return None
    return report if report.digest == plan.digest else None


def read_report(uri: str, store: Store) -> ScreenReport:
    """The record of a finished screen; NotFoundError when it is not finished, InputError for another schema version."""
    try:
        record = json.loads(store.read(join(uri, RECORD_FILE)))
    except NotFoundError:
        raise NotFoundError(
            "no finished screen.",
            where=uri,
            fix="Run `genescale perturb` with this output: it continues what is there.",
        ) from None
    if (version := record.pop("schema_version", None)) != SCREEN_SCHEMA_VERSION:
        raise InputError(
            f"the screen has schema version {version}; this release reads {SCREEN_SCHEMA_VERSION}.", where=uri
        )
    return ScreenReport(**{**record, "uri": uri})


def write_report(report: ScreenReport, store: Store) -> None:
    """Write the record that makes a screen complete."""
    content = {"schema_version": SCREEN_SCHEMA_VERSION, **dataclasses.asdict(report)}
    store.write(join(report.uri, RECORD_FILE), json.dumps(content, indent=2, sort_keys=True).encode())


def read_screen(uri: str, store: Store) -> Screen:
    """A finished screen with all its rows.

    Raises NotFoundError when it is not finished, IntegrityError when a part is not the one that was recorded.
    """
    report = read_report(uri, store)
    parts = {name: _read_part(uri, name, digest, store) for name, digest in report.parts.items()}
    cells = [pl.read_parquet(data) for name, data in sorted(parts.items()) if name.startswith("cell_shifts/")]
    genes = parts.get(GENE_SHIFTS_FILE)
    return Screen(
        cell_shifts=pl.concat(cells), gene_shifts=None if genes is None else pl.read_parquet(genes), report=report
    )


def parquet_of(table: pl.DataFrame) -> bytes:
    """A Polars table as Parquet."""
    return _parquet(table.to_arrow())


def _read_part(uri: str, name: str, digest: str, store: Store) -> bytes:
    data = store.read(join(uri, name))
    if hashlib.sha256(data).hexdigest() != digest:
        raise IntegrityError(
            "this part is not the one the screen recorded.",
            where=join(uri, name),
            fix="Run the screen again elsewhere.",
        )
    return data


def _parquet(table: pa.Table) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out, compression="zstd", write_page_checksum=True)
    return out.getvalue()
