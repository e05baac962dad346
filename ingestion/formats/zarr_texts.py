"""Texts of variable length in zarr: the number of texts that a chunk declares is checked before memory is taken for it.

The codec of numcodecs makes an array of as many objects as the first four bytes say: with one flipped bit, 16 GB.
"""

from __future__ import annotations

from typing import Any

import numcodecs  # type: ignore[import-untyped]
from numcodecs.vlen import VLenBytes, VLenUTF8  # type: ignore[import-untyped]
from zarr.codecs import vlen_utf8

LENGTH_BYTES = 4


def check_declared(chunk: Any) -> None:
    """ValueError when a decompressed chunk is too short for as many texts as it declares."""
    data = memoryview(chunk).cast("B")
    declared = int.from_bytes(data[:LENGTH_BYTES], "little")
    if LENGTH_BYTES * (1 + declared) > len(data):
        raise ValueError(f"a chunk of {len(data):,} bytes declares {declared:,} texts")


class CheckedTexts(VLenUTF8):
    """The codec of format 2, `vlen-utf8`, with the check."""

    codec_id = "vlen-utf8"

    def decode(self, buf: Any, out: Any = None) -> Any:
        """Texts of a chunk; ValueError for a damaged one."""
        check_declared(buf)
        return super().decode(buf, out)


class CheckedBytes(VLenBytes):
    """The codec of format 2, `vlen-bytes`, with the check."""

    codec_id = "vlen-bytes"

    def decode(self, buf: Any, out: Any = None) -> Any:
        """Byte texts of a chunk; ValueError for a damaged one."""
        check_declared(buf)
        return super().decode(buf, out)


def use_checked_codecs() -> None:
    """Let zarr take these codecs for their own names, in this process.

    Format 3 has codecs of its own around those of numcodecs, and zarr insists on them: what they hold is exchanged.
    """
    for codec in (CheckedTexts, CheckedBytes):
        numcodecs.register_codec(codec)
    vlen_utf8._vlen_utf8_codec = CheckedTexts()
    vlen_utf8._vlen_bytes_codec = CheckedBytes()
