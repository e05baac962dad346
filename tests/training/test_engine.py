"""Engines: plain torch and DeepSpeed, on any number of workers and at any ZeRO stage, follow one loss curve."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from genescale.platform.errors import ClusterError, IntegrityError, SettingsError
from genescale.training.batches import step_batches
from genescale.training.compiling import compile_layers
from genescale.training.engine import DeepSpeedEngine, OptimizerConfig, TorchEngine
from genescale.training.masking import Masking
from genescale.training.model import new_model
from genescale.training.objective import MaskedGenes

WORKER_FILE = Path(__file__).with_name("deepspeed_worker.py")
SHARED = runpy.run_path(str(WORKER_FILE))
STEPS, SAVED_AT = SHARED["STEPS"], SHARED["SAVED_AT"]
# (workers, ZeRO stages) of the DeepSpeed runs, in this order: each goes on from what all before it have written.
ROUNDS = [(1, (0, 1)), (2, (0, 1, 2, 3)), (1, (2, 3))]
RUNS = [(workers, stage) for workers, stages in ROUNDS for stage in stages]


def torch_engine(**changes: Any) -> TorchEngine:
    return TorchEngine(SHARED["model"](SHARED["source"]()), SHARED["optimizer"](**changes), total_steps=STEPS)


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    return SHARED["train"](torch_engine())


@pytest.fixture(scope="module")
def deepspeed_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of all DeepSpeed runs: a process for each worker of each round."""
    folder = tmp_path_factory.mktemp("deepspeed")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    for workers, numbers in ROUNDS:
        stages = [str(number) for number in numbers]
        command = [sys.executable, str(WORKER_FILE)]
        ranks = [
            subprocess.Popen(
                [*command, str(rank), str(workers), str(folder), *stages],
                env={**environment, "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(workers)
        ]
        outputs = [process.communicate(timeout=300)[0] for process in ranks]
        assert [process.returncode for process in ranks] == [0] * workers, "\n".join(outputs)[-6_000:]
    return folder


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("workers", "stage"), RUNS)
def test_deepspeed_follows_the_curve_of_plain_torch(
    reference: dict[str, Any], deepspeed_folder: Path, workers: int, stage: int
) -> None:
    result = json.loads((deepspeed_folder / f"stage{stage}_workers{workers}.json").read_text())
    found, continued = result["undisturbed"], result["continued"]
    np.testing.assert_allclose(found["losses"], reference["losses"], rtol=2e-6)
    np.testing.assert_allclose(found["evaluated"], reference["evaluated"], rtol=2e-6)
    assert found["weights"].keys() == reference["weights"].keys()
    for name, expected in reference["weights"].items():
        # A key bias shifts all scores of a query alike: its gradient is zero but for rounding, which AdamW blows up.
        if name.endswith("key.bias"):
            continue
        assert found["weights"][name] == pytest.approx(expected, rel=1e-5, abs=1e-6), name
    assert found["gradient_norm"] == pytest.approx(reference["gradient_norm"], rel=1e-5)
    # The same steps after a checkpoint, in a new engine.
    np.testing.assert_allclose(continued["losses"], found["losses"][SAVED_AT:], rtol=1e-6)
    assert continued["evaluated"] == pytest.approx(found["evaluated"], rel=1e-6)


@pytest.mark.timeout(600)
def test_any_state_goes_on_at_any_stage_with_any_number_of_workers(deepspeed_folder: Path) -> None:
    moves = 0
    for workers, stage in RUNS:
        result = json.loads((deepspeed_folder / f"stage{stage}_workers{workers}.json").read_text())
        for name, moved in result.items():
            if name.startswith("from "):
                expected = result["undisturbed"]["losses"][SAVED_AT:]
                np.testing.assert_allclose(moved["losses"], expected, rtol=2e-6, err_msg=f"{stage} {workers} {name}")
                moves += 1
    # Each of the eight runs goes on from what the runs before it wrote.
    assert moves == 28


def test_the_model_learns(reference: dict[str, Any]) -> None:
    assert reference["losses"][0] == pytest.approx(math.log(64), rel=0.02)
    longer = torch_engine(warmup_steps=0, schedule="constant")
    batch = next(iter_steps(last=1))
    losses = [float(longer.step(batch)[0]) / batch.masked for _ in range(30)]
    assert losses[-1] < 0.8 * losses[0]


def iter_steps(*, first: int = 0, last: int = STEPS) -> Any:
    cells = SHARED["source"]()
    masking = Masking(vocabulary=cells.vocabulary, seed=5)
    return step_batches(cells, SHARED["plan"](cells), masking, rank=0, workers=1, first=first, last=last)


def test_torch_goes_on_from_a_state_exactly(reference: dict[str, Any], tmp_path: Path) -> None:
    SHARED["train"](torch_engine(), folder=tmp_path)
    engine = torch_engine()
    engine.restore(SHARED["saved_in"](tmp_path))
    assert SHARED["train"](engine, first=SAVED_AT)["losses"] == reference["losses"][SAVED_AT:]


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    config = dataclasses.replace(SHARED["model"](SHARED["source"]()).config, feed_forward=32)
    other = TorchEngine(new_model(config, seed=1), OptimizerConfig(), total_steps=STEPS)
    other.snapshot().write(tmp_path / "shard-0")
    with pytest.raises(IntegrityError, match=r"feed_forward|is \(32"):
        torch_engine().restore(SHARED["saved_in"](tmp_path))


def test_a_state_with_a_missing_share_is_refused(tmp_path: Path) -> None:
    snapshot = torch_engine().snapshot()
    name, values = next(iter(snapshot.fragments.items()))
    snapshot.fragments[name] = values[:-1].clone()
    snapshot.write(tmp_path / "shard-0")
    with pytest.raises(IntegrityError, match="whole weight"):
        torch_engine().restore(SHARED["saved_in"](tmp_path))


def test_the_loss_of_each_lane_is_told(reference: dict[str, Any]) -> None:
    engine, batch = torch_engine(), next(iter_steps(first=2, last=3))
    sums = engine.step(batch)
    lanes = engine.lane_losses()
    assert len(lanes) == len(batch.micro_batches)
    assert float(lanes.sum()) == pytest.approx(float(sums[0]), rel=1e-6)
    assert [bool(loss) for loss in lanes] == [bool(lane.n_masked) for lane in batch.micro_batches]


def test_training_does_not_touch_the_global_random_state() -> None:
    engine, batch = torch_engine(), next(iter_steps(last=1))
    before = torch.random.get_rng_state()
    engine.step(batch)
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_loss_is_the_mean_over_masked_tokens_of_the_whole_step() -> None:
    """Lanes with few masked tokens weigh little, and empty lanes nothing."""
    config = dataclasses.replace(SHARED["model"](SHARED["source"]()).config, hidden_dropout=0.0, attention_dropout=0.0)
    engine = TorchEngine(new_model(config, seed=1), OptimizerConfig(), total_steps=STEPS)
    twin = new_model(config, seed=1)
    batch = next(iter_steps(first=2, last=3))
    lanes = [lane for lane in batch.micro_batches if lane.n_masked]
    assert len(lanes) < len(batch.micro_batches)
    nll_m = [cross_entropy(twin(x.packed, x.masked_positions), x.labels, reduction="none") for x in lanes]
    mean = torch.cat(nll_m).mean()
    mean.backward()
    nll, _, masked = engine.step(batch).tolist()
    assert nll / masked == pytest.approx(mean.item(), rel=1e-6)
    gradients = [parameter.grad for parameter in twin.parameters() if parameter.grad is not None]
    assert engine.gradient_norm() == pytest.approx(torch.nn.utils.get_total_norm(gradients).item(), rel=1e-5)


def test_biases_and_norms_do_not_decay() -> None:
    decayed, plain = torch_engine(weight_decay=0.5), torch_engine(weight_decay=0.0)
    batch = next(iter_steps(first=3, last=4))
    for engine in (decayed, plain):
        engine.step(batch)
    one, other = decayed.weights(), plain.weights()
    for name in one:
        is_vector = one[name].ndim == 1
        assert np.array_equal(one[name], other[name]) == is_vector, name


def test_bf16_stays_close_and_keeps_weights_in_fp32(reference: dict[str, Any]) -> None:
    engine = torch_engine(precision="bf16")
    result = SHARED["train"](engine)
    np.testing.assert_allclose(result["losses"], reference["losses"], rtol=5e-3)
    assert {tensor.dtype for tensor in engine.weights().values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, 0.853553, 0.5, 0.146447]),
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_learning_rates(schedule: str, expected: list[float]) -> None:
    for warmup in ({"warmup_steps": 2}, {"warmup_fraction": 0.3}):
        config = OptimizerConfig(learning_rate=1.0, schedule=schedule, **warmup)  # type: ignore[arg-type]
        assert [config.rate_at(step, 6) for step in range(1, 7)] == pytest.approx(expected, abs=1e-6)


