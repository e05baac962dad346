"""The Delta Lake table under a corpus: open one version of it, list its files, and commit changes.

This file knows Delta Lake and nothing of cells. A commit adds files, removes files, or both, in one transaction, and
carries numbered transactions: of two writers that take the same number of one name, Delta Lake refuses the later one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, Schema, Transaction
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.transaction import AddAction, RemoveAction

from genescale.ingestion.schema import PARTITION_COLUMN
from genescale.ingestion.table.history import COMMIT_KEY
from genescale.platform.errors import CorpusError
from genescale.platform.storage import Store

# Versions are pinned by training runs for years; Delta's defaults would forget them after thirty days.
RETENTION = {
    "delta.logRetentionDuration": "interval 36500 days",
    "delta.deletedFileRetentionDuration": "interval 36500 days",
}


# What the Delta library raises: its own errors, and a bare OSError when object storage fails under it.
DELTA_ERRORS = (DeltaError, OSError)


class LostRaceError(CorpusError):
    """Another writer changed the table first: look at the newest version and decide anew."""


class BrokenOffError(CorpusError):
    """Storage failed while the log was read or written; a commit may have happened all the same: look, then repeat."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableFile:
    """A file of the table: path within it, rows, bytes, and its partition (empty in a table without partitions)."""

    path: str
    rows: int
    size_bytes: int
    dataset_id: str


class Table:
    """One version of a Delta table."""

    def __init__(self, delta: DeltaTable, uri: str) -> None:
        self.uri, self._delta = uri, delta
        self.version: int = delta.version()
        self.configuration: dict[str, str] = dict(delta.metadata().configuration)
        self.partitioned = bool(delta.metadata().partition_columns)

    def files(self) -> list[TableFile]:
        """The files of this version, by path."""
        with _asking(self.uri):
            actions = pa.table(self._delta.get_add_actions(flatten=True))
        rows, size = actions.column("num_records").to_pylist(), actions.column("size_bytes").to_pylist()
        partition = f"partition.{PARTITION_COLUMN}"
        datasets = actions.column(partition).to_pylist() if self.partitioned else [""] * len(rows)
        found = zip(actions.column("path").to_pylist(), rows, size, datasets, strict=True)
        return [
            TableFile(path=path, rows=n, size_bytes=size_bytes, dataset_id=dataset)
            for path, n, size_bytes, dataset in sorted(found)
        ]

    def transaction_number(self, name: str) -> int:
        """The number that the last transaction of this name had; 0 before the first."""
        with _asking(self.uri):
            return self._delta.transaction_version(name) or 0

    def columns(self) -> list[str]:
        """Names of the columns the table declares."""
        return [field.name for field in self._delta.schema().fields]

    def commit(
        self,
        record: Mapping[str, Any],
        *,
        added: Sequence[TableFile] = (),
        removed: Sequence[TableFile] = (),
        transactions: Iterable[str] = (),
        data_change: bool = True,
    ) -> None:
        """Add and remove files in one transaction on top of this version.

        record: what the history says of it; transactions: names that take their next number; data_change: False when
        the rows are the same as before, only in other files. Raises LostRaceError when another writer changed what this
        commit rests on, CorpusError when storage or the table refuses.
        """
        now_ms = int(datetime.datetime.now(tz=datetime.UTC).timestamp() * 1000)
        actions: list[AddAction | RemoveAction] = [
            AddAction(
                path=file.path,
                size=file.size_bytes,
                partition_values=self._partition(file),
                modification_time=now_ms,
                data_change=data_change,
                stats=json.dumps({"numRecords": file.rows}),
            )
            for file in added
        ]
        actions += [
            RemoveAction(file.path, data_change, now_ms, file.size_bytes, self._partition(file)) for file in removed
        ]
        numbers = [Transaction(name, self.transaction_number(name) + 1) for name in transactions]
        try:
            self._delta.create_write_transaction(
                actions,
                mode="append",
                schema=self._delta.schema(),
                partition_by=[PARTITION_COLUMN] if self.partitioned else [],
                commit_properties=_properties(record, numbers),
            )
        except DELTA_ERRORS as error:
            raise _refused(error, self.uri) from error

    def upgrade(self, schema: pa.Schema, configuration: Mapping[str, str], record: Mapping[str, Any]) -> None:
        """Declare the columns of `schema` that the table lacks (they must be nullable), then set the properties.

        Two commits, in this order, so that a table never claims more than it has. Raises LostRaceError.
        """
        present = set(self.columns())
        missing = [field for field in Schema.from_arrow(schema).fields if field.name not in present]
        try:
            if missing:
                self._delta.alter.add_columns(missing, commit_properties=_properties(record, []))
            self._delta.alter.set_table_properties(
                dict(configuration), raise_if_not_exists=False, commit_properties=_properties(record, [])
            )
        except DELTA_ERRORS as error:
            raise _refused(error, self.uri) from error

    def _partition(self, file: TableFile) -> dict[str, str | None]:
        return {PARTITION_COLUMN: file.dataset_id} if self.partitioned else {}


