"""Where a cell stands in a shuffled corpus: a keyed hash of its dataset and source row, and nothing else.

The order does not depend on files, workers or the sequence in which datasets were ingested. Hashes are uniform on 64
bits; a bucket is a range of them, so that all cells in order of hash are the buckets one after the other.

Axis suffix: `n` cells.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

_HALF = np.uint64(32)


def place_hashes(seed: int, dataset_id: str, source_rows_n: npt.ArrayLike) -> npt.NDArray[np.uint64]:
    """(n) uint64 hash of each cell; two cells of one dataset never share one.

    The mixing function is SplitMix64 (Steele, Lea and Flood 2014), a bijection of 64-bit numbers.
    """
    text = f"{seed}\n{dataset_id}".encode()
    key = np.uint64(int.from_bytes(hashlib.blake2b(text, digest_size=8, person=b"shuffle").digest(), "little"))
    return _mix(_mix(np.asarray(source_rows_n).astype(np.uint64)) ^ key)


def buckets(hashes_n: npt.NDArray[np.uint64], n_buckets: int) -> npt.NDArray[np.int64]:
    """(n) bucket of each hash: `n_buckets` equal ranges; rises with the hash."""
    return ((hashes_n >> _HALF) * np.uint64(n_buckets) >> _HALF).astype(np.int64)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
