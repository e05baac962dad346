"""Edited cells against unedited ones, on the device that computed their hidden states.

Legend: `n` variants or cells of a batch, `t` tokens, `k` genes that stand in both cells, `r` such genes of all variants
of a batch, `d` width of an embedding, `s` states, `c` classes.

The unedited cell is read once and kept as unit vectors u. The shift of a gene is then half the squared distance of unit
vectors, 1 - cos(e, o) = |e/|e| - o/|o||^2 / 2: unlike one minus a dot product it loses nothing to cancellation, so
float32 is enough for the shifts of 1e-6 that a single edit makes. Only means, and what was asked for by gene, leave the
device, and they do so a chunk later: the device works on the next chunk meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from genescale.perturbation.answers import EditAnswer, Readouts
from genescale.perturbation.readouts import shift
from genescale.perturbation.variants import BaselineKey, Variant
from genescale.platform.errors import GenescaleError, InputError
from genescale.platform.vocabulary import Vocabulary
from genescale.training.embedder import HiddenBatch, Layer, pool

if TYPE_CHECKING:
    from genescale.perturbation.perturb import CellEmbedder
    from genescale.training.deletions import Deletions

NOTHING_LEFT = "the edit leaves no gene in the cell"
NOTHING_TO_COMPARE = "no gene beside the edited ones stands in the cell"


Placed = list[tuple[np.ndarray, torch.Tensor]]
"""Rows on the device, and the positions in the chunk that they belong to."""


@dataclass(frozen=True, eq=False)
class Reference:
    """What the unedited cell has to be compared with."""

    unit_td: torch.Tensor | None
    """float32 unit vectors on the device."""
    pooled_1d: torch.Tensor | None
    """float64 on the device."""
    probabilities_c: npt.NDArray[np.float32] | None

    @cached_property
    def pooled_d(self) -> npt.NDArray[np.float64]:
        """The one vector of the cell, on the host."""
        assert self.pooled_1d is not None
        return self.pooled_1d[0].cpu().numpy()


@dataclass(eq=False)
class Launched:
    """A chunk whose comparison is under way on the device."""

    chunk: list[Variant]
    references: list[Reference]
    """One for each variant."""
    shifts_n: Placed = field(default_factory=list)
    """float64: mean shift of the genes that stand in both cells."""
    shifts_r: Placed = field(default_factory=list)
    """float32: shift of each such gene, the variants' genes one after the other."""
    pooled_nd: Placed = field(default_factory=list)
    probed_nd: Placed = field(default_factory=list)
    """Vectors that the head reads."""


