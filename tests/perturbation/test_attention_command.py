"""`genescale perturb attention` as a user types it, on an encoder whose heads are built by hand."""

from __future__ import annotations

import io
import json
from pathlib import Path

import networkx
import numpy as np
import polars as pl
import pytest
import torch

from genescale.ingestion.corpus import Corpus
from genescale.perturbation.attention.config import AttentionConfig
from genescale.perturbation.attention.corpus_attention import AttentionResult, attend_corpus
from genescale.platform.bundle import Bundle, open_bundle, write_bundle
from genescale.platform.cli import main
from genescale.platform.errors import CorpusError, InputError, LimitError, SettingsError, UnknownGeneError
from genescale.platform.settings import Settings
from genescale.platform.storage import Store
from genescale.platform.tracking import MemoryTracker
from genescale.training.model import EncoderConfig, new_model
from genescale.training.weights import to_hf
from tests.perturbation.conftest import N_GENES, WINDOW, symbol, tiny_vocabulary, write_corpus

REGULATORS = tuple(range(3, 59, 7))
LIST = ",".join(symbol(gene) for gene in REGULATORS)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Corpus]:
    """An encoder whose head 2 of layer 1 looks at eight regulators alone, and 48 cells of eight donors.

    The first channel of a regulator's embedding is high; that head asks for it, all other heads ask for nothing.
    """
    folder = tmp_path_factory.mktemp("built")
    vocabulary = tiny_vocabulary(framed=True)
    config = EncoderConfig(
        vocabulary_size=vocabulary.size, width=16, layers=2, heads=2, feed_forward=16, positions=WINDOW
    )
    model = new_model(config, seed=0)
    with torch.no_grad():
        tokens_vd = model.encoder.embeddings.tokens.weight
        tokens_vd[1:].normal_(0.0, 0.3, generator=torch.Generator().manual_seed(1))
        tokens_vd[:, 0] = 0.0
        tokens_vd[[vocabulary.token(symbol(gene)) for gene in REGULATORS], 0] = 8.0
        for layer in model.encoder.layers:
            layer.attention.qkv.weight[:32].zero_()
            layer.attention.qkv.bias[:32].zero_()
        chosen = model.encoder.layers[0].attention.qkv
        chosen.bias[8] = 8.0  # the query of head 2, whatever the gene
        chosen.weight[16 + 8, 0] = 2.0  # its key: the channel of regulators
    weights = to_hf(model)
    bundle = write_bundle(
        folder / "bundle",
        kind="masked_gene_model",
        config=config.to_hf(),
        weights=weights,
        vocabulary=vocabulary,
        lineage={},
    )
    generator = np.random.default_rng(8)
    cells = []
    for _ in range(48):
        genes = generator.permutation(np.arange(1, N_GENES))[:40]
        framed = [vocabulary.cls, *(vocabulary.token(symbol(int(gene))) for gene in genes), vocabulary.eos]
        cells.append(np.array(framed, dtype=vocabulary.token_dtype))
    corpus = write_corpus(str(folder / "corpus"), vocabulary, Store(Settings().storage), cells)
    return open_bundle(bundle.folder), corpus


def run(built: tuple[Bundle, Corpus], out: Path, **options: object) -> AttentionResult:
    bundle, corpus = built
    config = AttentionConfig(device="cpu", draws=100, **options)  # type: ignore[arg-type]
    return attend_corpus(bundle, corpus, config, tracker=MemoryTracker(), out_uri=str(out), store=corpus.store)


