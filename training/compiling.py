"""torch.compile for an encoder: its layers without their attention.

Attention knows the length of every cell on the host, and no two micro-batches have the same: compiled with it, a layer
would be compiled anew for each. So the graph ends before it and begins again behind it; what lies between (products,
norms, activations, dropout) is compiled once for any number of tokens. Names of weights stay as they are.

Compiled dropout draws other masks than eager dropout from the same seed: a compiled run has its own loss curve, which
is as repeatable as the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from genescale.platform.errors import SettingsError
from genescale.training.attention import attend
from genescale.training.model import Encoder


def check_compiling(*, on_cuda: bool, zero_stage: int = 0) -> None:
    """SettingsError where layers cannot be compiled."""
    if not on_cuda:
        raise SettingsError(
            "layers are compiled for CUDA devices only.", where="compile", fix="Set compile = false on CPUs."
        )
    if zero_stage == 3:
        raise SettingsError(
            "at ZeRO stage 3 the weights of a layer come and go, which cannot be compiled.",
            where="compile",
            fix="Set compile = false, or optimizer.zero_stage to 2 or less.",
        )


def compile_layers(
    model: nn.Module, device: torch.device, *, zero_stage: int = 0, backend: str | Callable[..., Any] = "inductor"
) -> None:
    """Compile the layers of every encoder in `model`, in place; SettingsError where that is not possible.

    backend: of torch.compile; those that generate no code, such as `eager`, run on any device.
    """
    if backend == "inductor":
        check_compiling(on_cuda=device.type == "cuda", zero_stage=zero_stage)
    eager = torch.compiler.disable(attend)
    for module in model.modules():
        if isinstance(module, Encoder):
            for layer in module.layers:
                layer.attention.attend = eager
                layer.compile(dynamic=True, backend=backend)
