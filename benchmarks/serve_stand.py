"""What the parts of the benchmark of the service stand on: model, cells, bodies, services, the embedder without one.

The model has the shape of the published 10M encoder and fresh weights: the arithmetic is that of a trained one. Counts
fall with the rank, so the service ranks each cell to the tokens that the offline embedder is given, and both have to
answer the same bits.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from ranked_cells import CellPool, cell_pool
from serve_load import Load

from genescale.client.arrow_bodies import ARROW_TYPE
from genescale.platform.bundle import Bundle, open_bundle, write_bundle
from genescale.platform.cluster import ray_cluster
from genescale.platform.settings import ClusterSettings, LogSettings, Settings, TrackingSettings
from genescale.serving.config import Limits, ServingConfig

JSON_TYPE = "application/json"
PATH, FLOOR = "/v1/embeddings", "/floor"
LAYER = "second_to_last"
RECIPE = "geneformer-v1-10m"
CORES = len(os.sched_getaffinity(0))
# What is left for the HTTP side when the model gets nearly all processors.
MODEL_SHARE = 0.9


@dataclass(frozen=True)
class Bodies:
    """The same cells as requests: `files` of `cells_per_request` cells each, in one form."""

    form: str
    files: list[str]
    cells: list[list[np.ndarray]]

    @property
    def tokens_n(self) -> np.ndarray:
        """Tokens of each request."""
        return np.array([sum(map(len, cells)) for cells in self.cells])

    @property
    def size_bytes(self) -> float:
        """Mean bytes of a request."""
        return float(np.mean([Path(file).stat().st_size for file in self.files]))

    def load(self, port: int, **more: Any) -> Load:
        """These requests as a load on the service at `port`."""
        return Load(port=port, path=PATH, bodies=self.files, content_type=self.form, accept=self.form, **more)


@dataclass(frozen=True)
class Stand:
    """What all parts share."""

    scratch: Path
    pool: CellPool
    bundle: Bundle
    quick: bool
    settings: Settings
    made: dict[str, Any] = field(default_factory=dict)

    def cells(self, count: int, *, around: float | None = None) -> list[np.ndarray]:
        """Cells evenly spread over the lengths that there are, or those whose length is nearest to a quantile."""
        by_length = np.argsort(self.pool.lengths, kind="stable")
        if around is not None:
            first = int(around * (len(by_length) - count))
            return [self.pool.cells[by_length[first + n]] for n in range(count)]
        chosen = [self.pool.cells[by_length[int((n + 0.5) / count * len(by_length))]] for n in range(count)]
        # Mixed, so that every request has short and long cells.
        return [chosen[at] for at in np.random.default_rng(0).permutation(count)]

    def bodies(self, cells: Sequence[np.ndarray], per_request: int, form: str = ARROW_TYPE) -> Bodies:
        """Requests of `per_request` cells each, as gene names and counts."""
        groups = [list(cells[at : at + per_request]) for at in range(0, len(cells), per_request)]
        folder = Path(tempfile.mkdtemp(dir=self.scratch))
        render = arrow_body if form == ARROW_TYPE else json_body
        files = []
        for at, group in enumerate(groups):
            files.append(str(folder / f"{at}.body"))
            Path(files[-1]).write_bytes(render(group, self.pool))
        return Bodies(form, files, groups)

    @contextlib.contextmanager
    def service(self, *, model: str | Bundle | None = None, **config: Any) -> Iterator[int]:
        """The service on the Ray that is there, and the floor beside it; gives their port."""
        # Ray reads its settings when it is imported, and `ray_cluster` sets them.
        import serve_floor

        from genescale.serving.app import service

        chosen = {"port": 0, "num_cpus": 1.0, "cache": str(self.scratch / "cache"), "device": "cpu", **config}
        limits = Limits(**chosen.pop("limits", {}))
        with service(model or self.bundle, ServingConfig(limits=limits, **chosen), self.settings) as running:
            serve_floor.lay(FLOOR, b"x" * 2_000, JSON_TYPE)
            yield int(running.url.rpartition(":")[2])


def counts_of(cell: np.ndarray, pool: CellPool) -> tuple[list[str], list[float]]:
    """Genes and counts that are ranked to this cell: the counts fall, and all medians are 1."""
    names = [pool.vocabulary.gene_of_token(int(token)) for token in cell]
    return names, [float(count) for count in range(len(cell), 0, -1)]


def json_body(cells: Sequence[np.ndarray], pool: CellPool) -> bytes:
    asked = [dict(zip(*counts_of(cell, pool), strict=True)) for cell in cells]
    return json.dumps({"cells": [{"counts": counts} for counts in asked], "layer": LAYER}).encode()


def arrow_body(cells: Sequence[np.ndarray], pool: CellPool) -> bytes:
    given = [counts_of(cell, pool) for cell in cells]
    ends = pa.array(np.cumsum([0, *map(len, cells)]), pa.int32())
    names = pa.array([name for names, _ in given for name in names]).dictionary_encode()
    counts = pa.array([count for _, counts in given for count in counts], pa.float32())
    batch = pa.record_batch(
        {"genes": pa.ListArray.from_arrays(ends, names), "counts": pa.ListArray.from_arrays(ends, counts)}
    )
    schema = batch.schema.with_metadata({"genescale": json.dumps({"layer": LAYER})})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(batch.replace_schema_metadata(schema.metadata))
    return sink.getvalue().to_pybytes()


@contextlib.contextmanager
def stand(quick: bool) -> Iterator[Stand]:
    """A Ray on all processors, a model, and a folder for everything, removed at the end."""
    with tempfile.TemporaryDirectory(prefix="gs-bench-") as folder:
        scratch = Path(folder)
        settings = Settings(
            cluster=ClusterSettings(temp_dir=str(scratch / "ray"), num_cpus=CORES, num_gpus=0),
            tracking=TrackingSettings(
                uri=f"sqlite:///{scratch}/mlflow.db",
                artifact_root=str(scratch / "artefacts"),
                journal_folder=str(scratch / "journal"),
            ),
            log=LogSettings(level="WARNING"),
        )
        pool = cell_pool()
        bundle = random_bundle(RECIPE, pool, scratch / "model")
        with ray_cluster(settings):
            yield Stand(scratch, pool, bundle, quick, settings)


def random_bundle(recipe: str, pool: CellPool, folder: Path, *, seed: int = 0) -> Bundle:
    """A model of a recipe's shape with fresh weights."""
    from genescale.training.model import new_model
    from genescale.training.recipe import read_recipe
    from genescale.training.weights import to_hf

    shape = read_recipe(recipe).encoder.for_vocabulary(pool.vocabulary)
    weights = to_hf(new_model(shape, seed=seed))
    return write_bundle(
        folder,
        kind="masked_gene_model",
        config=shape.to_hf(),
        weights=weights,
        vocabulary=pool.vocabulary,
        lineage={},
    )


