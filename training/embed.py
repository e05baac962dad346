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
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch

from genescale.ingestion.corpus import Corpus
from genescale.ingestion.schema import METADATA_COLUMNS
from genescale.platform.bundle import Bundle
from genescale.platform.errors import AlreadyExistsError, CorpusError, GenescaleError, NotFoundError, SettingsError
from genescale.platform.progress import SILENT, Progress
from genescale.platform.settings import build
from genescale.platform.storage import Store, join
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
# large enough (seconds of work) that Ray's 20 ms per block do not count.
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
        for row in _worked_off(missing, manifest.key, bundle, corpus, out_uri, store, config):
            progress.advance(row["cells"])
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


def _worked_off(
    units: Sequence[Unit], key: str, bundle: Bundle, corpus: Corpus, out_uri: str, store: Store, config: EmbedConfig
) -> Iterator[dict[str, Any]]:
    if config.run_in == "cluster":
        yield from _run(units, key, bundle, corpus, out_uri, store, config)
        return
    files = _UnitFiles(bundle, corpus, config, device=config.device)
    for unit in units:
        store.write(join(out_uri, file_name(key, unit)), files.of(unit))
        yield {"cells": unit.cells}


def _run(
    units: Sequence[Unit],
    key: str,
    bundle: Bundle,
    corpus: Corpus,
    out_uri: str,
    store: Store,
    config: EmbedConfig,
) -> Iterator[dict[str, Any]]:
    gpus = int(ray.cluster_resources().get("GPU", 0)) if config.device != "cpu" else 0
    if config.device == "cuda" and not gpus:
        raise SettingsError("this Ray cluster has no GPU.", where="device", fix="Use device 'auto' or 'cpu'.")
    wished = config.actors or gpus or int(ray.cluster_resources().get("CPU", 1))
    size = max(1, min(wished, len(units)))
    rows = [{**asdict(unit), "name": file_name(key, unit)} for unit in units]
    answers = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _UnitEmbedder,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=size, initial_size=size),
        num_cpus=0 if gpus else 1,
        num_gpus=1 if gpus else 0,
        fn_constructor_kwargs={
            "shipped": ship(bundle),
            "corpus": corpus,
            "out_uri": out_uri,
            "store": store,
            "config": config,
        },
    )
    try:
        yield from answers.iter_rows()
    except Exception as error:
        _let_go(error)
        raise original_error(error) from error


class _UnitEmbedder:
    """A Ray actor: holds the model and turns units into files."""

    def __init__(self, shipped: Any, corpus: Corpus, out_uri: str, store: Store, config: EmbedConfig) -> None:
        self.out_uri, self.store = out_uri, store
        self.received = Received(shipped)
        device = "auto" if torch.cuda.is_available() and config.device != "cpu" else "cpu"
        self.files = _UnitFiles(self.received.bundle, corpus, config, device=device)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        for index in range(len(batch["name"])):
            unit = Unit(**{name: int(batch[name][index]) for name in Unit.__dataclass_fields__})
            self.store.write(join(self.out_uri, str(batch["name"][index])), self.files.of(unit))
        return {"cells": batch["stop"] - batch["start"]}


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


def _let_go(error: BaseException) -> None:
    """Part an error of Ray Data from the frames it passed through.

    They hold Ray Data's actors, which would keep their processors for as long as somebody keeps the error. Frames that
    have ended are emptied; one in a thread that still runs cannot be, so nothing may point to it either.
    """
    known: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        if (one := waiting.pop()) is not None and one not in known:
            known.append(one)
            waiting += [one.__cause__, one.__context__]
    for one in known:
        traceback.clear_frames(one.__traceback__)
        one.__traceback__ = None


def original_error(error: BaseException) -> BaseException:
    """The error of ours that a Ray worker raised, from under Ray's wrappers; else `error` itself."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, GenescaleError):
            return seen
        inner = getattr(seen, "cause", None)
        seen = inner if isinstance(inner, BaseException) else seen.__cause__
    return error
