"""How a task does with more and more labelled cells: points by size and seed, their lines, and a resumable run.

Axis suffixes: `r` rows.

A point is one fit on so many labelled cells under one seed, measured on the same test cells or genes as all others,
with the baselines on the same cells. Every finished point is a file of its own, named after all that decides it, so a
run that was cut off does only what is missing, and further sizes or seeds can be added later.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from genescale.ingestion.corpus import Corpus
from genescale.platform.bundle import Bundle
from genescale.platform.errors import InputError, IntegrityError, NotFoundError
from genescale.platform.progress import SILENT, Progress
from genescale.platform.runs import Run, Tracker
from genescale.platform.storage import Store, join
from genescale.training.evaluation.baselines import BaselineConfig, measure_baselines
from genescale.training.evaluation.curve_draws import AGAINST, RELEVANT, Curve, plan_curve
from genescale.training.evaluation.curve_lines import (
    MAJORITY,
    MODEL,
    SCHEMA_VERSION,
    CurveConfig,
    CurveLine,
    CurveResult,
    Point,
    curve_lines,
)
from genescale.training.evaluation.measures import Evaluation, measure, plain
from genescale.training.evaluation.predictions import Predictions, joined
from genescale.training.fitting.config import FinetuneConfig
from genescale.training.fitting.folds import Source, encoder_folds, frozen_folds
from genescale.training.fitting.frozen import training_counts, training_means
from genescale.training.fitting.task import Task
from genescale.training.fitting.vectors import row_vectors

PAGE_NAME, JSON_NAME, POINTS, VECTORS = "report.html", "report.json", "points", "vectors"


def learning_curve(
    bundle: Bundle,
    corpus: Corpus,
    task: FinetuneConfig,
    config: CurveConfig,
    *,
    tracker: Tracker,
    out_uri: str,
    store: Store,
    model: str = "",
    progress: Progress = SILENT,
) -> CurveResult:
    """Fit every point that is not in `out_uri` yet, and write report.html and report.json there.

    Needs no Ray, unless the encoder is trained by several workers. Raises CorpusError, InputError or SettingsError
    before any fit when task, cells and model do not fit.
    """
    began = time.monotonic()
    curve = plan_curve(bundle, corpus, task, against=config.against, test_cells=config.test_cells, store=store)
    wanted, notes = _wanted(curve, config)
    provenance = {
        "model": model or str(bundle.folder),
        "bundle_digest": bundle.digest,
        "vocabulary_digest": bundle.vocabulary.digest,
        "corpus": f"{corpus.uri}@{corpus.version}",
    }
    params = {**asdict(config), "task": asdict(task), **provenance}
    with tracker.run(f"curve {task.label}", params=params, tags={"stage": "curve"}) as run:
        maker = _Maker(Source(bundle=bundle, corpus=corpus, store=store), curve, task, config, out_uri)
        points, computed = maker.all(wanted, progress)
        result = CurveResult(
            title=f"Learning curve of {task.label}",
            metric=points[0].metric,
            unit=curve.unit,
            test_units=curve.test_units,
            lines=curve_lines(points, config, task),
            points=tuple(points),
            notes=(*notes, *_left_out(curve.task), *_missing_baselines(points)),
            config=config,
            task=task,
            provenance={**provenance, "run_id": run.id},
            computed=computed,
            reused=len(points) - computed,
            seconds=time.monotonic() - began,
        )
        _tell(result, run, out_uri, store)
    return result


def _wanted(curve: Curve, config: CurveConfig) -> tuple[list[tuple[str, int, int]], list[str]]:
    """(line, cells, seed) of every point, smallest first, and what cannot be had."""
    wanted, notes = [], []
    for cells in sorted(set(config.cells)):
        for line in (RELEVANT, AGAINST) if config.against else (RELEVANT,):
            if cells > curve.most(line):
                notes.append(f"No point of {cells:,} {line} cells: there are {curve.most(line):,} to draw from.")
                continue
            wanted += [(line, cells, seed) for seed in range(config.seeds)]
    if not wanted:
        raise InputError(
            f"the smallest point has {min(config.cells):,} cells, and there are {curve.most(RELEVANT):,} to draw from.",
            where="cells",
            fix="Ask for smaller points, a wider condition, or other fractions.",
        )
    return wanted, notes


class _Maker:
    """Makes the points of one curve, and keeps each when it is made."""

    def __init__(self, source: Source, curve: Curve, task: FinetuneConfig, config: CurveConfig, out_uri: str) -> None:
        self._source, self._curve, self._task, self._config = source, curve, task, config
        self._out_uri, self._store = out_uri, source.store
        self._vectors_rd: np.ndarray | None = None
        # What decides a point, beside its line, size and seed.
        decides = {
            "schema": SCHEMA_VERSION,
            "bundle": source.bundle.digest,
            "corpus": [source.corpus.uri, source.corpus.version],
            "task": asdict(task),
            **{name: getattr(config, name) for name in ("against", "baselines", "baseline_features", "test_cells")},
        }
        self._key = hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def all(self, wanted: Sequence[tuple[str, int, int]], progress: Progress) -> tuple[list[Point], int]:
        """The points of every (line, cells, seed), and how many of them were not there yet."""
        points, computed = [], 0
        progress.start(len(wanted), "points")
        for line, cells, seed in wanted:
            point = self.stored(line, cells, seed)
            if point is None:
                point, computed = self.made(line, cells, seed), computed + 1
            points.append(point)
            progress.advance(1, f"{line}, {cells:,} cells, seed {seed}: {_shown(point)}")
        return points, computed

    def stored(self, line: str, cells: int, seed: int) -> Point | None:
        """The point of an earlier run; None when there is none."""
        uri = self._uri(line, cells, seed)
        try:
            return Point(**json.loads(self._store.read(uri)))
        except NotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise IntegrityError(
                "this is no point of a curve.", where=uri, fix="Delete the file; the same command makes it again."
            ) from error

    def made(self, line: str, cells: int, seed: int) -> Point:
        """Fit and measure one point, and keep it."""
        began = time.monotonic()
        config = replace(self._task, seed=seed)
        tasks = self._curve.tasks(line, cells, seed)
        name = f"{self._key}-{line}-{cells}-{seed}"
        predicted = [self._predicted(task, config, f"{name}-{fold}") for fold, task in enumerate(tasks)]
        evaluation = _measured(tasks, predicted, config)
        scores: dict[str, Mapping[str, Any]] = {MODEL: evaluation.estimates(), MAJORITY: evaluation.majority}
        found, not_measured = _baselines(tasks, self._source.corpus, self._config, seed, self._store)
        point = Point(
            line=line,
            cells=cells,
            seed=seed,
            metric=evaluation.headline,
            scores=plain(scores | found),
            not_measured=not_measured,
            test_units=evaluation.units,
            seconds=round(time.monotonic() - began, 3),
        )
        text = json.dumps(asdict(point), indent=1, allow_nan=False)
        self._store.write(self._uri(line, cells, seed), text.encode())
        return point

    def _predicted(self, task: Task, config: FinetuneConfig, name: str) -> Predictions:
        if config.encoder == "frozen":
            return frozen_folds(self._source, task, self._vectors(task), config, SILENT).predictions[0]
        # Several workers need a folder that all of them reach; one keeps everything in memory.
        home = join(self._out_uri, "runs", name) if config.workers > 1 else ""
        return encoder_folds(replace(self._source, run_home=home), task, config, SILENT).predictions[0]

    def _vectors(self, task: Task) -> np.ndarray:
        """Vectors of the rows of a point, from the cache in the output folder where a smaller point filled it."""
        bundle, corpus = self._source.bundle, self._source.corpus
        if self._curve.unit == "genes":
            return row_vectors(bundle, corpus, task, self._task, store=self._store)
        # Cells of all points are few enough to be embedded once.
        whole = self._curve.task
        if self._vectors_rd is None:
            self._needed = np.unique(np.concatenate([_units(self._curve, *what) for what in self._points()]))
            part = replace(whole, examples=whole.examples.take(self._needed))
            cache = join(self._out_uri, VECTORS)
            self._vectors_rd = row_vectors(bundle, corpus, part, self._task, store=self._store, cache_uri=cache)
            self._row_of = {int(cell): row for row, cell in enumerate(part.examples.index_n[part.examples.row_cell_r])}
        cells = task.examples.index_n[task.examples.row_cell_r]
        return self._vectors_rd[[self._row_of[int(cell)] for cell in cells]]

    def _points(self) -> Iterator[tuple[str, int, int]]:
        return iter(_wanted(self._curve, self._config)[0])

    def _uri(self, line: str, cells: int, seed: int) -> str:
        return join(self._out_uri, POINTS, f"{self._key}-{line}-{cells}-{seed}.json")


def _units(curve: Curve, line: str, cells: int, seed: int) -> np.ndarray:
    """Units of the whole task that a point of cells needs."""
    (task,) = curve.tasks(line, cells, seed)
    return np.flatnonzero(np.isin(curve.task.examples.index_n, task.examples.index_n))


def _measured(tasks: Sequence[Task], predictions: Sequence[Predictions], config: FinetuneConfig) -> Evaluation:
    parts = [replace(part, fold_u=np.full(len(part), fold)) for fold, part in enumerate(predictions)]
    both = joined(parts)
    if both.kind == "classes":
        counts = {fold: training_counts(task, 0, config)[0] for fold, task in enumerate(tasks)}
        return measure(both, train_counts_by_fold=counts, bootstrap=0)
    means = {fold: training_means(task, 0, config)[0] for fold, task in enumerate(tasks)}
    return measure(both, train_means_by_fold=means, bootstrap=0)


def _baselines(
    tasks: Sequence[Task], corpus: Corpus, config: CurveConfig, seed: int, store: Store
) -> tuple[dict[str, Mapping[str, float]], dict[str, str]]:
    """Metrics of each baseline over all folds, and why one could not be measured."""
    if not config.fitted_baselines:
        return {}, {}
    settings = BaselineConfig(
        models=config.fitted_baselines,
        features=config.baseline_features,  # type: ignore[arg-type]
        max_train_units=max(config.cells),
        seed=seed,
    )
    by_fold = [measure_baselines(task, corpus, settings, store=store, bootstrap=0) for task in tasks]
    found: dict[str, Mapping[str, float]] = {}
    not_measured: dict[str, str] = {}
    for folds in zip(*by_fold, strict=True):
        name = f"{folds[0].name} of {folds[0].features}"
        parts = [one.predictions for one in folds if one.predictions is not None]
        if len(parts) < len(folds):
            not_measured[name] = next(one.why_not for one in folds if one.predictions is None)
            continue
        numbered = [replace(part, fold_u=np.full(len(part), fold)) for fold, part in enumerate(parts)]
        found[name] = measure(joined(numbered), bootstrap=0).estimates()
    return found, not_measured


def _tell(result: CurveResult, run: Run, out_uri: str, store: Store) -> None:
    """Write the page and its numbers into `out_uri`, and log both and the lines to the run."""
    from genescale.training.evaluation.curve_report import page

    files = {PAGE_NAME: page(result), JSON_NAME: json.dumps(result.to_dict(), indent=1, allow_nan=False)}
    for name, text in files.items():
        store.write(join(out_uri, name), text.encode())
        run.log_text(text, f"curve/{name}")
    run.log_metric_rows(_rows(result.lines, result.metric))


def _left_out(task: Task) -> list[str]:
    return [f"{count:,} left out: {reason}." for reason, count in task.left_out.items() if count]


def _missing_baselines(points: Sequence[Point]) -> list[str]:
    missing = {name: why for point in points for name, why in point.not_measured.items()}
    return [f"At some points not measured: {name} ({why})" for name, why in missing.items()]


def _rows(lines: Sequence[CurveLine], metric: str) -> list[tuple[int, dict[str, float]]]:
    """Rows for a tracker: the number of cells is the step."""
    return [
        (point.cells, {f"{metric}_{line.fit.replace(' ', '_')}_{line.line}": point.mean})
        for line in lines
        for point in line.points
    ]


def _shown(point: Point) -> str:
    value = point.scores[MODEL].get(point.metric)
    return f"{point.metric} {value:.3f}" if value is not None else f"{point.metric} without a value"
