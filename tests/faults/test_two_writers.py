"""Two ingestions at once into one corpus: both succeed, or one says why; no cell twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from genescale.ingestion.corpus import Corpus
from genescale.platform.storage import Store
from genescale.platform.vocabulary import Vocabulary

COMMAND = (sys.executable, "-c", "import sys; from genescale.platform.cli import main; sys.exit(main(sys.argv[1:]))")


@pytest.fixture
def together(
    ray_local: None, tmp_path: Path, vocabulary: Vocabulary, local_store: Store
) -> Callable[..., list[tuple[int, Any]]]:
    """Run several `genescale ingest` at the same moment on one cluster: exit status and report of each."""
    import ray

    address = ray.get_runtime_context().gcs_address
    local_store.write(str(tmp_path / "vocabulary.parquet"), vocabulary.to_parquet_bytes())

    def run(corpus: str, *sources: list[Path]) -> list[tuple[int, Any]]:
        started = [
            subprocess.Popen(
                [*COMMAND, "ingest", *map(str, some), "--corpus", corpus, "--vocabulary",
                 str(tmp_path / "vocabulary.parquet"), "--unit-nonzeros", "600", "--json"],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
                env={**os.environ, "GENESCALE_CLUSTER__ADDRESS": address},
            )
            for some in sources
        ]  # fmt: skip
        answers = []
        for process in started:
            out, errors = process.communicate(timeout=120)
            assert process.returncode in (0, 1), errors
            answers.append((process.returncode, json.loads(out)))
        return answers

    return run


@pytest.mark.slow
def test_disjoint_sources_are_both_committed(
    tmp_path: Path, together: Any, write_h5ad: Any, local_store: Store, rows_of: Any
) -> None:
    # Three files each, so that each writer meets commits of the other, the creation of the corpus included.
    names = {name: 60 + 10 * seed for seed, name in enumerate("abcdef")}
    files = [write_h5ad(tmp_path / f"{name}.h5ad", n, seed) for seed, (name, n) in enumerate(names.items())]
    answers = together(str(tmp_path / "corpus"), files[:3], files[3:])
    assert [status for status, _ in answers] == [0, 0], answers
    corpus = Corpus.open(str(tmp_path / "corpus"), local_store)
    assert {name: len(rows) for name, rows in rows_of(corpus).items()} == names
    assert [record.operation for record in corpus.history()].count("ingest") == 6


def test_the_same_source_is_committed_once(
    tmp_path: Path, together: Any, write_h5ad: Any, local_store: Store, rows_of: Any
) -> None:
    files = [write_h5ad(tmp_path / f"{name}.h5ad", 80, seed) for seed, name in enumerate("ab")]
    uri = str(tmp_path / "corpus")
    answers = together(uri, files, files, files)
    corpus = Corpus.open(uri, local_store)
    assert {name: len(rows) for name, rows in rows_of(corpus).items()} == {"a": 80, "b": 80}
    assert [record.operation for record in corpus.history()].count("ingest") == 2
    for name in "ab":
        sources = [next(s for s in report["sources"] if s["dataset_id"] == name) for _, report in answers]
        assert [source["status"] for source in sources].count("ingested") == 1
        for source in sources:
            if source["status"] == "refused":
                assert source["failure"]["code"] == "corpus"
                assert f"{name}.h5ad is already in this corpus" in source["failure"]["message"]
    for status, report in answers:
        assert status == int(any(source["status"] == "refused" for source in report["sources"]))
