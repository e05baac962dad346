"""Groups and arrays as anndata stores them, the same for HDF5 and zarr: names, attributes, slices, and nothing else.

Everything that is read from an atlas goes through these two classes, so each kind of store checks links, sizes and
damage in one place, and readers above them are written once.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from genescale.platform.errors import AtlasError

# What is read whole (pointers, categories, names) comes in pieces of this size, so that damage is met before memory is.
PIECE_BYTES = 16 * 1024 * 1024


class Ranges(Protocol):
    """Reads ranges of a long one-dimensional array, keeping no more than the last chunk between two reads."""

    seconds: dict[str, float]
    """Processor seconds spent so far, under `read` and `inflate`."""

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Values start … stop-1 in the machine's byte order; AtlasError when they cannot be read."""


class Array(abc.ABC):
    """One array: `shape`, `dtype` and `band`, the rows of one chunk; `where` names file and path for messages."""

    where: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    band: int

    @property
    @abc.abstractmethod
    def attrs(self) -> Mapping[str, Any]:
        """Attributes, read one by one; values are plain Python or NumPy values."""

    @abc.abstractmethod
    def numbers(self, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """Rows start … stop-1 in the machine's byte order; AtlasError unless they are plain numbers."""

    def rows(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows of a matrix of numbers; AtlasError when nothing of some of them was ever written."""
        return self.numbers(start, stop)

    @abc.abstractmethod
    def texts(self, start: int = 0, stop: int | None = None) -> list[str]:
        """A range of a one-dimensional array of texts; AtlasError unless it is one."""

    @abc.abstractmethod
    def field(self, name: str) -> Array:
        """One column of an array of records (compound type)."""

    @abc.abstractmethod
    def scalar(self) -> Any:
        """The value of an array without dimensions."""

    @abc.abstractmethod
    def check_written(self) -> None:
        """AtlasError when parts of the array were never written, unless that is seen when they are read."""

    @abc.abstractmethod
    def ranges(self) -> Ranges:
        """A fast reader of row ranges of this one-dimensional array of numbers."""

    @property
    def is_text(self) -> bool:
        """True for texts of fixed or free length."""
        return self.dtype.kind in "SUOT"

    @property
    def is_number(self) -> bool:
        """True for whole numbers, floating-point numbers and true/false."""
        return self.dtype.kind in "iufb"

    def __len__(self) -> int:
        return self.shape[0] if self.shape else 0


class Group(abc.ABC):
    """A named collection of arrays and groups; `where` names file and path for messages."""

    where: str

    @property
    @abc.abstractmethod
    def attrs(self) -> Mapping[str, Any]:
        """Attributes, read one by one."""

    @abc.abstractmethod
    def names(self) -> list[str]:
        """Names of the members."""

    @abc.abstractmethod
    def get(self, path: str) -> Array | Group | None:
        """The member at a relative path such as `raw/X`, or None; AtlasError for links that may lead elsewhere."""

    def array(self, path: str) -> Array:
        """The array at a path; AtlasError when there is none."""
        item = self.get(path)
        if not isinstance(item, Array):
            raise AtlasError(f"there is no array '{path}'.", where=self.where, fix="Write the file again.")
        return item


Node = Array | Group


def as_text(value: Any) -> str:
    """An attribute or a single value as text."""
    if isinstance(value, np.ndarray) and value.shape in ((), (1,)):
        value = value.reshape(-1)[0]
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)


@dataclasses.dataclass(frozen=True)
class Encoding:
    """The name and version that anndata wrote beside a value; both empty before version 0.7."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name or 'unnamed'} {self.version}".strip()


def encoding(node: Node) -> Encoding:
    """The encoding that is written at a node."""
    return Encoding(as_text(node.attrs.get("encoding-type", "")), as_text(node.attrs.get("encoding-version", "")))


def check_encoding(node: Node, known: Mapping[str, Sequence[str]]) -> str:
    """The encoding's name; AtlasError that names encoding and version unless it is one of `known` (name -> versions).

    Files written before encodings were named pass, with an empty name.
    """
    found = encoding(node)
    if not found.name or found.version in known.get(found.name, ()):
        return found.name
    latest = {name: max(versions) for name, versions in known.items()}
    reads = (
        f"{found.name} up to {latest[found.name]}"
        if found.name in latest
        else ", ".join(f"{name} {version}" for name, version in latest.items())
    )
    raise AtlasError(
        f"it uses encoding {found}; this release reads {reads}.",
        where=node.where,
        fix="Write the file again with anndata 0.12, or update Genescale.",
    )
