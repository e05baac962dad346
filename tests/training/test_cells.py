"""Where cells come from: the columns of a corpus, reading ahead, and storage that is away for a while."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from genescale.ingestion.corpus import Corpus
from genescale.platform.errors import StorageError
from genescale.platform.patience import Patience
from genescale.platform.storage import Store
from genescale.training import batches
from genescale.training.batches import BatchPlan, step_batches
from genescale.training.cells import CorpusCells, MemoryCells, training_corpus
from genescale.training.masking import Masking

QUICK = Patience(total_s=5, first_pause_s=0.01, longest_pause_s=0.02)


def test_columns_are_those_of_the_corpus(tiny_corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genescale.training.cells.PARTS_AT_ONCE", 3)
    cells = CorpusCells(tiny_corpus)
    table = tiny_corpus.cells(["length", "donor_id", "dataset_id", "source_row"])
    assert cells.lengths.tolist() == table["length"].to_pylist()
    names = table["donor_id"].to_pylist()
    # The same number for the same donor, also across parts.
    assert len(set(zip(names, cells.donors.tolist(), strict=True))) == len(set(names)) == 8
    assert cells.origin([0, 359]) == [
        (table["dataset_id"][i].as_py(), table["source_row"][i].as_py()) for i in (0, 359)
    ]
    tokens = cells.tokens(np.array([300, 5]))
    assert [len(cell) for cell in tokens] == cells.lengths[[300, 5]].tolist()


class FlakyCorpus:
    """A corpus whose storage does not answer the first times."""

    def __init__(self, corpus: Corpus, failures: int) -> None:
        self._corpus, self.failures = corpus, failures

    def __getattr__(self, name: str) -> Any:
        return getattr(self._corpus, name)

    def tokens(self, indices: Any) -> Any:
        if self.failures:
            self.failures -= 1
            raise StorageError("the bucket does not answer.")
        return self._corpus.tokens(indices)


def test_storage_that_is_away_is_waited_for(tiny_corpus: Corpus) -> None:
    flaky: Any = FlakyCorpus(tiny_corpus, 3)
    found = CorpusCells(flaky, patience=QUICK).tokens([7, 3])
    for cell, expected in zip(found, tiny_corpus.tokens([7, 3]), strict=True):
        assert np.array_equal(cell, expected)
    gone: Any = FlakyCorpus(tiny_corpus, 10**6)
    with pytest.raises(StorageError, match="does not answer"):
        CorpusCells(gone, patience=Patience(total_s=0.05, first_pause_s=0.01, longest_pause_s=0.01)).tokens([7])
    # Reading ahead says nothing: whoever needs the cells does.
    CorpusCells(gone, patience=QUICK).warm(np.array([1, 2]))


class RecordingCells(MemoryCells):
    """Remembers which cells it was told of before they were asked for."""

    def __init__(self, cells: Any, vocabulary: Any) -> None:
        super().__init__(cells, vocabulary)
        self.warmed: list[set[int]] = []
        self.asked = 0

    def warm(self, indices: Any) -> None:
        self.warmed.append({int(i) for i in indices})

    def tokens(self, indices: Any) -> Any:
        self.asked += len(indices)
        return super().tokens(indices)


def test_the_next_group_is_read_while_the_present_one_is_trained_on(
    tiny_corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "BLOCK_CELLS", 16)
    monkeypatch.setattr(batches, "BLOCKS", 4)
    source = RecordingCells(tiny_corpus.tokens(range(200)), tiny_corpus.vocabulary)
    plan = BatchPlan(lengths=source.lengths, cells=np.arange(200), seed=0, token_budget=128, lanes=2)
    masking = Masking(vocabulary=source.vocabulary, seed=0)
    order = plan.epoch(0).order
    groups = [set(order[start : start + 64].tolist()) for start in range(0, 200, 64)]
    reached, before = [], 0
    for _ in step_batches(source, plan, masking, rank=0, workers=1, first=0, last=plan.epoch(0).n_steps):
        if before // 64 not in reached:
            reached.append(before // 64)
            # Until it is over, and not only done with its cells: while one reads, no other is started.
            for reading in [thread for thread in threading.enumerate() if thread.name == "read-ahead"]:
                reading.join(timeout=10)
        before = source.asked
    following = [*groups[1:], set(plan.epoch(1).order[:64].tolist())]
    assert len(reached) >= 3
    assert source.warmed == [following[group] for group in reached]


def test_a_corpus_of_one_group_is_not_read_ahead(tiny_corpus: Corpus) -> None:
    source = RecordingCells(tiny_corpus.tokens(range(60)), tiny_corpus.vocabulary)
    plan = BatchPlan(lengths=source.lengths, cells=np.arange(60), seed=0, token_budget=128, lanes=2)
    masking = Masking(vocabulary=source.vocabulary, seed=0)
    assert list(step_batches(source, plan, masking, rank=0, workers=1, first=0, last=5))
    assert source.warmed == []


def test_a_corpus_to_train_on_is_pinned(tiny_corpus: Corpus, local_store: Store) -> None:
    found = training_corpus(f"{tiny_corpus.uri}@1", local_store, group_cells=10**6)
    assert (found.version, found.n_cells) == (1, 180)


PLAN = """
import resource, sys, time
import numpy as np
from genescale.training.batches import BatchPlan
from genescale.training.cells import hold_out

n = int(sys.argv[1])
draws = np.random.default_rng(0)
lengths = draws.integers(300, 2049, size=n, dtype=np.int32)
donors = (np.arange(n) // 5_000).astype(np.int32)
began = time.process_time()
split = hold_out(n, 4_096, seed=0, donors=donors)
plan = BatchPlan(lengths=lengths, cells=split.trained, seed=0, token_budget=24_576, lanes=12)
steps = plan.n_steps(3)
assert split.by_donor and steps > 0
print(time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
def test_the_plan_of_five_million_cells_is_small_and_quick(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PLAN, "5000000"], capture_output=True, text=True, check=True, timeout=150
    )
    seconds, peak_bytes = (float(text) for text in done.stdout.split())
    # A sixth of what 30 million cells may take (60 s, 2 GiB), with the imports of a process on top.
    assert seconds < 15
    assert peak_bytes < 2 * 1024**3 / 6 + 400 * 1024**2