class Comparison:
    """How the variants of one call are compared with the cells that they came from."""

    def __init__(self, embedder: CellEmbedder, readouts: Readouts) -> None:
        readouts.check(embedder)
        self.embedder, self.readouts, self.head = embedder, readouts, readouts.head
        wanted = readouts.gene_shifts_of
        self._by_gene = wanted is not None
        self._means = readouts.measure == "remaining_genes"
        self._pools = readouts.states is not None or not self._means
        self._interesting_v = None if wanted is None or wanted == "all" else _table(wanted, embedder.vocabulary)
        self._specials = sorted(embedder.vocabulary.special.values())
        # A head of the same model reads the hidden states that are there already.
        self._shared = self.head is not None and self.head.embedder.bundle == embedder.bundle
        layers: list[Layer] = [readouts.layer]
        if self.head is not None and self._shared and self.head.specs[0].layer not in layers:
            layers.append(self.head.specs[0].layer)
        self._layers = tuple(layers)
        self._references: dict[BaselineKey, Reference] = {}
        self._shares = readouts.share_first_layer and embedder.shares_first_layer(self._layers)
        self._deletions: tuple[int, Deletions] | None = None

    # --- without the encoder -----------------------------------------------------------------------------------------

    def answer_without_embedding(self, variant: Variant) -> EditAnswer | None:
        """The answer to an edit that changed nothing or left nothing to compare; None for all others."""
        edit, n_states = variant.edit, len(self.readouts.state_names)
        first, end = self._span(edit.tokens)
        if first == end:
            return self._answer(variant, None, (None,) * n_states, None, reason=NOTHING_LEFT)
        if not edit.changed:
            unmoved = None if self.head is None else (0.0,) * len(self.readouts.class_names)
            return self._answer(variant, 1.0, (0.0,) * n_states, unmoved, np.ones(len(edit.kept)))
        if len(edit.kept) == 0 and self._means:
            return self._answer(variant, None, (None,) * n_states, None, reason=NOTHING_TO_COMPARE)
        return None

    # --- on the device -----------------------------------------------------------------------------------------------

    def launch(self, chunk: list[Variant]) -> Launched:
        """Start to compare a chunk; `finish` gives its answers. Chunks come in the order of their cells."""
        self._refer(chunk)
        launched = Launched(chunk, [self._references[variant.baseline_key] for variant in chunk])
        cells = [variant.edit.tokens for variant in chunk]
        for found in self._hidden(chunk):
            at_n = found[0].cells
            if self._means or self._by_gene:
                self._compare_genes(launched, found[0])
            if self._pools:
                launched.pooled_nd.append((at_n, self._pooled(found[0], [cells[at] for at in at_n])))
            if self._shared:
                launched.probed_nd.append((at_n, self._probed(found[-1])))
        launched.probed_nd.extend(self._probed_apart(cells))
        return launched

    def _hidden(self, chunk: list[Variant]) -> Iterator[tuple[HiddenBatch, ...]]:
        """Hidden states of the variants, one entry for each layer that is read."""
        removed = {at: position for at, variant in enumerate(chunk) if (position := self._removed(variant)) is not None}
        others = np.array([at for at in range(len(chunk)) if at not in removed], dtype=np.int64)
        for found in self.embedder.hidden_of_layers([chunk[at].edit.tokens for at in others], self._layers):
            yield tuple(replace(of_layer, cells=others[of_layer.cells]) for of_layer in found)
        for at, position in removed.items():
            batch, states = self._without_one(chunk[at]).without(position)
            yield tuple(HiddenBatch(cells=np.array([at]), batch=batch, hidden_td=hidden_td) for hidden_td in states)

    def _removed(self, variant: Variant) -> int | None:
        """Position of the only token that the variant lacks; None where it does not share the first layer."""
        edit = variant.edit
        found = [rank for rank in edit.ranks if rank is not None]
        if not self._shares or edit.kind != "delete" or edit.n_refilled or len(found) != 1:
            return None
        return self._span(edit.baseline)[0] + found[0]

    def _without_one(self, variant: Variant) -> Deletions:
        """The variant's cell with its first layer computed; kept until another cell comes."""
        cell = variant.place[0]
        if self._deletions is None or self._deletions[0] != cell:
            self._deletions = (cell, self.embedder.deletions(variant.edit.baseline, self._layers))
        return self._deletions[1]

    def _refer(self, chunk: Sequence[Variant]) -> None:
        """Read the unedited cells of a chunk that were not read before, and forget those of earlier cells."""
        first = chunk[0].place[0]
        self._references = {key: kept for key, kept in self._references.items() if key[0] >= first}
        missing = {v.baseline_key: v.edit.baseline for v in chunk if v.baseline_key not in self._references}
        keys, cells = list(missing), list(missing.values())
        probabilities = _placed_rows(self._probabilities(self._probed_apart(cells), cells), len(cells))
        for found in self.embedder.hidden_of_layers(cells, self._layers) if cells else ():
            answers = self._probabilities([(found[0].cells, self._probed(found[-1]))], cells) if self._shared else []
            for at, rows_c in (pair for at_n, rows_nc in answers for pair in zip(at_n, rows_nc, strict=True)):
                probabilities[at] = rows_c
            for (at, hidden_td), one in zip(found[0].per_cell(), _apart(found[0]), strict=True):
                self._references[keys[at]] = Reference(
                    _unit(hidden_td) if self._means or self._by_gene else None,
                    self._pooled(one, [cells[at]]) if self._pools else None,
                    probabilities[at],
                )

    def _compare_genes(self, launched: Launched, found: HiddenBatch) -> None:
        """Shifts of the genes that stand in both cells, for the variants of one batch."""
        members = [launched.chunk[at] for at in found.cells]
        units = [launched.references[at].unit_td for at in found.cells]
        starts_n = np.cumsum((0, *found.batch.lengths[:-1]))
        edited_rd = _rows(found.hidden_td, [v.edit.kept for v in members], starts_n)
        same_cell = all(unit is units[0] for unit in units)
        stacked_td = units[0] if same_cell else torch.cat(units)
        lengths_n = [0 if same_cell else len(v.edit.baseline) for v in members]
        original_rd = _rows(stacked_td, [v.edit.kept_baseline for v in members], np.cumsum((0, *lengths_n[:-1])))
        shifts_r = torch.linalg.vector_norm(_unit(edited_rd).sub_(original_rd), dim=1).square_().div_(2)
        counts = [len(v.edit.kept) for v in members]
        if self._means:
            launched.shifts_n.append((found.cells, _means(shifts_r, counts)))
        if self._by_gene:
            launched.shifts_r.append((found.cells, shifts_r))

    def _pooled(self, found: HiddenBatch, cells: Sequence[np.ndarray]) -> torch.Tensor:
        """(n, d) float64: `<cls>`, or the mean over the genes, edited ones included, as published state vectors are."""
        if self.readouts.measure == "cls":
            return found.hidden_td[found.batch.offsets[:-1].long()].double()
        spans = [self._span(cell) for cell in cells]
        if len({(len(cell), span) for cell, span in zip(cells, spans, strict=True)}) == 1:
            hidden_ntd = found.hidden_td.unflatten(0, (len(cells), -1))
            return hidden_ntd[:, slice(*spans[0])].mean(dim=1, dtype=torch.float64)
        parts = zip(found.per_cell(), spans, strict=True)
        return torch.stack([hidden_td[slice(*span)].mean(dim=0, dtype=torch.float64) for (_, hidden_td), span in parts])

    def _probed(self, found: HiddenBatch) -> torch.Tensor:
        """(n, d) float32: what the head reads of each cell."""
        assert self.head is not None
        specials = torch.tensor(self._specials, device=found.hidden_td.device)
        return pool(found.hidden_td, found.batch, self.head.specs[0].pooling, specials)

    def _probed_apart(self, cells: Sequence[np.ndarray]) -> Placed:
        """What a head on another encoder reads; empty without such a head."""
        if self.head is None or self._shared or not cells:
            return []
        found = self.head.embedder.hidden(cells, layer=self.head.specs[0].layer)
        return [(one.cells, self._probed(one)) for one in found]

    def _probabilities(self, probed: Placed, cells: Sequence[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        """What the head says of each of these vectors; `cells` are those that the places in `probed` count."""
        if self.head is None:
            return []
        answer = self.head.heads[0].answer
        # Batch by batch: a matrix product of several rows has other last bits than that of one.
        return [(at_n, answer(rows_nd.cpu().numpy(), [cells[at] for at in at_n])) for at_n, rows_nd in probed]

    # --- on the host -------------------------------------------------------------------------------------------------

    def finish(self, launched: Launched) -> Iterator[tuple[Variant, EditAnswer]]:
        """The answers of a chunk, in its order; GenescaleError where the model gave no finite numbers."""
        cosines_n = self._cosines(launched)
        states_ns = self._state_shifts(launched)
        changes_nc = self._class_changes(launched)
        if not all(np.isfinite(x).all() for x in (cosines_n, states_ns, changes_nc)):
            raise GenescaleError("the model gave embeddings that are not finite numbers.", fix="Check its weights.")
        by_gene = self._gene_cosines(launched)
        numbers = zip(cosines_n.tolist(), states_ns.tolist(), changes_nc.tolist(), strict=True)
        for at, (variant, (cosine, states, changes)) in enumerate(zip(launched.chunk, numbers, strict=True)):
            classes = None if self.head is None else tuple(changes)
            yield variant, self._answer(variant, cosine, tuple(states), classes, by_gene.get(at))

    def _cosines(self, launched: Launched) -> np.ndarray:
        """(n) float64 of the measure."""
        n = len(launched.chunk)
        if self._means:
            return 1.0 - _filled(launched.shifts_n, (n,))
        return shift.cosine(_filled(launched.pooled_nd, (n, self.embedder.width)), _pooled_of(launched.references))

    def _state_shifts(self, launched: Launched) -> np.ndarray:
        """(n, s) float64."""
        n = len(launched.chunk)
        if self.readouts.states is None:
            return np.zeros((n, 0))
        pooled_nd = _filled(launched.pooled_nd, (n, self.embedder.width))
        return self.readouts.states.toward(pooled_nd, _pooled_of(launched.references))

    def _class_changes(self, launched: Launched) -> np.ndarray:
        """(n, c) float64."""
        if self.head is None:
            return np.zeros((len(launched.chunk), 0))
        cells = [variant.edit.tokens for variant in launched.chunk]
        rows = _placed_rows(self._probabilities(launched.probed_nd, cells), len(cells))
        before = [reference.probabilities_c for reference in launched.references]
        return np.stack(rows).astype(np.float64) - np.stack(before)  # type: ignore[arg-type]

    def _gene_cosines(self, launched: Launched) -> dict[int, np.ndarray]:
        """(k) float64 for each position in the chunk; empty unless genes were asked for."""
        found: dict[int, np.ndarray] = {}
        for at_n, shifts_r in launched.shifts_r:
            bounds = np.cumsum([len(launched.chunk[at].edit.kept) for at in at_n])[:-1]
            found.update(zip(at_n.tolist(), np.split(1.0 - shifts_r.double().cpu().numpy(), bounds), strict=True))
        return found

    def _answer(
        self,
        variant: Variant,
        cosine: float | None,
        state_shifts: tuple[float | None, ...],
        class_changes: tuple[float, ...] | None,
        cosines_k: np.ndarray | None = None,
        *,
        reason: str = "",
    ) -> EditAnswer:
        edit = variant.edit
        genes, values = np.zeros(0, dtype=np.int64), np.zeros(0)
        if self._by_gene and cosines_k is not None:
            genes, values = edit.tokens[edit.kept].astype(np.int64), cosines_k
            if self._interesting_v is not None:
                wanted_k = self._interesting_v[genes]
                genes, values = genes[wanted_k], values[wanted_k]
        return EditAnswer(
            request=variant.request,
            ranks=edit.ranks,
            cosine=cosine,
            state_shifts=state_shifts,
            class_changes=class_changes,
            goal_at=self.readouts.goal_at,
            reason=reason,
            gene_tokens=genes,
            gene_cosine_values=values,
            n_compared=len(edit.kept),
            n_cut=edit.n_cut,
            n_refilled=edit.n_refilled,
        )

    def _span(self, tokens_t: np.ndarray) -> tuple[int, int]:
        """Where the genes of a cell begin and end; its tokens were checked when it was edited."""
        vocabulary, n = self.embedder.vocabulary, len(tokens_t)
        first = int(n > 0 and vocabulary.cls is not None and tokens_t[0] == vocabulary.cls)
        return first, n - int(n > first and vocabulary.eos is not None and tokens_t[-1] == vocabulary.eos)


def check_framed(cells: Sequence[np.ndarray], readouts: Readouts, vocabulary: Vocabulary) -> None:
    """InputError for the first cell that does not begin with `<cls>` where that is read."""
    poolings = [readouts.pooling, *(spec.pooling for spec in (readouts.head.specs if readouts.head else ()))]
    if "cls" not in poolings:
        return
    for position, cell in enumerate(cells):
        if len(cell) and cell[0] != vocabulary.cls:
            raise InputError(
                "the cell does not begin with <cls>.", where=f"cell {position}", fix="Rank it with this vocabulary."
            )


def _unit(vectors_td: torch.Tensor) -> torch.Tensor:
    """New unit vectors; NaN where one has no length."""
    return vectors_td / torch.linalg.vector_norm(vectors_td, dim=1, keepdim=True)


def _rows(stream_td: torch.Tensor, positions: Sequence[np.ndarray], starts_n: np.ndarray) -> torch.Tensor:
    """Rows of a stream at rising positions within each of its parts; a view where they are neighbours."""
    at_r = np.concatenate([at_k + start for at_k, start in zip(positions, starts_n, strict=True)])
    if len(at_r) and at_r[-1] - at_r[0] + 1 == len(at_r) and len(positions) == 1:
        return stream_td[int(at_r[0]) : int(at_r[-1]) + 1]
    return stream_td[torch.from_numpy(at_r).to(stream_td.device, non_blocking=True)]


def _means(shifts_r: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """(n) float64: the mean of each variant's part."""
    if len(set(counts)) == 1:
        return shifts_r.unflatten(0, (len(counts), -1)).mean(dim=1, dtype=torch.float64)
    return torch.stack([part.mean(dtype=torch.float64) for part in shifts_r.split(list(counts))])


def _apart(found: HiddenBatch) -> Iterator[HiddenBatch]:
    """Each cell of a batch as a batch of its own."""
    if len(found.cells) == 1:
        yield found
        return
    from genescale.training.attention import Segments
    from genescale.training.model import PackedBatch

    batch = found.batch
    parts = (x.split(batch.lengths) for x in (batch.tokens_t, batch.positions_t, found.hidden_td))
    for at, length, (tokens_t, positions_t, hidden_td) in zip(
        found.cells, batch.lengths, zip(*parts, strict=True), strict=True
    ):
        one = PackedBatch(tokens_t, positions_t, Segments.of((length,), tokens_t.device))
        yield HiddenBatch(cells=np.array([at]), batch=one, hidden_td=hidden_td)


def _table(genes: Sequence[int], vocabulary: Vocabulary) -> npt.NDArray[np.bool_]:
    """(v) whether a token is one of `genes`."""
    table_v = np.zeros(vocabulary.size, dtype=bool)
    table_v[np.asarray(genes, dtype=np.int64)] = True
    return table_v


def _filled(placed: Placed, shape: Mapping[int, int] | tuple[int, ...]) -> np.ndarray:
    """Rows of all batches in the order of the chunk, float64."""
    rows = np.empty(tuple(shape))
    for at_n, values in placed:
        rows[at_n] = values.cpu().numpy()
    return rows


def _placed_rows(placed: Sequence[tuple[np.ndarray, np.ndarray]], n: int) -> list[np.ndarray | None]:
    rows: list[np.ndarray | None] = [None] * n
    for at_n, values in placed:
        for at, row in zip(at_n.tolist(), values, strict=True):
            rows[at] = row
    return rows


def _pooled_of(references: Sequence[Reference]) -> np.ndarray:
    return np.stack([reference.pooled_d for reference in references])
