"""Fitting heads on cached vectors, the encoder frozen: on the CPU, seconds for tens of thousands of rows.

Axis suffixes: `r` training rows, `b` rows of a batch, `d` width, `h` heads.

An epoch of training, a look at the validation part, the best epoch kept and put back at the end. All randomness comes
from `FinetuneConfig.seed`; the global state is not touched.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from genescale.training.averaging import WeightAverage
from genescale.training.fitting.config import FinetuneConfig
from genescale.training.fitting.epochs import (
    Course,
    Fitted,
    OnEpoch,
    judge,
    learning_rate_factor,
    nothing,
    own_randomness,
)
from genescale.training.fitting.examples import NO_LABEL, Examples
from genescale.training.fitting.losses import all_row_weights, target_tensors, weighted_loss_sum
from genescale.training.heads.head import Head, LinearHead, NearestHead
from genescale.training.heads.spec import HeadSpec


def fit_vectors(
    specs: Sequence[HeadSpec],
    train_rd: np.ndarray,
    train: Examples,
    validation_rd: np.ndarray,
    validation: Examples,
    config: FinetuneConfig,
    *,
    on_epoch: OnEpoch = nothing,
) -> Fitted:
    """Fit heads on the training vectors (r, d) float32, and keep the epoch that is best on the validation part."""
    if specs[0].type == "nearest":
        return _remembered(specs, train_rd, train, (validation_rd, validation), on_epoch)
    with own_randomness(config.seed, torch.device("cpu")):
        fit = _Fit(specs, train_rd, train, config)
        course = Course(config.patience)
        kept: list[dict[str, torch.Tensor]] = []
        for number in range(1, config.epochs + 1):
            train_loss = fit.epoch(number - 1)
            with fit.average.in_place():
                judgement = judge(fit.heads, [head.answer(validation_rd) for head in fit.heads], validation)
                epoch = judgement.epoch(number, train_loss)
                if course.add(epoch):
                    kept = fit.states()
            on_epoch(epoch)
            if course.exhausted:
                break
        for head, state in zip(fit.heads, kept, strict=True):
            head.load_state_dict(state)
    return Fitted(heads=fit.ended(), best_epoch=course.best_epoch, history=tuple(course.history))


def fit_vectors_for(
    specs: Sequence[HeadSpec], rows_rd: np.ndarray, examples: Examples, config: FinetuneConfig, *, epochs: int
) -> Fitted:
    """Fit heads for exactly so many epochs of `config`'s schedule, without a validation part: for a refit."""
    if specs[0].type == "nearest":
        return _remembered(specs, rows_rd, examples, None, nothing)
    with own_randomness(config.seed, torch.device("cpu")):
        fit = _Fit(specs, rows_rd, examples, config)
        for number in range(epochs):
            fit.epoch(number)
        with fit.average.in_place():
            kept = fit.states()
        for head, state in zip(fit.heads, kept, strict=True):
            head.load_state_dict(state)
    return Fitted(heads=fit.ended(), best_epoch=epochs, history=())


