"""Bounded memory: a worker's peak does not depend on the size of the file."""

from __future__ import annotations

import os
import threading
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest

from genescale.ingestion.pipeline import IngestConfig, ingest
from genescale.platform.storage import Store
from genescale.platform.vocabulary import Vocabulary

N_GENES, GENES_PER_CELL, CELLS_PER_CHUNK = 8_000, 3_000, 10
MEGABYTE = 1024 * 1024
# What a worker may take in all: the libraries it has loaded, one block of rows in all its forms, and one part.
BUDGET_MB = 768
# What it may take more for a large file than for one of a few units.
GROWTH_MB = 96
PATTERNS = 8


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    genes = [f"ENSG{i:011d}" for i in range(N_GENES)]
    return Vocabulary.build(genes, 1 + np.arange(N_GENES) / 7, window=2_048, name="wide")


def write_large(path: Path, n_chunks: int, vocabulary: Vocabulary) -> None:
    """A gzip CSR h5ad made of a few patterns of ten cells, repeated."""
    rng = np.random.default_rng(3)
    n_cells, n_values = n_chunks * CELLS_PER_CHUNK, n_chunks * CELLS_PER_CHUNK * GENES_PER_CELL
    patterns = []
    for _ in range(PATTERNS):
        indices = np.concatenate(
            [np.sort(rng.choice(N_GENES, GENES_PER_CELL, replace=False)) for _ in range(CELLS_PER_CHUNK)]
        )
        values = rng.geometric(0.4, indices.size).astype(np.float32)
        patterns.append((zlib.compress(values.tobytes(), 1), zlib.compress(indices.astype(np.int32).tobytes(), 1)))
    with h5py.File(path, "w") as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        matrix = file.create_group("X")
        matrix.attrs.update(
            {"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": np.array([n_cells, N_GENES])}
        )
        chunk = CELLS_PER_CHUNK * GENES_PER_CELL
        kinds = {"data": np.float32, "indices": np.int32}
        stored = [
            matrix.create_dataset(name, (n_values,), dtype=kind, chunks=(chunk,), compression="gzip")
            for name, kind in kinds.items()
        ]
        for number in range(n_chunks):
            for dataset, packed in zip(stored, patterns[number % PATTERNS], strict=True):
                dataset.id.write_direct_chunk((number * chunk,), packed)
        matrix.create_dataset("indptr", data=np.arange(n_cells + 1, dtype=np.int64) * GENES_PER_CELL)
        for name, texts in (("obs", [f"c{i}" for i in range(n_cells)]), ("var", list(vocabulary.gene_ids))):
            frame = file.create_group(name)
            frame.attrs.update({"encoding-type": "dataframe", "encoding-version": "0.2.0", "_index": "_index"})
            frame.attrs["column-order"] = np.array([], dtype="S1")
            frame.create_dataset("_index", data=texts, dtype=h5py.string_dtype()).attrs.update(
                {"encoding-type": "string-array", "encoding-version": "0.2.0"}
            )


class Workers:
    """Resident memory of the Ray workers below this process: now, and the highest since `watch` began."""

    def __init__(self) -> None:
        self.peak_mb: dict[int, float] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    @staticmethod
    def now() -> dict[int, dict[str, float]]:
        """VmRSS and VmHWM in MB by process."""
        parents: dict[int, int] = {}
        found: dict[int, dict[str, float]] = {}
        for folder in Path("/proc").iterdir():
            if not folder.name.isdecimal():
                continue
            try:
                title = (folder / "cmdline").read_bytes()
                fields = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
            except OSError:
                continue
            parents[int(folder.name)] = int(fields.get("PPid", 0))
            if title.startswith(b"ray::") and "VmHWM" in fields:
                found[int(folder.name)] = {key: int(fields[key].split()[0]) / 1024 for key in ("VmRSS", "VmHWM")}

        def ours(pid: int) -> bool:
            while pid > 1 and pid != os.getpid():
                pid = parents.get(pid, 0)
            return pid == os.getpid()

        return {pid: sizes for pid, sizes in found.items() if ours(pid)}

    def __enter__(self) -> Workers:
        for pid in self.now():
            (Path("/proc") / str(pid) / "clear_refs").write_text("5")  # the peak counts from here on
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._done.wait(0.1):
            self._look()

    def _look(self) -> None:
        for pid, sizes in self.now().items():
            self.peak_mb[pid] = max(self.peak_mb.get(pid, 0.0), sizes["VmHWM"])


def peak_mb(folder: Path, vocabulary: Vocabulary, store: Store, n_chunks: int) -> float:
    """Peak of the hungriest worker while a file of so many chunks is ingested."""
    path = folder / "large.h5ad"
    write_large(path, n_chunks, vocabulary)
    with Workers() as workers:
        report = ingest(
            [str(path)], str(folder / f"corpus{n_chunks}"), vocabulary=vocabulary, store=store,
            config=IngestConfig(duplicates="off"),
        )  # fmt: skip
    path.unlink()
    assert report.ok, report.sources[0].failure
    assert report.kept == n_chunks * CELLS_PER_CHUNK
    assert workers.peak_mb, "no worker was seen"
    return max(workers.peak_mb.values())


def size_mb(n_chunks: int) -> float:
    """Size of such a file's matrix when uncompressed."""
    return n_chunks * CELLS_PER_CHUNK * GENES_PER_CELL * 8 / MEGABYTE


def test_memory_does_not_grow_with_the_file(
    ray_local: None, tmp_path: Path, vocabulary: Vocabulary, local_store: Store
) -> None:
    few_units, many_units = 1_500, 9_000
    assert size_mb(many_units) > 20 * GROWTH_MB
    small = peak_mb(tmp_path, vocabulary, local_store, few_units)
    large = peak_mb(tmp_path, vocabulary, local_store, many_units)
    assert large <= BUDGET_MB, f"a worker took {large:.0f} MB"
    assert large - small <= GROWTH_MB, f"{small:.0f} MB for a small file, {large:.0f} MB for one six times as large"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_file_ten_times_the_budget(
    ray_local: None, tmp_path: Path, vocabulary: Vocabulary, local_store: Store
) -> None:
    n_chunks = 34_000
    assert size_mb(n_chunks) >= 10 * BUDGET_MB
    peak = peak_mb(tmp_path, vocabulary, local_store, n_chunks)
    assert peak <= BUDGET_MB, f"a worker took {peak:.0f} MB"
