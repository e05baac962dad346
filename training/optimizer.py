"""AdamW and its learning-rate schedule, as both engines use them."""

from __future__ import annotations

import math
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


def adamw(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW that decays matrices and leaves biases and norms alone, as the published training did."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    # On a GPU torch updates all tensors in one kernel instead of several for each.
    fused = all(parameter.is_cuda for parameter in matrices + vectors)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=BETAS, eps=EPSILON, fused=fused or None)


def set_rate(optimizer: Any, rate: float) -> None:
    """Let the next step use this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
