"""A corpus: a Delta Lake table of token rows, partitioned by dataset, with its vocabulary beside it.

One commit adds one source file together with the identity of that source, so a source is in the corpus whole and once,
or not at all. The table's version is the corpus version: an open Corpus is pinned to one, reads it unchanged whatever
is committed later, and travels to Ray workers. Part files that no commit names do not exist for readers.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy.typing as npt
import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, Transaction
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.transaction import AddAction

from genescale.ingestion.history import COMMIT_KEY, read_history
from genescale.ingestion.parts import Part as Part
from genescale.ingestion.parts import PartReader
from genescale.ingestion.records import CommitRecord as CommitRecord
from genescale.ingestion.records import DatasetRecord as DatasetRecord
from genescale.ingestion.records import NewPart as NewPart
from genescale.ingestion.records import Source as Source
from genescale.ingestion.records import dataset_folder as dataset_folder
from genescale.ingestion.records import parse_reference as parse_reference
from genescale.ingestion.schema import (
    CORPUS_SCHEMA_VERSION,
    PARTITION_COLUMN,
    TOKEN_COLUMN,
    corpus_schema,
    table_schema,
)
from genescale.platform.address import parse
from genescale.platform.errors import AlreadyExistsError, CorpusError, IntegrityError, NotFoundError, did_you_mean
from genescale.platform.storage import Store, join
from genescale.platform.vocabulary import Vocabulary, read_vocabulary

VOCABULARY_FILE = ("_genescale", "vocabulary.parquet")
DATASET_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
DEFAULT_CACHE_BYTES = 256 * 1024 * 1024
# Versions are pinned by training runs for years; Delta's defaults would forget them after thirty days.
RETENTION = {
    "delta.logRetentionDuration": "interval 36500 days",
    "delta.deletedFileRetentionDuration": "interval 36500 days",
}
T = TypeVar("T")


class Corpus:
    """A corpus pinned to one version; picklable, and safe to read from several threads."""

    def __init__(self, table: DeltaTable, uri: str, vocabulary: Vocabulary, store: Store, cache_bytes: int) -> None:
        self.uri, self.vocabulary, self.store = uri, vocabulary, store
        self.version: int = table.version()
        self.parts: tuple[Part, ...] = _parts(table, uri)
        self._table: DeltaTable | None = table
        self._reader = PartReader(self.parts, store, vocabulary.token_dtype, cache_bytes)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_table": None}

    @classmethod
    def create(
        cls, uri: str, vocabulary: Vocabulary, store: Store, *, cache_bytes: int = DEFAULT_CACHE_BYTES
    ) -> Corpus:
        """Make an empty corpus, or open the one that is there; CorpusError when that one has another vocabulary."""
        uri = parse(uri).uri
        try:
            store.write(join(uri, *VOCABULARY_FILE), vocabulary.to_parquet_bytes(), if_absent=True)
        except AlreadyExistsError:
            _refuse_other_vocabulary(vocabulary, _stored_vocabulary(uri, store), uri)
        # The vocabulary is there before the table, so a corpus that can be opened is never without one.
        if _table(uri, store) is None:
            _create_table(uri, vocabulary, store)
        return cls.open(uri, store, cache_bytes=cache_bytes)

    @classmethod
    def find(cls, uri: str, vocabulary: Vocabulary, store: Store) -> Corpus | None:
        """The corpus at `uri`, or None when there is none; CorpusError when it has another vocabulary."""
        if _table(parse(uri).uri, store) is None:
            return None
        corpus = cls.open(uri, store)
        _refuse_other_vocabulary(vocabulary, corpus.vocabulary, corpus.uri)
        return corpus

    @classmethod
    def open(
        cls, uri: str, store: Store, *, version: int | None = None, cache_bytes: int = DEFAULT_CACHE_BYTES
    ) -> Corpus:
        """The corpus at `uri` (also written `URI@VERSION`), pinned to `version` or to the newest one.

        cache_bytes: memory that decoded tokens may take in this process. Raises CorpusError when there is no corpus,
        no such version, or it was written by a newer release.
        """
        address, named = parse_reference(uri)
        uri, version = parse(address).uri, version if version is not None else named
        table = _table(uri, store, version=version)
        if table is None:
            raise CorpusError("there is no corpus here.", where=uri, fix="Make one with `genescale ingest`.")
        vocabulary = _stored_vocabulary(uri, store)
        _check_table(table, vocabulary, uri)
        return cls(table, uri, vocabulary, store, cache_bytes)

    # --- reading -----------------------------------------------------------------------------------------------------

    @property
    def schema(self) -> pa.Schema:
        """Columns of a row; `input_ids` in the vocabulary's token type."""
        return corpus_schema(self.vocabulary.token_dtype)

    @property
    def n_cells(self) -> int:
        """Cells in this version."""
        return sum(part.rows for part in self.parts)

    def cells(self, columns: Sequence[str], *, parts: Sequence[int] | None = None) -> pa.Table:
        """Scalar columns of all cells, in global order: parts sorted by path, rows as they stand in them.

        parts: numbers of the parts to read (positions in `self.parts`); None reads all.
        """
        for name in columns:
            if name not in self.schema.names or name == TOKEN_COLUMN:
                known = [column for column in self.schema.names if column != TOKEN_COLUMN]
                hint = "Tokens are read with `tokens`." if name == TOKEN_COLUMN else did_you_mean(name, known)
                raise CorpusError(
                    f"'{name}' is not a scalar column.", where=self.uri, fix=hint or f"Columns: {', '.join(known)}."
                )
        schema = pa.schema([self.schema.field(name) for name in columns])
        return self._reader.scalars(schema, parts)

    def tokens(self, indices: Sequence[int]) -> list[npt.NDArray[Any]]:
        """Token arrays of the cells with these global indices, in that order (read-only, vocabulary.token_dtype)."""
        return self._reader.tokens(indices)

    def datasets(self) -> list[DatasetRecord]:
        """The datasets of this version, by name."""
        cells: dict[str, int] = {}
        for part in self.parts:
            cells[part.dataset_id] = cells.get(part.dataset_id, 0) + part.rows
        newest = {r.dataset_id: r for r in reversed(self.history()) if r.operation == "ingest"}
        return [
            DatasetRecord(
                dataset_id=dataset,
                n_cells=n,
                source_uri=str(newest[dataset].details.get("source", {}).get("uri", "")) if dataset in newest else "",
                source_identity=str(newest[dataset].details.get("identity", "")) if dataset in newest else "",
                added_in_version=newest[dataset].version if dataset in newest else 0,
            )
            for dataset, n in sorted(cells.items())
        ]

    def history(self) -> list[CommitRecord]:
        """Every commit up to this version, newest first."""
        return read_history(self.uri, self.store, self.version)

    # --- changing ----------------------------------------------------------------------------------------------------

    def is_committed(self, source_identity: str) -> bool:
        """Whether this version holds the source with that identity (removed ones do not count)."""
        return _present(self._pinned().transaction_version(_transaction(source_identity)))

    def commit_source(
        self, source: Source, dataset_id: str, parts: Sequence[NewPart], details: Mapping[str, Any]
    ) -> Corpus:
        """Add the parts of one source in one transaction, and return the corpus at the new version.

        details: counts and reasons, kept in the history. Raises CorpusError when the source or the dataset is already
        there, also when another writer commits it at the same moment, and IntegrityError when a part is not as written.
        """
        table = self._newest()
        self._check_commit(table, source, dataset_id, parts)
        modified = int(datetime.datetime.now(tz=datetime.UTC).timestamp() * 1000)
        actions = [
            AddAction(
                path=part.path,
                size=part.size_bytes,
                partition_values={PARTITION_COLUMN: dataset_id},
                modification_time=modified,
                data_change=True,
                stats=json.dumps({"numRecords": part.rows}),
            )
            for part in parts
        ]
        record = {
            "operation": "ingest",
            "dataset_id": dataset_id,
            "identity": source.identity,
            "source": dataclasses.asdict(source),
            **details,
        }
        self._write(
            lambda: table.create_write_transaction(
                actions,
                mode="append",
                schema=table_schema(self.vocabulary.token_dtype),
                partition_by=[PARTITION_COLUMN],
                commit_properties=_properties(record, _next_transactions(table, source.identity, dataset_id)),
            )
        )
        return self.at_newest()

    def remove(self, dataset_id: str) -> Corpus:
        """Withdraw a dataset in one commit; earlier versions still hold it. Returns the corpus at the new version."""
        newest = self.at_newest()
        found = {record.dataset_id: record for record in newest.datasets()}
        if dataset_id not in found:
            hint = did_you_mean(dataset_id, found) or f"Datasets: {', '.join(found) or 'none'}."
            raise CorpusError(f"there is no dataset '{dataset_id}'.", where=self.uri, fix=hint)
        table, identity = self._newest(), found[dataset_id].source_identity
        record = {"operation": "remove", "dataset_id": dataset_id, "cells": found[dataset_id].n_cells}
        self._write(
            lambda: table.delete(
                f"{PARTITION_COLUMN} = '{dataset_id}'",
                commit_properties=_properties(record, _next_transactions(table, identity, dataset_id)),
            )
        )
        return self.at_newest()

    def at_newest(self) -> Corpus:
        """The same corpus at its newest version."""
        table = self._newest()
        _check_table(table, self.vocabulary, self.uri)
        return Corpus(table, self.uri, self.vocabulary, self.store, self._reader.cache_bytes)

    def _check_commit(self, table: DeltaTable, source: Source, dataset_id: str, parts: Sequence[NewPart]) -> None:
        if not DATASET_ID.fullmatch(dataset_id):
            raise CorpusError(
                f"'{dataset_id}' cannot name a dataset.",
                where=self.uri,
                fix="Use up to 100 letters, digits, dots, dashes and underscores.",
            )
        if source.vocabulary_digest != self.vocabulary.digest:
            raise CorpusError("the parts were made with another vocabulary.", where=self.uri, fix="Ingest them again.")
        if _present(table.transaction_version(_transaction(source.identity))):
            raise CorpusError(f"{source.uri} is already in this corpus.", where=self.uri)
        if any(part.dataset_id == dataset_id for part in _parts(table, self.uri)):
            raise CorpusError(
                f"it already holds a dataset '{dataset_id}'.",
                where=self.uri,
                fix=f"Choose another --dataset-id, or run `genescale corpus remove {self.uri} {dataset_id}` first.",
            )
        if not parts:
            raise CorpusError(f"{source.uri} brings no cell.", where=self.uri)
        for part in parts:
            self._check_part(part, dataset_id)

    def _check_part(self, part: NewPart, dataset_id: str) -> None:
        address = join(self.uri, part.path)
        if not part.path.startswith(f"{dataset_folder(dataset_id)}/"):
            raise CorpusError(f"a part of dataset '{dataset_id}' does not stand in its folder.", where=address)
        try:
            size_bytes = self.store.stat(address).size_bytes
        except NotFoundError:
            raise IntegrityError("a part file is gone before its commit.", where=address, fix="Ingest again.") from None
        if size_bytes != part.size_bytes:
            raise IntegrityError(
                f"a part file has {size_bytes:,} bytes, {part.size_bytes:,} were written.",
                where=address,
                fix="Ingest again.",
            )

    def _write(self, commit: Callable[[], T]) -> T:
        try:
            return commit()
        except CommitFailedError as error:
            raise CorpusError(
                f"another writer changed the corpus at the same moment ({error}).", where=self.uri, fix="Run it again."
            ) from error
        except DeltaError as error:
            raise CorpusError(f"the commit failed: {error}.", where=self.uri, fix="Run it again.") from error

    def _pinned(self) -> DeltaTable:
        if self._table is None:
            self._table = _opened(self.uri, self.store, self.version)
        return self._table

    def _newest(self) -> DeltaTable:
        return _opened(self.uri, self.store, None)

    def __repr__(self) -> str:
        return f"Corpus({self.uri}@{self.version}, {self.n_cells:,} cells)"


