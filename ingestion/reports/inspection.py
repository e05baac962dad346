"""What ingestion would do with a file, found out by doing it with some of its cells and keeping nothing.

The cells that are looked at go through the same code as in an ingest: they are read, proved, mapped, filtered, ranked
and written, to a scratch folder that is removed. What holds for the whole file (format, slot, genes) is exact; cells,
tokens, bytes and time are scaled up from the sample, or exact when all cells were read.

Axis suffix: `n` cells.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from genescale.ingestion.annotation.gene_table import GeneTable
from genescale.ingestion.annotation.genes import GeneMap, map_genes
from genescale.ingestion.annotation.obs_columns import TARGETS, filled_from, summed_notes
from genescale.ingestion.atlas import Atlas
from genescale.ingestion.config import IngestConfig
from genescale.ingestion.intake import dataset_name, sorted_out
from genescale.ingestion.plan import Failure, Unit, cut, guarded, opened
from genescale.ingestion.reports.findings import Finding, source_findings
from genescale.ingestion.reports.report import SourceReport
from genescale.ingestion.source_configs import source_configs
from genescale.ingestion.source_facts import check_tally, source_facts
from genescale.ingestion.tally import Tally
from genescale.ingestion.tokenise import write_part
from genescale.platform.errors import AtlasError
from genescale.platform.settings import StorageSettings
from genescale.platform.storage import Store
from genescale.platform.vocabulary import Vocabulary

if TYPE_CHECKING:
    from genescale.ingestion.corpus import Corpus
    from genescale.ingestion.sources import SourceSpec

# Enough cells for shares within one percent, few enough values to read from object storage in seconds.
SAMPLED_CELLS = 4_096
SAMPLED_VALUES = 6_000_000
SAMPLED_PLACES = 16
# A file that can only be read as a whole is read when it is no larger than this.
MOST_VALUES_AT_ONCE = 50_000_000
UNIT_VALUES = 16_000_000
UNIT_CELLS = 65_536
WARM_CELLS = 16

Outcome = Literal["would_ingest", "would_replace", "already_committed", "would_refuse"]
Ranges = list[tuple[int, int]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expected:
    """What an ingest would bring: cells by fate, tokens, bytes of part files, processor seconds."""

    kept: int
    dropped: dict[str, int]
    tokens: int
    corpus_bytes: int
    seconds: float


@dataclasses.dataclass(kw_only=True)
class Inspection:
    """What was seen in one file and what ingestion would do with it; `source.tally` counts the cells looked at."""

    source: SourceReport
    outcome: Outcome = "would_refuse"
    n_cells: int = 0
    n_genes: int = 0
    stored: int = 0
    dtype: str = ""
    layout: str = ""
    sequential: bool = False
    """True when rows can only be had by reading the whole file once."""
    exact: bool = False
    """True when every cell was looked at."""
    obs_missing: tuple[str, ...] = ()
    """Columns of the corpus that the file does not fill."""
    obs_unused: tuple[str, ...] = ()
    """Columns of obs that are not kept."""
    expected: Expected | None = None
    looked_s: float = 0.0

    @property
    def accepted(self) -> bool:
        """True when an ingest would not refuse the file."""
        return self.outcome != "would_refuse"

    @property
    def findings(self) -> list[Finding]:
        """What a person should look at before ingesting."""
        return source_findings(self.source)

    def to_dict(self) -> dict[str, Any]:
        """The inspection as JSON; counts of cells and tokens in it are of the cells looked at, except `expected`."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        source = own.pop("source").to_dict()
        expected = own.pop("expected")
        # Quantiles say it shorter than bins.
        for name in (
            "length_bins",
            "depth_bins",
            "genes_bins",
            "status",
            "replaced",
            "version",
            "parts",
            "part_bytes",
            "quarantined",
            "duplicates",
            "seconds",
        ):
            source.pop(name)
        return {
            "accepted": self.accepted,
            **own,
            "expected": dataclasses.asdict(expected) if expected else None,
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
            **source,
        }


