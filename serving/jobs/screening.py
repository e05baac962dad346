"""The job that runs a screen: edits of cells of a corpus, their effects, and the report."""

from __future__ import annotations

from genescale.platform.storage import join
from genescale.serving.jobs.asked import config_of
from genescale.serving.jobs.embedding import merge_parquet, pinned
from genescale.serving.jobs.records import File
from genescale.serving.jobs.tracked import OneRun
from genescale.serving.jobs.work import Desk

CELL_SHIFTS_FILE, FOLDER = "cell_shifts.parquet", "screen"
# Files of a screen and its report that callers see, under these names; others are kept for going on with it.
SHOWN = ("effects.parquet", "effects.csv", "gene_shifts.parquet", "masked_genes.parquet", "report.html", "_screen.json")


def screen(desk: Desk) -> tuple[File, ...]:
    """Try every edit; units that an earlier attempt wrote are not computed again."""
    from genescale.perturbation.reports.report import report as write_report
    from genescale.perturbation.screening.plan import check_names
    from genescale.perturbation.screening.screen import screen as run_screen
    from genescale.perturbation.screening.screen_readouts import given_states

    serving = desk.config
    spread = serving.jobs.spread
    config = config_of(
        desk.asked,
        device=serving.device if serving.device in ("auto", "cpu", "cuda") else "cuda",
        run_in="cluster" if spread else "process",
        workers=spread,
        tokens_per_batch=serving.tokens_per_batch,
        attention=serving.attention,
    )
    check_names(config, desk.bundle.vocabulary, desk.store)
    corpus, folder = pinned(desk, desk.asked["corpus"]), join(desk.results, FOLDER)
    done = run_screen(
        desk.bundle,
        corpus,
        config,
        out_uri=folder,
        store=desk.store,
        states=given_states(config, desk.bundle, desk.store),
        head=desk.bundle if config.readouts.head else None,
        tracker=OneRun(desk.run),  # type: ignore[arg-type]
        progress=desk.pace,
    )
    desk.pace.check()
    made = write_report(folder, desk.store)
    shifts = sorted(name for name in done.parts if name.startswith("cell_shifts/"))
    merged = merge_parquet([join(folder, name) for name in shifts], desk, CELL_SHIFTS_FILE)
    there = {*done.parts, *made.files, "_screen.json"}
    return (merged, *(desk.kept(name.lstrip("_"), f"{FOLDER}/{name}") for name in SHOWN if name in there))
