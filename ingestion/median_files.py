"""What medians leave behind: the vocabulary, a table of what each median rests on, and the histogram for later."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from genescale.ingestion.histograms import BINS, FRACTION_SHIFT, Histogram
from genescale.platform.errors import IntegrityError
from genescale.platform.rank_value import TARGET_SUM
from genescale.platform.storage import Store
from genescale.platform.vocabulary import Vocabulary, lint

if TYPE_CHECKING:
    from genescale.ingestion.plan import Failure

FEW_OBSERVATIONS = 1_000
HISTOGRAM_VERSION = 1
_FACTS = b"genescale.histogram"
_HISTOGRAM_COLUMNS = ("gene_id", "symbol", "bin", "count")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Medians:
    """A vocabulary computed from atlases, and what it rests on."""

    vocabulary: Vocabulary
    observations: npt.NDArray[np.int64]
    """Cells that detect each gene, aligned with vocabulary.gene_ids."""
    origins: tuple[str, ...]
    """Where each median comes from: `measured`, `fallback`, or `none` for genes without one."""
    n_cells: int
    cells_left_out: int
    """Cells that the rules for cells leave out."""
    genes_left_out: int
    """Genes of the files with fewer observations than asked for."""
    largest_total: float
    """Largest library size: no measured value can be smaller than 10,000 divided by it."""
    refused: Mapping[str, Failure]
    """Files that could not be read, and why."""
    histogram: Histogram
    genes: Vocabulary
    """All genes that were looked for, in the order of the histogram."""
    sources: tuple[tuple[str, str], ...]
    """Address and tag of every file that the histogram holds."""
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """True when no file was refused."""
        return not self.refused

    @property
    def warnings(self) -> list[str]:
        """What makes medians doubtful; an empty list when nothing does."""
        found, medians = lint(self.vocabulary), self.vocabulary.medians
        measured = np.array([origin == "measured" for origin in self.origins])
        if few := int((measured & (self.observations < FEW_OBSERVATIONS)).sum()):
            found.append(f"{few:,} genes were seen in fewer than {FEW_OBSERVATIONS:,} cells: their medians are rough.")
        if given := self.origins.count("fallback"):
            found.append(f"{given:,} genes have the median of the fallback vocabulary.")
        if self.largest_total and (low := int((medians < TARGET_SUM / self.largest_total).sum())):
            found.append(f"{low:,} medians are smaller than any value that a cell of this depth can have.")
        return found

    def table(self) -> pa.Table:
        """What each median rests on: gene_id, symbol, observations, median (null without), origin."""
        medians = self.vocabulary.medians
        columns = {
            "gene_id": pa.array(self.vocabulary.gene_ids, pa.string()),
            "symbol": pa.array(self.vocabulary.symbols, pa.string()),
            "observations": pa.array(self.observations, pa.int64()),
            "median": pa.array(medians, pa.float64(), mask=np.isnan(medians)),
            "origin": pa.array(self.origins, pa.string()),
        }
        return pa.table(columns)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON."""
        return {
            "name": self.vocabulary.name,
            "digest": self.vocabulary.digest,
            "genes": len(self.vocabulary.gene_ids),
            "window": self.vocabulary.window,
            "cells": self.n_cells,
            "cells_left_out": self.cells_left_out,
            "genes_left_out": self.genes_left_out,
            "genes_without_median": self.origins.count("none"),
            "genes_with_few_observations": int((self.observations < FEW_OBSERVATIONS).sum()),
            "warnings": self.warnings,
            "refused": {uri: dataclasses.asdict(failure) for uri, failure in self.refused.items()},
            "seconds": round(self.seconds, 3),
        }


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Earlier:
    """A histogram that was saved: the genes it knows, and the files it holds."""

    symbols: Mapping[str, str]
    """Gene id -> symbol, in the order of the histogram."""
    histogram: Histogram
    n_cells: int
    largest_total: float
    sources: tuple[tuple[str, str], ...]

    def histogram_of(self, gene_ids: Sequence[str]) -> Histogram:
        """The histogram by place of each gene in `gene_ids`, which hold all of its genes or leave some out."""
        place = {gene: number for number, gene in enumerate(gene_ids)}
        place_g = np.array([place.get(gene, -1) for gene in self.symbols], dtype=np.int64)
        genes_k = place_g[self.histogram.keys_k // BINS]
        keys_k, counts_k = genes_k * BINS + self.histogram.keys_k % BINS, self.histogram.counts_k
        order = np.flatnonzero(genes_k >= 0)
        order = order[np.argsort(keys_k[order], kind="stable")]
        return Histogram(keys_k[order], counts_k[order])


def write_beside(found: Medians, output: str, store: Store) -> dict[str, str]:
    """Write the table and the histogram beside the vocabulary at `output`; returns their addresses by name."""
    stem = output.rpartition(".")[0] or output
    written = {"table": f"{stem}.medians.parquet", "histogram": f"{stem}.histogram.parquet"}
    sink = io.BytesIO()
    pq.write_table(found.table(), sink, compression="zstd", write_page_checksum=True)
    store.write(written["table"], sink.getvalue())
    store.write(written["histogram"], histogram_bytes(found))
    return written


def histogram_bytes(found: Medians) -> bytes:
    """The histogram as a Parquet file that `read_histogram` reads: one row per occupied bin of a gene."""
    seen, places_k = np.unique(found.histogram.keys_k // BINS, return_inverse=True)
    genes_k = pa.array(places_k, pa.int32())
    facts = {
        "version": HISTOGRAM_VERSION,
        "fraction_shift": FRACTION_SHIFT,
        "n_cells": found.n_cells,
        "largest_total": found.largest_total,
        "sources": [list(pair) for pair in sorted(found.sources)],
    }
    # Genes may share a symbol, the empty one above all. Arrow writes memory it never filled into the file when a
    # dictionary repeats a value.
    symbols = pa.array([found.genes.symbols[g] for g in seen], pa.string()).dictionary_encode()
    columns = [
        pa.DictionaryArray.from_arrays(genes_k, [found.genes.gene_ids[g] for g in seen]),
        pa.DictionaryArray.from_arrays(symbols.indices.take(genes_k), symbols.dictionary),
        pa.array(found.histogram.keys_k % BINS, pa.int32()),
        pa.array(found.histogram.counts_k, pa.int64()),
    ]
    table = pa.table(columns, names=list(_HISTOGRAM_COLUMNS))
    table = table.replace_schema_metadata({_FACTS: json.dumps(facts, sort_keys=True).encode()})
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def read_histogram(uri: str, store: Store) -> Earlier:
    """A saved histogram; IntegrityError when the file is damaged, or is none that this release can add to."""
    try:
        table = pq.read_table(io.BytesIO(store.read(uri)), page_checksum_verification=True)
        facts = json.loads((table.schema.metadata or {})[_FACTS])
        if (facts["version"], facts["fraction_shift"]) != (HISTOGRAM_VERSION, FRACTION_SHIFT):
            raise ValueError(f"it is of version {facts['version']}, this release adds to {HISTOGRAM_VERSION}")
        ids, symbols, bins, counts = (table.column(name).combine_chunks() for name in _HISTOGRAM_COLUMNS)
        genes = ids.to_pylist() if not pa.types.is_dictionary(ids.type) else ids.cast(pa.string()).to_pylist()
        names = dict(zip(genes, symbols.cast(pa.string()).to_pylist(), strict=True))
        order = {gene: number for number, gene in enumerate(sorted(names))}
        keys = np.array([order[gene] for gene in genes], dtype=np.int64) * BINS + bins.to_numpy()
        counts_k = counts.to_numpy().astype(np.int64)
        if (np.diff(keys) <= 0).any() or (counts_k < 1).any():
            raise ValueError("its bins do not rise")
        sources = tuple((str(source), str(etag)) for source, etag in facts["sources"])
        n_cells, largest = int(facts["n_cells"]), float(facts["largest_total"])
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        fix = "Give a file that `genescale medians` wrote beside a vocabulary, or read its atlases again."
        raise IntegrityError(f"this is no saved histogram ({error}).", where=uri, fix=fix) from error
    return Earlier(
        symbols={gene: names[gene] for gene in sorted(names)},
        histogram=Histogram(keys, counts_k),
        n_cells=n_cells,
        largest_total=largest,
        sources=sources,
    )
