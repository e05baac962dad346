"""Embed a whole corpus offline: Ray actors hold the model, every unit of cells becomes one Parquet file.

Axis suffixes: `n` cells, `d` width.

A unit is a run of cells within one part of the corpus. Its file has a name that follows from the model, the corpus
version and the settings, so a run that was cut off does only what is missing, and a finished one does nothing. The
manifest comes last: without it there is no result. Files in the order of the manifest hold the cells in the order of
`Corpus.cells`.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from genescale.ingestion.corpus import Corpus
from genescale.ingestion.schema import METADATA_COLUMNS
from genescale.platform.bundle import Bundle
from genescale.platform.errors import AlreadyExistsError, CorpusError, NotFoundError, SettingsError
from genescale.platform.progress import SILENT, Progress
from genescale.platform.settings import build
from genescale.platform.storage import Store, join
from genescale.training.actors import actors_for, gpus_on, work_off
from genescale.training.embedder import (
    TOKENS_PER_BATCH,
    Embedder,
    Layer,
    Pooling,
    Precision,
    check_pooling,
    layers_to_run,
)
from genescale.training.embeddings import EMBEDDING_COLUMN, IDENTITY_COLUMNS, MANIFEST, Manifest, read_manifest
from genescale.training.freight import Received, ship

RunIn = Literal["cluster", "process"]
# Units of a corpus when `tokens_per_unit` is 0: enough of them to share among actors and to show progress, each
# large enough (seconds of work) that Ray's milliseconds for each do not count.
UNITS_WISHED = 64
SMALLEST_UNIT_TOKENS, LARGEST_UNIT_TOKENS = 32_768, 4_000_000


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """How a corpus is embedded."""

    layer: Layer = "second_to_last"
    pooling: Pooling = "mean_genes"
    precision: Precision = "float32"
    device: str = "auto"
    """auto, cpu or cuda; auto takes the cluster's GPUs when it has some."""
    run_in: RunIn = "cluster"
    """`cluster`: on Ray. `process`: in this one, which needs no Ray."""
    actors: int = 0
    """Processes that hold the model; 0 means one for each GPU, or for each processor without GPUs."""
    tokens_per_batch: int = TOKENS_PER_BATCH
    tokens_per_unit: int = 0
    """Tokens of one output file; 0 chooses by the size of the corpus."""

    def __post_init__(self) -> None:
        if self.device not in ("auto", "cpu", "cuda"):
            raise SettingsError(f"'{self.device}' is not a device.", where="device", fix="Use auto, cpu or cuda.")
        if self.run_in not in get_args(RunIn):
            raise SettingsError(f"'{self.run_in}' is no place to run in.", where="run_in", fix="cluster or process.")
        for name, least in (("actors", 0), ("tokens_per_batch", 1), ("tokens_per_unit", 0)):
            if getattr(self, name) < least:
                raise SettingsError(f"{getattr(self, name)} is too small.", where=name, fix=f"Use {least} or more.")


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Rows start to stop of one part of the corpus; `first` is the global index of its first cell."""

    number: int
    part: int
    start: int
    stop: int
    first: int
    tokens: int

    @property
    def cells(self) -> int:
        """How many cells it has."""
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True)
class EmbedReport:
    """What one run did. `tokens_per_s` counts only what this run computed; 0 when all was there already."""

    uri: str
    cells: int
    tokens: int
    computed_cells: int
    computed_tokens: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        """Tokens embedded per second of this run."""
        return self.computed_tokens / self.seconds if self.computed_tokens else 0.0


def embed_corpus(
    bundle: Bundle,
    corpus: Corpus,
    *,
    out_uri: str,
    store: Store,
    config: EmbedConfig = EmbedConfig(),
    progress: Progress = SILENT,
) -> EmbedReport:
    """Embed every cell of `corpus` and write Parquet files and a manifest into the folder `out_uri`.

    Ray must be running (`ray_cluster`), unless the config says to run in this process. Raises CorpusError when the
    corpus was made with another vocabulary, and AlreadyExistsError when the folder holds a finished run of another
    model, corpus version or setting.
    """
    began = time.monotonic()
    check_same_vocabulary(bundle, corpus)
    check_pooling(config.pooling, bundle.vocabulary)
    layers_to_run(config.layer, int(bundle.config["num_hidden_layers"]))
    lengths_n = corpus.cells(["length"]).column("length").to_numpy()
    units = plan_units([part.rows for part in corpus.parts], lengths_n, config.tokens_per_unit)
    manifest = _manifest(bundle, corpus, config, units)
    missing = _missing(units, manifest, out_uri, store)
    progress.start(manifest.cells, "cells")
    progress.advance(manifest.cells - sum(unit.cells for unit in missing))
    if missing:
        run = _Run(key=manifest.key, corpus=corpus, out_uri=out_uri, store=store, config=config)
        for unit in _worked_off(missing, bundle, run):
            progress.advance(unit.cells)
        # Another run may have ended here meanwhile.
        _refuse_other(manifest, out_uri, store)
    store.write(join(out_uri, MANIFEST), json.dumps(asdict(manifest), indent=1).encode())
    return EmbedReport(
        uri=out_uri,
        cells=manifest.cells,
        tokens=manifest.tokens,
        computed_cells=sum(unit.cells for unit in missing),
        computed_tokens=sum(unit.tokens for unit in missing),
        seconds=time.monotonic() - began,
    )


def check_same_vocabulary(bundle: Bundle, corpus: Corpus) -> None:
    """CorpusError unless the corpus was tokenised with the model's vocabulary."""
    if bundle.vocabulary.digest != corpus.vocabulary.digest:
        raise CorpusError(
            f"the corpus was made with vocabulary {corpus.vocabulary!r}, the model with {bundle.vocabulary!r}.",
            where=corpus.uri,
            fix="Ingest the atlases with the model's vocabulary.parquet, or take a model of this vocabulary.",
        )


