"""Several models behind one address, in this process: who answers what, and how a rollout is asked for."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pyarrow as pa
import pytest

from genescale.client import GenescaleClient
from genescale.platform.errors import ConflictError, IntegrityError
from genescale.platform.vocabulary import Vocabulary
from genescale.serving.answering.answers import Answers
from genescale.serving.config import Limits, ServingConfig
from genescale.serving.facts import describe
from genescale.serving.forms.media import ARROW_TYPE
from genescale.serving.gate import Gate
from genescale.serving.in_process import InProcessModel
from genescale.serving.models.fleet import begun
from genescale.serving.models.rollout import Wanted
from genescale.serving.models.state import initial_state
from genescale.serving.models.versions import Version, Versions
from genescale.serving.release import Release
from genescale.serving.routes import http_application, openapi_document
from genescale.serving.services import Services
from tests.serving.client_wire import Wire
from tests.serving.conftest import gene_id, write_tiny_bundle

if TYPE_CHECKING:
    from genescale.platform.bundle import Bundle

Ask = Callable[..., httpx.Response]
Bundles = Mapping[str, "Bundle"]
CELLS = {"cells": [{"counts": {"GENE1": 3, "GENE40": 4, "GENE130": 1}}]}


class Desk:
    """The models of one process: `small` and two versions of `encoder`, of which the second knows more genes."""

    def __init__(self, bundles: Bundles) -> None:
        self.bundles = bundles
        self.releases = {key: release(key, bundle) for key, bundle in bundles.items()}
        self.unreadable: set[str] = set()
        self.begun: list[Wanted] = []
        state = initial_state({"encoder": self.releases["encoder/1"], "small": self.releases["small/1"]})
        self.versions = Versions(state, self._make)

    def _make(self, release: Release) -> Version:
        from genescale.training.embedder import Embedder

        if release.digest in self.unreadable:
            raise IntegrityError("the bytes are wrong.")
        bundle = self.bundles[f"{release.name}/{release.version}"]
        config = ServingConfig(limits=Limits())
        model = InProcessModel(Embedder.load(bundle, device="cpu"))
        info = describe(release, bundle, config)
        return Version(release=release, answers=Answers(model, bundle.vocabulary, info, config.limits))

    async def held(self) -> list[dict[str, int]]:
        return [{one.digest: 7 for one in self.releases.values()}, {self.releases["encoder/1"].digest: 7}]

    async def rollout(self, name: str) -> dict[str, Any] | None:
        return begun("an-id", self.begun[-1]) if self.begun and self.begun[-1].name == name else None

    async def begin(self, wanted: Wanted) -> dict[str, Any]:
        if self.begun:
            raise ConflictError("another rollout is under way.", where="rollout", fix="Wait until it has ended.")
        self.begun.append(wanted)
        return begun("an-id", wanted)

    def now(self, change: Callable[..., Any], *arguments: Any) -> None:
        state = self.versions.state
        self.versions.adopt(state.changed(change(state.default, *arguments)))


def vocabulary(n: int) -> Vocabulary:
    medians = np.random.default_rng(n).gamma(2.0, 1.0, n) + 0.1
    return Vocabulary.build(
        [gene_id(i) for i in range(n)], medians, symbols=[f"GENE{i}" for i in range(n)], window=48, name=f"of-{n}"
    )


def release(key: str, bundle: Bundle) -> Release:
    name, _, version = key.partition("/")
    alias = "production" if version == "1" else ""
    return Release(name=name, version=version, digest=bundle.digest, address=f"models:/{key}", folder="", alias=alias)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    folder = tmp_path_factory.mktemp("models")
    return {
        "encoder/1": write_tiny_bundle(folder / "one", vocabulary(120), seed=1),
        "encoder/2": write_tiny_bundle(folder / "two", vocabulary(140), seed=2),
        "small/1": write_tiny_bundle(folder / "small", vocabulary(60), seed=3),
    }


@pytest.fixture
def desk(bundles: Bundles) -> Desk:
    return Desk(bundles)


@pytest.fixture
def app(desk: Desk) -> Gate:
    services = Services(answers=desk.versions.default.answers, models=desk)
    return http_application(services, ServingConfig())


def version_of(response: httpx.Response) -> tuple[str, str]:
    assert response.status_code == 200, response.text
    model = response.json()["provenance"]["model"]
    return model["name"], model["version"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", CELLS),
        ("/v1/tokens", CELLS),
        ("/v1/perturbations", {**CELLS, "edits": [{"kind": "delete", "genes": ["GENE1"]}]}),
    ],
)
def test_a_question_names_its_model_and_else_the_first_answers(ask: Ask, app: Gate, path: str, body: Any) -> None:
    assert version_of(ask(app, "POST", path, json=body)) == ("encoder", "1")
    assert version_of(ask(app, "POST", f"{path}?model=encoder", json=body)) == ("encoder", "1")
    answer = ask(app, "POST", f"{path}?model=small", json=body)
    assert version_of(answer) == ("small", "1")
    # Each model has its own genes.
    assert answer.json()["cells"][0]["ignored"]["unknown"] == 1
    assert answer.json()["provenance"]["vocabulary"]["name"] == "of-60"


def test_arrow_and_facts_name_their_model_the_same_way(ask: Ask, app: Gate) -> None:
    batch = pa.record_batch({"genes": [["GENE1", "GENE5"]], "counts": [[3.0, 4.0]]})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    headers = {"Content-Type": ARROW_TYPE, "Accept": ARROW_TYPE}
    body = sink.getvalue().to_pybytes()
    response = ask(app, "POST", "/v1/embeddings?model=small", content=body, headers=headers)
    assert response.status_code == 200, response.text
    facts = json.loads(pa.ipc.open_stream(response.content).schema.metadata[b"genescale"])
    assert facts["provenance"]["model"]["name"] == "small"
    info = ask(app, "GET", "/v1/info?model=small").json()
    assert info["encoder"]["n_genes"] == 60
    assert list(info["models"]) == ["encoder", "small"]
    assert info["models"]["small"] == info["provenance"]["model"]


@pytest.mark.parametrize("path", ["/v1/embeddings?model=smal", "/v1/embeddings?model=", "/v1/info?model=x"])
def test_an_unknown_name_is_told_with_those_there_are(ask: Ask, app: Gate, path: str) -> None:
    method, more = ("GET", {}) if "info" in path else ("POST", {"json": CELLS})
    response = ask(app, method, path, **more)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (404, "not_found")
    assert "encoder, small" in error["message"]
    assert ("Did you mean 'small'?" in error["message"]) == path.endswith("smal")


def test_two_names_at_once_are_refused(ask: Ask, app: Gate) -> None:
    response = ask(app, "POST", "/v1/embeddings?model=small&model=encoder", json=CELLS)
    assert (response.status_code, response.json()["error"]["details"]["where"]) == (422, "model")


def test_after_a_switch_the_new_version_answers_with_its_own_genes(ask: Ask, app: Gate, desk: Desk) -> None:
    before = ask(app, "POST", "/v1/embeddings", json=CELLS)
    desk.now(lambda served: served.promoted(desk.releases["encoder/2"]))
    after = ask(app, "POST", "/v1/embeddings", json=CELLS)
    assert version_of(after) == ("encoder", "2")
    ignored = [answer.json()["cells"][0]["ignored"]["unknown"] for answer in (before, after)]
    assert ignored == [1, 0]


def test_a_request_that_was_begun_keeps_its_version(app: Gate, desk: Desk) -> None:
    old = desk.releases["encoder/1"]

    async def body() -> Any:
        text = json.dumps(CELLS).encode()
        yield text[:10]
        # The request's first part is here: its version must not change any more once it is chosen.
        await asyncio.sleep(0)
        yield text[10:]

    class Slow(InProcessModel):
        async def embed(self, *arguments: Any) -> Any:
            assert desk.versions.in_work(old) == 1
            desk.now(lambda served: served.promoted(desk.releases["encoder/2"]))
            assert desk.versions.in_work(old) == 1
            return await super().embed(*arguments)

    answers = desk.versions.ready(old).answers
    assert isinstance(answers.model, InProcessModel)
    answers.model = Slow(answers.model.embedder)

    async def asked() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as http:
            headers = {"Content-Type": "application/json"}
            first = await http.post("/v1/embeddings", content=body(), headers=headers)
            return [first, await http.post("/v1/embeddings", json=CELLS)]

    assert [version_of(answer) for answer in asyncio.run(asked())] == [("encoder", "1"), ("encoder", "2")]
    assert desk.versions.in_work(old) == 0
    desk.versions.forget(old)
    with pytest.raises(KeyError):
        desk.versions.ready(old)


def test_a_version_that_cannot_be_opened_changes_nothing(ask: Ask, app: Gate, desk: Desk) -> None:
    desk.unreadable.add(desk.releases["encoder/2"].digest)
    before = desk.versions.state
    with pytest.raises(IntegrityError):
        desk.now(lambda served: served.promoted(desk.releases["encoder/2"]))
    assert desk.versions.state is before
    assert version_of(ask(app, "POST", "/v1/embeddings", json=CELLS)) == ("encoder", "1")


def test_what_is_older_or_of_another_deployment_changes_nothing(desk: Desk) -> None:
    old = desk.versions.state
    desk.now(lambda served: served.promoted(desk.releases["encoder/2"]))
    assert desk.versions.adopt(old) == 1
    elsewhere = initial_state({"encoder": desk.releases["small/1"]})
    assert desk.versions.adopt(elsewhere.changed(elsewhere.default.promoted(desk.releases["encoder/1"]))) == 1
    assert desk.versions.state.default.current.version == "2"


def test_a_canary_answers_its_share_by_request_id_and_says_so(ask: Ask, app: Gate, desk: Desk) -> None:
    desk.now(lambda served: served.with_candidate(desk.releases["encoder/2"], 0.4))
    served = desk.versions.state.default
    found = {}
    for at in range(30):
        response = ask(app, "GET", "/v1/info", headers={"X-Request-ID": f"id-{at}"})
        found[f"id-{at}"] = version_of(response)[1]
    assert found == {name: served.chosen(name).version for name in found}
    assert set(found.values()) == {"1", "2"}


def test_models_are_listed_with_what_is_loaded_where(ask: Ask, app: Gate, desk: Desk) -> None:
    desk.now(lambda served: served.with_candidate(desk.releases["encoder/2"], 0.25))
    listed = ask(app, "GET", "/v1/models").json()
    assert listed["replicas"] == 2
    encoder, small = listed["models"]
    assert encoder == ask(app, "GET", "/v1/models/encoder").json()
    assert (encoder["name"], encoder["version"], encoder["alias"], encoder["share"]) == (
        "encoder",
        "1",
        "production",
        0.75,
    )
    assert (encoder["default"], small["default"]) == (True, False)
    assert (encoder["loaded_on"], encoder["size_bytes"], small["loaded_on"]) == (2, 7, 1)
    candidate = encoder["candidate"]
    assert (candidate["version"], candidate["alias"], candidate["share"]) == ("2", None, 0.25)
    assert candidate["vocabulary"]["name"] == "of-140"
    assert small["candidate"] is None
    unknown = ask(app, "GET", "/v1/models/nothing")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "not_found")


def test_answers_are_as_the_interface_document_says(ask: Ask, app: Gate) -> None:
    import jsonschema

    document = openapi_document()
    for method, path, body in (
        ("get", "/v1/models", None),
        ("get", "/v1/models/{name}", None),
        ("post", "/v1/models/{name}/rollout", {"alias": "production", "canary": 0.1}),
    ):
        more = {"json": body} if body else {}
        answer = ask(app, method.upper(), path.replace("{name}", "encoder"), **more)
        schema = document["paths"][path][method]["responses"][str(answer.status_code)]["content"]["application/json"]
        jsonschema.validate(answer.json(), {**schema["schema"], "components": document["components"]})


def test_a_rollout_begins_once(ask: Ask, app: Gate, desk: Desk) -> None:
    asked = {"alias": "production", "canary": 0.2}
    response = ask(app, "POST", "/v1/models/encoder/rollout", json=asked)
    assert (response.status_code, response.json()["rollout"]["state"]) == (202, "running")
    assert desk.begun == [Wanted(name="encoder", alias="production", share=0.2)]
    again = ask(app, "POST", "/v1/models/encoder/rollout", json=asked)
    assert (again.status_code, again.json()["error"]["code"]) == (409, "conflict")
    assert ask(app, "GET", "/v1/models/encoder").json()["rollout"]["asked"] == "@production"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "either alias"),
        ({"alias": "a", "version": "1"}, "either alias"),
        ({"alias": "a", "back": True}, "either alias"),
        ({"back": True, "canary": 0.5}, "no canary"),
        ({"alias": "a", "canary": 1.0}, "canary"),
        ({"alias": "../secrets"}, "alias"),
        ({"version": "0"}, "version"),
        ({"version": 3}, "version"),
        ({"model": "s3://elsewhere/model"}, "model"),
        ({"back": True}, "no version before"),
    ],
)
def test_a_rollout_that_cannot_be_meant_is_refused(ask: Ask, app: Gate, desk: Desk, body: Any, said: str) -> None:
    response = ask(app, "POST", "/v1/models/encoder/rollout", json=body)
    assert response.status_code == 422, response.text
    assert said in response.text
    assert desk.begun == []


def test_a_service_with_one_fixed_model_says_so(ask: Ask, build: Callable[..., Gate]) -> None:
    for method, path, more in (("GET", "/v1/models", {}), ("POST", "/v1/models/x/rollout", {"json": {"back": True}})):
        response: httpx.Response = ask(build(), method, path, **more)
        assert (response.status_code, response.json()["error"]["code"]) == (422, "invalid_input")


def test_a_client_asks_one_model(app: Gate, loop: asyncio.AbstractEventLoop) -> None:
    cells: Sequence[Any] = [{"GENE1": 3, "GENE5": 1}] * 3
    with GenescaleClient("http://service", model="small", transport=Wire(app, loop)) as client:
        assert client.embeddings(cells).model.name == "small"
        assert client.embed(cells).model.name == "small"
        assert client.info()["encoder"]["n_genes"] == 60


def test_cells_of_one_run_are_answered_by_one_version_while_a_candidate_is_tried(
    app: Gate, desk: Desk, loop: asyncio.AbstractEventLoop
) -> None:
    desk.now(lambda served: served.with_candidate(desk.releases["encoder/2"], 0.5))
    # More than fit into one request.
    cells: Sequence[Any] = [{"GENE1": 3, f"GENE{5 + at % 40}": 1} for at in range(600)]
    versions = set()
    with GenescaleClient("http://service", transport=Wire(app, loop)) as client:
        for _ in range(12):
            found = client.embed(cells)
            assert found.requests > 1
            versions.add(found.model.version)
            if len(versions) == 2:
                break
    assert versions == {"1", "2"}
