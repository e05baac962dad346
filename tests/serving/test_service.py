"""A real service: Ray Serve, its proxy, a model replica, and the typed client."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest

from genescale.client import GenescaleClient
from genescale.perturbation.perturb import EditRequest, Readouts, perturb_cell
from genescale.perturbation.readouts.states import States
from genescale.platform import errors
from genescale.platform.settings import Secret, Settings
from genescale.platform.storage import Store, join
from genescale.platform.vocabulary import Vocabulary
from genescale.serving.config import Limits, ServingConfig

if TYPE_CHECKING:
    from genescale.ingestion.corpus import Corpus
    from genescale.platform.bundle import Bundle
    from genescale.serving.app import RunningService
    from genescale.training.embedder import Embedder

KEY = "a-service-key-0123456789abcdef"
PLACES = 4
DrawCell = Callable[[int, int], dict[str, float]]
Tokens = Callable[[Mapping[str, float]], np.ndarray]


@pytest.fixture(scope="module")
def running(
    ray_local: None, bundle: Bundle, settings_for: Callable[[Path], Settings], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningService]:
    """One service for this module, with few places, a small budget and a key; nothing of it may be left afterwards."""
    from ray import serve
    from ray.util import list_named_actors

    from genescale.serving.app import service

    def actors_of_serve() -> list[Any]:
        return [actor for actor in list_named_actors(all_namespaces=True) if actor["namespace"] == "serve"]

    config = ServingConfig(
        port=0,
        # Runs in the tracker have tests of their own.
        tracking_interval_s=0,
        # Leaves a processor of the two for a screen.
        num_cpus=0.5,
        max_ongoing=PLACES // 2,
        max_queued=PLACES // 2,
        tokens_per_batch=200,
        api_keys=(Secret(KEY),),
        limits=Limits(max_body_bytes=1_000_000),
    )
    with service(bundle, config, settings_for(tmp_path_factory.mktemp("service"))) as up:
        assert actors_of_serve()
        yield up
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{up.url}/healthz")
    assert not serve.status().proxies
    assert not actors_of_serve()


@pytest.fixture
def alike(embedder: Embedder) -> Iterator[Embedder]:
    """The embedder in this process, on as many threads as the replica has: sums depend on their number."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield embedder
    torch.set_num_threads(before)


@pytest.fixture
def client(running: RunningService) -> Iterator[GenescaleClient]:
    with GenescaleClient(running.url, api_key=KEY) as client:
        yield client


def test_it_is_ready_when_it_says_so(running: RunningService, client: GenescaleClient, bundle: Bundle) -> None:
    assert client.ready()
    info = client.info()
    assert info["provenance"]["model"] == {"name": "tiny-encoder", "version": "unregistered", "digest": bundle.digest}
    assert info["limits"]["max_body_bytes"] == 1_000_000
    assert httpx.get(f"{running.url}/healthz").json() == {"status": "alive"}


def test_embeddings_are_those_of_the_embedder_bit_for_bit(
    client: GenescaleClient, bundle: Bundle, alike: Embedder, draw_cell: DrawCell, tokens_of: Tokens
) -> None:
    cells = [draw_cell(seed, 1 + 7 * seed) for seed in range(12)]
    answer = client.embeddings([{"id": str(at), "counts": cell} for at, cell in enumerate(cells)], layer="last")
    assert answer.embeddings.dtype == np.float32
    assert np.array_equal(answer.embeddings, alike.embed_cells([tokens_of(cell) for cell in cells], layer="last"))
    assert [cell.id for cell in answer.cells] == [str(at) for at in range(12)]
    assert (answer.model.digest, answer.model.corpus_version) == (bundle.digest, 7)
    assert answer.model.vocabulary_digest == bundle.vocabulary.digest
    assert answer.timings_ms.forward > 0


def test_perturbations_are_those_of_perturb_cell_bit_for_bit(
    client: GenescaleClient, alike: Embedder, vocabulary: Vocabulary, draw_cell: DrawCell, tokens_of: Tokens
) -> None:
    counts, genes, watched = draw_cell(5, 90), [f"GENE{i}" for i in range(30)], ["GENE3", "GENE40"]
    answer = client.perturbations(
        [counts], [{"kind": "delete", "genes": [gene]} for gene in genes], measure="cls", gene_shifts=watched
    )
    requests = [EditRequest(kind="delete", genes=(vocabulary.token(gene),)) for gene in genes]
    watched_tokens = [vocabulary.token(gene) for gene in watched]
    readouts = Readouts(measure="cls", gene_shifts_of=watched_tokens)
    direct = perturb_cell(alike, tokens_of(counts), requests, readouts=readouts)
    (cell,) = answer.cells
    assert [edit.cosine for edit in cell.edits] == [one.cosine for one in direct]
    assert [list(edit.found.values()) for edit in cell.edits] == [list(one.found.values()) for one in direct]
    for edit, one in zip(cell.edits, direct, strict=True):
        assert [gene.cosine for gene in edit.gene_shifts] == [one.gene_cosines.get(token) for token in watched_tokens]
    assert cell.report.cropped