@contextlib.contextmanager
def _asking(uri: str) -> Iterator[None]:
    """The Delta library reads parts of the log only when they are asked for, so that storage may fail then."""
    try:
        yield
    except DELTA_ERRORS as error:
        raise BrokenOffError(
            f"the table's log cannot be read: {_first_line(error)}.", where=uri, fix="Check the storage, and try again."
        ) from error


def find_table(uri: str, store: Store, *, version: int | None = None) -> Table | None:
    """The table at `uri`, at `version` or the newest; None when there is none.

    Raises CorpusError for a version that does not exist and for a table that cannot be opened.
    """
    try:
        return Table(DeltaTable(uri, version=version, storage_options=store.table_options(uri) or None), uri)
    except TableNotFoundError:
        return None
    except DELTA_ERRORS as error:
        if version is not None and (newest := find_table(uri, store)) is not None and newest.version < version:
            raise CorpusError(
                f"there is no version {version}.", where=uri, fix=f"The newest is {newest.version}."
            ) from error
        raise CorpusError(
            f"the table cannot be opened: {_first_line(error)}.", where=uri, fix="Check the storage, and try again."
        ) from error


def opened_table(uri: str, store: Store, *, version: int | None = None) -> Table:
    """The table at `uri`, which must be there."""
    table = find_table(uri, store, version=version)
    if table is None:
        raise CorpusError("the corpus is gone.", where=uri, fix="Check the address and the storage.")
    return table


def create_table(
    uri: str,
    store: Store,
    schema: pa.Schema,
    *,
    partitioned: bool,
    configuration: Mapping[str, str],
    record: Mapping[str, Any],
) -> None:
    """Make an empty table whose versions are kept; nothing happens when another writer makes it first."""
    try:
        DeltaTable.create(
            uri,
            schema,
            partition_by=[PARTITION_COLUMN] if partitioned else None,
            configuration={**RETENTION, **configuration},
            raise_if_key_not_exists=False,
            storage_options=store.table_options(uri) or None,
            commit_properties=_properties(record, []),
        )
    except DELTA_ERRORS as error:
        if find_table(uri, store) is None:
            raise CorpusError(
                f"the corpus cannot be created: {_first_line(error)}.",
                where=uri,
                fix="Check the storage, and try again.",
            ) from error


def _properties(record: Mapping[str, Any], transactions: list[Transaction]) -> CommitProperties:
    return CommitProperties(custom_metadata={COMMIT_KEY: json.dumps(record)}, app_transactions=transactions)


def _refused(error: DeltaError | OSError, uri: str) -> CorpusError:
    if isinstance(error, OSError):
        return BrokenOffError(f"the commit failed: {_first_line(error)}.", where=uri, fix="Run it again.")
    if isinstance(error, CommitFailedError):
        what = f"another writer changed the corpus at the same moment ({_first_line(error)})."
        return LostRaceError(what, where=uri, fix="Run it again.")
    return CorpusError(f"the commit failed: {_first_line(error)}.", where=uri, fix="Run it again.")


def _first_line(error: Exception) -> str:
    # The library's messages are trees in colour: what failed stands in the first line, why in the last.
    text = re.sub(r"\x1b\[[0-9;]*m|↳", "", str(error)).strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    return ": ".join(dict.fromkeys((lines[0], lines[-1]))).rstrip(".")
