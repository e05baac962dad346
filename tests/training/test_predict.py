"""A fitted head on the cells of a corpus, as `genescale predict` asks: the same answers as the model gives directly."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import anndata
import numpy as np
import pandas
import pyarrow.parquet as pq
import pytest
from scipy import sparse

from genescale.ingestion.corpus import Corpus
from genescale.platform.bundle import Bundle, write_bundle
from genescale.platform.cli import main
from genescale.platform.errors import CorpusError, IntegrityError
from genescale.platform.vocabulary import UnknownGeneError
from genescale.training.evaluation.out_of_distribution import Reference, reference
from genescale.training.heads.corpus_answers import compare, predict_corpus
from genescale.training.heads.head import LinearHead
from genescale.training.heads.head_files import HEAD_TENSORS, head_files, references_of
from genescale.training.heads.predict import load_heads
from genescale.training.heads.spec import HeadKind, HeadSpec, bundle_kind
from tests.training.conftest import CELL_TYPES, WIDTH, make_bundle, make_vocabulary

SECOND = "dataset_id = 'atlas-1'"


def head_of(kind: HeadKind, label: str, classes: tuple[str, ...] = (), *, seed: int = 0) -> LinearHead:
    """A head of the last layer with drawn weights."""
    spec = HeadSpec(label=label, kind=kind, classes=classes, width=WIDTH, layer="last", pooling="mean_genes")
    head, generator = LinearHead(spec), np.random.default_rng(seed)
    head.standardise(generator.normal(size=(50, WIDTH)).astype(np.float32))
    if kind == "number":
        head.standardise_target(np.linspace(10, 80, 50))
    return head.eval()


def model_bundle(
    folder: Path, encoder: Bundle, heads: Sequence[LinearHead], references: Sequence[Reference] = ()
) -> Bundle:
    return write_bundle(
        folder,
        kind=bundle_kind([head.spec for head in heads]),
        config=encoder.config,
        weights=encoder.weights(),
        vocabulary=encoder.vocabulary,
        lineage={},
        extra=head_files(heads, references),
    )


def usual(seed: int) -> Reference:
    """What some drawn vectors look like."""
    generator = np.random.default_rng(seed)
    return reference(generator.normal(size=(80, WIDTH)), generator.integers(2, size=80))


@pytest.fixture(scope="module")
def cell_bundle(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Bundle) -> Bundle:
    """Cell types and an age, each with what its examples look like."""
    heads = [head_of("cell_classes", "cell_type", CELL_TYPES), head_of("number", "age/years", seed=1)]
    return model_bundle(tmp_path_factory.mktemp("cells") / "b", tiny_bundle, heads, [usual(0), usual(1)])


@pytest.fixture(scope="module")
def gene_bundle(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Bundle) -> Bundle:
    """A class of genes."""
    head = head_of("gene_classes", "driver", ("driven", "driver"))
    return model_bundle(tmp_path_factory.mktemp("genes") / "b", tiny_bundle, [head], [usual(2)])


def test_cells_get_what_the_model_says_of_them(cell_bundle: Bundle, tiny_corpus: Corpus) -> None:
    model = load_heads(cell_bundle, device="cpu")
    types, ages = predict_corpus(model, tiny_corpus, where=SECOND)
    names = tiny_corpus.cells(["cell_id", "dataset_id", "source_row"]).to_pandas()
    chosen = np.flatnonzero(names["dataset_id"] == "atlas-1")
    direct = model.predict_cells(tiny_corpus.tokens(chosen.tolist()))
    assert types.ids_u.tolist() == names["cell_id"][chosen].tolist()
    assert types.source_rows_u is not None
    assert types.source_rows_u.tolist() == names["source_row"][chosen].tolist()
    assert np.allclose(types.probabilities, direct[0].probabilities_nc, atol=1e-6)
    assert np.allclose(ages.values_u, direct[1].numbers_n, rtol=1e-5)
    vectors_nd = model.embedder.embed_cells(tiny_corpus.tokens(chosen.tolist()), layer="last", pooling="mean_genes")
    for found, seed in ((types, 0), (ages, 1)):
        assert found.out_of_distribution_u == pytest.approx(usual(seed).scores(vectors_nd), abs=1e-3)


def test_a_draw_is_of_the_condition_and_repeats(cell_bundle: Bundle, tiny_corpus: Corpus) -> None:
    model = load_heads(cell_bundle, device="cpu")
    whole = predict_corpus(model, tiny_corpus, where=SECOND)[0]
    few, again, other = (
        predict_corpus(model, tiny_corpus, where=SECOND, max_cells=20, seed=seed)[0] for seed in (3, 3, 4)
    )
    assert len(few) == 20
    assert few.ids_u.tolist() == again.ids_u.tolist() != other.ids_u.tolist()
    at = [whole.ids_u.tolist().index(name) for name in few.ids_u]
    assert np.allclose(few.probabilities, whole.probabilities[at], atol=1e-6)


def test_genes_get_the_mean_over_the_cells(gene_bundle: Bundle, tiny_corpus: Corpus) -> None:
    model = load_heads(gene_bundle, device="cpu")
    (found,) = predict_corpus(model, tiny_corpus, where=SECOND, genes=["GENE3", "ENSG00000000001", "GENE3"])
    assert found.ids_u.tolist() == ["ENSG00000000001", "ENSG00000000003"]
    assert found.names_u is not None
    assert found.names_u.tolist() == ["GENE1", "GENE3"]
    cells = tiny_corpus.tokens(list(range(180, 360)))
    token = tiny_corpus.vocabulary.token("GENE3")
    rows = [
        hidden_td.numpy()[block[cell] == token]
        for block in [cells]
        for part in model.embedder.hidden(block, layer="last")
        for cell, hidden_td in part.per_cell()
        if (block[cell] == token).any()
    ]
    vectors_nd = np.concatenate(rows)
    answers_nc = model.heads[0].answer(vectors_nd)
    assert found.rows_u is not None
    assert found.rows_u[1] == len(rows) > 10
    assert found.probabilities[1] == pytest.approx(answers_nc.mean(axis=0), abs=1e-5)
    assert found.spread_u is not None
    assert found.spread_u[1] == pytest.approx(answers_nc.std(axis=0)[found.codes_u[1]], abs=1e-5)
    assert found.out_of_distribution_u is not None
    assert found.out_of_distribution_u[1] == pytest.approx(usual(2).scores(vectors_nd).mean(), abs=1e-3)


def test_a_model_without_a_reference_says_nothing_of_it(
    tmp_path: Path, tiny_bundle: Bundle, tiny_corpus: Corpus
) -> None:
    bundle = model_bundle(tmp_path / "b", tiny_bundle, [head_of("cell_classes", "cell_type", CELL_TYPES)])
    assert references_of(bundle) == (None,)
    (found,) = predict_corpus(load_heads(bundle, device="cpu"), tiny_corpus, max_cells=10)
    assert found.out_of_distribution_u is None
    assert "out_of_distribution" not in found.table().column_names


def test_half_a_reference_is_damage(tmp_path: Path, tiny_bundle: Bundle) -> None:
    head = head_of("cell_classes", "cell_type", CELL_TYPES)
    files = head_files([head], [usual(0)])
    tensors = dict(files[HEAD_TENSORS])  # type: ignore[call-overload]
    del tensors["0.reference.means_cd"]
    bundle = write_bundle(
        tmp_path / "b",
        kind="cell_classifier",
        config=tiny_bundle.config,
        weights=tiny_bundle.weights(),
        vocabulary=tiny_bundle.vocabulary,
        lineage={},
        extra={**files, HEAD_TENSORS: tensors},
    )
    with pytest.raises(IntegrityError, match="no whole reference"):
        load_heads(bundle, device="cpu")


def test_two_sets_of_cells_are_compared_gene_by_gene(gene_bundle: Bundle, tiny_corpus: Corpus) -> None:
    model = load_heads(gene_bundle, device="cpu")
    first, second = (predict_corpus(model, tiny_corpus, where=f"dataset_id = 'atlas-{number}'")[0] for number in (0, 1))
    itself, other = compare(first, first, confidence=0.5), compare(first, second, confidence=0.5)
    assert (itself.agreement.value, itself.units, itself.only_first) == (1.0, len(first), 0)
    shared = sorted(set(first.ids_u) & set(second.ids_u))
    called = [dict(zip(one.ids_u, one.codes_u, strict=True)) for one in (first, second)]
    assert other.units == len(shared)
    assert other.agreement.value == pytest.approx(np.mean([called[0][gene] == called[1][gene] for gene in shared]))


def test_what_cannot_be_answered_is_refused(
    tmp_path: Path, cell_bundle: Bundle, gene_bundle: Bundle, tiny_corpus: Corpus
) -> None:
    model = load_heads(gene_bundle, device="cpu")
    with pytest.raises(UnknownGeneError, match="GENNE3"):
        predict_corpus(model, tiny_corpus, genes=["GENNE3"])
    with pytest.raises(CorpusError, match="none of the 360 cells"):
        predict_corpus(model, tiny_corpus, where="dataset_id = 'atlas-7'")
    bare = make_bundle(tmp_path / "bare", make_vocabulary(framed=False))
    other = model_bundle(tmp_path / "other", bare, [head_of("cell_classes", "cell_type", CELL_TYPES)])
    with pytest.raises(CorpusError, match="vocabulary"):
        predict_corpus(load_heads(other, device="cpu"), tiny_corpus)


def test_the_command_writes_answers_and_annotates_the_atlas(
    cell_bundle: Bundle, tiny_corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"atlas-0-cell-{i // 2}" if i % 2 == 0 else f"dropped-{i}" for i in range(360)]
    matrix = sparse.csr_matrix(np.ones((360, 2), dtype=np.float32))
    anndata.AnnData(X=matrix, obs=pandas.DataFrame(index=names)).write_h5ad(tmp_path / "atlas-0.h5ad")
    out, typed = tmp_path / "out", tmp_path / "typed.h5ad"
    shared = [str(cell_bundle.folder), "--corpus", tiny_corpus.uri, "--device", "cpu", "--output", str(out)]
    where = ["--where", "dataset_id = 'atlas-0'"]
    assert main(["predict", *shared, *where, "--h5ad", str(tmp_path / "atlas-0.h5ad"), str(typed)]) == 0
    assert "180 of 360 cells" in capsys.readouterr().out
    obs = anndata.read_h5ad(typed).obs
    for file, column, value in (
        ("cell_type", "genescale_cell_type", "predicted"),
        ("age_years", "genescale_age_years", "predicted"),
    ):
        table = pq.read_table(out / f"{file}.parquet").to_pandas().set_index("cell_id")
        said, wanted = obs.loc[table.index, column].tolist(), table[value].tolist()
        assert said == (wanted if isinstance(wanted[0], str) else pytest.approx(wanted, rel=1e-5))
        scores = obs.loc[table.index, f"{column}_out_of_distribution"]
        assert scores.tolist() == pytest.approx(table["out_of_distribution"].tolist(), rel=1e-5)
    assert obs["genescale_cell_type"].isna().sum() == 180


def test_the_command_compares_genes(
    gene_bundle: Bundle, tiny_corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shared = [str(gene_bundle.folder), "--corpus", tiny_corpus.uri, "--device", "cpu", "--output", str(out)]
    sets = ["--where", "dataset_id = 'atlas-0'", "--against", SECOND, "--confidence", "0.5"]
    assert main(["predict", *shared, *sets, "--genes", "GENE1,GENE2,GENE28"]) == 0
    shown = capsys.readouterr().out
    assert "left out     1 of the genes" in shown  # no cell has GENE28
    found = json.loads((out / "concordance.json").read_text(encoding="utf-8"))
    assert found["units"] == 2


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("cells", ["--against", SECOND], "only genes can be read in other cells"),
        ("cells", ["--h5ad", "nowhere.h5ad", "out.h5ad"], "nowhere"),
        ("cells", ["--genes", "GENE1"], "answers for cells, not for genes"),
        ("genes", ["--h5ad", "in.h5ad", "out.h5ad"], "a row for each cell"),
        ("genes", ["--against", "dataset_id = 'atlas-7'"], "none of the 360 cells"),
        ("genes", ["--genes", "GENNE1"], "GENE1"),
        ("cells", ["--max-cells", "-1"], "cannot be drawn"),
        ("cells", ["--confidence", "2"], "no probability"),
    ],
)
def test_mistakes_end_before_any_work(
    cell_bundle: Bundle,
    gene_bundle: Bundle,
    tiny_corpus: Corpus,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    model: str,
    options: list[str],
    message: str,
) -> None:
    bundle = cell_bundle if model == "cells" else gene_bundle
    shared = [str(bundle.folder), "--corpus", tiny_corpus.uri, "--device", "cpu", "--output", str(tmp_path / "out")]
    assert main(["predict", *shared, *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