def _table(uri: str, store: Store, *, version: int | None = None) -> DeltaTable | None:
    """The Delta table, or None when there is none; CorpusError for a version that does not exist."""
    try:
        return DeltaTable(uri, version=version, storage_options=store.table_options(uri) or None)
    except TableNotFoundError:
        return None
    except DeltaError as error:
        if version is not None and (newest := _table(uri, store)) is not None:
            raise CorpusError(
                f"there is no version {version}.", where=uri, fix=f"The newest is {newest.version()}."
            ) from error
        raise CorpusError(f"the table cannot be opened: {error}.", where=uri) from error


def _opened(uri: str, store: Store, version: int | None) -> DeltaTable:
    table = _table(uri, store, version=version)
    if table is None:
        raise CorpusError("the corpus is gone.", where=uri)
    return table


def _check_table(table: DeltaTable, vocabulary: Vocabulary, uri: str) -> None:
    configuration = table.metadata().configuration
    if int(configuration.get("genescale.schemaVersion", 0)) > CORPUS_SCHEMA_VERSION:
        raise CorpusError("a newer release of Genescale wrote this corpus.", where=uri, fix="Upgrade Genescale.")
    if configuration.get("genescale.vocabularyDigest") != vocabulary.digest:
        raise IntegrityError(
            "the vocabulary beside the table is not the one it was made with.",
            where=join(uri, *VOCABULARY_FILE),
            fix="Restore that file: tokens mean nothing without it.",
        )


