"""A screen: edits times cells of a corpus, on Ray, into Parquet.

The plan is cut into units of cells with their edits. A worker takes a unit, embeds each cell once and its edited
variants, and writes the unit's own files; nothing but counts travels back. Units that an earlier run finished are not
computed again, and the record that is written last makes the screen complete.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from genescale.ingestion.corpus import Corpus
from genescale.perturbation.readouts.states import States
from genescale.perturbation.screening import results
from genescale.perturbation.screening.gene_shifts import GENE_SHIFTS, MASKED_GENES, merge_pairs, remove_moments
from genescale.perturbation.screening.job import Job, run_here
from genescale.perturbation.screening.plan import Plan, make_plan
from genescale.perturbation.screening.results import ScreenReport as ScreenReport
from genescale.perturbation.screening.results import read_screen as read_screen
from genescale.perturbation.screening.screen_readouts import (
    check_head,
    classes_of,
    described,
    digests,
    given_states,
    states_of,
)
from genescale.perturbation.screening.shown_units import ShownUnits, measured, tracked
from genescale.perturbation.screening.spec import ScreenConfig as ScreenConfig
from genescale.platform.bundle import Bundle
from genescale.platform.errors import NotFoundError
from genescale.platform.progress import SILENT, Progress
from genescale.platform.runs import Run, Tracker
from genescale.platform.storage import Store, join


def screen(
    bundle: Bundle,
    corpus: Corpus,
    config: ScreenConfig,
    *,
    out_uri: str,
    store: Store,
    states: States | None = None,
    head: Bundle | None = None,
    tracker: Tracker | None = None,
    plan: Plan | None = None,
    progress: Progress = SILENT,
) -> ScreenReport:
    """Try the edits of `config` on cells of `corpus` and write all shifts below `out_uri`.

    Ray must be running, unless the config says to run in this process.
    `states` take the place of those that the config names; `head` is the bundle of `readouts.head`; `plan` is what
    `planned` made of the same arguments. The same call again continues what was interrupted, and returns at once when
    it is complete. Raises InputError when another screen stands at `out_uri`, and what `make_plan` and `perturb_cells`
    raise.
    """
    began = time.monotonic()
    check_head(config, head)
    given = given_states(config, bundle, store, states=states)
    plan = plan or planned(
        bundle, corpus, config, out_uri=out_uri, store=store, states=given, head=head, gpus=gpus_of_run(config)
    )
    if (done := results.finished(plan, out_uri, store)) is not None:
        remove_moments(plan, out_uri, store)
        return dataclasses.replace(done, n_units_reused=done.n_units)
    begun = results.read_claim(out_uri, store)
    with tracked(tracker, plan, config, uri=out_uri, resume="" if begun is None else begun.run_id) as run:
        results.claim(plan, out_uri, store, run_id="" if run is None else run.id)
        kept = states_of(given, bundle, corpus, config, uri=out_uri, store=store, progress=progress)
        job = Job(corpus=corpus, config=config, plan=plan, states=kept, uri=out_uri, store=store)
        reused = results.finished_units(out_uri, store)
        shown = ShownUnits(plan, reused, progress, run)
        for unit in _worked_off(bundle, head, job, [unit for unit in range(plan.n_units) if unit not in reused]):
            shown.done(unit)
        report = _completed(job, head=head, n_units_reused=len(reused), began=began, run=run)
        remove_moments(plan, out_uri, store)
        if run is not None:
            run.log_metrics(measured(report))
            run.log_text(store.read(join(out_uri, results.RECORD_FILE)).decode(), f"screen/{results.RECORD_FILE}")
    return report


def planned(
    bundle: Bundle,
    corpus: Corpus,
    config: ScreenConfig,
    *,
    out_uri: str,
    store: Store,
    states: States | None = None,
    head: Bundle | None = None,
    gpus: int = 0,
) -> Plan:
    """The plan of a screen at `out_uri`, in the units that it was begun with there; `states` as `given_states` says.

    Nothing is written. Raises InputError when another screen stands there, and what `make_plan` raises.
    """
    found = results.read_claim(out_uri, store)
    plan = make_plan(
        bundle,
        corpus,
        config,
        store=store,
        # A screen goes on in the units it was begun with, whatever machine it goes on with.
        tokens_per_unit=0 if found is None or config.compute.tokens_per_unit else found.tokens_per_unit,
        on_gpu=gpus > 0,
        origin=digests(states, head),
    )
    if found is not None:
        results.check_claim(found, plan, out_uri)
    return plan


def _worked_off(bundle: Bundle, head: Bundle | None, job: Job, units: list[int]) -> Iterator[int]:
    if not units:
        return iter(())
    if job.config.compute.run_in == "process":
        return run_here(bundle, head, job, units)
    from genescale.perturbation.screening.ray_workers import run_on_ray

    return run_on_ray(bundle, head, job, units)


def gpus_of_run(config: ScreenConfig) -> int:
    """GPUs that the screen may use: those of the running cluster, or of this process."""
    if config.compute.run_in == "process":
        return torch.cuda.device_count() if config.compute.device != "cpu" else 0
    from genescale.perturbation.screening.ray_workers import gpus_of

    return gpus_of(config)


def _completed(job: Job, **about: Any) -> ScreenReport:
    """Write the record; where another run of this screen was first, and removed the sums, the record is that run's."""
    try:
        report = _report(job, **about)
    except NotFoundError:
        done = results.finished(job.plan, job.uri, job.store)
        if done is None:
            raise
        return done
    results.write_report(report, job.store)
    return report


