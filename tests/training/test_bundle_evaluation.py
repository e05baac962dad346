"""`genescale evaluate`: what the report says is what was measured, left-out cells are counted, bad input is refused."""

from __future__ import annotations

import dataclasses
import io
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from genescale.ingestion.corpus import Corpus
from genescale.platform.bundle import Bundle
from genescale.platform.errors import CorpusError, InputError, SettingsError
from genescale.platform.settings import StorageSettings
from genescale.platform.storage import Store
from genescale.platform.tracking import MemoryTracker
from genescale.training.embedder import Embedder, gene_table
from genescale.training.evaluation.bundle_evaluation import BundleEvaluation, embedded, evaluate_bundle
from genescale.training.evaluation.bundle_report import page, verdict
from genescale.training.evaluation.measured_cells import EvaluateConfig, measured_cells, shown_values
from genescale.training.evaluation.umap_figure import MOST_CLASSES, class_looks, number_looks, scatter, umap_coordinates

CONFIG = EvaluateConfig(max_cells=120, min_cells_per_gene=5, bootstrap=60, device="cpu", skip=("umap",))


def evaluate(
    bundle: Bundle, corpus: Corpus, out: Path, config: EvaluateConfig, tracker: MemoryTracker | None = None
) -> BundleEvaluation:
    return evaluate_bundle(
        bundle, corpus, config, tracker=tracker or MemoryTracker(), out_uri=str(out), store=Store(StorageSettings())
    )


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(scope="module")
def tracker() -> MemoryTracker:
    return MemoryTracker()


@pytest.fixture(scope="module")
def measured(out: Path, tracker: MemoryTracker, tiny_bundle: Bundle, tiny_corpus: Corpus) -> BundleEvaluation:
    return evaluate(tiny_bundle, tiny_corpus, out, CONFIG, tracker)


def test_the_files_hold_what_was_measured(measured: BundleEvaluation, out: Path, tracker: MemoryTracker) -> None:
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert measured.overall is not None
    assert report["hidden_genes"]["overall"]["loss"]["model"]["mean"] == pytest.approx(
        measured.overall.loss["model"].mean
    )
    assert report["left_out_parts"] == {"umap": "left out on request"}
    html = (out / "report.html").read_text(encoding="utf-8")
    assert f"{measured.overall.loss['model'].mean:.3f}" in html
    table = pq.read_table(io.BytesIO((out / "cells.parquet").read_bytes()))
    assert table.num_rows == report["cells"]["measured"] == 120
    (run,) = tracker.runs.values()
    assert run.metrics["hidden_gene_loss_model"][0][1] == pytest.approx(measured.overall.loss["model"].mean)
    assert {"evaluation/report.html", "evaluation/report.json"} <= set(run.files)


def test_strata_of_a_column_add_up_to_all_hidden_genes(measured: BundleEvaluation, tiny_corpus: Corpus) -> None:
    assert measured.overall is not None
    assert set(measured.by_column) == {"dataset_id", "cell_type", "donor_id"}
    for rows in (*measured.by_column.values(), measured.by_rank):
        assert sum(row.genes for row in rows) == measured.overall.genes
        weighted = sum(row.genes * row.loss["model"].mean for row in rows) / measured.overall.genes
        assert weighted == pytest.approx(measured.overall.loss["model"].mean)
    named = {row.name: row.cells for row in measured.by_column["cell_type"]}
    assert "no value" in named
    assert sum(named.values()) == 120
    assert measured.cells.left_out == {"not drawn": tiny_corpus.n_cells - 120}
    assert measured.cells.resampled == "8 values of donor_id"


def test_a_random_model_is_said_to_know_less_than_frequencies(measured: BundleEvaluation) -> None:
    sentence, good = verdict(measured)
    assert not good
    assert "less than gene frequencies" in sentence


