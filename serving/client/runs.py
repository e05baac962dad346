"""Many cells in many requests: which cells go together, what a refusal changes, and what all answers make.

A run does no input or output: a client sends what `next_batch` gives, some at a time, and hands outcomes to `settle`.

Axis suffixes: `n` cells, `d` width.
"""

from __future__ import annotations

import re
import secrets
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from genescale.client import arrow_bodies, questions
from genescale.client.arrow_bodies import Bodies, arrow_is_best
from genescale.client.questions import Question
from genescale.client.records import EmbeddedCells, EmbeddingsAnswer, Model, Timings
from genescale.client.sources import Source, Whole
from genescale.platform.errors import (
    DeadlineError,
    GenescaleError,
    InputError,
    LimitError,
    ServiceError,
    SettingsError,
)

OnProgress = Callable[[int, int], None]
"""Called with the cells that are done and all cells."""
Unusable = Literal["raise", "nan"]
# Enough for full passes through the model, and an answer well within the deadline even on a processor.
PASSES_PER_REQUEST = 4
FRAMING_TOKENS = 2
# Braces and options around the cells of a body.
BODY_BYTES = 4_096
CELL_OF_REQUEST = re.compile(r"cells\[(\d+)\](.*)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What one request may hold, from the limits of `/v1/info`."""

    cells: int
    genes_per_cell: int
    tokens: int
    bytes: int
    window: int

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> Budget:
        """The budget of a service; ServiceError when it does not say its limits."""
        try:
            limits = info["limits"]
            return cls(
                cells=int(limits["max_cells"]),
                genes_per_cell=int(limits["max_genes_per_cell"]),
                tokens=int(min(limits["max_tokens"], PASSES_PER_REQUEST * limits["tokens_per_batch"])),
                bytes=int(limits["max_body_bytes"]) - BODY_BYTES,
                window=int(info["encoder"]["window"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ServiceError("the service does not say its limits.", where="/v1/info") from error

    def batches(self, source: Source, positions: Whole) -> list[Whole]:
        """Positions in order, cut wherever a request would be too large; LimitError for a cell too large by itself."""
        tokens_n = self.tokens_of(source)
        made: list[list[int]] = []
        cells, tokens, size = 0, 0, 0
        for at in positions.tolist():
            self._check_alone(source, at)
            mine, my_size = int(tokens_n[at]), int(source.bytes_n[at])
            full = cells + 1 > self.cells or tokens + mine > self.tokens or size + my_size > self.bytes
            if full or not made:
                made.append([])
                cells, tokens, size = 0, 0, 0
            made[-1].append(at)
            cells, tokens, size = cells + 1, tokens + mine, size + my_size
        return [np.array(batch, dtype=np.int64) for batch in made]

    def tokens_of(self, source: Source) -> Whole:
        """Tokens of each cell, at most."""
        return np.minimum(source.genes_n + FRAMING_TOKENS, self.window)

    def _check_alone(self, source: Source, at: int) -> None:
        for n, allowed, what in (
            (source.genes_n[at], self.genes_per_cell, "genes"),
            (source.bytes_n[at], self.bytes, "bytes"),
        ):
            if n > allowed:
                raise LimitError(f"{n:,} {what} are in one cell; {allowed:,} are allowed.", where=source.name(at))


class EmbeddingRun:
    """Embeddings of all cells of a source.

    `unusable` says what a cell is worth that the service cannot use (no counts, or no gene that it knows): `raise`, or
    a row of `nan` that is counted. Raises InputError for such a cell, LimitError for one that fits in no request.
    """

    def __init__(
        self,
        source: Source,
        info: Mapping[str, Any],
        *,
        layer: str,
        pooling: str,
        unusable: Unusable = "raise",
        bodies: Bodies = "auto",
        progress: OnProgress | None = None,
    ) -> None:
        if unusable not in ("raise", "nan"):
            raise SettingsError(f"unusable is '{unusable}'.", where="client", fix="Use 'raise' or 'nan'.")
        self.source, self.layer, self.pooling = source, layer, pooling
        self._arrow = arrow_is_best(bodies, info)
        self._skips, self._progress = unusable == "nan", progress
        n, width = len(source.genes_n), int(info["encoder"]["width"])
        self._rows_nd = np.full((n, width), np.nan, dtype=np.float32)
        self._n_genes_n, self._n_tokens_n, self._n_ignored_n = (np.zeros(n, dtype=np.int64) for _ in range(3))
        self._cropped_n = np.zeros(n, dtype=bool)
        self._why: dict[int, str] = {}
        self._model: Model | None = None
        self._id = secrets.token_hex(16)
        self._done, self._requests, self._ms = 0, 0, np.zeros(3)
        budget = Budget.of(info)
        self._tokens_n, self._tokens_allowed = budget.tokens_of(source), budget.tokens
        self._waiting = deque(budget.batches(source, self._with_genes()))
        self._report(0)

    @property
    def waits(self) -> bool:
        """Whether there is something to send."""
        return bool(self._waiting)

    def next_batch(self) -> Whole:
        """Positions of the cells to send next: no more than went well since a larger request was late."""
        batch = self._waiting.popleft()
        within = np.cumsum(self._tokens_n[batch]) <= self._tokens_allowed
        first = max(1, int(within.sum()))
        if first < len(batch):
            self._waiting.appendleft(batch[first:])
        return batch[:first]

    def question(self, batch: Whole) -> Question[EmbeddingsAnswer]:
        """What is asked of the cells at these positions."""
        flat = self.source.flat(batch) if self._arrow else None
        if flat is not None:
            question = arrow_bodies.embeddings(flat, layer=self.layer, pooling=self.pooling)
        else:
            question = questions.embeddings(self.source.cells(batch), layer=self.layer, pooling=self.pooling)
        # Requests of one run are kept together when the service tries a candidate on a share of all requests.
        name = f"{self._id}:{int(batch[0])}" if len(batch) else self._id
        return replace(question, headers={**question.headers, "X-Request-ID": name})

    def settle(self, batch: Whole, outcome: EmbeddingsAnswer | GenescaleError) -> None:
        """Keep an answer, or see what is to be sent in place of what was refused; raises what nothing helps."""
        self._requests += 1
        if isinstance(outcome, EmbeddingsAnswer):
            self._keep(batch, outcome)
            return
        at, named = self._position(batch, outcome)
        # A request that is late or too large may do in two parts; that of a cell by itself cannot.
        if isinstance(outcome, DeadlineError) or (isinstance(outcome, LimitError) and at is None):
            if len(batch) == 1:
                raise named
            self._tokens_allowed = min(self._tokens_allowed, int(self._tokens_n[batch].sum()) // 2)
            self._waiting.appendleft(batch)
            return
        # A plain InputError of one cell says that nothing of it can be used.
        if at is None or not self._skips or type(outcome) is not InputError:
            raise named
        self._skip(at, outcome.what)
        if len(batch) > 1:
            self._waiting.appendleft(batch[batch != at])

    def result(self) -> EmbeddedCells:
        """What all answers say together; InputError when no cell could be used."""
        if self._model is None:
            raise InputError("none of the cells can be used.", fix="Give cells with raw counts of known genes.")
        return EmbeddedCells(
            embeddings=self._rows_nd,
            n_genes=self._n_genes_n,
            n_tokens=self._n_tokens_n,
            n_ignored=self._n_ignored_n,
            cropped=self._cropped_n,
            unusable=dict(sorted(self._why.items())),
            model=self._model,
            requests=self._requests,
            timings_ms=Timings(parse=float(self._ms[0]), queue=float(self._ms[1]), forward=float(self._ms[2])),
        )

    def _with_genes(self) -> Whole:
        empty = np.flatnonzero(self.source.genes_n == 0)
        if len(empty) and not self._skips:
            raise InputError(
                f"{len(empty):,} cells have no counts, the first is {self.source.name(int(empty[0]))}.",
                fix="Leave them out, or use unusable='nan'.",
            )
        for at in empty.tolist():
            self._skip(at, "the cell has no counts.")
        return np.flatnonzero(self.source.genes_n)

    def _keep(self, batch: Whole, answer: EmbeddingsAnswer) -> None:
        self._check_same(answer, len(batch))
        self._rows_nd[batch] = answer.embeddings
        self._n_genes_n[batch] = [cell.n_genes for cell in answer.cells]
        self._n_tokens_n[batch] = [cell.n_tokens for cell in answer.cells]
        self._n_ignored_n[batch] = [cell.n_ignored for cell in answer.cells]
        self._cropped_n[batch] = [cell.cropped for cell in answer.cells]
        self._ms += [answer.timings_ms.parse, answer.timings_ms.queue, answer.timings_ms.forward]
        self._report(len(batch))

    def _check_same(self, answer: EmbeddingsAnswer, n: int) -> None:
        if answer.embeddings.shape != (n, self._rows_nd.shape[1]):
            raise ServiceError(f"{n} cells were sent, and embeddings of {answer.embeddings.shape} came back.")
        if self._model not in (None, answer.model):
            raise ServiceError(
                f"the service changed its model from {_called(self._model)} to {_called(answer.model)} in between.",
                fix="Embeddings of two models do not compare: ask for all cells again.",
            )
        self._model = answer.model

    def _skip(self, at: int, why: str) -> None:
        self._why[at] = why
        self._report(1)

    def _report(self, n: int) -> None:
        self._done += n
        if self._progress is not None:
            self._progress(self._done, len(self._rows_nd))

    def _position(self, batch: Whole, error: GenescaleError) -> tuple[int | None, GenescaleError]:
        """The position that an error is about, None when it is about no cell, and the error by the cell's name."""
        found = CELL_OF_REQUEST.fullmatch(error.where)
        if found is None or int(found[1]) >= len(batch):
            return None, error
        at = int(batch[int(found[1])])
        return at, type(error)(error.what, where=f"{self.source.name(at)}{found[2]}", fix=error.fix)


def _called(model: Model | None) -> str:
    return f"{model.name} {model.version} ({model.digest[:12]})" if model else "none"
