"""The points of a learning curve, the lines that they make, and the record that is reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from genescale.platform.errors import SettingsError
from genescale.training.evaluation.baselines_features import FEATURE_NAMES
from genescale.training.evaluation.baselines_models import CLASSIFIERS, MODEL_NAMES, REGRESSORS
from genescale.training.evaluation.curve_draws import AGAINST, LEAST_CELLS
from genescale.training.evaluation.measures import plain
from genescale.training.fitting.config import FinetuneConfig

SCHEMA_VERSION = 1
MODEL, MAJORITY = "model", "majority"


@dataclass(frozen=True, kw_only=True)
class CurveConfig:
    """The points of a curve, and what stands beside them."""

    cells: tuple[int, ...] = (100, 500, 884, 5_000)
    """Labelled cells of the points, validation cells among them; for genes, cells that they are read in."""
    seeds: int = 3
    """Draws of every size."""
    against: str = ""
    """A second line: training cells fulfil this condition instead of the task's `where`."""
    baselines: tuple[str, ...] = ("logistic_regression", "random_forest")
    """`none` for none; for numbers ridge_regression and random_forest."""
    baseline_features: tuple[str, ...] = ("rank_vectors",)
    """rank_vectors, log_expression; for genes also rank_averages."""
    test_cells: int = 2_000
    """Test cells at most, drawn once; 0 means all. For genes: the cells that test genes are read in."""

    def __post_init__(self) -> None:
        if not self.cells or min(self.cells) < LEAST_CELLS:
            raise SettingsError(
                f"{list(self.cells)} are no sizes of points.", where="cells", fix=f"Use {LEAST_CELLS} cells or more."
            )
        for name, least in (("seeds", 1), ("test_cells", 0)):
            if getattr(self, name) < least:
                raise SettingsError(f"{getattr(self, name)} is too small.", where=name, fix=f"Use {least} or more.")
        known = {"baselines": {*CLASSIFIERS, *REGRESSORS, "none"}, "baseline_features": set(FEATURE_NAMES)}
        for name, names in known.items():
            if unknown := sorted(set(getattr(self, name)) - names):
                raise SettingsError(f"'{unknown[0]}' is unknown.", where=name, fix=f"Use {', '.join(sorted(names))}.")

    @property
    def fitted_baselines(self) -> tuple[str, ...]:
        """Names of the baselines, without `none`."""
        return tuple(name for name in self.baselines if name != "none")


@dataclass(frozen=True, kw_only=True)
class Point:
    """One fit: what it scored, and its baselines on the same cells."""

    line: str
    """`relevant` or `against`."""
    cells: int
    seed: int
    metric: str
    """The metric to look at first."""
    scores: Mapping[str, Mapping[str, float | None]]
    """Metrics of `model`, `majority` and each baseline (`name of features`)."""
    not_measured: Mapping[str, str]
    """Baselines that could not be measured, with the reason."""
    test_units: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class LinePoint:
    """The seeds of one size."""

    cells: int
    mean: float
    sd: float
    """Over seeds (n - 1); 0 with one."""
    low: float
    high: float
    values: tuple[float, ...]

    @property
    def seeds(self) -> int:
        """How many there are."""
        return len(self.values)


@dataclass(frozen=True, kw_only=True)
class CurveLine:
    """The metric of one fit (model, baseline, majority) by number of cells."""

    name: str
    fit: str
    line: str
    points: tuple[LinePoint, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class CurveResult:
    """All points of a curve."""

    title: str
    metric: str
    unit: str
    test_units: int
    lines: tuple[CurveLine, ...]
    points: tuple[Point, ...]
    notes: tuple[str, ...]
    config: CurveConfig
    task: FinetuneConfig
    provenance: Mapping[str, Any]
    computed: int
    reused: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON."""
        found = {name: getattr(self, name) for name in ("title", "metric", "unit", "test_units", "notes", "seconds")}
        found |= {"schema_version": SCHEMA_VERSION, "provenance": dict(self.provenance)}
        found |= {"config": asdict(self.config), "task": asdict(self.task)}
        found |= {"lines": [asdict(line) for line in self.lines], "points": [asdict(point) for point in self.points]}
        made: dict[str, Any] = plain(found)
        return made


def curve_lines(points: Sequence[Point], config: CurveConfig, task: FinetuneConfig) -> tuple[CurveLine, ...]:
    """The mean of the seeds by size: the model on each kind of cells, then its baselines, then the majority."""
    fits = list(dict.fromkeys(fit for point in points for fit in point.scores))
    fits.sort(key=lambda fit: (fit == MAJORITY, fit != MODEL))
    lines = []
    for fit in fits:
        for line in dict.fromkeys(point.line for point in points):
            found = [_line_point(size, fit, points, line) for size in sorted({p.cells for p in points})]
            known = tuple(point for point in found if point is not None)
            if known:
                lines.append(CurveLine(name=line_name(fit, line, config, task), fit=fit, line=line, points=known))
    return tuple(lines)


def line_name(fit: str, line: str, config: CurveConfig, task: FinetuneConfig) -> str:
    """Such as `this model, relevant cells`."""
    if fit == MODEL:
        name = "this model" if task.encoder == "frozen" else "this model, encoder trained"
    else:
        model, _, features = fit.partition(" of ")
        name = "most frequent class" if fit == MAJORITY else MODEL_NAMES.get(model, model)
        name += f" on {FEATURE_NAMES[features].lower()}" if features in FEATURE_NAMES else ""
    if not config.against:
        return name
    return f"{name}, {'other' if line == AGAINST else 'relevant'} cells"


def _line_point(cells: int, fit: str, points: Sequence[Point], line: str) -> LinePoint | None:
    values = [
        value
        for point in points
        if (point.line, point.cells) == (line, cells) and fit in point.scores
        if (value := point.scores[fit].get(point.metric)) is not None
    ]
    if not values:
        return None
    return LinePoint(
        cells=cells,
        mean=float(np.mean(values)),
        sd=float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
        low=min(values),
        high=max(values),
        values=tuple(values),
    )
