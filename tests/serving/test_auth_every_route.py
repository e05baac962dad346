"""Every route of the application, asked with no key, a wrong key, a key of each other scope, and the right key."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from genescale.serving.access.keys import ApiKey, digest_of, write_keys
from genescale.serving.access.scopes import (
    ADMIN,
    ANY_KEY,
    SCOPE_BELOW,
    SCOPE_OF_PATH,
    SCOPES,
    is_open,
    scope_needed,
)
from genescale.serving.config import ServingConfig
from genescale.serving.gate import Gate
from genescale.serving.routes import routes

Ask = Callable[..., httpx.Response]


def known_routes() -> Iterator[tuple[str, str]]:
    """Methods and addresses of the application, with a value for each parameter of an address."""
    for route in routes().routes:
        methods, path = getattr(route, "methods", None), getattr(route, "path", None)
        assert path is not None, f"{route!r} is no address that this test can ask"
        # What is mounted whole, without methods of its own, is asked as a browser would.
        for method in sorted(methods or {"GET"}):
            yield method, re.sub(r"\{[^}]*\}", "x", path)


ROUTES = sorted(known_routes())
KEY_OF = {scope: f"gsk_key-of-{scope}-0123456789abcdef" for scope in SCOPES}


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys.toml"
    made = [(scope, key, (scope,), "") for scope, key in KEY_OF.items()]
    made.append(("old", "gsk_an-expired-key-0123456789", (ADMIN,), "2020-01-01T00:00:00+00:00"))
    write_keys(
        path,
        [ApiKey(id=i, sha256=digest_of(k.encode()).hex(), scopes=s, expires=e) for i, k, s, e in made],
    )
    return path


@pytest.fixture
def app(keys_file: Path, build: Callable[..., Gate]) -> Gate:
    """The real routes behind a gate that reads the file of keys."""
    open_gate = build()
    return Gate(open_gate.app, ServingConfig(keys_file=str(keys_file)))


def bearer(key: str) -> dict[str, Any]:
    return {"headers": {"Authorization": f"Bearer {key}"}}


def test_there_are_routes_to_ask_and_each_stands_in_the_table() -> None:
    paths = {path for _, path in ROUTES}
    assert {"/v1/embeddings", "/v1/perturbations", "/v1/classify", "/v1/info", "/docs", "/openapi.json"} <= paths
    for path in paths:
        entered = is_open(path) or path in SCOPE_OF_PATH or any(path.startswith(branch) for branch in SCOPE_BELOW)
        assert entered, f"{path} has no scope: enter it in serving/access/scopes.py"


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_a_route_opens_to_the_right_key_and_to_no_other(ask: Ask, app: Gate, method: str, path: str) -> None:
    def status(**more: Any) -> int:
        return ask(app, method, path, **more).status_code

    if is_open(path):
        assert {status(), status(**bearer("gsk_wrong-0123456789abcdef"))} == {200}
        return
    for refused in ({}, *map(bearer, ("", "gsk_wrong-0123456789abcdef", "gsk_an-expired-key-0123456789"))):
        response = ask(app, method, path, **refused)
        assert response.status_code == 401
        assert response.headers["www-authenticate"].startswith("Bearer")
        assert method == "HEAD" or response.json()["error"]["code"] == "unauthorized"
    needed = scope_needed(path)
    opened = {scope for scope, key in KEY_OF.items() if status(**bearer(key)) not in (401, 403)}
    assert opened == (set(SCOPES) if needed == ANY_KEY else {needed, ADMIN})


@pytest.mark.parametrize("path", ["/v1/nothing", "/assets", "/v1/embeddings/", "/v1/infox", "//v1/info", "/v1/jobsx"])
def test_an_address_that_nobody_entered_is_open_to_administrators_only(ask: Ask, app: Gate, path: str) -> None:
    assert ask(app, "GET", path).status_code == 401
    response = ask(app, "GET", path, **bearer(KEY_OF["embed"]))
    assert (response.status_code, response.json()["error"]["code"]) == (403, "forbidden")
    assert ask(app, "GET", path, **bearer(KEY_OF[ADMIN])).status_code == 404


def test_a_prefix_that_the_application_is_mounted_at_changes_no_scope(app: Gate) -> None:
    async def status(path: str, root: str) -> int:
        answers: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": b""}

        async def send(message: Any) -> None:
            answers.append(message)

        key = [(b"authorization", f"Bearer {KEY_OF['embed']}".encode())]
        scope = {"type": "http", "method": "POST", "path": path, "root_path": root, "headers": key}
        await app(scope, receive, send)
        return int(answers[0]["status"])

    import asyncio

    assert asyncio.run(status("/gs/v1/embeddings", "/gs")) != 403
    assert asyncio.run(status("/gs/v1/perturbations", "/gs")) == 403
    assert asyncio.run(status("/gsx/v1/embeddings", "/gs")) == 403
