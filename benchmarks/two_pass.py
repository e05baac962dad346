"""A screen in two passes against the exact full screen of the same cells: what it finds, and what it costs.

    make bench NAME=two_pass ARGS="--real BUNDLE CORPUS"     about ten minutes on one processor; continues where it was
    make bench NAME=two_pass ARGS=--quick                    less than a minute: that everything runs

Simulated cells are drawn and a published encoder of three layers is trained on them here (kept below --work); real
cells and their encoder are given: docs/two-pass-screen.md says how they were made. Every gene of every cell is deleted
exactly, which is the reference; then

top of a cell      the 100 genes whose deletion moves the cell most, or a tenth where it has fewer than 1,000, and the
                   top twentieth: how many of them the second pass deletes
top of the screen  the 100 genes of the largest mean shift, of those that a tenth of the cells have: how many are among
                   the 100 of `gene_means`, which takes the exact shift where there is one and the estimate elsewhere
cost               processor seconds of first pass and chosen deletions, as a share of the full screen's
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from harness import Row, at_least, at_most, finish, measured, parser
from two_pass_cells import QUICK, SIMULATED, Bench, given, simulated, untrained

from genescale.perturbation.answers import Readouts
from genescale.perturbation.editing.cell import gene_span
from genescale.perturbation.perturb import EditRequest, perturb_cell
from genescale.perturbation.screening.first_pass import FirstPass
from genescale.perturbation.screening.two_pass import Chosen, TwoPassConfig, choose
from genescale.perturbation.screening.two_pass_effects import gene_means, recall_estimate
from genescale.training.embedder import LAYERS, layers_to_run
from genescale.training.flops import Work, training_flops

PACKAGES = ("numpy", "polars", "torch")
CONFIG = TwoPassConfig()
PROBES = (1, 2, 4, 8)
RECALL, COST = 0.95, 0.1
MANY, WHOLE_TOP = 1_000, 100
SHARES = (0.05, 0.1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Screened:
    """One cell: its exact shifts, the estimates by number of probes, and processor seconds."""

    tokens_g: np.ndarray
    exact_g: np.ndarray
    estimates_pg: np.ndarray
    full_s: float
    deletion_s: float
    """Of one deletion, measured on the chosen ones."""
    first_pass_s: np.ndarray

    @property
    def estimate_g(self) -> np.ndarray:
        return self.estimates_pg[PROBES.index(CONFIG.probes)]

    def chosen(self, number: int, config: TwoPassConfig = CONFIG) -> Chosen:
        return choose(self.estimate_g, config, np.random.default_rng([config.seed, number]))


def screened(bench: Bench, number: int, work: Path) -> Screened:
    """A cell of a bench, from its file where there is one."""
    path = work / bench.name.replace(",", "").replace(" ", "-") / f"{number:04d}.npz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        # Renamed when it is whole: a run may be stopped at any time and goes on where it was.
        part = path.with_name("part.npz")
        np.savez(part, **dataclasses.asdict(screen_cell(bench, number)))
        part.rename(path)
    with np.load(path) as file:
        return Screened(**{name: file[name] for name in file.files})


def screen_cell(bench: Bench, number: int) -> Screened:
    tokens_t = bench.cells[number]
    # As the screen deletes every gene, in both passes.
    readouts = Readouts(layer=bench.layer, share_first_layer=True)
    tokens_g = tokens_t[gene_span(tokens_t, bench.embedder.vocabulary)]
    estimates, first_pass_s = [], []
    for probes in PROBES:
        first = FirstPass(bench.embedder, readouts, TwoPassConfig(probes=probes))
        found, seconds = timed(lambda first=first: first.estimates(tokens_t)["shift"])
        estimates.append(found)
        first_pass_s.append(seconds)

    def shifts(genes: Sequence[int]) -> np.ndarray:
        requests = [EditRequest(kind="delete", genes=(int(gene),)) for gene in genes]
        return np.array([one.shift for one in perturb_cell(bench.embedder, tokens_t, requests, readouts=readouts)])

    chosen = choose(estimates[PROBES.index(CONFIG.probes)], CONFIG, np.random.default_rng([CONFIG.seed, number]))
    _, chosen_s = timed(lambda: shifts(tokens_g[chosen.positions]))
    exact_g, full_s = timed(lambda: shifts(tokens_g))
    return Screened(
        tokens_g=tokens_g, exact_g=exact_g, estimates_pg=np.array(estimates), full_s=full_s,
        deletion_s=chosen_s / len(chosen.positions), first_pass_s=np.array(first_pass_s),
    )  # fmt: skip


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    began = time.process_time()
    found = work()
    return found, time.process_time() - began


def caught(cell: Screened, wanted: int, positions: np.ndarray) -> float:
    """Of the `wanted` largest exact shifts, the share at `positions`."""
    return float(np.isin(np.argsort(-cell.exact_g, kind="stable")[:wanted], positions).mean())


def rows(bench: Bench, cells: Sequence[Screened], *, quick: bool) -> Iterator[Row]:
    """Everything that is claimed of one bench."""
    name, chosen = bench.name, [cell.chosen(number) for number, cell in enumerate(cells)]
    cost = sum(cell.first_pass_s[PROBES.index(CONFIG.probes)] for cell in cells)
    cost += sum(cell.deletion_s * len(one.positions) for cell, one in zip(cells, chosen, strict=True))
    cost = float(cost / sum(cell.full_s for cell in cells))
    found, truth = whole_screen(bench, cells, chosen)
    share = float(np.isin(truth, found).mean())
    yield measured(f"{name}: same order (Spearman)", mean(same_order(cell) for cell in cells), "", note=bench.about)
    yield measured(f"{name}: error of an estimate", mean(error(cell) for cell in cells), "of the shift", note="median")
    if quick:
        yield measured(f"{name}: cost", cost, "of the full screen")
    else:
        yield at_least(f"{name}: top {len(truth)} genes of the screen", share, "found", RECALL)
        yield at_most(
            f"{name}: cost", cost, "of the full screen", COST, note=f"{flops_share(bench, chosen):.3f} of FLOPs"
        )
    for part in SHARES:
        recalls = [caught(cell, top_of(cell, part), one.positions) for cell, one in zip(cells, chosen, strict=True)]
        yield measured(f"{name}: top {part:.0%} of a cell", mean(recalls), "deleted", note=f"least {min(recalls):.2f}")
        needed = mean(share_needed(cell, top_of(cell, part)) for cell in cells)
        yield measured(f"{name}: top {part:.0%} of a cell, deletions for {RECALL:.0%}", needed, "of the genes")
        by_rank = mean(caught(cell, top_of(cell, part), np.arange(len(one.positions)))
                       for cell, one in zip(cells, chosen, strict=True))  # fmt: skip
        yield measured(f"{name}: top {part:.0%} of a cell, the highest ranks instead", by_rank, "deleted")
    yield from probe_rows(name, cells)
    yield from estimated(name, bench, cells, chosen)


def top_of(cell: Screened, part: float) -> int:
    """The number asked for: 100 instead of a tenth where a cell has 1,000 genes or more."""
    n = len(cell.exact_g)
    return WHOLE_TOP if part == 0.1 and n >= MANY else int(np.ceil(part * n))


def mean(values: Any) -> float:
    return float(np.mean(list(values)))


def same_order(cell: Screened) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(cell.exact_g, cell.estimate_g)[0])


def error(cell: Screened) -> float:
    return float(np.median(np.abs(cell.estimate_g / cell.exact_g - 1.0)))


def share_needed(cell: Screened, wanted: int) -> float:
    """The highest estimates, as a share of the genes, among which are 95 % of the `wanted` largest shifts."""
    place_g = np.argsort(np.argsort(-cell.estimate_g, kind="stable"), kind="stable")
    places = np.sort(place_g[np.argsort(-cell.exact_g, kind="stable")[:wanted]])
    return float(places[int(np.ceil(RECALL * wanted)) - 1] + 1) / len(place_g)


def probe_rows(name: str, cells: Sequence[Screened]) -> Iterator[Row]:
    """What more directions buy: recall of the top twentieth in the deletions made for certain, and their cost."""
    full_s = sum(cell.full_s for cell in cells)
    for at, probes in enumerate(PROBES):
        recalls = []
        for cell in cells:
            n_top = int(np.ceil(CONFIG.top_fraction * len(cell.exact_g)))
            recalls.append(caught(cell, top_of(cell, 0.05), np.argsort(-cell.estimates_pg[at])[:n_top]))
        cost = sum(cell.first_pass_s[at] for cell in cells) / full_s
        note = f"first pass {cost:.1%} of the full screen"
        yield measured(f"{name}: top 5% of a cell, {probes} probes", mean(recalls), "deleted", note=note)


def tables(bench: Bench, cells: Sequence[Screened], chosen: Sequence[Chosen]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """`first_pass` and `cell_shifts` as a screen of two passes writes them."""
    scored, made = [], []
    for number, (cell, one) in enumerate(zip(cells, chosen, strict=True)):
        same = {"dataset_id": "bench", "cell_id": str(number), "source_row": number}
        roles = np.full(len(cell.tokens_g), None, dtype=object)
        roles[one.positions] = one.roles
        ids = [str(token) for token in cell.tokens_g]
        scored.append(pl.DataFrame({"gene_id": ids, "score": cell.estimate_g, "chosen": roles.tolist()}).with_columns(
            **{key: pl.lit(value) for key, value in same.items()}
        ))  # fmt: skip
        made.append(pl.DataFrame({
            "gene_id": np.array(ids)[one.positions], "shift": cell.exact_g[one.positions], "chosen": one.roles,
            "chance": one.chances, "outcome": ["edited"] * len(one.positions),
        }).with_columns(**{key: pl.lit(value) for key, value in same.items()}))  # fmt: skip
    return pl.concat(scored), pl.concat(made)


def whole_screen(bench: Bench, cells: Sequence[Screened], chosen: Sequence[Chosen]) -> tuple[np.ndarray, np.ndarray]:
    """The strongest genes of the screen by `gene_means`, and by the exact full screen."""
    least = max(3, len(cells) // 10)
    found = gene_means(*tables(bench, cells, chosen)).filter(pl.col("n_cells") >= least)["gene_id"].to_numpy()
    pairs = pl.DataFrame({
        "gene_id": np.concatenate([cell.tokens_g for cell in cells]).astype(str),
        "shift": np.concatenate([cell.exact_g for cell in cells]),
    })  # fmt: skip
    exact = pairs.group_by("gene_id").agg(n=pl.len(), mean=pl.col("shift").mean()).filter(pl.col("n") >= least)
    truth = exact.sort("mean", "gene_id", descending=[True, False])["gene_id"].to_numpy()
    top = min(WHOLE_TOP, max(1, len(truth) // 10))
    return found[:top], truth[:top]


def estimated(name: str, bench: Bench, cells: Sequence[Screened], chosen: Sequence[Chosen]) -> Iterator[Row]:
    """What a screen says of its own recall, beside the recall that it had."""
    said = recall_estimate(*tables(bench, cells, chosen), share=0.05)
    true = mean(caught(cell, top_of(cell, 0.05), one.positions) for cell, one in zip(cells, chosen, strict=True))
    note = f"at least {said.at_least:.2f}, from {said.n_random} random deletions; it was {true:.3f}"
    yield measured(f"{name}: top 5% of a cell, as the screen estimates it", said.recall, "deleted", note=note)


def flops_share(bench: Bench, chosen: Sequence[Chosen]) -> float:
    """Model FLOPs of both passes as a share of the full screen's: a backward pass counts as two forward passes."""
    config = bench.embedder.encoder.config
    shape = dataclasses.replace(config, layers=max(1, layers_to_run(bench.layer, config.layers)))
    streams = 2 * config.rank_neighbours + 1 if config.rank_neighbours else 0
    two, full = 0.0, 0.0
    for tokens_t, one in zip(bench.cells, chosen, strict=False):
        n = len(tokens_t)
        forward = training_flops(shape, Work(tokens=n, squares=n * n)) / 3
        two += forward * (1 + len(one.positions) + 1 + 2 * CONFIG.probes + streams)
        full += forward * (1 + n)
    return two / full


