"""Rows of a made-up screen in the schema of `cell_shifts`, with effects that are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import polars as pl

CELL_TYPES = ("b_cell", "monocyte", "nk")


def gene_id(number: int) -> str:
    return f"ENSG{number:011d}"


def screen_rows(
    *,
    n_genes: int = 40,
    n_cells: int = 24,
    n_donors: int = 6,
    strong: Mapping[int, float] | None = None,
    controls: int = 0,
    states: Mapping[str, Mapping[int, float]] | None = None,
    classes: Sequence[str] = (),
    pairs: Sequence[int] = (),
    extra: Mapping[tuple[int, int], float] | None = None,
    absent: Sequence[int] = (),
    cell_types: bool = True,
    seed: int = 0,
) -> pl.DataFrame:
    """Every cell has every gene but those of `absent`, at a rank of its own; gene g is named GENEg.

    strong: what a gene's deletion adds to a shift of about 1e-3; states: the same for `toward:NAME`; pairs: genes whose
    pairs are deleted too, which adds `extra` to the sum of their singles; controls: control rows of each edit.
    """
    generator = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for cell in range(n_cells):
        ranks = generator.permutation(n_genes)
        common = {
            "cell_id": f"cell-{cell}",
            "dataset_id": "made",
            "source_row": cell,
            "cell_type": CELL_TYPES[cell % 3] if cell_types else None,
            "donor_id": f"donor-{cell % n_donors}",
            "n_genes": n_genes,
        }

        def row(
            genes: tuple[int, ...],
            shift: float,
            *,
            control_of: str | None = None,
            common: Any = common,
            ranks: Any = ranks,
        ) -> Any:
            effect = control_of is None
            gone = effect and all(gene in absent for gene in genes)
            name = "+".join(gene_id(gene) for gene in genes)
            noise = generator.normal(0, 1e-4, 1 + len(states or {}) + len(classes))
            moved = 0.0 if gone else shift + abs(noise[0])
            made = {
                **common,
                "edit_id": name,
                "gene_id": name,
                "symbol": "+".join(f"GENE{gene}" for gene in genes),
                "tokens": [gene + 4 for gene in genes],
                "kind": "delete",
                "role": "edit" if effect else "control",
                "control_of": control_of,
                "chosen": None,
                "outcome": "absent" if gone else "edited",
                "found": not gone,
                "rank": None if gone else int(min(ranks[gene] for gene in genes)),
                "cosine": 1.0 - moved,
                "shift": moved,
            }
            for at, (state, moves) in enumerate((states or {}).items(), start=1):
                toward = sum(moves.get(gene, 0.0) for gene in genes) if effect else 0.0
                made[f"toward:{state}"] = 0.0 if gone else toward + noise[at]
            for at, name in enumerate(classes):
                made[f"class:{name}"] = 0.0 if gone else noise[-1 - at] + (0.1 if effect and genes[0] == at else 0.0)
            return {**made, "n_compared": n_genes - len(genes), "n_cut": 0}

        single = {gene: 1e-3 * (1 + 0.2 * np.sin(gene)) + (strong or {}).get(gene, 0.0) for gene in range(n_genes)}
        for gene in range(n_genes):
            rows.append(row((gene,), single[gene]))
            for step in range(controls if gene not in absent else 0):
                other = (gene + 1 + step) % n_genes
                rows.append(row((other,), 1e-3 * (1 + 0.2 * np.sin(other)), control_of=gene_id(gene)))
        for one, other in combinations(pairs, 2):
            rows.append(row((one, other), single[one] + single[other] + (extra or {}).get((one, other), 0.0)))
    schema = {"rank": pl.Int32, "control_of": pl.String, "chosen": pl.String, "cell_type": pl.String}
    return pl.DataFrame(rows, infer_schema_length=None).with_columns(
        pl.col(name).cast(kind) for name, kind in schema.items()
    )
