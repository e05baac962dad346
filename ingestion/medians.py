"""Medians for a new vocabulary: per gene, the median of its normalised counts over the cells that detect it.

The counts of a gene are collected in a histogram whose bins are the upper bits of the float32 pattern: 64 bins for each
doubling, so a median is at most 1 % off, whatever the values are. Histograms hold whole numbers and merge by addition:
any order of files, units and workers gives the same medians, bit for bit. (Non-zero medians: Theodoris et al., Nature
2023.)

Axis suffixes: `n` cells, `g` genes of the new vocabulary, `k` occupied bins, sorted by gene and bin.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from genescale.ingestion.fan_out import fan_out
from genescale.ingestion.genes import ensembl_column, gathered, library_sizes
from genescale.ingestion.h5ad import Atlas, open_atlas
from genescale.ingestion.plan import Failure, Inspected, ReadConfig, Unit, blocks, guarded, inspect_files
from genescale.ingestion.sources import find_sources
from genescale.platform.errors import AtlasError, SettingsError
from genescale.platform.progress import SILENT, Progress
from genescale.platform.rank_value import normalised
from genescale.platform.storage import Store
from genescale.platform.vocabulary import FRAMED_WINDOW, SPECIAL_TOKENS, Vocabulary, canonical_id

# A float32 has 23 bits of fraction; keeping the upper 6 of them splits every doubling into 64 bins.
FRACTION_SHIFT = 23 - 6
BINS = 1 << (31 - FRACTION_SHIFT)
FEW_OBSERVATIONS = 1_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class MediansConfig(ReadConfig):
    """How medians are computed and what the vocabulary made of them looks like."""

    name: str = ""
    window: int = FRAMED_WINDOW
    """Tokens per cell, special tokens included."""
    special: tuple[str, ...] = SPECIAL_TOKENS
    min_observations: int = 1
    """Genes detected in fewer cells are left out of the vocabulary."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_observations < 1:
            raise SettingsError("min_observations is below 1.", fix="A median needs at least one observation.")
        if self.window < len(self.special) + 1:
            raise SettingsError(f"a window of {self.window} tokens holds no gene.", fix="Use for example 2048.")


