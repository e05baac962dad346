"""Optimiser steps: one protocol, one engine in plain torch, one on DeepSpeed (whose only door this file is).

Both do the same arithmetic. With N masked tokens in a step, over all lanes of all workers, the loss is
sum(negative log likelihood) / N, so a lane with fewer masked tokens weighs less and the result does not depend on how
lanes are dealt to workers. DeepSpeed divides each loss by its accumulation count and averages gradients over workers;
the loss handed to it is multiplied by both, which leaves the sum over lanes divided by N.

Dropout is drawn per micro-batch from a seed of the batch plan, inside a forked random state: the same on any worker,
and the caller's random state is untouched.
"""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from genescale.platform.errors import ClusterError, IntegrityError, SettingsError
from genescale.training.batches import MicroBatch, StepBatch
from genescale.training.model import MaskedGeneModel
from genescale.training.weights import to_hf

# One subfolder of a checkpoint belongs to the engine.
STATE_FOLDER = "engine"
STATE_FILE = "state.safetensors"
BETAS, EPSILON = (0.9, 0.999), 1e-8


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with a learning-rate schedule; defaults are those of the published 10M model."""

    learning_rate: float = 1e-3
    """At the end of the warm-up."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the rate falls to zero after the warm-up."""
    warmup_steps: int = 0
    warmup_fraction: float = 0.0
    """Warm-up as a share of all steps, instead of `warmup_steps`."""
    weight_decay: float = 0.001
    """Not applied to biases and norms."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 does not clip."""
    zero_stage: int = 1
    """What DeepSpeed divides among workers: 0 nothing, 1 optimiser state, 2 and gradients, 3 and weights."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 computes matrix products in bf16 and keeps weights and optimiser state in fp32."""

    def __post_init__(self) -> None:
        checks = {
            "learning_rate": self.learning_rate > 0,
            "warmup_steps": self.warmup_steps >= 0,
            "warmup_fraction": 0 <= self.warmup_fraction < 1,
            "weight_decay": self.weight_decay >= 0,
            "clip": self.clip >= 0,
            "zero_stage": self.zero_stage in (0, 1, 2, 3),
        }
        for name, holds in checks.items():
            if not holds:
                raise SettingsError(f"optimizer.{name} is {getattr(self, name)}, out of range.")
        if self.warmup_steps and self.warmup_fraction:
            raise SettingsError("optimizer has both warmup_steps and warmup_fraction.", fix="Give one of them.")

    def rate_at(self, step: int, total_steps: int) -> float:
        """Learning rate of optimiser step `step` (the first is 1)."""
        warmup = self.warmup_steps or math.ceil(self.warmup_fraction * total_steps)
        if step <= warmup:
            return self.learning_rate * step / warmup
        share = (step - 1 - warmup) / max(1, total_steps - warmup)
        fall = {"linear": 1 - share, "cosine": (1 + math.cos(math.pi * share)) / 2, "constant": 1.0}
        return self.learning_rate * max(0.0, fall[self.schedule])


class Engine(Protocol):
    """A model, its optimiser and its workers."""

    rank: int
    workers: int

    def step(self, batch: StepBatch) -> torch.Tensor:
        """One optimiser step. Returns this worker's sums (3): negative log likelihood, correct, masked tokens."""

    def evaluate(self, micro_batches: Iterable[MicroBatch]) -> torch.Tensor:
        """The same sums without learning and without dropout."""

    def total(self, sums: torch.Tensor) -> np.ndarray:
        """Sums of all workers, float64; every worker must call it."""

    def learning_rate(self, step: int) -> float:
        """Learning rate of that step."""

    def gradient_norm(self) -> float | None:
        """Norm of the last step's gradient before clipping; None where the engine does not say."""

    def save(self, folder: Path) -> None:
        """Write weights and optimiser state below `folder`; every worker must call it."""

    def resume(self, folder: Path) -> None:
        """Take weights and optimiser state from a folder written by `save`; every worker must call it."""

    def weights(self) -> dict[str, np.ndarray]:
        """All weights under their Hugging Face names; every worker must call it."""


