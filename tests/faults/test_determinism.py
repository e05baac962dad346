"""The same parts, byte for byte, from 1, 2 and 4 workers, with other processor features, and in another order."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from genescale.ingestion.corpus import Corpus
from genescale.ingestion.pipeline import IngestConfig, ingest
from genescale.platform.storage import Store
from genescale.platform.vocabulary import Vocabulary

COMMAND = (sys.executable, "-c", "import sys; from genescale.platform.cli import main; sys.exit(main(sys.argv[1:]))")
UNIT_NONZEROS = 1_000
FEATURES = (
    "import json; from numpy._core import _multiarray_umath as m; "
    "print(json.dumps([name for name in m.__cpu_dispatch__ if m.__cpu_features__.get(name)]))"
)


def parts_of(uri: Path, store: Store) -> dict[str, str]:
    """Digest of every file of rows that the corpus names."""
    corpus = Corpus.open(str(uri), store)
    return {
        part.uri.removeprefix(f"{corpus.uri}/"): hashlib.sha256(store.read(part.uri)).hexdigest()
        for part in corpus.parts
    }


def by_command(sources: list[Path], uri: Path, vocabulary: Path, **environment: str) -> None:
    done = subprocess.run(
        [*COMMAND, "ingest", *map(str, sources), "--corpus", str(uri), "--vocabulary", str(vocabulary),
         "--unit-nonzeros", str(UNIT_NONZEROS), "--json"],
        capture_output=True, text=True, timeout=170, check=False, env={**os.environ, **environment}, cwd=uri.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3_000:]


def optional_features(**environment: str) -> list[str]:
    """Features of this processor that NumPy uses and could do without."""
    done = subprocess.run(
        [sys.executable, "-c", FEATURES], capture_output=True, text=True, check=True, env={**os.environ, **environment}
    )
    return list(json.loads(done.stdout))


@pytest.fixture
def atlases(tmp_path: Path, write_h5ad: Any, vocabulary: Vocabulary, local_store: Store) -> list[Path]:
    local_store.write(str(tmp_path / "vocabulary.parquet"), vocabulary.to_parquet_bytes())
    return [write_h5ad(tmp_path / f"{name}.h5ad", 90, seed) for seed, name in enumerate("abc")]


def reference(atlases: list[Path], tmp_path: Path, vocabulary: Vocabulary, store: Store) -> dict[str, str]:
    """Parts made by two workers of the session's Ray."""
    ingest(
        [str(path) for path in atlases], str(tmp_path / "two"), vocabulary=vocabulary, store=store,
        config=IngestConfig(unit_nonzeros=UNIT_NONZEROS),
    )  # fmt: skip
    found = parts_of(tmp_path / "two", store)
    assert len(found) > 6
    return found


def test_two_workers_and_any_order_of_files(
    ray_local: None, tmp_path: Path, atlases: list[Path], vocabulary: Vocabulary, local_store: Store
) -> None:
    expected = reference(atlases, tmp_path, vocabulary, local_store)
    config = IngestConfig(unit_nonzeros=UNIT_NONZEROS)
    shuffled = [str(atlases[i]) for i in (2, 0, 1)]
    ingest(shuffled, str(tmp_path / "order"), vocabulary=vocabulary, store=local_store, config=config)
    assert parts_of(tmp_path / "order", local_store) == expected
    for path in reversed(atlases):
        ingest([str(path)], str(tmp_path / "single"), vocabulary=vocabulary, store=local_store, config=config)
    assert parts_of(tmp_path / "single", local_store) == expected


@pytest.mark.slow
def test_one_worker_without_vector_instructions(
    ray_local: None, tmp_path: Path, atlases: list[Path], vocabulary: Vocabulary, local_store: Store
) -> None:
    """NumPy without AVX2 and AVX-512, Numba for a processor of 2003: the rules for ties hold everywhere."""
    features = optional_features()
    if not features:
        pytest.skip("NumPy uses no feature of this processor that it could do without")
    plain = {
        "NPY_DISABLE_CPU_FEATURES": " ".join(features), "NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": "",
        "NUMBA_CACHE_DIR": str(tmp_path / "numba"),
    }  # fmt: skip
    assert optional_features(**plain) == [], "NumPy still uses them"
    expected = reference(atlases, tmp_path, vocabulary, local_store)
    by_command(atlases, tmp_path / "one", tmp_path / "vocabulary.parquet", GENESCALE_CLUSTER__NUM_CPUS="1", **plain)
    assert parts_of(tmp_path / "one", local_store) == expected


@pytest.mark.slow
def test_four_workers(
    ray_local: None, tmp_path: Path, atlases: list[Path], vocabulary: Vocabulary, local_store: Store
) -> None:
    expected = reference(atlases, tmp_path, vocabulary, local_store)
    by_command(atlases, tmp_path / "four", tmp_path / "vocabulary.parquet", GENESCALE_CLUSTER__NUM_CPUS="4")
    assert parts_of(tmp_path / "four", local_store) == expected
