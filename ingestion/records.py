"""What a corpus records about itself: sources, parts, datasets and commits."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from genescale.ingestion.schema import CORPUS_SCHEMA_VERSION, PARTITION_COLUMN


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


def parse_reference(reference: str) -> tuple[str, int | None]:
    """Split `URI@12` into address and version; without a version the second is None."""
    address, mark, version = reference.rpartition("@")
    return (address, int(version)) if mark and version.isdecimal() else (reference, None)


def dataset_folder(dataset_id: str) -> str:
    """Folder of a dataset's parts within the corpus, as every reader of partitioned tables expects it."""
    return f"{PARTITION_COLUMN}={dataset_id}"
