"""Two kinds of genes: those whose edits move cells, and those whose edits do not, as a mixture of two normals.

Legend: `e` edits with a value.

The published analysis takes component 0 of a fit for the one with impact; which component a fit calls 0 is chance (in
44 of 50 fits of its own kind of data it was the other one). Here the component is known by its mean: of the two it is
the one whose mean is farther from no effect (0). And because the wider of two normals claims both far ends, an edit is
of the impact component only on its own side of the other component's mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

from genescale.perturbation.statistics.matched_null import Floats
from genescale.platform.errors import InputError

FEWEST_EDITS = 20
STARTS = 5
CERTAIN = 0.5


@dataclass(frozen=True, kw_only=True, eq=False)
class ImpactMixture:
    """The fit, and each edit's place in it."""

    edits: pl.DataFrame
    """`edit_id`, `gene_id`, `symbol`, the fitted value, `impact_probability`, `impact`; rows by falling probability."""
    impact_mean: float
    impact_sd: float
    impact_weight: float
    other_mean: float
    other_sd: float
    separated: bool
    """Whether two components describe the values better than one (Bayesian information criterion, Schwarz 1978)."""
    bic_gain: float
    """Criterion of one component less that of two: above 10 is strong evidence for two (Kass and Raftery 1995)."""
    n_left_out: int
    """Edits without a value."""


def impact_mixture(effects: pl.DataFrame, *, column: str = "mean", seed: int = 0) -> ImpactMixture:
    """Fit the mixture to one value of each edit of one read-out (rows of `effects`).

    Where one normal does as well, `separated` is false and no edit has impact. Raises InputError below FEWEST_EDITS
    edits with a value, and when rows of several read-outs are given.
    """
    if column not in effects.columns:
        raise InputError(f"there is no column '{column}'.", where="effects", fix="Use 'mean' or 'excess'.")
    if "readout" in effects.columns and effects["readout"].n_unique() > 1:
        raise InputError("the effects are of several read-outs.", where="effects", fix="Choose the rows of one.")
    known = effects.filter(pl.col(column).is_finite())
    if len(known) < FEWEST_EDITS:
        raise InputError(
            f"{len(known)} edits have a {column}: too few for a mixture.",
            where=f"effects: {column}",
            fix=f"Screen at least {FEWEST_EDITS} edits.",
        )
    value_e = known[column].to_numpy()
    centre, width = float(value_e.mean()), float(value_e.std()) or 1.0
    means, sds, weights, gain = _fit((value_e - centre) / width, seed)
    means, sds = means * width + centre, sds * width
    impact = int(np.argmax(np.abs(means)))
    other = 1 - impact
    probability_e = _probabilities(value_e, means, sds, weights, impact)
    separated = gain > 0
    table = known.select("edit_id", "gene_id", "symbol", column).with_columns(
        impact_probability=pl.Series(probability_e), impact=pl.Series(separated & (probability_e > CERTAIN))
    )
    return ImpactMixture(
        edits=table.sort("impact_probability", "edit_id", descending=[True, False]),
        impact_mean=float(means[impact]),
        impact_sd=float(sds[impact]),
        impact_weight=float(weights[impact]),
        other_mean=float(means[other]),
        other_sd=float(sds[other]),
        separated=separated,
        bic_gain=gain,
        n_left_out=len(effects) - len(known),
    )


def _fit(value_e: Floats, seed: int) -> tuple[Floats, Floats, Floats, float]:
    """Means, standard deviations and weights of two components, and by how much they beat one."""
    from sklearn.mixture import GaussianMixture

    values = value_e[:, None]
    two = GaussianMixture(2, n_init=STARTS, random_state=seed, reg_covar=1e-6).fit(values)
    one = GaussianMixture(1, random_state=seed, reg_covar=1e-6).fit(values)
    gain = float(one.bic(values) - two.bic(values))
    return two.means_[:, 0], np.sqrt(two.covariances_[:, 0, 0]), two.weights_, gain


def _probabilities(value_e: Floats, means: Floats, sds: Floats, weights: Floats, impact: int) -> Floats:
    from scipy.stats import norm

    logs_ce = np.stack([np.log(w) + norm.logpdf(value_e, m, s) for m, s, w in zip(means, sds, weights, strict=True)])
    share_e = 1 / (1 + np.exp(np.clip(logs_ce[1 - impact] - logs_ce[impact], -700, 700)))
    away = np.sign(means[impact] - means[1 - impact])
    return np.where((value_e - means[1 - impact]) * away > 0, share_e, 0.0)
