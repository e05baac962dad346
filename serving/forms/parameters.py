"""Options that come as query parameters, read as strictly as those of a body."""

from __future__ import annotations

from collections.abc import Sequence
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from genescale.platform.errors import did_you_mean
from genescale.serving.forms.reading import does_not_fit
from genescale.serving.problems import refused

Options = TypeVar("Options", bound=BaseModel)
Parameters = Sequence[tuple[str, str]]
MOST_PARAMETERS = 256


def check_none(parameters: Parameters) -> None:
    """RefusedError (422) when a question has query parameters although its options stand in the body."""
    if parameters:
        name = parameters[0][0][:64]
        raise refused(422, f"the parameter '{name}' is not read here: options stand in the body.", where=name)


def split(parameters: Parameters, *kinds: type[BaseModel]) -> list[list[tuple[str, str]]]:
    """The parameters of each of `kinds`, by the names of their fields; RefusedError (422) for those of none."""
    known = [name for kind in kinds for name in kind.model_fields]
    if len(parameters) > MOST_PARAMETERS:
        raise refused(422, f"{len(parameters):,} parameters are given; {MOST_PARAMETERS} are allowed.")
    for name, _ in parameters:
        if name not in known:
            hint = did_you_mean(name, known) or f"There are {', '.join(known)}."
            raise refused(422, f"there is no parameter '{name[:64]}'. {hint}", where=name[:64])
    return [[pair for pair in parameters if pair[0] in kind.model_fields] for kind in kinds]


def read_parameters(kind: type[Options], parameters: Parameters) -> Options:
    """The options that these parameters say; a list repeats its name. RefusedError (422) for what does not fit."""
    single: dict[str, str] = {}
    lists: dict[str, list[str]] = {}
    for name, value in parameters:
        if is_list(kind.model_fields[name].annotation):
            lists.setdefault(name, []).append(value)
        elif name in single:
            raise refused(422, f"the parameter '{name}' stands there twice.", where=name)
        else:
            single[name] = value
    try:
        read = kind.model_validate_strings(single).model_dump(exclude_unset=True)
        return kind.model_validate({**read, **lists})
    except ValidationError as error:
        raise does_not_fit(error) from None


def is_list(annotation: Any) -> bool:
    """Whether a field holds a list, perhaps one that may be left out."""
    if get_origin(annotation) in (Union, UnionType):
        return any(is_list(one) for one in get_args(annotation))
    return get_origin(annotation) is list
