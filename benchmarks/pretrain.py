"""How fast an encoder is pretrained, against `transformers`' BertForMaskedLM under the published way of training.

    make bench NAME=pretrain                              all parts, about four minutes on two cores
    make bench NAME=pretrain ARGS=--quick
    make bench NAME=pretrain ARGS="--only grouped"        one part; --device cuda for a GPU

Both sides train the same cells from the same weights on the same device, in turn, and rates are medians of three in
real tokens per second: padding is no token. Ours is the product's own loop (`train_loop`, `TorchEngine`) with its
batch plan, masks, prefetch thread and measurements; the baseline is `published_trainer.py`. Both make an optimiser step
every 12 cells or so, the published batch of this model; with random batches every four, because 12 cells padded to the
longest need more memory for the baseline's logits and dropout than small machines have (and would pad more).
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from harness import Row, at_least, at_most, finish, in_turn, measured, parser, times_faster
from published_trainer import PublishedTrainer, length_grouped, mask_tokens, padded, shuffled
from ranked_cells import CellPool, cell_pool, reduced

from genescale.training.batches import BatchPlan, MicroBatch, StepBatch, evaluation_batches
from genescale.training.cells import MemoryCells
from genescale.training.engine import OptimizerConfig, TorchEngine
from genescale.training.flops import Utilisation, peak_flops_per_s
from genescale.training.loop import LoopResult, RunPlan, train_loop
from genescale.training.masking import Masking
from genescale.training.model import EncoderConfig, new_model, pack
from genescale.training.recipe import EncoderShape, PretrainConfig, read_recipe
from genescale.training.weights import from_hf, to_hf

PACKAGES = ("numpy", "torch", "transformers")
PARTS = ("grouped", "random", "no_dropout", "loss", "parity", "gpu")
# Their tensors are too small to share among threads.
SMALL_PARTS = ("loss", "parity")
BATCH_CELLS, RANDOM_BATCH_CELLS, MEGA_BATCH = 12, 4, 50
BARS = {"grouped": 2.5, "random": 3.0, "no_dropout": 1.8}
FORMULA = "model FLOPs = 3 x (layers x (t (8 d² + 4 d f) + 4 d sum l²) + m (2 d² + 2 d v)), see training/flops.py"


@dataclass(frozen=True)
class Bench:
    """What all parts share."""

    pool: CellPool
    device: str
    quick: bool

    @property
    def precision(self) -> str:
        return "bf16" if self.device == "cuda" else "fp32"


def main() -> int:
    made = parser(__doc__.partition("\n")[0])
    made.add_argument("--only", choices=PARTS, action="append", help="run only these parts")
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    arguments = made.parse_args()
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    parts: dict[str, Callable[[Bench], Iterator[Row]]] = {
        "grouped": grouped, "random": at_random, "no_dropout": no_dropout, "loss": loss, "parity": parity, "gpu": gpu,
    }  # fmt: skip
    bench = Bench(cell_pool(), device, arguments.quick)
    lengths, threads = bench.pool.lengths, torch.get_num_threads()
    rows = [measured("Mean length of the cells", float(lengths.mean()), "tokens", note=bench.pool.origin)]
    for name in arguments.only or PARTS:
        print(f"… {name}", file=sys.stderr, flush=True)
        torch.set_num_threads(1 if name in SMALL_PARTS else threads)
        rows += parts[name](bench)
    name = "pretrain" if not arguments.only else f"pretrain-{'-'.join(arguments.only)}"
    return finish(name, rows, PACKAGES, quick=arguments.quick, output=arguments.output)


# --- the race --------------------------------------------------------------------------------------------------------


def grouped(bench: Bench) -> Iterator[Row]:
    """Length-grouped batches of mixed lengths, the published dropout."""
    batches = length_grouped(bench.pool.lengths.tolist(), BATCH_CELLS, seed=0)[:MEGA_BATCH]
    yield from race(bench, "grouped", "length-grouped batches", spread(bench, batches, 1 if bench.quick else 2))


def at_random(bench: Bench) -> Iterator[Row]:
    """Batches of random cells, the published dropout."""
    batches = shuffled(len(bench.pool.cells), RANDOM_BATCH_CELLS, seed=0)[:MEGA_BATCH]
    yield from race(bench, "random", "random batches", spread(bench, batches, 1 if bench.quick else 2))


def no_dropout(bench: Bench) -> Iterator[Row]:
    """Length-grouped batches, no dropout on either side."""
    batches = length_grouped(bench.pool.lengths.tolist(), BATCH_CELLS, seed=0)[:MEGA_BATCH]
    batches = spread(bench, batches, 1 if bench.quick else 2)
    yield from race(bench, "no_dropout", "length-grouped batches, no dropout", batches, dropout=0.0)


def spread(bench: Bench, batches: Sequence[list[int]], count: int) -> list[list[int]]:
    """`count` of these batches, evenly spread over their padded lengths: a fair sample of a whole mega-batch."""
    lengths = bench.pool.lengths
    by_length = sorted(batches, key=lambda batch: int(lengths[batch].max()))
    return [by_length[int((number + 0.5) / count * len(by_length))] for number in range(count)]


def race(
    bench: Bench, name: str, what: str, batches: list[list[int]], *, dropout: float | None = None
) -> Iterator[Row]:
    """Both sides train these cells in turn."""
    shape = read_recipe("geneformer-v1-10m").encoder
    if dropout is not None:
        shape = dataclasses.replace(shape, hidden_dropout=dropout, attention_dropout=dropout)
    chosen = [bench.pool.cells[number] for batch in batches for number in batch]
    tokens = sum(len(cell) for cell in chosen)
    ours = Ours.of(bench, shape, chosen, tokens_per_step=tokens // len(batches))
    theirs = PublishedTrainer(
        ours.encoder, to_hf(new_model(ours.encoder, seed=0)), ours.config.optimizer, total_steps=10_000,
        device=bench.device,
    )  # fmt: skip
    lengths = bench.pool.lengths
    padded_tokens = sum(len(batch) * int(lengths[batch].max()) for batch in batches)
    # The shortest batch: libraries load, threads start, memory is asked for.
    theirs.train(bench.pool.cells, batches[:1])
    results = [ours.train()]
    results.clear()
    spent = in_turn(
        {
            "ours": lambda: results.append(ours.train()),
            "theirs": lambda: theirs.train(bench.pool.cells, batches),
        }
    )
    fast, slow = tokens / spent["ours"].wall_s, tokens / spent["theirs"].wall_s
    by_cpu = spent["theirs"].cpu_s / spent["ours"].cpu_s
    note = (
        f"{len(chosen)} cells of {min(map(len, chosen))} to {max(map(len, chosen))} tokens; "
        f"{len(batches)} steps of the baseline, {ours.plan.total_steps} of ours; ratio by processor time {by_cpu:.2f}"
    )
    claim = f"Real tokens per second, {what}"
    if bench.device == "cpu":
        yield times_faster(claim, fast, slow, "tokens/s", BARS[name], note=note)
    else:
        yield Row(claim=claim, value=fast, unit="tokens/s", baseline=slow, ratio=fast / slow, note=note)
    yield measured(f"  ratio by processor time, {what}", by_cpu, "×")
    yield measured(f"  pad efficiency of the baseline, {what}", tokens / padded_tokens, "real/padded", note="ours: 1")
    waited = statistics.median(result.waited_s / result.seconds for result in results)
    yield at_most(f"  share of time waiting for data, {what}", waited, "of step time", 0.05)
    mfu = statistics.median(result.mfu or 0.0 for result in results)
    yield Row(
        claim=f"  model FLOP utilisation, {what}", value=mfu, unit="of peak", baseline=mfu * slow / fast, note=FORMULA
    )


@dataclass(frozen=True, eq=False)
class Ours:
    """The product's loop over cells in memory, ready to be timed."""

    source: MemoryCells
    config: PretrainConfig
    plan: RunPlan
    encoder: EncoderConfig
    engine: TorchEngine
    utilisation: Utilisation

    @classmethod
    def of(
        cls, bench: Bench, shape: EncoderShape, cells: Sequence[np.ndarray], *, tokens_per_step: int, steps: int = 0
    ) -> Ours:
        source = MemoryCells(cells, bench.pool.vocabulary)
        lanes = 3 if bench.device == "cpu" else 1
        config = PretrainConfig(
            encoder=shape,
            optimizer=OptimizerConfig(precision=bench.precision),  # type: ignore[arg-type]
            # Small micro-batches suit the caches of a CPU, large ones a GPU.
            token_budget=max(tokens_per_step // lanes, max(map(len, cells))),
            lanes=lanes,
            epochs=1,
            steps=steps,
            held_out_cells=0,
            log_every=10**6,
        )
        plan, encoder = RunPlan.of(config, source), shape.for_vocabulary(source.vocabulary)
        engine = TorchEngine(new_model(encoder, seed=0), config.optimizer, total_steps=10_000, device=bench.device)
        utilisation = Utilisation(
            encoder=encoder, peak_flops_per_s=peak_flops_per_s(bench.device, config.optimizer.precision)
        )
        return cls(source, config, plan, encoder, engine, utilisation)

    def train(self) -> LoopResult:
        """One pass over the plan; it ends with losses on the host, so the device is done."""
        return train_loop(self.engine, self.source, self.plan, self.config, utilisation=self.utilisation)


# --- learning --------------------------------------------------------------------------------------------------------

SMALL = EncoderShape(width=64, layers=2, heads=2, feed_forward=128)
SMALL_OPTIMIZER = OptimizerConfig(learning_rate=3e-3, warmup_fraction=0.1)
SEEDS = (0, 1, 2)


def loss(bench: Bench) -> Iterator[Row]:
    """Held-out loss of a small encoder after the same number of cells, three seeds of each side.

    Noise is the standard error of the difference of the two means over seeds (initial weights, order of cells, masks
    and dropout all differ); the bar is that ours lies at most three of them, or 0.01, above the baseline.
    """
    pool = reduced(bench.pool, n_genes=1_022, window=128)
    n_cells, batch_cells = (640 if bench.quick else 1_600), 8
    pool = dataclasses.replace(pool, cells=pool.cells[: n_cells + 400])
    order = np.random.default_rng(0).permutation(len(pool.cells))
    trained, held_out = ([pool.cells[i] for i in part] for part in (order[:n_cells], order[n_cells:]))
    ends: dict[str, list[float]] = {"ours": [], "theirs": []}
    first = 0.0
    for seed in SEEDS:
        encoder = SMALL.for_vocabulary(pool.vocabulary)
        weights = to_hf(new_model(encoder, seed=seed))
        first = held_out_loss(encoder, weights, pool, held_out)
        ends["ours"].append(held_out_loss(encoder, learn_ours(pool, trained, batch_cells, seed), pool, held_out))
        torch.manual_seed(seed)
        batches = length_grouped([len(cell) for cell in trained], batch_cells, seed=seed)
        baseline = PublishedTrainer(encoder, weights, SMALL_OPTIMIZER, total_steps=len(batches))
        baseline.train(trained, batches)
        ends["theirs"].append(held_out_loss(encoder, baseline.weights(), pool, held_out))
    ours, theirs = (statistics.mean(ends[side]) for side in ends)
    noise = (sum(statistics.variance(values) for values in ends.values()) / len(SEEDS)) ** 0.5
    note = (
        f"nats; {n_cells:,} cells once, {len(SEEDS)} seeds; before training {first:.3f}; "
        f"ours {ends_of(ends['ours'])}, baseline {ends_of(ends['theirs'])}; standard error {noise:.4f}"
    )
    allowed = max(3 * noise, 0.01)
    yield Row(
        claim="Held-out loss after the same cells", value=ours, unit="nats", baseline=theirs, ratio=ours / theirs,
        bar=f"≤ baseline + {allowed:.3f}", holds=ours <= theirs + allowed, note=note,
    )  # fmt: skip
    # A loss that neither side brought down would agree as well.
    yield at_least("  which the baseline brought down by", first - theirs, "nats", 0.2)


def ends_of(values: Sequence[float]) -> str:
    return " ".join(f"{value:.3f}" for value in values)


def learn_ours(pool: CellPool, cells: Sequence[np.ndarray], batch_cells: int, seed: int) -> dict[str, np.ndarray]:
    """Weights after one pass of our loop with about `batch_cells` cells a step."""
    mean = sum(map(len, cells)) / len(cells)
    config = PretrainConfig(
        encoder=SMALL, optimizer=SMALL_OPTIMIZER, seed=seed, epochs=1, lanes=1, held_out_cells=0, log_every=10**6,
        token_budget=int((batch_cells + 0.5) * mean),
    )  # fmt: skip
    source = MemoryCells(cells, pool.vocabulary)
    plan = RunPlan.of(config, source)
    model = new_model(SMALL.for_vocabulary(pool.vocabulary), seed=seed)
    engine = TorchEngine(model, SMALL_OPTIMIZER, total_steps=plan.total_steps)
    train_loop(engine, source, plan, config)
    return engine.weights()


def held_out_loss(
    encoder: EncoderConfig, weights: dict[str, np.ndarray], pool: CellPool, held_out: Sequence[np.ndarray]
) -> float:
    """Loss on cells nobody trained on, the same genes hidden for all."""
    source = MemoryCells(held_out, pool.vocabulary)
    plan = BatchPlan(lengths=source.lengths, cells=np.arange(len(held_out)), seed=0, token_budget=4_096, lanes=1)
    batches = evaluation_batches(source, plan, Masking(vocabulary=pool.vocabulary, seed=0), rank=0, workers=1)
    engine = TorchEngine(from_hf(weights, encoder), SMALL_OPTIMIZER, total_steps=1)
    nll, _, masked = torch.stack([engine.evaluate(batch.micro_batches) for batch in batches]).sum(0).tolist()
    return nll / masked


def parity(bench: Bench) -> Iterator[Row]:
    """The loss step by step when both sides get the same batches and the same masks and there is no dropout."""
    pool = reduced(bench.pool, n_genes=1_022, window=128)
    shape = dataclasses.replace(SMALL, hidden_dropout=0.0, attention_dropout=0.0)
    encoder = shape.for_vocabulary(pool.vocabulary)
    model = new_model(encoder, seed=0)
    steps = 20
    theirs = PublishedTrainer(encoder, to_hf(model), SMALL_OPTIMIZER, total_steps=steps)
    ours = TorchEngine(model, SMALL_OPTIMIZER, total_steps=steps)
    torch.manual_seed(0)
    largest, first, last = 0.0, 0.0, 0.0
    for number, batch in enumerate(shuffled(len(pool.cells), 8, seed=0)[:steps]):
        cells = [pool.cells[i] for i in batch]
        tokens_bs, attention_bs = padded(cells)
        inputs_bs, labels_bs = mask_tokens(tokens_bs, encoder.vocabulary_size)
        last = float(theirs.step(inputs_bs, labels_bs, attention_bs))
        nll, _, masked = ours.step(step_of(inputs_bs, labels_bs, attention_bs, number + 1)).tolist()
        largest, first = max(largest, abs(nll / masked - last)), first or last
    note = f"{steps} optimiser steps, the loss falls from {first:.3f} to {last:.3f}"
    yield at_most("Largest difference of losses, same batches and masks", largest, "nats", 1e-3, note=note)


def step_of(inputs_bs: torch.Tensor, labels_bs: torch.Tensor, attention_bs: torch.Tensor, number: int) -> StepBatch:
    """The padded batch of the baseline as our packed one."""
    real_bs = attention_bs.bool()
    packed = pack([row[real].numpy() for row, real in zip(inputs_bs, real_bs, strict=True)])
    labels_t = labels_bs[real_bs]
    positions = torch.nonzero(labels_t >= 0).flatten()
    made = MicroBatch(packed, positions, labels_t[positions], len(positions), 0)
    return StepBatch(number, 0, (made,), len(positions), len(labels_t))


# --- a GPU -----------------------------------------------------------------------------------------------------------

# (recipe, tokens of a micro-batch, bar in real tokens per second on an H200-class card)
GPU_SIZES = (("geneformer-v1-10m", 131_072, 2.0e6), ("geneformer-v2-104m", 65_536, 4.0e5))
GPU_STEPS, GPU_BATCH_CELLS, GPU_RATIO = 30, 32, 1.4


def gpu(bench: Bench) -> Iterator[Row]:
    """bf16 on a CUDA device: rates of two published sizes, and the 6-layer one against random padded batches."""
    if bench.device != "cuda":
        for name, _, bar in GPU_SIZES:
            yield not_measured(f"Real tokens per second, {name} in bf16", f"≥ {bar:,.0f}")
        yield not_measured("6 layers in bf16 against random padded batches", f"≥ {GPU_RATIO} ×")
        return
    for name, budget, bar in GPU_SIZES:
        yield from gpu_rate(bench, name, budget, bar)
    yield from gpu_ratio(bench)


def not_measured(claim: str, bar: str) -> Row:
    # No number: a table of zeros would read as a result.
    return Row(claim=claim, value=None, unit="not measured: no CUDA device", bar=bar)  # type: ignore[arg-type]


def gpu_rate(bench: Bench, name: str, budget: int, bar: float) -> Iterator[Row]:
    ours = Ours.of(bench, read_recipe(name).encoder, bench.pool.cells, tokens_per_step=budget, steps=GPU_STEPS)
    ours.train()
    results = [ours.train() for _ in range(3)]
    rate = statistics.median(result.tokens_per_s for result in results)
    note = f"{torch.cuda.get_device_name()}, micro-batches of {budget:,} tokens"
    yield at_least(f"Real tokens per second, {name} in bf16", rate, "tokens/s", bar, note=note)
    yield measured(f"  model FLOP utilisation, {name}", statistics.median(r.mfu or 0.0 for r in results), "of peak")
    waited = statistics.median(result.waited_s / result.seconds for result in results)
    yield at_most(f"  share of time waiting for data, {name}", waited, "of step time", 0.05)


def gpu_ratio(bench: Bench) -> Iterator[Row]:
    name, budget, _ = GPU_SIZES[0]
    batches = shuffled(len(bench.pool.cells), GPU_BATCH_CELLS, seed=0)[:GPU_STEPS]
    tokens = sum(len(bench.pool.cells[number]) for batch in batches for number in batch)
    ours = Ours.of(bench, read_recipe(name).encoder, bench.pool.cells, tokens_per_step=budget, steps=GPU_STEPS)
    weights = to_hf(new_model(ours.encoder, seed=0))
    theirs = PublishedTrainer(ours.encoder, weights, ours.config.optimizer, total_steps=10_000, device="cuda")
    theirs.train(bench.pool.cells, batches[:3])
    results = [ours.train()]
    spent = in_turn(
        {"ours": lambda: results.append(ours.train()), "theirs": lambda: theirs.train(bench.pool.cells, batches)}
    )
    rate = statistics.median(result.tokens_per_s for result in results[1:])
    yield times_faster(
        "6 layers in bf16 against random padded batches", rate, tokens / spent["theirs"].wall_s, "tokens/s", GPU_RATIO
    )


if __name__ == "__main__":
    raise SystemExit(main())
