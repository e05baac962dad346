"""In-silico perturbation from Python: a model, an AnnData, and a table of effects.

    from genescale.perturbation.perturber import Perturber

    perturber = Perturber.open("models:/genescale@champion")
    effects = perturber.screen(adata, delete="all", cells="cell_type == 'monocyte'", toward=("disease", "normal"))

Everything runs in this process, without a cluster: the cells are ranked by the functions of ingestion, planned and
answered by those of `genescale perturb screen`, and tested by the same statistics, so the same cells give the same
numbers on either way. For atlases, and to survive an interruption, take the command.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from genescale.perturbation.readouts.shift import Measure
from genescale.perturbation.screening.spec import (
    NO_GENE,
    CellsConfig,
    EditsConfig,
    ReadoutsConfig,
    ScreenConfig,
    StatesConfig,
)
from genescale.platform.errors import InputError
from genescale.platform.progress import SILENT, Progress
from genescale.platform.settings import build

if TYPE_CHECKING:
    from genescale.ingestion.config import IngestConfig
    from genescale.ingestion.corpus import Corpus
    from genescale.ingestion.formats.memory_anndata import AnnData
    from genescale.perturbation.readouts.states import States
    from genescale.perturbation.reports.screen_tables import ScreenTables
    from genescale.perturbation.screening.plan import Plan
    from genescale.perturbation.screening.two_pass import TwoPassConfig
    from genescale.platform.bundle import Bundle
    from genescale.platform.settings import Settings
    from genescale.platform.storage import Store
    from genescale.training.embedder import Embedder, Layer
    from genescale.training.heads.predict import HeadModel

Genes = str | Sequence[str] | Mapping[str, Sequence[str]]
"""`"all"`, a gene, genes (`A+B` together), or named sets of genes that are edited together."""
Toward = tuple[str, str] | tuple[str, str, str] | Mapping[str, Any]
"""(column, goal), (column, goal, start), or the keys of a screen's `states`: column, start, goal, alternatives."""
KINDS = ("delete", "overexpress", "inhibit", "activate")
EVERY = "all"


