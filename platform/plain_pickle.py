"""Read the published gene dictionaries, which are pickles, without trusting them.

A pickle is a program. This reader runs only the part of the language that a dictionary of texts and numbers needs:
each opcode must be in a short list, and the only importable names are NumPy's scalar and dtype, which are replaced by
two objects of our own that cannot do anything but decode one number. Everything else is refused before it runs.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from typing import Any, NoReturn

import numpy as np

from genescale.platform.errors import VocabularyError

MAX_PICKLE_BYTES = 64 * 1024 * 1024
ALLOWED_OPCODES = frozenset(
    "PROTO FRAME STOP MARK EMPTY_DICT DICT SETITEM SETITEMS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 "
    "NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 FLOAT BINFLOAT "
    "BINUNICODE SHORT_BINUNICODE SHORT_BINBYTES BINBYTES "
    "PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET MEMOIZE GLOBAL STACK_GLOBAL REDUCE BUILD".split()
)
NUMBER_CODES = frozenset({"i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"})
Plain = str | int | float


class _NumberType:
    """Stands in for numpy.dtype: one number format, nothing else."""

    __slots__ = ("code", "order")

    def __init__(self, code: object, align: object = False, copy: object = True) -> None:
        if not isinstance(code, str) or code not in NUMBER_CODES:
            raise pickle.UnpicklingError(f"number format {code!r}")
        self.code, self.order = code, "<"

    def __setstate__(self, state: object) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        if order not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError("a number format with unusual state")
        self.order = "<" if order == "=" else str(order)


class _NumberDecoder:
    """Stands in for numpy's scalar constructor; takes no state, so a pickle cannot alter it."""

    __slots__ = ()

    def __call__(self, kind: object, data: object) -> int | float:
        if not isinstance(kind, _NumberType) or not isinstance(data, bytes):
            raise pickle.UnpicklingError("a NumPy value that is not a plain number")
        dtype = np.dtype(kind.order + kind.code)
        if len(data) != dtype.itemsize:
            raise pickle.UnpicklingError(f"a number of {len(data)} bytes where {dtype.itemsize} belong")
        return np.frombuffer(data, dtype=dtype)[0].item()

    def __setstate__(self, state: object) -> NoReturn:
        raise pickle.UnpicklingError("state for a number decoder")


class _NumberTypeMaker:
    """Makes number types; an object rather than the class itself, so that a pickle cannot set class attributes."""

    __slots__ = ()

    def __call__(self, *arguments: object) -> _NumberType:
        return _NumberType(*arguments)

    def __setstate__(self, state: object) -> NoReturn:
        raise pickle.UnpicklingError("state for a number format maker")


_IMPORTABLE: dict[tuple[str, str], object] = {
    ("numpy.core.multiarray", "scalar"): _NumberDecoder(),
    ("numpy._core.multiarray", "scalar"): _NumberDecoder(),
    ("numpy", "dtype"): _NumberTypeMaker(),
}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _IMPORTABLE[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"the name {module}.{name}") from None

    def persistent_load(self, reference: object) -> NoReturn:
        raise pickle.UnpicklingError("a persistent reference")


def read_plain_dictionary(data: bytes, *, where: str) -> dict[str, Plain]:
    """The dictionary from texts to numbers or texts that the pickle `data` holds.

    Raises VocabularyError, before anything of the pickle is run, when it holds more than that.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise VocabularyError(
            f"{len(data):,} bytes are more than a gene dictionary has.",
            where=where,
            fix=f"Limit: {MAX_PICKLE_BYTES:,}.",
        )
    try:
        _check_opcodes(data)
        value = _PlainUnpickler(io.BytesIO(data)).load()
    except Exception as error:  # noqa: BLE001  the unpickler raises whatever broken input makes it raise
        raise VocabularyError(
            f"refused: the pickle holds {error}, or is broken; only texts and numbers are read.",
            where=where,
            fix="Use the published token, median, name and mapping dictionaries, or a Parquet or TSV export.",
        ) from None
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise VocabularyError("the pickle is not a dictionary with gene ids or symbols as keys.", where=where)
    if not all(type(item) in (str, int, float) for item in value.values()):
        raise VocabularyError("the dictionary holds values that are neither texts nor numbers.", where=where)
    return value


def _check_opcodes(data: bytes) -> None:
    """Refuse opcodes outside the list, and memo positions beyond the pickle (they would allocate gigabytes)."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name not in ALLOWED_OPCODES:
            raise pickle.UnpicklingError(f"the instruction {opcode.name}")
        if opcode.name in ("PUT", "LONG_BINPUT") and int(argument or 0) > len(data):
            raise pickle.UnpicklingError("a memo position beyond its end")