# --- the embedder without a service ----------------------------------------------------------------------------------


class Offline:
    """The embedder as `genescale embed` uses it: `workers` processes of one thread each, the model loaded."""

    def __init__(self, bundle: Bundle, workers: int) -> None:
        self.workers = workers
        self._pool = ProcessPoolExecutor(
            workers, mp_context=get_context("spawn"), initializer=_load, initargs=(str(bundle.folder),)
        )
        list(self._pool.map(_warm, range(4 * workers)))

    def seconds(self, groups: Sequence[Sequence[np.ndarray]]) -> float:
        """Seconds on the wall for all groups, shared among the workers one group at a time."""
        began = time.perf_counter()
        list(self._pool.map(_embed, groups))
        return time.perf_counter() - began

    def cell_s(self, cells: Sequence[np.ndarray], repeats: int, *, every_s: float = 0.0) -> np.ndarray:
        """Median seconds of each cell by itself, on one worker: one after the other, or one every so many seconds."""
        return np.median(self._pool.submit(_each, cells, repeats, every_s).result(), axis=0)

    def vectors(self, groups: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
        """What is right, one array per group."""
        return list(self._pool.map(_embed, groups))

    def close(self) -> None:
        self._pool.shutdown()


_LOADED: list[Any] = []


def _load(folder: str) -> None:
    import torch

    from genescale.training.embedder import Embedder

    torch.set_num_threads(1)
    _LOADED.append(Embedder.load(open_bundle(Path(folder)), device="cpu"))


def _warm(_: int) -> None:
    vocabulary = _LOADED[0].vocabulary
    _embed([vocabulary.token_ids[:64].astype(vocabulary.token_dtype)] * 4)
    time.sleep(0.05)


def _embed(cells: Sequence[np.ndarray]) -> np.ndarray:
    found: np.ndarray = _LOADED[0].embed_cells(cells, layer=LAYER)
    return found


def _each(cells: Sequence[np.ndarray], repeats: int, every_s: float) -> np.ndarray:
    seconds = np.empty((repeats, len(cells)))
    due = time.perf_counter()
    for repeat in range(repeats):
        for at, cell in enumerate(cells):
            due += every_s
            time.sleep(max(0.0, due - time.perf_counter()))
            began = time.perf_counter()
            _embed([cell])
            seconds[repeat, at] = time.perf_counter() - began
    return seconds