@dataclass(frozen=True, kw_only=True, eq=False)
class Perturber:
    """A model that is ready to answer what edits do to cells; make it with `Perturber.open`."""

    embedder: Embedder
    store: Store
    settings: Settings
    head: HeadModel | None = None

    @classmethod
    def open(
        cls,
        model: str,
        *,
        head: str = "",
        device: str = "auto",
        attention: str = "auto",
        settings: Settings | None = None,
    ) -> Perturber:
        """The model behind `models:/NAME@ALIAS`, `models:/NAME/VERSION`, or a bundle folder.

        head: a fitted model whose class probabilities are read beside the shift. Raises NotFoundError, IntegrityError
        or TrackingError for models that cannot be had, and InputError for a head of another vocabulary.
        """
        from genescale.perturbation.answers import Readouts
        from genescale.platform.settings import load_settings
        from genescale.platform.storage import Store
        from genescale.platform.tracking import fetch_bundle
        from genescale.training.embedder import Embedder
        from genescale.training.heads.predict import load_heads

        settings = settings or load_settings()
        scratch = tempfile.TemporaryDirectory(prefix="genescale-", ignore_cleanup_errors=True)
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(scratch))
            bundle = fetch_bundle(model, settings, folder)
            embedder = Embedder.load(bundle, device=device, attention=attention)
            heads = load_heads(fetch_bundle(head, settings, folder), device=device) if head else None
            Readouts(head=heads).check(embedder)
            made = cls(embedder=embedder, store=Store(settings.storage), settings=settings, head=heads)
            # A fetched bundle is read again when its digest is asked for, so its folder lives as long as the perturber.
            weakref.finalize(made, stack.pop_all().close)
        return made

    @property
    def bundle(self) -> Bundle:
        """The model."""
        return self.embedder.bundle

    def screen(self, cells_of: AnnData | str, **options: Any) -> pl.DataFrame:
        """Effects of edits on the cells of an AnnData, or of the atlas file at an address: a row per edit and read-out.

        Takes the options of `tables`, whose `effects` it returns: `gene_id`, `symbol`, `mean` with its interval,
        `control_mean`, `excess` with its interval, `p`, `q` and more, strongest evidence first within each `readout`.
        """
        return self.tables(cells_of, **options).effects

    def tables(
        self,
        cells_of: AnnData | str,
        *,
        delete: Genes | None = None,
        overexpress: Genes | None = None,
        inhibit: Genes | None = None,
        activate: Genes | None = None,
        quartiles: int | None = None,
        pairs: bool = False,
        cells: str = "",
        max_cells: int = 0,
        toward: Toward | None = None,
        layer: Layer = "second_to_last",
        measure: Measure = "remaining_genes",
        controls: int | None = None,
        two_pass: TwoPassConfig | None = None,
        counts: IngestConfig | None = None,
        seed: int = 0,
        draws: int = 2000,
        progress: Progress = SILENT,
    ) -> ScreenTables:
        """Everything a screen finds: rows per cell and edit, effects, interactions of pairs, and how it was made.

        Exactly one of `delete`, `overexpress`, `inhibit`, `activate` names the genes. cells: a condition in SQL on the
        columns of `obs`; max_cells: so many of them, drawn by `seed`. pairs: also all pairs of the named genes.
        toward: states of all labelled cells of `cells_of`. controls: matched control edits for each edit of a cell
        (default 10; with `"all"` the cell's other genes serve as controls). two_pass: with `delete="all"`, score every
        gene cheaply and delete only those that seem to matter. counts: how the atlas is read, as for
        ingestion. Raises what ingestion raises for cells without raw counts, UnknownGeneError, InputError.
        """
        kind, genes = _one_kind(
            {"delete": delete, "overexpress": overexpress, "inhibit": inhibit, "activate": activate}
        )
        with tempfile.TemporaryDirectory(prefix="genescale-") as folder:
            config = ScreenConfig(
                edits=self._edits(kind, genes, quartiles=quartiles, pairs=pairs, controls=controls, folder=folder),
                cells=CellsConfig(max_cells=max_cells, seed=seed),
                readouts=ReadoutsConfig(
                    layer=layer, measure=measure, states=_states_config(toward), gene_shifts=NO_GENE
                ),
                two_pass=two_pass,
            )
            corpus = self._ranked(cells_of, counts, folder, where=cells)
            states = self._states(cells_of, config, counts, folder)
            plan = self._plan(corpus, config)
            cell_shifts = self._answered(plan, corpus, config, states, progress)
        record = {"identity": _identity(plan, cells_of, cells), "left_out": dict(plan.left_out)}
        from genescale.perturbation.reports.report import screen_tables

        return screen_tables("", cell_shifts, None, record, draws=draws, seed=seed)

    def annotate(self, adata: AnnData, effects: pl.DataFrame) -> None:
        """Put a table of effects into `adata.uns["genescale_perturbation"]`, with the digest of the model."""
        from genescale.perturbation.reports.annotate import annotate_anndata

        annotate_anndata(adata, effects, about={"model_digest": self.bundle.digest})

    def _edits(
        self, kind: str, genes: Genes, *, quartiles: int | None, pairs: bool, controls: int | None, folder: str
    ) -> EditsConfig:
        options: dict[str, Any] = {"kind": kind, "quartiles": quartiles, "controls": controls}
        if isinstance(genes, Mapping):
            path = Path(folder) / "sets.json"
            path.write_text(json.dumps({name: list(members) for name, members in genes.items()}), encoding="utf-8")
            options["sets"] = str(path)
        elif genes == EVERY:
            options["all"] = True
        else:
            options["pairs" if pairs else "genes"] = (genes,) if isinstance(genes, str) else tuple(genes)
        if pairs and "pairs" not in options:
            raise InputError(
                "pairs are made of listed genes.", where="pairs", fix='Name genes: delete=["A", "B", "C"].'
            )
        return EditsConfig(**options)

    def _ranked(
        self, cells_of: AnnData | str, counts: IngestConfig | None, folder: str, *, where: str = "", keep: str = ""
    ) -> Corpus:
        """The cells that fulfil `where`, ranked with the model's vocabulary; `keep` is an obs column to keep."""
        import dataclasses

        from genescale.ingestion.config import IngestConfig
        from genescale.ingestion.local_corpus import local_corpus

        config = counts or IngestConfig()
        config = dataclasses.replace(
            config,
            where=" AND ".join(f"({one})" for one in (config.where, where) if one),
            keep_obs=tuple(dict.fromkeys((*config.keep_obs, *([keep] if keep else [])))),
        )
        name = "states" if keep else "cells"
        return local_corpus(cells_of, f"{folder}/{name}", self.embedder.vocabulary, self.store, config=config).corpus

    def _states(
        self,
        cells_of: AnnData | str,
        config: ScreenConfig,
        counts: IngestConfig | None,
        folder: str,
    ) -> States | None:
        from genescale.perturbation.readouts.states import States
        from genescale.perturbation.screening.screen_readouts import pooling_of

        wanted = config.readouts.states
        if wanted is None:
            return None
        labelled = self._ranked(cells_of, counts, folder, keep=wanted.column)
        return States.of_corpus(
            self.embedder,
            labelled,
            f"labels.{wanted.column}",
            start=wanted.start,
            goal=wanted.goal,
            alternatives=wanted.alternatives,
            layer=config.readouts.layer,
            pooling=pooling_of(config.readouts),
            max_cells=wanted.max_cells,
            seed=config.cells.seed,
        )

    def _plan(self, corpus: Corpus, config: ScreenConfig) -> Plan:
        from genescale.perturbation.screening.plan import make_plan

        return make_plan(self.bundle, corpus, config, store=self.store, on_gpu=self.embedder.device.type == "cuda")

    def _answered(
        self, plan: Plan, corpus: Corpus, config: ScreenConfig, states: States | None, progress: Progress
    ) -> pl.DataFrame:
        from genescale.perturbation.screening.screen_readouts import readouts_of
        from genescale.perturbation.screening.unit_work import UnitWorker

        worker = UnitWorker(plan, self.embedder, readouts_of(config, plan, states, self.head))
        progress.start(plan.n_units, "units of cells")
        tables = []
        for unit in range(plan.n_units):
            tables.append(pl.from_arrow(worker.run(unit, corpus.tokens).cell_shifts))
            progress.advance()
        return pl.concat([pl.DataFrame(table) for table in tables])


