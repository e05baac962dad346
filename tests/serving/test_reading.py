"""Strict JSON: what Python's and FastAPI's readers let through is refused here."""

from __future__ import annotations

import json
from typing import Any

import pytest

from genescale.platform.errors import LimitError
from genescale.serving.forms.reading import read_body
from genescale.serving.problems import Problem, RefusedError
from genescale.serving.schemas import EmbeddingsAsked
from genescale.serving.schemas_perturb import PerturbationsAsked


def read(body: str | bytes, max_keys: int = 1000) -> EmbeddingsAsked:
    return read_body(EmbeddingsAsked, body.encode() if isinstance(body, str) else body, max_keys=max_keys)


def refusal(body: str | bytes) -> Problem:
    with pytest.raises(RefusedError) as caught:
        read(body)
    problem = caught.value.problem
    json.loads(problem.body("id"))  # whatever was sent, the answer to it is valid JSON
    return problem


def counts(text: str) -> str:
    return f'{{"cells": [{{"counts": {text}}}]}}'


def test_a_plain_request_is_read_with_its_defaults() -> None:
    asked = read('{"cells": [{"id": "a", "counts": {"GATA4": 3, "TTN": 0.5}}, {"tokens": [5, 6]}]}')
    assert asked.cells[0].counts == {"GATA4": 3.0, "TTN": 0.5}
    assert asked.cells[1].tokens == [5, 6]
    assert (asked.layer, asked.pooling) == ("second_to_last", "mean_genes")


@pytest.mark.parametrize(
    "body",
    [
        "",
        "{",
        "nonsense",
        counts('{"A": NaN}'),
        counts('{"A": Infinity}'),
        counts('{"A": -Infinity}'),
        counts('{"A": 1, "A": 2}'),
        '{"cells": [], "cells": [{"counts": {"A": 1}}]}',
        counts('{"A": ' + "9" * 5000 + "}"),
        b'{"cells": "\xff"}',
        "[" * 200_000,
        '{"a":' * 100_000,
    ],
    ids=[
        "empty",
        "open",
        "words",
        "NaN",
        "Infinity",
        "-Infinity",
        "twice",
        "twice-outside",
        "digits",
        "utf8",
        "deep",
        "deep-objects",
    ],
)
def test_what_is_no_strict_json_is_400(body: str | bytes) -> None:
    problem = refusal(body)
    assert (problem.status, problem.code) == (400, "invalid_input")


def test_a_duplicate_key_is_named() -> None:
    assert "'GATA4' stands twice" in refusal(counts('{"GATA4": 1, "TTN": 2, "GATA4": 1}')).message


