"""Cells that come as an h5ad file: the same tokens as in a corpus, and the same answers as in any other form."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import httpx
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from genescale.platform.vocabulary import Vocabulary
from genescale.serving.access.keys import ApiKey, digest_of, write_keys
from genescale.serving.config import ServingConfig
from genescale.serving.forms.media import H5AD_TYPE
from genescale.serving.gate import Gate

Ask = Callable[..., httpx.Response]
Build = Callable[..., Gate]
Write = Callable[..., bytes]
AS_H5AD = {"Content-Type": H5AD_TYPE}
N_CELLS = 12


def counts_of(seed: int = 0, n_cells: int = N_CELLS) -> np.ndarray:
    """(n, 120) counts; the columns are the genes of the vocabulary."""
    rng = np.random.default_rng(seed)
    return rng.poisson(rng.gamma(0.4, 3.0, size=120), size=(n_cells, 120)).astype(np.float32)


@pytest.fixture
def write(vocabulary: Vocabulary, tmp_path: Path) -> Write:
    """The bytes of an h5ad file of these counts: `write(counts_ng, layout="csr", names=…, **more)`."""

    def make(counts_ng: np.ndarray, *, layout: str = "csr", names: Any = None, **more: Any) -> bytes:
        layouts: dict[str, Any] = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "dense": np.asarray}
        adata = anndata.AnnData(
            layouts[layout](counts_ng),
            obs=pd.DataFrame(index=[f"cell-{at}" for at in range(len(counts_ng))]),
            var=pd.DataFrame(index=list(vocabulary.gene_ids if names is None else names)),
            **more,
        )
        adata.write_h5ad(tmp_path / "written.h5ad")
        return (tmp_path / "written.h5ad").read_bytes()

    return make


def send(ask: Ask, app: Any, path: str, body: bytes, **more: Any) -> httpx.Response:
    return ask(app, "POST", path, content=body, headers={**AS_H5AD, **more.pop("headers", {})}, **more)


def answer_of(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    return {key: value for key, value in response.json().items() if key not in ("timings_ms", "file")}


def as_json(counts_ng: np.ndarray, vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """The same cells for a JSON body."""
    return [
        {
            "id": f"cell-{at}",
            "counts": {vocabulary.gene_ids[gene]: float(row_g[gene]) for gene in np.flatnonzero(row_g)},
        }
        for at, row_g in enumerate(counts_ng)
    ]


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
def test_a_file_gets_the_answer_of_its_cells_in_json(
    ask: Ask, app: Gate, vocabulary: Vocabulary, write: Write, layout: str
) -> None:
    counts_ng = counts_of()
    body, cells = write(counts_ng, layout=layout), as_json(counts_ng, vocabulary)
    expected = answer_of(ask(app, "POST", "/v1/tokens", json={"cells": cells}))
    assert answer_of(send(ask, app, "/v1/tokens", body)) == expected
    assert any(cell["ignored"]["no_median"] for cell in expected["cells"])
    options = {"layer": "last", "output": "genes"}
    expected = answer_of(ask(app, "POST", "/v1/embeddings", json={"cells": cells[2:5], **options}))
    response = send(ask, app, "/v1/embeddings", body, params={**options, "offset": 2, "limit": 3})
    assert answer_of(response) == expected


def test_a_cell_gets_the_tokens_that_it_has_in_a_corpus(
    ask: Ask, app: Gate, vocabulary: Vocabulary, write: Write, tmp_path: Path
) -> None:
    """Symbols, ids with versions, two columns of one gene, spike-ins; counts in a layer, X normalised."""
    from genescale.ingestion.config import IngestConfig
    from genescale.ingestion.local_corpus import local_corpus
    from genescale.platform.settings import StorageSettings
    from genescale.platform.storage import Store

    counts_ng = counts_of(4)
    names = [f"GENE{at}" if at % 3 else f"{gene}.2" for at, gene in enumerate(vocabulary.gene_ids)]
    names[100], names[110] = "ERCC-00002", vocabulary.gene_ids[7]
    normalised_ng = np.log1p(1e4 * counts_ng / counts_ng.sum(axis=1, keepdims=True))
    body = write(normalised_ng, names=names, layers={"counts": sparse.csr_matrix(counts_ng)})
    (tmp_path / "cells.h5ad").write_bytes(body)
    places = (str(tmp_path / "cells.h5ad"), str(tmp_path / "corpus"))
    made = local_corpus(*places, vocabulary, Store(StorageSettings()), config=IngestConfig(min_genes=1))
    names, tokens = made.corpus.cells(["cell_id"]).column("cell_id").to_pylist(), made.corpus.tokens(range(N_CELLS))
    response = send(ask, app, "/v1/tokens", body)
    answered = [(cell["id"], cell["tokens"]) for cell in answer_of(response)["cells"]]
    assert answered == [(name, tokens_t.tolist()) for name, tokens_t in zip(names, tokens, strict=True)]
    file = response.json()["file"]
    assert (file["cells"], file["offset"], file["counts_slot"]) == (N_CELLS, 0, "layers/counts")
    assert (file["genes"], file["genes_known"]) == (120, 119)
    ignored = {one["gene"] for cell in response.json()["cells"] for one in cell["ignored"]["genes"]}
    assert "ERCC-00002" in ignored


def test_heads_and_neighbours_are_asked_with_a_file_too(
    ask: Ask, serve_heads: Any, vocabulary: Vocabulary, write: Write
) -> None:
    counts_ng = counts_of(2)
    body, cells = write(counts_ng), as_json(counts_ng, vocabulary)
    app, _, _ = serve_heads({"label": "type", "classes": ("a", "b")}, {"label": "age", "kind": "number"})
    expected = answer_of(ask(app, "POST", "/v1/classify", json={"cells": cells}))
    assert answer_of(send(ask, app, "/v1/classify", body)) == expected
    # A service without a reference says so before it reads a file.
    assert send(ask, app, "/v1/neighbors", b"no file", params={"k": 3}).json()["error"]["code"] == "invalid_input"


def test_a_head_of_genes_is_asked_for_genes_by_repeated_parameters(
    ask: Ask, serve_heads: Any, vocabulary: Vocabulary, write: Write
) -> None:
    counts_ng, wanted = counts_of(2), {"genes": ["GENE1", "GENE30"]}
    app, _, _ = serve_heads({"label": "dosage", "kind": "gene_classes", "classes": ("a", "b")})
    asked = {"cells": as_json(counts_ng, vocabulary), **wanted}
    expected = answer_of(ask(app, "POST", "/v1/classify", json=asked))
    assert [gene["gene"] for gene in expected["genes"]] == ["GENE1", "GENE30"]
    assert answer_of(send(ask, app, "/v1/classify", write(counts_ng), params=wanted)) == expected


@pytest.mark.parametrize(
    ("parameters", "status", "where", "told"),
    [
        ({"offset": 12}, 422, "offset", "12 cells"),
        ({"limit": 0}, 422, "limit", "greater than or equal"),
        ({"limit": "x"}, 422, "limit", "integer"),
        ({"limits": 3}, 422, "limits", "limit"),
        ({"limit": ["1", "2"]}, 422, "limit", "twice"),
        ({}, 413, "limit", "12 cells of the file are asked for; 5 are allowed"),
        ({"offset": 2}, 413, "limit", "10 cells"),
        ({"counts_slot": "layers/none"}, 422, None, "absent"),
        ({"counts_slot": "/etc/passwd"}, 422, None, "no place"),
        ({"gene_column": "none", "limit": 1}, 422, None, "no column 'none'"),
        ({"layer": "first"}, 422, "layer", "last"),
        ({"output": "genes", "pooling": "cls"}, 422, "pooling", "not pooled"),
    ],
)
def test_wrong_parameters_are_refused_with_their_names(
    ask: Ask, build: Build, write: Write, parameters: dict[str, Any], status: int, where: str | None, told: str
) -> None:
    response = send(ask, build(max_cells=5), "/v1/embeddings", write(counts_of()), params=parameters)
    error = response.json()["error"]
    assert response.status_code == status, response.text
    assert told in error["message"]
    assert where is None or error["details"]["where"] == where


def test_a_cell_that_cannot_be_used_is_named_by_its_row(ask: Ask, app: Gate, write: Write) -> None:
    counts_ng = counts_of()
    counts_ng[4] = 0
    response = send(ask, app, "/v1/tokens", write(counts_ng), params={"offset": 3, "limit": 2})
    assert (response.status_code, response.json()["error"]["details"]["where"]) == (422, "cells[4]")
    assert send(ask, app, "/v1/tokens", write(counts_ng), params={"offset": 5}).status_code == 200


@pytest.mark.parametrize(
    ("change", "code", "told"),
    [
        (lambda x: np.log1p(x), "not_counts", "counts_slot"),
        (lambda x: 40 * x + 0.25 * (x > 2), "not_counts", "allow_fractional"),
        (lambda x: -x, "not_counts", "negative"),
        (lambda x: np.where(x > 3, np.nan, x), "not_counts", "finite"),
    ],
)
def test_what_is_no_count_is_refused_in_terms_of_the_request(
    ask: Ask, app: Gate, write: Write, change: Callable[[np.ndarray], np.ndarray], code: str, told: str
) -> None:
    response = send(ask, app, "/v1/tokens", write(change(counts_of()).astype(np.float32)))
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (422, code)
    assert told in error["message"]
    assert "--" not in error["message"]


def test_corrected_counts_are_taken_when_the_request_says_so(ask: Ask, app: Gate, write: Write) -> None:
    counts_ng = counts_of()
    body = write(40 * counts_ng + 0.25 * (counts_ng > 2))
    assert send(ask, app, "/v1/tokens", body, params={"allow_fractional": "true"}).status_code == 200


def test_tokens_of_a_file_go_on_the_key_that_sent_it(ask: Ask, build: Build, write: Write, tmp_path: Path) -> None:
    key = "gsk_the-key-of-a-file-0123456789"
    held = ApiKey(id="web", sha256=digest_of(key.encode()).hex(), scopes=("embed",), tokens_per_minute=700)
    write_keys(tmp_path / "keys.toml", [held])
    app = Gate(build().app, ServingConfig(keys_file=str(tmp_path / "keys.toml")))
    bearer = {"Authorization": f"Bearer {key}"}
    body = write(counts_of())
    statuses = [
        send(ask, app, path, body, headers=bearer).status_code
        for path in ("/v1/tokens", "/v1/tokens", "/v1/embeddings", "/v1/embeddings")
    ]
    # Twelve cells of up to 48 tokens: the second question for embeddings finds the minute used up.
    assert statuses == [200, 200, 200, 429]


def test_files_that_come_together_are_all_answered(app: Gate, write: Write, ask_together: Any, ask: Ask) -> None:
    bodies = [write(counts_of(seed)) for seed in range(4)]
    requests = [("POST", "/v1/tokens", {"content": body, "headers": AS_H5AD}) for body in bodies]
    together = [answer_of(one) for one in ask_together(app, requests)]
    assert together == [answer_of(send(ask, app, "/v1/tokens", body)) for body in bodies]
    assert len({str(one) for one in together}) == 4


def test_reading_a_file_leaves_nothing_on_the_disk(
    ask: Ask, app: Gate, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    assert send(ask, app, "/v1/tokens", write(counts_of(), layout="csc")).status_code == 200
    assert list(scratch.iterdir()) == []


def test_a_file_that_was_cut_off_says_so(ask: Ask, app: Gate, write: Write) -> None:
    body = write(counts_of())
    for cut in (body[: len(body) // 2], body[:100], b"", b"PK\x03\x04 a zip", b'{"cells": []}'):
        response = send(ask, app, "/v1/tokens", cut)
        assert (response.status_code, response.json()["error"]["code"]) == (422, "atlas"), cut[:10]


def test_zarr_is_not_read_from_a_body(ask: Ask, app: Gate) -> None:
    import zipfile

    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr(".zgroup", '{"zarr_format": 2}')
    assert send(ask, app, "/v1/tokens", sink.getvalue()).status_code == 422
