"""Arrow answers of `/v1/perturbations`, `/v1/classify` and `/v1/neighbors`: each number of the JSON answer is there."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pyarrow as pa
import pytest

from genescale.platform.settings import Settings
from genescale.serving.forms.media import ARROW_TYPE
from genescale.serving.gate import Gate
from genescale.serving.in_process import InProcessModel
from genescale.serving.neighbours.building import IndexConfig, build_index
from genescale.serving.neighbours.reference import Reference

if TYPE_CHECKING:
    from genescale.ingestion.corpus import Corpus
    from genescale.platform.bundle import Bundle
    from genescale.training.embedder import Embedder

Ask = Callable[..., httpx.Response]
DrawCell = Callable[[int, int], dict[str, float]]
FACTS = ("id", "n_genes", "n_tokens", "cropped", "ignored", "merged")
TYPE = {"label": "cell_type", "classes": ("b", "nk", "t")}
AGE = {"label": "age", "kind": "number"}
DOSAGE = {"label": "dosage", "kind": "gene_classes", "classes": ("insensitive", "sensitive")}


def both(ask: Ask, app: Any, path: str, asked: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], pa.Table]:
    """The JSON answer, and metadata and table of the Arrow one, without timings."""
    as_json = ask(app, "POST", path, json=asked)
    as_arrow = ask(app, "POST", path, json=asked, headers={"Accept": ARROW_TYPE})
    assert as_json.status_code == as_arrow.status_code == 200, as_json.text
    assert as_arrow.headers["content-type"] == ARROW_TYPE
    table = pa.ipc.open_stream(as_arrow.content).read_all()
    answer, facts = as_json.json(), json.loads(table.schema.metadata[b"genescale"])
    assert answer.pop("timings_ms").keys() == facts.pop("timings_ms").keys()
    return answer, facts, table


def stream(cells: list[dict[str, Any]], options: dict[str, Any]) -> bytes:
    """The same question as an Arrow body."""
    columns = {
        "id": pa.array([cell["id"] for cell in cells]),
        "genes": pa.array([list(cell["counts"]) for cell in cells], pa.list_(pa.utf8())),
        "counts": pa.array([list(cell["counts"].values()) for cell in cells], pa.list_(pa.float64())),
    }
    table = pa.table(columns).replace_schema_metadata({"genescale": json.dumps(options)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    body: bytes = sink.getvalue().to_pybytes()
    return body


def cells_of(draw_cell: DrawCell, n: int = 3) -> list[dict[str, Any]]:
    counts = [{**draw_cell(seed, 20 + 30 * seed), "GENE1": 90, "NOSUCH": 2} for seed in range(n)]
    return [{"id": f"c{at}", "counts": cell} for at, cell in enumerate(counts)]


def expected_rows(cells: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """The flat table that the JSON answer of perturbations comes to."""
    rows: list[tuple[Any, ...]] = []
    for at, cell in enumerate(cells):
        for number, edit in enumerate(cell["edits"]):
            single = [(name, None, edit[name]) for name in ("cosine", "shift", "n_compared", "n_cut", "n_refilled")]
            if edit["goal_shift"] is not None:
                single.append(("goal_shift", None, edit["goal_shift"]))
            named = [("state_shift", *one) for one in edit["state_shifts"].items()]
            named += [("class_change", *one) for one in (edit["class_changes"] or {}).items()]
            named += [("gene_shift", one["gene"], one["shift"]) for one in edit["gene_shifts"]]
            named += [("top_gene_shift", one["gene"], one["shift"]) for one in edit["top_gene_shifts"]]
            named += [("found_rank", one["gene"], one["rank"]) for one in edit["found"]]
            named += [("absent", gene, None) for gene in edit["absent"]]
            rows += [(at, number, *one) for one in (*single, *named)]
    return rows


def test_shifts_come_as_a_flat_table(ask: Ask, serve_heads: Any, draw_cell: DrawCell) -> None:
    app, _, embedder = serve_heads(TYPE, AGE)
    rng = np.random.default_rng(4)
    asked = {
        "cells": cells_of(draw_cell),
        "edits": [
            {"kind": "delete", "genes": ["GENE1"]},
            {"kind": "overexpress", "genes": ["GENE2", "GENE116"]},
            {"kind": "delete", "genes": ["GENE115"]},
        ],
        "states": [{"name": name, "vector": rng.normal(size=embedder.width).tolist()} for name in ("well", "ill")],
        "goal": rng.normal(size=embedder.width).tolist(),
        "head": "cell_type",
        "gene_shifts": ["GENE7", "GENE116"],
        "top_gene_shifts": 4,
    }
    answer, facts, table = both(ask, app, "/v1/perturbations", asked)
    rows = [tuple(row.values()) for row in table.to_pylist()]
    assert table.column_names == ["cell", "edit", "measure", "of", "value"]
    assert sorted(map(str, rows)) == sorted(map(str, _floats(expected_rows(answer["cells"]))))
    assert {row[2] for row in rows} >= {"state_shift", "goal_shift", "class_change", "gene_shift", "top_gene_shift"}
    top = [(of, value) for at, edit, measure, of, value in rows if (at, edit, measure) == (0, 0, "top_gene_shift")]
    assert top == [(one["gene"], one["shift"]) for one in answer["cells"][0]["edits"][0]["top_gene_shifts"]]
    cells = answer.pop("cells")
    assert facts.pop("cells") == [{name: cell[name] for name in FACTS} for cell in cells]
    assert facts.pop("edits") == [{"kind": edit["kind"], "genes": edit["genes"]} for edit in asked["edits"]]
    assert facts.pop("reasons") == [[edit["reason"] for edit in cell["edits"]] for cell in cells]
    assert facts == answer


def _floats(rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    return [(*row[:4], None if row[4] is None else float(row[4])) for row in rows]


def test_an_edit_without_a_cosine_has_its_reason_in_the_metadata(ask: Ask, app: Gate) -> None:
    asked = {"cells": [{"counts": {"GENE1": 3}}], "edits": [{"kind": "delete", "genes": ["GENE1"]}]}
    answer, facts, table = both(ask, app, "/v1/perturbations", asked)
    (edit,) = answer["cells"][0]["edits"]
    assert edit["reason"]
    assert facts["reasons"] == [[edit["reason"]]]
    assert {row["value"] for row in table.to_pylist() if row["measure"] in ("cosine", "shift")} == {None}


def test_heads_of_cells_come_as_columns(ask: Ask, serve_heads: Any, draw_cell: DrawCell) -> None:
    app, _, _ = serve_heads(TYPE, AGE)
    answer, facts, table = both(ask, app, "/v1/classify", {"cells": cells_of(draw_cell)})
    for row, cell in zip(table.to_pylist(), answer["cells"], strict=True):
        assert {name: row[name] for name in FACTS} == {name: cell[name] for name in FACTS}
        kind, age = cell["heads"]
        assert row["heads"]["cell_type"]["predicted"] == kind["predicted"]
        assert row["heads"]["cell_type"]["probabilities"] == list(kind["probabilities"].values())
        assert row["heads"]["age"] == {"number": age["number"]}
    assert facts == {name: value for name, value in answer.items() if name not in ("cells", "genes")}
    assert [head["classes"] for head in facts["heads"]] == [list(TYPE["classes"]), []]


def test_a_head_of_genes_comes_with_one_row_a_gene(ask: Ask, serve_heads: Any, draw_cell: DrawCell) -> None:
    app, _, _ = serve_heads(DOSAGE)
    cells = cells_of(draw_cell)
    absent = next(name for name in (f"GENE{at}" for at in range(117)) if not any(name in c["counts"] for c in cells))
    asked = {"cells": cells, "genes": ["GENE1", absent]}
    answer, facts, table = both(ask, app, "/v1/classify", asked)
    known, unknown = table.to_pylist()
    expected = answer["genes"][0]
    assert (known["gene"], known["n_cells"], known["predicted"]) == ("GENE1", 3, expected["predicted"])
    for name in ("probabilities", "spread"):
        assert known[name] == list(expected[name].values())
    assert (unknown["gene"], unknown["n_cells"], unknown["probabilities"]) == (absent, 0, None)
    assert facts["cells"] == [{name: cell[name] for name in FACTS} for cell in answer["cells"]]


@pytest.mark.parametrize("columns", [["cell_type", "tissue"], []])
def test_neighbours_come_with_one_row_a_cell(
    ask: Ask,
    http_side: Callable[..., Gate],
    bundle: Bundle,
    embedder: Embedder,
    reference_corpus: Corpus,
    tmp_path: Any,
    draw_cell: DrawCell,
    columns: list[str],
) -> None:
    uri, config = str(tmp_path / "index"), IndexConfig(device="cpu", map_cells=0, columns=("cell_type", "tissue"))
    build_index(bundle, reference_corpus, out_uri=uri, store=reference_corpus.store, config=config)
    reference = Reference.open(uri, Settings(), tmp_path / "cache")
    app = http_side(bundle, InProcessModel(embedder), reference=reference)
    cells, options = cells_of(draw_cell), {"k": 3, "columns": columns}
    answer, facts, table = both(ask, app, "/v1/neighbors", {"cells": cells, **options})
    expected = answer.pop("cells")
    assert facts == answer
    if not columns:
        assert "votes" not in table.column_names
        expected = [{name: value for name, value in cell.items() if name != "votes"} for cell in expected]
        for cell in expected:
            cell["neighbors"] = [{k: v for k, v in one.items() if k != "labels"} for one in cell["neighbors"]]
    assert table.to_pylist() == expected
    sent = {"content": stream(cells, options), "headers": {"Content-Type": ARROW_TYPE}}
    again = ask(app, "POST", "/v1/neighbors", **sent).json()
    if columns:
        assert again["cells"] == expected


def test_arrow_cells_ask_for_the_same_edits_and_classes_as_json_cells(
    ask: Ask, serve_heads: Any, draw_cell: DrawCell
) -> None:
    app, _, _ = serve_heads(TYPE)
    cells = cells_of(draw_cell)
    edits = {"edits": [{"kind": "inhibit", "genes": ["GENE1"], "quartiles": 2}], "measure": "mean_pooled"}
    for path, options in (("/v1/perturbations", edits), ("/v1/classify", {"genes": []}), ("/v1/tokens", {})):
        expected = ask(app, "POST", path, json={"cells": cells, **options}).json()
        sent = {"content": stream(cells, options), "headers": {"Content-Type": ARROW_TYPE}}
        found = ask(app, "POST", path, **sent).json()
        assert {**found, "timings_ms": 0} == {**expected, "timings_ms": 0}


def test_what_is_spoken_is_said_in_info(ask: Ask, app: Gate) -> None:
    choices = ask(app, "GET", "/v1/info").json()["choices"]
    assert choices["content_types"] == ["application/json", ARROW_TYPE, "application/x-hdf5"]
    assert choices["answer_types"] == ["application/json", ARROW_TYPE]
    headers = {"Content-Type": "application/x-hdf5"}
    assert ask(app, "POST", "/v1/perturbations", content=b"", headers=headers).status_code == 415
