"""How fast genes are deleted in silico, against `transformers`' BertForMaskedLM under the published way of working.

    make bench NAME=perturb                          all parts, about five minutes on two quiet cores
    make bench NAME=perturb ARGS=--quick             less than a minute
    make bench NAME=perturb ARGS="--only race"       one part; --device cuda for a GPU

race       single genes of the same cells are deleted from the same 6-layer model (256 wide, 25,426 tokens), in turn; in
           sequences (edited copies) per second. Ours is `perturb_cells`, sharing the first layer among the deletions of
           a cell as a screen of all genes does; the baseline is `published_perturber.py`. What a cell costs once is
           spread over the deletions that are measured, which are fewer than a cell has. Both answer the mean cosine of
           the remaining genes, and have to agree.
overhead   processor time of `perturb_cells` outside the encoder: edits, batches, comparison, answers.
tiny       the same for a tiny model, where it counts most; nothing is promised.
workers    two processes of one thread each against one.
gpu        sequences per second at 2,048 tokens and the share of the device's peak; only where there is one.

On a CPU the processor time is compared as well as the clock, since other work disturbs only the latter. Needs no Ray.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from harness import Row, at_least, at_most, finish, in_turn, measured, parser, times_faster
from published_perturber import PublishedPerturber
from ranked_cells import CellPool, cell_pool

from genescale.perturbation.perturb import EditRequest, Readouts, perturb_cells
from genescale.platform.bundle import Bundle, open_bundle, write_bundle
from genescale.training.deletions import Deletions as CellDeletions
from genescale.training.embedder import Embedder
from genescale.training.flops import Work, peak_flops_per_s, training_flops
from genescale.training.model import Encoder, EncoderConfig, new_model
from genescale.training.recipe import EncoderShape, read_recipe
from genescale.training.weights import to_hf

# As a screen of all genes reads cells.
READOUTS = Readouts(share_first_layer=True)
PACKAGES = ("datasets", "numpy", "torch", "transformers")
PARTS = ("race", "overhead", "tiny", "workers", "gpu")
BARS = {"race": 3.0, "overhead": 0.05, "workers": 1.8, "gpu": 2_000.0}
TINY = EncoderShape(width=64, layers=2, heads=2, feed_forward=128)
# Copies that the baseline sends through its model at a time: 8 x 1,000 x 25,426 logits are 0.8 GB.
BATCH_CELLS = {"cpu": 8, "cuda": 100}
GPU_TOKENS, GPU_TOKENS_PER_BATCH = 2_048, 131_072


@dataclass(frozen=True)
class Bench:
    """What all parts share."""

    pool: CellPool
    shape: EncoderConfig
    bundle: Bundle
    tiny: Bundle
    device: str
    quick: bool

    def cells(self, count: int) -> list[np.ndarray]:
        """Cells evenly spread over the lengths that there are."""
        by_length = np.argsort(self.pool.lengths, kind="stable")
        return [self.pool.cells[by_length[int((n + 0.5) / count * len(by_length))]] for n in range(count)]


@dataclass(frozen=True)
class Deletions:
    """Genes to delete one at a time, evenly spread over the ranks of each cell."""

    cells: list[np.ndarray]
    positions: list[list[int]]

    @classmethod
    def of(cls, cells: list[np.ndarray], per_cell: int) -> Deletions:
        """At most `per_cell` of each cell."""
        return cls(cells, [np.unique(np.linspace(0, len(cell) - 1, per_cell).astype(int)).tolist() for cell in cells])

    @property
    def total(self) -> int:
        return sum(map(len, self.positions))

    @property
    def requests(self) -> list[list[EditRequest]]:
        return [
            [EditRequest(kind="delete", genes=(int(cell[at]),)) for at in positions]
            for cell, positions in zip(self.cells, self.positions, strict=True)
        ]

    @property
    def note(self) -> str:
        lengths = [len(cell) for cell in self.cells]
        return f"{self.total} deletions in {len(lengths)} cells of {min(lengths)} to {max(lengths)} genes"


def main() -> int:
    made = parser(__doc__.partition("\n")[0])
    made.add_argument("--only", choices=PARTS, action="append", help="run only these parts")
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    arguments = made.parse_args()
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    parts: dict[str, Callable[[Bench], Iterator[Row]]] = {
        "race": race, "overhead": overhead, "tiny": tiny, "workers": workers, "gpu": gpu,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="genescale-") as scratch:
        pool = cell_pool()
        shape = read_recipe("geneformer-v1-10m").encoder.for_vocabulary(pool.vocabulary)
        small = TINY.for_vocabulary(pool.vocabulary)
        bundles = [random_bundle(one, pool, Path(scratch) / str(one.width)) for one in (shape, small)]
        bench = Bench(pool, shape, *bundles, device, arguments.quick)
        rows = [measured("Mean length of the cells", float(pool.lengths.mean()), "tokens", note=pool.origin)]
        for name in arguments.only or PARTS:
            print(f"… {name}", file=sys.stderr, flush=True)
            rows += parts[name](bench)
    name = "perturb" if not arguments.only else f"perturb-{'-'.join(arguments.only)}"
    return finish(name, rows, PACKAGES, quick=arguments.quick, output=arguments.output)


def random_bundle(shape: EncoderConfig, pool: CellPool, folder: Path) -> Bundle:
    """A model with fresh weights: the arithmetic is that of a trained one."""
    weights = to_hf(new_model(shape, seed=0))
    return write_bundle(
        folder, kind="masked_gene_model", config=shape.to_hf(), weights=weights, vocabulary=pool.vocabulary, lineage={}
    )


# --- against the published way ---------------------------------------------------------------------------------------


def race(bench: Bench) -> Iterator[Row]:
    """Both sides delete the same genes, in turn, each in its own batches."""
    deletions = Deletions.of(bench.cells(1 if bench.quick else 4), per_cell=16 if bench.quick else 48)
    ours = Embedder.load(bench.bundle, device=bench.device)
    theirs = PublishedPerturber(
        bench.shape, bench.bundle.weights(), batch_cells=BATCH_CELLS[bench.device], device=bench.device
    )
    found: dict[str, list[float]] = {}

    def delete_ours() -> None:
        answers = perturb_cells(ours, deletions.cells, deletions.requests, readouts=READOUTS)
        found["ours"] = [answer.cosine or 0.0 for of_cell in answers for answer in of_cell]

    def delete_theirs() -> None:
        values = [theirs.delete_each(*pair) for pair in zip(deletions.cells, deletions.positions, strict=True)]
        found["theirs"] = np.concatenate(values).tolist()

    warm = Deletions.of(bench.cells(1), per_cell=2)
    perturb_cells(ours, warm.cells, warm.requests, readouts=READOUTS)
    theirs.delete_each(warm.cells[0], warm.positions[0])
    spent = in_turn({"ours": delete_ours, "theirs": delete_theirs}, repeats=1 if bench.quick else 3)
    fast, slow = (deletions.total / spent[name].wall_s for name in ("ours", "theirs"))
    by_cpu = spent["theirs"].cpu_s / spent["ours"].cpu_s
    note = f"{deletions.note}; batches of the baseline {theirs.batch_cells}; ratio by processor time {by_cpu:.2f}"
    yield times_faster("Single-gene deletions per second", fast, slow, "sequences/s", BARS["race"], note=note)
    apart = float(np.abs(np.subtract(found["ours"], found["theirs"])).max())
    yield at_most("  largest difference of a cell's cosine from the baseline's", apart, "", 1e-5)


# --- outside the encoder ---------------------------------------------------------------------------------------------


def overhead(bench: Bench) -> Iterator[Row]:
    """Edits, batches, comparison and answers of the 6-layer model, in one thread."""
    deletions = Deletions.of(bench.cells(1 if bench.quick else 3), per_cell=16 if bench.quick else 48)
    share, each_s = outside_encoder(bench.bundle, deletions)
    note = f"{deletions.note}; {1e3 * share * each_s:.2f} ms of {1e3 * each_s:.0f} ms of processor time each"
    yield at_most("Processor time outside the encoder, 6 layers", share, "of all", BARS["overhead"], note=note)


def tiny(bench: Bench) -> Iterator[Row]:
    """As `overhead`, for two layers of 64, of which the default read-out computes one."""
    deletions = Deletions.of(bench.cells(3), per_cell=40 if bench.quick else 200)
    share, each_s = outside_encoder(bench.tiny, deletions)
    yield measured("Processor time outside the encoder, tiny model", share, "of all", note=deletions.note)
    yield measured("Deletions per second of one core, tiny model", 1 / each_s, "sequences/s")


def outside_encoder(bundle: Bundle, deletions: Deletions) -> tuple[float, float]:
    """Share of the processor time that is not the encoder's, and processor seconds of each deletion."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        embedder = Embedder.load(bundle, device="cpu")
        perturb_cells(embedder, deletions.cells[:1], deletions.requests[:1], readouts=READOUTS)
        rounds = [_one_round(embedder, deletions) for _ in range(3)]
    finally:
        torch.set_num_threads(threads)
    return statistics.median(r[0] for r in rounds), statistics.median(r[1] for r in rounds)