def _create_table(uri: str, vocabulary: Vocabulary, store: Store) -> None:
    configuration = {
        **RETENTION,
        "genescale.schemaVersion": str(CORPUS_SCHEMA_VERSION),
        "genescale.vocabularyDigest": vocabulary.digest,
    }
    try:
        DeltaTable.create(
            uri,
            table_schema(vocabulary.token_dtype),
            partition_by=[PARTITION_COLUMN],
            configuration=configuration,
            raise_if_key_not_exists=False,
            storage_options=store.table_options(uri) or None,
            commit_properties=_properties({"operation": "create", "vocabulary": vocabulary.name}, []),
        )
    except DeltaError as error:
        if _table(uri, store) is None:  # otherwise another writer created it first, which is as good
            raise CorpusError(f"the corpus cannot be created: {error}.", where=uri) from error


def _stored_vocabulary(uri: str, store: Store) -> Vocabulary:
    address = join(uri, *VOCABULARY_FILE)
    try:
        return read_vocabulary(address, store)
    except NotFoundError:
        raise CorpusError("the corpus has lost its vocabulary.", where=address, fix="Restore that file.") from None


def _refuse_other_vocabulary(given: Vocabulary, stored: Vocabulary, uri: str) -> None:
    if given != stored:
        raise CorpusError(
            f"the corpus was made with the vocabulary {stored!r}, not {given!r}; tokens of two cannot be mixed.",
            where=uri,
            fix="Use the corpus's own vocabulary (_genescale/vocabulary.parquet in it), or another corpus.",
        )


def _parts(table: DeltaTable, uri: str) -> tuple[Part, ...]:
    actions = pa.table(table.get_add_actions(flatten=True))
    columns = [actions.column(name).to_pylist() for name in ("path", "num_records", f"partition.{PARTITION_COLUMN}")]
    return tuple(
        Part(uri=join(uri, path), rows=rows, dataset_id=dataset)
        for path, rows, dataset in sorted(zip(*columns, strict=True))
    )


def _properties(record: Mapping[str, Any], transactions: list[Transaction]) -> CommitProperties:
    return CommitProperties(custom_metadata={COMMIT_KEY: json.dumps(record)}, app_transactions=transactions)


def _transaction(source_identity: str) -> str:
    return f"genescale/source/{source_identity}"


def _next_transactions(table: DeltaTable, source_identity: str, dataset_id: str) -> list[Transaction]:
    """Numbers for the source and the dataset: of two writers that take the same number, Delta refuses the later one."""
    names = (_transaction(source_identity), f"genescale/dataset/{dataset_id}")
    return [Transaction(name, (table.transaction_version(name) or 0) + 1) for name in names]


def _present(number: int | None) -> bool:
    """A source's transaction number is odd while it is in the corpus and even after it was removed."""
    return number is not None and number % 2 == 1
