"""How much arithmetic a training step is, and how much of what the device can do that uses.

Model FLOPs of a forward pass over packed cells, a multiplication and an addition counting as two, with t tokens, cells
of lengths l, m masked positions, width d, feed-forward f, vocabulary v and n layers:

    n x (t x (8 d^2 + 4 d f)  +  4 d x sum(l^2))  +  m x (2 d^2 + 2 d v)

which is the projections of queries, keys, values and outputs and both matrices of the feed-forward block, scores and
mixing of values within each cell (in both directions), and the head at the masked positions alone. Backward is twice
that (Kaplan et al. 2020, section 2.1; Chowdhery et al. 2022, appendix B). Nothing that is computed again counts.

Options of an encoder change it so: with heads of width a together instead of d, 8 d a and 4 a sum(l^2); a gated
feed-forward has three matrices, 6 d f; o neighbours on each side of a rank are 2 o multiplications and additions per
channel, 4 o d; turning queries and keys by their rank is 3 a for each of the two; interpolated ranks are 3 d once per
token; taking seen genes from the logits is 2 v per masked position. The published formula leaves out what works on
single numbers (norms, activations, softmax, biases), and so does this one, but what an option adds is counted.

    MFU = 3 x forward FLOPs of a stretch / (its seconds x peak FLOPs per second of all workers)

The peak is what the maker states for dense products in the precision that is used, where the device is known, and
otherwise what a large matrix product reached on it when the run started.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from genescale.training.model import EncoderConfig

# Dense bf16 FLOPs per second from the makers' data sheets, by a part of the device's name.
PEAKS_BF16 = {
    "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12,
    "L4": 121e12, "A10": 125e12, "V100": 125e12,
}  # fmt: skip
_PROBE_SIZE, _PROBE_S = 1024, 0.2


@dataclass(frozen=True, kw_only=True)
class Work:
    """How much a step, or several, had to do."""

    tokens: int = 0
    squares: int = 0
    """Sum over cells of their squared lengths."""
    masked: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            tokens=self.tokens + other.tokens,
            squares=self.squares + other.squares,
            masked=self.masked + other.masked,
        )


def training_flops(config: EncoderConfig, work: Work) -> float:
    """Model FLOPs of forward and backward; see the top of this file."""
    width, attention = config.width, config.heads_width
    matrices = 6 if config.activation == "geglu" else 4
    per_token = 8 * width * attention + matrices * width * config.feed_forward + 4 * config.rank_neighbours * width
    if config.rotary_base:
        per_token += 2 * 3 * attention
    layer = work.tokens * per_token + 4 * attention * work.squares
    embedding = 3 * width * work.tokens if config.rank_knots else 0
    per_masked = 2 * width**2 + 2 * width * config.vocabulary_size
    if config.seen_genes:
        per_masked += 2 * config.vocabulary_size
    return 3.0 * (embedding + config.layers * layer + work.masked * per_masked)


@dataclass(frozen=True, kw_only=True)
class Utilisation:
    """What a step costs this encoder, and the peak of all workers together."""

    encoder: EncoderConfig
    peak_flops_per_s: float

    def share(self, work: Work, seconds: float) -> float:
        """MFU: model FLOPs done in `seconds` as a share of the peak."""
        return training_flops(self.encoder, work) / (seconds * self.peak_flops_per_s)


def peak_flops_per_s(device: torch.device | str, precision: str) -> float:
    """The peak of one device: the maker's figure where it is known, else measured with a matrix product."""
    device = torch.device(device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = next((peak for part, peak in PEAKS_BF16.items() if part in name), None)
        if known is not None and precision == "bf16":
            return known
    return _measured_peak(device, torch.bfloat16 if precision == "bf16" else torch.float32)


def _measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    size = _PROBE_SIZE * (8 if device.type == "cuda" else 1)
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    took_s: list[float] = []
    # The first product pays for starting up.
    while len(took_s) < 2 or sum(took_s) < _PROBE_S:
        _wait(device)
        began = time.perf_counter()
        torch.mm(matrix, matrix)
        _wait(device)
        took_s.append(time.perf_counter() - began)
    return float(2 * size**3 / min(took_s))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
