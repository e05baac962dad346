"""What a pretraining run will take, before it takes it: steps, tokens, memory and time.

**Memory of one worker**, with P parameters, N workers, t tokens in a micro-batch and m = mask fraction x t. Weights,
gradients and both Adam moments are fp32, 4 bytes each; ZeRO stages 1 to 3 keep a second copy of the weights for the
optimiser, divided like its state (Rajbhandari et al. 2020, "ZeRO", section 3 and figure 1, for these precisions):

    stage 0    (4 + 4 + 8) P                    stage 2    4 P + (4 + 12) P / N
    stage 1    (4 + 4) P + 12 P / N             stage 3    (4 + 4 + 12) P / N

and what the backward pass needs of the forward one, in e bytes a value (4, or 2 in bf16), after Korthikanti et al. 2022
("Reducing activation recomputation", section 4.1) for our layer (queries, keys, values, mixed values, two projections,
two sums and two norms of width d; two of the feed-forward width f; the dropout masks), without attention scores:

    layers x t x (e (10 d + 2 f) + 3 d)  +  3 x 4 x m x vocabulary        (logits, their softmax and its gradient)

Back ends that keep attention scores (`padded`, `eager`) take 2 e x heads x sum(l^2) more per layer. Options of
an encoder add to the values of width d: 2 for turned queries and keys, 2 for normalised ones, 2 o for o neighbours in
rank; a gated feed-forward keeps four of width f; seen genes take a byte and a value more per logit.

**Time**: the tokens of the plan over the tokens per second that a few micro-batches of the plan took on this machine's
own device, times the number of workers: communication between workers, and slower or faster devices than this one, are
not in it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from genescale.training.batches import CellSource, MicroBatch, StepBatch, check_workers, micro_batch
from genescale.training.engine import TorchEngine
from genescale.training.flops import Utilisation, Work, peak_flops_per_s
from genescale.training.loop import RunPlan
from genescale.training.model import EncoderConfig, MaskedGeneModel, new_model
from genescale.training.recipe import PretrainConfig

STAGES = (0, 1, 2, 3)
PROBE_S, PROBES = 10.0, 8
FP32 = 4
# (whole on every worker, divided among workers) of the bytes for each parameter.
BYTES_PER_PARAMETER = {0: (16, 0), 1: (8, 12), 2: (4, 16), 3: (0, 20)}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Speed of this encoder on this machine's device."""

    device: str
    micro_batches: int
    tokens: int
    seconds: float
    mfu: float

    @property
    def tokens_per_s(self) -> float:
        """Real tokens per second of one worker."""
        return self.tokens / self.seconds


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run will take."""

    cells: int
    held_out_cells: int
    held_out_by: str
    steps: int
    epochs: float
    tokens: int
    """Of all steps."""
    tokens_per_step: float
    fill: float
    """Share of the token budget that micro-batches fill, over the first epoch; nothing is padded."""
    workers: int
    parameters: int
    memory_bytes: dict[int, int]
    """Of one worker, by ZeRO stage."""
    zero_stage: int
    """The one that the recipe asks for."""
    checkpoint_bytes: int
    measured: Measured

    @property
    def hours(self) -> float:
        """Estimated time of the run without measurements on held-out cells; see the top of this file."""
        return self.tokens / (self.measured.tokens_per_s * self.workers) / 3600

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        measured = {**vars(self.measured), "tokens_per_s": self.measured.tokens_per_s}
        return {**vars(self), "measured": measured, "hours": self.hours}


def estimate(config: PretrainConfig, source: CellSource, *, workers: int, device: str = "") -> Estimate:
    """Plan a run, and measure a few micro-batches of it on this machine; SettingsError or CorpusError as `RunPlan`."""
    check_workers(config.lanes, workers)
    plan = RunPlan.of(config, source)
    encoder = config.encoder.for_vocabulary(source.vocabulary)
    # Counted without memory for the weights.
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in MaskedGeneModel(encoder).parameters())
    tokens, epochs = _tokens(plan)
    return Estimate(
        cells=len(plan.training.cells),
        held_out_cells=len(plan.split.held_out),
        held_out_by="donor" if plan.split.by_donor else "cell",
        steps=plan.total_steps,
        epochs=epochs,
        tokens=tokens,
        tokens_per_step=tokens / plan.total_steps,
        fill=_all_tokens(plan) / (len(plan.training.epoch(0).starts) - 1) / config.token_budget,
        workers=workers,
        parameters=parameters,
        memory_bytes={stage: memory_bytes(config, encoder, parameters, workers, stage) for stage in STAGES},
        zero_stage=config.optimizer.zero_stage,
        checkpoint_bytes=3 * FP32 * parameters,
        measured=measure(config, source, plan, device=device),
    )


def memory_bytes(config: PretrainConfig, encoder: EncoderConfig, parameters: int, workers: int, stage: int) -> int:
    """Memory of one worker at a ZeRO stage; see the top of this file."""
    whole, divided = BYTES_PER_PARAMETER[stage]
    value = 2 if config.optimizer.precision == "bf16" else FP32
    tokens, width = config.token_budget, encoder.width
    kept = 10 * width + (4 if encoder.activation == "geglu" else 2) * encoder.feed_forward
    kept += 2 * width * (bool(encoder.rotary_base) + encoder.query_key_norm + encoder.rank_neighbours)
    activations = encoder.layers * tokens * (value * kept + 3 * width)
    logit = 3 * FP32 + (FP32 + 1) * encoder.seen_genes
    logits = logit * config.mask_fraction * tokens * encoder.vocabulary_size
    return int(parameters * (whole + divided / workers) + activations + logits)


def measure(config: PretrainConfig, source: CellSource, plan: RunPlan, *, device: str = "") -> Measured:
    """Train on a few micro-batches of the plan, for about ten seconds, with an engine that is thrown away."""
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    encoder = config.encoder.for_vocabulary(source.vocabulary)
    engine = TorchEngine(
        new_model(encoder, seed=config.seed, attention=config.attention),
        # One process divides nothing, so there is nothing to put on the host either.
        dataclasses.replace(config.optimizer, offload=False),
        total_steps=max(plan.total_steps, PROBES + 1),
        device=place,
    )
    work, done, seconds = Work(), 0, 0.0
    for number, batch in enumerate(_probes(config, source, plan)):
        began = time.perf_counter()
        engine.step(batch).cpu()
        took = time.perf_counter() - began
        # The first one pays for allocation and compilation, unless it is the only one.
        if number == 0 and took < PROBE_S:
            continue
        work += Work(tokens=batch.tokens, squares=batch.squares, masked=batch.masked)
        done, seconds = done + 1, seconds + took
        if seconds > PROBE_S:
            break
    peak = peak_flops_per_s(place, config.optimizer.precision)
    mfu = Utilisation(encoder=encoder, peak_flops_per_s=peak).share(work, seconds)
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return Measured(device=name, micro_batches=done, tokens=work.tokens, seconds=seconds, mfu=mfu)


def _probes(config: PretrainConfig, source: CellSource, plan: RunPlan) -> Iterator[StepBatch]:
    """Steps of one micro-batch each; the same ones again when the plan has fewer."""
    epoch = plan.training.epoch(0)
    for number in range(PROBES + 1):
        step, lane = divmod(number % (len(epoch.starts) - 1), config.lanes)
        cells = epoch.micro_batch(step, lane)
        made: MicroBatch = micro_batch(source.tokens(cells), cells, plan.masking, epoch=0, dropout_seed=number)
        lengths = source.lengths[cells].astype(np.int64)
        tokens, squares = int(lengths.sum()), int((lengths**2).sum())
        yield StepBatch(number + 1, 0, (made,), made.n_masked, tokens, squares)


def _tokens(plan: RunPlan) -> tuple[int, float]:
    """(tokens of all steps, how many epochs they are)."""
    whole, rest = plan.training.locate(plan.total_steps)
    every = _all_tokens(plan)
    if not rest:
        return whole * every, float(whole)
    epoch = plan.training.epoch(whole)
    begun = epoch.order[: epoch.starts[min(rest * epoch.lanes, len(epoch.starts) - 1)]]
    return whole * every + int(plan.training.lengths[begun].sum(dtype=np.int64)), whole + rest / epoch.n_steps


def _all_tokens(plan: RunPlan) -> int:
    """Tokens of one epoch."""
    return int(plan.training.lengths[plan.training.cells].sum(dtype=np.int64))
