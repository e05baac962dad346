"""h5ad files that were made to read what they must not, to fill the memory, or that are damaged."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import httpx
import numpy as np
import pytest

from genescale.platform.vocabulary import Vocabulary
from genescale.serving.forms.media import H5AD_TYPE
from genescale.serving.gate import Gate

Ask = Callable[..., httpx.Response]
Change = Callable[[h5py.File], Any]
SECRET = 7_654_321


@pytest.fixture
def made(vocabulary: Vocabulary) -> Callable[..., bytes]:
    """The bytes of an h5ad file of five cells, after a change: `made(change)`."""

    def make(change: Change | None = None) -> bytes:
        sink = io.BytesIO()
        with h5py.File(sink, "w") as file:
            _plain(file, vocabulary)
            if change:
                change(file)
        return sink.getvalue()

    return make


def _plain(file: h5py.File, vocabulary: Vocabulary) -> None:
    file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    counts_ng = np.random.default_rng(3).poisson(1.0, size=(5, len(vocabulary.gene_ids)))
    x = file.create_dataset("X", data=counts_ng.astype(np.float32))
    x.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    for name, index in (("obs", [f"c{at}" for at in range(5)]), ("var", list(vocabulary.gene_ids))):
        table = file.create_group(name)
        table.attrs.update({"encoding-type": "dataframe", "encoding-version": "0.2.0", "_index": "_index"})
        table.attrs["column-order"] = np.array([], dtype="S1")
        column = table.create_dataset("_index", data=index, dtype=h5py.string_dtype())
        column.attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})


def replaced(file: h5py.File, path: str, **how: Any) -> None:
    """Another dataset under this name, with the old one's attributes."""
    attributes = dict(file[path].attrs)
    del file[path]
    file.create_dataset(path, **how).attrs.update(attributes)


def send(ask: Ask, app: Any, body: bytes, path: str = "/v1/tokens") -> httpx.Response:
    return ask(app, "POST", path, content=body, headers={"Content-Type": H5AD_TYPE})


def test_the_file_is_fine_without_a_change(ask: Ask, app: Gate, made: Callable[..., bytes]) -> None:
    assert len(send(ask, app, made()).json()["cells"]) == 5


@pytest.mark.parametrize("way", ["external link", "soft link", "external storage", "virtual dataset"])
def test_other_files_of_the_machine_stay_closed(
    ask: Ask, app: Gate, made: Callable[..., bytes], tmp_path: Path, vocabulary: Vocabulary, way: str
) -> None:
    """The other file holds counts that would be taken, so only the refusal keeps them inside."""
    shape = (5, len(vocabulary.gene_ids))
    secret = np.full(shape, SECRET, dtype=np.float32)
    with h5py.File(tmp_path / "secret.h5", "w") as other:
        other["X"] = secret
    (tmp_path / "secret.bin").write_bytes(secret.tobytes())

    def change(file: h5py.File) -> None:
        if way == "external storage":
            replaced(file, "X", shape=shape, dtype="f4", external=[(str(tmp_path / "secret.bin"), 0, secret.nbytes)])
            return
        del file["X"]
        if way == "external link":
            file["X"] = h5py.ExternalLink(str(tmp_path / "secret.h5"), "/X")
        elif way == "soft link":
            file["X"] = h5py.SoftLink("/obs/_index")
        else:
            layout = h5py.VirtualLayout(shape=shape, dtype="f4")
            layout[:] = h5py.VirtualSource(str(tmp_path / "secret.h5"), "X", shape=shape)
            file.create_virtual_dataset("X", layout)

    response = send(ask, app, made(change))
    assert (response.status_code, response.json()["error"]["code"]) == (422, "atlas")
    assert "refused" in response.json()["error"]["message"]
    assert str(SECRET) not in response.text
    assert str(tmp_path) not in response.text


def _declares_too_much(file: h5py.File) -> None:
    replaced(file, "X", shape=(1_000_000, 120), dtype="f8", chunks=(1_000, 120), compression="gzip")


def _layer_declares_too_much(file: h5py.File) -> None:
    file.create_dataset("layers/counts", shape=(5, 40_000_000), dtype="f8", chunks=(1, 1_000), compression="gzip")


def _old_categories_declare_too_much(file: h5py.File) -> None:
    file.create_dataset("uns/organism_categories", shape=(1_000_000,), dtype="S4000", chunks=(100,), compression="gzip")


def _too_many_cells(file: h5py.File) -> None:
    replaced(file, "X", shape=(2_000_000, 10), dtype="u1", chunks=(10_000, 10), compression="gzip")


