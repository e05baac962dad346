"""`genescale serve rollout`: what it asks, and how it follows what becomes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from genescale.client import GenescaleClient
from genescale.platform.errors import ConflictError, InputError, ServiceError, SettingsError
from genescale.serving.models import rollout_command
from genescale.serving.models.rollout_command import rollout

KEY = "an-admin-key-0123456789abcdef"


class Service:
    """Answers as a service whose rollout goes through these states."""

    def __init__(self, *told: dict[str, Any], refused: int = 0) -> None:
        self.told, self.refused = [{**STARTED, **one} for one in told], refused
        self.asked: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        if request.method == "POST" and self.refused:
            error = {"code": "conflict", "message": "another rollout is under way.", "request_id": "r"}
            return httpx.Response(self.refused, json={"error": error})
        if request.method == "POST":
            return httpx.Response(202, json={"model": "encoder", "rollout": {**STARTED}})
        now = self.told.pop(0) if len(self.told) > 1 else self.told[0]
        return httpx.Response(200, json={"name": "encoder", "rollout": now})

    @property
    def body(self) -> Any:
        return json.loads(next(one for one in self.asked if one.method == "POST").content)


STARTED = {"id": "a", "asked": "@production", "state": "running", "step": "resolve", "message": ""}
DONE = {"state": "succeeded", "step": "done", "message": "version 2 answers every request."}


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Callable[[Service], None]:
    """Let the command talk to a pretended service, without waiting in between."""

    def use(service: Service) -> None:
        def client(url: str, key: str | None) -> GenescaleClient:
            return GenescaleClient(url, key, attempts=1, transport=httpx.MockTransport(service))

        monkeypatch.setattr(rollout_command, "GenescaleClient", client)
        monkeypatch.setattr(rollout_command, "ASK_EVERY_S", 0.0)

    return use


@pytest.mark.parametrize(
    ("arguments", "body"),
    [
        (["encoder@production"], {"alias": "production"}),
        (["encoder/12"], {"version": "12"}),
        (["encoder/12", "--canary", "0.05"], {"version": "12", "canary": 0.05}),
        (["encoder@production", "--accept-losses"], {"alias": "production", "accept_losses": True}),
        (["encoder", "--back"], {"back": True}),
        (["encoder@production", "--back"], {"back": True}),
    ],
)
def test_it_asks_for_what_was_written(
    served: Callable[[Service], None], capsys: pytest.CaptureFixture[str], arguments: list[str], body: dict[str, Any]
) -> None:
    service = Service({"step": "load"}, {"step": "load"}, DONE)
    served(service)
    assert rollout([*arguments, "--url", "http://service"]) == 0
    assert service.asked[0].url.path == "/v1/models/encoder/rollout"
    assert service.body == body
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "looking the version up …",
        "loading it beside the running one …",
        "encoder: version 2 answers every request.",
    ]


def test_a_key_comes_from_the_environment(
    served: Callable[[Service], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    service = Service(DONE)
    served(service)
    monkeypatch.setenv("KEYS", f" {KEY},another-key-0123456789")
    rollout(["encoder@production", "--api-key-env", "KEYS"])
    assert {one.headers["authorization"] for one in service.asked} == {f"Bearer {KEY}"}
    assert KEY not in "".join(capsys.readouterr())
    monkeypatch.setenv("KEYS", " ")
    with pytest.raises(SettingsError, match="KEYS"):
        rollout(["encoder@production", "--api-key-env", "KEYS"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["encoder"], "which version"),
        (["encoder@"], "no model and version"),
        (["s3://bucket/model"], "no model and version"),
        (["encoder/latest"], "no model and version"),
        (["encoder@x", "--canary", "1"], "share"),
        (["encoder", "--back", "--canary", "0.5"], "no --canary"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_asked(
    served: Callable[[Service], None], arguments: list[str], said: str
) -> None:
    service = Service(DONE)
    served(service)
    with pytest.raises(SettingsError, match=said):
        rollout(arguments)
    assert service.asked == []


def test_a_rollout_that_failed_is_an_error_that_says_why(served: Callable[[Service], None]) -> None:
    served(Service({"state": "failed", "step": "load", "message": "no room."}))
    with pytest.raises(ServiceError, match=r"step load.*nothing changed: no room\."):
        rollout(["encoder@production"])


def test_a_question_whose_answer_was_cut_off_follows_what_it_began(served: Callable[[Service], None]) -> None:
    served(Service({}, DONE, refused=409))
    assert rollout(["encoder@production"]) == 0
    served(Service({"asked": "@staging"}, DONE, refused=409))
    with pytest.raises(ConflictError, match="under way"):
        rollout(["encoder@production"])


def test_another_rollout_is_not_taken_for_this_one(served: Callable[[Service], None]) -> None:
    served(Service({**DONE, "id": "b"}))
    with pytest.raises(ServiceError, match="no more of this rollout"):
        rollout(["encoder@production"])


def test_a_refusal_is_told_as_the_service_means_it(served: Callable[[Service], None]) -> None:
    class Refusing(Service):
        def __call__(self, request: httpx.Request) -> httpx.Response:
            error = {"code": "invalid_input", "message": "no version before 1.", "request_id": "r"}
            return httpx.Response(422, json={"error": error})

    served(Refusing(DONE))
    with pytest.raises(InputError, match="no version before 1"):
        rollout(["encoder", "--back"])
