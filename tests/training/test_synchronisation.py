"""On a GPU no optimiser step waits for the device: the host queues the next one while the device computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from genescale.platform.bundle import Bundle
from genescale.platform.vocabulary import Vocabulary
from genescale.training.batches import BatchPlan, step_batches
from genescale.training.cells import MemoryCells
from genescale.training.engine import OptimizerConfig, TorchEngine
from genescale.training.fitting.config import FinetuneConfig
from genescale.training.fitting.encoder_model import HeadedEncoder, LabelledRows
from genescale.training.fitting.encoder_plan import ExampleCells, FitPlan
from genescale.training.fitting.encoder_worker import optimizer_config
from genescale.training.fitting.examples import cell_examples
from genescale.training.heads.head import LinearHead
from genescale.training.heads.spec import HeadSpec
from genescale.training.masking import Masking
from genescale.training.model import EncoderConfig, new_model
from genescale.training.weights import load_encoder

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def synchronising_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_steps_do_not_wait_for_the_device(
    tiny_vocabulary: Vocabulary, tiny_cells: list[np.ndarray], precision: str, request: pytest.FixtureRequest
) -> None:
    source = MemoryCells(tiny_cells, tiny_vocabulary)
    plan = BatchPlan(lengths=source.lengths, cells=np.arange(len(tiny_cells)), seed=0, token_budget=256, lanes=2)
    config = EncoderConfig(
        vocabulary_size=tiny_vocabulary.size, width=32, layers=2, heads=2, feed_forward=64, positions=128
    )
    optimizer = OptimizerConfig(precision=precision)  # type: ignore[arg-type]
    engine = TorchEngine(new_model(config, seed=0), optimizer, total_steps=10, device="cuda")
    masking = Masking(vocabulary=tiny_vocabulary, seed=0)
    first, *rest = step_batches(source, plan, masking, rank=0, workers=1, first=0, last=3)
    # The first step sets up libraries and optimiser state.
    engine.step(first)
    torch.cuda.synchronize()
    request.getfixturevalue("synchronising_is_an_error")
    sums = [engine.step(batch) for batch in rest]
    torch.cuda.set_sync_debug_mode("default")
    assert all(bool(torch.isfinite(each).all()) for each in sums)


@pytest.mark.parametrize("encoder", ["trained", "lora"])
def test_fine_tuning_steps_do_not_wait_for_the_device(
    tiny_bundle: Bundle, tiny_cells: list[np.ndarray], encoder: str, request: pytest.FixtureRequest
) -> None:
    lengths = np.array([len(cell) for cell in tiny_cells])
    examples = cell_examples(np.arange(12), lengths, (np.arange(12) % 3, np.arange(12.0)))
    spec = HeadSpec(label="kind", classes=("a", "b", "c"), width=32, layer="last", pooling="mean_genes")
    number = dataclasses.replace(spec, label="age", kind="number", classes=())
    config = FinetuneConfig(encoder=encoder, precision="bf16", cells_per_batch=4, lanes=2, layer="last")  # type: ignore[arg-type]

    def cells_of(index_n: np.ndarray) -> list[np.ndarray]:
        return [tiny_cells[index] for index in index_n]

    model = HeadedEncoder(load_encoder(tiny_bundle), (spec, number), config)
    heads: list[LinearHead] = list(model.heads)  # type: ignore[arg-type]
    plan = FitPlan(config, heads, examples, examples, tiny_bundle.vocabulary, cells_of)
    objective = LabelledRows(model, config)
    engine = TorchEngine(model, optimizer_config(config), total_steps=10, objective=objective, device="cuda")
    source = ExampleCells(examples, tiny_bundle.vocabulary, cells_of)
    first, second, *_ = plan.batches(source, rank=0, workers=1, first=0)
    engine.step(first)
    torch.cuda.synchronize()
    request.getfixturevalue("synchronising_is_an_error")
    sums = engine.step(second)
    torch.cuda.set_sync_debug_mode("default")
    assert bool(torch.isfinite(sums).all())
