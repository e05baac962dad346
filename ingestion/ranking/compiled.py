"""How loops are compiled: without the interpreter's lock, and once per machine where a cache folder can be written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """Compile for the machine without the interpreter's lock; kept on disk where a folder can be written.

    Numbers divide as NumPy's do, without a look for zero that would keep loops from becoming vector instructions.

    Numba looks for one beside the source file (or in NUMBA_CACHE_DIR), then in the user's cache folder; where it finds
    none, as in a read-only image without a home, every worker compiles once.
    """
    try:
        made: Function = numba.njit(function, nogil=True, error_model="numpy", cache=True)
    except RuntimeError:
        made = numba.njit(function, nogil=True, error_model="numpy")
    return made
