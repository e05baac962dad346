"""What is read from an edited cell, and what one edit did to it.

Legend: `k` genes that stand in both cells, `s` states, `d` width of an embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from genescale.perturbation.readouts.class_change import model_of_classes
from genescale.perturbation.readouts.shift import MEASURES, Measure, check_measure
from genescale.platform.errors import InputError, SettingsError, did_you_mean

if TYPE_CHECKING:
    from genescale.perturbation.editing.requests import EditRequest
    from genescale.perturbation.perturb import CellEmbedder
    from genescale.perturbation.readouts.states import States
    from genescale.training.embedder import Layer, Pooling
    from genescale.training.heads.predict import HeadModel

GenesOfInterest = Sequence[int] | Literal["all"] | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Readouts:
    """What is compared between an edited cell and the unedited one."""

    layer: Layer = "second_to_last"
    """Whose embeddings are compared; layers above it are not computed, unless the head reads them."""
    measure: Measure = "remaining_genes"
    states: States | None = None
    """States toward or away from which the cell may move: vectors of `layer`, and of `<cls>` for the measure `cls`."""
    head: HeadModel | None = None
    """A model whose one head of cell classes is read; of several, `model_of_classes` takes one by name."""
    gene_shifts_of: GenesOfInterest = None
    """Tokens of the genes whose own cosines are wanted, or `all`."""
    share_first_layer: bool = False
    """Compute the first encoder layer once for all deletions of a single gene of a cell, where that can be done: faster
    from about ten deletions a cell on, slower below. Answers then have other last bits (1e-7 of a cosine)."""

    def __post_init__(self) -> None:
        if self.layer not in ("last", "second_to_last"):
            raise SettingsError(f"'{self.layer}' is not a layer.", where="layer", fix="Use last or second_to_last.")
        if self.measure not in MEASURES:
            fix = did_you_mean(self.measure, MEASURES) or f"Use one of {', '.join(MEASURES)}."
            raise InputError(f"'{self.measure}' is no measure of a shift.", fix=fix)
        if isinstance(self.gene_shifts_of, str) and self.gene_shifts_of != "all":
            raise InputError(f"'{self.gene_shifts_of}' names no genes.", fix="Give gene tokens, or 'all'.")
        if self.head is not None:
            object.__setattr__(self, "head", model_of_classes(self.head))

    @property
    def pooling(self) -> Pooling:
        """How a cell becomes the one vector that is compared with states."""
        return "cls" if self.measure == "cls" else "mean_genes"

    @property
    def state_names(self) -> tuple[str, ...]:
        """Names of the states, in the order of `EditAnswer.state_shifts`."""
        return () if self.states is None else tuple(self.states.names)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Classes of the head, in the order of `EditAnswer.class_changes`."""
        return () if self.head is None else self.head.specs[0].classes

    @property
    def goal_at(self) -> int | None:
        """Which of the states is the goal; None where there is none."""
        return None if self.states is None else self.states.goal_at

    def check(self, embedder: CellEmbedder) -> None:
        """Refuse what this model cannot answer: InputError."""
        vocabulary = embedder.vocabulary
        check_measure(self.measure, vocabulary)
        if self.states is not None:
            self.states.check_fits(
                width=embedder.width,
                layer=self.layer,
                pooling=self.pooling,
                model_digest=embedder.bundle.digest,
            )
        if self.head is not None and self.head.embedder.vocabulary.digest != vocabulary.digest:
            raise InputError(
                f"the head was fitted with vocabulary '{self.head.embedder.vocabulary.name}', the encoder with "
                f"'{vocabulary.name}'.",
                fix="Use a head and an encoder of one vocabulary.",
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class EditAnswer:
    """What one edit did to one cell."""

    request: EditRequest
    ranks: tuple[int | None, ...]
    """Rank of each gene of the request in the cell (0 = its first gene); None where the cell lacks it."""
    cosine: float | None
    """Cosine of the chosen measure; 1 where the edit changed nothing, None where `reason` says why there is none."""
    state_shifts: tuple[float | None, ...] = ()
    """Movement toward each state, in the order of the states' names; None where `reason` says why."""
    class_changes: tuple[float, ...] | None = None
    """Change of the probability of each class of the head; None without a head, or where `reason` says why."""
    goal_at: int | None = None
    """Which of `state_shifts` is the goal's."""
    reason: str = ""
    gene_tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """Genes `(k,)` whose own cosines were asked for and that stand in both cells, by their rank in the edited cell."""
    gene_cosine_values: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """Cosine `(k,)` float64 of each of `gene_tokens` before and after."""
    n_compared: int = 0
    """Genes that stand in both cells and were not edited."""
    n_cut: int = 0
    n_refilled: int = 0

    @property
    def shift(self) -> float | None:
        """`1 - cosine`: 0 where nothing moved."""
        return None if self.cosine is None else 1.0 - self.cosine

    @property
    def goal_shift(self) -> float | None:
        """Movement toward the goal state; None when no goal was given or `reason` says why."""
        return None if self.goal_at is None else self.state_shifts[self.goal_at]

    @property
    def found(self) -> dict[int, int]:
        """Rank of each gene that the cell has."""
        return {gene: rank for gene, rank in self._by_gene if rank is not None}

    @property
    def absent(self) -> tuple[int, ...]:
        """Genes of the request that the cell lacks."""
        return tuple(gene for gene, rank in self._by_gene if rank is None)

    @property
    def gene_cosines(self) -> dict[int, float]:
        """`gene_tokens` and `gene_cosine_values` as one mapping."""
        return dict(zip(self.gene_tokens.tolist(), self.gene_cosine_values.tolist(), strict=True))

    @property
    def _by_gene(self) -> list[tuple[int, int | None]]:
        return list(zip(self.request.genes, self.ranks, strict=True))
