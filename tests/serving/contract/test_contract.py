"""The contract, asked by a machine that knows nothing but the OpenAPI document.

Schemathesis makes questions that fit the document, and questions that do not. None may end in a fault of ours, in a
status or a body that the document does not name, and what does not fit must be refused.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings

from genescale.serving.access.scopes import OPEN_PATHS
from tests.serving.client_wire import Wire
from tests.serving.contract.known_names import make_answerable

if TYPE_CHECKING:
    import asyncio

    from genescale.serving.gate import Gate

ROOT = Path(__file__).resolve().parents[3]
DOCUMENT = ROOT / "docs" / "openapi.json"
ADDRESS = "http://127.0.0.1"
KEY = "a-service-key-0123456789abcdef"
# Of questions, in each of both modes, and of everything else.
N_EXAMPLES, N_OTHERS = 4, 1
# Questions whose generated forms the tiny model must be able to answer, or the test would only see refusals.
ANSWERED = {
    "POST /v1/embeddings",
    "POST /v1/perturbations",
    "POST /v1/classify",
    "POST /v1/neighbors",
    "POST /v1/tokens",
}


@pytest.fixture
def line(complete: Callable[..., Gate], loop: asyncio.AbstractEventLoop) -> Iterator[httpx.Client]:
    with httpx.Client(transport=Wire(complete(max_cells=8, max_edits=8), loop)) as client:
        yield client


def test_generated_questions_are_answered_as_the_document_says(line: httpx.Client) -> None:
    from schemathesis import GenerationMode, openapi

    document = json.loads(DOCUMENT.read_text(encoding="utf-8"))
    seen: dict[str, Counter[int]] = {}
    for found in openapi.from_dict(document).get_all_operations():
        operation = found.ok()
        for mode in GenerationMode:
            statuses = seen.setdefault(operation.label, Counter())
            n = N_EXAMPLES if operation.label in ANSWERED else N_OTHERS
            # A probe takes any header, so nothing that is sent to it is wrong.
            if mode == GenerationMode.POSITIVE or operation.path not in OPEN_PATHS:
                ask_generated(line, operation.as_strategy(generation_mode=mode), statuses, n)
    assert seen.keys() == {
        f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods
    }
    for label in ANSWERED:
        assert seen[label][200] >= 2, f"{label}: {seen[label]}"
        assert sum(seen[label].values()) >= 2 * N_EXAMPLES


def ask_generated(line: httpx.Client, strategy: Any, statuses: Counter[int], n: int) -> None:
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    @settings(
        max_examples=n,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def ask(case: Any) -> None:
        make_answerable(case)
        response = sent(line, case)
        statuses[response.status_code] += 1
        # A gene that no vocabulary has, or a state of another width, fits the schema and is refused all the same.
        case.validate_response(response, excluded_checks=[positive_data_acceptance])
        assert response.status_code < 500, response.text

    ask()


def sent(line: httpx.Client, case: Any) -> httpx.Response:
    """The answer to one generated question."""
    import requests

    given = case.as_transport_kwargs(base_url=ADDRESS)
    names = ("method", "url", "headers", "params", "cookies", "json", "data", "files")
    made = requests.Request(**{name: given[name] for name in names if name in given}).prepare()
    response = line.request(made.method or "", made.url or "", headers=dict(made.headers), content=made.body)
    response.elapsed = timedelta(0)
    return response
