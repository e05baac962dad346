"""A screen: edits times cells of a corpus, on Ray, into Parquet.

Legend: `n` chosen cells, `p` pairs of (edit, affected gene).

The plan is cut into units of a few cells with all their edits. A worker takes a unit, embeds each cell once and its
edited variants, and writes the unit's own part; nothing but counts travels back. Units that an earlier run finished are
not computed again, and the record that is written last makes the screen complete.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import ray
import ray.data
import ray.exceptions
import torch

from genescale.ingestion.corpus import Corpus
from genescale.perturbation.perturb import CellEmbedder, EditAnswer, EditRequest, perturb_cells
from genescale.perturbation.screening import results
from genescale.perturbation.screening.moments import Moments, fold, merge, observed
from genescale.perturbation.screening.plan import Plan, make_plan
from genescale.perturbation.screening.plan import ScreenConfig as ScreenConfig
from genescale.perturbation.screening.results import Screen as Screen
from genescale.perturbation.screening.results import ScreenReport as ScreenReport
from genescale.perturbation.screening.results import outcome_of, unit_file
from genescale.perturbation.screening.results import read_screen as read_screen
from genescale.perturbation.statistics.effects import summarise as summarise
from genescale.platform.bundle import Bundle
from genescale.platform.errors import ClusterError, GenescaleError, SettingsError
from genescale.platform.progress import SILENT, Progress
from genescale.platform.storage import Store, join
from genescale.training.embed import original_error
from genescale.training.embedder import Embedder
from genescale.training.freight import Received, ship


def screen(
    bundle: Bundle,
    corpus: Corpus,
    config: ScreenConfig,
    *,
    out_uri: str,
    store: Store,
    goal: np.ndarray | None = None,
    progress: Progress = SILENT,
) -> ScreenReport:
    """Try the edits of `config` on cells of `corpus` and write all shifts below `out_uri`. Ray must be running.

    `goal` is a state's mean embedding `(d,)`, see `perturb_cell`. The same call again continues what was interrupted,
    and returns at once when it is complete. Raises InputError when another screen stands at `out_uri`, and what
    `make_plan` and `perturb_cell` raise.
    """
    began = time.monotonic()
    plan = make_plan(bundle, corpus, config, goal=goal)
    if (done := results.finished(plan, out_uri, store)) is not None:
        return dataclasses.replace(done, n_units_reused=done.n_units)
    results.claim(plan, out_uri, store)
    job = _Job(corpus=corpus, config=config, plan=plan, goal=goal, uri=out_uri, store=store)
    reused = _finished_units(job)
    progress.start(plan.n_pairs, "cell-gene pairs")
    progress.advance(_pairs_of(plan, reused))
    _run_units(bundle, job, [unit for unit in range(plan.n_units) if unit not in reused], progress)
    report = _report(job, n_units_reused=len(reused), began=began)
    results.write_report(report, store)
    return report


@dataclass(frozen=True, kw_only=True, eq=False)
class _Job:
    """What every worker of one screen needs; travels to it once."""

    corpus: Corpus
    config: ScreenConfig
    plan: Plan
    goal: np.ndarray | None
    uri: str
    store: Store


class _Worker:
    """A Ray Data actor: holds the embedder and works off units."""

    def __init__(self, shipped: Any, job: Any) -> None:
        self.job: _Job = ray.get(job)
        self.received = Received(shipped)
        config = self.job.config
        # An actor has one processor; more threads (an inherited setting) would fight each other for it.
        torch.set_num_threads(1)
        self.embedder = Embedder.load(
            self.received.bundle,
            device="auto" if torch.cuda.is_available() and config.device != "cpu" else "cpu",
            tokens_per_batch=config.tokens_per_batch,
            attention=config.attention,
        )

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        for unit in batch["unit"].tolist():
            run_unit(self.job, unit, self.embedder)
        return batch


def run_unit(job: _Job, unit: int, embedder: CellEmbedder) -> None:
    """Answer all edits on the cells of one unit and write its parts, the one that marks it finished last."""
    plan, vocabulary = job.plan, embedder.vocabulary
    rows = plan.cells.filter(pl.col("unit") == unit)
    cells = job.corpus.tokens(rows["cell"].to_list())
    requests = [_requests(plan, job.config, tokens_t, vocabulary.special.values()) for tokens_t in cells]
    answers = perturb_cells(
        embedder,
        cells,
        requests,
        layer=job.config.layer,
        measure=job.config.measure,
        goal=job.goal,
        gene_shifts_of=plan.affected,
    )
    if plan.affected is not None:
        moments = fold(_observed(plan, of_cell) for of_cell in answers)
        job.store.write(unit_file(job.uri, "gene_moments", unit), results.moments_part(moments))
    part = results.cell_shifts_part(rows.to_dicts(), answers, vocabulary)
    job.store.write(unit_file(job.uri, "cell_shifts", unit), part)


def _requests(plan: Plan, config: ScreenConfig, tokens_t: np.ndarray, special: Any) -> list[EditRequest]:
    genes = plan.edits or [(token,) for token in tokens_t.tolist() if token not in special]
    return [EditRequest(kind=config.kind, genes=edit) for edit in genes]


def _observed(plan: Plan, answers: Sequence[EditAnswer]) -> Moments:
    """Gene cosines of one cell; cells in which a deletion found nothing are no observation."""
    position = {edit: at for at, edit in enumerate(plan.edits)}
    edited = [answer for answer in answers if outcome_of(answer) == "edited"]
    if not edited:
        return merge([])
    edits = [position[one.request.genes] if position else one.request.genes[0] for one in edited]
    return observed(
        np.repeat(np.array(edits), [len(one.gene_tokens) for one in edited]),
        np.concatenate([one.gene_tokens for one in edited]),
        np.concatenate([one.gene_cosine_values for one in edited]),
    )


def _finished_units(job: _Job) -> set[int]:
    present = {entry.uri.rpartition("/")[2] for entry in job.store.list(join(job.uri, "cell_shifts"))}
    units = range(job.plan.n_units)
    return {unit for unit in units if unit_file(job.uri, "cell_shifts", unit).rpartition("/")[2] in present}


def _pairs_of(plan: Plan, units: set[int]) -> int:
    return int(plan.cells.filter(pl.col("unit").is_in(list(units)))["n_edits"].sum())


def _run_units(bundle: Bundle, job: _Job, units: list[int], progress: Progress) -> None:
    """Work off `units` on a pool of actors, one GPU each where there are GPUs, else one processor each."""
    if not units:
        return
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0)) if job.config.device != "cpu" else 0
    if job.config.device == "cuda" and not gpus:
        raise SettingsError("this Ray cluster has no GPU.", where="device", fix="Use device 'auto' or 'cpu'.")
    pool = max(1, min(len(units), gpus or int(resources.get("CPU", 1))))
    done = ray.data.from_items([{"unit": unit} for unit in units], override_num_blocks=len(units)).map_batches(
        _Worker,
        batch_size=1,
        fn_constructor_args=(ship(bundle), ray.put(job)),
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=pool, initial_size=pool),
        num_cpus=0 if gpus else 1,
        num_gpus=1 if gpus else 0,
    )
    # Otherwise Ray Data wraps what a worker raised, and the cause is lost on its way here.
    done.context.raise_original_map_exception = True
    try:
        for row in done.iter_rows():
            progress.advance(_pairs_of(job.plan, {row["unit"]}), note=f"unit {row['unit'] + 1} of {job.plan.n_units}")
    except ray.exceptions.RayError as error:
        if isinstance(ours := original_error(error), GenescaleError):
            raise ours from error
        raise ClusterError(
            f"a worker failed: {error}.", where=job.uri, fix="Run the same command again: finished units are kept."
        ) from error


def _report(job: _Job, *, n_units_reused: int, began: float) -> ScreenReport:
    """Read back what the units wrote: merge the moments, count, and take the digests."""
    plan, store = job.plan, job.store
    digests: dict[str, str] = {}

    def read(kind: str) -> Iterator[bytes]:
        for unit in range(plan.n_units):
            address = unit_file(job.uri, kind, unit)
            data = store.read(address)
            digests[f"{kind}/{address.rpartition('/')[2]}"] = hashlib.sha256(data).hexdigest()
            yield data

    counts = dict.fromkeys(results.OUTCOMES, 0)
    edits: set[str] = set()
    for data in read("cell_shifts"):
        table = pl.read_parquet(io.BytesIO(data), columns=["gene_id", "outcome"])
        edits.update(table["gene_id"].unique())
        for outcome, rows in table.group_by("outcome").len().iter_rows():
            counts[outcome] += rows
    n_gene_pairs = 0
    if plan.affected is not None:
        moments = fold(results.read_moments(data) for data in read("gene_moments"))
        content = results.parquet_of(results.gene_shifts_table(moments, plan, job.corpus.vocabulary))
        store.write(join(job.uri, results.GENE_SHIFTS_FILE), content)
        digests[results.GENE_SHIFTS_FILE] = hashlib.sha256(content).hexdigest()
        n_gene_pairs = len(moments.edit_p)
    return ScreenReport(
        uri=job.uri,
        digest=plan.digest,
        identity=plan.identity,
        n_cells=len(plan.cells),
        n_edits=len(edits),
        n_pairs=sum(counts.values()),
        n_gene_pairs=n_gene_pairs,
        n_units=plan.n_units,
        n_units_reused=n_units_reused,
        seconds=time.monotonic() - began,
        parts=digests,
        **{f"n_{outcome}": count for outcome, count in counts.items()},
    )