@pytest.mark.parametrize(
    ("body", "where"),
    [
        (counts('{"A": 1e400}'), "cells[0].counts['A']"),
        (counts('{"A": -1}'), "cells[0].counts['A']"),
        (counts('{"A": 1e13}'), "cells[0].counts['A']"),
        (counts('{"A": true}'), "cells[0].counts['A']"),
        (counts('{"A": "3"}'), "cells[0].counts['A']"),
        (counts('{"A": null}'), "cells[0].counts['A']"),
        (counts('{"A": [1]}'), "cells[0].counts['A']"),
        (counts('{"": 1}'), "cells[0].counts['']"),
        (counts('{"\\ud800": 1}'), "cells[0].counts"),
        (counts('{"%s": 1}' % ("G" * 65)), "cells[0].counts"),
        (counts("[1, 2]"), "cells[0].counts"),
        ('{"cells": [{"counts": {"A": 1}}, {"tokens": [1.0]}]}', "cells[1].tokens[0]"),
        ('{"cells": [{"tokens": [true]}]}', "cells[0].tokens[0]"),
        ('{"cells": [{"tokens": [-1]}]}', "cells[0].tokens[0]"),
        ('{"cells": [{"counts": {"A": 1}, "tokens": [1]}]}', "cells[0]"),
        ('{"cells": [{}]}', "cells[0]"),
        ('{"cells": [{"genes": ["A"], "values": [1], "tokens": [1]}]}', "cells[0]"),
        ('{"cells": [{"genes": ["A"], "values": [1], "counts": {"A": 1}}]}', "cells[0]"),
        ('{"cells": [{"genes": ["A"]}]}', "cells[0]"),
        ('{"cells": [{"values": [1]}]}', "cells[0]"),
        ('{"cells": [{"counts": {"A": 1}, "values": [1]}]}', "cells[0]"),
        ('{"cells": [{"genes": ["A", "B"], "values": [1]}]}', "cells[0]"),
        ('{"cells": [{"genes": ["A"], "values": [-1]}]}', "cells[0].values[0]"),
        ('{"cells": [{"genes": ["A"], "values": [true]}]}', "cells[0].values[0]"),
        ('{"cells": [{"genes": ["A", 7], "values": [1, 1]}]}', "cells[0].genes[1]"),
        ('{"cells": [{"tokens": [99999999999999999999]}]}', "cells[0].tokens[0]"),
        ('{"cells": [{"counts": {"A": 1}}], "output": "gene"}', "output"),
        ('{"cells": [{"counts": {"A": 1}, "weight": 1}]}', "cells[0].weight"),
        ('{"cells": [{"counts": {"A": 1}, "id": 7}]}', "cells[0].id"),
        ('{"cells": []}', "cells"),
        ("{}", "cells"),
        ("[]", ""),
        ('{"cells": [{"counts": {"A": 1}}], "layer": "first"}', "layer"),
        ('{"cells": [{"counts": {"A": 1}}], "pooling": null}', "pooling"),
        ('{"cells": [{"counts": {"A": 1}}], "model": "other"}', "model"),
    ],
)
def test_what_does_not_fit_the_schema_is_422_and_says_where(body: str, where: str) -> None:
    problem = refusal(body)
    assert (problem.status, problem.code) == (422, "invalid_input")
    assert str(problem.details["where"]).startswith(where)


@pytest.mark.parametrize(
    "change",
    [
        {"edits": []},
        {"edits": [{"kind": "silence", "genes": ["A"]}]},
        {"edits": [{"kind": "inhibit", "genes": ["A"], "quartiles": 4}]},
        {"edits": [{"kind": "inhibit", "genes": ["A"], "rank": -1}]},
        {"edits": [{"kind": "replace", "genes": ["A"], "ranks": [1.0]}]},
        {"edits": [{"kind": "replace", "genes": ["A"], "ranks": [10**30]}]},
        {"states": [{"name": "", "vector": [1.0]}]},
        {"states": [{"vector": [1.0]}]},
        {"states": [{"name": "a", "vector": [float("nan")]}]},
        {"head": ""},
        {"top_gene_shifts": -1},
        {"top_gene_shifts": 1.5},
        {"edits": [{"kind": "delete", "genes": []}]},
        {"edits": [{"kind": "delete", "genes": "A"}]},
        {"edits": [{"kind": "delete", "genes": ["A"], "strength": 2}]},
        {"measure": "euclidean"},
        {"goal": [0.0, float("inf")]},
        {"goal": ["1"]},
        {"gene_shifts": [7]},
    ],
)
def test_perturbations_are_read_strictly_too(change: dict[str, Any]) -> None:
    good = {"cells": [{"counts": {"A": 1}}], "edits": [{"kind": "delete", "genes": ["A"]}]}
    read_body(PerturbationsAsked, json.dumps(good).encode(), max_keys=10)
    with pytest.raises(RefusedError):
        read_body(PerturbationsAsked, json.dumps({**good, **change}).encode(), max_keys=10)


def test_too_many_genes_are_refused_before_they_are_looked_at() -> None:
    read(counts('{"A": 1, "B": 2}'), max_keys=2)
    with pytest.raises(LimitError):
        read(counts('{"A": "x", "B": "y", "C": "z"}'), max_keys=2)


def test_a_request_full_of_mistakes_gets_a_short_answer() -> None:
    wrong = counts("{" + ", ".join(f'"G{i}": -1' for i in range(900)) + "}")
    problem = refusal(wrong)
    assert len(problem.body("id")) < 4000
    assert "899 more" in problem.message
