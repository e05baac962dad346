"""Embeddings of the 24 golden cells against what the published code computed with the same random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from genescale.platform.bundle import adopt_checkpoint
from genescale.platform.errors import SettingsError
from genescale.platform.settings import StorageSettings
from genescale.platform.storage import Store
from genescale.platform.vocabulary import read_vocabulary
from genescale.training.embedder import Embedder, gene_table

pytestmark = pytest.mark.shared

TOLERANCE = 1e-4
PUBLISHED = {"last": "0", "second_to_last": "-1"}
VERSIONS = {"V1": "token_dictionary_gc30M.pkl", "V2": "token_dictionary_gc104M.pkl"}


class Golden:
    """Cells of one published layout, the embedder of its random model, and the published tables."""

    def __init__(self, version: str, shared: Path, scratch: Path) -> None:
        self.folder = shared / "golden" / f"forward_{version}"
        store = Store(StorageSettings())
        self.vocabulary = read_vocabulary(str(shared / "vocabularies" / VERSIONS[version]), store)
        self.embedder = Embedder.load(
            adopt_checkpoint(self.folder / "model", self.vocabulary, scratch / version), device="cpu"
        )
        cells = pq.read_table(self.folder / "cells.parquet")
        self.cell_ids = cells.column("cell_id").to_pylist()
        self.cells = [np.array(tokens) for tokens in cells.column("input_ids").to_pylist()]

    def table(self, name: str, key: str) -> tuple[list[str], np.ndarray]:
        """Keys and vectors of a published table."""
        table = pq.read_table(self.folder / f"embeddings_{name}.parquet")
        columns = [table.column(str(i)).to_numpy() for i in range(self.embedder.width)]
        return table.column(key).to_pylist(), np.stack(columns, axis=1)


@pytest.fixture(scope="module", params=["V1", "V2"])
def golden(request: pytest.FixtureRequest, shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    return Golden(request.param, shared_data, tmp_path_factory.mktemp("golden"))


def _compare(ours: dict[str, np.ndarray], keys: list[str], published_nd: np.ndarray) -> None:
    difference = max(float(np.abs(ours[key] - row).max()) for key, row in zip(keys, published_nd, strict=True))
    print(f"largest difference {difference:.1e} over {len(keys)} vectors")
    assert difference < TOLERANCE


@pytest.mark.parametrize("layer", ["last", "second_to_last"])
def test_cell_embeddings(golden: Golden, layer: str) -> None:
    keys, published_nd = golden.table(f"cell_layer{PUBLISHED[layer]}", "cell_id")
    assert sorted(keys) == sorted(golden.cell_ids)
    vectors_nd = golden.embedder.embed_cells(golden.cells, layer=layer, pooling="mean_genes")
    _compare(dict(zip(golden.cell_ids, vectors_nd, strict=True)), keys, published_nd)


@pytest.mark.parametrize("layer", ["last", "second_to_last"])
def test_cls_embeddings(golden: Golden, layer: str) -> None:
    if golden.vocabulary.cls is None:
        with pytest.raises(SettingsError, match="<cls>"):
            golden.embedder.embed_cells(golden.cells, layer=layer, pooling="cls")
        return
    keys, published_nd = golden.table(f"cls_layer{PUBLISHED[layer]}", "cell_id")
    assert sorted(keys) == sorted(golden.cell_ids)
    vectors_nd = golden.embedder.embed_cells(golden.cells, layer=layer, pooling="cls")
    _compare(dict(zip(golden.cell_ids, vectors_nd, strict=True)), keys, published_nd)


def test_gene_table(golden: Golden) -> None:
    keys, published_nd = golden.table("gene_layer-1", "token")
    genes = [row for row, key in enumerate(keys) if not key.startswith("<")]
    ours = gene_table(golden.embedder, golden.cells, layer="second_to_last")
    assert sorted(ours.gene_ids) == sorted(keys[row] for row in genes)
    vectors = dict(zip(ours.gene_ids, ours.embeddings_gd, strict=True))
    _compare(vectors, [keys[row] for row in genes], published_nd[genes])


def test_special_tokens_of_the_gene_table(golden: Golden) -> None:
    """The published table also has means of <cls> and <eos>: here they come from the per-token embeddings."""
    keys, published_nd = golden.table("gene_layer-1", "token")
    specials = [row for row, key in enumerate(keys) if key.startswith("<")]
    assert len(specials) == (0 if golden.vocabulary.cls is None else 2)
    if not specials:
        return
    embedded = golden.embedder.embed_genes(golden.cells, layer="second_to_last")
    ours = {"<cls>": np.mean([cell[0] for cell in embedded], axis=0)}
    ours["<eos>"] = np.mean([cell[-1] for cell in embedded], axis=0)
    _compare(ours, [keys[row] for row in specials], published_nd[specials])