def main() -> int:
    made = parser((__doc__ or "").partition("\n")[0])
    made.add_argument("--real", nargs=2, metavar=("BUNDLE", "CORPUS"), help="a trained model and a corpus of its cells")
    made.add_argument("--only", choices=("simulated", "real"), help="one of the two")
    made.add_argument("--layer", choices=LAYERS, help="one of the two")
    made.add_argument("--cells", type=int, default=30, help="cells of each bench (default 30)")
    made.add_argument("--work", type=Path, help="where the trained encoder and finished cells are kept")
    arguments = made.parse_args()
    torch.set_num_threads(1)
    work = arguments.work or Path(tempfile.mkdtemp())
    found: list[Row] = []
    chosen = (bench for bench in benches(arguments, work) if arguments.layer in (None, bench.layer))
    for bench in chosen:
        cells = [screened(bench, number, work) for number in range(len(bench.cells))]
        found += rows(bench, cells, quick=arguments.quick)
    return finish("two_pass", found, PACKAGES, quick=arguments.quick, output=arguments.output)


def benches(arguments: Any, work: Path) -> Iterator[Bench]:
    if arguments.quick:
        yield from untrained(QUICK)
        return
    if arguments.only != "real":
        yield from simulated(SIMULATED, work, n_cells=arguments.cells)
    if arguments.real and arguments.only != "simulated":
        yield from given("real", Path(arguments.real[0]), arguments.real[1], n_cells=arguments.cells)


if __name__ == "__main__":
    sys.exit(main())
