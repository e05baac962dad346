"""Attention over the cells of a corpus: choose cells, read lists, look once, write tables, graph, page and record.

Axis suffixes: `n` chosen cells, `t` token ids.

No Ray: one process, one device. A run is minutes for hundreds of cells, which is what averages of attention need.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import polars as pl

from genescale.ingestion.corpus import Corpus
from genescale.perturbation.attention.analysis import AttentionTables, analyse, detected
from genescale.perturbation.attention.attention_page import page
from genescale.perturbation.attention.config import AttentionConfig
from genescale.perturbation.attention.graph_files import graphml
from genescale.perturbation.attention.list_shares import NamedGenes
from genescale.perturbation.attention.list_tests import Donors, significant
from genescale.perturbation.attention.named_lists import named_lists
from genescale.perturbation.attention.rank_summary import layer_summary
from genescale.platform.bundle import Bundle
from genescale.platform.progress import SILENT, Progress
from genescale.platform.runs import Tracker
from genescale.platform.storage import Store, join
from genescale.training.embed import check_same_vocabulary
from genescale.training.embedder import check_cells, pick_device
from genescale.training.evaluation.measured_cells import texts
from genescale.training.labels.selection import select_cells
from genescale.training.model import Encoder
from genescale.training.weights import load_encoder

CELLS_AT_ONCE = 256
RECORD, PAGE, GRAPH = "attention.json", "attention.html", "graph.graphml"
RECORD_SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionResult:
    """Everything the page and the record need."""

    tables: AttentionTables
    config: AttentionConfig
    lists: tuple[NamedGenes, ...]
    donors: Donors
    provenance: Mapping[str, Any]
    left_out: Mapping[str, int]
    """Cells of the corpus that were not looked at, by reason."""
    n_layers: int
    n_heads: int
    seconds: float

    @property
    def n_cells(self) -> int:
        """Cells that were looked at."""
        return len(self.donors.code_n)

    def metrics(self) -> dict[str, float]:
        """The main numbers, for a tracker."""
        found = {"cells": float(self.n_cells), "seconds": self.seconds}
        if (lists := self.tables.lists) is not None:
            for number, name in enumerate(one.name for one in self.lists):
                rows = lists.filter((pl.col("list") == name) & (pl.col("head") > 0))
                found[f"list_{number}_heads_above"] = float(len(significant(rows, above=True)))
                found[f"list_{number}_heads_below"] = float(len(significant(rows, above=False)))
        return found

    def to_dict(self) -> dict[str, Any]:
        """The record: what was asked, of what, and how many of everything."""
        tables = self.tables
        return {
            "schema_version": RECORD_SCHEMA_VERSION,
            "provenance": dict(self.provenance),
            "config": asdict(self.config),
            "cells": {"looked_at": self.n_cells, "donors": len(self.donors.names), "left_out": dict(self.left_out)},
            "encoder": {"layers": self.n_layers, "heads": self.n_heads},
            "genes_in_cells": len(tables.genes),
            "lists": [_list_record(one, tables) for one in self.lists],
            "graph": None
            if tables.edges is None or tables.nodes is None
            else {"genes": len(tables.nodes), "pairs": tables.n_pairs, "edges": len(tables.edges)},
            "seconds": round(self.seconds, 2),
        }


def attend_corpus(
    bundle: Bundle,
    corpus: Corpus,
    config: AttentionConfig,
    *,
    tracker: Tracker,
    out_uri: str,
    store: Store,
    model: str = "",
    progress: Progress = SILENT,
) -> AttentionResult:
    """Analyse the attention of a model in the cells that `config` chooses, and write everything below `out_uri`.

    Raises CorpusError, InputError, UnknownGeneError, LimitError or SettingsError before anything is computed.
    """
    began = time.monotonic()
    check_same_vocabulary(bundle, corpus)
    lists = named_lists(config.genes, corpus.vocabulary, store)
    index_n, left_out = _chosen(corpus, config)
    donors = _donors(corpus, index_n)
    encoder = load_encoder(bundle).to(pick_device(config.device)).requires_grad_(False).eval()
    config.check_encoder(len(encoder.layers), encoder.config.heads)
    model = model or str(bundle.folder)
    provenance = {
        "model": model,
        "bundle_digest": bundle.digest,
        "corpus": f"{corpus.uri}@{corpus.version}",
        "vocabulary_digest": corpus.vocabulary.digest,
    }
    tags = {"stage": "attention", "bundle_digest": bundle.digest}
    with tracker.run(f"attention {model}", params={**asdict(config), **provenance}, tags=tags) as run:
        progress.start(2 * len(index_n), "cells read, then looked at")
        cells_t = detected(_cells_of(corpus, index_n, encoder, progress), corpus.vocabulary.size)
        tables = analyse(
            encoder,
            corpus.vocabulary,
            _cells_of(corpus, index_n, encoder),
            donors,
            config,
            cells_t=cells_t,
            lists=lists,
            progress=progress,
        )
        result = AttentionResult(
            tables=tables,
            config=config,
            lists=lists,
            donors=donors,
            provenance={**provenance, "run_id": run.id},
            left_out=left_out,
            n_layers=len(encoder.layers),
            n_heads=encoder.config.heads,
            seconds=time.monotonic() - began,
        )
        for name, data in files(result, page(result)).items():
            store.write(join(out_uri, name), data)
            if name in (RECORD, PAGE):
                run.log_text(data.decode(), f"attention/{name}")
        run.log_metrics(result.metrics())
    return result


def files(result: AttentionResult, html: str) -> dict[str, bytes]:
    """Everything that is written, by name: each table as Parquet and as CSV."""
    tables = result.tables
    named = {
        "between_ranks": tables.between_ranks,
        "heads": tables.heads,
        "layers": layer_summary(tables.between_ranks, tables.heads),
        "genes": tables.genes,
        "lists": tables.lists,
        "list_genes": tables.list_genes,
        "graph_nodes": tables.nodes,
        "graph_edges": tables.edges,
    }
    made: dict[str, bytes] = {}
    for name, table in named.items():
        if table is not None:
            sink = io.BytesIO()
            table.write_parquet(sink, compression="zstd")
            made[f"{name}.parquet"] = sink.getvalue()
            made[f"{name}.csv"] = table.write_csv().encode()
    if tables.nodes is not None and tables.edges is not None:
        about = {name: str(result.provenance[name]) for name in ("model", "bundle_digest", "corpus")}
        made[GRAPH] = graphml(tables.nodes, tables.edges, {**about, "n_cells": result.n_cells})
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in made.items()}
    record = {**result.to_dict(), "files": digests}
    return {**made, PAGE: html.encode(), RECORD: json.dumps(record, indent=1, allow_nan=False).encode()}


def _list_record(one: NamedGenes, tables: AttentionTables) -> dict[str, Any]:
    assert tables.lists is not None
    assert tables.list_genes is not None
    rows = tables.lists.filter(pl.col("list") == one.name)
    there = tables.list_genes.filter(pl.col("list") == one.name)["gene_id"].n_unique()
    return {
        "name": one.name,
        "genes": len(one.tokens),
        "in_no_cell_with_a_match": len(one.tokens) - there,
        "outside_the_vocabulary": list(one.outside),
        "tested_genes": rows["n_genes"][0],
        "testable": rows["testable"][0],
        "reason": rows["reason"][0],
    }


def _chosen(corpus: Corpus, config: AttentionConfig) -> tuple[np.ndarray, dict[str, int]]:
    """Global indices of the cells, rising, and how many of the corpus are not among them."""
    selected = select_cells(corpus, config.where)
    index_n = selected
    if config.max_cells and len(selected) > config.max_cells:
        generator = np.random.default_rng([config.seed, len(selected)])
        index_n = np.sort(generator.choice(selected, config.max_cells, replace=False))
    counts = {"not selected by where": corpus.n_cells - len(selected), "not drawn": len(selected) - len(index_n)}
    return index_n, {reason: count for reason, count in counts.items() if count}


def _donors(corpus: Corpus, index_n: np.ndarray) -> Donors:
    """Donors as the corpus names them; cells without one count as one donor for each dataset."""
    table = corpus.cells(["donor_id", "dataset_id"]).take(index_n)
    donor_n, dataset_n = (texts(table, name) for name in ("donor_id", "dataset_id"))
    # A donor may be called alike in two datasets: without more knowledge they are two.
    whole_n = np.char.add(np.char.add(dataset_n, " / "), np.where(donor_n != "", donor_n, "unknown donor"))
    names, code_n = np.unique(whole_n, return_inverse=True)
    return Donors(code_n=code_n.astype(np.int64), names=tuple(names.tolist()))


def _cells_of(
    corpus: Corpus, index_n: np.ndarray, encoder: Encoder, progress: Progress = SILENT
) -> Iterator[np.ndarray]:
    """The cells one after the other, read in runs; refused when one cannot be encoded."""
    window = min(corpus.vocabulary.window, encoder.config.positions)
    for start in range(0, len(index_n), CELLS_AT_ONCE):
        cells = corpus.tokens(index_n[start : start + CELLS_AT_ONCE].tolist())
        check_cells(cells, corpus.vocabulary, window)
        yield from cells
        progress.advance(len(cells))
