"""The client that lets other work go on while it waits: the same questions, awaited."""

from __future__ import annotations

import asyncio
import io
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from genescale.client import jobs, questions
from genescale.client.arrow_bodies import Bodies, check_bodies, embeddings_asked, gene_embeddings_asked
from genescale.client.cells import Cell, Vector
from genescale.client.connection import READY, Connection, address_of, request_of, secret
from genescale.client.jobs import Download, Job, JobsPage
from genescale.client.objects import OBSM_KEY, check_writable, write_embeddings
from genescale.client.questions import LAYER, POOLING, Answer, Edit, Question
from genescale.client.records import (
    ClassifyAnswer,
    EmbeddedCells,
    EmbeddingsAnswer,
    GeneEmbeddingsAnswer,
    NeighborsAnswer,
    PerturbationsAnswer,
    TokensAnswer,
)
from genescale.client.retries import Outcome, Retries
from genescale.client.runs import EmbeddingRun, OnProgress, Unusable
from genescale.client.sources import ListedCells, ObjectCells, Source
from genescale.client.together import AT_ONCE, run_on_loop
from genescale.platform.settings import Secret


class AsyncGenescaleClient:
    """Questions to one service, from one event loop.

    `model` names one of several models of the service; its first one is asked without it.
    `timeout_s` bounds one try; `attempts` counts tries of a question that met a busy or restarting service. Raises
    the classes of `genescale.platform.errors` that the service named, ServiceError when it cannot be reached.
    `bodies` says how embeddings travel: as `json`, as `arrow` (needs pyarrow), or `auto`: those of `embed` and
    `embed_anndata` as Arrow where both sides can.
    `transport` and `sleep` are for tests.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | Secret | None = None,
        *,
        model: str = "",
        timeout_s: float = 90.0,
        attempts: int = Retries.attempts,
        bodies: Bodies = "auto",
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        connection = Connection(base_url=base_url, api_key=secret(api_key), timeout_s=timeout_s, model=model)
        self._http = httpx.AsyncClient(**connection.options(), transport=transport)
        self._storage = httpx.AsyncClient(timeout=timeout_s, transport=transport)
        self._retries, self._sleep = Retries(attempts=attempts), sleep
        check_bodies(bodies)
        self._bodies: Bodies = bodies
        # Jitter spreads callers that were refused at the same moment; nothing that should repeat depends on it.
        self._jitter = random.Random()

    async def embeddings(
        self, cells: Sequence[Cell], *, layer: str = LAYER, pooling: str = POOLING
    ) -> EmbeddingsAnswer:
        """One embedding per cell, in order."""
        return await self.ask(embeddings_asked(cells, self._bodies, layer=layer, pooling=pooling))

    async def embed(
        self,
        cells: Sequence[Cell],
        *,
        layer: str = LAYER,
        pooling: str = POOLING,
        unusable: Unusable = "raise",
        at_once: int = AT_ONCE,
        progress: OnProgress | None = None,
    ) -> EmbeddedCells:
        """Embeddings of as many cells as you have; arguments as GenescaleClient.embed."""
        return await self._embed(
            await asyncio.to_thread(ListedCells, cells),
            at_once,
            layer=layer,
            pooling=pooling,
            unusable=unusable,
            progress=progress,
        )

    async def embed_anndata(
        self,
        adata: Any,
        *,
        key: str = OBSM_KEY,
        counts_layer: str | None = None,
        gene_column: str | None = None,
        layer: str = LAYER,
        pooling: str = POOLING,
        unusable: Unusable = "raise",
        at_once: int = AT_ONCE,
        progress: OnProgress | None = None,
    ) -> EmbeddedCells:
        """Embeddings of an AnnData object, into `obsm[key]`; arguments as GenescaleClient.embed_anndata."""
        check_writable(adata)
        source = await asyncio.to_thread(ObjectCells, adata, counts_layer=counts_layer, gene_column=gene_column)
        found = await self._embed(source, at_once, layer=layer, pooling=pooling, unusable=unusable, progress=progress)
        write_embeddings(adata, key, found, layer=layer, pooling=pooling, slot=source.slot)
        return found

    async def tokens(self, cells: Sequence[Cell], *, beyond_window: bool = False) -> TokensAnswer:
        """Each cell ranked and tokenised; arguments as GenescaleClient.tokens."""
        return await self.ask(questions.tokens(cells, beyond_window=beyond_window))

    async def gene_embeddings(self, cells: Sequence[Cell], *, layer: str = LAYER) -> GeneEmbeddingsAnswer:
        """One embedding per gene that the model sees of each cell, in rank order."""
        return await self.ask(gene_embeddings_asked(cells, self._bodies, layer=layer))

    async def perturbations(
        self,
        cells: Sequence[Cell],
        edits: Sequence[Edit],
        *,
        layer: str = LAYER,
        measure: str = "remaining_genes",
        states: Mapping[str, Vector] | None = None,
        goal: Vector | None = None,
        head: str | None = None,
        gene_shifts: Sequence[str] = (),
        top_gene_shifts: int = 0,
        progress: OnProgress | None = None,
    ) -> PerturbationsAnswer:
        """Each edit tried on each cell, in order; arguments and large questions as GenescaleClient.perturbations."""
        question = questions.perturbations(
            cells,
            edits,
            layer=layer,
            measure=measure,
            states=states,
            goal=goal,
            head=head,
            gene_shifts=gene_shifts,
            top_gene_shifts=top_gene_shifts,
        )
        answer = await self.ask(jobs.or_job(question))
        if not isinstance(answer, Job):
            return answer
        await self.wait_for_job(answer.id, progress=progress)
        whole = io.BytesIO()
        await self._download(Download(answer.id, jobs.ANSWER_FILE, whole))
        return questions.perturbations_of(whole.getvalue())

    async def classify(self, cells: Sequence[Cell], *, genes: Sequence[str] = ()) -> ClassifyAnswer:
        """What the heads of a fine-tuned model say of cells, or of genes (none named: all genes of the cells)."""
        return await self.ask(questions.classify(cells, genes=genes))

    async def neighbors(
        self, cells: Sequence[Cell], *, k: int = 10, columns: Sequence[str] | None = None
    ) -> NeighborsAnswer:
        """The `k` nearest cells of the service's reference for each cell, with labels of `columns` (all when None)."""
        return await self.ask(questions.neighbors(cells, k=k, columns=columns))

    async def submit_job(self, job: Mapping[str, Any], *, idempotency_key: str | None = None) -> Job:
        """Begin a job; arguments as GenescaleClient.submit_job."""
        return await self.ask(jobs.asked(job, idempotency_key))

    async def job(self, job_id: str) -> Job:
        """A job as it stands."""
        return await self.ask(jobs.looked_at(job_id))

    async def jobs(self, *, limit: int = 20, before: str | None = None) -> JobsPage:
        """Jobs of this key, the newest first; `before` is `next` of the page before."""
        return await self.ask(jobs.listed(limit, before))

    async def cancel_job(self, job_id: str) -> Job:
        """Ask for the end of a job; nothing happens to one that is over."""
        return await self.ask(jobs.cancelled(job_id))

    async def wait_for_job(
        self, job_id: str, *, timeout_s: float | None = None, progress: OnProgress | None = None
    ) -> Job:
        """The job once it succeeded; raises what it failed with, DeadlineError when it takes longer than `timeout_s`.

        `progress` is called with what is done and all there is, as soon as that is known.
        """
        waiting = jobs.Waiting(job_id, timeout_s, time.monotonic())
        while not (job := await self.job(job_id)).over:
            if progress is not None and job.total:
                progress(job.done, job.total)
            await self._sleep(waiting.pause_s(time.monotonic()))
        return job.check()

    async def job_result(self, job_id: str, to: str | Path, *, file: str = "") -> Path:
        """Write a file of a job's result, the main one without a name, to the local path `to`; returns it."""
        with jobs.whole_file(to) as into:
            await self._download(Download(job_id, file, into))
        return Path(to)

    async def info(self) -> dict[str, Any]:
        """Model, vocabulary, corpus, choices and limits of the service."""
        return await self.ask(questions.info())

    async def ready(self) -> bool:
        """Whether the model is loaded, warm and answers; asks once and does not wait."""
        try:
            return (await self._http.get(READY)).status_code == httpx.codes.OK
        except httpx.RequestError:
            return False

    async def ask(self, question: Question[Answer]) -> Answer:
        """The answer to a question, tried again while the service is busy or restarting."""
        return await self._ask(self._http, question)

    async def _ask(self, http: httpx.AsyncClient, question: Question[Answer]) -> Answer:
        attempt = 0
        while True:
            attempt += 1
            outcome = await self._outcome(http, question)
            where = address_of(http, question)
            wait_s = self._retries.wait_s(outcome, attempt, where=where, jitter=self._jitter)
            if isinstance(outcome, httpx.Response) and wait_s is None:
                # A large answer takes a while to read; the loop has other work.
                return await asyncio.to_thread(question.read, outcome)
            await self._sleep(wait_s or 0.0)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()
        await self._storage.aclose()

    async def __aenter__(self) -> AsyncGenescaleClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _embed(self, source: Source, at_once: int, **options: Any) -> EmbeddedCells:
        run = EmbeddingRun(source, await self.info(), bodies=self._bodies, **options)
        await run_on_loop(run, self.ask, at_once)
        return run.result()

    async def _download(self, download: Download) -> None:
        while not download.done:
            piece = await self._ask(self._http, download.question())
            if piece.link:
                # Storage is asked without the key, which is none of its business.
                piece = await self._ask(self._storage, download.behind(piece.link))
            download.take(piece)

    async def _outcome(self, http: httpx.AsyncClient, question: Question[Answer]) -> Outcome:
        try:
            return await http.send(request_of(http, question))
        except httpx.RequestError as error:
            return error
