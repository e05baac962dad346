"""A cache of the encoder's vectors for the rows of a task: computed once, read by every head that is fitted on them.

Axis suffixes: `r` rows, `d` width.

An entry is two files: `vectors-KEY-DIGEST.safetensors`, and `vectors-KEY.json`, written last, which holds what decides
the vectors, and the name and sha256 of the first. KEY is a digest of what decides them, so another model, corpus
version, layer, pooling, precision or choice of rows has another entry; DIGEST is that of the vectors, so that two runs
that store the same entry at once do not mix their files. An entry that is not what its name says is refused.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from genescale.platform.errors import InputError, IntegrityError, NotFoundError
from genescale.platform.storage import Store, join

TENSOR = "vectors"
_REPAIR = "Delete the two files of this entry; the next run computes it again."


@dataclass(frozen=True, kw_only=True)
class VectorKey:
    """Everything that decides the vectors of some rows."""

    bundle_digest: str
    corpus_uri: str
    corpus_version: int
    layer: str
    pooling: str
    """Of cells; `token` for genes."""
    precision: str
    rows_digest: str
    """`Examples.rows_digest`: cells and token positions, in their order."""

    @property
    def name(self) -> str:
        """The entry's file name without its ending."""
        text = json.dumps(asdict(self), sort_keys=True)
        return f"vectors-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def read_vectors(uri: str, key: VectorKey, store: Store) -> np.ndarray | None:
    """Vectors (r, d) float32 of an entry, None when there is none.

    Raises InputError for an entry that was made of something else, IntegrityError for a damaged one.
    """
    address = join(uri, key.name)
    try:
        about = json.loads(store.read(f"{address}.json"))
    except NotFoundError:
        return None
    except ValueError as error:
        raise IntegrityError("the entry's description is not JSON.", where=f"{address}.json", fix=_REPAIR) from error
    _check_key(about.get("key"), key, f"{address}.json")
    try:
        data = store.read(join(uri, about.get("file", f"{key.name}.safetensors")))
        if hashlib.sha256(data).hexdigest() != about.get("sha256"):
            raise IntegrityError("the vectors are not those that were written.", where=address, fix=_REPAIR)
        vectors_rd = safetensors.numpy.load(data)[TENSOR]
    except (NotFoundError, SafetensorError, KeyError) as error:
        raise IntegrityError(f"the vectors cannot be read: {error}.", where=address, fix=_REPAIR) from error
    return vectors_rd


def write_vectors(uri: str, key: VectorKey, vectors_rd: np.ndarray, store: Store) -> None:
    """Keep vectors (r, d) float32 as the entry of `key`; an equal entry that is there already is replaced by itself."""
    data = safetensors.numpy.save({TENSOR: np.ascontiguousarray(vectors_rd, dtype=np.float32)})
    about = {"schema_version": 1, "key": asdict(key), "rows": len(vectors_rd), "width": int(vectors_rd.shape[1])}
    digest = hashlib.sha256(data).hexdigest()
    file = f"{key.name}-{digest[:16]}.safetensors"
    store.write(join(uri, file), data)
    about |= {"file": file, "sha256": digest}
    store.write(join(uri, f"{key.name}.json"), json.dumps(about, indent=2).encode())


def _check_key(found: Any, key: VectorKey, where: str) -> None:
    stored = found if isinstance(found, dict) else {}
    for name, wanted in asdict(key).items():
        if stored.get(name) != wanted:
            raise InputError(
                f"the cached vectors are of another {name.replace('_', ' ')}: {stored.get(name)}, not {wanted}.",
                where=where,
                fix=_REPAIR,
            )
