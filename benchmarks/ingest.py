"""How fast atlases become a corpus, against the published tokenizer's way of working, and what it costs to grow.

    make bench NAME=ingest            all claims, about ten minutes
    make bench NAME=ingest ARGS=--quick

Speeds are per processor second, ours and the baseline in turn, medians of three to nine; walls, the best of three,
only where more than one worker is the claim. Inputs are synthetic counts over the public V2 gene space
(`synthetic.py`), the baseline is written from the published tokenizer's description (`published_tokenizer.py`).
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from harness import (
    Row,
    at_least,
    at_most,
    finish,
    in_turn,
    measured,
    parser,
    peak_rss_bytes,
    spending,
    times_faster,
)
from published_tokenizer import PublishedTokenizer, with_sizes
from scipy import sparse
from synthetic import CellSource, GeneSpace, drawn_atlas, gene_space, write_h5ad, write_large_h5ad

from genescale.ingestion.annotation.cells import CellRules
from genescale.ingestion.annotation.genes import GeneMap, GeneRules, map_genes
from genescale.ingestion.atlas import Rows
from genescale.ingestion.histograms import Counter
from genescale.ingestion.opening import open_atlas
from genescale.ingestion.plan import MAX_UNIT_CELLS, ReadConfig, Unit, cut
from genescale.ingestion.ranking.kernel import rank_rows
from genescale.ingestion.tally import Tally
from genescale.ingestion.tokenise import write_part
from genescale.platform.cluster import quiet_environment
from genescale.platform.settings import ClusterSettings, Settings, StorageSettings
from genescale.platform.storage import Store

PACKAGES = ("anndata", "datasets", "h5py", "isal", "numba", "numpy", "pyarrow", "ray", "scipy")
STEPS = ("read", "inflate", "rank", "obs", "write", "hash")
RULES, GENE_RULES = CellRules(), GeneRules()
GROWTH = (10_000, 100_000, 1_000_000)
PARTS = ("kernel", "end_to_end", "medians", "workers", "ray", "growth")


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all parts share: the cells, a scratch folder, and whether to be quick."""

    space: GeneSpace
    source: CellSource
    folder: Path
    quick: bool

    @property
    def cells(self) -> int:
        return 8_000 if self.quick else 40_000


def main() -> int:
    made = parser(__doc__.partition("\n")[0])
    made.add_argument("--only", choices=PARTS, action="append", help="run only these parts")
    made.add_argument("--growth-of", type=int, help="internal: measure the growth at one size, print JSON")
    arguments = made.parse_args()
    if arguments.growth_of:
        print(json.dumps(growth_of(arguments.growth_of)))
        return 0
    quiet_datasets()
    space = gene_space()
    parts: dict[str, Callable[[Bench], Iterator[Row]]] = {
        "kernel": kernel, "end_to_end": end_to_end, "medians": medians, "workers": workers, "ray": ray_overhead,
        "growth": growth,
    }  # fmt: skip
    left_out = {"workers", "ray", "growth"} if arguments.quick else set()
    chosen = arguments.only or [name for name in PARTS if name not in left_out]
    with tempfile.TemporaryDirectory(prefix="genescale-bench-") as folder:
        bench = Bench(space, CellSource(space), Path(folder), arguments.quick)
        quiet_environment()  # as every command does
        rows = [measured("Gene columns of the input", space.n_genes, "genes", note=space.origin)]
        for name in chosen:
            print(f"… {name}", file=sys.stderr, flush=True)
            rows += parts[name](bench)
    name = "ingest" if not arguments.only else f"ingest-{'-'.join(arguments.only)}"
    return finish(name, rows, PACKAGES, quick=arguments.quick, output=arguments.output)


def quiet_datasets() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import datasets

    datasets.disable_progress_bars()


# --- the kernel ------------------------------------------------------------------------------------------------------


def kernel(bench: Bench) -> Iterator[Row]:
    """Ranking alone, in memory: the compiled kernel with all its checks against the exact NumPy loop."""
    # As many cells as the product reads at once.
    few, rounds = 2_000, 10
    rows = bench.source.rows(0, few)
    genes = map_genes(drawn_atlas(bench.source, 1), bench.space.vocabulary, rules=GENE_RULES)
    baseline = PublishedTokenizer(bench.space.vocabulary)
    atlas = anndata_of(rows, bench.space, few)
    rank_rows(bench.source.rows(0, 10), genes, bench.space.vocabulary)
    spent = in_turn(
        {
            "ours": lambda: [rank_rows(rows, genes, bench.space.vocabulary) for _ in range(rounds)],
            "loop": lambda: list(baseline.rank_chunks(atlas)),
        },
        repeats=9,
    )
    ours, loop = rounds * few / spent["ours"].cpu_s, few / spent["loop"].cpu_s
    note = f"{np.diff(rows.indptr_n).mean():,.0f} stored values per cell; ours proves and hashes them too"
    yield times_faster("Kernel against the exact NumPy loop", ours, loop, "cells/CPU-s", 15, note=note)
    found = rank_rows(rows, genes, bench.space.vocabulary)
    tokens = [found.tokens_t[a:b] for a, b in zip(found.offsets_n[:-1], found.offsets_n[1:], strict=True)]
    loop_tokens = list(baseline.rank_chunks(atlas))
    capacity = bench.space.vocabulary.window - 2
    differing = sum(
        not np.array_equal(mine[1:-1], theirs[:capacity]) for mine, theirs in zip(tokens, loop_tokens, strict=False)
    )
    yield at_most("Cells whose tokens differ from the exact NumPy loop", differing, f"of {few:,} cells", 0)


