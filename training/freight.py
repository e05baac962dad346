"""A bundle on its way to Ray workers, which may not see the driver's disk.

The files travel through Ray's object store, one copy for each node, and are verified by digest where they arrive.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import ray

from genescale.platform.bundle import Bundle, open_bundle


def ship(bundle: Bundle) -> Any:
    """Put the files of `bundle` into the object store; gives the reference that `Received` takes."""
    folder = Path(bundle.folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return ray.put({path.relative_to(folder).as_posix(): path.read_bytes() for path in files})


class Received:
    """A shipped bundle on this worker: a temporary folder that lives as long as this object."""

    def __init__(self, shipped: Any) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="genescale-bundle-")
        for name, data in ray.get(shipped).items():
            path = Path(self._folder.name) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        self.bundle: Bundle = open_bundle(Path(self._folder.name))
