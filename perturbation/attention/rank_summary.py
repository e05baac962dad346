"""Attention by rank in a few numbers for each layer: how wide genes look, at which ranks, and how heads share the work.

Axis suffixes: `h` heads, `c` rank bins looked at.
"""

from __future__ import annotations

import numpy as np
import polars as pl

from genescale.perturbation.attention.rank_profile import ALL_RANKS
from genescale.training.evaluation.masked_genes import bin_name

TOP_RANKS = bin_name(0)


def layer_summary(between_ranks: pl.DataFrame, heads: pl.DataFrame) -> pl.DataFrame:
    """One row per layer, means over its heads, all genes looking.

    to_genes, to_self, to_special: shares of attention; looked_at_share: tokens that a gene looks at as if alike, over
    those of the cell; top_relative: attention to the ten highest ranks over that of a head that looks at all alike;
    spread_bits: how much the heads differ in the ranks they look at (`spread`).
    """
    every = heads.filter(pl.col("from_rank") == ALL_RANKS).group_by("layer").agg(
        pl.col("to_genes", "to_self", "to_special", "looked_at_share").mean()
    )  # fmt: skip
    profiles = between_ranks.filter(pl.col("from_rank") == ALL_RANKS)
    top = profiles.filter(pl.col("to_rank") == TOP_RANKS).group_by("layer").agg(top_relative=pl.col("relative").mean())
    layers = profiles["layer"].unique().sort().to_list()
    spreads = {
        "layer": layers,
        "spread_bits": [spread(_profile(profiles.filter(pl.col("layer") == layer))) for layer in layers],
    }
    return every.join(top, on="layer").join(pl.DataFrame(spreads), on="layer").sort("layer")


def spread(relative_hc: np.ndarray) -> float:
    """Bits that one look of a head at a rank bin tells about which head it is; 0 when all look alike.

    The generalised Jensen-Shannon divergence of the heads' profiles (Lin 1991, IEEE Trans. Inform. Theory 37), each
    divided by uniform attention and scaled to one, so that wide bins do not count for more.
    """
    share_hc = relative_hc / np.maximum(relative_hc.sum(axis=1, keepdims=True), np.finfo(float).tiny)
    return float(_entropy(share_hc.mean(axis=0)) - np.mean([_entropy(share_c) for share_c in share_hc]))


def survey_and_focus(summary: pl.DataFrame) -> dict[str, float] | None:
    """Means of `spread_bits` and `top_relative` over the first and the second half of the layers; None for one layer.

    A layer in the middle belongs to neither half. Geneformer was reported to survey ranks early and to focus on the
    highest ranks late (Theodoris et al., Nature 2023).
    """
    half = len(summary) // 2
    if not half:
        return None
    first, second = summary.head(half), summary.tail(half)
    found = {}
    for name in ("spread_bits", "top_relative", "looked_at_share"):
        for when, rows in (("early", first), ("late", second)):
            found[f"{when}_{name}"] = float(np.mean(rows[name].to_numpy()))
    return found


def _profile(rows: pl.DataFrame) -> np.ndarray:
    """(h, c) relative attention of the heads of one layer."""
    bins = rows["to_rank"].unique(maintain_order=True).to_list()
    wide = rows.pivot("to_rank", index="head", values="relative").sort("head")
    return wide.select(bins).to_numpy()


def _entropy(share_c: np.ndarray) -> float:
    known = share_c[share_c > 0]
    return float(-(known * np.log2(known)).sum())