def _one_round(embedder: Embedder, deletions: Deletions) -> tuple[float, float]:
    spent: list[float] = []
    with contextlib.ExitStack() as stack:
        for owner, name in ((Encoder, "forward"), (CellDeletions, "__init__"), (CellDeletions, "without")):
            stack.enter_context(mock.patch.object(owner, name, _timed(getattr(owner, name), spent)))
        start = time.process_time()
        perturb_cells(embedder, deletions.cells, deletions.requests, readouts=READOUTS)
        total_s = time.process_time() - start
    return 1 - sum(spent) / total_s, total_s / deletions.total


def _timed(work: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.process_time()
        try:
            return work(*args, **kwargs)
        finally:
            spent.append(time.process_time() - began)

    return timed


# --- two workers -----------------------------------------------------------------------------------------------------


def workers(bench: Bench) -> Iterator[Row]:
    """The same cells by one process of one thread, and by two."""
    if bench.device != "cpu":
        return
    deletions = Deletions.of(bench.cells(2) * 2, per_cell=16 if bench.quick else 48)
    seconds = {count: _pool_s(bench.bundle, deletions, count, 1 if bench.quick else 3) for count in (1, 2)}
    one, two = (deletions.total / seconds[count] for count in (1, 2))
    yield times_faster("Two workers of one thread", two, one, "sequences/s", BARS["workers"], note=deletions.note)


def _pool_s(bundle: Bundle, deletions: Deletions, count: int, repeats: int) -> float:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=context, initializer=_load, initargs=(str(bundle.folder),)) as pool:
        # Longest first: with four pieces of work the order decides, with the many units of a screen it does not.
        pairs = sorted(zip(deletions.cells, deletions.requests, strict=True), key=lambda pair: -len(pair[0]))
        list(pool.map(_delete, pairs[:count]))
        rounds = []
        for _ in range(repeats):
            began = time.perf_counter()
            list(pool.map(_delete, pairs))
            rounds.append(time.perf_counter() - began)
    return statistics.median(rounds)