def test_the_page_is_well_formed_and_escapes_what_files_say(measured: BundleEvaluation) -> None:
    title = "<script>alert(1)</script>"
    html = page(dataclasses.replace(measured, title=title, coordinates_n2=np.random.default_rng(0).random((120, 2))))
    assert title not in html

    waiting: list[str] = []

    class Balance(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in ("meta", "line", "circle", "path", "br"):
                waiting.append(tag)

        def handle_endtag(self, tag: str) -> None:
            if tag not in ("line", "circle", "path"):
                assert waiting.pop() == tag

    Balance().feed(html)
    assert waiting == []
    assert html.count('class="map"') >= 3


def test_vectors_and_gene_means_are_those_of_the_embedder(tiny_bundle: Bundle, tiny_corpus: Corpus) -> None:
    from genescale.platform.progress import SILENT

    embedder = Embedder.load(tiny_bundle, device="cpu")
    index = np.array([3, 50, 200, 201, 359])
    vectors, table = embedded(embedder, tiny_corpus, index, "last", "mean_genes", SILENT)
    cells = tiny_corpus.tokens(index.tolist())
    np.testing.assert_allclose(vectors, embedder.embed_cells(cells, layer="last"), atol=1e-6)
    expected = gene_table(embedder, cells, layer="last")
    assert table.gene_ids == expected.gene_ids
    np.testing.assert_allclose(table.embeddings_gd, expected.embeddings_gd, atol=1e-6)


def test_gene_lists_are_looked_up_and_an_unknown_one_is_refused_before_anything_runs(
    tmp_path: Path, tiny_bundle: Bundle, tiny_corpus: Corpus
) -> None:
    (tmp_path / "markers.txt").write_text("GENE0\nGENE1\nGENE2\nGENE3\nNOSUCH\n", encoding="utf-8")
    skip = ("hidden_genes", "mixing", "umap")
    config = dataclasses.replace(CONFIG, genes=str(tmp_path / "markers.txt"), skip=skip)
    found = evaluate(tiny_bundle, tiny_corpus, tmp_path / "a", config)
    assert found.genes is not None
    assert {gene.symbol for gene in found.genes.genes} == {"GENE0", "GENE1", "GENE2", "GENE3"}
    assert [(one.name, one.genes) for one in found.genes.lists] == [("markers", 4)]
    (tmp_path / "none.txt").write_text("NOSUCH\n", encoding="utf-8")
    with pytest.raises(InputError, match="no gene of 'none'"):
        evaluate(tiny_bundle, tiny_corpus, tmp_path / "b", dataclasses.replace(config, genes=f"{tmp_path}/none.txt"))
    assert not (tmp_path / "b").exists()


def test_bad_columns_and_parts_are_refused_with_the_nearest_name(tiny_corpus: Corpus) -> None:
    with pytest.raises(CorpusError, match="cell_type"):
        measured_cells(tiny_corpus, EvaluateConfig(label="cell_typ"))
    with pytest.raises(SettingsError, match="hidden_genes"):
        EvaluateConfig(skip=("hidden",))
    with pytest.raises(SettingsError, match="Leave one part"):
        EvaluateConfig(skip=("hidden_genes", "neighbourhoods", "mixing", "umap"))


def test_few_donors_are_not_resampled_and_the_report_says_so(tiny_corpus: Corpus) -> None:
    cells = measured_cells(tiny_corpus, EvaluateConfig(where="dataset_id = 'atlas-0'"))
    assert "only 4 donors" in cells.resampled
    assert len(set(cells.group_n.tolist())) == len(cells.index_n)
    assert cells.left_out == {"not selected by where": 180}


def test_rarer_values_are_put_together_and_counted() -> None:
    values = np.array([f"v{i:02d}" for i in range(40) for _ in range(50 - i)] + [""] * 3)
    codes, names = shown_values(values)
    assert names[0] == "v00"
    assert names[-2:] == ["10 rarer values", "no value"]
    assert (codes == len(names) - 1).sum() == 3
    assert np.bincount(codes).sum() == len(values)


def test_maps_show_every_cell_once_and_twenty_classes_apart() -> None:
    values = [f"type {i % 24}" for i in range(480)] + [""] * 7
    looks = class_looks(values)
    assert sorted(np.concatenate([look.cells for look in looks]).tolist()) == list(range(487))
    shown = [look for look in looks if look.label]
    assert len(shown) == MOST_CLASSES
    assert len({(look.colour, look.mark) for look in shown}) == MOST_CLASSES
    svg = scatter(np.random.default_rng(0).normal(size=(487, 2)), looks, label="cells")
    assert "4 rarer values" in svg
    numbers = number_looks(np.array([*range(100), np.nan]))
    assert sum(len(look.cells) for look in numbers) == 101
    assert [len(look.cells) for look in number_looks(np.ones(5))] == [5]


@pytest.mark.slow
def test_the_map_of_the_same_vectors_is_the_same() -> None:
    vectors = np.random.default_rng(0).normal(size=(60, 8))
    vectors[:30] += 20
    first, second = (umap_coordinates(vectors, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    centres = first[:30].mean(axis=0), first[30:].mean(axis=0)
    assert np.linalg.norm(centres[0] - centres[1]) > 4 * first[:30].std(axis=0).max()
