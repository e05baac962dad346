"""What a model is trained for: the seam between the engines and what a micro-batch means.

Axes: m masked positions, v vocabulary.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from genescale.training.batches import MicroBatch
from genescale.training.weights import to_hf


class Objective(Protocol):
    """A loss that is a sum over what a micro-batch holds, so that the sums of lanes and workers add up.

    `model` is the module, or DeepSpeed's engine around it: it may be called, no more.
    """

    def loss(self, model: Any, micro_batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(weighted loss summed over the micro-batch, its detached sums (3): loss, correct, weight)."""

    def measure(self, model: Any, micro_batch: Any) -> torch.Tensor:
        """Sums (k) for a measurement without learning; k is the same for every micro-batch."""

    def weights(self, model: nn.Module) -> dict[str, np.ndarray]:
        """What is kept of a trained model, by name."""

    def rate_scale(self, parameter: str) -> float:
        """Share of the learning rate that this parameter, by its name in the model, is trained with."""


class MaskedGenes:
    """Find the genes that were hidden: the cross-entropy at masked positions, each of weight one."""

    def loss(self, model: Any, micro_batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Objective.loss`."""
        logits_mv = model(micro_batch.packed, micro_batch.masked_positions).float()
        nll_m = functional.cross_entropy(logits_mv, micro_batch.labels, reduction="none")
        # An empty lane computes one token, for the collectives of ZeRO, and counts for nothing.
        weight = 1.0 if micro_batch.n_masked else 0.0
        nll = nll_m.sum() * weight
        correct = (logits_mv.argmax(-1) == micro_batch.labels).sum() * weight
        return nll, torch.stack([nll.detach(), correct, nll.new_full((), float(micro_batch.n_masked))])

    def measure(self, model: Any, micro_batch: MicroBatch) -> torch.Tensor:
        """Negative log likelihood, correct, masked tokens."""
        return self.loss(model, micro_batch)[1]

    def weights(self, model: Any) -> dict[str, np.ndarray]:
        """All weights under their Hugging Face names."""
        return to_hf(model)

    def rate_scale(self, parameter: str) -> float:
        """All alike."""
        return 1.0


MASKED_GENES = MaskedGenes()
