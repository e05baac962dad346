"""Which encoder reaches the published architecture's held-out loss with fewer FLOPs.

    make bench NAME=modern ARGS="--simulated CORPUS --real CORPUS"      35 minutes of one processor
    make bench NAME=modern ARGS=--quick

Every training run is one line of a JSON file: what was trained, and (FLOPs, tokens, held-out loss) along its way. Runs
that are there already are not run again, so the benchmark goes on where it was stopped. Held-out cells and their masks
are the same for all runs of a seed, whatever a recipe masks in training. FLOPs are those of training/flops.py.

A lower loss must not be bought with worse embeddings: where cells have types, a logistic regression on their mean
embeddings (second to last layer, five folds) says how well they can be told apart.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import modern_report
import numpy as np
import torch
from harness import ROOT, Row, at_most, finish, measured, parser
from modern_variants import FINAL, RATES, SEEDS, SINGLE, VARIANTS, Bench, corpus_bench, quick_bench

from genescale.training.engine import TorchEngine
from genescale.training.flops import Work, training_flops
from genescale.training.loop import RunPlan, train_loop
from genescale.training.model import Encoder, new_model, pack

PACKAGES = ("numpy", "torch", "scikit-learn")
BAR = 0.6


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One training run."""

    corpus: str
    variant: str
    seed: int
    learning_rate: float
    share: float = 1.0
    """Of the steps that the published architecture takes, with a whole learning-rate schedule."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What a run showed: FLOPs and held-out loss, from the untrained encoder to the end."""

    trial: Trial
    changes: tuple[str, ...]
    flops: tuple[float, ...]
    tokens: tuple[int, ...]
    losses: tuple[float, ...]
    accuracy: float
    parameters: int
    cpu_s: float
    cell_types: float | None = None
    """Balanced accuracy of cell types from embeddings; None where it was not asked for or cells have none."""

    @property
    def loss(self) -> float:
        """At the end."""
        return self.losses[-1]


def train(bench: Bench, trial: Trial, changes: tuple[str, ...], *, with_types: bool = False) -> Curve:
    """Train one encoder on the CPU; the same arguments give the same curve."""
    config = bench.recipe(changes, seed=trial.seed, learning_rate=trial.learning_rate, share=trial.share)
    plan, encoder = RunPlan.of(config, bench.source), config.encoder.for_vocabulary(bench.source.vocabulary)
    model = new_model(encoder, seed=config.seed)
    engine = TorchEngine(model, config.optimizer, total_steps=plan.total_steps)
    rows: list[tuple[int, dict[str, Any]]] = []
    began = time.process_time()
    train_loop(engine, bench.source, plan, config, on_rows=rows.extend)
    cpu_s = time.process_time() - began
    measured = {step: row for step, row in rows if "held_out_loss" in row}
    works = dict(zip(measured, work_until(plan, list(measured)), strict=True))
    return Curve(
        trial=trial,
        changes=changes,
        flops=tuple(training_flops(encoder, work) for work in works.values()),
        tokens=tuple(work.tokens for work in works.values()),
        losses=tuple(row["held_out_loss"] for row in measured.values()),
        accuracy=measured[max(measured)]["held_out_accuracy"],
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        cpu_s=cpu_s,
        cell_types=told_apart(bench, model.eval().encoder) if with_types and len(bench.typed_cells) else None,
    )


def work_until(plan: RunPlan, steps: list[int]) -> Iterator[Work]:
    """What was computed until each of these rising steps."""
    work, done = Work(), 0
    for step in steps:
        for number in range(done, step):
            epoch, place = plan.training.locate(number)
            lengths = plan.training.lengths[plan.training.epoch(epoch).step_cells(place)].astype(np.int64)
            work += Work(
                tokens=int(lengths.sum()),
                squares=int((lengths**2).sum()),
                masked=int(plan.masking.counts(lengths).sum()),
            )
        done = step
        yield work


@torch.inference_mode()
def told_apart(bench: Bench, encoder: Encoder) -> float:
    """Balanced accuracy of a logistic regression on mean embeddings, over five folds of the cells with a type."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    vectors = []
    for cell in bench.source.tokens(bench.typed_cells):
        vectors.append(encoder(pack([cell]), layers=encoder.config.layers - 1).mean(0).numpy())
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of not having converged: the same number of iterations for all
        scores = cross_val_score(model, np.array(vectors), bench.types, cv=folds, scoring="balanced_accuracy")
    return float(scores.mean())


class Points:
    """The runs that are done, one line of JSON each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.curves: dict[Trial, Curve] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                values = json.loads(line)
                trial = Trial(**values.pop("trial"))
                lists = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
                self.curves[trial] = Curve(trial=trial, **lists)

    def get(self, bench: Bench, trial: Trial, changes: tuple[str, ...], *, with_types: bool = False) -> Curve:
        """The curve of a run, which is trained if it is not there with these very changes."""
        found = self.curves.get(trial)
        if found is None or set(found.changes) != set(changes):
            found = train(bench, trial, changes, with_types=with_types)
            self.curves[trial] = found
            with self.path.open("a") as file:
                file.write(json.dumps(dataclasses.asdict(found)) + "\n")
            print(f"… {trial}: loss {found.loss:.4f}, {found.flops[-1]:.3g} FLOPs, {found.cpu_s:.0f} s",
                  file=sys.stderr, flush=True)  # fmt: skip
        return found


