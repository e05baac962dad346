"""The files of a screen: Parquet parts for each unit of work, and a record that makes them complete.

    OUTPUT/_plan.json                         what is being computed, written first
    OUTPUT/states.parquet                     the states, when the screen worked them out
    OUTPUT/cell_shifts/unit-000000.parquet    one row per (cell, edit) and per (cell, control of an edit)
    OUTPUT/first_pass/unit-000000.parquet     scores of every gene, in a screen of two passes
    OUTPUT/gene_moments/unit-000000.parquet   sums behind the gene shifts; removed when the screen is complete
    OUTPUT/masked_moments/unit-000000.parquet the same behind the changes of masked genes
    OUTPUT/_units/unit-000000.json            digests and counts of one unit; the last file a unit writes
    OUTPUT/gene_shifts.parquet                per (edit, affected gene), merged from the sums
    OUTPUT/masked_genes.parquet               per (edit, masked gene), merged likewise
    OUTPUT/_screen.json                       counts and digests, written last: without it a screen is not finished

Every name is a function of the plan, so a unit that runs twice writes the same files twice.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from genescale.perturbation.answers import EditAnswer, Readouts
from genescale.perturbation.editing.edit_sets import EditSet
from genescale.perturbation.screening.plan import SCREEN_SCHEMA_VERSION, Plan
from genescale.platform.errors import AlreadyExistsError, InputError, IntegrityError, NotFoundError
from genescale.platform.storage import Store, join

PLAN_FILE, RECORD_FILE, GENE_SHIFTS_FILE = "_plan.json", "_screen.json", "gene_shifts.parquet"
STATES_FILE, MASKED_GENES_FILE = "states.parquet", "masked_genes.parquet"
CELL_SHIFTS, FIRST_PASS, UNITS = "cell_shifts", "first_pass", "_units"
GENE_MOMENTS, MASKED_MOMENTS = "gene_moments", "masked_moments"
OUTCOMES = ("edited", "absent", "undefined")
TOWARD, CLASS = "toward:", "class:"
CELL_FIELDS = [
    pa.field("cell_id", pa.string(), nullable=False),
    pa.field("dataset_id", pa.string(), nullable=False),
    pa.field("source_row", pa.int64(), nullable=False),
    pa.field("cell_type", pa.string()),
    pa.field("donor_id", pa.string()),
    pa.field("n_genes", pa.int32(), nullable=False),  # of the cell, before the edit
]
EDIT_FIELDS = [
    pa.field("edit_id", pa.string(), nullable=False),  # gene ids joined by +, or the name of a set
    pa.field("gene_id", pa.string(), nullable=False),  # gene ids joined by +
    pa.field("symbol", pa.string(), nullable=False),
    pa.field("tokens", pa.list_(pa.int32()), nullable=False),
    pa.field("kind", pa.string(), nullable=False),
    pa.field("role", pa.string(), nullable=False),  # edit or control
    pa.field("control_of", pa.string()),  # the edit that a control was drawn for
    pa.field("chosen", pa.string()),  # top or random, in a screen of two passes
    pa.field("chance", pa.float64()),  # … and how probable it was that the first pass let it through
    pa.field("outcome", pa.string(), nullable=False),  # one of OUTCOMES
    pa.field("found", pa.bool_(), nullable=False),  # the cell has every gene of the edit
    pa.field("rank", pa.int32()),  # of the highest-ranked gene of the edit, 0 = first
    pa.field("cosine", pa.float64()),
    pa.field("shift", pa.float64()),
]
COUNT_FIELDS = [pa.field("n_compared", pa.int32(), nullable=False), pa.field("n_cut", pa.int32(), nullable=False)]


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
    """(cell, edit) pairs, one row of role `edit` each in `cell_shifts`."""
    n_edited: int
    n_absent: int
    """Edits of genes that the cell lacks: shift 0."""
    n_undefined: int
    """Edits after which no gene is left to compare: no shift."""
    n_controls: int
    """Rows of role `control`."""
    n_controls_missing: int
    """Controls that could not be drawn because a cell has too few other genes."""
    n_not_chosen: int
    """(cell, gene) pairs that the first pass of two left out."""
    n_gene_pairs: int
    """Rows of `gene_shifts`."""
    n_gene_pairs_left_out: int
    """Rows that `top_k` and `min_cells` left out."""
    n_units: int
    n_units_reused: int
    """Units that an earlier, interrupted run had finished."""
    n_sequences: int
    """Cells through the encoder, edited or not."""
    left_out: dict[str, int]
    """Cells of the corpus, and names of genes, that the screen leaves out, by reason."""
    seconds: float
    """Of the run that completed the screen."""
    worker_seconds: float
    """Of all units, whichever run computed them."""
    states: dict[str, Any] = field(default_factory=dict)
    """Names of the states, start, goal, and the cells they are means of."""
    classes: list[str] = field(default_factory=list)
    n_masked_pairs: int = 0
    """Rows of `masked_genes`."""
    run_id: str = ""
    """Of the tracked run."""
    parts: dict[str, str] = field(default_factory=dict)
    """sha256 (hex) of each part below the screen's address."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Screen:
    """A finished screen, read back."""

    cell_shifts: pl.DataFrame
    gene_shifts: pl.DataFrame | None
    report: ScreenReport
    masked_genes: pl.DataFrame | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One answer on its way into the table."""

    cell: int
    """Row among the cells of the unit."""
    answer: EditAnswer
    edit_id: str
    symbol: str
    control_of: str | None = None
    chosen: str | None = None
    chance: float | None = None


def outcome_of(answer: EditAnswer) -> str:
    """`edited`, `absent` (an edit that found none of its genes) or `undefined` (nothing left to compare)."""
    if answer.cosine is None:
        return "undefined"
    return "absent" if answer.request.kind != "overexpress" and not answer.found else "edited"


def cell_shifts_schema(readouts: Readouts) -> pa.Schema:
    """Columns of `cell_shifts`: one `toward:` for each state and one `class:` for each class."""
    of_states = [pa.field(f"{TOWARD}{name}", pa.float64()) for name in readouts.state_names]
    of_classes = [pa.field(f"{CLASS}{name}", pa.float64()) for name in readouts.class_names]
    return pa.schema([*CELL_FIELDS, *EDIT_FIELDS, *of_states, *of_classes, *COUNT_FIELDS])


def cell_shifts_table(cells: pl.DataFrame, rows: Sequence[Row], edits: EditSet, readouts: Readouts) -> pa.Table:
    """One row per answer, in their order; `cells` has the columns of CELL_FIELDS."""
    schema = cell_shifts_schema(readouts)
    answers = [row.answer for row in rows]
    ids: dict[tuple[int, ...], str] = {}
    for answer in answers:
        if answer.request.genes not in ids:
            ids[answer.request.genes] = edits.gene_id(answer.request.genes)
    of_cells = cells.select(one.name for one in CELL_FIELDS)[[row.cell for row in rows]].to_arrow()
    columns = {name: of_cells.column(name) for name in of_cells.column_names}
    columns |= {
        "edit_id": [row.edit_id for row in rows],
        "gene_id": [ids[answer.request.genes] for answer in answers],
        "symbol": [row.symbol for row in rows],
        "tokens": [answer.request.genes for answer in answers],
        "kind": [answer.request.kind for answer in answers],
        "role": ["edit" if row.control_of is None else "control" for row in rows],
        "control_of": [row.control_of for row in rows],
        "chosen": [row.chosen for row in rows],
        "chance": [row.chance for row in rows],
        "outcome": [outcome_of(answer) for answer in answers],
        "found": [None not in answer.ranks for answer in answers],
        "rank": [min((rank for rank in answer.ranks if rank is not None), default=None) for answer in answers],
        "cosine": [answer.cosine for answer in answers],
        "shift": [answer.shift for answer in answers],
        "n_compared": [answer.n_compared for answer in answers],
        "n_cut": [answer.n_cut for answer in answers],
    }
    for at, name in enumerate(readouts.state_names):
        columns[f"{TOWARD}{name}"] = [answer.state_shifts[at] for answer in answers]
    for at, name in enumerate(readouts.class_names):
        columns[f"{CLASS}{name}"] = [one.class_changes[at] if one.class_changes else None for one in answers]
    return pa.table([pa.array(columns[one.name], one.type) if isinstance(columns[one.name], list)
                     else columns[one.name].cast(one.type) for one in schema], schema=schema)  # fmt: skip


def unit_file(uri: str, kind: str, unit: int) -> str:
    """Address of one file of a unit; `kind` is the folder."""
    return join(uri, kind, f"unit-{unit:06d}.{'json' if kind == UNITS else 'parquet'}")


def write_unit(uri: str, unit: int, tables: Mapping[str, pa.Table], counts: Mapping[str, Any], store: Store) -> None:
    """Write the tables of a unit by folder, and its mark last."""
    parts = {}
    for kind, table in tables.items():
        data = parquet_bytes(table)
        address = unit_file(uri, kind, unit)
        store.write(address, data)
        parts[f"{kind}/{address.rpartition('/')[2]}"] = hashlib.sha256(data).hexdigest()
    mark = {"unit": unit, "parts": parts, **counts}
    store.write(unit_file(uri, UNITS, unit), json.dumps(mark, sort_keys=True).encode())


def finished_units(uri: str, store: Store) -> set[int]:
    """Numbers of the units that are complete."""
    names = (entry.uri.rpartition("/")[2] for entry in store.list(join(uri, UNITS)))
    return {int(name[5:-5]) for name in names if name.startswith("unit-") and name.endswith(".json")}


def read_mark(uri: str, unit: int, store: Store) -> dict[str, Any]:
    """What a unit said when it was complete."""
    mark: dict[str, Any] = json.loads(store.read(unit_file(uri, UNITS, unit)))
    return mark


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What an earlier run wrote down before it began."""

    identity: Mapping[str, Any]
    tokens_per_unit: int
    run_id: str = ""


