"""The demo's report: one HTML page with what was made, what was measured, and what of the planted truth was found.

Every number on the page is read from what the stages recorded or from their results; no sentence claims more than the
number beside it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from genescale.perturbation.reports.figures import draw_screen
from genescale.perturbation.screening.results import read_screen
from genescale.platform.progress import Progress, clock
from genescale.serving.demo import figures
from genescale.serving.demo.page import Page, shown
from genescale.serving.demo.plan import Demo
from genescale.serving.demo.screening import describe_truth
from genescale.serving.demo.stages import Made
from genescale.training.embeddings import read_embeddings

UNLABELLED = "(no label)"
MOST_LABELS = 20


def write_report(demo: Demo, progress: Progress) -> Made:
    """Draw the figures and write report/report.html."""
    folder = demo.work.folder("report")
    page = Page(
        "Genescale demo: from atlas to answers",
        "One run through every stage: ingestion, pretraining, embedding, a cell-type head, a deletion screen, serving.",
    )
    sections = (_overview, _corpus, _pretraining, _embedding, _head, _screen, _service, _lineage)
    progress.start(len(sections), "sections")
    for section in sections:
        section(demo, page, folder)
        progress.advance()
    path = folder / "report.html"
    path.write_text(page.html(), encoding="utf-8")
    return {"path": str(path), "figures": sorted(file.name for file in folder.glob("*.png"))}


def findings(demo: Demo) -> dict[str, str]:
    """One short line per finished stage."""
    return {name: LINES[name](stage["made"]) for name, stage in demo.work.stages.items()}


def _pretrain_line(made: Made) -> str:
    before, after = made["held_out_before"], made["held_out_after"]
    change = f"held-out loss {before['loss']:.2f} -> {after['loss']:.2f}" if before and after else "no held-out cells"
    return f"{made['steps']:,} steps, {shown(made['tokens_per_s'])} tokens/s, {change}"


def _head_line(made: Made) -> str:
    if "skipped" in made:
        return str(made["skipped"])
    return f"macro F1 {made['macro_f1']:.3f} ({made['split']} split; majority class {made['majority_macro_f1']:.3f})"


def _screen_line(made: Made) -> str:
    line = f"{made['edited']:,} deletions in {made['cells']:,} cells"
    return f"{line}; {made['truth']['headline']}" if made.get("truth") else line


LINES: dict[str, Callable[[Made], str]] = {
    "atlas": lambda made: f"{len(made['files'])} files",
    "vocabulary": lambda made: f"{made['genes']:,} genes, window {made['window']:,}",
    "ingest": lambda made: f"{made['cells']:,} cells kept, {made['dropped']:,} dropped, {made['tokens']:,} tokens",
    "pretrain": _pretrain_line,
    "embed": lambda made: f"{made['cells']:,} cells, {shown(made['tokens_per_s'])} tokens/s",
    "head": _head_line,
    "screen": _screen_line,
    "ask": lambda made: f"HTTP and offline embeddings differ by {made['embedding_difference']:.1g}",
    "report": lambda made: f"{len(made['figures'])} figures",
}


def _overview(demo: Demo, page: Page, folder: Path) -> None:
    page.heading("Stages")
    lines = findings(demo)
    rows = [
        [name, clock(demo.work.stages[name]["elapsed_s"]), line] for name, line in lines.items() if name != "report"
    ]
    page.table(["stage", "time (m:ss)", "result"], rows)


def _corpus(demo: Demo, page: Page, folder: Path) -> None:
    made, vocabulary = demo.made("ingest"), demo.made("vocabulary")
    page.heading("Corpus")
    page.text(
        f"Version {made['version']} of the corpus holds {made['cells']:,} cells and {made['tokens']:,} tokens "
        f"(mean length {made['mean_length']:.0f}), ranked with the vocabulary '{vocabulary['name']}' of "
        f"{vocabulary['genes']:,} genes. Every cell that was read was kept or dropped for a reason:"
    )
    columns = ["file", "outcome", "read", "kept", "dropped", "why dropped", "genes mapped", "genes not in vocabulary"]
    page.table(columns, [_source_row(source) for source in made["sources"]])


def _source_row(source: dict[str, Any]) -> list[Any]:
    why = ", ".join(f"{reason}: {count:,}" for reason, count in source["dropped"].items()) or "–"
    name = str(source["uri"]).rsplit("/", 1)[-1]
    outcome = source["status"].replace("_", " ")
    if source.get("failure"):
        outcome = f"{outcome}: {source['failure']['message']}"
    dropped = sum(source["dropped"].values())
    mapped, other = source["genes_mapped"], source["genes_dropped"]
    return [name, outcome, source["read"], source["kept"], dropped, why, mapped, other]


def _pretraining(demo: Demo, page: Page, folder: Path) -> None:
    made = demo.made("pretrain")
    page.heading("Pretraining")
    before, after = made["held_out_before"], made["held_out_after"]
    measured = ""
    if before and after:
        measured = (
            f" On cells kept from training the masked-gene loss went from {before['loss']:.3f} to {after['loss']:.3f} "
            f"nats; the share of masked genes named exactly, from {before['masked_accuracy']:.1%} to "
            f"{after['masked_accuracy']:.1%}."
        )
    page.text(
        f"{made['steps']:,} optimiser steps on {made['workers']} Ray Train workers with DeepSpeed, "
        f"{shown(made['tokens_per_s'])} real tokens per second.{measured}"
    )
    held_out = {0: before["loss"], made["steps"]: after["loss"]} if before and after else {}
    if made["losses"]:
        steps, losses = zip(*made["losses"], strict=True)
        image = figures.loss_curve(steps, losses, held_out, folder / "loss.png")
        page.figure(
            image,
            "Masked-gene loss during pretraining. Held-out cells are always measured with 15% of the genes hidden (of "
            "those 80% by the mask, 10% by a random gene); a recipe may train with other shares.",
        )
    recipe = made["recipe"]
    chosen = ("encoder.layers", "encoder.width", "encoder.heads", "optimizer.learning_rate", "token_budget", "lanes")
    page.table(["setting", "value"], [[name, recipe[name]] for name in chosen])


def _embedding(demo: Demo, page: Page, folder: Path) -> None:
    made = demo.made("embed")
    table, embeddings_nd = read_embeddings(made["uri"], demo.store)
    labels = [value or UNLABELLED for value in table[demo.config.label].to_pylist()]
    if len(set(labels)) > MOST_LABELS:
        names, counts = np.unique(labels, return_counts=True)
        kept = set(names[np.argsort(-counts, kind="stable")[: MOST_LABELS - 1]])
        labels = [label if label in kept else "(other)" for label in labels]
    page.heading("Embeddings")
    page.text(
        f"{made['cells']:,} cells, {embeddings_nd.shape[1]} numbers each: the mean over a cell's genes of the second "
        f"to last layer. They are also in obsm['X_genescale'] of {', '.join(made['h5ad'])} in the folder 'embedded'."
    )
    image = figures.embedding_map(embeddings_nd, labels, folder / "map.png", seed=demo.config.seed)
    page.figure(image, f"t-SNE of the embeddings, coloured by {demo.config.label}; the encoder never saw these labels.")


def _head(demo: Demo, page: Page, folder: Path) -> None:
    made = demo.made("head")
    page.heading("Cell-type head")
    if "skipped" in made:
        page.text(f"Not fitted: {made['skipped']}.")
        return
    kind = "donors that were not trained on" if made["split"] == "grouped" else "cells drawn at random"
    page.text(
        f"On {kind}: macro F1 {made['macro_f1']:.3f} and accuracy {made['accuracy']:.3f}; always answering with the "
        f"most frequent class scores {made['majority_macro_f1']:.3f} and {made['majority_accuracy']:.3f}."
    )
    confusion = np.array(made["confusion"], dtype=np.int64)
    image = figures.confusion_matrix(confusion, made["classes"], folder / "confusion.png")
    page.figure(image, "Test cells by true and predicted class; the shade is the share of the true class.")
    columns = ["class", "precision", "recall", "F1", "test cells"]
    rows = [[c["name"], c["precision"], c["recall"], c["f1"], c["support"]] for c in made["per_class"]]
    page.table(columns, rows)


def _screen(demo: Demo, page: Page, folder: Path) -> None:
    made = demo.made("screen")
    page.heading("Deletion screen")
    page.text(
        f"{made['edits']} deletions were tried on {made['cells']:,} cells: {made['edited']:,} cell-gene pairs had the "
        f"gene, {made['absent']:,} did not. A cell's shift is 1 minus the mean cosine, before and after, of the genes "
        "that remain."
    )
    screen = read_screen(made["uri"], demo.store)
    image = folder / "screen.png"
    draw_screen(screen.cell_shifts).savefig(image, dpi=figures.DPI)
    page.figure(image, "Shift of the cell by deleted gene, with 95% intervals, and by cell type.")
    if made.get("truth"):
        describe_truth(made["truth"], page, folder)


def _service(demo: Demo, page: Page, folder: Path) -> None:
    made = demo.made("ask")
    page.heading("Asked over HTTP")
    ignored = ", ".join(f"{reason}: {count:,}" for reason, count in made["genes_ignored"].items()) or "none"
    page.text(
        f"The service was given the raw counts of cell {made['cell']} ({made['genes_sent']:,} genes) and ranked "
        f"{made['genes_ranked']:,} of them (ignored: {ignored}). Its embedding differs from the one computed offline "
        f"by at most {made['embedding_difference']:.2g}. Deleting {made['deleted']} shifts the cell by "
        f"{made['shift']:.6g}; the screen found {made['screen_shift']:.6g}."
    )
    numbers = ", ".join(f"{value:.4f}" for value in made["embedding"])
    page.code(
        "POST /v1/embeddings     -> embedding of "
        f"{made['width']} numbers: [{numbers}, …]\n"
        f'POST /v1/perturbations  {{"edits": [{{"kind": "delete", "genes": {json.dumps(made["genes"])}}}]}}\n'
        f"                        -> rank {json.dumps(made['rank'])}, shift {made['shift']:.6g}"
    )


def _lineage(demo: Demo, page: Page, folder: Path) -> None:
    vocabulary, ingest, pretrain, ask = (demo.made(name) for name in ("vocabulary", "ingest", "pretrain", "ask"))
    page.heading("Where the answers come from")
    rows = [
        ["model", f"{ask['model']['name']} version {ask['model']['version']}"],
        ["model digest", pretrain["digest"]],
        ["vocabulary digest", vocabulary["digest"]],
        ["corpus", f"{ingest['uri']} version {ingest['version']}"],
        ["MLflow run", pretrain["run_id"]],
    ]
    page.table(["what", "value"], rows)
