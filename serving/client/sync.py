"""A small typed client of the service. Needs httpx and numpy; no torch, no Ray.

    with GenescaleClient("http://127.0.0.1:8000", api_key=key) as client:
        answer = client.embeddings([{"counts": {"GATA4": 3, "TTN": 41}}])
        print(answer.embeddings.shape, answer.model.version)

Every question is a pure function of its input, so the client repeats a question that met a busy or restarting service.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import httpx
import numpy as np

from genescale.platform.errors import (
    DeadlineError,
    GenescaleError,
    InputError,
    LimitError,
    OverloadedError,
    ServiceError,
    UnauthorizedError,
)
from genescale.platform.settings import Secret
from genescale.serving.client_answers import (
    CellReport as CellReport,
)
from genescale.serving.client_answers import (
    ClassifiedCell as ClassifiedCell,
)
from genescale.serving.client_answers import (
    ClassifiedGene as ClassifiedGene,
)
from genescale.serving.client_answers import (
    ClassifyAnswer as ClassifyAnswer,
)
from genescale.serving.client_answers import (
    EditResult as EditResult,
)
from genescale.serving.client_answers import (
    EmbeddingsAnswer as EmbeddingsAnswer,
)
from genescale.serving.client_answers import (
    GeneShift as GeneShift,
)
from genescale.serving.client_answers import (
    HeadAnswer as HeadAnswer,
)
from genescale.serving.client_answers import (
    Model as Model,
)
from genescale.serving.client_answers import (
    PerturbationsAnswer as PerturbationsAnswer,
)
from genescale.serving.client_answers import (
    PerturbedCell as PerturbedCell,
)
from genescale.serving.client_answers import (
    Timings as Timings,
)
from genescale.serving.client_answers import (
    edit_of,
    model_of,
    report_of,
)

Cell = Mapping[str, Any]
"""`{"counts": {gene: count}}` or `{"tokens": [...]}`, and `"id"` if wanted; or just `{gene: count}`."""
Edit = Mapping[str, Any]
"""`{"kind": "delete" | "overexpress", "genes": [...]}`, and `"refill": True` if wanted."""

# Busy, restarting, or cut off: the same question may be answered in a moment. A late answer (504) would be late again.
TRY_AGAIN = frozenset({429, 502, 503})
FIRST_WAIT_S, LONGEST_WAIT_S = 0.25, 8.0
STATUS_CLASSES: dict[int, type[GenescaleError]] = {
    401: UnauthorizedError,
    408: DeadlineError,
    413: LimitError,
    429: OverloadedError,
    503: OverloadedError,
    504: DeadlineError,
}


class GenescaleClient:
    """Questions to one service.

    `timeout_s` bounds one attempt; `attempts` counts tries of a question that met a busy or restarting service. Raises
    the classes of `genescale.platform.errors` that the service named, ServiceError when it cannot be reached.
    `transport` and `sleep` are for tests.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | Secret | None = None,
        *,
        timeout_s: float = 90.0,
        attempts: int = 4,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        key = api_key.reveal() if isinstance(api_key, Secret) else api_key
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=base_url, headers=headers, timeout=timeout_s, transport=transport)
        self._attempts, self._sleep = max(1, attempts), sleep
        # Jitter spreads callers that were refused at the same moment; nothing that should repeat depends on it.
        self._jitter = random.Random()

    def embeddings(
        self, cells: Sequence[Cell], *, layer: str = "second_to_last", pooling: str = "mean_genes"
    ) -> EmbeddingsAnswer:
        """One embedding per cell, in order."""
        body = {"cells": [_cell(cell) for cell in cells], "layer": layer, "pooling": pooling}
        answer = self._ask("POST", "/v1/embeddings", body)
        return EmbeddingsAnswer(
            embeddings=np.asarray([cell["embedding"] for cell in answer["cells"]], dtype=np.float64).astype(np.float32),
            cells=tuple(report_of(cell) for cell in answer["cells"]),
            model=model_of(answer["provenance"]),
            timings_ms=Timings(**answer["timings_ms"]),
        )

    def perturbations(
        self,
        cells: Sequence[Cell],
        edits: Sequence[Edit],
        *,
        layer: str = "second_to_last",
        measure: str = "remaining_genes",
        goal: Sequence[float] | np.ndarray | None = None,
        gene_shifts: Sequence[str] = (),
    ) -> PerturbationsAnswer:
        """Each edit tried on each cell, in order."""
        body: dict[str, Any] = {
            "cells": [_cell(cell) for cell in cells],
            "edits": [dict(edit) for edit in edits],
            "layer": layer,
            "measure": measure,
            "gene_shifts": list(gene_shifts),
        }
        if goal is not None:
            body["goal"] = np.asarray(goal, dtype=np.float64).tolist()
        answer = self._ask("POST", "/v1/perturbations", body)
        return PerturbationsAnswer(
            cells=tuple(
                PerturbedCell(report=report_of(cell), edits=tuple(edit_of(edit) for edit in cell["edits"]))
                for cell in answer["cells"]
            ),
            model=model_of(answer["provenance"]),
            timings_ms=Timings(**answer["timings_ms"]),
        )

    def classify(self, cells: Sequence[Cell], *, genes: Sequence[str] = ()) -> ClassifyAnswer:
        """What the heads of a fine-tuned model say of cells, or of genes (none named: all genes of the cells)."""
        answer = self._ask("POST", "/v1/classify", {"cells": [_cell(cell) for cell in cells], "genes": list(genes)})
        return ClassifyAnswer(
            cells=tuple(
                ClassifiedCell(report=report_of(cell), heads=tuple(HeadAnswer(**head) for head in cell["heads"]))
                for cell in answer["cells"]
            ),
            genes=tuple(ClassifiedGene(**gene) for gene in answer["genes"]),
            model=model_of(answer["provenance"]),
            timings_ms=Timings(**answer["timings_ms"]),
        )

    def info(self) -> dict[str, Any]:
        """Model, vocabulary, corpus, choices and limits of the service."""
        return self._ask("GET", "/v1/info")

    def ready(self) -> bool:
        """Whether the model is loaded, warm and answers; asks once and does not wait."""
        try:
            return self._http.get("/readyz").status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> GenescaleClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        for attempt in range(1, self._attempts + 1):
            last = attempt == self._attempts
            try:
                response = self._http.request(method, path, json=body)
            except httpx.TimeoutException as error:
                raise DeadlineError(
                    "the service did not answer in time.", where=path, fix="Ask for less, or allow a longer timeout_s."
                ) from error
            except httpx.TransportError as error:
                if last:
                    raise ServiceError(
                        f"the service cannot be reached: {error}.", where=str(self._http.base_url), fix="Is it running?"
                    ) from error
                self._sleep(self._wait_s(attempt, asked_s=0.0))
                continue
            if response.is_success:
                return _object(response)
            if last or not _worth_another_try(response):
                raise error_of(response)
            self._sleep(self._wait_s(attempt, asked_s=_retry_after_s(response)))
        raise AssertionError("unreachable: the last attempt returns or raises. This is a bug.")

    def _wait_s(self, attempt: int, *, asked_s: float) -> float:
        backoff_s = FIRST_WAIT_S * 2 ** (attempt - 1) * self._jitter.uniform(0.5, 1.0)
        return min(LONGEST_WAIT_S, max(asked_s, backoff_s))


