"""The stage that starts the service and asks it as an application would: raw counts in, answers out, over HTTP."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from genescale.client import GenescaleClient
from genescale.perturbation.screening.results import read_screen
from genescale.platform.errors import IntegrityError
from genescale.platform.progress import Progress
from genescale.serving.app import service
from genescale.serving.config import ServingConfig
from genescale.serving.demo.plan import MODEL_NAME, Demo
from genescale.serving.demo.stages import Made, corpus_of, ingested
from genescale.training.embeddings import read_embeddings

SHOWN_NUMBERS = 6


def ask_service(demo: Demo, progress: Progress) -> Made:
    """Serve the registered model, ask for one embedding and one deletion, and compare with the offline results.

    The cell is sent as raw counts read from the atlas file, so tokens are made anew by the service: agreement with the
    corpus is agreement of ingestion and serving. Raises IntegrityError when the answers are not those computed offline.
    """
    progress.start(4, "steps")
    position, edit = asked_cell(demo)
    cell = raw_cell(demo, position)
    progress.advance(1, "starting Ray Serve")
    config = ServingConfig(port=0, cache=str(demo.work.folder("models")))
    with service(f"models:/{MODEL_NAME}@newest", config, demo.settings) as running:
        progress.advance(1, running.url)
        with GenescaleClient(running.url) as client:
            embedded = client.embeddings([cell])
            progress.advance(1, "POST /v1/embeddings")
            perturbed = client.perturbations([cell], [{"kind": "delete", "genes": edit["genes"]}])
            progress.advance(1, "POST /v1/perturbations")
    answer = perturbed.cells[0].edits[0]
    _, offline_nd = read_embeddings(str(demo.made("embed")["uri"]), demo.store)
    difference = float(np.abs(embedded.embeddings[0] - offline_nd[position]).max())
    screened = float(edit["shift"])
    if difference > 1e-5 or answer.shift is None or abs(answer.shift - screened) > 1e-5:
        raise IntegrityError(
            f"service and offline run differ: embedding by {difference:.2g}, shift {answer.shift} and {screened}.",
            where=str(cell["id"]),
            fix="Please report this with the work folder's state.json.",
        )
    report = embedded.cells[0]
    return {
        "cell": cell["id"],
        "genes_sent": len(cell["counts"]),
        "genes_ranked": report.n_genes,
        "genes_ignored": dict(report.ignored_by_reason),
        "tokens": report.n_tokens,
        "cropped": report.cropped,
        "embedding": embedded.embeddings[0][:SHOWN_NUMBERS].tolist(),
        "width": int(embedded.embeddings.shape[1]),
        "embedding_difference": difference,
        "deleted": edit["symbol"],
        "genes": list(edit["genes"]),
        "rank": dict(answer.found),
        "shift": answer.shift,
        "screen_shift": screened,
        "model": {"name": embedded.model.name, "version": embedded.model.version, "digest": embedded.model.digest},
        "milliseconds": {"embedding": vars(embedded.timings_ms), "deletion": vars(perturbed.timings_ms)},
    }


def asked_cell(demo: Demo) -> tuple[int, dict[str, Any]]:
    """Position in the corpus of the screen's most shifted cell, and the edit that shifted it."""
    shifts = read_screen(str(demo.made("screen")["uri"]), demo.store).cell_shifts
    strongest = (
        shifts.filter(
            (pl.col("role") == "edit")
            & (pl.col("outcome") == "edited")
            & ~pl.col("gene_id").str.contains("+", literal=True)
        )
        .sort(["shift", "dataset_id", "source_row"], descending=[True, False, False])
        .row(0, named=True)
    )
    keys = corpus_of(demo).cells(["dataset_id", "source_row"])
    at = (keys["dataset_id"].to_numpy(zero_copy_only=False) == strongest["dataset_id"]) & (
        keys["source_row"].to_numpy() == strongest["source_row"]
    )
    edit = {"genes": [strongest["gene_id"]], "symbol": strongest["symbol"], "shift": strongest["shift"]}
    return int(np.flatnonzero(at)[0]), edit


def raw_cell(demo: Demo, position: int) -> dict[str, Any]:
    """One cell as an application would send it: its id and the raw count of every gene its atlas file has for it."""
    from genescale.ingestion.annotation.gene_columns import candidates
    from genescale.ingestion.counts import checked
    from genescale.ingestion.opening import open_atlas

    corpus = corpus_of(demo)
    row = corpus.cells(["cell_id", "dataset_id", "source_row"]).slice(position, 1).to_pylist()[0]
    source = next(record for record in ingested(demo) if record["dataset_id"] == row["dataset_id"])
    start = int(row["source_row"])
    counts: dict[str, int] = {}
    with open_atlas(source["uri"], demo.store, counts_slot=source["counts_slot"]) as atlas:
        block = checked(atlas, start, start + 1)
        genes = candidates(atlas.var, source["gene_column"])[source["gene_column"]]
    for index, count in zip(block.indices.tolist(), block.counts.tolist(), strict=True):
        counts[genes[index]] = counts.get(genes[index], 0) + int(count)
    return {"id": row["cell_id"], "counts": counts}