def test_deepspeed_without_a_process_group_says_what_to_do() -> None:
    with pytest.raises(ClusterError, match="TorchEngine"):
        DeepSpeedEngine(SHARED["model"](SHARED["source"]()), OptimizerConfig(), total_steps=1, lanes=4)


@pytest.mark.parametrize(
    "changes", [{"learning_rate": 0.0}, {"zero_stage": 4}, {"clip": -1.0}, {"warmup_steps": 1, "warmup_fraction": 0.1}]
)
def test_optimizers_out_of_range_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        OptimizerConfig(**changes)


def test_compiled_layers_compute_the_same_and_are_compiled_once_for_all_lengths() -> None:
    """With a back end that generates no code, on the CPU: what is compiled is what the GPU compiles."""
    graphs: list[Any] = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    plain, compiled = (SHARED["model"](SHARED["source"]()).eval() for _ in range(2))
    compile_layers(compiled, torch.device("cpu"), backend=counting)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    lanes = [lane for batch in iter_steps() for lane in batch.micro_batches if lane.n_masked]
    assert len({lane.packed.lengths for lane in lanes}) > 10
    with torch.no_grad():
        for lane in lanes:
            expected = plain(lane.packed, lane.masked_positions)
            torch.testing.assert_close(compiled(lane.packed, lane.masked_positions), expected)
    # Before and after the attention of a layer; a second time when lengths turn out to vary.
    assert len(graphs) <= 6


