"""/metrics of one HTTP process: what is counted, under which labels, and that labels stay few."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from genescale.platform.errors import GenescaleError, ServiceError
from genescale.serving.access.keys import ApiKey, digest_of, write_keys
from genescale.serving.access.room import Room
from genescale.serving.config import ServingConfig
from genescale.serving.gate import Gate
from genescale.serving.in_process import InProcessModel
from genescale.serving.watching.http_numbers import MOST_KEYS, OTHER, HttpNumbers
from genescale.serving.watching.noted import Noted

Ask = Callable[..., httpx.Response]
DrawCell = Callable[[int, int], dict[str, float]]
Build = Callable[..., Gate]
Samples = dict[str, list[tuple[dict[str, str], float]]]
EMBED = "/v1/embeddings"


def parsed(text: str) -> Samples:
    """Samples of an exposition by name; a name that is declared twice is an error of the page."""
    found: Samples = {}
    names: list[str] = []
    for family in text_string_to_metric_families(text):
        names.append(family.name)
        for one in family.samples:
            found.setdefault(one.name, []).append((one.labels, one.value))
    assert len(names) == len(set(names))
    return found


def scraped(ask: Ask, app: Gate, **more: Any) -> Samples:
    response = ask(app, "GET", "/metrics", **more)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/plain; version=")
    return parsed(response.text)


def total(samples: Samples, name: str, **labels: str) -> float:
    return sum(value for given, value in samples.get(name, ()) if labels.items() <= given.items())


def test_questions_are_counted_by_route_answer_and_model_version(ask: Ask, app: Gate, draw_cell: DrawCell) -> None:
    cells = [{"counts": draw_cell(seed, 20)} for seed in range(3)]
    for _ in range(2):
        assert ask(app, "POST", EMBED, json={"cells": cells}).status_code == 200
    assert ask(app, "POST", EMBED, json={"cells": [{"counts": {"NOGENE": 1}}]}).status_code == 422
    samples = scraped(ask, app)
    answered = {"route": EMBED, "method": "POST", "model": "tiny", "version": "3"}
    assert total(samples, "genescale_requests_total", code="200", **answered) == 2
    assert total(samples, "genescale_requests_total", code="422", **answered) == 1
    assert total(samples, "genescale_request_cells_sum", route=EMBED) == 6
    assert total(samples, "genescale_request_cells_count", route=EMBED) == 2
    assert total(samples, "genescale_tokens_total", route=EMBED, model="tiny", version="3") == 2 * 3 * 22
    assert total(samples, "genescale_request_seconds_count", route=EMBED, outcome="answered") == 2
    assert total(samples, "genescale_request_seconds_count", route=EMBED, outcome="mistaken") == 1
    assert total(samples, "genescale_refusals_total", route=EMBED, reason="invalid_input") == 1
    for phase in ("parse", "queue", "forward"):
        assert total(samples, "genescale_request_phase_seconds_count", route=EMBED, phase=phase) == 2
    assert total(samples, "genescale_request_phase_seconds_count", route=EMBED, phase="body") == 3
    assert total(samples, "genescale_response_bytes_total", route=EMBED) > 3 * 16
    assert total(samples, "genescale_model_share", model="tiny", version="3") == 1
    assert total(samples, "genescale_ready") == 1


def test_whole_requests_take_at_least_as_long_as_their_phases(ask: Ask, app: Gate, draw_cell: DrawCell) -> None:
    ask(app, "POST", EMBED, json={"cells": [{"counts": draw_cell(1, 40)}]})
    samples = scraped(ask, app)
    phases = total(samples, "genescale_request_phase_seconds_sum", route=EMBED)
    assert 0 < phases <= total(samples, "genescale_request_seconds_sum", route=EMBED) + 1e-3


@pytest.mark.parametrize("path", ["/v1/nothing", "/v1/embeddings/x", "/%00", "/v1/models/../../etc", "/" + "a" * 3000])
def test_an_address_that_is_no_route_is_never_a_label(ask: Ask, app: Gate, path: str) -> None:
    ask(app, "POST", path)
    routes = {labels["route"] for labels, _ in scraped(ask, app)["genescale_requests_total"]}
    assert routes == {"unmatched"}


def test_an_address_with_a_name_in_it_is_counted_by_its_template(ask: Ask, app: Gate) -> None:
    for name in ("tiny", "other", "x" * 50):
        ask(app, "GET", f"/v1/models/{name}")
    routes = {labels["route"] for labels, _ in scraped(ask, app)["genescale_requests_total"]}
    assert routes == {"/v1/models/{name}"}


def test_an_unknown_method_is_one_label(ask: Ask, app: Gate) -> None:
    for method in ("BREW", "WHEN", "POST"):
        ask(app, method, EMBED)
    methods = {labels["method"] for labels, _ in scraped(ask, app)["genescale_requests_total"]}
    assert methods == {OTHER, "POST"}


class Gone:
    """A model whose replica died."""

    async def ping(self) -> None:
        raise ServiceError("the model's replica went away.")

    async def embed(self, *_: Any) -> Any:
        raise ServiceError("the model's replica went away.")


class Broken(Gone):
    """A model with a fault that nobody thought of."""

    async def embed(self, *_: Any) -> Any:
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("model", "code", "reason"), [(Gone(), "503", "service"), (Broken(), "500", GenescaleError.code)]
)
def test_failures_are_failures_and_the_process_is_not_ready(
    ask: Ask, build: Build, draw_cell: DrawCell, model: Any, code: str, reason: str
) -> None:
    app = build(model=model)
    ask(app, "POST", EMBED, json={"cells": [{"counts": draw_cell(1, 9)}]})
    samples = scraped(ask, app)
    assert total(samples, "genescale_requests_total", route=EMBED, code=code, version="3") == 1
    assert total(samples, "genescale_refusals_total", route=EMBED, reason=reason) == 1
    assert total(samples, "genescale_request_seconds_count", route=EMBED, outcome="failed") == 1
    assert total(samples, "genescale_ready") == 0


def test_draining_is_told_and_its_refusals_are_no_failures(ask: Ask, app: Gate) -> None:
    app.drain()
    assert ask(app, "POST", EMBED, json={"cells": []}).status_code == 503
    samples = scraped(ask, app)
    assert total(samples, "genescale_draining") == 1
    assert total(samples, "genescale_ready") == 0
    assert total(samples, "genescale_refusals_total", route=EMBED, reason="draining") == 1
    assert total(samples, "genescale_request_seconds_count", route=EMBED, outcome="refused") == 1


def test_keys_are_counted_by_their_id_and_never_by_what_they_are(
    ask: Ask, build: Build, draw_cell: DrawCell, tmp_path: Path
) -> None:
    key, asking = "gsk_a-key-0123456789abcdef", {"cells": [{"counts": draw_cell(1, 9)}]}
    write_keys(
        tmp_path / "keys.toml",
        [ApiKey(id="web", sha256=digest_of(key.encode()).hex(), scopes=("embed", "metrics"), requests_per_minute=3)],
    )
    gate = build()
    gate.config, gate.ring = ServingConfig(), Gate(gate.app, ServingConfig(keys_file=str(tmp_path / "keys.toml"))).ring
    headers = {"Authorization": f"Bearer {key}"}
    assert [ask(gate, "POST", EMBED, json=asking, headers=headers).status_code for _ in range(3)] == [200] * 3
    assert ask(gate, "POST", EMBED, json=asking, headers=headers).status_code == 429
    wrong = {"Authorization": "Bearer gsk_wrong-0123456789"}
    assert ask(gate, "POST", EMBED, json=asking, headers=wrong).status_code == 401
    text = _own_page(gate).decode()
    samples = parsed(text)
    assert total(samples, "genescale_key_requests_total", key="web") == 4
    assert total(samples, "genescale_key_tokens_total", key="web") == 3 * 11
    assert total(samples, "genescale_key_refusals_total", key="web", reason="rate_limited") == 1
    assert total(samples, "genescale_refusals_total", reason="unauthorized") == 1
    assert {labels["key"] for labels, _ in samples["genescale_key_requests_total"]} == {"web"}
    assert key not in text
    assert "gsk_wrong" not in text


def _own_page(gate: Gate) -> bytes:
    from genescale.serving.watching.reports import page

    return page([gate.numbers.report()])[0]


def test_more_keys_than_can_be_labels_share_one() -> None:
    numbers = HttpNumbers(object(), Room(1, 1, retry_after_s=1), {})
    for at in range(MOST_KEYS + 7):
        numbers.ended({"path": "/x", "method": "GET", "key_id": f"key-{at}"}, Noted(), 200, 0.1, question=False)
    labels = numbers.registry.get_sample_value("genescale_key_requests_total", {"key": OTHER})
    assert labels == 7


def test_a_caller_who_leaves_is_counted_as_gone() -> None:
    async def wait(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.Event().wait()

    async def talk() -> HttpNumbers:
        gate = Gate(wait, ServingConfig())
        arriving = iter([{"type": "http.request", "body": b"", "more_body": False}, {"type": "http.disconnect"}])

        async def receive() -> Any:
            return next(arriving)

        async def send(message: Any) -> None:
            raise AssertionError("nobody is there to be answered")

        await gate({"type": "http", "method": "POST", "path": "/x", "headers": []}, receive, send)
        return gate.numbers

    numbers = asyncio.run(talk())
    labels = {"route": "unmatched", "method": "POST", "code": "499", "model": "", "version": ""}
    assert numbers.registry.get_sample_value("genescale_requests_total", labels) == 1
    assert numbers.report().totals.gone == 1


def test_places_stages_and_bodies_are_told_while_a_question_is_answered(
    ask: Ask, build: Build, draw_cell: DrawCell
) -> None:
    seen: Mapping[str, Any] = {}

    class Looking(InProcessModel):
        def __init__(self) -> None:
            pass

        async def ping(self) -> None:
            pass

        async def embed(self, *_: Any) -> Any:
            nonlocal seen
            seen = parsed(_own_page(app).decode())
            raise ServiceError("enough was seen.")

    app = build(model=Looking())
    ask(app, "POST", EMBED, json={"cells": [{"counts": draw_cell(1, 9)}]})
    assert total(dict(seen), "genescale_requests_admitted") == 1
    assert total(dict(seen), "genescale_requests_in_stage", stage="reading") == 1
    assert total(dict(seen), "genescale_held_bytes") > 50
    after = scraped(ask, app)
    assert total(after, "genescale_requests_admitted") == 0
    assert total(after, "genescale_held_bytes") == 0


def test_a_scraper_that_prefers_open_metrics_gets_them(ask: Ask, app: Gate) -> None:
    response = ask(app, "GET", "/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    assert response.text.endswith("# EOF\n")
