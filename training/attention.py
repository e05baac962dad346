"""Self-attention over packed cells: one seam, four back ends that compute the same numbers.

A batch is one stream of tokens; `Segments` says where each cell begins. Every back end keeps cells apart:

    varlen     variable-length flash attention (CUDA, bf16 or fp16): one kernel for the whole stream
    segments   scaled_dot_product_attention on each run of equally long cells, without a mask (CPU, and CUDA in fp32)
    padded     cells padded to the longest, with a mask: the reference that tests compare the others with
    eager      the softmax written out, cell by cell; `attention_weights` returns its weights for analysis

`auto` is varlen where that kernel runs and segments elsewhere.

Dropout. The published model drops single attention weights (query i, key j) with probability p. The varlen kernel has
no dropout at all, and on CPU a dropout argument drops scaled_dot_product_attention to an unfused kernel (4.6 times
slower forward, 2.4 times with backward at 1,400 tokens). Here the values of a (key, head) are dropped for all queries
of the cell at once, before the kernel: sum_j P_ij m_j v_j / (1 - p) instead of sum_j P_ij m_ij v_j / (1 - p). Each
output keeps the published distribution (same mean, same variance); only the masks of different queries become equal.
It costs one multiplication per value and is the same on every back end, so they agree in training too.

Axes: t tokens, h heads, k width of one head, s tokens of one cell, b cells, d width = h x k.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch.nn import functional

from genescale.platform.errors import SettingsError

Backend = Literal["auto", "varlen", "segments", "padded", "eager"]


@dataclass(frozen=True, eq=False)
class Segments:
    """Where each cell of a packed stream begins and ends."""

    lengths: tuple[int, ...]
    """Tokens of each cell, on the host, so that no back end waits for the device."""
    offsets: torch.Tensor
    """(b + 1) int32 on the device of the stream: cell i is stream[offsets[i]:offsets[i + 1]]."""

    @classmethod
    def of(cls, lengths: tuple[int, ...], device: torch.device | str = "cpu") -> Segments:
        """Segments of cells with these lengths, in this order."""
        offsets = list(itertools.accumulate(lengths, initial=0))
        return cls(lengths, torch.tensor(offsets, dtype=torch.int32, device=device))

    @property
    def max_length(self) -> int:
        """Tokens of the longest cell; 0 for an empty batch."""
        return max(self.lengths, default=0)

    def runs(self) -> list[tuple[int, int]]:
        """(length, count) of each run of neighbouring cells of one length: a run needs one kernel call."""
        return [(length, len(list(group))) for length, group in itertools.groupby(self.lengths)]

    def to(self, device: torch.device | str) -> Segments:
        """The same segments with the offsets on `device`."""
        return Segments(self.lengths, self.offsets.to(device, non_blocking=True))


def check_backend(name: str) -> Backend:
    """`name` as a back end; SettingsError when there is none of that name."""
    if name not in get_args(Backend):
        raise SettingsError(f"no attention back end '{name}'.", fix=f"Use one of {', '.join(get_args(Backend))}.")
    return name  # type: ignore[return-value]


def attend(
    query_thk: torch.Tensor, key_thk: torch.Tensor, value_thk: torch.Tensor, segments: Segments, backend: Backend
) -> torch.Tensor:
    """Attention of every token to all tokens of its own cell: (t, h, k), the dtype of the query.

    Raises SettingsError when `varlen` is asked for where its kernel does not run.
    """
    if not segments.lengths:
        return torch.empty_like(value_thk)
    if backend == "auto":
        backend = "segments" if _varlen_refusal(query_thk) else "varlen"
    return _BACKENDS[backend](query_thk, key_thk, value_thk, segments)


def drop_values(value_thk: torch.Tensor, probability: float, training: bool) -> torch.Tensor:
    """Attention dropout (see the top of this file): whole (token, head) values set to zero, the rest scaled up."""
    if not training or probability == 0.0:
        return value_thk
    keep_th1 = functional.dropout(value_thk.new_ones(*value_thk.shape[:2], 1), probability, training=True)
    return value_thk * keep_th1


def attention_weights(query_thk: torch.Tensor, key_thk: torch.Tensor, segments: Segments) -> list[torch.Tensor]:
    """The softmax weights of each cell, (h, s, s): row = the token that looks, column = the token looked at."""
    scale = 1.0 / math.sqrt(query_thk.shape[-1])
    queries, keys = (x.transpose(0, 1).split(segments.lengths, dim=1) for x in (query_thk, key_thk))
    return [torch.softmax(q @ k.transpose(-1, -2) * scale, dim=-1) for q, k in zip(queries, keys, strict=True)]


def _eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments) -> torch.Tensor:
    values = v.transpose(0, 1).split(segments.lengths, dim=1)
    weights = attention_weights(q, k, segments)
    return torch.cat([(w @ x).transpose(0, 1) for w, x in zip(weights, values, strict=True)])


def _segments(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments) -> torch.Tensor:
    runs = segments.runs()
    # Split and not sliced: the gradient of a slice is as long as the whole stream, once for every run.
    parts = zip(*(x.split([length * count for length, count in runs]) for x in (q, k, v)), strict=True)
    outputs = []
    for (length, count), part in zip(runs, parts, strict=True):
        run = [x.unflatten(0, (count, length)).transpose(1, 2) for x in part]
        outputs.append(functional.scaled_dot_product_attention(*run).transpose(1, 2).flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _padded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments) -> torch.Tensor:
    lengths = torch.tensor(segments.lengths, device=q.device)
    real_bs = torch.arange(segments.max_length, device=q.device) < lengths[:, None]

    def pad(x: torch.Tensor) -> torch.Tensor:
        padded = x.new_zeros(*real_bs.shape, *x.shape[1:])
        return padded.masked_scatter(real_bs[..., None, None], x).transpose(1, 2)

    output = functional.scaled_dot_product_attention(pad(q), pad(k), pad(v), attn_mask=real_bs[:, None, None, :])
    return output.transpose(1, 2)[real_bs]


def _varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments) -> torch.Tensor:
    refusal = _varlen_refusal(q)
    if refusal:
        raise SettingsError(f"attention back end 'varlen' cannot run: {refusal}.", fix="Use 'auto' or 'segments'.")
    from torch.nn.attention.varlen import varlen_attn

    # Only the seven leading arguments are the same in every release since 2.10: causal, window and scale keep moving,
    # and their defaults are what is wanted here (every token sees its whole cell).
    longest = segments.max_length
    return varlen_attn(q, k, v.contiguous(), segments.offsets, segments.offsets, longest, longest)


def _varlen_refusal(query_thk: torch.Tensor) -> str:
    """Why the varlen kernel cannot take this query; empty when it can."""
    if query_thk.device.type != "cuda":
        return f"it needs a CUDA device, the model is on {query_thk.device.type}"
    if query_thk.dtype not in (torch.bfloat16, torch.float16):
        return f"it needs bf16 or fp16, the model computes in {query_thk.dtype}"
    if query_thk.shape[-1] % 8 or query_thk.shape[-1] > 256:
        return f"it needs heads of a multiple of 8 up to 256 wide, these are {query_thk.shape[-1]}"
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} does not have it (2.10 does)"
    return ""


_BACKENDS = {"varlen": _varlen, "segments": _segments, "padded": _padded, "eager": _eager}
