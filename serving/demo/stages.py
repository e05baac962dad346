"""The stages of the demo, in order; each does its real work and returns what it made, as plain values for state.json.

A stage takes the run and a progress line, reads what earlier stages recorded, and may be run again after a kill.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from genescale.ingestion.corpus import Corpus
from genescale.platform.bundle import Bundle
from genescale.platform.progress import Progress
from genescale.platform.settings import Settings
from genescale.platform.storage import Store
from genescale.platform.tracking import fetch_bundle, open_tracker
from genescale.serving.demo.plan import HEAD_NAME, MODEL_NAME, Demo

Made = dict[str, Any]
# A grouped split needs groups to spare for the validation and the test part.
FEWEST_DONORS = 5
TOP_RANKS = 32


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of the demo."""

    name: str
    label: str
    run: Callable[[Demo, Progress], Made]
    needs_ray: bool = True


def simulate_atlas(demo: Demo, progress: Progress) -> Made:
    """A planted-truth atlas, written into object storage."""
    from genescale.ingestion.simulate import SimulateConfig, simulate

    config = SimulateConfig(seed=demo.config.seed, **demo.config.simulation)
    atlas = simulate(config, demo.at("atlas"), demo.store)
    progress.start(atlas.n_cells, "cells")
    progress.advance(atlas.n_cells, f"{len(atlas.files)} files, {atlas.n_genes:,} genes")
    return {"files": list(atlas.files), "truth": atlas.truth_uri, "cells": atlas.n_cells, "genes": atlas.n_genes}


def copy_atlas(demo: Demo, progress: Progress, *, sources: tuple[str, ...], outside: Settings) -> Made:
    """The user's atlas files, copied into the run's object storage."""
    from_store = Store(outside.storage)
    progress.start(len(sources), "files")
    files = []
    for source in sources:
        name = Path(source).name
        with tempfile.TemporaryDirectory() as folder:
            entry = demo.store.upload(from_store.download(source, Path(folder) / name), demo.at("atlas", name))
        files.append(entry.uri)
        progress.advance(1, f"{name} {entry.size_bytes / 1e6:.1f} MB")
    return {"files": files, "truth": ""}


def compute_vocabulary(demo: Demo, progress: Progress) -> Made:
    """Gene medians over the atlas, and the vocabulary they make."""
    from genescale.ingestion.medians import MediansConfig, compute_medians

    config = MediansConfig(window=demo.config.window, name="demo")
    vocabulary = compute_medians(atlas_files(demo), store=demo.store, config=config, progress=progress)
    return _keep_vocabulary(demo, vocabulary)


def import_vocabulary(demo: Demo, progress: Progress, *, outside: Settings) -> Made:
    """The vocabulary that the user named."""
    from genescale.platform.vocabulary import read_vocabulary

    vocabulary = read_vocabulary(demo.config.vocabulary, Store(outside.storage))
    progress.start(vocabulary.size, "tokens")
    progress.advance(vocabulary.size)
    return _keep_vocabulary(demo, vocabulary)


def _keep_vocabulary(demo: Demo, vocabulary: Any) -> Made:
    uri = demo.at("vocabulary.parquet")
    demo.store.write(uri, vocabulary.to_parquet_bytes())
    return {
        "uri": uri,
        "name": vocabulary.name,
        "genes": len(vocabulary.gene_ids),
        "tokens": vocabulary.size,
        "window": vocabulary.window,
        "digest": vocabulary.digest,
    }


def ingest_atlas(demo: Demo, progress: Progress) -> Made:
    """The atlas becomes a corpus of token rows: one commit per file."""
    from genescale.ingestion.pipeline import ingest
    from genescale.platform.vocabulary import read_vocabulary

    vocabulary = read_vocabulary(str(demo.made("vocabulary")["uri"]), demo.store)
    report = ingest(atlas_files(demo), demo.at("corpus"), vocabulary=vocabulary, store=demo.store, progress=progress)
    return ingest_summary(report, Corpus.open(demo.at("corpus"), demo.store))


def ingest_summary(report: Any, corpus: Corpus) -> Made:
    """What the report page shows of an ingestion."""
    lengths = corpus.cells(["length"])["length"].to_numpy()
    return {
        "uri": corpus.uri,
        "version": corpus.version,
        "cells": corpus.n_cells,
        "tokens": int(lengths.sum()),
        "mean_length": float(lengths.mean()),
        "dropped": sum(sum(source.tally.dropped.values()) for source in report.sources),
        "sources": [source.to_dict() for source in report.sources],
    }


def pretrain_encoder(demo: Demo, progress: Progress) -> Made:
    """An encoder, pretrained with Ray Train and DeepSpeed and registered in MLflow."""
    from genescale.training.pretrain import pretrain
    from genescale.training.recipe import read_recipe

    changes = [f"model_name={MODEL_NAME}", f"seed={demo.config.seed}"]
    config = read_recipe(demo.config.chosen_recipe, changes)
    result = pretrain(
        config,
        corpus_of(demo),
        settings=demo.settings,
        store=demo.store,
        storage_uri=demo.at("runs"),
        tracker=open_tracker(demo.settings),
        workers=demo.config.training_workers,
        progress=progress,
        run_name="pretrain",
    )
    return {
        "model": result.model_version.reference if result.model_version else "",
        "run_id": result.run_id,
        "digest": result.bundle_digest,
        "steps": result.steps,
        "resumed_from": result.resumed_from,
        "losses": [list(pair) for pair in result.losses],
        "held_out_before": dataclasses.asdict(result.held_out_before) if result.held_out_before else None,
        "held_out_after": dataclasses.asdict(result.held_out_after) if result.held_out_after else None,
        "tokens_per_s": result.tokens_per_s,
        "workers": demo.config.training_workers,
        "recipe": config.flat(),
    }