def test_layers_are_not_compiled_on_cpus() -> None:
    with pytest.raises(SettingsError, match="CUDA"):
        TorchEngine(SHARED["model"](SHARED["source"]()), OptimizerConfig(), total_steps=1, compiled=True)


def test_offload_without_gpus_is_refused() -> None:
    with pytest.raises(SettingsError, match="needs GPUs"):
        OptimizerConfig(offload=True).check_device(on_cuda=False)
    with pytest.raises(SettingsError, match="stage 0"):
        OptimizerConfig(offload=True, zero_stage=0)
    with pytest.raises(SettingsError, match="DeepSpeed"):
        torch_engine(offload=True)


def test_frozen_parameters_are_neither_trained_nor_in_a_snapshot(tmp_path: Path) -> None:
    model = SHARED["model"](SHARED["source"]())
    model.encoder.embeddings.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    engine = TorchEngine(model, SHARED["optimizer"](), total_steps=STEPS)
    SHARED["train"](engine, folder=tmp_path)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if ".embeddings." not in name}
    assert set(engine.snapshot().shapes) == changed


def test_parameters_learn_at_their_share_of_the_rate() -> None:
    class HalfTheEncoder(MaskedGenes):
        def rate_scale(self, parameter: str) -> float:
            return 0.5 if parameter.startswith("encoder.") else 1.0

    batch, moved = next(iter_steps(last=1)), []
    for objective in (MaskedGenes(), HalfTheEncoder()):
        model = SHARED["model"](SHARED["source"]())
        before = {name: value.clone() for name, value in model.named_parameters()}
        config = SHARED["optimizer"](weight_decay=0.0, warmup_steps=0, schedule="constant")
        TorchEngine(model, config, total_steps=STEPS, objective=objective).step(batch)
        moved.append({name: (value - before[name]).detach() for name, value in model.named_parameters()})
    for name, whole in moved[0].items():
        share = 0.5 if name.startswith("encoder.") else 1.0
        torch.testing.assert_close(moved[1][name], share * whole, rtol=1e-3, atol=1e-7)
