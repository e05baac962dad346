"""Is an edit more than what matched genes do? A test whose null is a matched gene, seen in the same donors.

Legend: `r` rows (a gene in a cell), `e` genes (or sets) of a `Sample`, `u` donors.

The excess of gene e in cell c of donor u, in units of the spread of its controls, is taken as

    gene_e + gene_by_donor_eu + cell_euc,      variances  rho, omega, kappa.

Under the null a gene is an ordinary matched gene: gene_e is not zero but a draw of variance rho, because any two genes
differ and with enough cells every gene differs from the mean of its controls. The statistic is

    T = mean / sqrt(rho (1 + 1/k) + v),     v: variance of the mean over donors (over cells when there is one donor).

v comes from few donors. Like a moderated t it is drawn towards what all genes say: (d0 v0 + (D-1) v) / (d0 + D - 1)
with d0 + D - 1 degrees of freedom (Smyth, "Linear models and empirical Bayes methods", Stat. Appl. Genet. Mol. Biol. 3,
2004), where v0 follows from omega, kappa and the gene's cells. rho is the least value >= 0 at which the median p of the
reference genes is one half: the between-study variance of Paule and Mandel (J. Res. Natl Bur. Stand. 87, 1982) with the
median in place of the mean, so that true effects among them do not move it (the central matching of Efron,
"Large-scale simultaneous hypothesis testing", J. Am. Stat. Assoc. 99, 2004). It is known as well as 0.37 times as many
values would tell, and its degrees of freedom join those of v by Satterthwaite's rule.

Reference genes are the control genes where the screen has named controls, else all edited genes themselves. Control
genes are null by design, so where they suffice p is the plain rank test: the share of control genes whose |T| is as
large.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Over = Literal["donor", "cell"]
Test = Literal["rank", "calibrated", "bound", "zero"]
FEWEST_REFERENCES = 19
"""Fewer reference genes cannot tell how far ordinary genes differ: with 19, a rank test can say p = 0.05 at best."""
FEWEST_FOR_TAIL = 100
"""From so many reference genes on, p may be smaller than one over their number."""
FEWEST_FOR_PRIOR = 20
SIGNIFICANT = 0.05
MEDIAN_EFFICIENCY = 0.37
"""What a spread taken from a median is worth beside a standard deviation of as many normal values (Hampel 1974)."""
TAILS = (2.0, 3.0, 4.0, 5.0, 7.0, 10.0, 15.0)
_PRIOR_FREEDOM = 20
_RANK_BINS = 20
_MANY = 1e6


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """Excess of each gene in units of its controls' spread, and how well it is known."""

    mean_e: Floats
    variance_e: Floats
    """Of the mean, from this gene's own donors (or cells); NaN with one."""
    n_e: Ints
    """Donors (or cells)."""
    freedom_e: Floats
    """Degrees of freedom of that variance."""
    per_cell_e: Floats
    """What the variance of a single cell is multiplied by in the variance of the mean."""
    per_donor_e: Floats
    """What the variance between donors is multiplied by in it; 0 over cells."""
    controls_e: Floats
    """Controls of a cell, on average."""
    within_squares_e: Floats
    """Sum of squares between cells of one donor, and its degrees of freedom."""
    within_freedom_e: Floats

    @property
    def usable_e(self) -> npt.NDArray[np.bool_]:
        """Genes with a mean that was seen more than once."""
        return np.isfinite(self.mean_e) & (self.n_e > 1)

    def take(self, chosen_e: npt.NDArray[np.bool_]) -> Sample:
        """The chosen genes."""
        return Sample(**{name: values[chosen_e] for name, values in vars(self).items()})


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """One row per gene and cell: what is left of a shift when its controls' mean is subtracted."""

    gene_r: Ints
    donor_r: Ints
    excess_r: Floats
    spread_r: Floats
    """Variance between the controls of the row."""
    controls_r: Floats
    rank_r: Floats

    def known(self) -> Rows:
        """Rows with an excess and a spread."""
        known_r = np.isfinite(self.excess_r) & np.isfinite(self.spread_r)
        return Rows(**{name: values[known_r] for name, values in vars(self).items()})


@dataclass(frozen=True, kw_only=True, eq=False)
class Tested:
    """Statistic and p of each edit, and the variances behind them."""

    z_e: Floats
    """Signed, as a normal deviate."""
    p_e: Floats
    n_e: Ints
    """Donors (or cells) with an excess."""
    test: Test
    n_references: int
    between_genes: float
    """rho: how much ordinary genes differ, in units of the spread of controls in one cell."""
    between_donors: float
    within_donor: float
    prior_freedom: float
    """d0; 0 when variances could not be pooled."""


