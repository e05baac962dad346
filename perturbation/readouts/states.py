"""States of cells, such as healthy and diseased, as mean embeddings, and how far an edit moves a cell toward each.

Legend: `n` cells, `s` states, `d` width of an embedding.

A state is the plain mean, in float64, of the embeddings of its cells: the rule of the published code (exact mean,
nothing trimmed or weighted). A movement toward a state is cos(c_edited, S) - cos(c_original, S), with c pooled in the
same way from the same layer; it is positive where the edit moved the cell toward the state.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from genescale.perturbation.readouts.shift import cosine
from genescale.platform.errors import InputError, SettingsError, did_you_mean
from genescale.platform.progress import SILENT, Progress

if TYPE_CHECKING:
    from genescale.ingestion.corpus import Corpus
    from genescale.platform.bundle import Bundle
    from genescale.platform.storage import Store
    from genescale.training.embedder import Layer, Pooling

CELLS_AT_ONCE = 512
MAX_CELLS = 1_000
"""Cells that a state is the mean of, unless asked otherwise."""


class StateEmbedder(Protocol):
    """What states need of an embedder (`genescale.training.embedder.Embedder` is one)."""

    @property
    def bundle(self) -> Bundle:
        """The model."""

    @property
    def width(self) -> int:
        """Length of one embedding."""

    def embed_cells(self, cells: Sequence[np.ndarray], *, layer: Layer, pooling: Pooling) -> np.ndarray:
        """One vector per cell `(n, d)`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class States:
    """Mean embeddings of the states that cells are compared with."""

    names: tuple[str, ...]
    vectors_sd: np.ndarray
    """float64, one row for each name."""
    goal: str = ""
    """The state that edits should lead to; empty when none is wanted more than the others."""
    start: str = ""
    """The state that the edited cells are in; empty when it is not said."""
    layer: Layer = "second_to_last"
    pooling: Pooling = "mean_genes"
    model_digest: str = ""
    """Of the bundle whose embeddings these are; empty when unknown."""
    cells: tuple[int, ...] = ()
    """Cells that each state is the mean of; empty when unknown."""
    without_label: int = 0
    """Cells of the selection that are in none of the states."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Cells of each state beyond the limit: they were not drawn."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "vectors_sd", np.asarray(self.vectors_sd, dtype=np.float64))
        self._check_vectors()
        self._check_roles()

    def _check_vectors(self) -> None:
        from genescale.training.embedder import LAYERS, POOLINGS

        if not self.names or len(set(self.names)) < len(self.names) or "" in self.names:
            raise InputError(f"states need different names, not {list(self.names)}.", where="states")
        if self.vectors_sd.ndim != 2 or len(self.vectors_sd) != len(self.names):
            raise InputError(
                f"{len(self.names)} states have vectors of shape {self.vectors_sd.shape}.",
                where="states",
                fix="Give one vector for each state.",
            )
        for name, vector_d in zip(self.names, self.vectors_sd, strict=True):
            if not np.isfinite(vector_d).all() or not vector_d.any():
                raise InputError("the vector holds values that are not finite, or only zeros.", where=f"state {name}")
        for what, value, choices in (("layer", self.layer, LAYERS), ("pooling", self.pooling, POOLINGS)):
            if value not in choices:
                raise InputError(f"'{value}' is no {what}.", where="states", fix=f"Use {' or '.join(choices)}.")

    def _check_roles(self) -> None:
        for role, name in (("goal", self.goal), ("start", self.start)):
            if name and name not in self.names:
                hint = did_you_mean(name, self.names) or f"States: {', '.join(self.names)}."
                raise InputError(f"the {role} '{name}' is none of the states.", where="states", fix=hint)
        if self.goal and self.goal == self.start:
            raise InputError(f"'{self.goal}' is both start and goal.", where="states", fix="Name two states.")

    @classmethod
    def of_corpus(
        cls,
        embedder: StateEmbedder | Bundle,
        corpus: Corpus,
        column: str,
        *,
        start: str = "",
        goal: str = "",
        alternatives: Sequence[str] = (),
        where: str = "",
        layer: Layer = "second_to_last",
        pooling: Pooling = "mean_genes",
        max_cells: int = MAX_CELLS,
        seed: int = 0,
        progress: Progress = SILENT,
    ) -> States:
        """The states that the labels in `column` of a corpus name; all labels when neither start nor goal is given.

        `where` limits the cells (an SQL condition). Of each state at most `max_cells` are drawn at random (0: all).
        Raises CorpusError for an unknown column, label, or vocabulary, InputError for names that do not fit together.
        """
        from genescale.perturbation.readouts.state_cells import cells_by_state, drawn
        from genescale.training.embed import check_same_vocabulary

        model = _loaded(embedder)
        check_same_vocabulary(model.bundle, corpus)
        by_state, without_label = cells_by_state(corpus, column, _asked(start, goal, alternatives), where=where)
        chosen = {name: drawn(index_n, max_cells, seed, name) for name, index_n in by_state.items()}
        progress.start(sum(len(index_n) for index_n in chosen.values()), "cells")
        means = [_mean(model, _blocks(corpus, index_n, progress), layer, pooling) for index_n in chosen.values()]
        return cls(
            names=tuple(by_state),
            vectors_sd=np.stack(means),
            goal=goal,
            start=start,
            layer=layer,
            pooling=pooling,
            model_digest=model.bundle.digest,
            cells=tuple(len(index_n) for index_n in chosen.values()),
            without_label=without_label,
            left_out={name: len(by_state[name]) - len(index_n) for name, index_n in chosen.items()},
        )

    @classmethod
    def of_cells(
        cls,
        embedder: StateEmbedder | Bundle,
        cells: Mapping[str, Sequence[np.ndarray]],
        *,
        start: str = "",
        goal: str = "",
        layer: Layer = "second_to_last",
        pooling: Pooling = "mean_genes",
    ) -> States:
        """The states that sets of tokenised cells stand for, by name. Raises InputError for an empty set."""
        model = _loaded(embedder)
        if empty := [name for name, members in cells.items() if not len(members)]:
            raise InputError("there are no cells.", where=f"state {empty[0]}", fix="Give one cell at least.")
        means = [_mean(model, [members], layer, pooling) for members in cells.values()]
        return cls(
            names=tuple(cells),
            vectors_sd=np.stack(means) if means else np.zeros((0, model.width)),
            goal=goal,
            start=start,
            layer=layer,
            pooling=pooling,
            model_digest=model.bundle.digest,
            cells=tuple(len(members) for members in cells.values()),
        )

    def toward(self, edited_d: np.ndarray, original_d: np.ndarray) -> npt.NDArray[np.float64]:
        """Movement toward each state `(…, s)` float64; cells `(…, d)` may have leading axes, which broadcast."""
        edited, original = np.asarray(edited_d)[..., None, :], np.asarray(original_d)[..., None, :]
        return cosine(edited, self.vectors_sd) - cosine(original, self.vectors_sd)

    def check_fits(self, *, width: int, layer: Layer, pooling: Pooling, model_digest: str = "") -> None:
        """InputError unless these states come from embeddings of this model, layer and pooling."""
        for what, ours, theirs in (
            ("layer", self.layer, layer),
            ("pooling", self.pooling, pooling),
            ("model", self.model_digest[:12], model_digest[:12]),
        ):
            if ours and theirs and ours != theirs:
                raise InputError(
                    f"the states were made with {what} '{ours}', but '{theirs}' is asked for.",
                    where="states",
                    fix=f"Make them again with this {what}: genescale perturb states.",
                )
        if self.vectors_sd.shape[1] != width:
            raise InputError(
                f"the states have {self.vectors_sd.shape[1]} values; the model's embeddings have {width}.",
                where="states",
                fix="Make them again with this model: genescale perturb states.",
            )

    def save(self, uri: str, store: Store) -> None:
        """Write the states to `uri` as Parquet (columns: `states_file`)."""
        from genescale.perturbation.readouts.states_file import states_bytes

        store.write(uri, states_bytes(self))

    @classmethod
    def load(cls, uri: str, store: Store, *, start: str | None = None, goal: str | None = None) -> States:
        """The states saved at `uri`; `start` and `goal`, when given, take the place of the saved ones.

        Whether they fit a model and a layer is asked with `check_fits`.
        """
        from genescale.perturbation.readouts.states_file import read_states

        return read_states(uri, store, start=start, goal=goal)

    @property
    def cosines_ss(self) -> npt.NDArray[np.float64]:
        """Cosine of each state with each: how much there is to move between them."""
        return cosine(self.vectors_sd[:, None, :], self.vectors_sd[None, :, :])

    @property
    def goal_at(self) -> int | None:
        """Position of the goal among the names; None without one."""
        return self.names.index(self.goal) if self.goal else None


def _asked(start: str, goal: str, alternatives: Sequence[str]) -> list[str]:
    if not (start or goal or alternatives):
        return []
    asked = [name for name in (start, goal, *alternatives) if name]
    if len(set(asked)) < len(asked):
        raise SettingsError(
            f"a state is named twice: {', '.join(asked)}.", where="states", fix="Start, goal and alternatives differ."
        )
    return asked


def _loaded(embedder: StateEmbedder | Bundle) -> StateEmbedder:
    from genescale.platform.bundle import Bundle
    from genescale.training.embedder import Embedder

    return Embedder.load(embedder) if isinstance(embedder, Bundle) else embedder


def _blocks(corpus: Corpus, index_n: npt.NDArray[np.int64], progress: Progress) -> Iterator[Sequence[np.ndarray]]:
    for start in range(0, len(index_n), CELLS_AT_ONCE):
        block = index_n[start : start + CELLS_AT_ONCE].tolist()
        yield corpus.tokens(block)
        progress.advance(len(block))


def _mean(
    model: StateEmbedder, blocks: Iterable[Sequence[np.ndarray]], layer: Layer, pooling: Pooling
) -> npt.NDArray[np.float64]:
    """Mean embedding `(d,)` of the cells of all blocks."""
    sum_d, n_cells = np.zeros(model.width), 0
    for cells in blocks:
        embeddings_nd = model.embed_cells(cells, layer=layer, pooling=pooling)
        sum_d += embeddings_nd.sum(axis=0, dtype=np.float64)
        n_cells += len(cells)
    return sum_d / n_cells
