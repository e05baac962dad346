"""Bodies as Arrow streams, where pyarrow is installed: numbers travel as they are, and a gene's name once per request.

Axis suffixes: `n` cells, `g` genes of one cell, `z` genes of all cells, `v` names, `d` width.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import httpx
import numpy as np

from genescale.client import questions
from genescale.client.answers import embeddings_answer, gene_embeddings_answer
from genescale.client.cells import Cell, cell_json
from genescale.client.flat import Flat, flat_cells
from genescale.client.questions import JSON_TYPE, Answer, Question, json_object, understood
from genescale.client.records import (
    CellGenes,
    EmbeddingsAnswer,
    GeneEmbeddingsAnswer,
    Timings,
    made,
    model_of,
    report_of,
)
from genescale.platform.errors import InputError, SettingsError

if TYPE_CHECKING:
    import pyarrow as pa

Bodies = Literal["auto", "json", "arrow"]
ARROW_TYPE = "application/vnd.apache.arrow.stream"
METADATA_KEY = b"genescale"
FACTS = ("id", "n_genes", "n_tokens", "cropped", "ignored", "merged")


def check_bodies(bodies: str) -> None:
    """SettingsError for no choice of bodies, and for Arrow without pyarrow."""
    if bodies not in ("auto", "json", "arrow"):
        raise SettingsError(f"bodies is '{bodies}'.", where="client", fix="Use 'auto', 'json' or 'arrow'.")
    if bodies == "arrow" and not _installed():
        raise SettingsError("pyarrow is not installed.", where="bodies='arrow'", fix="pip install pyarrow")


def arrow_is_best(bodies: Bodies, info: Mapping[str, Any]) -> bool:
    """Whether many cells go as Arrow: wanted, or possible on both sides. InputError when wanted and not offered."""
    offered = ARROW_TYPE in info.get("choices", {}).get("content_types", ())
    if bodies == "arrow" and not offered:
        raise InputError("the service takes no Arrow bodies.", where="bodies='arrow'", fix="Use bodies='json'.")
    return bodies != "json" and offered and _installed()


def embeddings_asked(cells: Sequence[Cell], bodies: Bodies, *, layer: str, pooling: str) -> Question[EmbeddingsAnswer]:
    """Which embedding each cell has, as Arrow where that is the choice of bodies and all cells are of one form."""
    flat = flat_cells([cell_json(cell) for cell in cells]) if bodies == "arrow" else None
    if flat is None:
        return questions.embeddings(cells, layer=layer, pooling=pooling)
    return embeddings(flat, layer=layer, pooling=pooling)


def gene_embeddings_asked(cells: Sequence[Cell], bodies: Bodies, *, layer: str) -> Question[GeneEmbeddingsAnswer]:
    """Which embedding each gene has in each cell, as Arrow where that is the choice and all cells are of one form."""
    flat = flat_cells([cell_json(cell) for cell in cells]) if bodies == "arrow" else None
    return questions.gene_embeddings(cells, layer=layer) if flat is None else gene_embeddings(flat, layer=layer)


def embeddings(flat: Flat, *, layer: str, pooling: str) -> Question[EmbeddingsAnswer]:
    """Which embedding each cell has."""
    options = {"layer": layer, "pooling": pooling}
    return _question(flat, options, _embeddings_in, embeddings_answer)


def gene_embeddings(flat: Flat, *, layer: str) -> Question[GeneEmbeddingsAnswer]:
    """Which embedding each gene has in each cell."""
    return _question(flat, {"layer": layer, "output": "genes"}, _gene_embeddings_in, gene_embeddings_answer)


def _installed() -> bool:
    return importlib.util.find_spec("pyarrow") is not None


def _question(
    flat: Flat,
    options: Mapping[str, Any],
    from_arrow: Callable[[bytes], Answer],
    from_json: Callable[[Mapping[str, Any]], Answer],
) -> Question[Answer]:
    path = "/v1/embeddings"

    def read(response: httpx.Response) -> Answer:
        is_arrow = response.headers.get("content-type", "").startswith(ARROW_TYPE)
        return from_arrow(response.content) if is_arrow else from_json(json_object(response))

    return Question(
        method="POST",
        path=path,
        content=_stream(flat, options),
        headers={"Content-Type": ARROW_TYPE, "Accept": f"{ARROW_TYPE}, {JSON_TYPE};q=0.1"},
        read=lambda response: understood(lambda: read(response), path),
    )


def _stream(flat: Flat, options: Mapping[str, Any]) -> bytes:
    import pyarrow as pa

    ends_n = pa.array(flat.indptr, pa.int32())
    columns: dict[str, pa.Array] = {}
    if any(one is not None for one in flat.ids):
        columns["id"] = pa.array(flat.ids, pa.utf8())
    if flat.names is None:
        columns["tokens"] = pa.ListArray.from_arrays(ends_n, pa.array(flat.values_z, pa.uint32()))
    else:
        names = pa.DictionaryArray.from_arrays(pa.array(flat.codes_z, pa.int32()), pa.array(flat.names, pa.utf8()))
        columns["genes"] = pa.ListArray.from_arrays(ends_n, names)
        columns["counts"] = pa.ListArray.from_arrays(ends_n, pa.array(_narrow(flat.values_z)))
    batch = pa.record_batch(columns)
    schema = batch.schema.with_metadata({METADATA_KEY: json.dumps(options).encode()})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(batch.replace_schema_metadata(schema.metadata))
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _narrow(values_z: np.ndarray) -> np.ndarray:
    """Counts in four bytes where none changes by it."""
    narrow_z = values_z.astype(np.float32)
    return narrow_z if np.array_equal(narrow_z, values_z) else values_z.astype(np.float64)


def _opened(content: bytes) -> tuple[pa.Table, dict[str, Any], list[dict[str, Any]]]:
    """Columns, facts of the answer and facts of each cell."""
    import pyarrow as pa

    with pa.ipc.open_stream(content) as reader:
        table = reader.read_all()
    return table, json.loads(table.schema.metadata[METADATA_KEY]), table.select(FACTS).to_pylist()


def _embeddings_in(content: bytes) -> EmbeddingsAnswer:
    table, facts, cells = _opened(content)
    column = table.column("embedding").combine_chunks()
    return EmbeddingsAnswer(
        embeddings=_floats(column).reshape(len(table), column.type.list_size),
        cells=tuple(report_of(cell) for cell in cells),
        model=model_of(facts["provenance"]),
        timings_ms=made(Timings, facts["timings_ms"]),
    )


def _gene_embeddings_in(content: bytes) -> GeneEmbeddingsAnswer:
    table, facts, cells = _opened(content)
    names_n, vectors = table.column("genes").to_pylist(), table.column("gene_embeddings").combine_chunks()
    width = vectors.type.value_type.list_size
    rows_zd = _floats(vectors.flatten()).reshape(-1, width)
    parts = np.split(rows_zd, np.cumsum([len(names) for names in names_n])[:-1])
    return GeneEmbeddingsAnswer(
        cells=tuple(
            CellGenes(report=report_of(cell), genes=tuple(names), embeddings=rows_gd)
            for cell, names, rows_gd in zip(cells, names_n, parts, strict=True)
        ),
        model=model_of(facts["provenance"]),
        timings_ms=made(Timings, facts["timings_ms"]),
    )


def _floats(lists: pa.Array) -> np.ndarray:
    """A copy that can be written to, and that does not hold the whole response."""
    values: np.ndarray = np.array(lists.flatten().to_numpy(zero_copy_only=False), dtype=np.float32)
    return values