@dataclass(frozen=True, kw_only=True)
class _Model:
    omega: float
    kappa: float
    scale: float
    freedom: float

    def expected_e(self, sample: Sample) -> Floats:
        """Variance of each mean that the pooled components foresee."""
        return self.omega * sample.per_donor_e + self.kappa * sample.per_cell_e


def unmatched(gene_r: Ints, donor_r: Ints, value_r: Floats) -> Rows:
    """Rows of values that are tested in their own units, as if their spread were known to be one."""
    same = (np.ones(len(value_r)), np.full(len(value_r), _MANY), np.zeros(len(value_r)))
    return Rows(gene_r=gene_r, donor_r=donor_r, excess_r=value_r, spread_r=same[0], controls_r=same[1], rank_r=same[2])


def sample(rows: Rows, n_genes: int, n_donors: int, *, over: Over) -> Sample:
    """Summaries of each gene in units of its controls' spread; donors weigh the same, whatever their cells."""
    rows = rows.known()
    spread_e = _spread(rows, n_genes)
    with np.errstate(divide="ignore", invalid="ignore"):
        value_r = rows.excess_r / np.sqrt(spread_e[rows.gene_r])
    value_r = np.where(np.isfinite(value_r), value_r, 0.0)
    size = n_genes * n_donors
    place_r = rows.gene_r * n_donors + rows.donor_r
    count_eu = np.bincount(place_r, minlength=size).reshape(n_genes, n_donors)
    sum_eu = np.bincount(place_r, weights=value_r, minlength=size).reshape(n_genes, n_donors)
    mean_eu = np.divide(sum_eu, count_eu, out=np.zeros(sum_eu.shape), where=count_eu > 0)
    squares_r = (value_r - mean_eu.ravel()[place_r]) ** 2
    within_e = np.bincount(place_r, weights=squares_r, minlength=size).reshape(n_genes, n_donors).sum(axis=1)
    cells_e, donors_e = count_eu.sum(axis=1), (count_eu > 0).sum(axis=1)
    freedom_e = (cells_e - donors_e).astype(np.float64)
    controls_e = _mean_by(rows.gene_r, rows.controls_r, n_genes)
    if over == "donor":
        mean_e = _ratio(mean_eu.sum(axis=1), donors_e)
        between_e = np.where(count_eu > 0, (mean_eu - mean_e[:, None]) ** 2, 0.0).sum(axis=1)
        inverse_eu = np.divide(1.0, count_eu, out=np.zeros(count_eu.shape), where=count_eu > 0)
        n_e, variance_e = donors_e, _ratio(between_e, donors_e * (donors_e - 1))
        per_cell_e, per_donor_e = _ratio(inverse_eu.sum(axis=1), donors_e**2), _ratio(np.ones(n_genes), donors_e)
    else:
        # All cells count the same; differences between unknown or single donors are no part of the question.
        mean_e = _ratio(sum_eu.sum(axis=1), cells_e)
        total_e = np.bincount(rows.gene_r, weights=(value_r - mean_e[rows.gene_r]) ** 2, minlength=n_genes)
        within_e, freedom_e = total_e, np.maximum(cells_e - 1.0, 0.0)
        n_e, variance_e = cells_e, _ratio(total_e, cells_e * (cells_e - 1))
        per_cell_e, per_donor_e = _ratio(np.ones(n_genes), cells_e), np.zeros(n_genes)
    return Sample(
        mean_e=np.where(spread_e > 0, mean_e, np.nan),
        variance_e=variance_e,
        n_e=n_e,
        freedom_e=np.maximum(n_e - 1.0, 0.0),
        per_cell_e=per_cell_e,
        per_donor_e=per_donor_e,
        controls_e=controls_e,
        within_squares_e=within_e,
        within_freedom_e=freedom_e,
    )


def against_matched(edits: Sample, references: Sample | None) -> Tested:
    """Test every edit against the reference genes; `None` takes the edits themselves for reference."""
    own = references is None
    known = edits if references is None else references
    known = known.take(known.usable_e)
    model = _model(known if len(known.mean_e) >= FEWEST_REFERENCES else edits.take(edits.usable_e))
    if len(known.mean_e) < FEWEST_REFERENCES:
        # Genes cannot differ by more than the whole spread of controls, so taking it all for theirs is safe.
        z_e, p_e = _scores(edits, model, rho=1.0)
        return _tested(edits.n_e, z_e, p_e, "bound", 0, 1.0, model)
    rho_freedom = MEDIAN_EFFICIENCY * len(known.mean_e)
    rho = _between_genes(known, model, rho_freedom)
    z_e, p_e = _scores(edits, model, rho=rho, rho_freedom=rho_freedom)
    if own:
        return _tested(edits.n_e, z_e, p_e, "calibrated", len(known.mean_e), rho, model)
    reference_j = _scores(known, model, rho=rho, rho_freedom=rho_freedom)[0][_well_known(known)]
    n_references = len(reference_j)
    fine_enough = SIGNIFICANT * (n_references + 1) >= edits.usable_e.sum()
    if n_references >= FEWEST_FOR_TAIL and not fine_enough:
        return _tested(edits.n_e, z_e, _tail_p(z_e, reference_j), "calibrated", n_references, rho, model)
    p_e = _rank_p(z_e, reference_j)
    return _tested(edits.n_e, z_e, p_e, "rank", n_references, rho, model)