def read_claim(uri: str, store: Store) -> Claim | None:
    """The claim on an output, or None when nothing was begun there."""
    try:
        found = json.loads(store.read(join(uri, PLAN_FILE)))
        return Claim(identity=found["identity"], tokens_per_unit=found["tokens_per_unit"], run_id=found["run_id"])
    except NotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError("this is no plan of a screen.", where=join(uri, PLAN_FILE), fix=_OTHER) from error


def claim(plan: Plan, uri: str, store: Store, *, run_id: str = "") -> None:
    """Write the plan down before any unit; InputError when another screen has that address already."""
    content = {"identity": plan.identity, "tokens_per_unit": plan.tokens_per_unit, "run_id": run_id}
    try:
        store.write(join(uri, PLAN_FILE), json.dumps(content, indent=2, sort_keys=True).encode(), if_absent=True)
    except AlreadyExistsError:
        found = read_claim(uri, store)
        assert found is not None
        check_claim(found, plan, uri)


_OTHER = "Choose another output, or give the same model, corpus version and settings to continue it."


def check_claim(found: Claim, plan: Plan, uri: str) -> None:
    """InputError unless the claim is that of this plan."""
    changed = [key for key, value in plan.identity.items() if found.identity.get(key) != value]
    if found.tokens_per_unit != plan.tokens_per_unit:
        changed.append("tokens_per_unit")
    if changed:
        raise InputError(
            f"another screen stands there; it differs in {', '.join(sorted(changed))}.", where=uri, fix=_OTHER
        )


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
            fix="Run `genescale perturb screen` with this output: it continues what is there.",
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
    cells = [
        pl.read_parquet(_read_part(uri, name, digest, store))
        for name, digest in sorted(report.parts.items())
        if name.startswith(f"{CELL_SHIFTS}/")
    ]
    genes, masked = (
        pl.read_parquet(_read_part(uri, name, report.parts[name], store)) if name in report.parts else None
        for name in (GENE_SHIFTS_FILE, MASKED_GENES_FILE)
    )
    return Screen(cell_shifts=pl.concat(cells), gene_shifts=genes, report=report, masked_genes=masked)


def _read_part(uri: str, name: str, digest: str, store: Store) -> io.BytesIO:
    data = store.read(join(uri, name))
    if hashlib.sha256(data).hexdigest() != digest:
        raise IntegrityError(
            "this part is not the one the screen recorded.",
            where=join(uri, name),
            fix="Run the screen again elsewhere.",
        )
    return io.BytesIO(data)


def parquet_bytes(table: pa.Table) -> bytes:
    """A table as one Parquet file with checksums."""
    out = io.BytesIO()
    pq.write_table(table, out, compression="zstd", write_page_checksum=True)
    return out.getvalue()
