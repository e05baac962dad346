"""Generated questions get names and lengths that the tiny model knows: what a schema alone cannot say.

A schema says that a gene is a text; random texts are no genes, so every generated question would be refused before the
model sees it. Only questions that fit the schema are changed; the wrong ones stay as wrong as they were made.

Loaded as hooks by Schemathesis's command as well (SCHEMATHESIS_HOOKS=tests.serving.contract.known_names).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import schemathesis

from genescale.serving.forms.h5ad_cells import FileOptions
from genescale.serving.neighbours.contract import NeighborsOptions
from genescale.serving.schemas import ClassifyOptions, EmbeddingOptions
from genescale.serving.schemas_perturb import PerturbationsOptions
from genescale.serving.schemas_tokens import TokensOptions
from tests.serving.conftest import N_GENES, N_WITHOUT_MEDIAN, WIDTH

N_RANKED = N_GENES - N_WITHOUT_MEDIAN
FORMS = ("tokens", "genes", "counts")
OPTIONS_OF_KIND = {
    "delete": {"refill"},
    "overexpress": set(),
    "inhibit": {"quartiles"},
    "activate": {"rank"},
    "replace": {"ranks"},
}
FIRST_GENE_TOKEN = 4
DEADLINE, LONG_MS = "X-Genescale-Deadline-Ms", 60_000
OPTIONS = (EmbeddingOptions, TokensOptions, ClassifyOptions, NeighborsOptions, PerturbationsOptions, FileOptions)
FILE_OPTIONS = {name for kind in OPTIONS for name in kind.model_fields}


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Make what fits the schema a question that the model can answer, in time."""
    make_answerable(case)


def make_answerable(case: Any) -> None:
    """The same, of any generated question; one that is wrong stays wrong."""
    deadline = str((case.headers or {}).get(DEADLINE, LONG_MS)).strip()
    # A deadline of a millisecond is kept, and answered with 504; an empty header counts as none.
    if not deadline or (deadline.isascii() and deadline.isdecimal() and 0 < int(deadline) < LONG_MS):
        case.headers[DEADLINE] = str(LONG_MS) if deadline else "no number"
    if fits(case) and isinstance(case.body, dict):
        case.body = answerable(case.body)
        # Options of files: beside a JSON body they are refused.
        case.query = {name: value for name, value in (case.query or {}).items() if name not in FILE_OPTIONS}


def fits(case: Any) -> bool:
    """Whether a generated question was meant to fit the schema."""
    return case.meta is not None and case.meta.generation.mode == schemathesis.GenerationMode.POSITIVE


def answerable(body: dict[str, Any]) -> dict[str, Any]:
    """The body with genes, states, heads and columns that exist; unknown genes stay beside known ones."""
    made = _whole(dict(body))
    if isinstance(made.get("cells"), list):
        made["cells"] = [_cell(cell) if isinstance(cell, dict) else cell for cell in made["cells"]]
    if isinstance(made.get("edits"), list):
        made["edits"] = [_edit(edit) if isinstance(edit, dict) else edit for edit in made["edits"]]
    if isinstance(made.get("gene_shifts"), list):
        made["gene_shifts"] = _genes(made["gene_shifts"])
    # The heads of the complete model read cells.
    made.pop("genes", None)
    if isinstance(made.get("states"), list):
        made["states"] = [{"name": f"state-{at}", "vector": _vector(at)} for at in range(len(made["states"]))]
    if made.get("goal") is not None:
        made["goal"] = _vector(1)
    if isinstance(made.get("k"), int):
        made["k"] = 1 + made["k"] % 9
    if isinstance(made.get("top_gene_shifts"), int):
        made["top_gene_shifts"] %= 9
    if made.get("head") is not None:
        made["head"] = "cell_type"
    if made.get("columns") is not None:
        made["columns"] = ["tissue"]
    if made.get("output") in ("cls", "genes"):
        made.pop("pooling", None)
    return made


def _whole(value: Any) -> Any:
    """The same with 3 for 3.0: the one is as whole as the other in a schema, and not in strict JSON."""
    if isinstance(value, dict):
        return {name: _whole(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_whole(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _cell(cell: dict[str, Any]) -> dict[str, Any]:
    form = next((name for name in FORMS if cell.get(name)), "counts")
    made = {"id": cell.get("id")}
    if form == "tokens":
        return {**made, "tokens": [FIRST_GENE_TOKEN + at for at in range(min(len(cell["tokens"]), N_RANKED))]}
    if form == "genes":
        genes = _genes(cell["genes"])
        values = [*(cell.get("values") or []), *[1] * len(genes)][: len(genes)]
        return {**made, "genes": genes, "values": [*values[:-1], 3]}
    given = cell.get("counts") or {}
    known = {f"GENE{at}": count for at, count in enumerate(list(given.values())[:N_RANKED])}
    unknown = {name: 1 for name in list(given)[::2] if not name.startswith("GENE")}
    return {**made, "counts": {**known, **unknown, "GENE116": 2}}


def _edit(edit: dict[str, Any]) -> dict[str, Any]:
    kind = edit.get("kind")
    allowed = {"kind", "genes", *OPTIONS_OF_KIND.get(str(kind), ())}
    made = {name: value for name, value in edit.items() if name in allowed}
    made["genes"] = _genes(edit.get("genes") or ["GENE1"])
    if kind == "replace":
        made["ranks"] = list(range(len(made["genes"])))
    return made


def _genes(given: Sequence[Any]) -> list[str]:
    return [f"GENE{at}" for at in range(min(len(given), N_RANKED))]


def _vector(at: int) -> list[float]:
    return [1.0 + at, *[0.5] * (WIDTH - 1)]
