"""Reading a request's JSON strictly: what JSON leaves open is refused instead of guessed.

Python's reader lets the last of two equal keys win and takes NaN; a cell with a gene twice or a count that is no number
would then be answered as if nothing were wrong.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from genescale.platform.errors import LimitError
from genescale.serving.problems import RefusedError, refused

Asked = TypeVar("Asked", bound=BaseModel)
MOST_PROBLEMS = 10
_LONGEST_NAME = 64


def read_body(kind: type[Asked], body: bytes, *, max_keys: int) -> Asked:
    """The request in `body`; raises RefusedError: 400 for what is no strict JSON, 422 for what does not fit `kind`.

    An object of more than `max_keys` keys raises LimitError before it is looked at, which also bounds how many mistakes
    one request can make us list.
    """
    try:
        return kind.model_validate(_parse(body, max_keys))
    except ValidationError as error:
        raise does_not_fit(error) from None


def _parse(body: bytes, max_keys: int) -> Any:
    try:
        return json.loads(body, object_pairs_hook=partial(_unique, max_keys), parse_constant=_no_number)
    except RecursionError:
        raise refused(400, "the JSON is nested too deeply.") from None
    except ValueError as error:
        raise refused(400, f"the body is not valid JSON: {str(error)[:200]}.") from None


def _unique(max_keys: int, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > max_keys:
        raise LimitError(f"{len(pairs):,} genes in one cell are given; {max_keys:,} are allowed.")
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key '{twice[:_LONGEST_NAME]}' stands twice in one object")
    return values


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number in JSON")


def does_not_fit(error: ValidationError) -> RefusedError:
    """The refusal (422) of what does not fit a schema: the first problems, each with its place."""
    found = error.errors(include_url=False, include_input=False, include_context=False)
    problems = [{"where": _place(one["loc"]), "message": one["msg"]} for one in found[:MOST_PROBLEMS]]
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    first = f"{problems[0]['where']}: {problems[0]['message']}" if problems[0]["where"] else problems[0]["message"]
    return refused(422, f"{first}{more}.", where=problems[0]["where"], problems=problems)


def _place(steps: Sequence[int | str]) -> str:
    """A place in the request as a reader writes it: `cells[0].counts['GATA4']`."""
    text = ""
    for step in steps:
        if isinstance(step, int):
            text += f"[{step}]"
        elif step.isidentifier() and not text.endswith("counts"):
            text += f".{step}" if text else step[:_LONGEST_NAME]
        elif step != "[key]":
            text += f"[{step[:_LONGEST_NAME]!r}]"
    return text