def anndata_of(rows: Rows, space: GeneSpace, few: int) -> Any:
    import anndata
    import pandas

    counts = sparse.csr_matrix(
        (rows.values_z, rows.indices_z, rows.indptr_n), shape=(rows.indptr_n.size - 1, space.n_genes)
    )
    names = pandas.DataFrame(index=[f"cell{i}" for i in range(few)])
    return with_sizes(anndata.AnnData(counts[:few], obs=names, var=pandas.DataFrame(index=list(space.gene_ids))))


# --- end to end ------------------------------------------------------------------------------------------------------


def end_to_end(bench: Bench) -> Iterator[Row]:
    """From an h5ad file on disk to a part on disk, and the baseline from the same file to a saved table."""
    rows = bench.source.rows(0, bench.cells)
    baseline = PublishedTokenizer(bench.space.vocabulary)
    few = bench.source.rows(0, min(bench.cells, 2_000))
    # Twice: the first call compiles, the second still meets cold caches.
    warm = write_h5ad(bench.space, bench.source.rows(0, 100), bench.folder / "warm.h5ad", compression="gzip")
    for _ in range(2):
        ingest_file(warm, bench)
    baseline.run(warm, bench.folder / "warm")
    # What both have imported by now is not searched for garbage again in the middle of either.
    gc.collect()
    gc.freeze()
    for kind, compression, bar in (("gzip", "gzip", 10), ("uncompressed", None, 13)):
        path = write_h5ad(bench.space, rows, bench.folder / f"{kind}.h5ad", compression=compression)
        short = write_h5ad(bench.space, few, bench.folder / f"{kind}-short.h5ad", compression=compression)
        answers: list[Tally] = []
        spent = in_turn(
            {
                "ours": lambda path=path, into=answers: into.append(ingest_file(path, bench)[0]),
                "baseline": lambda path=short, kind=kind: baseline.run(path, bench.folder / f"hf-{kind}"),
            },
            repeats=5,
        )
        ours = bench.cells / spent["ours"].cpu_s
        theirs = (len(few.indptr_n) - 1) / spent["baseline"].cpu_s
        note = f"{path.stat().st_size / bench.cells:,.0f} bytes per cell on disk"
        yield times_faster(f"End to end, {kind} h5ad", ours, theirs, "cells/CPU-s", bar, note=note)
        total = 0.0
        for step in STEPS:
            share = statistics.median(tally.seconds.get(step, 0.0) for tally in answers) / bench.cells * 1e6
            total += share
            yield measured(f"  of which {step}, {kind}", share, "µs/cell")
        yield measured(f"  of which opening and mapping genes, {kind}", 1e6 / ours - total, "µs/cell")
    tally, size = ingest_file(path, bench)
    ratio = size / tally.kept / (tally.tokens / tally.kept)
    yield at_most("Bytes per cell, by mean length", ratio, "bytes/token", 2.0, note=f"{size / tally.kept:,.0f} B/cell")


def ingest_file(path: Path, bench: Bench, *, folder: str = "corpus") -> tuple[Tally, int]:
    """All units of a file, one after the other, as a worker does them; the tally and the bytes written."""
    store, tally, size = Store(StorageSettings()), Tally(), 0
    with open_atlas(str(path), store) as atlas:
        genes = map_genes(atlas, bench.space.vocabulary, rules=GENE_RULES)
        for unit in units_of(atlas):
            answer = part_of(unit, atlas, genes, bench, folder)
            tally.add(Tally(**answer["tally"]))
            size += answer["part"]["size_bytes"]
    return tally, size


def units_of(atlas: Any) -> list[Unit]:
    pinned = {"uri": atlas.uri, "etag": atlas.entry.etag, "slot": atlas.slot}
    ranges = cut(atlas.matrix.stored_before, ReadConfig().unit_nonzeros, MAX_UNIT_CELLS)
    return [Unit(**pinned, start=start, stop=stop) for start, stop in ranges]