_LOADED: list[Embedder] = []


def _load(folder: str) -> None:
    torch.set_num_threads(1)
    _LOADED.append(Embedder.load(open_bundle(Path(folder)), device="cpu"))


def _delete(pair: tuple[np.ndarray, list[EditRequest]]) -> int:
    return len(perturb_cells(_LOADED[0], [pair[0]], [pair[1]], readouts=READOUTS)[0])


# --- a GPU -----------------------------------------------------------------------------------------------------------


def gpu(bench: Bench) -> Iterator[Row]:
    """Full windows in each precision, and how far its shifts are from those of float32 on the CPU."""
    if bench.device != "cuda":
        return
    draws = np.random.default_rng(0)
    cell = draws.choice(bench.pool.vocabulary.token_ids, GPU_TOKENS, replace=False).astype(np.uint16)
    every = Deletions.of([cell], per_cell=GPU_TOKENS)
    few = Deletions.of([cell], per_cell=16)
    exact = _shifts(Embedder.load(bench.bundle, device="cpu"), few)
    peak = peak_flops_per_s("cuda", "bf16")
    flops = forward_flops(bench.shape, bench.shape.layers - 1, every.total * (GPU_TOKENS - 1), GPU_TOKENS - 1)
    for precision in ("float32", "float16", "bfloat16"):
        embedder = Embedder.load(
            bench.bundle, device="cuda", tokens_per_batch=GPU_TOKENS_PER_BATCH, precision=precision
        )
        _shifts(embedder, few)
        spent = in_turn({"ours": lambda embedder=embedder: _shifts(embedder, every)}, repeats=3)["ours"]
        rate = every.total / spent.wall_s
        note = f"{torch.cuda.get_device_name()}, all {every.total} genes of a full window"
        claim = f"Single-gene deletions per second at {GPU_TOKENS:,} tokens, {precision}"
        yield (
            at_least(claim, rate, "sequences/s", BARS["gpu"], note=note)
            if precision == "float16"
            else measured(claim, rate, "sequences/s", note=note)
        )
        yield measured("  share of the device's bf16 peak", flops / spent.wall_s / peak, "of peak")
        error = float(np.abs(_shifts(embedder, few) / exact - 1).max())
        yield measured("  largest relative error of a shift", error, "of the shift", note="against float32 on the CPU")


def _shifts(embedder: Embedder, deletions: Deletions) -> np.ndarray:
    answers = perturb_cells(embedder, deletions.cells, deletions.requests, readouts=READOUTS)
    return np.array([answer.shift for of_cell in answers for answer in of_cell])


def forward_flops(shape: EncoderConfig, layers: int, tokens: int, length: int) -> float:
    """Model FLOPs of a forward pass through some layers, without vocabulary logits (formula in training/flops.py)."""
    work = Work(tokens=tokens, squares=tokens * length)
    return training_flops(dataclasses.replace(shape, layers=layers), work) / 3


if __name__ == "__main__":
    sys.exit(main())
