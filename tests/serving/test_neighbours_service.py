"""A real service with a reference: Ray Serve opens the index, and the answer is that of the same index here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from genescale.platform.errors import SettingsError
from genescale.platform.settings import Settings
from genescale.platform.storage import Store
from genescale.serving.config import ServingConfig
from genescale.serving.neighbours.building import IndexConfig, build_index
from genescale.serving.neighbours.reference import Reference

if TYPE_CHECKING:
    from genescale.ingestion.corpus import Corpus
    from genescale.platform.bundle import Bundle
    from genescale.training.embedder import Embedder

pytestmark = pytest.mark.slow


@pytest.fixture
def index(bundle: Bundle, reference_corpus: Corpus, local_store: Store, tmp_path: Path) -> str:
    config = IndexConfig(device="cpu", map_cells=0, search="graph")
    return build_index(bundle, reference_corpus, out_uri=str(tmp_path / "index"), store=local_store, config=config).uri


def test_a_deployed_reference_answers(
    ray_local: None,
    bundle: Bundle,
    embedder: Embedder,
    reference_corpus: Corpus,
    index: str,
    settings_for: Callable[[Path], Settings],
    tmp_path: Path,
) -> None:
    from genescale.serving.app import service

    tokens = [cell[:-2].tolist() for cell in reference_corpus.tokens([5, 55])]
    framed = [[*cell, int(reference_corpus.vocabulary.eos or 0)] for cell in tokens]
    reference = Reference.open(index, Settings(), tmp_path)
    here = reference.nearest(embedder.embed_cells(framed), 5)  # type: ignore[arg-type]
    config = ServingConfig(port=0, num_cpus=0.5, index=index, tracking_interval_s=0)
    with service(bundle, config, settings_for(tmp_path / "service")) as running:
        body = {"cells": [{"tokens": cell} for cell in tokens], "k": 5}
        response = httpx.post(f"{running.url}/v1/neighbors", json=body, timeout=60)
        info = httpx.get(f"{running.url}/v1/info").json()
    assert response.status_code == 200, response.text
    assert info["reference"] == response.json()["reference"] == reference.facts.model_dump()
    for at, cell in enumerate(response.json()["cells"]):
        known = reference.cells(here.rows_qk[at])
        assert [one["id"] for one in cell["neighbors"]] == [one["cell_id"] for one in known]
        distances = [one["distance"] for one in cell["neighbors"]]
        assert distances == pytest.approx(here.distances_qk[at].tolist(), rel=1e-3)


def test_an_index_of_another_model_is_refused_before_anything_starts(
    ray_local: None,
    write_bundle_at: Callable[..., Bundle],
    index: str,
    settings_for: Callable[[Path], Settings],
    tmp_path: Path,
) -> None:
    from ray import serve

    from genescale.serving.app import start

    other = write_bundle_at(tmp_path / "other", 99)
    with pytest.raises(SettingsError, match="made with model"):
        start(other, ServingConfig(port=0, index=index), settings_for(tmp_path))
    assert not serve.status().proxies
