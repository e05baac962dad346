"""An index with a map whose places a test has chosen: laying one out would take longer than the rest of the test."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from genescale.platform.settings import Settings
from genescale.platform.storage import Store
from genescale.serving.neighbours.index_folder import MANIFEST, MAP, file_digests, publish
from genescale.serving.neighbours.layout import write_places
from genescale.serving.neighbours.reference import Reference


def with_map(index: Path, places_n2: np.ndarray, store: Store, scratch: Path) -> Path:
    """A copy of the index at `index`, below `scratch`, with these places."""
    parts, out = scratch / "parts", scratch / "index"
    shutil.copytree(index, parts)
    (parts / MANIFEST).unlink()
    write_places(parts / MAP, places_n2)
    manifest = Reference.open(str(index), Settings(), scratch).manifest
    publish(parts, replace(manifest, files=file_digests(parts)), str(out), store)
    return out
