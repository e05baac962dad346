"""The client that waits for each answer."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import httpx

from genescale.client import questions
from genescale.client.arrow_bodies import Bodies, check_bodies, embeddings_asked, gene_embeddings_asked
from genescale.client.cells import Cell, Vector
from genescale.client.connection import READY, Connection, address_of, request_of, secret
from genescale.client.objects import OBSM_KEY, check_writable, write_embeddings
from genescale.client.questions import LAYER, POOLING, Answer, Edit, Question
from genescale.client.records import (
    ClassifyAnswer,
    EmbeddedCells,
    EmbeddingsAnswer,
    GeneEmbeddingsAnswer,
    NeighborsAnswer,
    PerturbationsAnswer,
)
from genescale.client.retries import Outcome, Retries
from genescale.client.runs import EmbeddingRun, OnProgress, Unusable
from genescale.client.sources import ListedCells, ObjectCells, Source
from genescale.client.together import AT_ONCE, run_on_threads
from genescale.platform.settings import Secret


class GenescaleClient:
    """Questions to one service; may be used from several threads.

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
        timeout_s: float = 90.0,
        attempts: int = Retries.attempts,
        bodies: Bodies = "auto",
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        connection = Connection(base_url=base_url, api_key=secret(api_key), timeout_s=timeout_s)
        self._http = httpx.Client(**connection.options(), transport=transport)
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
    ) -> PerturbationsAnswer:
        """Each edit tried on each cell, in order.

        `states` are mean embeddings by name and `goal` is one without a name, all of the same layer; `head` is the
        label of a head whose change of class probabilities is wanted; `gene_shifts` names genes whose own shifts are,
        `top_gene_shifts` says how many of those that moved furthest.
        """
        return self.ask(
            questions.perturbations(
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
        )

    def classify(self, cells: Sequence[Cell], *, genes: Sequence[str] = ()) -> ClassifyAnswer:
        """What the heads of a fine-tuned model say of cells, or of genes (none named: all genes of the cells)."""
        return self.ask(questions.classify(cells, genes=genes))

    def neighbors(self, cells: Sequence[Cell], *, k: int = 10, columns: Sequence[str] | None = None) -> NeighborsAnswer:
        """The `k` nearest cells of the service's reference for each cell, with labels of `columns` (all when None)."""
        return self.ask(questions.neighbors(cells, k=k, columns=columns))

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
        attempt = 0
        while True:
            attempt += 1
            outcome = self._outcome(question)
            where = address_of(self._http, question)
            wait_s = self._retries.wait_s(outcome, attempt, where=where, jitter=self._jitter)
            if isinstance(outcome, httpx.Response) and wait_s is None:
                return question.read(outcome)
            self._sleep(wait_s or 0.0)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> GenescaleClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _embed(self, source: Source, at_once: int, **options: Any) -> EmbeddedCells:
        run = EmbeddingRun(source, self.info(), bodies=self._bodies, **options)
        run_on_threads(run, self.ask, at_once)
        return run.result()

    def _outcome(self, question: Question[Answer]) -> Outcome:
        try:
            return self._http.send(request_of(self._http, question))
        except httpx.RequestError as error:
            return error
