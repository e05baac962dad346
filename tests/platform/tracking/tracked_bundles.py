"""A small bundle, and what the tests of tracking do with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from genescale.platform.bundle import Bundle, write_bundle
from genescale.platform.tracking import (
    ModelVersion,
    Tracker,
)
from genescale.platform.vocabulary import Vocabulary

FOLDER = "bundle"


def make_bundle(folder: Path, vocabulary: Vocabulary, *, value: float) -> Bundle:
    return write_bundle(
        folder,
        kind="masked_gene_model",
        config={"vocab_size": vocabulary.size},
        weights={"w": np.full(3, value, dtype=np.float32)},
        vocabulary=vocabulary,
        lineage={"corpus_version": 3},
        extra={"deep/head.json": b"{}"},
    )


def registered(tracker: Tracker, bundle: Bundle, model: str, **options: Any) -> ModelVersion:
    with tracker.run("train") as run:
        run.log_folder(bundle.folder, FOLDER)
        return tracker.register(run, FOLDER, model, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
