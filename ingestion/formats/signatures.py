"""What a file is by its first bytes, and how to say that it is no atlas."""

from __future__ import annotations

import zlib

from genescale.platform.errors import AtlasError

HDF5 = b"\x89HDF\r\n\x1a\n"
GZIP = b"\x1f\x8b"
ZIP = b"PK"
MATRIX_MARKET = b"%%MatrixMarket"
HEAD_BYTES = 1024
_DOWNLOAD = "Download the atlas file again."
_CONVERT = "Convert it to h5ad with anndata, or to a 10x matrix."
# First bytes of what is often found under the name of an atlas: what it is, and what to do.
IMPOSTORS: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file it points to", "Fetch it with `git lfs pull`."),
    (b"<", "an HTML or XML page, which is how a failed download often ends", _DOWNLOAD),
    (b"PAR1", "a Parquet file", "Give the file that holds the count matrix; a Parquet table has no cells × genes."),
    (b"ARROW1", "an Arrow (Feather) file", _CONVERT),
    (b"RDX", "an R object (.rds or .RData)", "Write it from R with zellkonverter::writeH5AD."),
    (b"X\n\x00\x00\x00", "an R object (.rds)", "Write it from R with zellkonverter::writeH5AD."),
    (b"BZh", "compressed with bzip2 as a whole", "Decompress it."),
    (b"\xfd7zXZ", "compressed with xz as a whole", "Decompress it."),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd as a whole", "Decompress it."),
    (b"7z\xbc\xaf", "a 7-Zip archive", "Unpack it."),
    (b"Rar!", "a RAR archive", "Unpack it."),
    (b"\x93NUMPY", "a NumPy array without tables of cells and genes", _CONVERT),
    (b"CDF\x01", "a netCDF file", _CONVERT),
    (b"SQLite format 3", "an SQLite database", _CONVERT),
    (b"\x80\x02", "a Python pickle, which is never opened because it can run code", _CONVERT),
    (b"\x80\x03", "a Python pickle, which is never opened because it can run code", _CONVERT),
    (b"\x80\x04", "a Python pickle, which is never opened because it can run code", _CONVERT),
    (b"\x80\x05", "a Python pickle, which is never opened because it can run code", _CONVERT),
    (b"{", "JSON text", "Give the atlas file itself; a list of sources ends in .toml or .csv."),
)


def refusal(head: bytes, size_bytes: int, uri: str) -> AtlasError:
    """The error for a file that is no atlas: what it is instead, and what to do. head: its first bytes."""
    if size_bytes == 0:
        return AtlasError("the file is empty (0 bytes).", where=uri, fix="Download it again.")
    if head.startswith(GZIP):
        return _refusal_of_gzip(head, size_bytes, uri)
    what, fix = _named(head) or _unnamed(head)
    return AtlasError(f"not an atlas: it is {what} ({size_bytes:,} bytes).", where=uri, fix=fix)


def _refusal_of_gzip(head: bytes, size_bytes: int, uri: str) -> AtlasError:
    inside = inflated_head(head)
    what, fix = _named(inside) or ("", "")
    if what.startswith("an R object"):
        return AtlasError(f"not an atlas: it is {what}.", where=uri, fix=fix)
    kind = "an HDF5 file" if inside.startswith(HDF5) else what or _unnamed(inside)[0]
    return AtlasError(
        f"not an atlas: it is {kind}, compressed with gzip as a whole ({size_bytes:,} bytes).",
        where=uri,
        fix="Decompress it with gunzip; h5ad files are compressed inside.",
    )


def _named(head: bytes) -> tuple[str, str] | None:
    if head.startswith(HDF5):
        return None
    if head.startswith(ZIP):
        return "a zip archive without zarr data", "Unpack it and give the atlas files."
    if head[257:262] == b"ustar":
        return "a tar archive", "Unpack it and give the atlas files."
    bare = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    return next(((what, fix) for start, what, fix in IMPOSTORS if bare.startswith(start)), None)


def _unnamed(head: bytes) -> tuple[str, str]:
    if head and all(byte >= 32 or byte in b"\t\r\n\f" for byte in head):
        return "plain text", "Text tables of counts are not read: " + _CONVERT[0].lower() + _CONVERT[1:]
    return f"of an unknown kind (it begins with {head[:8].hex(' ')})", "Give an h5ad, zarr, loom or 10x file."


def inflated_head(head: bytes) -> bytes:
    """The beginning of what a gzip file holds; empty when its first bytes are damaged."""
    try:
        return zlib.decompressobj(wbits=31).decompress(head, HEAD_BYTES)
    except zlib.error:
        return b""