def main() -> int:
    made = parser(__doc__.partition("\n")[0])
    made.add_argument("--real", help="corpus of real cells (docs/modern-encoder.md makes it)")
    made.add_argument("--simulated", help="corpus of simulated cells")
    made.add_argument("--points", type=Path, help="file with the runs (default benchmarks/results/modern-points.jsonl)")
    made.add_argument("--figure", type=Path, help="where the curves are drawn, .png and .svg")
    arguments = made.parse_args()
    torch.set_num_threads(1)
    quick = arguments.quick
    benches = [quick_bench()] if quick else list(given_benches(arguments.real, arguments.simulated))
    if not benches:
        made.error("give --real and --simulated, or --quick")
    suffix = "-quick" if quick else ""
    points = Points(arguments.points or ROOT / "benchmarks" / "results" / f"modern-points{suffix}.jsonl")
    points.path.parent.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for bench in benches:
        print(f"… {bench.name}: {bench.origin}", file=sys.stderr, flush=True)
        final = [points.get(bench, *each, with_types=True) for each in final_runs(bench.name)]
        single = [points.get(bench, *each) for each in single_runs(bench.name)]
        rows += claims(bench, final, quick=quick)
        print("\n".join(modern_report.changes_table([*final, *single], bench.name)), "\n")
    if arguments.figure:
        titles = {bench.name: f"{bench.name}: {bench.origin}" for bench in benches}
        shown = [c for c in points.curves.values() if RATES.get(c.trial.variant) == c.trial.learning_rate]
        modern_report.draw(shown, titles, arguments.figure)
    return finish("modern", rows, PACKAGES, quick=quick, output=arguments.output)


def given_benches(real: str | None, simulated: str | None) -> Iterator[Bench]:
    """The corpora that were given, reduced."""
    if real:
        yield corpus_bench("real", real, n_genes=3_000, window=384, steps=400)
    if simulated:
        yield corpus_bench("simulated", simulated, n_genes=3_000, window=512, steps=400)


def single_runs(corpus: str) -> Iterator[tuple[Trial, tuple[str, ...]]]:
    """Learning rates on both sides, one change at a time, and what is left out of all changes; one seed."""
    for variant, rate, share in SINGLE[corpus]:
        trial = Trial(corpus=corpus, variant=variant, seed=0, learning_rate=rate, share=share)
        yield trial, VARIANTS[variant]


def final_runs(corpus: str) -> Iterator[tuple[Trial, tuple[str, ...]]]:
    """The comparison: all seeds, the whole schedule in a share of the published steps."""
    for variant, shares in FINAL[corpus].items():
        for share in shares:
            for seed in SEEDS:
                trial = Trial(corpus=corpus, variant=variant, seed=seed, learning_rate=RATES[variant], share=share)
                yield trial, VARIANTS[variant]


def claims(bench: Bench, curves: Sequence[Curve], *, quick: bool) -> Iterator[Row]:
    """What the comparison on one corpus amounts to."""
    for variant, shares in FINAL[bench.name].items():
        whole = [c for c in curves if c.trial.variant == variant and c.trial.share == max(shares)]
        steps = f"{bench.name}, {variant}, {max(shares):g} of the steps"
        losses = [curve.loss for curve in whole]
        yield measured(f"Held-out loss, {steps}", statistics.fmean(losses), "nats", note=modern_report.spread(losses))
        typed = [curve.cell_types for curve in whole if curve.cell_types is not None]
        if typed:
            note = modern_report.spread(typed)
            yield measured(f"  cell types told apart, {steps}", statistics.fmean(typed), "balanced accuracy", note=note)
        if variant == "published":
            continue
        found = list(modern_report.ratios(curves, bench.name, variant).values())
        seeds = ", ".join(f"{'≤ ' if bound else ''}{share:.3f}" for share, bound in found)
        note = f"{modern_report.spread([share for share, _ in found])}; seeds: {seeds}"
        claim, mean = f"Compute for the published loss, {bench.name}, {variant}", statistics.fmean(s for s, _ in found)
        # A few steps show that everything runs, and nothing else.
        yield measured(claim, mean, "of it", note=note) if quick else at_most(claim, mean, "of it", BAR, note=note)


if __name__ == "__main__":
    sys.exit(main())