def test_arrow_goes_through_the_proxy_in_both_directions(
    running: RunningService, alike: Embedder, draw_cell: DrawCell, tokens_of: Tokens
) -> None:
    import pyarrow as pa

    from genescale.serving.forms.media import ARROW_TYPE

    tokens = [tokens_of(draw_cell(seed, 5 + 20 * seed)) for seed in range(4)]
    batch = pa.record_batch({"tokens": pa.array([one.tolist() for one in tokens], pa.list_(pa.uint16()))})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": ARROW_TYPE, "Accept": ARROW_TYPE}
    body = sink.getvalue().to_pybytes()
    response = httpx.post(f"{running.url}/v1/embeddings", content=body, headers=headers)
    assert response.status_code == 200, response.text
    found = pa.ipc.open_stream(response.content).read_all()["embedding"].combine_chunks()
    assert np.array_equal(found.flatten().to_numpy().reshape(4, -1), alike.embed_cells(tokens))


def test_genes_their_embeddings_and_their_shifts_come_from_the_replica(
    client: GenescaleClient, alike: Embedder, vocabulary: Vocabulary, draw_cell: DrawCell, tokens_of: Tokens
) -> None:
    counts = draw_cell(8, 40)
    (cell,) = client.gene_embeddings([counts]).cells
    assert np.array_equal(cell.embeddings, alike.embed_genes([tokens_of(counts)])[0][1:-1])
    names, vectors_sd = ("a", "b"), np.random.default_rng(0).normal(size=(2, alike.width))
    edit = {"kind": "inhibit", "genes": [cell.genes[0]], "quartiles": 2}
    asked = client.perturbations([counts], [edit], states=dict(zip(names, vectors_sd, strict=True)), top_gene_shifts=2)
    request = EditRequest(kind="inhibit", genes=(vocabulary.token(cell.genes[0]),), quartiles=2)
    readouts = Readouts(states=States(names=names, vectors_sd=vectors_sd), gene_shifts_of="all")
    (direct,) = perturb_cell(alike, tokens_of(counts), [request], readouts=readouts)
    (found,) = asked.cells[0].edits
    assert found.cosine == direct.cosine
    assert tuple(found.state_shifts.values()) == direct.state_shifts
    assert [gene.cosine for gene in found.top_gene_shifts] == sorted(direct.gene_cosine_values.tolist())[:2]


@pytest.mark.parametrize("kind", ["delete", "overexpress"])
def test_a_screen_and_the_service_agree_on_the_same_cells_bit_for_bit(
    client: GenescaleClient,
    bundle: Bundle,
    draw_cell: DrawCell,
    tokens_of: Tokens,
    local_store: Store,
    tmp_path: Path,
    kind: Any,
) -> None:
    from genescale.perturbation.screening.results import read_screen
    from genescale.perturbation.screening.screen import screen
    from genescale.perturbation.screening.spec import ComputeConfig, EditsConfig, ScreenConfig

    cells, genes = [draw_cell(seed, n) for seed, n in enumerate((20, 46, 100))], ("GENE1", "GENE7", "GENE50")
    corpus = write_corpus(str(tmp_path / "corpus"), bundle.vocabulary, local_store, [tokens_of(cell) for cell in cells])
    config = ScreenConfig(edits=EditsConfig(kind=kind, genes=genes), compute=ComputeConfig(device="cpu"))
    screen(bundle, corpus, config, out_uri=str(tmp_path / "screen"), store=local_store)
    shifts = read_screen(str(tmp_path / "screen"), local_store).cell_shifts
    screened = shifts.filter(shifts["role"] == "edit")
    answer = client.perturbations(cells, [{"kind": kind, "genes": [gene]} for gene in genes])
    edits = [edit for cell in answer.cells for edit in cell.edits]
    assert screened["cosine"].to_list() == [edit.cosine for edit in edits]
    assert screened["rank"].to_list() == [edit.found.get(edit.genes[0]) for edit in edits]
    assert screened["n_cut"].to_list() == [edit.n_cut for edit in edits]


def write_corpus(uri: str, vocabulary: Vocabulary, store: Store, cells: list[np.ndarray]) -> Corpus:

    from genescale.ingestion.corpus import Corpus, NewPart, Source, dataset_folder
    from genescale.ingestion.schema import part_schema, rows_table
    from genescale.ingestion.table.parts import part_bytes

    n = len(cells)
    columns = {
        "cell_id": [f"cell-{i}" for i in range(n)],
        "source_row": list(range(n)),
        "input_ids": [cell.tolist() for cell in cells],
        "length": [len(cell) for cell in cells],
        "total_counts": [1000.0] * n,
        "n_genes": [len(cell) for cell in cells],
    }
    data = part_bytes(rows_table(columns, part_schema(vocabulary.token_dtype)))
    corpus = Corpus.create(uri, vocabulary, store)
    path = f"{dataset_folder('tiny')}/part-0.parquet"
    store.write(join(uri, path), data)
    source = Source(uri="tiny.h5ad", size_bytes=1, etag="1", vocabulary_digest=vocabulary.digest, recipe={})
    return corpus.commit_source(source, "tiny", [NewPart(path=path, rows=n, size_bytes=len(data))], {})