def against_zero(edits: Sample) -> Tested:
    """Test whether each mean is zero, by a moderated t alone: for differences in which the gene itself cancels."""
    model = _model(edits.take(edits.usable_e))
    z_e, p_e = _scores(edits, model, rho=0.0)
    return _tested(edits.n_e, z_e, p_e, "zero", 0, 0.0, model)


def _tested(n_e: Ints, z_e: Floats, p_e: Floats, test: Test, n_references: int, rho: float, model: _Model) -> Tested:
    return Tested(
        z_e=z_e,
        p_e=p_e,
        n_e=n_e,
        test=test,
        n_references=n_references,
        between_genes=rho,
        between_donors=model.omega,
        within_donor=model.kappa,
        prior_freedom=model.freedom,
    )


def _spread(rows: Rows, n_genes: int) -> Floats:
    """Variance between controls for each gene, drawn towards what is usual at its ranks."""
    freedom_r = rows.controls_r - 1
    edges = np.quantile(rows.rank_r, np.linspace(0, 1, _RANK_BINS + 1)[1:-1]) if len(rows.rank_r) else np.zeros(0)
    bin_r = np.searchsorted(edges, rows.rank_r, side="right")
    weight_b = np.bincount(bin_r, weights=freedom_r, minlength=_RANK_BINS)
    usual_b = _ratio(np.bincount(bin_r, weights=freedom_r * rows.spread_r, minlength=_RANK_BINS), weight_b)
    usual_e = _mean_by(rows.gene_r, usual_b[bin_r], n_genes)
    squares_e = np.bincount(rows.gene_r, weights=freedom_r * rows.spread_r, minlength=n_genes)
    freedom_e = np.bincount(rows.gene_r, weights=freedom_r, minlength=n_genes)
    return np.nan_to_num((squares_e + _PRIOR_FREEDOM * usual_e) / (freedom_e + _PRIOR_FREEDOM))


def _model(known: Sample) -> _Model:
    """Variance components pooled over genes, and how far single genes depart from them (Smyth 2004, section 6.2)."""
    from scipy.special import digamma, polygamma

    kappa = _ratio(np.array(known.within_squares_e.sum()), np.array(known.within_freedom_e.sum()), fill=0.0)
    freedom_e = known.freedom_e
    left_e = known.variance_e - float(kappa) * known.per_cell_e
    weight_e = freedom_e * known.per_donor_e
    omega = float(_ratio(np.array((freedom_e * left_e)[weight_e > 0].sum()), np.array(weight_e.sum()), fill=0.0))
    model = _Model(omega=max(omega, 0.0), kappa=float(kappa), scale=1.0, freedom=0.0)
    ratio_e = _ratio(known.variance_e, model.expected_e(known))
    good_e = np.isfinite(ratio_e) & (freedom_e > 0)
    if good_e.sum() < FEWEST_FOR_PRIOR or not (ratio_e[good_e] > 0).any():
        return model
    ratio_e, half_e = ratio_e[good_e], freedom_e[good_e] / 2
    logs_e = np.log(np.maximum(ratio_e, 1e-5 * np.median(ratio_e[ratio_e > 0]))) - digamma(half_e) + np.log(half_e)
    excess = float(np.var(logs_e, ddof=1) - polygamma(1, half_e).mean())
    if excess <= 0:
        return _Model(omega=model.omega, kappa=model.kappa, scale=float(ratio_e.mean()), freedom=np.inf)
    half = _inverse_trigamma(excess)
    scale = float(np.exp(logs_e.mean() + digamma(half) - np.log(half)))
    return _Model(omega=model.omega, kappa=model.kappa, scale=scale, freedom=2 * half)


def _inverse_trigamma(value: float) -> float:
    """x with trigamma(x) = value, by bisection in log x."""
    from scipy.optimize import brentq
    from scipy.special import polygamma

    if value > 1e7:
        return float(1 / np.sqrt(value))
    if value < 1e-6:
        return 1 / value
    return float(np.exp(brentq(lambda x: float(polygamma(1, np.exp(x))) - value, -10, 16)))


