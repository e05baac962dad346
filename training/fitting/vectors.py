"""The encoder's vectors for the rows of a task: from a cache, from stored embeddings, or computed.

Axis suffixes: `n` cells, `r` rows, `t` tokens of one cell, `d` width.
"""

from __future__ import annotations

import numpy as np

from genescale.ingestion.corpus import Corpus
from genescale.platform.bundle import Bundle
from genescale.platform.errors import InputError
from genescale.platform.progress import SILENT, Progress
from genescale.platform.storage import Store
from genescale.training.embedder import Embedder, Precision
from genescale.training.embeddings import read_embeddings, read_manifest
from genescale.training.fitting.config import FinetuneConfig
from genescale.training.fitting.examples import POOLED, Examples
from genescale.training.fitting.task import Task
from genescale.training.fitting.vector_cache import VectorKey, read_vectors, write_vectors

CELLS_AT_ONCE = 256
PRECISIONS: dict[str, Precision] = {"fp32": "float32", "bf16": "bfloat16"}


def row_vectors(
    bundle: Bundle,
    corpus: Corpus,
    task: Task,
    config: FinetuneConfig,
    *,
    store: Store | None = None,
    cache_uri: str = "",
    embeddings_uri: str = "",
    progress: Progress = SILENT,
) -> np.ndarray:
    """Vectors of the task's rows, (r, d) float32.

    They come from the folder `embeddings_uri` that `genescale embed` wrote (cells only), from the cache in `cache_uri`,
    or from the encoder, which fills the cache. `store` reads and writes both (the corpus' own by default). Raises
    InputError when what is stored was made from another model, corpus version, layer or pooling.
    """
    store = corpus.store if store is None else store
    if embeddings_uri:
        return _stored(embeddings_uri, store, bundle, corpus, task, config)
    key = vector_key(bundle, corpus, task.examples, config)
    if cache_uri:
        cached_rd = read_vectors(cache_uri, key, store)
        if cached_rd is not None:
            return cached_rd
    embedder = Embedder.load(
        bundle,
        device=config.device,
        tokens_per_batch=config.tokens_per_batch,
        precision=PRECISIONS[config.precision],
    )
    vectors_rd = embed_rows(embedder, corpus, task.examples, config, progress)
    if cache_uri:
        write_vectors(cache_uri, key, vectors_rd, store)
    return vectors_rd


def vector_key(bundle: Bundle, corpus: Corpus, examples: Examples, config: FinetuneConfig) -> VectorKey:
    """What decides the vectors of these rows."""
    return VectorKey(
        bundle_digest=bundle.digest,
        corpus_uri=corpus.uri,
        corpus_version=corpus.version,
        layer=config.layer,
        pooling=config.pooling if config.unit == "cells" else "token",
        precision=config.precision,
        rows_digest=examples.rows_digest(),
    )


def embed_rows(
    embedder: Embedder, corpus: Corpus, examples: Examples, config: FinetuneConfig, progress: Progress = SILENT
) -> np.ndarray:
    """Vectors of rows, (r, d) float32, computed here; no more than a few hundred cells are held at a time."""
    vectors_rd = np.empty((examples.n_rows, embedder.width), dtype=np.float32)
    n_cells = len(examples.index_n)
    edges = np.searchsorted(examples.row_cell_r, np.arange(n_cells + 1))
    progress.start(n_cells, "cells embedded")
    for start in range(0, n_cells, CELLS_AT_ONCE):
        stop = min(start + CELLS_AT_ONCE, n_cells)
        cells = corpus.tokens(examples.index_n[start:stop].tolist())
        rows = slice(int(edges[start]), int(edges[stop]))
        which_r, token_r = examples.row_cell_r[rows] - start, examples.row_token_r[rows]
        vectors_rd[rows] = _vectors_of(embedder, cells, which_r, token_r, config)
        progress.advance(stop - start)
    return vectors_rd


def _vectors_of(
    embedder: Embedder, cells: list[np.ndarray], which_r: np.ndarray, token_r: np.ndarray, config: FinetuneConfig
) -> np.ndarray:
    """Vectors of the rows of some cells, (r, d); `which_r` rises."""
    vectors_rd = np.empty((len(which_r), embedder.width), dtype=np.float32)
    pooled_r = token_r == POOLED
    if pooled_r.any():
        embedded_nd = embedder.embed_cells(cells, layer=config.layer, pooling=config.pooling)
        vectors_rd[pooled_r] = embedded_nd[which_r[pooled_r]]
    if pooled_r.all():
        return vectors_rd
    for found in embedder.hidden(cells, layer=config.layer):
        for cell, hidden_td in found.per_cell():
            rows = np.arange(*np.searchsorted(which_r, (cell, cell + 1)))
            rows = rows[~pooled_r[rows]]
            vectors_rd[rows] = hidden_td.cpu().numpy()[token_r[rows]]
    return vectors_rd


def _stored(uri: str, store: Store, bundle: Bundle, corpus: Corpus, task: Task, config: FinetuneConfig) -> np.ndarray:
    """Vectors (r, d) from a folder of `genescale embed`; InputError when it is of another model, corpus or kind."""
    if task.unit != "cells":
        raise InputError(
            "stored embeddings hold cells, and this task reads genes.", where=uri, fix="Leave the embeddings out."
        )
    manifest = read_manifest(uri, store)
    wanted = {
        "model": (manifest.bundle_digest, bundle.digest),
        "corpus": (f"{manifest.corpus_uri}@{manifest.corpus_version}", f"{corpus.uri}@{corpus.version}"),
        "layer": (manifest.layer, config.layer),
        "pooling": (manifest.pooling, config.pooling),
        "precision": (manifest.precision, PRECISIONS[config.precision]),
    }
    for name, (stored, asked) in wanted.items():
        if stored != asked:
            raise InputError(
                f"the embeddings are of another {name}: {stored}, not {asked}.",
                where=uri,
                fix="Embed again with the same settings, or leave the embeddings out.",
            )
    return read_embeddings(uri, store)[1][task.examples.index_n]