def test_requests_that_share_passes_get_the_answers_they_would_get_alone(
    client: GenescaleClient, alike: Embedder, draw_cell: DrawCell, tokens_of: Tokens
) -> None:
    cells = [draw_cell(seed, 5 + seed) for seed in range(30)]
    layers = ["last", "second_to_last"]

    def ask(at: int) -> np.ndarray:
        return client.embeddings([cells[at]], layer=layers[at % 2]).embeddings

    with ThreadPoolExecutor(PLACES) as threads:
        answers = list(threads.map(ask, range(len(cells))))
    for at, (answer, cell) in enumerate(zip(answers, cells, strict=True)):
        layer: Any = layers[at % 2]
        assert np.array_equal(answer, alike.embed_cells([tokens_of(cell)], layer=layer))


def test_a_flood_is_refused_quickly_and_what_is_accepted_is_answered(
    running: RunningService, client: GenescaleClient, draw_cell: DrawCell
) -> None:
    cells, edits = [draw_cell(1, 90)] * 4, [{"kind": "delete", "genes": [f"GENE{i}"]} for i in range(60)]
    expected = [edit.cosine for edit in client.perturbations(cells, edits).cells[0].edits]

    def ask(_: int) -> list[float | None] | str:
        with GenescaleClient(running.url, api_key=KEY, attempts=1, timeout_s=60) as impatient:
            try:
                return [edit.cosine for edit in impatient.perturbations(cells, edits).cells[0].edits]
            except errors.OverloadedError as error:
                return error.code

    with ThreadPoolExecutor(24) as threads:
        answers = list(threads.map(ask, range(24)))
    answered = [answer for answer in answers if answer != "overloaded"]
    assert len(answered) >= 2
    assert len(answered) < len(answers)
    assert all(answer == expected for answer in answered)
    assert client.embeddings([draw_cell(1, 5)]).embeddings.shape == (1, 16)


def test_patient_clients_all_get_their_answers(running: RunningService, draw_cell: DrawCell) -> None:
    def ask(seed: int) -> tuple[int, ...]:
        with GenescaleClient(running.url, api_key=KEY, attempts=20) as patient:
            return patient.embeddings([draw_cell(seed, 40)] * 8).embeddings.shape

    with ThreadPoolExecutor(12) as threads:
        assert set(threads.map(ask, range(12))) == {(8, 16)}


@pytest.mark.parametrize(
    ("call", "kind", "said"),
    [
        (lambda c: c.embeddings([{"NOSUCH": 1}]), errors.InputError, "NOSUCH"),
        (
            lambda c: c.perturbations([{"GENE1": 1}], [{"kind": "delete", "genes": ["GENE44X"]}]),
            errors.UnknownGeneError,
            "GENE44",
        ),
        (lambda c: c.perturbations([{"GENE1": 1}], [{"kind": "melt", "genes": ["GENE1"]}]), errors.InputError, "kind"),
        (lambda c: c.embeddings([{"GENE1": 1}] * 257), errors.LimitError, "256"),
        (lambda c: c.embeddings([{"id": "x" * 250, "counts": {"GENE1": 1}}] * 5000), errors.LimitError, "1,000,000"),
    ],
    ids=["cell", "gene", "kind", "cells", "body"],
)
def test_the_client_raises_what_the_service_means(
    client: GenescaleClient, call: Callable[[GenescaleClient], Any], kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=said) as caught:
        call(client)
    assert type(caught.value) is kind


def test_only_the_right_key_opens(running: RunningService) -> None:
    for key in (None, "not-the-key-0123456789abcdef"):
        with GenescaleClient(running.url, api_key=key) as stranger:
            assert stranger.ready()
            with pytest.raises(errors.UnauthorizedError):
                stranger.info()


def test_a_response_carries_one_request_id_and_the_security_headers(running: RunningService) -> None:
    for headers in ({}, {"X-Request-ID": "trace-9"}):
        response = httpx.get(f"{running.url}/v1/info", headers=headers)
        assert response.status_code == 401
        assert len(response.headers.get_list("x-request-id")) == 1
        assert response.json()["error"]["request_id"] == response.headers["x-request-id"]
        assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["x-request-id"] == "trace-9"


def test_a_second_service_on_the_same_cluster_is_refused(running: RunningService, bundle: Bundle) -> None:
    from genescale.serving.app import start

    with pytest.raises(errors.ClusterError, match="already runs"):
        start(bundle, ServingConfig(port=0), Settings())
    assert httpx.get(f"{running.url}/readyz").status_code == 200
