"""Where deleting a gene finds what it drives, and where it does not: cells whose network is known.

    make bench NAME=truth ARGS="--points FOLDER"        all settings, each trained and screened on one processor
    make bench NAME=truth ARGS="--points FOLDER --only main"
    make bench NAME=truth ARGS=--quick

Every setting is a file of JSON in the folder, beside the weights of its encoder; what is there already is not computed
again, so the benchmark goes on where it was stopped, and several processes can share a folder. What is trained and what
is varied stands in truth_settings.py, what is compared in truth_scores.py, the results in docs/planted-truth.md.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import truth_figures
from harness import RESULTS, Row, at_least, finish, measured, parser
from truth_baselines import CORRELATION, Oracle, correlations
from truth_cells import FIRST_GENE, PlantedCells, kept, planted_cells, untrained
from truth_effects import MASKED, READOUTS, CellEffects, cell_effects
from truth_figures import ABSOLUTE, ORACLE, pooled
from truth_pairs import correlated_pairs, effector_scores, pair_scores
from truth_scores import MATCHED, Rows, classes_kg, records, scores
from truth_settings import MAIN, QUICK, SETTINGS, Setting

from genescale.training.model import MaskedGeneModel

PACKAGES = ("numpy", "torch")
BAR = 0.8
# Share of a cell that the oracle takes to be hidden: what pretraining and the masked-gene read-out hide.
HIDDEN_SHARE = 0.15
CELLS_FOR_CORRELATION = 6_000


def measure(setting: Setting, folder: Path) -> dict[str, Any]:
    """Train one encoder, delete the planted regulators in other cells, and score every read-out and baseline."""
    began = time.process_time()
    planted = planted_cells(setting)
    trained = kept(planted, setting, folder / f"{setting.name}.npz")
    screened_s = time.process_time()
    models = {"trained": trained.model, "random": untrained(planted, setting)}
    kinds_kg = classes_kg(planted.network)
    found: dict[str, Any] = {}
    for name, model in models.items():
        effects = [_screened(model, planted, cell, kinds_kg) for cell in planted.screened[: setting.screened_cells]]
        found[name] = _scored(effects, kinds_kg, {readout: _rows_of(effects, readout) for readout in READOUTS})
    found["baselines"] = _scored(effects, kinds_kg, _baselines(planted))
    return {
        "setting": dataclasses.asdict(setting),
        "genes": planted.network.n_genes,
        "genes_per_cell": float(planted.trained.lengths.mean()),
        "loss_before": trained.loss_before,
        "loss": trained.loss,
        "training_cpu_s": trained.cpu_s,
        "scores": found,
        "pairs": _pairs(models, planted) if setting.whole else {},
        "effectors": {
            name: effector_scores(model, planted, n_cells=setting.effector_cells) for name, model in models.items()
        } if setting.whole else {},
        "screening_cpu_s": time.process_time() - screened_s,
        "cpu_s": time.process_time() - began,
    }  # fmt: skip


def _pairs(models: Mapping[str, MaskedGeneModel], planted: PlantedCells) -> dict[str, Any]:
    plain_gg = correlations(planted.counts_ng[:CELLS_FOR_CORRELATION], planted.types_n[:CELLS_FOR_CORRELATION])
    found = {name: pair_scores(model, planted) for name, model in models.items()}
    return {**found, "baselines": correlated_pairs(plain_gg[CORRELATION], planted)}


def _regulators(kinds_kg: np.ndarray) -> dict[int, int]:
    """Number of each regulator by its gene."""
    return {int(np.flatnonzero(kinds_g == "self")[0]): k for k, kinds_g in enumerate(kinds_kg)}


def _screened(model: MaskedGeneModel, planted: PlantedCells, cell: np.ndarray, kinds_kg: np.ndarray) -> CellEffects:
    regulators = _regulators(kinds_kg)
    screened = [at for at, token in enumerate(cell.tolist()) if token - FIRST_GENE in regulators]
    return cell_effects(model, planted.trained.vocabulary, cell, screened)


def _rows_of(effects: Sequence[CellEffects], readout: str) -> Rows:
    return lambda cell, at: effects[cell].effects[readout][at,]


def _baselines(planted: PlantedCells) -> dict[str, Rows]:
    """Correlations and the oracle, in the form of a deletion's effects on the genes of a cell."""
    made = correlations(planted.counts_ng[:CELLS_FOR_CORRELATION], planted.types_n[:CELLS_FOR_CORRELATION])
    made[ABSOLUTE] = np.abs(made[CORRELATION])
    genes = [cell - FIRST_GENE for cell in planted.screened]
    seen_ng = [np.isin(np.arange(planted.network.n_genes), genes_t) for genes_t in genes]
    types, oracle = planted.screened_types.tolist(), Oracle(planted.network, HIDDEN_SHARE)

    def correlated(name: str) -> Rows:
        return lambda cell, at: made[name][genes[cell][at], genes[cell]]

    def known(cell: int, at: int) -> np.ndarray:
        return np.array([oracle.effect(seen_ng[cell], types[cell], genes[cell][at], gene) for gene in genes[cell]])

    return {**{name: correlated(name) for name in made}, ORACLE: known}


