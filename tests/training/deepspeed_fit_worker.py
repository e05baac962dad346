"""One rank of a fit on DeepSpeed, in a process of its own: DeepSpeed fixes process-wide state when it is imported.

Usage: deepspeed_fit_worker.py RANK WORKERS FOLDER CORPUS BUNDLE STAGE:ENCODER... ; rank 0 writes each curve, and the
sums of the weights at the end, into FOLDER/STAGE-ENCODER.json.
`test_encoder_fitting.py` and `test_encoder_runs.py` take their examples and settings from here.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genescale.ingestion.corpus import Corpus
from genescale.platform.bundle import Bundle
from genescale.platform.settings import StorageSettings
from genescale.platform.storage import Store
from genescale.training.fitting.config import FinetuneConfig
from genescale.training.fitting.encoder_fitting import fit_encoder
from genescale.training.fitting.encoder_worker import FitJob, FitRhythm
from genescale.training.fitting.epochs import Fitted
from genescale.training.fitting.examples import NO_LABEL, Examples, cell_examples
from genescale.training.heads.spec import HeadSpec
from genescale.training.loop import train_loop

CLASSES = ("b_cell", "monocyte", "t_cell")
CONFIG = FinetuneConfig(
    encoder="trained",
    epochs=5,
    learning_rate=1e-2,
    encoder_learning_rate=1e-3,
    cells_per_batch=32,
    lanes=2,
    patience=0,
    layer="last",
)
CELLS = HeadSpec(label="cell_type", classes=CLASSES, width=32, layer="last", pooling="mean_genes")
RHYTHM = FitRhythm(log_every=2, checkpoint_every=3)
Weights = dict[str, np.ndarray]


def labelled(corpus: Corpus) -> Examples:
    columns = corpus.cells(["cell_type", "length"])
    code = {name: number for number, name in enumerate(CLASSES)}
    codes = np.array([code.get(name, NO_LABEL) for name in columns["cell_type"].to_pylist()])
    return cell_examples(np.arange(len(codes)), columns["length"].to_numpy().astype(np.int64), (codes,))


def parts(examples: Examples, *, train: int = 240) -> tuple[Examples, Examples]:
    units = np.unique(examples.unit_r)
    return examples.take(units[:train]), examples.take(units[train:])


def reader(corpus: Corpus) -> Callable[[np.ndarray], list[np.ndarray]]:
    return lambda index_n: corpus.tokens(index_n.tolist())


def fit(bundle: Bundle, cells: Corpus, config: FinetuneConfig = CONFIG, **options: Any) -> tuple[Fitted, Weights]:
    return fit_encoder(bundle, reader(cells), *parts(labelled(cells)), (CELLS,), config, **options)


def job_of(corpus: Corpus, bundle: str, **changes: Any) -> FitJob:
    workers = changes.pop("workers", 1)
    train, validation = parts(labelled(corpus))
    return FitJob(
        store=corpus.store,
        workers=workers,
        home="",
        keep=1,
        config=dataclasses.replace(CONFIG, epochs=2, frozen_layers=1, weight_average=0.2, **changes),
        specs=(CELLS,),
        train=train,
        validation=validation,
        bundle_uri=bundle,
        corpus=corpus,
        rhythm=RHYTHM,
    )


def trained(job: FitJob) -> dict[str, Any]:
    """The curve of a job that is trained to its end in memory, on every worker."""
    training = job.training()
    rows: dict[int, dict[str, float]] = {}

    def on_rows(new: list[tuple[int, dict[str, float]]]) -> None:
        for step, values in new:
            rows.setdefault(step, {}).update(values)

    result = train_loop(
        training.engine, training.source, training.plan, training.rhythm, start=training.state(None), on_rows=on_rows
    )
    weights = training.engine.weights()
    return {
        "losses": [values["loss"] for _, values in sorted(rows.items()) if "loss" in values],
        "validation": [epoch.validation_loss for epoch in result.state.history],
        "weights": {name: float(np.abs(values).sum()) for name, values in sorted(weights.items())},
    }


def main(rank: int, workers: int, folder: Path, corpus_uri: str, bundle: str, runs: list[str]) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "group"), workers)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=workers)
    corpus = Corpus.open(corpus_uri, Store(StorageSettings()))
    for run in runs:
        stage, encoder = run.split(":")
        result = trained(job_of(corpus, bundle, workers=workers, zero_stage=int(stage), encoder=encoder))
        if rank == 0:
            (folder / f"{stage}-{encoder}.json").write_text(json.dumps(result))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], sys.argv[5], sys.argv[6:])