def inspect_source(
    uri: str,
    store: Store,
    vocabulary: Vocabulary,
    config: IngestConfig,
    *,
    table: GeneTable | None = None,
    full: bool = False,
    etag: str = "",
) -> Inspection:
    """Look at one file; never raises for what is wrong with it: `outcome` and `source.failure` say so.

    table: the content of `config.gene_table`; full: read every cell; etag: refuse content that differs from this one.
    """
    began = time.perf_counter()
    name = config.dataset_id or dataset_name(uri)
    found = Inspection(source=SourceReport(uri=uri, dataset_id=name, status="refused"))

    def look() -> dict[str, Any]:
        with opened(uri, etag, config.counts_slot, config, store) as atlas:
            _describe(found, atlas, config)
            genes = map_genes(atlas, vocabulary, rules=config, table=table)
            _describe_genes(found, atlas, genes, vocabulary, config)
            _try(found, atlas, genes, vocabulary, config, full=full)
        return {}

    answer = guarded(look, where=uri)
    if "failure" in answer:
        found.source.failure = Failure(**answer["failure"])
    else:
        found.source.status, found.outcome = "ingested", "would_ingest"
    found.looked_s = round(time.perf_counter() - began, 3)
    return found


def _describe(found: Inspection, atlas: Atlas, config: IngestConfig) -> None:
    source, matrix = found.source, atlas.matrix
    source.kind, source.size_bytes, source.notes = atlas.kind, atlas.entry.size_bytes, tuple(atlas.notes)
    source.counts_slot, source.slot_reason, source.slots_seen = atlas.slot, atlas.slot_reason, dict(atlas.slots_seen)
    found.n_cells, found.n_genes = atlas.n_cells, atlas.n_genes
    found.dtype, found.layout, found.sequential = str(matrix.dtype), matrix.layout, matrix.sequential
    filled = {name: column for name, column in filled_from(atlas, config.obs).items() if column}
    source.obs_columns = filled
    found.obs_missing = tuple(name for name in TARGETS if name not in filled)
    used = {*filled.values(), *config.keep_obs}
    found.obs_unused = tuple(column for column in atlas.obs.columns if column not in used)


def _describe_genes(
    found: Inspection, atlas: Atlas, genes: GeneMap, vocabulary: Vocabulary, config: IngestConfig
) -> None:
    for name, value in source_facts(atlas, genes, vocabulary, config).items():
        setattr(found.source, name, tuple(value) if isinstance(value, list) else value)


def _try(
    found: Inspection, atlas: Atlas, genes: GeneMap, vocabulary: Vocabulary, config: IngestConfig, *, full: bool
) -> None:
    """Ingest the cells to look at into a scratch folder, judge them as an ingest would, and scale up."""
    ranges = _ranges(atlas, full=full)
    found.stored = atlas.stored if ranges else 0
    if not ranges:
        note = "the file must be read as a whole: its cells were not looked at (--full reads them)"
        found.source.notes = (*found.source.notes, note)
        return
    found.exact = sum(stop - start for start, stop in ranges) == atlas.n_cells
    tally, notes, part_bytes = Tally(), list[str](), 0
    for answer in _written(atlas, genes, vocabulary, config, ranges):
        tally.add(Tally(**answer["tally"]))
        notes += answer["notes"]
        part_bytes += answer["part"]["size_bytes"] if answer["part"] else 0
    found.source.tally = tally
    of_sample = "" if found.exact else "in the sample: "
    found.source.notes = (*found.source.notes, *(f"{of_sample}{note}" for note in summed_notes(notes)))
    found.expected = _scaled(tally, part_bytes, atlas.n_cells)
    try:
        check_tally(tally, config, where=atlas.uri)
    except AtlasError as error:
        if found.exact:
            raise
        fix = f"{error.fix} This is judged by a sample of the cells: --full reads them all.".strip()
        raise type(error)(error.what, where=error.where, fix=fix) from error


def _ranges(atlas: Atlas, *, full: bool) -> Ranges:
    """Row ranges to look at: all of them in pieces of bounded size, or places spread evenly over the file."""
    matrix = atlas.matrix
    if full:
        return list(cut(matrix.stored_before, UNIT_VALUES, UNIT_CELLS))
    if matrix.sequential:
        # Knowing how much is stored may itself mean reading the file, so the whole is bounded by what it could hold.
        small = atlas.n_cells * atlas.n_genes <= MOST_VALUES_AT_ONCE
        return list(cut(matrix.stored_before, UNIT_VALUES, UNIT_CELLS)) if small else []
    return sampled_ranges(matrix.stored_before)


