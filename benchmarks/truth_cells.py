"""Cells with a planted truth for `truth.py`: drawn, ranked, and kept in memory; and the encoders trained on them.

Axes: `n` cells, `g` genes.
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from truth_settings import Setting

from genescale.ingestion.simulate import draw_cells
from genescale.ingestion.simulate_network import Network, plant_network
from genescale.platform.rank_value import rank_value_tokens
from genescale.platform.vocabulary import SPECIAL_TOKENS, Vocabulary
from genescale.training.cells import MemoryCells
from genescale.training.engine import TorchEngine
from genescale.training.loop import RunPlan, train_loop
from genescale.training.model import MaskedGeneModel, new_model
from genescale.training.weights import from_hf, to_hf

FIRST_GENE = 2
LEAST_GENES = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class PlantedCells:
    """A network and its cells: those to train on, and others to screen. Gene g of the network is token g + 2."""

    network: Network
    trained: MemoryCells
    screened: list[np.ndarray]
    screened_types: np.ndarray
    counts_ng: np.ndarray
    """Counts of the cells that are trained on, for baselines that need no encoder."""
    types_n: np.ndarray
    """Their cell types."""


def planted_cells(setting: Setting) -> PlantedCells:
    """Draw and rank the cells of a setting: a pure function of it."""
    # The second file is a tissue of its own, as held-out cells of an atlas would be.
    config = dataclasses.replace(setting.simulate(), cells_per_file=setting.cells)
    network = plant_network(config)
    learned = draw_cells(network, 0)
    fewer = dataclasses.replace(network, config=dataclasses.replace(config, cells_per_file=setting.drawn_cells))
    others = draw_cells(fewer, 1)
    medians_g = _medians(learned.counts.tocsc())
    vocabulary = Vocabulary.build(
        network.gene_ids, medians_g, symbols=network.symbols, window=setting.window, name="planted",
        special=SPECIAL_TOKENS[:FIRST_GENE],
    )  # fmt: skip
    cells, kept = _ranked(learned.counts, vocabulary)
    screened, kept_screened = _ranked(others.counts, vocabulary)
    return PlantedCells(
        network=network,
        trained=MemoryCells(cells, vocabulary),
        screened=screened,
        screened_types=others.type_n[kept_screened],
        counts_ng=learned.counts.toarray()[kept],
        types_n=learned.type_n[kept],
    )


def _medians(counts: Any) -> np.ndarray:
    """Median of each gene over the cells that have it, as the vocabularies of atlases have them."""
    columns = [counts.data[start:stop] for start, stop in zip(counts.indptr, counts.indptr[1:], strict=False)]
    return np.array([float(np.median(column)) if len(column) else 1.0 for column in columns])


def _ranked(counts: Any, vocabulary: Vocabulary) -> tuple[list[np.ndarray], np.ndarray]:
    """Tokens of every cell with at least eight genes, and which cells these are."""
    cells, kept = [], []
    for cell, (start, stop) in enumerate(zip(counts.indptr, counts.indptr[1:], strict=False)):
        tokens = counts.indices[start:stop] + FIRST_GENE
        if len(tokens) >= LEAST_GENES:
            ranked = rank_value_tokens(tokens.astype(np.int64), counts.data[start:stop], vocabulary)
            cells.append(np.asarray(ranked.input_ids, dtype=np.int64))
            kept.append(cell)
    return cells, np.array(kept)


@dataclass(frozen=True, kw_only=True, eq=False)
class Trained:
    """An encoder and how well it finds hidden genes of cells that it was not trained on."""

    model: MaskedGeneModel
    loss_before: float
    loss: float
    cpu_s: float


def train(cells: PlantedCells, setting: Setting) -> Trained:
    """Pretrain on the CPU, without Ray; the same setting gives the same weights."""
    config = setting.pretrain()
    plan = RunPlan.of(config, cells.trained)
    model = untrained(cells, setting)
    engine = TorchEngine(model, config.optimizer, total_steps=plan.total_steps)
    rows: list[dict[str, Any]] = []
    began = time.process_time()
    train_loop(engine, cells.trained, plan, config, on_rows=lambda new: rows.extend(row for _, row in new))
    losses = [row["held_out_loss"] for row in rows if "held_out_loss" in row]
    return Trained(model=model.eval(), loss_before=losses[0], loss=losses[-1], cpu_s=time.process_time() - began)


def untrained(cells: PlantedCells, setting: Setting) -> MaskedGeneModel:
    """The same encoder with its random initial weights."""
    config = setting.pretrain()
    return new_model(config.encoder.for_vocabulary(cells.trained.vocabulary), seed=config.seed).eval()


def kept(cells: PlantedCells, setting: Setting, path: Path) -> Trained:
    """The trained encoder in a file, trained first when the file has none of this setting: points can be remade."""
    encoder = setting.pretrain().encoder.for_vocabulary(cells.trained.vocabulary)
    wanted = json.dumps(setting.trained_by(), sort_keys=True)
    tensors: dict[str, np.ndarray] = {}
    if path.exists():
        with np.load(path) as file:
            tensors = {name: file[name] for name in file.files}
    if not tensors or str(tensors.pop("setting")) != wanted:
        made = train(cells, setting)
        facts = np.array([made.loss_before, made.loss, made.cpu_s])
        np.savez(path, setting=np.array(wanted), facts=facts, **to_hf(made.model))
        return made
    loss_before, loss, cpu_s = tensors.pop("facts").tolist()
    model = from_hf(tensors, encoder, where=str(path))
    return Trained(model=model, loss_before=loss_before, loss=loss, cpu_s=cpu_s)
