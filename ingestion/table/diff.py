"""What differs between two versions of a corpus, or between two corpora of one vocabulary: by dataset, with reasons."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from genescale.ingestion.corpus import Corpus
from genescale.ingestion.table.records import DatasetRecord
from genescale.platform.errors import CorpusError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetChange:
    """A dataset that both sides have, made from different sources or with different options."""

    dataset_id: str
    cells: tuple[int, int]
    """Cells before and after."""
    source: Mapping[str, tuple[Any, Any]]
    """What differs of the source file: `uri`, `size_bytes`, `etag` or `schema_version`."""
    options: Mapping[str, tuple[Any, Any]]
    """Options of ingestion that differ; None where one side left it at its default."""

    @property
    def reasons(self) -> str:
        """What differs, in words."""
        named = {
            "uri": "another file",
            "size_bytes": "other size",
            "etag": "other content",
            "schema_version": "release",
        }
        texts = [named[name] for name in self.source if name in named]
        return ", ".join(texts + [f"{name}: {old} -> {new}" for name, (old, new) in self.options.items()])


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorpusDiff:
    """From `before` to `after`: datasets by what became of them."""

    before: str
    after: str
    cells: tuple[int, int]
    added: tuple[DatasetRecord, ...]
    removed: tuple[DatasetRecord, ...]
    changed: tuple[DatasetChange, ...]
    unchanged: tuple[str, ...]

    @property
    def same(self) -> bool:
        """True when both hold the same datasets from the same sources."""
        return not (self.added or self.removed or self.changed)

    def to_dict(self) -> dict[str, Any]:
        """The difference as JSON."""

        def plain(record: DatasetRecord) -> dict[str, Any]:
            return {"dataset_id": record.dataset_id, "cells": record.n_cells, "source": record.source_uri}

        return {
            "before": self.before,
            "after": self.after,
            "cells": list(self.cells),
            "added": [plain(record) for record in self.added],
            "removed": [plain(record) for record in self.removed],
            "changed": [dataclasses.asdict(change) for change in self.changed],
            "unchanged": list(self.unchanged),
        }


def compare(before: Corpus, after: Corpus) -> CorpusDiff:
    """What changed from one version to the other; CorpusError when they have different vocabularies."""
    if before.vocabulary.digest != after.vocabulary.digest:
        raise CorpusError(
            f"the corpora have different vocabularies: {before.vocabulary!r} and {after.vocabulary!r}.",
            where=after.uri,
            fix="Tokens of two vocabularies cannot be compared; ingest one of them again.",
        )
    old = {record.dataset_id: record for record in before.datasets()}
    new = {record.dataset_id: record for record in after.datasets()}
    both = sorted(old.keys() & new.keys())
    return CorpusDiff(
        before=f"{before.uri}@{before.version}",
        after=f"{after.uri}@{after.version}",
        cells=(before.n_cells, after.n_cells),
        added=tuple(new[name] for name in sorted(new.keys() - old.keys())),
        removed=tuple(old[name] for name in sorted(old.keys() - new.keys())),
        changed=tuple(_change(old[name], new[name]) for name in both if not _equal(old[name], new[name])),
        unchanged=tuple(name for name in both if _equal(old[name], new[name])),
    )


def _equal(old: DatasetRecord, new: DatasetRecord) -> bool:
    return old.source_identity == new.source_identity and old.n_cells == new.n_cells


def _change(old: DatasetRecord, new: DatasetRecord) -> DatasetChange:
    before, after = old.details.get("source", {}), new.details.get("source", {})
    facts = ("uri", "size_bytes", "etag", "schema_version")
    return DatasetChange(
        dataset_id=old.dataset_id,
        cells=(old.n_cells, new.n_cells),
        source=_differing({name: before.get(name) for name in facts}, {name: after.get(name) for name in facts}),
        options=_differing(before.get("recipe", {}), after.get("recipe", {})),
    )


def _differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = sorted(before.keys() | after.keys())
    return {name: (before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)}
