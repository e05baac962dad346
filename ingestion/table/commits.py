"""Changes of a corpus: each is one transaction on top of the newest version, decided anew when another writer is first.

Two writers of different datasets both land, one after the other. Of two writers of one source or one dataset the later
one is refused, and is told so.
"""

from __future__ import annotations

import dataclasses
import random
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from genescale.ingestion.schema import CORPUS_SCHEMA_VERSION, table_schema
from genescale.ingestion.table.delta_table import BrokenOffError, LostRaceError, Table, TableFile, opened_table
from genescale.ingestion.table.history import read_history
from genescale.ingestion.table.records import NewPart, Source, dataset_folder
from genescale.ingestion.table.source_files import write_source_files
from genescale.platform.errors import CorpusError, IntegrityError, NotFoundError
from genescale.platform.storage import Store, join

if TYPE_CHECKING:
    from genescale.ingestion.corpus import Corpus

DATASET_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
SCHEMA_VERSION_KEY = "genescale.schemaVersion"
# Every lost race means that another writer succeeded, so this many only run out under dozens of writers at once.
ATTEMPTS = 40
# The Delta library does not repeat a commit that storage breaks off, because it may have happened; `apply` looks.
BROKEN_OFF_ATTEMPTS = 4
LONGEST_PAUSE_S = 2.0
STATS_AT_ONCE = 16
_MARK = "commit"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """One transaction: what the history says of it, the files it adds and removes, and the names it numbers."""

    record: Mapping[str, Any]
    added: Sequence[TableFile] = ()
    removed: Sequence[TableFile] = ()
    transactions: Sequence[str] = ()
    data_change: bool = True


def apply(uri: str, store: Store, decide: Callable[[Table], Change]) -> None:
    """Commit what `decide` makes of the newest version; when another writer is first, decide again on its version.

    Raises what `decide` raises, and CorpusError when storage refuses or other writers were first at every attempt.
    """
    mark, lost, broken_off, began = secrets.token_hex(8), False, 0, -1
    for attempt in range(ATTEMPTS):
        table = opened_table(uri, store)
        began = table.version if attempt == 0 else began
        try:
            change = _decided(table, decide, lost=lost)
            if _commit(table, change, mark):
                return
        except CorpusError as error:
            # An answer that was lost on the way looks like a lost race, or like a failure, and was neither. Storage may
            # also carry out late what it broke off, so that an attempt finds the change of an earlier one.
            if _landed(uri, store, began, mark):
                return
            broken_off += isinstance(error, BrokenOffError)
            if not isinstance(error, LostRaceError | BrokenOffError) or broken_off == BROKEN_OFF_ATTEMPTS:
                raise
            lost = lost or isinstance(error, LostRaceError)
            time.sleep(random.SystemRandom().uniform(0, min(LONGEST_PAUSE_S, 0.02 * 2**attempt)))
    raise CorpusError(
        f"other writers were first {ATTEMPTS} times in a row.", where=uri, fix="Run it again when fewer write to it."
    )


def _decided(table: Table, decide: Callable[[Table], Change], *, lost: bool) -> Change:
    """What to commit; when another writer was first, its being there may be what speaks against it."""
    try:
        return decide(table)
    except BrokenOffError:
        raise
    except CorpusError as error:
        raise _beaten(error) if lost else error from None


def commit_source(
    corpus: Corpus,
    source: Source,
    dataset_id: str,
    parts: Sequence[NewPart],
    details: Mapping[str, Any],
    *,
    files: Mapping[str, bytes],
    replace: bool,
) -> None:
    """Add the parts of one source in one transaction; see `Corpus.commit_source`."""
    check_source(corpus, source, dataset_id, parts)
    _refuse_if_there(corpus, opened_table(corpus.uri, corpus.store), source, dataset_id, replace)
    check_parts(corpus, parts)
    recorded = write_source_files(corpus.uri, source.identity, files, corpus.store)
    new = [TableFile(**dataclasses.asdict(part), dataset_id=dataset_id) for part in parts]

    def decide(table: Table) -> Change:
        _refuse_if_there(corpus, table, source, dataset_id, replace)
        old = [file for file in table.files() if file.dataset_id == dataset_id]
        record = {
            "operation": "ingest",
            "dataset_id": dataset_id,
            "identity": source.identity,
            "source": dataclasses.asdict(source),
            **details,
            **({"files": recorded} if recorded else {}),
        }
        names = [transaction_name(source.identity), f"genescale/dataset/{dataset_id}"]
        if old:
            replaced = corpus.pinned_to(table).dataset(dataset_id)
            record["replaces"] = {"identity": replaced.source_identity, "version": replaced.added_in_version}
            names += [transaction_name(replaced.source_identity)] if replaced.source_identity else []
        # A part that is the same before and after has the same name, and one commit cannot both add and remove it.
        both = set(old) & set(new)
        added, removed = ([file for file in files if file not in both] for files in (new, old))
        return Change(record=record, added=added, removed=removed, transactions=names)

    apply(corpus.uri, corpus.store, decide)