def _report(job: Job, *, head: Bundle | None, n_units_reused: int, began: float, run: Run | None) -> ScreenReport:
    """Add up what the units said, and merge their sums."""
    plan, store, readouts = job.plan, job.store, job.config.readouts
    counts: Counter[str] = Counter()
    parts: dict[str, str] = {}
    edits: set[int] = set()
    worker_s = 0.0
    for unit in range(plan.n_units):
        mark = results.read_mark(job.uri, unit, store)
        counts.update(mark["counts"])
        sums = (results.GENE_MOMENTS, results.MASKED_MOMENTS)
        parts |= {name: digest for name, digest in mark["parts"].items() if not name.startswith(sums)}
        edits.update(mark["edits"])
        worker_s += mark["seconds"]
    n_gene_pairs = n_left_out = n_masked_pairs = 0
    if plan.affected is not None:
        merged = merge_pairs(
            GENE_SHIFTS,
            plan,
            job.uri,
            store,
            n_observed=counts["observed"],
            top_k=readouts.top_k,
            min_cells=readouts.min_cells,
        )
        n_gene_pairs, n_left_out = merged.rows, merged.left_out
        parts[results.GENE_SHIFTS_FILE] = merged.sha256
    if plan.masked is not None:
        merged = merge_pairs(MASKED_GENES, plan, job.uri, store, n_observed=counts["observed_masked"])
        n_masked_pairs, parts[results.MASKED_GENES_FILE] = merged.rows, merged.sha256
    return ScreenReport(
        uri=job.uri,
        digest=plan.digest,
        identity=dict(plan.identity),
        n_cells=len(plan.cells),
        n_edits=len(edits),
        n_pairs=sum(counts[name] for name in results.OUTCOMES),
        n_controls=counts["controls"],
        n_controls_missing=counts["controls_missing"],
        n_not_chosen=counts["not_chosen"],
        n_gene_pairs=n_gene_pairs,
        n_gene_pairs_left_out=n_left_out,
        n_masked_pairs=n_masked_pairs,
        n_units=plan.n_units,
        n_units_reused=n_units_reused,
        n_sequences=counts["sequences"],
        left_out=dict(plan.left_out),
        seconds=time.monotonic() - began,
        worker_seconds=worker_s,
        states=described(job.states),
        classes=[] if head is None else list(classes_of(job.config, head)),
        run_id="" if run is None else run.id,
        parts=parts,
        **{f"n_{outcome}": counts[outcome] for outcome in results.OUTCOMES},
    )
