"""What it costs to plan an epoch of a large corpus, and how fast batches are masked and packed.

    make bench NAME=plan                30 million cells, about a minute
    make bench NAME=plan ARGS=--quick   3 million cells

Lengths are drawn evenly from 300 to 2,048 tokens, donors have 5,000 cells each. The plan is built in a process of its
own, so that its memory is that of the plan. The bars are those of 30 million cells: under a minute for the three epochs
that the published recipes have, and under 2 GiB; and at least twice the 2 million tokens per second that one GPU takes.
"""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
from harness import Row, at_least, at_most, finish, parser

from genescale.platform.vocabulary import Vocabulary
from genescale.training.batches import BatchPlan, step_batches
from genescale.training.cells import MemoryCells
from genescale.training.masking import Masking

GENES, CELLS = 20_000, 3_000
BUDGET, LANES = 24_576, 12
PLAN = """
import resource, sys, time
import numpy as np
from genescale.training.batches import BatchPlan
from genescale.training.cells import hold_out

n = int(sys.argv[1])
draws = np.random.default_rng(0)
lengths, donors = np.empty(n, np.int32), np.empty(n, np.int32)
for start in range(0, n, 1 << 20):
    stop = min(start + (1 << 20), n)
    lengths[start:stop] = draws.integers(300, 2049, size=stop - start)
    donors[start:stop] = np.arange(start, stop) // 5_000
began = time.perf_counter()
split = hold_out(n, 4_096, seed=0, donors=donors)
plan = BatchPlan(lengths=lengths, cells=split.trained, seed=0, token_budget=24_576, lanes=12)
plan.n_steps(3)
print(time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2)
"""


def main() -> int:
    arguments = parser((__doc__ or "").split("\n", 1)[0]).parse_args()
    cells = 3_000_000 if arguments.quick else 30_000_000
    rows = [*planned(cells), packed()]
    return finish("plan", rows, ("numpy", "torch"), quick=arguments.quick, output=arguments.output)


def planned(cells: int) -> list[Row]:
    """Seconds and memory of the plan of three epochs."""
    done = subprocess.run([sys.executable, "-c", PLAN, str(cells)], capture_output=True, text=True, check=True)
    seconds, peak_gib = (float(text) for text in done.stdout.split())
    what = f"plan of {cells / 1e6:.0f} million cells, three epochs"
    return [at_most(what, seconds, "s", 60), at_most(f"{what}, peak memory", peak_gib, "GiB", 2)]


def packed() -> Row:
    """Tokens that one thread masks and packs in a second."""
    draws = np.random.default_rng(0)
    vocabulary = Vocabulary.build([f"ENSG{i:011d}" for i in range(GENES)], np.ones(GENES), window=2_048, name="bench")
    lengths = draws.integers(300, 2_047, size=CELLS)
    cells = [np.r_[2, draws.choice(GENES, n - 2, replace=False) + 4, 3].astype(np.uint16) for n in lengths]
    source = MemoryCells(cells, vocabulary)
    plan = BatchPlan(lengths=source.lengths, cells=np.arange(CELLS), seed=0, token_budget=BUDGET, lanes=LANES)
    masking, tokens = Masking(vocabulary=vocabulary, seed=0), 0
    steps = plan.epoch(0).n_steps
    began = time.perf_counter()
    for batch in step_batches(source, plan, masking, rank=0, workers=1, first=0, last=steps):
        tokens += batch.tokens
    return at_least("masked and packed by one thread", tokens / (time.perf_counter() - began) / 1e6, "M tokens/s", 4)


if __name__ == "__main__":
    sys.exit(main())
