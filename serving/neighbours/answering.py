"""From the bytes of a question for neighbours to the bytes of its answer.

The model embeds the cells like any others; the search runs here, on one thread of the HTTP side, some cells at a time:
requests take turns, and a caller who leaves costs no more than the turn that it had begun.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np

from genescale.platform.errors import GenescaleError, InputError, LimitError, did_you_mean
from genescale.serving.answering.answers import Answers
from genescale.serving.answering.cells import PreparedCell
from genescale.serving.answering.questions import Sent, planned, read_question
from genescale.serving.forms.media import ARROW_TYPE
from genescale.serving.neighbours.arrow_neighbors import render_arrow
from genescale.serving.neighbours.contract import (
    LabelVote,
    Neighbor,
    NeighborsAnswered,
    NeighborsAsked,
    NeighborsCell,
    NeighborsFacts,
    NeighborsOptions,
    NeighborsTimings,
)
from genescale.serving.neighbours.reference import Nearest, Reference
from genescale.serving.neighbours.viewing import ReferenceView
from genescale.serving.problems import JSON_TYPE
from genescale.serving.schemas import FileFacts
from genescale.serving.watching.noted import note_phases

CELLS_PER_TURN = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class _Plan:
    """A question for neighbours, read and tokenised."""

    k: int
    columns: tuple[str, ...]
    cells: list[PreparedCell]
    file: FileFacts | None


class NeighborAnswers:
    """Answers questions for neighbours with the model of `answers` and one reference."""

    def __init__(self, answers: Answers, reference: Reference) -> None:
        self.answers, self.reference = answers, reference
        self._lane = ThreadPoolExecutor(max_workers=1, thread_name_prefix="genescale-neighbours")
        self.view = ReferenceView(reference)

    async def neighbors(self, sent: Sent, wanted: str = JSON_TYPE) -> bytes:
        """The nearest cells of the reference, in the form `wanted`; raises InputError and ServiceError."""
        began = time.perf_counter()
        plan = await planned(self._plan, sent)
        parsed = time.perf_counter()
        known = self.reference.manifest
        outcome = await self.answers.model.embed([cell.tokens for cell in plan.cells], known.layer, known.pooling)
        embedded = time.perf_counter()
        found = await self._search(outcome.value, plan.k)
        searched = time.perf_counter()
        timings = NeighborsTimings(
            parse=_ms(parsed - began),
            # Two clocks in two processes: never report a negative wait.
            queue=_ms(max(0.0, embedded - parsed - outcome.forward_s)),
            forward=_ms(outcome.forward_s),
            search=_ms(searched - embedded),
        )
        note_phases({name: ms / 1000 for name, ms in timings.model_dump().items()})
        return await asyncio.to_thread(self._render, plan, found, timings, wanted)

    def _plan(self, sent: Sent) -> _Plan:
        question = read_question(self.answers.intake, sent, NeighborsAsked, NeighborsOptions)
        asked = question.options
        limit = self.reference.manifest.max_neighbors
        if asked.k > limit:
            raise LimitError(
                f"{asked.k:,} neighbours are asked for; this reference answers up to {limit:,}.",
                where="k",
                fix="Ask for fewer.",
            )
        columns, read = self._columns(asked.columns), self.answers.read_cells(question)
        return _Plan(k=asked.k, columns=columns, cells=read.cells, file=read.file)

    def _columns(self, asked: Sequence[str] | None) -> tuple[str, ...]:
        known = self.reference.manifest.columns
        for at, name in enumerate(asked or ()):
            if name not in known:
                hint = did_you_mean(name, known) or f"It has: {', '.join(known) or 'none'}."
                raise InputError(f"the reference has no column '{name}'.", where=f"columns[{at}]", fix=hint)
        return known if asked is None else tuple(dict.fromkeys(asked))

    async def _search(self, vectors_qd: np.ndarray, k: int) -> list[Nearest]:
        if not np.isfinite(vectors_qd).all():
            raise GenescaleError("the model gives embeddings that are not finite numbers.")
        loop = asyncio.get_running_loop()
        turns = [vectors_qd[at : at + CELLS_PER_TURN] for at in range(0, len(vectors_qd), CELLS_PER_TURN)]
        return [await loop.run_in_executor(self._lane, self.reference.nearest, turn, k) for turn in turns]

    def _render(self, plan: _Plan, found: Sequence[Nearest], timings: NeighborsTimings, wanted: str) -> bytes:
        rows_qk = np.concatenate([one.rows_qk for one in found])
        distances = [row for one in found for row in one.distances_qk.tolist()]
        unlike = [score for one in found for score in one.out_of_distribution_q.tolist()]
        known = self.reference.cells(rows_qk)
        places = self.reference.places(rows_qk)
        own = [place for one in found for place in one.places]
        facts = NeighborsFacts(
            provenance=self.answers.info.provenance,
            reference=self.reference.facts,
            k=plan.k,
            file=plan.file,
            timings_ms=timings,
        )
        cells = [
            NeighborsCell(
                **cell.facts.fields,
                **_company(known[part], places[part], distances[at], plan.columns),
                out_of_distribution=unlike[at],
                place=own[at],
            )
            for at, (cell, part) in enumerate(zip(plan.cells, _parts(plan.k), strict=False))
        ]
        if wanted == ARROW_TYPE:
            return render_arrow(facts, plan.cells, cells, plan.columns)
        return NeighborsAnswered(**dict(facts), cells=cells).model_dump_json().encode()


def _parts(k: int) -> Iterator[slice]:
    """The neighbours of the first cell, of the second, and so on."""
    return (slice(start, start + k) for start in count(0, k))


def _company(
    known: Sequence[dict[str, Any]],
    places: Sequence[list[float] | None],
    distances: Sequence[float],
    columns: Sequence[str],
) -> dict[str, Any]:
    """A cell's neighbours, and what their labels say together."""
    neighbors = [
        Neighbor(
            id=one["cell_id"],
            dataset=one["dataset_id"],
            distance=distance,
            labels={column: one[column] for column in columns},
            place=place,
        )
        for one, place, distance in zip(known, places, distances, strict=True)
    ]
    return {
        "neighbors": neighbors,
        "votes": {column: votes([one.labels[column] for one in neighbors]) for column in columns},
    }


def votes(labels: Sequence[str | None]) -> list[LabelVote]:
    """Votes of neighbours, nearest first; of labels with equally many, the one met first comes first."""
    # Counter keeps the order of first meetings, and most_common sorts stably.
    counted = Counter(labels).most_common()
    return [LabelVote(label=label, n=n, share=n / len(labels)) for label, n in counted]


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)
