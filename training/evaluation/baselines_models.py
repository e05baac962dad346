"""The simple classifiers themselves: scikit-learn's, one thread, with settings chosen on the validation part.

Axis suffixes: `u` units, `k` features, `c` classes.

The penalty of linear models is chosen by macro F1 (numbers: squared error) on the validation part, which is what the
head's best epoch is chosen by, so that neither side has seen more; without validation units the middle one is taken.
Features are scaled by their largest training value.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from genescale.platform.errors import InputError
from genescale.training.evaluation.scores import score

CLASSIFIERS = ("logistic_regression", "random_forest", "linear_svm")
REGRESSORS = ("ridge_regression", "random_forest")
MODEL_NAMES = {
    "logistic_regression": "Logistic regression",
    "random_forest": "Random forest",
    "linear_svm": "Linear SVM",
    "ridge_regression": "Ridge regression",
    "majority": "Most frequent class",
    "mean": "Mean of training",
}
PENALTIES: dict[str, tuple[float, ...]] = {
    "logistic_regression": (0.01, 0.1, 1.0),
    "linear_svm": (0.001, 0.01, 0.1),
    "ridge_regression": (10.0, 100.0, 1000.0),
}
TREES = 200
_MOST_ITERATIONS = 300
_CALIBRATION_FOLDS = 3


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """Features (u, k) of some units with their codes or numbers (u)."""

    features_uk: Any
    targets_u: npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """Probabilities (u, c) or numbers (u) of the test units, and what was chosen and seen on the way."""

    values: npt.NDArray[np.float64]
    facts: dict[str, Any]


def fit_and_predict(
    name: str, train: Part, validation: Part, test_uk: Any, *, n_classes: int, seed: int, trees: int = TREES
) -> Answer:
    """Fit a baseline and predict the test units: probabilities, or numbers when `n_classes` is 0.

    A class without a training unit has probability 0. Raises InputError when training has fewer than two classes, or a
    class too small for the SVM's calibration.
    """
    if n_classes and len(np.unique(train.targets_u)) < 2:
        raise InputError("its training part holds one class only.", where=f"baseline {name}")
    shown = train.features_uk.max(axis=0)
    scale_k = np.asarray(shown.toarray() if hasattr(shown, "toarray") else shown, dtype=np.float64).ravel()
    # Features that no training unit has cannot be learnt from, and only cost time.
    used_k = np.flatnonzero(scale_k > 0)
    if not len(used_k):
        raise InputError("no training unit has any feature.", where=f"baseline {name}")
    facts: dict[str, Any] = {"training_units": len(train.targets_u), "features": len(used_k)}

    def scaled(features_uk: Any) -> Any:
        from scipy import sparse

        found = sparse.csr_array(features_uk)[:, used_k] @ sparse.diags_array(1 / scale_k[used_k])
        # Trees take 32-bit indices only, and SciPy keeps whatever the features came with.
        parts = (found.data, found.indices.astype(np.int32), found.indptr.astype(np.int32))
        return sparse.csr_array(parts, shape=found.shape)

    train_uk, validation_uk, test_scaled_uk = (scaled(x) for x in (train.features_uk, validation.features_uk, test_uk))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model = _chosen(
            name, train_uk, train.targets_u, validation_uk, validation.targets_u, n_classes, seed, facts, trees
        )
        n_test = test_scaled_uk.shape[0]
        if n_classes:
            values = np.zeros((n_test, n_classes))
            if n_test:
                values[:, model.classes_] = model.predict_proba(test_scaled_uk)
        else:
            values = model.predict(test_scaled_uk) if n_test else np.empty(0)
    if any("onverge" in str(warning.message) for warning in seen):
        facts["not_converged"] = True
    return Answer(values=np.asarray(values, dtype=np.float64), facts=facts)


def _chosen(
    name: str,
    train_uk: Any,
    train_u: npt.NDArray[Any],
    validation_uk: Any,
    validation_u: npt.NDArray[Any],
    n_classes: int,
    seed: int,
    facts: dict[str, Any],
    trees: int,
) -> Any:
    """The fitted model with the penalty that does best on the validation part."""
    if name == "random_forest":
        facts["trees"] = trees
        return _forest(n_classes, seed, trees).fit(train_uk, train_u)
    if name not in PENALTIES or (name == "ridge_regression") == bool(n_classes):
        kind = f"{n_classes} classes" if n_classes else "numbers"
        known = ", ".join(CLASSIFIERS if n_classes else REGRESSORS)
        raise InputError(f"there is no baseline '{name}' for {kind}.", where="baselines", fix=f"Use {known}.")
    penalties = PENALTIES[name]
    if not len(validation_u):
        penalties = penalties[1:2]
    best, best_quality = None, -np.inf
    for penalty in penalties:
        model = _linear(name, penalty, seed).fit(train_uk, train_u)
        quality = _quality(model.predict(validation_uk), validation_u, n_classes) if len(validation_u) else 0.0
        if best is None or quality > best_quality:
            best, best_quality, facts["penalty"] = model, quality, penalty
    return _calibrated(best, train_uk, train_u) if name == "linear_svm" else best


def _forest(n_classes: int, seed: int, trees: int) -> Any:
    from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor

    kind = RandomForestClassifier if n_classes else RandomForestRegressor
    return kind(n_estimators=trees, max_features="sqrt", random_state=seed, n_jobs=1)


def _linear(name: str, penalty: float, seed: int) -> Any:
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.svm import LinearSVC

    if name == "ridge_regression":
        return Ridge(alpha=penalty, solver="auto")
    if name == "linear_svm":
        return LinearSVC(C=penalty, random_state=seed, max_iter=_MOST_ITERATIONS * 10)
    return LogisticRegression(C=penalty, tol=1e-3, max_iter=_MOST_ITERATIONS)


def _calibrated(model: Any, train_uk: Any, train_u: npt.NDArray[Any]) -> Any:
    """Probabilities of an SVM: a sigmoid on its decision values, fitted on held-out parts of the training part."""
    from sklearn.base import clone
    from sklearn.calibration import CalibratedClassifierCV

    smallest = int(np.unique(train_u, return_counts=True)[1].min())
    if smallest < 2:
        raise InputError("a class has one training unit, and calibration needs two.", where="baseline linear_svm")
    folds = min(_CALIBRATION_FOLDS, smallest)
    return CalibratedClassifierCV(clone(model), method="sigmoid", cv=folds, ensemble=False).fit(train_uk, train_u)


def _quality(predicted_u: npt.NDArray[Any], true_u: npt.NDArray[Any], n_classes: int) -> float:
    """Macro F1, or minus the squared error."""
    if n_classes:
        return score(true_u, predicted_u.astype(np.int64), [str(code) for code in range(n_classes)]).macro_f1
    return -float(((predicted_u - true_u) ** 2).mean())
