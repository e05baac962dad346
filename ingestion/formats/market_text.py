"""Matrix Market text, plain or gzip, read in blocks: header, and triplets of row, column and value.

Axis suffix: `z` entries. The format: https://math.nist.gov/MatrixMarket/formats.html
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
from isal import igzip, isal_zlib

from genescale.ingestion.formats.signatures import GZIP, MATRIX_MARKET
from genescale.platform.errors import AtlasError
from genescale.platform.storage import Entry, Store

BLOCK_BYTES = 8 * 1024 * 1024
# Longest line that a header may have: Cell Ranger writes its metadata into one.
LONGEST_COMMENT = 1024 * 1024
LONGEST_ENTRY = 1024
MOST_COMMENTS = 10_000
# gzip cannot compress better than about 1 : 1,030.
GZIP_EXPANSION = 1_032
DTYPES = {"integer": np.int64, "unsigned-integer": np.int64, "real": np.float64, "double": np.float64, "pattern": bool}
# The types of the library do not know that its error is an exception.
DAMAGE: tuple[type[Exception], ...] = (igzip.BadGzipFile, isal_zlib.error)  # type: ignore[assignment]
_DAMAGED = "Download it again."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    """What a file says of itself: rows, columns and entries, and the kind of number its values are."""

    n_rows: int
    n_columns: int
    n_entries: int
    dtype: np.dtype[Any]


@contextlib.contextmanager
def inflated(uri: str, store: Store) -> Iterator[io.BufferedReader]:
    """The text of a file, decompressed when it begins like gzip; AtlasError when the compression is damaged."""
    with store.open(uri) as raw:
        compressed = raw.read(2) == GZIP
        raw.seek(0)
        text: Any = igzip.IGzipFile(fileobj=raw) if compressed else raw
        try:
            yield io.BufferedReader(text, BLOCK_BYTES)
        except EOFError as error:
            raise AtlasError("the gzip file is cut off.", where=uri, fix=_DAMAGED) from error
        except DAMAGE as error:
            raise AtlasError(f"the gzip content is damaged ({error}).", where=uri, fix=_DAMAGED) from error


def read_header(text: IO[bytes], matrix: Entry) -> Header:
    """Read banner, comments and sizes; AtlasError for other kinds of matrix and for sizes that cannot be true."""
    uri = matrix.uri
    dtype = _banner(text.readline(LONGEST_ENTRY), uri)
    line = text.readline(LONGEST_COMMENT)
    for _ in range(MOST_COMMENTS):
        if (not line.startswith(b"%") and line.strip()) or not line:
            break
        line = text.readline(LONGEST_COMMENT)
    sizes = line.split()
    if len(sizes) != 3 or not all(size.isdigit() and len(size) < 19 for size in sizes):
        raise AtlasError(
            f"the line of sizes reads {_shown(line)}; three whole numbers belong there.", where=uri, fix=_DAMAGED
        )
    n_rows, n_columns, n_entries = (int(size) for size in sizes)
    if not (n_rows and n_columns):
        raise AtlasError(f"the matrix is empty ({n_rows:,} × {n_columns:,}).", where=uri)
    return Header(n_rows=n_rows, n_columns=n_columns, n_entries=n_entries, dtype=np.dtype(dtype))


def check_declared(header: Header, matrix: Entry, *, compressed: bool) -> None:
    """AtlasError when a file is too small to hold the entries that it declares."""
    shortest = 4 if header.dtype == bool else 6
    most_bytes = matrix.size_bytes * (GZIP_EXPANSION if compressed else 1)
    if header.n_entries * shortest > most_bytes + 1:
        raise AtlasError(
            f"{header.n_entries:,} entries are declared, which {matrix.size_bytes:,} bytes cannot hold.",
            where=matrix.uri,
            fix="The file is cut off or damaged: download it again.",
        )


def _banner(line: bytes, uri: str) -> Any:
    words = line.decode("ascii", errors="replace").lower().split()
    if len(words) != 5 or words[0] != MATRIX_MARKET.decode().lower():
        raise AtlasError(f"no Matrix Market file: it begins with {_shown(line)}.", where=uri, fix=_DAMAGED)
    what = " ".join(words[1:])
    fix = "Write it as 'matrix coordinate integer general', for example with scipy.io.mmwrite."
    if words[1:3] != ["matrix", "coordinate"]:
        raise AtlasError(f"a Matrix Market file of kind '{what}'; only sparse matrices are read.", where=uri, fix=fix)
    if words[3] not in DTYPES:
        raise AtlasError(f"a Matrix Market file of {words[3]} values, which no counts are.", where=uri, fix=fix)
    if words[4] != "general":
        raise AtlasError(
            f"a {words[4]} matrix: that is a graph or a covariance, not cells × genes.",
            where=uri,
            fix="Give the count matrix of the same data.",
        )
    return DTYPES[words[3]]


def read_entries(
    text: io.BufferedReader, header: Header, uri: str
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[Any]]]:
    """Blocks of rows_z, columns_z (from 0) and values_z until the text ends; AtlasError for what is no entry."""
    done = 0
    while block := text.read(BLOCK_BYTES):
        if not block.endswith(b"\n"):
            block += _rest_of_line(text, uri, done)
        entries = _parsed(block, header, uri, done)
        if not entries.num_rows:
            continue
        rows, columns = (entries.column(i).to_numpy() for i in range(2))
        for indices, size, what in ((rows, header.n_rows, "row"), (columns, header.n_columns, "column")):
            outside = (indices < 1) | (indices > size)
            if outside.any():
                first = int(np.argmax(outside))
                raise AtlasError(
                    f"{int(outside.sum()):,} {what} numbers lie outside 1 … {size:,}, the first is {indices[first]} "
                    f"in entry {done + first + 1:,}.",
                    where=uri,
                    fix="Numbers count from 1; matrix and tables must belong together: write the file again.",
                )
        values = np.ones(rows.size, dtype=bool) if header.dtype == bool else entries.column(2).to_numpy()
        done += rows.size
        yield rows - 1, columns - 1, values


def _rest_of_line(text: io.BufferedReader, uri: str, done: int) -> bytes:
    rest = text.readline(LONGEST_ENTRY)
    if len(rest) == LONGEST_ENTRY and not rest.endswith(b"\n"):
        raise AtlasError(
            f"after entry {done:,} comes a line of more than {LONGEST_ENTRY:,} bytes.", where=uri, fix=_DAMAGED
        )
    return rest


def _parsed(block: bytes, header: Header, uri: str, done: int) -> pa.Table:
    """The entries of whole lines; lines with other white space than one blank are tidied first."""
    try:
        return _read_csv(block, header)
    except pa.ArrowInvalid:
        pass
    tidy = re.sub(rb"(?m)^ | $", b"", re.sub(rb"[ \t\r\f\v]+", b" ", block))
    try:
        return _read_csv(tidy, header)
    except pa.ArrowInvalid as error:
        raise AtlasError(
            f"after entry {done:,} comes text that is no entry ({_shown(str(error).encode())}).",
            where=uri,
            fix="The file is damaged, or no matrix: download or write it again.",
        ) from error


def _read_csv(block: bytes, header: Header) -> pa.Table:
    types = {"row": pa.int64(), "column": pa.int64()}
    if header.dtype != bool:
        types["value"] = pa.from_numpy_dtype(header.dtype)
    table = pyarrow.csv.read_csv(
        pa.BufferReader(block),
        read_options=pyarrow.csv.ReadOptions(column_names=list(types), use_threads=False, block_size=len(block) + 1),
        parse_options=pyarrow.csv.ParseOptions(delimiter=" ", quote_char=False),
        convert_options=pyarrow.csv.ConvertOptions(column_types=types, null_values=[], strings_can_be_null=False),
    )
    return table.combine_chunks()


def _shown(data: bytes) -> str:
    text = data[:200].decode("utf-8", errors="replace").strip()
    return repr(text[:100] + "…") if len(text) > 100 else repr(text)
