"""The published in-silico perturbation, reproduced: outputs of the published code (commit ff551ee) on a random model.

Both runs took the published defaults: layer -1, which is `second_to_last` here; for the bare layout (V1) the mode
`cell`, which is `remaining_genes` here, and for the framed layout (V2) the mode `cls`. The published results are
float32, so cosines agree to about 1e-7; movements toward a goal are of the order 1e-4 and are held to 3e-7.
Overexpression has no per-gene values here: the published code stores them under the wrong gene.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from genescale.perturbation.editing.edits import Kind
from genescale.perturbation.perturb import EditAnswer, EditRequest, perturb_cell, perturb_cells
from genescale.perturbation.readouts.shift import Measure
from genescale.platform.bundle import adopt_checkpoint
from genescale.platform.settings import StorageSettings
from genescale.platform.storage import Store
from genescale.platform.vocabulary import read_vocabulary
from genescale.training.embedder import Embedder

pytestmark = pytest.mark.shared
COSINE_TOLERANCE = 2e-6
GOAL_TOLERANCE = 3e-7
VOCABULARIES = {"V1": "gc30M", "V2": "gc104M"}
MEASURES: dict[str, Measure] = {"V1": "remaining_genes", "V2": "cls"}


@dataclass(frozen=True)
class Golden:
    """One published run: the model, its cells and what the published code answered."""

    embedder: Embedder
    measure: Measure
    cells: pl.DataFrame
    small_cells: list[np.ndarray]
    answers: pl.DataFrame
    states: dict[str, np.ndarray]

    def keys_and_values(self, run: str) -> Iterator[tuple[Any, list[float]]]:
        rows = self.answers.filter(pl.col("run") == run)
        assert len(rows) > 0
        for key, values in rows.select("key", "values").iter_rows():
            yield json.loads(key), values

    def cells_of(self, state: str | None = None) -> list[np.ndarray]:
        """Tokens of the cells, longest first, as the published code orders them."""
        chosen = self.cells if state is None else self.cells.filter(pl.col("state") == state)
        return sorted((np.array(row) for row in chosen["input_ids"].to_list()), key=len, reverse=True)

    def genes_of(self, tokens: np.ndarray) -> list[int]:
        special = set(self.embedder.vocabulary.special.values())
        return [int(token) for token in tokens if int(token) not in special]

    def every_gene(self, kind: Kind, tokens: np.ndarray, **wanted: Any) -> list[EditAnswer]:
        requests = [EditRequest(kind=kind, genes=(gene,)) for gene in self.genes_of(tokens)]
        return perturb_cell(self.embedder, tokens, requests, measure=self.measure, **wanted)


@pytest.fixture(scope="module", params=["V1", "V2"])
def golden(request: pytest.FixtureRequest, shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    version: str = request.param
    folder = shared_data / "golden" / f"forward_{version}"
    name = f"geneformer_{VOCABULARIES[version]}_genes.tsv"
    vocabulary = read_vocabulary(str(shared_data / "vocabularies" / name), Store(StorageSettings()))
    bundle = adopt_checkpoint(folder / "model", vocabulary, tmp_path_factory.mktemp(version) / "bundle")
    small = pl.read_parquet(folder / "small_cells.parquet")["input_ids"].to_list()
    return Golden(
        embedder=Embedder.load(bundle, device="cpu"),
        measure=MEASURES[version],
        cells=pl.read_parquet(folder / "cells.parquet"),
        small_cells=[np.array(tokens) for tokens in small],
        answers=pl.read_parquet(folder / "perturbation.parquet"),
        states={k: np.array(v) for k, v in json.loads((folder / "states.json").read_text()).items()},
    )


def assert_same_values(ours: dict[Any, list[float]], published: dict[Any, list[float]], tolerance: float) -> None:
    """Same keys, and per key the same values, one per cell, in any order."""
    assert ours.keys() == published.keys()
    for key, values in published.items():
        np.testing.assert_allclose(sorted(ours[key]), sorted(values), rtol=0, atol=tolerance, err_msg=str(key))


@pytest.mark.parametrize(("kind", "run"), [("delete", "delete_all"), ("overexpress", "overexpress_all")])
def test_every_gene_of_a_cell(golden: Golden, kind: Kind, run: str) -> None:
    published, ours = defaultdict(list), defaultdict(list)
    for (gene, label), values in golden.keys_and_values(run):
        assert label == "cell_emb"
        published[gene] += values
    for tokens in golden.small_cells:
        for answer in golden.every_gene(kind, tokens):
            if kind == "overexpress" and answer.ranks == (0,):
                assert answer.cosine == 1.0  # the published code leaves out the gene that is first already
            else:
                ours[answer.request.genes[0]].append(answer.cosine)
    assert_same_values(ours, published, COSINE_TOLERANCE)


def test_every_gene_on_every_other_gene(golden: Golden) -> None:
    published, ours = defaultdict(list), defaultdict(list)
    for key, values in golden.keys_and_values("delete_all_gene"):
        published[tuple(key)] += values
    for tokens in golden.small_cells:
        for answer in golden.every_gene("delete", tokens, gene_shifts_of="all"):
            (gene,) = answer.request.genes
            ours[gene, "cell_emb"].append(answer.cosine)
            for other, cosine in answer.gene_cosines.items():
                ours[gene, other].append(cosine)
    assert_same_values(ours, published, COSINE_TOLERANCE)


@pytest.mark.parametrize(("kind", "run"), [("delete", "group_delete"), ("overexpress", "group_overexpress")])
def test_two_genes_together_in_all_cells(golden: Golden, kind: Kind, run: str) -> None:
    (((genes, _), published),) = golden.keys_and_values(run)
    cells = golden.cells_of()
    request = EditRequest(kind=kind, genes=tuple(genes))
    answers = perturb_cells(golden.embedder, cells, [[request]] * len(cells), measure=golden.measure)
    assert all(not answer.absent for (answer,) in answers)
    # Cells of equal length may stand in either order.
    ours = sorted((-len(tokens), answer.cosine) for tokens, (answer,) in zip(cells, answers, strict=True))
    theirs = sorted((-len(tokens), value) for tokens, value in zip(cells, published, strict=True))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=COSINE_TOLERANCE)


def test_two_genes_deleted_toward_states(golden: Golden) -> None:
    (((genes, _), _),) = golden.keys_and_values("group_delete")
    rows = golden.answers.filter(pl.col("run") == "goal_delete_group").select("key", "by_state")
    assert {json.loads(key)[0] for key, _ in rows.iter_rows()} == set(golden.states)
    request = EditRequest(kind="delete", genes=tuple(genes))
    cells = golden.cells_of("a")
    for key, by_state in rows.iter_rows():
        goal = golden.states[json.loads(key)[0]]
        (published,) = json.loads(by_state).values()
        answers = perturb_cells(golden.embedder, cells, [[request]] * len(cells), measure=golden.measure, goal=goal)
        ours = [answer.goal_shift for (answer,) in answers]
        np.testing.assert_allclose(ours, published, rtol=0, atol=GOAL_TOLERANCE)