def error_of(response: httpx.Response) -> GenescaleError:
    """The error that a response stands for, as the class its code names."""
    facts = _error_facts(response)
    if facts is None:
        kind = STATUS_CLASSES.get(response.status_code, ServiceError if response.status_code >= 500 else InputError)
        return kind(f"the service answered {response.status_code}.", where=response.url.path)
    kind = _classes().get(str(facts.get("code")), ServiceError)
    where = (facts.get("details") or {}).get("where", "")
    return kind(str(facts.get("message")), where=str(where), fix=f"(request {facts.get('request_id')})")


def _error_facts(response: httpx.Response) -> Mapping[str, Any] | None:
    """The typed body of an error; None for answers of a proxy or of a replica that died."""
    try:
        facts = response.json()["error"]
    except (ValueError, KeyError, TypeError):
        return None
    return facts if isinstance(facts, dict) else None


def _worth_another_try(response: httpx.Response) -> bool:
    # A 500 without our shape comes from a proxy whose replica died in mid answer; ours would be a fault again.
    died = response.status_code == httpx.codes.INTERNAL_SERVER_ERROR and _error_facts(response) is None
    return response.status_code in TRY_AGAIN or died


def _retry_after_s(response: httpx.Response) -> float:
    given = response.headers.get("retry-after", "")
    return float(given) if given.isascii() and given.isdigit() and len(given) < 6 else 0.0


def _classes() -> dict[str, type[GenescaleError]]:
    found: dict[str, type[GenescaleError]] = {}
    waiting: list[type[GenescaleError]] = [GenescaleError]
    while waiting:
        kind = waiting.pop()
        found[kind.code] = kind
        waiting += kind.__subclasses__()
    return found


def _object(response: httpx.Response) -> dict[str, Any]:
    try:
        answer = response.json()
    except ValueError as error:
        raise ServiceError("the service answered something that is not JSON.", where=response.url.path) from error
    if not isinstance(answer, dict):
        raise ServiceError("the service answered something unexpected.", where=response.url.path)
    return answer


def _cell(cell: Cell) -> dict[str, Any]:
    if "counts" in cell or "tokens" in cell:
        return {key: _plain(value) for key, value in cell.items()}
    return {"counts": _plain(cell)}


def _plain(value: Any) -> Any:
    """NumPy numbers and arrays as JSON can carry them."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    return value
