"""Low-rank additions to an encoder's matrices (LoRA): a small part to train, merged into the weights at the end.

Hu et al. 2021 (arXiv 2106.09685), sections 4.1 and 4.2: a frozen matrix W is used as W + (alpha / rank) B A, where A
(rank x in) begins as Gaussian noise and B (out x rank) as zero, so that nothing is changed at first. Adapted by default
are the query and value projections, as there; queries, keys and values are one matrix here, and each has its own A and
B. A is scaled like torch's linear layers begin: a standard deviation of 1 / sqrt(in).

Axis suffixes: `t` tokens, `p` parts of a matrix (three for queries, keys and values, else one), `r` rank, `i` inputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional

from genescale.platform.errors import SettingsError
from genescale.training.model import EncoderLayer

QKV = ("query", "key", "value")
WHOLE = {"output": "attention.output", "widen": "widen", "narrow": "narrow"}
MATRICES = (*QKV, *WHOLE)


class LowRankLinear(nn.Module):
    """A frozen linear layer with a trained addition to some of its equal parts, or to all of it."""

    def __init__(
        self,
        base: nn.Linear,
        *,
        rank: int,
        alpha: float,
        dropout: float,
        generator: torch.Generator,
        parts: int = 1,
        adapted: Sequence[int] = (0,),
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.adapted, self.parts, self.scaling = tuple(adapted), parts, alpha / rank
        self.dropout = nn.Dropout(dropout)
        like = {"device": base.weight.device, "dtype": base.weight.dtype}
        noise = torch.randn(len(adapted), rank, base.in_features, generator=generator) / math.sqrt(base.in_features)
        self.down_pri = nn.Parameter(noise.to(**like))
        self.up_por = nn.Parameter(torch.zeros(len(adapted), base.out_features // parts, rank, **like))

    def forward(self, inputs_ti: torch.Tensor) -> torch.Tensor:
        """(t, out)."""
        outputs = list(self.base(inputs_ti).chunk(self.parts, dim=-1))
        dropped_ti = self.dropout(inputs_ti)
        for number, part in enumerate(self.adapted):
            low_tr = functional.linear(dropped_ti, self.down_pri[number])
            outputs[part] = outputs[part] + self.scaling * functional.linear(low_tr, self.up_por[number])
        return outputs[0] if self.parts == 1 else torch.cat(outputs, dim=-1)

    @torch.no_grad()
    def merged(self) -> torch.Tensor:
        """The weight (out, in) of a plain linear layer that computes the same without dropout."""
        weight = self.base.weight.detach().clone()
        for number, part in enumerate(self.adapted):
            weight.chunk(self.parts)[part].add_(self.up_por[number] @ self.down_pri[number], alpha=self.scaling)
        return weight


def add_low_rank(
    layers: Sequence[nn.Module], *, matrices: Sequence[str], rank: int, alpha: float, dropout: float, seed: int
) -> None:
    """Put additions into encoder layers, in place; their other weights are frozen. The same seed gives the same noise.

    Raises SettingsError for a matrix that no layer has.
    """
    check_matrices(matrices)
    generator = torch.Generator().manual_seed(seed)
    options = {"rank": rank, "alpha": alpha, "dropout": dropout, "generator": generator}
    for layer in layers:
        if not isinstance(layer, EncoderLayer):
            raise SettingsError(f"low-rank additions are for encoder layers, this is a {type(layer).__name__}.")
        layer.requires_grad_(False)
        adapted = [number for number, name in enumerate(QKV) if name in matrices]
        if adapted:
            qkv = layer.attention.qkv
            layer.attention.qkv = LowRankLinear(qkv, parts=len(QKV), adapted=adapted, **options)
        for name, place in WHOLE.items():
            if name in matrices:
                owner = layer.get_submodule(place.rpartition(".")[0])
                attribute = place.rpartition(".")[2]
                setattr(owner, attribute, LowRankLinear(getattr(owner, attribute), **options))


def check_matrices(matrices: Sequence[str]) -> None:
    """SettingsError unless these are matrices of an encoder layer, each named once."""
    wrong = [name for name in matrices if name not in MATRICES]
    if wrong or not matrices or len(set(matrices)) != len(matrices):
        what = f"'{wrong[0]}' is no matrix of an encoder layer." if wrong else "name one matrix or more, each once."
        raise SettingsError(what, where="lora_matrices", fix=f"Use some of {', '.join(MATRICES)}.")


def merged_state(module: nn.Module) -> Mapping[str, torch.Tensor]:
    """The state of `module` as it would be without additions, the additions merged in; `module` is not changed."""
    additions = {name: each for name, each in module.named_modules() if isinstance(each, LowRankLinear)}
    state = {}
    for name, tensor in module.state_dict().items():
        owner, _, key = name.rpartition(".")
        if owner in additions:  # the trained part itself
            continue
        inside = owner.removesuffix(".base") if owner.endswith(".base") else ""
        if inside in additions:
            state[f"{inside}.{key}"] = additions[inside].merged() if key == "weight" else tensor
        else:
            state[name] = tensor
    return state
