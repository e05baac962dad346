"""Make an index from a corpus: its cells' vectors, labels, and how near reference cells are to one another.

Axis suffixes: `n` cells of the index, `d` width, `s` sampled cells, `k` neighbours.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy

from genescale.ingestion.corpus import Corpus
from genescale.platform.bundle import Bundle
from genescale.platform.errors import CorpusError, InputError, IntegrityError, SettingsError
from genescale.platform.progress import SILENT, Progress
from genescale.platform.storage import Store
from genescale.serving.neighbours.examples import example_rows, write_examples
from genescale.serving.neighbours.index_folder import (
    CELLS,
    EXAMPLES,
    GEOMETRY,
    MAP,
    VECTORS,
    IndexManifest,
    file_digests,
    publish,
    refuse_finished,
)
from genescale.serving.neighbours.layout import laid_out, write_places
from genescale.serving.neighbours.reference import DISTANCES, ID_COLUMNS, MEAN
from genescale.serving.neighbours.spread import group_codes, most_neighbors, reference_distances, sample
from genescale.serving.neighbours.vectors import Search, VectorIndex, unit_vectors
from genescale.training.embed import check_same_vocabulary
from genescale.training.embedder import TOKENS_PER_BATCH, Embedder, Layer, Pooling, check_pooling, layers_to_run
from genescale.training.embeddings import read_embeddings, read_manifest
from genescale.training.labels.selection import check_columns, select_cells

SEARCHES: tuple[Search, ...] = get_args(Search)
# Where a search through every vector takes about as long as the model takes for a short cell.
LARGEST_EXACT = 100_000
CELLS_AT_ONCE = 512
VECTORS_AT_ONCE = 65_536


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """Which cells become a reference, what is known of each, and how they are searched."""

    where: str = ""
    """Condition in SQL on the cells' columns; empty takes all."""
    columns: tuple[str, ...] = ("cell_type", "tissue")
    """Labels that the service answers with: they become public."""
    max_cells: int = 0
    """Cells drawn at random from those of `where`; 0 takes all."""
    layer: Layer = "second_to_last"
    pooling: Pooling = "mean_genes"
    device: str = "auto"
    search: str = "auto"
    """exact, graph, or auto: a graph beyond 100,000 cells."""
    apart: str = ""
    """Column, such as donor_id: distances between reference cells are taken to cells with another value only."""
    sampled: int = 2_000
    """Reference cells whose distances to their neighbours are measured."""
    map_cells: int = 20_000
    """Cells that are laid out in two dimensions; further ones are placed among them. 0 makes no map."""
    examples: int = 3
    """Cells of each label of the first column whose genes are published as examples; 0 publishes none."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.search not in ("auto", *SEARCHES):
            raise SettingsError(
                f"'{self.search}' is not a search.", where="search", fix=f"Use auto, {' or '.join(SEARCHES)}."
            )
        for name, least in (("max_cells", 0), ("sampled", 1), ("map_cells", 0), ("examples", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise SettingsError(f"{getattr(self, name)} is too small.", where=name, fix=f"Use {least} or more.")
        for name in ID_COLUMNS:
            if name in self.columns:
                raise SettingsError(f"{name} is in every answer.", where="columns", fix="Leave it out.")


@dataclass(frozen=True, kw_only=True)
class IndexReport:
    """What was made."""

    uri: str
    manifest: IndexManifest
    labelled: dict[str, int]
    """Cells with a value, by column."""
    size_bytes: int


def build_index(
    bundle: Bundle,
    corpus: Corpus,
    *,
    out_uri: str,
    store: Store,
    config: IndexConfig = IndexConfig(),
    embeddings_uri: str = "",
    progress: Progress = SILENT,
) -> IndexReport:
    """Write an index of the cells of `corpus` into the folder `out_uri`.

    Vectors come from what `genescale embed` wrote to `embeddings_uri`, or are made here. Raises AlreadyExistsError when
    the folder holds an index, CorpusError for unknown columns, another vocabulary or too few cells, and InputError when
    the stored embeddings are of another model, corpus version, layer or pooling.
    """
    refuse_finished(out_uri, store)
    check_same_vocabulary(bundle, corpus)
    check_pooling(config.pooling, bundle.vocabulary)
    layers_to_run(config.layer, int(bundle.config["num_hidden_layers"]))
    check_columns(corpus, [*config.columns, *([config.apart] if config.apart else [])])
    cells = _chosen(corpus, config)
    if embeddings_uri:
        precision, stored_nd = _stored(embeddings_uri, store, bundle, corpus, config)
        vectors_nd = stored_nd[cells.index_n]
        del stored_nd
    else:
        precision, vectors_nd = "float32", _embedded(bundle, corpus, cells.index_n, config, progress)
    search = _search(config, len(vectors_nd))
    with tempfile.TemporaryDirectory(prefix="genescale-index-") as scratch:
        folder = Path(scratch)
        sampled = _write_files(folder, cells, vectors_nd, search, config)
        _write_examples(folder, cells, corpus, config)
        manifest = IndexManifest(
            bundle_digest=bundle.digest,
            vocabulary_digest=bundle.vocabulary.digest,
            corpus_uri=corpus.uri,
            corpus_version=corpus.version,
            where=config.where,
            layer=config.layer,
            pooling=config.pooling,
            precision=precision,
            width=vectors_nd.shape[1],
            cells=len(vectors_nd),
            columns=tuple(dict.fromkeys(config.columns)),
            search=search,
            max_neighbors=cells.max_neighbors,
            apart=config.apart,
            sampled=sampled,
            files=file_digests(folder),
        )
        publish(folder, manifest, out_uri, store)
        size_bytes = sum(path.stat().st_size for path in folder.iterdir())
    labelled = {name: len(vectors_nd) - cells.table.column(name).null_count for name in manifest.columns}
    return IndexReport(uri=out_uri, manifest=manifest, labelled=labelled, size_bytes=size_bytes)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Cells:
    """The cells of an index."""

    index_n: np.ndarray
    """(n) int64: rising indices in the corpus."""
    table: pa.Table
    """Ids and labels as texts."""
    codes_n: np.ndarray | None
    """(n) int64: groups that are kept apart, if any."""
    max_neighbors: int


def _chosen(corpus: Corpus, config: IndexConfig) -> _Cells:
    found_n = select_cells(corpus, config.where)
    if config.max_cells and len(found_n) > config.max_cells:
        generator = np.random.default_rng([config.seed, len(found_n)])
        found_n = np.sort(generator.choice(found_n, config.max_cells, replace=False))
    if len(found_n) < 2:
        raise CorpusError(
            f"{len(found_n)} cells are no reference.", where=corpus.uri, fix="Take more cells, or another --where."
        )
    names = list(dict.fromkeys([*ID_COLUMNS, *config.columns]))
    known = corpus.cells([*names, *([config.apart] if config.apart and config.apart not in names else [])])
    known = known.take(pa.array(found_n))
    codes_n = group_codes(known.column(config.apart)) if config.apart else None
    texts = {name: known.column(name).cast(pa.string()) for name in names}
    return _Cells(
        index_n=found_n,
        table=pa.table({name: text if name == "cell_id" else text.dictionary_encode() for name, text in texts.items()}),
        codes_n=codes_n,
        max_neighbors=most_neighbors(len(found_n), codes_n, column=config.apart),
    )


def _search(config: IndexConfig, n_cells: int) -> Search:
    if config.search == "auto":
        return "graph" if n_cells > LARGEST_EXACT else "exact"
    return "graph" if config.search == "graph" else "exact"


def _write_files(folder: Path, cells: _Cells, vectors_nd: np.ndarray, search: Search, config: IndexConfig) -> int:
    """Write the files of an index into a local folder; returns how many cells were sampled."""
    index, mean_d = indexed(vectors_nd, search)
    sampled_s = sample(len(vectors_nd), config.sampled, config.seed)
    distances_ks = reference_distances(index, sampled_s, cells.max_neighbors, codes_n=cells.codes_n)
    index.write(folder / VECTORS)
    pq.write_table(cells.table, folder / CELLS, compression="zstd", write_page_checksum=True)
    safetensors.numpy.save_file({MEAN: mean_d, DISTANCES: distances_ks}, folder / GEOMETRY)
    places_n2 = laid_out(index, config.map_cells, config.seed)
    if places_n2 is not None:
        write_places(folder / MAP, places_n2)
    return len(sampled_s)


def _write_examples(folder: Path, cells: _Cells, corpus: Corpus, config: IndexConfig) -> None:
    if not config.examples:
        return
    labels = cells.table.column(config.columns[0]) if config.columns else None
    rows_e = example_rows(labels, len(cells.index_n), config.examples, config.seed)
    write_examples(folder / EXAMPLES, rows_e, corpus.tokens(cells.index_n[rows_e].tolist()))


def _stored(uri: str, store: Store, bundle: Bundle, corpus: Corpus, config: IndexConfig) -> tuple[str, np.ndarray]:
    """Precision and vectors of every cell of the corpus, from a finished folder of embeddings of exactly these."""
    known = read_manifest(uri, store)
    wanted = {
        "bundle_digest": bundle.digest,
        "corpus_uri": corpus.uri,
        "corpus_version": corpus.version,
        "layer": config.layer,
        "pooling": config.pooling,
    }
    for name, value in wanted.items():
        if getattr(known, name) != value:
            raise InputError(
                f"the embeddings have {name} {getattr(known, name)}, not {value}.",
                where=uri,
                fix="Embed this corpus with this model, or name what the embeddings are of.",
            )
    vectors_nd = read_embeddings(uri, store)[1]
    if len(vectors_nd) != corpus.n_cells:
        raise IntegrityError(f"holds {len(vectors_nd):,} of the corpus's {corpus.n_cells:,} cells.", where=uri)
    return known.precision, vectors_nd


def _embedded(
    bundle: Bundle, corpus: Corpus, index_n: np.ndarray, config: IndexConfig, progress: Progress
) -> np.ndarray:
    embedder = Embedder.load(bundle, device=config.device, tokens_per_batch=TOKENS_PER_BATCH)
    vectors_nd = np.empty((len(index_n), embedder.width), dtype=np.float32)
    progress.start(len(index_n), "cells")
    for start in range(0, len(index_n), CELLS_AT_ONCE):
        part_n = index_n[start : start + CELLS_AT_ONCE]
        cells = corpus.tokens(part_n.tolist())
        vectors_nd[start : start + len(part_n)] = embedder.embed_cells(
            cells, layer=config.layer, pooling=config.pooling
        )
        progress.advance(len(part_n))
    return vectors_nd


def indexed(vectors_nd: np.ndarray, search: Search) -> tuple[VectorIndex, np.ndarray]:
    """Vectors (n, d) as an index, and the mean (d) float64 that was taken off their unit vectors."""
    mean_d = np.zeros(vectors_nd.shape[1])
    for units_nd in _units(vectors_nd):
        mean_d += units_nd.sum(axis=0)
    mean_d /= len(vectors_nd)
    index = VectorIndex.empty(vectors_nd.shape[1], search)
    for units_nd in _units(vectors_nd):
        index.add(units_nd - mean_d)
    return index, mean_d


def _units(vectors_nd: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(vectors_nd), VECTORS_AT_ONCE):
        yield unit_vectors(vectors_nd[start : start + VECTORS_AT_ONCE], what=f"cells from {start:,} on")
