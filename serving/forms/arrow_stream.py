"""An Arrow IPC stream from outside, opened only as far as it is safe.

Arrow's reader trusts a compressed buffer's own word for its size and allocates that much, so a short body could fill
the memory: streams with compressed buffers are refused before anything of them is read. What is read is then checked in
full (offsets, UTF-8, dictionary indices), which Arrow leaves to whoever reads data of unknown origin.
"""

from __future__ import annotations

import struct

import pyarrow as pa

from genescale.platform.errors import InputError, LimitError
from genescale.serving.problems import refused

# Places of fields in Arrow's flatbuffers tables (Message.fbs, format version 5).
_HEADER, _COMPRESSION, _DICTIONARY_DATA = 2, 3, 1


def open_stream(body: bytes, *, max_messages: int) -> tuple[pa.Schema, list[pa.RecordBatch]]:
    """Schema and record batches of a whole stream, zero-copy and checked in full.

    Raises RefusedError (400) for what is no Arrow stream, InputError for compressed buffers, LimitError for more than
    `max_messages` messages.
    """
    try:
        _check_messages(body, max_messages)
        with pa.ipc.open_stream(pa.py_buffer(body)) as reader:
            schema, batches = reader.schema, list(reader)
        # Names are decoded only when they are looked at, and may be no UTF-8.
        _ = schema.names
        for batch in batches:
            batch.validate(full=True)
    # OSError is what Arrow calls a stream that ends too early.
    except (pa.ArrowException, OSError, struct.error, UnicodeDecodeError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise refused(400, f"the body is no valid Arrow stream: {reason}") from None
    return schema, batches


def _check_messages(body: bytes, max_messages: int) -> None:
    source = pa.BufferReader(pa.py_buffer(body))
    messages = pa.ipc.MessageReader.open_stream(source)
    for n, message in enumerate(messages, start=1):
        if n > max_messages:
            raise LimitError(
                f"the stream has more than {max_messages:,} messages.", fix="Put the cells into one record batch."
            )
        if message.type != "schema" and _compressed(message.type, message.metadata.to_pybytes()):
            raise InputError("the stream has compressed buffers.", fix="Write it without compression.")
    if source.tell() != len(body):
        raise refused(400, "the body is no valid Arrow stream: bytes follow its end.")


def _compressed(kind: str, flatbuffer: bytes) -> bool:
    """Whether a message declares a compression of its buffers."""
    (root,) = struct.unpack_from("<I", flatbuffer)
    table = _follow(flatbuffer, root, _HEADER)
    if kind == "dictionary batch" and table is not None:
        table = _follow(flatbuffer, table, _DICTIONARY_DATA)
    if table is None:
        raise pa.ArrowInvalid("a message without a header")
    return _field(flatbuffer, table, _COMPRESSION) is not None


def _field(flatbuffer: bytes, table: int, number: int) -> int | None:
    """Where a field of a flatbuffers table stands; None where the table has not that field."""
    (back,) = struct.unpack_from("<i", flatbuffer, table)
    (size,) = struct.unpack_from("<H", flatbuffer, table - back)
    if 4 + 2 * number >= size:
        return None
    (offset,) = struct.unpack_from("<H", flatbuffer, table - back + 4 + 2 * number)
    return table + offset if offset else None


def _follow(flatbuffer: bytes, table: int, number: int) -> int | None:
    """The table that a field points to."""
    at = _field(flatbuffer, table, number)
    if at is None:
        return None
    (offset,) = struct.unpack_from("<I", flatbuffer, at)
    return at + int(offset)
