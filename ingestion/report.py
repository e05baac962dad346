"""What an ingestion did, per source and in total: every cell that was read is kept or dropped for a reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from genescale.ingestion.plan import Failure
from genescale.ingestion.tokenise import Tally

# What a report says of this run, which no history knows.
NOT_RECALLED = ("uri", "status", "failure", "tally", "seconds")
Status = Literal["ingested", "already_committed", "refused"]


@dataclasses.dataclass(kw_only=True)
class SourceReport:
    """One atlas file: what became of it and of its cells."""

    uri: str
    dataset_id: str
    status: Status
    tally: Tally = dataclasses.field(default_factory=Tally)
    failure: Failure | None = None
    counts_slot: str = ""
    gene_column: str = ""
    genes_mapped: int = 0
    genes_dropped: int = 0
    genes_summed: int = 0
    genes_versioned: int = 0
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    """Work time of the tasks of this source, summed."""

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON."""
        plain = dataclasses.asdict(self)
        return {**plain.pop("tally"), **plain}

    def recall(self, details: Mapping[str, Any]) -> None:
        """Take what the corpus's history says of the source (see `to_dict`)."""
        fields = {field.name for field in dataclasses.fields(Tally)}
        self.tally = Tally(**{key: value for key, value in details.items() if key in fields})
        for field in dataclasses.fields(self):
            if field.name in details and field.name not in NOT_RECALLED:
                setattr(self, field.name, details[field.name])


@dataclasses.dataclass(frozen=True, kw_only=True)
class IngestReport:
    """The whole run; totals count the sources that were ingested now."""

    corpus_uri: str
    version: int | None
    """Version of the corpus after the run; None when there is none because every source was refused."""
    sources: tuple[SourceReport, ...]
    ignored: tuple[str, ...] = ()
    seconds: float = 0.0

    def of(self, status: Status) -> list[SourceReport]:
        """The sources with this outcome."""
        return [source for source in self.sources if source.status == status]

    @property
    def ok(self) -> bool:
        """True when no source was refused."""
        return not self.of("refused")

    @property
    def total(self) -> Tally:
        """Counts over the sources that were ingested now."""
        tally = Tally()
        for source in self.of("ingested"):
            tally.add(source.tally)
        return tally

    @property
    def read(self) -> int:
        """Cells read."""
        return self.total.read

    @property
    def kept(self) -> int:
        """Cells that became rows."""
        return self.total.kept

    @property
    def dropped(self) -> dict[str, int]:
        """Cells that did not, by reason."""
        return self.total.dropped

    @property
    def tokens(self) -> int:
        """Tokens written."""
        return self.total.tokens

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON."""
        return {
            "corpus": self.corpus_uri,
            "version": self.version,
            "seconds": round(self.seconds, 3),
            "total": dataclasses.asdict(self.total),
            "sources": [source.to_dict() for source in self.sources],
            "ignored_files": list(self.ignored),
        }
