"""The client that waits for each answer."""

from __future__ import annotations

import functools
import io
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
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
from genescale.client.together import AT_ONCE, run_on_threads
from genescale.platform.errors import ServiceError
from genescale.platform.settings import Secret

NEVER = threading.Event()
"""Of a question whose answer is waited for to the end."""


class GenescaleClient:
    """Questions to one service; may be used from several threads.

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
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        connection = Connection(base_url=base_url, api_key=secret(api_key), timeout_s=timeout_s, model=model)
        self._http = httpx.Client(**connection.options(), transport=transport)
        self._storage = httpx.Client(timeout=timeout_s, transport=transport)
        self._retries, self._sleep = Retries(attempts=attempts), sleep
        check_bodies(bodies)
        self._bodies: Bodies = bodies
        # Jitter spreads callers that were refused at the same moment; nothing that should repeat depends on it.
        self._jitter = random.Random()

    def embeddings(self, cells: Sequence[Cell], *, layer: str = LAYER, pooling: str = POOLING) -> EmbeddingsAnswer:
        """One embedding per cell, in order."""
        return self.ask(embeddings_asked(cells, self._bodies, layer=layer, pooling=pooling))

    def embed(
        self,
        cells: Sequence[Cell],
        *,
        layer: str = LAYER,
        pooling: str = POOLING,
        unusable: Unusable = "raise",
        at_once: int = AT_ONCE,
        progress: OnProgress | None = None,
    ) -> EmbeddedCells:
        """Embeddings of as many cells as you have, in requests within the service's limits, `at_once` at a time.

        `unusable` says what becomes of a cell that the service cannot use: an error, or a row of `nan`. `progress` is
        called with the cells that are done and all cells, such as a ProgressBar.
        """
        return self._embed(
            ListedCells(cells), at_once, layer=layer, pooling=pooling, unusable=unusable, progress=progress
        )

    def embed_anndata(
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
        """Embeddings of the cells of an AnnData object, into `obsm[key]`; their origin goes into `uns[key]`.

        `counts_layer` names the layer of raw counts (`X` when None), `gene_column` the column of `var` with Ensembl
        ids or symbols (`var_names` when None). The object is changed when all cells are done, and not before. Raises
        NotCountsError for values that are no raw counts; the other arguments are those of `embed`.
        """
        check_writable(adata)
        source = ObjectCells(adata, counts_layer=counts_layer, gene_column=gene_column)
        found = self._embed(source, at_once, layer=layer, pooling=pooling, unusable=unusable, progress=progress)
        write_embeddings(adata, key, found, layer=layer, pooling=pooling, slot=source.slot)
        return found

    def tokens(self, cells: Sequence[Cell], *, beyond_window: bool = False) -> TokensAnswer:
        """Each cell ranked and tokenised as the model would take it, which the model is not asked for.

        `beyond_window` gives the genes that fall out of the model's window as well.
        """
        return self.ask(questions.tokens(cells, beyond_window=beyond_window))

    def gene_embeddings(self, cells: Sequence[Cell], *, layer: str = LAYER) -> GeneEmbeddingsAnswer:
        """One embedding per gene that the model sees of each cell, in rank order."""
        return self.ask(gene_embeddings_asked(cells, self._bodies, layer=layer))

    def perturbations(
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
        """Each edit tried on each cell, in order.

        `states` are mean embeddings by name and `goal` is one without a name, all of the same layer; `head` is the
        label of a head whose change of class probabilities is wanted; `gene_shifts` names genes whose own shifts are,
        `top_gene_shifts` says how many of those that moved furthest. A question that is too large to be answered at
        once is waited for as a job, where the service takes jobs; `progress` is then called with its cells.
        """
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
        answer = self.ask(jobs.or_job(question))
        if not isinstance(answer, Job):
            return answer
        self.wait_for_job(answer.id, progress=progress)
        whole = io.BytesIO()
        self._download(Download(answer.id, jobs.ANSWER_FILE, whole))
        return questions.perturbations_of(whole.getvalue())

    def classify(self, cells: Sequence[Cell], *, genes: Sequence[str] = ()) -> ClassifyAnswer:
        """What the heads of a fine-tuned model say of cells, or of genes (none named: all genes of the cells)."""
        return self.ask(questions.classify(cells, genes=genes))

    def neighbors(self, cells: Sequence[Cell], *, k: int = 10, columns: Sequence[str] | None = None) -> NeighborsAnswer:
        """The `k` nearest cells of the service's reference for each cell, with labels of `columns` (all when None)."""
        return self.ask(questions.neighbors(cells, k=k, columns=columns))

    def submit_job(self, job: Mapping[str, Any], *, idempotency_key: str | None = None) -> Job:
        """Begin a job, such as `{"kind": "embed", "source": "s3://lake/corpus"}`; returns how it stands.

        The same job under the same `idempotency_key` is begun once, however often it is asked for.
        """
        return self.ask(jobs.asked(job, idempotency_key))

    def job(self, job_id: str) -> Job:
        """A job as it stands."""
        return self.ask(jobs.looked_at(job_id))

    def jobs(self, *, limit: int = 20, before: str | None = None) -> JobsPage:
        """Jobs of this key, the newest first; `before` is `next` of the page before."""
        return self.ask(jobs.listed(limit, before))

    def cancel_job(self, job_id: str) -> Job:
        """Ask for the end of a job; nothing happens to one that is over."""
        return self.ask(jobs.cancelled(job_id))

    def wait_for_job(self, job_id: str, *, timeout_s: float | None = None, progress: OnProgress | None = None) -> Job:
        """The job once it succeeded; raises what it failed with, DeadlineError when it takes longer than `timeout_s`.

        `progress` is called with what is done and all there is, as soon as that is known.
        """
        waiting = jobs.Waiting(job_id, timeout_s, time.monotonic())
        while not (job := self.job(job_id)).over:
            if progress is not None and job.total:
                progress(job.done, job.total)
            self._sleep(waiting.pause_s(time.monotonic()))
        return job.check()

    def job_result(self, job_id: str, to: str | Path, *, file: str = "") -> Path:
        """Write a file of a job's result, the main one without a name, to the local path `to`; returns it."""
        with jobs.whole_file(to) as into:
            self._download(Download(job_id, file, into))
        return Path(to)

    def info(self) -> dict[str, Any]:
        """Model, vocabulary, corpus, choices and limits of the service."""
        return self.ask(questions.info())

    def ready(self) -> bool:
        """Whether the model is loaded, warm and answers; asks once and does not wait."""
        try:
            return self._http.get(READY).status_code == httpx.codes.OK
        except httpx.RequestError:
            return False

    def ask(self, question: Question[Answer]) -> Answer:
        """The answer to a question, tried again while the service is busy or restarting."""
        return self._ask(self._http, question)

    def _ask(self, http: httpx.Client, question: Question[Answer], over: threading.Event = NEVER) -> Answer:
        attempt = 0
        while True:
            attempt += 1
            outcome = self._outcome(http, question)
            where = address_of(http, question)
            wait_s = self._retries.wait_s(outcome, attempt, where=where, jitter=self._jitter)
            if isinstance(outcome, httpx.Response) and wait_s is None:
                return question.read(outcome)
            self._sleep(wait_s or 0.0)
            if over.is_set():
                raise ServiceError("nobody waits for this answer any more.", where=where)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()
        self._storage.close()

    def __enter__(self) -> GenescaleClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _embed(self, source: Source, at_once: int, **options: Any) -> EmbeddedCells:
        run = EmbeddingRun(source, self.info(), bodies=self._bodies, **options)
        run_on_threads(run, functools.partial(self._ask, self._http), at_once)
        return run.result()

    def _download(self, download: Download) -> None:
        while not download.done:
            piece = self._ask(self._http, download.question())
            if piece.link:
                # Storage is asked without the key, which is none of its business.
                piece = self._ask(self._storage, download.behind(piece.link))
            download.take(piece)

    def _outcome(self, http: httpx.Client, question: Question[Answer]) -> Outcome:
        try:
            return http.send(request_of(http, question))
        except httpx.RequestError as error:
            return error