def _chunk_is_larger_than_the_data(file: h5py.File) -> None:
    replaced(
        file,
        "X",
        data=np.ones((5, 120)),
        maxshape=(None, None),
        chunks=(100_000, 120),
        compression="gzip",
    )


def _cycle_of_groups(file: h5py.File) -> None:
    group = file.create_group("layers/a")
    group["b"] = file["layers"]


@pytest.mark.parametrize(
    ("change", "status", "told"),
    [
        (_declares_too_much, 413, "unpack to more than"),
        (_layer_declares_too_much, 413, "unpack to more than"),
        (_old_categories_declare_too_much, 413, "unpack to more than"),
        (_too_many_cells, 413, "2,000,000 rows"),
        (_chunk_is_larger_than_the_data, 422, "chunks of 96,000,000 bytes"),
    ],
)
def test_what_a_file_declares_is_refused_before_memory_is_given_to_it(
    ask: Ask, app: Gate, made: Callable[..., bytes], change: Change, status: int, told: str
) -> None:
    import tracemalloc

    body = made(change)
    tracemalloc.start()
    try:
        began = time.perf_counter()
        response = send(ask, app, body)
        took_s = time.perf_counter() - began
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert response.status_code == status, response.text
    assert told in response.json()["error"]["message"]
    assert peak < 4 * len(body) + 50_000_000
    assert took_s < 5


def test_one_long_text_is_not_copied_for_every_row_that_points_to_it(
    ask: Ask, app: Gate, made: Callable[..., bytes]
) -> None:
    """The same pointer in every row, as nobody but an attacker writes it."""
    body = made(lambda file: file["obs/_index"].__setitem__(0, "y" * 100_000))
    with h5py.File(io.BytesIO(body), "r") as file:
        dataset = file["obs/_index"]
        at, size = dataset.id.get_offset(), dataset.id.get_storage_size()
    pointer = body[at : at + 16]
    forged = body[:at] + pointer * (size // 16) + body[at + size :]
    with h5py.File(io.BytesIO(forged), "r") as file:
        assert [len(text) for text in file["obs/_index"][:]] == [100_000] * 5
    response = send(ask, app, forged)
    assert (response.status_code, response.json()["error"]["code"]) == (422, "atlas")
    assert "longer than" in response.json()["error"]["message"]


def test_groups_that_hold_each_other_end(ask: Ask, app: Gate, made: Callable[..., bytes]) -> None:
    assert send(ask, app, made(_cycle_of_groups)).status_code in (200, 422)


def test_more_genes_than_a_cell_may_have_are_refused(ask: Ask, build: Any, made: Callable[..., bytes]) -> None:
    response = send(ask, build(max_genes_per_cell=119), made())
    assert (response.status_code, response.json()["error"]["code"]) == (413, "limit")
    assert send(ask, build(max_genes_per_cell=120), made()).status_code == 200


def test_a_service_may_refuse_files_before_it_opens_them(ask: Ask, build: Any, made: Callable[..., bytes]) -> None:
    body = made()
    assert send(ask, build(max_file_bytes=len(body)), body).status_code == 200
    response = send(ask, build(max_file_bytes=1), b"no file at all")
    assert (response.status_code, response.json()["error"]["code"]) == (413, "limit")


def test_what_may_be_unpacked_is_a_limit(ask: Ask, build: Any, made: Callable[..., bytes]) -> None:
    # The matrix, and 16 bytes for each name of a cell or gene.
    unpacked = 5 * 120 * 4 + 16 * (5 + 120)
    assert send(ask, build(max_unpacked_bytes=unpacked), made()).status_code == 200
    response = send(ask, build(max_unpacked_bytes=unpacked - 1), made())
    assert (response.status_code, response.json()["error"]["code"]) == (413, "limit")


def test_no_changed_byte_makes_a_fault_of_the_service(ask: Ask, app: Gate, made: Callable[..., bytes]) -> None:
    body, rng, statuses = made(), np.random.default_rng(11), []
    for _ in range(60):
        changed = bytearray(body)
        # Most of a file are names and numbers: its first bytes say how it is built.
        for at in rng.integers(8, 4_000, size=int(rng.integers(1, 4))):
            changed[at] = int(rng.integers(0, 256))
        response = send(ask, app, bytes(changed))
        statuses.append(response.status_code)
        assert "Traceback" not in response.text
    assert set(statuses) <= {200, 413, 422}
    assert {200, 422} <= set(statuses)
