"""Fitting a head: on cached cell vectors (encoder frozen), or together with the upper layers of the encoder.

Axis suffixes: `n` cells of a part, `b` cells of a batch, `d` width, `c` classes.

Both ways share one loop: an epoch of training, a look at the validation part, the best epoch kept (highest macro F1,
then lowest loss) and put back at the end. All randomness comes from `FitConfig.seed`; the global state is not touched.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from genescale.platform.errors import SettingsError
from genescale.training.embedder import TOKENS_PER_BATCH, layers_to_run, plan_batches, pool
from genescale.training.evaluation.scores import Scores, score
from genescale.training.heads.cell_classes import CellClassHead, HeadSpec
from genescale.training.model import Encoder, pack

CELLS_TO_STANDARDISE = 512
"""About so many training cells, evenly spaced, give the head its mean and scale when the encoder is trained too."""


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How a head is fitted. Defaults suit a head on a frozen encoder."""

    epochs: int = 50
    """Passes over the training cells at most."""
    patience: int = 10
    """Stop after so many epochs without a better one; 0 runs all epochs. The best epoch is kept either way."""
    learning_rate: float = 1e-2
    """Highest learning rate of the head."""
    encoder_learning_rate: float = 5e-5
    """Highest learning rate of encoder layers that are trained too."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls after the warm-up."""
    warmup_fraction: float = 0.05
    """Part of all steps in which the learning rate rises from zero."""
    weight_decay: float = 0.001
    gradient_clip: float = 1.0
    """Largest norm of the gradient."""
    cells_per_batch: int = 64
    tokens_per_batch: int = TOKENS_PER_BATCH
    """Most tokens of a batch when encoder layers are trained."""
    hidden: int = 0
    """Width of the head's hidden layer; 0 makes it linear."""
    dropout: float = 0.1
    """Dropout of the head."""
    class_weights: Literal["none", "balanced"] = "none"
    """`balanced` weighs a class by the inverse of its training cells."""
    seed: int = 0

    def __post_init__(self) -> None:
        at_least_one = ("epochs", "cells_per_batch", "tokens_per_batch")
        positive = ("learning_rate", "encoder_learning_rate", "gradient_clip")
        bounds = {name: getattr(self, name) >= 1 for name in at_least_one}
        bounds |= {name: getattr(self, name) > 0 for name in positive}
        bounds |= {name: getattr(self, name) >= 0 for name in ("patience", "weight_decay", "hidden", "seed")}
        bounds |= {name: 0 <= getattr(self, name) < 1 for name in ("warmup_fraction", "dropout")}
        wrong = [name for name, holds in bounds.items() if not holds]
        if wrong:
            raise SettingsError(f"{getattr(self, wrong[0])} is out of range.", where=wrong[0])


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """What one pass over the training cells led to; `number` counts from 1."""

    number: int
    train_loss: float
    validation_loss: float
    validation_accuracy: float
    validation_macro_f1: float

    def metrics(self) -> dict[str, float]:
        """The numbers by the names they are tracked under."""
        return {
            "train_loss": self.train_loss,
            "validation_loss": self.validation_loss,
            "validation_accuracy": self.validation_accuracy,
            "validation_macro_f1": self.validation_macro_f1,
        }


OnEpoch = Callable[[Epoch], None]