def _one_kind(given: Mapping[str, Genes | None]) -> tuple[str, Genes]:
    named = [(kind, genes) for kind, genes in given.items() if genes is not None]
    if len(named) != 1 or not named[0][1]:
        said = f"edits of {len(named)} kinds are" if len(named) > 1 else "no edit is"
        raise InputError(f"{said} given.", where="screen", fix=f'Give one of {", ".join(KINDS)}, such as delete="all".')
    return named[0]


def _identity(plan: Plan, cells_of: AnnData | str, cells: str) -> dict[str, Any]:
    """The plan's identity, with the source of the cells in place of the corpus that was made for it."""
    settings = plan.identity["config"]
    source = cells_of if isinstance(cells_of, str) else "an AnnData in memory"
    kept = {name: value for name, value in plan.identity.items() if not name.startswith("corpus_")}
    return {**kept, "source": source, "config": {**settings, "cells": {**settings["cells"], "where": cells}}}


def _states_config(toward: Toward | None) -> StatesConfig | None:
    if toward is None:
        return None
    if isinstance(toward, Mapping):
        return build(StatesConfig, toward, where="toward")
    if isinstance(toward, str) or len(toward) not in (2, 3):
        raise InputError(
            f"{toward!r} names no state.", where="toward", fix="Give (column, goal) or (column, goal, start)."
        )
    return build(StatesConfig, dict(zip(("column", "goal", "start"), toward, strict=False)), where="toward")