def plan_units(rows: Sequence[int], lengths_n: np.ndarray, tokens_per_unit: int) -> list[Unit]:
    """Cut every part (of `rows` cells) into runs of about `tokens_per_unit` tokens: a function of its arguments."""
    if not tokens_per_unit:
        wished = int(lengths_n.sum(dtype=np.int64)) // UNITS_WISHED
        tokens_per_unit = int(np.clip(wished, SMALLEST_UNIT_TOKENS, LARGEST_UNIT_TOKENS))
    units: list[Unit] = []
    first = 0
    for part, n_rows in enumerate(rows):
        part_lengths_n = lengths_n[first : first + n_rows].astype(np.int64)
        # Cell i belongs to the run in which its first token falls.
        run_n = (np.cumsum(part_lengths_n) - part_lengths_n) // tokens_per_unit
        starts = [*np.flatnonzero(np.diff(run_n, prepend=-1)).tolist(), n_rows]
        for start, stop in itertools.pairwise(starts):
            tokens = int(part_lengths_n[start:stop].sum())
            units.append(Unit(number=len(units), part=part, start=start, stop=stop, first=first + start, tokens=tokens))
        first += n_rows
    return units


def file_name(key: str, unit: Unit) -> str:
    """Name of the file that holds a unit's embeddings."""
    return f"part-{key[:16]}-{unit.number:06d}.parquet"


def _manifest(bundle: Bundle, corpus: Corpus, config: EmbedConfig, units: Sequence[Unit]) -> Manifest:
    what = {
        "bundle_digest": bundle.digest,
        "vocabulary_digest": bundle.vocabulary.digest,
        "corpus_uri": corpus.uri,
        "corpus_version": corpus.version,
        "layer": config.layer,
        "pooling": config.pooling,
        "precision": config.precision,
    }
    # A corpus that was deleted and made anew can have the same address and version, but not the same parts.
    content = [what, [(part.uri, part.rows) for part in corpus.parts], [(u.part, u.start, u.stop) for u in units]]
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return build(
        Manifest,
        {
            **what,
            "key": key,
            "width": int(bundle.config["hidden_size"]),
            "cells": corpus.n_cells,
            "tokens": sum(unit.tokens for unit in units),
            "files": [file_name(key, unit) for unit in units],
        },
    )


