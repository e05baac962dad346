"""From the bytes of a request to the bytes of its answer.

The main way: read strictly, turn cells into tokens, ask the model, render. Parsing and rendering are work for a
processor, so they run on a thread and the event loop stays free for other requests.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from genescale.platform.errors import ServiceError
from genescale.platform.vocabulary import Vocabulary
from genescale.serving.answering.classifications import Classifications
from genescale.serving.answering.embeddings import Embeddings
from genescale.serving.answering.intake import Intake
from genescale.serving.answering.passes import Model
from genescale.serving.answering.perturbations import Perturbations
from genescale.serving.answering.published_states import PublishedState, StateKey
from genescale.serving.answering.questions import Question, ReadCells, Sent, planned, rendered
from genescale.serving.answering.tokens import Tokens
from genescale.serving.config import Limits
from genescale.serving.problems import JSON_TYPE
from genescale.serving.schemas import InfoAnswered, Timings
from genescale.serving.watching.noted import note_phases

PING_TIMEOUT_S = 3.0


class Answers:
    """Answers requests with one model, its vocabulary and its limits."""

    def __init__(
        self,
        model: Model,
        vocabulary: Vocabulary,
        info: InfoAnswered,
        limits: Limits,
        published: Mapping[StateKey, PublishedState] | None = None,
    ) -> None:
        self.model, self.vocabulary, self.info, self.limits = model, vocabulary, info, limits
        self.intake, self.published = Intake(vocabulary, info, limits), published or {}
        self._embeddings, self._perturbations = Embeddings(self.intake), Perturbations(self.intake, published)
        self._tokens, self._classifications = Tokens(self.intake), Classifications(self.intake)

    async def tokens(self, sent: Sent, wanted: str = JSON_TYPE) -> bytes:
        """The cells as the model would take them, in the form `wanted`; raises InputError."""
        began = time.perf_counter()
        plan = await planned(self._tokens.plan, sent)
        timings = self._timings(began, time.perf_counter(), 0.0, waits=False)
        return await asyncio.to_thread(self._tokens.render, plan, timings, wanted)

    async def embeddings(self, sent: Sent, wanted: str = JSON_TYPE) -> bytes:
        """The embeddings that were asked for, in the form `wanted`; raises InputError and ServiceError."""
        began = time.perf_counter()
        plan = await planned(self._embeddings.plan, sent)
        parsed = time.perf_counter()
        outcome = await self.model.embed([cell.tokens for cell in plan.cells], plan.layer, plan.rows)
        timings = self._timings(began, parsed, outcome.forward_s)
        render = partial(self._embeddings.render, plan, outcome.value, timings, wanted)
        return await rendered(render, outcome.value.size)

    async def perturbations(self, sent: Sent, wanted: str = JSON_TYPE) -> bytes:
        """What edits do to cells, in the form `wanted`; raises InputError and ServiceError."""
        began = time.perf_counter()
        plan = await planned(self._perturbations.plan, sent)
        parsed = time.perf_counter()
        tokens = [cell.tokens for cell in plan.cells]
        outcome = await self.model.perturb(tokens, plan.edits, plan.comparison, plan.uncropped)
        timings = self._timings(began, parsed, outcome.forward_s)
        return await asyncio.to_thread(self._perturbations.render, plan, outcome.value, timings, wanted)

    async def classifications(self, sent: Sent, wanted: str = JSON_TYPE) -> bytes:
        """What the heads say, in the form `wanted`; raises InputError and ServiceError."""
        began = time.perf_counter()
        plan = await planned(self._classifications.plan, sent)
        parsed = time.perf_counter()
        outcome = await self.model.classify([cell.tokens for cell in plan.cells], plan.wanted)
        timings = self._timings(began, parsed, outcome.forward_s)
        render = partial(self._classifications.render, plan, outcome.value, timings, wanted)
        return await rendered(render, sum(answer.size for answer in outcome.value.answers))

    async def ready(self) -> None:
        """Return when the model answers; raises ServiceError when it does not, or not soon."""
        try:
            async with asyncio.timeout(PING_TIMEOUT_S):
                await self.model.ping()
        except TimeoutError:
            raise ServiceError("the model does not answer.", fix="Try again in a moment.") from None

    def _timings(self, began: float, parsed: float, forward_s: float, *, waits: bool = True) -> Timings:
        # Two clocks in two processes: never report a negative wait.
        queue_s = max(0.0, time.perf_counter() - parsed - forward_s) if waits else 0.0
        note_phases({"parse": parsed - began, "queue": queue_s, "forward": forward_s})
        return Timings(parse=_ms(parsed - began), queue=_ms(queue_s), forward=_ms(forward_s))

    def read_cells(self, question: Question[Any]) -> ReadCells:
        """Cells that go through the model once, tokenised; InputError for a wrong cell, LimitError for too many."""
        read = question.read_cells()
        self.intake.check_tokens(read.n_tokens)
        return read


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)
