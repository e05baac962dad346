"""Optimiser steps: one protocol, one engine in plain torch, one on DeepSpeed (whose only door this file is).

Both do the same arithmetic. What a micro-batch is trained for is said by an `Objective`: a sum over what it holds, such
as the negative log likelihood of its masked tokens. The loss of a step is the sum over all lanes of all workers divided
by their weight (N masked tokens), so a lane with fewer of them weighs less and the result does not depend on how lanes
are dealt to workers. DeepSpeed divides each loss by its accumulation count and averages gradients over workers;
the loss handed to it is multiplied by both, which leaves the sum over lanes divided by N.

Dropout is drawn per micro-batch from a seed of the batch plan, inside a forked random state: the same on any worker,
and the caller's random state is untouched. Parameters that do not require gradients are frozen: neither the optimiser
nor a snapshot has them. With `average`, measurements and the weights that are kept are those of an average over the
steps (`averaging.py`), which a snapshot has too.
"""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Iterable, Iterator
from functools import reduce
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from genescale.platform.errors import ClusterError, SettingsError
from genescale.training import zero_state
from genescale.training.averaging import WeightAverage, check_average
from genescale.training.batches import Lane, StepBatch
from genescale.training.compiling import compile_layers
from genescale.training.objective import MASKED_GENES, Objective
from genescale.training.optimizer import OptimizerConfig as OptimizerConfig
from genescale.training.optimizer import adamw, set_rate
from genescale.training.shards import SavedState, Snapshot


class Engine(Protocol):
    """A model, its optimiser and its workers."""

    rank: int
    workers: int
    device: torch.device

    def step(self, batch: StepBatch) -> torch.Tensor:
        """One optimiser step. Returns this worker's sums (3): loss, correct, weight (of masked tokens each is one)."""

    def evaluate(self, micro_batches: Iterable[Lane]) -> torch.Tensor:
        """The objective's sums (k) for a measurement, without learning and without dropout."""

    def total(self, sums: torch.Tensor) -> np.ndarray:
        """Sums of all workers, float64; every worker must call it."""

    def learning_rate(self, step: int) -> float:
        """Learning rate of that step."""

    def gradient_norm(self) -> float | None:
        """Norm of the last step's gradient before clipping; None where the engine does not say."""

    def lane_losses(self) -> torch.Tensor:
        """Loss of each of this worker's micro-batches in the last step."""

    def snapshot(self) -> Snapshot:
        """A copy on the host of what this worker holds of weights and optimiser state; no worker waits for another."""

    def restore(self, saved: SavedState) -> None:
        """Take weights and optimiser state, whoever wrote them; every worker must call it."""

    def weights(self) -> dict[str, np.ndarray]:
        """What the objective keeps of the model, or of its average, by name; every worker must call it."""


