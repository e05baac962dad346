"""The training loop without Ray: it learns, measures honestly, and goes on from any checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from genescale.platform.errors import IntegrityError, SettingsError, TrainingError
from genescale.platform.vocabulary import Vocabulary
from genescale.training.batches import StepBatch
from genescale.training.cells import MemoryCells
from genescale.training.engine import OptimizerConfig, TorchEngine
from genescale.training.flops import Utilisation
from genescale.training.loop import LoopResult, Row, RunPlan, TrainState, curve, train_loop
from genescale.training.model import new_model
from genescale.training.recipe import EncoderShape, PretrainConfig
from genescale.training.shards import SavedState

Rows = dict[int, dict[str, float]]
Finished = tuple[Path, LoopResult, Rows]
GENES = 40
CONFIG = PretrainConfig(
    encoder=EncoderShape(width=32, layers=1, heads=2, feed_forward=64),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=3),
    steps=25,
    token_budget=256,
    lanes=2,
    held_out_cells=20,
    evaluate_every=10,
    checkpoint_every=10,
    log_every=4,
)


@pytest.fixture(scope="module")
def source() -> MemoryCells:
    """Cells of two kinds, each with its own genes in nearly the same order: something to learn."""
    vocabulary = Vocabulary.build([f"ENSG{i:011d}" for i in range(GENES)], np.ones(GENES), window=32, name="test")
    draws = np.random.default_rng(0)
    cells = []
    for number in range(300):
        genes = np.arange(20) + 20 * (number % 2)
        order = np.argsort(np.arange(20) + draws.normal(0, 1.5, 20))[: draws.integers(10, 21)]
        cells.append(np.r_[2, genes[order] + 4, 3].astype(np.uint16))
    return MemoryCells(cells, vocabulary)


def engine_for(source: MemoryCells, plan: RunPlan) -> TorchEngine:
    model = new_model(CONFIG.encoder.for_vocabulary(source.vocabulary), seed=CONFIG.seed)
    return TorchEngine(model, CONFIG.optimizer, total_steps=plan.total_steps)


def run(source: MemoryCells, folder: Path, start_from: Path | None = None, **options: Any) -> tuple[LoopResult, Rows]:
    plan = RunPlan.of(CONFIG, source)
    engine, rows = engine_for(source, plan), Rows()
    start = TrainState()
    if start_from:
        start = TrainState.from_dict(json.loads((start_from / "state.json").read_text()))
        engine.restore(SavedState([start_from / "shard"]))

    def on_rows(new: list[Row]) -> None:
        for step, values in new:
            rows.setdefault(step, {}).update(values)

    def on_checkpoint(state: TrainState) -> None:
        here = folder / f"step_{state.steps}"
        here.mkdir(parents=True)
        engine.snapshot().write(here / "shard")
        (here / "state.json").write_text(json.dumps(state.to_dict()))

    callbacks = {"on_rows": on_rows, "on_checkpoint": on_checkpoint}
    return train_loop(engine, source, plan, CONFIG, start=start, **callbacks, **options), rows


@pytest.fixture(scope="module")
def finished(source: MemoryCells, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("run")
    return folder, *run(source, folder)


def test_the_held_out_loss_falls(finished: Finished) -> None:
    _, result, _ = finished
    before, after = result.state.before, result.state.held_out
    assert before is not None
    assert after is not None
    assert after.loss < 0.8 * before.loss


def test_every_step_is_measured_once(finished: Finished) -> None:
    _, result, rows = finished
    assert [step for step, _ in curve(rows, "loss")] == list(range(1, 26))
    assert [step for step, _ in curve(rows, "held_out_loss")] == [0, 10, 20, 25]
    assert rows[25]["held_out_loss"] == result.state.held_out.loss if result.state.held_out else False
    assert rows[3]["learning_rate"] == pytest.approx(1e-2)
    for step, share in curve(rows, "data_wait_share"):
        assert 0 <= share <= 1, step
    assert result.tokens_per_s > 0


def test_tokens_are_those_of_the_plan(source: MemoryCells, finished: Finished) -> None:
    training = RunPlan.of(CONFIG, source).training
    expected = sum(
        int(source.lengths[training.epoch(epoch).step_cells(step)].sum())
        for epoch, step in (training.locate(done) for done in range(25))
    )
    assert finished[1].tokens == expected


@pytest.mark.parametrize("step", [10, 20])
def test_a_run_goes_on_from_a_checkpoint_with_the_same_curve(
    source: MemoryCells, finished: Finished, tmp_path: Path, step: int
) -> None:
    folder, whole, rows = finished
    result, rest = run(source, tmp_path, start_from=folder / f"step_{step}")
    assert curve(rest, "loss") == curve(rows, "loss")[step:]
    assert result.state == whole.state


def test_a_finished_run_has_nothing_left_to_do(source: MemoryCells, finished: Finished, tmp_path: Path) -> None:
    folder, whole, _ = finished
    result, rows = run(source, tmp_path, start_from=folder / "step_25")
    assert (result.tokens, rows, list(tmp_path.iterdir())) == (0, {}, [])
    assert result.state == whole.state


def test_held_out_cells_are_never_trained_on(source: MemoryCells) -> None:
    plan = RunPlan.of(CONFIG, source)
    assert plan.held_out is not None
    assert len(plan.held_out.cells) == 20
    assert not set(plan.held_out.cells) & set(plan.training.epoch(0).order)


def test_a_corpus_too_small_to_hold_cells_back(source: MemoryCells) -> None:
    few = MemoryCells(source.tokens(range(8)), source.vocabulary)
    plan = RunPlan.of(CONFIG, few)
    engine = engine_for(few, plan)
    result = train_loop(engine, few, plan, CONFIG)
    assert (result.state.before, result.state.held_out, result.state.steps) == (None, None, 25)


def test_epochs_are_counted_in_steps(source: MemoryCells) -> None:
    plan = RunPlan.of(PretrainConfig(**{**CONFIG.__dict__, "steps": 0, "epochs": 2}), source)
    assert plan.total_steps == plan.training.epoch(0).n_steps + plan.training.epoch(1).n_steps


def test_a_state_that_is_not_whole_is_refused() -> None:
    with pytest.raises(IntegrityError, match="held_out"):
        TrainState.from_dict({"steps": 3, "finished": False, "before": None})


def test_the_best_held_out_loss_is_remembered_and_each_new_best_is_kept(finished: Finished) -> None:
    folder, result, rows = finished
    losses = dict(curve(rows, "held_out_loss"))
    assert result.state.best_loss == min(losses.values())
    for step in (10, 20):
        state = TrainState.from_dict(json.loads((folder / f"step_{step}" / "state.json").read_text()))
        assert state.held_out is not None
        assert state.held_out.loss == losses[step]
        assert state.best_loss == min(loss for at, loss in losses.items() if at <= step)


def test_a_loop_that_is_told_to_stop_leaves_a_checkpoint_to_go_on_from(
    source: MemoryCells, finished: Finished, tmp_path: Path
) -> None:
    calls = iter([False, True])
    result, rows = run(source, tmp_path, should_stop=lambda: next(calls))
    assert (result.state.steps, result.state.finished) == (8, False)
    assert curve(rows, "loss") == curve(finished[2], "loss")[:8]
    again, rest = run(source, tmp_path / "rest", start_from=tmp_path / "step_8")
    assert again.state == finished[1].state
    assert curve(rest, "loss") == curve(finished[2], "loss")[8:]


class RecordingCells(MemoryCells):
    """Remembers what it was asked for, one entry for each batch."""

    def __init__(self, source: MemoryCells) -> None:
        super().__init__(source.tokens(range(len(source.lengths))), source.vocabulary)
        self.asked: list[list[int]] = []

    def tokens(self, indices: Any) -> list[np.ndarray]:
        self.asked.append([int(index) for index in indices])
        return super().tokens(indices)


def test_no_cell_is_seen_twice_or_never_in_an_epoch_that_was_cut_off_and_gone_on_with(
    source: MemoryCells, tmp_path: Path
) -> None:
    plan = RunPlan.of(CONFIG, source)
    steps = plan.training.epoch(0).n_steps
    assert steps > CONFIG.log_every
    # Measurements on held-out cells ask for cells as well: those of the first run come before its first step.
    assert plan.held_out is not None
    evaluations = plan.held_out.epoch(0).n_steps
    cut, rest = RecordingCells(source), RecordingCells(source)
    result, _ = run(cut, tmp_path, should_stop=lambda: True)
    assert result.state.steps == CONFIG.log_every
    run(rest, tmp_path / "rest", start_from=tmp_path / f"step_{CONFIG.log_every}")
    seen = cut.asked[evaluations : evaluations + CONFIG.log_every] + rest.asked[: steps - CONFIG.log_every]
    assert sorted(cell for batch in seen for cell in batch) == plan.training.cells.tolist()


class PoisonedEngine(TorchEngine):
    """From some step on a lane, or the whole model, gives no number."""

    at, lane = 7, 1

    def step(self, batch: StepBatch) -> torch.Tensor:
        sums = super().step(batch)
        if batch.step < self.at:
            return sums
        lanes = self.lane_losses().clone()
        lanes[slice(None) if self.lane < 0 else self.lane] = torch.nan
        self._lane_losses = lanes
        return torch.stack([lanes.sum(), *sums[1:]])


@pytest.mark.parametrize(("lane", "named"), [(1, 7), (-1, 6)])
def test_a_loss_that_is_no_number_stops_with_its_cells_named(source: MemoryCells, lane: int, named: int) -> None:
    plan = RunPlan.of(CONFIG, source)
    model = new_model(CONFIG.encoder.for_vocabulary(source.vocabulary), seed=CONFIG.seed)
    engine = PoisonedEngine(model, CONFIG.optimizer, total_steps=plan.total_steps)
    engine.lane = lane
    saved: list[int] = []
    with pytest.raises(TrainingError, match=r"step 7 is nan.*memory row") as raised:
        train_loop(engine, source, plan, CONFIG, on_checkpoint=lambda state: saved.append(state.steps))
    assert saved == []
    epoch, place = plan.training.locate(named - 1)
    lanes = [lane] if lane >= 0 else range(CONFIG.lanes)
    cells = [int(cell) for each in lanes for cell in plan.training.epoch(epoch).micro_batch(place, each)]
    assert raised.value.where == f"step {named}"
    assert ", ".join(f"memory row {cell}" for cell in cells[:3]) in raised.value.what


def test_a_gradient_that_is_no_number_stops_before_a_checkpoint(source: MemoryCells) -> None:
    plan = RunPlan.of(CONFIG, source)
    engine = engine_for(source, plan)
    engine.gradient_norm = lambda: float("inf")  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="gradient of step 4 has the norm inf"):
        train_loop(engine, source, plan, CONFIG)


def test_utilisation_is_model_flops_over_the_peak(source: MemoryCells, tmp_path: Path) -> None:
    encoder = CONFIG.encoder.for_vocabulary(source.vocabulary)
    peak = 1e12
    result, rows = run(source, tmp_path, utilisation=Utilisation(encoder=encoder, peak_flops_per_s=peak))
    training = RunPlan.of(CONFIG, source).training
    lengths = [
        source.lengths[training.epoch(epoch).step_cells(step)]
        for epoch, step in (training.locate(done) for done in range(25))
    ]
    tokens, squares = sum(int(n.sum()) for n in lengths), sum(int((n**2).sum()) for n in lengths)
    masked = sum(int(RunPlan.of(CONFIG, source).masking.counts(n).sum()) for n in lengths)
    forward = (
        tokens * (8 * 32**2 + 4 * 32 * 64) + 4 * 32 * squares + masked * (2 * 32**2 + 2 * 32 * encoder.vocabulary_size)
    )
    assert result.mfu == pytest.approx(3 * forward / (result.seconds * peak), rel=1e-9)
    assert len(curve(rows, "mfu")) == len(curve(rows, "tokens_per_s"))


def test_a_budget_below_the_longest_cell_is_refused(source: MemoryCells) -> None:
    with pytest.raises(SettingsError, match="token_budget"):
        RunPlan.of(PretrainConfig(token_budget=5), source)