def sampled_ranges(stored_before: npt.NDArray[np.int64]) -> Ranges:
    """At most SAMPLED_CELLS rows and about SAMPLED_VALUES stored values from places spread over the file.

    All rows, when there are no more than that. stored_before: values stored before each cell (n+1).
    """
    n_cells, stored = len(stored_before) - 1, int(stored_before[-1])
    if n_cells <= SAMPLED_CELLS and stored <= SAMPLED_VALUES:
        return list(cut(stored_before, UNIT_VALUES, UNIT_CELLS))
    cells, values = SAMPLED_CELLS // SAMPLED_PLACES, SAMPLED_VALUES // SAMPLED_PLACES
    ranges: Ranges = []
    for place in np.linspace(0, max(n_cells - cells, 0), SAMPLED_PLACES).astype(int):
        start = max(int(place), ranges[-1][1] if ranges else 0)
        fitting = int(np.searchsorted(stored_before, stored_before[min(start, n_cells)] + values, side="right")) - 1
        stop = min(max(fitting, start + 1), start + cells, n_cells)
        if start < stop:
            ranges.append((start, stop))
    return ranges


def _written(
    atlas: Atlas, genes: GeneMap, vocabulary: Vocabulary, config: IngestConfig, ranges: Ranges
) -> Iterator[dict[str, Any]]:
    """The answers of `write_part` for each range; what it writes is removed."""
    with tempfile.TemporaryDirectory(prefix="genescale-inspect-") as folder:
        store, scratch = Store(StorageSettings()), str(Path(folder) / "corpus")

        def write(start: int, stop: int) -> dict[str, Any]:
            unit = Unit(uri=atlas.uri, etag=atlas.entry.etag, slot=atlas.slot, start=start, stop=stop)
            answer, _ = write_part(
                unit,
                atlas,
                genes,
                vocabulary=vocabulary,
                cell_rules=config,
                obs_mapping=config.obs,
                allow_fractional=config.allow_fractional,
                bad_values=config.bad_values,
                corpus_uri=scratch,
                dataset_id="sample",
                store=store,
            )
            store.delete_folder(scratch)
            return answer

        # What is compiled and imported at the first use must not count as the time of a cell.
        write(ranges[0][0], min(ranges[0][0] + WARM_CELLS, ranges[0][1]))
        for start, stop in ranges:
            yield write(start, stop)


def _scaled(tally: Tally, part_bytes: int, n_cells: int) -> Expected:
    factor = n_cells / tally.read if tally.read else 0.0
    dropped = {reason: round(cells * factor) for reason, cells in tally.dropped.items()}
    return Expected(
        kept=n_cells - sum(dropped.values()),
        dropped=dropped,
        tokens=round(tally.tokens * factor),
        corpus_bytes=round(part_bytes * factor),
        seconds=round(sum(tally.seconds.values()) * factor, 2),
    )


def inspect_sources(
    specs: Sequence[SourceSpec],
    config: IngestConfig,
    vocabulary: Vocabulary,
    store: Store,
    *,
    corpus: Corpus | None = None,
    corpus_uri: str = "",
    full: bool = False,
) -> Iterator[Inspection]:
    """Look at each source in turn, in this process, and say what the corpus, if there is one, holds of it already.

    Raises SettingsError when options do not fit any file, before the first is opened.
    """
    configs, tables = source_configs(specs, config, store)
    reports, wanted = sorted_out(specs, configs, corpus, vocabulary, corpus_uri)
    new = {one.spec.uri: one for one in wanted}
    for spec in specs:
        own, report = configs[spec.uri], reports[spec.uri]
        if report.status == "already_committed":
            yield Inspection(source=report, outcome="already_committed", exact=True)
            continue
        table = tables[own.gene_table] if own.gene_table else None
        found = inspect_source(spec.uri, store, vocabulary, own, table=table, full=full, etag=spec.etag)
        found.source.dataset_id = report.dataset_id
        if spec.uri not in new:
            found.outcome, found.source.status, found.source.failure = "would_refuse", "refused", report.failure
        elif found.accepted and new[spec.uri].replaces:
            found.outcome = "would_replace"
        yield found