class TorchEngine:
    """One process, plain torch: the reference for DeepSpeed, and the engine for machines without Ray."""

    rank, workers = 0, 1

    def __init__(
        self,
        model: nn.Module,
        config: OptimizerConfig,
        *,
        total_steps: int,
        objective: Objective = MASKED_GENES,
        device: str | torch.device = "cpu",
        compiled: bool = False,
        average: float = 0.0,
    ) -> None:
        if config.offload:
            raise SettingsError(
                "only DeepSpeed keeps optimiser state on the host.",
                where="optimizer.offload",
                fix="Set optimizer.offload = false, or train with several workers on GPUs.",
            )
        self._model, self._objective = model.to(device), objective
        self._config, self._total_steps, self.device = config, total_steps, torch.device(device)
        self._optimizer = adamw(model, config, rate_scale=objective.rate_scale, fused=self.device.type == "cuda")
        self._average = WeightAverage(zero_state.trained(model), average)
        if compiled:
            compile_layers(model, self.device)
        self._norm: torch.Tensor | None = None
        self._lane_losses = torch.zeros(0)

    def step(self, batch: StepBatch) -> torch.Tensor:
        """One optimiser step; see `Engine.step`."""
        self._model.train()
        self._optimizer.zero_grad(set_to_none=True)
        lanes = []
        for micro_batch in batch.micro_batches:
            with _dropout_from(micro_batch.dropout_seed, self.device), self._autocast():
                loss, micro_sums = self._objective.loss(self._model, micro_batch.to(self.device))
            (loss / batch.divisor).backward()
            lanes.append(micro_sums)
        clip = self._config.clip or math.inf
        # Kept on the device: a step must not wait for it.
        self._norm = nn.utils.clip_grad_norm_(self._model.parameters(), clip)
        set_rate(self._optimizer, self.learning_rate(batch.step))
        self._optimizer.step()
        self._average.add(batch.step)
        self._lane_losses = torch.stack(lanes)[:, 0]
        return torch.stack(lanes).sum(0)

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterable[Lane]) -> torch.Tensor:
        """Sums without learning; see `Engine.evaluate`."""
        self._model.eval()
        with self._average.in_place(), self._autocast():
            sums = [self._objective.measure(self._model, lane.to(self.device)) for lane in micro_batches]
        return reduce(torch.add, sums)

    def total(self, sums: torch.Tensor) -> np.ndarray:
        """There is one worker: its sums."""
        return sums.double().cpu().numpy()

    def learning_rate(self, step: int) -> float:
        """Learning rate of that step."""
        return self._config.rate_at(step, self._total_steps)

    def gradient_norm(self) -> float | None:
        """Norm of the last step's gradient before clipping."""
        return None if self._norm is None else float(self._norm)

    def lane_losses(self) -> torch.Tensor:
        """Loss of each micro-batch of the last step."""
        return self._lane_losses

    def snapshot(self) -> Snapshot:
        """A copy of weights and optimiser state."""
        whole = zero_state.take_whole(self._optimizer, zero_state.trained(self._model))
        return self._average.added_to(whole, rank=self.rank, workers=self.workers)

    def restore(self, saved: SavedState) -> None:
        """Take weights and optimiser state; IntegrityError when they are not this model's."""
        parameters = zero_state.trained(self._model)
        saved.check_fits({name: tuple(parameter.shape) for name, parameter in parameters})
        zero_state.put_whole(self._optimizer, parameters, saved)
        self._average.restore(saved)

    def weights(self) -> dict[str, np.ndarray]:
        """What the objective keeps of the model, by name."""
        with self._average.in_place():
            return self._objective.weights(self._model)

    def _autocast(self) -> contextlib.AbstractContextManager[None]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._config.precision == "bf16")


