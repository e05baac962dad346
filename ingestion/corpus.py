"""A corpus: a Delta Lake table of token rows, partitioned by dataset, with its vocabulary beside it.

One commit adds one source file together with the identity of that source, so a source is in the corpus whole and once,
or not at all. The table's version is the corpus version: an open Corpus is pinned to one, reads it unchanged whatever
is committed later, and travels to Ray workers. Part files that no commit names do not exist for readers.

A corpus has one of two layouts. `datasets`: what ingestion writes; a part holds cells of one dataset. `shuffled`: what
`genescale corpus shuffle` makes of one for training; every part holds cells of all datasets, the dataset is a stored
column, `Part.dataset_id` is empty, and it only changes by being shuffled again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy.typing as npt
import pyarrow as pa

from genescale.ingestion.schema import CORPUS_SCHEMA_VERSION, TOKEN_COLUMN, corpus_schema, table_schema
from genescale.ingestion.table import commits
from genescale.ingestion.table.commits import SCHEMA_VERSION_KEY
from genescale.ingestion.table.delta_table import Table, create_table, find_table, opened_table
from genescale.ingestion.table.history import read_history
from genescale.ingestion.table.parts import LABEL_PREFIX, PartReader
from genescale.ingestion.table.parts import Part as Part
from genescale.ingestion.table.records import CommitRecord as CommitRecord
from genescale.ingestion.table.records import DatasetRecord as DatasetRecord
from genescale.ingestion.table.records import NewPart as NewPart
from genescale.ingestion.table.records import Source as Source
from genescale.ingestion.table.records import dataset_folder as dataset_folder
from genescale.ingestion.table.records import dataset_records
from genescale.ingestion.table.records import parse_reference as parse_reference
from genescale.ingestion.table.source_files import read_recorded
from genescale.platform.address import parse
from genescale.platform.errors import AlreadyExistsError, CorpusError, IntegrityError, NotFoundError, did_you_mean
from genescale.platform.storage import Store, join
from genescale.platform.vocabulary import Vocabulary, read_vocabulary

VOCABULARY_FILE = ("_genescale", "vocabulary.parquet")
VOCABULARY_KEY, VOCABULARY_FILE_KEY = "genescale.vocabularyDigest", "genescale.vocabularyFileSha256"
LAYOUT_KEY = "genescale.layout"
DEFAULT_CACHE_BYTES = 256 * 1024 * 1024
Layout = Literal["datasets", "shuffled"]


class Corpus:
    """A corpus pinned to one version; picklable, and safe to read from several threads."""

    def __init__(self, table: Table, uri: str, vocabulary: Vocabulary, store: Store, cache_bytes: int) -> None:
        self.uri, self.vocabulary, self.store = uri, vocabulary, store
        self.version: int = table.version
        self.layout: Layout = "shuffled" if table.configuration.get(LAYOUT_KEY) == "shuffled" else "datasets"
        self.schema_version = int(table.configuration.get(SCHEMA_VERSION_KEY, 0))
        self.vocabulary_sha256 = table.configuration.get(VOCABULARY_FILE_KEY, "")
        """Digest of the vocabulary's file; empty in a corpus of the first release."""
        self.files = tuple(table.files())
        """The part files of this version, by path."""
        self.parts: tuple[Part, ...] = tuple(
            Part(uri=join(uri, file.path), rows=file.rows, dataset_id=file.dataset_id) for file in self.files
        )
        self._table: Table | None = table
        self._reader = PartReader(self.parts, store, vocabulary.token_dtype, cache_bytes)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_table": None}

    @classmethod
    def create(
        cls,
        uri: str,
        vocabulary: Vocabulary,
        store: Store,
        *,
        layout: Layout = "datasets",
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> Corpus:
        """Make an empty corpus, or open the one that is there; CorpusError when that one has another vocabulary."""
        uri = parse(uri).uri
        try:
            store.write(join(uri, *VOCABULARY_FILE), vocabulary.to_parquet_bytes(), if_absent=True)
        except AlreadyExistsError:
            _refuse_other_vocabulary(vocabulary, _stored_vocabulary(uri, store), uri)
        # The vocabulary is there before the table, so a corpus that can be opened is never without one.
        if find_table(uri, store) is None:
            _create(uri, vocabulary, store, layout)
        corpus = cls.open(uri, store, cache_bytes=cache_bytes)
        if corpus.layout != layout:
            raise CorpusError(f"its layout is '{corpus.layout}'.", where=uri, fix="Choose another address.")
        return corpus

    @classmethod
    def find(cls, uri: str, vocabulary: Vocabulary, store: Store) -> Corpus | None:
        """The corpus at `uri` to add sources to, or None when there is none.

        Raises CorpusError when it has another vocabulary, and when it is a shuffled one.
        """
        if find_table(parse(uri).uri, store) is None:
            return None
        corpus = cls.open(uri, store)
        _refuse_other_vocabulary(vocabulary, corpus.vocabulary, corpus.uri)
        corpus.refuse_shuffled("a source cannot be added to it")
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
        table = find_table(uri, store, version=version)
        if table is None:
            raise CorpusError("there is no corpus here.", where=uri, fix="Make one with `genescale ingest`.")
        vocabulary = _stored_vocabulary(uri, store)
        _check_table(table, vocabulary, uri)
        return cls(table, uri, vocabulary, store, cache_bytes)

    # --- reading -----------------------------------------------------------------------------------------------------

    @property
    def schema(self) -> pa.Schema:
        """Columns of a row; `input_ids` in the vocabulary's token type. Parts of earlier releases read as null."""
        return corpus_schema(self.vocabulary.token_dtype)

    @property
    def n_cells(self) -> int:
        """Cells in this version."""
        return sum(part.rows for part in self.parts)

    @property
    def size_bytes(self) -> int:
        """Bytes of the part files of this version."""
        return sum(file.size_bytes for file in self.files)

    def cells(self, columns: Sequence[str], *, parts: Sequence[int] | None = None) -> pa.Table:
        """Scalar columns of all cells, in global order: parts sorted by path, rows as they stand in them.

        columns: names of the schema; `labels.NAME` gives one of the further obs columns (null where a cell has none).
        parts: numbers of the parts to read (positions in `self.parts`); None reads all.
        """
        schema = pa.schema([self._scalar(name) for name in columns])
        return self._reader.scalars(schema, parts)

    def tokens(self, indices: Sequence[int]) -> list[npt.NDArray[Any]]:
        """Token arrays of the cells with these global indices, in that order (read-only, vocabulary.token_dtype)."""
        return self._reader.tokens(indices)

    def datasets(self) -> list[DatasetRecord]:
        """The datasets of this version, by name."""
        return dataset_records(self.files, self.history(), shuffled=self.layout == "shuffled")

    def dataset(self, dataset_id: str) -> DatasetRecord:
        """One dataset of this version; CorpusError when it is not there."""
        found = {record.dataset_id: record for record in self.datasets()}
        if dataset_id not in found:
            hint = did_you_mean(dataset_id, found) or f"Datasets: {', '.join(found) or 'none'}."
            raise CorpusError(f"there is no dataset '{dataset_id}'.", where=self.uri, fix=hint)
        return found[dataset_id]

    def history(self) -> list[CommitRecord]:
        """Every commit up to this version, newest first."""
        return read_history(self.uri, self.store, self.version)

    def source_files(self, dataset_id: str) -> Mapping[str, Mapping[str, Any]]:
        """Files that were committed with a dataset: name -> path, size_bytes, sha256."""
        files = self.dataset(dataset_id).details.get("files", {})
        return files if isinstance(files, Mapping) else {}

    def read_source_file(self, dataset_id: str, name: str) -> bytes:
        """Content of a file that was committed with a dataset, such as `report.json`.

        Raises CorpusError when there is none of that name, IntegrityError when it is not what was committed.
        """
        files = self.source_files(dataset_id)
        if name not in files:
            hint = did_you_mean(name, files) or f"Files: {', '.join(sorted(files)) or 'none'}."
            raise CorpusError(f"dataset '{dataset_id}' has no file '{name}'.", where=self.uri, fix=hint)
        return read_recorded(self.uri, files[name], self.store)

    # --- changing ----------------------------------------------------------------------------------------------------

    def is_committed(self, source_identity: str) -> bool:
        """Whether this version holds the source with that identity (removed ones do not count)."""
        return commits.present(self._pinned().transaction_number(commits.transaction_name(source_identity)))

    def commit_source(
        self,
        source: Source,
        dataset_id: str,
        parts: Sequence[NewPart],
        details: Mapping[str, Any],
        *,
        files: Mapping[str, bytes] = {},
        replace: bool = False,
    ) -> Corpus:
        """Add the parts of one source in one transaction, and return the corpus at the new version.

        details: counts and reasons, kept in the history; files: name -> content, stored before the transaction and
        named by it; replace: a dataset of this name leaves in the same transaction, and earlier versions still hold
        it. Raises CorpusError when the source, or without `replace` the dataset, is already there, also when another
        writer commits it at the same moment, and IntegrityError when a part is not as written.
        """
        commits.commit_source(self, source, dataset_id, parts, details, files=files, replace=replace)
        return self.at_newest()

    def remove(self, dataset_id: str) -> Corpus:
        """Withdraw a dataset in one commit; earlier versions still hold it. Returns the corpus at the new version."""
        commits.remove_dataset(self, dataset_id)
        return self.at_newest()

    def at_newest(self) -> Corpus:
        """The same corpus at its newest version."""
        return self.pinned_to(opened_table(self.uri, self.store))

    def pinned_to(self, table: Table) -> Corpus:
        """The same corpus at the version of `table`."""
        _check_table(table, self.vocabulary, self.uri)
        return Corpus(table, self.uri, self.vocabulary, self.store, self._reader.cache_bytes)

    def refuse_shuffled(self, what: str) -> None:
        """CorpusError when this corpus is a shuffled one."""
        if self.layout == "shuffled":
            raise CorpusError(
                f"this is a shuffled corpus: {what}.",
                where=self.uri,
                fix="Change the corpus it was made from, and run `genescale corpus shuffle` again.",
            )

    def _scalar(self, name: str) -> pa.Field:
        if name.startswith(LABEL_PREFIX) and len(name) > len(LABEL_PREFIX):
            return pa.field(name, pa.string())
        if name in self.schema.names and name != TOKEN_COLUMN:
            return self.schema.field(name)
        known = [column for column in self.schema.names if column != TOKEN_COLUMN]
        hint = "Tokens are read with `tokens`." if name == TOKEN_COLUMN else did_you_mean(name, known)
        fix = hint or f"Columns: {', '.join(known)}, and labels.NAME."
        raise CorpusError(f"'{name}' is not a scalar column.", where=self.uri, fix=fix)

    def _pinned(self) -> Table:
        if self._table is None:
            self._table = opened_table(self.uri, self.store, version=self.version)
        return self._table

    def __repr__(self) -> str:
        return f"Corpus({self.uri}@{self.version}, {self.n_cells:,} cells)"


def _check_table(table: Table, vocabulary: Vocabulary, uri: str) -> None:
    if int(table.configuration.get(SCHEMA_VERSION_KEY, 0)) > CORPUS_SCHEMA_VERSION:
        raise CorpusError("a newer release of Genescale wrote this corpus.", where=uri, fix="Upgrade Genescale.")
    if table.configuration.get(VOCABULARY_KEY) != vocabulary.digest:
        raise IntegrityError(
            "the vocabulary beside the table is not the one it was made with.",
            where=join(uri, *VOCABULARY_FILE),
            fix="Restore that file: tokens mean nothing without it.",
        )


def _create(uri: str, vocabulary: Vocabulary, store: Store, layout: Layout) -> None:
    stored = store.read(join(uri, *VOCABULARY_FILE))
    configuration = {
        SCHEMA_VERSION_KEY: str(CORPUS_SCHEMA_VERSION),
        VOCABULARY_KEY: vocabulary.digest,
        VOCABULARY_FILE_KEY: hashlib.sha256(stored).hexdigest(),
    }
    create_table(
        uri,
        store,
        table_schema(vocabulary.token_dtype),
        partitioned=layout == "datasets",
        configuration={**configuration, **({} if layout == "datasets" else {LAYOUT_KEY: layout})},
        record={"operation": "create", "vocabulary": vocabulary.name},
    )


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
