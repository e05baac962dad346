"""An average of the weights over the steps of a training, which is judged and kept in place of the last weights.

The average is that of Shamir & Zhang 2013 (arXiv 1212.1824, polynomial-decay averaging): after step t it moves toward
the weights of that step by k / (t + k - 1), so that recent steps count most and the first ones are soon forgotten. How
far it reaches back grows with the run: the mean age of what is averaged is the share 1 / (k + 1) of the steps done,
whether they are a hundred or a million. This share is the `reach`. A reach of 1/2 is the plain mean over all steps
(Polyak & Juditsky 1992). Izmailov et al. 2018 (arXiv 1803.05407) saw averages of weights generalise better than the
weights they are made of.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from genescale.platform.errors import SettingsError
from genescale.training.shards import AVERAGE, SavedState, Snapshot, even_range

MOST_REACH = 0.5


def check_average(reach: float, zero_stage: int) -> None:
    """SettingsError unless `reach` is 0 (no average) or up to one half, and each worker holds whole weights."""
    if not 0 <= reach <= MOST_REACH:
        raise SettingsError(
            f"{reach} is no mean age of averaged weights.",
            where="weight_average",
            fix=f"Use 0 (no average) up to {MOST_REACH} (the plain mean over all steps), for example 0.1.",
        )
    if reach and zero_stage == 3:
        raise SettingsError(
            "at ZeRO stage 3 no worker holds whole weights to average.",
            where="weight_average",
            fix="Use zero_stage 0, 1 or 2 with it, or weight_average = 0.",
        )


class WeightAverage:
    """The average beside trained parameters that this worker holds whole; with a reach of 0 it does nothing."""

    def __init__(self, parameters: Sequence[tuple[str, nn.Parameter]], reach: float) -> None:
        """Begins at the weights as they are."""
        self._parameters = list(parameters) if reach else []
        self._order = 1 / reach - 1 if reach else 1.0
        self._averages = [parameter.detach().clone() for _, parameter in self._parameters]

    @torch.no_grad()
    def add(self, step: int) -> None:
        """Take in the weights after optimiser step `step` (the first is 1)."""
        share = self._order / (step + self._order - 1)
        for (_, parameter), average in zip(self._parameters, self._averages, strict=True):
            average.lerp_(parameter, share)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """For the block, the model computes with the average. Nothing is copied; no step may be taken in the block."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def added_to(self, snapshot: Snapshot, *, rank: int, workers: int) -> Snapshot:
        """The snapshot with this worker's share of the average; every worker holds all of it."""
        for (name, _), average in zip(self._parameters, self._averages, strict=True):
            start, stop = even_range(average.numel(), rank, workers)
            snapshot.add(AVERAGE, name, start, average.reshape(-1)[start:stop])
        return snapshot

    def restore(self, saved: SavedState) -> None:
        """Take the average, whoever wrote it; IntegrityError where the state has none."""
        for (name, _), average in zip(self._parameters, self._averages, strict=True):
            average.copy_(saved.tensor(AVERAGE, name))

    def _exchange(self) -> None:
        for number, (_, parameter) in enumerate(self._parameters):
            parameter.data, self._averages[number] = self._averages[number], parameter.data
