"""HDF5 groups and datasets as trees of `tree.py`: links, storage, sizes and filters are checked at every step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from genescale.ingestion.formats.direct_chunks import dataset_ranges, is_direct
from genescale.ingestion.formats.hdf5_safety import (
    MAX_RECORD_BYTES,
    check_chunks,
    check_size,
    check_written,
    followed,
    read_texts,
)
from genescale.ingestion.formats.tree import Array, Group, Node, Ranges
from genescale.platform.errors import AtlasError
from genescale.platform.storage import is_remote

MAX_ATTRIBUTE_BYTES = 16 * 1024 * 1024


class HdfGroup(Group):
    """A group of an HDF5 file."""

    def __init__(self, group: h5py.Group, uri: str) -> None:
        self._group, self._uri = group, uri
        self.where = f"{uri}: {group.name.strip('/')}" if group.name != "/" else uri

    @property
    def attrs(self) -> Mapping[str, Any]:
        """Attributes of the group."""
        return Attributes(self._group, self.where)

    def names(self) -> list[str]:
        """Names of the members."""
        return list(self._group)

    def get(self, path: str) -> Node | None:
        """The member at a relative path, or None."""
        item: Any = self._group
        for part in path.split("/"):
            item = followed(item, part, self._uri) if isinstance(item, h5py.Group) else None
            if item is None:
                return None
        if isinstance(item, h5py.Group):
            return HdfGroup(item, self._uri)
        return HdfArray(item, self._uri) if isinstance(item, h5py.Dataset) else None


class HdfArray(Array):
    """A dataset of an HDF5 file, or one field of a dataset of records."""

    def __init__(self, dataset: h5py.Dataset, uri: str, field: str = "") -> None:
        self._dataset, self._uri, self._field = dataset, uri, field
        self.where = f"{uri}: {dataset.name.strip('/')}" + (f"['{field}']" if field else "")
        # An empty dataspace, which anndata writes for None, has no shape.
        self.shape = tuple(dataset.shape or ()) if dataset.shape is not None else (0,)
        self.dtype = dataset.dtype[field] if field else dataset.dtype
        self.band = int(dataset.chunks[0]) if dataset.chunks else max(self.shape[0], 1) if self.shape else 1

    @property
    def attrs(self) -> Mapping[str, Any]:
        """Attributes of the dataset."""
        return Attributes(self._dataset, self.where)

    def numbers(self, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """Rows start … stop-1 in the machine's byte order."""
        if not self.shape or not self.is_number:
            raise AtlasError(f"it holds no plain numbers ({self.dtype}).", where=self.where, fix="Write it again.")
        self._check_size()
        values = self._source()[start:stop]
        return values.astype(values.dtype.newbyteorder("="), copy=False)

    def texts(self, start: int = 0, stop: int | None = None) -> list[str]:
        """A range of texts."""
        self._check_size()
        return read_texts(_Texts(self._source(), self.shape, self.dtype, self.where), self._uri, start, stop)

    def field(self, name: str) -> Array:
        """One column of a dataset of records."""
        if self.dtype.itemsize > MAX_RECORD_BYTES:
            raise AtlasError(
                f"its records have {self.dtype.itemsize:,} bytes each, more than {MAX_RECORD_BYTES:,}.",
                where=self.where,
                fix="Write the file again with a current anndata.",
            )
        return HdfArray(self._dataset, self._uri, name)

    def scalar(self) -> Any:
        """The value of a dataset without dimensions."""
        if self._dataset.shape != ():
            raise AtlasError("it is no single value.", where=self.where)
        check_size(self._dataset, self._uri)
        return self._dataset[()]

    def check_written(self) -> None:
        """AtlasError when chunks have no storage; from object storage, where possible, only when they are read.

        The index of a large dataset's chunks is strewn over the whole file, and walking it would fetch all of it.
        """
        if is_remote(self._uri) and is_direct(self._dataset, remote=True):
            check_chunks(self._dataset, self._uri)
        else:
            check_written(self._dataset, self._uri)

    def ranges(self) -> Ranges:
        """A fast reader of row ranges."""
        if len(self.shape) != 1 or not self.is_number:
            raise AtlasError(f"it holds no plain numbers ({self.dtype}).", where=self.where, fix="Write it again.")
        check_chunks(self._dataset, self._uri)
        return dataset_ranges(self._dataset, self.where, remote=is_remote(self._uri))

    def _source(self) -> Any:
        return self._dataset.fields(self._field) if self._field else self._dataset

    def _check_size(self) -> None:
        check_size(self._dataset, self._uri)


class _Texts:
    """What `read_texts` needs of a dataset or of one of its fields."""

    def __init__(self, source: Any, shape: tuple[int, ...], dtype: np.dtype[Any], name: str) -> None:
        self._source, self.shape, self.dtype, self.name = source, shape, dtype, name

    def __getitem__(self, rows: slice) -> Any:
        return self._source[rows]


class Attributes(Mapping[str, Any]):
    """Attributes of an object, refused when they are larger than any that anndata writes."""

    def __init__(self, item: h5py.HLObject, where: str) -> None:
        self._attrs, self._id, self._where = item.attrs, item.id, where

    def __getitem__(self, name: str) -> Any:
        if name not in self._attrs:
            raise KeyError(name)
        attribute = h5py.h5a.open(self._id, name.encode())
        if attribute.get_storage_size() > MAX_ATTRIBUTE_BYTES:
            raise AtlasError(
                f"its attribute '{name}' has {attribute.get_storage_size():,} bytes.",
                where=self._where,
                fix="Write the file again with anndata.",
            )
        return self._attrs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._attrs)

    def __len__(self) -> int:
        return len(self._attrs)