def _scored(
    effects: Sequence[CellEffects], kinds_kg: np.ndarray, sources: Mapping[str, Rows]
) -> dict[str, dict[str, list[float]]]:
    found = records(effects, _regulators(kinds_kg), sources)
    return {name: scores(found, name, kinds_kg) for name in found.effect_z}


def point(setting: Setting, folder: Path) -> dict[str, Any]:
    """The stored result of a setting, measured first when there is none of this very setting."""
    path = folder / f"{setting.name}.json"
    wanted = json.loads(json.dumps(dataclasses.asdict(setting)))
    if path.exists():
        stored: dict[str, Any] = json.loads(path.read_text())
        if stored["setting"] == wanted:
            return stored
    result = measure(setting, folder)
    path.write_text(json.dumps(result, indent=1))
    print(f"… {setting.name}: loss {result['loss']:.3f}, {result['cpu_s']:.0f} s", file=sys.stderr, flush=True)
    return result


def main() -> int:
    made = parser(__doc__.partition("\n")[0])
    made.add_argument("--points", type=Path, help="folder of the points (default benchmarks/results/truth)")
    made.add_argument("--only", help="settings to measure, by name and separated by commas (default: all)")
    made.add_argument("--figure", type=Path, help="where the figures are drawn: a folder")
    arguments = made.parse_args()
    torch.set_num_threads(1)
    quick = arguments.quick
    folder = arguments.points or RESULTS / ("truth-quick" if quick else "truth")
    folder.mkdir(parents=True, exist_ok=True)
    settings = [QUICK] if quick else SETTINGS
    if arguments.only:
        wanted = arguments.only.split(",")
        if unknown := sorted(set(wanted) - {setting.name for setting in settings}):
            made.error(f"no setting {unknown[0]!r}; there are {', '.join(setting.name for setting in settings)}")
        settings = [setting for setting in settings if setting.name in wanted]
    points = {setting.name: point(setting, folder) for setting in settings}
    if arguments.figure:
        truth_figures.draw(points, arguments.figure)
    print("\n".join(truth_figures.tables(points)), "\n")
    rows = [row for name, one in points.items() for row in _rows(name, one)]
    seeds = [points[name] for name in MAIN if name in points]
    if len(seeds) == len(MAIN):
        rows += list(_claims(seeds))
    return finish("truth", rows, PACKAGES, quick=quick, output=arguments.output)


def _rows(name: str, one: dict[str, Any]) -> Iterator[Row]:
    for model, readouts in one["scores"].items():
        for readout in readouts:
            found = pooled([one], model, readout, MATCHED)
            note = f"{found['low']:.2f} to {found['high']:.2f} over {found['n']} regulators"
            yield measured(f"{name}: {model}, {readout}, matched", found["mean"], "AUROC", note=note)


def _claims(points: Sequence[dict[str, Any]]) -> Iterator[Row]:
    """The documented setting: every read-out against both baselines, over the regulators of all seeds."""
    deleted = pooled(points, "trained", MASKED, MATCHED)
    note = f"{deleted['low']:.3f} to {deleted['high']:.3f}, {deleted['n']} regulators of {len(points)} networks"
    yield at_least("Direct targets against matched controls, masked gene", deleted["mean"], "AUROC", BAR, note=note)
    random = pooled(points, "random", MASKED, MATCHED)
    signed, absolute = (pooled(points, "baselines", name, MATCHED) for name in (CORRELATION, ABSOLUTE))
    best = max(random["high"], signed["high"], absolute["high"])
    yield at_least("  lower end of its interval", deleted["low"], "AUROC", best, note="upper ends of both baselines")


if __name__ == "__main__":
    sys.exit(main())
