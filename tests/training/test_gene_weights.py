"""Weights of genes beside a head: a model of what genes a cell has, with whatever the encoder makes of the cell."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from sklearn.linear_model import LogisticRegression

from genescale.ingestion.corpus import Corpus
from genescale.platform.bundle import Bundle, write_bundle
from genescale.platform.errors import InputError, IntegrityError, SettingsError
from genescale.platform.tracking import MemoryTracker
from genescale.serving.classifier import heads_on
from genescale.training.evaluation.baselines_features import rank_vectors
from genescale.training.fitting.finetune import FinetuneConfig, FinetuneResult, finetune
from genescale.training.fitting.gene_weights import _Cells, _fit, with_gene_weights
from genescale.training.heads.head import LinearHead
from genescale.training.heads.head_files import head_files, heads_of
from genescale.training.heads.predict import HeadModel, load_heads
from genescale.training.heads.published_heads import export_head

BESIDE = FinetuneConfig(
    epochs=4, fractions=(0.6, 0.2, 0.2), cells_per_batch=32, device="cpu", learning_rate=3e-2, gene_weights=True
)


def fit(bundle: Bundle, corpus: Corpus, out: Path, **changes: object) -> FinetuneResult:
    return finetune(bundle, corpus, dataclasses.replace(BESIDE, **changes), tracker=MemoryTracker(), out=out)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Bundle, tiny_corpus: Corpus) -> FinetuneResult:
    return fit(tiny_bundle, tiny_corpus, tmp_path_factory.mktemp("beside"))


@pytest.fixture(scope="module")
def model(fitted: FinetuneResult) -> HeadModel:
    return load_heads(fitted.bundle, device="cpu")


def cells_of(corpus: Corpus, count: int = 40) -> list[np.ndarray]:
    return corpus.tokens(list(range(0, corpus.n_cells, corpus.n_cells // count))[:count])


def test_the_linear_part_is_scikit_learns(fitted: FinetuneResult, model: HeadModel, tiny_corpus: Corpus) -> None:
    """Taken alone, it gives the probabilities of a logistic regression on ones and zeros, with one of the penalties."""
    (head,) = model.heads
    assert isinstance(head, LinearHead)
    task = fitted.task
    train = task.examples.take(task.folds.splits[0].train)
    features = rank_vectors(tiny_corpus, train.index_n)
    features.data[:] = 1
    cells = cells_of(tiny_corpus)
    mine = head._of_genes(cells).numpy()
    mine = np.exp(mine - np.logaddexp.reduce(mine, axis=1, keepdims=True))
    shown = np.zeros((len(cells), tiny_corpus.vocabulary.size))
    for row, cell in enumerate(cells):
        shown[row, cell] = 1
    away = []
    for penalty in (0.03, 0.1, 0.3, 1.0):
        theirs = LogisticRegression(C=penalty, tol=1e-3, max_iter=300).fit(features, train.targets[0])
        away.append(np.abs(theirs.predict_proba(shown) - mine).max())
    assert min(away) < 1e-3
    assert sorted(away)[1] > 5e-3, "the penalties cannot be told apart"


def test_the_answer_is_the_mean_of_both_logits(model: HeadModel, tiny_corpus: Corpus) -> None:
    cells = cells_of(tiny_corpus)
    (head,) = model.heads
    assert isinstance(head, LinearHead)
    vectors_nd = model.embedder.embed_cells(cells, layer=head.spec.layer, pooling=head.spec.pooling)
    plain = LinearHead(dataclasses.replace(head.spec, genes=0)).eval()
    plain.load_state_dict({name: value for name, value in head.state_dict().items() if not name.startswith("gene_")})
    logits_nc = (np.log(plain.answer(vectors_nd)) + head._of_genes(cells).numpy()) / 2
    wanted_nc = np.exp(logits_nc - np.logaddexp.reduce(logits_nc, axis=1, keepdims=True))
    (found,) = model.predict_cells(cells)
    np.testing.assert_allclose(found.answers_nc, wanted_nc, atol=1e-5)
    assert np.abs(found.answers_nc - plain.answer(vectors_nd)).max() > 0.01


def test_the_report_is_of_what_the_bundle_answers(
    fitted: FinetuneResult, model: HeadModel, tiny_corpus: Corpus
) -> None:
    ids = tiny_corpus.cells(["cell_id"])["cell_id"].to_pylist()
    wanted = fitted.predictions["cell_id"].to_pylist()
    (answer,) = model.predict_cells(tiny_corpus.tokens([ids.index(cell) for cell in wanted]))
    assert np.allclose(answer.probabilities_nc.max(axis=1), fitted.predictions["probability"].to_numpy(), atol=1e-6)


@pytest.mark.parametrize("changes", [{"folds": 2}, {"refit": True}, {"encoder": "trained", "layer": "last"}], ids=str)
def test_it_goes_with_every_kind_of_fit(
    changes: dict[str, object], tiny_bundle: Bundle, tiny_corpus: Corpus, tmp_path: Path
) -> None:
    result = fit(tiny_bundle, tiny_corpus, tmp_path, epochs=1, **changes)
    (head,) = heads_of(result.bundle)
    assert head.spec.genes == tiny_corpus.vocabulary.size
    # One epoch teaches the network little; what is known comes from the genes.
    assert result.macro_f1 > 0.8


def test_the_service_answers_alike_alone_and_in_company(
    fitted: FinetuneResult, model: HeadModel, tiny_corpus: Corpus
) -> None:
    cells = cells_of(tiny_corpus, 6)
    served = heads_on(model.embedder, fitted.bundle)
    assert served is not None
    together = served.classify(cells, None).answers[0]
    for row, cell in enumerate(cells):
        np.testing.assert_array_equal(together[row], served.classify([cell], None).answers[0][0])
    np.testing.assert_allclose(together, model.predict_cells(cells)[0].answers_nc, atol=1e-6)


def test_vectors_alone_are_not_enough(model: HeadModel) -> None:
    with pytest.raises(InputError, match="the genes of the cells are not given"):
        model.heads[0].answer(np.zeros((1, model.specs[0].width), dtype=np.float32))


def test_it_has_no_published_layout(fitted: FinetuneResult) -> None:
    with pytest.raises(InputError, match="weights of genes"):
        export_head(fitted.bundle)


@pytest.mark.parametrize(
    "changes", [{"kind": "number"}, {"head": "nearest"}, {"unit": "genes", "genes": "lists.csv"}], ids=str
)
def test_where_it_means_nothing_it_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(SettingsError, match="gene_weights"):
        dataclasses.replace(BESIDE, **changes)  # type: ignore[arg-type]


def test_weights_of_another_vocabulary_are_damage(
    fitted: FinetuneResult, model: HeadModel, tiny_corpus: Corpus, tmp_path: Path
) -> None:
    (head,) = model.heads
    few = LinearHead(dataclasses.replace(head.spec, genes=7))
    bundle = write_bundle(
        tmp_path / "few",
        kind=fitted.bundle.kind,
        config=fitted.bundle.config,
        weights=fitted.bundle.weights(),
        vocabulary=fitted.bundle.vocabulary,
        lineage={},
        extra=head_files([few]),
    )
    with pytest.raises(IntegrityError, match="other genes than the vocabulary"):
        heads_of(bundle)


@pytest.mark.parametrize(("codes", "n_classes"), [((0, 1), 2), ((0, 2), 3), ((0, 1, 2), 3)], ids=str)
def test_classes_are_told_apart_and_an_absent_one_is_never_named(codes: tuple[int, ...], n_classes: int) -> None:
    draws = np.random.default_rng(0)
    codes_n = np.repeat(codes, 30)
    genes_nv = (draws.random((len(codes_n), 12)) < 0.2).astype(np.float32)
    # Gene c is that of class c, gene 11 nobody's.
    genes_nv[np.arange(len(codes_n)), codes_n] = 1
    genes_nv[:, 11] = 0
    weights_vc, bias_c = _fit(_Cells(genes_nv=csr_array(genes_nv), codes_n=codes_n), 1.0, n_classes, BESIDE)
    logits_nc = genes_nv @ weights_vc + bias_c
    assert (logits_nc.argmax(axis=1) == codes_n).mean() > 0.8
    assert not weights_vc[11].any()
    theirs = LogisticRegression(C=1.0, tol=1e-3, max_iter=300).fit(genes_nv, codes_n).predict_proba(genes_nv)
    mine = np.exp(logits_nc - np.logaddexp.reduce(logits_nc, axis=1, keepdims=True))
    np.testing.assert_allclose(mine[:, list(codes)], theirs, atol=1e-3)


def test_the_random_state_is_left_alone(model: HeadModel, fitted: FinetuneResult, tiny_corpus: Corpus) -> None:
    split, examples = fitted.task.folds.splits[0], fitted.task.examples
    plain = LinearHead(dataclasses.replace(model.specs[0], genes=0)).eval()
    before = torch.get_rng_state()
    heads, penalties = with_gene_weights(
        [plain], tiny_corpus, examples.take(split.train), examples.take(split.validation), BESIDE, [(0.5,)],
    )  # fmt: skip
    assert penalties == (0.5,)
    assert heads[0].spec.genes == tiny_corpus.vocabulary.size
    assert torch.equal(torch.get_rng_state(), before)
