"""What a pretrained model knows: hidden genes against floors, gene neighbourhoods, mixing of donors, and maps of cells.

Axis suffixes: `n` measured cells, `d` width, `g` genes, `v` vocabulary.

Cells are drawn once (`where`, then `max_cells` at random), and everything is measured on them. Nothing is fitted.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from genescale.ingestion.corpus import Corpus
from genescale.platform.bundle import Bundle
from genescale.platform.errors import InputError
from genescale.platform.progress import SILENT, Progress
from genescale.platform.runs import Tracker
from genescale.platform.storage import Store, join
from genescale.training.cells import CorpusCells
from genescale.training.embed import check_same_vocabulary
from genescale.training.embedder import (
    Embedder,
    GeneTable,
    Layer,
    Pooling,
    check_pooling,
    pick_device,
    pool,
)
from genescale.training.evaluation.masked_genes import ScoreRow, bin_name, hidden_genes, score_rows
from genescale.training.evaluation.measured_cells import Cells, EvaluateConfig, measured_cells, shown_values
from genescale.training.evaluation.mixing import Mixing, measure_mixing
from genescale.training.evaluation.neighbourhoods import Neighbourhoods, neighbourhoods
from genescale.training.evaluation.umap_figure import LEAST_CELLS as LEAST_MAP_CELLS
from genescale.training.evaluation.umap_figure import umap_coordinates
from genescale.training.labels.gene_lists import ListAddress, read_lists
from genescale.training.masking import Masking
from genescale.training.weights import load_model

REPORT_SCHEMA_VERSION = 1
PAGE_NAME, JSON_NAME, CELLS_NAME = "report.html", "report.json", "cells.parquet"
CELLS_AT_ONCE = 256
HEAD_TENSORS = ("cls.predictions.bias", "head.bias")


@dataclass(frozen=True, kw_only=True, eq=False)
class BundleEvaluation:
    """Everything the report shows; a part that was not measured is None and `left_out_parts` says why."""

    title: str
    model: str
    provenance: Mapping[str, Any]
    config: EvaluateConfig
    cells: Cells
    overall: ScoreRow | None = None
    by_rank: tuple[ScoreRow, ...] = ()
    by_column: Mapping[str, tuple[ScoreRow, ...]] = field(default_factory=dict)
    genes: Neighbourhoods | None = None
    mixing: Mixing | None = None
    coordinates_n2: np.ndarray | None = None
    left_out_parts: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON."""
        mixing = None
        if self.mixing:
            means = {name: getattr(self.mixing, name) for name in ("mixing", "rejection", "rejection_shuffled")}
            mixing = {**asdict(self.mixing), **means}
        return plain(
            {
                "schema_version": REPORT_SCHEMA_VERSION,
                "title": self.title,
                "provenance": dict(self.provenance),
                "config": asdict(self.config),
                "cells": {
                    "measured": len(self.cells.index_n),
                    "left_out": dict(self.cells.left_out),
                    "batch": self.cells.batch,
                    "intervals": self.cells.resampled,
                },
                "hidden_genes": self.overall
                and {
                    "overall": asdict(self.overall),
                    "by_rank": [asdict(row) for row in self.by_rank],
                    "by_column": {name: [asdict(row) for row in rows] for name, rows in self.by_column.items()},
                },
                "neighbourhoods": self.genes and asdict(self.genes),
                "mixing": mixing,
                "left_out_parts": dict(self.left_out_parts),
                "seconds": round(self.seconds, 2),
            }
        )

    def metrics(self) -> dict[str, float]:
        """The main numbers, for a tracker."""
        found: dict[str, float] = {"measured_cells": float(len(self.cells.index_n))}
        if self.overall:
            found |= {f"hidden_gene_loss_{name}": score.mean for name, score in self.overall.loss.items()}
            found |= {f"hidden_gene_accuracy_{name}": score.mean for name, score in self.overall.accuracy.items()}
            found["hidden_gene_gain"] = self.overall.gain.mean
        if self.mixing:
            found["silhouette_label"] = self.mixing.silhouette_label
            found |= {"batch_mixing": self.mixing.mixing, "batch_rejection": self.mixing.rejection}
        if self.genes:
            found |= {f"list_share_{at}": one.share["contextual"] for at, one in enumerate(self.genes.lists)}
        return {name: value for name, value in found.items() if np.isfinite(value)}