@dataclasses.dataclass(frozen=True, eq=False)
class Histogram:
    """Occupied bins: key = gene × BINS + bin (int64, rising), and how many values fell into each (int64)."""

    keys_k: npt.NDArray[np.int64]
    counts_k: npt.NDArray[np.int64]

    @classmethod
    def empty(cls) -> Histogram:
        """No value yet."""
        return cls(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))

    @classmethod
    def of(cls, genes: npt.NDArray[Any], values: npt.NDArray[np.float64]) -> Histogram:
        """Of positive values and the genes they belong to (same length)."""
        bins = np.ascontiguousarray(values, dtype=np.float32).view(np.int32).astype(np.int64) >> FRACTION_SHIFT
        keys, counts = np.unique(genes.astype(np.int64) * BINS + bins, return_counts=True)
        return cls(keys, counts.astype(np.int64))

    def __add__(self, other: Histogram) -> Histogram:
        keys, places = np.unique(np.concatenate([self.keys_k, other.keys_k]), return_inverse=True)
        counts = np.zeros(keys.size, dtype=np.int64)
        np.add.at(counts, places, np.concatenate([self.counts_k, other.counts_k]))
        return Histogram(keys, counts)

    def to_bytes(self) -> bytes:
        """Both arrays, one after the other."""
        return self.keys_k.tobytes() + self.counts_k.tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> Histogram:
        """Read `to_bytes`."""
        both = np.frombuffer(data, dtype=np.int64)
        return cls(both[: both.size // 2], both[both.size // 2 :])

    def observations(self, n_genes: int) -> npt.NDArray[np.int64]:
        """Values per gene (g)."""
        observed = np.zeros(n_genes, dtype=np.int64)
        np.add.at(observed, self.keys_k // BINS, self.counts_k)
        return observed

    def medians(self, n_genes: int) -> npt.NDArray[np.float64]:
        """Median per gene (g, float64; NaN without values): the middle of the bin of the middle value, or of two."""
        observed = self.observations(n_genes)
        before = np.concatenate(([0], np.cumsum(observed)[:-1]))
        up_to_k = np.cumsum(self.counts_k)
        medians = np.full(n_genes, np.nan)
        seen = np.flatnonzero(observed)
        middles = [before[seen] + (observed[seen] - 1) // 2, before[seen] + observed[seen] // 2]
        lower, upper = (_bin_middle(self.keys_k[np.searchsorted(up_to_k, m, side="right")] % BINS) for m in middles)
        medians[seen] = (lower + upper) / 2
        return medians


def _bin_middle(bins: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    edges = [((bins + step) << FRACTION_SHIFT).astype(np.int32).view(np.float32).astype(np.float64) for step in (0, 1)]
    return (edges[0] + edges[1]) / 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Medians:
    """A vocabulary computed from atlases, and what it rests on."""

    vocabulary: Vocabulary
    observations: npt.NDArray[np.int64]
    """Cells that detect each gene, aligned with vocabulary.gene_ids."""
    n_cells: int
    genes_left_out: int
    """Genes of the files with fewer observations than asked for."""
    refused: Mapping[str, Failure]
    """Files that could not be read, and why."""
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """True when no file was refused."""
        return not self.refused

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON."""
        return {
            "name": self.vocabulary.name,
            "digest": self.vocabulary.digest,
            "genes": len(self.vocabulary.gene_ids),
            "window": self.vocabulary.window,
            "cells": self.n_cells,
            "genes_left_out": self.genes_left_out,
            "genes_with_few_observations": int((self.observations < FEW_OBSERVATIONS).sum()),
            "refused": {uri: dataclasses.asdict(failure) for uri, failure in self.refused.items()},
            "seconds": round(self.seconds, 3),
        }


def compute_medians(
    sources: Sequence[str], *, store: Store, config: MediansConfig = MediansConfig(), progress: Progress = SILENT
) -> Vocabulary:
    """A vocabulary of the genes that the atlases detect, with their non-zero medians; Ray must be running.

    As `measure_medians`, but raises AtlasError when any file cannot be read.
    """
    found = measure_medians(sources, store=store, config=config, progress=progress)
    for failure in found.refused.values():
        raise AtlasError(failure.message)
    return found.vocabulary


def measure_medians(
    sources: Sequence[str], *, store: Store, config: MediansConfig = MediansConfig(), progress: Progress = SILENT
) -> Medians:
    """The same vocabulary and what it rests on: cells, observations per gene, files left out.

    Each file counts as it is: give every cell once. Raises AtlasError when no source can be read; a single bad file is
    left out as a whole and reported.
    """
    began = time.perf_counter()
    files = find_sources(sources, store).files
    inspected = inspect_files(files, _judge, store=store, config=config, progress=progress)
    refused = {file.uri: file.failure for file in inspected if file.failure}
    good = [file for file in inspected if not file.failure]
    symbols = _symbols(good)
    genes = sorted(symbols)
    progress.start(sum(file.n_cells for file in good), "cells")
    histograms, failed = _collected(good, genes, store, progress)
    refused |= failed
    if not histograms:
        first = next(iter(refused.values()))
        raise AtlasError(f"none of {len(files)} files could be read, the first because: {first.message}")
    total = functools.reduce(Histogram.__add__, histograms.values(), Histogram.empty())
    observed, medians = total.observations(len(genes)), total.medians(len(genes))
    kept = np.flatnonzero(observed >= config.min_observations)
    if not kept.size:
        raise AtlasError(f"no gene is detected in {config.min_observations:,} cells.", fix="Lower min_observations.")
    vocabulary = Vocabulary.build(
        [genes[i] for i in kept],
        medians[kept],
        symbols=[symbols[genes[i]] for i in kept],
        window=config.window,
        name=config.name,
        special=config.special,
    )
    return Medians(
        vocabulary=vocabulary,
        observations=observed[kept],
        n_cells=sum(file.n_cells for file in good if file.uri in histograms),
        genes_left_out=int((observed < config.min_observations).sum()),
        refused=refused,
        seconds=time.perf_counter() - began,
    )


def _judge(atlas: Atlas) -> dict[str, Any]:
    candidates = atlas.gene_columns()
    column = ensembl_column(candidates, where=atlas.uri)
    ids = [canonical_id(name) for name in candidates[column]]
    return {"column": column, "genes": dict(zip(ids, atlas.symbols(), strict=True))}


def _symbols(files: Sequence[Inspected]) -> dict[str, str]:
    """Every gene id of the files with its symbol; the first file that names one decides."""
    symbols: dict[str, str] = {}
    for file in files:
        for gene, symbol in file.facts["genes"].items():
            if gene and not symbols.get(gene):
                symbols[gene] = symbol
    return symbols


def _collected(
    files: Sequence[Inspected], genes: Sequence[str], store: Store, progress: Progress
) -> tuple[dict[str, Histogram], dict[str, Failure]]:
    """The histogram of each file that was read to its end, and why the others were not."""
    import ray

    work = functools.partial(_run_unit, genes=ray.put({gene: i for i, gene in enumerate(genes)}), store=store)
    items = [
        {"unit": dataclasses.asdict(unit), "column": file.facts["column"]} for file in files for unit in file.units
    ]
    histograms: dict[str, Histogram] = {file.uri: Histogram.empty() for file in files}
    failed: dict[str, Failure] = {}
    for answer, payload in fan_out(items, work):
        uri = answer["unit"]["uri"]
        if "failure" in answer:
            failed[uri] = Failure(**answer["failure"])
        else:
            histograms[uri] += Histogram.from_bytes(payload)
        progress.advance(answer["unit"]["stop"] - answer["unit"]["start"])
    return {uri: histogram for uri, histogram in histograms.items() if uri not in failed}, failed


def _run_unit(item: dict[str, Any], *, genes: Any, store: Store) -> tuple[dict[str, Any], bytes]:
    import ray

    unit, payload = Unit(**item["unit"]), b""

    def work() -> dict[str, Any]:
        nonlocal payload
        payload = unit_histogram(unit, item["column"], ray.get(genes), store).to_bytes()
        return {}

    return {**item, **guarded(work, where=unit.uri)}, payload


def unit_histogram(unit: Unit, column: str, genes: Mapping[str, int], store: Store) -> Histogram:
    """Histogram of count / library size × 10,000 over the cells of a unit; genes: canonical id -> number."""
    histogram = Histogram.empty()
    with open_atlas(unit.uri, store, counts_slot=unit.slot, etag=unit.etag) as atlas:
        names = atlas.gene_columns()[column]
        targets_g = np.array([genes.get(canonical_id(name), -1) for name in names], dtype=np.int64)
        for start, stop in blocks(atlas, unit):
            block = atlas.read_rows(start, stop)
            counts_ng = gathered(block, targets_g, len(genes))
            sizes = np.repeat(library_sizes(block), np.diff(counts_ng.indptr))
            histogram += Histogram.of(counts_ng.indices, normalised(counts_ng.data, sizes))
    return histogram
