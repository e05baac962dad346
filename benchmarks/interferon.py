"""Does the deletion of interferon-response genes move stimulated cells toward unstimulated ones?

    make bench NAME=interferon                                        trains an encoder first, about half an hour
    .venv/bin/python benchmarks/interferon.py --model MODEL           a bundle folder or models:/NAME@ALIAS

Cells: blood cells of eight lupus patients, half of them stimulated with interferon beta (Kang et al. 2018). In
stimulated cells every gene is deleted in turn; the read-out is how far the cell moves toward the mean of the control
cells. Response genes are those whose approved HGNC name says that interferon induces them; no result chose them. A
gene's `excess` is its movement beyond genes of near rank and near detection in the same cells. The rank AUC compares
response genes with all other genes that stand in as many cells; intervals are bootstraps over genes. Three things are
told apart: what the trained encoder says, what the same encoder with random weights says (a gene that marks stimulated
cells moves them toward the others by being gone, whatever was learned), and what plain expression says.
"""

from __future__ import annotations

import dataclasses
import gzip
import re
import tempfile
from pathlib import Path

import numpy as np
import polars as pl
from harness import Row, finish, measured, parser
from synthetic import SHARED

from genescale.ingestion.config import IngestConfig
from genescale.ingestion.local_corpus import local_corpus
from genescale.perturbation.perturber import Perturber
from genescale.platform.bundle import Bundle, write_bundle
from genescale.platform.settings import StorageSettings
from genescale.platform.storage import Store
from genescale.platform.vocabulary import Vocabulary, read_vocabulary
from genescale.training.cells import MemoryCells
from genescale.training.encoder_config import EncoderConfig
from genescale.training.engine import TorchEngine
from genescale.training.loop import RunPlan, train_loop
from genescale.training.model import MaskedGeneModel, new_model
from genescale.training.recipe import PretrainConfig, changed_recipe
from genescale.training.weights import to_hf

PACKAGES = ("numpy", "polars", "torch")
KANG = "kang_harmony_ctrl_stim_counts_symbols.h5ad"
OTHERS = ("pbmc_facs_train_counts_ensembl.h5ad", "pbmc3k_counts_ensembl.h5ad")
RESPONSE = re.compile(r"interferon.*(induc|stimul)|oligoadenylate synthetase|mx dynamin", re.IGNORECASE)
# Names that speak of a partner of such a gene, not of the gene.
NOT_RESPONSE = re.compile(r"activator of|regulator", re.IGNORECASE)
LEAST_CELLS, DRAWS = 10, 2_000
READ = {
    "mean": "toward control",
    "excess": "toward control, beyond matched genes",
    "contrast": "toward control rather than stimulated",
    "contrast_excess": "toward control rather than stimulated, beyond matched genes",
}
RECIPE = (
    "encoder.width=64", "encoder.layers=2", "encoder.heads=4", "encoder.feed_forward=128", "encoder.rank_knots=64",
    "encoder.rotary_base=10000", "encoder.rank_neighbours=2", "encoder.seen_genes=true", "encoder.hidden_dropout=0",
    "encoder.attention_dropout=0", "lanes=1", "token_budget=4096", "held_out_cells=128", "optimizer.warmup_steps=100",
    "optimizer.learning_rate=0.004", "checkpoint_every=1000000000", "log_every=100",
)  # fmt: skip