class TorchEngine:
    """One process, plain torch: the reference for DeepSpeed, and the engine for machines without Ray."""

    rank, workers = 0, 1

    def __init__(
        self, model: MaskedGeneModel, config: OptimizerConfig, *, total_steps: int, device: str | torch.device = "cpu"
    ) -> None:
        self._model = model.to(device)
        self._config, self._total_steps, self._device = config, total_steps, torch.device(device)
        self._optimizer = _adamw(model, config)
        self._norm: float | None = None

    def step(self, batch: StepBatch) -> torch.Tensor:
        """One optimiser step; see `Engine.step`."""
        self._model.train()
        self._optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(3, device=self._device)
        for micro_batch in batch.micro_batches:
            with _dropout_from(micro_batch.dropout_seed, self._device), self._autocast():
                nll, micro_sums = _forward(self._model, micro_batch.to(self._device))
            (nll / batch.masked).backward()
            sums += micro_sums
        clip = self._config.clip or math.inf
        self._norm = float(nn.utils.clip_grad_norm_(self._model.parameters(), clip))
        _set_rate(self._optimizer, self.learning_rate(batch.step))
        self._optimizer.step()
        return sums

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterable[MicroBatch]) -> torch.Tensor:
        """Sums without learning; see `Engine.evaluate`."""
        self._model.eval()
        sums = torch.zeros(3, device=self._device)
        for micro_batch in micro_batches:
            with self._autocast():
                sums += _forward(self._model, micro_batch.to(self._device))[1]
        return sums

    def total(self, sums: torch.Tensor) -> np.ndarray:
        """There is one worker: its sums."""
        return sums.double().cpu().numpy()

    def learning_rate(self, step: int) -> float:
        """Learning rate of that step."""
        return self._config.rate_at(step, self._total_steps)

    def gradient_norm(self) -> float | None:
        """Norm of the last step's gradient before clipping."""
        return self._norm

    def save(self, folder: Path) -> None:
        """Write weights and optimiser state as safetensors."""
        (folder / STATE_FOLDER).mkdir(parents=True, exist_ok=True)
        tensors = {f"weight/{name}": parameter.detach() for name, parameter in self._model.named_parameters()}
        for name, parameter in self._model.named_parameters():
            state = self._optimizer.state.get(parameter, {})
            tensors.update({f"{key}/{name}": torch.as_tensor(value) for key, value in state.items()})
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / STATE_FOLDER / STATE_FILE)

    @torch.no_grad()
    def resume(self, folder: Path) -> None:
        """Take weights and optimiser state from `save`; IntegrityError when they are not this model's."""
        path = folder / STATE_FOLDER / STATE_FILE
        tensors = load_file(path) if path.is_file() else {}
        for name, parameter in self._model.named_parameters():
            saved = tensors.get(f"weight/{name}")
            if saved is None or saved.shape != parameter.shape:
                raise IntegrityError(f"holds no {name} of shape {tuple(parameter.shape)}.", where=str(path))
            parameter.copy_(saved)
            state = {key: tensors.get(f"{key}/{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
            if all(value is not None for value in state.values()):
                moved = {k: v if k == "step" else v.to(parameter.device) for k, v in state.items() if v is not None}
                self._optimizer.state[parameter] = moved

    def weights(self) -> dict[str, np.ndarray]:
        """All weights under their Hugging Face names."""
        return to_hf(self._model)

    def _autocast(self) -> contextlib.AbstractContextManager[None]:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._config.precision == "bf16")


class DeepSpeedEngine:
    """DeepSpeed on the process group of this worker: gloo on CPU, NCCL on GPUs, the same code."""

    def __init__(self, model: MaskedGeneModel, config: OptimizerConfig, *, total_steps: int, lanes: int) -> None:
        if not torch.distributed.is_initialized():
            raise ClusterError(
                "DeepSpeedEngine needs a torch process group.",
                fix="Ray Train makes one; elsewhere call torch.distributed.init_process_group, or use TorchEngine.",
            )
        self.rank, self.workers = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self._config, self._total_steps, self._accumulation = config, total_steps, lanes // self.workers
        self._model, self._deepspeed = model, _import_deepspeed()
        self._engine, *_ = self._deepspeed.initialize(
            model=model,
            # torch's own AdamW: DeepSpeed's CPU and fused ones are compiled at first use.
            optimizer=_adamw(model, config),
            config=_deepspeed_config(config, self._accumulation),
            dist_init_required=None,
        )
        self._device = torch.device(self._engine.device)

    def step(self, batch: StepBatch) -> torch.Tensor:
        """One optimiser step; see `Engine.step`."""
        self._engine.train()
        sums = torch.zeros(3, device=self._device)
        # DeepSpeed takes the mean over accumulation and workers: this undoes it (see the top of this file).
        scale = self._accumulation * self.workers / batch.masked
        _set_rate(self._engine.optimizer, self.learning_rate(batch.step))
        for micro_batch in batch.micro_batches:
            with _dropout_from(micro_batch.dropout_seed, self._device):
                nll, micro_sums = _forward(self._engine, micro_batch.to(self._device))
            self._engine.backward(nll * scale)
            self._engine.step()
            sums += micro_sums
        return sums

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterable[MicroBatch]) -> torch.Tensor:
        """Sums without learning; see `Engine.evaluate`."""
        self._engine.eval()
        sums = torch.zeros(3, device=self._device)
        for micro_batch in micro_batches:
            sums += _forward(self._engine, micro_batch.to(self._device))[1]
        return sums

    def total(self, sums: torch.Tensor) -> np.ndarray:
        """Sums of all workers."""
        summed = sums.double()
        torch.distributed.all_reduce(summed)
        return summed.cpu().numpy()

    def learning_rate(self, step: int) -> float:
        """Learning rate of that step."""
        return self._config.rate_at(step, self._total_steps)

    def gradient_norm(self) -> float | None:
        """Norm of the last step's gradient before clipping; DeepSpeed keeps it at ZeRO stages 1 to 3."""
        norm = self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def save(self, folder: Path) -> None:
        """Write DeepSpeed's own files (pickles: for storage that only this run writes to)."""
        self._engine.save_checkpoint(str(folder), tag=STATE_FOLDER, save_latest=False)

    def resume(self, folder: Path) -> None:
        """Take DeepSpeed's files; ZeRO stages 1 to 3 need as many workers as wrote them."""
        loaded, _ = self._engine.load_checkpoint(str(folder), tag=STATE_FOLDER)
        if loaded is None:
            raise IntegrityError("DeepSpeed finds no checkpoint.", where=str(folder / STATE_FOLDER))

    def weights(self) -> dict[str, np.ndarray]:
        """All weights under their Hugging Face names; at ZeRO stage 3 they are gathered first."""
        if self._config.zero_stage < 3:
            return to_hf(self._model)
        with self._deepspeed.zero.GatheredParameters(list(self._model.parameters())):
            return to_hf(self._model)


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
    return {
        # A micro-batch is one packed stream; how many cells it holds is the batch plan's business.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.clip,
        "zero_optimization": {"stage": config.zero_stage},
        "zero_allow_untested_optimizer": True,
        "torch_autocast": {"enabled": config.precision == "bf16", "dtype": "bfloat16"},
        "steps_per_print": 10**9,
    }


def _forward(model: Any, micro_batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """(negative log likelihood summed over masked tokens, the sums of `Engine.step`)."""
    logits_mv = model(micro_batch.packed, micro_batch.masked_positions).float()
    nll_m = functional.cross_entropy(logits_mv, micro_batch.labels, reduction="none")
    # An empty lane computes one token, for the collectives of ZeRO, and counts for nothing.
    weight = 1.0 if micro_batch.n_masked else 0.0
    nll = nll_m.sum() * weight
    correct = (logits_mv.argmax(-1) == micro_batch.labels).sum() * weight
    return nll, torch.stack([nll.detach(), correct, nll.new_tensor(float(micro_batch.n_masked))])


def _adamw(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW that decays matrices and leaves biases and norms alone, as the published training did."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=BETAS, eps=EPSILON)


def _set_rate(optimizer: Any, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


@contextlib.contextmanager
def _dropout_from(seed: int, device: torch.device) -> Iterator[None]:
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
