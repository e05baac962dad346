"""AdamW and its learning-rate schedule, as both engines use them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from genescale.platform.errors import SettingsError

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
    offload: bool = False
    """Keep what ZeRO divides of the optimiser state in host memory: slower steps, for models that fill their GPU."""

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
        if self.offload and not self.zero_stage:
            raise SettingsError(
                "at ZeRO stage 0 there is no divided state to keep on the host.",
                where="optimizer.offload",
                fix="Use optimizer.zero_stage 1, 2 or 3 with it.",
            )

    def check_device(self, *, on_cuda: bool) -> None:
        """SettingsError when these settings need a GPU and the workers have none."""
        if self.offload and not on_cuda:
            raise SettingsError(
                "on CPUs the optimiser state is in host memory anyway: offload needs GPUs.",
                where="optimizer.offload",
                fix="Set optimizer.offload = false; ZeRO stages 1 to 3 divide the state among workers.",
            )

    def rate_at(self, step: int, total_steps: int) -> float:
        """Learning rate of optimiser step `step` (the first is 1)."""
        warmup = self.warmup_steps or math.ceil(self.warmup_fraction * total_steps)
        if step <= warmup:
            return self.learning_rate * step / warmup
        share = (step - 1 - warmup) / max(1, total_steps - warmup)
        fall = {"linear": 1 - share, "cosine": (1 + math.cos(math.pi * share)) / 2, "constant": 1.0}
        return self.learning_rate * max(0.0, fall[self.schedule])


def adamw(
    model: nn.Module,
    config: OptimizerConfig,
    *,
    rate_scale: Callable[[str], float] = lambda name: 1.0,
    fused: bool = False,
) -> torch.optim.Optimizer:
    """AdamW that decays matrices and leaves biases and norms alone, as the published training did.

    Frozen parameters are left out. rate_scale: share of the learning rate for a parameter of this name. fused: torch
    updates all tensors in one kernel instead of several for each; for state on a GPU.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = []
    for scale in sorted({rate_scale(name) for name, _ in trained}):
        of_scale = [parameter for name, parameter in trained if rate_scale(name) == scale]
        matrices = [parameter for parameter in of_scale if parameter.dim() > 1]
        vectors = [parameter for parameter in of_scale if parameter.dim() <= 1]
        for parameters, decay in ((matrices, config.weight_decay), (vectors, 0.0)):
            if parameters:
                groups.append({"params": parameters, "weight_decay": decay, "rate_scale": scale})
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=BETAS, eps=EPSILON, fused=fused or None)


def set_rate(optimizer: Any, rate: float) -> None:
    """Let the next step use this learning rate, each group its share of it."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_scale"]
