"""Medians for a new vocabulary: per gene, the median of its normalised counts over the cells that detect it.

Every worker counts the values of its cells in a histogram per gene; histograms add up in any order of files, units and
workers to the same bits (`histograms.py`). A gene that few cells detect gets no median, which keeps it in the
vocabulary but out of the ranks, or that of a fallback vocabulary. (Non-zero medians: Theodoris et al., Nature 2023.)

Axis suffixes: `n` cells, `g` genes of the new vocabulary, sorted by id, `v` values.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from genescale.ingestion.annotation.cells import KEPT, CellRules, counts_reasons, obs_reasons
from genescale.ingestion.annotation.gene_columns import candidates, symbols
from genescale.ingestion.annotation.gene_table import GeneTable, read_gene_table
from genescale.ingestion.annotation.genes import GeneRules, map_genes
from genescale.ingestion.annotation.species import ensembl_share, read_name, species_of_ids
from genescale.ingestion.atlas import Atlas, Rows
from genescale.ingestion.counts import explain, refuse_equal_sums
from genescale.ingestion.fan_out import fan_out
from genescale.ingestion.histograms import CellSums, Counter
from genescale.ingestion.histograms import Histogram as Histogram
from genescale.ingestion.median_files import Earlier, Medians, read_histogram
from genescale.ingestion.plan import Failure, Inspected, ReadConfig, Unit, blocks, guarded, inspect_files, opened
from genescale.ingestion.sources import SourceSpec, find_sources
from genescale.ingestion.unit_work import Known
from genescale.platform.errors import AtlasError, SettingsError
from genescale.platform.progress import SILENT, Progress
from genescale.platform.settings import build
from genescale.platform.storage import Store
from genescale.platform.vocabulary import FRAMED_WINDOW, SPECIAL_TOKENS, Vocabulary, read_vocabulary

MEASURED, FALLBACK, NONE = "measured", "fallback", "none"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MediansConfig(ReadConfig, GeneRules, CellRules):
    """Which cells and genes medians rest on, and what the vocabulary made of them looks like."""

    unit_nonzeros: int = 128_000_000
    """Stored counts that one task turns into one histogram; it reads a few million of them at a time."""
    name: str = ""
    window: int = FRAMED_WINDOW
    """Tokens per cell, special tokens included."""
    special: tuple[str, ...] = SPECIAL_TOKENS
    min_observations: int = 1
    """Genes detected in fewer cells are left out of the vocabulary."""
    min_observations_for_median: int = 10
    """Genes detected in fewer cells have no median of their own: in the vocabulary, but not ranked. A median of ten
    values is about 40 % off by chance, of a thousand 4 %: for a vocabulary that is to last, ask for 1,000."""
    fallback: str = ""
    """Vocabulary whose medians stand in for those of genes with too few observations."""
    earlier: tuple[str, ...] = ()
    """Saved histograms of other atlases to add, which are not read again."""
    exact: bool = False
    """Read everything a second time for medians without rounding; the values in each gene's middle bin, about a
    hundredth of all, are held in memory."""

    def __post_init__(self) -> None:
        for part in (ReadConfig, GeneRules, CellRules):
            part.__post_init__(self)
        if self.min_observations < 1 or self.min_observations_for_median < 1:
            raise SettingsError("min_observations is below 1.", fix="A median needs at least one observation.")
        if self.window < len(self.special) + 1:
            raise SettingsError(f"a window of {self.window} tokens holds no gene.", fix="Use for example 2048.")
        if self.exact and self.earlier:
            raise SettingsError("exact medians need the atlases themselves.", fix="Leave out exact, or earlier.")


DEFAULTS = MediansConfig()


def compute_medians(
    sources: Sequence[str], *, store: Store, config: MediansConfig = DEFAULTS, progress: Progress = SILENT
) -> Vocabulary:
    """A vocabulary of the genes that the atlases detect, with their non-zero medians; Ray must be running.

    As `measure_medians`, but raises AtlasError when any file cannot be read.
    """
    found = measure_medians(sources, store=store, config=config, progress=progress)
    for failure in found.refused.values():
        raise AtlasError(failure.message)
    return found.vocabulary


def measure_medians(
    sources: Sequence[str], *, store: Store, config: MediansConfig = DEFAULTS, progress: Progress = SILENT
) -> Medians:
    """The same vocabulary and what it rests on: cells, observations per gene, files left out, histogram.

    Cells count as often as they are given, unless the files mark copies by `is_primary_data`. Raises AtlasError when no
    source can be read; a single bad file is left out as a whole and reported.
    """
    began = time.perf_counter()
    specs = find_sources(sources, store).files
    earlier = [read_histogram(uri, store) for uri in config.earlier]
    _check_new(specs, earlier)
    configs = {spec.uri: _config_of(spec, config) for spec in specs}
    tables = {uri: read_gene_table(uri, store) for uri in {c.gene_table for c in configs.values()} if uri}
    judge = functools.partial(_judge, tables=tables)
    inspected = inspect_files(specs, judge, store=store, configs=configs, progress=progress)
    named = _symbols([file for file in inspected if not file.failure], earlier)
    if not named:
        first = next(file.failure for file in inspected if file.failure)
        raise AtlasError(f"none of {len(specs)} files could be read, the first because: {first.message}")
    genes = Vocabulary.build(sorted(named), np.full(len(named), np.nan), symbols=[named[g] for g in sorted(named)])
    passes = _Passes(inspected, configs, _known(genes, tables), store, progress)
    total = passes.histogram()
    for one in earlier:
        total += one.histogram_of(genes.gene_ids)
    values = passes.exact(total) if config.exact else total.medians(len(genes.gene_ids))
    if not total.keys_k.size:
        reason = next(iter(passes.refused.values())).message if passes.refused else "no cell is kept."
        raise AtlasError(f"none of {len(specs)} files could be read, the first because: {reason}")
    sources_read = [spec for spec in specs if spec.uri not in passes.refused]
    return _made(config, store, genes, total, values, passes, sources_read, earlier, time.perf_counter() - began)


def _config_of(spec: SourceSpec, config: MediansConfig) -> MediansConfig:
    """The run's config with the source's own options; those that only ingestion has do not matter here."""
    own = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    given = {name: value for name, value in spec.options.items() if name in own}
    return build(MediansConfig, {**own, **given}, where=spec.uri) if given else config


def _check_new(specs: Sequence[SourceSpec], earlier: Sequence[Earlier]) -> None:
    seen = {(uri, etag) for one in earlier for uri, etag in one.sources}
    for spec in specs:
        if (spec.uri, spec.etag) in seen:
            raise SettingsError("a saved histogram holds this file already.", where=spec.uri, fix="Leave one out.")
    if len(seen) < sum(len(one.sources) for one in earlier):
        raise SettingsError("two saved histograms hold the same file.", fix="Leave one out.")


def _judge(atlas: Atlas, config: MediansConfig, *, tables: Mapping[str, GeneTable]) -> tuple[dict[str, Any], bytes]:
    """Ensembl ids of the genes of a file, with their symbols; AtlasError when it has none."""
    columns = candidates(atlas.var, config.gene_column, where=atlas.uri)
    best = max(columns, key=lambda name: ensembl_share(columns[name]))
    table = tables.get(config.gene_table)
    if ensembl_share(columns[best]) >= 0.5:
        names = [read_name(text) for text in columns[best]]
        found = {name.core: text for name, text in zip(names, symbols(atlas), strict=True) if name.kind == "id"}
    elif table is not None:
        texts = max(columns.values(), key=lambda texts: sum(len(table.find(text)) == 1 for text in texts))
        found = {ids[0]: text.strip() for text in texts if len(ids := table.find(read_name(text).core)) == 1}
    else:
        shown = next((text for texts in columns.values() for text in texts if text), "")[:40]
        raise AtlasError(
            f"no Ensembl gene ids found (names such as '{shown}').",
            where=f"{atlas.uri}: {atlas.var.path}",
            fix="Give ids in the var index or in var['ensembl_id'], or a table of symbols with --gene-table.",
        )
    home = species_of_ids(found)
    return {"genes": {gene: text for gene, text in found.items() if read_name(gene).species == home}}, b""


def _symbols(files: Sequence[Inspected], earlier: Sequence[Earlier]) -> dict[str, str]:
    """Every gene id with its symbol; the first file that names one decides."""
    named: dict[str, str] = {}
    for genes in [*(file.facts["genes"] for file in files), *(one.symbols for one in earlier)]:
        for gene, symbol in genes.items():
            if gene and not named.get(gene):
                named[gene] = symbol
    home = species_of_ids(named)
    return {gene: symbol for gene, symbol in named.items() if read_name(gene).species == home}


def _known(genes: Vocabulary, tables: Mapping[str, GeneTable]) -> Known:
    import ray

    return Known(ray.put((genes, dict(tables))))


class _Passes:
    """The passes over all files; `refused` and the sums grow as they run."""

    def __init__(
        self,
        inspected: Sequence[Inspected],
        configs: Mapping[str, MediansConfig],
        known: Known,
        store: Store,
        progress: Progress,
    ) -> None:
        self.good = {file.uri: file for file in inspected if not file.failure}
        self.refused: dict[str, Failure] = {file.uri: file.failure for file in inspected if file.failure}
        self.cells = self.cells_left_out = 0
        self.largest_total = 0.0
        self._work = functools.partial(_run_unit, configs=dict(configs), known=known, store=store)
        self._known, self._progress = known, progress

    def histogram(self) -> Histogram:
        """The histogram of all files that could be read to their end."""
        total = Histogram.empty()
        for uri, answers in self._files(self._work):
            if uri in self.refused:
                continue
            for answer, payload in answers:
                total += Histogram.from_bytes(payload)
                self.cells += answer["taken"]
                self.cells_left_out += answer["left_out"]
                self.largest_total = max(self.largest_total, answer["largest_total"])
        return total

    def exact(self, total: Histogram) -> npt.NDArray[np.float64]:
        """Medians from the values in the bins where they lie; AtlasError when a file cannot be read a second time."""
        n_genes, genes, values = len(self._known.vocabulary.gene_ids), [], []
        read = set(self.good) - set(self.refused)
        self.good = {uri: file for uri, file in self.good.items() if uri in read}
        import ray

        wanted = ray.put(total.median_bins(n_genes))
        for uri, answers in self._files(functools.partial(self._work, wanted=wanted)):
            if uri in self.refused:
                raise AtlasError(self.refused[uri].message)
            for answer, payload in answers:
                genes.append(np.frombuffer(payload, dtype=np.int64, count=answer["found"]))
                values.append(np.frombuffer(payload, dtype=np.float64, offset=8 * answer["found"]))
        none = np.empty(0, dtype=np.int64)
        return total.exact_medians(n_genes, np.concatenate([none, *genes]), np.concatenate([none, *values]))

    def _files(self, work: Callable[..., Any]) -> Iterator[tuple[str, list[tuple[dict[str, Any], bytes]]]]:
        """Run all units; yield each file with its answers when the last one is there, or without when one failed."""
        self._progress.start(sum(file.n_cells for file in self.good.values()), "cells")
        items = [{"unit": dataclasses.asdict(unit)} for file in self.good.values() for unit in file.units]
        answers: dict[str, list[tuple[dict[str, Any], bytes]]] = {uri: [] for uri in self.good}
        for answer, payload in fan_out(items, work):
            uri = answer["unit"]["uri"]
            if "failure" in answer:
                self.refused[uri] = Failure(**answer["failure"])
            answers[uri].append((answer, b"" if uri in self.refused else payload))
            self._progress.advance(answer["unit"]["stop"] - answer["unit"]["start"])
            if len(answers[uri]) == len(self.good[uri].units):
                yield uri, answers.pop(uri)


def _run_unit(
    item: dict[str, Any], *, configs: Mapping[str, MediansConfig], known: Known, store: Store, wanted: Any = None
) -> tuple[dict[str, Any], bytes]:
    unit, payload = Unit(**item["unit"]), b""

    def work() -> dict[str, Any]:
        nonlocal payload
        bins = None
        if wanted is not None:
            import ray

            bins = ray.get(wanted)
        config = configs[unit.uri]
        facts, payload = unit_pass(unit, config, known.vocabulary, known.table(config), store, bins)
        return facts

    return {**item, **guarded(work, where=unit.uri)}, payload


def unit_pass(
    unit: Unit,
    config: MediansConfig,
    genes: Vocabulary,
    table: GeneTable | None,
    store: Store,
    bins_g2: npt.NDArray[np.int64] | None = None,
) -> tuple[dict[str, Any], bytes]:
    """Count the values of a unit, or, with `bins_g2`, collect those that lie in these bins; facts and a payload."""
    taken_cells, largest = 0, 0.0
    found: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]] = []
    with opened(unit.uri, unit.etag, unit.slot, config, store) as atlas:
        counter = Counter(map_genes(atlas, genes, rules=config, table=table), genes)
        for start, stop in blocks(atlas, unit):
            rows = atlas.read(start, stop)
            sums = counter.sums(rows, allow_fractional=config.allow_fractional)
            taken_n = _taken(rows, sums, atlas, start, stop, config)
            taken_cells += int(taken_n.sum())
            largest = max(largest, float(sums.totals_n.max(initial=0.0)))
            if bins_g2 is None:
                counter.add(rows, sums, taken_n)
            else:
                found.append(counter.values(rows, sums, taken_n, bins_g2))
    facts: dict[str, Any] = {"taken": taken_cells, "left_out": unit.stop - unit.start - taken_cells}
    facts["largest_total"] = largest
    if bins_g2 is None:
        return facts, counter.histogram().to_bytes()
    genes_v, values_v = (b"".join(pair[side].tobytes() for pair in found) for side in (0, 1))
    return {**facts, "found": len(genes_v) // 8}, genes_v + values_v


def _taken(
    rows: Rows, sums: CellSums, atlas: Atlas, start: int, stop: int, config: MediansConfig
) -> npt.NDArray[np.bool_]:
    """The cells of a block that medians rest on: those that ingestion would keep."""
    if sums.faults_n.any():
        explain(rows, atlas, start, allow_fractional=config.allow_fractional)
    refuse_equal_sums(sums.totals_n, int((rows.values_z == 1).sum()), atlas)
    of_obs = np.array(obs_reasons(config, atlas, start, stop), dtype=object)
    taken_n: npt.NDArray[np.bool_] = of_obs == KEPT
    return taken_n & (counts_reasons(config, sums.totals_n, sums.n_genes_n, sums.mito_n) == KEPT)


def _made(
    config: MediansConfig,
    store: Store,
    genes: Vocabulary,
    total: Histogram,
    medians_g: npt.NDArray[np.float64],
    passes: _Passes,
    sources: Sequence[SourceSpec],
    earlier: Sequence[Earlier],
    seconds: float,
) -> Medians:
    """The vocabulary of the genes that were seen often enough, and what it rests on."""
    observed = total.observations(len(genes.gene_ids))
    kept = np.flatnonzero(observed >= config.min_observations)
    if not kept.size:
        raise AtlasError(f"no gene is detected in {config.min_observations:,} cells.", fix="Lower min_observations.")
    rare_g = observed < config.min_observations_for_median
    medians_g, origin_g = np.where(rare_g, np.nan, medians_g), np.where(rare_g, NONE, MEASURED).astype(object)
    if config.fallback:
        given = read_vocabulary(config.fallback, store)
        by_id = dict(zip(given.gene_ids, given.medians.tolist(), strict=True))
        for g in np.flatnonzero(rare_g):
            medians_g[g] = by_id.get(genes.gene_ids[g], np.nan)
            origin_g[g] = NONE if np.isnan(medians_g[g]) else FALLBACK
    if np.isnan(medians_g[kept]).all():
        raise AtlasError(
            f"no gene is detected in {config.min_observations_for_median:,} cells, so none has a median.",
            fix="Give more cells, or lower min_observations_for_median.",
        )
    return Medians(
        vocabulary=Vocabulary.build(
            [genes.gene_ids[g] for g in kept],
            medians_g[kept],
            symbols=[genes.symbols[g] for g in kept],
            window=config.window,
            name=config.name,
            special=config.special,
        ),
        observations=observed[kept],
        origins=tuple(origin_g[kept].tolist()),
        n_cells=passes.cells + sum(one.n_cells for one in earlier),
        cells_left_out=passes.cells_left_out,
        genes_left_out=int((observed < config.min_observations).sum()),
        largest_total=max([passes.largest_total, *(one.largest_total for one in earlier)]),
        refused=dict(passes.refused),
        histogram=total,
        genes=genes,
        sources=tuple((s.uri, s.etag) for s in sources) + tuple(pair for one in earlier for pair in one.sources),
        seconds=seconds,
    )
