"""Weights of single genes beside the head's network: a linear model on which genes a cell has.

Axis suffixes: `n` cells, `v` genes of the vocabulary by token, `c` classes.

With few labelled cells an encoder blurs what one gene says by itself, and a linear model sees nothing else: they are
wrong about different cells. The idea is that of wide and deep learning (Cheng et al. 2016, arXiv:1606.07792), but the
two are fitted apart: fitted together, what the genes explain is not left for the encoder to learn. The model is
scikit-learn's logistic regression; its penalty is chosen by the log loss on the validation part.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from genescale.ingestion.corpus import Corpus
from genescale.platform.errors import CorpusError
from genescale.platform.log import get_logger
from genescale.training.evaluation.baselines_features import rank_vectors
from genescale.training.fitting.config import FinetuneConfig
from genescale.training.fitting.examples import NO_LABEL, Examples
from genescale.training.heads.head import Head, LinearHead
from genescale.training.labels.splits import at_most

PENALTIES = (0.03, 0.1, 0.3, 1.0)
"""Inverse strengths of the penalty on squared weights, as scikit-learn counts them."""
MOST_CELLS = 10_000
"""Training cells that are used at most, of each class its share: many more take long and change little."""
MOST_ITERATIONS = 300
# Logit of a class that no training cell has; the network has no more reason to name it.
NEVER = -50.0
log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Cells:
    """Labelled cells: which genes they have (n, v), ones and zeros, and their codes (n)."""

    genes_nv: npt.NDArray[np.float32]  # a sparse array, which has no type of its own
    codes_n: npt.NDArray[np.int64]


def with_gene_weights(
    heads: Sequence[Head],
    corpus: Corpus,
    train: Examples,
    validation: Examples | None,
    config: FinetuneConfig,
    penalties: Sequence[Sequence[float]] = (),
) -> tuple[tuple[Head, ...], tuple[float, ...]]:
    """The same heads with weights of genes, fitted on the training cells, and the penalty that each was fitted with.

    penalties: those to choose among for each head, PENALTIES for all by default; without validation cells the middle
    one of them. With `config.refit` the weights are fitted again on both parts. Raises CorpusError when the training
    part of a head has one class.
    """
    found = []
    for number, head in enumerate(heads):
        assert isinstance(head, LinearHead)
        parts = [_labelled(corpus, part, number, config) for part in (train, validation) if part is not None]
        found.append(_with_weights(head, parts, config, penalties[number] if penalties else PENALTIES))
    return tuple(head for head, _ in found), tuple(penalty for _, penalty in found)


def _labelled(corpus: Corpus, examples: Examples, head: int, config: FinetuneConfig) -> _Cells:
    codes_r = examples.targets[head]
    rows = np.flatnonzero(codes_r != NO_LABEL)
    rows = at_most(rows, MOST_CELLS, config.seed, classes_of=codes_r)
    genes_nv = rank_vectors(corpus, examples.index_n[examples.row_cell_r[rows]])
    genes_nv.data[:] = 1
    return _Cells(genes_nv=genes_nv, codes_n=codes_r[rows])


def _with_weights(
    head: LinearHead, parts: Sequence[_Cells], config: FinetuneConfig, penalties: Sequence[float]
) -> tuple[Head, float]:
    train, *others = parts
    if len(np.unique(train.codes_n)) < 2:
        raise CorpusError(
            "the training part has cells of one class only.",
            where=head.spec.label,
            fix="Split by another column, or set gene_weights = false.",
        )
    n_classes = head.spec.outputs
    fits = {penalty: _fit(train, penalty, n_classes, config) for penalty in penalties}
    penalty = sorted(penalties)[len(penalties) // 2]
    if others and len(others[0].codes_n):
        penalty = min(fits, key=lambda one: _log_loss(others[0], *fits[one]))
        if config.refit:
            fits[penalty] = _fit(_together(train, others[0]), penalty, n_classes, config)
    weights_vc, bias_c = fits[penalty]
    with torch.device("meta"):  # no weights are drawn, so that torch's random state is left alone
        made = LinearHead(replace(head.spec, genes=len(weights_vc)))
    kept = {"gene_weights_vc": torch.from_numpy(weights_vc), "gene_bias_c": torch.from_numpy(bias_c)}
    made.load_state_dict({**head.state_dict(), **kept}, assign=True)
    return made.eval(), penalty


def _fit(
    cells: _Cells, penalty: float, n_classes: int, config: FinetuneConfig
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Weights (v, c) and bias (c) of logits."""
    from sklearn.linear_model import LogisticRegression

    # Genes that no training cell has cannot be learnt from.
    used_k = np.flatnonzero(cells.genes_nv.sum(axis=0))
    balanced = "balanced" if config.class_weights == "balanced" else None
    model = LogisticRegression(C=penalty, class_weight=balanced, tol=1e-3, max_iter=MOST_ITERATIONS)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model.fit(cells.genes_nv[:, used_k], cells.codes_n)
    if any("onverge" in str(warning.message) for warning in seen):
        log.warning("weights of genes did not settle in %d iterations (penalty %g)", MOST_ITERATIONS, penalty)
    coefficients_ck, intercepts_c = model.coef_, model.intercept_
    if len(model.classes_) == 2:
        # Of two classes scikit-learn keeps the difference.
        coefficients_ck = np.concatenate([-coefficients_ck, coefficients_ck]) / 2
        intercepts_c = np.concatenate([-intercepts_c, intercepts_c]) / 2
    weights_vc = np.zeros((cells.genes_nv.shape[1], n_classes), dtype=np.float32)
    weights_vc[np.ix_(used_k, model.classes_)] = coefficients_ck.T
    bias_c = np.full(n_classes, NEVER, dtype=np.float32)
    bias_c[model.classes_] = intercepts_c
    return weights_vc, bias_c


def _log_loss(cells: _Cells, weights_vc: npt.NDArray[np.float32], bias_c: npt.NDArray[np.float32]) -> float:
    logits_nc = cells.genes_nv @ weights_vc + bias_c
    chosen_n = np.take_along_axis(logits_nc, cells.codes_n[:, None], axis=1)[:, 0]
    return float((np.logaddexp.reduce(logits_nc, axis=1) - chosen_n).mean())


def _together(one: _Cells, other: _Cells) -> _Cells:
    from scipy import sparse

    genes_nv = sparse.csr_array(sparse.vstack([one.genes_nv, other.genes_nv], format="csr"))
    return _Cells(genes_nv=genes_nv, codes_n=np.concatenate([one.codes_n, other.codes_n]))
