"""Tables of cell shifts whose truth is known, drawn without any model.

The logarithm of a shift is the sum of: donor, cell, slope times rank, gene, gene by donor, noise. Hits are genes whose
gene effect is replaced by a planted one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl


@dataclass(frozen=True, kw_only=True)
class Truth:
    """How shifts come about; all in units of the natural logarithm of a shift."""

    donors: int = 3
    cells: int | Sequence[int] = 10
    genes: int = 200
    detected: float = 0.5
    between_donors: float = 1.0
    between_genes: float = 0.3
    gene_by_donor: float = 0.2
    noise: float = 0.5
    slope: float = -1.0
    hits: int = 0
    size: float = 0.0
    order_noise: float = 0.3


def every_gene(truth: Truth, seed: int) -> pl.DataFrame:
    """A screen that edits every gene of every cell and has no control rows; the first genes are the hits."""
    return _table(pl.concat([pl.DataFrame(cell) for cell in _cells(truth, np.random.default_rng(seed))]))


def listed(truth: Truth, seed: int, *, n_edits: int = 20, controls: int = 10, reach: int = 15) -> pl.DataFrame:
    """A screen of the first `n_edits` genes with control edits drawn from near ranks of the same cell."""
    generator = np.random.default_rng(seed)
    frames = []
    for cell in _cells(truth, generator):
        genes, shifts, n = cell["gene"], cell["shift"], len(cell["gene"])
        for edit in range(n_edits):
            here = np.flatnonzero(genes == edit)
            one = {"cell": cell["cell"], "donor": cell["donor"], "n_genes": n, "edit": edit}
            if not len(here):
                frames.append({**one, "gene": [edit], "rank": [None], "shift": [0.0], "of": [None]})
                continue
            rank = int(here[0])
            near = np.setdiff1d(np.arange(max(0, rank - reach), min(n, rank + reach + 1)), [rank])
            drawn = generator.choice(near, size=min(controls, len(near)), replace=False)
            places = np.concatenate([[rank], drawn])
            frames.append(
                {
                    **one,
                    "gene": genes[places].tolist(),
                    "rank": places.tolist(),
                    "shift": shifts[places].tolist(),
                    "of": [None, *(edit for _ in drawn)],
                }
            )
    return _table(pl.DataFrame(frames).explode("gene", "rank", "shift", "of"))


def _cells(truth: Truth, generator: np.random.Generator) -> list[dict[str, object]]:
    gene_g = generator.normal(0, truth.between_genes, truth.genes)
    gene_g[: truth.hits] = truth.size
    by_donor_ug = generator.normal(0, truth.gene_by_donor, (truth.donors, truth.genes))
    level_g = generator.normal(size=truth.genes)
    counts = [truth.cells] * truth.donors if isinstance(truth.cells, int) else list(truth.cells)
    found = []
    for donor, n_cells in enumerate(counts):
        donor_effect = generator.normal(0, truth.between_donors)
        for cell in range(n_cells):
            have = np.flatnonzero(generator.random(truth.genes) < truth.detected)
            order = have[np.argsort(-(level_g[have] + generator.normal(0, truth.order_noise, len(have))))]
            rank = np.arange(len(order))
            logs = donor_effect + generator.normal(0, 0.5) + truth.slope * rank / len(order) - 5
            logs = logs + gene_g[order] + by_donor_ug[donor, order] + generator.normal(0, truth.noise, len(order))
            found.append(
                {
                    "cell": f"{donor}-{cell}",
                    "donor": donor,
                    "gene": order,
                    "rank": rank,
                    "shift": np.exp(logs),
                    "n_genes": len(order),
                }
            )
    return found


def _table(rows: pl.DataFrame) -> pl.DataFrame:
    """Columns as a screen writes them."""
    of = pl.col("of") if "of" in rows.columns else pl.lit(None, pl.Int64)
    name = pl.format("G{}", pl.col("gene"))
    return rows.with_columns(
        cell_id=pl.col("cell"),
        dataset_id=pl.lit("planted"),
        source_row=pl.col("cell").rank("dense").cast(pl.Int64),
        donor_id=pl.format("d{}", pl.col("donor")),
        edit_id=name,
        gene_id=name,
        symbol=name,
        kind=pl.lit("delete"),
        role=pl.when(of.is_null()).then(pl.lit("edit")).otherwise(pl.lit("control")),
        control_of=pl.when(of.is_not_null()).then(pl.format("G{}", of)),
        outcome=pl.when(pl.col("rank").is_not_null()).then(pl.lit("edited")).otherwise(pl.lit("absent")),
        found=pl.col("rank").is_not_null(),
    ).drop("cell", "donor", "gene", *(["of", "edit"] if "of" in rows.columns else []))
