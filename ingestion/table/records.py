"""What a corpus records about itself: sources, parts, datasets and commits."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from genescale.ingestion.schema import CORPUS_SCHEMA_VERSION, PARTITION_COLUMN

if TYPE_CHECKING:
    from genescale.ingestion.table.delta_table import TableFile


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """One atlas file and everything that decides the tokens made from it."""

    uri: str
    size_bytes: int
    etag: str
    vocabulary_digest: str
    recipe: Mapping[str, Any]
    """Options of ingestion that change rows."""
    schema_version: int = CORPUS_SCHEMA_VERSION

    @property
    def identity(self) -> str:
        """sha256 (hex) of all fields: the same source with the same recipe has the same identity."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class NewPart:
    """A part file that was written but not committed: path within the corpus, rows, bytes."""

    path: str
    rows: int
    size_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommitRecord:
    """One version of the corpus: what was done, when (UTC), to which dataset, with which counts."""

    version: int
    time: datetime.datetime
    operation: str
    dataset_id: str = ""
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetRecord:
    """One dataset of the corpus: its cells and where they came from."""

    dataset_id: str
    n_cells: int
    source_uri: str
    source_identity: str
    added_in_version: int
    source_etag: str = ""
    n_parts: int = 0
    size_bytes: int = 0
    """Bytes of its part files; 0 in a shuffled corpus, where datasets share files."""
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What the history says of the commit that brought it."""


def parse_reference(reference: str) -> tuple[str, int | None]:
    """Split `URI@12` into address and version; without a version the second is None."""
    address, mark, version = reference.rpartition("@")
    return (address, int(version)) if mark and version.isdecimal() else (reference, None)


def dataset_folder(dataset_id: str) -> str:
    """Folder of a dataset's parts within the corpus, as every reader of partitioned tables expects it."""
    return f"{PARTITION_COLUMN}={dataset_id}"


def dataset_records(
    files: Sequence[TableFile], history: Sequence[CommitRecord], *, shuffled: bool
) -> list[DatasetRecord]:
    """The datasets of a version, by name, from its part files and its history (newest first)."""
    return _shuffled_records(history) if shuffled else _ingested_records(files, history)


def _ingested_records(files: Sequence[TableFile], history: Sequence[CommitRecord]) -> list[DatasetRecord]:
    held: dict[str, list[TableFile]] = {}
    for file in files:
        held.setdefault(file.dataset_id, []).append(file)
    newest = {record.dataset_id: record for record in reversed(history) if record.operation == "ingest"}
    nothing = CommitRecord(version=0, time=datetime.datetime.fromtimestamp(0, tz=datetime.UTC), operation="")
    return [_ingested(dataset, held[dataset], newest.get(dataset, nothing)) for dataset in sorted(held)]


def _ingested(dataset_id: str, files: Sequence[TableFile], commit: CommitRecord) -> DatasetRecord:
    source = commit.details.get("source", {})
    return DatasetRecord(
        dataset_id=dataset_id,
        n_cells=sum(file.rows for file in files),
        source_uri=str(source.get("uri", "")),
        source_identity=str(commit.details.get("identity", "")),
        added_in_version=commit.version,
        source_etag=str(source.get("etag", "")),
        n_parts=len(files),
        size_bytes=sum(file.size_bytes for file in files),
        details=commit.details,
    )


def _shuffled_records(history: Sequence[CommitRecord]) -> list[DatasetRecord]:
    """What the shuffles since the last rebuild brought in."""
    found: list[DatasetRecord] = []
    for commit in history:
        if commit.operation != "shuffle":
            continue
        for dataset, facts in commit.details["datasets"].items():
            source = facts.get("source", {})
            found.append(
                DatasetRecord(
                    dataset_id=dataset,
                    n_cells=int(facts["kept"]),
                    source_uri=str(source.get("uri", "")),
                    source_identity=str(facts["identity"]),
                    added_in_version=commit.version,
                    source_etag=str(source.get("etag", "")),
                    details=facts,
                )
            )
        if commit.details.get("rebuilt"):
            break
    return sorted(found, key=lambda record: record.dataset_id)
