"""The first pass of a screen in two: an estimate of every single deletion's effect on a cell, without deleting.

Legend: `t` tokens of a cell, `g` its genes (highest rank first), `d` width, `c` scalars of a read-out, `p` probes.

`attribution.py` says how a backward pass answers for all deletions at once. What is asked here:

    remaining_genes    directions v for all genes at once, `probes` of them; half the mean of the squared movements
    cls, mean_pooled   directions of the one vector of the cell, `DIRECTIONS` x `probes` of them, or all d
    states             the cosine to each state: signed
    classes            the probability of each class: signed

A cell that is the mean of its genes also changes because the mean no longer holds the deleted gene: that part is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from genescale.perturbation.answers import Readouts
from genescale.perturbation.editing.cell import gene_span
from genescale.perturbation.readouts.class_change import model_of_classes
from genescale.perturbation.screening.attribution import Attribution
from genescale.perturbation.screening.two_pass import TwoPassConfig
from genescale.platform.errors import SettingsError
from genescale.training.embedder import Embedder, Layer, layers_to_run
from genescale.training.heads.head import Head, LinearHead

SHIFT, TOWARD, CLASS = "shift", "toward:", "class:"
# One vector of a cell has no hundreds of genes to average over, so how far it moves takes more directions to estimate.
DIRECTIONS = 4
Estimates = Mapping[str, npt.NDArray[np.float64]]


def first_pass_scores(
    embedder: Embedder, tokens_t: np.ndarray, readouts: Readouts, config: TwoPassConfig
) -> npt.NDArray[np.float64]:
    """How much the deletion of each gene of a cell matters, `(g,)`: higher is more. `FirstPass` for many cells."""
    return FirstPass(embedder, readouts, config).scores(tokens_t)


class FirstPass:
    """Estimates the read-outs of all single deletions of a cell; made once, it serves any number of cells."""

    def __init__(self, embedder: Embedder, readouts: Readouts, config: TwoPassConfig) -> None:
        """Raises SettingsError when `config.rank_by` names a read-out that is not asked for or cannot be estimated."""
        readouts.check(embedder)
        self._embedder, self._readouts, self._config = embedder, readouts, config
        self._wanted = _wanted(readouts, config)
        self._attribution = self._of_head = None
        if config.first_pass == "cotangents":
            self._attribution = self._of_head = Attribution(embedder.encoder)
            # A head reads the encoder that it was fitted with, which may be another one.
            if "classes" in self._wanted and readouts.head and readouts.head.embedder is not embedder:
                self._of_head = Attribution(readouts.head.embedder.encoder)

    def scores(self, tokens_t: np.ndarray) -> npt.NDArray[np.float64]:
        """One score `(g,)` for each gene of the cell: the estimated shift, or how high it ranks on any read-out."""
        return combined(self.estimates(tokens_t))

    def estimates(self, tokens_t: np.ndarray) -> Estimates:
        """Estimates `(g,)` under the names of the screen's columns: `shift`, `toward:STATE`, `class:CLASS`.

        With the first pass `rank`, the only one is `rank`: higher for genes of higher rank.
        """
        span = gene_span(tokens_t, self._embedder.vocabulary)
        n_genes = span.stop - span.start
        if self._attribution is None:
            return {"rank": -np.arange(n_genes, dtype=np.float64)}
        if n_genes < 2:
            return {SHIFT: np.zeros(n_genes)}
        cell = _Cell(self._attribution, self._embedder, tokens_t, span, self._config)
        found: dict[str, torch.Tensor] = {}
        if "shift" in self._wanted:
            found[SHIFT] = self._shifts(cell)
        if "states" in self._wanted:
            found |= self._toward_states(cell)
        if "classes" in self._wanted:
            found |= self._class_changes(tokens_t, span)
        return {name: values_g.double().cpu().numpy() for name, values_g in found.items()}

    def _shifts(self, cell: _Cell) -> torch.Tensor:
        readouts = self._readouts
        if readouts.measure == "remaining_genes":
            return cell.gene_shifts(readouts.layer)
        pooled_d = cell.pooled(readouts.layer, readouts.pooling)
        return cell.squares(functional.normalize(pooled_d, dim=0), pooled_d, readouts.layer, readouts.pooling) / 2

    def _toward_states(self, cell: _Cell) -> dict[str, torch.Tensor]:
        states, readouts = self._readouts.states, self._readouts
        assert states is not None
        pooled_d = cell.pooled(readouts.layer, readouts.pooling)
        found = {}
        for name, vector_d in zip(states.names, states.vectors_sd, strict=True):
            state_d = functional.normalize(torch.as_tensor(vector_d, device=pooled_d.device).float(), dim=0)
            cosine = functional.normalize(pooled_d, dim=0) @ state_d
            found[TOWARD + name] = cell.changes(cosine, pooled_d, readouts.pooling)
        return found

    def _class_changes(self, tokens_t: np.ndarray, span: slice) -> dict[str, torch.Tensor]:
        model = self._readouts.head
        assert model is not None
        assert self._of_head is not None
        head = _head_of(self._readouts)
        assert isinstance(head, LinearHead)
        cell = _Cell(self._of_head, model.embedder, tokens_t, span, self._config)
        pooled_d = cell.pooled(head.spec.layer, head.spec.pooling)
        with torch.enable_grad():
            probability_c = torch.softmax(head(pooled_d[None]), dim=1)[0]
        names = self._readouts.class_names
        changes = [cell.changes(probability, pooled_d, head.spec.pooling) for probability in probability_c]
        return {CLASS + name: change_g for name, change_g in zip(names, changes, strict=True)}


def combined(estimates: Estimates) -> npt.NDArray[np.float64]:
    """One score `(g,)` of several read-outs: the estimate itself where there is one, else how near a gene gets to the
    top of any of them (1 = the strongest of the cell), so that no read-out's scale outweighs another's."""
    sizes = [np.abs(values_g) if name not in ("rank", SHIFT) else values_g for name, values_g in estimates.items()]
    if len(sizes) == 1:
        return sizes[0]
    places = [np.argsort(np.argsort(size_g, kind="stable"), kind="stable") + 1.0 for size_g in sizes]
    return np.max(places, axis=0) / max(1, len(sizes[0]))


def _wanted(readouts: Readouts, config: TwoPassConfig) -> set[str]:
    there = {"shift": True, "states": readouts.states is not None, "classes": readouts.head is not None}
    named = [name for name in there if name == config.rank_by]
    wanted: set[str] = set(named) if named else {name for name, given in there.items() if given}
    if config.first_pass == "cotangents" and not all(there[name] for name in wanted):
        raise SettingsError(
            f"genes are to be ranked by {config.rank_by}, which the screen does not read.",
            where="two_pass: rank_by",
            fix="Add it to the read-outs, or rank by 'shift'.",
        )
    if config.first_pass == "cotangents" and "classes" in wanted and not isinstance(_head_of(readouts), LinearHead):
        raise SettingsError(
            "the head votes by nearest examples, which a backward pass cannot follow.",
            where="two_pass: rank_by",
            fix="Rank by 'shift', or use a head that is a network.",
        )
    return wanted


def _head_of(readouts: Readouts) -> Head | None:
    return None if readouts.head is None else model_of_classes(readouts.head).heads[0]


@dataclass(eq=False)
class _Cell:
    """One cell under attribution; the graph is that of the layer asked for last."""

    attribution: Attribution
    embedder: Embedder
    tokens: np.ndarray
    span: slice
    config: TwoPassConfig

    def __post_init__(self) -> None:
        self.tokens_t = torch.as_tensor(self.tokens.astype(np.int64), device=self.embedder.device)
        self.n_genes = self.span.stop - self.span.start
        self.layer: Layer | None = None
        self.states_td = torch.zeros(0)

    def hidden(self, layer: Layer) -> torch.Tensor:
        """States (t, d) of a layer, with their graph."""
        if layer != self.layer:
            self.states_td = self.attribution.states(self.tokens_t, layers=self._layers(layer))
            self.layer = layer
        return self.states_td

    def pooled(self, layer: Layer, pooling: str) -> torch.Tensor:
        """The one vector (d) of the cell, a leaf of its own: `changes` goes on from there."""
        states_td = self.hidden(layer).detach()
        pooled_d = states_td[self.span].mean(0) if pooling == "mean_genes" else states_td[0]
        return pooled_d.requires_grad_()

    def changes(self, scalar: torch.Tensor, pooled_d: torch.Tensor, pooling: str) -> torch.Tensor:
        """First-order change (g) of a scalar of the pooled vector."""
        (slope_d,) = torch.autograd.grad(scalar, pooled_d, retain_graph=True)
        states_td = self.states_td[self.span]
        if pooling != "mean_genes":
            return self._moves(self.states_td[0] @ slope_d).sum(0)[self.span]
        # The mean of one gene less, of the others as they are; then what moves among them.
        without_g = (pooled_d.detach() - states_td.detach()) @ slope_d / (self.n_genes - 1)
        return without_g + self._moves(states_td.mean(0) @ slope_d).sum(0)[self.span]

    def squares(self, unit_d: torch.Tensor, pooled_d: torch.Tensor, layer: Layer, pooling: str) -> torch.Tensor:
        """Estimated squared movement (g) of the unit vector of the cell."""
        n = min(len(unit_d), DIRECTIONS * self.config.probes)
        drawn_dp, _ = torch.linalg.qr(self._normal(len(unit_d), n))
        moved = [self.changes(unit_d @ direction_d, pooled_d, pooling) ** 2 for direction_d in drawn_dp.T]
        return torch.stack(moved).sum(0) * (len(unit_d) / n)

    def gene_shifts(self, layer: Layer) -> torch.Tensor:
        """Estimated mean (g) over the remaining genes of 1 - cosine."""
        units_td = functional.normalize(self.hidden(layer), dim=1)[self.span]
        squares_tt = torch.zeros(len(self.tokens_t), len(self.tokens_t), device=units_td.device)
        for _ in range(self.config.probes):
            direction_td = self._normal(*units_td.shape)
            squares_tt += self._moves((direction_td * units_td).sum()) ** 2
        squares_tt /= self.config.probes
        self._put_near(squares_tt, layer)
        return squares_tt[:, self.span].sum(0) / (2 * (self.n_genes - 1))

    def _put_near(self, squares_tt: torch.Tensor, layer: Layer) -> None:
        """Genes beside the gap: what they move by with the gap instead of the first-order estimate."""
        layers, reach = self._layers(layer), self.attribution.reach
        if not layers or not reach:
            return
        deltas = [delta for delta in range(-reach, reach + 1) if delta]
        units_ctd = functional.normalize(self.attribution.near(self.tokens_t, deltas, layers=layers), dim=2)
        place_t = torch.arange(self.span.start, self.span.stop, device=squares_tt.device)
        for unit_td, delta in zip(units_ctd[:-1], deltas, strict=True):
            rows = place_t[(place_t + delta >= self.span.start) & (place_t + delta < self.span.stop)]
            squares_tt[rows, rows + delta] = ((unit_td[rows] - units_ctd[-1, rows]) ** 2).sum(1)

    def _moves(self, scalar: torch.Tensor) -> torch.Tensor:
        return self.attribution.moves(scalar)

    def _layers(self, layer: Layer) -> int:
        return layers_to_run(layer, self.embedder.encoder.config.layers)

    def _normal(self, *shape: int) -> torch.Tensor:
        """Standard normal numbers: those of the seed, the same for every cell of this size."""
        if self._generator is None:
            self._generator = torch.Generator().manual_seed(self.config.seed)
        return torch.randn(shape, generator=self._generator).to(self.embedder.device)

    _generator: torch.Generator | None = None