def part_of(unit: Unit, atlas: Any, genes: GeneMap, bench: Bench, folder: str) -> dict[str, Any]:
    answer, _ = write_part(
        unit, atlas, genes, vocabulary=bench.space.vocabulary, cell_rules=RULES, obs_mapping={}, allow_fractional=False,
        bad_values="refuse", corpus_uri=str(bench.folder / folder), dataset_id="benchmark",
        store=Store(StorageSettings()),
    )  # fmt: skip
    return answer


# --- medians ---------------------------------------------------------------------------------------------------------


def medians(bench: Bench) -> Iterator[Row]:
    """Counting normalised values in histograms, from stored values in memory to the mergeable result."""
    rows = bench.source.rows(0, bench.cells)
    genes = map_genes(drawn_atlas(bench.source, 1), bench.space.vocabulary, rules=GENE_RULES)
    rounds, counted = (4 if bench.quick else 1), 0

    def count(rounds: int = rounds) -> None:
        nonlocal counted
        counter = Counter(genes, bench.space.vocabulary)
        for _ in range(rounds):
            sums = counter.sums(rows)
            counter.add(rows, sums, np.ones(bench.cells, dtype=np.bool_))
        counted = int(counter.histogram().counts_k.sum())

    count()
    spent = in_turn({"count": count})["count"]
    rate = counted / spent.cpu_s / 1e6
    # A unit of the product holds 128 million values; the fixed cost of a histogram weighs more on a shorter run.
    yield at_least("Values counted for medians", rate, "M/CPU-s", 25, note=f"{counted:,} values, checks included")
    histogram = Counter(genes, bench.space.vocabulary)
    histogram.add(rows, histogram.sums(rows), np.ones(bench.cells, dtype=np.bool_))
    one = histogram.histogram()
    spent = in_turn({"merge": lambda: one + one})["merge"]
    yield measured("Adding two histograms", spent.cpu_s * 1e3, "ms", note=f"{one.keys_k.size:,} occupied bins each")


# --- several workers -------------------------------------------------------------------------------------------------


def workers(bench: Bench) -> Iterator[Row]:
    """The units of one large file by one worker process, then by two at once."""
    n_cells = 20_000 if bench.quick else 200_000
    path = write_large_h5ad(bench.source, n_cells, bench.folder / "large.h5ad")
    walls: dict[int, list[float]] = {1: [], 2: []}
    processors: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(3):
        for n_workers in walls:
            wall_s, cpu_s = run_workers(path, bench, n_workers)
            walls[n_workers].append(wall_s)
            processors[n_workers].append(cpu_s)
    # The best wall of each: whatever else runs on the machine can only make one longer.
    one, two = (n_cells / min(walls[n]) for n in (1, 2))
    more = statistics.median(processors[2]) / statistics.median(processors[1])
    spread = "; ".join(f"{n}: {min(walls[n]):.1f} to {max(walls[n]):.1f} s" for n in (1, 2))
    note = f"{n_cells:,} cells, best of three walls ({spread}); {more:.2f} × the processor time"
    yield times_faster("Two workers against one", two, one, "cells/s (wall)", 1.8, note=note)
    path.unlink()


def run_workers(path: Path, bench: Bench, n_workers: int) -> tuple[float, float]:
    """Seconds from the start signal to the last part, and processor seconds of all workers."""
    context = multiprocessing.get_context("spawn")
    ready, go, answers = context.Semaphore(0), context.Event(), context.Queue()
    processes = [
        context.Process(target=worker, args=(str(path), str(bench.folder), n_workers, number, ready, go, answers))
        for number in range(n_workers)
    ]
    for process in processes:
        process.start()
    for _ in processes:
        ready.acquire()
    began = time.perf_counter()
    go.set()
    seconds = [answers.get() for _ in processes]
    wall_s = time.perf_counter() - began
    for process in processes:
        process.join()
    return wall_s, sum(seconds)


def worker(path: str, folder: str, n_workers: int, number: int, ready: Any, go: Any, answers: Any) -> None:
    """Every n-th unit of the file; compiled code is loaded before the start signal."""
    space = gene_space()
    bench = Bench(space, CellSource(space), Path(folder), quick=False)
    genes = map_genes(drawn_atlas(bench.source, 1), space.vocabulary, rules=GENE_RULES)
    rank_rows(bench.source.rows(0, 10), genes, space.vocabulary)
    with open_atlas(path, Store(StorageSettings())) as atlas:
        genes, units = map_genes(atlas, space.vocabulary, rules=GENE_RULES), units_of(atlas)
        ready.release()
        go.wait()
        began = time.process_time()
        for unit in units[number::n_workers]:
            part_of(unit, atlas, genes, bench, f"corpus-{n_workers}-{number}")
        answers.put(time.process_time() - began)


