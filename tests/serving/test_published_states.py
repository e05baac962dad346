"""States that are published with a service: read from files, checked against the model, named in requests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest

from genescale.perturbation.readouts.states import States
from genescale.platform.errors import InputError, SettingsError
from genescale.platform.settings import Settings
from genescale.platform.storage import Store
from genescale.serving.answering.answers import Answers
from genescale.serving.answering.published_states import of_model, published_with, read_published
from genescale.serving.config import ServingConfig
from genescale.serving.facts import describe
from genescale.serving.gate import Gate
from genescale.serving.in_process import InProcessModel
from genescale.serving.release import Release
from genescale.serving.routes import http_application
from genescale.serving.services import Services

if TYPE_CHECKING:
    from genescale.platform.bundle import Bundle
    from genescale.training.embedder import Embedder

Ask = Callable[..., httpx.Response]
DrawCell = Callable[[int, int], dict[str, float]]
Save = Callable[..., str]
OTHER_DIGEST = "f" * 64


@pytest.fixture
def save(bundle: Bundle, embedder: Embedder, local_store: Store, tmp_path: Path) -> Save:
    """A file of the states `well` and `ill`, of the tiny model unless said otherwise: `save("a.parquet", layer=…)`."""

    def make(name: str = "states.parquet", *, seed: int = 1, width: int = embedder.width, **more: Any) -> str:
        vectors_sd = np.random.default_rng(seed).normal(size=(2, width))
        facts = {"names": ("well", "ill"), "cells": (40, 50), "model_digest": bundle.digest, **more}
        States(vectors_sd=vectors_sd, **facts).save(str(tmp_path / name), local_store)
        return str(tmp_path / name)

    return make


def release_of(bundle: Bundle) -> Release:
    return Release(name="tiny", version="3", digest=bundle.digest, address="models:/tiny/3", folder="")


@pytest.fixture
def app_with(bundle: Bundle, embedder: Embedder) -> Callable[..., Gate]:
    """The HTTP side of the tiny model with these files of states."""

    def make(*uris: str) -> Gate:
        config, release = ServingConfig(states=uris), release_of(bundle)
        states = of_model(published_with([release], config, Settings()), bundle.digest, embedder.width)
        info = describe(release, bundle, config, states=[state.facts for state in states.values()])
        answers = Answers(InProcessModel(embedder), bundle.vocabulary, info, config.limits, states)
        return http_application(Services(answers=answers), config)

    return make


def perturb(ask: Ask, app: Gate, draw_cell: DrawCell, **more: Any) -> httpx.Response:
    counts = {**draw_cell(1, 30), "GENE1": 900}
    asked = {"cells": [{"counts": counts}], "edits": [{"kind": "delete", "genes": ["GENE1"]}], **more}
    return ask(app, "POST", "/v1/perturbations", json=asked)


def test_a_named_state_answers_as_its_vector_does(
    ask: Ask, app_with: Callable[..., Gate], save: Save, draw_cell: DrawCell
) -> None:
    app, vectors_sd = app_with(save()), np.random.default_rng(1).normal(size=(2, 16))
    named = perturb(ask, app, draw_cell, states=[{"name": "ill"}, {"name": "well"}]).json()["cells"]
    given = [{"name": "ill", "vector": vectors_sd[1].tolist()}, {"name": "well", "vector": vectors_sd[0].tolist()}]
    assert named == perturb(ask, app, draw_cell, states=given).json()["cells"]
    shifts = named[0]["edits"][0]["state_shifts"]
    assert list(shifts) == ["ill", "well"]
    assert shifts["ill"] != shifts["well"]
    # A published name with a vector of the caller's is the caller's.
    mine = [{"name": "ill", "vector": vectors_sd[0].tolist()}]
    assert perturb(ask, app, draw_cell, states=mine).json()["cells"][0]["edits"][0]["state_shifts"] == {
        "ill": shifts["well"]
    }


def test_states_of_the_layer_and_pooling_of_the_request_are_taken(
    ask: Ask, app_with: Callable[..., Gate], save: Save, draw_cell: DrawCell
) -> None:
    app = app_with(save("a.parquet"), save("b.parquet", seed=2, layer="last"), save("c.parquet", seed=3, pooling="cls"))
    for seed, options in ((1, {}), (2, {"layer": "last"}), (3, {"measure": "cls"})):
        vector = np.random.default_rng(seed).normal(size=(2, 16))[0].tolist()
        named = perturb(ask, app, draw_cell, states=[{"name": "well"}], **options)
        given = perturb(ask, app, draw_cell, states=[{"name": "well", "vector": vector}], **options)
        assert named.json()["cells"] == given.json()["cells"]
    listed = ask(app, "GET", "/v1/info").json()["states"]
    assert listed[:2] == [
        {"name": name, "layer": "second_to_last", "pooling": "mean_genes", "cells": cells}
        for name, cells in (("well", 40), ("ill", 50))
    ]
    assert {(one["layer"], one["pooling"]) for one in listed[2:]} == {("last", "mean_genes"), ("second_to_last", "cls")}


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [("wel", {}, "Did you mean 'well'"), ("q", {}, "Published: well, ill"), ("well", {"layer": "last"}, "layer=")],
)
def test_a_state_that_cannot_be_taken_is_named(
    ask: Ask,
    app_with: Callable[..., Gate],
    save: Save,
    draw_cell: DrawCell,
    name: str,
    options: dict[str, Any],
    told: str,
) -> None:
    response = perturb(ask, app_with(save()), draw_cell, states=[{"name": name}], **options)
    error = response.json()["error"]
    assert (response.status_code, error["details"]["where"]) == (422, "states[0].name")
    assert told in error["message"]


def test_a_service_without_states_says_so(ask: Ask, app: Gate, draw_cell: DrawCell) -> None:
    response = perturb(ask, app, draw_cell, states=[{"name": "well"}])
    assert response.status_code == 422
    assert "publishes none" in response.json()["error"]["message"]
    assert ask(app, "GET", "/v1/info").json()["states"] == []


def test_states_of_another_model_never_answer(bundle: Bundle, save: Save, caplog: pytest.LogCaptureFixture) -> None:
    foreign, own = save("other.parquet", model_digest=OTHER_DIGEST), save()
    with pytest.raises(SettingsError, match=OTHER_DIGEST[:12]):
        published_with([release_of(bundle)], ServingConfig(states=(foreign,)), Settings())
    kept = published_with([release_of(bundle)], ServingConfig(states=(foreign, own)), Settings())
    assert {state.model_digest for state in of_model(kept, bundle.digest, 16).values()} == {bundle.digest}
    # For a version that is rolled out later.
    assert len(of_model(kept, OTHER_DIGEST, 16)) == 2


def test_files_that_cannot_be_published_are_refused(bundle: Bundle, save: Save, local_store: Store) -> None:
    with pytest.raises(InputError, match="published twice"):
        read_published([save("a.parquet"), save("b.parquet", seed=2)], local_store)
    with pytest.raises(SettingsError, match="has 8 values"):
        of_model(read_published([save("c.parquet", width=8)], local_store), bundle.digest, 16)
    broken = Path(save("d.parquet"))
    broken.write_bytes(b"PAR1 no more")
    with pytest.raises(InputError, match="Parquet"):
        read_published([str(broken)], local_store)


@pytest.mark.slow
def test_a_deployed_service_knows_its_states_and_reads_files(
    ray_local: None,
    bundle: Bundle,
    embedder: Embedder,
    save: Save,
    settings_for: Callable[[Path], Settings],
    tmp_path: Path,
) -> None:
    import anndata
    import pandas as pd

    from genescale.serving.app import service

    vocabulary = bundle.vocabulary
    var = pd.DataFrame(index=list(vocabulary.gene_ids))
    counts_ng = np.random.default_rng(6).poisson(1.0, size=(3, len(var))).astype(np.float32)
    obs = pd.DataFrame(index=["a", "b", "c"])
    anndata.AnnData(counts_ng, obs=obs, var=var).write_h5ad(tmp_path / "cells.h5ad")
    config = ServingConfig(port=0, num_cpus=0.5, states=(save(),))
    with service(bundle, config, settings_for(tmp_path / "service")) as running:
        assert [one["name"] for one in httpx.get(f"{running.url}/v1/info").json()["states"]] == ["well", "ill"]
        file = {"content": (tmp_path / "cells.h5ad").read_bytes(), "headers": {"Content-Type": "application/x-hdf5"}}
        tokens = httpx.post(f"{running.url}/v1/tokens", **file, timeout=60)  # type: ignore[arg-type]
        embedded = httpx.post(f"{running.url}/v1/embeddings?layer=last", **file, timeout=60)  # type: ignore[arg-type]
        body = {
            "cells": [{"tokens": cell["tokens"]} for cell in tokens.json()["cells"]],
            "edits": [{"kind": "delete", "genes": ["GENE1"]}],
            "states": [{"name": "well"}],
        }
        response = httpx.post(f"{running.url}/v1/perturbations", json=body, timeout=60)
    assert [cell["id"] for cell in tokens.json()["cells"]] == ["a", "b", "c"]
    cells = [np.array(cell["tokens"]) for cell in tokens.json()["cells"]]
    found_nd = np.array([cell["embedding"] for cell in embedded.json()["cells"]])
    assert found_nd == pytest.approx(embedder.embed_cells(cells, layer="last", pooling="mean_genes"), rel=1e-4)
    assert response.status_code == 200, response.text
    assert isinstance(response.json()["cells"][0]["edits"][0]["state_shifts"]["well"], float)