class DeepSpeedEngine:
    """DeepSpeed on the process group of this worker: gloo on CPU, NCCL on GPUs, the same code."""

    def __init__(
        self,
        model: nn.Module,
        config: OptimizerConfig,
        *,
        total_steps: int,
        lanes: int,
        objective: Objective = MASKED_GENES,
        compiled: bool = False,
        average: float = 0.0,
    ) -> None:
        check_average(average, config.zero_stage)
        if not torch.distributed.is_initialized():
            raise ClusterError(
                "DeepSpeedEngine needs a torch process group.",
                fix="Ray Train makes one; elsewhere call torch.distributed.init_process_group, or use TorchEngine.",
            )
        on_cuda = torch.cuda.is_available()
        config.check_device(on_cuda=on_cuda)
        self.rank, self.workers = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self._config, self._total_steps, self._accumulation = config, total_steps, lanes // self.workers
        self._model, self._objective, self._deepspeed = model, objective, _import_deepspeed()
        self._engine, *_ = self._deepspeed.initialize(
            model=model,
            # torch's own AdamW: DeepSpeed's CPU and fused ones are compiled at first use. The model is still on the
            # host; the fused form is chosen by where DeepSpeed will put the state.
            optimizer=adamw(model, config, rate_scale=objective.rate_scale, fused=on_cuda and not config.offload),
            config=_deepspeed_config(config, self._accumulation),
            dist_init_required=None,
        )
        self.device = torch.device(self._engine.device)
        self._average = WeightAverage(zero_state.trained(model), average)
        if compiled:
            compile_layers(model, self.device, zero_stage=config.zero_stage)
        self._norm: torch.Tensor | None = None
        if config.zero_stage == 0:
            self._engine.clip_fp32_gradients = self._clip
        self._lane_losses = torch.zeros(0)

    def step(self, batch: StepBatch) -> torch.Tensor:
        """One optimiser step; see `Engine.step`."""
        self._engine.train()
        lanes = []
        # DeepSpeed takes the mean over accumulation and workers: this undoes it (see the top of this file).
        scale = self._accumulation * self.workers / batch.divisor
        set_rate(self._engine.optimizer, self.learning_rate(batch.step))
        for micro_batch in batch.micro_batches:
            with _dropout_from(micro_batch.dropout_seed, self.device):
                loss, micro_sums = self._objective.loss(self._engine, micro_batch.to(self.device))
            self._engine.backward(loss * scale)
            self._engine.step()
            lanes.append(micro_sums)
        self._average.add(batch.step)
        self._lane_losses = torch.stack(lanes)[:, 0]
        return torch.stack(lanes).sum(0)

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterable[Lane]) -> torch.Tensor:
        """Sums without learning; see `Engine.evaluate`."""
        self._engine.eval()
        with self._average.in_place():
            sums = [self._objective.measure(self._engine, lane.to(self.device)) for lane in micro_batches]
        return reduce(torch.add, sums)

    def total(self, sums: torch.Tensor) -> np.ndarray:
        """Sums of all workers."""
        summed = sums.double()
        torch.distributed.all_reduce(summed)
        return summed.cpu().numpy()

    def learning_rate(self, step: int) -> float:
        """Learning rate of that step."""
        return self._config.rate_at(step, self._total_steps)

    def gradient_norm(self) -> float | None:
        """Norm of the last step's gradient before clipping; None at stage 0 without clipping."""
        norm = self._norm if self._config.zero_stage == 0 else self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def _clip(self) -> None:
        """What DeepSpeed does at stage 0, where it keeps no norm."""
        self._norm = nn.utils.clip_grad_norm_(self._engine.module.parameters(), self._config.clip)

    def lane_losses(self) -> torch.Tensor:
        """Loss of each of this worker's micro-batches in the last step."""
        return self._lane_losses

    def snapshot(self) -> Snapshot:
        """A copy of this worker's fragments of weights and optimiser state."""
        place = {"rank": self.rank, "workers": self.workers}
        held = zero_state.take(self._engine, self._model, stage=self._config.zero_stage, **place)
        return self._average.added_to(held, **place)

    def restore(self, saved: SavedState) -> None:
        """Take weights and optimiser state, written by any number of workers at any ZeRO stage."""
        gathered, stage = self._deepspeed.zero.GatheredParameters, self._config.zero_stage
        zero_state.put(self._engine, self._model, saved, stage=stage, rank=self.rank, gathered=gathered)
        self._average.restore(saved)

    def weights(self) -> dict[str, np.ndarray]:
        """What the objective keeps of the model, by name; at ZeRO stage 3 the weights are gathered first."""
        if self._config.zero_stage < 3:
            with self._average.in_place():
                return self._objective.weights(self._model)
        with self._deepspeed.zero.GatheredParameters(list(self._model.parameters())):
            return self._objective.weights(self._model)


def _import_deepspeed() -> Any:
    # Here and not at the top: the import takes 3 to 25 seconds and fixes the accelerator.
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops

    # At first use DeepSpeed compiles this op (80 s, and a C++ compiler). It is a shared-memory all-reduce for tensor
    # parallel inference on CPU; training reduces through gloo.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed 0.19 calls collectives under names that torch 2.13 has renamed: one warning a step, nothing to act on.
    renamed = "`torch.distributed.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated"
    warnings.filterwarnings("ignore", message=renamed, category=FutureWarning)
    return deepspeed


def _deepspeed_config(config: OptimizerConfig, accumulation: int) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    return {
        # A micro-batch is one packed stream; how many cells it holds is the batch plan's business.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # With offload DeepSpeed asks for its own CPU AdamW, which is compiled at first use.
        "zero_force_ds_cpu_optimizer": False,
        "torch_autocast": {"enabled": config.precision == "bf16", "dtype": "bfloat16"},
        "steps_per_print": 10**9,
    }


@contextlib.contextmanager
def _dropout_from(seed: int, device: torch.device) -> Iterator[None]:
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