def test_the_head_that_looks_at_regulators_is_found_and_no_other(built: tuple[Bundle, Corpus], tmp_path: Path) -> None:
    result = run(built, tmp_path / "out", genes=LIST, graph="59", controls=5)
    lists = pl.read_parquet(tmp_path / "out" / "lists.parquet")
    rows = {(row["layer"], row["head"]): row for row in lists.iter_rows(named=True)}
    assert set(rows) == {(layer, head) for layer in (1, 2) for head in (0, 1, 2)}
    hit = rows[1, 2]
    assert hit["place"] == 1.0
    assert hit["share"] > 0.95
    assert hit["ratio"] > 20
    assert (hit["n_genes"], hit["n_listed"], hit["n_donors"], hit["donors_above"]) == (8, 8, 6, 6)
    # Eight genes of eight, six donors of six: the larger is that of the donors, over four heads.
    assert hit["p_donors"] == pytest.approx(2 / 64)
    assert hit["p"] == pytest.approx(2 / 64)
    assert hit["q"] == pytest.approx(4 * 2 / 64)
    for place in ((1, 1), (2, 1), (2, 2)):
        assert rows[place]["ratio"] == pytest.approx(1.0, abs=1e-5)
        assert rows[place]["p"] == 1.0
    assert json.loads((tmp_path / "out" / "attention.json").read_text())["lists"][0]["tested_genes"] == 8

    genes = pl.read_parquet(tmp_path / "out" / "genes.parquet").sort("received_layer_1", descending=True)
    assert set(genes["symbol"].head(8)) == {symbol(gene) for gene in REGULATORS}
    edges = pl.read_parquet(tmp_path / "out" / "graph_edges.parquet").sort("relative", descending=True)
    assert set(edges["target_symbol"].head(300)) == {symbol(gene) for gene in REGULATORS}
    assert edges["relative"][0] > 2
    heads = pl.read_parquet(tmp_path / "out" / "heads.parquet").filter(pl.col("from_rank") == "all")
    wide = {(row["layer"], row["head"]): row["looked_at_share"] for row in heads.iter_rows(named=True)}
    assert wide[1, 1] == pytest.approx(1.0, abs=1e-4)
    assert wide[1, 2] < 0.25
    assert result.n_cells == 48


def test_the_graph_is_read_by_networkx_and_agrees_with_the_table(built: tuple[Bundle, Corpus], tmp_path: Path) -> None:
    options = {"graph_layers": (1,), "graph_heads": (2,), "edges": 30, "edge_order": "lift", "min_cells": 10}
    run(built, tmp_path / "out", genes=LIST, graph="lists", **options)
    graph = networkx.read_graphml(io.BytesIO((tmp_path / "out" / "graph.graphml").read_bytes()))
    edges = pl.read_csv(tmp_path / "out" / "graph_edges.csv")
    nodes = pl.read_csv(tmp_path / "out" / "graph_nodes.csv")
    assert graph.is_directed()
    assert set(graph.nodes) == set(nodes["gene_id"])
    assert set(nodes["symbol"]) == {symbol(gene) for gene in REGULATORS}
    assert len(edges) == 30
    for row in edges.iter_rows(named=True):
        assert graph.edges[row["source"], row["target"]]["relative"] == pytest.approx(row["relative"])
        assert row["n_cells"] >= 10
    assert edges["lift"].is_sorted(descending=True)
    assert graph.nodes[nodes["gene_id"][0]]["lists"] == "genes"
    assert graph.graph["n_cells"] == 48


def test_cells_are_chosen_and_counted_and_the_same_command_gives_the_same_files(
    built: tuple[Bundle, Corpus], tmp_path: Path
) -> None:
    options = {"where": "cell_type = 'b_cell'", "max_cells": 7, "graph": "none", "min_cells": 2}
    first, second = (run(built, tmp_path / name, **options) for name in ("a", "b"))
    assert first.n_cells == 7
    assert dict(first.left_out) == {"not selected by where": 32, "not drawn": 9}
    assert first.tables.genes.equals(second.tables.genes)
    assert not (tmp_path / "a" / "graph.graphml").exists()
    assert not (tmp_path / "a" / "lists.csv").exists()
    assert run(built, tmp_path / "c", **{**options, "seed": 1}).tables.genes.equals(first.tables.genes) is False


