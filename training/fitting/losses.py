"""The loss of heads on some rows: sums and weights, so that it is the same however rows are cut into batches.

Axis suffixes: `r` or `b` rows, `c` classes, `h` heads.

The loss of a step is the sum over all heads and rows of weight x loss, over the sum of the weights. A row's weight for
a head is that head's weight x that of the row's class, and 0 where the row has no target for it. Classes are learned by
cross-entropy, numbers by squared error in standard units.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional

from genescale.training.fitting.config import FinetuneConfig
from genescale.training.fitting.examples import NO_LABEL
from genescale.training.heads.head import LinearHead
from genescale.training.heads.spec import HeadSpec


def class_weights(codes_r: np.ndarray, spec: HeadSpec, config: FinetuneConfig) -> np.ndarray:
    """(c) float32 weight of each class, from the codes of all training rows: 1, or the inverse of its share."""
    if config.class_weights == "none" or spec.kind == "number":
        return np.ones(spec.outputs, dtype=np.float32)
    rows_c = np.bincount(codes_r[codes_r != NO_LABEL], minlength=spec.outputs)
    return (rows_c.sum() / (spec.outputs * np.maximum(rows_c, 1))).astype(np.float32)


def row_weights(target_r: np.ndarray, spec: HeadSpec, weight_c: np.ndarray) -> np.ndarray:
    """(r) float32 weight of each row in the loss of one head; 0 without a target."""
    if spec.kind == "number":
        return np.where(np.isnan(target_r), 0.0, spec.weight).astype(np.float32)
    return np.where(target_r == NO_LABEL, 0.0, spec.weight * weight_c[target_r]).astype(np.float32)


def all_row_weights(targets: Sequence[np.ndarray], specs: Sequence[HeadSpec], config: FinetuneConfig) -> np.ndarray:
    """(h, r) float32 weights of the training rows for every head."""
    pairs = zip(targets, specs, strict=True)
    return np.stack([row_weights(target_r, spec, class_weights(target_r, spec, config)) for target_r, spec in pairs])


def target_tensors(targets: Sequence[np.ndarray], device: torch.device | str = "cpu") -> list[torch.Tensor]:
    """The targets as tensors (r): int64 codes, float32 numbers; what is missing becomes 0, for its weight is 0."""
    plain = [
        np.nan_to_num(target_r).astype(np.float32) if target_r.dtype.kind == "f" else np.maximum(target_r, 0)
        for target_r in targets
    ]
    return [torch.from_numpy(np.ascontiguousarray(values)).to(device) for values in plain]


def weighted_loss_sum(
    head: LinearHead, outputs_bc: torch.Tensor, target_b: torch.Tensor, weight_b: torch.Tensor, smoothing: float = 0.0
) -> torch.Tensor:
    """Sum over rows of weight x loss, with gradients; outputs as `LinearHead.forward` gives them, in fp32.

    smoothing: the part of each label that is spread evenly over all classes (as torch's `label_smoothing`).
    """
    if head.spec.kind == "number":
        loss_b = (outputs_bc[:, 0] - head.standard_target(target_b)) ** 2
    else:
        loss_b = functional.cross_entropy(outputs_bc, target_b, reduction="none", label_smoothing=smoothing)
    return (loss_b * weight_b).sum()