def _nothing(epoch: Epoch) -> None:
    """The `on_epoch` of a caller that does not listen."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Fitted:
    """A head at its best epoch, in evaluation mode, and how it got there."""

    head: CellClassHead
    best_epoch: int
    history: tuple[Epoch, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Vectors:
    """Cell vectors with their classes."""

    cells_nd: np.ndarray
    """(n, d) float32."""
    codes_n: np.ndarray
    """(n) int64 positions among the classes."""

    def take(self, positions_n: np.ndarray) -> Vectors:
        """The cells at these positions."""
        return Vectors(cells_nd=self.cells_nd[positions_n], codes_n=self.codes_n[positions_n])


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenCells:
    """Tokenised cells with their classes."""

    cells: Sequence[np.ndarray]
    codes_n: np.ndarray
    """(n) int64 positions among the classes."""


def fit_head(
    spec: HeadSpec, train: Vectors, validation: Vectors, config: FitConfig, *, on_epoch: OnEpoch = _nothing
) -> Fitted:
    """Fit a head on cached cell vectors, on the CPU: seconds for tens of thousands of cells."""
    with own_randomness(config.seed, torch.device("cpu")):
        head = CellClassHead(spec)
        head.standardise(train.cells_nd)
        cells_nd, codes_n = torch.from_numpy(train.cells_nd), torch.from_numpy(train.codes_n)
        n_batches = math.ceil(len(codes_n) / config.cells_per_batch)
        optimiser = torch.optim.AdamW(_decayed(head, config.learning_rate, config.weight_decay))
        steps = _Steps(optimiser, [head], config, n_batches * config.epochs)
        weight_c = _class_weights(train.codes_n, spec, config)

        def train_epoch(epoch: int) -> float:
            order_n = np.random.default_rng([config.seed, epoch]).permutation(len(codes_n))
            losses = []
            for chunk in np.array_split(order_n, n_batches):
                loss = functional.cross_entropy(head(cells_nd[chunk]), codes_n[chunk], weight=weight_c)
                losses.append(steps.take(loss) * len(chunk))
            return sum(losses) / len(codes_n)

        def validate() -> tuple[float, Scores]:
            return _judge(head.probabilities(validation.cells_nd), validation.codes_n, spec)

        return _run_epochs([head], head, train_epoch, validate, config, on_epoch)


def fit_encoder(
    encoder: Encoder,
    spec: HeadSpec,
    train: TokenCells,
    validation: TokenCells,
    config: FitConfig,
    *,
    frozen_layers: int,
    specials: Sequence[int],
    on_epoch: OnEpoch = _nothing,
) -> Fitted:
    """Fit a head together with the encoder above its first `frozen_layers` layers; `encoder` is changed in place.

    With `frozen_layers` of at least 1 the embeddings stay as they are too. Layers above `spec.layer` are not used and
    do not change. The encoder's own dropout works in the trained layers only. Raises SettingsError when nothing of the
    encoder would be trained.
    """
    layers = layers_to_run(spec.layer, encoder.config.layers)
    trained = _thaw(encoder, frozen_layers, layers)
    vectors = _EncoderVectors(encoder, spec, layers, specials, config.tokens_per_batch)
    device = vectors.device
    with own_randomness(config.seed, device):
        head = CellClassHead(spec).to(device)
        every = max(1, len(train.cells) // CELLS_TO_STANDARDISE)
        head.standardise(vectors.detached(train.cells[::every]))
        groups = _decayed(head, config.learning_rate, config.weight_decay)
        for module in trained:
            groups += _decayed(module, config.encoder_learning_rate, config.weight_decay)
        plan = [_shuffled_batches(train, config, epoch) for epoch in range(config.epochs)]
        steps = _Steps(torch.optim.AdamW(groups), [head, *trained], config, sum(len(batches) for batches in plan))
        weight_c = _class_weights(train.codes_n, spec, config).to(device)
        codes_n = torch.from_numpy(train.codes_n).to(device)

        def train_epoch(epoch: int) -> float:
            for module in trained:
                module.train()
            losses = []
            for chunk in plan[epoch]:
                vectors_bd = vectors.of([train.cells[i] for i in chunk])
                loss = functional.cross_entropy(head(vectors_bd), codes_n[chunk], weight=weight_c)
                losses.append(steps.take(loss) * len(chunk))
            return sum(losses) / len(codes_n)

        def validate() -> tuple[float, Scores]:
            return _judge(head.probabilities(vectors.detached(validation.cells)), validation.codes_n, spec)

        fitted = _run_epochs([head, *trained], head, train_epoch, validate, config, on_epoch)
    encoder.eval()
    return fitted


class _EncoderVectors:
    """Cell vectors from an encoder that is being trained."""

    def __init__(
        self, encoder: Encoder, spec: HeadSpec, layers: int, specials: Sequence[int], tokens_per_batch: int
    ) -> None:
        self.encoder, self.spec, self.layers, self.tokens_per_batch = encoder, spec, layers, tokens_per_batch
        self.device = next(encoder.parameters()).device
        self.specials = torch.tensor(sorted(specials), device=self.device)

    def of(self, cells: Sequence[np.ndarray]) -> torch.Tensor:
        """Vectors of one batch (b, d), with gradients."""
        batch = pack(cells).to(self.device)
        return pool(self.encoder(batch, layers=self.layers), batch, self.spec.pooling, self.specials)

    @torch.inference_mode()
    def detached(self, cells: Sequence[np.ndarray]) -> np.ndarray:
        """Vectors of many cells (n, d) float32, without dropout; leaves the encoder in evaluation mode."""
        self.encoder.eval()
        vectors_nd = np.empty((len(cells), self.spec.width), dtype=np.float32)
        lengths_n = np.array([len(cell) for cell in cells])
        for positions_n in plan_batches(lengths_n, self.tokens_per_batch):
            vectors_nd[positions_n] = self.of([cells[i] for i in positions_n]).cpu().numpy()
        return vectors_nd


@contextlib.contextmanager
def own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's generators seeded for the block and put back after it: dropout and initialisation take no generator."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def learning_rate_factor(step: int, n_steps: int, config: FitConfig) -> float:
    """The part of the highest learning rate that optimiser step `step` (from 0) of `n_steps` uses."""
    warmup = round(n_steps * config.warmup_fraction)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return 1.0
    done = (step - warmup) / max(n_steps - warmup, 1)
    return 1.0 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


class _Steps:
    """Optimiser steps with clipping and the learning-rate schedule."""

    def __init__(
        self, optimiser: torch.optim.Optimizer, modules: Sequence[nn.Module], config: FitConfig, n_steps: int
    ) -> None:
        self.optimiser, self.clip = optimiser, config.gradient_clip
        self.parameters = [parameter for module in modules for parameter in module.parameters()]
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda step: learning_rate_factor(step, n_steps, config)
        )

    def take(self, loss: torch.Tensor) -> float:
        """One step down `loss`; gives its value."""
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimiser.step()
        self.schedule.step()
        return float(loss.detach())


def _run_epochs(
    modules: Sequence[nn.Module],
    head: CellClassHead,
    train_epoch: Callable[[int], float],
    validate: Callable[[], tuple[float, Scores]],
    config: FitConfig,
    on_epoch: OnEpoch,
) -> Fitted:
    history: list[Epoch] = []
    best, best_rank = 0, (-1.0, -math.inf)
    kept: list[dict[str, torch.Tensor]] = []
    for number in range(1, config.epochs + 1):
        head.train()
        train_loss = train_epoch(number - 1)
        validation_loss, scores = validate()
        history.append(
            Epoch(
                number=number,
                train_loss=train_loss,
                validation_loss=validation_loss,
                validation_accuracy=scores.accuracy,
                validation_macro_f1=scores.macro_f1,
            )
        )
        if (scores.macro_f1, -validation_loss) > best_rank:
            best, best_rank = number, (scores.macro_f1, -validation_loss)
            kept = [{name: value.detach().clone() for name, value in m.state_dict().items()} for m in modules]
        on_epoch(history[-1])
        if config.patience and number - best >= config.patience:
            break
    for module, state in zip(modules, kept, strict=True):
        module.load_state_dict(state)
    return Fitted(head=head.eval(), best_epoch=best, history=tuple(history))


def _judge(probabilities_nc: np.ndarray, codes_n: np.ndarray, spec: HeadSpec) -> tuple[float, Scores]:
    """Mean cross-entropy and scores of predicted probabilities."""
    true_n = probabilities_nc[np.arange(len(codes_n)), codes_n]
    loss = float(-np.log(np.maximum(true_n, np.finfo(np.float32).tiny)).mean())
    return loss, score(codes_n, probabilities_nc.argmax(axis=1), spec.classes)


def _class_weights(codes_n: np.ndarray, spec: HeadSpec, config: FitConfig) -> torch.Tensor:
    cells_c = np.bincount(codes_n, minlength=len(spec.classes))
    if config.class_weights == "none":
        return torch.ones(len(spec.classes))
    return torch.from_numpy((len(codes_n) / (len(spec.classes) * np.maximum(cells_c, 1))).astype(np.float32))


def _decayed(module: nn.Module, learning_rate: float, weight_decay: float) -> list[dict[str, object]]:
    """Two optimiser groups: matrices decay, biases and norms do not."""
    matrices = [parameter for parameter in module.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in module.parameters() if parameter.dim() <= 1]
    return [
        {"params": matrices, "lr": learning_rate, "weight_decay": weight_decay},
        {"params": others, "lr": learning_rate, "weight_decay": 0.0},
    ]


def _thaw(encoder: Encoder, frozen_layers: int, layers: int) -> list[nn.Module]:
    """The parts of the encoder that are trained; only they get gradients."""
    if not 0 <= frozen_layers < layers:
        raise SettingsError(
            f"with {frozen_layers} frozen layers nothing is left to train: the head reads layer {layers}.",
            where="frozen_layers",
            fix=f"Freeze at most {layers - 1} layers, or keep the whole encoder frozen (encoder = 'frozen').",
        )
    trained = [*([encoder.embeddings] if frozen_layers == 0 else []), *encoder.layers[frozen_layers:layers]]
    encoder.requires_grad_(False).eval()
    for module in trained:
        module.requires_grad_(True)
    return trained


def _shuffled_batches(train: TokenCells, config: FitConfig, epoch: int) -> list[np.ndarray]:
    """The epoch's batches: cells in a random order, cut at `cells_per_batch` cells or `tokens_per_batch` tokens."""
    order_n = np.random.default_rng([config.seed, epoch]).permutation(len(train.cells))
    batches: list[list[int]] = [[]]
    tokens = 0
    for cell in order_n.tolist():
        length = len(train.cells[cell])
        full = len(batches[-1]) == config.cells_per_batch or tokens + length > config.tokens_per_batch
        if batches[-1] and full:
            batches.append([])
            tokens = 0
        batches[-1].append(cell)
        tokens += length
    return [np.array(batch) for batch in batches]
