"""What `modern.py` trains: the published architecture, one change at a time, and what the changes make together.

A variant is a list of changes to a recipe, written as `genescale pretrain --set` takes them. The corpora are reduced so
that many encoders can be trained on one processor: vocabulary and width together, so that the share of the decoder in
the FLOPs stays about what it is in the published sizes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from ranked_cells import cell_pool, reduced, vocabulary

from genescale.ingestion.corpus import Corpus
from genescale.platform.settings import StorageSettings
from genescale.platform.storage import Store
from genescale.training.cells import CorpusCells, MemoryCells
from genescale.training.recipe import PretrainConfig, changed_recipe

LEAST_GENES, MOST_TYPED = 8, 1_500

NO_DROPOUT = ("encoder.hidden_dropout=0", "encoder.attention_dropout=0")
# Two thirds of the inner width: a gated block has three matrices instead of two.
GATED = ("encoder.activation=geglu", "encoder.feed_forward=85")
NEIGHBOURS = ("encoder.seen_genes=true", *NO_DROPOUT, "encoder.rank_neighbours=2")
# The encoder of training/recipes/modern.toml at the size of the bench.
MODERN = (*NEIGHBOURS, "encoder.rotary_base=10000", "encoder.rank_knots=32")
VARIANTS: dict[str, tuple[str, ...]] = {
    "published": (),
    # One change each.
    "rank neighbours": ("encoder.rank_neighbours=2",),
    "rotary ranks": ("encoder.rotary_base=10000",),
    "interpolated ranks": ("encoder.rank_knots=32",),
    "seen genes": ("encoder.seen_genes=true",),
    "pre-norm": ("encoder.norm=pre",),
    # Together, and what leaving out or adding does then.
    "modern": MODERN,
    "modern, absolute ranks only": NEIGHBOURS,
    "modern, absolute ranks only, initial 0.1": (*NEIGHBOURS, "encoder.initializer_range=0.1"),
    "modern, gated": (*MODERN, *GATED),
    "modern, gated, initial 0.1": (*MODERN, *GATED, "encoder.initializer_range=0.1"),
    "modern, gated, initial 0.01": (*MODERN, *GATED, "encoder.initializer_range=0.01"),
    "modern, gated, pre-norm, no biases": (*MODERN, *GATED, "encoder.norm=pre", "encoder.biases=false"),
    "modern, gated, batches of 1,024": (*MODERN, *GATED, "token_budget=1024", "steps=1600"),
}
SEEDS = (0, 1, 2)
# Peak learning rates: of the sweeps below the best one on the published side; on the other the best of fewer.
RATES = {"published": 6e-3, "modern": 1e-2}
# (variant, peak rate, share of the steps), one seed each.
SINGLE: dict[str, tuple[tuple[str, float, float], ...]] = {
    "quick": (),
    "real": (
        ("published", 1e-3, 1.0),
        ("published", 3e-3, 1.0),
        ("published", 1e-2, 1.0),
        *((name, 3e-3, 1.0) for name in list(VARIANTS)[1:6]),
        ("modern, absolute ranks only", 3e-3, 1.0),
        ("modern, gated", 3e-3, 1.0),
        ("modern, gated, pre-norm, no biases", 3e-3, 1.0),
        ("modern, absolute ranks only", 3e-3, 0.5),
        ("modern, absolute ranks only, initial 0.1", 3e-3, 0.5),
        ("modern, gated", 3e-3, 0.5),
        ("modern, gated, initial 0.1", 3e-3, 0.5),
        ("modern, gated, initial 0.01", 3e-3, 0.5),
        ("modern", 3e-3, 0.3),
        ("modern, gated", 3e-3, 0.3),
        ("modern, gated", 6e-3, 0.3),
        ("modern, gated, pre-norm, no biases", 3e-3, 0.3),
        ("modern, gated, batches of 1,024", 3e-3, 0.25),
        ("modern", 1e-2, 1.0),
        ("modern, absolute ranks only", 1e-2, 1.0),
    ),
    "simulated": (("published", 3e-3, 1.0), ("modern, gated, pre-norm, no biases", 3e-3, 1.0)),
}
# Shares of the published steps in which a variant goes through its whole schedule.
FINAL: dict[str, dict[str, tuple[float, ...]]] = {
    "quick": {"published": (1.0,), "modern": (0.5, 1.0)},
    "real": {"published": (1.0,), "modern": (0.3, 0.4)},
    "simulated": {"published": (1.0,), "modern": (0.05, 0.1, 0.2, 0.39)},
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Bench:
    """A corpus, and how long the published architecture is trained on it."""

    name: str
    source: MemoryCells
    origin: str
    steps: int
    held_out_cells: int = 320
    typed_cells: tuple[int, ...] = ()
    """Cells of one source whose types are known, and these types."""
    types: tuple[str, ...] = ()

    def recipe(
        self, changes: tuple[str, ...], *, seed: int, learning_rate: float, share: float = 1.0
    ) -> PretrainConfig:
        """The published recipe at a reduced size, with changes, for a share of the steps."""
        config = changed_recipe(PretrainConfig(), [*PUBLISHED_SMALL, f"steps={self.steps}", *changes])
        steps = max(2, round(config.steps * share))
        return dataclasses.replace(
            config,
            seed=seed,
            steps=steps,
            held_out_cells=self.held_out_cells,
            evaluate_every=max(1, steps // 5),
            optimizer=dataclasses.replace(config.optimizer, learning_rate=learning_rate),
        )


PUBLISHED_SMALL = (
    "encoder.width=64", "encoder.layers=3", "encoder.heads=2", "encoder.feed_forward=128", "token_budget=4096",
    "lanes=1", "optimizer.schedule=linear", "optimizer.warmup_fraction=0.05", "checkpoint_every=1000000000",
    "log_every=1000000000",
)  # fmt: skip


def corpus_bench(name: str, uri: str, *, n_genes: int, window: int, steps: int) -> Bench:
    """A corpus, reduced to its commonest genes and a shorter window."""
    corpus = Corpus.open(uri, Store(StorageSettings()))
    cells = corpus.tokens(list(range(corpus.n_cells)))
    counts = np.bincount(np.concatenate(cells), minlength=corpus.vocabulary.size)
    first = corpus.vocabulary.size - len(corpus.vocabulary.gene_ids)
    counts[:first] = 0
    kept = np.sort(np.argsort(-counts, kind="stable")[: min(n_genes, int((counts > 0).sum()))])
    new = np.zeros(len(counts), dtype=np.uint16)
    new[kept] = np.arange(len(kept)) + 2
    cropped = [new[cell][new[cell] > 0][:window] for cell in cells]
    chosen = np.flatnonzero([len(cell) >= LEAST_GENES for cell in cropped])
    source = MemoryCells(
        [cropped[cell] for cell in chosen], vocabulary(len(kept), window), CorpusCells(corpus).donors[chosen]
    )
    origin = (
        f"{len(chosen):,} cells of {len(cells):,}, the {len(kept):,} commonest genes, windows of {window}: "
        f"{source.lengths.mean():.0f} genes a cell"
    )
    typed, types = _typed(corpus, chosen)
    return Bench(name=name, source=source, origin=origin, steps=steps, typed_cells=typed, types=types)


def _typed(corpus: Corpus, chosen: np.ndarray) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """At most 1,500 cells of the source with the most cells of known type: no batch can pass for a type."""
    table = corpus.cells(["cell_type", "dataset_id"])
    kinds, sources = (np.array(table[name].to_pylist(), dtype=object)[chosen] for name in ("cell_type", "dataset_id"))
    known = np.array([kind not in (None, "", "unknown") for kind in kinds])
    if not known.any():
        return (), ()
    names, counts = np.unique(sources[known].astype(str), return_counts=True)
    mine = np.flatnonzero(known & (sources == names[np.argmax(counts)]))
    cells = np.sort(np.random.default_rng(0).permutation(mine)[:MOST_TYPED])
    return tuple(int(cell) for cell in cells), tuple(str(kind) for kind in kinds[cells])


def quick_bench() -> Bench:
    """A few hundred short cells, without a corpus: to see that everything runs."""
    pool = reduced(cell_pool(), n_genes=300, window=64)
    source = MemoryCells(pool.cells[:600], pool.vocabulary)
    return Bench(name="quick", source=source, origin=pool.origin, steps=12, held_out_cells=40)