def _missing(units: Sequence[Unit], manifest: Manifest, out_uri: str, store: Store) -> list[Unit]:
    """The units whose files are not there; raises AlreadyExistsError for a finished run of something else."""
    _refuse_other(manifest, out_uri, store)
    there = {entry.uri.rsplit("/", 1)[-1] for entry in store.list(out_uri)}
    return [unit for unit in units if file_name(manifest.key, unit) not in there]


def _refuse_other(manifest: Manifest, out_uri: str, store: Store) -> None:
    """AlreadyExistsError when the folder holds a finished run of something else."""
    try:
        stored = read_manifest(out_uri, store)
    except NotFoundError:
        return
    if stored.key != manifest.key:
        raise AlreadyExistsError(
            f"the folder holds embeddings of model {stored.bundle_digest[:12]}, corpus "
            f"{stored.corpus_uri}@{stored.corpus_version}, {stored.layer}, {stored.pooling}.",
            where=out_uri,
            fix="Choose another output folder, or delete this one.",
        )


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What all units have in common."""

    key: str
    corpus: Corpus
    out_uri: str
    store: Store
    config: EmbedConfig


def _worked_off(units: Sequence[Unit], bundle: Bundle, run: _Run) -> Iterator[Unit]:
    config = run.config
    if config.run_in == "process":
        yield from map(_UnitWriter(bundle, run, device=config.device), units)
        return
    gpus = gpus_on(config.device)
    freight = [ship(bundle), ray.put(run), "auto" if gpus else "cpu"]
    size = actors_for(config.actors, gpus)
    yield from work_off(units, _ShippedWriter, freight, size=size, gpus=gpus, where=run.out_uri)


class _UnitWriter:
    """Turns units into files."""

    def __init__(self, bundle: Bundle, run: _Run, *, device: str) -> None:
        self.run, self.files = run, _UnitFiles(bundle, run.corpus, run.config, device=device)

    def __call__(self, unit: Unit) -> Unit:
        self.run.store.write(join(self.run.out_uri, file_name(self.run.key, unit)), self.files.of(unit))
        return unit


class _ShippedWriter(_UnitWriter):
    """The same in a Ray actor."""

    def __init__(self, shipped: Any, run: Any, device: str) -> None:
        # Kept: its folder lives as long as it does.
        self.received = Received(shipped)
        super().__init__(self.received.bundle, ray.get(run), device=device)


class _UnitFiles:
    """The content of units' files, with the model loaded."""

    def __init__(self, bundle: Bundle, corpus: Corpus, config: EmbedConfig, *, device: str) -> None:
        self.corpus, self.config = corpus, config
        self.embedder = Embedder.load(
            bundle, device=device, tokens_per_batch=config.tokens_per_batch, precision=config.precision
        )
        self.part = -1
        self.scalars: pa.Table | None = None

    def of(self, unit: Unit) -> bytes:
        """The Parquet bytes of one unit."""
        if self.scalars is None or self.part != unit.part:
            self.scalars = self.corpus.cells([*IDENTITY_COLUMNS, *METADATA_COLUMNS], parts=[unit.part])
            self.part = unit.part
        cells = self.corpus.tokens(range(unit.first, unit.first + unit.cells))
        vectors_nd = self.embedder.embed_cells(cells, layer=self.config.layer, pooling=self.config.pooling)
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors_nd.reshape(-1)), vectors_nd.shape[1])
        table = self.scalars.slice(unit.start, unit.cells).append_column(EMBEDDING_COLUMN, column)
        sink = io.BytesIO()
        strings = [*IDENTITY_COLUMNS[:2], *METADATA_COLUMNS]
        pq.write_table(table, sink, compression="zstd", use_dictionary=strings, write_page_checksum=True)
        return sink.getvalue()