def evaluate_bundle(
    bundle: Bundle,
    corpus: Corpus,
    config: EvaluateConfig,
    *,
    tracker: Tracker,
    out_uri: str,
    store: Store,
    model: str = "",
    progress: Progress = SILENT,
) -> BundleEvaluation:
    """Measure a model on cells of `corpus`, write report.html, report.json and cells.parquet, and record a run.

    Needs no Ray. Raises CorpusError, InputError or SettingsError, before anything is computed, when they do not fit.
    """
    from genescale.training.evaluation.bundle_report import page

    began = time.monotonic()
    check_same_vocabulary(bundle, corpus)
    check_pooling(config.pooling, bundle.vocabulary)
    cells = measured_cells(corpus, config)
    lists = _gene_lists(bundle, config, store)
    model = model or str(bundle.folder)
    provenance = _provenance(bundle, corpus, model)
    tags = {"stage": "evaluate", "bundle_digest": bundle.digest}
    with tracker.run(f"evaluate {model}", params={**asdict(config), **provenance}, tags=tags) as run:
        found = _measured(bundle, corpus, config, cells, lists, progress)
        evaluation = BundleEvaluation(
            title=f"Evaluation of {model}",
            model=model,
            provenance={**provenance, "run_id": run.id},
            config=config,
            cells=cells,
            seconds=time.monotonic() - began,
            **found,
        )
        files = {PAGE_NAME: page(evaluation), JSON_NAME: json.dumps(evaluation.to_dict(), indent=1, allow_nan=False)}
        for name, text in files.items():
            store.write(join(out_uri, name), text.encode())
            run.log_text(text, f"evaluation/{name}")
        store.write(join(out_uri, CELLS_NAME), _cells_file(evaluation))
        run.log_metrics(evaluation.metrics())
    return evaluation


def _gene_lists(bundle: Bundle, config: EvaluateConfig, store: Store) -> list[tuple[str, np.ndarray]]:
    if not config.genes or "neighbourhoods" in config.skip:
        return []
    address = ListAddress.parse(config.genes)
    without = {bundle.vocabulary.find(gene) for gene in address.without}
    found = []
    for name, genes in read_lists(address, store).items():
        tokens = {bundle.vocabulary.find(gene) for gene in genes} - {None} - without
        if not tokens:
            fix = "Give Ensembl ids or symbols of human genes."
            raise InputError(f"no gene of '{name}' is in the vocabulary.", where=config.genes, fix=fix)
        found.append((name, np.array(sorted(tokens), dtype=np.int64)))  # type: ignore[type-var]
    return found


def _provenance(bundle: Bundle, corpus: Corpus, model: str) -> dict[str, Any]:
    lineage = bundle.lineage
    return {
        "model": model,
        "bundle_digest": bundle.digest,
        "bundle_kind": bundle.kind,
        "vocabulary": bundle.vocabulary.name,
        "vocabulary_digest": bundle.vocabulary.digest,
        "corpus": f"{corpus.uri}@{corpus.version}",
        "trained_on": f"{lineage['corpus_uri']}@{lineage['corpus_version']}" if "corpus_uri" in lineage else "",
    }