def main() -> int:
    """Screen, compare and write the rows."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--model", help="bundle folder or models:/NAME@ALIAS (default: one is trained)")
    options.add_argument("--steps", type=int, default=5_000, help="of the training (default 5000)")
    options.add_argument("--cells", type=int, default=150, help="stimulated cells to screen (default 150)")
    options.add_argument("--type", default="", help="their cell type (default: every type)")
    options.add_argument("--genes", type=Path, help="also write the table of genes, as CSV")
    arguments = options.parse_args()
    steps, cells = (3, 6) if arguments.quick else (arguments.steps, arguments.cells)
    with tempfile.TemporaryDirectory(prefix="genescale-") as folder:
        model = arguments.model or str(trained(Path(folder) / "trained", steps).folder)
        found = {"trained": screened(model, cells, arguments.type)}
        random = str(untrained(model, Path(folder) / "random").folder)
        found["random weights"] = screened(random, cells, arguments.type)
    genes = compared(found)
    if arguments.genes:
        genes.sort("contrast_excess", descending=True).write_csv(arguments.genes)
    return finish("interferon", rows(genes), PACKAGES, quick=arguments.quick, output=arguments.output)


def screened(model: str, cells: int, kind: str) -> pl.DataFrame:
    """Effects of deleting each gene of stimulated cells on their movement toward control cells."""
    of_type = f" AND cell_type = '{kind}'" if kind else ""
    effects = Perturber.open(model).screen(
        str(SHARED / "atlases" / KANG),
        delete="all",
        cells=f"condition = 'stim'{of_type}",
        max_cells=cells,
        toward=("condition", "ctrl", "stim"),
    )
    ctrl, stim = (effects.filter(pl.col("readout") == f"toward:{state}") for state in ("ctrl", "stim"))
    # Many deletions bring a cell nearer to every mean of cells: what speaks of interferon is the difference.
    return ctrl.join(stim.select("edit_id", stim="mean", stim_excess="excess"), on="edit_id").with_columns(
        contrast=pl.col("mean") - pl.col("stim"), contrast_excess=pl.col("excess") - pl.col("stim_excess")
    )


def compared(found: dict[str, pl.DataFrame]) -> pl.DataFrame:
    """One row per gene that stands in cells enough: what each model says of it, and whether it is a response gene."""
    trained, random = (table.filter(pl.col("excess").is_not_null()) for table in found.values())
    often = min(LEAST_CELLS, int(trained["n_edited"].max() or 0))
    values = {f"random_{name}": name for name in READ}
    both = trained.select("gene_id", "symbol", "n_edited", "q", *READ).join(
        random.select("gene_id", **{new: pl.col(name) for new, name in values.items()}), on="gene_id"
    )
    return both.filter(pl.col("n_edited") >= often).with_columns(
        response=pl.col("gene_id").is_in(list(response_genes()))
    )


def rows(genes: pl.DataFrame) -> list[Row]:
    """What came out; nothing is promised of it."""
    response = genes["response"].to_numpy()
    told = []
    for model, prefix in (("trained", ""), ("random weights", "random_")):
        for name, what in READ.items():
            auc, low, high = rank_auc(genes[prefix + name].to_numpy(), response)
            claim = f"Rank AUC of response genes, {model}: {what}"
            told.append(measured(claim, auc, "AUC", note=f"95 %: {low:.3f} to {high:.3f}"))
    order = genes.sort("contrast_excess", descending=True)
    places = np.flatnonzero(order["response"].to_numpy()) + 1
    median = float(np.median(places)) if len(places) else float("nan")
    told.append(measured("Median place of the response genes", median, f"of {len(genes)} genes"))
    told.append(measured("Response genes among the first 20", int((places <= 20).sum()), f"of {len(places)}"))
    best = ", ".join(order["symbol"].head(12))
    told.append(measured("Genes with q < 0.05 and excess > 0", int(_sure(genes).sum()), "genes", note=f"first: {best}"))
    told.append(measured("  response genes among them", int((_sure(genes) & response).sum()), "genes"))
    return told


def _sure(genes: pl.DataFrame) -> np.ndarray:
    return ((genes["q"].fill_null(1.0) < 0.05) & (genes["excess"] > 0)).to_numpy()


def rank_auc(values_g: np.ndarray, positive_g: np.ndarray, *, seed: int = 0) -> tuple[float, float, float]:
    """Chance that a response gene lies above another gene, with a percentile bootstrap over genes of both kinds."""
    above, others = values_g[positive_g], values_g[~positive_g]
    if not len(above) or not len(others):
        return float("nan"), float("nan"), float("nan")
    draws = np.random.default_rng(seed)
    wins_ij = (above[:, None] > others).astype(np.float64) + 0.5 * (above[:, None] == others)
    drawn = [
        wins_ij[draws.integers(len(above), size=len(above))][:, draws.integers(len(others), size=len(others))].mean()
        for _ in range(DRAWS)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(wins_ij.mean()), float(low), float(high)


def response_genes() -> set[str]:
    """Ensembl ids of genes whose approved HGNC name says that interferon induces them."""
    path = SHARED / "genesets" / "hgnc_complete_set.txt.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        names = file.readline().rstrip("\n").split("\t")
        at, gene_at = names.index("name"), names.index("ensembl_gene_id")
        lines = [line.rstrip("\n").split("\t") for line in file]
    return {
        line[gene_at]
        for line in lines
        if RESPONSE.search(line[at]) and not NOT_RESPONSE.search(line[at]) and "pseudogene" not in line[at]
    }


def trained(folder: Path, steps: int) -> Bundle:
    """An encoder trained on three atlases of blood cells, the screened one among them, without labels."""
    store = Store(StorageSettings())
    vocabulary = read_vocabulary(str(SHARED / "vocabularies" / "token_dictionary_gc104M.pkl"), store)
    cells: list[np.ndarray] = []
    for name in (KANG, *OTHERS):
        with tempfile.TemporaryDirectory(prefix="genescale-") as place:
            address = str(SHARED / "atlases" / name)
            corpus = local_corpus(address, f"{place}/corpus", vocabulary, store, config=IngestConfig()).corpus
            cells += corpus.tokens(list(range(corpus.n_cells)))
    config = changed_recipe(PretrainConfig(), [*RECIPE, f"steps={steps}", f"evaluate_every={max(1, steps // 4)}"])
    config = dataclasses.replace(config, held_out_cells=min(config.held_out_cells, len(cells) // 10))
    source = MemoryCells(cells, vocabulary)
    plan = RunPlan.of(config, source)
    model = new_model(config.encoder.for_vocabulary(vocabulary), seed=config.seed)
    engine = TorchEngine(model, config.optimizer, total_steps=plan.total_steps)
    train_loop(engine, source, plan, config, on_rows=_told)
    return _written(model, vocabulary, folder)


def _told(new: list[tuple[int, dict[str, object]]]) -> None:
    for step, row in new:
        if "held_out_loss" in row:
            print(f"step {step:,}: held-out loss {row['held_out_loss']:.3f}", flush=True)


def untrained(model: str, folder: Path) -> Bundle:
    """The same encoder with random weights."""
    bundle = Perturber.open(model).bundle
    return _written(new_model(EncoderConfig.from_hf(bundle.config), seed=1), bundle.vocabulary, folder)


def _written(model: MaskedGeneModel, vocabulary: Vocabulary, folder: Path) -> Bundle:
    config = model.encoder.config.to_hf()
    return write_bundle(
        folder, kind="masked_gene_model", config=config, weights=to_hf(model), vocabulary=vocabulary, lineage={}
    )


if __name__ == "__main__":
    raise SystemExit(main())