class _Fit:
    """Heads, their optimiser and the training rows."""

    def __init__(
        self, specs: Sequence[HeadSpec], rows_rd: np.ndarray, examples: Examples, config: FinetuneConfig
    ) -> None:
        self.config, self.n_rows = config, len(rows_rd)
        self.heads = [LinearHead(spec) for spec in specs]
        for head, target_r in zip(self.heads, examples.targets, strict=True):
            head.standardise(rows_rd)
            if head.spec.kind == "number":
                head.standardise_target(target_r)
        # All heads see the same rows, so one standardisation serves them all, and it is done once.
        self.rows_rd = self.heads[0].standard(torch.from_numpy(np.ascontiguousarray(rows_rd, dtype=np.float32)))
        self.targets = target_tensors(examples.targets)
        self.weights_hr = torch.from_numpy(all_row_weights(examples.targets, specs, config))
        self.batches = math.ceil(self.n_rows / config.cells_per_batch)
        self.optimiser = torch.optim.AdamW(
            decayed_groups(self.heads, config.learning_rate, config.weight_decay), fused=True
        )
        self.parameters = [parameter for head in self.heads for parameter in head.parameters()]
        named = [pair for head in self.heads for pair in head.named_parameters()]
        self.average = WeightAverage(named, config.weight_average)
        self.step = 0

    def epoch(self, number: int) -> float:
        """One pass over the rows in an order of its own; gives the mean loss."""
        for head in self.heads:
            head.train()
        order = torch.from_numpy(np.random.default_rng([self.config.seed, number]).permutation(self.n_rows))
        rows_rd, weights_hr = self.rows_rd[order], self.weights_hr[:, order]
        targets = [target_r[order] for target_r in self.targets]
        edges = np.linspace(0, self.n_rows, self.batches + 1).astype(np.int64).tolist()
        total, weight = 0.0, 0.0
        for start, stop in itertools.pairwise(edges):
            chunk_targets = [target_r[start:stop] for target_r in targets]
            chunk = self._take(rows_rd[start:stop], chunk_targets, weights_hr[:, start:stop])
            total, weight = total + chunk[0], weight + chunk[1]
        return total / weight if weight else math.nan

    def states(self) -> list[dict[str, torch.Tensor]]:
        """A copy of each head's numbers."""
        return [{name: value.clone() for name, value in head.state_dict().items()} for head in self.heads]

    def ended(self) -> tuple[Head, ...]:
        """The heads, in evaluation mode."""
        return tuple(head.eval() for head in self.heads)

    def _take(
        self, rows_bd: torch.Tensor, targets: Sequence[torch.Tensor], weights_hb: torch.Tensor
    ) -> tuple[float, float]:
        """One optimiser step; (sum of weight x loss, sum of weights)."""
        factor = learning_rate_factor(self.step, self.batches * self.config.epochs, self.config)
        self.step += 1
        weight = float(weights_hb.sum())
        if not weight:
            return 0.0, 0.0
        sums = [
            weighted_loss_sum(head, head.from_standard(rows_bd), target_b, weight_b, self.config.label_smoothing)
            for head, target_b, weight_b in zip(self.heads, targets, weights_hb, strict=True)
        ]
        total = torch.stack(sums).sum() if len(sums) > 1 else sums[0]
        self.optimiser.zero_grad(set_to_none=True)
        (total / weight).backward()
        nn.utils.clip_grad_norm_(self.parameters, self.config.gradient_clip)
        for group in self.optimiser.param_groups:
            group["lr"] = self.config.learning_rate * factor
        self.optimiser.step()
        self.average.add(self.step)
        return float(total.detach()), weight


def decayed_groups(modules: Sequence[nn.Module], learning_rate: float, weight_decay: float) -> list[dict[str, object]]:
    """Two optimiser groups: matrices decay, biases and norms do not."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    return [
        {"params": [p for p in parameters if p.dim() > 1], "lr": learning_rate, "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "lr": learning_rate, "weight_decay": 0.0},
    ]


def _remembered(
    specs: Sequence[HeadSpec],
    rows_rd: np.ndarray,
    examples: Examples,
    validation: tuple[np.ndarray, Examples] | None,
    on_epoch: OnEpoch,
) -> Fitted:
    """Nearest-neighbour heads: nothing is trained; the one epoch says how they do on the validation part."""
    heads = []
    for spec, target_r in zip(specs, examples.targets, strict=True):
        labelled_r = ~np.isnan(target_r) if spec.kind == "number" else target_r != NO_LABEL
        head = NearestHead(spec)
        head.remember(rows_rd[labelled_r], target_r[labelled_r])
        heads.append(head.eval())
    if validation is None:
        return Fitted(heads=tuple(heads), best_epoch=1, history=())
    epoch = judge(heads, [head.answer(validation[0]) for head in heads], validation[1]).epoch(1, math.nan)
    on_epoch(epoch)
    return Fitted(heads=tuple(heads), best_epoch=1, history=(epoch,))