def embed_atlas(demo: Demo, progress: Progress) -> Made:
    """One embedding per cell of the corpus, as Parquet and as obsm of a copy of each atlas file."""
    from genescale.training.embed import embed_corpus
    from genescale.training.embeddings import annotate_h5ad

    uri = demo.at("embeddings")
    report = embed_corpus(bundle_of(demo), corpus_of(demo), out_uri=uri, store=demo.store, progress=progress)
    annotated = []
    for source in ingested(demo):
        name = source["uri"].rsplit("/", 1)[-1]
        out = demo.work.folder("embedded") / name
        annotate_h5ad(source["uri"], uri, out, store=demo.store, dataset_id=source["dataset_id"])
        annotated.append(name)
    return {
        "uri": uri,
        "cells": report.cells,
        "tokens": report.tokens,
        "tokens_per_s": report.tokens_per_s,
        "h5ad": annotated,
    }


def fit_head(demo: Demo, progress: Progress) -> Made:
    """A cell-type head on the frozen encoder, scored on donors it has not seen."""
    from genescale.training.fitting.finetune import FinetuneConfig, finetune

    corpus, label = corpus_of(demo), demo.config.label
    split = head_split(corpus, label)
    if not split:
        progress.start(0, "cells")
        return {"skipped": f"the atlas has fewer than two values of '{label}', so there is nothing to tell apart"}
    result = finetune(
        bundle_of(demo),
        corpus,
        FinetuneConfig(label=label, split=split, min_cells_per_class=20, seed=demo.config.seed),
        tracker=open_tracker(demo.settings),
        out=demo.work.folder("head"),
        store=demo.store,
        embeddings_uri=str(demo.made("embed")["uri"]),
        model_name=HEAD_NAME,
        aliases=("newest",),
        progress=progress,
    )
    return {
        "model": f"models:/{HEAD_NAME}@newest",
        "split": split,
        "macro_f1": result.macro_f1,
        "accuracy": result.accuracy,
        "majority_macro_f1": result.majority.macro_f1,
        "majority_accuracy": result.majority.accuracy,
        "classes": [score.name for score in result.test.per_class],
        "per_class": [dataclasses.asdict(score) for score in result.test.per_class],
        "confusion": result.test.confusion_cc.tolist(),
        "counts": json.loads(json.dumps(result.counts, default=str)),
    }


def head_split(corpus: Corpus, label: str) -> Literal["grouped", "random", ""]:
    """`grouped` when the labelled cells come from enough donors, else `random`; empty with fewer than two labels."""
    table = corpus.cells([label, "donor_id"]).to_pandas()
    labelled = table[table[label].notna()]
    if labelled[label].nunique() < 2:
        return ""
    every_cell_has_one = bool(labelled["donor_id"].notna().all())
    return "grouped" if every_cell_has_one and labelled["donor_id"].nunique() >= FEWEST_DONORS else "random"


def characteristic_genes(corpus: Corpus, count: int, *, cells: int = 2_000, seed: int = 0) -> tuple[str, ...]:
    """The genes that most often stand among a cell's first ranks, of at most `cells` cells drawn at random."""
    vocabulary = corpus.vocabulary
    chosen = np.sort(np.random.default_rng(seed).permutation(corpus.n_cells)[:cells])
    special = np.array(sorted(vocabulary.special.values()))
    heads = [tokens_t[~np.isin(tokens_t, special)][:TOP_RANKS] for tokens_t in corpus.tokens(chosen.tolist())]
    seen = np.bincount(np.concatenate(heads), minlength=vocabulary.size)
    order = np.argsort(-seen, kind="stable")[:count]
    return tuple(vocabulary.gene_of_token(int(token)) for token in order if seen[token])


def corpus_of(demo: Demo) -> Corpus:
    """The corpus, pinned to the version that the ingestion left."""
    made = demo.made("ingest")
    return Corpus.open(str(made["uri"]), demo.store, version=int(made["version"]))


def bundle_of(demo: Demo) -> Bundle:
    """The pretrained model, from the registry."""
    return fetch_bundle(str(demo.made("pretrain")["model"]), demo.settings, demo.work.folder("models"))


def ingested(demo: Demo) -> list[dict[str, Any]]:
    """Records of the sources that are in the corpus; a refused file is not."""
    return [source for source in demo.made("ingest")["sources"] if source["status"] != "refused"]


def atlas_files(demo: Demo) -> list[str]:
    """Addresses of the atlas files in the run's object storage."""
    return [str(uri) for uri in demo.made("atlas")["files"]]