def _measured(
    bundle: Bundle,
    corpus: Corpus,
    config: EvaluateConfig,
    cells: Cells,
    lists: Sequence[tuple[str, np.ndarray]],
    progress: Progress,
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    left_out = dict.fromkeys(config.skip, "left out on request")
    if "hidden_genes" not in config.skip:
        if any(name in bundle.weights() for name in HEAD_TENSORS):
            found |= _hidden(bundle, corpus, config, cells, progress)
        else:
            left_out["hidden_genes"] = "the bundle has no masked-gene head"
    if set(config.skip) >= {"neighbourhoods", "mixing", "umap"}:
        return found | {"left_out_parts": left_out}
    embedder = Embedder.load(bundle, device=config.device, tokens_per_batch=config.tokens_per_batch)
    vectors_nd, table = embedded(embedder, corpus, cells.index_n, config.layer, config.pooling, progress)
    if "neighbourhoods" not in config.skip:
        try:
            found["genes"] = _neighbours(bundle, table, lists, config)
        except InputError as error:
            if lists:
                raise
            left_out["neighbourhoods"] = str(error)
    if "mixing" not in config.skip:
        types_n, batches_n = cells.texts(config.label), cells.texts(cells.batch)
        if (types_n != "").any():
            found["mixing"] = measure_mixing(
                vectors_nd, types_n, batches_n, label=config.label, batch=cells.batch, seed=config.seed
            )
        else:
            left_out["mixing"] = f"no measured cell has a value in {config.label}"
    if "umap" not in config.skip:
        if len(vectors_nd) < LEAST_MAP_CELLS:
            left_out["umap"] = f"{len(vectors_nd)} cells make no map"
        else:
            found["coordinates_n2"] = umap_coordinates(vectors_nd, seed=config.seed)
    return found | {"left_out_parts": left_out}


def _hidden(bundle: Bundle, corpus: Corpus, config: EvaluateConfig, cells: Cells, progress: Progress) -> dict[str, Any]:
    hidden = hidden_genes(
        load_model(bundle),
        CorpusCells(corpus),
        cells.index_n,
        Masking(vocabulary=bundle.vocabulary, seed=config.seed, fraction=config.mask_fraction),
        token_budget=config.tokens_per_batch,
        device=pick_device(config.device),
        progress=progress,
    )

    def rows(stratum_m: np.ndarray, names: Sequence[str]) -> tuple[ScoreRow, ...]:
        made = score_rows(hidden, stratum_m, names, cells.group_n, bootstrap=config.bootstrap, seed=config.seed)
        return tuple(made)

    by_column = {}
    for column in cells.by:
        code_n, names = shown_values(cells.texts(column))
        by_column[column] = rows(code_n[hidden.cell_m], names)
    bins = [bin_name(number) for number in range(int(hidden.bin_m.max()) + 1)]
    return {
        "overall": rows(np.zeros(len(hidden.cell_m), dtype=np.int64), ["all"])[0],
        "by_rank": rows(hidden.bin_m, bins),
        "by_column": by_column,
    }


def embedded(
    embedder: Embedder, corpus: Corpus, index_n: np.ndarray, layer: Layer, pooling: Pooling, progress: Progress
) -> tuple[np.ndarray, GeneTable]:
    """Vectors of the cells (n, d) and the mean vector of every gene over them, in one pass of the encoder."""
    vocabulary, device = embedder.vocabulary, embedder.device
    specials = torch.tensor(sorted(vocabulary.special.values()), device=device)
    vectors_nd = np.empty((len(index_n), embedder.width), dtype=np.float32)
    sums_vd = torch.zeros(vocabulary.size, embedder.width, dtype=torch.float64, device=device)
    cells_v = torch.zeros(vocabulary.size, dtype=torch.int64, device=device)
    progress.start(len(index_n), "cells embedded")
    for start in range(0, len(index_n), CELLS_AT_ONCE):
        tokens = corpus.tokens(index_n[start : start + CELLS_AT_ONCE].tolist())
        for found in embedder.hidden(tokens, layer=layer):
            vectors_nd[start + found.cells] = pool(found.hidden_td, found.batch, pooling, specials).cpu().numpy()
            sums_vd.index_add_(0, found.batch.tokens_t, found.hidden_td.double())
            cells_v += torch.bincount(found.batch.tokens_t, minlength=vocabulary.size)
        progress.advance(len(tokens))
    cells_v[specials] = 0
    tokens_g = torch.nonzero(cells_v).flatten()
    means_gd = sums_vd[tokens_g] / cells_v[tokens_g].unsqueeze(1)
    return vectors_nd, GeneTable(
        gene_ids=tuple(vocabulary.gene_of_token(token) for token in tokens_g.tolist()),
        tokens_g=tokens_g.cpu().numpy(),
        embeddings_gd=means_gd.float().cpu().numpy(),
        cells_g=cells_v[tokens_g].cpu().numpy(),
    )


def _neighbours(
    bundle: Bundle, table: GeneTable, lists: Sequence[tuple[str, np.ndarray]], config: EvaluateConfig
) -> Neighbourhoods:
    weights = bundle.weights()
    named = ("bert.embeddings.word_embeddings.weight", "encoder.embeddings.tokens.weight")
    input_vd = next(weights[name] for name in named if name in weights)
    asked = np.unique(np.concatenate([tokens for _, tokens in lists])) if lists else None
    return neighbourhoods(
        table,
        input_vd,
        bundle.vocabulary,
        k=config.neighbours,
        min_cells=config.min_cells_per_gene,
        asked=asked,
        most_asked=config.most_genes,
        lists=lists,
        seed=config.seed,
    )


def _cells_file(evaluation: BundleEvaluation) -> bytes:
    """The measured cells with their place on the map."""
    table = evaluation.cells.table
    if evaluation.coordinates_n2 is not None:
        for number in range(2):
            table = table.append_column(f"umap_{number + 1}", pa.array(evaluation.coordinates_n2[:, number]))
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def plain(value: Any) -> Any:
    """The same with plain Python numbers and lists, and None for what is not a number: JSON has none."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value
