"""What the deletion of a gene does to every other gene of a cell, for the read-outs that `truth.py` compares.

    cosine, second to last   1 - cosine of the gene's embedding before and after, at the layer that is read by default
    cosine, last             the same at the last layer
    masked gene              how much less probable the gene becomes where it is hidden (perturbation/readouts)
    attention                how much of the gene's attention comes to lie elsewhere, mean over layers and heads

All are larger where more happens. Controls of a regulator are the genes at the nearest ranks of the same cell.

Axes: `t` genes of one cell, `v` deletions of a cell, `c` controls, `h` heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from genescale.perturbation.editing.edits import delete
from genescale.perturbation.readouts.masked_gene import masked_gene_changes
from genescale.perturbation.readouts.shift import gene_cosines
from genescale.platform.vocabulary import Vocabulary
from genescale.training.model import MaskedGeneModel, pack

COSINE, LAST, MASKED, ATTENTION = "cosine, second to last", "cosine, last", "masked gene", "attention"
READOUTS = (COSINE, LAST, MASKED, ATTENTION)
CONTROLS = 4


@dataclass(frozen=True, kw_only=True, eq=False)
class CellEffects:
    """Deletions of one cell."""

    tokens_t: np.ndarray
    effects: dict[str, dict[tuple[int, ...], np.ndarray]]
    """By read-out and by positions of the deleted genes: what happens to each gene (t,), NaN where it was deleted."""
    controls: dict[int, np.ndarray]
    """Of each gene that is screened: positions of its controls (c,)."""


def nearest_ranks(position: int, length: int, count: int = CONTROLS, barred: Sequence[int] = ()) -> np.ndarray:
    """The positions closest to one, the lower of two at the same distance first, and none of those barred."""
    others = np.setdiff1d(np.arange(length), [position, *barred])
    return others[np.argsort(np.abs(others - position), kind="stable")[:count]]


def cell_effects(
    model: MaskedGeneModel,
    vocabulary: Vocabulary,
    tokens_t: np.ndarray,
    screened: Sequence[int],
    *,
    pairs: Sequence[tuple[int, int]] = (),
    masked: bool = True,
    attention: bool = True,
) -> CellEffects:
    """Delete the genes at the positions `screened`, their controls, and pairs of positions."""
    controls = {at: nearest_ranks(at, len(tokens_t)) for at in screened}
    near = {int(control) for chosen in controls.values() for control in chosen}
    singles = {*screened, *near, *(at for pair in pairs for at in pair)}
    deletions: list[tuple[int, ...]] = [*((at,) for at in sorted(singles)), *pairs]
    effects: dict[str, dict[tuple[int, ...], np.ndarray]] = {name: {} for name in READOUTS}
    for size in sorted({len(one) for one in deletions}):
        same = [one for one in deletions if len(one) == size]
        for deleted, values in zip(same, _movements(model, tokens_t, same, attention), strict=True):
            for name, moved in values.items():
                effects[name][deleted] = moved
    if masked:
        edits = [delete(tokens_t, [int(tokens_t[at]) for at in one], vocabulary) for one in deletions]
        for one, edit, change in zip(deletions, edits, masked_gene_changes(model, edits, vocabulary), strict=True):
            effects[MASKED][one] = _spread(len(tokens_t), edit.kept_baseline, -change.change_k)
    return CellEffects(tokens_t=tokens_t, effects=effects, controls=controls)


def _spread(length: int, kept: np.ndarray, values_k: np.ndarray) -> np.ndarray:
    spread = np.full(length, np.nan)
    spread[kept] = values_k
    return spread


@torch.inference_mode()
def _movements(
    model: MaskedGeneModel, tokens_t: np.ndarray, deletions: Sequence[tuple[int, ...]], attention: bool
) -> Iterator[dict[str, np.ndarray]]:
    """What deletions of as many genes each do to embeddings and attention."""
    encoder, length = model.encoder, len(tokens_t)
    cells = [np.delete(tokens_t, one) for one in deletions]
    whole, batch = pack([tokens_t]), pack(cells)
    before = [state.numpy() for state in encoder.hidden_states(whole)[-2:]]
    after = [state.unflatten(0, (len(cells), -1)).numpy() for state in encoder.hidden_states(batch)[-2:]]
    layers = range(encoder.config.layers)
    looks = [encoder.attention_weights(whole, layer=layer)[0] for layer in layers] if attention else []
    looked = [encoder.attention_weights(batch, layer=layer) for layer in layers] if attention else []
    for at, one in enumerate(deletions):
        kept = np.delete(np.arange(length), one)
        second, last = (1.0 - gene_cosines(a[at], b[kept]) for a, b in zip(after, before, strict=True))
        found = {COSINE: _spread(length, kept, second), LAST: _spread(length, kept, last)}
        if attention:
            moved = [_attention_moved(old, new[at], kept) for old, new in zip(looks, looked, strict=True)]
            found[ATTENTION] = _spread(length, kept, np.mean(moved, axis=0))
        yield found


def _attention_moved(before_htt: torch.Tensor, after_htt: torch.Tensor, kept: np.ndarray) -> np.ndarray:
    """Total variation between what each remaining gene attends to before and after, mean over heads."""
    old = before_htt[:, kept]
    lost = 1.0 - old[:, :, kept].sum(-1)
    return ((after_htt - old[:, :, kept]).abs().sum(-1) + lost).mean(0).numpy() / 2
