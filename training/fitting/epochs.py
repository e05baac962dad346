"""The course of a fit: what each epoch led to, which was the best, and how a validation part is judged.

Axis suffixes: `r` rows, `u` units, `c` classes.

Every way of fitting shares this: an epoch is judged by its validation part, heads of several targets by the mean over
them. The score of classes is macro F1, that of a number is R2; equal scores are decided by the lower loss.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from genescale.training.evaluation.scores import score
from genescale.training.fitting.config import FinetuneConfig
from genescale.training.fitting.examples import NO_LABEL, Examples, unit_means
from genescale.training.heads.head import Head, LinearHead
from genescale.training.heads.spec import HeadSpec


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """What one pass over the training rows led to; `number` counts from 1. NaN where nothing was measured."""

    number: int
    train_loss: float
    validation_loss: float
    validation_score: float
    """Mean over the heads of macro F1 (classes) or R2 (numbers): what chooses the best epoch."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """`macro_f1`, `accuracy` or `r2`, `mae` on the validation part; with several heads `LABEL.macro_f1` and so on."""

    @property
    def validation_macro_f1(self) -> float:
        """Mean over the heads of classes; NaN without one."""
        return self._mean("macro_f1")

    @property
    def validation_accuracy(self) -> float:
        """Mean over the heads of classes; NaN without one."""
        return self._mean("accuracy")

    def metrics(self) -> dict[str, float]:
        """The numbers that were measured, by the names they are tracked under."""
        named = {"train_loss": self.train_loss, "validation_loss": self.validation_loss}
        named |= {"validation_score": self.validation_score}
        named |= {f"validation_{name}": value for name, value in self.scores.items()}
        return {name: value for name, value in named.items() if not math.isnan(value)}

    def _mean(self, name: str) -> float:
        values = [value for key, value in self.scores.items() if key == name or key.endswith(f".{name}")]
        return sum(values) / len(values) if values else math.nan


OnEpoch = Callable[[Epoch], None]


def nothing(epoch: Epoch) -> None:
    """The `on_epoch` of a caller that does not listen."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Fitted:
    """Heads at their best epoch, in evaluation mode, and how they got there."""

    heads: tuple[Head, ...]
    best_epoch: int
    history: tuple[Epoch, ...]

    @property
    def head(self) -> Head:
        """The first head: the only one unless there are several targets."""
        return self.heads[0]


class Course:
    """The history of a fit, its best epoch, and whether it should stop."""

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.history: list[Epoch] = []
        self.best_epoch = 0
        self._best_rank = (-math.inf, -math.inf)

    def add(self, epoch: Epoch) -> bool:
        """Take an epoch in; whether it is the best up to now. The first epoch always is."""
        self.history.append(epoch)
        # A score or loss that is no number ranks below every other.
        rank = tuple(
            -math.inf if math.isnan(value) else value for value in (epoch.validation_score, -epoch.validation_loss)
        )
        if self.best_epoch and rank <= self._best_rank:
            return False
        self.best_epoch, self._best_rank = epoch.number, rank  # type: ignore[assignment]
        return True

    @property
    def exhausted(self) -> bool:
        """Whether `patience` epochs have gone by without a better one."""
        return bool(self.patience) and len(self.history) - self.best_epoch >= self.patience


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """How answers agree with targets: mean loss, mean score and the scores by name (as in `Epoch`)."""

    loss: float
    score: float
    scores: Mapping[str, float]

    def epoch(self, number: int, train_loss: float) -> Epoch:
        """The record of an epoch that ended so."""
        return Epoch(
            number=number,
            train_loss=train_loss,
            validation_loss=self.loss,
            validation_score=self.score,
            scores=dict(self.scores),
        )


def judge(heads: Sequence[Head], answers: Sequence[np.ndarray], examples: Examples) -> Judgement:
    """Judge the answers (r, c) of each head on the rows of `examples`, unit by unit: a gene by the mean over its cells.

    Rows without a target do not count; a head without any target among the rows is left out of the means.
    """
    losses: list[float] = []
    means: list[float] = []
    named: dict[str, float] = {}
    for head, answer_rc, target_r in zip(heads, answers, examples.targets, strict=True):
        answer_uc, target_u = per_unit(answer_rc, target_r, examples.unit_r)
        if not len(target_u):
            continue
        prefix = f"{head.spec.label}." if len(heads) > 1 else ""
        loss, main, scores = (
            _numbers(head, answer_uc, target_u)
            if head.spec.kind == "number"
            else _classes(head.spec, answer_uc, target_u)
        )
        losses.append(loss * head.spec.weight)
        means.append(main)
        named |= {f"{prefix}{name}": value for name, value in scores.items()}
    weight = sum(head.spec.weight for head in heads) or 1.0
    if not means:
        return Judgement(loss=math.nan, score=math.nan, scores={})
    return Judgement(loss=sum(losses) / weight, score=sum(means) / len(means), scores=named)


def per_unit(answer_rc: np.ndarray, target_r: np.ndarray, unit_r: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mean answers (u, c), targets (u)) of the units with a target, in the order of their numbers."""
    labelled_r = ~np.isnan(target_r) if target_r.dtype.kind == "f" else target_r != NO_LABEL
    units, first = np.unique(unit_r[labelled_r], return_index=True)
    if len(units) == labelled_r.sum():
        return answer_rc[labelled_r][first], target_r[labelled_r][first]
    mean_uc, _, _ = unit_means(answer_rc[labelled_r], unit_r[labelled_r], units)
    return mean_uc, target_r[labelled_r][first]


def _classes(spec: HeadSpec, answer_uc: np.ndarray, target_u: np.ndarray) -> tuple[float, float, dict[str, float]]:
    """(mean cross-entropy, macro F1, scores)."""
    true_u = answer_uc[np.arange(len(target_u)), target_u]
    loss = float(-np.log(np.maximum(true_u, np.finfo(np.float32).tiny)).mean())
    found = score(target_u, answer_uc.argmax(axis=1), spec.classes)
    return loss, found.macro_f1, {"macro_f1": found.macro_f1, "accuracy": found.accuracy}


def _numbers(head: Head, answer_uc: np.ndarray, target_u: np.ndarray) -> tuple[float, float, dict[str, float]]:
    """(mean squared error in standard units, R2, scores); R2 of equal targets is taken as 0 or below."""
    error_u = answer_uc[:, 0].astype(np.float64) - target_u
    scale = float(head.target_scale_1) if isinstance(head, LinearHead) else float(target_u.std()) or 1.0
    spread = float(((target_u - target_u.mean()) ** 2).sum())
    r2 = 1 - float((error_u**2).sum()) / spread if spread else -float((error_u**2).sum())
    return float((error_u**2).mean()) / scale**2, r2, {"r2": r2, "mae": float(np.abs(error_u).mean())}


def learning_rate_factor(step: int, n_steps: int, config: FinetuneConfig) -> float:
    """The part of the highest learning rate that optimiser step `step` (from 0) of `n_steps` uses."""
    warmup = round(n_steps * config.warmup_fraction)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return 1.0
    done = (step - warmup) / max(n_steps - warmup, 1)
    return 1.0 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


@contextlib.contextmanager
def own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's generators seeded for the block and put back after it: dropout and initialisation take no generator."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
