"""One rank of a DeepSpeed run, in a process of its own: DeepSpeed fixes process-wide state when it is imported.

Usage: deepspeed_worker.py RANK WORKERS FOLDER STAGE... ; writes FOLDER/stage<N>_workers<W>.json from rank 0, and goes
on from every state that it finds in FOLDER.
`test_engine.py` takes its cells, plan and model from here, so that both sides train on the same thing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genescale.platform.vocabulary import Vocabulary
from genescale.training.batches import BatchPlan, evaluation_batches, step_batches
from genescale.training.cells import MemoryCells
from genescale.training.engine import DeepSpeedEngine, Engine, OptimizerConfig
from genescale.training.masking import Masking
from genescale.training.model import EncoderConfig, MaskedGeneModel, new_model
from genescale.training.shards import SavedState

GENES, LANES, STEPS, SAVED_AT = 60, 4, 8, 4


def source() -> MemoryCells:
    vocabulary = Vocabulary.build([f"ENSG{i:011d}" for i in range(GENES)], np.ones(GENES), window=32, name="test")
    draws = np.random.default_rng(0)
    lengths = draws.integers(1, 31, size=60)
    return MemoryCells([np.r_[2, draws.permutation(GENES)[:n] + 4, 3].astype(np.uint16) for n in lengths], vocabulary)


def plan(cells: MemoryCells) -> BatchPlan:
    # Three steps an epoch, the last with empty lanes.
    return BatchPlan(lengths=cells.lengths, cells=np.arange(60), seed=3, token_budget=128, lanes=LANES)


def model(cells: MemoryCells) -> MaskedGeneModel:
    config = EncoderConfig(
        vocabulary_size=cells.vocabulary.size,
        width=32,
        layers=2,
        heads=2,
        feed_forward=64,
        positions=32,
        hidden_dropout=0.1,
        attention_dropout=0.1,
    )
    return new_model(config, seed=1)


def optimizer(**changes: Any) -> OptimizerConfig:
    return OptimizerConfig(**{"learning_rate": 1e-2, "warmup_steps": 2, "clip": 0.5, **changes})


def save(engine: Engine, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    engine.snapshot().write(folder / f"shard-{engine.rank}.safetensors")
    if engine.workers > 1:
        torch.distributed.barrier()


def saved_in(folder: Path) -> SavedState:
    return SavedState(sorted(folder.glob("shard-*")))


def train(engine: Engine, *, first: int = 0, folder: Path | None = None) -> dict[str, Any]:
    cells = source()
    masking = Masking(vocabulary=cells.vocabulary, seed=5)
    losses = []
    place = {"rank": engine.rank, "workers": engine.workers}
    for batch in step_batches(cells, plan(cells), masking, **place, first=first, last=STEPS):
        nll, _, masked = engine.total(engine.step(batch))
        assert masked == batch.masked
        losses.append(float(nll / masked))
        if folder and batch.step == SAVED_AT:
            save(engine, folder)
    evaluation = evaluation_batches(cells, plan(cells), masking, **place)
    sums = engine.total(torch.stack([engine.evaluate(batch.micro_batches) for batch in evaluation]).sum(0))
    weights = engine.weights()
    return {
        "losses": losses,
        "evaluated": float(sums[0] / sums[2]),
        "weights": {name: float(np.abs(weights[name]).sum()) for name in sorted(weights)},
        "gradient_norm": engine.gradient_norm(),
    }


def main(rank: int, workers: int, folder: Path, stages: list[int]) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / f"group-{workers}-{stages[0]}"), workers)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=workers)
    for stage in stages:
        saved = folder / f"saved_stage{stage}_workers{workers}"

        def engine(stage: int = stage) -> DeepSpeedEngine:
            return DeepSpeedEngine(model(source()), optimizer(zero_stage=stage), total_steps=STEPS, lanes=LANES)

        undisturbed = train(engine(), folder=saved)
        continued = engine()
        continued.restore(saved_in(saved))
        result: dict[str, Any] = {"undisturbed": undisturbed, "continued": train(continued, first=SAVED_AT)}
        # States of every stage and of the other number of workers, as far as they were written before.
        for elsewhere in sorted(folder.glob("saved_*")):
            if elsewhere != saved:
                moved = engine()
                moved.restore(saved_in(elsewhere))
                result[f"from {elsewhere.name}"] = train(moved, first=SAVED_AT)
        if rank == 0:
            (folder / f"stage{stage}_workers{workers}.json").write_text(json.dumps(result))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), [int(stage) for stage in sys.argv[4:]])