# --- Ray -------------------------------------------------------------------------------------------------------------


def ray_overhead(bench: Bench) -> Iterator[Row]:
    """Time between tasks on one processor, as a share of the time inside them: units of the size the product uses."""
    from genescale.ingestion.fan_out import fan_out
    from genescale.platform.cluster import ray_cluster

    n_cells = 20_000 if bench.quick else 120_000
    path = write_large_h5ad(bench.source, n_cells, bench.folder / "ray.h5ad")
    with open_atlas(str(path), Store(StorageSettings())) as atlas:
        items = [{"unit": dataclasses.asdict(unit), "folder": str(bench.folder)} for unit in units_of(atlas)]
    cluster = ClusterSettings(num_cpus=1, num_gpus=0, temp_dir=str(bench.folder / "ray"))
    shares = []
    with ray_cluster(Settings(cluster=cluster)):
        for _ in range(3):
            answers = sorted((answer for answer, _ in fan_out(items, ray_unit)), key=lambda answer: answer["began"])
            # The first two tasks pay for imports and compiled code, once per worker.
            gaps = [b["began"] - a["ended"] for a, b in itertools.pairwise(answers[2:])]
            inside = [a["ended"] - a["began"] for a in answers[2:]]
            shares.append(statistics.median(gaps) / statistics.median(inside))
    note = f"{len(items)} units, {statistics.median(inside):.2f} s inside a task, median gap of the tasks"
    yield at_most("Ray's own time per unit", statistics.median(shares) * 100, "% of the unit", 5, note=note)
    path.unlink()


_in_task: dict[str, Any] = {}


def ray_unit(item: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    began, unit = time.time(), Unit(**item["unit"])
    if not _in_task:
        space = gene_space()
        _in_task["bench"] = Bench(space, CellSource(space), Path(item["folder"]), quick=False)
        # The context is kept with what it yields: its end would close the file.
        _in_task["open"] = open_atlas(unit.uri, Store(StorageSettings()))
        _in_task["atlas"] = _in_task["open"].__enter__()
        _in_task["genes"] = map_genes(_in_task["atlas"], space.vocabulary, rules=GENE_RULES)
    part_of(unit, _in_task["atlas"], _in_task["genes"], _in_task["bench"], "corpus-ray")
    return {"began": began, "ended": time.time()}, b""


# --- growth ----------------------------------------------------------------------------------------------------------


def growth(bench: Bench) -> Iterator[Row]:
    """The same work on more and more cells, each size in a process of its own, cells drawn as they are read."""
    sizes = (2_000, 20_000) if bench.quick else GROWTH
    found = []
    for n_cells in sizes:
        command = [sys.executable, __file__, "--growth-of", str(n_cells)]
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=3_600)
        found.append(json.loads(run.stdout.splitlines()[-1]))
        facts = found[-1]
        note = f"drawing the cells took {facts['drawing_s']:.1f} s more; {facts['parts']} parts"
        yield measured(
            f"{n_cells:,} cells: processor time per million", facts["cpu_s"] / n_cells * 1e6, "CPU-s", note=note
        )
        yield measured(f"{n_cells:,} cells: peak memory", facts["rss"] / 2**20, "MiB")
        yield measured(f"{n_cells:,} cells: written per million", facts["bytes"] / n_cells * 1e6 / 1e9, "GB")
    rates = [facts["cpu_s"] / facts["cells"] for facts in found]
    yield at_most("Processor time per cell, largest by smallest size", rates[-1] / rates[0], "×", 1.25)
    yield at_most("Peak memory, largest size by the one before", found[-1]["rss"] / found[-2]["rss"], "×", 1.25)


def growth_of(n_cells: int) -> dict[str, Any]:
    """Ingest drawn cells unit by unit as one worker; parts are deleted as soon as they are written."""
    space = gene_space()
    source = CellSource(space)
    with tempfile.TemporaryDirectory(prefix="genescale-growth-") as folder:
        bench = Bench(space, source, Path(folder), quick=False)
        genes = map_genes(drawn_atlas(source, 1), space.vocabulary, rules=GENE_RULES)
        part_of(units_of(drawn_atlas(source, 64))[0], drawn_atlas(source, 64), genes, bench, "warm")
        atlas, written, parts = drawn_atlas(source, n_cells), 0, 0
        with spending() as spent:
            for unit in units_of(atlas):
                answer = part_of(unit, atlas, genes, bench, "corpus")
                written += answer["part"]["size_bytes"]
                parts += 1
                (bench.folder / "corpus" / answer["part"]["path"]).unlink()
    drawing_s = atlas.matrix.drawing_s
    return {
        "cells": n_cells, "cpu_s": spent.cpu_s - drawing_s, "drawing_s": drawing_s, "bytes": written, "parts": parts,
        "rss": peak_rss_bytes(),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
