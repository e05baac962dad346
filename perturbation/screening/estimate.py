"""What a screen will cost, before it starts: passes, tokens, arithmetic, time and disk.

The arithmetic is counted by the formula of `training/flops.py`, up to the layer that is read. How fast this machine
does it is measured on cells and edits of the screen itself, for a few seconds on one worker's share of it, with
everything that a worker does for them. Time is the one over the other, divided among the workers: other devices than
this one, and a cluster that is shared, are not in it.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch

from genescale.ingestion.corpus import Corpus
from genescale.perturbation.answers import Readouts
from genescale.perturbation.screening.masked_genes import masked_gene_model
from genescale.perturbation.screening.plan import BACKWARD, Plan
from genescale.perturbation.screening.results import CELL_SHIFTS, parquet_bytes
from genescale.perturbation.screening.unit_work import UnitWorker
from genescale.training.embedder import Embedder, layers_to_run
from genescale.training.flops import Work, training_flops

PROBE_S = 5.0
# A probe is a small unit of its own: cells of the screen, each with so many of its edits.
PROBE_CELLS, PROBE_EDITS = 8, 12
FORWARD_SHARE = 3.0
"""`training_flops` counts forward and backward: three forward passes."""


@dataclass(frozen=True, kw_only=True)
class ScreenEstimate:
    """What a screen will take."""

    cells: int
    edits: int
    """(cell, edit) pairs; with a first pass, the genes that it scores."""
    controls: int
    """Control edits, at most."""
    sequences: int
    """Cells through the encoder, edited or not."""
    masked_sequences: int
    """Further ones with hidden genes, nearly."""
    tokens: int
    units: int
    tokens_per_unit: int
    forward_flops: float
    device: str
    workers: int
    measured_sequences: int
    measured_seconds: float
    flops_per_s: float
    """Of one worker, with all that it does beside the encoder."""
    result_bytes: int
    """Of the table of cell shifts, nearly."""

    @property
    def seconds(self) -> float:
        """Estimated time of the whole screen."""
        return self.forward_flops / self.flops_per_s / self.workers

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**dataclasses.asdict(self), "seconds": self.seconds}


def estimate(
    plan: Plan, corpus: Corpus, embedder: Embedder, readouts: Readouts, *, workers: int = 1, probe_s: float = PROBE_S
) -> ScreenEstimate:
    """Count the work of a plan, and measure for about `probe_s` seconds how fast this machine does it."""
    sequences_n = sequences_of_cells(plan)
    flops = screen_flops(plan, embedder, readouts, sequences_n)
    done, done_flops, took_s, bytes_per_row = _measure(plan, corpus, embedder, readouts, probe_s)
    rows = plan.n_pairs if plan.two_pass is None else int(sequences_n.sum())
    on_gpu = embedder.device.type == "cuda"
    name = torch.cuda.get_device_name(embedder.device) if on_gpu else f"CPU, {torch.get_num_threads()} thread(s)"
    return ScreenEstimate(
        cells=len(plan.cells),
        edits=plan.n_pairs,
        controls=int(_changed_of_cells(plan).sum()) * plan.n_controls,
        sequences=int(sequences_n.sum()),
        masked_sequences=int(_masked_of_cells(plan, sequences_n).sum()),
        tokens=plan.n_tokens,
        units=plan.n_units,
        tokens_per_unit=plan.tokens_per_unit,
        forward_flops=flops,
        device=name,
        workers=workers,
        measured_sequences=done,
        measured_seconds=took_s,
        flops_per_s=done_flops / took_s,
        result_bytes=round(bytes_per_row * rows * (1 + plan.n_controls)),
    )


def sequences_of_cells(plan: Plan) -> np.ndarray:
    """Passes (n) through the encoder that each cell takes: itself once per unit, its edits and their controls."""
    per_row = plan.pieces.group_by("row").agg(pl.len()).sort("row")["len"].to_numpy()
    return per_row + np.rint(_changed_of_cells(plan) * (1 + plan.n_controls)).astype(np.int64)


def _changed_of_cells(plan: Plan) -> np.ndarray:
    """Edits (n) of each cell that change it."""
    return plan.cells["n_changed"].to_numpy().astype(np.float64)


def screen_flops(plan: Plan, embedder: Embedder, readouts: Readouts, sequences_n: np.ndarray) -> float:
    """Arithmetic of a screen: forward passes of all sequences, with hidden genes as well, and those of a first pass."""
    length_n = plan.cells["length"].to_numpy().astype(np.float64)
    passes_n = sequences_n.astype(np.float64)
    if plan.two_pass is not None:
        passes_n = passes_n + 1 + BACKWARD * plan.two_pass.probes
    flops = forward_flops(embedder, readouts, tokens=float(length_n @ passes_n), squares=float(length_n**2 @ passes_n))
    passes_n = _masked_of_cells(plan, sequences_n)
    work = Work(
        tokens=round(float(length_n @ passes_n)),
        squares=round(float(length_n**2 @ passes_n)),
        masked=round(float(plan.cells["n_masked"].to_numpy() @ sequences_n)),
    )
    return flops + training_flops(embedder.encoder.config, work) / FORWARD_SHARE


def _masked_of_cells(plan: Plan, sequences_n: np.ndarray) -> np.ndarray:
    """Passes (n) with hidden genes of each cell, for so many variants of it."""
    passes_n: np.ndarray = plan.cells["n_masked_passes"].to_numpy() * sequences_n
    return passes_n


def forward_flops(embedder: Embedder, readouts: Readouts, *, tokens: float, squares: float) -> float:
    """FLOPs of forward passes over so many tokens, up to the highest layer that is read."""
    config = embedder.encoder.config
    layers = layers_to_run(readouts.layer, config.layers)
    head = readouts.head
    if head is not None and head.embedder.bundle.digest == embedder.bundle.digest:
        layers = max(layers, layers_to_run(head.specs[0].layer, config.layers))
    work = Work(tokens=round(tokens), squares=round(squares))
    flops = training_flops(dataclasses.replace(config, layers=layers), work) / FORWARD_SHARE
    if head is not None and head.embedder.bundle.digest != embedder.bundle.digest:
        other = head.embedder.encoder.config
        layers = layers_to_run(head.specs[0].layer, other.layers)
        flops += training_flops(dataclasses.replace(other, layers=layers), work) / FORWARD_SHARE
    return flops


def _measure(
    plan: Plan, corpus: Corpus, embedder: Embedder, readouts: Readouts, probe_s: float
) -> tuple[int, float, float, float]:
    """(sequences, FLOPs, seconds, bytes per row) of small units of the screen, worked off as a worker would."""
    generator = np.random.default_rng(plan.seed)
    order = generator.permutation(len(plan.cells))
    sequences, flops, took_s = 0, 0.0, 0.0
    bytes_per_row = 0.0
    model = None if plan.masked is None else masked_gene_model(embedder)
    for number, start in enumerate(range(0, len(order), PROBE_CELLS)):
        part = _probe(plan, np.sort(order[start : start + PROBE_CELLS]))
        worker = UnitWorker(part, embedder, readouts, model=model)
        began = time.perf_counter()
        result = worker.run(0, corpus.tokens)
        table = parquet_bytes(result.tables()[CELL_SHIFTS])
        seconds = time.perf_counter() - began
        # The first one pays for starting up, unless it is the only one.
        if number == 0 and len(order) > PROBE_CELLS and seconds < probe_s:
            continue
        sequences += result.counts["sequences"]
        share = result.counts["sequences"] / len(part.cells)
        flops += screen_flops(part, embedder, readouts, np.full(len(part.cells), share))
        took_s += seconds
        bytes_per_row = len(table) / max(1, result.cell_shifts.num_rows)
        if took_s > probe_s:
            break
    return sequences, flops, took_s, bytes_per_row


def _probe(plan: Plan, rows: np.ndarray) -> Plan:
    """A plan of one unit: these cells, each with a few of its edits (all of them, where a first pass chooses)."""
    pieces = plan.pieces.filter(pl.col("row").is_in(rows.tolist())).unique("row", keep="first").sort("row")
    if plan.two_pass is None:
        pieces = pieces.with_columns(stop=pl.min_horizontal("stop", pl.col("start") + PROBE_EDITS))
    pieces = pieces.with_columns(unit=pl.lit(0, pl.Int32), row=pl.int_range(pl.len(), dtype=pl.Int64))
    return dataclasses.replace(plan, cells=plan.cells[rows.tolist()], pieces=pieces)