def test_the_page_escapes_names_and_says_what_is_absent(built: tuple[Bundle, Corpus], tmp_path: Path) -> None:
    lists = {"<b>one</b>": ["GENE0"], "two & three": ["GENE1", "GENE2", "GENE3", "GENE4", "NOT1"]}
    path = tmp_path / "lists.json"
    path.write_text(json.dumps(lists), encoding="utf-8")
    run(built, tmp_path / "out", genes=str(path), graph="10")
    page = (tmp_path / "out" / "attention.html").read_text(encoding="utf-8")
    assert "<b>one</b>" not in page
    assert "&lt;b&gt;one&lt;/b&gt;: not measured, no gene of the list is in 5 cells" in page
    assert "two &amp; three: measured but not tested, 4 of its genes" in page
    assert "1 names are not in the vocabulary: NOT1" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    record = json.loads((tmp_path / "out" / "attention.json").read_text())
    assert [one["in_no_cell_with_a_match"] for one in record["lists"]] == [1, 0]
    assert record["lists"][1]["outside_the_vocabulary"] == ["NOT1"]


def test_what_cannot_be_done_is_refused_before_anything_is_written(
    built: tuple[Bundle, Corpus], corpus: Corpus, bare_bundle: Bundle, tmp_path: Path
) -> None:
    for wrong, options in (
        (UnknownGeneError, {"genes": "GENE1,GENEE2"}),
        (InputError, {"where": "cell_type ="}),
        (CorpusError, {"where": "cell_typ = 'b_cell'"}),
        (CorpusError, {"where": "cell_type = 'none such'"}),
        (SettingsError, {"graph_layers": (3,)}),
        (SettingsError, {"graph_heads": (3,)}),
    ):
        with pytest.raises(wrong):
            run(built, tmp_path / "out", **options)
    with pytest.raises(CorpusError, match="vocabulary"):
        run((bare_bundle, corpus), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"graph": "1"}, "a graph of 1 genes"),
        ({"graph": "everything"}, "says no genes"),
        ({"graph": "lists"}, "there are no lists"),
        ({"graph_layers": (0,)}, "numbered from 1"),
        ({"edge_order": "weight"}, "no order of edges"),
        ({"controls": 0}, "too small"),
        ({"confidence": 1.0}, "confidence"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        AttentionConfig(**options)  # type: ignore[arg-type]


def test_a_graph_of_too_many_genes_is_refused(
    built: tuple[Bundle, Corpus], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("genescale.perturbation.attention.analysis.MOST_GRAPH_GENES", 20)
    with pytest.raises(LimitError, match="the graph would have"):
        run(built, tmp_path / "out", genes=LIST, graph="20")


def test_from_the_command_line_with_a_tracked_run(
    built: tuple[Bundle, Corpus], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = MemoryTracker()
    monkeypatch.setattr("genescale.platform.tracking.open_tracker", lambda settings: tracker)
    bundle, corpus = built
    out = tmp_path / "out"
    options = ["--corpus", corpus.uri, "--output", str(out), "--genes", LIST, "--max-cells", "30", "--graph", "20"]
    shared = ["--device", "cpu", "--draws", "100", "--graph-layers", "1,2"]
    assert main(["perturb", "attention", str(bundle.folder), *options, *shared]) == 0
    shown = capsys.readouterr().out
    assert "list     genes: 8 genes receive more attention" in shown
    assert f"report   {out}/attention.html" in shown
    record = json.loads((out / "attention.json").read_text())
    assert record["config"]["graph_layers"] == [1, 2]
    assert {path.name for path in out.iterdir()} == {*record["files"], "attention.html", "attention.json"}
    (run,) = tracker.runs.values()
    assert (run.status, run.params["bundle_digest"], run.metrics["cells"][0][1]) == ("FINISHED", bundle.digest, 30.0)
    assert run.files["attention/attention.html"] == (out / "attention.html").read_bytes()
    assert run.id == record["provenance"]["run_id"]

    assert main(["perturb", "attention", str(bundle.folder), *options, *shared, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cells"]["looked_at"] == 30
    assert main(["perturb", "attention", str(bundle.folder), *options, *shared, "--edges", "-1"]) == 2
    assert "error [settings]" in capsys.readouterr().err