def remove_dataset(corpus: Corpus, dataset_id: str) -> None:
    """Withdraw a dataset in one transaction; see `Corpus.remove`."""

    def decide(table: Table) -> Change:
        newest = corpus.pinned_to(table)
        newest.refuse_shuffled("a dataset cannot be removed from it")
        record = newest.dataset(dataset_id)
        names = [transaction_name(record.source_identity)] if record.source_identity else []
        return Change(
            record={"operation": "remove", "dataset_id": dataset_id, "cells": record.n_cells},
            removed=[file for file in table.files() if file.dataset_id == dataset_id],
            transactions=[*names, f"genescale/dataset/{dataset_id}"],
        )

    apply(corpus.uri, corpus.store, decide)


def check_parts(corpus: Corpus, parts: Sequence[NewPart]) -> None:
    """IntegrityError unless every part stands where it should with the bytes that were written."""

    def check(part: NewPart) -> None:
        address = join(corpus.uri, part.path)
        try:
            size_bytes = corpus.store.stat(address).size_bytes
        except NotFoundError:
            raise IntegrityError("a part file is gone before its commit.", where=address, fix="Run it again.") from None
        if size_bytes != part.size_bytes:
            raise IntegrityError(
                f"a part file has {size_bytes:,} bytes, {part.size_bytes:,} were written.",
                where=address,
                fix="Run it again.",
            )

    with ThreadPoolExecutor(STATS_AT_ONCE) as pool:
        list(pool.map(check, parts))


def check_source(corpus: Corpus, source: Source, dataset_id: str, parts: Sequence[NewPart]) -> None:
    """CorpusError for what can never be committed: a name, a vocabulary or parts that do not fit."""
    corpus.refuse_shuffled("a source cannot be added to it")
    if not DATASET_ID.fullmatch(dataset_id):
        raise CorpusError(
            f"'{dataset_id}' cannot name a dataset.",
            where=corpus.uri,
            fix="Use up to 100 letters, digits, dots, dashes and underscores.",
        )
    if source.vocabulary_digest != corpus.vocabulary.digest:
        raise CorpusError("the parts were made with another vocabulary.", where=corpus.uri, fix="Ingest them again.")
    if not parts:
        raise CorpusError(f"{source.uri} brings no cell.", where=corpus.uri, fix="See its report for the reasons.")
    for part in parts:
        if not part.path.startswith(f"{dataset_folder(dataset_id)}/"):
            address = join(corpus.uri, part.path)
            raise CorpusError(f"a part of dataset '{dataset_id}' does not stand in its folder.", where=address)


def transaction_name(source_identity: str) -> str:
    """The name under which transactions of one source are numbered."""
    return f"genescale/source/{source_identity}"


def present(number: int) -> bool:
    """A source's transaction number is odd while it is in the corpus and even after it has left."""
    return number % 2 == 1


def _refuse_if_there(corpus: Corpus, table: Table, source: Source, dataset_id: str, replace: bool) -> None:
    if present(table.transaction_number(transaction_name(source.identity))):
        raise CorpusError(
            f"{source.uri} is already in this corpus.", where=corpus.uri, fix="Nothing has to be done for it."
        )
    if not replace and any(file.dataset_id == dataset_id for file in table.files()):
        raise CorpusError(
            f"it already holds a dataset '{dataset_id}'.",
            where=corpus.uri,
            fix=f"Choose another --dataset-id, replace it with --replace, or run "
            f"`genescale corpus remove {corpus.uri} {dataset_id}` first.",
        )


def _commit(table: Table, change: Change, mark: str) -> bool:
    """Commit the change, or upgrade the table of an earlier release first and return False."""
    if int(table.configuration.get(SCHEMA_VERSION_KEY, 0)) < CORPUS_SCHEMA_VERSION:
        # Only columns that the table lacks are added, and `input_ids` is never among them.
        record = {"operation": "upgrade", "schema_version": CORPUS_SCHEMA_VERSION}
        table.upgrade(table_schema(np.uint16), {SCHEMA_VERSION_KEY: str(CORPUS_SCHEMA_VERSION)}, record)
        return False
    table.commit(
        {**change.record, _MARK: mark},
        added=change.added,
        removed=change.removed,
        transactions=change.transactions,
        data_change=change.data_change,
    )
    return True


def _landed(uri: str, store: Store, after: int, mark: str) -> bool:
    newest = opened_table(uri, store).version
    return any(record.details.get(_MARK) == mark for record in read_history(uri, store, newest, after=after))


def _beaten(error: CorpusError) -> CorpusError:
    return CorpusError(f"another writer was first: {error.what}", where=error.where, fix=error.fix)
