"""The forms that a body can have, and which of them a request sends and wants back (`Content-Type`, `Accept`)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from genescale.serving.problems import JSON_TYPE, refused

ARROW_TYPE = "application/vnd.apache.arrow.stream"
H5AD_TYPE = "application/x-hdf5"
_QUALITY = re.compile(r"q\s*=\s*(0(?:\.\d{0,3})?|1(?:\.0{0,3})?)")


def sent_form(content_type: str, readable: Sequence[str]) -> str:
    """Which of `readable` a body is declared as; RefusedError with the status 415 for anything else.

    A body without a declaration is refused too: a browser's form on another site can send one, but not declare it.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind not in readable:
        raise refused(415, f"the body must be declared as {' or '.join(readable)}.", where="Content-Type")
    return kind


def wanted_form(accept: str, offered: Sequence[str]) -> str:
    """Which of `offered` the header `Accept` prefers; RefusedError with the status 406 when it wants none of them.

    Of forms that it wants alike, the one it names more precisely, then earlier, is taken; without the header the first.
    """
    ranges = [_range(text) for text in accept.split(",") if text.strip()]
    if not ranges:
        return offered[0]
    best = max(offered, key=lambda form: _rank(form, ranges))
    if _rank(best, ranges)[0] == 0:
        raise refused(406, f"the answer comes as {' or '.join(offered)}.", where="Accept")
    return best


def _range(text: str) -> tuple[str, float]:
    name, *parameters = (part.strip().lower() for part in text.split(";"))
    qualities = [part for part in parameters if part.startswith("q")]
    if not qualities:
        return name, 1.0
    found = _QUALITY.fullmatch(qualities[0])
    if found is None:
        raise refused(406, "the quality of a type is a number from 0 to 1.", where="Accept")
    return name, float(found[1])


def _rank(form: str, ranges: Sequence[tuple[str, float]]) -> tuple[float, int, int]:
    """Quality, precision and place of the range that speaks of `form`; the most precise one does."""
    patterns = {form: 2, form.partition("/")[0] + "/*": 1, "*/*": 0}
    fitting = [(patterns[name], -at, quality) for at, (name, quality) in enumerate(ranges) if name in patterns]
    if not fitting:
        return 0.0, 0, 0
    precision, place, quality = max(fitting)
    return quality, precision, place


JSON_ONLY, JSON_OR_ARROW = (JSON_TYPE,), (JSON_TYPE, ARROW_TYPE)
CELL_FORMS = (JSON_TYPE, ARROW_TYPE, H5AD_TYPE)
"""Forms in which cells come."""
