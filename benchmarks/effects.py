"""What the statistics of a screen cost, and whether they keep their promises on data whose truth is known.

    make bench NAME=effects                about two minutes
    make bench NAME=effects ARGS=--quick   under a minute: fewer repeats

Cost: effects of a screen that deletes every detected gene of 500 cells, 20,000 genes in all, on one processor.
Promises: screens are drawn as sums of logarithms (donor, cell, rank, gene, gene by donor, noise); in the null every
gene is an ordinary one, in the others 10 of 200 genes have a planted effect. Reported are the share of p below 0.05 and
0.01 under the null, the share of screens with any discovery, the power and the share of false discoveries at q < 0.05
by effect and donors, and how often the 95 % interval holds the mean of the donors.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import polars as pl
from harness import Row, at_least, at_most, finish, measured, parser

from genescale.perturbation.statistics.effects import effects
from genescale.perturbation.statistics.intervals import Clustered, intervals

GENES, HITS = 200, 10
CELLS = 30
DONORS = (1, 2, 3, 6, 10)
SIZES = (0.5, 1.0, 1.5, 2.0)


def main() -> int:
    arguments = parser((__doc__ or "").split("\n", 1)[0]).parse_args()
    repeats = 6 if arguments.quick else 24
    rows = [*cost(), *null(repeats), *power(max(3, repeats // 4)), *coverage()]
    return finish("effects", rows, ("numpy", "polars", "scipy"), quick=arguments.quick, output=arguments.output)


def cost() -> list[Row]:
    """Wall seconds for every gene of a screen, cell shift with its intervals, test and q."""
    chance_g = np.random.default_rng(0).beta(0.3, 2.5, 20_000) + 0.005
    table = planted(np.random.default_rng(1), donors=6, cells=500, chance_g=chance_g)
    began = time.perf_counter()
    found = effects(table)
    seconds = time.perf_counter() - began
    what = f"effects of {len(found):,} genes, {len(table):,} rows of 500 cells"
    return [at_most(what, seconds, "s", 60, note="2,000 bootstrap draws, 10 matched genes a row")]


def null(repeats: int) -> list[Row]:
    rows = []
    for donors in DONORS:
        tables = list(_tested(repeats, donors=donors))
        p = np.concatenate([table["p"].drop_nulls().to_numpy() for table in tables])
        share = float(np.mean([(table["q"] < 0.05).any() for table in tables]))
        # Four standard errors: the tests of one screen share their controls, so they vary more than lone ones.
        error = 4 * np.sqrt(0.05 * 0.95 / len(p))
        rows += [
            at_most(
                f"{donors} donors, null: p < 0.05", float((p < 0.05).mean()), "share", round(float(0.05 + error), 4)
            ),
            measured(f"{donors} donors, null: p < 0.01", float((p < 0.01).mean()), "share"),
            measured(f"{donors} donors, null: screens with a discovery", share, "share", note=f"{repeats} screens"),
        ]
    return rows


def power(repeats: int) -> list[Row]:
    rows = []
    truth = [f"G{i}" for i in range(HITS)]
    for donors in DONORS:
        for size in SIZES:
            called = [t.filter(pl.col("q") < 0.05) for t in _tested(repeats, donors=donors, size=size)]
            true = [int(table["edit_id"].is_in(truth).sum()) for table in called]
            false = float(np.mean([(len(t) - n) / max(1, len(t)) for t, n in zip(called, true, strict=True)]))
            what = f"{donors} donors, effect {size:g} (a factor of {np.exp(size):.1f})"
            rows.append(measured(f"{what}: power", float(np.mean(true)) / HITS, "share"))
            if size == SIZES[-1]:
                rows.append(at_most(f"{what}: false discoveries", false, "share", 0.1))
    return rows


def coverage() -> list[Row]:
    rows = []
    for donors in (2, 3, 5, 8, 15, 30):
        generator = np.random.default_rng(donors)
        shape = (4000, donors)
        for name, values in (("even", generator.normal(size=shape)), ("skewed", generator.exponential(size=shape) - 1)):
            means = Clustered(sums_eu=values, counts_eu=np.ones(shape))
            low, high = intervals(means, confidence=0.95, draws=2000, seed=0)
            share = float(((low < 0) & (high > 0)).mean())
            what = f"{donors} {name} donors: 95 % interval holds the mean"
            rows.append(at_least(what, share, "share", 0.935) if name == "even" else measured(what, share, "share"))
    return rows


def _tested(repeats: int, *, donors: int, size: float | None = None) -> Iterator[pl.DataFrame]:
    chance_g = np.full(GENES, 0.5)
    for seed in range(repeats):
        generator = np.random.default_rng([seed, donors])
        table = planted(generator, donors=donors, cells=CELLS, chance_g=chance_g, size=size)
        yield effects(table, draws=0)


def planted(
    generator: np.random.Generator, *, donors: int, cells: int, chance_g: np.ndarray, size: float | None = None
) -> pl.DataFrame:
    """A screen that deletes every detected gene; the first HITS genes have the effect `size`, if one is given."""
    n_genes = len(chance_g)
    gene_g = generator.normal(0, 0.3, n_genes)
    if size is not None:
        gene_g[:HITS] = size
    by_donor_ug, level_g = generator.normal(0, 0.2, (donors, n_genes)), generator.normal(size=n_genes)
    donor_u = generator.normal(0, 1.0, donors)
    frames = []
    for cell in range(cells):
        donor = cell % donors
        have = np.flatnonzero(generator.random(n_genes) < chance_g)
        order = have[np.argsort(-(level_g[have] + generator.normal(0, 0.3, len(have))))]
        rank = np.arange(len(order))
        logs = donor_u[donor] + generator.normal(0, 0.5) - 5 - rank / max(1, len(order))
        logs = logs + gene_g[order] + by_donor_ug[donor, order] + generator.normal(0, 0.5, len(order))
        frames.append(
            pl.DataFrame({"gene": order, "rank": rank, "shift": np.exp(logs)}).with_columns(
                cell_id=pl.lit(f"cell-{cell}"), donor_id=pl.lit(f"donor-{donor}"), n_genes=pl.lit(len(order))
            )
        )
    name = pl.format("G{}", pl.col("gene"))
    return pl.concat(frames).with_columns(
        dataset_id=pl.lit("planted"), edit_id=name, gene_id=name, symbol=name, kind=pl.lit("delete"),
        role=pl.lit("edit"), control_of=pl.lit(None, pl.String), outcome=pl.lit("edited"), found=pl.lit(True),
    )  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