def _scores(genes: Sample, model: _Model, *, rho: float, rho_freedom: float = np.inf) -> tuple[Floats, Floats]:
    """Signed normal deviate and two-sided p of each gene; NaN for one seen only once."""
    from scipy.stats import norm, t

    own_freedom_e = freedom_e = genes.freedom_e
    variance_e = np.nan_to_num(genes.variance_e)
    if np.isinf(model.freedom):
        variance_e, freedom_e = model.scale * model.expected_e(genes), np.full(len(variance_e), np.inf)
    elif model.freedom > 0:
        prior_e = model.freedom * model.scale * model.expected_e(genes)
        freedom_e = own_freedom_e + model.freedom
        variance_e = (prior_e + own_freedom_e * variance_e) / freedom_e
    between_e = rho * (1 + _ratio(np.ones(len(variance_e)), genes.controls_e, fill=0.0))
    whole_e = between_e + variance_e
    usable_e = genes.usable_e & (whole_e > 0)
    t_e = np.divide(genes.mean_e, np.sqrt(whole_e), out=np.full(len(whole_e), np.nan), where=usable_e)
    # Satterthwaite's degrees of freedom of a sum of two estimated variances.
    with np.errstate(divide="ignore", invalid="ignore"):
        uncertain_e = np.nan_to_num(variance_e**2 / freedom_e) + between_e**2 / rho_freedom
    freedom_e = np.divide(whole_e**2, uncertain_e, out=np.full(len(whole_e), np.inf), where=uncertain_e > 0)
    p_e = 2 * np.where(np.isfinite(freedom_e), t.sf(np.abs(t_e), np.minimum(freedom_e, 1e9)), norm.sf(np.abs(t_e)))
    z_e = np.sign(t_e) * norm.isf(np.maximum(p_e, 1e-300) / 2)
    return np.where(usable_e, z_e, np.nan), np.where(usable_e, p_e, np.nan)


def _between_genes(known: Sample, model: _Model, rho_freedom: float) -> float:
    """rho: the least value at which half of the reference genes have p above one half."""

    def median(rho: float) -> float:
        return float(np.nanmedian(_scores(known, model, rho=rho, rho_freedom=rho_freedom)[1]))

    if median(0.0) >= 0.5:
        return 0.0
    low, high = 0.0, 1.0
    while median(high) < 0.5:
        low, high = high, 4 * high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if median(middle) < 0.5 else (low, middle)
    return high


def _well_known(known: Sample) -> npt.NDArray[np.bool_]:
    """The half of many reference genes that was seen best: noise would hide how far single genes stand out."""
    noise_e = known.per_cell_e + known.per_donor_e
    enough = len(noise_e) >= 2 * FEWEST_FOR_TAIL
    best_e: npt.NDArray[np.bool_] = noise_e <= (np.median(noise_e) if enough else np.inf)
    return best_e


def _tail_p(z_e: Floats, reference_j: Floats) -> Floats:
    """p by Student's t with the reference genes' median and the tail that they make most likely.

    Some genes stand far out without being edited on purpose; a normal tail would call each of them a discovery. The
    normal is left only for a tail that is more likely by one unit of log-likelihood, as Akaike's criterion asks.
    """
    from scipy.stats import norm, t

    known_j = reference_j[np.isfinite(reference_j)]
    best, scale, most = np.inf, 1.0, float(norm.logpdf(known_j).sum()) + 1.0
    for freedom in TAILS:
        width = norm.ppf(0.75) / t.ppf(0.75, freedom)
        likelihood = float(t.logpdf(known_j, freedom, scale=width).sum())
        if likelihood > most:
            best, scale, most = freedom, width, likelihood
    tail = norm if np.isinf(best) else t(best)
    return np.asarray(2 * tail.sf(np.abs(z_e) / scale))


def _rank_p(z_e: Floats, reference_j: Floats) -> Floats:
    """Share of reference genes at least as extreme, the edit itself counted among them (Phipson and Smyth 2010)."""
    size_j = np.sort(np.abs(reference_j[np.isfinite(reference_j)]))
    as_large_e = len(size_j) - np.searchsorted(size_j, np.abs(z_e), side="left")
    return np.where(np.isfinite(z_e), (1 + as_large_e) / (1 + len(size_j)), np.nan)


def _mean_by(gene_r: Ints, values_r: Floats, n_genes: int) -> Floats:
    return _ratio(np.bincount(gene_r, weights=values_r, minlength=n_genes), np.bincount(gene_r, minlength=n_genes))


def _ratio(above: npt.NDArray[np.generic], below: npt.NDArray[np.generic], *, fill: float = np.nan) -> Floats:
    over, under = np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64)
    return np.divide(over, under, out=np.full(np.broadcast(over, under).shape, fill), where=under > 0)
